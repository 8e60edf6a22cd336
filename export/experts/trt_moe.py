"""Expand an outlined MoE block as one `TRT_MoE`, TensorRT's own layer (`IMoELayer`): `trt_moe`.

The lowering for `--target tensorrt-sm100`. TensorRT's parser knows the node by its name, and builds it for compute
capability 10.x and 11.x. Its inputs, with B = 1 and all N tokens in S:

    hidden (B, S, H), experts (B, S, k) int32, scores (B, S, k), gate (E, H, I), up (E, H, I), down (E, I, H)

and `activation_type`, an integer: 1 is SiLU, so that an expert is down(silu(gate x) * up x). A string is silently taken
for 0, no activation. Source: TensorRT's documentation of the layer (inputs and shapes), and what the parser of
TensorRT-RTX 1.7 made of such nodes.

The graph also defines the node as a function of standard operators: ONNX Runtime inlines it, so that the file can be
verified, and TensorRT's parser prefers its own layer. In that function all experts compute all tokens; it is not fast.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from moe_export.errors import Code, NotExportableError
from moe_export.export.experts.contrib import FeedForward, read_feed_forward
from moe_export.export.experts.one_at_a_time import Opaque
from moe_export.export.experts.weights import ExpertWeights
from moe_export.graph_builder import GraphBuilder

DOMAIN, OPERATOR = "trt", "TRT_MoE"
SILU = 1

_MEANING = """
<domain: "trt", opset_import: ["" : {opset}]>
TRT_MoE <activation_type> (hidden, experts, scores, gate, up, down) => (mixed)
{{
    shape = Shape (hidden)
    width = Shape <start: int = 2> (hidden)
    slots = Shape <start: int = 2> (experts)
    every_row = Constant <value = int64[2] {{1, -1}}> ()
    every_token = Constant <value = int64[1] {{-1}}> ()
    first = Constant <value = int64[1] {{0}}> ()
    last = Constant <value = int64[1] {{2}}> ()
    behind = Constant <value = int64[2] {{1, 2}}> ()
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    rows_shape = Concat <axis: int = 0> (every_row, width)
    rows = Reshape (hidden, rows_shape)
    gated = MatMul (rows, gate)
    opened = Sigmoid (gated)
    activated = Mul (gated, opened)
    raised = MatMul (rows, up)
    inner = Mul (activated, raised)
    made = MatMul (inner, down)
    pairs_shape = Concat <axis: int = 0> (every_token, slots)
    pairs = Reshape (experts, pairs_shape)
    chosen = Cast <to: int = 7> (pairs)
    weights = Reshape (scores, pairs_shape)
    count = Shape <start: int = 0, end: int = 1> (gate)
    number = Squeeze (count, first)
    numbers = Range (zero, number, one)
    each = Unsqueeze (numbers, behind)
    hot = Equal (chosen, each)
    marks = CastLike (hot, scores)
    marked = Mul (marks, weights)
    of_token = ReduceSum <keepdims: int = 1> (marked, last)
    weighted = Mul (made, of_token)
    mixed_rows = ReduceSum <keepdims: int = 0> (weighted, first)
    mixed = Reshape (mixed_rows, shape)
}}
"""


def trt_moe(w: GraphBuilder, block: Opaque) -> ir.Value:
    """One `TRT_MoE`.

    Raises:
        NotExportableError: The experts are not SwiGLU without biases, or their weights are not known.
    """
    form, gated = _gated(block)
    arrays = ExpertWeights(w, block.weights, block.count, block.opset).stacks()
    stacks = dict(enumerate(arrays, 3 + len(block.shared)))
    gate, up, down = (
        w.constant(np.ascontiguousarray(stacks[place].transpose(0, 2, 1)), name)
        for place, name in ((form.first, "gate"), (gated, "up"), (form.second, "down"))
    )
    tokens = block.shared[form.tokens - 3]
    chosen = w.op("Reshape", block.indices, w.ints(1, -1, block.slots))
    if form.scores is None:
        one = w.constant(np.array(1, (tokens.dtype or ir.DataType.FLOAT).numpy()), "one")
        scores = w.op("Expand", one, w.op("Shape", chosen))
    else:
        scores = w.op("Reshape", block.shared[form.scores - 3], w.ints(1, -1, block.slots))
    if block.valid is not None:  # a pair that names no expert gets weight 0
        valid = w.op("Reshape", block.valid, w.ints(1, -1, block.slots))
        scores = w.op("Where", valid, scores, w.op("CastLike", w.scalar(0), scores))
    mixed = w.op(
        OPERATOR,
        w.op("Unsqueeze", tokens, w.ints(0)),
        w.op("Cast", chosen, to=ir.DataType.INT32),
        scores,
        gate,
        up,
        down,
        domain=DOMAIN,
        activation_type=SILU,
    )
    return w.op("Squeeze", mixed, w.ints(0))


def _gated(block: Opaque) -> tuple[FeedForward, int]:
    """The experts as SwiGLU, and the position of W3."""
    why = "these compute something else"
    form: FeedForward | None = None
    try:
        form = read_feed_forward(block.meaning)
        why = f"these have two linear layers ({form.activation})"
    except NotExportableError:
        pass
    if form is None or form.gated is None:
        raise NotExportableError(
            f"TRT_MoE takes experts down(silu(gate x) * up x) without biases, and {why}",
            code=Code.EXPERTS_FORM,
            where=block.meaning.line,
            hint="--experts blocks takes any expert",
        )
    return form, form.gated


def add_meaning(model: ir.Model) -> None:
    """Add the function that defines the node to a model that has such nodes, in place."""
    if all(node.domain != DOMAIN for node in model.graph):
        return
    model.opset_imports[DOMAIN] = 1
    text = _MEANING.format(opset=model.opset_imports[""])
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    model.functions[function.identifier()] = function
