"""One level of a graph, the graph itself or a body, opened so that any value can be read or replaced.

A body is run by itself: the values that it captures become inputs. So the inside of a Scan, a Loop or an If, nested
ones included, is searched in the same way as the graph around it, one iteration at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import onnx

from moe_export.verify.bodies import reads
from moe_export.verify.specs import Array, numpy_dtype

Value: TypeAlias = "Array | list[Array]"
"""A tensor, or a sequence of tensors."""
Engine: TypeAlias = "Callable[[onnx.ModelProto, Mapping[str, Value], str], Sequence[Value]]"
"""Runs a model whose outputs need no types: the model, its inputs, how far it is optimised → the outputs, in order."""

LEVELS = ("none", "basic", "extended", "all")
"""How far onnxruntime optimises a graph."""
OWN = "own::"
"""What a computed value is called where the reference's has taken its name."""
_FATAL = 4


@dataclass(frozen=True)
class Cut:
    """One or a few nodes as a model of their own, with inputs and expected outputs."""

    model: onnx.ModelProto
    inputs: Mapping[str, Value]
    expected: Mapping[str, Value]


@dataclass(frozen=True)
class Level:
    """A graph of a model, and the outer values that it can see.

    Args:
        model: Its opsets, its functions.
        graph: The model's graph, or a body in it.
        outside: Initializers of the graphs around it, by name: constants that belong to the model.
        engine: What runs it; None for onnxruntime.
    """

    model: onnx.ModelProto
    graph: onnx.GraphProto
    outside: Mapping[str, onnx.TensorProto]
    engine: Engine | None = None

    @classmethod
    def of(cls, model: onnx.ModelProto, engine: Engine | None = None) -> Level:
        """The level of a model's own graph."""
        return cls(model, model.graph, {}, engine)

    def body(self, name: str, node: onnx.NodeProto) -> Level:
        """The level of a body of one of its nodes, by the attribute's name."""
        graph = next(attribute.g for attribute in node.attribute if attribute.name == name)
        return Level(self.model, graph, {**self.outside, **self.constants}, self.engine)

    @cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        """The graph's initializers by name."""
        return {tensor.name: tensor for tensor in self.graph.initializer}

    @cached_property
    def producer(self) -> dict[str, int]:
        """Which node computes a value: its place in the graph."""
        return {
            name: place for place, node in enumerate(self.graph.node) for name in node.output if name != ""
        }

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs; an initializer that is listed as one, as old files do, is none."""
        return tuple(value.name for value in self.graph.input if value.name not in self.constants)

    def constant(self, name: str) -> onnx.TensorProto | None:
        """An initializer that the graph can see."""
        found = self.constants.get(name)
        return self.outside.get(name) if found is None else found

    def read(self, names: Sequence[str], feeds: Mapping[str, Value], level: str = "none") -> dict[str, Value]:
        """Run the graph and read these of its values.

        Args:
            names: Values that nodes compute, inputs or constants.
            feeds: The inputs, and for a body what it takes from outside.
            level: How far onnxruntime optimises.

        Raises:
            Exception: onnxruntime refuses the graph, or fails.
        """
        wanted = [name for name in names if name in self.producer]
        found = self._run(wanted, feeds, frozenset(), level)
        for name in names:
            if name not in found:
                tensor = self.constant(name)
                found[name] = feeds[name] if tensor is None else onnx.numpy_helper.to_array(tensor)
        return found

    def own(self, names: Sequence[str], known: Mapping[str, Value], level: str = "none") -> dict[str, Value]:
        """Compute values, each from the known ones nearest above it, all in one session.

        Args:
            names: The values.
            known: Values that stand in place of the computed ones wherever they are read; the inputs are among them.
            level: How far onnxruntime optimises.

        Raises:
            Exception: onnxruntime refuses the graph, or fails.
        """
        return self._run(list(names), known, frozenset(known) & self.producer.keys(), level)

    def cut(self, name: str, known: Mapping[str, Value]) -> Cut | None:
        """What computes a value from the known ones nearest above it, as a model; None for what has no type."""
        try:
            made = self.part([name], known, frozenset(known) & self.producer.keys())
            output = name if all(value.name != name for value in made.graph.input) else f"{name}_again"
            for node in made.graph.node:
                node.output[:] = [
                    output if given == OWN + name else given.removeprefix(OWN) for given in node.output
                ]
            del made.graph.output[:]
            made.graph.output.append(value_info(output, known[name]))
        except ValueError:
            return None
        inputs = {value.name: known[value.name] for value in made.graph.input}
        return Cut(made, inputs, {output: known[name]})

    def needed(self, names: Collection[str], known: Collection[str]) -> tuple[list[int], set[str]]:
        """The nodes that compute `names` from `known` values, in order; and the names that these nodes read."""
        stack = [self.producer[name] for name in names]
        places: set[int] = set()
        read: set[str] = set()
        while stack:
            place = stack.pop()
            if place in places:
                continue
            places.add(place)
            for name in reads(self.graph.node[place]):
                read.add(name)
                if name in self.producer and name not in known:
                    stack.append(self.producer[name])
        return sorted(places), read

    def part(
        self, names: Sequence[str], feeds: Mapping[str, Value], replaced: Collection[str]
    ) -> onnx.ModelProto:
        """A model that computes `names` from `feeds`; of the values in `replaced`, those fed are read."""
        places, read = self.needed(names, replaced)
        nodes = []
        for place in places:
            node = onnx.NodeProto()
            node.CopyFrom(self.graph.node[place])
            for index, name in enumerate(node.output):
                if name in replaced:
                    node.output[index] = OWN + name
            nodes.append(node)
        computed = {name for node in nodes for name in node.output}
        outer = sorted(name for name in read if name and name not in computed)
        constants = [
            tensor for name in outer if (tensor := self.constant(name)) is not None and name not in replaced
        ]
        held = {tensor.name for tensor in constants}
        inputs = [value_info(name, feeds[name]) for name in outer if name not in held]
        outputs = [
            onnx.ValueInfoProto(name=OWN + name if name in replaced else name)
            for name in dict.fromkeys(names)
        ]
        made = onnx.ModelProto()
        made.ir_version = self.model.ir_version
        made.opset_import.extend(self.model.opset_import)
        made.functions.extend(self.model.functions)
        made.graph.name = self.graph.name or "part"
        made.graph.node.extend(nodes)
        made.graph.initializer.extend(constants)
        made.graph.input.extend(inputs)
        made.graph.output.extend(outputs)
        return made

    def _run(
        self, names: Sequence[str], feeds: Mapping[str, Value], replaced: Collection[str], level: str
    ) -> dict[str, Value]:
        if not names:
            return {}
        names = list(dict.fromkeys(names))
        made = self.part(names, feeds, replaced)
        taken = {value.name: feeds[value.name] for value in made.graph.input}
        arrays = (self.engine or run_model)(made, taken, level)
        return dict(zip(names, arrays, strict=True))


def value_info(name: str, value: Value) -> onnx.ValueInfoProto:
    """The type of a value that is at hand: a tensor with its sizes, or a sequence.

    Raises:
        ValueError: A sequence without elements, which says nothing of its type.
    """
    if not isinstance(value, list):
        return onnx.helper.make_tensor_value_info(name, _element(value), value.shape)
    if not value:
        raise ValueError(f"the sequence {name} is empty")
    tensor = onnx.helper.make_tensor_type_proto(_element(value[0]), None)
    return onnx.helper.make_value_info(name, onnx.helper.make_sequence_type_proto(tensor))


def _element(array: Array) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


def run_model(model: onnx.ModelProto, feeds: Mapping[str, Value], level: str = "none") -> list[Value]:
    """Run a model on onnxruntime's CPU, optimised as far as `level` says.

    Raises:
        Exception: onnxruntime refuses the model, or fails.
    """
    return Session(model, level).run(feeds)


class Session:
    """A model in onnxruntime, on the CPU.

    Args:
        model: The model; outputs need no types.
        level: One of `LEVELS`.
        saved: Where onnxruntime writes the optimised graph, if anywhere.
    """

    def __init__(self, model: onnx.ModelProto, level: str = "none", saved: str | None = None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        known = ort.GraphOptimizationLevel
        options.graph_optimization_level = {
            "none": known.ORT_DISABLE_ALL,
            "basic": known.ORT_ENABLE_BASIC,
            "extended": known.ORT_ENABLE_EXTENDED,
            "all": known.ORT_ENABLE_ALL,
        }[level]
        if saved is not None:
            options.optimized_model_filepath = saved
        ort.set_default_logger_severity(_FATAL)
        self._session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._quiet = ort.RunOptions()
        self._quiet.log_severity_level = _FATAL
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._sequences = [output.type.startswith("seq") for output in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Value]) -> list[Value]:
        """The outputs, in the model's order."""
        if any(isinstance(value, list) for value in feeds.values()) or any(self._sequences):
            return list(self._session.run(self._outputs, dict(feeds), self._quiet))
        given = {name: _to_ort(value) for name, value in feeds.items()}
        found = self._session.run_with_ort_values(self._outputs, given, self._quiet)
        return [_from_ort(value) for value in found]


def _to_ort(array: Any) -> Any:
    import onnxruntime as ort

    contiguous = np.ascontiguousarray(array).reshape(np.shape(array))  # or () becomes (1,)
    if contiguous.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(contiguous)
    bits = contiguous.view(f"uint{8 * contiguous.dtype.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _element(contiguous))


def _from_ort(value: Any) -> Array:
    element = value.element_type()
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    if dtype.isbuiltin == 1:
        return np.array(value.numpy())
    kind, shape = numpy_dtype(dtype.name), tuple(value.shape())
    size = int(np.prod(shape)) * kind.itemsize
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(raw, dtype=kind).reshape(shape).copy()
