"""The commands and options for engines: `build`, `check`, `bench`, `--engine` of an export. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from moe_export.commands.force import force_option

Command = Callable[..., Any]


def engine_options(*, required: bool) -> Callable[[Command], Command]:
    """The options of a command that builds engines."""

    def add(command: Command) -> Command:
        for option in reversed(_options(required)):
            command = option(command)
        return command

    return add


def _options(required: bool) -> list[Callable[[Command], Command]]:
    return [
        click.option("--engine", required=required, metavar="sm89,sm120",
                     help="Build a TensorRT engine for each: sm75 to sm121, portable (Ampere and newer; no GPU "
                     "needed), or current (the GPU of this machine)."),
        click.option("--range", "ranges", multiple=True, metavar="DIM=MIN:OPT:MAX",
                     help="Sizes that the engine takes, and is fastest at (repeatable)  [1:128:1024; batch 1:1:8]"),
        click.option("--profile", "profiles", multiple=True, metavar="DIM=MIN:OPT:MAX,...",
                     help="One more profile, on top of --range (repeatable)."),
        click.option("--builder", type=click.Choice(["tensorrt_rtx", "tensorrt"]),
                     help="What builds  [tensorrt_rtx; tensorrt for current, if it is there]."),
        click.option("--workspace", metavar="2GB", help="The most memory for intermediate values."),
        click.option("--strip-weights", is_flag=True, help="Leave the weights out of the engine (needs a GPU)."),
        click.option("--refit", is_flag=True, help="Make weights replaceable (needs a GPU)."),
        click.option("--tf32", is_flag=True, help="Faster and coarser float32 products."),
        click.option("--require", type=click.Choice(["tensorrt"]),
                     help="Exit 4 if the engines cannot be run here; without it that is only said."),
        click.option("--timing-cache", metavar="FILE", help="Keep timings for the next build (tensorrt only)."),
        click.option("--layers", is_flag=True, help="Write what each engine is made of, as JSON."),
    ]  # fmt: skip


def add_commands(
    group: click.Group,
    model_options: Callable[[Command], Command],
    output_options: Callable[[Command], Command],
) -> None:
    """Add the commands to the command line."""

    @group.command("build")
    @click.argument("graph", metavar="GRAPH.ONNX")
    @click.option("-o", "--output", metavar="FOLDER", help="Where the engines go  [beside the graph].")
    @engine_options(required=True)
    @force_option
    @output_options
    def build_command(**options: Any) -> int:
        """Build TensorRT engines of a graph: GRAPH.sm89.engine, and GRAPH.engines.json that describes them."""
        from moe_export.commands.build import run_build

        return run_build(**options)

    @group.command("check")
    @click.argument("graph", metavar="GRAPH.ONNX")
    @click.option("--target", type=click.Choice(["tensorrt"]), required=True, help="The engine to check for.")
    @output_options
    def check_command(**options: Any) -> int:
        """Say what TensorRT is known to refuse in a graph, without TensorRT; exit 1 if it refuses anything.

        Each line names the node, the model's line and module, the rule, and the option that avoids it. That nothing is
        found proves nothing: only a build does.
        """
        from moe_export.commands.check import run_check

        return run_check(**options)

    @group.command("bench")
    @click.argument("graph", metavar="GRAPH.ONNX")
    @click.option("--against", metavar="MODEL.PY[:CLASS]", help="Measure the model in PyTorch, too.")
    @click.option(
        "--size",
        "sizes",
        multiple=True,
        metavar="DIM=SIZE",
        help="A dynamic size (repeatable)  [seq 128, batch 1].",
    )
    @click.option(
        "--repeat", type=click.IntRange(1), default=50, show_default=True, help="Runs that are measured."
    )
    @click.option("--compile", "compiled", is_flag=True, help="With --against: torch.compile, too.")
    @model_options
    @output_options
    def bench_command(**options: Any) -> int:
        """Measure a graph, and the engines beside it, on every backend that is there; each in a process of its own."""
        from moe_export.commands.bench import run_bench

        return run_bench(**options)
