"""Options of the commands that rewrite einsums, and that measure, draw, plan and generate text."""

from __future__ import annotations

import click

from moe_export.options.option import Option

_LEVELS = click.Choice(["blocks", "nodes"])

# fmt: off
REWRITING = (
    Option("sizes", "--size", "Of an equation", "Sizes of the labels.", ("rewrite",), otherwise="symbols",
           metavar="b=2,d=256", repeatable=True),
    Option("target", "--target", "Rewriting", "The engine to plan for.", ("rewrite",), ("einsums",),
           type=click.Choice(["onnx", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "torch"]),
           default="onnxruntime-cpu"),
    Option("keep_einsum", "--keep-einsum", "Of an ONNX file", "Leave einsums that are one plain matrix product.",
           ("rewrite",), type=bool),
    Option("max_intermediate", "--max-intermediate", "Of an ONNX file",
           "The most memory that one intermediate may take.", ("rewrite",), metavar="1GB"),
    Option("prove", "--prove", "Of an ONNX file", "Show the evidence for each rewritten einsum.", ("rewrite",),
           type=bool),
    Option("diff", "--diff", "Of a Python file", "Print the changes instead of writing them.", ("rewrite",),
           type=bool),
    Option("in_place", "--in-place", "Of a Python file", "Write the file itself.", ("rewrite",), type=bool),
    Option("check", "--check", "Of a Python file",
           "Write nothing; exit 1 if something is left to rewrite.", ("rewrite",), type=bool),
)
MEASURING = (
    Option("against", "--against", "Measuring", "Measure the model in PyTorch, too.", ("bench",),
           metavar="MODEL.PY[:CLASS]"),
    Option("sizes", "--size", "Measuring", "The sizes of free dimensions.", ("bench", "diff"),
           otherwise="batch=1, others 128", metavar="batch=4,sequence=128", repeatable=True),
    Option("repeat", "--repeat", "Measuring", "Runs that are measured.", ("bench",), type=click.IntRange(1),
           default=50),
    Option("compiled", "--compile", "Measuring", "Measure torch.compile, too.", ("bench",), type=bool,
           goes_with="against"),
)
PICTURES = (
    Option("gate", "--gate", "Picture", "Only this gate, by its module path.", ("routing",), otherwise="every gate",
           metavar="MODULE"),
    Option("capacity", "--capacity", "Picture", "Slots of each expert.", ("routing",), type=click.IntRange(1),
           otherwise="the fullest one's"),
    Option("ranks", "--ranks", "Picture",
           "Draw the ranks that an export with --expert-parallel wrote, and what they send one another.", ("routing",),
           metavar="MODEL.parallel.json"),
    Option("level", "--level", "Picture", "What is a box.", ("view",), type=_LEVELS,
           otherwise="nodes for a small graph, else blocks", goes_with="output"),
    Option("level", "--level", "Picture", "What is a box.", ("diff",), type=_LEVELS,
           otherwise="blocks where both graphs tell modules, else nodes"),
    Option("port", "--port", "Picture", "Port on this machine; 0 for a free one.", ("view",),
           type=click.IntRange(0, 65535), default=0),
    Option("browse", "--no-browse", "Picture", "Open no browser.", ("view",), type=bool),
)
PLANNING = (
    Option("gpu_memory", "--gpu-memory", "Planning", "Of one device.", ("plan",), default="80GB", metavar="SIZE"),
    Option("gpus", "--gpus", "Planning", "Devices at most.", ("plan",), type=click.IntRange(1, 65536), default=8),
)
TEXT = (
    Option("prompt", "--prompt", "Text", "What to continue; the folder has the tokenizer's files.", ("generate",),
           metavar="TEXT"),
    Option("ids", "--ids", "Text", "The same as token ids, where there is no tokenizer.", ("generate",),
           metavar="5,17,33"),
    Option("max_new_tokens", "--max-new-tokens", "Text", "How many tokens to add.", ("generate",),
           type=click.IntRange(1), default=64),
    Option("top_k", "--top-k", "Text", "Draw each token from so many of the likeliest; 1 takes the likeliest.",
           ("generate",), type=click.IntRange(1), default=1),
    Option("seed", "--seed", "Text", "Of what is drawn.", ("generate",), type=int, default=0),
)
