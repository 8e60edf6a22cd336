"""transformers, while a model is traced: which of its own forms of a computation a model takes.

Why: its registry of experts is public, but what a model takes from it stands in the model's configuration, which is the
user's. Its gated delta rules are two functions of a module that name no registry at all.

Seen in transformers 5.23.0. It is not imported for this: a model that uses it has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

REGISTRY = "transformers.integrations.moe"
MODELS = "transformers.models."


@contextmanager
def experts_taken(implementation: str) -> Iterator[None]:
    """While it runs, experts take one implementation of the registry, whatever their model is set to.

    Source: https://huggingface.co/docs/transformers/experts_interface
    """
    registry = getattr(sys.modules.get(REGISTRY), "ExpertsInterface", None)
    if registry is None:
        yield
        return

    def take(self: Any, configured: str, default: Any) -> Any:
        return self.get(implementation, default)

    with mock.patch.object(registry, "get_interface", take):
        yield


@contextmanager
def function_taken(name: str, other: str) -> Iterator[None]:
    """While it runs, the files of models that have both functions call `other` where they call `name`."""
    with ExitStack() as stack:
        for file, module in list(sys.modules.items()):
            if file.startswith(MODELS) and {name, other} <= vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, getattr(module, other)))
        yield
