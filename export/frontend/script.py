"""Run a user's file and see what it defines, or what it calls.

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
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from moe_export.errors import UsageError
from moe_export.export.frontend.export_calls import Made
from moe_export.export.frontend.kernel_shims import install_kernel_shims
from moe_export.export.frontend.source import calls_user_code, last_user_line
from moe_export.export.frontend.watch import Call, CallSeen, Watch
from moe_export.export.torch_compat.after_export import without_files
from moe_export.export.torch_compat.devices import on_the_cpu
from moe_export.export.torch_compat.export_calls import export_calls
from moe_export.export.torch_compat.modules import calls_of_modules

calls_user_code(__file__)


def run_file(
    path: Path, *, as_script: bool, stop_at_call: bool, names_model: bool = False
) -> tuple[ModuleType | None, Call | None]:
    """Execute a file and return its namespace and its export call, or the first outermost module call in it.

    An export call ends it (`watch`). A file that has one is not ended before, whatever it calls.

    Args:
        path: The Python file. Its folder is importable while it runs, and stays so afterwards, because
            models import lazily.
        as_script: Run under the name `__main__`, so that the demonstration behind the main guard runs.
        stop_at_call: End a file that exports nothing at its first module call instead of letting it run on.
        names_model: The file defines `model` and `example_inputs`.

    Returns:
        The module (None if it was ended early) and the call (None if there was none).

    Raises:
        UsageError: The file has a syntax error, or raises.
    """
    source = _read(path)
    watch = Watch(source, ends=stop_at_call, names_model=names_model)
    module, error = _run(path, source, watch, as_script)
    if error is not None and not any(call.exporter for call in watch.calls):
        raise _file_error(path, error) from error
    return module, watch.found


def calls_in(path: Path, pick: int | None = None) -> tuple[list[Call], UsageError | None]:
    """Every call in a script, each answered by a stand-in; with `pick`, up to that one.

    Returns:
        The calls in order, and what the script failed with behind the last of them.

    Raises:
        UsageError: It has a syntax error, or raises before it calls anything.
    """
    source = _read(path)
    watch = Watch(source, ends=False, every=True, pick=pick)
    _, error = _run(path, source, watch, as_script=True)
    failed = None if error is None else _file_error(path, error)
    if failed is not None and not watch.calls:
        raise failed from error
    return watch.calls, failed


def picked_call(path: Path, number: int) -> Call:
    """A call in a script by its number, from 1.

    Raises:
        UsageError: There are not so many.
    """
    calls, failed = calls_in(path, number)
    if 0 < number <= len(calls):
        return calls[number - 1]
    found = f"{len(calls)} call{'s' * (len(calls) != 1)}"
    if failed is not None:
        raise UsageError(
            f"{path.name} makes {found} and then fails, so there is no call {number}: {failed.what}",
            where=failed.where,
        )
    raise UsageError(
        f"{path.name} makes {found}, so there is no call {number}",
        where=str(path),
        hint=f"moe-export {path.name} --list shows them",
    )


def _read(path: Path) -> bytes:
    source = path.read_bytes()
    try:
        compile(source, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise _file_error(path, error) from error
    return source


def _run(
    path: Path, source: bytes, watch: Watch, as_script: bool
) -> tuple[ModuleType | None, BaseException | None]:
    """Execute a file under a watch; its namespace, None if a call ended it, and what it failed with."""
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
    watch.namespace = module.__dict__
    # Compiled here and not by the loader, which would leave a __pycache__ beside the user's file.
    code = compile(source, str(path), "exec", dont_inherit=True)
    with (
        _as_main(path, module, as_script),
        on_the_cpu(),
        without_files(watch.files, Made, Made()) if watch.every else contextlib.nullcontext(),
        calls_of_modules(watch.on_module),
        export_calls(watch.on_export, watch.compiled.append),
    ):
        try:
            exec(code, module.__dict__)
        except CallSeen as seen:
            watch.calls = [call for call in watch.calls if call is not seen.call]
            watch.calls.insert(len(watch.calls) if watch.every else 0, seen.call)
            return None, None
        except SystemExit as error:
            return module, error if error.code else None
        except Exception as error:
            return module, error
    return module, None


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
