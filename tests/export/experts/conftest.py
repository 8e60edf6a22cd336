"""Every idiom of a block of experts, as a fixture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from experts_idioms import IDIOMS, Block, FlatMasks, FusedWeights, OverMasks, SkipEmpty, TopOne
from slow_cases import only


@pytest.fixture(
    params=only([OverMasks, SkipEmpty, TopOne, FusedWeights, FlatMasks], IDIOMS),
    ids=lambda idiom: idiom.__name__,
)
def idiom(request) -> Callable[[], Block]:
    return request.param
