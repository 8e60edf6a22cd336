"""`Whole` and `DecoderModule`: a model for all tokens at once, and the same for new tokens after earlier ones.

    whole     logits[b, l] = model(ids[b, l], mask[b, l])
    decoder   logits[b, n], presents = model(ids[b, n], mask[b, p + n], pasts)

Each way of making a decoder has a pair of these classes. Whoever compares the two knows no more of either.

Letters: b batch, l length, n new tokens, p earlier tokens ("past").
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_export.export.frontend.subject import Subject
from moe_export.float64 import double_module

MASK = "attention_mask"
"""Which of all tokens so far count: int64 (batch, past + sequence), 0 for what is padded on the left."""
POSITIONS = "position_ids"
"""Where the new tokens stand among those that count: int64 (batch, sequence)."""


@dataclass(frozen=True)
class TokenOutputs:
    """Which outputs of a model belong to which tokens; any other, as a loss over all, cannot be had in parts.

    Attributes:
        each: Those with one entry for each: (batch, length, ...).
        last: Those of one size whatever the length, taken as those of the last: (batch, ...).
    """

    each: tuple[str, ...]
    last: tuple[str, ...]


class Whole(ABC):
    """How a model is called for all tokens at once, without anything of earlier ones.

    Attributes:
        subject: The model.
    """

    subject: Subject

    @property
    @abstractmethod
    def words(self) -> int:
        """How many ids its table of tokens has."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Its inputs that have one entry a token, the mask and the positions aside."""
        return tuple(name for name in self.subject.inputs if name not in (MASK, POSITIONS))

    @property
    def outputs(self) -> tuple[str, ...]:
        """What `run` gives, in order."""
        return self.subject.outputs

    @property
    def settings(self) -> tuple[Any, ...]:
        """The model's own settings (transformers' configs), those of its texts first; empty if it has none."""
        return ()

    @abstractmethod
    def of(self, subject: Subject) -> Whole:
        """The same of a copy of the model."""

    def wide(self) -> Whole:
        """The same in float64."""
        return self.of(self.subject.of(double_module(self.subject.module)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Whole:
        return self.of(self.subject.of(copy.deepcopy(self.subject.module, memo)))

    @abstractmethod
    def run(self, tokens: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> list[Tensor]:
        """Call it once.

        Args:
            tokens: By name, (batch, length, ...).
            beside: The mask and the positions, where it takes them.
        """

    def token_outputs(self, examples: Mapping[int, Mapping[str, Tensor]]) -> TokenOutputs:
        """Which tokens the outputs belong to, seen at two numbers of tokens."""
        (one, first), (two, second) = ((size, self.run(tokens, {})) for size, tokens in examples.items())
        named = list(zip(self.outputs, first, second, strict=True))
        each = [name for name, a, b in named if a.dim() > 1 and (a.shape[1], b.shape[1]) == (one, two)]
        batch = len(next(iter(examples[one].values())))
        last = [name for name, a, b in named if a.dim() > 1 and a.shape == b.shape and len(a) == batch]
        return TokenOutputs(tuple(each), tuple(last))


class DecoderModule(nn.Module):
    """A model of new tokens: takes them, a mask, positions and what it keeps, by position; gives outputs by name.

    Attributes:
        whole: What its results are held against.
        given: What it takes beside the tokens and what it keeps: `attention_mask`, `position_ids`.
        results: Which outputs belong to which tokens.
    """

    def __init__(self, whole: Whole, given: Sequence[str], results: TokenOutputs) -> None:
        super().__init__()
        self.model = whole.subject.module
        self.whole, self.given, self.results = whole, tuple(given), results

    @abstractmethod
    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """One call."""


def beside_of(mask: Tensor, new: int) -> dict[str, Tensor]:
    """The mask, and the positions of the last tokens: each counts those before it that are not padding."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {MASK: mask, POSITIONS: positions[:, mask.shape[1] - new :]}


def fitted(mask: Tensor, count: int) -> Tensor:
    """A mask of so many tokens.

    A trace only ever sees one that fits. What looks for loops runs the model with more tokens, and the same mask.
    """
    if mask.shape[1] == count:
        return mask
    more = mask.new_ones(mask.shape[0], count)
    return torch.cat([more, mask], 1)[:, mask.shape[1] :]
