"""The commands that show graphs: `view`, `diff`, `report`. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from moe_export.commands.force import force_option

Command = Callable[..., Any]
_LEVELS = click.Choice(["blocks", "nodes"])
_NOT_OF_A_REPORT = ("model", "output", "stop_after", "show")


def add_report_command(group: click.Group) -> None:
    """Add `report`, which takes whatever `export` takes, but for where it goes.

    Args:
        group: The command line; it has `export` already.
    """

    def report_command(**options: Any) -> int:
        """Export a model, verify it, and tell all of it as one page: offline, for a browser or a printer."""
        from moe_export.commands.report import run_report

        return run_report(**options)

    command = group.command("report")(report_command)
    own: list[click.Parameter] = [
        click.Argument(["model"], metavar="MODEL.PY[:CLASS]"),
        click.Option(["-o", "--output"], metavar="FILE.html", help="Where the page goes  [default: MODEL.report.html]"),
        click.Option(["--graphs"], metavar="FOLDER", help="Keep the graphs, and the report as JSON, here."),
        click.Option(["--before/--no-before"], default=True, show_default=True,
                     help="Show the graph as it is without any rewriting, too."),
    ]  # fmt: skip
    shared = [param for param in group.commands["export"].params if param.name not in _NOT_OF_A_REPORT]
    command.params = [*own, *shared]


def add_graph_commands(group: click.Group, output_options: Callable[[Command], Command]) -> None:
    """Add the commands to the command line."""

    @group.command("view")
    @click.argument("graph", metavar="GRAPH.ONNX")
    @click.option("--svg", metavar="FILE.svg", help="Write a picture instead, without Netron and a browser.")
    @click.option("--level", type=_LEVELS, help="What is a box  [nodes for a small graph, else blocks].")
    @click.option(
        "--port", type=click.IntRange(0, 65535), default=0, help="Port on this machine  [default: a free one]"
    )
    @click.option("--browse/--no-browse", default=True, show_default=True, help="Open a browser.")
    @force_option
    @output_options
    def view_command(**options: Any) -> int:
        """Show a graph in Netron, on this machine only, until Ctrl-C; or write a picture of it (docs/seeing.md)."""
        from moe_export.commands.view import run_view

        return run_view(**options)

    @group.command("diff")
    @click.argument("before", metavar="BEFORE.ONNX")
    @click.argument("after", metavar="AFTER.ONNX")
    @click.option(
        "--size",
        "sizes",
        multiple=True,
        metavar="DIM=SIZE",
        help="A dynamic size (repeatable)  [seq 128, batch 1].",
    )
    @click.option("--svg", metavar="FILE.svg", help="Draw both side by side, what differs marked.")
    @click.option(
        "--level", type=_LEVELS, help="What is a box  [blocks where both graphs tell modules, else nodes]."
    )
    @force_option
    @output_options
    def diff_command(**options: Any) -> int:
        """Say what differs between two graphs: operators, weights, FLOPs, memory, inputs and outputs; exit 0."""
        from moe_export.commands.diff import run_diff

        return run_diff(**options)
