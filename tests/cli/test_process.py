"""The real command in a process of its own: start-up, signals, the server of `view`."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from slow_cases import one_in

import moe_export
from moe_export.errors import READER_GONE


def test_version(process):
    done = process("--version")
    assert (done.code, done.out, done.err) == (0, f"moe-export {moe_export.__version__}\n", "")


@pytest.mark.parametrize(
    "args", one_in(2, [["--help"], ["export", "--help"], ["verify", "-h"], ["rewrite", "-h"], ["view", "-h"]])
)
def test_help_is_fast_because_nothing_heavy_is_imported(args):
    code = (
        "import sys\nfrom moe_export.cli import run\n"
        f"assert run({args!r}) == 0\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'transformers', 'netron'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.endswith("loaded: []\n")
    assert "Usage: moe-export" in done.stdout


def test_help_names_the_exit_codes(process):
    said = " ".join(process("--help").out.split())
    assert "0 equal, 1 not equal, 2 wrong use or unreadable input, 3 cannot be exported" in said


def test_an_export_and_what_it_prints(process, write, listing, tmp_path, texts):
    done = process(write(texts["model"], "net.py"), "-o", "out")
    assert done.code == 0
    assert "onnxruntime-cpu matches torch" in done.out
    lines = [line for line in done.err.splitlines() if not re.fullmatch(r"[\w ./-]+: \d+\.\d s", line)]
    assert lines == []  # no noise of torch, onnx or onnxruntime
    assert listing(tmp_path / "out") == ["net.onnx", "net.report.json"]


def test_an_error(process, write):
    done = process(write("x = 1\n", "net.py"))
    assert (done.code, done.out) == (2, "")
    assert "error: no model in net.py" in done.err
    assert "Traceback" not in done.err


SLEEPS = """
import os, pathlib, time
COUNT = f"CALLS_{os.getpid()}"  # what the model itself keeps is put back before each call
class Net(nn.Module):
    def forward(self, x):
        os.environ[COUNT] = str(int(os.environ.get(COUNT, 0)) + 1)
        if os.environ[COUNT] == "3":
            pathlib.Path(__file__).with_name("reached").touch()
            time.sleep(60)
        return x + 1
model = Net()
example_inputs = (torch.ones(2, 3),)
"""


def hears_ctrl_c():
    """A job in the background starts with SIGINT ignored, and so would the commands of its tests."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("whom", ["the parent", pytest.param("both", marks=pytest.mark.slow)])
def test_ctrl_c_in_the_middle(write, older, listing, tmp_path, env, whom):
    """A terminal tells both processes; then the parent passes it on, and the cleaning up is not interrupted by that."""
    path = write(SLEEPS, "net.py")
    good = older(tmp_path / "net.onnx")
    started = subprocess.Popen(
        [sys.executable, "-m", "moe_export", str(path), "-o", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=hears_ctrl_c,  # noqa: PLW1509  these tests have one thread
        start_new_session=True,
    )
    try:
        wait_for((tmp_path / "reached").exists)
        (os.killpg if whom == "both" else os.kill)(started.pid, signal.SIGINT)
        out, err = started.communicate(timeout=30)
    finally:
        started.kill()
    assert started.returncode == 130
    assert out == ""
    assert err.endswith("interrupted; nothing more was written\n")
    assert "Traceback" not in err
    assert listing(tmp_path) == ["net.onnx", "net.py", "reached"]
    assert (tmp_path / "net.onnx").read_bytes() == good


def wait_for(happened, seconds=90):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def test_view_serves_the_file_on_the_loopback(finished, env):
    started = subprocess.Popen(
        [sys.executable, "-m", "moe_export", "view", str(finished / "moe.onnx"), "--no-browse"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=hears_ctrl_c,  # noqa: PLW1509  these tests have one thread
    )
    try:
        line = next(line for line in started.stdout if "Ctrl-C to stop" in line)
        address = line.split()[0]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
        with urllib.request.urlopen(address, timeout=30) as page:
            text = page.read().decode()
        assert "netron" in text.lower()
        location = re.search(r'data/[^"]*moe\.onnx|moe\.onnx', text)
        assert location is not None
        with urllib.request.urlopen(f"{address}/data/moe.onnx", timeout=30) as served:
            assert served.read() == (finished / "moe.onnx").read_bytes()
        started.send_signal(signal.SIGINT)
        started.communicate(timeout=30)
    finally:
        started.kill()
    assert started.returncode in (0, 130)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file: x.onnx"),
        (b"# no graph", "x.onnx is not an ONNX model, or a truncated one"),
        (b"", "x.onnx"),
    ],
)
def test_view_of_what_is_no_graph(command, tmp_path, content, said):
    if content is not None:
        (tmp_path / "x.onnx").write_bytes(content)
    done = command("view", "x.onnx", "--no-browse")
    assert done.code == 2
    assert done.err.startswith(f"error: {said}")


def test_view_on_a_port_that_is_taken(command, finished):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command("view", finished / "moe.onnx", "--no-browse", "--port", port)
    assert done.code == 2
    assert done.err.startswith(f"error: cannot serve on port {port}: ")


def test_view_of_a_truncated_graph(command, finished, tmp_path):
    data = (finished / "moe.onnx").read_bytes()
    (tmp_path / "x.onnx").write_bytes(data[: len(data) // 2])
    done = command("view", "x.onnx", "--no-browse")
    assert done.code == 2
    assert "x.onnx is not an ONNX model, or a truncated one" in done.err


def test_a_reader_that_goes_away(process, finished, write, texts, env):
    """`moe-export ... | head -1` ends without a traceback."""
    path = write(texts["model"])
    done = subprocess.run(
        f"{sys.executable} -m moe_export {path} --no-verify --no-simplify -o {path.parent} | head -1",
        shell=True,
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command", ["diff block.onnx moe.onnx", "verify block.onnx --against block.onnx --seeds 1"]
)
def test_a_command_without_a_reader(finished, env, command):
    """What is not read is no exit of the model's code, however it is printed."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "moe_export", *command.split()],
        stdout=write, stderr=subprocess.PIPE, text=True, cwd=finished, env=env, check=False, timeout=120,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == READER_GONE
    assert "error" not in done.stderr
