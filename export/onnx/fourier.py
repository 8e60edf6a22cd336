"""Fourier transforms and convolutions (`tracing.fourier`) as matrix products, exact to a few roundings of float32.

    transform     X = x C + i x S      C[j, k] = cos(2 pi jk / n), S likewise, by the exact remainder of jk by n
                  of a size that is fixed and large, as a convolution (`fourier_padded`)
    convolution   by a padded transform in two products

ONNX's `DFT` is not used: ONNX Runtime's is off by 1e-4 of the largest value at n = 1000, TensorRT-RTX has none,
TensorRT none before 11.2, and it is slower (docs/complex.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxscript.values import Op, Opset

from moe_export.export.onnx.fourier_padded import Turn, chirped, expand_convolution
from moe_export.export.onnx.fourier_tables import Number, Tables, negative, twice_but_ends
from moe_export.export.tracing.fourier import CONVOLVE, FOURIER, FOURIER_REAL
from moe_export.graph_builder import GraphBuilder

DOMAIN = "moe_export.fourier"
_LARGEST = (
    2**20
)  # entries of a table: at 1000 entries it is as fast as a convolution, at 4096 four times slower


# What the translation writes


def _operator(name: str, operands: Sequence[str], numbers: Sequence[str], attributes: Sequence[str]) -> Op:
    parameter, option = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.FormalParameterOption

    def of(kind: str, each: str) -> Any:
        return parameter(each, kind, param_option=option.Optional if each == "imag" else option.Single)

    integer = onnx.defs.OpSchema.AttrType.INT
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[*(of("T", each) for each in operands), *(of("tensor(int64)", each) for each in numbers)],
        outputs=[of("T", "found")],
        type_constraints=[
            ("T", [f"tensor({each})" for each in ("float16", "bfloat16", "float", "double")], "")
        ],
        attributes=[onnx.defs.OpSchema.Attribute(each, integer, required=True) for each in attributes],
    )
    return Op(Opset(DOMAIN, 1), name, schema)


_TRANSFORM = _operator("Transform", ("real", "imag"), ("size", "n"), ("onesided", "inverse", "power"))
_TO_REAL = _operator("ToReal", ("real", "imag"), ("size", "n"), ("power",))
_CONVOLUTION = _operator("Convolution", ("a", "b"), ("a_size", "b_size", "n", "length"), ("wraps",))


def _transform(real: Any, imag: Any, size: Any, n: Any, onesided: bool, inverse: bool, power: int) -> Any:
    return _TRANSFORM(real, imag, size, n, onesided=int(onesided), inverse=int(inverse), power=power)


def _to_real(real: Any, imag: Any, size: Any, n: Any, power: int) -> Any:
    return _TO_REAL(real, imag, size, n, power=power)


def _convolution(a: Any, b: Any, a_size: Any, b_size: Any, n: Any, length: Any, wraps: bool) -> Any:
    return _CONVOLUTION(a, b, a_size, b_size, n, length, wraps=int(wraps))


TRANSLATIONS: dict[Any, Any] = {FOURIER: _transform, FOURIER_REAL: _to_real, CONVOLVE: _convolution}


# What these become


def expand_fourier(model: ir.Model) -> None:
    """Replace every such node by the products that compute it, in place."""
    for node in list(model.graph.all_nodes()):
        if node.domain == DOMAIN:
            found = _FORMS[node.op_type](Tables(GraphBuilder.in_front_of(node, str(node.name))), node)
            found.shape, found.type = node.outputs[0].shape, node.outputs[0].type
            node.outputs[0].replace_all_uses_with(found, replace_graph_outputs=True)
            assert node.graph is not None
            node.graph.remove(node, safe=True)
    if DOMAIN in model.opset_imports:
        model.opset_imports.pop(DOMAIN)
        CommonSubexpressionEliminationPass()(model)  # transforms of one size have their tables in common


def _expand_transform(t: Tables, node: ir.Node) -> ir.Value:
    real, imag = node.inputs[:2]
    rows, n = map(t.given, node.inputs[2:])
    assert real is not None
    onesided, inverse, power = (node.attributes[key].as_int() for key in ("onesided", "inverse", "power"))
    kept = t.apply("Add", t.apply("Div", n, 2), 1) if onesided else n
    scale = t.scale(n, power)
    if not _fits(n, kept):
        parts = chirped(t, (real, imag), rows, Turn(n, bool(inverse)), kept, scale)
        return t.w.op("Concat", *parts, axis=-1)
    cos, sin = t.angles(rows, kept, n, many=True)
    cos, sin = t.times(cos, scale), t.times(sin, scale if inverse else negative(t, scale))
    found = t.w.op("MatMul", real, t.typed(t.joined((cos, sin), -1), real))
    if imag is not None:
        turned = t.typed(t.joined((negative(t, sin), cos), -1), real)
        found = t.w.op("Add", found, t.w.op("MatMul", imag, turned))
    return found


def _fits(n: Number, columns: Number) -> bool:
    """Whether a transform is a product with a table; of a free size too, since that takes a fifth of the nodes."""
    return not (isinstance(n, int) and isinstance(columns, int) and n * columns > _LARGEST)


def _expand_to_real(t: Tables, node: ir.Node) -> ir.Value:
    real, imag = node.inputs[:2]
    rows, n = map(t.given, node.inputs[2:])
    assert real is not None
    counted = twice_but_ends(t, rows, n)
    scale = t.scale(n, node.attributes["power"].as_int())
    if not _fits(n, n):
        weight = t.typed(t.row(counted), real)
        parts = (t.w.op("Mul", real, weight), imag if imag is None else t.w.op("Mul", imag, weight))
        return chirped(t, parts, rows, Turn(n, inverse=True), n, scale)[0]
    cos, sin = t.angles(rows, n, n, many=True)
    scale = t.times(counted, scale)
    found = t.w.op("MatMul", real, t.typed(t.times(cos, scale), real))
    if imag is not None:
        found = t.w.op("Sub", found, t.w.op("MatMul", imag, t.typed(t.times(sin, scale), real)))
    return found


_FORMS: dict[str, Callable[[Tables, ir.Node], ir.Value]] = {
    "Transform": _expand_transform,
    "ToReal": _expand_to_real,
    "Convolution": expand_convolution,
}
