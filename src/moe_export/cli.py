"""The command line: `moe-export model.py` exports; `verify`, `rewrite` and `view` are commands of their own.

Nothing heavy is imported before a command runs, so that `--help` is instant. Errors of the user are one message
and an exit code (see `errors`); a traceback is a defect of this tool, or `--debug`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

import moe_export
from moe_export.backends import BACKENDS
from moe_export.commands.engines import add_commands, engine_options
from moe_export.commands.force import force_option
from moe_export.commands.graphs import add_graph_commands, add_report_command
from moe_export.commands.judged import judged_options, verify_options
from moe_export.commands.parallel import parallel_options
from moe_export.commands.plan import add_plan_command
from moe_export.commands.reports import report_options, take_wanted
from moe_export.errors import INTERRUPTED, READER_GONE, MoeExportError
from moe_export.export.frontend.ended import no_exit
from moe_export.supervisor import drop_output


class _ExportByDefault(click.Group):
    """A group whose default command is `export`: `moe-export model.py` is `moe-export export model.py`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["export", *args]
        return super().parse_args(ctx, args)


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
    moe-export build model.onnx --engine sm89,sm120 --range seq=1:512:4096
    moe-export rewrite "b l d, d n -> b l d n"
    moe-export view model.onnx
    """  # noqa: D301  click keeps the lines of a paragraph that starts with a backspace character


def _output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every command has."""
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and nothing else."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    ):
        command = option(command)
    return command


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--input", "inputs", multiple=True, metavar="NAME=2x10x512:DTYPE",
                     help="An example input of model.py:ClassName (repeatable); ids=2x10:int64<1000 limits integers."),
        click.option("--init", multiple=True, metavar="NAME=VALUE",
                     help="An argument of model.py:ClassName (repeatable)."),
    ):  # fmt: skip
        command = option(command)
    return command


_memory_option = click.option(
    "--memory",
    default="1GiB",
    show_default=True,
    metavar="SIZE",
    help="Weights in files that are larger are never read as a whole (docs/weights.md).",
)


STAGES = (
    "fold",
    "trace",
    "outline",
    "einsums",
    "translate",
    "expand",
    "name",
    "simplify",
    "order",
    "precision",
)
"""The names of `export.stages.PIPELINE`, which takes seconds to import."""


@cli.command("export")
@click.argument("model", metavar="MODEL.PY[:CLASS]")
@click.option(
    "--opset", type=int, default=17, show_default=True, help="ONNX opset, 17 or newer; exactly this one."
)
@click.option("-o", "--output", default=".", show_default=True, metavar="FOLDER", help="Where the files go.")
@click.option("--static", is_flag=True, help="Fix every dimension at its example size.")
@click.option(
    "--dynamic",
    multiple=True,
    metavar="INPUT:AXIS=NAME",
    help="Name a dynamic dimension; with --static, the only ones that stay free (repeatable).",
)
@click.option(
    "--gate", metavar="MODULE", help="Cut out this gate only, by its module path; 'none' for no gate."
)
@click.option(
    "--experts",
    type=click.Choice(["auto", "dense", "slices", "blocks", "gather", "loop", "contrib", "trt_moe", "keep"]),
    default="auto",
    show_default=True,
    help="How experts are computed (docs/experts.md); keep leaves them as written.",
)
@click.option(
    "--target",
    type=click.Choice(["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-sm100"]),
    default="onnxruntime-cpu",
    show_default=True,
    help="The engine that the graph is for; decides what auto stands for.",
)
@click.option(
    "--recurrence",
    type=click.Choice(["auto", "scan", "chunked", "contrib", "unrolled"]),
    default="auto",
    show_default=True,
    help="Loops over a length: for any length where that can be; always (or an error) as a Scan, as products over"
    " chunks, or as ONNX Runtime's LinearAttention; or as traced.",
)
@click.option(
    "--unroll",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Steps of a loop that a turn of its Scan takes.",
)
@click.option(
    "--step",
    "decode",
    is_flag=True,
    help="Write MODEL.step.onnx, too: one step, its states as past_* and present_*.",
)
@click.option(
    "--functions",
    is_flag=True,
    help="Write each module, and each block of experts, as an ONNX function that Netron opens as a graph of its own.",
)
@click.option(
    "--simplify/--no-simplify", default=True, show_default=True, help="Try onnxsim; kept if it helps."
)
@click.option(
    "--verify",
    "verify_how",
    type=click.Choice(["whole", "layers"]),
    help="Compare the model as a whole, or block by block; default: whole, where its weights fit in --memory.",
)
@click.option("--no-verify", "verify", flag_value=False, default=True, help="Compare nothing.")
@click.option(
    "--weights",
    type=click.Choice(["copy", "reference"]),
    default="copy",
    show_default=True,
    help="Of weights in files: copy them beside the graph, or point to those that are used as they are stored"
    " (docs/weights.md).",
)
@click.option(
    "--shard-size",
    default="4GB",
    show_default=True,
    metavar="SIZE",
    help="What a file of weights has at most.",
)
@_memory_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What the graph computes in; gates, norms and recurrences stay float32 (docs/precision.md).",
)
@click.option(
    "--float32", multiple=True, metavar="MODULE", help="With --dtype: this module stays float32 (repeatable)."
)
@click.option(
    "--stop-after",
    type=click.Choice(STAGES),
    help="Run the pipeline up to this stage and write nothing (docs/architecture.md).",
)
@click.option("--show", is_flag=True, help="With --stop-after: print what the stage made.")
@parallel_options
@engine_options(required=False)
@force_option
@_model_options
@verify_options
@_output_options
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
@click.option(
    "--against",
    multiple=True,
    metavar="ARTIFACT[@BACKEND]",
    help="What is right by definition: a model file, a graph, an engine, a golden file (repeatable).",
)
@click.option(
    "--backend",
    type=click.Choice([name for names in BACKENDS.values() for name in names]),
    help="What runs the first artifact.",
)
@click.option(
    "--record", metavar="FILE.safetensors", help="Store inputs and right outputs, to compare with later."
)
@click.option(
    "--localise/--no-localise",
    default=True,
    show_default=True,
    help="Where a graph differs, name the first faulty node.",
)
@click.option(
    "--inside", is_flag=True, help="Hold every node against its operator in the model, not the outputs alone."
)
@click.option(
    "--repro", metavar="FOLDER", help="Where a graph differs, write the fault as a script that shows it."
)
@click.option("--case", metavar="LABEL", help="Run one case of a report again, with the report's --seed.")
@click.option(
    "--by",
    "how",
    type=click.Choice(["whole", "layers"]),
    help="As a whole, or block by block; default: whole, where the model's weights fit in --memory.",
)
@_memory_option
@judged_options
@report_options
@_model_options
@verify_options
@_output_options
def verify_command(**options: Any) -> int:
    """Compare a graph, an engine, a model file or golden tensors with another; exit 0 if equal, 1 if not.

    \b
    moe-export verify model.onnx --against model.py
    moe-export verify model.onnx@onnx-reference --against model.py@torch-float64
    moe-export verify model.py --record golden.safetensors
    moe-export verify model.onnx --against golden.safetensors
    """  # noqa: D301
    from moe_export.commands.verify import run_verify

    wanted = take_wanted(options)
    return run_verify(**options, wanted=wanted)


@cli.command("judge")
@click.argument("file", metavar="REPORT.JSON")
@click.option("--rtol", type=float, help="Relative tolerance  [the report's].")
@click.option("--atol", type=float, help="Absolute tolerance  [the report's].")
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="OUTPUT=RTOL,ATOL",
    help="Tolerances of one output (repeatable).",
)
@click.option("--flips", metavar="0.5%|N", help="How many tokens may go to another expert in a tie.")
@report_options
@_output_options
def judge_command(**options: Any) -> int:
    """Judge a report of verify again at other tolerances, without running anything; exit 0 if equal, 1 if not."""
    from moe_export.commands.judge import run_judge

    wanted = take_wanted(options)
    return run_judge(**options, wanted=wanted)


@cli.command("mutate")
@click.argument("graph", metavar="GRAPH.ONNX")
@click.option(
    "--against", required=True, metavar="MODEL.PY[:CLASS]", help="The model that the graph was made from."
)
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Only this kind of mutant (repeatable).")
@click.option(
    "--limit", type=click.IntRange(0), default=0, help="At most so many mutants of each kind  [default: all]"
)
@click.option("--thorough", is_flag=True, help="The gate tries every kind of values.")
@click.option("--inside", is_flag=True, help="The gate holds every node against its operator in the model.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the test inputs.")
@click.option("--atol", type=float, help="Absolute tolerance [float32: 1e-5].")
@click.option("--rtol", type=float, help="Relative tolerance [float32: 1e-5].")
@judged_options
@_model_options
@_output_options
def mutate_command(**options: Any) -> int:
    """Test the gate itself: break a right graph in every way, one at a time; exit 1 if one goes unnoticed."""
    from moe_export.commands.mutate import run_mutate

    return run_mutate(**options)


@cli.command("rewrite")
@click.argument("sources", nargs=-1, required=True, metavar="MODEL.ONNX|MODEL.PY|EQUATION")
@click.option("-o", "--output", metavar="FILE", help="Where the rewritten file goes.")
@click.option("--shapes", metavar="2x64x256,256x16", help="Sizes of the operands; without them, symbols.")
@click.option(
    "--target",
    type=click.Choice(["onnx", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "torch"]),
    default="onnxruntime-cpu",
    show_default=True,
    help="The engine to plan for.",
)
@click.option("--keep-einsum", is_flag=True, help="Leave einsums that are one plain matrix product.")
@click.option("--max-intermediate", metavar="1GB", help="The most memory that one intermediate may take.")
@click.option("--prove", is_flag=True, help="Show the evidence for each rewritten einsum.")
@click.option("--diff", is_flag=True, help="Python: print the changes instead of writing them.")
@click.option("--in-place", is_flag=True, help="Python: write the file itself.")
@click.option("--check", is_flag=True, help="Python: write nothing; exit 1 if something is left to rewrite.")
@force_option
@_output_options
def rewrite_command(**options: Any) -> int:
    """Replace every einsum of an ONNX or a Python file, or show how one EQUATION is computed.

    Several files may be given with --check, --diff and --in-place.
    """
    from moe_export.commands.rewrite import run_rewrite

    sources = options.pop("sources")
    if len(sources) > 1 and not (options["check"] or options["diff"] or options["in_place"]):
        raise click.UsageError("several files go with --check, --diff or --in-place")
    return max(run_rewrite(source=source, **options) for source in sources)


@cli.command("routing")
@click.argument("model", metavar="MODEL.PY[:CLASS]")
@click.option(
    "-o", "--output", metavar="FILE.svg|.png", help="Where the picture goes  [default: MODEL.routing.svg]"
)
@click.option("--gate", metavar="MODULE", help="Only this gate, by its module path.")
@click.option("--capacity", type=click.IntRange(1), help="Slots of each expert  [default: the fullest one's]")
@click.option(
    "--ranks",
    metavar="MODEL.parallel.json",
    help="Draw the ranks that an export with --expert-parallel wrote, and what they send one another.",
)
@force_option
@_model_options
@_output_options
def routing_command(**options: Any) -> int:
    """Draw which token of the example inputs goes to which expert, and the load of every expert."""
    from moe_export.commands.routing import run_routing

    return run_routing(**options)


add_commands(cli, _model_options, _output_options)
add_graph_commands(cli, _output_options)
add_plan_command(cli, _model_options, _output_options)
add_report_command(cli)


def run(args: list[str]) -> int:
    """Run the command line.

    Returns:
        The exit code.
    """
    debug = "--debug" in args
    try:
        with no_exit():  # click ends no process here, so that is the user's code
            return int(cli.main(args, prog_name="moe-export", standalone_mode=False) or 0)
    except MoeExportError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing more was written", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        drop_output()
        return READER_GONE
