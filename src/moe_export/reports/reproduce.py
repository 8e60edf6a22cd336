"""The commands that reproduce an export, a comparison or one case, with every option that was given."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moe_export.options.option import Option
from moe_export.options.table import options_of, typed

_ALWAYS = ("opset", "seed")
"""Options that are always written out, since their defaults may change."""
_COMPARED = {"load", "comparison"}


def reproduce_commands(model: str, graph: str, given: Mapping[str, Any]) -> list[str]:
    """The command for the same export, and the command to compare its graph again.

    Args:
        model: The model as the user named it, `MODEL.PY[:CLASS]`.
        graph: The file name of the whole model's graph.
        given: The options of the export, by their names in Python; `opset` and `seed` among them.
    """
    exporting = options_of("export")
    own = (option for option in exporting if option.group != "Output")
    shared = {(option.name, option.group) for option in exporting}
    both = [option for option in compared() if (option.name, option.group) in shared]
    opset, seed = str(given["opset"]), str(given["seed"])
    return [
        shlex.join(["moe-export", model, "--opset", opset, "-o", "out", "--seed", seed, *_words(own, given)]),
        shlex.join(
            ["moe-export", "verify", f"out/{graph}", "--against", model, "--seed", seed, *_words(both, given)]
        ),
    ]


def reproduce_command(graph: str, given: Mapping[str, Any]) -> str:
    """The command to run a case of a comparison again, without `--against`, `--seed` and `--case`.

    Args:
        graph: The candidate.
        given: The options of `verify`, by their names in Python.
    """
    return shlex.join(["moe-export", "verify", graph, *_words(compared(), given)])


def compared() -> list[Option]:
    """The options of `verify` that decide what is compared and how it is judged."""
    return [
        option for option in options_of("verify") if option.name != "case" and _COMPARED & set(option.read_by)
    ]


def _words(options: Iterable[Option], given: Mapping[str, Any]) -> Iterator[str]:
    for option in options:
        if option.name not in _ALWAYS and option.name in given:
            yield from typed(option, given[option.name])
