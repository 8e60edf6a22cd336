"""What PyTorch computes anew at every trace and every translation, although it comes out the same: computed once.

Of a small graph this was more than half of the time:

- the table of ONNX functions, once a translation: it depends on the opset and on the libraries that are loaded;
- all operators that stand for others, as attributes, dozens of times a decomposition: there are more of them only when
  a library registers some;
- the types in the signatures of operators' kernels, 11,000 times a decomposition: nobody reads them; `typing` keeps
  what it was asked for, `collections.abc` does not;
- what is known of each node's value, where types of numbers are made equal before translating: nearly all of them come
  out as the program already says, so only nodes that are new or changed there are run;
- the layout of each value, which is noted beside what is known of it anyway: to find it, three conditions are decided
  for each shape, and nobody reads it;
- the Python code of a graph (`graph_code`);
- a fake tensor of each weight: PyTorch asks each weight a hundred things, and while a model is traced, all of them went
  through what listens to the model's code;
- the program itself: an exporter has it decomposed, which traces all of it once more, whether or not there is an
  operator in it to decompose.

Why: none of it is public, and nothing public makes it faster. Where PyTorch has it no more, or has it otherwise, its
own way is taken: that is slower, and as right.

Seen in torch 2.13.0 and 2.14.1 with onnxscript 0.7.2.
"""

from __future__ import annotations

import collections.abc
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._subclasses import fake_tensor
from torch.export import ExportedProgram

from moe_export.export.torch_compat.graph_code import code_when_called

_REGISTRIES: dict[tuple[int, bool], Any] = {}
_MATERIALIZED: list[list[str]] = []
_KEY = "CompositeImplicitAutograd"


@contextmanager
def cache_patches() -> Iterator[None]:
    """Inside, `torch.export` and `torch.onnx.export` compute what they compute, faster."""
    with ExitStack() as stack:
        for instead in (
            _registry,
            _registrations,
            _types,
            _known_values,
            _layouts,
            _fake_weights,
            code_when_called,
        ):
            stack.enter_context(instead())
        yield


@contextmanager
def _registry() -> Iterator[None]:
    """`ONNXRegistry.from_torchlib` makes a registry of an opset once, then copies it."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        theirs = ONNXRegistry.__dict__["from_torchlib"]
    except (ImportError, KeyError):
        theirs = None
    if not isinstance(theirs, classmethod):  # inside another `cache_patches`, or another PyTorch
        yield
        return
    make: Callable[..., Any] = theirs.__func__

    def from_torchlib(opset_version: int | None = None) -> Any:
        if opset_version is None:
            return make(ONNXRegistry)
        key = (opset_version, "torchvision" in sys.modules)  # whose operators exist when it is loaded
        if key not in _REGISTRIES:
            with _domains_only():
                _REGISTRIES[key] = make(ONNXRegistry, opset_version)
        ready, copy = _REGISTRIES[key], ONNXRegistry()
        copy.__dict__.update(ready.__dict__)
        copy.functions = {target: list(functions) for target, functions in ready.functions.items()}
        return copy

    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib)):
        yield


@contextmanager
def _domains_only() -> Iterator[None]:
    """The source of 500 functions is parsed for the domain of each, which its opset knows."""
    with ExitStack() as stack:
        with suppress(ImportError, KeyError, AttributeError):
            from onnxscript._internal.values import TracedOnnxFunction

            if isinstance(TracedOnnxFunction.__dict__["function_ir"], property):
                opset = property(lambda function: function.opset)
                stack.enter_context(mock.patch.object(TracedOnnxFunction, "function_ir", opset))
        yield


@contextmanager
def _registrations() -> Iterator[None]:
    """`_materialize_cpp_cia_ops` looks every operator up only if there are others than the last time."""
    try:
        from torch._export import utils

        materialize: Callable[[], None] = utils.__dict__["_materialize_cpp_cia_ops"]
        registered: Callable[[str], list[str]] = torch._C.__dict__[
            "_dispatch_get_registrations_for_dispatch_key"
        ]
    except (ImportError, KeyError):
        yield
        return

    def if_new() -> None:
        now = registered(_KEY)
        if now not in _MATERIALIZED:
            materialize()
            _MATERIALIZED[:] = [now]

    with mock.patch.object(utils, "_materialize_cpp_cia_ops", if_new):
        yield


@contextmanager
def _types() -> Iterator[None]:
    """`torch._ops` writes types with `typing.Callable`, which remembers what it was asked for."""
    import torch._ops as ops

    if ops.__dict__.get("Callable") is collections.abc.Callable:
        with mock.patch.object(ops, "Callable", typing.Callable):
            yield
    else:
        yield


@contextmanager
def _known_values() -> Iterator[None]:
    """The pass that makes types of numbers equal takes what the program knows of a value, instead of running its node.

    It asks for the types of a node's inputs, whose nodes are the program's own or were run by the pass itself, which
    notes what they gave. A node of which nothing is known is run.
    """
    try:
        from torch.onnx._internal.fx.passes import type_promotion

        interpreter: Any = vars(type_promotion)["_TypePromotionInterpreter"]
        promote: Callable[[Any, fx.Node, Any], fx.Node] = vars(interpreter)["_maybe_promote_node"]
        original: Callable[[Any, fx.Node], Any] = vars(interpreter)["run_node"]
        rule_of: Callable[[fx.Node, Any], Any] = type_promotion.get_type_promotion_rule
    except (ImportError, KeyError, AttributeError):
        yield
        return

    def run_node(running: Any, node: fx.Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return original(running, node)
        rule = rule_of(node, running.type_promotion_table)
        if rule is not None:
            with running._set_current_node(node):
                promote(running, node, rule)
        return node.meta["val"]

    with mock.patch.object(interpreter, "run_node", run_node):
        yield


@contextmanager
def _layouts() -> Iterator[None]:
    """A trace notes shape, strides and dtype of a value (`tensor_meta`), not by which words its layout is called."""
    from torch.fx.experimental import proxy_tensor

    theirs: Callable[..., Any] | None = vars(proxy_tensor).get("_extract_tensor_metadata")
    if theirs is None or "include_contiguity" not in inspect.getfullargspec(theirs).args:
        yield
        return
    without = partial(theirs, include_contiguity=False)
    with mock.patch.object(proxy_tensor, "_extract_tensor_metadata", without):
        yield


@contextmanager
def _fake_weights() -> Iterator[None]:
    """`FakeTensorMode.from_tensor` looks at a plain tensor unheard by function modes."""
    original: Callable[..., Any] = fake_tensor.FakeTensorMode.from_tensor

    def from_tensor(mode: Any, tensor: torch.Tensor, **how: Any) -> Any:
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        with torch._C.DisableTorchFunction() if plain else nullcontext():
            return original(mode, tensor, **how)

    with mock.patch.object(fake_tensor.FakeTensorMode, "from_tensor", from_tensor):
        yield


def decomposed_if_needed(program: ExportedProgram) -> ExportedProgram:
    """A program that is not traced once more by an exporter that has nothing to decompose in it.

    Args:
        program: The caller's own; changed in place.
    """

    def run_decompositions(
        table: Mapping[Any, Any] | None = None, *rest: Any, **others: Any
    ) -> ExportedProgram:
        if table is not None and not _has_any(program.graph, table):
            program.graph.eliminate_dead_code()
            return program
        decomposed: ExportedProgram = type(program).run_decompositions(program, table, *rest, **others)
        return decomposed

    program.run_decompositions = run_decompositions
    return program


def _has_any(graph: fx.Graph, table: Mapping[Any, Any]) -> bool:
    """Whether there may be something to decompose.

    A graph inside another may have it, and so may a node of which the example value is to be found out.
    """
    return any(
        node.op == "call_module"
        or (node.op != "output" and "val" not in node.meta)
        or (
            node.op == "call_function"
            and (node.target in table or isinstance(node.target, torch._ops.HigherOrderOperator))
        )
        for node in graph.nodes
    )
