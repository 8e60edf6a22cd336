"""`genai_config`: what onnxruntime-genai reads beside a decoder, from the graph and the model's own settings.

What the graph shows (layers, heads, sizes) is read from the graph; what only the model knows (its last position, the
ids at which a text begins and ends) from its transformers config.

Source: https://onnxruntime.ai/docs/genai/reference/config
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

import onnx_ir as ir

from moe_export.export.decoder.shared_buffers import in_buffers
from moe_export.export.decoder.whole import MASK, POSITIONS, DecoderModule
from moe_export.export.recurrence.transformers_cache import CACHE

FILE = "genai_config.json"
LOG = "moe-export"
"""What its session is called in logs, and what tells the file from those of others."""
_LONGEST = 2048  # positions where the config names none: the runtime wants a number
_GREEDY = {"do_sample": False, "num_beams": 1, "top_k": 1, "top_p": 1.0, "temperature": 1.0, "min_length": 0}


def genai_config(decoder: DecoderModule, graph: ir.Graph, filename: str) -> str | None:
    """The file's text.

    Args:
        decoder: The decoder in PyTorch.
        graph: Of it.
        filename: The graph's file, which lies beside this one.

    Returns:
        None if the runtime has no names for what goes in or comes out: it takes token ids and gives logits.
    """
    inputs = {value.name: value for value in graph.inputs}
    keys = [value for name, value in inputs.items() if str(name).endswith(".key")]
    taken = {"input_ids", MASK, POSITIONS}
    others = [name for name in inputs if name not in taken and not str(name).startswith(f"{CACHE}.")]
    if (
        others
        or "input_ids" not in inputs
        or "logits" not in {value.name for value in graph.outputs}
        or not keys
    ):
        return None
    shape = keys[0].shape
    assert shape is not None
    heads, width = (shape[1], shape[3]) if len(shape) == 4 else (None, None)
    if not isinstance(heads, int) or not isinstance(width, int):
        return None  # other keys than (batch, heads, length, width)
    config = decoder.whole.settings[-1] if decoder.whole.settings else None
    longest = _number(config, "max_position_embeddings", _LONGEST)
    document = {
        "model": {
            "type": "decoder",
            "vocab_size": decoder.whole.words,
            "context_length": longest,
            **_ends(decoder),
            "decoder": {
                "filename": filename,
                "session_options": {"log_id": LOG, "provider_options": []},
                "num_hidden_layers": _number(config, "num_hidden_layers", len(keys)),
                "num_attention_heads": _number(config, "num_attention_heads", heads),
                "num_key_value_heads": heads,
                "head_size": width,
                "hidden_size": _number(config, "hidden_size", heads * width),
                **_layer_types(set(map(str, inputs))),
                "inputs": {
                    **{name: name for name in ("input_ids", MASK, POSITIONS) if name in inputs},
                    "past_key_names": f"{CACHE}.%d.key",
                    "past_value_names": f"{CACHE}.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {**_GREEDY, "max_length": longest, "past_present_share_buffer": in_buffers(graph)},
    }
    return json.dumps(document, indent=2) + "\n"


def _ends(decoder: DecoderModule) -> Mapping[str, int | list[int]]:
    """The ids at which a text begins, ends and is padded; the end of the text where there is no padding."""
    found = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found[name] = next(
            (value for each in decoder.whole.settings if (value := getattr(each, name, None)) is not None),
            None,
        )
    last = found["eos_token_id"] or 0
    first_of_last = last[0] if isinstance(last, list) else last
    return {name: (first_of_last if name == "pad_token_id" else last) if value is None else value
            for name, value in found.items()}  # fmt: skip


def _layer_types(names: Set[str]) -> Mapping[str, list[str]]:
    """What each layer keeps, where some keep something else than keys: the runtime looks for that by itself."""
    kept: dict[int, set[str]] = {}
    for name in names:
        if name.startswith(f"{CACHE}."):
            _, number, *what = name.split(".")
            kept.setdefault(int(number), set()).update(what)
    if all("key" in each for each in kept.values()):
        return {}
    kinds = [kept.get(layer, set()) for layer in range(max(kept) + 1)]
    return {"layer_types": ["full_attention" if "key" in each else "conv" if each == {"conv_state"}
                            else "linear_attention" for each in kinds]}  # fmt: skip


def _number(config: Any, name: str, otherwise: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else otherwise
