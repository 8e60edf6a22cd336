"""Write the weights of a graph as external data, one after another, without having them.

Each recipe is read in pieces, transposed and cast, and goes into a file of at most `shard` bytes, at an offset that
memory can be mapped at. A file is called after its content: a graph never points to what another run has put there.

```
recipe ─▶ pieces ─▶ model.onnx.<content>.0.data  at 4096 * n        copy
recipe that is used as stored ─▶ (model.safetensors, offset, length)  reference
```
What lies in a file the other way round is referenced, too, and turned by the graph (`shared_weights`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from moe_export.disk import PAGE
from moe_export.errors import UsageError
from moe_export.export.onnx.bodies import initializers
from moe_export.export.onnx.shared_weights import keep_as_stored
from moe_export.export.weights.data_file import DataFile
from moe_export.export.weights.recipe import ByteRange, Held, Recipe, RecipeTensor, Stored, recipe_of
from moe_export.external_data import FACT, fingerprint, remember

DATA_SUFFIX = ".data"
SHARD = 4 * 10**9


@dataclass(frozen=True)
class Storage:
    """How weights are stored.

    Attributes:
        mode: `copy` them beside the graph, or `reference` those that are used as they are stored.
        shard: Bytes that a file has at most; a tensor that is larger has a file of its own.
        folder: Where the graph will stand, if it is written elsewhere first.
    """

    mode: Literal["copy", "reference"] = "copy"
    shard: int = SHARD
    folder: Path | None = None


@dataclass(frozen=True)
class Streamed:
    """What was written.

    Attributes:
        copied, referenced: Tensors and their bytes.
        reasons: Why tensors were copied, with their number.
        files: That were written.
    """

    copied: tuple[int, int] = (0, 0)
    referenced: tuple[int, int] = (0, 0)
    reasons: Mapping[str, int] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    def notes(self, mode: str) -> tuple[str, ...]:
        """For the report."""
        lines = []
        if self.referenced[0]:
            lines.append(f"weights: {_amount(self.referenced)} referenced where they are stored")
        if mode == "reference" and not self.referenced[0] and not self.copied[0]:
            lines.append("weights: none is referenced, because they came as tensors and not in files")
        if self.copied[0]:
            why = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
            files = f"{len(self.files)} file{'s' * (len(self.files) > 1)}"
            told = f" ({why})" if mode == "reference" else ""
            lines.append(f"weights: {_amount(self.copied)} copied into {files}{told}")
        return tuple(lines)


def _amount(found: tuple[int, int]) -> str:
    count, size = found
    return f"{count} tensor{'s' * (count > 1)} of {size / 2**20:,.1f} MiB"


def stream_weights(model: ir.Model, path: Path, storage: Storage) -> Streamed:
    """Write every recipe of a model, and let the model point to what was written.

    Args:
        model: Its recipes become external tensors, in place.
        path: The graph's file; data files are put beside it.
        storage: How.

    Raises:
        UsageError: There is too little room, or a file of weights ends early.
        OSError: The disk refuses.
    """
    final = (storage.folder or path.parent).resolve()
    if storage.mode == "reference":
        keep_as_stored(model, lambda place: not _unreadable(place.file, final))
    copied: list[tuple[ir.Value, Recipe]] = []
    referenced, reasons = [0, 0], dict[str, int]()
    for value in initializers(model):
        recipe = recipe_of(value)
        if recipe is None:
            continue
        place, reason = _reference(recipe, final, storage)
        if place is None:
            copied.append((value, recipe))
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            location = place.file.resolve().relative_to(final).as_posix()
            value.const_value = _outside(value, recipe, location, place.offset, place.length, final)
            referenced = [referenced[0] + 1, referenced[1] + place.length]
    files = _copy(copied, path, storage.shard) if copied else ()
    total = sum(recipe.nbytes for _, recipe in copied)
    return Streamed((len(copied), total), (referenced[0], referenced[1]), reasons, files)


def _reference(recipe: Recipe, folder: Path, storage: Storage) -> tuple[ByteRange | None, str]:
    """Where a graph may point for a weight; else why it may not."""
    place = recipe.byte_range()
    if storage.mode == "copy":
        return None, "as asked"
    if place is None:
        return None, " and ".join(dict.fromkeys(recipe.steps())) or "stored in parts"
    refused = _unreadable(place.file, folder)
    return (None, refused) if refused else (place, "")


def _unreadable(file: Path, folder: Path) -> str:
    """Why a graph in a folder may not point to a file; empty if it may."""
    if file.is_symlink():
        return "behind a link, which onnxruntime does not follow"
    if not file.resolve().is_relative_to(folder):
        return "outside the output folder, where no engine reads"
    return ""


def referable(files: Iterable[Path], storage: Storage) -> list[Path]:
    """Of files of weights, those that a graph will point to if it uses their tensors as they are stored."""
    if storage.mode == "copy" or storage.folder is None:
        return []
    folder = storage.folder.resolve()
    return [file for file in files if not _unreadable(file, folder)]


def _outside(
    value: ir.Value, recipe: Recipe, location: str, offset: int, length: int, folder: Path
) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        offset,
        length,
        recipe.dtype,
        shape=ir.Shape(recipe.shape),
        name=str(value.name),
        base_dir=folder,
    )


def _copy(weights: list[tuple[ir.Value, Recipe]], path: Path, shard: int) -> tuple[str, ...]:
    total = sum(recipe.nbytes + PAGE for _, recipe in weights)
    free = shutil.disk_usage(path.parent).free
    if total > free:
        raise UsageError(
            f"cannot write to {path.parent}: the weights take {total / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free",
            hint="choose another folder with -o, or make room; --weights reference copies less",
        )
    names: list[str] = []
    for number, group in enumerate(_shards(weights, shard)):
        file = path.with_name(f"{path.name}.part")
        with DataFile(file) as writer:
            places = _write(group, writer)
        name = f"{path.name}.{writer.digest[:12]}.{number}{DATA_SUFFIX}"
        os.replace(file, file.with_name(name))
        remember(file.with_name(name), writer.digest)
        names.append(name)
        for (value, recipe), offset in zip(group, places, strict=True):
            value.const_value = _outside(value, recipe, name, offset, recipe.nbytes, path.parent)
    return tuple(names)


def _shards(weights: list[tuple[ir.Value, Recipe]], shard: int) -> Iterator[list[tuple[ir.Value, Recipe]]]:
    """Weights in order, as many as a file takes."""
    group: list[tuple[ir.Value, Recipe]] = []
    size = 0
    for item in weights:
        taken = -(-item[1].nbytes // PAGE) * PAGE
        if group and size + taken > shard:
            yield group
            group, size = [], 0
        group.append(item)
        size += taken
    yield group


def _write(group: list[tuple[ir.Value, Recipe]], writer: DataFile) -> list[int]:
    """Write the weights of one file; where each begins. What is stored once is written once."""
    places: list[int] = []
    seen: dict[ByteRange, int] = {}
    for _, recipe in group:
        place = recipe.byte_range()
        if place is not None and place in seen:
            places.append(seen[place])
            continue
        places.append(writer.align())
        if place is not None:
            seen[place] = places[-1]
            writer.write_from(place.file, place.offset, place.length)
            continue
        for piece in recipe.pieces():
            writer.write(piece.reshape(-1).view("uint8").data if piece.size else b"")
    return places


def data_facts(model: ir.Model) -> dict[str, str]:
    """What the metadata of a graph without recipes say of its data files: size, time and checksum of each."""
    found: dict[str, Any] = {}
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) not in found:
            found[str(tensor.location)] = fingerprint(Path(str(tensor.path)))
    return {FACT.removeprefix("moe_export."): json.dumps(found, sort_keys=True)} if found else {}


def held(model: ir.Model, least: int) -> None:
    """Make recipes of the weights that a model has in memory, from `least` bytes on, so that they are streamed."""
    for value in initializers(model):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < least or isinstance(tensor, (RecipeTensor, ir.ExternalTensor)):
            continue
        shape = tuple(tensor.shape.numpy())
        value.const_value = RecipeTensor(Held(tensor.numpy, tensor.dtype, shape), value.name)


def taken_along(model: ir.Model, folders: set[Path]) -> None:
    """Make recipes of weights that lie in other folders: a graph that is written elsewhere needs its own."""
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir).resolve() not in folders:
            shape = tuple(tensor.shape.numpy())
            stored = Stored(Path(str(tensor.path)), tensor.offset or 0, tensor.dtype, shape)
            value.const_value = RecipeTensor(stored, value.name)
