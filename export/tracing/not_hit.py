"""What a model's code does for an expert that no token chose, read off the statement that asks.

    if mask.any(): out[mask] += ...            nothing: such an expert may be traced as if it had tokens
    if rows.numel() == 0: continue             nothing
    if rows.numel() == 0: break                it leaves the loop
    if rows.numel(): ... else: out = out + 1   something else

A trace sees one way only, so this is not in it.
"""

from __future__ import annotations

import ast
import linecache
import os
from collections.abc import Iterator
from functools import lru_cache
from types import FrameType

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.source import is_library_model
from moe_export.export.torch_compat import frames as torch_compat


def asking_frame() -> FrameType | None:
    """The frame of the model's code that asks for the truth of a value right now; None where PyTorch does."""
    return torch_compat.asking_frame(is_library_model)


def place_of(frame: FrameType) -> str:
    """`file:line` that a frame is at."""
    return f"{os.path.abspath(frame.f_code.co_filename)}:{frame.f_lineno}"


def require_nothing(frame: FrameType, hit: bool) -> None:
    """Make sure that the statement at hand does nothing for an expert without tokens.

    Args:
        frame: Where the question is asked.
        hit: The answer for an expert with tokens; `if not ...` turns it round.

    Raises:
        NotExportableError: It leaves the loop, or computes something.
    """
    for statement in _asking(frame):
        turned = _is_turned(statement.test)
        for each in statement.orelse if hit is not turned else statement.body:
            if isinstance(each, (ast.Break, ast.Return)):
                _refuse(frame, "leaves the loop at an expert without tokens")
            if isinstance(each, (ast.Assign, ast.AugAssign)):
                _refuse(frame, "computes something for an expert without tokens")


def _is_turned(test: ast.expr) -> bool:
    """Whether a condition is the contrary of what is asked: `not ...`, `e not in indices`."""
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.NotIn)
    return isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)


def writes_by_its_mask(frame: FrameType) -> bool:
    """Whether the statement that asks for `mask.any()` does nothing but write by that mask: `x[mask] = 0`, and print.

    Where the mask is empty nothing is written, so it is right to write always. The mask may be written out twice:
    `if torch.isnan(x).any(): x[torch.isnan(x)] = 0`.
    """
    statements = list(_asking(frame))
    for statement in statements:
        mask = _mask_of(statement.test)
        if mask is None or statement.orelse:
            return False
        if not all(_writes_by(each, ast.dump(mask)) or _only_says(each) for each in statement.body):
            return False
    return bool(statements)


def _mask_of(test: ast.expr) -> ast.expr | None:
    """The E of `E.any()`, `torch.any(E)` and `bool(...)` of these."""
    if not isinstance(test, ast.Call) or test.keywords:
        return None
    if isinstance(test.func, ast.Name) and test.func.id == "bool" and len(test.args) == 1:
        return _mask_of(test.args[0])
    if not isinstance(test.func, ast.Attribute) or test.func.attr != "any":
        return None
    if not test.args:
        return test.func.value
    of_torch = isinstance(test.func.value, ast.Name) and test.func.value.id == "torch"
    return test.args[0] if of_torch and len(test.args) == 1 else None


def _writes_by(statement: ast.stmt, mask: str) -> bool:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    elif isinstance(statement, ast.AugAssign):
        target = statement.target
    else:
        return False
    plain = not any(
        isinstance(each, (ast.Call, ast.NamedExpr, ast.Await, ast.Yield)) and not _is_number(each)
        for each in ast.walk(statement.value)
    )
    return plain and isinstance(target, ast.Subscript) and ast.dump(target.slice) == mask


def _is_number(node: ast.AST) -> bool:
    """`float("inf")`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("float", "int")


def _only_says(statement: ast.stmt) -> bool:
    """`print(...)` and `warnings.warn(...)`, of which a graph has nothing."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    return ast.unparse(statement.value.func) in ("print", "warnings.warn")


def refuse_number(frame: FrameType) -> None:
    """Refuse a question about how many tokens an expert has, other than whether it has any.

    Raises:
        NotExportableError: Always.
    """
    _refuse(frame, "asks how many tokens an expert has")


def _refuse(frame: FrameType, what: str) -> None:
    raise NotExportableError(
        f"a condition {what}, and a graph has all experts in it",
        code=Code.TOKEN_COUNT,
        where=place_of(frame),
        hint="compute it for every expert, and choose with torch.where or a mask",
    )


def _asking(frame: FrameType) -> Iterator[ast.If]:
    """The `if` whose condition stands on the line that runs."""
    for node in _ifs("".join(linecache.getlines(frame.f_code.co_filename))):
        if node.test.lineno <= frame.f_lineno <= (node.test.end_lineno or 0):
            yield node


@lru_cache(maxsize=16)  # a loop over experts asks once for each of them
def _ifs(source: str) -> tuple[ast.If, ...]:
    """The `if` statements of a file."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.If))
