"""How to type it again: the command of this run, as an export and as a comparison, with every option that was given."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import click
from click.core import ParameterSource

_NOT_OF_AN_EXPORT = {"model", "output", "graphs", "before", "quiet", "as_json", "debug", "force"}
_OF_A_COMPARISON = {
    "inputs", "init", "provider", "atol", "rtol", "tolerances", "flips", "thorough", "seeds", "at", "own_inputs",
}  # fmt: skip


def commands_of(context: click.Context | None, graph: str) -> list[str]:
    """What to type for the same graphs, and to compare them again.

    Args:
        context: Of `report`; None outside the command line, where nothing is known of what was typed.
        graph: The file of the whole model.
    """
    if context is None:
        return []
    model = context.params["model"]
    opset, seed = str(context.params["opset"]), str(context.params["seed"])
    given = [param for param in context.command.params if _was_given(context, param)]
    own = [part for param in given if param.name not in {"opset", "seed"} for part in _typed(context, param)]
    compared = [part for param in given if param.name in _OF_A_COMPARISON for part in _typed(context, param)]
    return [
        shlex.join(["moe-export", model, "--opset", opset, "-o", "out", "--seed", seed, *own]),
        shlex.join(["moe-export", "verify", f"out/{graph}", "--against", model, "--seed", seed, *compared]),
    ]


def _was_given(context: click.Context, param: click.Parameter) -> bool:
    assert param.name is not None
    source = context.get_parameter_source(param.name)
    return param.name not in _NOT_OF_AN_EXPORT and source is ParameterSource.COMMANDLINE


def _typed(context: click.Context, param: click.Parameter) -> Iterator[str]:
    """An option as it is typed."""
    assert isinstance(param, click.Option)
    assert param.name is not None
    value = context.params[param.name]
    word = max(param.opts, key=len)
    if param.is_flag:
        yield word if value or not param.secondary_opts else max(param.secondary_opts, key=len)
        return
    for each in value if param.multiple else (value,):
        yield from (word, str(each))
