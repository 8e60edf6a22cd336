"""The commands that show graphs: `view`, `diff`. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]
_LEVEL = click.option(
    "--level",
    type=click.Choice(["blocks", "nodes"]),
    help="What is a box of the picture  [nodes for a small graph, else blocks].",
)


def add_graph_commands(group: click.Group, output_options: Callable[[Command], Command]) -> None:
    """Add the commands to the command line."""

    @group.command("view")
    @click.argument("graph", metavar="GRAPH.ONNX")
    @click.option("--svg", metavar="FILE.svg", help="Write a picture instead, without Netron and a browser.")
    @_LEVEL
    @click.option(
        "--port", type=click.IntRange(0, 65535), default=0, help="Port on this machine  [default: a free one]"
    )
    @click.option("--browse/--no-browse", default=True, show_default=True, help="Open a browser.")
    @output_options
    def view_command(**options: Any) -> int:
        """Show a graph in Netron, on this machine only, until Ctrl-C; or write a picture of it (docs/seeing.md)."""
        from moe_export.cli_view import run_view

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
    @_LEVEL
    @output_options
    def diff_command(**options: Any) -> int:
        """Say what differs between two graphs: operators, weights, FLOPs, memory, inputs and outputs; exit 0."""
        from moe_export.cli_diff import run_diff

        return run_diff(**options)
