"""Integers in the code that a model runs."""

from __future__ import annotations

import sys

import torch
from torch import nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.tracing.constants import constants_of

LIMIT, UNUSED = 331, 332


def _helper(x, window=77):
    return x[:, -window:] if x.shape[1] > LIMIT else x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.chunk_size = 61
        self.sizes = (83, 89)
        self.register_buffer("table", torch.zeros(97, 1))

    def forward(self, x):
        for t in range(min(x.shape[1], 48)):
            if t >= 60 or t % 7 == 3:
                break
        return _helper(x) * sum(x.shape[0] for _ in range(2))

    def never(self):
        return 4001


def test_constants(tmp_path):
    subject = make_subject(Model(), (torch.zeros(2, 5, 3),), {}, source=tmp_path, how="")
    found = constants_of(subject)
    assert {48, 60, 7, 3, LIMIT, 61, 83, 89, 97, 77} <= set(found)
    assert not {UNUSED, 4001, 0, 1} & set(found)
    assert (
        found.index(48) < found.index(61) < found.index(77)
    )  # its own constants, its attributes, its arguments
    assert len(set(found)) == len(found)


def test_widths(tmp_path):
    class Widths(nn.Linear):
        limit = 19

        def forward(self, x):
            self.window = 41
            return super().forward(x) if x.shape[0] < 17 else x

    subject = make_subject(Widths(23, 17), (torch.zeros(2, 23),), {}, source=tmp_path, how="")
    assert {17, 23, 41} <= set(constants_of(subject))
    assert {17, 41} <= set(constants_of(subject, widths=False))  # 17 is compared with
    assert 23 not in constants_of(subject, widths=False)


def test_whoever_watches_goes_on_watching(tmp_path):
    subject = make_subject(nn.Linear(3, 3), (torch.zeros(2, 3),), {}, source=tmp_path, how="")
    seen = []
    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: seen.append(event))
    try:
        constants_of(subject)
        watching = sys.gettrace()
    finally:
        sys.settrace(before)
    assert watching is not None
    assert seen


class Config:
    block = 12

    def __init__(self):
        self.depth = 9

    @property
    def asked(self):
        raise AssertionError("nothing of the model is run")


TABLE = {"long": 301, "short": [5, 307]}


class Computes(nn.Module):
    def __init__(self):
        super().__init__()
        self.n, self.ratio, self.config, self.limits = 20, 1.5, Config(), [211, 223]
        self.inner = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x, shift: int = 3):
        double = 2 * self.n
        far = 17 * double
        step = 1
        for t in range(x.shape[1]):
            step += 400 * t
            if t >= far or t > self.config.block**2 or t == self.config.depth * self.n + 1:
                break
            if t > TABLE["short"][1] - 1 or t > max(self.limits[0], 2) + shift or t == int(self.ratio * 401):
                break
            if t > x.shape[1] + 5000 or t > step + 6000 or self.config.asked_never() > 7 * 1000:
                break
        return self.inner[0](x)


def test_computed_integers(tmp_path):
    Config.asked_never = lambda self: 0
    subject = make_subject(Computes(), (torch.zeros(2, 5, 3),), {}, source=tmp_path, how="")
    found = constants_of(subject)
    assert {17 * 40, 144, 181, 306, 307, 301, 214, 211, 223, 601, 7000} <= set(found)
    assert not {5005, 6001, 6401, 2005} & set(found)  # of sizes, or of what changes
    assert found.index(5000) < found.index(17 * 40) < found.index(223)  # what is written comes first
