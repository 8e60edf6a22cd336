"""What `verify` can compare: a model file, an ONNX graph, an engine or a golden file, each with the backend it runs on.

Parsing a command line imports nothing heavy; PyTorch is imported only for a model file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from moe_export.backends import BACKENDS, KINDS, ONNXRUNTIME, OPENVINO, Kind
from moe_export.errors import UsageError
from moe_export.verify import (
    Array,
    DimRange,
    OnnxRuntimeRunner,
    RoutingPair,
    Runner,
    TensorRtRunner,
    TensorSpec,
)
from moe_export.verify.inputs.graph_numbers import graph_numbers
from moe_export.verify.inputs.known import Known
from moe_export.verify.inputs.meaning import MOST_ASKED, Asked, Table, meanings_of
from moe_export.verify.reports.findings import PRECISION
from moe_export.verify.runners.onnx_reference_runner import OnnxReferenceRunner
from moe_export.verify.runners.onnxruntime_runner import specs_of
from moe_export.verify.runners.openvino_runner import OpenVinoRunner
from moe_export.verify.specs import is_float, numpy_dtype

GraphRunner: TypeAlias = OnnxRuntimeRunner | TensorRtRunner | OnnxReferenceRunner | OpenVinoRunner


@dataclass(frozen=True)
class Artifact:
    """One of the two artifacts of a comparison.

    Attributes:
        text: The path as the user wrote it, without the backend.
        kind: What it is, by the suffix of the file.
        backend: What runs it; None for the default.
    """

    text: str
    kind: Kind
    backend: str | None = None

    @property
    def path(self) -> Path:
        """The file; for a model it may still end in `:Class`."""
        return Path(self.text)

    @property
    def file(self) -> Path:
        """The file, without a `:Class` at its end."""
        head, _, tail = self.text.rpartition(":")
        return Path(head) if head and tail.isidentifier() else self.path

    @property
    def provider(self) -> str:
        """The device on which onnxruntime runs it: `cpu` or `cuda`."""
        return (self.backend or "").removeprefix("onnxruntime-") or "cpu"


def parse_artifact(text: str, backend: str | None = None) -> Artifact:
    """Parse `model.onnx`, or with a backend `model.onnx@onnxruntime-cuda`.

    Args:
        text: The file, as the user wrote it.
        backend: The backend to use if `text` names none.

    Raises:
        UsageError: There is no such backend for this kind of file.
    """
    head, mark, tail = text.rpartition("@")
    if mark and tail in {name for names in BACKENDS.values() for name in names}:
        text, backend = head, tail
    kind = KINDS.get(Path(text).suffix, "model")
    if backend is not None and backend not in BACKENDS[kind]:
        has = ", ".join(BACKENDS[kind]) or "no backend: its outputs are stored"
        raise UsageError(f"{backend} cannot run {text}, a {_NOUN[kind]}", hint=f"a {_NOUN[kind]} has {has}")
    if kind == "graph" and backend is None:
        backend = ONNXRUNTIME[0]
    return Artifact(text, kind, backend)


def parse_candidates(text: str, backends: str | None) -> tuple[Artifact, ...]:
    """An artifact on each of some backends, `onnxruntime-cpu,openvino`, or on its default one.

    Raises:
        UsageError: There is no such backend, or it cannot run this kind of file; or `text` names one, too.
    """
    if backends is None:
        return (parse_artifact(text),)
    known = [name for names in BACKENDS.values() for name in names]
    asked = tuple(dict.fromkeys(each.strip() for each in backends.split(",")))
    for name in asked:
        if name not in known:
            raise UsageError(f"there is no backend {name!r}", hint=f"use {', '.join(known)}")
    return tuple(parse_artifact(text, name) for name in asked)


def can_replay(artifact: Artifact) -> bool:
    """Whether what runs a graph can run it with given choices of experts, too (see `checking_replay`)."""
    return artifact.backend in (*ONNXRUNTIME, OPENVINO)


_NOUN: Mapping[Kind, str] = {
    "model": "model file",
    "graph": "graph",
    "engine": "serialized engine",
    "golden": "golden file",
}


def graph_runner(artifact: Artifact, dtype: str = "float32") -> GraphRunner:
    """A graph or an engine, ready to run.

    Args:
        artifact: The file, and what runs it.
        dtype: The narrowest type that the graph computes in: on onnxruntime's CPU, half precision runs in float32
            and is rounded.
    """
    if artifact.kind == "engine":
        from moe_export.running.engines import open_engine

        return open_engine(artifact.path, artifact.backend)
    if artifact.backend == "onnx-reference":
        return OnnxReferenceRunner(artifact.path)
    if artifact.backend == OpenVinoRunner.name:
        return OpenVinoRunner(artifact.path)
    from moe_export.running.choices import runner_of

    return runner_of(artifact.path, artifact.provider, dtype)


def running_type(path: Path, asked: str) -> str:
    """The narrowest type that a graph is run in: the one that the user named, else the one that it computes in.

    It decides how half precision is run where an engine has no kernels for it, never how the outputs are judged.
    """
    named = asked if asked != "float32" else metadata(path).get("moe_export.dtype", "float32")
    return named if named != "float32" else narrowest(path)


def narrowest(path: Path) -> str:
    """The narrowest type that a graph computes in, by its weights and casts: bfloat16, float16 or float32."""
    import onnx

    from moe_export.verify.bodies import all_graphs

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # running the file reports what is wrong with it
        return "float32"
    types: set[int] = set()
    for body in all_graphs(graph):
        types |= {tensor.data_type for tensor in body.initializer}
        types |= {attribute.i for node in body.node for attribute in node.attribute if attribute.name == "to"}
    named = {onnx.TensorProto.BFLOAT16: "bfloat16", onnx.TensorProto.FLOAT16: "float16"}
    return next((name for number, name in named.items() if number in types), "float32")


def metadata(path: Path) -> dict[str, str]:
    """A graph's metadata, such as `moe_export.kind`; for an engine, the metadata of the graph that it was built from.

    Empty if the graph cannot be found or read.
    """
    import onnx

    if path.suffix == ".engine":
        from moe_export.running.engines import graph_of

        graph = graph_of(path)
        return {} if graph is None else metadata(graph)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # running the file reports what is wrong with it
        return {}
    return {entry.key: entry.value for entry in model.metadata_props}


def graph_example(
    artifact: Artifact, runner: GraphRunner, facts: Mapping[str, str], seed: int
) -> tuple[dict[str, Array], list[DimRange]]:
    """Random inputs, and the free dimensions, for a graph that no model gives example inputs for.

    Floats are standard normal. Integers that index a table are drawn from its rows, other integers are 0 or 1, and
    bools are true; what decides the shapes of an engine has the values that it is fastest at. A free dimension is 2 as
    the first axis, else 10, within the bounds in the graph's metadata.
    """
    dims = list(runner.dims) if isinstance(runner, TensorRtRunner) else _dims(runner.inputs, facts)
    sizes = {dim.name: dim.traced for dim in dims}
    tables = table_sizes(artifact.path) if artifact.kind == "graph" else {}
    generator = np.random.default_rng(seed)
    example = {}
    for spec in runner.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        dtype = numpy_dtype(spec.dtype)
        if is_float(dtype):
            example[spec.name] = generator.standard_normal(shape).astype(dtype)
        elif dtype.kind == "b":
            example[spec.name] = np.ones(shape, dtype)
        else:
            example[spec.name] = generator.integers(0, tables.get(spec.name, 2), shape).astype(dtype)
    if isinstance(runner, TensorRtRunner):
        example |= {name: limits.best for name, limits in runner.profile.values.items()}
    return example, dims


def limits_of(runner: GraphRunner) -> Mapping[str, tuple[Array, Array]]:
    """The least and greatest values of the inputs that decide the shapes of an engine; a graph has none."""
    return runner.profile.limits if isinstance(runner, TensorRtRunner) else {}


def _dims(specs: Sequence[TensorSpec], facts: Mapping[str, str]) -> list[DimRange]:
    found: dict[str, DimRange] = {}
    for spec in specs:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and size not in found:
                low, _, high = facts.get(f"moe_export.dim.{size}", "1:").partition(":")
                dim = DimRange(size, 10, int(low or 1), int(high) if high else None)
                found[size] = replace(dim, traced=dim.clamp(10 if axis else 2))
    return list(found.values())


def table_sizes(path: Path) -> dict[str, int]:
    """Inputs that index a constant, directly or after a cast or reshape → the constant's size along that axis."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    rows = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    found: dict[str, int] = {}
    inputs = {value.name for value in graph.input}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "Gather" or not rows.get(node.input[0]):
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        size, index = rows[node.input[0]][axis], node.input[1]
        while index in makers and makers[index].op_type in _PASSING:
            index = makers[index].input[0]
        if index in inputs:
            found[index] = min(size, found.get(index, size))
    return found


def known_of_graph(
    runner: Runner, example: Mapping[str, Array], tables: Mapping[str, int], path: Path
) -> Known:
    """What is known about a reference that is a graph: which values its inputs accept.

    Args:
        runner: Runs the reference.
        example: Inputs of `graph_example`.
        tables: The number of rows of the table that an input indexes, by input name (see `table_sizes`).
        path: The ONNX file whose integer constants are worth trying as sizes and values.
    """
    rows = {name: Table(0, count - 1) for name, count in tables.items() if name in example}
    asked = Asked(runner.run, example, MOST_ASKED)
    return Known(meanings=meanings_of(asked, example, rows), numbers=graph_numbers(path))


_PASSING = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}


def graph_routing(path: Path) -> list[RoutingPair]:
    """Outputs of a graph that are the positions of a `TopK`, each with the one float output of the same shape.

    Engines return a `TopK`'s positions in any order, so they are compared as sets.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    outputs = specs_of(graph.output)
    chosen = [spec for spec in outputs if _is_positions(spec.name, makers)]
    pairs = []
    for spec in chosen:
        weights = [other.name for other in outputs if other.shape == spec.shape and other not in chosen]
        pairs.append(RoutingPair(spec.name, weights[0] if len(weights) == 1 else None))
    return pairs


def _is_positions(name: str, makers: Mapping[str, Any]) -> bool:
    node = makers.get(name)
    while node is not None and node.op_type in _PASSING:
        name = node.input[0]
        node = makers.get(name)
    return node is not None and node.op_type == "TopK" and name == node.output[1]


def about_precision(candidate: Artifact, judged: str) -> dict[str, str]:
    """A note for the report if a graph computes in a narrower type than it is judged by, and the option for it.

    The tolerance is never widened on the graph's own word: only `--dtype` does that.
    """
    narrow = narrowest(candidate.path) if candidate.kind == "graph" else "float32"
    if judged != "float32" or narrow == "float32":
        return {}
    return {
        PRECISION: f"the graph computes in {narrow}, and is judged by {judged}: "
        f"--dtype {narrow} judges it by what that loses"
    }


def about_artifacts(candidate: Artifact, reference: Artifact) -> dict[str, str]:
    """The names of the two artifacts, for the report."""
    return {"candidate": candidate.text, "reference": reference.text}
