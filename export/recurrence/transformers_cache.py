"""transformers models that keep a cache: one token, with what the cache holds as inputs and outputs.

transformers passes a model a cache, in which each layer keeps what it needs from earlier tokens: keys and values, the
window of a convolution, the state of a recurrence. The step of such a model is a call of it with one token and a cache
made from given tensors; the model itself computes positions, masks and attention windows. A layer that only keeps the
keys of a window is given the keys of all tokens: the model's mask leaves out those that are too old.

Source: https://huggingface.co/docs/transformers/cache_explanation
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CACHES = "transformers.cache_utils"
_MODELS = "transformers.modeling_utils"
CACHE = "past_key_values"
"""The argument that a model takes its cache by."""
_GROWING = ("keys", "values")
_CALLED = {"keys": "key", "values": "value", "conv_states": "window", "recurrent_states": "state"}


@dataclass(frozen=True)
class Kept:
    """One tensor of a cache.

    Attributes:
        layer: The number of the layer that keeps it.
        attribute: The layer's attribute that holds it.
        part: Its key, if the attribute is a dict of tensors.
    """

    layer: int
    attribute: str
    part: int | None

    @property
    def name(self) -> str:
        """Its name in a cache, such as `0.key` or `3.state`; layers count from 0."""
        kind = _CALLED.get(self.attribute, self.attribute)
        return f"{self.layer}.{kind}" + (f".{self.part}" if self.part else "")

    @property
    def grows(self) -> int | None:
        """The axis along which it has one entry a token; None if it does not grow."""
        return 2 if self.attribute in _GROWING else None

    def of(self, cache: Any) -> Tensor:
        """Read it from a cache."""
        found: Tensor = self._place(cache.layers[self.layer])[self._key]
        return found

    def put(self, layer: Any, tensor: Tensor) -> None:
        """Write it into a layer of a cache."""
        self._place(layer)[self._key] = tensor

    def _place(self, layer: Any) -> dict[Any, Tensor]:
        held: dict[Any, Tensor] = vars(layer) if self.part is None else getattr(layer, self.attribute)
        return held

    @property
    def _key(self) -> str | int:
        return self.attribute if self.part is None else self.part


class CachedModel:
    """A transformers model inside a module, and what its cache is made of.

    Attributes:
        model: The model.
        kept: The tensors of its cache; empty until `fill` has run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._layers: list[Any] = []
        self.kept: tuple[Kept, ...] = ()

    def fill(self, call: Any) -> Any:
        """Run `call`, which calls the model, with an empty cache; the filled cache, whose layout `kept` then is."""
        caches: Any = sys.modules[_CACHES]
        cache = caches.DynamicCache(config=self.model.config)
        cache.layers = [self._without_window(layer, caches) for layer in cache.layers]
        with self.given(cache):
            call()
        self._layers = list(cache.layers)
        self.kept = tuple(kept for place, layer in enumerate(cache.layers) for kept in _tensors(place, layer))
        return cache

    @staticmethod
    def _without_window(layer: Any, caches: Any) -> Any:
        both = getattr(caches, "LinearAttentionAndSlidingWindowAttentionLayer", ())
        if both and isinstance(layer, both):
            return caches.LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
        return caches.DynamicLayer() if isinstance(layer, caches.DynamicSlidingWindowLayer) else layer

    def cache_of(self, tensors: Sequence[Tensor]) -> Any:
        """A new cache that holds copies of tensors, given in the order of `kept`."""
        caches: Any = sys.modules[_CACHES]
        cache = caches.DynamicCache(config=self.model.config)
        cache.layers = [_twin(layer) for layer in self._layers]
        for kept, tensor in zip(self.kept, tensors, strict=True):
            kept.put(cache.layers[kept.layer], tensor.clone())  # layers write into their states
        return cache

    @contextmanager
    def given(self, cache: Any) -> Iterator[None]:
        """While this context is active, the model is called with this cache, whatever its caller passes."""

        def with_cache(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, CACHE: cache, "use_cache": True}

        handle = self.model.register_forward_pre_hook(with_cache, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def find_cached_model(module: nn.Module) -> CachedModel | None:
    """The outermost transformers model in a module, if it takes a cache that grows; None if there is none.

    transformers is not imported for this: a module that uses it has already done so.
    """
    kind = getattr(sys.modules.get(_MODELS), "PreTrainedModel", None)
    caches = sys.modules.get(_CACHES)
    if kind is None or caches is None:
        return None
    model = next((each for each in module.modules() if isinstance(each, kind)), None)
    if model is None or not {CACHE, "use_cache"} <= set(inspect.signature(model.forward).parameters):
        return None
    layers = getattr(caches.DynamicCache(config=model.config), "layers", ())
    attends = any(isinstance(layer, caches.DynamicLayer) for layer in layers)
    return CachedModel(model) if attends else None


def _tensors(place: int, layer: Any) -> Iterator[Kept]:
    for name, value in vars(layer).items():
        if isinstance(value, Tensor) and not name.startswith("_"):
            yield Kept(place, name, None)
        elif isinstance(value, Mapping):
            for part, tensor in value.items():
                if isinstance(tensor, Tensor):
                    yield Kept(place, name, part)


def _twin(layer: Any) -> Any:
    """A copy of a cache's layer with the same settings, which can be written into."""
    twin = copy.copy(layer)
    for name, value in vars(twin).items():
        if isinstance(value, dict):
            setattr(twin, name, dict(value))
    if isinstance(getattr(twin, "keys", None), Tensor):
        # The original method asks whether there are any tokens, a condition that would become part of a trace.
        twin.get_seq_length = functools.partial(_length, twin)
    return twin


def _length(layer: Any) -> int:
    size: int = layer.keys.shape[-2]
    return size


def empty(kept: Kept, tensor: Tensor) -> Tensor:
    """What a tensor of a cache is before the first token: zeros, or no entries if it grows."""
    return torch.zeros_like(tensor) if kept.grows is None else tensor.narrow(kept.grows, 0, 0)
