"""`Decoder`: text from a decoder's graph, by plain onnxruntime.

    decoder = Decoder("out/model.onnx")
    decoder.generate([[5, 17, 33]], max_new_tokens=64)

What the model keeps of earlier tokens stays where onnxruntime has it: it is handed from run to run, and never copied to
Python. A graph that keeps keys and values in buffers gets one for the whole text, and writes into it. This is the
reference of how such a graph is run, not a server: one batch, rows of one length, no beams.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_export.errors import UsageError
from moe_export.verify.decoding import BUFFER, MASK, PAST, POSITIONS, PRESENT, nothing_kept
from moe_export.verify.runners.onnxruntime_runner import OnnxRuntimeRunner
from moe_export.verify.specs import Array


@dataclass(frozen=True)
class Speed:
    """How fast a text was made.

    Attributes:
        prompt: Tokens of the prompt a second, all rows together.
        decode: New tokens a second, all rows together; 0 for a single one, which comes out of the prompt.
    """

    prompt: float
    decode: float


class Decoder:
    """A graph that `moe-export --decoder` wrote, ready to run.

    Args:
        path: The graph.
        provider: Where onnxruntime runs it: `cpu` or `cuda`.
        threads: How many compute an operator on the CPU; None for a core each.

    Attributes:
        speed: Of the last call of `generate`; None before.

    Raises:
        UsageError: The file is no decoder: it lacks token ids, a past or logits.
        MissingBackendError: onnxruntime has no such provider here.
    """

    def __init__(self, path: str | Path, provider: str = "cpu", *, threads: int | None = None) -> None:
        self._runner = OnnxRuntimeRunner(path, provider, exact=False, threads=threads)
        self._device = provider
        self._kept = tuple(spec for spec in self._runner.inputs if spec.name.startswith(PAST))
        inputs, outputs = (
            {spec.name for spec in specs} for specs in (self._runner.inputs, self._runner.outputs)
        )
        if not self._kept or "input_ids" not in inputs or "logits" not in outputs:
            raise UsageError(
                "no decoder: it takes no input_ids and past_key_values.*, or gives no logits",
                where=str(path),
                hint="moe-export model.py --decoder writes one",
            )
        self._inputs = inputs
        (logits,) = (spec for spec in self._runner.outputs if spec.name == "logits")
        self._words = logits.shape[-1]
        self._in_place = {spec.name for spec in self._runner.outputs if BUFFER in spec.shape}
        self.speed: Speed | None = None

    def generate(
        self,
        ids: Sequence[Sequence[int]] | Array,
        *,
        max_new_tokens: int = 64,
        top_k: int = 1,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> Array:
        """Continue a text.

        Args:
            ids: The prompt: (batch, length), at least one token, rows of one length.
            max_new_tokens: How many tokens to add.
            top_k: Draw each token from so many of the likeliest; 1 always takes the likeliest.
            seed: Of what is drawn.
            stop: Ids at which a row ends; later places of it repeat that id.

        Returns:
            int64 (batch, length + new tokens).

        Raises:
            UsageError: The prompt is empty, its rows differ in length, or an id is none of the model's.
        """
        steps = list(self.stream(ids, max_new_tokens=max_new_tokens, top_k=top_k, seed=seed, stop=stop))
        return np.concatenate([_prompt(ids), *(step[:, None] for step in steps)], 1)

    def stream(
        self,
        ids: Sequence[Sequence[int]] | Array,
        *,
        max_new_tokens: int = 64,
        top_k: int = 1,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> Iterator[Array]:
        """The new tokens as they come, int64 (batch,) each; arguments and errors as in `generate`."""
        now = _prompt(ids)
        if now.min() < 0 or (isinstance(self._words, int) and now.max() >= self._words):
            known = f"0 to {self._words - 1}" if isinstance(self._words, int) else "from 0 on"
            raise UsageError(
                f"token ids are {known}, not {now.min()} to {now.max()}",
                hint="use the tokenizer of this model",
            )
        draw, ended = np.random.default_rng(seed), np.zeros(len(now), bool)
        last, made, times = now[:, -1], 0, [time.perf_counter()]
        kept, length, first = self._nothing(len(now), now.shape[1] + max_new_tokens), 0, now.size
        while made < max_new_tokens and not ended.all():
            length += now.shape[1]
            logits, kept = self._run(now, length, kept)
            chosen = _chosen(logits, top_k, draw)
            last = np.where(ended, last, chosen)
            ended |= np.isin(last, list(stop))
            made += 1
            times.append(time.perf_counter())
            now = last[:, None]
            yield last
        if made:
            spent = times[-1] - times[1]
            self.speed = Speed(
                first / max(times[1] - times[0], 1e-9), (made - 1) * len(last) / spent if spent > 0 else 0.0
            )

    def _run(self, now: Array, length: int, kept: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        """Logits of the last new token, (batch, vocabulary), and what is kept after it, where onnxruntime has it."""
        batch, count = now.shape
        places = np.broadcast_to(np.arange(length - count, length), (batch, count))
        given = {"input_ids": now, MASK: np.ones((batch, length), np.int64), POSITIONS: places}
        fed = {name: array for name, array in given.items() if name in self._inputs}
        made = {name: name.replace(PAST, PRESENT, 1) for name in kept}
        into = {made[name]: value for name, value in kept.items() if made[name] in self._in_place}
        found = self._runner.run_bound(fed, kept, self._device, into)
        after = {name: found[made[name]] for name in kept}
        logits: Array = found["logits"].numpy()
        return (logits[:, -1] if logits.ndim > 2 else logits), after

    def _nothing(self, batch: int, longest: int) -> dict[str, Any]:
        kept = nothing_kept(self._runner.inputs, "input_ids", batch, longest if self._in_place else 0)
        return {name: self._runner.value_of(array, self._device) for name, array in kept.items()}


def _prompt(ids: Sequence[Sequence[int]] | Array) -> Array:
    lengths = {len(row) for row in ids}
    if len(lengths) != 1 or 0 in lengths:
        raise UsageError(
            "a prompt is (batch, length): rows of one length, at least one token",
            hint="generate([[5, 17, 33]])",
        )
    return np.asarray(ids, np.int64)


def _chosen(logits: Array, top_k: int, draw: np.random.Generator) -> Array:
    """A token a row: the likeliest, or one of the `top_k` likeliest by their probabilities."""
    if top_k <= 1:
        best: Array = logits.argmax(-1)
        return best
    likely = np.argsort(-logits, -1, kind="stable")[:, :top_k]
    scores = np.take_along_axis(logits, likely, -1).astype(np.float64)
    odds = np.exp(scores - scores.max(-1, keepdims=True))
    # The largest of scores with Gumbel noise is a draw by their probabilities.
    noise = -np.log(draw.exponential(size=odds.shape))
    picked = (np.log(odds) + noise).argmax(-1)
    found: Array = likely[np.arange(len(likely)), picked]
    return found
