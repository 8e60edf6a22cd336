"""`--stop-after`: what a stage made is printed, and nothing is written."""

from __future__ import annotations

import pytest

SHOWN = {
    "fold": "(linear): Linear(in_features=4",
    "trace": "torch.ops.aten.linear.default",
    "translate": "MatMul",
    "name": "FLOAT,[batch,sequence,4]",
    "precision": "Relu",
}


@pytest.mark.parametrize("stage", SHOWN)
def test_what_a_stage_made_is_shown_and_nothing_is_written(command, write, texts, listing, tmp_path, stage):
    path = write(texts["model"], "net.py")
    done = command(path, "-o", tmp_path / "new" / "out", "--stop-after", stage, "--show")
    assert done.code == 0, done.err
    assert SHOWN[stage] in done.out
    assert listing(tmp_path) == ["net.py"]


def test_without_show_only_its_size_is_said(command, write, texts):
    done = command(write(texts["model"]), "--stop-after", "trace")
    assert done.code == 0
    assert "after trace: a Program, " in done.out
    assert "aten" not in done.out


def test_a_folded_loop_is_shown_as_one(command, write):
    text = """
    class Loop(nn.Module):
        def forward(self, x):
            h, found = torch.zeros_like(x[:, 0]), []
            for t in range(x.shape[1]):
                h = h * 0.5 + x[:, t]
                found.append(h)
            return torch.stack(found, 1)
    model, example_inputs = Loop(), (torch.randn(2, 5, 4),)
    """
    done = command(write(text), "--stop-after", "fold", "--show")
    assert done.code == 0
    assert "loop_0" in done.out
    assert done.out.count("aten.mul") <= 1


def test_show_alone_and_stages_that_do_not_exist_are_refused(command, write, texts):
    path = write(texts["model"])
    assert "--show goes with --stop-after" in command(path, "--show").err
    assert command(path, "--show").code == 2
    assert command(path, "--stop-after", "fuse").code == 2
    assert "--stop-after makes none" in command(path, "--stop-after", "fold", "--json").err
