"""Options that say how a graph is judged: on how many inputs, by which tolerance, as which part of the model.

A graph's own metadata say what it may lose and which part it is, too. But whoever wrote the file would then choose how
it is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]


def verify_options(command: Command) -> Command:
    """Add how much is tried, and how exactly, to a command."""
    for option in (
        click.option("--provider", type=click.Choice(["cpu", "cuda", "tensorrt"]), default="cpu", show_default=True,
                     help="Where onnxruntime runs."),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of the test inputs."),
        click.option("--atol", type=float, help="Absolute tolerance [float32: 1e-5]."),
        click.option("--rtol", type=float, help="Relative tolerance [float32: 1e-5]."),
        click.option("--tolerance", "tolerances", multiple=True, metavar="OUTPUT=RTOL,ATOL",
                     help="Tolerances of one output (repeatable)."),
        click.option("--flips", metavar="0.5%|N", help="How many tokens may go to another expert in a tie  [all]."),
        click.option("--thorough", is_flag=True, help="Every kind of values, at more sizes (docs/verify.md)."),
        click.option("--seeds", type=click.IntRange(1), default=1, show_default=True,
                     help="How many seeds, from --seed on."),
        click.option("--at", multiple=True, metavar="batch=1,seq=4096", help="Sizes to try, too (repeatable)."),
        click.option("--inputs", "own_inputs", multiple=True, metavar="FILE",
                     help="Your own inputs: .safetensors or .npz, by the inputs' names (repeatable)."),
        click.option("--time-limit", type=click.FloatRange(0), metavar="SECONDS",
                     help="Begin no further case then; what is cut off makes the verdict \"unfinished\", exit 5"
                     "  [no limit]."),
    ):  # fmt: skip
        command = option(command)
    return command


def judged_options(command: Command) -> Command:
    """Add them to a command."""
    for option in (
        click.option(
            "--dtype",
            type=click.Choice(["float32", "float16", "bfloat16"]),
            default="float32",
            show_default=True,
            help="What the graph may compute in: half precision widens the tolerance (docs/verify.md).",
        ),
        click.option("--gate", metavar="MODULE", help="The graph is the gate of this module of the model."),
    ):
        command = option(command)
    return command
