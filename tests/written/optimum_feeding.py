"""A decoder fed as optimum's `ORTModelForCausalLM` feeds one, by the names that it looks for, in their order.

optimum itself is not needed for this.

Source: https://github.com/huggingface/optimum-onnx, optimum/onnxruntime/modeling_decoder.py
"""

from __future__ import annotations

import numpy as np
import onnxruntime

NEW = 12


class Fed:
    """Greedy text from a session, with what that class knows of it: names, and the heads of a config."""

    def __init__(self, path, config):
        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._pasts = [name for name in self._inputs if ".key" in name or ".value" in name]
        self._presents = [name for name in self._outputs if ".key" in name or ".value" in name]
        self._heads, self._width = (
            config.num_key_value_heads,
            config.hidden_size // config.num_attention_heads,
        )

    def forward(self, input_ids, attention_mask, pasts):
        """Logits, and keys and values in the order in which they are given next time."""
        positions = attention_mask.cumsum(-1) - 1
        positions[attention_mask == 0] = 1
        if pasts is None:
            empty = np.empty((len(input_ids), self._heads, 0, self._width), np.float32)
            pasts = [empty] * len(self._pasts)
        else:
            positions = positions[:, -1:]
        given = {"input_ids": input_ids, "position_ids": positions, "attention_mask": attention_mask}
        given.update(zip(self._pasts, pasts, strict=True))
        assert set(given) == set(self._inputs)
        found = dict(zip(self._outputs, self._session.run(None, given), strict=True))
        return found["logits"], [found[name] for name in self._presents]

    def generate(self, input_ids, attention_mask):
        """The text, (batch, length + NEW)."""
        text, now, pasts = input_ids, input_ids, None
        for _ in range(NEW):
            logits, pasts = self.forward(now, attention_mask, pasts)
            now = logits[:, -1].argmax(-1)[:, None]
            text = np.concatenate([text, now], 1)
            attention_mask = np.concatenate([attention_mask, np.ones_like(now)], 1)
        return text
