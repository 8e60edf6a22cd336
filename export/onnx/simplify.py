"""onnxsim, where it helps: its result is kept only if it is smaller, valid, and computes the same.

onnxsim folds constants and fuses nodes, but it sometimes makes a graph larger (a MatMul and an Add of any rank
become Reshape, Gemm, Reshape) and it drops the metadata of every node. So it is a proposal, not a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from moe_export.export.onnx.counted_sizes import without_counted
from moe_export.export.onnx.float32_kernels import NARROW, wide_outside, with_float32_kernels
from moe_export.export.onnx.recipes import has_recipes
from moe_export.export.onnx.weight_names import name_constants

_LIMIT = 512 * 2**20  # bytes of weights; onnxsim copies a model several times
_SKIPPED = ["fuse_lp_normalization"]  # x / ReduceL2(x): at zeros ONNX Runtime's LpNormalization is 0, not NaN
_EDGES = (0.0, np.inf, -np.inf, np.nan)  # where a fusion that is right elsewhere is found out


def as_numpy(tensor: torch.Tensor) -> Any:
    """A tensor as an array; bfloat16, which NumPy lacks, through ml_dtypes."""
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@dataclass(frozen=True)
class Simplified:
    """What came of it.

    Attributes:
        model: The simplified model, or the given one.
        note: What was done, or why nothing was.
    """

    model: ir.Model
    note: str


def simplify(model: ir.Model, example: Mapping[str, np.ndarray]) -> Simplified:
    """Offer a model to onnxsim and take the result if it is better and right.

    Args:
        model: The model; it is not changed.
        example: Inputs by name, on which both models must give the same outputs, bit for bit in integers and
            within 1e-6 in floats; so, too, with floats that are all zero, infinite or NaN, unless a loop asks values
            whether it has ended.
    """
    if has_recipes(model):
        return Simplified(model, "onnxsim left out: weights are taken from files")
    weights = sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    if weights > _LIMIT:
        return Simplified(model, f"onnxsim left out: {weights / 2**20:.0f} MiB of weights")
    before = ir.to_proto(model)
    try:
        import onnxsim

        after, valid = onnxsim.simplify(before, skipped_optimizers=_SKIPPED)
    except Exception as error:
        return Simplified(model, f"onnxsim left out: it raised {type(error).__name__}")
    counts = f"{_size(before.graph)} → {_size(after.graph)} nodes"
    if not valid or _size(after.graph) >= _size(before.graph):
        return Simplified(model, f"onnxsim skipped (no reduction: {counts})")
    # A loop that halves a number until it is small never ends at infinity.
    ends = not any(node.op_type == "Loop" for node in model.graph.all_nodes())
    if not _same(before, after, example, ends=ends):
        return Simplified(model, f"onnxsim left out: its graph computes something else ({counts})")
    return Simplified(_with_metadata(ir.from_proto(after), model), f"onnxsim: {counts}")


def _size(graph: onnx.GraphProto) -> int:
    """Nodes, those of subgraphs included."""
    inner = (
        _size(attribute.g) for node in graph.node for attribute in node.attribute if attribute.HasField("g")
    )
    return len(graph.node) + sum(inner)


# In the model's own type, unlike what is decided of a model's meaning: both graphs are right, and whether a fused
# product's rounding is within 1e-6 decides about a few nodes only. What is taken is verified like any other graph.
def _same(
    before: onnx.ModelProto, after: onnx.ModelProto, example: Mapping[str, np.ndarray], *, ends: bool
) -> bool:
    try:
        onnx.checker.check_model(after, full_check=True)
        left, right = _session(before), _session(after)
        example = {
            name: array.astype(np.float32) if array.dtype.name in {"bfloat16", "float16"} else array
            for name, array in example.items()
        }
        if not _agree(left.run(None, dict(example)), right.run(None, dict(example))):
            return False
    except Exception:
        return False
    return all(_agree_or_fail(left, right, feeds) for feeds in (_on_the_edge(example) if ends else ()))


def _agree_or_fail(left: Any, right: Any, feeds: Mapping[str, np.ndarray]) -> bool:
    """What is no number may be no index either: a graph that fails there has nothing to keep."""
    try:
        expected = left.run(None, feeds)
    except Exception:
        return True
    try:
        return _agree(expected, right.run(None, feeds))
    except Exception:
        return False


def _on_the_edge(example: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The example with all floats at one value."""
    floats = {name: value for name, value in example.items() if value.dtype.kind == "f"}
    for edge in _EDGES if floats else ():
        yield {**example, **{name: np.full_like(value, edge) for name, value in floats.items()}}


def _agree(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> bool:
    return len(left) == len(right) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and (
            np.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
            if a.dtype.kind == "f"
            else bool((a == b).all())
        )
        for a, b in zip(left, right, strict=True)
    )


def _session(model: onnx.ModelProto) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    known = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    values = [*known.graph.inputs, *(value for node in known.graph.all_nodes() for value in node.outputs)]
    if any(value.dtype in NARROW for value in values):
        # kernels of half precision, where there are any, are other ones for fused nodes, and flip experts
        model = ir.to_proto(wide_outside(with_float32_kernels(known)))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _with_metadata(simplified: ir.Model, original: ir.Model) -> ir.Model:
    """Put back the metadata of the nodes that are still there; a new node takes that of its first producer.

    So with names: constants are called after what they hold, and a size that onnxsim's inference counted is the one
    that it was before, or has no name.
    """
    before = {str(value.name): value for node in original.graph.all_nodes() for value in node.outputs}
    known = {*before, *original.graph.initializers}
    name_constants(simplified.graph, known)
    for node in simplified.graph.all_nodes():
        for value in node.outputs:
            producer = before[str(value.name)].producer() if value.name in before else None
            if producer is not None:
                node.metadata_props.update(producer.metadata_props)
                break
        for value in node.outputs:
            old = before.get(str(value.name))
            value.shape = without_counted(value.shape, old.shape if old is not None else None)
    return simplified
