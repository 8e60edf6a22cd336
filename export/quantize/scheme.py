"""`Scheme`: the codes that weights are stored as, and how many weights share a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from moe_export.errors import UsageError

Packing = Literal["int8", "int4", "float8e4m3"]

_STORED: Mapping[tuple[Packing, bool], ir.DataType] = {
    ("int8", False): ir.DataType.INT8,
    ("int8", True): ir.DataType.UINT8,
    ("int4", False): ir.DataType.INT4,
    ("int4", True): ir.DataType.UINT4,
    ("float8e4m3", False): ir.DataType.FLOAT8E4M3FN,
}
_BLOCK_OF_4_BITS = 32
"""Weights that share a scale where nobody says otherwise: the usual block of 4 bits, 5 bits a weight with its scale."""
BLOCKED = 21
"""The opset from which on `DequantizeLinear` takes blocks, and 4 bits."""
_FLOAT8 = 19
"""The opset from which on it takes 8-bit floats."""


@dataclass(frozen=True)
class Scheme:
    """How weights are stored.

    Attributes:
        packing: Of a weight.
        block: Weights along the summed axis that share a scale; None for all of them, a scale for each output.
        zero_points: Whether a block also has the code of zero: its values need not lie around it.
        tensorrt: Whether TensorRT reads the graph: it takes positive scales only, and codes that `DequantizeLinear`
            reads, and nothing else. So a stack is dequantised before an expert is picked out of it.
    """

    packing: Packing
    block: int | None = None
    zero_points: bool = False
    tensorrt: bool = False

    @classmethod
    def of(
        cls, packing: Packing, block: int | None, *, zero_points: bool = False, tensorrt: bool = False
    ) -> Scheme:
        """The scheme for what the user asked for: 4 bits have blocks of 32 if nothing else is said.

        Raises:
            UsageError: There is no such scheme.
        """
        if block is not None and block & (block - 1):
            raise UsageError(f"--block-size is a power of two, not {block}", hint="--block-size 32")
        if zero_points and packing == "float8e4m3":
            raise UsageError(
                "--zero-points: 8-bit floats lie around zero", hint="--weights-dtype int8 has zero points"
            )
        if block is None and packing == "int4":
            block = _BLOCK_OF_4_BITS
        return cls(packing, block, zero_points, tensorrt)

    @property
    def stored(self) -> ir.DataType:
        """The type of the codes."""
        return _STORED[self.packing, self.zero_points]

    @property
    def opset(self) -> int:
        """The lowest opset whose `DequantizeLinear` takes these codes."""
        if self.packing == "int4" or self.block is not None or self.tensorrt:
            return BLOCKED
        return _FLOAT8 if self.packing == "float8e4m3" else 17

    @property
    def signed(self) -> bool:
        """Whether a scale may be negative. Codes of 4 bits go from -8 to 7, so a block whose extreme is positive is
        nearer to a grid that is turned round.
        """
        return self.packing == "int4" and not self.zero_points and not self.tensorrt

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest code."""
        if self.packing == "float8e4m3":
            return -448.0, 448.0
        bits = 4 if self.packing == "int4" else 8
        return (0.0, 2.0**bits - 1) if self.zero_points else (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)

    def __str__(self) -> str:
        shared = "a scale for each output" if self.block is None else f"blocks of {self.block}"
        return f"{self.packing}, {shared}{', zero points' if self.zero_points else ''}"
