"""The lines of PyTorch for one call in somebody's source: on their operands, each of which is evaluated once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import libcst as cst

from moe_export.einsum_rewrite.codemod_call import EinsumCall, UnknownError
from moe_export.einsum_rewrite.codemod_dots import writings
from moe_export.einsum_rewrite.codemod_proof import prove_lines
from moe_export.einsum_rewrite.notation import ELLIPSIS
from moe_export.einsum_rewrite.planner import plan_einsum
from moe_export.einsum_rewrite.python_source import to_python
from moe_export.errors import EquationError

ELLIPSIS_RANKS = (1, 2, 3)
"""How many dimensions an ellipsis may stand for; lines that differ among these are not written."""

_OPERAND = re.compile(r"operand_(\d+)_")
_PLAIN = (cst.Name, cst.Integer, cst.Float)
_ATOMS = (cst.Name, cst.Attribute, cst.Subscript, cst.Call, cst.Integer, cst.Float)


@dataclass(frozen=True)
class Lines:
    """Code for a call.

    Attributes:
        before: Assignments that come first, as `name = expression`.
        expression: What takes the place of the call.
    """

    before: tuple[str, ...]
    expression: str


def lines_for(call: EinsumCall, taken: set[str]) -> Lines:
    """Write the lines that replace a call.

    Args:
        call: The call.
        taken: Names that the file uses; those that are made up here are added.

    Raises:
        UnknownError: The lines depend on the number of dimensions that an ellipsis stands for.
    """
    template = _template(call)
    found = [int(number) for number in _OPERAND.findall("\n".join(template))]
    names, before = _operand_names(call.operands, found, taken)
    lines = [_OPERAND.sub(lambda match: names[int(match[1])], line) for line in template]
    renamed = _rename_temporaries(lines, taken)
    return Lines((*before, *renamed[:-1]), renamed[-1])


def _template(call: EinsumCall) -> list[str]:
    """The lines with `operand_0_`, `operand_1_` for the operands; the same for every rank of an ellipsis."""
    names = [f"operand_{index}_" for index in range(len(call.operands))]
    found: dict[str, None] = {}
    for ranks in _ellipsis_ranks(call):
        try:
            plan = plan_einsum(call.equation, *shapes_for(call, ranks), target="torch")
        except EquationError as error:
            raise UnknownError(f"its equation cannot be planned: {error.what}") from error
        found[to_python(plan, names, result="", from_end=any(ranks))] = None
    written = list(found) if len(found) == 1 else []
    if any(ELLIPSIS in term for term in call.equation.inputs):
        return _proved(call, names, itertools.chain(written, writings(call.equation, names))).split("\n")
    prove_lines(call.equation, names, written[0])
    return written[0].split("\n")


def _proved(call: EinsumCall, names: Sequence[str], codes: Iterable[str]) -> str:
    """The first of several writings that holds for every rank of the ellipsis."""
    for code in codes:
        try:
            prove_lines(call.equation, names, code)
        except UnknownError:
            continue
        return code
    raise UnknownError("its lines would depend on how many dimensions the ellipsis stands for")


def shapes_for(call: EinsumCall, ranks: Sequence[int]) -> list[tuple[str | None, ...]]:
    """The operands' shapes in labels, with nothing known of what an ellipsis stands for."""
    return [
        tuple(size for label in term for size in ([None] * rank if label == ELLIPSIS else [label]))
        for term, rank in zip(call.equation.inputs, ranks, strict=True)
    ]


def _ellipsis_ranks(call: EinsumCall) -> list[tuple[int, ...]]:
    """Numbers of dimensions to write the lines for; the proof then tries unequal numbers too."""
    has = [ELLIPSIS in term for term in call.equation.inputs]
    if not any(has):
        return [(0,) * len(has)]
    return [tuple(rank if dots else 0 for dots in has) for rank in ELLIPSIS_RANKS]


def _operand_names(
    operands: Sequence[cst.BaseExpression], found: Sequence[int], taken: set[str]
) -> tuple[dict[int, str], list[str]]:
    """How each operand is written; one that is no plain name and is used twice, or out of turn, gets a name first."""
    module = cst.Module([])
    codes = [module.code_for_node(operand) for operand in operands]
    acts = [_may_act(operand) for operand in operands]
    first_uses = list(dict.fromkeys(found))
    in_turn = first_uses == sorted(first_uses) and len(first_uses) == len(operands)
    named = [
        not isinstance(operand, _PLAIN) and (found.count(index) != 1 or (acts[index] and not in_turn))
        for index, operand in enumerate(operands)
    ]
    last = max((index for index, name in enumerate(named) if name and acts[index]), default=-1)
    names: dict[int, str] = {}
    before = []
    for index, (operand, code) in enumerate(zip(operands, codes, strict=True)):
        if named[index] or (acts[index] and index < last):  # what ran before a named operand still does
            names[index] = fresh_name("operand", taken)
            before.append(f"{names[index]} = {code}")
        else:
            names[index] = code if isinstance(operand, _ATOMS) or operand.lpar else f"({code})"
    return names, before


def _may_act(node: cst.CSTNode) -> bool:
    """Whether evaluating an expression may do something: then it must not move past another one."""
    if isinstance(node, (cst.Call, cst.Await, cst.Yield, cst.NamedExpr)):
        return True
    return any(_may_act(child) for child in node.children)


def _rename_temporaries(lines: Sequence[str], taken: set[str]) -> list[str]:
    """`t1`, `t2` of the writer → names that the file does not use."""
    names = {
        match[1]: fresh_name("product", taken)
        for line in lines[:-1]
        if (match := re.match(r"(t\d+) = ", line)) is not None
    }
    return [re.sub(r"\bt\d+\b", lambda match: names.get(match[0], match[0]), line) for line in lines]


def fresh_name(stem: str, taken: set[str]) -> str:
    """A name that is not taken: `product`, `product_2`, ..."""
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}_{number}"
        if name not in taken:
            taken.add(name)
            return name
    raise AssertionError("unreachable")
