"""The table of all options, and what is asked of it: those of a command, and how one is typed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_export.options.comparison import ARTIFACTS, CASES, DIFFERING, MUTANTS, TOLERANCES
from moe_export.options.engines import ENGINES
from moe_export.options.making import GRAPH, MODEL, PACKING, PIPELINE, RANKS, WEIGHTS
from moe_export.options.option import GROUPS, Option
from moe_export.options.output import PLACES, PRINTED, REPORTS
from moe_export.options.showing import MEASURING, PICTURES, PLANNING, REWRITING, TEXT

OPTIONS: tuple[Option, ...] = (
    *(*MODEL, *GRAPH, *WEIGHTS, *PACKING, *RANKS, *PIPELINE),
    *(*ARTIFACTS, *CASES, *TOLERANCES, *DIFFERING, *MUTANTS),
    *ENGINES,
    *(*REWRITING, *MEASURING, *TEXT, *PICTURES, *PLANNING),
    *(*PLACES, *REPORTS, *PRINTED),
)


def options_of(command: str) -> tuple[Option, ...]:
    """The options of a command, group by group."""
    own = (option for option in OPTIONS if command in option.commands)
    return tuple(sorted(own, key=lambda option: GROUPS.index(option.group)))


def names_in(*tables: tuple[Option, ...]) -> tuple[str, ...]:
    """The names in Python of the options of some tables, each once."""
    return tuple(dict.fromkeys(option.name for table in tables for option in table))


def typed(option: Option, value: Any) -> Iterator[str]:
    """An option as it is typed for a value; nothing where it has that value without being typed.

    Example:
        >>> opset = next(option for option in OPTIONS if option.name == "opset")
        >>> list(typed(opset, 18)), list(typed(opset, 17))
        (['--opset', '18'], [])
    """
    if value == option.unset:
        return
    if option.is_flag:
        yield max((word for word in option.words if word.startswith("--no-") != value), key=len)
        return
    for each in value if option.repeatable else (value,):
        yield from (option.word, str(each))
