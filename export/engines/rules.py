"""What TensorRT's parser and builder are known to refuse, read off a graph without TensorRT.

Each rule was seen at work in TensorRT-RTX 1.7 (`tests/export/engine/test_rules.py` holds the two against each other on
the same graphs). Which of them hold for full TensorRT was read in its manual, 10.15 to 11.4: `LIFTED` and the arguments
`lifted` say where they do not. A rule that finds something refuses; that none does proves nothing: only a build does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from moe_export.export.engines.carry import growing_states
from moe_export.export.engines.module import FULL
from moe_export.export.engines.refusal import ALWAYS_FINE, Refusal, all_nodes, refusal_at

MOST_K = 3840
"""The greatest K of a TopK."""
MOST_AXES = 8
_SINCE = {ir.DataType.INT4: 80, ir.DataType.FLOAT8E4M3FN: 89}
"""The compute capability from which on TensorRT-RTX has weights of a type."""
_MOE_MAJORS = {"10", "11"}

# Operators of ONNX that the parser does not know.
UNKNOWN = frozenset(
    """
    AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad
    Col2Im Compress ConcatFromSequence ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear
    ImageDecoder MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix Multinomial
    NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul
    RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert
    SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer
    StringSplit SwiGLU TfIdfVectorizer Unique
    """.split()  # noqa: SIM905 (a table that people read)
)
# Operators that it knows by name, and for which TensorRT-RTX has nothing; full TensorRT has.
RTX_LACKS = frozenset({"NonZero", "NonMaxSuppression"})
# Since when full TensorRT has operators that TensorRT-RTX has not.
LIFTED = {**dict.fromkeys(RTX_LACKS, ALWAYS_FINE), "DeformConv": ALWAYS_FINE, "DFT": (11, 2)}
# Types that no tensor can have; weights of uint8 and float64 are converted.
_NO_TENSOR = {
    ir.DataType.INT16,
    ir.DataType.UINT16,
    ir.DataType.UINT32,
    ir.DataType.UINT64,
    ir.DataType.STRING,
    ir.DataType.COMPLEX64,
    ir.DataType.COMPLEX128,
    ir.DataType.UINT4,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
    ir.DataType.FLOAT8E8M0,
}
_PRODUCTS = {"Einsum", "MatMul", "Gemm"}
_INTEGERS = {ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64}

BY_POSITION = "--target tensorrt, or --experts blocks, sorts by counting, without it"
NO_SEQUENCE = "--target tensorrt, or --experts blocks, needs no sequence"
_HINTS = {
    "NonZero": BY_POSITION,
    "Compress": BY_POSITION,
    "Unique": BY_POSITION,
    **dict.fromkeys((name for name in UNKNOWN if "Sequence" in name), NO_SEQUENCE),
}


@dataclass(frozen=True)
class Findings:
    """What a graph holds that TensorRT refuses, and what may go wrong.

    Attributes:
        refused: Each is a reason for which no engine can be built.
        doubts: Each may be one, or changes what is computed; only a build shows it. What some versions of the builder
            refuse is one if the version is not known.
    """

    refused: tuple[Refusal, ...]
    doubts: tuple[Refusal, ...]


Rule = Callable[[ir.Node], Iterator[Refusal]]


def find_refusals(model: ir.Model, product: str | None = None, version: str = "") -> Findings:
    """Hold a graph against every rule.

    Args:
        model: The graph; shapes and dtypes of values are used where it has them.
        product: What will build it, `tensorrt-rtx` or `tensorrt`; None for what either refuses.
        version: Its version; empty if it is not known.
    """
    refused = [found for value in model.graph.inputs for found in _bad_value(value, "input")]
    refused += [found for value in model.graph.initializers.values() for found in _bad_weight(value)]
    doubts: list[Refusal] = []
    functions = set(model.functions)
    for node in all_nodes(model):
        if node.op_identifier() in functions:
            continue
        for rule in _RULES:
            refused += rule(node)
        refused += _carry(node, model.opset_imports.get("", 17))
        for rule in _DOUBTS:
            doubts += rule(node)
    doubts += moe_layers(model)
    if product == FULL:
        since = tuple(map(int, version.split(".")[:2])) if version else ()
        open_ones = [found for found in refused if found.lifted not in {None, ALWAYS_FINE}]
        doubts += [] if since else open_ones
        refused = [
            found
            for found in refused
            if found.lifted is None or (found in open_ones and since and since < found.lifted)
        ]
    return Findings(tuple(dict.fromkeys(refused)), tuple(dict.fromkeys(doubts)))


def _is_onnx(node: ir.Node) -> bool:
    return node.domain in {"", "ai.onnx"}


def _unknown(node: ir.Node) -> Iterator[Refusal]:
    if not _is_onnx(node):
        if (
            not _known_elsewhere(node)
            and node.domain != "trt.plugins"
            and not node.op_type.startswith("TRT_")
        ):
            hint = "--target tensorrt writes operators of ONNX only" if node.domain == "com.microsoft" else ""
            yield refusal_at(node, f"TensorRT has no operator {node.domain}.{node.op_type}", hint)
        return
    if node.op_type in UNKNOWN | RTX_LACKS:
        lifted, hint = LIFTED.get(node.op_type), _HINTS.get(node.op_type, "")
        who = "TensorRT-RTX" if lifted == ALWAYS_FINE else "TensorRT"
        yield refusal_at(node, f"{who} has no {node.op_type}", hint, lifted=lifted)


def _scatter(node: ir.Node) -> Iterator[Refusal]:
    if not _is_onnx(node) or node.op_type not in {"ScatterElements", "ScatterND"}:
        return
    reduction = node.attributes.get_string("reduction", "none")
    if reduction != "none":
        fine = node.op_type == "ScatterElements"
        who = "TensorRT-RTX" if fine else "TensorRT"
        yield refusal_at(
            node,
            f"{who} scatters without a reduction only, this is reduction={reduction!r}",
            BY_POSITION,
            lifted=ALWAYS_FINE if fine else None,
        )


def _top_k(node: ir.Node) -> Iterator[Refusal]:
    if node.op_type != "TopK" or not _is_onnx(node) or len(node.inputs) < 2 or node.inputs[1] is None:
        return
    count = ir.convenience.get_const_tensor(node.inputs[1])
    if count is not None and count.size == 1 and int(count.numpy().reshape(())) > MOST_K:
        size = int(count.numpy().reshape(()))
        yield refusal_at(node, f"TensorRT's TopK takes K up to {MOST_K}, this is K={size}", BY_POSITION)


def _integer_product(node: ir.Node) -> Iterator[Refusal]:
    if node.op_type not in _PRODUCTS or not _is_onnx(node):
        return
    for value in node.inputs:
        if value is not None and value.dtype in _INTEGERS:
            hint = (
                "moe-export rewrite"
                if node.op_type == "Einsum"
                else "multiply in a float type, and cast back"
            )
            yield refusal_at(node, f"TensorRT's {node.op_type} takes floats, this is {_dtype(value)}", hint)
            return


def _bad_output(node: ir.Node) -> Iterator[Refusal]:
    """Types and ranks that a value cannot have. `Cast` says its type itself; uint8 goes in and out only."""
    if node.op_type == "Cast" and _is_onnx(node):
        dtype = ir.DataType(node.attributes.get_int("to", 1))
        inside = dtype is ir.DataType.UINT8 and not node.outputs[0].is_graph_output()
        if dtype in _NO_TENSOR or inside:
            yield refusal_at(node, f"TensorRT has no {_name(dtype)} tensors", _cast_hint(dtype))
        return
    for value in node.outputs:
        if value.dtype in _NO_TENSOR:
            yield refusal_at(node, f"TensorRT has no {_dtype(value)} tensors", _cast_hint(value.dtype))
        if value.shape is not None and len(value.shape) > MOST_AXES:
            yield refusal_at(
                node, f"TensorRT's tensors have up to {MOST_AXES} axes, this has {len(value.shape)}"
            )


def _cast_hint(dtype: ir.DataType | None) -> str:
    if dtype in {ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128}:
        return ""
    if dtype is not None and dtype.name.startswith("FLOAT8"):
        return "use float8e4m3fn"
    return "use int32, int64 or bool"


def _bad_value(value: ir.Value, kind: str) -> Iterator[Refusal]:
    if value.dtype in _NO_TENSOR:
        yield Refusal(
            f"TensorRT has no {_dtype(value)} tensors", f"{kind} {value.name}", hint=_cast_hint(value.dtype)
        )
    if value.shape is not None and len(value.shape) > MOST_AXES:
        yield Refusal(
            f"TensorRT's tensors have up to {MOST_AXES} axes, this has {len(value.shape)}",
            f"{kind} {value.name}",
        )


def _bad_weight(value: ir.Value) -> Iterator[Refusal]:
    if not any(value is other for other in (value.graph.inputs if value.graph else ())):
        yield from _bad_value(value, "weight")


def _carry(node: ir.Node, opset: int) -> Iterator[Refusal]:
    if node.op_type not in {"Loop", "Scan"} or not _is_onnx(node):
        return
    for name, before, after in growing_states(node, opset):
        yield refusal_at(
            node,
            f"TensorRT's loops carry tensors of one shape, {name!r} goes from {before} to {after}",
            "--recurrence scan, or --experts blocks, carries none that grows",
        )


def _known_elsewhere(node: ir.Node) -> bool:
    """Whether the parser takes an operator of another domain for ONNX's of the same name, as it does."""
    import onnx

    name = node.op_type
    known = onnx.defs.has(name) and name not in UNKNOWN | RTX_LACKS
    return known or name == "SimplifiedLayerNormalization"


def _domain_ignored(node: ir.Node) -> Iterator[Refusal]:
    if not _is_onnx(node) and _known_elsewhere(node):
        yield refusal_at(
            node,
            f"TensorRT reads {node.domain}.{node.op_type} as its own {node.op_type}, whatever it means there",
        )


def _computed_k(node: ir.Node) -> Iterator[Refusal]:
    if node.op_type != "TopK" or not _is_onnx(node) or len(node.inputs) < 2 or node.inputs[1] is None:
        return
    if ir.convenience.get_const_tensor(node.inputs[1]) is None:
        yield refusal_at(node, f"K is computed, and TensorRT's TopK takes K up to {MOST_K}", BY_POSITION)


def _double(node: ir.Node) -> Iterator[Refusal]:
    if any(value.dtype is ir.DataType.DOUBLE for value in node.outputs):
        yield refusal_at(node, "TensorRT computes float64 as float32")


def moe_layers(model: ir.Model, capability: str = "") -> Iterator[Refusal]:
    """`TRT_MoE` nodes, which only some GPUs can compute.

    Args:
        model: The graph.
        capability: The one to build for; empty for any.
    """
    number = capability.removeprefix("sm")
    if number.isdigit() and number[:-1] in _MOE_MAJORS:
        return
    for node in all_nodes(model):
        if node.domain == "trt" and node.op_type == "TRT_MoE":
            yield refusal_at(
                node,
                "TensorRT builds its MoE layer for compute capability 10.x and 11.x only",
                "--target tensorrt writes experts that every GPU takes",
                capability,
            )


def packed_types(model: ir.Model, capability: str) -> Iterator[Refusal]:
    """Packed weights of a type that TensorRT-RTX has no code for on an older GPU.

    Args:
        model: The graph.
        capability: The one to build for. `portable` leaves it to the GPU that runs the engine.
    """
    number = capability.removeprefix("sm")
    if not number.isdigit():
        return
    for node in all_nodes(model):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        least = _SINCE.get(codes.dtype) if codes is not None and codes.dtype is not None else None
        if least is not None and int(number) < least:
            assert codes is not None
            rule = f"TensorRT-RTX takes weights in {_dtype(codes)} from sm{least} on"
            yield refusal_at(node, rule, "--weights-dtype int8 is taken by every GPU", capability)


_RULES: tuple[Rule, ...] = (_unknown, _scatter, _top_k, _integer_product, _bad_output)
_DOUBTS: tuple[Rule, ...] = (_domain_ignored, _computed_k, _double)


def _name(dtype: ir.DataType | None) -> str:
    return dtype.name.lower() if dtype is not None else "?"


def _dtype(value: ir.Value) -> str:
    return _name(value.dtype)
