"""Write files whole or not at all.

Every file is written beside its place under a temporary name and then moved, so that a failure, a full disk or
Ctrl-C leaves neither half a file nor a damaged older one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir

from moe_export.errors import UsageError

_INLINE_LIMIT = 2**31 - 2**24  # protobuf cannot hold 2 GiB; room is left for the nodes


def write_files(folder: Path, files: Mapping[str, Callable[[Path], None]]) -> list[Path]:
    """Write several files that belong together, then move all of them into place.

    Args:
        folder: Made if it is not there.
        files: File name → a function that writes it to the path it is given. It may write companions beside
            that path, in the same (temporary) folder; they are moved along.

    Raises:
        UsageError: The folder cannot be made or written to, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".moe-export-", dir=folder) as temporary:
            for name, writer in files.items():
                writer(Path(temporary) / name)
            # Companions (external data) first: a graph must never stand there without its weights.
            names = sorted(os.listdir(temporary), key=lambda name: (name in files, name))
            for name in names:
                os.replace(Path(temporary) / name, folder / name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"cannot write to {folder}: {reason}", hint="choose another folder with -o, or make room"
        ) from error
    return [folder / name for name in files]


def model_writer(model: ir.Model) -> Callable[[Path], None]:
    """A writer for `write_files`: one `.onnx` file, with `.onnx.data` beside it above 2 GiB of weights."""
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)

    def write(path: Path) -> None:
        if weights > _INLINE_LIMIT:
            ir.save(model, path, external_data=f"{path.name}.data")
        else:
            ir.save(model, path)

    return write


def text_writer(text: str) -> Callable[[Path], None]:
    """A writer for `write_files`: a text file."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write
