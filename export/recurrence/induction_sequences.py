"""Steps that compute with their number: the numbers as a sequence outside the loop, of which each step reads one.

    x[:, t] / (t + 1)        arange(iterations) + 1 ─▶ n      div(x[t], n[t])
    h * 0.9 ** (L - 1 - t)   0.9 ** (L - 1 - arange(iterations)) ─▶ p      mul(h, p[t])

The operator takes a tensor where it took a number: `pow(x, 3)` becomes `pow(x, tensor)`. Integers stay int64 as long as
possible, and their ratios are divided in the type that the step computes in, so that an engine without float64 computes
them just as exactly. Powers, roots and functions are computed in float64 and rounded once: in float32, `0.999 ** t`
loses a digit in a hundred steps, and `1 - 0.999 ** t` three in the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moe_export.export.recurrence.closed_form import Applied, ClosedForm, Line, OfLength, Power, Ratio
from moe_export.export.recurrence.form import Form
from moe_export.export.recurrence.loop import InductionVariable, Series, Step
from moe_export.export.recurrence.operand import atoms, operator_name
from moe_export.export.torch_compat.operators import arguments_of

aten = torch.ops.aten

COUNT = "count of iterations"  # in the metadata of the node that counts the iterations of a loop

_FUNCTIONS = {
    "cos": aten.cos.default, "sin": aten.sin.default, "exp": aten.exp.default, "log": aten.log.default,
}  # fmt: skip
_NUMBER = ("number", "Optional[number]")
_TENSOR = ("Tensor", "Optional[Tensor]")
# Operators that make a tensor from a number, and the argument that holds the number.
_FILLING = {
    aten.full.default: "fill_value",
    aten.new_full.default: "fill_value",
    aten.full_like.default: "fill_value",
    aten.scalar_tensor.default: "s",
}


def counts(argument: Any) -> bool:
    """Whether an operand is a number that changes from iteration to iteration, or with the length by a closed form."""
    return isinstance(argument, (InductionVariable, Series, Ratio, Power, Applied, OfLength))


_SUMS = (aten.add.Tensor, aten.sub.Tensor)
# Arithmetic that computes with a number in float32 even if its tensors are in half precision.
_WIDE = (*_SUMS, aten.mul.Tensor, aten.div.Tensor)


@dataclass(frozen=True)
class _Taking:
    """How a step is called with tensors in the place of numbers.

    Attributes:
        target: The operator's overload that takes tensors there.
        arguments: Its arguments by name.
        tensors: Which of them have to be tensors instead of numbers.
    """

    target: Any
    arguments: Mapping[str, Any]
    tensors: frozenset[str]


def why_not(step: Step, node: fx.Node) -> str | None:
    """Why a step cannot read its numbers from a sequence; None if it can.

    Args:
        step: A step with an operand that `counts`.
        node: The step in one iteration of the trace.
    """
    name = operator_name(node.target)
    if _taking(step) is None:
        return f"the number of the step is an argument of {name} that must be the same in every step"
    dtype = number_type(node, step)
    numbers = [leaf for leaf in atoms((step.args, step.kwargs)) if counts(leaf)]
    if not dtype.is_floating_point and not all(isinstance(number, InductionVariable) for number in numbers):
        return f"{name} takes an integer that does not change by the same amount in every step"
    return None


def _taking(step: Step) -> _Taking | None:
    arguments = arguments_of(step.target)
    named = dict(zip((argument.name for argument in arguments), step.args, strict=False)) | step.kwargs
    counting = {name for name, value in named.items() if any(counts(leaf) for leaf in atoms(value))}
    if any(not counts(named[name]) for name in counting):
        return None  # inside a list, such as sizes, which no tensor can stand for
    if step.target in _FILLING:
        return _Taking(step.target, named, frozenset()) if counting == {_FILLING[step.target]} else None
    if step.target in _SUMS and counting == {"alpha"}:
        return _Taking(step.target, named, frozenset())
    types = {argument.name: str(argument.type) for argument in arguments}
    packet = step.target.overloadpacket
    for target in (step.target, *(getattr(packet, name) for name in packet.overloads())):
        others = {argument.name: str(argument.type) for argument in arguments_of(target)}
        if list(others) != list(types) or any(others[name] not in _TENSOR for name in counting):
            continue
        changed = {name for name in types if types[name] != others[name]}
        if all(types[name] in _NUMBER and others[name] in _TENSOR for name in changed):
            return _Taking(target, named, frozenset(name for name in changed if named.get(name) is not None))
    return None


def number_type(node: fx.Node, step: Step) -> torch.dtype:
    """The dtype that a step computes in, to which its numbers are rounded."""
    dtype: torch.dtype = node.meta["val"].dtype
    if node.target in _FILLING:
        return dtype
    values = [source.meta.get("val") for source in node.all_input_nodes]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if dtype == torch.bool:
        integers = all(
            isinstance(leaf, InductionVariable) for leaf in atoms((step.args, step.kwargs)) if counts(leaf)
        )
        return torch.result_type(torch.empty(1, dtype=tensors[0].dtype), 1 if integers else 1.0)
    if node.target in _WIDE and any(tensor.dim() for tensor in tensors):
        return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    return dtype


def write_step(
    call: Callable[..., fx.Node], step: Step, node: fx.Node, operand: Callable[[Any], Any], element: Any
) -> fx.Node:
    """Write a step that computes with its number.

    Args:
        call: Writes one node of the body.
        step: The step, one that `why_not` has no objection to.
        node: The step in one iteration of the trace.
        operand: Writes an operand that does not count (`counts`).
        element: From a number that counts and a dtype, gives the node of its value in the iteration.
    """
    taking = _taking(step)
    assert taking is not None
    dtype = number_type(node, step)
    values = {
        name: element(value, dtype) if counts(value) else operand(value)
        for name, value in taking.arguments.items()
    }
    if taking.target in _FILLING:
        number = values[_FILLING[taking.target]]
        if taking.target is aten.scalar_tensor.default:
            return call(aten.clone.default, number)
        if taking.target is aten.full_like.default:
            return call(aten.add.Tensor, call(aten.zeros_like.default, values["self"], dtype=dtype), number)
        return call(aten.expand.default, number, values["size"])
    if taking.target in _SUMS and counts(taking.arguments.get("alpha")):
        return call(taking.target, values["self"], call(aten.mul.Tensor, values["other"], values["alpha"]))
    for name in taking.tensors:
        if not isinstance(values[name], fx.Node):
            values[name] = call(aten.scalar_tensor.default, values[name], dtype=dtype)
    schema = arguments_of(taking.target)
    positional = [argument.name for argument in schema if not argument.kwarg_only and argument.name in values]
    return call(
        taking.target,
        *(values[name] for name in positional),
        **{name: value for name, value in values.items() if name not in positional},
    )


class InductionSequences:
    """Writes numbers that change from iteration to iteration as sequences with one entry per iteration.

    Args:
        call: Writes one node outside of the loop.
        number: From an integer or a `Form`, gives the integer or the node that computes it.
        iterations: The number of iterations, an integer or a `Form`.
    """

    def __init__(self, call: Callable[..., fx.Node], number: Callable[[Any], Any], iterations: Any) -> None:
        self._call, self._number, self._iterations = call, number, iterations
        self._known: dict[Any, fx.Node] = {}

    def sequence(self, number: InductionVariable | ClosedForm, dtype: torch.dtype) -> fx.Node:
        """The numbers of all iterations: (iterations,) of this dtype."""
        if isinstance(number, InductionVariable):
            return self._as(self._integers(self._number(number.first), number.step), dtype)
        if isinstance(number, Ratio) and number.scale == 1:
            wide = torch.promote_types(dtype, torch.float32)
            return self._as(self._ratio(number, wide), dtype)
        return self._as(self._in_float64(number), dtype)

    def scalar(self, number: OfLength, dtype: torch.dtype) -> fx.Node:
        """A number that depends on the length only: () of this dtype. `iterations` has to be 1."""
        return self._call(aten.select.int, self.sequence(number.closed_form, dtype), 0, 0)

    def _as(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return self._once("as", node, dtype, lambda: self._call(aten.to.dtype, node, dtype))

    def _once(self, *key: Any) -> fx.Node:
        *name, made = key
        if tuple(name) not in self._known:
            self._known[tuple(name)] = made()
        return self._known[tuple(name)]

    def _count(self) -> fx.Node:
        node = self._call(
            aten.arange.default, self._number(self._iterations), dtype=torch.int64, device="cpu"
        )
        node.meta[COUNT] = True
        return node

    def _integers(self, first: Any, step: int) -> fx.Node:
        node = self._once("count", self._count)
        if step != 1:
            count = node
            node = self._once("times", step, lambda: self._call(aten.mul.Tensor, count, step))
        if first != 0:
            steps = node
            node = self._once("from", step, first, lambda: self._call(aten.add.Tensor, steps, first))
        return node

    def _line(self, line: Line, dtype: torch.dtype, least: int | None = None) -> Any:
        """A line of this dtype: a sequence, or one number if it is the same in every iteration.

        A length below `least` counts as `least`.
        """
        rest: Any = Form(line.length, line.rest) if line.length else line.rest
        number = self._number(rest)
        if least is not None and line.length:
            limit = torch.sym_max if line.length > 0 else torch.sym_min
            number = self._once("limit", rest, least, lambda: self._call(limit, number, rest.at(least)))
        return self._as(self._integers(number, line.iteration), dtype) if line.iteration else number

    def _ratio(self, ratio: Ratio, dtype: torch.dtype) -> fx.Node:
        above, below = ratio.numerator, ratio.denominator
        least = None
        if not below.iteration and below.length > 0 and below.length + below.rest == 0:
            least = 2  # t / (L - 1) is 0 / 0 at length 1; a model that runs there writes max(L - 1, 1)
        node, under = self._line(above, dtype, least), self._line(below, dtype, least)
        if not above.iteration:
            node = self._call(aten.mul.Tensor, self._as(self._integers(1, 0), dtype), node)
        if under != 1:
            node = self._call(aten.div.Tensor, node, under)
        return node if ratio.scale == 1 else self._call(aten.mul.Tensor, node, self._exactly(ratio.scale))

    def _in_float64(self, closed_form: ClosedForm) -> fx.Node:
        if isinstance(closed_form, Ratio):
            return self._ratio(closed_form, torch.float64)
        if isinstance(closed_form, Power):
            exponent = self._line(closed_form.exponent, torch.float64)
            node = self._power(closed_form.base, exponent)
        elif isinstance(closed_form.function, str):
            node = self._call(_FUNCTIONS[closed_form.function], self._in_float64(closed_form.inner))
        else:
            node = self._call(
                aten.pow.Tensor_Scalar, self._in_float64(closed_form.inner), closed_form.function
            )
        if closed_form.scale != 1:
            node = self._call(aten.mul.Tensor, node, self._exactly(closed_form.scale))
        return (
            self._call(aten.add.Tensor, node, self._exactly(closed_form.shift)) if closed_form.shift else node
        )

    def _exactly(self, value: float) -> Any:
        """A float64, written as the quotient of two integers, because the exporter writes Python floats as float32.

        The number itself if float32 holds it exactly, or if the integers are too large.
        """
        above, below = value.as_integer_ratio()
        if abs(above) < 2**24 or abs(above) >= 2**63 or below >= 2**126:
            return value
        node = self._call(aten.scalar_tensor.default, above, dtype=torch.int64)
        node = self._call(aten.to.dtype, node, torch.float64)
        return node if below == 1 else self._call(aten.div.Tensor, node, float(below))

    def _power(self, base: float, exponent: fx.Node) -> fx.Node:
        exact = self._exactly(base)
        if not isinstance(exact, fx.Node):
            exact = self._call(aten.scalar_tensor.default, base, dtype=torch.float64)
        return self._call(aten.pow.Tensor_Tensor, exact, exponent)
