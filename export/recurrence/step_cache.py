"""`step_with_cache`: the step of a model that keeps a cache: one token, with the cache's tensors as inputs and outputs.

    subject   logits[l] = model(ids[l])
    step      logits[1], presents = model(ids[1], a cache of pasts)

The step is the library's own path for one token (`recurrence/transformers_cache`); that it gives what the model gives
for all tokens at once is proved by running both.

Letters: l length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_export.errors import Code, NotExportableError
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.recurrence.step_model import PROVED, StepModel, present_of, prove_as_given
from moe_export.export.recurrence.transformers_cache import CACHE, CachedModel, empty, find_cached_model
from moe_export.export.tracing.lengths import Length
from moe_export.export.tracing.trace import quiet
from moe_export.export.tracing.transformers_experts import experts_as_written
from moe_export.float64 import double_module, in_float64

_ROOM = 2**31  # bytes of weights that may be copied to float64
_BEFORE = (5, 7)  # tokens in the example's cache: 7 if the batch is 5, so that the two sizes differ


def step_with_cache(subject: Subject, cached: CachedModel) -> StepModel:
    """Make the model of a step.

    Args:
        subject: The model; axis 1 of its inputs is the length.
        cached: The part of it that keeps the cache.

    Raises:
        NotExportableError: No input has a length, the model cannot be called with a cache, or one token at a time
            gives something else.
    """
    length = Length(tuple((name, 1) for name, tensor in subject.inputs.items() if tensor.dim() > 1))
    if not length.axes:
        raise NotExportableError(
            "no input has a length, so the model has no step", code=Code.NO_STEP, where=str(subject.source),
            hint="leave out --step",
        )  # fmt: skip
    with quiet(), torch.no_grad():
        _prove(subject, length, max(PROVED, _window(cached) + 3))
        made, firsts = _step(subject, cached, length)
    places = [(name, 0) for name, tensor in made.inputs.items() if tensor.dim()]
    grows = [(name, kept.grows) for name, kept in zip(firsts, cached.kept, strict=True)]
    past = tuple((name, axis) for name, axis in grows if axis is not None)
    return StepModel(made, tuple(firsts), tuple(places), past)


def _step(subject: Subject, cached: CachedModel, length: Length) -> tuple[Subject, dict[str, Tensor]]:
    """The step as a model, and its states before the first step by name."""
    batch = next(tensor.shape[0] for tensor in subject.inputs.values() if tensor.dim() > 1)
    cache = _filled(subject, cached, length, _BEFORE[batch == _BEFORE[0]])
    pasts = {f"{CACHE}.{kept.name}": kept.of(cache).clone() for kept in cached.kept}
    one = length.resized(subject.inputs, 1)
    outputs = [*subject.outputs, *map(present_of, pasts)]
    module = CachedStep(subject, cached, outputs)
    made = make_subject(module, (*one.values(), *pasts.values()), {}, source=subject.source, how=subject.how)
    made = replace(made, inputs=dict(zip([*one, *pasts], made.inputs.values(), strict=True)), root="model")
    firsts = zip(pasts.items(), cached.kept, strict=True)
    return made, {name: empty(kept, past) for (name, past), kept in firsts}


def _prove(subject: Subject, length: Length, count: int) -> None:
    """Compare steps with the whole, in float64 if there is memory: a deep model amplifies the last digit of float32."""
    size = sum(parameter.nbytes for parameter in subject.module.parameters())
    if size > _ROOM:
        _prove_as_it_is(subject, length, count)
        return
    inputs = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in subject.inputs.items()
    }
    wide = replace(subject.of(double_module(subject.module)), inputs=inputs)
    with in_float64(), experts_as_written():
        _prove_as_it_is(wide, length, count)


def _prove_as_it_is(subject: Subject, length: Length, count: int) -> None:
    cached = find_cached_model(subject.module)
    assert cached is not None
    made, firsts = _step(subject, cached, length)
    prove_as_given(subject, made, firsts, length, count)


def _filled(subject: Subject, cached: CachedModel, length: Length, size: int) -> object:
    example = length.resized(subject.inputs, size)
    try:
        return cached.fill(lambda: subject.call_named(example))
    except Exception as error:
        raise NotExportableError(
            f"{type(cached.model).__name__} cannot be called with a cache: {error}",
            code=Code.NO_STEP,
            where=str(subject.source),
            hint="leave masks out of the inputs, or leave out --step",
        ) from error


def _window(cached: CachedModel) -> int:
    """The attention window if it is short enough to run beyond it, else 0."""
    window = getattr(cached.model.config, "sliding_window", None) or 0
    return window if isinstance(window, int) and window <= 64 else 0


class CachedStep(nn.Module):
    """The model called with one token and the tensors of a cache; its outputs and the cache after it, by name."""

    def __init__(self, subject: Subject, cached: CachedModel, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = subject.module
        self._subject, self._cached, self._outputs = subject, cached, tuple(outputs)

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """One step."""
        count = len(self._subject.inputs)
        cache = self._cached.cache_of(tensors[count:])
        with self._cached.given(cache):
            results = [leaf.value for leaf in self._subject.call_leaves(tensors[:count]) if leaf.is_tensor]
        found = [*results, *(kept.of(cache) for kept in self._cached.kept)]
        return dict(zip(self._outputs, found, strict=True))
