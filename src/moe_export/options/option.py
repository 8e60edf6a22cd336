"""`Option`: one option of the command line, and everything that is made from it.

From the table of these (`moe_export.options.table`) come click's options and their help, the command that a report
gives for doing it again, and the choices that a graph's metadata keep for error localisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GROUPS = (
    "Model",
    "Graph",
    "Weights",
    "Planning",
    "Comparison",
    "Tolerances",
    "Where they differ",
    "Mutants",
    "Rewriting",
    "Of an ONNX file",
    "Of a Python file",
    "Of an equation",
    "Measuring",
    "Text",
    "Picture",
    "Experts over ranks",
    "TensorRT engines",
    "Pipeline",
    "Output",
)
"""The groups of options, in the order in which help shows them."""
COMMANDS = (
    "export",
    "verify",
    "judge",
    "mutate",
    "rewrite",
    "routing",
    "axes",
    "build",
    "check",
    "bench",
    "generate",
    "view",
    "diff",
    "plan",
    "report",
    "explain",
    "schema",
)
EXPORTING = ("export", "report")
STAGES = (
    "fold",
    "trace",
    "outline",
    "einsums",
    "translate",
    "expand",
    "name",
    "simplify",
    "share",
    "order",
    "precision",
    "quantize",
    "sides",
    "attention",
    "engine",
)
"""The names of `export.stages.PIPELINE`, which takes seconds to import."""
READERS = (*STAGES, "load", "gates", "weights", "comparison", "engines", "ranks", "command")
"""What may read an option: a stage; loading the model; cutting gates out; storing weights; choosing and judging the
cases of a comparison; building engines; splitting over ranks; or the command alone."""


@dataclass(frozen=True)
class Option:
    """One option, of one command or of several in which it means the same.

    Attributes:
        name: Its name in Python.
        spelling: As it is typed: `-o/--output`; `--no-verify` for a flag that is on without it.
        group: One of `GROUPS`.
        help: A sentence or two.
        commands: The commands that have it.
        read_by: What reads it, of `READERS`.
        type: `str`, `int`, `float`, `bool` for a flag, or a type of click's.
        default: What holds where it is not given.
        otherwise: The same in words, where `default` does not say it.
        metavar: How help shows its value.
        repeatable: Whether it may be given several times.
        required: Whether it must be given.
        goes_with: The name in Python of the option without which this one means nothing.
        first: Whether the first screen of a long help shows it.
    """

    name: str
    spelling: str
    group: str
    help: str
    commands: tuple[str, ...]
    read_by: tuple[str, ...] = ("command",)
    type: Any = str
    default: Any = None
    otherwise: str = ""
    metavar: str | None = None
    repeatable: bool = False
    required: bool = False
    goes_with: str = ""
    first: bool = False

    @property
    def is_flag(self) -> bool:
        """Whether it takes no value."""
        return self.type is bool

    @property
    def words(self) -> tuple[str, ...]:
        """All ways to type it: `-o` and `--output`."""
        return tuple(self.spelling.split("/"))

    @property
    def word(self) -> str:
        """The longest of them."""
        return max(self.words, key=len)

    @property
    def unset(self) -> Any:
        """Its value where it is not given."""
        if self.repeatable:
            return ()
        if self.is_flag and self.default is None and "/--no-" not in self.spelling:
            return self.spelling.startswith("--no-")
        return self.default
