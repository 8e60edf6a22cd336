"""Each node's error where Netron shows it: in a copy of the graph, or as an attachment to the graph itself.

A click on a node of the copy shows its own error, by what factor that exceeds rounding, and the inherited error,
under "Metadata". The attachment, a file that is dropped on Netron while it shows the graph, puts the same
under "Metrics".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from moe_export.own_files import KEY
from moe_export.verify.bodies import all_nodes
from moe_export.verify.localise.search import Localisation, NodeError

SCHEMA = "moe-export/errors/1"
OWN, RATIO, INHERITED, FAULTY = "own error", "own error / rounding", "inherited error", "faulty node"


def facts(error: NodeError) -> dict[str, str]:
    """What is shown for a node."""
    shown = {OWN: error.reason or f"{error.own:.3g}", RATIO: f"{error.ratio:.3g}"}
    return shown if math.isnan(error.whole) else {**shown, INHERITED: f"{error.inherited:.3g}"}


def with_errors(model: onnx.ModelProto, localisation: Localisation) -> onnx.ModelProto:
    """A copy of the graph whose nodes carry their errors; the faulty one says so."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    worst = _worst(localisation)
    for node in all_nodes(copy.graph):
        error = next((worst[name] for name in node.output if name in worst), None)
        if error is not None:
            _put(node, facts(error))
        if localisation.faulty is not None and localisation.faulty.value in node.output:
            _put(node, {**facts(localisation.faulty), FAULTY: str(localisation.faulty)})
    return copy


def attachment(localisation: Localisation) -> dict[str, Any]:
    """The same as a file for Netron, `{"signature": "netron:attachment", ...}`; only nodes that have names."""
    errors = {error.node: error for error in _worst(localisation).values()}
    if localisation.faulty is not None:
        errors[localisation.faulty.node] = localisation.faulty
    metrics = [
        {"kind": "node", "target": node, "name": name, "value": value, "type": "attribute"}
        for node, error in errors.items()
        for name, value in facts(error).items()
    ]
    return {"signature": "netron:attachment", "schema": SCHEMA, "metrics": metrics}


def write_overlay(
    folder: Path, model: onnx.ModelProto, localisation: Localisation, stem: str = "model"
) -> list[Path]:
    """Write `model.errors.onnx` and `model.errors.json`.

    Args:
        folder: Where to.
        model: The graph that is wrong.
        localisation: The result of the search in it.
        stem: What the files are called.
    """
    graph, attached = folder / f"{stem}.errors.onnx", folder / f"{stem}.errors.json"
    copy = with_errors(model, localisation)
    copy.metadata_props.add(key=f"{KEY}errors", value=stem)
    onnx.save(copy, graph)
    attached.write_text(json.dumps(attachment(localisation), indent=1) + "\n", encoding="utf-8")
    return [graph, attached]


def _worst(localisation: Localisation) -> dict[str, NodeError]:
    """The errors by value; of a node with several values, all have the worst."""
    by_node: dict[str, NodeError] = {}
    for error in localisation.nodes:
        if error.node not in by_node or error.ratio > by_node[error.node].ratio:
            by_node[error.node] = error
    return {error.value: by_node[error.node] for error in localisation.nodes}


def _put(node: onnx.NodeProto, shown: Mapping[str, str]) -> None:
    kept = [(entry.key, entry.value) for entry in node.metadata_props if entry.key not in shown]
    del node.metadata_props[:]
    for key, value in (*kept, *shown.items()):
        node.metadata_props.add(key=key, value=value)
