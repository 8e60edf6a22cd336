"""Compare a graph with what it should compute the same as: a report, an assertion, or its first faulty node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.errors import UsageError

if TYPE_CHECKING:
    import torch

    from moe_export.comparing.artifacts import Artifact
    from moe_export.comparing.explaining import Explanation
    from moe_export.comparing.request import Request
    from moe_export.export.frontend.subject import Subject
    from moe_export.verify import Report


def assert_equivalent(  # noqa: PLR0913  each has a name and a default
    module: torch.nn.Module,
    inputs: torch.Tensor | Sequence[Any] | Mapping[str, Any],
    onnx_path: str | Path,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    tolerances: Sequence[str] = (),
    flips: str | None = None,
    seed: int = 0,
    seeds: int = 1,
    thorough: bool = False,
    backend: str | None = None,
) -> Report:
    """Compare a graph with the module it was exported from, at the example and at other sizes and values.

    The reference is a copy of the module, made before anything else is done with it.

    Args:
        module: The reference. It runs in eval mode; its own mode is restored afterwards.
        inputs: Example inputs: a tensor, a tuple of arguments, or a dict of named ones.
        onnx_path: The `.onnx` graph or `.engine` file to test.
        rtol: Relative tolerance; each dtype's default if None.
        atol: Absolute tolerance; each dtype's default if None.
        tolerances: Tolerances of single outputs, as on the command line: `y=1e-3,1e-4`.
        flips: How many tokens may be routed to another expert in a tie: `0.5%`, or a number.
        seed: The first seed of the generated values.
        seeds: How many seeds to try.
        thorough: Whether to try every kind of values, and at more sizes.
        backend: The backend that runs the graph, such as `onnxruntime-cuda`; the default one if None.

    Returns:
        The report.

    Raises:
        AssertionError: They differ, or too little could be compared. The message is the report.
        UsageError: The graph cannot be read or has other inputs than the module, or the module ended the process.
        MissingBackendError: The backend that the graph needs is not available here.
    """
    report = verify_model(
        onnx_path,
        module,
        inputs,
        rtol=rtol,
        atol=atol,
        tolerances=tolerances,
        flips=flips,
        seed=seed,
        seeds=seeds,
        thorough=thorough,
        backend=backend,
    )
    if report.exit_code:
        raise AssertionError(f"{onnx_path} is not what {type(module).__name__} computes\n\n{report}")
    return report


def verify_model(  # noqa: PLR0913  each has a name and a default
    graph: str | Path,
    against: torch.nn.Module | str | Path,
    inputs: torch.Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    tolerances: Sequence[str] = (),
    flips: str | None = None,
    seed: int = 0,
    seeds: int = 1,
    thorough: bool = False,
    backend: str | None = None,
) -> Report:
    """Run a graph and what it is held against on the same inputs, at many sizes and kinds of values, and compare.

    The reference, if it is a module, is a copy that is made before anything else is done with it.

    Args:
        graph: The `.onnx` graph or `.engine` file to test.
        against: What is right by definition: a module, with its `inputs`; or, as on the command line, a model file, a
            graph, an engine or a golden file, each with `@BACKEND` if it is not to run on its usual one.
        inputs: Example inputs of a module: a tensor, a tuple of arguments, or a dict of named ones.
        rtol: Relative tolerance; each dtype's default if None.
        atol: Absolute tolerance; each dtype's default if None.
        tolerances: Tolerances of single outputs, as on the command line: `y=1e-3,1e-4`.
        flips: How many tokens may be routed to another expert in a tie: `0.5%`, or a number.
        seed: The first seed of the generated values.
        seeds: How many seeds to try.
        thorough: Whether to try every kind of values, and at more sizes.
        backend: The backend that runs the graph, such as `onnxruntime-cuda`; the default one if None.

    Returns:
        The report: `print` shows it, `verdict` and `exit_code` sum it up.

    Raises:
        UsageError: A file cannot be read, the graph has other inputs than the reference, or the module ended the
            process.
        MissingBackendError: The backend that the graph needs is not available here.
    """
    from moe_export.comparing.artifacts import parse_artifact
    from moe_export.comparing.request import Request
    from moe_export.comparing.verifying import compare_artifacts
    from moe_export.comparison_settings import parse_settings, parse_tolerance

    candidate = parse_artifact(str(graph), backend)
    if candidate.kind not in {"graph", "engine"}:
        raise UsageError(f"{graph} is neither a graph nor an engine", hint="give the path of an .onnx file")
    request = Request(
        tolerance=parse_tolerance(rtol, atol, tolerances),
        seed=seed,
        settings=parse_settings(thorough=thorough, seeds=seeds, flips=flips),
    )
    if isinstance(against, (str, Path)):
        if inputs is not None:
            raise UsageError("inputs are those of a module; a file has its own")
        return compare_artifacts(candidate, parse_artifact(str(against)), request)
    if inputs is None:
        raise UsageError("a module is compared on example inputs", hint="verify_model(graph, module, (x,))")
    return _against_module(candidate, against, inputs, request)


def localise_error(
    graph: str | Path,
    module: torch.nn.Module,
    inputs: torch.Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
) -> Explanation | None:
    """Find the first faulty node of a graph that does not compute what its module computes.

    Args:
        graph: The `.onnx` graph, with the metadata that moe-export or PyTorch's exporter wrote: nodes are matched with
            operators of the module by them.
        module: What is right by definition. It runs in eval mode; its own mode is restored afterwards.
        inputs: Example inputs: a tensor, a tuple of arguments, or a dict of named ones.
        rtol: Relative tolerance of the comparison; each dtype's default if None.
        atol: Absolute tolerance; each dtype's default if None.
        seed: Of the generated values.

    Returns:
        The node, its source line and its own error, and the case that shows it: `print` tells them, `write(folder)`
        writes a reproduction. None if graph and module are equal.

    Raises:
        UsageError: The graph cannot be read, has other inputs than the module, or the module ended the process.
    """
    from moe_export.comparing.artifacts import parse_artifact
    from moe_export.comparing.request import Request
    from moe_export.comparison_settings import parse_tolerance

    candidate = parse_artifact(str(graph))
    if candidate.kind != "graph":
        raise UsageError(f"{graph} is not a graph", hint="nodes are those of an .onnx file")
    found: list[Explanation] = []
    request = Request(tolerance=parse_tolerance(rtol, atol, ()), seed=seed, why=found)
    _against_module(candidate, module, inputs, request)
    return found[0] if found else None


def _against_module(candidate: Artifact, module: torch.nn.Module, inputs: Any, request: Request) -> Report:
    from moe_export.comparing.apart import copy_model
    from moe_export.comparing.verifying_models import compare_subject
    from moe_export.export.frontend.ended import no_exit
    from moe_export.export.frontend.subject import make_subject

    args, kwargs = _arguments(inputs)
    training = [(part, part.training) for part in module.modules()]
    try:

        def bind(module: torch.nn.Module) -> Subject:
            return make_subject(
                module, args, kwargs, source=Path(candidate.text), how="given to verify_model"
            )

        with no_exit():
            untouched = copy_model(bind, module)
            subject = replace(bind(module), apart=untouched)
            return compare_subject(subject, candidate, request, type(module).__name__)
    finally:
        for part, mode in training:
            part.training = mode


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    import torch

    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
