"""The manifest of the ranks, `MODEL.parallel.json`, for whoever runs their graphs. docs/parallel.md has its fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

import onnx_ir as ir

from moe_export.export.onnx.provenance import BLOCK, relative_line
from moe_export.export.parallel.ranks import Ranks
from moe_export.export.parallel.stages import Exchange, Spec, Staged
from moe_export.export.pipeline import Graph

SCHEMA: Final = "moe-export/parallel/1"


class DimEntry(TypedDict):
    """A free dimension: its size in the example, and the sizes for which the graph is right (null: any)."""

    name: str
    traced: int
    minimum: int
    maximum: int | None


class FormEntry(TypedDict):
    """The form of a value: a string in its shape is a dimension or an expression of some, null depends on the data."""

    dtype: str
    shape: list[int | str | None]


class ValueEntry(FormEntry):
    """An input or an output."""

    name: str


class LayerEntry(TypedDict):
    """A block of experts, and the rank of each."""

    module: str
    line: str | None
    experts: int
    slots: int
    placement: list[int]


class SentEntry(FormEntry):
    """What a rank sends."""

    bytes_per_row: int


class ExchangeEntry(TypedDict):
    """Values that the ranks exchange behind a stage."""

    kind: str
    layer: int
    after: int
    back: bool
    capacity: int | None
    values: list[SentEntry]


class RankExchangeEntry(TypedDict):
    """The same by the names of values in the graphs of one rank."""

    sends: list[str]
    gives: list[str]
    counts: str | None
    counted: str | None


class TensorEntry(TypedDict):
    """A weight of a rank; of `experts`, or on `all` ranks."""

    name: str
    stage: int
    of: Literal["experts", "all"]
    dtype: str
    shape: list[int]
    bytes: int


class RankEntry(TypedDict):
    """The graphs of one rank."""

    rank: int
    experts: list[list[int]]
    stages: list[str]
    exchanges: list[RankExchangeEntry]
    bytes: int
    expert_bytes: int
    tensors: list[TensorEntry]


class Facts(TypedDict):
    """What a manifest says of this tool and of the graphs' target."""

    version: str
    opset: int
    target: str


class ManifestDocument(Facts):
    """The graphs of all ranks, and what they exchange: `MODEL.parallel.json`."""

    schema: Literal["moe-export/parallel/1"]
    source: str
    ranks: int
    exchange: str
    capacity: int | None
    collectives: str
    whole: str | None
    example: str | None
    inputs: list[ValueEntry]
    outputs: list[ValueEntry]
    dims: list[DimEntry]
    layers: list[LayerEntry]
    exchanges: list[ExchangeEntry]
    graphs: list[RankEntry]


def file_name(stem: str, rank: int, stage: int) -> str:
    """`model.rank0.stage1.onnx`."""
    return f"{stem}.rank{rank}.stage{stage}.onnx"


def manifest(
    graph: Graph, ranks: Ranks, whole: str | None, example: str | None, facts: Facts
) -> ManifestDocument:
    """The manifest as plain data.

    Args:
        graph: The whole model's.
        ranks: The graphs of the ranks.
        whole: The file of the whole model's graph, to compare with.
        example: The file of example inputs.
        facts: `version` of this tool, `opset`, `target`.
    """
    source, parallel = graph.reference.source, ranks.parallel
    first = ranks.staged[0]
    return {
        "schema": SCHEMA,
        **facts,
        "source": source.name,
        "ranks": parallel.ranks,
        "exchange": parallel.exchange,
        "capacity": parallel.capacity,
        "collectives": parallel.collectives,
        "whole": whole,
        "example": example,
        "inputs": [_value(str(value.name), _spec(value)) for value in graph.model.graph.inputs],
        "outputs": [_value(str(value.name), _spec(value)) for value in graph.model.graph.outputs],
        "dims": [
            {"name": dim.name, "traced": dim.traced, "minimum": dim.minimum, "maximum": dim.maximum}
            for dim in graph.traced.dims
        ],
        "layers": [
            {
                "module": layer.module,
                "line": relative_line(layer.line, source.parent) if layer.line else None,
                "experts": layer.experts,
                "slots": slots,
                "placement": list(placed),
            }
            for layer, slots, placed in zip(ranks.layers, ranks.slots, ranks.placement.layers, strict=True)
        ],
        "exchanges": [_exchange(exchange, first.specs) for exchange in first.exchanges],
        "graphs": [_rank(rank, staged, ranks, source) for rank, staged in enumerate(ranks.staged)],
    }


def _rank(rank: int, staged: Staged, ranks: Ranks, source: Path) -> RankEntry:
    tensors = [tensor for stage, model in enumerate(staged.stages) for tensor in _tensors(stage, model)]
    return {
        "rank": rank,
        "experts": [list(ranks.placement.experts_of(layer, rank)) for layer in range(len(ranks.layers))],
        "stages": [file_name(source.stem, rank, stage) for stage in range(len(staged.stages))],
        "exchanges": [
            {
                "sends": list(exchange.sends),
                "gives": list(exchange.gives),
                "counts": exchange.counts,
                "counted": exchange.counted,
            }
            for exchange in staged.exchanges
        ],
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "expert_bytes": sum(tensor["bytes"] for tensor in tensors if tensor["of"] == "experts"),
        "tensors": tensors,
    }


def _tensors(stage: int, model: ir.Model) -> Iterable[TensorEntry]:
    """The weights of a stage: a tensor that only nodes of experts read is theirs, any other stands on every rank."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is not None:
                readers.setdefault(value, []).append(node)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        marks = [node.metadata_props.get(BLOCK, "") for node in readers.get(value, [])]
        yield {
            "name": str(value.name),
            "stage": stage,
            "of": "experts" if marks and all(mark.startswith("experts:") for mark in marks) else "all",
            "dtype": value.const_value.dtype.name.lower(),
            "shape": [int(size) for size in value.const_value.shape],  # type: ignore[arg-type]
            "bytes": int(value.const_value.nbytes),
        }


def _exchange(exchange: Exchange, specs: Mapping[str, Spec]) -> ExchangeEntry:
    return {
        "kind": exchange.kind,
        "layer": exchange.layer,
        "after": exchange.after,
        "back": exchange.back,
        "capacity": exchange.capacity,
        "values": [
            {**_form(specs[name]), "bytes_per_row": row_bytes(specs[name])} for name in exchange.sends
        ],
    }


def row_bytes(spec: Spec) -> int:
    """Bytes of one row of a value: of all axes but the first."""
    dtype, shape = spec
    return prod(size if isinstance(size, int) else 1 for size in shape[1:]) * dtype.bitwidth // 8


def _value(name: str, spec: Spec) -> ValueEntry:
    return {"name": name, **_form(spec)}


def _form(spec: Spec) -> FormEntry:
    dtype, shape = spec
    return {"dtype": numpy_name(dtype), "shape": list(shape)}


def numpy_name(dtype: ir.DataType) -> str:
    """What NumPy and ml_dtypes call a type."""
    return str(dtype.numpy())


def _spec(value: ir.Value) -> Spec:
    sizes: Sequence[Any] = tuple(value.shape or ())
    return value.dtype or ir.DataType.FLOAT, tuple(
        size if isinstance(size, int) else size.value for size in sizes
    )
