"""Options for TensorRT engines, of `build` and of an export that builds them."""

from __future__ import annotations

import click

from moe_export.options.option import EXPORTING, Option

_BUILDING = (*EXPORTING, "build")
_READ_BY = ("engines",)
_GROUP = "TensorRT engines"
_ENGINE = (
    "Build a TensorRT engine for each: sm75 to sm121, portable (Ampere and newer), or current (the GPU of this"
    " machine). With tensorrt-rtx all but current need no GPU."
)

# fmt: off
ENGINES = (
    Option("engine", "--engine", _GROUP, _ENGINE, EXPORTING, _READ_BY, metavar="sm89,sm120", first=True),
    Option("engine", "--engine", _GROUP, _ENGINE, ("build",), _READ_BY, metavar="sm89,sm120", required=True),
    Option("ranges", "--range", _GROUP, "Sizes that the engine takes, and is fastest at; each --range is a profile.",
           _BUILDING, _READ_BY, otherwise="1:128:1024; batch 1:1:8", metavar="sequence=MIN:OPT:MAX,batch=SIZE",
           repeatable=True, first=True, goes_with="engine"),
    Option("builder", "--builder", _GROUP, "Which TensorRT builds the engines.", _BUILDING, _READ_BY,
           type=click.Choice(["tensorrt-rtx", "tensorrt"]),
           otherwise="tensorrt-rtx; tensorrt for current, if it is there", goes_with="engine"),
    Option("builder", "--builder", _GROUP, "What would build it.", ("check",),
           type=click.Choice(["tensorrt-rtx", "tensorrt"]), otherwise="what either refuses is named"),
    Option("workspace", "--workspace", _GROUP, "The most memory for intermediate values.", _BUILDING, _READ_BY,
           metavar="2GB", goes_with="engine"),
    Option("strip_weights", "--strip-weights", _GROUP, "Leave the weights out of the engine (needs a GPU).", _BUILDING,
           _READ_BY, type=bool, goes_with="engine"),
    Option("refit", "--refit", _GROUP, "Make weights replaceable (needs a GPU).", _BUILDING, _READ_BY, type=bool,
           goes_with="engine"),
    Option("tf32", "--tf32", _GROUP, "Allow TF32 matmuls: faster, with 10 bits of mantissa.", _BUILDING, _READ_BY,
           type=bool, goes_with="engine"),
    Option("require_run", "--require-run", _GROUP,
           "Exit 4 if the engines cannot be run here; without it that is only said.", _BUILDING, _READ_BY, type=bool,
           goes_with="engine"),
    Option("timing_cache", "--timing-cache", _GROUP, "Keep timings for the next build (tensorrt only).", _BUILDING,
           _READ_BY, metavar="FILE", goes_with="engine"),
    Option("version_compatible", "--version-compatible", _GROUP,
           "Make an engine that later versions run, too (tensorrt only).", _BUILDING, _READ_BY, type=bool,
           goes_with="engine"),
    Option("platform", "--platform", _GROUP, "Where the engine is to run (tensorrt only).", _BUILDING, _READ_BY,
           type=click.Choice(["windows"]), otherwise="where it is built", goes_with="engine"),
    Option("layers", "--layers", _GROUP, "Write what each engine is made of, as JSON.", _BUILDING, _READ_BY,
           type=bool, goes_with="engine"),
)
