"""`LazyWeights`: the weights of a model, in its module, without their bytes until somebody fills them.

A module on the meta device cannot be run, and much of the export asks what a model does by running it. So each large
weight gets a tensor over memory that was never written: reading it gives zeros and takes no room. Its values can be
read into that memory (`fill`), for all who hold the tensor or a view of it, and given back (`free`). What is asked of
zeros is only what does not depend on values: shapes, types, which sizes a model takes. Weights of up to `SMALL` bytes
are read at once, since graphs compute with them offline.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx_ir import tensor_adapters
from torch import nn

from moe_export.disk import read_exactly
from moe_export.errors import UsageError
from moe_export.export.weights.files import open_weights
from moe_export.export.weights.layouts import note_on_stored, quantized_weights
from moe_export.export.weights.recipe import Converted, Recipe

SMALL = 64 * 2**10
"""Bytes up to which a weight is simply read; constant folders look at no larger ones."""
MEMORY = 2**30
"""Bytes of weights that a model may have to be read as a whole, where the user names no other bound."""
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@dataclass(eq=False)
class LazyWeight:
    """One weight: memory of its size, empty or filled.

    Attributes:
        name: The parameter's path.
        recipe: Where its values are.
        tensor: Of the module's shape and dtype, over the memory.
        full: Whether the values are in it.
    """

    name: str
    recipe: Recipe
    tensor: torch.Tensor = field(repr=False)
    memory: mmap.mmap = field(repr=False)
    full: bool = False

    def fill(self) -> None:
        """Read the values."""
        if self.full:
            return
        self.full = True
        place = self.recipe.byte_range()
        if place is not None:
            read_exactly(place.file, memoryview(self.memory)[: place.length], place.offset)
            return
        at = 0
        target = np.frombuffer(self.memory, np.uint8)
        for piece in self.recipe.pieces():
            raw = piece.reshape(-1).view(np.uint8)
            target[at : at + raw.size] = raw
            at += raw.size

    def free(self) -> None:
        """Give the memory back; it reads as zeros again."""
        if self.full:
            self.full = False
            self.memory.madvise(mmap.MADV_DONTNEED)


@dataclass(eq=False)
class LazyWeights:
    """The weights of one module.

    Attributes:
        files: What they are read from.
        items: By the parameter's first path.
        names: Every path, those of tied parameters too.
        notes: What is to be said of how they are stored.
    """

    files: tuple[Path, ...]
    items: Mapping[str, LazyWeight]
    names: Mapping[str, LazyWeight]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all lazy weights."""
        return sum(item.recipe.nbytes for item in self.items.values())

    @property
    def absent(self) -> bool:
        """Whether a weight is not in memory."""
        return any(not item.full for item in self.items.values())

    def under(self, path: str) -> list[LazyWeight]:
        """The weights of a module and of those inside it."""
        return list(
            dict.fromkeys(
                item for name, item in self.names.items() if not path or name.startswith(f"{path}.")
            )
        )


_known: weakref.WeakValueDictionary[int, LazyWeight] = weakref.WeakValueDictionary()


def lazy_weight_of(tensor: Any) -> LazyWeight | None:
    """The lazy weight behind a tensor, told from a tensor that is all of it, under whatever name and wrapper."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        return None
    try:
        found = _known.get(tensor.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):  # a tensor without memory
        return None
    return found


def is_whole(tensor: torch.Tensor, item: LazyWeight) -> bool:
    """Whether a tensor is the weight itself, not a view of another shape."""
    own = item.tensor
    return (tensor.shape, tensor.stride(), tensor.dtype) == (own.shape, own.stride(), own.dtype)


def absent_among(tensors: Iterable[Any]) -> bool:
    """Whether one of these tensors is a weight that is not in memory."""
    return any(item is not None and not item.full for item in map(lazy_weight_of, tensors))


@contextmanager
def filled(tensors: Iterable[Any]) -> Iterator[None]:
    """Have the values of these tensors in memory for a while."""
    items = [item for item in map(lazy_weight_of, tensors) if item is not None and not item.full]
    try:
        for item in items:
            item.fill()
        yield
    finally:
        for item in items:
            item.free()


def in_memory(module: nn.Module) -> AbstractContextManager[None]:
    """Have the weights of a module in memory for a while: all of them, so it should be a gate, or fit."""
    return filled([*module.parameters(), *module.buffers()])


def attach_weights(module: nn.Module, path: Path, memory: int, source: Path) -> LazyWeights:
    """Give a module on the meta device its weights, from files.

    Args:
        module: Changed in place: no parameter or buffer is on the meta device after it.
        path: The weights.
        memory: Up to this many bytes in all are read at once; of more, only the small tensors.
        source: The model's file, for errors.

    Raises:
        UsageError: The file cannot be read; a weight is not in it, or has another shape there.
    """
    wanted = [(name, *entry) for name, entry in _owners(module) if entry[2].is_meta]
    stored, notes = _stored(path, {name: tensor for name, _, _, tensor in wanted})
    missing = [name for name, *_ in wanted if name not in stored]
    tied = {id(tensor): name for name, _, _, tensor in wanted if name in stored}
    lost = [name for name, _, _, tensor in wanted if name not in stored and id(tensor) not in tied]
    if lost:
        others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UsageError(
            f"{path.name} has no {lost[0]}{others}, and the model has it on the meta device",
            where=str(source),
            hint="a buffer that no file holds must be made on the CPU: register_buffer(name, "
            "torch.empty(..., device='cpu')) with its values"
            if len(missing) < len(wanted)
            else f"the file has: {', '.join(list(stored)[:4])}",
        )
    large: dict[str, LazyWeight] = {}
    names: dict[str, LazyWeight] = {}
    made: dict[int, tuple[torch.Tensor, LazyWeight | None]] = {}
    for name, owner, key, tensor in wanted:
        if id(tensor) not in made:
            first = tied[id(tensor)]
            made[id(tensor)] = _made(first, tensor, stored[first], path, source)
            item = made[id(tensor)][1]
            if item is not None:
                large[first] = item
        value, item = made[id(tensor)]
        if item is not None:
            names[name] = item
        setattr(owner, key, value)
    files = tuple(
        sorted({place.file for item in stored.values() if (place := item.byte_range()) is not None})
    )
    found = LazyWeights(files or (path,), large, names, notes)
    if found.nbytes <= memory:
        for item in found.items.values():
            item.fill()
    return found


def map_weights(module: nn.Module, stored: Mapping[str, Recipe]) -> LazyWeights:
    """Have a module that is in memory read its weights from files, where they stand there as they are.

    Args:
        module: Changed in place: such weights are pages of the files, which the system reads and drops as it likes.
        stored: What files hold, by the parameters' paths.

    Returns:
        Those weights; all others stay in memory.
    """
    files: dict[Path, mmap.mmap] = {}
    items: dict[str, LazyWeight] = {}
    for name, parameter in module.named_parameters():
        recipe = stored.get(name)
        place = recipe.byte_range() if recipe is not None else None
        if parameter.nbytes <= SMALL:
            parameter.data = (
                parameter.data.clone()
            )  # a view would keep the loader's mapping of the whole file
        if (
            recipe is None
            or place is None
            or recipe.nbytes <= SMALL
            or recipe.shape != tuple(parameter.shape)
        ):
            continue
        if recipe.dtype != tensor_adapters.from_torch_dtype(parameter.dtype):
            continue
        if place.file not in files:
            with place.file.open("rb") as file:
                files[place.file] = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
        memory = files[place.file]
        flat = torch.frombuffer(memory, dtype=parameter.dtype, count=parameter.numel(), offset=place.offset)
        mapped = flat.reshape(parameter.shape)
        if torch.equal(mapped, parameter):
            parameter.data = mapped
            memory.madvise(mmap.MADV_DONTNEED)  # pages that were read to compare
            items[name] = LazyWeight(name, recipe, mapped, memory, full=True)
            _known[mapped.untyped_storage().data_ptr()] = items[name]
    return LazyWeights(tuple(sorted(files)), items, items)


def _stored(path: Path, wanted: Mapping[str, torch.Tensor]) -> tuple[dict[str, Recipe], tuple[str, ...]]:
    """What files hold, with floats in place of what is stored quantized where the model has floats; notes on that.

    A module that has the codes and scales as weights of its own is given them as they are.
    """
    stored = open_weights(path)
    taken = {}
    for name, weight in quantized_weights(stored, path if path.is_dir() else path.parent).items():
        tensor = wanted.get(name)
        apart = any(each != name and each in wanted for each in weight.tensors)
        if tensor is not None and tensor.is_floating_point() and tensor.element_size() > 1 and not apart:
            taken[name] = weight
    return stored | {name: weight.recipe for name, weight in taken.items()}, note_on_stored(taken.values())


def _owners(module: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str, torch.Tensor]]]:
    """Every parameter and buffer, tied ones under each of their paths."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        own = {"recurse": False, "remove_duplicate": False}
        for key, tensor in (*owner.named_parameters(**own), *owner.named_buffers(**own)):
            yield (f"{prefix}.{key}" if prefix else key), (owner, key, tensor)


def _made(
    name: str, meta: torch.Tensor, recipe: Recipe, path: Path, source: Path
) -> tuple[torch.Tensor, LazyWeight | None]:
    if tuple(meta.shape) != recipe.shape:
        raise UsageError(
            f"{name} is {list(recipe.shape)} in {path.name}, and {list(meta.shape)} in the model",
            where=str(source),
        )
    dtype = tensor_adapters.from_torch_dtype(meta.dtype)
    recipe = recipe if recipe.dtype == dtype else Converted(recipe, dtype)
    item = None
    if recipe.nbytes <= SMALL:
        tensor = tensor_of(recipe)
    else:
        memory = mmap.mmap(-1, recipe.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        tensor = torch.frombuffer(memory, dtype=meta.dtype).reshape(meta.shape)
        item = LazyWeight(name, recipe, tensor, memory)
        _known[tensor.untyped_storage().data_ptr()] = item
    if isinstance(meta, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=False), item
    return tensor, item


def tensor_of(recipe: Recipe) -> torch.Tensor:
    """A weight in memory."""
    dtype = tensor_adapters.to_torch_dtype(recipe.dtype)
    raw = np.frombuffer(bytearray(np.ascontiguousarray(recipe.array()).tobytes()), np.uint8)
    return (torch.from_numpy(raw).view(dtype) if raw.size else torch.empty(0, dtype=dtype)).reshape(
        recipe.shape
    )
