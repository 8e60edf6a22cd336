"""What looks free in a trace and is not is fixed; what only has to be divided, or to have a root, stays free."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from slow_cases import slow
from torch import nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.tracing.needless import run_program
from moe_export.export.tracing.widest import widest_trace


class Windows(nn.Module):
    """Swin's windows, taken apart and put together: the batch is found by a division of floats."""

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, x):
        batch, height, width, channels = x.shape
        side = self.side
        x = x.view(batch, height // side, side, width // side, side, channels)
        windows = x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, side, side, channels)
        windows = windows.cumsum(1) + windows.flip(2)
        batch = int(windows.shape[0] / (height * width / side / side))
        x = windows.view(batch, height // side, width // side, side, side, -1)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, -1)


class Square(nn.Module):
    """Tokens of a square image after `before` others."""

    def __init__(self, before, root):
        super().__init__()
        self.before, self.root = before, root

    def forward(self, x):
        image = x[:, self.before :]
        side = int(math.sqrt(image.shape[1])) if self.root else int(image.shape[1] ** 0.5)
        image = image.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)
        image = image.cumsum(2) + image.flip(3)
        return torch.cat([x[:, : self.before], image.flatten(2).transpose(1, 2)], 1)


class Counted(nn.Module):
    """A loop over windows, which is unrolled: as many as in the example."""

    def forward(self, x):
        total = x.sum(1)
        for number in range(x.shape[1] // 4 * (x.shape[2] // 4)):
            total = total + number * x[:, 0]
        return total


def traced_at(tmp_path, module, *shape):
    subject = make_subject(module, (torch.randn(shape),), {}, source=tmp_path, how="")
    return subject, widest_trace(subject)


def right(subject, traced, *shape):
    x = torch.randn(shape)
    return torch.allclose(subject.call([x])[0], run_program(traced, [x])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [4, slow(7)])
def test_windows_leave_height_and_width_free(tmp_path, side):
    subject, traced = traced_at(tmp_path, Windows(side), 2, 2 * side, 3 * side, 3)
    assert not traced.fixed
    names = traced.inputs["x"]
    for b, h, w in ((1, 1, 2), (3, 2, 1), (2, 4, 3), (5, 7, 2), (2, 3, 3)):
        shape = (b, h * side, w * side, 3)
        assert right(subject, traced, *shape)
        if min(h, w) > 1:  # what is not said to hold where there is one row of windows does so, too
            assert traced.domain.holds(dict(zip(names, shape, strict=True)))
        for axis, off in ((1, 1), (1, -1), (2, 1), (2, -1)):
            other = [size + off * (axis == place) for place, size in enumerate(shape)]
            assert not traced.domain.holds(dict(zip(names, other, strict=True)))


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("root", [True, False])
def test_a_length_that_has_a_root_stays_free(tmp_path, before, root):
    subject, traced = traced_at(tmp_path, Square(before, root), 2, 16 + before, 4)
    assert not traced.fixed or {each.axis for each in traced.fixed} == {2}
    assert traced.inputs["x"][1] == "sequence"
    for side in (2, 3, 4, 5, 8, 9, 31, 32):
        length = side * side + before
        assert right(subject, traced, 2, length, 4)
        assert traced.domain.holds({"batch": 2, "sequence": length})
        for other in (length - 1, length + 1, length + side):
            assert not traced.domain.holds({"batch": 2, "sequence": other})
    assert len(traced.domain.conditions) <= 3


class Doubled(nn.Module):
    """A scan in passes, each twice as far: as many as in the example."""

    def forward(self, x):
        span = 1
        while span < x.shape[1]:
            x = x + x.roll(span, 1)
            span *= 2
        return x


@pytest.mark.parametrize(
    ("module", "axes", "text"),
    [(Counted(), {1, 2}, "for number in range(x.shape[1]"), (Doubled(), {1}, "while span < x.shape[1]")],
)
def test_a_number_of_steps_fixes_sizes_and_the_line_is_named(tmp_path, module, axes, text):
    _, traced = traced_at(tmp_path, module, 2, 8, 12)
    fixed = {each.axis: each for each in traced.fixed if each.model_takes_others}
    assert fixed.keys() == axes
    lines = Path(__file__).read_text().splitlines()
    line = next(number for number, line in enumerate(lines, 1) if line.strip().startswith(text))
    for each in fixed.values():
        assert each.line == f"{__file__}:{line}"
