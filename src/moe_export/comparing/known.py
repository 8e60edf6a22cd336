"""What is known about two artifacts before they are compared: what cases cost, what inputs mean.

It is found out by running the reference. The number of runs follows from its counted work, not from measured time, so
the plan is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moe_export.comparing import apart
from moe_export.domain import Domain
from moe_export.export.frontend.subject import Subject
from moe_export.export.tracing.constants import constants_of
from moe_export.verify import Array, DimRange, TensorSpec, TorchRunner
from moe_export.verify.cost.torch_work import price_of
from moe_export.verify.inputs.cases import case_maker
from moe_export.verify.inputs.graph_numbers import graph_numbers
from moe_export.verify.inputs.known import Known
from moe_export.verify.inputs.maker import is_measured
from moe_export.verify.inputs.meaning import MOST_ASKED, Asked, Table, meanings_of
from moe_export.verify.inputs.price import BUDGET
from moe_export.verify.inputs.torch_tables import watch_indices
from moe_export.verify.runners.torch_runner import to_torch
from moe_export.verify.specs import is_float

_SHARE = 0.25  # of the budget of all cases, spent on finding out which values the inputs accept


def known_of_model(
    model: Subject,
    specs: Sequence[TensorSpec],
    dims: Sequence[DimRange],
    example: Mapping[str, Array],
    seed: int,
    graph: Path | None = None,
    domain: Domain | None = None,
) -> Known:
    """What is known about a model, and about the graph that it is compared with.

    Args:
        model: The model. Its work is counted, and its index operations watched, in this process; which values its
            inputs accept is asked of the process that runs it as the reference.
        specs: The inputs.
        dims: The free dimensions.
        example: Its example inputs.
        seed: Of the values.
        graph: The file of the other artifact, if it is an ONNX graph.
        domain: The sizes that the graph claims to be right for; ignored if it excludes the example's.
    """
    make = case_maker(specs, example, seed)
    price = price_of(TorchRunner(model.call_named, model.outputs).run, dims, make)
    traced = {dim.name: dim.traced for dim in dims}
    times = MOST_ASKED if price is None else int(min(MOST_ASKED, _SHARE * BUDGET / max(price(traced), 1.0)))
    call = model.call_named
    found, read = watch_indices(call, {name: to_torch(array) for name, array in example.items()})
    grown = {
        dim.name: watch_indices(
            call,
            {
                name: to_torch(array)
                for name, array in make(traced | {dim.name: dim.clamp(2 * dim.traced + 1)}).inputs.items()
            },
        )[0]
        for dim in (dims if found else ())
    }
    tables = {name: _table(name, within, dims, grown) for name, within in found.items()}
    asked = Asked(apart.reference(model, model.outputs).run, example, times)
    stated = domain if domain is not None and domain.holds(traced) else Domain()
    limits = sorted({number for condition in stated.conditions for number in condition.constants})
    numbers = (*limits, *(() if graph is None else graph_numbers(graph)), *constants_of(model))
    return Known(
        price, meanings_of(asked, example, tables, read), _unfilled(asked, example), numbers, stated.holds
    )


def _table(
    name: str,
    within: tuple[int, int],
    dims: Sequence[DimRange],
    grown: Mapping[str, Mapping[str, tuple[int, int]]],
) -> Table:
    """The table that an input indexes, with the dimension that it grows with, if it does.

    The bounds of the indices are compared between the example and one run with that dimension at twice its size plus 1.
    """
    low, high = within
    for dim in dims:
        more = grown[dim.name].get(name)
        if more is not None and more[1] - high == dim.clamp(2 * dim.traced + 1) - dim.traced != 0:
            return Table(low, high, dim.name, dim.traced)
    return Table(low, high)


def _unfilled(asked: Asked, example: Mapping[str, Array]) -> frozenset[str]:
    """Float inputs whose example is a placeholder, all zeros or all ones: the reference accepts random values for them.

    Ones beside an input with measured values may be a mask, and are kept.
    """
    floats = {name: array for name, array in example.items() if is_float(array.dtype) and array.size > 1}
    measured = any(is_measured(array) for array in floats.values())
    found = set()
    for name, array in floats.items():
        values = np.unique(array.astype(np.float64))
        if values.size == 1 and np.isfinite(values[0]) and (values[0] == 0 or not measured):
            drawn = np.random.default_rng(0).standard_normal(array.shape).astype(array.dtype)
            if asked.takes(name, [drawn]):
                found.add(name)
    return frozenset(found)
