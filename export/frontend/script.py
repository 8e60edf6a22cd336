"""Run a user's file and see what it defines, or which module it calls first.

A script that exports its module (`torch.onnx.export(model, (x,), "m.onnx", ...)`) has said all that is needed, and
ends there (`export_calls`). One that only shows its module working (`model = Block(); print(model(x).shape)`) is a
model file too: the first outermost `nn.Module` that it calls, with the real arguments of that call, is the model.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from moe_export.errors import UsageError
from moe_export.export.frontend.export_calls import NOTHING, Asked, exports, read
from moe_export.export.frontend.kernel_shims import install_kernel_shims
from moe_export.export.frontend.source import calls_user_code, last_user_line
from moe_export.export.torch_compat.export_calls import export_calls
from moe_export.export.torch_compat.modules import calls_of_modules

calls_user_code(__file__)


@dataclass(frozen=True)
class Call:
    """A script's own export call, or its first outermost module call.

    Attributes:
        exporter: What it exports with, `torch.onnx.export`; None of a call of the module.
        asked: What an export call asks for besides.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    exporter: str | None = None
    asked: Asked = NOTHING


class _CallSeen(BaseException):
    """Ends a script at a call. No `Exception`, so that `except Exception` lets it pass."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def run_file(path: Path, *, as_script: bool, stop_at_call: bool) -> tuple[ModuleType | None, Call | None]:
    """Execute a file and return its namespace and its export call, or the first outermost module call in it.

    An export call ends it. A file that has one is not ended before, whatever it calls.

    Args:
        path: The Python file. Its folder is importable while it runs, and stays so afterwards, because
            models import lazily.
        as_script: Run under the name `__main__`, so that the demonstration behind the main guard runs.
        stop_at_call: End a file that exports nothing at its first module call instead of letting it run on.

    Returns:
        The module (None if it was ended early) and the call (None if there was none).

    Raises:
        UsageError: The file has a syntax error, or raises.
    """
    _import_folder(path)
    install_kernel_shims()
    package = _package_of(path)
    _import_package(package)
    loader = importlib.machinery.SourceFileLoader(
        f"{package}.{path.stem}" if package else _free_name(path.stem), str(path)
    )
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)  # its package, for relative imports, is the spec's parent
    if as_script:
        module.__name__ = "__main__"
    calls: list[Call] = []
    source = path.read_bytes()
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
        stop_at_call = stop_at_call and not exports(source)
    except (SyntaxError, ValueError) as error:
        raise _file_error(path, error) from error
    with _as_main(path, module, as_script), _watch_calls(calls, stop_at_call), export_calls(_end_at_export):
        try:
            # Compiled here and not by the loader, which would leave a __pycache__ beside the user's file.
            exec(code, module.__dict__)
        except _CallSeen as seen:
            return None, seen.call
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and not error.code:
                return module, calls[0] if calls else None
            raise _file_error(path, error) from error
    return module, calls[0] if calls else None


def _file_error(path: Path, error: BaseException) -> UsageError:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return UsageError(f"{path.name} has a syntax error: {error.msg}", where=f"{path}:{error.lineno}")
    if isinstance(error, SystemExit):
        return UsageError(
            f"{path.name} ended itself before it called a module: sys.exit({error.code!r})",
            where=last_user_line(error) or str(path),
            hint="a model file is run without arguments; define `model` and `example_inputs` in it",
        )
    hint = None
    if isinstance(error, ModuleNotFoundError):
        hint = f"install {error.name!r} beside moe-export, or put it into the folder of {path.name}"
    return UsageError(
        f"{path.name} raised {type(error).__name__}: {error}",
        where=last_user_line(error) or str(path),
        hint=hint,
    )


def _import_folder(path: Path) -> None:
    """Make what the file imports from its own folder, or as a sibling in its package, findable."""
    for folder in (str(path.parent), str(_package_root(path))):
        if folder not in sys.path:
            sys.path.insert(0, folder)


def _package_root(path: Path) -> Path:
    folder = path.parent
    while (folder / "__init__.py").exists() and folder.parent != folder:
        folder = folder.parent
    return folder


def _package_of(path: Path) -> str:
    """The dotted package for relative imports; empty for a file that lies in none."""
    return ".".join(path.parent.relative_to(_package_root(path)).parts)


def _import_package(package: str) -> None:
    """Import the package that the file lies in before the file, as Python does: its modules may import one another.

    What fails in it may not matter to the file; what does fails again there.
    """
    if package:
        with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(package)


def _free_name(stem: str) -> str:
    """A module name that hides nothing that is already imported or importable (a file named `torch.py`)."""
    name = stem.replace(".", "_")
    with contextlib.suppress(ImportError, ValueError):
        if name in sys.modules or importlib.machinery.PathFinder.find_spec(name, sys.path[2:]):
            return f"_subject_{name}"
    return name


@contextlib.contextmanager
def _as_main(path: Path, module: ModuleType, as_script: bool) -> Iterator[None]:
    """While it runs: the file's arguments, its entry in `sys.modules`, and its prints kept off stdout."""
    saved, argv = sys.modules.get(module.__name__), sys.argv
    sys.modules[module.__name__] = module
    sys.argv = [str(path)]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.argv = argv
        if as_script and saved is not None:
            sys.modules[module.__name__] = saved


def _watch_calls(calls: list[Call], stop: bool) -> contextlib.AbstractContextManager[None]:
    """Record the first module call that is not inside another one."""

    def watched(original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not calls:
            call = Call(module, args, kwargs)
            calls.append(call)
            if stop:
                raise _CallSeen(call)
        return original(module, *args, **kwargs)

    return calls_of_modules(watched)


def _end_at_export(exporter: str, given: Mapping[str, Any]) -> None:
    found = read(given)
    if found is not None:
        raise _CallSeen(Call(*found[:3], exporter, found[3]))
