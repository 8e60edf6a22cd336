"""`stateful_decoders`: a module whose forward takes what it keeps of earlier tokens, and returns it.

    model     logits, states' = forward(ids[b, n], states)
    decoder   logits, present.0.conv, ... = model(ids[b, n], past_key_values.0.conv, ...)

What it keeps is whatever it takes behind its first argument, and gives in the same order, types and shapes; one axis
may have grown by the new tokens. Before the first token it is zeros, or has no entries where it grows, as runtimes
have it. More than one row of outputs may look like it; which one it is, is proved by running them.

Letters: b batch, n new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe_export.export.decoder.doors import candidates
from moe_export.export.decoder.in_parts import Made
from moe_export.export.decoder.whole import (
    MASK,
    POSITIONS,
    DecoderModule,
    TokenOutputs,
    Whole,
    beside_of,
    fitted,
)
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.recurrence.step_model import present_of
from moe_export.export.recurrence.transformers_cache import CACHE
from moe_export.export.tracing.dims import BATCH, PAST, SEQUENCE, TOTAL
from moe_export.export.tracing.lengths import Length
from moe_export.float64 import doubled

_BATCH, _PAST, _NEW = 2, 7, 5  # sizes of the example, no two sums of which are alike
_WORDS = 2  # ids of a model that has no table of them


@dataclass(frozen=True)
class Door:
    """What a model takes and gives, sorted by what it is.

    Attributes:
        tokens: Inputs of (batch, length, ...).
        given: The mask and the positions, where it takes them.
        states: Inputs that it keeps → the outputs that they become.
        rows: States → the axis that has one entry a row of the batch, if they have one.
        grows: States → the axis along which they have one entry a token.
        firsts: What they are before the first token, for a batch of one.
    """

    tokens: tuple[str, ...]
    given: tuple[str, ...]
    states: Mapping[str, str]
    rows: Mapping[str, int]
    grows: Mapping[str, int]
    firsts: Mapping[str, Tensor]

    def first(self, batch: int) -> dict[str, Tensor]:
        """The states before the first token."""
        return {
            name: first.repeat_interleave(batch, self.rows[name]) if name in self.rows else first.clone()
            for name, first in self.firsts.items()
        }


class StatefulCall(Whole):
    """A model that takes its states, called for all tokens at once: its states are those before the first one."""

    def __init__(self, subject: Subject, door: Door) -> None:
        self.subject, self.door = subject, door

    @property
    def words(self) -> int:
        """How many ids its first table has."""
        tables = (part for part in self.subject.module.modules() if isinstance(part, nn.Embedding))
        return next((table.num_embeddings for table in tables), _WORDS)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Its inputs that have one entry a token."""
        return self.door.tokens

    @property
    def outputs(self) -> tuple[str, ...]:
        """What it gives but for its states."""
        kept = set(self.door.states.values())
        return tuple(name for name in self.subject.outputs if name not in kept)

    def of(self, subject: Subject) -> StatefulCall:
        """The same of a copy of the model."""
        return StatefulCall(subject, self.door)

    def run(self, tokens: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> list[Tensor]:
        """Call it once; all tokens count unless a mask is given."""
        batch, length = tokens[self.tokens[0]].shape[:2]
        every = beside_of(torch.ones(batch, length, dtype=torch.int64), length)
        weight = next(iter(self.subject.module.parameters()), None)
        firsts = self.door.first(batch)
        if weight is not None and weight.dtype is torch.float64:
            firsts = {name: doubled(first) for name, first in firsts.items()}
        found = self.once({**tokens, **every, **beside, **firsts})
        return [found[name] for name in self.outputs]

    def once(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Call it once with everything that it takes."""
        leaves = self.subject.call_leaves([named[name] for name in self.subject.inputs])
        found = (leaf.value for leaf in leaves if leaf.is_tensor)
        return dict(zip(self.subject.outputs, found, strict=True))


class StatefulDecoder(DecoderModule):
    """The model, with its states under the names that runtimes know.

    Args:
        call: The model.
        whole: What its results are held against.
        names: What its states are called → what runtimes call them.
        results: Which of its outputs belong to which tokens.
    """

    def __init__(
        self, call: StatefulCall, whole: Whole, names: Mapping[str, str], results: TokenOutputs
    ) -> None:
        super().__init__(whole, call.door.given, results)
        self._call, self._names = call, dict(names)

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """One call."""
        door = self._call.door
        order = [*door.tokens, *door.given, *door.states]
        named = dict(zip(order, tensors, strict=True))
        if MASK in named:
            past = next((named[name].shape[axis] for name, axis in door.grows.items()), 0)
            named[MASK] = fitted(named[MASK], past + tensors[0].shape[1])
        found = self._call.once(named)
        results = {name: found[name] for name in self._call.outputs}
        return results | {
            present_of(self._names[state]): found[output] for state, output in door.states.items()
        }


def stateful_decoders(subject: Subject, *, shown: bool = False) -> Iterator[Made]:
    """Decoders that a model may be, the likeliest first; none of a model that keeps nothing at its door.

    Args:
        subject: The model.
        shown: Whether its example must show what it takes and returns.

    Raises:
        NotExportableError: It keeps something that cannot go in and out of a graph.
    """
    for states in _pairs(subject):
        yield from _possible(subject, states, None)
    for found in () if shown else candidates(subject):
        yield from _possible(found.subject, found.states, found.whole)


def _possible(subject: Subject, states: Mapping[str, str], whole: Whole | None) -> Iterator[Made]:
    try:
        door = _door(subject, states)
        made = None if door is None else _made(StatefulCall(subject, door), whole)
    except Exception:  # it cannot be run like this, so these are not what it keeps
        return
    if made is not None:
        yield made


def _pairs(subject: Subject) -> Iterator[dict[str, str]]:
    """Rows of inputs behind the first argument, and rows of outputs that have their types and as many axes."""
    first = next(iter(subject.inputs)).partition(".")[0]
    inputs = [
        name for name in subject.inputs if name.partition(".")[0] != first and name not in (MASK, POSITIONS)
    ]
    if not inputs:
        return
    kinds = {name: _kind(tensor) for name, tensor in subject.inputs.items()}
    copies = {name: tensor.clone() for name, tensor in subject.inputs.items()}
    given = dict(zip(subject.outputs, subject.call_named(copies), strict=True))
    outputs = list(given)
    for skipped in range(len(inputs)):
        row = inputs[skipped:]
        for at in reversed(range(len(outputs) - len(row) + 1)):
            there = outputs[at : at + len(row)]
            if [kinds[name] for name in row] == [_kind(given[name]) for name in there]:
                yield dict(zip(row, there, strict=True))


def _kind(tensor: Tensor) -> tuple[torch.dtype, int]:
    return tensor.dtype, tensor.dim()


def _door(subject: Subject, states: Mapping[str, str]) -> Door | None:
    """What grows, seen at two numbers of new tokens; None if anything else happens to a state's shape."""
    given = tuple(name for name in (MASK, POSITIONS) if name in subject.inputs)
    tokens = tuple(name for name in subject.inputs if name not in (*given, *states))
    example = subject.inputs
    if any(example[name].dim() < 2 for name in tokens):
        return None
    door = Door(tokens, given, states, {}, {}, {})
    length = Length(tuple((name, 1) for name in tokens))
    batch, past = len(example[tokens[0]]), 0
    if MASK in given:
        past = example[MASK].shape[1] - length.of(example)
    kept = {name: example[name].clone() for name in states}
    seen = []
    for new in (_NEW, _NEW + 1):
        beside = beside_of(torch.ones(batch, max(past, 0) + new, dtype=torch.int64), new)
        seen.append(StatefulCall(subject, door).once({**length.resized(example, new), **beside, **kept}))
    rows, grows = dict[str, int](), dict[str, int]()
    for name, output in states.items():
        before, after, longer = (list(one.shape) for one in (example[name], *(each[output] for each in seen)))
        axes = [axis for axis, size in enumerate(before) if (size, size) != (after[axis], longer[axis])]
        more = [(after[axis] - before[axis], longer[axis] - before[axis]) for axis in axes]
        if more not in ([], [(_NEW, _NEW + 1)]):
            return None
        grows |= dict.fromkeys([name], axes[0]) if axes else {}
        if batch in before:  # otherwise it is one for all rows, as a count of tokens is
            rows[name] = before.index(batch)
    firsts = {name: _first(example[name], rows.get(name), grows.get(name)) for name in states}
    return replace(door, rows=rows, grows=grows, firsts=firsts)


def _first(state: Tensor, row: int | None, grows: int | None) -> Tensor:
    """What a state is before the first token, for a batch of one."""
    return state.new_zeros(
        [1 if axis == row else 0 if axis == grows else size for axis, size in enumerate(state.shape)]
    )


def _made(call: StatefulCall, whole: Whole | None) -> Made:
    """The decoder, without a look at what it computes."""
    subject, door = call.subject, call.door
    length = Length(tuple((name, 1) for name in door.tokens))
    rows = Length(tuple((name, 0) for name in door.tokens))
    tokens = rows.resized({name: subject.inputs[name] for name in door.tokens}, _BATCH)
    sizes = {size: length.resized(tokens, size) for size in (_PAST, _PAST + 1)}
    beside = beside_of(torch.ones(_BATCH, _PAST, dtype=torch.int64), _PAST)
    before = call.once({**sizes[_PAST], **beside, **door.first(_BATCH)})
    results = call.token_outputs(sizes)
    names = _names(list(door.states))
    beside = beside_of(torch.ones(_BATCH, _PAST + _NEW, dtype=torch.int64), _NEW)
    inputs = {
        **length.resized(tokens, _NEW),
        **{name: beside[name] for name in door.given},
        **{names[name]: before[output].clone() for name, output in door.states.items()},
    }
    module = StatefulDecoder(call, whole or call, names, results)
    made = make_subject(module, tuple(inputs.values()), {}, source=subject.source, how=subject.how)
    root = f"model.{subject.root}" if whole is None and subject.root else "model"
    made = replace(made, inputs=dict(zip(inputs, made.inputs.values(), strict=True)), root=root)
    free: dict[tuple[str, int], str] = {(name, 0): BATCH for name in (*tokens, *door.given)}
    free |= {(names[name], axis): BATCH for name, axis in door.rows.items()}
    free |= dict.fromkeys(length.axes, SEQUENCE)
    free |= {(name, 1): SEQUENCE if name == POSITIONS else TOTAL for name in door.given}
    free |= {(names[name], axis): PAST for name, axis in door.grows.items()}
    firsts = {names[name]: first for name, first in door.first(_BATCH).items()}
    return Made(made, free, firsts, length)


def _names(states: Sequence[str]) -> dict[str, str]:
    """What runtimes call them: the argument's own name is left out if there is one argument, and it holds several."""
    inside = [name.partition(".")[2] for name in states]
    roots = {name.partition(".")[0] for name in states}
    paths = inside if len(roots) == 1 and all(inside) else states
    return {name: f"{CACHE}.{path}" for name, path in zip(states, paths, strict=True)}
