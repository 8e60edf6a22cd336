"""Faults of OpenVINO that graphs are refused for, or written around, in their smallest form: docs/findings.md has them.

Each is a canary: where a newer version computes it right, the test says which refusal or detour can go. What may end
the process runs in one of its own.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import openvino
import pytest
from canaries import canary

from moe_export.errors import UsageError
from moe_export.verify.runners.openvino_runner import OpenVinoRunner

FILE = "verify/runners/openvino_errors.py"
GROWING = """g (int64 n, float[r,3] x) => (float[q,3] y) {
    going = Constant<value = bool {1}>()
    zero = Constant<value_ints = [0]>()
    one = Constant<value_ints = [1]>()
    start = Slice(x, zero, FIRST, zero)
    before = SequenceConstruct(start)
    after = Loop<body = b (int64 i, bool c, seq(float[]) s) => (bool d, seq(float[]) t) {
        d = Identity(c)
        k = Unsqueeze(i, zero)
        m = Add(k, one)
        end = Mul(m, m)
        rows = Slice(x, k, end, zero)
        t = SequenceInsert(s, rows)
    }>(n, going, before)
    y = ConcatFromSequence<axis = 0>(after)
}"""
ALONE = """
import sys, numpy as np, openvino
model = openvino.Core().read_model(sys.stdin.buffer.read())
compiled = openvino.Core().compile_model(model, "CPU")
x = np.arange(300, dtype=np.float32).reshape(100, 3)
print(*compiled([np.array(3), x])[0].shape)
"""


def rows_of(data: bytes) -> str:
    """What OpenVINO makes of the loop, as "11 3"; another text if it ends its process."""
    done = subprocess.run([sys.executable, "-c", ALONE], input=data, capture_output=True, check=False)
    return done.stdout.decode().strip() or f"ended by {done.returncode}"


@pytest.mark.parametrize(
    ("first", "right"),
    [("zero", "11 3"), ("one", "12 3")],
    ids=["parts of several sizes", "a sequence that is not empty"],
)
def test_canary_a_loop_that_carries_a_sequence(graph_bytes, first, right):
    """The parts have 1, 3 and 7 rows, behind none or one from the start; OpenVINO takes 3 times the last: 21."""
    data = graph_bytes(GROWING.replace("FIRST", first))
    with canary(
        FILE,
        "sequences in loops are computed wrongly",
        todo=f"openvino {openvino.__version__} is right: let `miscomputed` pass it, and docs/findings.md say so",
    ):
        assert rows_of(data) != right
    with pytest.raises(UsageError, match="drops what a sequence holds") as caught:
        OpenVinoRunner(data)
    assert "node Loop after" in caught.value.where


def test_canary_a_scan_that_reads_a_computed_value(graph_bytes):
    text = """g (float[L,3] x, float[3] h, float[3] w) => (float[3] y) {
        y = Scan <num_scan_inputs = 1, body = b (float[3] s, float[3] e) => (float[3] n) {
            t = Mul(s, w) n = Add(t, e) }> (h, x) }"""
    relied_on = "a Scan whose body reads a value that is computed outside is refused"
    todo = "leave out `captures_as_states`"
    with canary(FILE, relied_on, todo=todo), pytest.raises(UsageError, match="the body of a Scan reads"):
        OpenVinoRunner(graph_bytes(text))


def test_canary_integers_are_int32(graph_bytes):
    core = openvino.Core()
    data = graph_bytes("g (int64[n] x) => (int64[n] y) { y = Identity(x) }")
    compiled = core.compile_model(core.read_model(data), "CPU")
    with canary(
        FILE, "int64 is computed as int32", todo="let the runner of OpenVINO pass integers beyond int32"
    ):
        assert compiled([np.array([2**40 + 3])])[0].tolist() == [3]


def test_canary_an_index_beyond_its_table_is_no_error(graph_bytes):
    """Onnxruntime refuses it; a comparison of the two would call that a difference."""
    core = openvino.Core()
    data = graph_bytes("g (float[n,3] x, int64[k] i) => (float[k,3] y) { y = Gather(x, i) }")
    compiled = core.compile_model(core.read_model(data), "CPU")
    with canary(FILE, "Gather gives zeros for it", todo="say so in docs/findings.md"):
        assert compiled([np.ones((2, 3), np.float32), np.array([7])])[0].tolist() == [[0, 0, 0]]


def test_the_messages_that_are_read_are_those_of_this_version():
    with canary(
        FILE,
        "messages are worded as in openvino 2026.4.1",
        todo="run tests/verify/test_openvino_runner.py, and add the version to `Seen in`",
    ):
        assert openvino.__version__.startswith("2026.4")
