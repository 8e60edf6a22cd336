"""Replace einsum in Python source by readable PyTorch, and leave the rest of the file as it is.

    deltaA = torch.exp(einsum(delta, A, "b l d, d n -> b l d n"))
becomes
    # einsum "b l d, d n -> b l d n"
    deltaA = torch.exp(delta.unsqueeze(-1) * A)

Whose `einsum` a call is, is read off the imports. A call whose equation or operands are only known at run time is
left alone, and listed with its line and the reason. No operand is evaluated twice, or in another order where
evaluating it may do something. As everywhere, a label is taken to have one size: broadcasting an axis of size 1
against a longer one under the same label is not visible in the source.

    source ─▶ libcst ─▶ codemod_call (what it says) ─▶ codemod_code (the lines) ─▶ codemod_proof ─▶ source
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import libcst as cst
from libcst import CSTNodeT
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider, QualifiedNameProvider

from moe_export.einsum_rewrite.codemod_call import UnknownError, is_einsum, read_call
from moe_export.einsum_rewrite.codemod_code import Lines, lines_for
from moe_export.errors import UsageError

# Where an expression needs no parentheses around it.
_ALONE = (
    cst.Arg, cst.Assign, cst.AnnAssign, cst.AugAssign, cst.Return, cst.Expr, cst.Element, cst.Index, cst.NamedExpr,
    cst.Lambda, cst.DictElement,
)  # fmt: skip


@dataclass(frozen=True)
class Rewritten:
    """A call that was replaced: its line in the old source, its equation, the expression that took its place."""

    line: int
    equation: str
    code: str


@dataclass(frozen=True)
class LeftAlone:
    """A call that was not replaced: its line, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class SourceResult:
    """What became of a file.

    Attributes:
        code: The new source.
        rewritten, left: The calls, by line.
    """

    code: str
    rewritten: tuple[Rewritten, ...]
    left: tuple[LeftAlone, ...]


def rewrite_source(code: str) -> str:
    r"""Replace every einsum of a Python source that can be known; the new source.

    Raises:
        UsageError: The source has a syntax error.

    Example:
        >>> print(rewrite_source("import torch as t\ny = t.einsum('ij,jk->ik', a, b)"), end="")
        import torch as t
        # einsum "ij,jk->ik"
        y = a @ b
    """
    return rewrite_file(code).code


def rewrite_file(code: str, name: str = "<source>") -> SourceResult:
    """Like `rewrite_source`, with a list of what was replaced and what was left alone.

    Args:
        code: The source.
        name: The file's name, for errors.

    Raises:
        UsageError: The source has a syntax error; names the line.
    """
    try:
        wrapper = MetadataWrapper(cst.parse_module(code))
    except cst.ParserSyntaxError as error:
        raise UsageError(
            f"{name} has a syntax error: {error.message}", where=f"{name}:{error.raw_line}"
        ) from None
    finder = _Finder(code)
    wrapper.visit(finder)
    changed = wrapper.module.visit(_Replacer(finder))
    return SourceResult(
        changed.code,
        tuple(sorted(finder.rewritten, key=lambda item: item.line)),
        tuple(sorted(finder.left, key=lambda item: item.line)),
    )


class _Finder(cst.CSTVisitor):
    """Finds the calls, decides about each, and keeps the lines for those that are replaced."""

    METADATA_DEPENDENCIES = (QualifiedNameProvider, PositionProvider, ParentNodeProvider)

    def __init__(self, code: str) -> None:
        super().__init__()
        self.expressions: dict[cst.Call, Lines] = {}
        self.joined: set[cst.Call] = set()  # calls that stand in front of a method or beside an operator
        self.statements: dict[cst.CSTNode, list[tuple[str, Lines]]] = {}
        self.rewritten: list[Rewritten] = []
        self.left: list[LeftAlone] = []
        self._torch = False
        self._taken: set[str] = set()

    def visit_Module(self, node: cst.Module) -> None:
        names = _AllNames()
        node.visit(names)
        self._taken, self._torch = names.names, "torch" in names.names

    def leave_Call(self, original_node: cst.Call) -> None:
        """Decide about a call; those inside its operands have been decided about already."""
        node = original_node
        found = self.get_metadata(QualifiedNameProvider, node.func, set())
        names = frozenset(item.name for item in found)
        if not is_einsum(names):
            return
        line = self.get_metadata(PositionProvider, node).start.line
        try:
            if not self._torch and not any(name.startswith("torch.") for name in names):
                raise UnknownError(
                    "nothing says that its operands are tensors of PyTorch: torch is not imported"
                )
            statement = self._statement(node)
            call = read_call(node, names)
            operands = [cast(cst.BaseExpression, operand.visit(_Replacer(self))) for operand in call.operands]
            taken = set(self._taken)
            lines = lines_for(replace(call, operands=tuple(operands)), taken)
            if lines.before:
                self._require_movable(node, statement)
        except UnknownError as reason:
            self.left.append(LeftAlone(line, str(reason)))
            return
        self._taken = taken
        self.expressions[node] = lines
        if not isinstance(self.get_metadata(ParentNodeProvider, node), _ALONE) and not node.lpar:
            self.joined.add(node)
        self.statements.setdefault(statement, []).append((call.text, lines))
        self.rewritten.append(Rewritten(line, call.text, lines.expression))

    def _statement(self, node: cst.CSTNode) -> cst.CSTNode:
        """The statement line that a call stands in, which gets the comment."""
        child: cst.CSTNode = node
        while not isinstance(child, (cst.SimpleStatementLine, cst.BaseCompoundStatement)):
            if isinstance(child, cst.SimpleStatementSuite):
                raise UnknownError("it stands on the line of its `if` or `for`; give it a line of its own")
            child = self.get_metadata(ParentNodeProvider, child)
        return child

    def _require_movable(self, call: cst.Call, statement: cst.CSTNode) -> None:
        """Make sure that operands may be given names on lines before the statement.

        Raises:
            UnknownError: The call is not always run, or runs more than once, or something runs before it.
        """
        if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
            raise UnknownError("its operands need lines of their own, and it stands in a compound statement")
        child: cst.CSTNode = call
        while child is not statement:
            parent = self.get_metadata(ParentNodeProvider, child)
            if isinstance(parent, (cst.Lambda, cst.BaseComp, cst.BooleanOperation, cst.IfExp, cst.NamedExpr)):
                raise UnknownError(
                    f"its operands need lines of their own, and it stands in a {type(parent).__name__}"
                )
            if isinstance(parent, cst.Call) and parent in self.expressions:
                raise UnknownError(
                    "its operands need lines of their own, and it is an operand of another einsum"
                )
            for sibling in parent.children:
                if sibling is child:
                    break
                if _acts(sibling):
                    raise UnknownError(
                        "its operands need lines of their own, and another call runs before it"
                    )
            child = parent


def _acts(node: cst.CSTNode) -> bool:
    if isinstance(node, (cst.Call, cst.Await, cst.Yield, cst.NamedExpr)):
        return True
    return any(_acts(child) for child in node.children)


class _AllNames(cst.CSTVisitor):
    """Every identifier of a file."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_Name(self, node: cst.Name) -> None:
        self.names.add(node.value)


class _Replacer(cst.CSTTransformer):
    """Puts the lines where the calls were."""

    def __init__(self, finder: _Finder) -> None:
        super().__init__()
        self._finder = finder

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        lines = self._finder.expressions.get(original_node)
        if lines is None:
            return updated_node
        expression = cst.parse_expression(lines.expression)
        operator = isinstance(expression, (cst.BinaryOperation, cst.UnaryOperation, cst.Comparison))
        extra = int(operator and original_node in self._finder.joined)
        return expression.with_changes(
            lpar=[*updated_node.lpar, *[cst.LeftParen()] * extra, *expression.lpar],
            rpar=[*expression.rpar, *[cst.RightParen()] * extra, *updated_node.rpar],
        )

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement]:
        found = self._finder.statements.get(original_node)
        return updated_node if found is None else _with_lines(updated_node, found)

    def on_leave(
        self, original_node: CSTNodeT, updated_node: CSTNodeT
    ) -> CSTNodeT | cst.RemovalSentinel | cst.FlattenSentinel[CSTNodeT]:
        result = super().on_leave(original_node, updated_node)
        if isinstance(result, cst.BaseCompoundStatement) and original_node in self._finder.statements:
            comments = _comments(self._finder.statements[original_node])
            return cast(CSTNodeT, result.with_changes(leading_lines=[*result.leading_lines, *comments]))
        return result


def _comments(found: Sequence[tuple[str, Lines]]) -> list[cst.EmptyLine]:
    texts = dict.fromkeys(" ".join(text.split()) for text, _ in found)
    return [cst.EmptyLine(comment=cst.Comment(f'# einsum "{text}"')) for text in texts]


def _with_lines(
    statement: cst.SimpleStatementLine, found: Sequence[tuple[str, Lines]]
) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement]:
    """A comment with the equation, the lines that come first, the statement."""
    before = [cst.parse_statement(line) for _, lines in found for line in lines.before]
    commented = [*statement.leading_lines, *_comments(found)]
    if not before:
        return statement.with_changes(leading_lines=commented)
    first = cast(cst.SimpleStatementLine, before[0]).with_changes(leading_lines=commented)
    return cst.FlattenSentinel([first, *before[1:], statement.with_changes(leading_lines=[])])
