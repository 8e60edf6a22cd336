"""transformers' mixtures of experts, traced so that all families with stacked weights look alike.

transformers keeps a registry of ways to run such experts; a configuration names the one to take. Its loop over the
hit experts and its sorted form depend on the data or have no ONNX form. The way that looks up the weights of each
pair traces for any model and any number of experts in the same few nodes, and `experts/pairs` understands it.

Source: https://huggingface.co/docs/transformers/experts_interface
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

_REGISTRY = "transformers.integrations.moe"
_TRACEABLE = "batched_mm"


@contextmanager
def traceable_experts() -> Iterator[None]:
    """While it runs, experts of transformers take the way that can be traced, whatever their model is set to.

    transformers is not imported for it: a model that uses it has done so.
    """
    registry = getattr(sys.modules.get(_REGISTRY), "ExpertsInterface", None)
    if registry is None:
        yield
        return

    def take(self: Any, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        way: Callable[..., Any] = self.get(_TRACEABLE, default)
        return way

    with mock.patch.object(registry, "get_interface", take):
        yield
