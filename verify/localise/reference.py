"""The expected values of a graph: those of another graph, or values computed elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx

from moe_export.verify.localise.level import Level, Value, run_model

_MAKES_SEQUENCES = {
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceInsert",
    "SequenceErase",
    "SplitToSequence",
}
_PASSES_ON = {"Identity", "Loop", "If"}
_SHAPE = "shape::"


class ReferenceValues(Protocol):
    """Right values, by the names that the graph in question gives them."""

    @property
    def names(self) -> Collection[str]:
        """The values that are known."""
        ...

    @property
    def exact(self) -> bool:
        """Whether a right node repeats them to the bit: they come from the same kernels."""
        ...

    @property
    def level(self) -> Level | None:
        """The graph that they are values of, node for node, if there is one; bodies are followed in it."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Bytes of each value; a name may be missing."""
        ...

    def values(self, names: Sequence[str]) -> dict[str, Value]:
        """These values; names that are not known are left out."""
        ...


@dataclass(frozen=True)
class GivenValues:
    """Values that were computed elsewhere, such as those of a PyTorch program.

    Args:
        given: By the names of the graph in question.
    """

    given: Mapping[str, Value]
    exact: bool = False
    level: Level | None = None

    @property
    def names(self) -> Collection[str]:
        """The values that are known."""
        return self.given.keys()

    def sizes(self) -> Mapping[str, int]:
        """Empty: the values are in memory already, so parts would save nothing."""
        return {}

    def values(self, names: Sequence[str]) -> dict[str, Value]:
        """These values."""
        return {name: self.given[name] for name in names if name in self.given}


class GraphValues:
    """The values of a graph that is right, computed by onnxruntime without any optimisation.

    Args:
        model: The graph.
        inputs: Its inputs, by name.
    """

    exact = True

    def __init__(self, model: onnx.ModelProto, inputs: Mapping[str, Value]) -> None:
        self.level = Level.of(model)
        self._inputs = inputs
        self.names: Collection[str] = {*self.level.producer, *inputs}

    def sizes(self) -> Mapping[str, int]:
        """Bytes of each value, from a run that keeps nothing but their shapes; 0 for sequences.

        Raises:
            Exception: onnxruntime refuses the graph, or fails.
        """
        sequences = sequence_values(self.level)
        names = [name for name in self.level.producer if name not in sequences]
        made = self.level.part(names, self._inputs, ())
        del made.graph.output[:]
        for name in names:
            made.graph.node.append(onnx.helper.make_node("Shape", [name], [_SHAPE + name]))
            made.graph.output.append(onnx.ValueInfoProto(name=_SHAPE + name))
        feeds = {value.name: self._inputs[value.name] for value in made.graph.input}
        shapes = run_model(made, feeds)
        return {name: 8 * int(np.prod(shape)) for name, shape in zip(names, shapes, strict=True)}

    def values(self, names: Sequence[str]) -> dict[str, Value]:
        """These values, in one run.

        Raises:
            Exception: onnxruntime refuses the graph, or fails.
        """
        known = [name for name in names if name in self.names or self.level.constant(name) is not None]
        return self.level.read(known, self._inputs)


def sequence_values(level: Level) -> set[str]:
    """Values of a graph that are sequences, not tensors."""
    found: set[str] = set()
    for node in level.graph.node:
        carried = node.op_type in _PASSES_ON and any(name in found for name in node.input)
        if node.op_type in _MAKES_SEQUENCES or carried:
            # Of a Loop that carries one, any output may be one: what is carried comes first, in the inputs' order.
            offset = 2 if node.op_type == "Loop" else 0
            found |= {
                name
                for place, name in enumerate(node.output)
                if node.op_type in _MAKES_SEQUENCES
                or (place + offset < len(node.input) and node.input[place + offset] in found)
            }
    return found
