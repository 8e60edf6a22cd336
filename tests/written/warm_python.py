"""Python programs, each in a process of its own, without the seconds that each would spend importing PyTorch.

One process imports the libraries that they share, nothing of this project, and waits; every program runs in a fork of
it, as `python -c`, `python file.py` or `python -m module` would run it: its own `__main__`, arguments, folder,
environment, output and exit code.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

SHARED = ("torch", "torch.export", "torch.onnx", "torch._dynamo", "torch._inductor.codecache", "onnx")
SHARED += ("onnx_ir", "onnxruntime", "onnxscript", "onnxscript.function_libs.torch_lib.ops")


def run(arguments: Sequence[str], folder: Path, env: Mapping[str, str]) -> tuple[int, str, str]:
    """What `python ARGUMENTS` gives: its exit code, what it printed, and to where errors go.

    Args:
        arguments: `-c CODE`, `FILE ...` or `-m MODULE ...`, before it perhaps `-W ignore`.
        folder: Where it runs.
        env: Its environment.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as files:
        out, err = Path(files, "out"), Path(files, "err")
        asked = {
            "arguments": [*arguments],
            "folder": str(folder),
            "env": dict(env),
            "files": [str(out), str(err)],
        }
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")


@functools.cache
def _server() -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )

    def end() -> None:
        server.communicate()

    atexit.register(end)
    return server


def _serve() -> None:
    import importlib

    for name in SHARED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(asked)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(asked: dict) -> None:
    """Be the program that was asked for; this never returns."""
    for descriptor, path in enumerate([os.devnull, *asked["files"]]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["env"])
    code = _code_of(asked["arguments"])
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _code_of(arguments: list[str]) -> int:
    import traceback

    try:
        _run(arguments)
    except SystemExit as done:
        if isinstance(done.code, str):
            print(done.code, file=sys.stderr)
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(arguments: list[str]) -> None:
    import runpy
    import types
    import warnings

    if arguments[:2] == ["-W", "ignore"]:
        warnings.simplefilter("ignore")
        arguments = arguments[2:]
    if arguments[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if arguments[0] == "-c":
        sys.path[0], sys.argv, name, text = "", ["-c", *arguments[2:]], "<string>", arguments[1]
    else:
        path = Path(arguments[0])
        sys.path[0], sys.argv, name, text = (
            str(path.absolute().parent),
            arguments,
            str(path),
            path.read_text(),
        )
        main.__dict__["__file__"] = name
    exec(compile(text, name, "exec", dont_inherit=True), main.__dict__)


if __name__ == "__main__":
    _serve()
