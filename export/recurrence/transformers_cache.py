"""transformers models that keep a cache: one token, with what the cache holds as inputs and outputs.

transformers passes a model a cache, in which each layer keeps what it needs from earlier tokens: keys and values, the
window of a convolution, the state of a recurrence. The step of such a model is a call of it with one token and a cache
made from given tensors (`frontend/caches`); the model itself computes positions, masks and attention windows.

Source: https://huggingface.co/docs/transformers/cache_explanation
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_export.export.frontend.caches import CACHES, Kept, kept_in, twin, without_window

_MODELS = "transformers.modeling_utils"
CACHE = "past_key_values"
"""What a graph's inputs of a cache begin with."""
_ARGUMENTS = (CACHE, "cache_params")
"""The argument that a model takes its cache by: the second one where it has states alone (Mamba)."""


class CachedModel:
    """A transformers model inside a module, and what its cache is made of.

    Attributes:
        model: The model.
        argument: What it takes its cache by.
        kept: The tensors of its cache; empty until `fill` has run.
    """

    def __init__(self, model: nn.Module, argument: str) -> None:
        self.model, self.argument = model, argument
        self._layers: list[Any] = []
        self.kept: tuple[Kept, ...] = ()

    def inside(self, module: nn.Module) -> CachedModel:
        """The same part of a copy of the module."""
        found = find_cached_model(module, attends=False)
        assert found is not None
        found._layers, found.kept = self._layers, self.kept
        return found

    def fill(self, call: Any) -> Any:
        """Run `call`, which calls the model, with an empty cache; the filled cache, whose layout `kept` then is."""
        caches: Any = sys.modules[CACHES]
        cache = caches.DynamicCache(config=self.model.config)
        cache.layers = [without_window(layer) for layer in cache.layers]
        with self.given(cache):
            call()
        self._layers = list(cache.layers)
        self.kept = kept_in(cache.layers)
        return cache

    def cache_of(self, tensors: Sequence[Tensor]) -> Any:
        """A new cache that holds copies of tensors, given in the order of `kept`."""
        caches: Any = sys.modules[CACHES]
        cache = caches.DynamicCache(config=self.model.config)
        cache.layers = [twin(layer) for layer in self._layers]
        for kept, tensor in zip(self.kept, tensors, strict=True):
            kept.put(cache.layers[kept.layer], tensor.clone())  # layers write into their states
        return cache

    def given(self, cache: Any) -> AbstractContextManager[None]:
        """While this context is active, the model is called with this cache, whatever its caller passes."""
        return self.called_with({self.argument: cache, "use_cache": True})

    @contextmanager
    def called_with(self, more: Mapping[str, Any]) -> Iterator[None]:
        """While this context is active, the model is called with these arguments, whatever its caller passes."""

        def replaced(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, **more}

        handle = self.model.register_forward_pre_hook(replaced, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def find_cached_model(module: nn.Module, *, attends: bool = True) -> CachedModel | None:
    """The outermost transformers model in a module, if it takes a cache that grows; None if there is none.

    Args:
        module: The module.
        attends: Whether it must grow, or may hold windows and states alone.

    transformers is not imported for this: a module that uses it has already done so.
    """
    kind = getattr(sys.modules.get(_MODELS), "PreTrainedModel", None)
    caches = sys.modules.get(CACHES)
    if kind is None or caches is None:
        return None
    model = next((each for each in module.modules() if isinstance(each, kind)), None)
    argument = None if model is None else _argument_of(model)
    if model is None or argument is None or not takes(model, "use_cache"):
        return None
    layers = getattr(caches.DynamicCache(config=model.config), "layers", ())
    grows = any(isinstance(layer, caches.DynamicLayer) for layer in layers)
    return CachedModel(model, argument) if grows or (layers and not attends) else None


def _argument_of(model: nn.Module) -> str | None:
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _ARGUMENTS if name in parameters), None)


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model can be called with an argument of this name; some hand on what they do not name themselves."""
    parameters = inspect.signature(model.forward).parameters
    handed_on = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return name in parameters or (handed_on and _argument_of(model) is not None)


def empty(kept: Kept, tensor: Tensor) -> Tensor:
    """What a tensor of a cache is before the first token: zeros, or no entries if it grows."""
    return torch.zeros_like(tensor) if kept.grows is None else tensor.narrow(kept.grows, 0, 0)
