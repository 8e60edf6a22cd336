"""`Request`: what is asked of a comparison besides its two artifacts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_export.comparison_settings import DEFAULT_SETTINGS, ComparisonSettings
from moe_export.verify import Tolerance
from moe_export.verify.golden import Recorder

if TYPE_CHECKING:
    from moe_export.comparing.explaining import Explanation


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked besides the two artifacts.

    Attributes:
        tolerance: For floats.
        seed: Of the inputs.
        settings: How much to try.
        init: Arguments of a model file's class.
        inputs: Example inputs of a model file's class.
        recorder: Keeps what the reference computes.
        why: Keeps what was found out about graphs that are not equal to their model; None to look for nothing.
        inside: Whether nodes are looked at where the outputs are right.
        memory: Bytes that the weights of a model file may have to be read as a whole.
        how: `whole` or `layers`, if one was asked for.
        dtype: What the candidate may compute in: `float16` and `bfloat16` widen the tolerance.
        gate: The module whose gate the candidate is.
    """

    tolerance: Tolerance = field(default_factory=Tolerance)
    seed: int = 0
    settings: ComparisonSettings = DEFAULT_SETTINGS
    init: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    recorder: Recorder | None = None
    why: list[Explanation] | None = None
    inside: bool = False
    memory: int = 2**30
    how: str | None = None
    dtype: str = "float32"
    gate: str | None = None
