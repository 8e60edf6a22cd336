"""`decoder_of`: from a language model, the model of any number of tokens after any number of earlier ones.

    subject   logits[b, l] = model(ids[b, l])
    decoder   logits[b, n], presents[p + n] = model(ids[b, n], mask[b, p + n], positions[b, n], a cache of pasts[p])

Data flows one way: a `Subject` comes in, its part that keeps a cache is found (`recurrence/transformers_cache`), a
module that calls it with a cache of given tensors is made (`cached`), and what that computes is held against the model
without a cache (`in_parts`). If it is wrong because a loop starts from nothing, its loops are folded and started from
what goes in (`continued`), and that is held against the model. Only then it is a `Decoder`, whose subject goes through
the pipeline like any other.

What is refused: a model without a cache, and one that with its cache computes something else than without.

Letters: b batch, l length, n new tokens, p earlier tokens ("past").
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_export.errors import NotExportableError
from moe_export.export.decoder.cached import CachedCall, CachedDecoder
from moe_export.export.decoder.continued import ContinuedDecoder, continue_loops
from moe_export.export.decoder.found import found_decoder
from moe_export.export.decoder.in_parts import Made, prove_in_parts, refused
from moe_export.export.decoder.one_token import one_token_calls
from moe_export.export.decoder.stateful import stateful_decoders
from moe_export.export.decoder.whole import MASK, POSITIONS, beside_of
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.recurrence.delta_rule import delta_rules_step_by_step
from moe_export.export.recurrence.fold import FoldedModule
from moe_export.export.recurrence.recurrences import Recurrent, fold_recurrences
from moe_export.export.recurrence.step_model import present_of
from moe_export.export.recurrence.transformers_cache import (
    CACHE,
    CachedModel,
    empty,
    find_cached_model,
    takes,
)
from moe_export.export.tracing.constants import constants_of
from moe_export.export.tracing.dims import BATCH, PAST, SEQUENCE, TOTAL, DimRequest
from moe_export.export.tracing.lengths import Length
from moe_export.export.tracing.trace import Traced, quiet, trace
from moe_export.export.tracing.transformers_experts import experts_as_written
from moe_export.export.tracing.widest import generic_sizes

_SIZES, _NEW = (2, 7), 5  # batch and earlier tokens of the example, new tokens: no two sums of them are alike
_TRIED = 2  # numbers of new tokens, if a trace at a few holds for no others


@dataclass(frozen=True)
class Decoder:
    """The model of new tokens after earlier ones.

    Attributes:
        subject: Its inputs are the tokens, `attention_mask` and `position_ids` if the model takes them, and
            `past_key_values.*`; its outputs are the model's and `present.*`.
        free: `(input, axis)` → the name of each dimension that may change, if it is no sum of others.
        tokens: The inputs that have the length.
        recurrent: The same with its loops folded, if that was needed to make it; what is exported then.
        apart: The same with parts that are called for one token apart, where that costs less (`one_token`).
    """

    subject: Subject
    free: Mapping[tuple[str, int], str]
    tokens: tuple[str, ...]
    recurrent: Recurrent | None = None
    apart: Subject | None = None

    def dims(self, request: DimRequest) -> DimRequest:
        """What is free in the graph: the new tokens and the earlier ones always, the batch if that was requested."""
        batch = all(request.wants(name, 0) for name in self.tokens)
        free = {place: name for place, name in self.free.items() if name != BATCH or batch}
        return DimRequest(True, free)

    def from_nothing(self, traced: Traced) -> Traced:
        """A trace of it, right for no earlier tokens, too: so every text begins, and it was compared so."""
        dims = (replace(dim, minimum=0) if dim.name == PAST else dim for dim in traced.dims)
        return replace(traced, dims=tuple(dims))


def decoder_of(subject: Subject) -> Decoder:
    """Make the decoder of a model.

    Args:
        subject: The model; axis 1 of its inputs is the length.

    Raises:
        NotExportableError: The model keeps no cache, or computes something else with its cache than without.
    """
    cached = find_cached_model(subject.module, attends=False)
    with quiet(), torch.no_grad(), experts_as_written():
        stateful = _stateful(subject, shown=cached is not None)
        if stateful is not None:
            return stateful
        if cached is None:
            return _found(subject)
        made = _made(subject, cached)
        try:
            prove_in_parts(made)
        except NotExportableError:
            folded = _proved_folded(made)
            if folded is None:
                raise
            return folded
        if any(kept.grows is None for kept in cached.kept):
            made = _traceable(subject, cached, made)
            return replace(_decoder(made), apart=_one_token_apart(made, cached))
    return _decoder(made)


def _stateful(subject: Subject, *, shown: bool) -> Decoder | None:
    """The decoder of a model that takes and returns its states; None if it has none.

    Args:
        subject: The model.
        shown: Whether its example must show them, as where there is a cache that is known.

    Raises:
        NotExportableError: It has, and computes something else in parts than at once.
    """
    refusal: NotExportableError | None = None
    for made in stateful_decoders(subject, shown=shown):
        try:
            prove_in_parts(made)
        except NotExportableError as error:
            folded = _proved_folded(made)
            if folded is not None:
                return folded
            refusal = refusal or error
        else:
            return _decoder(made)
    if refusal is not None:
        raise refusal
    return None


def _found(subject: Subject) -> Decoder:
    """The decoder of a model that keeps nothing, from its folded loops."""
    recurrent = fold_recurrences(subject, DimRequest())
    if len(recurrent.lengths) != 1 or not isinstance(recurrent.subject.module, FoldedModule):
        raise refused(
            subject,
            "it has no part that takes a cache, returns nothing that it takes, and has no loop over a length that "
            "could be folded",
            "a decoder is made of a transformers model with a cache (use_cache, past_key_values), of a module that "
            "takes and returns its states, or of one with a loop over its tokens",
        )
    if set(recurrent.lengths[0].axes) != {(name, 1) for name in subject.inputs}:
        raise refused(
            subject,
            "it keeps nothing, and its loops run over something else than axis 1 of all that it takes",
            "its inputs are tokens: (batch, sequence) or (batch, sequence, width)",
        )
    made = found_decoder(subject, recurrent.subject, recurrent.lengths[0])
    prove_in_parts(made)
    return _decoder(made, replace(recurrent, subject=made.subject, unrolled=None))


def _decoder(made: Made, recurrent: Recurrent | None = None) -> Decoder:
    return Decoder(made.subject, made.free, tuple(name for name, _ in made.tokens.axes), recurrent)


def _traceable(subject: Subject, cached: CachedModel, made: Made) -> Made:
    """The decoder with as many new tokens in its example as a trace takes that holds for any number.

    Recurrences are computed in chunks, and a trace of a part of one chunk holds for nothing else.
    """
    for size in (None, *itertools.islice(generic_sizes(constants_of(made.subject)), _TRIED)):
        longer = made if size is None else _made(subject, cached, size)
        try:
            trace(longer.subject, _decoder(longer).dims(DimRequest()))
        except NotExportableError:
            continue
        return longer
    return made


def _one_token_apart(made: Made, cached: CachedModel) -> Subject | None:
    """The decoder with parts that are called for one token apart; None if that would cost no less, or is wrong."""
    module = made.module
    assert isinstance(module, CachedDecoder)

    past = _SIZES[1]

    def run(count: int, around: Callable[[Any], AbstractContextManager[None]]) -> None:
        mask = torch.ones(_SIZES[0], past + count, dtype=torch.int64)
        mask[0, : past + (count > 1)] = 0  # padding, but for a single token
        beside = beside_of(mask, count)
        example = made.tokens.resized(made.subject.inputs, count)
        module.seen([beside.get(name, tensor) for name, tensor in example.items()], around)

    with delta_rules_step_by_step():  # as they are folded
        apart = one_token_calls(run, module.model, cached.kept)
    if not apart:
        return None
    both = made.subject.of(module.with_apart(apart))
    try:
        prove_in_parts(replace(made, subject=both))
    except NotExportableError:
        return None
    return both


def _made(subject: Subject, cached: CachedModel, new: int = _NEW) -> Made:
    """Make the decoder, without a look at what it computes; its example has so many new tokens."""
    call = CachedCall(subject, cached)
    named = {name: subject.inputs[name] for name in call.tokens}
    tokens = Length(tuple((name, 1) for name, tensor in named.items() if tensor.dim() > 1))
    if not tokens.axes or len(tokens.axes) < len(named):
        odd = next((name for name, tensor in named.items() if tensor.dim() < 2), None)
        what = "no input has a length" if odd is None else f"input {odd} has no length"
        raise refused(subject, what, "its inputs are tokens: (batch, sequence) or (batch, sequence, width)")
    batch, past = _SIZES
    rows = Length(tuple((name, 0) for name in named))
    example = rows.resized(named, batch)
    earlier = tokens.resized(example, past)
    try:
        cache = cached.fill(lambda: call.run(earlier, {}))
    except Exception as error:
        what = f"{type(cached.model).__name__} cannot be called with a cache: {error}"
        raise refused(subject, what, "call the model as its generate() does") from error
    pasts = {f"{CACHE}.{kept.name}": kept.of(cache).clone() for kept in cached.kept}
    given = tuple(name for name in (MASK, POSITIONS) if takes(cached.model, name))
    beside = beside_of(torch.ones(batch, past + new, dtype=torch.int64), new)
    inputs = {**tokens.resized(example, new), **{name: beside[name] for name in given}, **pasts}
    results = call.token_outputs({size: tokens.resized(example, size) for size in (past, past + 1)})
    if not results.each and not results.last:
        raise refused(subject, "no output is one of a token", "return the logits of all tokens")
    module = CachedDecoder(call, list(inputs), given, [*subject.outputs, *map(present_of, pasts)], results)
    made = make_subject(module, tuple(inputs.values()), {}, source=subject.source, how=subject.how)
    made = replace(made, inputs=dict(zip(inputs, made.inputs.values(), strict=True)), root="model")
    free: dict[tuple[str, int], str] = {(name, 0): BATCH for name in inputs}
    free |= dict.fromkeys(tokens.axes, SEQUENCE)
    free |= {(name, 1): SEQUENCE if name == POSITIONS else TOTAL for name in given}
    free |= {(name, kept.grows): PAST for name, kept in zip(pasts, cached.kept, strict=True) if kept.grows}
    firsts = {name: empty(kept, past) for (name, past), kept in zip(pasts.items(), cached.kept, strict=True)}
    return Made(made, free, firsts, tokens)


def _proved_folded(made: Made) -> Decoder | None:
    """The decoder with its loops folded, if that is right where the model's own code in parts is not; else None.

    A library may start several tokens from zeros though it is given a state, or do something else for a single one.
    """
    for states_go_in in (False, True):
        try:
            folded = _folded(made, states_go_in)
            if folded is not None:
                prove_in_parts(folded[0])
                return _decoder(*folded)
        except Exception:  # whatever code that is wrong in parts runs into when it is looked at
            continue
    return None


def _folded(made: Made, states_go_in: bool) -> tuple[Made, Recurrent] | None:
    """The decoder with its loops folded; None if there are none.

    Args:
        made: The decoder.
        states_go_in: Whether the loops start from the states; otherwise they start from zeros, and are made to.
    """
    states = [name for name in made.firsts if not any(key == name and axis for key, axis in made.free)]
    if not states:
        return None
    inputs, subject = list(made.subject.inputs), made.subject
    if not states_go_in:
        # Several tokens start from zeros and a single one from its state, so only after zeros both are one loop.
        blank = {name: torch.zeros_like(made.subject.inputs[name]) for name in states}
        subject = replace(subject, inputs={**subject.inputs, **blank, **_odd_mask(made)})
    recurrent = fold_recurrences(subject, _decoder(made).dims(DimRequest()))
    folded, outputs = recurrent.subject.module, subject.outputs
    if not isinstance(folded, FoldedModule):
        return None
    if not states_go_in and not continue_loops(folded, inputs, outputs, states):
        return None
    module = ContinuedDecoder(made.whole, made.given, outputs, made.results, folded)
    proved = replace(made.subject.of(module), inputs=made.subject.inputs)
    return replace(made, subject=proved), recurrent


def _odd_mask(made: Made) -> dict[str, torch.Tensor]:
    """A mask that fits none of the lengths that are looked at: one that fits is handled by fewer operators."""
    if MASK not in made.given or PAST in made.free.values():
        return {}
    return {MASK: made.subject.inputs[MASK][:, : sum(_SIZES[1:]) + _NEW - 1]}
