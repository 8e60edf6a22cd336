"""`trace`: a `Subject` becomes a `Traced`, an `ExportedProgram` whose free dimensions are symbols.

Every dimension is offered to `torch.export` as free (`Dim.AUTO`); what it fixes, the model's code fixes, and the
report says so. An example of size 1 would be taken for a constant, so it is widened to 2 first where the model
takes that, and takes 3 as well: a mask that is broadcast over two heads must stay 1.

Source: https://docs.pytorch.org/docs/stable/export.html
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx, nn
from torch.export import Dim as TorchDim
from torch.export import ExportedProgram

from moe_export.domain import Condition, Domain
from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.source import last_model_line
from moe_export.export.frontend.subject import Subject
from moe_export.export.torch_compat.caches import cache_patches
from moe_export.export.torch_compat.failures import depends_on_values
from moe_export.export.torch_compat.fake_results import fake_results_remembered
from moe_export.export.torch_compat.higher_order import closures_lifted
from moe_export.export.torch_compat.proxies import node_of
from moe_export.export.torch_compat.sizes import fake_results_cached
from moe_export.export.torch_compat.weight_attributes import weight_attributes_kept
from moe_export.export.tracing.asked_numbers import AskedNumber
from moe_export.export.tracing.checks import checks_passed
from moe_export.export.tracing.compiled_sizes import sizes_for_compilers
from moe_export.export.tracing.complex_numbers import without_complex
from moe_export.export.tracing.conditions import only_there
from moe_export.export.tracing.decisions import Decisions, TooManyWaysError
from moe_export.export.tracing.dims import Dim, DimRequest
from moe_export.export.tracing.every_expert_hit import every_expert_hit
from moe_export.export.tracing.fixed_sizes import Fixed, fixed_sizes, lines_noted, require_picked, resized
from moe_export.export.tracing.functionalize import functionalized
from moe_export.export.tracing.idioms import traceable_idioms, user_lines
from moe_export.export.tracing.idioms_numbers import symbolic_numbers
from moe_export.export.tracing.keyed_by_sizes import keyed_by_sizes
from moe_export.export.tracing.looked_up import looked_up
from moe_export.export.tracing.memos import without_memos
from moe_export.export.tracing.open_loops import LoopRefusedError
from moe_export.export.tracing.programs import without_unread_constants
from moe_export.export.tracing.randomness import refuse_random
from moe_export.export.tracing.traced_dims import Shape, read_dims
from moe_export.export.tracing.weight_inputs import with_weights_marked
from moe_export.export.tracing.widen import accepts, widened

SCOPE = "model"  # the attribute of `_Flat` that holds the user's module: the root of every module path


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Attributes:
        program: Inputs are flat, in the order of `inputs`; so are the outputs, in the order of `outputs`.
        inputs: Shape of each input: sizes, names of dynamic dimensions, or expressions of them (`2*batch`).
        dims: The dynamic dimensions.
        fixed: Dimensions that were offered as free and came back fixed.
        computed: Outputs that are Python numbers in the model but depend on sizes or values; no graph has them.
        scope: Module path of the model inside the program, which every module path begins with.
        conditions: What it holds under besides the bounds of `dims`.
        checks: Where the model checks values and does no more than end; the program goes on there.
        decisions: Where the model decides on values, and the program does so, too.
        open_loops: Where a loop of the model takes a number of steps that depends on values.
        lookups: Where one of some modules is looked up by a number of the data: all of them are computed.
    """

    program: ExportedProgram
    inputs: Mapping[str, Shape]
    example: Mapping[str, torch.Tensor]
    outputs: tuple[str, ...]
    dims: tuple[Dim, ...]
    fixed: tuple[Fixed, ...]
    computed: frozenset[str] = frozenset()
    scope: str = SCOPE
    conditions: tuple[Condition, ...] = ()
    checks: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()
    open_loops: tuple[str, ...] = ()
    lookups: tuple[str, ...] = ()

    @property
    def domain(self) -> Domain:
        """For which sizes it holds: the bounds of dimensions, and the conditions."""
        low = [Condition(f"{dim.name} >= {dim.minimum}") for dim in self.dims if dim.minimum > 1]
        high = [Condition(f"{dim.name} <= {dim.maximum}") for dim in self.dims if dim.maximum is not None]
        return Domain((*low, *high, *self.conditions))

    def dim_names(self) -> dict[str, str]:
        """The tracer's symbol → the dimension's name."""
        return {symbol: dim.name for dim in self.dims for symbol in (dim.symbol, *dim.also)}


class _Flat(nn.Module):
    """The subject with tensors in and tensors out, so that the program has neither constants nor nesting."""

    def __init__(self, subject: Subject, computed: list[frozenset[int]], decisions: Decisions) -> None:
        super().__init__()
        self.model = subject.module
        self._call = subject.call_leaves
        self._note = computed.append  # an attribute set during the trace would be set back after it
        self._results = decisions.results
        absent = subject.weights is not None and subject.weights.absent
        self._weights = {} if absent else dict(_named_weights(subject.module))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self._results(lambda: self._call(inputs), inputs, self._known_weights)
        others = [leaf.value for leaf in found if not leaf.is_tensor]
        self._note(
            frozenset(
                index
                for index, value in enumerate(others)
                if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, AskedNumber))
            )
        )
        values = tuple(leaf.value for leaf in found if leaf.is_tensor)
        for value in values:
            value.dim()  # what was written into slices of it is there once it is asked anything (`expert_slices`)
        return values

    def _known_weights(self) -> dict[fx.Node, torch.Tensor]:
        """The values of weights and buffers by their nodes in the trace under way."""
        nodes = ((node_of(traced), name) for name, traced in _named_weights(self.model))
        return {
            node: self._weights[name] for node, name in nodes if node is not None and name in self._weights
        }


def _named_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep notices of the tracer, the exporter and the model to themselves: what matters is raised or checked.

    The model prints as often as it is called; a user has seen that once, when the file was loaded.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def trace(subject: Subject, request: DimRequest | None = None, *, as_called: bool = False) -> Traced:
    """Trace the subject with every wanted dimension free.

    Args:
        subject: The model and its example inputs.
        request: Which dimensions to leave free, and their names; default: all of them.
        as_called: Keep the operators that the model calls (`reshape`, `unflatten`), but for those that write into
            their input; `functional` makes them those few that others expect.

    Raises:
        NotExportableError: `torch.export` cannot trace the model at all, or a dimension that the user picked by
            name cannot be free.
    """
    request = request or DimRequest()
    with quiet():
        example = widened(subject, request)
        exported = _export(subject, example, request, as_called=as_called)
        program = exported.program
        refuse_random(program, subject, example)
        dims, inputs = read_dims(program, example, request)
        stuck = {
            (name, axis)
            for name, shape in inputs.items()
            for axis, size in enumerate(shape)
            if isinstance(size, int) and size != subject.inputs[name].shape[axis]
        }
        if (
            stuck and not stuck & request.picked.keys()
        ):  # widened for nothing: what is fixed stays the example's 1
            again = trace(subject, replace(request, fixed=request.fixed | stuck), as_called=as_called)
            return replace(
                again, fixed=fixed_sizes(subject, again.example, again.inputs, request, exported.fixing)
            )
        fixed = fixed_sizes(subject, example, inputs, request, exported.fixing)
    traced = Traced(program, inputs, example, subject.outputs, dims, fixed, exported.computed)
    require_picked(inputs, request, exported.fixing, exported.reason)
    return replace(
        traced,
        checks=exported.checks,
        decisions=exported.decisions,
        open_loops=exported.open_loops,
        lookups=exported.lookups,
    )


def functional(traced: Traced) -> Traced:
    """A trace `as_called`, with the operators that any other trace has."""
    with quiet(), _decomposing(free=bool(traced.dims)):
        return replace(traced, program=with_weights_marked(functionalized(traced.program)))


@contextmanager
def _decomposing(*, free: bool) -> Iterator[None]:
    """What holds while operators are traced.

    PyTorch's cache of fake results is slower than none where sizes are symbols: twice, with loops over experts. Where
    all are numbers it saves a third. Ours knows what it has seen under other names of sizes. With opt_einsum,
    torch.einsum compares sizes to choose a path, which would fix them; the path is chosen later, by the einsum
    rewriting.
    """
    with (
        torch.no_grad(),
        cache_patches(),
        torch.backends.opt_einsum.flags(enabled=False),
        fake_results_cached(not free),
        fake_results_remembered(),
    ):
        yield


@dataclass(frozen=True)
class _Exported:
    """What the tracer made.

    Attributes:
        program: With as many free dimensions as the tracer takes.
        computed: The outputs that are computed numbers.
        checks: As in `Traced`.
        decisions: As in `Traced`.
        open_loops: As in `Traced`.
        lookups: As in `Traced`.
        fixing: The lines that fixed sizes, by the number of the input and the axis.
        reason: Why fewer dimensions are free than were asked for.
    """

    program: ExportedProgram
    computed: frozenset[str]
    checks: tuple[str, ...]
    decisions: tuple[str, ...]
    open_loops: tuple[str, ...]
    lookups: tuple[str, ...]
    fixing: Mapping[tuple[int, int], str]
    reason: str | None


def _export(
    subject: Subject, example: Mapping[str, torch.Tensor], request: DimRequest, *, as_called: bool = False
) -> _Exported:
    """Export with as many free dimensions as the tracer takes."""
    first: Exception | None = None
    stuck: dict[tuple[int, int], str] = {}  # with the line that is the reason
    decisions = Decisions(subject.module)
    limits: list[int | None] = [0, 1, 2, None]
    while limits:
        limit = limits.pop()
        spec = tuple(
            tuple(
                TorchDim.AUTO
                if request.wants(name, axis)
                and (limit is None or axis < limit)
                and (place, axis) not in stuck
                else None
                for axis in range(tensor.dim())
            )
            for place, (name, tensor) in enumerate(example.items())
        )
        numbers: list[frozenset[int]] = []
        fixing = {place: line for place, line in stuck.items() if line}
        reasons: dict[sympy.Basic, str] = {}
        free = any(dimension is not None for axes in spec for dimension in axes)
        flat = _Flat(subject, numbers, decisions).eval()
        try:
            with (
                _tracing(subject, decisions, free=free) as checks,
                lines_noted(fixing, reasons),
            ):
                with subject.state.kept():
                    if free:
                        keyed_by_sizes(subject.state)
                    exported = torch.export.export(
                        flat,
                        tuple(tensor.clone() for tensor in example.values()),
                        dynamic_shapes={"inputs": spec},
                        strict=False,
                    )
                decisions.require_followed()
                exported = without_unread_constants(exported)
                found = _only_there(exported, subject, example, request)
                if found.keys() - stuck.keys():  # it is right at these sizes alone, and only looks free
                    stuck = {place: reasons.get(reason, "") for place, reason in found.items()} | stuck
                    limits.append(limit)
                    continue
                program = with_weights_marked(without_complex(functionalized(exported, as_called=as_called)))
        except TooManyWaysError:
            raise
        except Exception as error:
            if decisions.follow_after(error):
                limits.append(limit)
                continue
            cause = None if isinstance(error, LoopRefusedError) else decisions.cause
            first = first or cause or error
            continue
        names = list(subject.dropped)
        computed = frozenset(names[index] for index in numbers[-1] if index < len(names))
        return _Exported(
            program,
            computed,
            (*checks, *decisions.checks()),
            tuple(decisions.places),
            tuple(decisions.loops),
            tuple(decisions.lookups),
            fixing,
            _first_line(first) if first else None,
        )
    assert first is not None
    if isinstance(first, NotExportableError):
        raise first
    line = last_model_line(first)
    raise NotExportableError(
        f"torch.export cannot trace {type(subject.module).__name__}: {_first_line(first)}",
        code=Code.VALUES_DECIDE if depends_on_values(first) else Code.NOT_TRACEABLE,
        where=line or str(subject.source),
        hint=_hint(first, line),
    ) from first


@contextmanager
def _tracing(subject: Subject, decisions: Decisions, *, free: bool) -> Iterator[list[str]]:
    """What holds while a model is traced.

    Yields:
        The checks that are taken as passed.
    """
    with (
        _decomposing(free=free),
        without_memos(subject.module),
        closures_lifted(),
        traceable_idioms(),
        sizes_for_compilers(),
        symbolic_numbers(subject.module),
        looked_up(decisions.note_lookup),
        weight_attributes_kept(),
        decisions.answered(),  # what neither checks nor experts answer
        checks_passed() as checks,
        every_expert_hit(decisions.apart),
        user_lines(),
    ):
        yield checks


def _only_there(
    program: ExportedProgram, subject: Subject, example: Mapping[str, torch.Tensor], request: DimRequest
) -> dict[tuple[int, int], sympy.Basic]:
    """Inputs and axes that only look free, and the conditions that say so; the model is asked for other sizes."""
    dims, inputs = read_dims(program, example, request)

    def takes(sizes: Mapping[tuple[int, int], int]) -> bool:
        named = {(list(example)[place], axis): size for (place, axis), size in sizes.items()}
        return accepts(subject, resized(example, named))

    return only_there(program, dims, tuple(inputs.values()), takes)


def _hint(error: Exception, line: str | None) -> str:
    """What to do about a model that cannot be traced: values that decide, or anything else."""
    if depends_on_values(error):
        return (
            "control flow or sizes that depend on the values of tensors cannot be traced; "
            "write it with torch.where, masks, or a loop over all experts"
        )
    if line is None:
        return (
            "PyTorch's tracer failed by itself, at no line of the model: export its parts one by one to find which, "
            "or see --debug"
        )
    return (
        "that line runs, but not while it is traced: write it with tensor operators, or give other arguments"
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
