"""The weights of a model in files, replaced by those that packed ones stand for, while a graph is held against it.

```
packed:  Transposed(Part(Stored up (E, H, I), expert 3)), summed over axis 0      of the initializer
model:   Stored up (E, H, I), summed over axis 1  ─▶ on its grid anew, one expert at a time
```
How a weight came to the graph is followed back to where it is stored. Rounding goes along the summed axis only, so it
does not matter whether experts were cut out or turned before or after it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from moe_export.export.quantize.packed import Grid, values_of
from moe_export.export.quantize.quantize import Quantized
from moe_export.export.weights.lazy import LazyWeight, LazyWeights
from moe_export.export.weights.recipe import Part, Recipe, Reshaped, Stacked, Transposed

STANDS_FOR: Final = "torch, with the weights that the packed ones stand for"
"""What reports call such a model."""


@contextmanager
def packed_values(weights: LazyWeights | None, quantized: Quantized | None) -> Iterator[bool]:
    """Let the weights of a model that are read from files be what packed ones stand for.

    Args:
        weights: Of the model.
        quantized: What was packed; None for nothing.

    Yields:
        Whether all that was packed could be replaced; if not, nothing is.
    """
    if quantized is None:
        yield True
        return
    found = _replaced(weights, quantized) if weights is not None else None
    if found is None:
        yield False
        return
    before = {item: item.recipe for item in found}
    try:
        for item, recipe in found.items():
            item.free()
            item.recipe = recipe
        yield True
    finally:
        for item, recipe in before.items():
            item.free()
            item.recipe = recipe


def _replaced(weights: LazyWeights, quantized: Quantized) -> dict[LazyWeight, Recipe] | None:
    """The packed weights of a model, with what they stand for; None if one cannot be followed, or only in part."""
    axes: dict[LazyWeight, set[int]] = defaultdict(set)
    parts: dict[LazyWeight, int] = defaultdict(int)
    for weight in quantized.weights:
        if weight.grid.calibrated:
            return None
        for recipe, axis, size in _stored(weight.grid.source, weight.grid.axis):
            item = next((item for item in weights.items.values() if item.recipe is recipe), None)
            if item is None or axis is None:
                return None
            axes[item].add(axis)
            parts[item] += size
    for item, own in axes.items():
        if len(own) > 1 or parts[item] < item.recipe.nbytes:
            return None
    return {item: values_of(Grid(item.recipe, own.pop(), quantized.scheme)) for item, own in axes.items()}


def _stored(recipe: Recipe, axis: int | None) -> Iterator[tuple[Recipe, int | None, int]]:
    """What a recipe begins with, the axis that its `axis` is there, and how many bytes of it the recipe has.

    The axis is None where it was cut, or merged with another.
    """
    size = recipe.nbytes
    while isinstance(recipe, (Transposed, Part, Reshaped)):
        if isinstance(recipe, Transposed):
            axis = None if axis is None else recipe.order[axis]
        elif isinstance(recipe, Part):
            axis = None if axis == recipe.axis else axis
        elif axis is not None:
            behind = len(recipe.shape) - axis
            same = (
                behind <= len(recipe.source.shape) and recipe.shape[-behind:] == recipe.source.shape[-behind:]
            )
            axis = len(recipe.source.shape) - behind if same else None
        recipe = recipe.source
    if isinstance(recipe, Stacked):
        for part in recipe.parts:
            yield from _stored(part, axis - 1 if axis else None)
        return
    yield recipe, axis, size
