"""How far apart equal floats may be: |candidate - reference| <= atol + rtol * |reference|.

The defaults are a few roundings of the output's dtype. float32's is the usual 1e-5 (84 roundings: sums over
a few hundred terms, taken in another order, stay below it). In the narrow types intermediate values of about
1 are rounded before they cancel, so atol equals rtol there too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from moe_export.errors import UsageError


@dataclass(frozen=True)
class Margin:
    """The tolerance of one output."""

    rtol: float
    atol: float

    def __post_init__(self) -> None:
        if not (0 <= self.rtol < float("inf") and 0 <= self.atol < float("inf")):  # NaN fails this too
            raise UsageError(
                f"a tolerance must be finite and not negative: rtol={self.rtol}, atol={self.atol}"
            )

    def __str__(self) -> str:
        return f"rtol={self.rtol:g} atol={self.atol:g}"


DEFAULTS: Mapping[str, Margin] = MappingProxyType(
    {
        "float64": Margin(1e-10, 1e-10),  # leaves no room for a constant that was stored as float32 (6e-8)
        "float32": Margin(1e-5, 1e-5),  # epsilon 1.2e-7
        "float16": Margin(4e-3, 4e-3),  # 4 x epsilon, 9.8e-4
        "bfloat16": Margin(3e-2, 3e-2),  # 4 x epsilon, 7.8e-3
        "float8_e4m3fn": Margin(0.25, 0.25),  # 2 x epsilon: such values are stored, hardly computed with
        "float8_e4m3fnuz": Margin(0.25, 0.25),
        "float8_e5m2": Margin(0.5, 0.5),
        "float8_e5m2fnuz": Margin(0.5, 0.5),
    }
)


@dataclass(frozen=True)
class Tolerance:
    """The tolerance of every output: its own if it has one, else the user's, else its dtype's default.

    Args:
        rtol: Relative part, for all outputs; None takes the default of each output's dtype.
        atol: Absolute part, likewise.
        outputs: Margins of single outputs, by name; these win over everything.
        usual: Replaces the defaults of the outputs' dtypes.
    """

    rtol: float | None = None
    atol: float | None = None
    outputs: Mapping[str, Margin] = field(default_factory=dict)
    usual: Margin | None = None

    def __post_init__(self) -> None:
        Margin(self.rtol or 0.0, self.atol or 0.0)  # refuse nonsense here, not in the middle of a comparison

    def unknown(self, outputs: Iterable[str]) -> list[str]:
        """Outputs with a margin of their own that do not exist: a misspelt name."""
        return sorted(set(self.outputs) - set(outputs))

    def of(self, output: str, dtype: str) -> Margin:
        """The margin of `output`, whose dtype is `dtype`; a dtype without a row gets float32's."""
        if output in self.outputs:
            return self.outputs[output]
        default = self.usual or DEFAULTS.get(dtype, DEFAULTS["float32"])
        return Margin(
            default.rtol if self.rtol is None else self.rtol, default.atol if self.atol is None else self.atol
        )

    def is_by_hand(self, output: str) -> bool:
        """Whether the user chose the margin of `output`: then nothing beyond it is excused."""
        return output in self.outputs or self.rtol is not None or self.atol is not None


@dataclass(frozen=True)
class FlipBudget:
    """How many tokens of an output may go to another expert, each in a tie: a share of them, or a number.

    Args:
        limit: A share (0.005 is 0.5 %), or a number of tokens.
        share: Which of the two it is.
    """

    limit: float
    share: bool = True

    def allowed(self, tokens: int) -> float:
        """How many of so many tokens may."""
        return self.limit * tokens if self.share else self.limit

    def __str__(self) -> str:
        return f"{self.limit * 100:g}%" if self.share else f"{self.limit:g}"

    @classmethod
    def parse(cls, text: str, option: str = "--flips") -> FlipBudget:
        """`0.5%` or `3`; `option` is what it was given to, for the error.

        Raises:
            UsageError: It is neither.
        """
        share = text.strip().endswith("%")
        try:
            limit = float(text.strip().removesuffix("%"))
        except ValueError:
            limit = -1.0
        if not (0 <= limit <= 100 if share else limit >= 0 and limit == int(limit)):
            raise UsageError(
                f"{option} is a share or a number of tokens, not {text!r}", hint=f"{option} 0.5%"
            )
        return cls(limit / 100 if share else limit, share)


def parse_tolerances(texts: Iterable[str]) -> dict[str, Margin]:
    """`y=1e-3,1e-4`: rtol and atol of the output `y`.

    Raises:
        UsageError: The text has another form.
    """
    found: dict[str, Margin] = {}
    for text in texts:
        name, _, figures = text.rpartition("=")
        try:
            rtol, atol = (float(figure) for figure in figures.split(","))
        except ValueError:
            raise UsageError(
                f"--tolerance takes OUTPUT=RTOL,ATOL, not {text!r}", hint="--tolerance y=1e-3,1e-4"
            ) from None
        if not name:
            raise UsageError(f"--tolerance names no output: {text!r}", hint="--tolerance y=1e-3,1e-4")
        found[name] = Margin(rtol, atol)
    return found
