"""`ExportRequest`: what an export was asked for, read and checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from moe_export.backends import ONNXRUNTIME
from moe_export.commands.build import Request, take_request
from moe_export.commands.console import Console
from moe_export.commands.parallel import take_parallel
from moe_export.commands.reports import Wanted, take_wanted_of_export
from moe_export.comparing.packing_effect import Limits
from moe_export.comparison_settings import SETTINGS, ComparisonSettings, parse_settings, parse_tolerance
from moe_export.errors import UsageError
from moe_export.export.frontend.load import split_spec
from moe_export.export.frontend.pretrained import folder_of
from moe_export.export.frontend.subject import Subject
from moe_export.export.onnx.external_weights import Storage
from moe_export.export.options import Options
from moe_export.export.parallel.ranks import Parallel
from moe_export.export.tracing.dims import requested
from moe_export.options.memory import parse_bytes
from moe_export.options.table import options_of
from moe_export.verify import Tolerance

_OPTIONS = tuple(
    one.name for one in fields(Options) if one.name in {option.name for option in options_of("export")}
)


@dataclass(frozen=True)
class ExportRequest:
    """What an export was asked for.

    Attributes:
        model: `MODEL.PY[:CLASS]`.
        folder: Where the files go.
        init: Arguments of the class, as text.
        inputs: Example inputs, as text.
        memory: Bytes of a file of weights beyond which it is never read as a whole.
        dynamic: Dimensions with names, as text.
        static: Whether all others are fixed.
        input_names: Names of the first inputs, in order.
        output_names: Names of the first outputs, in order.
        options: The choices that stages depend on; which dimensions are free is known when the model is.
        storage: Where weights go.
        functions: Whether modules become ONNX functions.
        verify: Whether graphs are compared with the model.
        compare: As a whole, by layers, or as it fits.
        tolerance: For outputs.
        comparison: Which cases are compared.
        seed: Of the test inputs.
        provider: Where onnxruntime runs.
        engines: Which engines to build.
        parallel: Over which ranks to spread the experts.
        limits: What packing weights may do to the model.
        force: Whether files of others are overwritten.
        wanted: The reports to write besides.
        list_calls: Whether to list the calls of a script, and write nothing.
        stop_after: The stage at which to stop.
        show: Whether to print what it made.
        console: How much is printed.
    """

    model: str
    folder: Path = Path()
    init: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    memory: int = 2**30
    dynamic: tuple[str, ...] = ()
    static: bool = False
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    options: Options = field(default_factory=Options)
    storage: Storage = field(default_factory=Storage)
    functions: bool = False
    verify: bool = True
    compare: str | None = None
    tolerance: Tolerance = field(default_factory=Tolerance)
    comparison: ComparisonSettings = field(default_factory=ComparisonSettings)
    seed: int = 0
    provider: str = "cpu"
    engines: Request | None = None
    parallel: Parallel | None = None
    limits: Limits = field(default_factory=Limits)
    force: bool = False
    wanted: Wanted = field(default_factory=Wanted)
    list_calls: bool = False
    stop_after: str | None = None
    show: bool = False
    console: Console = field(default_factory=Console)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ExportRequest:
        """The request that a command line is.

        Args:
            given: The command's options by their names in Python; one that a command does not have is not there.

        Raises:
            UsageError: One of them cannot be read, or does not go with another.
            MissingBackendError: An engine is asked for, and TensorRT is not installed.
        """
        left = dict(given)
        if left.get("stop_after") is not None and left["console"].as_json:
            raise UsageError(
                "--json prints the report, and --stop-after makes none", hint="--stop-after STAGE --show"
            )
        left["model"] = _with_call(_model_of(left["model"], left.pop("hf", None)), left.pop("call", None))
        engines = take_request(left) if "engine" in left else None
        parallel = take_parallel(left) if "expert_parallel" in left else None
        wanted = take_wanted_of_export(left) if "reports" in left else Wanted()
        if wanted.files and not left.get("verify", True):
            raise UsageError("--report writes what was compared, and --no-verify compares nothing")
        folder = Path(left.pop("output"))
        gates, gate = left.pop("gates", True), left.pop("gate", None)
        if gate is not None and not gates:
            raise UsageError("--gate and --no-gate contradict each other", hint="leave one of them away")
        if left.get("decoder") and left.get("decode"):
            raise UsageError(
                "--step and --decoder contradict each other",
                hint="a decoder takes one token, too: drop --step",
            )
        if left.get("calibrate") and parallel is not None:
            raise UsageError(
                "--calibrate is about the whole graph, and those of ranks get other inputs",
                hint="leave --calibrate or --expert-parallel away",
            )
        if left.get("block_size") is not None:
            left["block_size"] = int(left["block_size"])
        storage = Storage(
            left.pop("weights", "copy"),
            parse_bytes(left.pop("shard_size", "4GB"), "--shard-size"),
            folder.absolute(),
        )
        return cls(
            folder=folder,
            input_names=_names(left.pop("input_names", None), "--input-names"),
            output_names=_names(left.pop("output_names", None), "--output-names"),
            storage=storage,
            provider=(left.pop("backend", None) or ONNXRUNTIME[0]).removeprefix("onnxruntime-"),
            memory=parse_bytes(left.pop("memory", "1GiB"), "--memory"),
            tolerance=parse_tolerance(
                left.pop("rtol", None), left.pop("atol", None), left.pop("tolerances", ())
            ),
            options=Options(
                gates=gates if gate is None else gate,
                **{name: left.pop(name) for name in _OPTIONS if name in left},
            ).at_opset(),
            comparison=parse_settings(**{name: left.pop(name) for name in SETTINGS if name in left}),
            engines=engines,
            parallel=parallel,
            limits=Limits.parse(left.pop("max_flips", None), left.pop("max_error", None)),
            wanted=wanted,
            **left,
        )

    def named(self, subject: Subject) -> Subject:
        """A model under the names that were asked for; errors as of `Subject.with_names`."""
        return subject.with_names(self.input_names, self.output_names)

    def options_for(self, subject: Subject) -> Options:
        """The options, with the dimensions of a model that are to be free."""
        return replace(self.options, dims=requested(subject, self.dynamic, self.static))


def _names(text: str | None, spelling: str) -> tuple[str, ...]:
    names = () if text is None else tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"{spelling} {text!r} is not NAME,NAME,...", hint="give each name once, in order")
    return names


def _model_of(model: str | None, published: str | None) -> str:
    """What is exported: a file, or the folder of a published model."""
    if model is not None and published is not None:
        raise UsageError(f"--hf {published} stands in place of {model}", hint="leave one of them away")
    if published is not None:
        return str(folder_of(published))
    if model is None:
        raise UsageError("no model is named", hint="moe-export model.py, or moe-export --hf FOLDER")
    return model


def _with_call(model: str, number: int | None) -> str:
    """`--call 2` as part of what is exported: `script.py:2`."""
    if number is None:
        return model
    path, name = split_spec(model)
    if name is not None:
        raise UsageError(
            f"--call picks a call of a script, and {model} names {name}", hint=f"--call goes with {path.name}"
        )
    return f"{model}:{number}"
