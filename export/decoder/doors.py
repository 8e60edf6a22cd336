"""`doors`: where a model keeps what it remembers of earlier tokens, where its example does not show it.

    logits = model(ids, cache)                            the cache is changed in place, and may be empty at first
    logits, cache = model(ids, cache=None)                no cache is given
    output.logits, output.state = model(ids, state=None)  the same by name

From such a model, one is made that takes the tensors of that object and returns what they become; whether these are
what it keeps is not known here. An object may count the tokens it has seen, in ints: those are taken from the size of a
tensor in it that has one entry a token.

Letters: b batch, l length.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_export.errors import NotExportableError
from moe_export.export.decoder.in_parts import refused
from moe_export.export.decoder.whole import MASK, POSITIONS, Whole, beside_of
from moe_export.export.frontend.objects import numbers_in, rebuilt, tensors_in
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.tracing.lengths import Length

_BATCH, _LENGTH = (
    11,
    7,
)  # no other size is likely to be the same, so it shows which axis of a state is the batch
_MORE = (5, 6)  # tokens of two further calls, in which what counts tokens grows by as many
AFTER = "after"
"""What the outputs begin with that are what an object holds after the call."""


class Blank(Whole):
    """A model that is called with its tokens, as its user calls it for a prompt."""

    def __init__(self, subject: Subject, tokens: Sequence[str]) -> None:
        self.subject, self._tokens = subject, tuple(tokens)

    @property
    def tokens(self) -> tuple[str, ...]:
        """Its inputs that have one entry a token."""
        return self._tokens

    @property
    def words(self) -> int:
        """How many ids its first table has; 2 if it has none."""
        tables = (part for part in self.subject.module.modules() if isinstance(part, nn.Embedding))
        return next((table.num_embeddings for table in tables), 2)

    def of(self, subject: Subject) -> Blank:
        """The same of a copy of the model."""
        return Blank(subject, self._tokens)

    def run(self, tokens: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> list[Tensor]:
        """Call it once; all tokens count unless a mask is given."""
        batch, length = tokens[self._tokens[0]].shape[:2]
        given = {**beside_of(torch.ones(batch, length, dtype=torch.int64), length), **tokens, **beside}
        return list(self.subject.call([given[name] for name in self.subject.inputs]))


class Opened(nn.Module):
    """A model that takes the tensors of what it keeps behind its own inputs, and returns what they become.

    Args:
        subject: The model.
        kept: What it keeps, by the parameters of its forward.
        returned: Where its result holds what they become; None if they are changed in place.
        counted: Ints in what it keeps that are sizes of tensors in it: by path, the tensor's and the axis.
    """

    def __init__(
        self,
        subject: Subject,
        kept: Mapping[str, Any],
        returned: Mapping[str, str | int] | None,
        counted: Mapping[str, tuple[str, int]] | None = None,
    ) -> None:
        super().__init__()
        self.model = subject.module
        self._subject, self._kept, self._returned = subject, dict(kept), returned
        self._counted = dict(counted or {})
        self.own = [name for name in subject.inputs if name.partition(".")[0] not in kept]

    def __deepcopy__(self, memo: dict[int, Any]) -> Opened:
        subject = self._subject.of(copy.deepcopy(self.model, memo))
        return Opened(subject, self._kept, self._returned, self._counted)

    def __getstate__(self) -> Any:
        raise TypeError("what a model keeps is not written to files")

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Call it once: its own inputs, then what it keeps."""
        count = len(self.own)
        objects = self.objects(tensors[count:])
        found = self.called(dict(zip(self.own, tensors[:count], strict=True)), objects)
        leaves = [leaf.value for leaf in self._subject.leaves_of(lambda: found) if leaf.is_tensor]
        becomes = tensors_in(self.after(found, objects))
        taken = {id(tensor) for tensor in becomes.values()}
        results = zip(self._subject.outputs, leaves, strict=True)
        return {
            **{name: tensor for name, tensor in results if id(tensor) not in taken},
            **{f"{AFTER}.{path}": tensor for path, tensor in becomes.items()},
        }

    def after(self, found: Any, objects: Mapping[str, Any]) -> Mapping[str, Any]:
        """What it keeps after a call, from the call's result and what it was given."""
        if self._returned is None:
            return objects
        return {name: items_of(found)[key] for name, key in self._returned.items()}

    def objects(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """What it keeps, of these tensors, each call's own."""
        named = dict(zip(tensors_in(self._kept), tensors, strict=True))

        def put(path: str, each: Any) -> Any:
            if path in named:
                return named[path].clone()  # some write into it
            if path in self._counted:
                source, axis = self._counted[path]
                return named[source].shape[axis]
            return each

        made: dict[str, Any] = rebuilt(self._kept, put)
        return made

    def called(self, own: Mapping[str, Tensor], objects: Mapping[str, Any]) -> Any:
        """The model's result."""
        inputs = {**self._subject.inputs, **own}
        args, kwargs = self._subject.arguments(list(inputs.values()))
        bound = inspect.signature(self.model.forward).bind(*args, **kwargs)
        bound.arguments.update(objects)
        with torch.compiler.set_stance("force_eager"):
            return self.model(*bound.args, **bound.kwargs)


@dataclass(frozen=True)
class Candidate:
    """A model with what it keeps at its door.

    Attributes:
        subject: It takes and returns tensors.
        states: Its inputs that it keeps → the outputs that they become.
        whole: The model for all tokens at once; None if it has to be given what it keeps.
    """

    subject: Subject
    states: Mapping[str, str]
    whole: Whole | None


def items_of(found: Any) -> dict[str | int, Any]:
    """What a result holds, by keys, fields or places; nothing if it is a tensor."""
    if isinstance(found, Mapping):
        return dict(found)
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    if isinstance(found, tuple) and hasattr(found, "_fields"):
        return dict(zip(found._fields, found, strict=True))
    return dict(enumerate(found)) if isinstance(found, (tuple, list)) else {}


def candidates(subject: Subject) -> Iterator[Candidate]:
    """What a model may keep that its example does not show, the likeliest first.

    Raises:
        NotExportableError: It keeps something that cannot go in and out of a graph.
    """
    args, kwargs = subject.arguments([tensor.clone() for tensor in subject.inputs.values()])
    bound = inspect.signature(subject.module.forward).bind(*args, **kwargs).arguments
    first = next(iter(subject.inputs)).partition(".")[0]
    objects = {name: value for name, value in bound.items() if name != first and _may_hold(value)}
    if any(map(tensors_in, objects.values())):
        yield from _given(subject, objects)
    elif all(tensor.dim() > 1 for tensor in subject.inputs.values()):
        yield from _blank(subject, objects)


def _may_hold(value: Any) -> bool:
    """Whether a value can hold tensors, now or later."""
    return isinstance(value, (list, tuple, dict)) or (
        hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module, type))
    )


def _given(subject: Subject, objects: Mapping[str, Any]) -> Iterator[Candidate]:
    """Objects that the example gives, if a call changes them in place."""
    opened = Opened(subject, objects, None)
    before = tensors_in(objects)
    own = {name: subject.inputs[name] for name in opened.own}
    used = opened.objects(list(before.values()))
    opened.called(own, used)
    after = tensors_in(used)
    if after.keys() == before.keys() and all(
        tensor.shape == before[path].shape and torch.equal(tensor, before[path])
        for path, tensor in after.items()
    ):
        return
    yield _candidate(opened, own, None)


def _blank(subject: Subject, objects: Mapping[str, Any]) -> Iterator[Candidate]:
    """What comes out of a call on tokens alone, given to whatever is empty or not given."""
    tokens = [name for name in subject.inputs if name not in (MASK, POSITIONS)]
    rows, length = (Length(tuple((name, axis) for name in tokens)) for axis in (0, 1))
    example = length.resized(rows.resized(subject.inputs, _BATCH), _LENGTH)
    example |= {name: value for name, value in _beside(_LENGTH, _LENGTH).items() if name in subject.inputs}
    whole = Blank(subject, tokens)
    empty = Opened(subject, objects, None)
    used = empty.objects(())
    result = empty.called(example, used)
    own = {name: tensor for name, tensor in example.items() if name in empty.own}
    if any(map(tensors_in, used.values())):
        yield _candidate(Opened(subject, used, None), own, whole)
    unset = [
        parameter.name
        for parameter in inspect.signature(subject.module.forward).parameters.values()
        if parameter.default is not inspect.Parameter.empty or parameter.name in objects
        if parameter.name not in (*tokens, MASK, POSITIONS)
    ]
    items = {key: item for key, item in items_of(result).items() if tensors_in(item)}
    for returned in _assigned(unset, list(items)):
        kept = {name: items[key] for name, key in returned.items()}
        try:
            found = _candidate(Opened(subject, kept, returned), own, whole)
        except NotExportableError:
            raise
        except Exception:  # it does not take that there
            continue
        yield found


def _assigned(unset: Sequence[str], keys: Sequence[str | int]) -> Iterator[dict[str, str | int]]:
    """Parameters that may take what is returned: those of the same names, or else some in order."""
    named = {name: name for name in unset if name in keys}
    if named:
        yield named  # type: ignore[misc]
        return
    later = keys[1:]
    for count in range(len(later), 0, -1):
        for start in range(len(unset) - count + 1):
            yield dict(zip(unset[start : start + count], later[-count:], strict=True))


def _beside(count: int, new: int) -> dict[str, Tensor]:
    return beside_of(torch.ones(_BATCH, count, dtype=torch.int64), new)


def _candidate(opened: Opened, own: Mapping[str, Tensor], whole: Whole | None) -> Candidate:
    """The model with what it keeps at its door, its counts of tokens included."""
    subject, kept = opened._subject, opened._kept
    tokens = Length(tuple((name, 1) for name in own if name not in (MASK, POSITIONS)))
    states = tensors_in(kept)
    past = _LENGTH if whole is not None else own[MASK].shape[1] - tokens.of(own) if MASK in own else 0
    batch = len(next(iter(own.values())))
    counts, sizes = [], []
    for new in _MORE:
        beside = beside_of(torch.ones(batch, past + new, dtype=torch.int64), new)
        now = {**tokens.resized(own, new), **{name: tensor for name, tensor in beside.items() if name in own}}
        used = opened.objects(list(states.values()))
        found = opened.called(now, used)
        after = opened.after(found, used)
        counts.append(numbers_in(after))
        sizes.append({path: tensor.shape for path, tensor in tensors_in(after).items()})
    before = numbers_in(kept)
    grown = [
        path for path, value in before.items()
        if [each.get(path, value) - value for each in counts] == list(_MORE)
    ]  # fmt: skip
    counted = {path: _source(subject, path, before[path], states, sizes) for path in grown}
    opened = Opened(subject, kept, opened._returned, counted)
    beside = beside_of(torch.ones(batch, past + tokens.of(own), dtype=torch.int64), tokens.of(own))
    inputs = {**own, **{name: tensor for name, tensor in beside.items() if name in own}, **states}
    made = make_subject(opened, tuple(inputs.values()), {}, source=subject.source, how=subject.how)
    made = replace(made, inputs=dict(zip(inputs, made.inputs.values(), strict=True)), root="model")
    return Candidate(made, {path: f"{AFTER}.{path}" for path in states}, whole)


def _source(
    subject: Subject, path: str, value: int, states: Mapping[str, Tensor], sizes: Sequence[Mapping[str, Any]]
) -> tuple[str, int]:
    """The tensor, and its axis, that has as many entries as an int counts."""
    for name, tensor in states.items():
        for axis, size in enumerate(tensor.shape):
            later = [each[name][axis] - size for each in sizes if name in each]
            if size == value and later == list(_MORE):
                return name, axis
    raise refused(
        subject,
        f"{path} counts tokens in a Python int, and no tensor beside it has one entry a token",
        "keep the count in a tensor, or take it from position_ids: an int is a constant in a graph",
    )
