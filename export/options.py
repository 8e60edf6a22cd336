"""`Options`: what the user may choose of an export."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from moe_export.export.experts.choose import Choice, Target
from moe_export.export.quantize.scheme import Packing, Scheme
from moe_export.export.recurrence.recurrences import Mode
from moe_export.export.tracing.dims import DimRequest


@dataclass(frozen=True)
class Options:
    """What the user may choose.

    Attributes:
        opset: 17 or newer.
        dims: Which dimensions to leave free, and their names.
        gates: True for every gate, False for none, or the module path of one.
        simplify: Whether to try onnxsim.
        experts: How loops over experts are lowered: a name of `experts.choose.LOWERINGS`, `auto`, or `keep` for as
            they were written.
        recurrence: `auto` folds loops over a length and notes those that it cannot, `scan` and `chunked` insist,
            `unrolled` leaves them as traced, with their length fixed.
        unroll: Steps that an iteration of a `Scan` takes.
        decode: Whether to write the graph of one step, too, its states as inputs and outputs.
        decoder: Whether the graph is that of new tokens after earlier ones, in place of the model's own.
        attention: How a decoder's attention is written: `standard`, or `contrib` for ONNX Runtime's own operator.
        dtype: `float32`, or what the parts of the graph that can bear it compute in: `float16` or `bfloat16`.
        float32: Paths of modules that stay float32 then.
        weights_dtype: What weights are packed as; `float32` for not at all.
        quantize: Which weights are: `experts`, `linear`, `all`, or patterns of names.
        block_size: Weights that share a scale; None for what is usual (`quantize.scheme`).
        zero_points: Whether packed weights have zero points.
        calibrate: Files of inputs that rounding goes by.
        target: The engine that the graph is for: a name of `experts.choose.TARGETS`.
    """

    opset: int = 17
    dims: DimRequest = field(default_factory=DimRequest)
    gates: bool | str = True
    simplify: bool = True
    experts: Choice = "auto"
    recurrence: Mode = "auto"
    unroll: int = 1
    decode: bool = False
    decoder: bool = False
    attention: Literal["standard", "contrib"] = "standard"
    target: Target = "onnxruntime-cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    float32: tuple[str, ...] = ()
    weights_dtype: Literal["float32"] | Packing = "float32"
    quantize: str = "experts"
    block_size: int | None = None
    zero_points: bool = False
    calibrate: tuple[str, ...] = ()

    def at_opset(self) -> Options:
        """The same at an opset that packed weights can be in: the one that was asked for, if it is new enough."""
        scheme = self.scheme
        return self if scheme is None or scheme.opset <= self.opset else replace(self, opset=scheme.opset)

    @property
    def scheme(self) -> Scheme | None:
        """How weights are packed; None for not at all."""
        if self.weights_dtype == "float32":
            return None
        return Scheme.of(
            self.weights_dtype,
            self.block_size,
            zero_points=self.zero_points,
            tensorrt=self.target.startswith("tensorrt"),
        )
