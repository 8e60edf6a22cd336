"""`moe-export rewrite`: an ONNX file, a Python file, or one equation, told apart by the suffix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from moe_export.commands.console import Console
from moe_export.einsum_rewrite import plan_einsum
from moe_export.einsum_rewrite.binding import Size, symbolic_shapes
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.notation import deduce
from moe_export.einsum_rewrite.planner import make_plan
from moe_export.einsum_rewrite.python_source import to_python
from moe_export.errors import UsageError
from moe_export.options.memory import parse_bytes
from moe_export.options.sizes import parse_one_set
from moe_export.options.table import options_of

_KINDS = {".onnx": "Of an ONNX file", ".py": "Of a Python file"}


def run_rewrite(
    source: str,
    output: str | None,
    sizes: tuple[str, ...],
    target: str,
    keep_einsum: bool,
    max_intermediate: str | None,
    prove: bool,
    diff: bool,
    in_place: bool,
    check: bool,
    console: Console,
    force: bool = False,
    alone: bool = True,
) -> int:
    """Run the command on one source; the exit code. Beside others, it is not `alone`."""
    suffix = PurePath(source).suffix
    limit = None if max_intermediate is None else parse_bytes(max_intermediate, "--max-intermediate")
    if suffix == ".onnx":
        from moe_export.commands.rewrite_onnx import run_rewrite_onnx
        from moe_export.einsum_rewrite.onnx_model import Options

        options = Options(target=target, keep_einsum=keep_einsum, max_intermediate=limit)
        return run_rewrite_onnx(source, output, options, prove, force, console)
    if suffix == ".py":
        from moe_export.commands.rewrite_python import run_rewrite_python

        return run_rewrite_python(source, output, diff, in_place, check, force, console, alone)
    return _run_equation(source, sizes, target, console)


def check_kind(source: str, given: Mapping[str, Any]) -> None:
    """Refuse an option of another kind of source, which would have no effect.

    Raises:
        UsageError: There is one.
    """
    kind = _KINDS.get(PurePath(source).suffix, "Of an equation")
    for option in options_of("rewrite"):
        other = option.group.startswith("Of ") and option.group != kind
        if other and given[option.name] != option.unset:
            raise UsageError(f"{option.word} is {option.group[0].lower()}{option.group[1:]}, not of {source}")


def _run_equation(text: str, sizes: Sequence[str], target: str, console: Console) -> int:
    from moe_export.einsum_rewrite.explain import explain
    from moe_export.einsum_rewrite.onnx_text import to_onnx_text

    equation = Equation.parse(text, deduce(text, None))
    operands = _operands(equation, parse_one_set(sizes))
    plan = plan_einsum(equation, *operands, target=target)
    told = explain(plan.equation, operands, target)
    code = to_python(make_plan(plan.equation, operands, target="torch"))
    nodes = to_onnx_text(plan.equation, operands, "onnx" if target == "torch" else target)
    for part in (plan, told, f"torch\n{_indented(code)}", f"ONNX\n{_indented(nodes)}"):
        console.say(f"{part}\n")
    console.json(
        json.dumps(
            {"equation": text, "plan": str(plan), "why": told.why, "python": code, "onnx": nodes}, indent=2
        )
    )
    return 0


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _operands(equation: Equation, sizes: Mapping[str, int]) -> list[list[Size]]:
    """The shapes of an equation's operands, where some labels have sizes and the others are symbols.

    Raises:
        UsageError: There is no such label.
    """
    shapes = symbolic_shapes(equation)
    labels = list(dict.fromkeys(label for shape in shapes for label in shape))
    for name in sizes:
        if name not in labels:
            raise UsageError(
                f"--size {name}: no label {name!r} in the equation",
                hint=f"the labels: {', '.join(map(str, labels))}",
            )
    return [[sizes.get(str(label), label) for label in shape] for shape in shapes]
