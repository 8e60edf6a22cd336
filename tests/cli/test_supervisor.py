"""A process that ends says nothing about two outputs being equal: without a verdict no command exits with 0 or 1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import onnx
import onnxruntime
import pytest
import torch
from canaries import canary
from slow_cases import one_in, slow

from moe_export.equivalence import assert_equivalent
from moe_export.errors import UsageError

NET = """
import ctypes, os, pathlib, signal, sys, time
{first}
COUNT = f"CALLS_{{os.getpid()}}"  # what the model itself keeps is put back before each call
class Net(nn.Module):
    def forward(self, x):
        os.environ[COUNT] = str(int(os.environ.get(COUNT, 0)) + 1)
        if int(os.environ[COUNT]) >= {call}:
            {second}
        return x + 1
model = Net()
example_inputs = (torch.ones(2, 3),)
"""
FIRST_CALL, WHILE_TRACING = 1, 4


@pytest.fixture
def ending(write):
    """A model file that ends its process when it is imported, or at a call."""

    def ending(at_import="", forward="pass", call=FIRST_CALL):
        return write(NET.format(first=at_import, second=forward, call=call), "net.py")

    return ending


def line_with(path, text):
    return 1 + next(n for n, line in enumerate(path.read_text().splitlines()) if text in line)


@pytest.mark.parametrize("code", ["0", "1", "", "'words'"])
def test_forward_exits(command, ending, listing, tmp_path, code):
    path = ending(forward=f"sys.exit({code})")
    done = command(path)
    assert done.code == 2
    assert f"error: the model's code ended the process: sys.exit({code})\n" in done.err
    assert f"where: {path}:{line_with(path, 'sys.exit')}\n" in done.err
    assert listing(tmp_path) == ["net.py"]


def test_forward_exits_only_when_the_graph_is_compared(process, finished, write, texts):
    """As if it had been verified: exit code 0, and no word."""
    path = write(texts["model"].replace("return", "import sys; sys.exit(0) if len(x) != 2 else 0; return"))
    done = process("verify", finished / "block.onnx", "--against", path, "--no-localise")
    assert done.code == 2
    assert "the model's code ended the process: sys.exit(0)" in done.err


@pytest.mark.parametrize(
    "words",
    one_in(4, [["export"], ["verify", "GRAPH", "--against"], ["routing"], ["plan"]]),
)
def test_a_file_that_leaves_when_it_is_imported(process, ending, finished, words):
    path = ending(at_import="os._exit(0)")
    done = process(*(finished / "block.onnx" if word == "GRAPH" else word for word in words), path)
    assert done.code == 2
    assert "without a result, with exit status 0" in done.err
    assert "net.py" in done.err.splitlines()[0]  # the step names the file
    assert done.out == ""


@pytest.mark.parametrize(
    ("number", "call", "code", "said"),
    [
        slow(("SIGSEGV", FIRST_CALL, 2, "while loading ")),
        ("SIGSEGV", WHILE_TRACING, 3, "while looking for loops over a length"),
        slow(("SIGKILL", WHILE_TRACING, 3, "while looking for loops over a length")),
        slow(("SIGABRT", FIRST_CALL, 2, "while loading ")),
    ],
)
def test_a_signal_in_forward(process, ending, number, call, code, said):
    path = ending(forward=f"os.kill(os.getpid(), signal.{number})", call=call)
    done = process(path, "-o", "out")
    assert done.code == code
    last = done.err[done.err.index("error: ") :]
    assert last.startswith(f"error: the work was killed by {number} {said}")
    assert ("memory" in last) == (number == "SIGKILL")
    if number != "SIGKILL":  # which leaves nobody time to say where
        assert f"where: {path}:{line_with(path, 'os.kill')}\n" in last
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_memory_that_is_not_there(ending, tmp_path, env):
    path = ending(forward="x = torch.ones(2**40)")
    done = subprocess.run(
        [sys.executable, "-m", "moe_export", str(path)],
        capture_output=True, text=True, env=env, cwd=tmp_path, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_crash_behind_the_verdict_changes_nothing(process, ending):
    """What is unloaded when the process ends may crash, too; the verdict was there before."""
    path = ending(at_import="import atexit; atexit.register(lambda: os.kill(os.getpid(), signal.SIGSEGV))")
    done = process(path, "--no-verify")
    assert (done.code, "killed" in done.err) == (0, False)
    assert process("--help").code == 0


@pytest.mark.slow
def test_a_process_that_the_model_forks_hands_over_no_verdict(process, ending):
    """Both go on with our code: the copy's verdict is not the command's."""
    path = ending(at_import="if os.fork() == 0:\n    raise RuntimeError('the copy fails')\nos.wait()")
    done = process(path, "--no-verify")
    assert done.code == 0, done.err
    assert "the copy fails" in done.err


OURS = "moe-export itself failed while judging r.json: ZeroDivisionError"


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("ZeroDivisionError('ours')", 70, OURS),
        ("MemoryError", 2, "no memory is left while judging r.json"),
        ("RuntimeError('Failed to allocate memory for requested buffer')", 2, "no memory is left while"),
    ],
)
def test_a_defect_is_no_verdict(tmp_path, env, raised, code, said):
    """An exception that nobody expected keeps its traceback, and says neither equal nor not equal."""
    text = """
    import sys
    from moe_export import cli
    from moe_export.commands import judge
    from moe_export.supervisor import supervise, under_way

    def run_judge(**options):
        with under_way("judging r.json"):
            raise RAISED

    judge.run_judge = run_judge
    sys.exit(supervise(lambda: cli.run(["judge", "r.json"])))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text).replace("RAISED", raised)],
        capture_output=True, text=True, env=env, cwd=tmp_path, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == code
    assert f"error: {said}" in done.stderr
    assert ("Traceback" in done.stderr) == (code == 70)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_result_that_cannot_be_printed_is_no_verdict(finished, env):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "moe_export", "check", finished / "block.onnx"],
            stdout=full, stderr=subprocess.PIPE, text=True, env=env, check=False, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: cannot write: No space left on device\n" in done.stderr


def test_debug_keeps_the_exit_code(process):
    done = process("none.py", "--debug")
    assert done.code == 2
    assert "Traceback" in done.err


WAITS = 'pathlib.Path(__file__).with_name("reached").write_text(str(os.getpid())); time.sleep(120)'


def started(path, tmp_path, env):
    """An export that waits in the middle, and the process that does its work."""
    command = subprocess.Popen(
        [sys.executable, "-m", "moe_export", str(path), "-o", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    reached = tmp_path / "reached"
    end = time.monotonic() + 90
    while not (reached.exists() and reached.read_text()):
        assert time.monotonic() < end, "it never came so far"
        time.sleep(0.05)
    return command, int(reached.read_text())


def is_there(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_ending_the_parent_ends_the_work(ending, listing, tmp_path, env):
    command, worker = started(ending(forward=WAITS, call=WHILE_TRACING), tmp_path, env)
    assert worker != command.pid
    command.terminate()
    out, err = command.communicate(timeout=30)
    assert command.returncode == 128 + signal.SIGTERM
    assert (out, err.endswith("ended by SIGTERM; nothing more was written\n")) == ("", True)
    assert not is_there(worker)
    assert listing(tmp_path) == ["net.py", "reached"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has gone")
def test_killing_the_parent_kills_the_work(ending, tmp_path, env):
    command, worker = started(ending(forward=WAITS, call=WHILE_TRACING), tmp_path, env)
    command.kill()
    command.communicate(timeout=30)
    end = time.monotonic() + 30
    while is_there(worker):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_the_streams_are_the_terminals(ending, tmp_path, env):
    """A breakpoint in a model reads what is typed."""
    path = ending(at_import="typed = input(); print('typed', typed, sys.stdin.isatty())")
    done = subprocess.run(
        [sys.executable, "-m", "moe_export", str(path), "--no-verify", "--json"],
        input="word\n", capture_output=True, text=True, env=env, cwd=tmp_path, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    assert "typed word False\n" in done.stderr
    assert done.stdout.startswith("{")


@pytest.mark.slow
def test_a_spinner_that_dies_gives_the_cursor_back(ending, tmp_path, env):
    import pty

    path = ending(forward="os.kill(os.getpid(), signal.SIGSEGV)")
    ours, theirs = pty.openpty()
    command = subprocess.Popen(
        [sys.executable, "-m", "moe_export", str(path)],
        stdout=theirs, stderr=theirs, stdin=theirs, env={**env, "TERM": "xterm"}, cwd=tmp_path,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # how Linux says that a terminal was closed
        pass
    assert command.wait(timeout=30) == 2
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert b"killed by SIGSEGV while loading" in shown


def test_in_python_it_is_an_error_like_any_other(finished, write):
    from torch import nn, ones

    from moe_export.export import Options, export_subject, load_subject

    class Leaves(nn.Module):
        def forward(self, x):
            if torch_is_exporting() or self.now:
                sys.exit(0)
            return x

        now = False

    def torch_is_exporting():
        import torch

        return torch.compiler.is_exporting()

    with pytest.raises(UsageError, match=r"ended the process: sys\.exit\(0\)"):
        load_subject(str(write(NET.format(first="", second="sys.exit(0)", call=1))))
    from moe_export.export.frontend.subject import make_subject

    subject = make_subject(Leaves(), (ones(2, 3, 4),), {}, source=finished / "block.py", how="here")
    with pytest.raises(UsageError, match="ended the process") as caught:
        export_subject(subject, Options())
    assert caught.value.where.startswith(__file__)
    leaves = Leaves()
    leaves.now = True
    with pytest.raises(UsageError, match="ended the process"):
        assert_equivalent(leaves, ones(2, 3, 4), finished / "block.onnx")


def test_canary_what_libraries_say_where_memory_is_short():
    size = 2**46  # of float32: more than a process can address
    with canary(
        "src/moe_export/supervisor.py",
        "PyTorch and ONNX Runtime have no class for a lack of memory, and say `allocate memory`",
        todo="match the new words in `_guarded`, or the class if there is one now",
    ):
        with pytest.raises(RuntimeError, match="allocate memory"):
            torch.empty(size)
        shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [1], [size])
        node = onnx.helper.make_node("ConstantOfShape", ["shape"], ["y"])
        y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])
        graph = onnx.helper.make_graph([node], "large", [], [y], [shape])
        opsets = [onnx.helper.make_opsetid("", 17)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with pytest.raises(Exception, match="allocate memory"):  # a class of its own a status code
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {})
