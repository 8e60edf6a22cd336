"""A transformers model as it is published: a folder with `config.json`, weights and a tokenizer, or a name on the hub.

Source: https://huggingface.co/docs/transformers/main_classes/model (`from_pretrained`),
https://huggingface.co/docs/huggingface_hub/guides/download (`snapshot_download`)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moe_export.errors import UsageError
from moe_export.export.frontend.subject import Subject

CONFIG = "config.json"
_READ = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_OF_TOKENIZERS = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|spiece\.model|.*\.jinja"
)
_EXAMPLE = (2, 7)  # batch, tokens


def is_pretrained(folder: Path) -> bool:
    """Whether a folder holds a published model."""
    return (folder / CONFIG).is_file()


def folder_of(name: str) -> Path:
    """The folder of a model: one of this machine, or what the hub has under this name, downloaded if it must be.

    Raises:
        UsageError: There is no such folder and no such model, or huggingface_hub is not installed.
    """
    place = Path(name)
    if place.is_dir():
        return place.absolute()
    if place.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UsageError(f"no such folder: {name}", hint="a model of the hub is named OWNER/MODEL")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UsageError(
            f"{name} is no folder, and huggingface_hub is not installed", hint="pip install transformers"
        ) from error
    try:
        try:
            return Path(snapshot_download(name, allow_patterns=_READ, local_files_only=True))
        except OSError:
            return Path(snapshot_download(name, allow_patterns=_READ))
    except Exception as error:  # of the network, of the hub, of a disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{name} is no folder, and the hub did not give it: {reason}",
            hint="check the name and the network, or download it elsewhere and name its folder",
        ) from error


def load_pretrained(folder: Path, make: Callable[..., Subject]) -> Subject:
    """The language model of a folder, in float32, with a few token ids as its example.

    Args:
        folder: With `config.json` and weights.
        make: Binds a module to its example.

    Raises:
        UsageError: transformers is not installed, or does not know the model or its weights.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"{folder} is a model of transformers, which is not installed", hint="pip install transformers"
        ) from error
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True
        )
    except Exception as error:  # whatever its files lead to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"transformers cannot load {folder}: {reason}",
            hint="it wants the config.json of a language model, and its weights (*.safetensors)",
        ) from error
    words = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, words, _EXAMPLE)
    source = folder / "model"  # it has no file of its own; graphs are called after this one
    return make(model, (), {"input_ids": ids}, source=source, how="a folder of transformers")


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """The files of a model's tokenizer."""
    for name in sorted(os.listdir(folder)):
        if _OF_TOKENIZERS.fullmatch(name) and (folder / name).is_file():
            yield folder / name
