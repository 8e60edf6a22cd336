"""Options that say which graph is made: of which model, by which choices, with its weights where, over which ranks."""

from __future__ import annotations

import click

from moe_export.options.option import EXPORTING, STAGES, Option

_LOADING = (*EXPORTING, "verify", "mutate", "routing", "axes", "bench", "plan")
_PLANNED = (*EXPORTING, "plan")
_PRECISIONS = click.Choice(["float32", "float16", "bfloat16"])

# fmt: off
MODEL = (
    Option("init", "--init", "Model", "An argument of model.py:ClassName.", _LOADING, ("load",),
           metavar="NAME=VALUE", repeatable=True, first=True),
    Option("inputs", "--input", "Model",
           "An example input of model.py:ClassName; ids=2x10:int64<1000 limits integers.", _LOADING, ("load",),
           metavar="NAME=2x10x512:DTYPE", repeatable=True, first=True),
    Option("hf", "--hf", "Model",
           "In place of MODEL.PY: a folder of transformers with config.json and weights, or a model's name on the hub.",
           ("export",), ("load",), metavar="FOLDER|OWNER/MODEL", first=True),
    Option("list_calls", "--list", "Model", "List the calls of a script that can be exported, and write nothing.",
           ("export",), ("load",), type=bool),
    Option("call", "--call", "Model", "Which of these calls; the same as script.py:N.", ("export", "report"), ("load",),
           otherwise="the first export, or else the first call", type=click.IntRange(1), metavar="N"),
)
GRAPH = (
    Option("opset", "--opset", "Graph",
           "ONNX opset, 17 or newer; exactly this one, or the lowest that the weights of --weights-dtype can be in.",
           EXPORTING, ("translate", "name"), type=int, default=17, first=True),
    Option("static", "--static", "Graph", "Fix every dimension at its example size.", EXPORTING, ("trace",),
           type=bool, first=True),
    Option("dynamic", "--dynamic", "Graph",
           "Name a dynamic dimension; with --static, the only ones that stay free.", EXPORTING, ("trace",),
           metavar="INPUT:AXIS=NAME", repeatable=True, first=True),
    Option("input_names", "--input-names", "Graph", "Names of the first inputs, in order.", EXPORTING,
           otherwise="those of forward's parameters", metavar="NAME,NAME,..."),
    Option("output_names", "--output-names", "Graph", "Names of the first outputs, in order.", EXPORTING,
           otherwise="as docs/command-line.md says", metavar="NAME,NAME,..."),
    Option("gate", "--gate", "Graph", "Cut out this gate only, by its module path.", EXPORTING, ("gates",),
           otherwise="every gate", metavar="MODULE"),
    Option("gates", "--no-gate", "Graph", "Cut out no gate.", EXPORTING, ("gates",), type=bool),
    Option("experts", "--experts", "Graph",
           "How experts are computed (docs/experts.md); keep leaves them as written.", EXPORTING,
           ("outline", "expand"), default="auto", first=True,
           type=click.Choice(
               ["auto", "dense", "slices", "blocks", "gather", "loop", "contrib", "trt_moe", "keep"])),
    Option("target", "--target", "Graph", "The engine that the graph is written for; decides what auto stands for.",
           EXPORTING, ("outline", "einsums", "expand", "engine"), default="onnxruntime-cpu", first=True,
           type=click.Choice(["onnxruntime-cpu", "onnxruntime-cuda", "openvino", "tensorrt", "tensorrt-sm100"])),
    Option("recurrence", "--recurrence", "Graph",
           "Loops over a length: for any length where that can be; always (or an error) as a Scan, as products over"
           " chunks, or as ONNX Runtime's LinearAttention; or as traced.", EXPORTING, ("fold", "expand"),
           default="auto", type=click.Choice(["auto", "scan", "chunked", "contrib", "unrolled"]), first=True),
    Option("unroll", "--unroll", "Graph", "Steps of a loop that an iteration of its Scan takes.", EXPORTING,
           ("expand",), type=click.IntRange(1, 64), default=1),
    Option("decode", "--step", "Graph", "Write MODEL.step.onnx, too: one step, its states as past_* and present_*.",
           EXPORTING, type=bool),
    Option("decoder", "--decoder", "Graph",
           "A language model for new tokens after earlier ones, whose keys and values are past_key_values.* and"
           " present.* (docs/decoder.md).", EXPORTING, type=bool, first=True),
    Option("attention", "--attention", "Graph",
           "How attention of a decoder is written: contrib lets keys and values stay in one buffer, by ONNX Runtime's"
           " own operator on a CPU (docs/decoder.md).", EXPORTING, ("attention",), default="standard",
           type=click.Choice(["standard", "contrib"]), goes_with="decoder"),
    Option("functions", "--functions", "Graph",
           "Write each module, and each block of experts, as an ONNX function that Netron opens as a graph of its own.",
           EXPORTING, type=bool),
    Option("simplify", "--no-simplify", "Graph", "Do not try onnxsim, which is kept where it helps.", EXPORTING,
           ("simplify",), type=bool),
    Option("dtype", "--dtype", "Graph",
           "What the graph computes in; gates, norms and recurrences stay float32 (docs/precision.md), and the"
           " tolerance is that of the type (docs/verify.md).", (*EXPORTING, "verify", "mutate"),
           ("precision", "comparison"), type=_PRECISIONS, default="float32", first=True),
    Option("float32", "--float32", "Graph", "This module stays float32.", EXPORTING, ("precision",), metavar="MODULE",
           repeatable=True, goes_with="dtype"),
)
WEIGHTS = (
    Option("weights", "--weights", "Weights",
           "Of weights in files: copy them beside the graph, or point to those that are used as they are stored"
           " (docs/weights.md).", EXPORTING, ("weights",), type=click.Choice(["copy", "reference"]), default="copy"),
    Option("shard_size", "--shard-size", "Weights", "What a weight file has at most.", EXPORTING, ("weights",),
           default="4GB", metavar="SIZE"),
    Option("memory", "--memory", "Weights",
           "Weights in files that are larger are never read as a whole (docs/weights.md).", (*EXPORTING, "verify"),
           ("load", "comparison"), default="1GiB", metavar="SIZE"),
)
PACKING = (
    Option("weights_dtype", "--weights-dtype", "Weights",
           "What weights are stored as, to be multiplied in their own type (docs/quantize.md).", _PLANNED,
           ("quantize",), default="float32", first=True, type=click.Choice(["float32", "int8", "int4", "float8e4m3"])),
    Option("quantize", "--quantize", "Weights",
           "Which weights: of experts, of other linear layers, all of these, or those of a name; several with commas.",
           EXPORTING, ("quantize",), default="experts", metavar="experts|linear|all|PATTERN",
           goes_with="weights_dtype"),
    Option("block_size", "--block-size", "Weights", "Weights of an output that share a scale.", _PLANNED,
           ("quantize",), type=click.Choice(["16", "32", "64", "128", "256"]),
           otherwise="int4: 32; others: all of an output", goes_with="weights_dtype"),
    Option("zero_points", "--zero-points", "Weights",
           "Blocks have zero points, too: for weights that do not lie around zero.", _PLANNED, ("quantize",),
           type=bool, goes_with="weights_dtype"),
    Option("calibrate", "--calibrate", "Weights",
           "Round weights by what your inputs make of them: .safetensors or .npz, by the inputs' names.", EXPORTING,
           ("quantize",), metavar="FILE", repeatable=True, goes_with="weights_dtype"),
    Option("max_flips", "--max-flips", "Tolerances",
           "How many tokens may go to another expert because weights were packed.", EXPORTING,
           otherwise="all", metavar="1%|N", goes_with="weights_dtype"),
    Option("max_error", "--max-error", "Tolerances",
           "How far an output may move because weights were packed: root mean square, as a share of the output's.",
           EXPORTING, otherwise="any", metavar="0.02",
           goes_with="weights_dtype"),
)
RANKS = (
    Option("expert_parallel", "--expert-parallel", "Experts over ranks",
           "Write the graphs of N ranks, too, each with its share of the experts (docs/parallel.md).", EXPORTING,
           ("ranks",), type=click.IntRange(1), metavar="N", first=True),
    Option("exchange", "--exchange", "Experts over ranks",
           "Every rank sees all tokens, and partial sums are added; or each has tokens of its own, and their rows"
           " travel.", EXPORTING, ("ranks",), type=click.Choice(["all_reduce", "all_to_all"]), default="all_reduce",
           goes_with="expert_parallel"),
    Option("exchange_rows", "--exchange-rows", "Experts over ranks",
           "Rows that a rank sends to another, always; pairs beyond are dropped.", EXPORTING, ("ranks",),
           default="dynamic", metavar="ROWS|dynamic", goes_with="exchange"),
    Option("placement", "--placement", "Experts over ranks", "The rank of each expert.", EXPORTING, ("ranks",),
           otherwise="in order, evenly", metavar="FILE.json", goes_with="expert_parallel"),
    Option("collectives", "--collectives", "Experts over ranks",
           "Who exchanges: whoever runs the ranks' graphs, or nodes of the engine's own in them.", EXPORTING,
           ("ranks",), type=click.Choice(["runner", "graph"]), default="runner", goes_with="expert_parallel"),
)
PIPELINE = (
    Option("stop_after", "--stop-after", "Pipeline",
           "Run the pipeline up to this stage and write nothing (docs/architecture.md).", ("export",),
           type=click.Choice(STAGES)),
    Option("show", "--show", "Pipeline", "Print what the stage made.", ("export",), type=bool, goes_with="stop_after"),
)
