"""A decoder, run part by part: whatever the parts are, its results are those of the model for all tokens at once.

    whole      logits[b, l] = model(ids[b, l], mask[b, l])                             one run
    in parts   logits[b, n], kept = decoder(ids[b, n], mask[b, p + n], kept), ...      a run for each part, joined

Both are engines that take the same arrays, and `compare` holds one against the other like any two. Which parts there
are is one of these arrays, `parts`. Where the mask says that a token does not count, results are zero in both.

Letters: b batch, l length, n tokens of a part, p tokens before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_export.verify.inputs.maker import Case
from moe_export.verify.runner import Runner
from moe_export.verify.specs import Array, RoutingPair, TensorSpec, numpy_dtype

MASK, POSITIONS = "attention_mask", "position_ids"
PAST, PRESENT = "past_key_values.", "present."
BUFFER = "buffer"
"""The axis of `present.*` in a graph that keeps keys and values in buffers: as long as the one that goes in."""
PARTS = "parts"
"""The array of how many tokens each run takes: int64 (runs,)."""
NEXT = "next_token"
"""The output of the likeliest token at each place: int64 (batch, length, 1)."""

_LENGTH = 9
_DEALT = {
    "prompt at once": (9,),
    "token by token": (1,) * 9,
    "a prompt of 4, then token by token": (4, *(1,) * 5),
    "parts of 4, 3, 2": (4, 3, 2),
    "parts of 1, 8": (1, 8),
}
_PROMPT, _MADE = 6, (64, 32, 16, 8)
_PADDED = 3  # places in front of one row that do not count; all in the first part, as those of a prompt are


@dataclass(frozen=True)
class Results:
    """The outputs that can be had part by part.

    Args:
        each: Those with one entry for each token: (batch, length, ...).
        last: Those of the last token: (batch, ...).
        logits: That of `each` which the next token is chosen by; None if none is chosen.
    """

    each: Sequence[str]
    last: Sequence[str] = ()
    logits: str | None = None

    def of(self, found: Mapping[str, Array], mask: Array) -> dict[str, Array]:
        """These outputs, with zeros where no token is, and the likeliest token at each place."""
        real = {name: found[name] for name in self.last}
        for name in self.each:
            counts = mask.reshape(*mask.shape, *[1] * (found[name].ndim - 2)) > 0
            real[name] = np.where(counts, found[name], 0).astype(found[name].dtype)
        return real if self.logits is None else {**real, NEXT: real[self.logits].argmax(-1)[..., None]}

    @property
    def pairs(self) -> list[RoutingPair]:
        """The likeliest token is a choice by its logits: another one may be taken only where the two are equal."""
        return [] if self.logits is None else [RoutingPair(NEXT, None, self.logits)]


@dataclass(frozen=True)
class InParts:
    """A decoder as an engine that takes all tokens, and runs them in parts.

    Args:
        decoder: Runs one part.
        inputs: What it takes.
        tokens: The inputs that have one entry a token.
        results: The outputs that are compared.
        name: What reports call it.
        buffered: Whether keys and values are kept in buffers that are longer than they will be; what is behind them
            is NaN, for whatever reads it.
    """

    decoder: Runner
    inputs: Sequence[TensorSpec]
    tokens: Sequence[str]
    results: Results
    name: str = field(default="")
    buffered: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.decoder.name)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run part after part; the outputs that have one entry a token, joined, and the likeliest tokens."""
        mask, rows, at = inputs[MASK], [], 0
        kept = self.nothing(*mask.shape)
        for count in inputs[PARTS].tolist():
            now = {name: inputs[name][:, at : at + count] for name in self.tokens}
            found = self.step(now, mask[:, : at + count], kept)
            kept = {name: found.pop(name.replace(PAST, PRESENT)) for name in kept}
            rows.append(found)
            at += count
        joined = {name: np.concatenate([row[name] for row in rows], 1) for name in self.results.each}
        return self.results.of({**rows[-1], **joined}, mask)

    def step(self, tokens: Mapping[str, Array], mask: Array, kept: Mapping[str, Array]) -> dict[str, Array]:
        """Run one part: new tokens (batch, n), the mask of all (batch, p + n), what is kept of p."""
        count = next(iter(tokens.values())).shape[1]
        places = np.maximum(mask.cumsum(1) - 1, 0)[:, mask.shape[1] - count :]
        given = {**tokens, MASK: mask, POSITIONS: places, **kept}
        return self.decoder.run({spec.name: given[spec.name] for spec in self.inputs})

    def nothing(self, batch: int, length: int) -> dict[str, Array]:
        """What is kept before the first of so many tokens."""
        kept = nothing_kept(self.inputs, self.tokens[0], batch)
        if not self.buffered:
            return kept
        longer = nothing_kept(self.inputs, self.tokens[0], batch, length + 1)
        return {name: x if kept[name].size else np.full_like(x, np.nan) for name, x in longer.items()}

    def continued(self, tokens: Array, count: int) -> Array:
        """Tokens (batch, l), and after them the likeliest ones: (batch, l + count)."""
        kept, now, text = self.nothing(len(tokens), tokens.shape[1] + count), tokens, tokens
        for _ in range(count):
            found = self.step({self.tokens[0]: now}, np.ones(text.shape, np.int64), kept)
            kept = {name: found[name.replace(PAST, PRESENT)] for name in kept}
            now = found[str(self.results.logits)][:, -1:].argmax(-1).astype(tokens.dtype)
            text = np.concatenate([text, now], 1)
        return text


def nothing_kept(inputs: Sequence[TensorSpec], tokens: str, batch: int, buffer: int = 0) -> dict[str, Array]:
    """What a decoder keeps before the first token: zeros, or no entries where that grows.

    Args:
        inputs: What it takes.
        tokens: The input of tokens, whose first axis is the batch.
        batch: How many rows there are.
        buffer: Entries along what grows: those of a buffer, none of which counts yet.
    """
    (rows,) = (spec.shape[0] for spec in inputs if spec.name == tokens)
    return {
        spec.name: np.zeros(
            [size if isinstance(size, int) else batch if size == rows else buffer for size in spec.shape],
            numpy_dtype(spec.dtype),
        )
        for spec in inputs
        if spec.name.startswith(PAST)
    }


@dataclass(frozen=True)
class AtOnce:
    """The model without a cache, on all tokens.

    Args:
        model: Takes the tokens, the mask and the positions by name.
        results: The outputs that are compared.
        name: What reports call it.
    """

    model: Callable[[Mapping[str, Array]], Mapping[str, Array]]
    results: Results
    name: str

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""
        mask = inputs[MASK]
        places = np.maximum(mask.cumsum(1) - 1, 0)
        found = self.model({**{name: x for name, x in inputs.items() if name != PARTS}, POSITIONS: places})
        return self.results.of(found, mask)


def decoding_cases(
    decoder: InParts, model: AtOnce, make: Callable[[str, int], Array], seed: int, *, padded: bool
) -> Iterator[Case]:
    """The cases: all parts, one row padded on the left; and a text that the decoder makes, token by token.

    Args:
        decoder: Makes the text.
        model: What it is held against: a text is no longer than it takes, as positions in a table may end.
        make: New tokens for two rows, (2, count), by the name of their input.
        seed: Of the tokens, for the report.
        padded: Whether the model takes a mask.
    """
    tokens = {name: make(name, _LENGTH) for name in decoder.tokens}
    for label, parts in _DEALT.items():
        mask = np.ones((2, _LENGTH), np.int64)
        if padded and parts[0] > _PADDED:
            mask[0, :_PADDED] = 0
        yield _case(label, seed, {**tokens, MASK: mask}, parts)
    if len(decoder.tokens) == 1 and decoder.results.logits is not None:
        name = decoder.tokens[0]
        count = next((made for made in _MADE if _takes(model, name, make(name, _PROMPT + made))), 1)
        text = decoder.continued(make(name, _PROMPT), count)
        mask = np.ones(text.shape, np.int64)
        yield _case(f"a text of {count} tokens", seed, {name: text, MASK: mask}, (_PROMPT, *(1,) * count))


def _takes(model: AtOnce, name: str, tokens: Array) -> bool:
    try:
        model.run({name: tokens, MASK: np.ones(tokens.shape, np.int64)})
    except Exception:  # whatever a model raises
        return False
    return True


def _case(label: str, seed: int, inputs: Mapping[str, Array], parts: Sequence[int]) -> Case:
    batch, length = inputs[MASK].shape
    sizes = {"batch": batch, "sequence": length, "past_sequence": 0}
    return Case(label, seed, sizes, {**inputs, PARTS: np.array(parts, np.int64)})
