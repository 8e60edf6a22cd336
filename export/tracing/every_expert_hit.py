"""Trace loops over experts that ask which experts were hit: every expert is traced as if it had been.

An expert without tokens adds nothing, so skipping it saves time and changes no result; but a trace cannot branch
on the data. Three questions are answered by what they ask about, never by where they stand:

- `if mask.any():`, `if e in indices:`, `if rows.numel() == 0: continue`, `if counts[e] > 0:` — the expert has tokens; a
  mask of rows that comes from no choice, `scores[:, e] > 0`, has some, too, if rows are then written by it
  (`rows_written`);
- `for e in hit.nonzero():`, `for e in chosen.unique():`, `.tolist()` of these — all experts are hit;
  `counts.tolist()` — each has some;
- a number of rows that only the data knows — it is neither 0 nor 1; where rows above a limit are cut off (`cut_off`),
  they are, which changes nothing below it.

Rows whose number only the data knows may be listed in Python to index with them, `x[rows.tolist()]`: the list stays
a tensor (`RowNumbers`).

What an answer was given for is listed, and the graph is compared with the model at sizes where experts go
without tokens, so an answer that changes a result is found.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.experimental import symbolic_shapes
from torch.overrides import TorchFunctionMode

from moe_export.export.axes.chosen import experts_of
from moe_export.export.sizes import fixed
from moe_export.export.torch_compat.length import TracedList
from moe_export.export.torch_compat.lists import lists_answered
from moe_export.export.torch_compat.proxies import node_of
from moe_export.export.torch_compat.sizes import undecided
from moe_export.export.tracing.cut_off import cuts_off
from moe_export.export.tracing.expert_slices import Count, Counts, Slices, counts_of, joined
from moe_export.export.tracing.hit_values import (
    AS_ITS_SOURCE,
    counts_pairs,
    hit_experts,
    is_count,
    truth_of_hit,
)
from moe_export.export.tracing.not_hit import asking_frame, place_of, refuse_number, require_nothing
from moe_export.export.tracing.row_masks import is_mask_of_rows, rows_written

_aten = torch.ops.aten
_LENGTH = 4093  # `len` of such rows must be a number: another prime, so that no shape is taken to fit it
_MANY = 4099  # stands for a number of rows that only the data knows: a prime that no size of a model is
_SIZES = (1009, 2003)  # stand for a model's free sizes beside such a number: a limit may be made of them
_MORE = 10**18 + 9  # more rows than any product of a few such sizes: tokens of a batch, times choices
_UNIQUE = {torch.unique, torch.Tensor.unique}

SOME = Count(None, 0, 1)  # how many rows an expert has, for code that asks whether it has any


class ExpertNumber(int):
    """The number of an expert, for code that takes it for an element, or for a row (1,), of a tensor."""

    is_row = False

    def __getitem__(self, index: Any) -> ExpertNumber:
        return ExpertNumber(self)

    def item(self) -> int:
        return int(self)

    def squeeze(self, *args: Any) -> ExpertNumber:
        return ExpertNumber(self)

    def tolist(self) -> int:
        return int(self)


class ExpertRow(ExpertNumber):
    """The number of an expert as a row (1,): what is looked up by it keeps an axis."""

    is_row = True


class RowNumbers(TracedList):
    """A tensor (R,) of integers, R known by the data only, for code that takes it for a list to index with."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.shape = rows, tuple(rows.shape)

    def __bool__(self) -> bool:
        return bool(self.shape[0] != 0)

    def __iter__(self) -> Iterator[int]:
        return iter([int(row) for row in self.rows.unbind()])  # refused: there is no number of steps

    def tolist(self) -> RowNumbers:
        return self


def _indexed(index: Any) -> Any:
    """An index, or the parts of one, with lists of rows as the tensors that they are."""
    if isinstance(index, tuple) and any(isinstance(part, RowNumbers) for part in index):
        return tuple(_indexed(part) for part in index)
    return index.rows if isinstance(index, RowNumbers) else index


class _AllHit(TorchFunctionMode):
    """Answers what a model asks its tensors about hit experts."""

    def __init__(self, decided: Collection[str]) -> None:
        super().__init__()
        self.asked: list[tuple[fx.Node, str]] = []  # conditions on masks of rows, taken for true; their lines
        self._decided = decided
        self._segments: dict[fx.Node, Counts] = {}
        self._slices = Slices()
        self._counted: dict[fx.Node, tuple[torch.Tensor, int]] = {}  # counts beside `unique`: of what, E
        self._lists: dict[
            fx.Node, torch.Tensor
        ] = {}  # integers that were computed, to find them by their nodes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._slices.before_a_call([*args, *kwargs.values()])
        rule = _ANSWERS.get(func)
        answer = rule(self, func, args, kwargs) if rule is not None else None
        if answer is not None:
            return answer
        result = func(*args, **kwargs)
        if func in _UNIQUE and isinstance(result, tuple):
            self._note_counts(args[0], result[-1], kwargs)
        if isinstance(result, torch.Tensor) and result.dim() == 1 and result.dtype is torch.int64:
            node = node_of(result)
            if node is not None:
                self._lists[node] = result
        return result

    def _note_counts(self, chosen: torch.Tensor, counts: torch.Tensor, asked: dict[str, Any]) -> None:
        """How often each number occurs, beside `unique`: where every expert is hit, how many rows each has."""
        node, count = node_of(counts), experts_of(node_of(chosen))
        if asked.get("return_counts") and asked.get("dim") is None and node is not None and count is not None:
            self._counted[node] = (chosen.reshape(-1), count)

    def contains(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`e in indices`."""
        return self.truth(func, ((args[0] == args[1]).any(),), kwargs)

    def truth(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node = node_of(args[0])
        answer = truth_of_hit(node)
        frame = asking_frame()
        if answer is not None and frame is not None:
            require_nothing(frame, answer)
        place = place_of(frame) if frame is not None else ""
        if answer is None and node is not None and place not in self._decided:
            answer = truth_of_hit(node, is_mask_of_rows)
            if answer is not None:
                self.asked.append((node, place))
        return answer

    def length(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _LENGTH if _is_unknown(args[0].shape[:1]) else None

    def bincount(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        least = kwargs.get("minlength", args[2] if len(args) > 2 else 0) or experts_of(node_of(args[0]))
        if not least or len(args) != 1:
            return None
        # Numbers of experts: none is above `minlength`.
        return torch.nn.functional.one_hot(args[0], least).sum(0)

    def numbers(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Values as Python integers: the experts that were hit, or how many rows each has."""
        node = node_of(args[0])
        count = hit_experts(node)
        if count is not None:
            kind = ExpertRow if args[0].dim() > 1 else ExpertNumber
            found = [kind(expert) for expert in range(count)]
            return iter(found) if func is torch.Tensor.__iter__ else found
        if func is torch.Tensor.numpy and (listed := self.listed(args[0])) is not None:
            return listed
        counts = self._counts(node, args[0])
        if counts is None or (func in (torch.Tensor.unbind, torch.unbind) and node not in self._counted):
            return None
        return iter(counts) if func is torch.Tensor.__iter__ else counts

    def listed(self, tensor: torch.Tensor) -> RowNumbers | None:
        """Rows as Python has them: integers of which only the data knows how many there are.

        Neither hit experts nor how many rows each has, of which there are as many as experts.
        """
        if tensor.dim() != 1 or tensor.dtype is not torch.int64 or not _is_unknown(tensor.shape):
            return None
        node = node_of(tensor)
        if hit_experts(node) is not None or self._counts(node, tensor) is not None:
            return None
        return RowNumbers(tensor.clone())

    def number(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One element of the counts, or of where they end."""
        node = node_of(args[0])
        if node is None or not is_count(node, running=True):
            return None
        one = SOME if is_count(node) else None
        while node.target in AS_ITS_SOURCE - {_aten.select.int, _aten.unbind.int}:
            node = node.args[0]  # type: ignore[assignment]
        place: Any = node.args[2] if node.target is _aten.select.int else node.args[1:]
        source = node.args[0]
        if (
            node.target is operator.getitem
            and isinstance(source, fx.Node)
            and source.target is _aten.unbind.int
        ):
            place, source = node.args[1], source.args[0]
        if isinstance(source, fx.Node) and isinstance(place, int):
            counts = self._counts(source, self._lists.get(source))
            if counts is not None:
                return counts[place]
        return one

    def _counts(self, node: fx.Node | None, tensor: torch.Tensor | None) -> Counts | None:
        """The Python integers of a tensor (E,) of counts, or of its running sum."""
        if node in self._segments:
            return self._segments[node]
        if node is not None and node in self._counted:
            chosen, experts = self._counted[node]
            self._segments[node] = counts_of(torch.nn.functional.one_hot(chosen, experts).sum(0))
            return self._segments[node]
        if node is None or tensor is None or tensor.dim() != 1 or fixed(tensor.shape[0]) is None:
            return None
        source, running = node, False
        while source.target in AS_ITS_SOURCE | {_aten.cumsum.default} and isinstance(source.args[0], fx.Node):
            running = running or source.target is _aten.cumsum.default
            source = source.args[0]
        if not counts_pairs(source):
            return None
        self._segments[node] = counts_of(tensor, running=running)
        return self._segments[node]

    def item(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(args[1], ExpertRow):
            return args[0][int(args[1])].unsqueeze(0)
        index = _indexed(args[1])
        return self._slices.sliced(*args) if index is args[1] else args[0][index]

    def write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor, index, value = args
        parts = _indexed(index)
        if parts is index:
            return self._slices.written(tensor, index, value)
        tensor[parts] = value
        return tensor

    def tensor(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor of a list of rows."""
        if not args or not isinstance(args[0], RowNumbers):
            return None
        return (
            args[0].rows.clone().to(**{name: kwargs[name] for name in ("dtype", "device") if name in kwargs})
        )

    def split(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sizes = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
        return self._slices.split(args[0], sizes, kwargs.get("dim", args[2] if len(args) > 2 else 0))

    def cat(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parts = args[0] if args else kwargs["tensors"]
        axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        known = [counts[0].segments for counts in self._segments.values() if counts]
        return joined(parts, known) if axis == 0 else None


_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.__bool__: _AllHit.truth,
    torch.Tensor.__len__: _AllHit.length,
    torch.Tensor.__contains__: _AllHit.contains,
    torch.bincount: _AllHit.bincount,
    torch.Tensor.bincount: _AllHit.bincount,
    torch.Tensor.__iter__: _AllHit.numbers,
    torch.Tensor.tolist: _AllHit.numbers,
    torch.Tensor.numpy: _AllHit.numbers,
    torch.Tensor.unbind: _AllHit.numbers,
    torch.unbind: _AllHit.numbers,
    torch.Tensor.item: _AllHit.number,
    torch.Tensor.__getitem__: _AllHit.item,
    torch.Tensor.__setitem__: _AllHit.write,
    torch.Tensor.split: _AllHit.split,
    torch.split: _AllHit.split,
    torch.tensor: _AllHit.tensor,
    torch.as_tensor: _AllHit.tensor,
    torch.cat: _AllHit.cat,
    torch.concat: _AllHit.cat,
}


def _is_unknown(sizes: Any) -> bool:
    return any(
        symbolic_shapes.free_unbacked_symbols(size) for size in sizes if isinstance(size, torch.SymInt)
    )


@contextmanager
def every_expert_hit(decided: Collection[str] = ()) -> Iterator[list[str]]:
    """While it runs, a trace takes every expert for hit.

    Args:
        decided: Lines where a question about a mask of rows decides something, and is not answered here.

    Yields:
        The conditions on numbers of rows that were answered, as the tracer writes them.
    """
    answered: list[str] = []

    def answer(env: Any, expression: Any) -> bool | None:
        frame = asking_frame()
        if frame is not None and _is_of_rows(env, expression):
            cut = cuts_off(frame)
            if cut is not None:
                return cut
        value = _for_many_rows(env, expression)
        if value is None:
            return None
        if frame is not None:
            if _values(expression, (1, 2, 3, 5, *_SIZES, _MORE)) != {value}:
                refuse_number(frame)
            if _values(expression, (0,)) != {value}:
                require_nothing(frame, value)
        answered.append(str(expression))
        return value

    with _AllHit(decided) as questions, undecided(answer), lists_answered(questions.listed):
        yield answered
    rows_written(questions.asked)


def _for_many_rows(env: Any, expression: Any) -> bool | None:
    """What a condition on numbers of rows says where there are many; None if it is about something else."""
    values = _values(expression, (_MANY,)) if _is_of_rows(env, expression) else set()
    return values.pop() if len(values) == 1 else None


def _is_of_rows(env: Any, expression: Any) -> bool:
    """Whether a condition is one on numbers of rows that only the data knows."""
    ranges = [env.var_to_range[symbol] for symbol in _row_numbers(expression)]
    # A number of rows is not negative, and not at most 1: that is the truth of a condition on the data.
    return bool(ranges) and all(found.lower >= 0 and found.upper > 1 for found in ranges)


def _row_numbers(expression: Any) -> list[Any]:
    """What stands in a condition for numbers that only the data knows."""
    return [symbol for symbol in expression.free_symbols if symbolic_shapes.free_unbacked_symbols(symbol)]


def _values(expression: Any, numbers: Sequence[int]) -> set[Any]:
    """What a condition on numbers of rows says for each of some numbers, whatever the model's sizes are."""
    import sympy

    rows = _row_numbers(expression)
    sizes = [symbol for symbol in expression.free_symbols if symbol not in rows]
    found = (
        expression.xreplace(
            {**dict.fromkeys(sizes, sympy.Integer(size)), **dict.fromkeys(rows, sympy.Integer(number))}
        )
        for number in numbers
        for size in _SIZES
    )
    return {bool(value) if value in (sympy.true, sympy.false) else None for value in found}
