"""`prove_in_parts`: what a decoder gives for tokens part by part is what the model gives for all of them at once.

    wanted   model(ids[b, l])
    found    decoder(ids[b, n], pasts), decoder(ids[b, n'], what that kept), ...      joined

At once, one by one, in unequal parts, and for rows that are padded on the left.

Letters: b batch, l length, n tokens of a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_export.errors import Code, NotExportableError
from moe_export.export.decoder.whole import MASK, DecoderModule, TokenOutputs, Whole, beside_of
from moe_export.export.frontend.subject import Subject
from moe_export.export.recurrence.step_model import present_of
from moe_export.export.tracing.lengths import Length
from moe_export.float64 import agree, double_module, doubled, in_float64

_PARTS = ((9,), (1,) * 9, (4, *(1,) * 5), (4, 3, 2), (2, 1, 6))
"""How the tokens that are tried are dealt out."""
_PADDED = 3  # places in front of the first row that do not count, where the first part is longer
_ROOM = 2**31  # bytes of weights that may be copied to float64
_NEAR, _NEAR_FLOAT32 = 1e-6, 1e-4  # of the largest value
_SHORT_WINDOW = 64  # of attention: as many more tokens are tried


@dataclass(frozen=True)
class Made:
    """A decoder that may not be proved yet.

    Attributes:
        subject: Its inputs are the tokens, the mask and the positions if the model takes them, and what it keeps; its
            outputs are the model's and `present.*`. Its module is a `DecoderModule`.
        free: `(input, axis)` → the name of each dimension that may change, if it is no sum of others.
        firsts: What it keeps before the first token, by name.
        tokens: The inputs that have the length.
    """

    subject: Subject
    free: Mapping[tuple[str, int], str]
    firsts: Mapping[str, Tensor]
    tokens: Length

    @property
    def module(self) -> DecoderModule:
        """What it runs."""
        module = self.subject.module
        assert isinstance(module, DecoderModule)
        return module

    @property
    def whole(self) -> Whole:
        """The model at once."""
        return self.module.whole

    @property
    def given(self) -> tuple[str, ...]:
        """The mask and the positions, where it takes them."""
        return self.module.given

    @property
    def results(self) -> TokenOutputs:
        """Which outputs belong to which tokens."""
        return self.module.results

    def wide(self) -> Made:
        """The same in float64."""
        inputs = {name: doubled(tensor) for name, tensor in self.subject.inputs.items()}
        subject = replace(self.subject.of(double_module(self.module)), inputs=inputs)
        return replace(
            self, subject=subject, firsts={name: doubled(first) for name, first in self.firsts.items()}
        )


def prove_in_parts(made: Made) -> None:
    """Compare a decoder with its model, in float64 if there is memory: a deep model amplifies the last digit.

    Raises:
        NotExportableError: They give different values.
    """
    if sum(parameter.nbytes for parameter in made.module.parameters()) > _ROOM:
        _prove(made, _NEAR_FLOAT32)
        return
    with in_float64():
        _prove(made.wide(), _NEAR)


def _prove(made: Made, near: float) -> None:
    whole = made.whole
    windows = [getattr(settings, "sliding_window", None) for settings in whole.settings]
    more = max([size for size in windows if isinstance(size, int) and size <= _SHORT_WINDOW], default=0)
    for dealt in _PARTS:
        parts = (*dealt[:-1], dealt[-1] + more)
        count = sum(parts)
        named = {name: made.subject.inputs[name] for name in whole.tokens}
        tokens = made.tokens.resized(Length(tuple((name, 0) for name in named)).resized(named, 2), count)
        mask = torch.ones(2, count, dtype=torch.int64)
        if MASK in made.given and parts[0] > _PADDED:
            # Padding is part of a prompt: models take a single token for one that counts.
            mask[0, :_PADDED] = 0
        beside = {name: tensor for name, tensor in beside_of(mask, count).items() if name in made.given}
        wanted = dict(zip(whole.outputs, whole.run(tokens, beside), strict=True))
        how = "one by one" if len(parts) == count else f"in parts of {', '.join(map(str, parts))}"
        try:
            found = _joined(made, tokens, mask, parts)
        except Exception as error:
            raise refused(
                whole.subject,
                f"{count} tokens {how} cannot be run: {error}",
                "a decoder takes any number of new tokens, a single one among them",
            ) from error
        real = mask.bool()
        for name in (*made.results.each, *made.results.last):
            one, other = wanted[name], found[name]
            same = one.shape == other.shape
            if same and name in made.results.each:
                one, other = one[real], other[real]
            if not same or not agree([one], [other], near):
                raise refused(
                    whole.subject,
                    f"{name} of {count} tokens {how} is not what the model gives for all at once",
                    "it keeps something of earlier tokens outside of its cache, or looks at later ones",
                )


def _joined(
    made: Made, tokens: Mapping[str, Tensor], mask: Tensor, parts: Sequence[int]
) -> dict[str, Tensor]:
    """The decoder's outputs for tokens that are given to it part by part; those of each token joined."""
    pasts = {name: first.clone() for name, first in made.firsts.items()}
    rows: list[dict[str, Any]] = []
    at = 0
    for count in parts:
        beside = beside_of(mask[:, : at + count], count)
        now = {name: tensor.narrow(1, at, count) for name, tensor in tokens.items()}
        now |= {name: beside[name] for name in made.given} | pasts
        found = dict(zip(made.subject.outputs, made.subject.call_named(now), strict=True))
        pasts = {name: found.pop(present_of(name)) for name in pasts}
        rows.append(found)
        at += count
    return {**rows[-1], **{name: torch.cat([row[name] for row in rows], 1) for name in made.results.each}}


def refused(subject: Subject, what: str, hint: str) -> NotExportableError:
    """The error of a model that has no decoder."""
    return NotExportableError(
        f"the model has no decoder: {what}", code=Code.NO_DECODER, where=str(subject.source), hint=hint
    )
