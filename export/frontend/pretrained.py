"""A transformers model as it is published: a folder with `config.json`, weights and a tokenizer, or a name on the hub.

Source: https://huggingface.co/docs/transformers/main_classes/model (`from_pretrained`),
https://huggingface.co/docs/huggingface_hub/guides/download (`snapshot_download`)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_export.errors import UsageError
from moe_export.export.frontend.subject import Subject
from moe_export.export.weights.files import open_weights
from moe_export.export.weights.layouts import note_on_stored, quantized_weights
from moe_export.export.weights.lazy import map_weights, tensor_of

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


def load_pretrained(folder: Path, memory: int, make: Callable[..., Subject]) -> Subject:
    """The language model of a folder, in float32, with a few token ids as its example.

    Args:
        folder: With `config.json` and weights.
        memory: Of more bytes of weights, those that are stored as they are used are left in their files.
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
        model, notes = _loaded(folder, transformers)
    except UsageError:
        raise
    except Exception as error:  # whatever its files lead to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"transformers cannot load {folder}: {reason}",
            hint="it wants the config.json of a language model, and its weights (*.safetensors)",
        ) from error
    words = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, words, _EXAMPLE)
    source = folder / "model"  # it has no file of its own; graphs are called after this one
    large = sum(parameter.nbytes for parameter in model.parameters()) > memory
    mapped = {"weights": map_weights(model, open_weights(folder))} if large and not notes else {}
    subject = make(model, (), {"input_ids": ids}, source=source, how="a folder of transformers", **mapped)
    return replace(subject, notes=(*subject.notes, *notes))


def _loaded(folder: Path, transformers: Any) -> tuple[Any, tuple[str, ...]]:
    """The model of a folder in float32, and notes on how its weights are stored.

    What is stored quantized is made floats here: transformers needs a package or a GPU for most layouts.

    Raises:
        UsageError: Weights of the model are not among those that are stored.
    """
    kind, given = transformers.AutoModelForCausalLM, {"dtype": torch.float32}
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    stored = open_weights(folder) if getattr(config, "quantization_config", None) is not None else {}
    quantized = quantized_weights(stored, folder)
    if not quantized:
        return kind.from_pretrained(str(folder), local_files_only=True, **given), ()
    del config.quantization_config
    used = {name for weight in quantized.values() for name in weight.tensors}
    floats = {name: recipe for name, recipe in stored.items() if name not in used}
    floats |= {name: weight.recipe for name, weight in quantized.items()}
    with torch.device("meta"):
        kind = type(kind.from_config(config))
    state = {name: tensor_of(recipe) for name, recipe in floats.items()}
    model, report = kind.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, **given
    )
    if missing := sorted(report["missing_keys"]):
        raise UsageError(
            f"{folder} has no {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            hint="layouts of quantized weights that are read are on docs/quantize.md",
        )
    return model, note_on_stored(quantized.values())


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """The files of a model's tokenizer."""
    for name in sorted(os.listdir(folder)):
        if _OF_TOKENIZERS.fullmatch(name) and (folder / name).is_file():
            yield folder / name
