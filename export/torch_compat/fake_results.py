"""`fake_results_remembered`: what an operator gives for tensors of a shape is worked out once in a trace.

A layer or an expert runs the operators that the one before it ran, on other weights. The tracer works out the shape,
the strides and the dtype of each result anew; half of the time of a trace of 256 experts was that.

    mul(f32[u0, 64], f32[u0, 64]) → f32[u0, 64]        worked out
    mul(f32[u7, 64], f32[u7, 64]) → f32[u7, 64]        the same with u7 for u0

Sizes that only data knows are told apart by what is known of them, not by name. A result is remembered only if
nothing else came of the call: no condition on a size, no new size, no question that the model's code was asked, no
memory shared with an argument. All that it may depend on is part of the key.

Why: PyTorch's own memory of fake results (`fake_tensor_cache_enabled`) does not look past the names of sizes, and takes
longer to look something up than to work it out where sizes are symbols.

Seen in torch 2.13.0 and 2.14.1 (`torch._subclasses.fake_tensor.FakeTensorMode._dispatch_impl`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import sympy
import torch
from torch._subclasses import fake_tensor

from moe_export.export.torch_compat.sizes import answers_given

_PLAIN: tuple[type, ...] = (
    int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_NUMBERS = (int, float, bool)
_COMPARISONS = tuple(getattr(torch.ops.aten, name).Scalar for name in ("eq", "ne", "lt", "le", "gt", "ge"))
_FRESH = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
)
_MASKS = (torch.bool, torch.uint8)
_BUILTIN = ("aten", "prims")


class _OtherwiseError(Exception):
    """A call that is not remembered."""


@dataclass(frozen=True)
class _Size:
    """A size of a result.

    Attributes:
        place: Where it stands among the sizes that the call was given; -1 if it is none of them.
        formula: What it is otherwise, in the symbols of `_stand_in`.
        hint: Its value at the example's sizes.
    """

    place: int
    formula: Any = None
    hint: Any = None


@dataclass(frozen=True)
class _Result:
    """A tensor that a call returns.

    Attributes:
        argument: Which argument it is itself; -1 if it is a tensor of its own, which the others are about.
    """

    argument: int
    shape: tuple[int | _Size, ...] = ()
    strides: tuple[int | _Size, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    requires_grad: bool = False


@dataclass
class _Memory:
    """The results of one trace, whose sizes are symbols of one environment.

    Attributes:
        mode: The mode that works results out.
        results: By the key of a call.
        formulas: By an expression: the same with stand-ins for sizes that only data knows, and these.
        asserted: The symbols that conditions are known of, beyond a range.
        assertions: How many conditions there were when `asserted` was made.
    """

    mode: Any
    results: dict[Any, _Result] = field(default_factory=dict)
    formulas: dict[Any, tuple[Any, tuple[Any, ...]]] = field(default_factory=dict)
    asserted: frozenset[Any] = frozenset()
    assertions: int = -1


@contextmanager
def fake_results_remembered() -> Iterator[None]:
    """While it runs, a trace works out each fake result once."""
    memories: dict[Any, _Memory] = {}
    original: Callable[..., Any] = fake_tensor.FakeTensorMode._dispatch_impl

    def dispatch(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if not _may_be_known(func):
            return original(mode, func, types, args, kwargs)
        memory = memories.get(mode)
        if memory is None:
            memory = memories[mode] = _Memory(mode)
        call = _Call(memory)
        try:
            key = call.key(func, args, kwargs)
        except _OtherwiseError:
            return original(mode, func, types, args, kwargs)
        known = memory.results.get(key)
        if known is not None:
            return call.again(known)
        before = call.state()
        result = original(mode, func, types, args, kwargs)
        if before == call.state() and (
            not func._schema.is_mutable or key == _Call(memory).key(func, args, kwargs)
        ):
            found = call.described(result)
            if found is not None:
                memory.results[key] = found
        return result

    with mock.patch.object(fake_tensor.FakeTensorMode, "_dispatch_impl", dispatch):
        yield


_MAY_BE: dict[Any, bool] = {}


def _may_be_known(func: Any) -> bool:
    """Whether the result of an operator depends on shapes and dtypes alone, and is one new tensor or an argument."""
    known = _MAY_BE.get(func)
    if known is None:
        known = _MAY_BE[func] = (
            isinstance(func, torch._ops.OpOverload)
            and func.namespace in _BUILTIN
            and len(func._schema.returns) == 1
            and str(func._schema.returns[0].type) == "Tensor"
            and _is_written_to(func._schema.returns[0].alias_info)
            and (func is torch.ops.aten.index.Tensor or not any(tag in func.tags for tag in _FRESH))
        )
    return known


def _is_written_to(alias: Any) -> bool:
    """Whether a result is no view: an argument that is written to, or new."""
    return alias is None or bool(alias.is_write)


class _Call:
    """A call that is looked up.

    Attributes:
        sizes: The sizes that it was given and that are no numbers, in order.
        tensors: Its tensors, in order.
    """

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory
        self._env = memory.mode.shape_env
        self.sizes: list[torch.SymInt] = []
        self.tensors: list[Any] = []
        self._unknown: dict[Any, int] = {}  # sizes that only data knows → their numbers

    def key(self, func: Any, args: Any, kwargs: Any) -> Any:
        """All that a result may depend on.

        Raises:
            _OtherwiseError: An argument may say more than its shape does.
        """
        given: list[Any] = [func, torch.get_default_dtype(), torch.is_grad_enabled()]
        by_type = func in _COMPARISONS  # `chosen == 3` has the shape and dtype of `chosen == 4`
        for each in args:
            if by_type and type(each) in _NUMBERS:
                given.append(type(each))
            else:
                self._add(given, each)
        for name, each in kwargs.items():
            given.append(name)
            self._add(given, each)
        return (*given, *self._facts())

    def _add(self, given: list[Any], value: Any) -> None:
        if type(value) is fake_tensor.FakeTensor:
            self._add_tensor(given, value)
        elif isinstance(value, torch.SymInt):
            given.append(self._size(value))
        elif isinstance(value, (list, tuple)):
            given.append(len(value))
            for each in value:
                if isinstance(each, torch.Tensor) and each.dtype in _MASKS:
                    raise _OtherwiseError  # how many are set may have been asked before, and be known by another name
                self._add(given, each)
        elif isinstance(value, _PLAIN):
            given += (type(value), value)
        else:
            raise _OtherwiseError

    def _add_tensor(self, given: list[Any], tensor: Any) -> None:
        if tensor.fake_mode is not self._memory.mode or tensor.constant is not None:
            raise _OtherwiseError
        self.tensors.append(tensor)
        keys = torch._C._dispatch_keys(tensor).raw_repr()
        given += (tensor.dtype, tensor.fake_device, tensor.requires_grad, keys, tensor.dim())
        for size in (*tensor.shape, *tensor.stride(), tensor.storage_offset()):
            given.append(size if type(size) is int else self._size(size))

    def _size(self, size: torch.SymInt) -> Any:
        """A size up to the names of symbols that only data knows."""
        expression = size.node.expr
        if expression.is_number:  # a size that the trace has fixed meanwhile: as good as a number
            return int(expression)
        self.sizes.append(size)
        formula, symbols = self._formula(expression)
        numbers = (self._unknown.setdefault(symbol, len(self._unknown)) for symbol in symbols)
        return (formula, *numbers)

    def _formula(self, expression: Any) -> tuple[Any, tuple[Any, ...]]:
        found = self._memory.formulas.get(expression)
        if found is None:
            symbols = [each for each in expression.free_symbols if self._env.is_unbacked_symint(each)]
            symbols.sort(key=lambda symbol: (len(symbol.name), symbol.name))
            renamed = {symbol: _stand_in(place) for place, symbol in enumerate(symbols)}
            found = (expression.xreplace(renamed) if renamed else expression, tuple(symbols))
            self._memory.formulas[expression] = found
        return found

    def _facts(self) -> Iterator[Any]:
        """What is known of the sizes that only data knows.

        Raises:
            _OtherwiseError: More than between which numbers they lie.
        """
        if not self._unknown:
            return
        memory, env = self._memory, self._env
        if memory.assertions != env.num_deferred_runtime_asserts:
            memory.assertions = env.num_deferred_runtime_asserts
            held = [each.expr for every in env.deferred_runtime_asserts.values() for each in every]
            memory.asserted = frozenset(symbol for each in held for symbol in each.free_symbols)
        for symbol in self._unknown:
            if symbol in memory.asserted:
                raise _OtherwiseError
            known = env.var_to_range[symbol]
            yield (known.lower, known.upper, symbol in env.size_like)

    def state(self) -> tuple[Any, ...]:
        """What changes if something else comes of a call than its result."""
        env = self._env
        if env is None:
            return ()
        counted = (
            env.guards,
            env.replacements,
            env.divisible,
            env.var_to_range,
            env.pending_fresh_unbacked_symbols,
        )
        ranges = [env.var_to_range[symbol] for symbol in self._unknown]
        versions = (env._version_counter, env._replacements_version_counter, env.num_deferred_runtime_asserts)
        return (*map(len, counted), *versions, answers_given(), ranges)

    def described(self, result: Any) -> _Result | None:
        """How to make the result of such a call; None if that cannot be said."""
        places = [place for place, tensor in enumerate(self.tensors) if tensor is result]
        if places:
            return _Result(places[0]) if len(places) == 1 else None
        if type(result) is not fake_tensor.FakeTensor or result.constant is not None:
            return None
        memory = result.untyped_storage()._cdata
        if any(tensor.untyped_storage()._cdata == memory for tensor in self.tensors):
            return None
        if (
            result.layout is not torch.strided
            or result.is_conj()
            or result.is_neg()
            or result.storage_offset() != 0
        ):
            return None
        try:
            shape, strides = self._described(result.shape), self._described(result.stride())
        except _OtherwiseError:
            return None
        return _Result(-1, shape, strides, result.dtype, result.fake_device, result.requires_grad)

    def _described(self, sizes: Sequence[Any]) -> tuple[int | _Size, ...]:
        return tuple(size if type(size) is int else self._described_size(size) for size in sizes)

    def _described_size(self, size: torch.SymInt) -> int | _Size:
        expression = size.node.expr
        if expression.is_number:
            return int(expression)
        for place, each in enumerate(self.sizes):
            if each.node.expr == expression:
                return _Size(place)
        _, symbols = self._formula(expression)
        if not self._unknown.keys() >= set(symbols):
            raise _OtherwiseError
        renamed = {symbol: _stand_in(self._unknown[symbol]) for symbol in symbols}
        return _Size(-1, expression.xreplace(renamed), size.node.hint)

    def again(self, result: _Result) -> Any:
        """The tensor that a call whose key is known returns."""
        if result.argument >= 0:
            return self.tensors[result.argument]
        mode = self._memory.mode
        shape, strides = self._sizes(result.shape), self._sizes(result.strides)
        suppressed = self._env.suppress_guards() if self._env is not None else nullcontext()
        with fake_tensor.in_kernel_invocation_manager(mode), suppressed:
            plain = torch.empty_strided(
                shape, strides, dtype=result.dtype, device="meta", requires_grad=result.requires_grad
            )
        return fake_tensor.FakeTensor(mode, plain, result.device)

    def _sizes(self, sizes: Sequence[int | _Size]) -> list[Any]:
        return [size if isinstance(size, int) else self._made(size) for size in sizes]

    def _made(self, size: _Size) -> Any:
        if size.place >= 0:
            return self.sizes[size.place]
        renamed = {_stand_in(number): symbol for symbol, number in self._unknown.items()}
        return self._env.create_symintnode(size.formula.xreplace(renamed), hint=size.hint)


@cache
def _stand_in(number: int) -> sympy.Symbol:
    """What stands for a size that only data knows in formulas."""
    return sympy.Symbol(f"data{number}", integer=True)
