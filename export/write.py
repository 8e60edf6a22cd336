"""Write files whole or not at all.

Everything is first written into a hidden folder beside its place, can be checked there, and is then moved, so
that a failure, a full disk or Ctrl-C leaves neither half a file nor a damaged older one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from moe_export.errors import UsageError

_INLINE_LIMIT = 2**31 - 2**24  # protobuf cannot hold 2 GiB; room is left for the nodes
DATA_SUFFIX = ".data"


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends without an error.

    Args:
        folder: Made if it is not there, and unmade again if it was made for nothing.

    Raises:
        UsageError: The folder cannot be made or written to, or the disk is full.
    """
    made = _first_missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".moe-export-", dir=folder))
    except OSError as error:
        raise _unwritable(folder, error) from error
    done = False
    try:
        yield temporary
        # External data first: a graph must never stand there without its weights.
        for name in sorted(os.listdir(temporary), key=lambda name: (not name.endswith(DATA_SUFFIX), name)):
            os.replace(temporary / name, folder / name)
        done = True
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not done and made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _first_missing(folder: Path) -> Path | None:
    """The outermost folder that has to be made; None if all are there."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    return missing[-1] if missing else None


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write to {folder}: {error.strerror or error}",
        hint="choose another folder with -o, or make room",
    )


def write_model(model: ir.Model, path: Path) -> None:
    """Write one `.onnx` file, with `.onnx.data` beside it for 2 GiB of weights and more."""
    weights = sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    ir.save(model, path, external_data=f"{path.name}{DATA_SUFFIX}" if weights > _INLINE_LIMIT else None)
