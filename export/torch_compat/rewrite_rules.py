"""`rules_by_operator`: the rules of onnxscript's optimizer are tried only at nodes of the operator that they look for.

Why: its optimizer tries each of 60 rules at each node, and a rule with several results first lists all nodes of the
graph by operator, each time: the time grows with the square of the graph, and of a model of 60 layers it was half of
the translation. The first thing that a match compares is the operator, so whatever is left out here fails there, too.
Where onnxscript has it otherwise, its own way is taken: that is slower, and as right.

Seen in onnxscript 0.7.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def rules_by_operator() -> Iterator[None]:
    """Inside, a rule whose pattern ends in one operator is not tried at nodes of another."""
    try:
        from onnxscript.rewriter._matcher import SimplePatternMatcher
        from onnxscript.rewriter._rewrite_rule import RewriteRule

        original = RewriteRule.try_rewrite
    except (ImportError, AttributeError):
        yield
        return
    wanted: dict[Any, tuple[str, str] | None] = {}

    def try_rewrite(rule: Any, model: Any, graph: Any, node: Any, **others: Any) -> Any:
        if rule not in wanted:
            wanted[rule] = _operator(rule, SimplePatternMatcher)
        operator = wanted[rule]
        heard = others.get("tracer") is not None or others.get(
            "verbose"
        )  # someone wants to know why it fails
        if operator is not None and operator != (node.domain, node.op_type) and not heard:
            return None
        return original(rule, model, graph, node, **others)

    with mock.patch.object(RewriteRule, "try_rewrite", try_rewrite):
        yield


def _operator(rule: Any, simple: type) -> tuple[str, str] | None:
    """The domain and name of the operator that a node must have for a rule to match it; None if that is not known."""
    matcher: Any = getattr(rule, "_matcher", None)
    if type(matcher) is not simple:
        return None
    pattern: Any = vars(matcher)["pattern"]
    identifier = pattern.output_nodes[0].op_identifier()
    return None if identifier is None else (identifier[0], identifier[1])
