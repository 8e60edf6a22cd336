"""Tables of cases of which a few are run by `make test`: what the others repeat is run with the slow tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(case: Any) -> Any:
    """A case as `parametrize` and a fixture's `params` take it; a tuple is the values of several arguments."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)


def one_in(step: int, cases: Iterable[Any]) -> list[Any]:
    """All cases of a table: the first, and every `step`-th after it, are run each time."""
    return [case if place % step == 0 else slow(case) for place, case in enumerate(cases)]


def only(kept: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """All cases of a table, of which these are run each time.

    Raises:
        ValueError: A case that is to be run is not in the table.
    """
    kept, cases = list(kept), list(cases)
    if missing := [case for case in kept if case not in cases]:
        raise ValueError(f"no cases of the table: {missing}")
    return [case if case in kept else slow(case) for case in cases]
