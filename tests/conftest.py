"""`slow_but_one`: of the cases of a test, the first runs in `make test`, and the others are slow."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before the cases are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but the first case."""
    seen: set[str] = set()
    for item in items:
        if item.get_closest_marker("slow_but_one") is None or item.get_closest_marker("slow") is not None:
            continue
        name = item.nodeid.partition("[")[0]
        if name in seen:
            item.add_marker(pytest.mark.slow)
        seen.add(name)
