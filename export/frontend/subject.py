"""`Subject`: a module, the example inputs that its dimensions are read from, and how to call it.

A `Subject` is what every way of loading a model ends in, and all that the later stages know of the user's file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from moe_export.errors import Code, NotExportableError, UsageError
from moe_export.export.frontend.accept import (
    check_constants,
    check_inputs,
    check_outputs,
    plain_module,
    plain_weights,
    register_dataclasses,
)
from moe_export.export.frontend.caches import close_caches, inside_caches, open_caches
from moe_export.export.frontend.export_calls import NOTHING, Asked
from moe_export.export.frontend.first_calls import first_calls, is_tensor
from moe_export.export.frontend.names import argument_names, output_names, renamed
from moe_export.export.frontend.objects import close_objects, inside_objects, open_objects
from moe_export.export.frontend.pytree import Inside, Leaf, leaves
from moe_export.export.frontend.source import calls_user_code, forward_line, last_user_line
from moe_export.export.frontend.state import State
from moe_export.export.frontend.train_mode import note_on_mode
from moe_export.export.torch_compat.nesting import pytree
from moe_export.export.weights.lazy import LazyWeights
from moe_export.export.weights.zero import without_weights

calls_user_code(__file__)


class Apart(Protocol):
    """The model once more, where nothing but its own code runs: what graphs of it are held against."""

    def ask(self, kind: str, method: str, arrays: Sequence[Any], *more: Any) -> Any:
        """Run it once on arrays, in the order of the subject's inputs."""
        ...


@dataclass(frozen=True)
class Subject:
    """A model as it was found in the user's file.

    Attributes:
        module: The model, in eval mode.
        source: The file it comes from.
        how: How it was found, for the report.
        inputs: Example tensors by graph input name, in order.
        constants: Arguments that are no tensors and are fixed in the graph, by name.
        outputs: Names of the tensors that a call returns, in order.
        dropped: Outputs that are no tensors (`aux_loss = 0`) and so no outputs of a graph.
        changed: What every call changes (`buffer total`, `attribute rope.calls`); each call here starts from its first
            value.
        cached: What the first call alone changes.
        unread: Of `changed`, what no later call was seen to read: the second one gave the same outputs.
        weights: Where the weights are, if the model came without them.
        notes: What is to be said of how the model was found.
        free: `(input, axis)` → the name of each dimension that the user's own export call leaves free, None for the
            usual name; None if it says nothing of dimensions.
        apart: The same model where nobody else touches it, if it was loaded with one.
        root: The path in `module` below which weights have the names of the user's model; "" for its own.
    """

    module: nn.Module
    source: Path
    how: str
    inputs: Mapping[str, torch.Tensor]
    constants: Mapping[str, Any]
    outputs: tuple[str, ...]
    dropped: Mapping[str, Any]
    changed: frozenset[str]
    cached: frozenset[str]
    state: State = field(repr=False)
    _spec: pytree.TreeSpec = field(repr=False)
    _template: tuple[Any, ...] = field(repr=False)
    _inside: Inside | None = field(default=None, repr=False)
    weights: LazyWeights | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    unread: frozenset[str] = frozenset()
    free: Mapping[tuple[str, int], str | None] | None = None
    apart: Apart | None = field(default=None, repr=False)
    root: str = ""

    def of(self, module: nn.Module) -> Subject:
        """The same with another module: a copy of its own, in other types or on another device."""
        return replace(self, module=module, state=self.state.like(module), apart=None)

    def with_names(self, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> Subject:
        """The same with other names for its first inputs and outputs.

        Raises:
            UsageError: There are more names than inputs or outputs.
        """
        for kind, given, own in (("input", inputs, self.inputs), ("output", outputs, self.outputs)):
            if len(given) > len(own):
                raise UsageError(
                    f"{len(given)} {kind} names for {len(own)} {kind}{'s' * (len(own) != 1)}",
                    where=str(self.source),
                    hint=f"in order, they are: {', '.join(own)}",
                )
        names = renamed(list(self.inputs), inputs, (True for _ in self.inputs))
        now = dict(zip(self.inputs, names, strict=True))
        taken = frozenset(names)
        free = self.free
        return replace(
            self,
            inputs=dict(zip(names, self.inputs.values(), strict=True)),
            outputs=tuple(renamed(self.outputs, outputs, (True for _ in self.outputs), taken)),
            free=None if free is None else {(now[name], axis): dim for (name, axis), dim in free.items()},
        )

    def call(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run the model on flat tensors, in the order of `inputs`; the outputs in the order of `outputs`."""
        with self.state.kept(), without_weights(self.weights):
            return tuple(leaf.value for leaf in self.call_leaves(tensors) if leaf.is_tensor)

    def call_leaves(self, tensors: Sequence[torch.Tensor]) -> list[Leaf]:
        """Run the model once; everything that it returns, `dropped` included. What it does to its state stays."""
        args, kwargs = self.arguments(tensors)
        return self.leaves_of(lambda: self.module(*args, **kwargs))

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model's forward takes, made of flat tensors: by position, and by name."""
        queue = iter(tensors)
        filled = [item.filled(next(queue)) if isinstance(item, _Slot) else item for item in self._template]
        args, kwargs = _closed(pytree.tree_unflatten(filled, self._spec))
        return tuple(args), dict(kwargs)

    def leaves_of(self, call: Callable[[], Any]) -> list[Leaf]:
        """All that a call of the model returns, which is made here."""
        with torch.compiler.set_stance("force_eager"):
            return [_in_pairs(leaf) for leaf in leaves(call(), inside=self._inside)]

    def call_named(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run the model on tensors by input name, for its values.

        Raises:
            UsageError: Its weights are in files, and more than are read as a whole.
        """
        self.require_weights()
        return self.call([tensors[name] for name in self.inputs])

    def require_weights(self) -> None:
        """Refuse what asks for values where there are none.

        Raises:
            UsageError: The weights are in files, and more than are read as a whole.
        """
        if self.weights is not None and self.weights.absent:
            raise UsageError(
                "this runs the model as a whole, and its weights are not in memory: "
                f"{self.weights.nbytes / 2**30:.1f} GiB in {self.weights.files[0].name} and others",
                where=str(self.source),
                hint="load them in the model file, with load_state_dict; export and verify need not: docs/weights.md",
            )


@dataclass(frozen=True)
class _Slot:
    """Stands where a tensor goes in the flattened arguments.

    Attributes:
        pairs: Whether the model takes complex numbers there, which are given as pairs along a last axis.
    """

    pairs: bool

    def filled(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the model takes."""
        return torch.view_as_complex(tensor.contiguous()) if self.pairs else tensor


def _as_pairs(tensor: torch.Tensor) -> torch.Tensor:
    """Complex numbers as pairs along a last axis; any other tensor as it is."""
    if tensor.is_neg():  # PyTorch's imaginary part of a conjugate
        return tensor.resolve_neg()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _in_pairs(leaf: Leaf) -> Leaf:
    return replace(leaf, value=_as_pairs(leaf.value)) if leaf.is_tensor else leaf


def make_subject(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    source: Path,
    how: str,
    weights: LazyWeights | None = None,
    asked: Asked = NOTHING,
) -> Subject:
    """Bind example arguments to a module, run it once, and name its inputs and outputs.

    Args:
        module: The model.
        args: By position.
        kwargs: By name.
        source: The file that it comes from.
        how: How it was found there.
        weights: Where its weights are, if it came without them.
        asked: Names and free dimensions, as the user's own export call has them.

    Raises:
        UsageError: The arguments do not fit `forward`, or `forward` raises on them.
        NotExportableError: The model returns no tensor, or it or an argument is of a kind that ONNX lacks.
    """
    module = plain_module(module, source)
    as_floats = plain_weights(module)
    awake = [part for part in module.modules() if part.training]
    module.eval()
    register_dataclasses((args, kwargs))
    args, kwargs = open_objects(open_caches((tuple(args), dict(kwargs)), source))
    inside = _either(inside_caches((args, kwargs)), inside_objects((args, kwargs)))
    flat, spec = pytree.tree_flatten((args, kwargs))
    names = argument_names(module, args, kwargs, source, flat)
    names = renamed(names, asked.input_names, map(is_tensor, flat))
    tensors = {
        name: _as_pairs(value.detach()) for name, value in zip(names, flat, strict=True) if is_tensor(value)
    }
    check_constants(
        {name: value for name, value in zip(names, flat, strict=True) if not is_tensor(value)}, source
    )
    if not tensors:
        raise UsageError(
            f"the example inputs of {type(module).__name__} hold no tensor, but {_kinds(flat)}",
            where=str(source),
            hint="give example_inputs as a tuple or dict of tensors",
        )
    check_inputs(tensors, source)
    with without_weights(weights):
        ran = first_calls(
            module, lambda: list(leaves(_run(module, args, kwargs, source), inside=inside)), source
        )
    found = ran.found
    outputs, dropped = output_names(module, found, tensors)
    outputs = renamed(outputs, asked.output_names, (True for _ in outputs), taken=set(tensors))
    check_outputs(
        dict(zip(outputs, (leaf.value for leaf in found if leaf.is_tensor), strict=True)),
        forward_line(module),
    )
    if not outputs:
        raise NotExportableError(
            f"{type(module).__name__}.forward returns no tensor but {_kinds([leaf.value for leaf in found])}, "
            "so there is no graph to write",
            code=Code.NO_OUTPUT,
            where=forward_line(module),
            hint="return tensors, in tuples, lists, dicts or dataclasses, or in a class that is registered: "
            "torch.utils._pytree.register_pytree_node",
        )
    notes = (*(weights.notes if weights is not None else ()), *as_floats)
    notes += tuple(
        f"{kind} {name} is complex, and has pairs of a real and an imaginary part along a last axis in the graph"
        for kind, names_of, values in (
            ("input", tensors, filter(is_tensor, flat)),
            ("output", outputs, (leaf.value for leaf in found if leaf.is_tensor)),
        )
        for name, value in zip(names_of, values, strict=True)
        if value.is_complex()
    )
    subject = Subject(
        module=module,
        source=source,
        how=how,
        inputs=tensors,
        constants={
            name: value
            for name, value in zip(names, flat, strict=True)
            if not is_tensor(value) and value is not None
        },
        outputs=tuple(outputs),
        dropped=dropped,
        changed=ran.changed,
        cached=ran.cached,
        unread=ran.unread,
        state=ran.state,
        _spec=spec,
        _template=tuple(_Slot(value.is_complex()) if is_tensor(value) else value for value in flat),
        _inside=inside,
        weights=weights,
        free=None if asked.free is None else _free_dims(tensors, asked),
        notes=notes,
    )
    if weights is not None and weights.absent:
        return subject
    example = tuple(tensors.values())
    return replace(
        subject,
        notes=(*notes, *note_on_mode(module, awake, lambda: subject.call([t.clone() for t in example]))),
    )


def _closed(arguments: Any) -> Any:
    """The arguments as the model takes them: caches and objects made of their tensors."""
    return close_objects(close_caches(arguments))


def _either(one: Inside | None, other: Inside | None) -> Inside | None:
    """How to look into what either way looks into."""
    if one is None or other is None:
        return one or other
    return lambda value: other(value) if (held := one(value)) is None else held


def _free_dims(tensors: Mapping[str, torch.Tensor], asked: Asked) -> dict[tuple[str, int], str | None]:
    return {
        (name, axis % max(1, tensor.dim())): dim
        for (name, tensor), axes in zip(tensors.items(), asked.free or (), strict=False)
        for axis, dim in axes.items()
    }


def _kinds(values: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(type(value).__name__ for value in values)) or "nothing at all"


def _run(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], source: Path) -> Any:
    """One eager call on copies of the example inputs, so that an in-place model cannot change them."""
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if is_tensor(leaf) else leaf, (args, kwargs))
    given, named = _closed((args, kwargs))
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return module(*given, **named)
    except Exception as error:
        shapes = ", ".join(
            f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
            for leaf in pytree.tree_leaves((args, kwargs))
            if is_tensor(leaf)
        )
        raise UsageError(
            f"{type(module).__name__}.forward raised {type(error).__name__}: {error}",
            where=last_user_line(error) or str(source),
            hint=f"it was called with the example inputs {shapes}; do they have the right shapes and dtypes?",
        ) from error
