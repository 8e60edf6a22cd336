"""`CachedDecoder`: a transformers model called with a cache of given tensors.

    logits[b, n], presents[p + n] = model(ids[b, n], mask[b, p + n], positions[b, n], a cache of pasts[p])

The part of a model that keeps a cache (`recurrence/transformers_cache`) is handed one whatever the code around it
passes, so it may be anywhere inside a module of a user's.

Letters: b batch, n new tokens, p earlier tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from moe_export.export.decoder.one_token import OneTokenCall, both_ways
from moe_export.export.decoder.whole import MASK, DecoderModule, TokenOutputs, Whole, fitted
from moe_export.export.frontend.subject import Subject
from moe_export.export.recurrence.transformers_cache import CACHE, CachedModel


class CachedCall(Whole):
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

    @property
    def settings(self) -> tuple[Any, ...]:
        """Those of the part that keeps the cache."""
        model = self.cached.model
        return (getattr(model, "generation_config", None), model.config)

    def of(self, subject: Subject) -> CachedCall:
        """The same of a copy of the model."""
        return CachedCall(subject, self.cached.inside(subject.module))

    def run(
        self, tokens: Mapping[str, Tensor], beside: Mapping[str, Tensor], cache: Any = None
    ) -> list[Tensor]:
        """Call it once: with a cache, or, without one, on all tokens."""
        whole = [beside.get(name, tokens.get(name)) for name in self.subject.inputs]
        kept = {} if cache is None else {self.cached.argument: cache, "use_cache": True}
        with self.cached.called_with({**beside, **kept}):
            leaves = self.subject.call_leaves(whole)  # type: ignore[arg-type]
        return [leaf.value for leaf in leaves if leaf.is_tensor]


class CachedDecoder(DecoderModule):
    """The model called with new tokens, a mask, positions and the tensors of a cache; its outputs and the cache.

    Args:
        call: The call that it makes.
        inputs: Names of what it is given, in order.
        given: The mask and the positions, where it takes them.
        outputs: Names of what it gives, in order.
        results: Which of these belong to which tokens.
        apart: The parts that are called for one token apart.
    """

    def __init__(
        self,
        call: CachedCall,
        inputs: Sequence[str],
        given: Sequence[str],
        outputs: Sequence[str],
        results: TokenOutputs,
        apart: Sequence[OneTokenCall] = (),
    ) -> None:
        super().__init__(call, given, results)
        self._call, self._inputs, self._outputs = call, tuple(inputs), tuple(outputs)
        self._apart = tuple(apart)

    def with_apart(self, apart: Sequence[OneTokenCall]) -> CachedDecoder:
        """The same, with parts that are called for one token apart."""
        return CachedDecoder(self._call, self._inputs, self.given, self._outputs, self.results, apart)

    def _past(self, pasts: Sequence[Tensor]) -> int | None:
        """How many earlier tokens there are; None of a model that only keeps windows and states, which do not tell."""
        grows = (
            past.shape[kept.grows]
            for kept, past in zip(self._call.cached.kept, pasts, strict=True)
            if kept.grows
        )
        return next(grows, None)

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """One call."""
        if not self._apart:
            return self.seen(tensors, nullcontext)
        count = tensors[0].shape[1]
        return self.seen(tensors, lambda cache: both_ways(self._apart, self.model, cache, count))

    def seen(
        self, tensors: Sequence[Tensor], around: Callable[[Any], AbstractContextManager[None]]
    ) -> dict[str, Tensor]:
        """One call, inside a context that is made of the cache."""
        named = dict(zip(self._inputs, tensors, strict=True))
        pasts = [tensor for name, tensor in named.items() if name.startswith(f"{CACHE}.")]
        past = self._past(pasts)
        if MASK in named:  # without keys, only the new tokens' own part of it is read
            named[MASK] = fitted(named[MASK], (past or 0) + tensors[0].shape[1])
        beside = {name: named[name] for name in self.given}
        cache = self._call.cached.cache_of(pasts)
        with around(cache):
            found = self._call.run(named, beside, cache)
        found += [kept.of(cache) for kept in self._call.cached.kept]
        return dict(zip(self._outputs, found, strict=True))
