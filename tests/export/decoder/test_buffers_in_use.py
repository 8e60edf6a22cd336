"""Keys and values in one buffer, as runtimes use them: unequal prompts, no new tokens, beams, windows, long prompts.

A model with all that attention may have beside its mask: a window in one layer, none in the other, and sinks. What the
graph gives is held against the model in float64, without a cache, one text at a time and without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import families
import numpy as np
import pytest
import torch

from moe_export.export.decoder.shared_buffers import in_buffers
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.export.pipeline import Options, export_subject
from moe_export.float64 import double_module, in_float64
from moe_export.running.choices import runner_of
from moe_export.verify.decoding import InParts, Results

WORDS, EXAMPLE, WINDOW = 32, 7, 8


@dataclass(frozen=True)
class Both:
    """A decoder, and its model in float64."""

    decoder: InParts
    model: torch.nn.Module

    def wanted(self, text: np.ndarray) -> np.ndarray:
        """The logits (l, words) of one text."""
        with torch.no_grad(), in_float64():
            return self.model(input_ids=torch.from_numpy(text)[None]).logits[0].numpy()

    def check(self, logits: np.ndarray, texts: list[np.ndarray]) -> None:
        """That the last logits of each row are those of the last tokens of its text."""
        for row, text in zip(logits, texts, strict=True):
            count = min(len(row), len(text))
            wanted = self.wanted(text)[len(text) - count :]
            np.testing.assert_allclose(row[len(row) - count :], wanted, rtol=1e-4, atol=1e-5)

    def run(self, tokens: np.ndarray, mask: np.ndarray, kept: dict) -> tuple[np.ndarray, dict]:
        """The logits of new tokens (batch, n), and what is kept after them."""
        found = self.decoder.step({"input_ids": tokens}, mask, kept)
        return found["logits"], {name: found[name.replace("past_key_values", "present")] for name in kept}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    model = next(each for each in families.FAMILIES if each.name == "gpt_oss").build_lm()
    layers = model.model.layers
    assert [getattr(layer.self_attn, "sliding_window", None) for layer in layers][:2] == [WINDOW, None]
    torch.manual_seed(3)
    for layer in layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    ids = {"input_ids": torch.randint(3, WORDS, (2, EXAMPLE))}
    subject = make_subject(model, (), ids, source=Path(__file__), how="a test")
    options = Options(gates=False, simplify=False, decoder=True, attention="contrib")
    graph = export_subject(subject, options)[0]
    assert in_buffers(graph.model.graph), graph.notes
    place = tmp_path_factory.mktemp("decoder") / "model.onnx"
    write_model(graph.model, place)
    return place, double_module(model)


@pytest.fixture(params=[False, True], ids=["as long as they are", "in buffers"])
def both(path, request) -> Both:
    runner = runner_of(path[0], "cpu")
    results = Results(("logits",), (), "logits")
    return Both(InParts(runner, runner.inputs, ("input_ids",), results, buffered=request.param), path[1])


def texts_of(*lengths: int) -> list[np.ndarray]:
    draw = np.random.default_rng(sum(lengths))
    return [draw.integers(3, WORDS, length) for length in lengths]


def padded(texts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, texts))
    ids = np.stack([np.pad(text, (longest - len(text), 0)) for text in texts])
    return ids, np.stack([np.arange(longest) >= longest - len(text) for text in texts]).astype(np.int64)


@pytest.mark.parametrize("parts", [(1, 1, 1), (3, 1, 2), (12,)])
def test_unequal_prompts_and_what_comes_after(both, parts):
    """One token at a time, several, and more than the window has room for."""
    texts, added = texts_of(11, 5, 1), np.random.default_rng(1).integers(3, WORDS, (3, sum(parts)))
    ids, mask = padded(texts)
    logits, kept = both.run(ids, mask, both.decoder.nothing(3, ids.shape[1] + sum(parts)))
    both.check(logits, texts)
    at = 0
    for count in parts:
        now = added[:, at : at + count]
        texts = [np.concatenate([text, row]) for text, row in zip(texts, now, strict=True)]
        mask = np.pad(mask, ((0, 0), (0, count)), constant_values=1)
        logits, kept = both.run(now, mask, kept)
        assert logits.shape[1] == count
        both.check(logits, texts)
        at += count


@pytest.mark.parametrize("batch", [1, 2])
def test_no_new_tokens_change_nothing(both, batch):
    texts = texts_of(*[6] * batch)
    ids, mask = padded(texts)
    _, kept = both.run(ids, mask, both.decoder.nothing(batch, 7))
    logits, after = both.run(ids[:, :0], mask, kept)
    assert logits.shape == (batch, 0, logits.shape[-1])
    for name, value in kept.items():
        np.testing.assert_array_equal(after[name][:, :, :6], value[:, :, :6])
    last = np.full((batch, 1), 9)
    logits, _ = both.run(last, np.ones((batch, 7), np.int64), after)
    both.check(logits, [np.append(text, 9) for text in texts])


def test_beams_are_reordered(both):
    """Rows are repeated and dropped after the prompt, and again after a token, padding and all."""
    texts = texts_of(9, 4, 6)
    ids, mask = padded(texts)
    _, kept = both.run(ids, mask, both.decoder.nothing(3, 11))
    for order, new in (([1, 1, 0], [5, 6, 7]), ([2, 0, 0], [8, 9, 10])):
        kept, mask = {name: value[order] for name, value in kept.items()}, mask[order]
        texts = [np.append(texts[row], token) for row, token in zip(order, new, strict=True)]
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        logits, kept = both.run(np.array(new)[:, None], mask, kept)
        both.check(logits, texts)


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 10 * EXAMPLE])
@pytest.mark.parametrize("batch", [1, 2])
def test_prompts_around_the_window_and_beyond_the_example(both, length, batch):
    texts = texts_of(*[length] * batch)
    ids, mask = padded(texts)
    logits, kept = both.run(ids, mask, both.decoder.nothing(batch, length + 3))
    both.check(logits, texts)
    for count in (2, 1):
        texts = [np.append(text, [4] * count) for text in texts]
        mask = np.ones((batch, len(texts[0])), np.int64)
        logits, kept = both.run(np.full((batch, count), 4), mask, kept)
        both.check(logits, texts)
