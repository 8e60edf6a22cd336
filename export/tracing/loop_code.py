"""`converted_loop`: a loop whose test, count or `break` asks a tensor, with the rest of its steps in functions.

    while t:                   l = BOTH.loop(key)
        body                   while l.goes(lambda: t):                  steps in Python, as long as it knows the answer
        if s: break       →        body
                                   if l.stops(lambda: s): break
                               if l.is_open:                             the rest of them
                                   def test(a, b): return t
                                   def step(a, b): body; return (a, b, s)
                                   a, b = l.run(test, step, ("a", "b"), locals())

    for i in range(n):         for i in l.counted(range, n): ...
        body                   def step(i, a, b): ...

A loop is left as it is where it has an `else`, leaves in another place than at its end, or does more than give values
to local names.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator, Sequence

from moe_export.export.tracing.syntax import (
    OURS,
    Block,
    assigned,
    at,
    call,
    given,
    local_names,
    names_of,
    of,
    waiting,
)

Loop = ast.While | ast.For


def asking(node: Loop) -> Iterator[ast.expr]:
    """What a loop may ask a tensor: its test, the limits of its range, and the test of a `break` that ends a step."""
    if isinstance(node, ast.While):
        yield node.test
    elif _range(node) is not None:
        yield node.iter
    ends = _ending(node)
    if ends is not None:
        yield ends.test


def converted_loop(
    node: Loop,
    asks: ast.expr,
    key: str,
    number: int,
    *,
    question: Callable[[ast.expr], ast.expr],
    assigns_only: Callable[[Sequence[ast.stmt]], bool],
) -> Block | None:
    """A loop, converted.

    Args:
        node: The loop, all of which `can_wait`; what is in it is converted already.
        asks: What asks a tensor, one of `asking`.
        key: `file:line` of it.
        number: Names what this conversion adds.
        question: Gives a test with `and`, `or` and `not` as calls that may be given tensors.
        assigns_only: Whether statements do nothing but give values to local names.

    Returns:
        What stands for it; None if it must be left as it is.
    """
    limits = _range(node) if isinstance(node, ast.For) else []
    ends = _ending(node)
    body = node.body[:-1] if ends is not None else node.body
    if node.orelse or limits is None or not body or not assigns_only(body):
        return None
    counter = [node.target.id] if isinstance(node, ast.For) and isinstance(node.target, ast.Name) else []
    names = sorted(assigned(body) - set(counter))
    loop = f"{OURS}{number}_"

    def method(name: str, *args: ast.expr) -> ast.Call:
        return ast.Call(of(loop, name), list(args), [])

    stops: Block = []
    if ends is not None:
        stops = [ast.If(method("stops", waiting(question(ends.test))), [ast.Break()], [])]
    steps = [*copy.deepcopy(body), *stops]
    in_python: ast.stmt
    if isinstance(node, ast.While):
        in_python = ast.While(method("goes", waiting(question(node.test))), steps, [])
    else:
        limited = method("counted", ast.Name("range", ast.Load()), *limits)
        in_python = ast.For(node.target, limited, steps, [])
    rest: Block = []
    test: ast.expr = ast.Constant(None)
    if isinstance(node, ast.While):
        rest.append(_function(f"{loop}test", names, [ast.Return(question(copy.deepcopy(node.test)))]))
        test = ast.Name(f"{loop}test", ast.Load())
    ended = question(copy.deepcopy(ends.test)) if ends is not None else ast.Constant(False)
    values = ast.Tuple([*(ast.Name(name, ast.Load()) for name in names), ended], ast.Load())
    rest.append(_function(f"{loop}step", [*counter, *names], [*body, ast.Return(values)]))
    ran = method("run", test, ast.Name(f"{loop}step", ast.Load()), names_of(names), local_names())
    rest += given([*counter, *names], ran, loop)
    made: Block = [
        ast.Assign([ast.Name(loop, ast.Store())], call("loop", ast.Constant(key))),
        in_python,
        ast.If(of(loop, "is_open"), rest, []),
    ]
    return [at(each, asks) for each in made]


def _function(name: str, names: Sequence[str], body: Block) -> ast.stmt:
    arguments = ast.arguments([], [ast.arg(each) for each in names], None, [], [], None, [])
    return ast.FunctionDef(name, arguments, body, [])


def _range(node: ast.For) -> list[ast.expr] | None:
    """The limits of a loop over `range(...)` with a single name as its counter."""
    over = node.iter
    plain = isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and over.func.id == "range"
    if not plain or not isinstance(over, ast.Call) or over.keywords or not isinstance(node.target, ast.Name):
        return None
    return None if any(isinstance(each, ast.Starred) for each in over.args) else over.args


def _ending(node: Loop) -> ast.If | None:
    """The `if ...: break` that ends each step."""
    last = node.body[-1]
    breaks = isinstance(last, ast.If) and len(last.body) == 1 and isinstance(last.body[0], ast.Break)
    return last if breaks and isinstance(last, ast.If) and not last.orelse else None
