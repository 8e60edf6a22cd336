"""The plan: a short list of steps that computes an einsum without an `Einsum` operator.

It belongs to no framework. `torch_ops` runs it, `python_source` writes it down, and it prints itself:

    b l d_in, d_in n -> b l d_in n
          operand 0  b l d_in
          operand 1  d_in n
       1  unsqueeze  b l d_in 1  operand 0
       2  multiply   b l d_in n  step 1, operand 1
      result                (b, l, d_in, n)
      FLOPs                 b·d_in·l·n
      largest intermediate  b·d_in·l·n elements, 4 B × b·d_in·l·n in float32
      scaling               4
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moe_export.einsum_rewrite.amount import Amount, show_bytes
from moe_export.einsum_rewrite.binding import Size, show
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.layout import Axis, Layout, Permute, flat, show_layout
from moe_export.einsum_rewrite.steps import MatMul, Multiply, Step, Sum


@dataclass(frozen=True)
class Plan:
    """How to compute one equation for operands of given shapes.

    Values are numbered: the operands first, then the result of each step.

    Attributes:
        equation: What is computed.
        operands: The layout of each operand; an axis of size 1 that is broadcast has no label.
        output: The labels of the result, in order.
        label_sizes: Each label's size: a number, a name, or None.
        steps: What to do, in order.
        result: The number of the value that is the result.
    """

    equation: Equation
    operands: tuple[Layout, ...]
    output: Axis
    label_sizes: tuple[tuple[str, Size], ...]
    steps: tuple[Step, ...]
    result: int

    @cached_property
    def sizes(self) -> dict[str, Size]:
        """The size of each label."""
        return dict(self.label_sizes)

    def layout(self, value: int) -> Layout:
        """The layout of a value."""
        count = len(self.operands)
        return self.operands[value] if value < count else self.steps[value - count].layout

    @cached_property
    def size_sources(self) -> dict[str, tuple[int, int]]:
        """For each label an operand and its axis where the size can be read when the plan runs."""
        return {
            axis[0]: (operand, position)
            for operand, layout in reversed(list(enumerate(self.operands)))
            for position, axis in reversed(list(enumerate(layout)))
            if axis
        }

    @cached_property
    def last_uses(self) -> dict[int, int]:
        """For each value the step that uses it last, so that a runner can let go of it."""
        return {value: number for number, step in enumerate(self.steps) for value in step.inputs}

    @property
    def summary(self) -> str:
        """The kinds of steps, in order: `unsqueeze, multiply`."""
        return ", ".join(step.name for step in self.steps) or "nothing to do"

    @property
    def is_gemm(self) -> bool:
        """Whether all the arithmetic is one matrix product of two operands."""
        kinds = [type(step.action) for step in self.steps if step.computes]
        return len(self.operands) == 2 and kinds == [MatMul]

    @cached_property
    def flops(self) -> Amount:
        """Multiplications and additions."""
        total = Amount()
        for step in self.steps:
            total += self._step_flops(step)
        return total

    def _step_flops(self, step: Step) -> Amount:
        layouts = [self.layout(value) for value in step.inputs]
        if isinstance(step.action, Multiply):
            return self._elements(step.layout)
        if isinstance(step.action, Sum):
            return self._elements(layouts[0])
        if isinstance(step.action, MatMul):
            labels = dict.fromkeys(flat(layouts[0]) + flat(layouts[1]))
            return Amount.product(labels, self.sizes, times=2)
        return Amount()

    @cached_property
    def largest(self) -> Amount:
        """Elements of the largest value that a step makes (operands do not count, the result does)."""
        made = [step.layout for step in self.steps] or [self.layout(self.result)]
        return max((self._elements(layout) for layout in made), key=lambda amount: amount.at({}, 32))

    @cached_property
    def moved(self) -> Amount:
        """Elements that are read or written by the steps that pass over memory."""
        total = Amount()
        for step in self.steps:
            if step.computes or isinstance(step.action, Permute):
                for layout in (*(self.layout(value) for value in step.inputs), step.layout):
                    total += self._elements(layout)
        return total

    @property
    def scaling(self) -> int:
        """How many labels meet in the step that does most: the exponent with which work grows."""
        degrees = [
            len(frozenset(label for value in step.inputs for label in flat(self.layout(value))))
            for step in self.steps
        ]
        return max(degrees, default=len(self.output))

    def _elements(self, layout: Layout) -> Amount:
        return Amount.product(flat(layout), self.sizes)

    def __str__(self) -> str:
        rows = [(f"operand {k}", show_layout(layout), "") for k, layout in enumerate(self.operands)]
        rows += [
            (step.name, show_layout(step.layout), ", ".join(map(self._name, step.inputs)))
            for step in self.steps
        ]
        wide = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
        lines = [str(self.equation)]
        for number, (kind, layout, inputs) in enumerate(rows, 1 - len(self.operands)):
            line = f"  {number if number > 0 else '':>2}  {kind:<{wide[0]}}  {layout:<{wide[1]}}  {inputs}"
            lines.append(line.rstrip())
        lines += [f"  {name:<22}{text}" for name, text in self._facts()]
        return "\n".join(lines)

    def _name(self, value: int) -> str:
        count = len(self.operands)
        return f"operand {value}" if value < count else f"step {value - count + 1}"

    def _facts(self) -> list[tuple[str, str]]:
        size = show_bytes(self.largest, 4)
        return [
            ("result", show([self.sizes[label] for label in self.output])),
            ("FLOPs", str(self.flops)),
            ("largest intermediate", f"{self.largest} elements, {size} in float32"),
            ("scaling", f"{self.scaling}"),
        ]
