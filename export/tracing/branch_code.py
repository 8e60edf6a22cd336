"""`converted`: a file's functions in which an `if` on a tensor runs both of its sides.

    if t:                  d = BOTH.begin(t, key, locals())
        y = a              if d.yes: y = a
    else:             →    if d.both: y, = d.turn(locals())           the names as they were before the `if`
        y = b              if d.no: y = b
                           if d.both: y, = d.merge(locals())          where(t, a, b)

    a if t else b          BOTH.choose(t, key, lambda: a, lambda: b)
    s and t, not t         BOTH.all_of(lambda: s, lambda: t), BOTH.negated(t)         in what such an `if` asks

What `t` is, is asked as it runs: where it is no tensor of a trace, `yes` and `no` are its truth, and one side runs.

An `if` is left as it is where a side does more than give values to local names: it assigns to an attribute or an
element, calls something for its effect, leaves a loop, or returns other than at the end. An early `return` is brought
into that form first: what follows becomes the other side. Line numbers stay.
"""

from __future__ import annotations

import ast
import copy
import linecache
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType

from moe_export.export.tracing import loop_code
from moe_export.export.tracing.syntax import (
    OURS,
    RESULT,
    Block,
    assigned,
    at,
    call,
    can_wait,
    given,
    local_names,
    names_of,
    of,
    waiting,
)


@dataclass(frozen=True)
class Converted:
    """The functions of a file.

    Attributes:
        codes: What they are compiled to, before and after.
        lines: The lines of each test that was converted.
    """

    codes: tuple[tuple[CodeType, CodeType], ...]
    lines: frozenset[int]


@cache
def converted(
    path: str, lines: frozenset[int] | None = None, apart: frozenset[int] = frozenset()
) -> Converted:
    """The functions of a file with their branches on tensors converted.

    Args:
        path: The file.
        lines: Where the tests are that ask tensors; None for wherever there is one.
        apart: First lines of tests that are not converted.
    """
    source = "".join(linecache.getlines(path))
    try:
        before = compile(source, path, "exec", dont_inherit=True)
        rewriting = _Rewriting(path, lines, apart)
        tree = ast.fix_missing_locations(rewriting.visit(ast.parse(source)))
        after = compile(tree, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return Converted((), frozenset())
    named = dict(_functions(after))
    found = ((code, named.get(place)) for place, code in _functions(before))
    codes = tuple((code, other) for code, other in found if other is not None and other != code)
    tests = ((test.lineno, test.end_lineno or test.lineno) for test in rewriting.converted)
    return Converted(codes, frozenset(line for first, last in tests for line in range(first, last + 1)))


def _functions(code: CodeType, inside: tuple[str, ...] = ()) -> Iterator[tuple[tuple[object, ...], CodeType]]:
    """Each function of a code by its place: the names around it, its own, its first line. Python 3.10 lacks
    `co_qualname`.
    """
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names = (*inside, constant.co_name)
            yield (*names, constant.co_firstlineno), constant
            yield from _functions(constant, names)


class _Rewriting(ast.NodeTransformer):
    """Converts the branches of a file."""

    def __init__(self, path: str, lines: Collection[int] | None, apart: Collection[int]) -> None:
        self._path, self._lines, self._apart = path, lines, apart
        self.converted: list[ast.expr] = []
        self._declared: set[str] = set()  # as of other functions or of the file

    def visit_Module(self, node: ast.Module) -> ast.AST:
        found = [each.names for each in ast.walk(node) if isinstance(each, (ast.Global, ast.Nonlocal))]
        self._declared = {name for names in found for name in names}
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        body = _with_one_return(node.body, self._is_wanted)
        if body is not None and not _is_generator(node):
            node.body = body
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        wanted = self._is_wanted(node) and not _takes(*node.body, *node.orelse)
        self.generic_visit(node)
        if not wanted or not (_assigns_only(node.body) and _assigns_only(node.orelse)):
            return node
        names = sorted(assigned([*node.body, *node.orelse]))
        if any(name in self._declared or name.startswith("__") for name in names):
            return node
        self.converted.append(node.test)
        return _both_sides(node, self._test(node.test), self._key(node.test), names, len(self.converted))

    def visit_While(self, node: ast.While) -> ast.AST | list[ast.stmt]:
        return self._loop(node)

    def visit_For(self, node: ast.For) -> ast.AST | list[ast.stmt]:
        return self._loop(node)

    def _loop(self, node: loop_code.Loop) -> ast.AST | list[ast.stmt]:
        asks = next(filter(self._asks, loop_code.asking(node)), None)
        waits = can_wait(node)  # before branches in it are converted
        self.generic_visit(node)
        if asks is None or not waits:
            return node
        if any(name in self._declared or name.startswith("__") for name in assigned([node])):
            return node
        made = loop_code.converted_loop(
            node,
            asks,
            self._key(asks),
            len(self.converted) + 1,
            question=self._test,
            assigns_only=_assigns_only,
        )
        if made is None:
            return node
        self.converted.append(asks)
        return made

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        wanted = self._is_wanted(node) and not _takes(node.body, node.orelse)
        self.generic_visit(node)
        if not wanted or not (can_wait(node.body) and can_wait(node.orelse)):
            return node
        self.converted.append(node.test)
        sides = [waiting(node.body), waiting(node.orelse)]
        made = call("choose", self._test(node.test), ast.Constant(self._key(node.test)), *sides)
        return at(made, node)

    def _is_wanted(self, node: ast.If | ast.IfExp) -> bool:
        return self._asks(node.test)

    def _asks(self, test: ast.expr) -> bool:
        """Whether an expression asks a tensor."""
        first, last = test.lineno, test.end_lineno or 0
        if first in self._apart or isinstance(test, ast.Constant):
            return False
        return self._lines is None or any(first <= line <= last for line in self._lines)

    def _key(self, test: ast.expr) -> str:
        return f"{self._path}:{test.lineno}"

    def _test(self, test: ast.expr) -> ast.expr:
        """What is asked, with `and`, `or`, `not` and `bool` as calls that may be given tensors."""
        made = test
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            made = call("negated", self._test(test.operand))
        elif isinstance(test, ast.BoolOp) and all(can_wait(part) for part in test.values):
            name = "all_of" if isinstance(test.op, ast.And) else "any_of"
            made = call(name, *(waiting(self._test(part)) for part in test.values))
        elif (
            isinstance(test, ast.Call)
            and isinstance(test.func, ast.Name)
            and test.func.id == "bool"
            and len(test.args) == 1
        ):
            return self._test(test.args[0])
        if made is not test:
            at(made, test)
        return made


def _both_sides(node: ast.If, test: ast.expr, key: str, names: Sequence[str], number: int) -> Block:
    decision = f"{OURS}{number}_"

    def taken(method: str) -> Block:
        return given(names, ast.Call(of(decision, method), [local_names()], []), decision)

    begun = call("begin", test, ast.Constant(key), names_of(names), local_names())
    made: Block = [
        ast.Assign([ast.Name(decision, ast.Store())], begun),
        ast.If(of(decision, "yes"), node.body, []),
        ast.If(of(decision, "both"), taken("turn"), []),
        ast.If(of(decision, "no"), node.orelse or [ast.Pass()], []),
        ast.If(of(decision, "both"), taken("merge"), []),
    ]
    return [at(each, node.test) for each in made]


def _is_generator(node: ast.FunctionDef) -> bool:
    return any(isinstance(each, (ast.Yield, ast.YieldFrom)) for each in ast.walk(node))


# What a side may do


def _assigns_only(block: Sequence[ast.stmt], *, in_loop: bool = False) -> bool:
    """Whether statements do nothing but give values to local names."""
    return all(_assigns(each, in_loop) for each in block)


def _takes(*nodes: ast.AST) -> bool:
    """Whether code takes something out of an iterator or a list, which the other side would find gone."""
    walked = (each for node in nodes for each in ast.walk(node))
    calls = (each.func for each in walked if isinstance(each, ast.Call))
    return any(
        (isinstance(call, ast.Name) and call.id == "next")
        or (isinstance(call, ast.Attribute) and call.attr in ("pop", "popleft", "popitem"))
        for call in calls
    )


def _assigns(node: ast.stmt, in_loop: bool) -> bool:
    if isinstance(node, ast.Assign):
        return all(map(_is_local, node.targets))
    if isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        return isinstance(node.target, ast.Name)
    if isinstance(node, ast.If):
        return _assigns_only(node.body, in_loop=in_loop) and _assigns_only(node.orelse, in_loop=in_loop)
    if isinstance(node, (ast.For, ast.While)):
        inside = _assigns_only(node.body, in_loop=True) and _assigns_only(node.orelse, in_loop=in_loop)
        return inside and (isinstance(node, ast.While) or _is_local(node.target))
    if isinstance(node, (ast.Break, ast.Continue)):
        return in_loop
    if isinstance(node, ast.Delete):  # as an inner branch has it by now
        return all(isinstance(each, ast.Name) for each in node.targets)
    if isinstance(node, ast.FunctionDef):  # as an inner loop has it by now
        return node.name.startswith(OURS)
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text or isinstance(node, (ast.Pass, ast.Assert, ast.Raise))


def _is_local(target: ast.expr) -> bool:
    if isinstance(target, (ast.Tuple, ast.List)):
        return all(map(_is_local, target.elts))
    return isinstance(target, ast.Name)


# Early returns


def _with_one_return(block: Block, is_wanted: Callable[[ast.If], bool]) -> Block | None:
    """The body of a function that returns early under an `if`, with one return at its end; None if it does not."""
    for place, node in enumerate(block):
        if isinstance(node, ast.If) and is_wanted(node) and _returns([node]):
            rest = _closed([node, *block[place + 1 :]])
            if rest is None:
                return None
            done = ast.Return(ast.Name(RESULT, ast.Load()))
            return [*block[:place], *rest, at(done, node.test)]
    return None


def _returns(block: Sequence[ast.AST]) -> bool:
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
    return any(
        isinstance(node, ast.Return)
        or (not isinstance(node, inner) and _returns(list(ast.iter_child_nodes(node))))
        for node in block
    )


def _closed(block: Sequence[ast.stmt]) -> Block | None:
    """Statements each way of which ends in a return, with one name given the value instead; None if one does not."""
    made: Block = []
    for place, node in enumerate(block):
        if isinstance(node, ast.Return):
            value = node.value or ast.copy_location(ast.Constant(None), node)
            given = ast.Assign([ast.Name(RESULT, ast.Store())], value)
            target = ast.copy_location(given.targets[0], node)
            given.targets = [target]
            return [*made, ast.copy_location(given, node)]
        if isinstance(node, ast.If) and _returns([node]):
            rest = list(block[place + 1 :])
            body, other = _closed([*node.body, *copy.deepcopy(rest)]), _closed([*node.orelse, *rest])
            if body is None or other is None:
                return None
            return [*made, ast.copy_location(ast.If(node.test, body, other), node)]
        if isinstance(node, ast.Raise):
            return [*made, node]
        if _returns([node]):
            return None
        made.append(node)
    return None
