"""`closures_lifted`: the functions that `torch.while_loop` and its like are given may close over weights and inputs.

Why: such an operator compiles its functions, and what they close over becomes arguments of the compiled ones. Where
compilation is switched off (a model's own `torch.compile` is not to run), tensors of the trace end up as constants in
the graph of the loop, and nothing can copy it. For a `while_loop`, what is closed over is found by running its
functions once outside of the trace, and handed in where it is used: no compiler reads the user's code, and the graph
of the loop keeps the user's lines. And what is carried must not be closed over besides: PyTorch asks for copies there,
in words that name no line.

Seen in torch 2.13.0: `torch._higher_order_ops.utils._hop_compile_and_call`, `while_loop.while_loop_op`, which takes
what is closed over as its last argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import _ops
from torch._higher_order_ops import utils as higher_order
from torch._higher_order_ops.while_loop import while_loop_op
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from moe_export.errors import Code, NotExportableError
from moe_export.export.torch_compat.operators import writes_to
from moe_export.export.torch_compat.proxies import is_tracing, node_of, untraced


class AnotherStepError(NotExportableError):
    """A function of a loop uses other tensors when it is called again."""


class WritesAroundError(NotExportableError):
    """A function of a loop writes into what it closes over."""


@contextmanager
def closures_lifted() -> Iterator[None]:
    """While it runs, a `while_loop` is given what its functions close over; its like compile theirs."""
    original: Callable[..., Any] = higher_order._hop_compile_and_call

    def compiled(function: Any, args: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
        if "while_loop" in function.__name__:
            condition, body, carried, *_ = args
            return looped(condition, body, carried)
        with torch.compiler.set_stance("default"):
            return original(function, args, kwargs)

    with mock.patch.object(higher_order, "_hop_compile_and_call", compiled):
        yield


def looped(
    condition: Callable[..., Any], body: Callable[..., tuple[Any, ...]], carried: Sequence[Any]
) -> tuple[Any, ...]:
    """`torch.while_loop` within a trace, with functions that may close over tensors of it.

    Args:
        condition: Is given what is carried; a tensor () of bool.
        body: Is given what is carried, and gives it anew, with the same shapes and dtypes.
        carried: Tensors and integers.

    Raises:
        WritesAroundError: A function writes into what it closes over.
        AnotherStepError: A function uses other tensors when it is called again.
    """
    carried = tuple(map(_copied, carried))
    functions = [_Lifted(function, carried) for function in (condition, body)]
    more = [tensor for function in functions for tensor in function.closed_over()]
    given = list({id(tensor): tensor for tensor in more}.values())
    given_now = tuple(map(_present, given))
    call = (*(function.given(given) for function in functions), carried, given_now)
    # Past the modes for functions, which would be off while the graphs of the loop are made: the model's questions to
    # its tensors are answered there, too.
    operator: Any = while_loop_op
    keys: Any = _ops._compute_keyset
    key = keys(call, {}, operator.non_fallthrough_keys).highestPriorityTypeId()
    return tuple(operator.dispatch(key, *call))


_REPLACING = ContextVar[tuple["_InPlaceOf", ...]]("what stands in the place of what", default=())


def _present(tensor: torch.Tensor) -> torch.Tensor:
    """What stands for a tensor in the step of the outer loop that is under way."""
    for replacing in _REPLACING.get():
        tensor = replacing.replaced(tensor)
    return tensor


def _is_from_around(tensor: torch.Tensor) -> bool:
    """Whether a tensor was there before a step was tried: the trace knows it, or it is no part of any trace."""
    return node_of(_present(tensor)) is not None or not isinstance(tensor, FakeTensor)


class _Lifted:
    """A function of a loop, and what it needs from around it: tensors that it closes over, and its constants.

    Args:
        function: Is given what is carried.
        carried: What that is.
    """

    def __init__(self, function: Callable[..., Any], carried: Sequence[Any]) -> None:
        self._function, self._carried = function, carried
        self._needs = _Needs(carried)
        self._tensors: list[torch.Tensor] = []
        self._constants: list[torch.Tensor] = []

    def closed_over(self) -> list[torch.Tensor]:
        """The tensors, its constants among them, as the trace knows them."""
        with self._needs:
            untraced(self._function, *self._carried)
        self._needs.require_unwritten()
        self._constants = [make() for make in self._needs.constants]
        self._tensors = [tensor for tensor in self._needs.tensors if _is_from_around(tensor)]
        return [*self._tensors, *self._constants]

    def given(self, tensors: Sequence[torch.Tensor]) -> Callable[..., Any]:
        """The function, given these besides; nothing that it gives is what it was given."""
        places = {id(tensor): place for place, tensor in enumerate(tensors)}

        def call(*args: Any) -> Any:
            own = args[len(self._carried) :]
            others = {id(tensor): own[places[id(tensor)]] for tensor in self._tensors}
            needs = _InPlaceOf(others, [own[places[id(tensor)]] for tensor in self._constants])
            before = _REPLACING.set((*_REPLACING.get(), needs))
            try:
                with needs:
                    results = self._function(*args[: len(self._carried)])
            finally:
                _REPLACING.reset(before)
            return pytree.tree_map(_copied, needs.replaced(results))  # none may be another, or what was given

        return call


class _Needs(TorchFunctionMode):
    """Collects the tensors that functions of PyTorch are given and that none of them made, and the constants.

    A constant is a tensor of numbers in the code: in the graph of a loop, it would be an attribute that nothing copies.
    """

    def __init__(self, own: Sequence[Any]) -> None:
        super().__init__()
        self.constants: list[Callable[[], torch.Tensor]] = []
        self._known = list(own)  # kept, since a tensor that is gone leaves its id to another
        self._ids = {id(value) for value in own}
        self._found: list[tuple[torch.Tensor, int]] = []

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for tensor, _ in self._found)

    def require_unwritten(self) -> None:
        if any(writes_to(tensor) != before for tensor, before in self._found):
            raise WritesAroundError(
                "a loop whose number of steps depends on values writes into a tensor from before it",
                code=Code.VALUES_DECIDE,
                hint="give the tensor a new value in each step: x = x.index_copy(...)",
            )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in _tensors((args, kwargs)):
            if id(value) not in self._ids:
                self._add(value)
                self._found.append((value, writes_to(value)))
        if _is_constant(func, args):
            self.constants.append(partial(func, *args, **kwargs))
        result = func(*args, **kwargs)
        for value in _tensors(result):
            self._add(value)
        return result

    def _add(self, value: torch.Tensor) -> None:
        self._known.append(value)
        self._ids.add(id(value))


class _InPlaceOf(TorchFunctionMode):
    """Functions of PyTorch get other tensors than they are given, and constants are given, not made.

    Args:
        others: The others, by the ids of those in whose place they are.
        constants: In the order in which they are made.
    """

    def __init__(self, others: Mapping[int, torch.Tensor], constants: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._others, self._constants = others, iter(constants)

    def replaced(self, values: Any) -> Any:
        """Values with the others in their places."""
        return pytree.tree_map(lambda value: self._others.get(id(value), value), values)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _is_constant(func, args):
            return next(self._constants)
        args, kwargs = self.replaced(args), self.replaced(kwargs or {})
        result = func(*args, **kwargs)
        if is_tracing() and _tensors(result) and None in map(node_of, _tensors((args, kwargs))):
            raise AnotherStepError(
                "a loop whose number of steps depends on values takes something else in each step",
                code=Code.VALUES_DECIDE,
                hint="a graph has the step once: index a stack of tensors by the counter",
            )
        return result


def _is_constant(function: Any, args: tuple[Any, ...]) -> bool:
    return function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
