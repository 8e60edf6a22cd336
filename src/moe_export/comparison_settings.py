"""The settings of a comparison: how many cases, on which inputs, within which tolerance; needs no engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from moe_export.errors import UsageError
from moe_export.options.sizes import parse_sizes
from moe_export.verify import DEFAULTS, Array, Case, DimRange, FlipBudget, TensorSpec, Tolerance, cases
from moe_export.verify.golden import read_inputs
from moe_export.verify.inputs.experts_alone import Watched, alone_cases
from moe_export.verify.inputs.known import NOTHING, Known
from moe_export.verify.judging.tolerance import parse_tolerances
from moe_export.verify.specs import describe

Own = Callable[[int], Mapping[str, Array]]


@dataclass(frozen=True)
class ComparisonSettings:
    """How much a comparison tries.

    Attributes:
        thorough: Every kind of values, and at more sizes.
        seeds: How many seeds, from the given one on.
        flips: How many tokens may go to another expert in a tie.
        at: Further sizes.
        only: The label of the one case to run; None for all.
        files: Files of the user's own inputs.
        own: The function `inputs(seed)` of the model's file, if it has one.
        time_limit: Seconds after which no further case is begun; None for no limit.
    """

    thorough: bool = False
    seeds: int = 1
    flips: FlipBudget | None = None
    at: tuple[Mapping[str, int], ...] = ()
    only: str | None = None
    files: tuple[Path, ...] = ()
    own: Own | None = None
    time_limit: float | None = None


DEFAULT_SETTINGS = ComparisonSettings()


def parse_settings(
    thorough: bool = False,
    seeds: int = 1,
    flips: str | None = None,
    sizes: Sequence[str] = (),
    case: str | None = None,
    input_files: Sequence[str] = (),
    time_limit: float | None = None,
) -> ComparisonSettings:
    """The settings as the command line gives them.

    Raises:
        UsageError: One of them cannot be parsed.
    """
    return ComparisonSettings(
        thorough=thorough,
        seeds=seeds,
        flips=None if flips is None else FlipBudget.parse(flips),
        at=tuple(map(parse_sizes, sizes)),
        only=case,
        files=tuple(Path(file) for file in input_files),
        time_limit=time_limit,
    )


SETTINGS = tuple(inspect.signature(parse_settings).parameters)
"""The options that settings are read from, by their names in Python."""


def parse_tolerance(rtol: float | None, atol: float | None, outputs: Sequence[str] = ()) -> Tolerance:
    """`--rtol`, `--atol` and every `--tolerance`."""
    return Tolerance(rtol, atol, parse_tolerances(outputs))


def tolerance_of(dtype: str, asked: Tolerance) -> Tolerance:
    """What the user asked for, else what the narrowest type that a graph computes in allows."""
    if dtype not in {"float16", "bfloat16"}:
        return asked
    return replace(asked, usual=DEFAULTS[dtype])


def check_names(tolerance: Tolerance, outputs: Sequence[str]) -> None:
    """Refuse a margin for an output that does not exist: it would be believed and never used.

    Raises:
        UsageError: There is one.
    """
    unknown = tolerance.unknown(outputs)
    if unknown:
        raise UsageError(
            f"--tolerance names the output '{unknown[0]}', which there is not",
            hint=f"the outputs: {', '.join(outputs)}",
        )


def comparison_cases(
    settings: ComparisonSettings,
    specs: Sequence[TensorSpec],
    dims: Sequence[DimRange],
    example: Mapping[str, Array],
    seed: int,
    watched: Watched | None = None,
    known: Known = NOTHING,
) -> Iterator[Case]:
    """The cases of a comparison; the user's own inputs come right after the example.

    Args:
        settings: How much to try.
        specs: The inputs.
        dims: The free dimensions.
        example: The first case.
        seed: Of the values.
        watched: The reference, if it says what it chooses: then each expert is tried alone, if all is to be tried.
        known: What is known of the two artifacts.

    Raises:
        UsageError: There is no case of the label that was asked for, or the user's inputs do not fit.
    """
    made = cases(
        specs,
        dims,
        example,
        seed,
        thorough=settings.thorough,
        seeds=settings.seeds,
        at=settings.at,
        known=known,
    )
    made = _with_own(settings, specs, made, seed)
    if settings.thorough and watched is not None:
        drawn = (case for more in range(8) for case in _ordinary(specs, dims, example, seed + more))
        made = _before_reserve(made, alone_cases(watched, drawn))
    return picked(made, settings.only)


def _ordinary(
    specs: Sequence[TensorSpec], dims: Sequence[DimRange], example: Mapping[str, Array], seed: int
) -> Iterator[Case]:
    """New values at the traced sizes."""
    return islice(cases(specs, dims, example, seed), 1, 2)


def _before_reserve(made: Iterator[Case], more: Iterator[Case]) -> Iterator[Case]:
    for case in made:
        if case.reserve:
            yield from more
            yield case
            break
        yield case
    yield from more  # nothing is left of it if the reserve was reached
    yield from made


def _with_own(
    settings: ComparisonSettings, specs: Sequence[TensorSpec], made: Iterator[Case], seed: int
) -> Iterator[Case]:
    yield next(made)
    names = [spec.name for spec in specs]
    for file in settings.files:
        yield own_case(file.name, seed, specs, read_inputs(file, names))
    if settings.own is not None:
        for more in range(settings.seeds):
            yield own_case(f"inputs({seed + more})", seed + more, specs, settings.own(seed + more))
    yield from made


def own_case(label: str, seed: int, specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> Case:
    """A case of inputs that were given.

    Raises:
        UsageError: One of them does not fit.
    """
    sizes: dict[str, int] = {}
    inputs = {}
    for spec in specs:
        array = arrays[spec.name]
        wanted = [
            size if isinstance(size, int) else sizes.get(size) if size in sizes else None
            for size in spec.shape
        ]
        fits = array.ndim == len(wanted) and all(
            want in (None, got) for want, got in zip(wanted, array.shape, strict=True)
        )
        if not fits or array.dtype.name != spec.dtype:
            raise UsageError(f"{label}: the input '{spec.name}' is {describe(array)}, the model takes {spec}")
        sizes |= {
            name: size
            for name, size in zip(spec.shape, array.shape, strict=True)
            if isinstance(name, str) and name.isidentifier()
        }
        inputs[spec.name] = array
    return Case(label, seed, sizes, inputs)


def picked(cases: Iterator[Case], only: str | None) -> Iterator[Case]:
    """The one case of a label, or all.

    Raises:
        UsageError: There is none.
    """
    if only is None:
        return cases
    labels = []
    for case in cases:
        if case.label == only:
            return iter([case])
        labels.append(case.label)
    raise UsageError(
        f"there is no case '{only}'", hint=f"the cases: {'; '.join(labels)} (and more with --thorough)"
    )
