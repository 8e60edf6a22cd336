"""Caches of transformers, taken apart into named tensors and made again of others.

    DynamicCache(layers=[keys, values; conv_states, recurrent_states])
        ⇄ 0.key, 0.value, 1.conv_state, 1.recurrent_state

A call writes into the cache that it is given, so each call is given one of its own. A layer that only keeps the keys of
a window becomes one that keeps those of all tokens: the model's mask leaves out those that are too old.

Source: https://huggingface.co/docs/transformers/cache_explanation
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.pytree import KEY, STATE, VALUE, WINDOW, Inside
from moe_export.export.torch_compat.nesting import pytree

CACHES = "transformers.cache_utils"
_GROWING = ("keys", "values")
_CALLED = {"keys": KEY, "values": VALUE, "conv_states": WINDOW, "recurrent_states": STATE}


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
        """Its name in a cache, such as `0.key` or `3.recurrent_state`; layers count from 0."""
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


def kept_in(layers: Sequence[Any]) -> tuple[Kept, ...]:
    """The tensors that the layers of a cache hold."""
    return tuple(kept for place, layer in enumerate(layers) for kept in _tensors(place, layer))


def _tensors(place: int, layer: Any) -> Iterator[Kept]:
    for name, value in vars(layer).items():
        if isinstance(value, Tensor) and not name.startswith("_"):
            yield Kept(place, name, None)
        elif isinstance(value, Mapping):
            for part, tensor in value.items():
                if isinstance(tensor, Tensor):
                    yield Kept(place, name, part)


def twin(layer: Any) -> Any:
    """A copy of a cache's layer with the same settings, which can be written into."""
    made = copy.copy(layer)
    for name, value in vars(made).items():
        if isinstance(value, dict):
            setattr(made, name, dict(value))
    if isinstance(getattr(made, "keys", None), Tensor):
        # The original method asks whether there are any tokens, a condition that would become part of a trace.
        made.get_seq_length = functools.partial(_length, made)
    return made


def _length(layer: Any) -> int:
    size: int = layer.keys.shape[-2]
    return size


def without_window(layer: Any) -> Any:
    """An empty layer that keeps all tokens, for one that keeps those of a window; any other as it is."""
    caches: Any = sys.modules[CACHES]
    both = getattr(caches, "LinearAttentionAndSlidingWindowAttentionLayer", ())
    if both and isinstance(layer, both):
        return caches.LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return caches.DynamicLayer() if isinstance(layer, caches.DynamicSlidingWindowLayer) else layer


def _cache_kinds() -> tuple[type, ...]:
    """The class of all caches; none if transformers has not been imported."""
    kind = getattr(sys.modules.get(CACHES), "Cache", None)
    return () if kind is None else (kind,)


@dataclass(frozen=True)
class _Opened:
    """A cache among the arguments of a model, as a node of a tree whose leaves are its tensors."""

    cache: Any
    kept: tuple[Kept, ...]
    tensors: tuple[Any, ...]

    def closed(self) -> Any:
        """A cache of its own, with these tensors."""
        made = copy.copy(self.cache)
        made.layers = [twin(layer) for layer in self.cache.layers]
        for kept, tensor in zip(self.kept, self.tensors, strict=True):
            kept.put(made.layers[kept.layer], tensor)
        return made


def open_caches(arguments: Any, source: Path) -> Any:
    """The same arguments, with nodes for caches.

    Args:
        arguments: Any nesting.
        source: The model's file, for errors.

    Raises:
        NotExportableError: A cache is of another kind than those that grow, or lacks tokens that it has seen.
    """
    kinds = _cache_kinds()
    if not kinds:
        return arguments
    return pytree.tree_map(
        lambda leaf: _opened(leaf, source) if isinstance(leaf, kinds) else leaf,
        arguments,
        is_leaf=lambda value: isinstance(value, kinds),
    )


def inside_caches(arguments: Any) -> Inside | None:
    """How to look into what a model returns: into caches, too, if it takes one."""
    nodes = pytree.tree_leaves(arguments, is_leaf=lambda value: isinstance(value, _Opened))
    return _tensors_by_name if any(isinstance(node, _Opened) for node in nodes) else None


def _tensors_by_name(value: Any) -> dict[str, Tensor] | None:
    layers: Any = getattr(value, "layers", None)
    if layers is None or not isinstance(value, _cache_kinds()):
        return None
    return {kept.name: kept.of(value) for kept in kept_in(layers)}


def close_caches(arguments: Any) -> Any:
    """The arguments that a model takes: nodes as caches, which it may write into."""
    return pytree.tree_map(
        lambda leaf: leaf.closed() if isinstance(leaf, _Opened) else leaf,
        arguments,
        is_leaf=lambda value: isinstance(value, _Opened),
    )


def _opened(cache: Any, source: Path) -> _Opened:
    caches: Any = sys.modules[CACHES]
    fixed = tuple(getattr(caches, name, ()) for name in ("StaticLayer", "BaseQuantizedLayer"))
    layers = getattr(cache, "layers", None)
    other = (
        type(cache)
        if layers is None
        else next((type(each) for each in layers if isinstance(each, fixed)), None)
    )
    if other is not None:
        raise NotExportableError(
            f"the example inputs hold a cache of {other.__name__}, which is not taken apart into tensors",
            code=Code.UNLIKE_ONNX,
            where=str(source),
            hint="give a DynamicCache, whose keys and values become inputs",
        )
    made = copy.copy(cache)
    made.layers = [_unlimited(layer, source) for layer in cache.layers]
    kept = kept_in(made.layers)
    return _Opened(made, kept, tuple(each.of(made) for each in kept))


def _unlimited(layer: Any, source: Path) -> Any:
    """The layer with room for all tokens."""
    made = without_window(layer)
    if made is layer:
        return layer
    seen, held = layer.get_seq_length(), 0 if layer.keys is None else layer.keys.shape[-2]
    if seen != held:
        raise NotExportableError(
            f"the cache in the example inputs has the last {held} of {seen} tokens, because attention has a window",
            code=Code.UNLIKE_ONNX,
            where=str(source),
            hint="give one of fewer tokens than the window; the graph takes those of all tokens, and masks old ones",
        )
    limits = vars(made)
    vars(made).update({name: value for name, value in vars(layer).items() if name in limits})
    return made


def _flatten(opened: _Opened) -> tuple[list[Any], Any]:
    return list(opened.tensors), (opened.cache, opened.kept)


def _flatten_with_keys(opened: _Opened) -> tuple[list[Any], Any]:
    tensors, context = _flatten(opened)
    names: list[Any] = [pytree.MappingKey(kept.name) for kept in opened.kept]
    return list(zip(names, tensors, strict=True)), context


def _unflatten(tensors: Any, context: Any) -> _Opened:
    cache, kept = context
    return _Opened(cache, kept, tuple(tensors))


pytree.register_pytree_node(_Opened, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys)
