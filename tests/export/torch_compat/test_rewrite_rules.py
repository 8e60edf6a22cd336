"""A rule that is left out at a node would have failed there."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from canaries import canary
from onnxscript import optimizer, rewriter
from onnxscript.rewriter import _rewrite_rule as theirs
from onnxscript.rewriter._matcher import SimplePatternMatcher

from moe_export.export.torch_compat.rewrite_rules import rules_by_operator

GRAPH = """
<ir_version: 8, opset_import: ["" : 18, "custom" : 1]>
graph (float[n, 4] x, float[4, 3] w, float[3] b, float[n, 4] z)
    => (float[n, 3] gemm, float[n, 4] same, float[n, 4] cast, float[n, 4] back, float[n, 2, 2] split, float[n, 4] own)
{
    product = MatMul (x, w)
    gemm = Add (product, b)
    zero = Constant <value_float = 0.0> ()
    same = Add (x, zero)
    once = Cast <to = 1> (x)
    cast = Relu (once)
    there = Transpose <perm = [1, 0]> (z)
    back = Transpose <perm = [1, 0]> (there)
    one = Constant <value_ints = [-1, 4]> ()
    two = Constant <value_ints = [-1, 2, 2]> ()
    flat = Reshape (x, one)
    split = Reshape (flat, two)
    own = custom.Transpose <perm = [1, 0]> (z)
}
"""


def optimized() -> str:
    model = ir.from_onnx_text(GRAPH)
    optimizer.optimize(model)
    return str(ir.to_proto(model))


def test_the_graph_is_the_same_and_has_been_rewritten() -> None:
    wanted = optimized()
    with rules_by_operator():
        assert optimized() == wanted
    assert wanted.count("op_type") < ir.from_onnx_text(GRAPH).graph.num_nodes()


def test_a_rule_is_tried_at_nodes_of_its_operator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two roots, too: of these, all nodes were listed at each."""
    tried = []

    def match(self: object, model: object, graph: object, node: ir.Node, **others: object) -> None:
        tried.append((self, node.domain, node.op_type))

    rules = [
        rewriter.pattern.RewriteRule(target, lambda op, **values: None)
        for target in (
            lambda op, x: op.Transpose(x),
            lambda op, x: (op.Relu(x), op.Transpose(x)),
            lambda op, x: op.Transpose(x, _domain="custom"),
            lambda op, x: op.submodule("Transp")(x),
        )
    ]
    monkeypatch.setattr(theirs.RewriteRule, "match", match)
    model = ir.from_onnx_text(GRAPH)
    with rules_by_operator():
        theirs.RewriteRuleSet(rules).apply_to_model(model)
    found = [{(domain, name) for rule, domain, name in tried if rule is each} for each in rules]
    assert found[:3] == [{("", "Transpose")}, {("", "Relu")}, {("custom", "Transpose")}]
    assert len(found[3]) > 5  # by a part of the name: left to its own match


def test_canary_a_match_begins_with_the_operator() -> None:
    with canary(
        "export/torch_compat/rewrite_rules.py",
        "RewriteRule.try_rewrite asks a SimplePatternMatcher, whose pattern says its operator",
        todo="exports of deep models are slower and as right: see in what order rules are tried now",
    ):
        rule = rewriter.pattern.RewriteRule(lambda op, x: op.Relu(x), lambda op, x: op.Relu(x))
        assert type(rule._matcher) is SimplePatternMatcher
        assert rule._matcher.pattern.output_nodes[0].op_identifier()[:2] == ("", "Relu")
        assert callable(rule.try_rewrite)
