"""`load_subject`: what a model file is, tried in a fixed order.

1. it defines `model` (an `nn.Module`, a function without arguments that returns one, or a free function of tensors)
   and `example_inputs` (a tuple, a dict, or a function returning one);
2. `model.py:ClassName`, or a free function's name, with `--init dim=512` and `--input x=2x10x512:float32`;
3. otherwise it is run as a script: what it gives to `torch.onnx.export`, `torch.export.export` or `torch.jit.trace` is
   the model with its arguments, names and free dimensions; of a script without an export, the first outermost module
   that it calls, with the arguments of that call. `script.py:2` is the second of all its calls.
"""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from moe_export.errors import UsageError
from moe_export.export.frontend.arguments import parse_init, parse_input
from moe_export.export.frontend.ended import no_exit
from moe_export.export.frontend.export_calls import LAST, exports
from moe_export.export.frontend.functions import as_module, needs_arguments
from moe_export.export.frontend.kernel_shims import forget_calls, note_on_shims
from moe_export.export.frontend.pretrained import is_pretrained, load_pretrained
from moe_export.export.frontend.script import picked_call, run_file
from moe_export.export.frontend.source import calls_user_code, last_user_line
from moe_export.export.frontend.subject import Apart, Subject, make_subject
from moe_export.export.frontend.watch import Call
from moe_export.export.torch_compat.nesting import pytree
from moe_export.export.weights.lazy import MEMORY, LazyWeights, attach_weights

calls_user_code(__file__)

Make = Callable[..., Subject]


def load_subject(
    spec: str | Path,
    *,
    init: Sequence[str] = (),
    inputs: Sequence[str] = (),
    memory: int = MEMORY,
    apart: Callable[[Callable[[nn.Module], Subject], nn.Module], Apart | None] | None = None,
) -> Subject:
    """Load the model that `spec` names.

    Random numbers start anew, so that a file which makes its weights, and seeds nothing, makes the same ones when it is
    loaded again to be verified.

    Args:
        spec: `model.py`, `model.py:ClassName`, or `script.py:2` for the second of its calls; or the path of the file.
        init: Arguments of the class, `name=value` (a Python literal; anything else is a string).
        inputs: Example inputs of the class, `name=2x10x512:float32`.
        memory: Weights that a file names (`weights = "model.safetensors"`) are read at once up to so many bytes.
        apart: Starts a reference on which nothing of ours runs; given how to bind a module to its example, and the
            model, which has not been run yet. Not asked where weights are not in memory.

    Raises:
        UsageError: There is no such file, it cannot be run, or no model (or no single one) is in it.
    """
    with no_exit(), _same_numbers():
        forget_calls()
        subject = _load(str(spec), init, inputs, memory, partial(_made, apart))
        note = note_on_shims(subject.module)
    return replace(subject, notes=(*subject.notes, note)) if note else subject


def _made(
    apart: Callable[[Callable[[nn.Module], Subject], nn.Module], Apart | None] | None,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    **facts: Any,
) -> Subject:
    """The subject, and the reference that is started before the model has run."""

    def bind(module: nn.Module) -> Subject:
        return make_subject(module, args, kwargs, **facts)

    weights = facts.get("weights")
    if apart is None or (weights is not None and weights.absent):
        return bind(module)
    started = apart(bind, module)
    return replace(bind(module), apart=started)


@contextmanager
def _same_numbers() -> Iterator[None]:
    """Seeds of Python, NumPy and PyTorch that are the same each time, and nobody else's."""
    python, state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(state)


def _load(spec: str, init: Sequence[str], inputs: Sequence[str], memory: int, make: Make) -> Subject:
    path, name = split_spec(spec)
    if path.is_dir() and is_pretrained(path):
        if init or inputs:
            raise UsageError("--init and --input go with a class, not with a folder", where=str(path))
        return load_pretrained(path, memory, make)
    source = _read(path)
    if name is not None and name.isdecimal():
        if init or inputs:
            raise UsageError("--init and --input go with a class, not with a call of a script")
        return _from_call(picked_call(path, int(name)), path, make, int(name))
    if name is not None:
        module, _ = run_file(path, as_script=False, stop_at_call=False)
        assert module is not None
        return _from_class(module, name, path, init, inputs, make)
    if init or inputs:
        raise UsageError(
            "--init and --input go with a class", hint=f"name it: moe-export {path}:ClassName --init ..."
        )
    return _from_file(path, source, memory, make)


def split_spec(spec: str) -> tuple[Path, str | None]:
    """`model.py:Name` or `script.py:2` → the path, and the name or number; a drive letter's colon is none of it."""
    head, _, tail = spec.rpartition(":")
    if head and (tail.isidentifier() or tail.isdecimal()):
        return Path(head).absolute(), tail
    return Path(spec).absolute(), None


def _read(path: Path) -> str:
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder without config.json",
            hint="give the Python file that holds the model, or the folder of a transformers model",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} as Python source: {error}") from None
    try:
        ast.parse(text, str(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        reason = getattr(error, "msg", str(error))
        raise UsageError(
            f"{path.name} has a syntax error: {reason}", where=f"{path}:{line}" if line else str(path)
        ) from None
    return text


def _from_file(path: Path, source: str, memory: int, make: Make) -> Subject:
    """Ways 1 and 3. A file that cannot define both names is ended at its first call, before it trains for hours."""
    defines_both = {"model", "example_inputs"} <= _top_level_names(source)
    module, call = run_file(path, as_script=False, stop_at_call=not defines_both, names_model=defines_both)
    if defines_both and module is not None and _has_both(module):
        return _from_names(module, path, memory, make)
    if call is None:
        _, call = run_file(path, as_script=True, stop_at_call=True)
    if call is None:
        raise _half_a_model(path, module) or _no_model(path, module)
    return _from_call(call, path, make)


def _half_a_model(path: Path, module: ModuleType | None) -> UsageError | None:
    """One of the two names is there, and the other is missing or something else."""
    model, example = (getattr(module, name, None) for name in ("model", "example_inputs"))
    if model is None and example is None:
        return None
    if model is None:
        return UsageError(
            f"{path.name} defines `example_inputs` but no `model`",
            where=str(path),
            hint="define `model`, an nn.Module or a function without arguments that returns one",
        )
    if not isinstance(model, nn.Module) and not callable(model):
        return UsageError(
            f"`model` in {path.name} is a {type(model).__name__}, not an nn.Module",
            where=str(path),
            hint="let `model` be an nn.Module or a function without arguments that returns one",
        )
    parameters = _forward_parameters(model)
    return UsageError(
        f"{path.name} defines `model` but no `example_inputs`, and does not call it",
        where=str(path),
        hint=f"define example_inputs, a tuple or dict of tensors for forward{parameters}",
    )


def _forward_parameters(model: Any) -> str:
    try:
        return str(inspect.signature(model.forward if isinstance(model, nn.Module) else model))
    except (AttributeError, TypeError, ValueError):
        return ""


def _top_level_names(source: str) -> set[str]:
    """Every name that the file may bind at its top level, also inside `if`, `with` and `try`."""
    names: set[str] = set()
    stack: list[ast.AST] = list(ast.parse(source).body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if isinstance(node, ast.alias):
            names |= {"model", "example_inputs"} if node.name == "*" else {node.asname or node.name}
        stack += ast.iter_child_nodes(node)
    return names


def _has_both(module: ModuleType) -> bool:
    """Modules are callable too; a class or a `functools.partial` makes one when it is called."""
    model = getattr(module, "model", None)
    return getattr(module, "example_inputs", None) is not None and callable(model)


def _from_names(module: ModuleType, path: Path, memory: int, make: Make) -> Subject:
    model: Any = module.model
    if needs_arguments(model):
        model = as_module(model)
    if not isinstance(model, nn.Module):
        model = _call_user(model, "model", path)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model() returned {type(model).__name__}, not an nn.Module",
            where=str(path),
            hint="let `model` be an nn.Module or a function without arguments that returns one",
        )
    example: Any = module.example_inputs
    if callable(example):
        example = _call_user(example, "example_inputs", path)
    how = "`model` and `example_inputs`"
    weights = _weights(module, model, path, memory)
    if isinstance(example, Mapping):
        return make(model, (), _tensors(example), source=path, how=how, weights=weights)
    if isinstance(example, (torch.Tensor, np.ndarray)):
        example = (example,)
    if not isinstance(example, (tuple, list)):
        raise UsageError(
            f"example_inputs is a {type(example).__name__}",
            where=str(path),
            hint="make it a tuple of forward's arguments, or a dict by their names",
        )
    return make(model, _tensors(tuple(example)), {}, source=path, how=how, weights=weights)


def _weights(module: ModuleType, model: nn.Module, path: Path, memory: int) -> LazyWeights | None:
    """The weights of a model on the meta device, from the files that `weights` names, seen from the model's file."""
    named: Any = getattr(module, "weights", None)
    if not isinstance(named, (str, Path)):
        return None
    if not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        return None  # it has its own, and `weights` is a name like any other
    return attach_weights(model, path.parent / named, memory, path)


def _tensors(arguments: Any) -> Any:
    """Arrays of NumPy, at whatever depth, as tensors."""
    return pytree.tree_map(
        lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, arguments
    )


def _call_user(function: Callable[[], Any], name: str, path: Path) -> Any:
    try:
        return function()
    except Exception as error:
        raise UsageError(
            f"{name}() raised {type(error).__name__}: {error}",
            where=last_user_line(error) or str(path),
            hint=f"`{name}` is called without arguments",
        ) from error


def _from_call(call: Call, path: Path, make: Make, number: int | None = None) -> Subject:
    how = f"the first module call of the script ({type(call.module).__name__})"
    if call.exporter is not None:
        how = f"the script's own call of {call.exporter} ({type(call.module).__name__})"
    if number is not None:
        how = f"call {number} of the script, {call.exporter or 'of a module'} ({type(call.module).__name__})"
    subject = make(call.module, call.args, call.kwargs, source=path, how=how, asked=call.asked)
    times = exports(path.read_bytes(), LAST)
    if number is not None or times < 2:
        return subject
    note = f"{path.name} exports {times} times, and this is one of them: --list shows all, --call picks one"
    return replace(subject, notes=(*subject.notes, note))


def _from_class(
    module: ModuleType, name: str, path: Path, init: Sequence[str], inputs: Sequence[str], make: Make
) -> Subject:
    """Way 2."""
    found = getattr(module, name, None)
    if isinstance(found, nn.Module):
        model: Any = found
    elif callable(found):
        options = dict(parse_init(item) for item in init)
        try:
            model = (
                as_module(partial(found, **options)) if needs_arguments(found, options) else found(**options)
            )
        except Exception as error:
            raise UsageError(
                f"{name}(**{options}) raised {type(error).__name__}: {error}",
                where=last_user_line(error) or str(path),
                hint="give the class its arguments with --init name=value",
            ) from error
    else:
        raise UsageError(f"{path.name} has no class {name}", hint=_candidates_hint(path, module))
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} in {path.name} is not an nn.Module", hint=_candidates_hint(path, module))
    if not inputs:
        raise UsageError(
            f"{name} needs example inputs: {name}.forward{inspect.signature(model.forward)}",
            hint="give each tensor: --input name=2x10x512:float32",
        )
    tensors = dict(parse_input(item, model) for item in inputs)
    return make(model, (), tensors, source=path, how=f"the class {name}")


def _module_classes(path: Path, module: ModuleType | None) -> list[str]:
    """The `nn.Module` classes that the file itself defines."""
    if module is None:
        return []
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    ]


def _candidates_hint(path: Path, module: ModuleType | None) -> str:
    classes = _module_classes(path, module)
    return (
        f"nn.Module classes in it: {', '.join(classes)}" if classes else "there is no nn.Module class in it"
    )


def _no_model(path: Path, module: ModuleType | None) -> UsageError:
    classes = _module_classes(path, module)
    if not classes:
        return UsageError(
            f"no model in {path.name}: it defines no `model`, no nn.Module class, and calls no module",
            hint="define `model` (an nn.Module) and `example_inputs` (a tuple or dict of tensors)",
        )
    what = "one nn.Module class" if len(classes) == 1 else f"{len(classes)} nn.Module classes"
    return UsageError(
        f"cannot tell which model to export: {path.name} has {what} ({', '.join(classes)}) "
        "but neither `model` and `example_inputs` nor a call of a module",
        hint=f"pick one: moe-export {path.name}:{classes[0]} --init ... --input name=2x10x512:float32",
    )
