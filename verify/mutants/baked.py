"""Mutants with a baked answer: a constant from one run in place of a computation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx

from moe_export.verify.localise.level import Level, Value
from moe_export.verify.localise.reference import sequence_values
from moe_export.verify.mutants.mutant import Change, Mutant, name_of
from moe_export.verify.specs import Array

_MOST = 2**20


def baked_mutants(model: onnx.ModelProto, example: Mapping[str, Value]) -> Iterator[Mutant]:
    """A mutant for each node that depends on the inputs: the graph's own nodes, not those of bodies.

    Args:
        model: The graph.
        example: The inputs of the run.

    Raises:
        Exception: onnxruntime refuses the graph, or fails.
    """
    level = Level.of(model)
    values = run_values(model, example)
    for index, node in enumerate(model.graph.node):
        names = [name for name in node.output if name]
        if (
            any(name not in values or values[name].nbytes > _MOST for name in names)
            or node.op_type == "Constant"
        ):
            continue
        if not _depends(level, names, set(example)):
            continue
        arrays = {name: values[name] for name in names}
        what = f"{', '.join(names)} as the example has {'it' if len(names) == 1 else 'them'}"
        yield Mutant("constant", name_of(node), what, _bake(index, arrays))


def run_values(model: onnx.ModelProto, example: Mapping[str, Value]) -> dict[str, Array]:
    """Every value of a graph that is a tensor, of one run."""
    level = Level.of(model)
    names = [name for name in level.producer if name not in sequence_values(level)]
    found = level.read(names, example)
    return {name: value for name, value in found.items() if not isinstance(value, list)}


def _depends(level: Level, names: list[str], inputs: set[str]) -> bool:
    _, read = level.needed(names, ())
    return bool(read & inputs)


def _bake(index: int, arrays: Mapping[str, Array]) -> Change:
    def change(model: onnx.ModelProto) -> None:
        del model.graph.node[index]
        for place, (name, array) in enumerate(arrays.items()):
            # A node, not an initializer: an output of the graph can be one.
            tensor = onnx.numpy_helper.from_array(array, f"{name}_baked")
            model.graph.node.insert(
                place, onnx.helper.make_node("Constant", [], [name], f"baked_{name}", value=tensor)
            )

    return change
