"""The commands that show graphs: `view`, `diff`, `report`. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from moe_export.cli_engines import engine_options

Command = Callable[..., Any]
_LEVELS = click.Choice(["blocks", "nodes"])
_EXPERTS = ["auto", "dense", "slices", "blocks", "gather", "loop", "contrib", "trt_moe", "keep"]
_REPORT: tuple[Callable[[Command], Command], ...] = (
    click.argument("model", metavar="MODEL.PY[:CLASS]"),
    click.option("-o", "--output", metavar="FILE.html", help="Where the page goes  [default: MODEL.report.html]"),
    click.option("--graphs", metavar="FOLDER", help="Keep the graphs, and the report as JSON, here."),
    click.option("--opset", type=int, default=17, show_default=True, help="ONNX opset, 17 or newer."),
    click.option("--experts", default="auto", show_default=True, help="How experts are computed, as for export.",
                 type=click.Choice(_EXPERTS)),
    click.option("--target", default="onnxruntime-cpu", show_default=True, help="The engine that the graph is for.",
                 type=click.Choice(["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-sm100"])),
    click.option("--recurrence", type=click.Choice(["auto", "scan", "chunked", "unrolled"]), default="auto",
                 show_default=True, help="How loops over a length are written, as for export."),
    click.option("--unroll", type=click.IntRange(1, 64), default=1, show_default=True,
                 help="Steps of a loop that a turn of its Scan takes."),
)  # fmt: skip


def add_report_command(group: click.Group, *own_options: Callable[[Command], Command]) -> None:
    """Add `report`.

    Args:
        group: The command line.
        own_options: Of models, of verification and of every command; applied from the last to the first.
    """

    def report_command(**options: Any) -> int:
        """Export a model, verify it, and tell all of it as one page: offline, for a browser or a printer."""
        from moe_export.cli_build import take_request
        from moe_export.cli_report import run_report

        engines = take_request(options)
        return run_report(**options, engines=engines)

    command: Command = report_command
    for option in (*reversed(own_options), engine_options(required=False), *reversed(_REPORT)):
        command = option(command)
    group.command("report")(command)


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
    @click.option(
        "--level", type=_LEVELS, help="What is a box  [blocks where both graphs tell modules, else nodes]."
    )
    @output_options
    def diff_command(**options: Any) -> int:
        """Say what differs between two graphs: operators, weights, FLOPs, memory, inputs and outputs; exit 0."""
        from moe_export.cli_diff import run_diff

        return run_diff(**options)
