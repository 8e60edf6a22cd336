"""`Request`: the arguments of a comparison besides its two artifacts."""

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
    """The arguments of a comparison besides its two artifacts.

    Attributes:
        tolerance: For floats.
        seed: Of the inputs.
        settings: How much to try.
        init: Arguments of a model file's class.
        inputs: Example inputs of a model file's class.
        recorder: Records the reference's inputs and outputs for a golden file.
        why: A list that explanations of graphs which are not equal to their model are added to; None for none.
        inside: Whether nodes are compared, too, where the outputs are right.
        memory: Bytes of weights up to which a model file is loaded as a whole.
        how: `whole` or `layers` (block by block), if the user chose; else None.
        dtype: The narrowest type that the candidate may compute in: `float16` and `bfloat16` widen the tolerance.
        gate: The module whose gate the candidate is; None to decide by its inputs and outputs.
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
