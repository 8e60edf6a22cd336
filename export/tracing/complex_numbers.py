"""`without_complex`: a traced program in which every complex number is a pair of real ones, by one table of operators.

    before   z: c64[b, n] = mul(a, c)                                          y: f32[b, n] = abs(z)
    after    x = mul(ar, cr) - mul(ai, ci);  i = mul(ar, ci) + mul(ai, cr)     y = |(x, i)|

ONNX has complex types, and no runtime computes with them. So this is done as soon as a program is traced, and nothing
after it ever sees a complex number: loops over a complex state fold as loops over two real ones, and experts, gates
and ranks are found as in any other model.

    operators    `complex_arithmetic`, `complex_functions`, `complex_parts`, `fourier_rules`: operator → rule
    spectra      remember their signals, so that a product of two stays a convolution (`spectrum`)
    weights      `ssm.A` becomes `ssm.A.real` and `ssm.A.imag`
    the door     inputs and outputs of the model are pairs along a last axis by then (`frontend.subject`)

An operator without a rule is refused, by its name and its line. A program without complex numbers is returned as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from moe_export.export.axes.shapes import arguments
from moe_export.export.sizes import same_shape
from moe_export.export.tracing import (
    complex_arithmetic,
    complex_functions,
    complex_parts,
    fourier_rules,
    spectrum,
)
from moe_export.export.tracing.complex_writer import VIEWS, Pair, Writer, is_complex
from moe_export.export.tracing.programs import copied_module, with_module

_PLAIN: Mapping[Any, Any] = {
    **complex_arithmetic.RULES,
    **complex_functions.RULES,
    **complex_parts.RULES,
}
_RULES: Mapping[Any, Any] = {
    **_PLAIN,
    **{target: partial(spectrum.on_signals, _PLAIN[target], target) for target in spectrum.SIGNAL_RULES},
    **fourier_rules.RULES,
}
_OF_PARTS = {torch.ops.aten._neg_view.default, torch.ops.aten.resolve_neg.default, *fourier_rules.RULES}
"""Operators that may take and return real values: PyTorch's imaginary part of a conjugate, `irfft` of real ones."""
_ASSERTIONS = {torch.ops.aten._assert_tensor_metadata.default}
_PARTS = ("real", "imag")


def without_complex(program: ExportedProgram) -> ExportedProgram:
    """The program with pairs of real numbers in the place of complex ones.

    Args:
        program: In functional form, with the operators that the model calls or those that these are made of; it stays
            as it is.

    Raises:
        NotExportableError: An operator has no rule; names the model's line.
    """
    if not any(is_complex(node.meta.get("val")) or node.target in _OF_PARTS for node in program.graph.nodes):
        return program
    module = copied_module(program)
    pairs = _Pairs(module.graph)
    pairs.run()
    signature = copy.deepcopy(program.graph_signature)
    signature.input_specs[:] = [
        each for spec in signature.input_specs for each in _split(spec, pairs.inputs.get(spec.arg.name))
    ]
    signature.output_specs[:] = [
        each
        for spec in signature.output_specs
        for each in _split(spec, pairs.outputs.get(spec.arg.name) if spec.target else None)
    ]
    return with_module(
        program,
        module,
        keeps=fx.Node.is_impure,
        signature=signature,
        state_dict=_as_pairs(program.state_dict),
        constants=_as_pairs(program.constants),
    )


def _split(spec: Any, names: tuple[str, str] | None) -> Iterator[Any]:
    """What a program's signature says of a weight, for each of its parts."""
    if names is None:
        yield spec
        return
    for name, part in zip(names, _PARTS, strict=True):
        yield dataclasses.replace(
            spec, arg=dataclasses.replace(spec.arg, name=name), target=f"{spec.target}.{part}"
        )


def _as_pairs(tensors: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in tensors.items():
        if is_complex(value):
            for place, part in enumerate(_PARTS):
                found[f"{name}.{part}"] = _part_of(value, place)
        else:
            found[name] = value
    return found


def _part_of(tensor: torch.Tensor, place: int) -> torch.Tensor:
    part = torch.view_as_real(tensor.detach().resolve_conj()).select(-1, place).contiguous()
    return nn.Parameter(part, requires_grad=False) if isinstance(tensor, nn.Parameter) else part


class _Pairs:
    """One pass over a graph, in order.

    Args:
        graph: Changed.

    Attributes:
        inputs: By the name of a complex input: the names of its parts.
        outputs: Likewise of the values that it returns.
    """

    def __init__(self, graph: fx.Graph) -> None:
        values = (node.meta.get("val") for node in graph.nodes)
        mode: Any = next(
            getattr(value, "fake_mode", None) for value in values if isinstance(value, torch.Tensor)
        )
        self._graph = graph
        self._writer = Writer(graph, mode)
        self._pairs: dict[fx.Node, Pair] = {}
        self._laid_out_anew: set[fx.Node] = set()
        self.inputs: dict[str, tuple[str, str]] = {}
        self.outputs: dict[str, tuple[str, str]] = {}

    def run(self) -> None:
        inputs = [node for node in self._graph.nodes if node.op == "placeholder"]
        others = [node for node in self._graph.nodes if node.op != "placeholder"]
        self._writer.node = others[0]
        for node in inputs:
            if is_complex(node.meta.get("val")):
                self._weight(node)
        for node in others:
            self._writer.node = node
            if node.op == "output":
                node.args = (tuple(self._returned(node.args[0])),)
            elif self._is_concerned(node):
                self._rewrite(node)
            elif not self._laid_out_anew.isdisjoint(node.all_input_nodes):
                self._lay_out(node)
        for node in reversed(others):
            if node in self._pairs:
                self._graph.erase_node(node)

    def _is_concerned(self, node: fx.Node) -> bool:
        known = any(each in self._pairs for each in node.all_input_nodes)
        return known or is_complex(node.meta.get("val")) or node.target in _OF_PARTS

    def _weight(self, node: fx.Node) -> None:
        """Two placeholders for one of complex numbers."""
        name, found = node.name, node.meta["val"]
        with self._graph.inserting_after(node):
            imag = self._graph.placeholder(f"{name}_imag")
        parts = torch.view_as_real(found)
        imag.meta = {**node.meta, "val": parts.select(-1, 1).clone()}
        node.meta = {**node.meta, "val": parts.select(-1, 0).clone()}
        self._pairs[node] = Pair(node, imag)
        self.inputs[name] = name, imag.name

    def _returned(self, values: Any) -> Iterator[fx.Node]:
        """What the program returns, complex buffers that it writes to as two values."""
        for node in values:
            if node in self._pairs:
                parts = self._writer.whole(self._pairs[node])
                self.outputs[node.name] = parts[0].name, parts[1].name
                yield from parts
            else:
                yield node

    def _rewrite(self, node: fx.Node) -> None:
        if node.target in _ASSERTIONS:
            self._graph.erase_node(node)
            return
        rule = _RULES.get(node.target)
        if rule is None:
            self._writer.refuse()
        given: Any = self._pairs.get
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: given(each, each))
        found = rule(self._writer, *args, **kwargs)
        value: Any = node.meta.get("val")
        if is_complex(value):
            if not isinstance(found, Pair):
                found = Pair(found, None)
            known = isinstance(found, spectrum.Spectrum) or not isinstance(value, torch.Tensor)
            self._pairs[node] = found if known else self._writer.fitted(found, value)
            return
        if isinstance(found, Pair):  # a cast to a real type
            found = self._writer.cast(complex_parts.one_part(0, self._writer, found), value.dtype)
        self._note_layout(found, value)
        node.replace_all_uses_with(found)
        self._graph.erase_node(node)

    def _note_layout(self, node: fx.Node, before: Any) -> None:
        """Remember what has other strides than it had in the trace."""
        now = node.meta["val"]
        if isinstance(before, torch.Tensor) and not same_shape(now.stride(), before.stride()):
            self._laid_out_anew.add(node)

    def _lay_out(self, node: fx.Node) -> None:
        """Work out anew what is known of a real value whose operands are laid out otherwise."""
        if node.target in VIEWS:
            node.args = (self._writer.viewable(node.target, *arguments(node)), *node.args[1:])
        before, target = node.meta.get("val"), node.target
        assert callable(target)
        node.meta = {**node.meta, "val": self._writer.value_of(target, node.args, node.kwargs)}
        self._note_layout(node, before)
