"""Options that say what is compared with what, on which inputs, how exactly; and what is found out where it differs."""

from __future__ import annotations

import click

from moe_export.backends import ONNXRUNTIME
from moe_export.options.option import EXPORTING, Option

_COMPARING = (*EXPORTING, "verify")
_JUDGING = (*_COMPARING, "judge")

# fmt: off
ARTIFACTS = (
    Option("against", "--against", "Comparison",
           "What is right by definition: a model file, a graph, an engine, a golden file.", ("verify",),
           metavar="ARTIFACT[@BACKEND]", repeatable=True, first=True),
    Option("against", "--against", "Comparison", "The model that the graph was made from.", ("mutate",),
           metavar="MODEL.PY[:CLASS]", required=True),
    Option("gate", "--gate", "Comparison", "The graph is the gate of this module of the model.", ("verify", "mutate"),
           ("comparison",), metavar="MODULE", first=True),
    Option("backend", "--backend", "Comparison",
           "What runs the graphs here, to compare them: not what they are written for (--target).", EXPORTING,
           ("comparison",), type=click.Choice(ONNXRUNTIME), otherwise=ONNXRUNTIME[0]),
    Option("backend", "--backend", "Comparison",
           "What runs the first artifact, as `FILE@BACKEND` does for any: torch, torch-float64; onnxruntime-cpu, -cuda"
           " or -tensorrt, openvino or onnx-reference; tensorrt-rtx or tensorrt. Several are compared in one table.",
           ("verify",), ("comparison",), metavar="BACKEND,...", first=True),
)
CASES = (
    Option("verify", "--no-verify", "Comparison", "Compare nothing.", EXPORTING, type=bool, first=True),
    Option("compare", "--compare", "Comparison", "Compare the model as a whole, or block by block.", _COMPARING,
           ("comparison",), type=click.Choice(["whole", "layers"]),
           otherwise="whole, where its weights fit in --memory"),
    Option("thorough", "--thorough", "Comparison", "Every kind of values, at more sizes (docs/verify.md).",
           (*_COMPARING, "mutate"), ("comparison",), type=bool, first=True),
    Option("sizes", "--size", "Comparison", "Further sizes to compare at, a set each.", _COMPARING, ("comparison",),
           metavar="batch=1,sequence=4096", repeatable=True, first=True),
    Option("input_files", "--input-file", "Comparison", "Your own inputs: .safetensors or .npz, by the inputs' names.",
           _COMPARING, ("comparison",), metavar="FILE", repeatable=True),
    Option("seed", "--seed", "Comparison", "Seed of the test inputs.", (*_COMPARING, "mutate"), ("comparison",),
           type=int, default=0),
    Option("seeds", "--seeds", "Comparison", "How many seeds, from --seed on.", _COMPARING, ("comparison",),
           type=click.IntRange(1), default=1),
    Option("case", "--case", "Comparison", "Run one case of a report again, with the report's --seed.", ("verify",),
           ("comparison",), metavar="LABEL", first=True),
    Option("time_limit", "--time-limit", "Comparison",
           "Begin no further case then; what is cut off makes the verdict \"unfinished\", exit 5.", _COMPARING,
           ("comparison",), type=click.FloatRange(0), otherwise="no limit", metavar="SECONDS"),
)
TOLERANCES = (
    Option("rtol", "--rtol", "Tolerances", "Relative tolerance.", (*_COMPARING, "mutate"), ("comparison",),
           type=float, otherwise="float32: 1e-5", first=True),
    Option("atol", "--atol", "Tolerances", "Absolute tolerance.", (*_COMPARING, "mutate"), ("comparison",),
           type=float, otherwise="float32: 1e-5", first=True),
    Option("rtol", "--rtol", "Tolerances", "Relative tolerance.", ("judge",), type=float, otherwise="the report's"),
    Option("atol", "--atol", "Tolerances", "Absolute tolerance.", ("judge",), type=float, otherwise="the report's"),
    Option("tolerances", "--tolerance", "Tolerances", "Tolerances of one output.", _JUDGING, ("comparison",),
           metavar="OUTPUT=RTOL,ATOL", repeatable=True),
    Option("flips", "--flips", "Tolerances", "How many tokens may go to another expert in a tie.", _JUDGING,
           ("comparison",), otherwise="all", metavar="0.5%|N"),
)
DIFFERING = (
    Option("localise", "--no-localise", "Where they differ", "Look for no faulty node.", ("verify",),
           type=bool, first=True),
    Option("inside", "--inside", "Where they differ",
           "Hold every node against its operator in the model, not the outputs alone.", ("verify",), type=bool,
           first=True),
    Option("repro", "--repro", "Where they differ", "Write the fault as a script that shows it.", ("verify",),
           metavar="FOLDER", first=True),
)
MUTANTS = (
    Option("kinds", "--kind", "Mutants", "Only this kind of mutant.", ("mutate",), metavar="KIND", repeatable=True),
    Option("limit", "--limit", "Mutants", "At most so many mutants of each kind; 0 for all.", ("mutate",),
           type=click.IntRange(0), default=0),
    Option("inside", "--inside", "Mutants", "Hold every node against its operator in the model, too.", ("mutate",),
           type=bool),
)
