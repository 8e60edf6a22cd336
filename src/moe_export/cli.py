"""The command line: `moe-export model.py` exports; `verify`, `rewrite` and `view` are commands of their own.

Nothing heavy is imported before a command runs, so that `--help` is instant. Errors of the user are one message
and an exit code (see `errors`); a traceback is a defect of this tool, or `--debug`.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

import click

import moe_export
from moe_export.commands.reports import take_wanted
from moe_export.commands.terminal import TableCommand
from moe_export.errors import (
    INTERRUPTED,
    READER_GONE,
    MissingBackendError,
    MoeExportError,
    NotExportableError,
)
from moe_export.export.frontend.ended import no_exit
from moe_export.supervisor import drop_output

COMPLETING = "_MOE_EXPORT_COMPLETE"
"""Where a shell says that it completes a word (https://click.palletsprojects.com/en/stable/shell-completion/)."""


class _ReaderGoneError(Exception):
    """Nobody reads the output any more."""


class _ExportByDefault(click.Group):
    """A group whose default command is `export`: `moe-export model.py` is `moe-export export model.py`."""

    command_class = TableCommand

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            self._require_no_typo(args[0], ctx)
            args = ["export", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # click would take it for the end of the process
            raise _ReaderGoneError from error

    def _require_no_typo(self, word: str, ctx: click.Context) -> None:
        """Refuse what is nearly a command and no file, rather than look for a model of that name."""
        close = get_close_matches(word, self.commands, n=1)
        if close and word.isalpha() and not Path(word).exists():
            raise click.UsageError(f"No such command {word!r}. Did you mean {close[0]!r}?", ctx)


@click.group(
    cls=_ExportByDefault,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 equal, 1 not equal, 2 wrong use or unreadable input, 3 cannot be exported, "
    "4 a required backend is missing, 5 unfinished: a time limit cut the comparison off, "
    "70 a defect of moe-export, 128 + N ended by signal N (130: Ctrl-C).",
)
@click.version_option(moe_export.__version__, prog_name="moe-export", message="%(prog)s %(version)s")
def cli() -> None:
    """Export Mixture-of-Experts and Mamba-style PyTorch models to verified ONNX graphs.

    \b
    moe-export model.py --opset 17 -o out      export, verify, report
    moe-export model.py:Block --init dim=64 --input x=2x10x64:float32
    moe-export verify model.onnx --against model.py
    moe-export build model.onnx --engine sm89,sm120 --range sequence=1:512:4096
    moe-export rewrite "b l d, d n -> b l d n"
    moe-export view model.onnx
    """  # noqa: D301  click keeps the lines of a paragraph that starts with a backspace character


@cli.command("export")
@click.argument("model", metavar="MODEL.PY[:CLASS]", required=False)
def export_command(**options: Any) -> int:
    """Export a model: MODEL.onnx, MODEL.gate.onnx where it has a gate, MODEL.report.json.

    MODEL.PY defines `model` and `example_inputs`, or shows its module working at the end of the file; or name a
    class in it, MODEL.PY:CLASS, with --init and --input.
    """
    from moe_export.commands.export import run_export
    from moe_export.commands.request import ExportRequest

    return run_export(ExportRequest.of(options))


@cli.command("verify")
@click.argument("graph", metavar="ARTIFACT[@BACKEND]")
def reproduce_command(**options: Any) -> int:
    """Compare a graph, an engine, a model file or golden tensors with another; exit 0 if equal, 1 if not.

    \b
    moe-export verify model.onnx --against model.py
    moe-export verify model.onnx@onnx-reference --against model.py@torch-float64
    moe-export verify model.py --record golden.safetensors
    moe-export verify model.onnx --against golden.safetensors
    """  # noqa: D301
    from moe_export.commands.verify import VerifyRequest, run_verify

    return run_verify(VerifyRequest.of(options))


@cli.command("judge")
@click.argument("file", metavar="REPORT.JSON")
def judge_command(**options: Any) -> int:
    """Judge a report of verify again at other tolerances, without running anything; exit 0 if equal, 1 if not."""
    from moe_export.commands.judge import run_judge

    wanted = take_wanted(options)
    return run_judge(**options, wanted=wanted)


@cli.command("mutate")
@click.argument("graph", metavar="GRAPH.ONNX")
def mutate_command(**options: Any) -> int:
    """Test the gate itself: break a right graph in every way, one at a time; exit 1 if one goes unnoticed."""
    from moe_export.commands.mutate import run_mutate
    from moe_export.comparing.mutation_process import Request

    console = options.pop("console")
    return run_mutate(Request(**options), console)


@cli.command("rewrite")
@click.argument("sources", nargs=-1, required=True, metavar="MODEL.ONNX|MODEL.PY|EQUATION")
def rewrite_command(**options: Any) -> int:
    """Replace every einsum of an ONNX or a Python file, or show how one EQUATION is computed.

    Several files may be given with --check, --diff and --in-place.
    """
    from moe_export.commands.rewrite import check_kind, run_rewrite

    sources = options.pop("sources")
    for source in sources:
        check_kind(source, options)
    if len(sources) > 1 and not (options["check"] or options["diff"] or options["in_place"]):
        raise click.UsageError("several files go with --check, --diff or --in-place")
    return max(run_rewrite(source=source, alone=len(sources) == 1, **options) for source in sources)


@cli.command("routing")
@click.argument("model", metavar="MODEL.PY[:CLASS]")
def routing_command(**options: Any) -> int:
    """Draw which token of the example inputs goes to which expert, and the load of every expert."""
    from moe_export.commands.routing import run_routing

    return run_routing(**options)


@cli.command("axes")
@click.argument("model", metavar="MODEL.PY[:CLASS]")
def axes_command(**options: Any) -> int:
    """Show each line of a model with what the axes of its values run over: tokens, slots, experts, steps.

    Where experts are exported as they were written, this shows up to which line their tokens and experts were followed.
    """
    from moe_export.commands.axes import run_axes

    return run_axes(**options)


@cli.command("build")
@click.argument("graph", metavar="GRAPH.ONNX")
def build_command(**options: Any) -> int:
    """Build TensorRT engines of a graph: GRAPH.sm89.engine, and GRAPH.engines.json that describes them."""
    from moe_export.commands.build import run_build

    return run_build(**options)


@cli.command("check")
@click.argument("graph", metavar="GRAPH.ONNX")
def check_command(**options: Any) -> int:
    """Say what TensorRT is known to refuse in a graph, without TensorRT; exit 1 if it refuses anything.

    Each line names the node, the model's line and module, the rule, and the option that avoids it. That nothing is
    found proves nothing: only a build does.
    """
    from moe_export.commands.check import run_check

    return run_check(**options)


@cli.command("bench")
@click.argument("graph", metavar="GRAPH.ONNX")
def bench_command(**options: Any) -> int:
    """Measure a graph, and the engines beside it, on every backend that is there; each in a process of its own."""
    from moe_export.commands.bench import run_bench

    return run_bench(**options)


@cli.command("view")
@click.argument("graph", metavar="GRAPH.ONNX")
def view_command(**options: Any) -> int:
    """Show a graph in Netron, on this machine only, until Ctrl-C; or write a picture of it (docs/seeing.md)."""
    from moe_export.commands.view import run_view

    return run_view(**options)


@cli.command("diff")
@click.argument("before", metavar="BEFORE.ONNX")
@click.argument("after", metavar="AFTER.ONNX")
def diff_command(**options: Any) -> int:
    """Say what differs between two graphs: operators, weights, FLOPs, memory, inputs and outputs; exit 0."""
    from moe_export.commands.diff import run_diff

    return run_diff(**options)


@cli.command("generate")
@click.argument("decoder", metavar="GRAPH.ONNX|FOLDER")
def generate_command(**options: Any) -> int:
    """Continue a text with a graph that --decoder wrote, by plain onnxruntime.

    \b
    moe-export generate out --prompt "Once upon a time" --max-new-tokens 64
    moe-export generate out/model.onnx --ids 5,17,33
    """  # noqa: D301
    from moe_export.commands.generate import run_generate

    return run_generate(**options)


@cli.command("plan")
@click.argument("model", metavar="MODEL.PY[:CLASS]")
def plan_command(**options: Any) -> int:
    """Calculate what each way of splitting the experts over ranks costs, without the model's weights.

    Bytes of weights a rank, bytes of values for a batch, bytes exchanged a token, the largest batch that fits;
    for 1, 2, 4, ... ranks up to --gpus. Exit code 0 if the model fits one way or another, 1 if it does not.
    """
    from moe_export.commands.plan import run_plan

    return run_plan(**options)


@cli.command("report")
@click.argument("model", metavar="MODEL.PY[:CLASS]")
def report_command(**options: Any) -> int:
    """Export a model, verify it, and tell all of it as one page: offline, for a browser or a printer."""
    from moe_export.commands.report import run_report

    return run_report(**options)


@cli.command("explain")
@click.argument("code", metavar="CODE")
def explain_command(**options: Any) -> int:
    """Explain the code of a refusal, MX101: the code that causes it, why, and the smallest rewrite."""
    from moe_export.commands.explain import run_explain

    return run_explain(**options)


@cli.command("schema")
@click.argument("name", metavar="NAME")
def schema_command(**options: Any) -> int:
    """Print the JSON Schema of a file that moe-export writes (report, verify, engines, parallel), or of what a command
    prints with --json (bench, check, diff, explain, generate, mutate, plan, rewrite of a Python file).
    """
    from moe_export.commands.schema import run_schema

    return run_schema(**options)


def _complete(args: list[str]) -> int:
    """Answer the shell that asks what a word may become."""
    try:
        cli.main(args, prog_name="moe-export")
    except SystemExit as done:  # as click ends it
        return int(done.code or 0)


def _left_out(error: ModuleNotFoundError) -> MissingBackendError | None:
    """What to say where a package of ours was not installed with us; None of any other module."""
    name = (error.name or "").partition(".")[0]
    own = (
        re.split(r"[^\w-]", line)[0]
        for line in metadata.requires("moe-export") or ()
        if "extra ==" not in line
    )
    if name.lower().replace("_", "-") not in {each.lower().replace("_", "-") for each in own}:
        return None
    return MissingBackendError(
        f"this needs {name}, which is not installed",
        hint="pip install moe-export installs it; without, moe-export only rewrites and compares",
    )


def run(args: list[str]) -> int:
    """Run the command line.

    Returns:
        The exit code.
    """
    debug = "--debug" in args
    if COMPLETING in os.environ:
        return _complete(args)
    try:
        with no_exit():  # click ends no process here, so that is the user's code
            return int(cli.main(args, prog_name="moe-export", standalone_mode=False) or 0)
    except MoeExportError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        if isinstance(error, NotExportableError):
            click.echo(f"  why: moe-export explain {error.code.number}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ModuleNotFoundError as error:
        missing = _left_out(error)
        if missing is None or debug:
            raise
        click.echo(f"error: {missing}", err=True)
        return missing.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing more was written", err=True)
        return INTERRUPTED
    except (BrokenPipeError, _ReaderGoneError):
        drop_output()
        return READER_GONE
