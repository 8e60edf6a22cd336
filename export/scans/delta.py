"""`read_delta`: a linear recurrence, or a delta rule, whose step first reads what the state holds for its key.

    r  = sum over n of k (a h)                 what the decayed state holds for the key
    h' = a h + rate * k * (v - r)              the value is stored in its place
    y  = sum over n of q h'

Such a step is linear in the state, but its state is computed from what was read from it. Recognised as papers' code
writes it: with the difference (`h + k * rate * (v - r)`, `h - rate * k * (r - v)`), or multiplied out
(`h - rate k r + rate k v`).

What is no delta rule may still be fed with what it reads, under any keys (`Fed`; RWKV-7, arXiv:2503.14456):

    h' = a h + b (sum over n of c h) + k v

Source of the rule: arXiv:2406.06484 (delta), arXiv:2412.06464 (gated).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import onnx_ir as ir

from moe_export.errors import RefusedError
from moe_export.export.scans.linear import Fed, Linear, LinearState, Reader
from moe_export.export.scans.loop_region import LoopRegion
from moe_export.export.scans.terms import Factor, Reading, Seen, axes_of, broadcast

_Product = tuple[Factor, ...]
_MINUS = Factor(ir.Value(name="minus"), ())


def read_delta(loop: LoopRegion, fed: bool = False) -> Linear:
    """Read a loop whose states are linear recurrences or delta rules.

    Args:
        loop: The loop.
        fed: Whether states may also be fed with what is read from them in any other way (`Fed`).

    Raises:
        RefusedError: One is neither; says why.
    """
    return _DeltaReader(loop, fed).read()


class _DeltaReader(Reader):
    """A `Reader` that also takes states that are computed from what was read from them."""

    def __init__(self, loop: LoopRegion, fed: bool) -> None:
        super().__init__(loop)
        self._fed_too = fed

    def read(self) -> Linear:
        linear = super().read()
        _only_through([reading.value for reading in linear.readings], self.loop)
        return linear

    def whole(self, value: ir.Value) -> bool:
        return any(reading.value is value for reading in self.readings)

    def mixed(self, node: ir.Node) -> Seen:
        """`a h + k * rate * (v - r)`: adds a product that was computed from what was read."""
        state, other, place = self.seen(node)
        if node.op_type not in ("Add", "Sub") or (node.op_type == "Sub" and place):
            raise RefusedError(f"{node.op_type} mixes a state with what was read from one")
        sign = (_MINUS,) if node.op_type == "Sub" else ()
        return replace(state, terms=(*state.terms, (*sign, *self.factors(other, state.axes))))

    def state(self, number: int, shape: tuple[int | ir.SymbolicDim, ...]) -> LinearState:
        found = self.next.get(number)
        terms = found.terms if found is not None else ()
        computed = [term for term in terms if self._computed(term)]
        if found is None or not computed:
            return super().state(number, shape)
        readings = list(self.readings)
        try:
            return self._delta(number, shape, found)
        except RefusedError:
            if not self._fed_too:
                raise
            self.readings = readings
            return self._fed(number, shape, found)

    def _delta(self, number: int, shape: tuple[int | ir.SymbolicDim, ...], found: Seen) -> LinearState:
        """The recurrence of a delta rule.

        Raises:
            RefusedError: It is none.
        """
        terms = found.terms
        computed = [term for term in terms if self._computed(term)]
        if len(computed) > 1 or len(terms) > 2:
            raise RefusedError("a step adds several products to its state")
        corrected, reading, held, stored = self._parts(
            computed[0], [term for term in terms if term not in computed]
        )
        self.readings.remove(reading)
        if reading.new or reading.terms or reading.state != number:
            raise RefusedError("what a delta rule subtracts is not read from the state before the step")
        over = self.over(number)
        if reading.over != over:
            raise RefusedError("a state is read over different axes")
        read = (*reading.factors, *held)
        key = tuple(factor for factor in corrected if factor.axes & over)
        if _without([factor for factor in read if factor.axes & over], key) != _without(
            [factor for factor in found.scale if factor.axes & over], ()
        ):
            raise RefusedError("a delta rule stores under another key than it reads")
        flat = [factor for factor in (*corrected, *read) if not factor.axes & over]
        rate = _without(flat, [factor for factor in found.scale if not factor.axes & over])
        value = _without(stored, (*key, *rate))
        made = self.made(number, shape, found.scale, key, value, rate)
        if axes_of(rate) & set(made.only) or axes_of(value) & over:
            raise RefusedError("the rate of a delta rule differs along the state that it corrects")
        return made

    def _fed(self, number: int, shape: tuple[int | ir.SymbolicDim, ...], found: Seen) -> LinearState:
        """`h' = a h + row (read h) + k v`, whatever is read and stored under.

        Raises:
            RefusedError: It is none.
        """
        terms = [part for term in found.terms for part in self._multiplied_out(term)]
        computed = [term for term in terms if self._computed(term)]
        stored = [term for term in terms if not self._computed(term)]
        if len(computed) != 1 or len(stored) != 1:
            raise RefusedError("a step adds several products to its state")
        products = self._computed(computed[0])
        if len(products) > 1:
            raise RefusedError("a step multiplies what it reads by what it reads")
        reading, held = self._reading(products[0])
        self.readings.remove(reading)
        if reading.new or reading.terms or reading.state != number:
            raise RefusedError("what a step stores again is not read from the state before it")
        over = self.over(number)
        if reading.over != over:
            raise RefusedError("a state is read over different axes")
        if stored[0].count(_MINUS) % 2:
            raise RefusedError("a step subtracts from its state what it does not read")
        again = tuple(one for one in computed[0] if one is not products[0] and one != _MINUS)
        fed = Fed((*reading.factors, *held), again, computed[0].count(_MINUS) % 2 == 1)
        row = tuple(factor for factor in stored[0] if factor.axes & over)
        column = tuple(one for one in stored[0] if not one.axes & over and one != _MINUS)
        made = self.made(number, shape, found.scale, row, column, None, fed)
        if axes_of(held) & (over | set(made.only)):
            raise RefusedError("what is read differs along the state that it is stored in")
        return made

    def _multiplied_out(self, term: _Product) -> list[_Product]:
        """A product as a sum of products: `k (v - r)` is `k v - k r`."""
        for factor in self._computed(term):
            node = factor.value.producer()
            if node is not None and node.op_type in ("Add", "Sub") and not self.whole(factor.value):
                rest = tuple(one for one in term if one is not factor)
                first, second = (self.split(broadcast(operand, factor.labels)) for operand in node.inputs)
                if node.op_type == "Sub":
                    second = (*second, _MINUS)
                return [
                    product for part in (first, second) for product in self._multiplied_out((*rest, *part))
                ]
        return [term]

    def _computed(self, product: Iterable[Factor]) -> list[Factor]:
        """The factors that were computed from what was read."""
        return [factor for factor in product if factor.value in self.dependent]

    def _parts(self, term: _Product, others: list[_Product]) -> tuple[_Product, Reading, _Product, _Product]:
        """Take apart what a delta rule adds.

        Args:
            term: The product that was computed from what was read.
            others: What else the step adds: nothing, or `rate k v` of a rule that is multiplied out.

        Returns:
            What the reading is multiplied by after it was subtracted (`rate k`); the reading; the factors that it was
            multiplied by before (`a`); the product that is stored (`rate k v`).
        """
        computed = self._computed(term)
        if len(computed) > 1:
            raise RefusedError("a step multiplies what it reads by what it reads")
        minus = term.count(_MINUS) % 2 == 1
        rest = tuple(factor for factor in term if factor not in (*computed, _MINUS))
        (difference,) = computed
        if others:  # multiplied out
            if not minus or _MINUS in others[0]:
                raise RefusedError("what a delta rule reads is not subtracted")
            reading, held = self._reading(difference)
            return rest, reading, held, others[0]
        node = difference.value.producer()
        if node is None or node.op_type != "Sub":
            raise RefusedError("what a delta rule reads is not subtracted")
        operands = [broadcast(operand, difference.labels) for operand in node.inputs]
        place = next((at for at, one in enumerate(operands) if one.value in self.dependent), 1)
        if (place == 0) != minus:
            raise RefusedError("what a delta rule reads is not subtracted")
        reading, held = self._reading(operands[place])
        value = self.split(operands[1 - place])
        if self._computed(value):
            raise RefusedError("a step subtracts what it reads from what it reads")
        return rest, reading, held, (*rest, *value)

    def _reading(self, factor: Factor) -> tuple[Reading, _Product]:
        """The one reading in a product, and the other factors."""
        parts = self.split(factor)
        found = [
            (part, reading) for part in parts for reading in self.readings if reading.value is part.value
        ]
        if len(found) != 1:
            raise RefusedError("a state is computed from what was read from one")
        part, reading = found[0]
        others = tuple(other for other in parts if other is not part)
        shape = self.loop.states[reading.state].outputs[0].shape or ()
        axes = (axis[0] if len(axis) == 1 and shape[axis[0]] != 1 else None for axis in reading.axes)
        if part.labels != tuple(axes):
            raise RefusedError("what is read is stored along other axes")
        if self._computed(others):
            raise RefusedError("a step multiplies what it reads by what it reads")
        return reading, others


def _without(product: Iterable[Factor], part: Iterable[Factor]) -> _Product:
    """The factors of a product without those of `part`, which has to be contained in it."""
    left, gone = Counter(product), Counter(part)
    if gone - left:
        raise RefusedError(
            "a delta rule stores under another key than it reads, or forgets after it has read"
        )
    return tuple((left - gone).elements())


def _only_through(values: Iterable[ir.Value], loop: LoopRegion) -> None:
    """Make sure that what a loop collects depends on its states only through these values."""
    boundaries, known = {boundary.outputs[0] for boundary in loop.states}, set(values)
    stack = list(loop.collected)
    while stack:
        value = stack.pop()
        if value in boundaries:
            raise RefusedError("what a delta rule subtracts is returned, too")
        node = value.producer()
        if value not in known and node is not None and node in loop.body:
            known.add(value)
            stack += [one for one in node.inputs if one is not None]
