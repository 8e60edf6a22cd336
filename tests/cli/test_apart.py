"""What graphs are held against is the model in a process of its own, on which nothing of ours has run."""

from __future__ import annotations

import gc
import json
import os

import numpy as np
import pytest
import torch
from torch import nn

from moe_export.comparing import apart
from moe_export.errors import DiedError
from moe_export.export.frontend.load import load_subject
from moe_export.export.frontend.state import State
from moe_export.export.frontend.subject import make_subject
from moe_export.export.pipeline import export_subject

ROTATION = """
class Rotation(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(64, 4), persistent=False)
        self.filled = 0

    def forward(self, x):
        length = x.shape[1]
        if self.filled < length:
            self.table[:length] = torch.arange(length)[:, None] * torch.ones(4)
            self.filled = length
        return x + self.table[:length]

model = Rotation().eval()
example_inputs = (torch.randn(2, 3, 4),)
"""


def test_a_table_and_what_stands_beside_it(write, command):
    path = write(ROTATION)
    assert command(path, "--quiet").code == 0
    assert command("verify", f"{path.stem}.onnx", "--against", path, "--quiet").code == 0


def test_what_is_done_to_the_traced_copy_does_not_reach_the_reference(write, command, monkeypatch):
    def damaged(subject, *args):
        monkeypatch.setattr(State, "restore", lambda self: None)
        subject.module.filled = 64  # of a table of zeros
        return export_subject(subject, *args)

    monkeypatch.setattr("moe_export.commands.export.export_subject", damaged)
    path = write(ROTATION)
    assert command(path, "--quiet", "--static").code == 1
    assert json.loads(path.with_suffix(".report.json").read_text())["verdict"] == "not equal"


def test_weights_that_nobody_can_make_again(write, command):
    path = write(
        """
        import os
        import numpy as np
        weight = torch.from_numpy(np.frombuffer(os.urandom(16), np.uint8).astype(np.float32) / 255)

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(weight)

            def forward(self, x):
                return x * self.weight

        model = Block()
        example_inputs = (torch.randn(2, 16),)
        """
    )
    assert command(path, "--quiet").code == 0


def test_a_script_whose_first_call_is_the_model(write):
    path = write("model = nn.Linear(4, 4)\nprint(model(torch.ones(2, 4)).sum())\n")
    subject = load_subject(str(path), apart=apart.fork_model)
    found = apart.reference(subject, ["y"]).run({"input": np.ones((2, 4), np.float32)})
    assert np.allclose(found["y"], subject.call([torch.ones(2, 4)])[0].detach().numpy())


def bind(module):
    return make_subject(module, (torch.ones(2, 3),), {}, source=__file__, how="test")


class Kinds(nn.Module):
    """Raises, exits or dies where its input says so."""

    def forward(self, x):
        if float(x[0, 0]) == 2:
            raise ZeroDivisionError("two")
        if float(x[0, 0]) == 3:
            raise SystemExit(0)
        if float(x[0, 0]) == 4:
            os._exit(0)
        if float(x[0, 0]) == 5:
            os.abort()
        return x * torch.get_num_threads(), torch.topk(x, 2).indices


def ask(started, value):
    return started.ask(apart.TORCH, "run", [np.full((2, 3), value, np.float32)])


def test_what_a_model_raises_arrives():
    started = apart.fork_model(bind, Kinds())
    assert np.array_equal(ask(started, 1)["output_0"], np.ones((2, 3))), "it computes on one thread"
    with pytest.raises(apart.ModelRaisedError, match="two") as raised:
        ask(started, 2)
    assert type(raised.value).__name__ == "ZeroDivisionError"
    with pytest.raises(DiedError, match=r"sys\.exit\(0\)"):
        ask(started, 3)


@pytest.mark.parametrize(("value", "how"), [(4, "exit code 0"), (5, "SIGABRT")])
def test_a_model_that_ends_its_process(value, how):
    with pytest.raises(DiedError, match=how):
        ask(apart.fork_model(bind, Kinds()), value)


def test_it_says_what_it_chooses():
    subject = make_subject(Kinds(), (torch.ones(2, 3),), {}, source=__file__, how="test")
    runner = apart.ApartRunner(apart.Copy(subject), apart.TORCH, ["x"], ["y", "best"])
    outputs, choices = runner.run_watched({"x": np.ones((2, 3), np.float32)})
    assert list(outputs) == ["y", "best"]
    assert len(choices) == 1


def test_the_process_ends_with_who_holds_it():
    started = apart.fork_model(bind, nn.Linear(3, 3))
    pid = started._pid
    os.kill(pid, 0)
    del started
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


class Destroyed:
    """Writes down which process destroyed it, as a session's threads do not survive a fork."""

    def __init__(self, file):
        self.file, self.itself = file, self

    def __del__(self):
        with self.file.open("a") as file:
            file.write(f"{os.getpid()}\n")


class Collects(nn.Module):
    def forward(self, x):
        gc.collect()
        return x + 1


def test_what_is_left_behind_is_not_destroyed_in_the_fork(tmp_path):
    file, enabled = tmp_path / "destroyed", gc.isenabled()
    gc.disable()
    try:
        Destroyed(file)  # in a cycle, so that only the collector finds it
        started = apart.fork_model(bind, Collects())
        assert not gc.isenabled()
        (found,) = ask(started, 1).values()
        assert np.array_equal(found, np.full((2, 3), 2))
        assert not file.exists()
        gc.collect()
        assert file.read_text() == f"{os.getpid()}\n"
    finally:
        if enabled:
            gc.enable()


def test_where_nothing_can_be_forked_a_copy_is_made_before_the_first_call(monkeypatch):
    monkeypatch.delattr(os, "fork")
    module = nn.BatchNorm1d(3)
    started = apart.fork_model(bind, module)
    assert isinstance(started, apart.Copy)
    with torch.no_grad():
        module.weight.mul_(2)
    array = np.ones((2, 3), np.float32)
    assert np.allclose(ask(started, 1)["output"], array, atol=1e-4)
