"""`decoder_of`: from a language model, the model of any number of tokens after any number of earlier ones.

    subject   logits[b, l] = model(ids[b, l])
    decoder   logits[b, n], presents[p + n] = model(ids[b, n], mask[b, p + n], positions[b, n], a cache of pasts[p])

Data flows one way: a `Subject` comes in, its part that keeps a cache is found (`recurrence/transformers_cache`), a
module that calls it with a cache of given tensors is made, and what that computes is held against the model without a
cache: at once, one by one, in unequal parts, and for rows that are padded on the left. Only then it is a `Decoder`,
whose subject goes through the pipeline like any other.

What is refused: a model without a cache, and one that with its cache computes something else than without, such as one
whose library starts several tokens from an empty state.

Letters: b batch, l length, n new tokens, p earlier tokens ("past").
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.recurrence.step_model import present_of
from moe_export.export.recurrence.transformers_cache import (
    CACHE,
    CachedModel,
    empty,
    find_cached_model,
    takes,
)
from moe_export.export.tracing.constants import constants_of
from moe_export.export.tracing.dims import BATCH, PAST, SEQUENCE, DimRequest
from moe_export.export.tracing.lengths import Length
from moe_export.export.tracing.trace import quiet, trace
from moe_export.export.tracing.transformers_experts import traceable_experts
from moe_export.export.tracing.widest import generic_sizes
from moe_export.float64 import agree, double_module, in_float64

MASK = "attention_mask"
"""Which of all tokens so far count: int64 (batch, past + sequence), 0 for what is padded on the left."""
POSITIONS = "position_ids"
"""Where the new tokens stand among those that count: int64 (batch, sequence)."""

_SIZES, _NEW = (2, 7), 5  # batch and earlier tokens of the example, new tokens: no two sums of them are alike
_TRIED = 2  # numbers of new tokens, if a trace at a few holds for no others
_PARTS = ((9,), (1,) * 9, (4, *(1,) * 5), (4, 3, 2), (2, 1, 6))
"""How the tokens that are tried are dealt out."""
_PADDED = 3  # places in front of the first row that do not count, where the first part is longer
_ROOM = 2**31  # bytes of weights that may be copied to float64
_NEAR, _NEAR_FLOAT32 = 1e-6, 1e-4  # of the largest value


@dataclass(frozen=True)
class Decoder:
    """The model of new tokens after earlier ones.

    Attributes:
        subject: Its inputs are the tokens, `attention_mask` and `position_ids` if the model takes them, and
            `past_key_values.*`; its outputs are the model's and `present.*`.
        free: `(input, axis)` → the name of each dimension that may change; None for one that is a sum of others.
        tokens: The inputs that have the length.
    """

    subject: Subject
    free: Mapping[tuple[str, int], str | None]
    tokens: tuple[str, ...]

    def dims(self, request: DimRequest) -> DimRequest:
        """What is free in the graph: the new tokens and the earlier ones always, the batch if that was requested."""
        batch = all(request.wants(name, 0) for name in self.tokens)
        free = {place: name for place, name in self.free.items() if name != BATCH or batch}
        return DimRequest(True, free)


def decoder_of(subject: Subject) -> Decoder:
    """Make the decoder of a model.

    Args:
        subject: The model; axis 1 of its inputs is the length.

    Raises:
        NotExportableError: The model keeps no cache, or computes something else with its cache than without.
    """
    cached = find_cached_model(subject.module, attends=False)
    if cached is None:
        raise _refused(
            subject,
            "it has no part that takes a cache",
            "a decoder is made of a transformers model with a cache (use_cache, past_key_values); "
            "--step makes the graph of one token from loops",
        )
    with quiet(), torch.no_grad(), traceable_experts():
        made = _Made.of(subject, cached)
        _prove(subject)
        if any(kept.grows is None for kept in cached.kept):
            made = _traceable(subject, cached, made)
    return made.decoder()


def _traceable(subject: Subject, cached: CachedModel, made: _Made) -> _Made:
    """The decoder with as many new tokens in its example as a trace takes that holds for any number.

    Recurrences are computed in chunks, and a trace of a part of one chunk holds for nothing else.
    """
    for size in (None, *itertools.islice(generic_sizes(constants_of(made.subject)), _TRIED)):
        longer = made if size is None else _Made.of(subject, cached, size)
        try:
            trace(longer.subject, longer.decoder().dims(DimRequest()))
        except NotExportableError:
            continue
        return longer
    return made


@dataclass(frozen=True)
class _Made:
    """A decoder that is not proved yet.

    Attributes:
        subject: The decoder.
        free: As in `Decoder`.
        firsts: What it keeps before the first token, by name.
        tokens: The inputs that have the length.
        given: What it takes beside them: the mask, the positions.
        results: Which outputs belong to which tokens.
    """

    subject: Subject
    free: Mapping[tuple[str, int], str | None]
    firsts: Mapping[str, Tensor]
    tokens: Length
    given: tuple[str, ...]
    results: TokenOutputs

    def decoder(self) -> Decoder:
        """What comes of it once it is proved."""
        return Decoder(self.subject, self.free, tuple(name for name, _ in self.tokens.axes))

    @classmethod
    def of(cls, subject: Subject, cached: CachedModel, new: int = _NEW) -> _Made:
        """Make the decoder, without a look at what it computes; its example has so many new tokens."""
        named = {name: tensor for name, tensor in subject.inputs.items() if name not in (MASK, POSITIONS)}
        tokens = Length(tuple((name, 1) for name, tensor in named.items() if tensor.dim() > 1))
        if not tokens.axes or len(tokens.axes) < len(named):
            odd = next((name for name, tensor in named.items() if tensor.dim() < 2), None)
            what = "no input has a length" if odd is None else f"input {odd} has no length"
            raise _refused(
                subject, what, "its inputs are tokens: (batch, sequence) or (batch, sequence, width)"
            )
        batch, past = _SIZES
        rows = Length(tuple((name, 0) for name in named))
        example = rows.resized(named, batch)
        call = CachedCall(subject, cached)
        earlier = tokens.resized(example, past)
        try:
            cache = cached.fill(lambda: call.run(earlier, {}))
        except Exception as error:
            what = f"{type(cached.model).__name__} cannot be called with a cache: {error}"
            raise _refused(subject, what, "call the model as its generate() does") from error
        pasts = {f"{CACHE}.{kept.name}": kept.of(cache).clone() for kept in cached.kept}
        given = tuple(name for name in (MASK, POSITIONS) if takes(cached.model, name))
        beside = beside_of(torch.ones(batch, past + new, dtype=torch.int64), new)
        inputs = {
            **tokens.resized(example, new),
            **{name: beside[name] for name in given},
            **pasts,
        }
        results = call.token_outputs({size: tokens.resized(example, size) for size in (past, past + 1)})
        if not results.each and not results.last:
            raise _refused(subject, "no output is one of a token", "return the logits of all tokens")
        module = CachedDecoder(
            call, list(inputs), given, [*subject.outputs, *map(present_of, pasts)], results
        )
        made = make_subject(module, tuple(inputs.values()), {}, source=subject.source, how=subject.how)
        made = replace(made, inputs=dict(zip(inputs, made.inputs.values(), strict=True)), root="model")
        free: dict[tuple[str, int], str | None] = {(name, 0): BATCH for name in inputs}
        free |= dict.fromkeys(tokens.axes, SEQUENCE)
        free |= {(name, 1): SEQUENCE if name == POSITIONS else None for name in given}
        free |= {
            (name, kept.grows): PAST for name, kept in zip(pasts, cached.kept, strict=True) if kept.grows
        }
        firsts = {
            name: empty(kept, past) for (name, past), kept in zip(pasts.items(), cached.kept, strict=True)
        }
        return cls(made, free, firsts, tokens, given, results)


@dataclass(frozen=True)
class TokenOutputs:
    """Which outputs of a model belong to which tokens; any other, as a loss over all, cannot be had in parts.

    Attributes:
        each: Those with one entry for each: (batch, length, ...).
        last: Those of one size whatever the length, taken as those of the last: (batch, ...).
    """

    each: tuple[str, ...]
    last: tuple[str, ...]


class CachedCall:
    """How a model is called with what it takes beside its tokens, whatever the code around it passes.

    Attributes:
        subject: The model.
        cached: The part of it that keeps a cache.
    """

    def __init__(self, subject: Subject, cached: CachedModel) -> None:
        self.subject, self.cached = subject, cached

    @property
    def words(self) -> int:
        """How many ids its table of tokens has."""
        count: int = self.cached.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        return count

    def wide(self) -> CachedCall:
        """The same in float64."""
        wide = self.subject.of(double_module(self.subject.module))
        cached = find_cached_model(wide.module, attends=False)
        assert cached is not None
        return CachedCall(wide, cached)

    def token_outputs(self, examples: Mapping[int, Mapping[str, Tensor]]) -> TokenOutputs:
        """Which tokens the outputs belong to, seen at two numbers of tokens."""
        (one, first), (two, second) = ((size, self.run(tokens, {})) for size, tokens in examples.items())
        named = list(zip(self.subject.outputs, first, second, strict=True))
        each = [name for name, a, b in named if a.dim() > 1 and (a.shape[1], b.shape[1]) == (one, two)]
        batch = len(next(iter(examples[one].values())))
        last = [name for name, a, b in named if a.dim() > 1 and a.shape == b.shape and len(a) == batch]
        return TokenOutputs(tuple(each), tuple(last))

    def run(
        self, tokens: Mapping[str, Tensor], beside: Mapping[str, Tensor], cache: Any = None
    ) -> list[Tensor]:
        """Call it once: with a cache, or, without one, on all tokens."""
        whole = [beside.get(name, tokens.get(name)) for name in self.subject.inputs]
        kept = {} if cache is None else {self.cached.argument: cache, "use_cache": True}
        with self.cached.called_with({**beside, **kept}):
            leaves = self.subject.call_leaves(whole)  # type: ignore[arg-type]
        return [leaf.value for leaf in leaves if leaf.is_tensor]


class CachedDecoder(nn.Module):
    """The model called with new tokens, a mask, positions and the tensors of a cache; its outputs and the cache.

    Attributes:
        whole: The call that it makes; without a cache, what its results are held against.
        given: What it takes beside the tokens and the cache: `attention_mask`, `position_ids`.
        results: Which outputs belong to which tokens.
    """

    def __init__(
        self,
        call: CachedCall,
        inputs: Sequence[str],
        given: Sequence[str],
        outputs: Sequence[str],
        results: TokenOutputs,
    ) -> None:
        super().__init__()
        self.model = call.subject.module
        self.whole, self.given, self.results = call, tuple(given), results
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)

    def _past(self, pasts: Sequence[Tensor]) -> int | None:
        """How many earlier tokens there are; None of a model that only keeps windows and states, which do not tell."""
        grows = (
            past.shape[kept.grows]
            for kept, past in zip(self.whole.cached.kept, pasts, strict=True)
            if kept.grows
        )
        return next(grows, None)

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """One call."""
        named = dict(zip(self._inputs, tensors, strict=True))
        pasts = [tensor for name, tensor in named.items() if name.startswith(f"{CACHE}.")]
        past = self._past(pasts)
        if MASK in named and past is not None:
            named[MASK] = _fitted(named[MASK], past + tensors[0].shape[1])
        beside = {name: named[name] for name in self.given}
        cache = self.whole.cached.cache_of(pasts)
        found = self.whole.run(named, beside, cache)
        found += [kept.of(cache) for kept in self.whole.cached.kept]
        return dict(zip(self._outputs, found, strict=True))


def _fitted(mask: Tensor, count: int) -> Tensor:
    """A mask of so many tokens.

    A trace only ever sees one that fits. What looks for loops runs the model with more tokens, and the same mask.
    """
    if mask.shape[1] == count:
        return mask
    more = mask.new_ones(mask.shape[0], count)
    return torch.cat([more, mask], 1)[:, mask.shape[1] :]


def beside_of(mask: Tensor, new: int) -> dict[str, Tensor]:
    """The mask, and the positions of the last tokens: each counts those before it that are not padding."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {MASK: mask, POSITIONS: positions[:, mask.shape[1] - new :]}


def _prove(subject: Subject) -> None:
    """Compare the decoder with the model, in float64 if there is memory: a deep model amplifies the last digit."""
    if sum(parameter.nbytes for parameter in subject.module.parameters()) > _ROOM:
        _prove_as_it_is(subject, _NEAR_FLOAT32)
        return
    inputs = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in subject.inputs.items()
    }
    wide = replace(subject.of(double_module(subject.module)), inputs=inputs)
    with in_float64():
        _prove_as_it_is(wide, _NEAR)


def _prove_as_it_is(subject: Subject, near: float) -> None:
    cached = find_cached_model(subject.module, attends=False)
    assert cached is not None
    made, call = _Made.of(subject, cached), CachedCall(subject, cached)
    window = getattr(cached.model.config, "sliding_window", None)
    more = window if isinstance(window, int) and window <= 64 else 0
    for dealt in _PARTS:
        parts = (*dealt[:-1], dealt[-1] + more)
        count = sum(parts)
        named = {name: tensor for name, tensor in subject.inputs.items() if name not in (MASK, POSITIONS)}
        tokens = made.tokens.resized(Length(tuple((name, 0) for name in named)).resized(named, 2), count)
        mask = torch.ones(2, count, dtype=torch.int64)
        if MASK in made.given and parts[0] > _PADDED:
            # Padding is part of a prompt: models take a single token for one that counts.
            mask[0, :_PADDED] = 0
        beside = {name: tensor for name, tensor in beside_of(mask, count).items() if name in made.given}
        wanted = dict(zip(subject.outputs, call.run(tokens, beside), strict=True))
        found = _in_parts(made, tokens, mask, parts)
        real = mask.bool()
        for name in (*made.results.each, *made.results.last):
            one, other = wanted[name], found[name]
            if name in made.results.each:
                one, other = one[real], other[real]
            if not agree([one], [other], near):
                how = "one by one" if len(parts) == count else f"in parts of {', '.join(map(str, parts))}"
                raise _refused(
                    subject,
                    f"{name} of {count} tokens {how} is not what the model gives for all at once",
                    "it keeps something of earlier tokens outside of its cache, or looks at later ones",
                )


def _in_parts(
    made: _Made, tokens: Mapping[str, Tensor], mask: Tensor, parts: Sequence[int]
) -> dict[str, Tensor]:
    """The decoder's outputs for tokens that are given to it part by part; those of each token joined."""
    pasts = {name: first.clone() for name, first in made.firsts.items()}
    rows: list[dict[str, Tensor]] = []
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


def _refused(subject: Subject, what: str, hint: str) -> NotExportableError:
    return NotExportableError(
        f"the model has no decoder: {what}", code=Code.NO_DECODER, where=str(subject.source), hint=hint
    )
