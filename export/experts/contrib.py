"""Expand an outlined MoE block as one `com.microsoft.MoE`, ONNX Runtime's own operator: `contrib`.

The operator does its own routing, from logits (N, E): softmax over the k greatest. It is made to follow the model's
routing by logits that are log(weight) at the chosen experts and far lower elsewhere; its result is then scaled by the
sum of the weights. That needs weights that are not negative, and a body that is one of the operator's:

    w[token, slot] * (W2 act(W1 x[token] + b1) + b2)            act: relu, gelu (of tanh), silu, identity
    w[token, slot] * W2 (silu(W1 x[token]) * (W3 x[token]))     SwiGLU

Source: the operator's schema in onnxruntime (ContribOperators.md, com.microsoft.MoE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moe_export.errors import Code, NotExportableError
from moe_export.export.experts.body import Experts
from moe_export.export.experts.one_at_a_time import Opaque
from moe_export.export.experts.weights import ExpertWeights
from moe_export.graph_builder import GraphBuilder

_aten = torch.ops.aten
_ACTIVATIONS = {_aten.relu.default: "relu", _aten.silu.default: "silu", _aten.gelu.default: "gelu"}
_LEAST, _UNCHOSEN = 1e-30, -1e30
"""The weight that stands for 0, whose logarithm would be -inf; the logit of experts that were not chosen."""
DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class FeedForward:
    """A body that the operator computes. Weights and shared values are given by position among the body's inputs.

    Attributes:
        activation: The activation, by the operator's name for it.
        first, second, gated: W1, W2 and W3, each (out, in); `gated` is None if there is no W3.
        first_bias, second_bias: Their biases, or None.
        tokens: The shared value (N, H) that the experts read.
        scores: The shared value (N, k) of weights; None if rows are added as they are.
    """

    activation: str
    first: int
    second: int
    gated: int | None
    first_bias: int | None
    second_bias: int | None
    tokens: int
    scores: int | None


def read_feed_forward(experts: Experts) -> FeedForward:
    """Read a body as one that the operator computes.

    Raises:
        NotExportableError: The operator does not compute such a body.
    """
    reader = _Reader(experts)
    found = reader.read()
    if found is None:
        raise NotExportableError(
            "com.microsoft.MoE does not compute such an expert",
            code=Code.EXPERTS_FORM,
            where=experts.line,
            hint="it takes two linear layers with relu, gelu of tanh, silu or nothing between them, or SwiGLU; "
            "the other forms of --experts take any",
        )
    return found


class _Reader:
    """Matches the nodes of a body, from its result back to its inputs."""

    def __init__(self, experts: Experts) -> None:
        graph = experts.body.graph
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._result: fx.Node = next(node for node in graph.nodes if node.op == "output").args[0]
        self._weights = range(3 + len(experts.shared), len(self._inputs))

    def read(self) -> FeedForward | None:
        scores, value = self._scored(self._result)
        second = self._linear(value)
        if second is None:
            return None
        inner, matrix, bias = second
        for activation, first, third in self._activated(inner):
            one, three = self._linear(first), self._linear(third) if third is not None else None
            if one is None or (third is not None and (three is None or three[0] is not one[0])):
                continue
            tokens = self._rows(one[0])
            if tokens is None or (three is not None and (one[2], three[2], bias) != (None, None, None)):
                continue
            return FeedForward(
                activation, one[1], matrix, three[1] if three else None, one[2], bias, tokens, scores
            )
        return None

    def _scored(self, node: fx.Node) -> tuple[int | None, fx.Node]:
        """The weights that rows are multiplied by, if any, and the rows before that."""
        if node.target is _aten.mul.Tensor:
            for one, other in (node.args, reversed(node.args)):
                scores = self._scores(one)
                if scores is not None and isinstance(other, fx.Node):
                    return scores, other
        return None, node

    def _scores(self, node: object) -> int | None:
        """The position of w, if a node is `w[token, slot]` as a column."""
        shaped = {_aten.unsqueeze.default, _aten.view.default, _aten.reshape.default, _aten.slice.Tensor}
        while isinstance(node, fx.Node) and node.target in shaped:
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.target is not _aten.index.Tensor:
            return None
        picked = [index for index in node.args[1] if index is not None]  # type: ignore[union-attr]
        return self._shared(node.args[0]) if picked == self._inputs[:2] else None

    def _rows(self, node: fx.Node) -> int | None:
        """The position of x, if a node is `x[token]`."""
        if node.target is _aten.index.Tensor and list(node.args[1]) == self._inputs[:1]:  # type: ignore[arg-type]
            return self._shared(node.args[0])
        if node.target is _aten.index_select.default and node.args[1:] == (0, self._inputs[0]):
            return self._shared(node.args[0])
        return None

    def _shared(self, node: object) -> int | None:
        position = self._inputs.index(node) if node in self._inputs else 0
        return position if 3 <= position < self._weights.start else None

    def _linear(self, node: fx.Node | None) -> tuple[fx.Node, int, int | None] | None:
        """The input, matrix and bias of a linear layer."""
        if node is None or node.target is not _aten.linear.default:
            return None
        value, matrix, *bias = node.args
        places = [self._inputs.index(part) if part in self._inputs else -1 for part in (matrix, *bias)]
        if not isinstance(value, fx.Node) or any(place not in self._weights for place in places):
            return None
        return value, places[0], places[1] if len(places) > 1 else None

    def _activated(self, node: fx.Node) -> Sequence[tuple[str, fx.Node, fx.Node | None]]:
        """Each way to read a node as an activation: its name, its input, and what it is multiplied by."""
        if node.target is _aten.linear.default:
            return [("identity", node, None)]
        if node.target is _aten.gelu.default and node.kwargs.get("approximate") != "tanh":
            return []
        if node.target in _ACTIVATIONS:
            return [(_ACTIVATIONS[node.target], node.args[0], None)]  # type: ignore[list-item]
        if node.target is not _aten.mul.Tensor:
            return []
        one, other = node.args
        return [
            ("swiglu", gate.all_input_nodes[0], value)
            for gate, value in ((one, other), (other, one))
            if isinstance(gate, fx.Node) and gate.target is _aten.silu.default and isinstance(value, fx.Node)
        ]


def contrib(w: GraphBuilder, block: Opaque) -> ir.Value:
    """One `com.microsoft.MoE`.

    Raises:
        NotExportableError: The operator does not compute such experts or such a routing, or the weights are not known.
    """
    form = read_feed_forward(block.meaning)
    if block.valid is not None:
        raise NotExportableError(
            "com.microsoft.MoE cannot leave a token without an expert, and this routing may",
            code=Code.EXPERTS_FORM,
            where=block.meaning.line,
            hint="the other forms of --experts can",
        )
    arrays = ExpertWeights(w, block.weights, block.count, block.opset).stacks()
    stacks = dict(enumerate(arrays, 3 + len(block.shared)))
    first = stacks[form.first]
    if form.gated is not None:  # the CPU kernel expects the rows of gate and value interleaved
        first = np.stack([first, stacks[form.gated]], axis=2).reshape(block.count, -1, first.shape[-1])
    matrices = [w.constant(first, "fc1"), _optional(w, stacks, form.first_bias, "fc1_bias")]
    matrices += [
        w.constant(stacks[form.second], "fc2"),
        _optional(w, stacks, form.second_bias, "fc2_bias"),
    ]
    tokens = block.shared[form.tokens - 3]
    indices = w.op("Reshape", block.indices, w.ints(-1, block.slots))
    number = w.op("Shape", indices, start=0, end=1)
    size = w.op("Concat", number, w.ints(block.count), axis=0)
    dtype = tokens.dtype or ir.DataType.FLOAT
    low = w.op("Expand", w.constant(np.array(_UNCHOSEN, dtype.numpy()), "unchosen"), size)
    if form.scores is None:
        one = w.constant(np.array(1, dtype.numpy()), "one")
        scores = w.op("Expand", one, w.op("Shape", indices))
    else:
        scores = w.op("Reshape", block.shared[form.scores - 3], w.ints(-1, block.slots))
    least = w.constant(np.array(_LEAST, dtype.numpy()), "least")
    logits = w.op(
        "ScatterElements", low, indices, w.op("Log", w.op("Max", scores, least)), axis=1, name="logits"
    )
    gated: dict[str, Any] = (
        {"activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_fusion": 1}
        if form.gated is not None
        else {}
    )
    rows = w.op(
        "MoE", tokens, logits, *matrices, domain=DOMAIN, k=block.slots, normalize_routing_weights=1,
        activation_type=form.activation, **gated,
    )  # fmt: skip
    return w.op("Mul", rows, w.op("ReduceSum", scores, w.ints(1), keepdims=1))


def _optional(
    w: GraphBuilder, stacks: Mapping[int, np.ndarray], position: int | None, name: str
) -> ir.Value | None:
    return None if position is None else w.constant(stacks[position], name)
