"""The engines that a plan can be made for, and what things cost there.

The unit is the time to move one element through memory. Numbers are rough on purpose: they rank the plans of
one equation and predict nothing. Those of `onnxruntime-cpu` follow measurements (tests/bench); no GPU was at
hand for the others, so there they follow what the engines are known to do.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_export.errors import EquationError


@dataclass(frozen=True)
class Target:
    """What steps cost on one engine.

    Attributes:
        name: As the user writes it.
        copies: Whether a matmul copies an operand that it broadcasts along some of its batch axes (torch does),
            and sizes are read for nothing; engines for ONNX follow strides, and pay for each size looked up.
        node: A step that computes nothing: the engine still walks over it.
        transpose: A permute, whatever its size: it also keeps its neighbours from being fused.
        swap: Moving an element by a permute of the last two axes, which often becomes part of a matrix product.
        rows: Moving an element by a permute that leaves the last axis where it is.
        move: Moving an element by a permute that takes one axis (or neighbours, as one) elsewhere.
        scatter: Moving an element by any other permute.
        product: Writing an element of an elementwise product, which reads two others.
        span: Beginning a run of elements in which each operand of a broadcast product is read in order, or is one.
        sum: Reading an element of a sum.
        sum_rows: Likewise, where the last axis is among those that are summed.
        batch: Starting one small matrix product among many.
        read: Reading an element of an operand of one of them.
        flop: A multiply-add inside a matrix product, far cheaper than a pass over memory.
        splits: Whether a scatter is written as two permutes that are cheaper (`permutes`).
        vectors: Whether a matrix product may take a vector. ONNX Runtime 1.31 fuses a Transpose (the user's, for
            example) into a MatMul and then forgets it if the right operand is a vector: silently wrong.
    """

    name: str
    copies: bool = False
    node: float = 400.0
    transpose: float = 4000.0
    swap: float = 1.5
    rows: float = 2.0
    move: float = 2.0
    scatter: float = 2.0
    product: float = 1.0
    span: float = 0.0
    sum: float = 1.0
    sum_rows: float = 1.0
    batch: float = 64.0
    read: float = 0.25
    flop: float = 0.05
    splits: bool = False
    vectors: bool = False


TARGETS = {
    target.name: target
    for target in (
        Target("onnx"),
        # As tests/bench/einsum_prices.py found them.
        Target(
            "onnxruntime-cpu",
            node=1400.0,
            transpose=1000.0,
            swap=1.2,
            rows=2.0,
            move=2.0,
            scatter=10.0,
            product=1.4,
            span=18.0,
            sum=1.2,
            sum_rows=0.2,
            batch=400.0,
            read=0.17,
            flop=0.07,
            splits=True,
        ),
        # A kernel launch costs some thousand elements of traffic, a batched product one launch in all.
        Target("onnxruntime-cuda", node=4000.0, transpose=8000.0, batch=2.0, flop=0.01),
        # Chains of elementwise steps are fused into one kernel; moves without data are free.
        Target("tensorrt", node=1000.0, transpose=8000.0, batch=2.0, flop=0.01),
        Target("torch", copies=True, vectors=True),
    )
}


def read_target(name: str) -> Target:
    """The target of a name.

    Raises:
        EquationError: There is none of this name.
    """
    if name not in TARGETS:
        raise EquationError(f"there is no target {name!r}", hint=f"the targets are: {', '.join(TARGETS)}")
    return TARGETS[name]


def target_for(engine: str) -> str:
    """The target to plan for, of the name of an engine that may be a kind of one, as `tensorrt-sm100` is.

    >>> target_for("tensorrt-sm100"), target_for("openvino")
    ('tensorrt', 'onnx')
    """
    name = engine.partition("-sm")[0]
    return name if name in TARGETS else "onnx"
