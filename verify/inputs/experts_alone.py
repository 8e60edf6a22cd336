"""Inputs that send every token to one expert, for each expert in turn.

The reference itself decides which expert a token goes to: tokens are drawn, the reference runs, and one token of each
expert is repeated throughout. Where a layer mixes tokens before the router, other experts may be chosen than planned;
the inputs are still useful.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from moe_export.verify.inputs.cases import Case
from moe_export.verify.judging.replay import Choice
from moe_export.verify.specs import Array, is_float

ALONE = "one expert"
_MOST = 64  # experts; of more, the first that are found


class Watched(Protocol):
    """An engine that reports its choices."""

    def run_watched(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], tuple[Choice, ...]]:
        """Outputs, and the choices in order."""
        ...


def alone_cases(runner: Watched, drawn: Iterator[Case]) -> Iterator[Case]:
    """A case for each expert that some token of `drawn` goes to first: "expert 3 alone".

    Args:
        runner: The reference.
        drawn: Ordinary cases of the same sizes; as many are taken as find new experts.
    """
    seen: set[int] = set()
    for case in drawn:
        found = _first_choice(runner, case)
        new = 0
        for name, ids in found.items():
            for expert, row in zip(*np.unique(ids, return_index=True), strict=True):
                if int(expert) not in seen and len(seen) < _MOST:
                    seen.add(int(expert))
                    new += 1
                    inputs = {**case.inputs, name: repeated(case.inputs[name], int(row))}
                    inputs[name].setflags(write=False)
                    yield Case(f"expert {int(expert)} alone", case.seed, case.sizes, inputs, regime=ALONE)
        if not new:
            return


def _first_choice(runner: Watched, case: Case) -> dict[str, Array]:
    """The input whose rows are the tokens of the first choice, and the first expert of each; empty if there is none."""
    try:
        _, choices = runner.run_watched(case.inputs)
    except Exception:  # what the reference refuses is recorded where it is run for its own sake
        return {}
    for choice in choices:
        first = choice.ids.reshape(-1, choice.ids.shape[-1])[:, 0] if choice.ids.ndim else choice.ids
        for name, array in case.inputs.items():
            if _rows(array) == first.size and first.size:
                return {name: first}
    return {}


def _rows(array: Array) -> int:
    """How many tokens an input holds: vectors of floats, or ids."""
    if is_float(array.dtype):
        return int(np.prod(array.shape[:-1])) if array.ndim > 1 else 0
    return array.size if array.dtype.kind in "iu" else 0


def repeated(array: Array, row: int) -> Array:
    """An array of the same shape with one of its rows, or of its ids, throughout."""
    if not is_float(array.dtype):
        return np.full_like(array, array.reshape(-1)[row])
    return np.array(np.broadcast_to(array.reshape(-1, array.shape[-1])[row], array.shape))
