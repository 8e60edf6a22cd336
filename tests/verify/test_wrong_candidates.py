"""Right programs broken by hand in one way each, which the example's own sizes and values do not show.

Each pair is two functions: what is right, and a candidate that is wrong as graphs are: a baked size or constant,
an input that is not looked at, rows that are lost, another rounding, int32. The plan is the one that `verify` makes by
default. What it cannot catch stands in MISSED, and in docs/verify.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from slow_cases import one_in
from torch import nn

from moe_export.comparing.known import known_of_model
from moe_export.comparison_settings import DEFAULT_SETTINGS, comparison_cases
from moe_export.export.frontend.subject import make_subject
from moe_export.verify import DimRange, TensorSpec, TorchRunner, compare
from moe_export.verify.runners.torch_runner import to_numpy
from moe_export.verify.specs import Array

G = torch.Generator().manual_seed(0)
X = torch.randn(2, 10, 4, generator=G)
IDS = torch.randint(3, 20, (2, 10), generator=G)
W = torch.randn(4, 4, generator=G)
T = torch.randn(1000, 4, generator=G)
ONES = torch.ones(2, 10, dtype=torch.int64)
OPEN = torch.ones(2, 10, dtype=torch.bool)
LOST = T.clone()
LOST[20:] = 0
ONE_LOST = T.clone()
ONE_LOST[777] = 0
I32 = torch.int32


def upto(x, n):
    return torch.cat([x[:, :n], torch.zeros_like(x[:, n:])], 1)


def softmax(mask):
    return mask.float().masked_fill(~mask.bool(), -1e9).softmax(-1)


def ema(x, decay=lambda t: 0.9, end=10**9):
    h, out = torch.zeros(x.shape[0], 4), []
    for t in range(x.shape[1]):
        h = decay(t) * h + x[:, t] if t < end else h
        out.append(h)
    return torch.stack(out, 1)


def chunked(x, size):
    pad = -x.shape[1] % size
    c = nn.functional.pad(x, (0, 0, 0, pad)).reshape(x.shape[0], -1, size, 4).cumsum(2)
    return c.reshape(x.shape[0], -1, 4)[:, : x.shape[1]]


def trunc32(x):
    return x.to(I32).to(torch.int64)


# name: (right, wrong, example inputs)
PAIRS = {
    # baked sizes and lengths
    "length baked into a mean": (lambda x: x.sum(1) / x.shape[1], lambda x: x.sum(1) / 10, (X,)),
    "batch baked into a mean": (lambda x: x.sum(0) / x.shape[0], lambda x: x.sum(0) / 2, (X,)),
    "positions end at the example": (
        lambda x: x + T[: x.shape[1]].mean(), lambda x: x + T[:10].mean(), (X,)),
    "only 64 tokens": (lambda x: x.tanh(), lambda x: upto(x.tanh(), 64), (X,)),
    "only 100 tokens": (lambda x: x.tanh(), lambda x: upto(x.tanh(), 100), (X,)),
    "only 1000 tokens": (lambda x: x.tanh(), lambda x: upto(x.tanh(), 1000), (X,)),
    "only 8 of a batch": (lambda x: x * 2, lambda x: torch.cat([x[:8] * 2, x[8:]]), (X,)),
    "a window forgotten": (lambda x: x[:, -48:].mean(1), lambda x: x.mean(1), (X,)),
    "a window of another length": (lambda x: x[:, -48:].mean(1), lambda x: x[:, -47:].mean(1), (X,)),
    "a limit forgotten": (lambda x: x / min(x.shape[1], 50), lambda x: x / x.shape[1], (X,)),
    "a branch forgotten": (lambda x: 2 * x if x.shape[1] > 48 else x, lambda x: x, (X,)),
    "a branch off by one": (
        lambda x: 2 * x if x.shape[1] > 48 else x, lambda x: 2 * x if x.shape[1] >= 48 else x, (X,)),
    "one length forgotten": (lambda x: 2 * x if x.shape[1] == 37 else x, lambda x: x, (X,)),
    "a branch on the batch": (lambda x: 2 * x if x.shape[0] > 20 else x, lambda x: x, (X,)),
    "a branch on tokens": (lambda x: 2 * x if x.reshape(-1, 4).shape[0] > 256 else x, lambda x: x, (X,)),
    "swapped branches at 1": (lambda x: x if x.shape[1] > 1 else -x, lambda x: x, (X,)),
    "a remainder forgotten": (lambda x: x * (x.shape[1] % 16), lambda x: x * x.shape[1], (X,)),
    "chunks of another size": (lambda x: chunked(x, 16), lambda x: chunked(x, 32), (X,)),
    "one chunk only": (lambda x: chunked(x, 64), lambda x: x.cumsum(1), (X,)),
    "a wrong pad side": (
        lambda x: chunked(x, 16),
        lambda x: chunked(x.flip(1), 16).flip(1) if x.shape[1] > 16 else x.cumsum(1), (X,)),
    # loops
    "a loop that ends": (ema, lambda x: ema(x, end=60), (X,)),
    "a loop that ended": (lambda x: ema(x, end=60), ema, (X,)),
    "a decay that changes": (
        lambda x: ema(x, lambda t: 0.99 if t < 60 else 0.5), lambda x: ema(x, lambda t: 0.99), (X,)),
    "a reset": (lambda x: ema(x, lambda t: 0 if t == 50 else 0.9), ema, (X,)),
    "a reset every 32": (lambda x: ema(x, lambda t: 0 if t % 32 == 0 else 0.9), ema, (X,)),
    "a reset late": (lambda x: ema(x, lambda t: 0 if t == 300 else 0.9), ema, (X,)),
    # ids and tables
    "980 of 1,000 rows": (lambda i: T[i], lambda i: LOST[i], (IDS,)),
    "one row of 1,000": (lambda i: T[i], lambda i: ONE_LOST[i], (IDS,)),
    "ids clipped": (lambda i: T[i], lambda i: T[i.clamp(max=500)], (IDS,)),
    "ids from the end": (lambda i: T[i], lambda i: T[i.clamp(min=0)], (IDS,)),
    "ids by a remainder": (lambda i: T[i % 1000], lambda i: T[i % 100], (IDS,)),
    "token types ignored": (
        lambda i, k: T[i] + T[998:][k], lambda i, k: T[i] + T[998], (IDS, torch.zeros(2, 10, dtype=torch.int64))),
    "one-hot of few": (
        lambda i: nn.functional.one_hot(i, 50), lambda i: nn.functional.one_hot(i.clamp(max=19), 50), (IDS,)),
    "an id that is special": (lambda i: torch.where(i == 33, -1, i), lambda i: i, (IDS,)),
    "a second table": (lambda i: T[i] + T[:50][i % 50], lambda i: T[i] + T[:50][i.clamp(max=49)], (IDS,)),
    # masks and flags
    "a padding mask ignored": (lambda x, m: x * m.unsqueeze(-1), lambda x, m: x, (X, ONES)),
    "a bool mask ignored": (lambda x, m: x * m.unsqueeze(-1), lambda x, m: x, (X, OPEN)),
    "key_padding_mask ignored": (lambda x, m: x.masked_fill(m.unsqueeze(-1), 0), lambda x, m: x, (X, ~OPEN)),
    "a mask taken for a length": (
        lambda x, m: x * m.unsqueeze(-1),
        lambda x, m: x * (torch.arange(x.shape[1]) < m.sum(-1, keepdim=True)).unsqueeze(-1), (X, ONES)),
    "a mask the other way": (
        lambda x, m: x * softmax(m).unsqueeze(-1), lambda x, m: x * softmax(m.flip(-1)).unsqueeze(-1), (X, ONES)),
    "a flag ignored": (lambda x, f: torch.where(f, x, -x), lambda x, f: x, (X, torch.tensor(True))),
    "a flag that was False": (lambda x, f: torch.where(f, x, -x), lambda x, f: -x, (X, torch.tensor(False))),
    "a float mask ignored": (lambda x, m: x * m.unsqueeze(-1), lambda x, m: x, (X, torch.ones(2, 10))),
    "an additive mask ignored": (lambda x, m: x + m, lambda x, m: x, (X, torch.zeros(2, 10, 1))),
    "any for all": (lambda m: m.all(-1), lambda m: m.any(-1), (OPEN,)),
    # integers
    "an offset ignored": (lambda x, o: x + o, lambda x, o: x + 3, (X, torch.tensor(3))),
    "an offset of 0 ignored": (lambda x, o: x + o, lambda x, o: x, (X, torch.tensor(0))),
    "lengths ignored": (
        lambda x, n: x * (torch.arange(x.shape[1]) < n.unsqueeze(-1)).unsqueeze(-1), lambda x, n: x,
        (X, torch.tensor([10, 10]))),
    "fmod for remainder": (lambda i: i % 7, lambda i: torch.fmod(i, 7), (IDS,)),
    "truncated for floored": (lambda i: i // 4, lambda i: torch.div(i, 4, rounding_mode="trunc"), (IDS,)),
    "int32": (lambda i: i * 3 + 1, lambda i: trunc32(i) * 3 + 1, (IDS,)),
    "an int32 product": (lambda i: i * i, lambda i: trunc32(i * i), (IDS,)),
    "a hash in int32": (lambda i: (i * 40503) % 1000, lambda i: trunc32(i * 40503) % 1000, (IDS,)),
    "float32 between": (lambda i: i + 1, lambda i: (i.float() + 1).long(), (IDS,)),
    "uint8": (lambda i: i + 0, lambda i: i.to(torch.uint8).long(), (IDS,)),
    "no sign": (lambda i: i.sign(), torch.ones_like, (IDS,)),
    "clipped at 127": (lambda i: i * 1, lambda i: i.clamp(max=127), (IDS,)),
    # floats
    "relu forgotten": (lambda x: x.relu(), lambda x: x, (X.abs(),)),
    "zeros forgotten": (lambda x, h: x + h, lambda x, h: x, (X, torch.zeros(2, 10, 4))),
    "ones forgotten": (
        lambda x: x @ W.to(x.dtype), lambda x: x.sum(-1, keepdim=True) / 4 * W.sum(0), (torch.ones(2, 10, 4),)),
    "clipped at 6": (lambda x: x * 1, lambda x: x.clamp(-6, 6), (X,)),
    "a constant baked": (lambda x: x * x.abs().max(), lambda x: x * X.abs().max(), (X,)),
    # what the default cannot catch
    "clipped at 10,000": (lambda x: x * 1, lambda x: x.clamp(-1e4, 1e4), (X,)),
    "a length beyond all": (lambda x: x * 1, lambda x: upto(x, 5000), (X,)),
    "one value of a product": (lambda i: i * 1, lambda i: torch.where(i == 123_457, 0, i), (IDS,)),
}  # fmt: skip
MISSED = {"clipped at 10,000", "a length beyond all", "one value of a product"}


class Net(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *inputs):
        return self.call(*inputs)


def report_of(right, wrong, inputs):
    subject = make_subject(Net(right), inputs, {}, source=Path("net.py"), how="")
    arrays: dict[str, Array] = {name: to_numpy(tensor) for name, tensor in subject.inputs.items()}
    shapes = [("batch", "sequence")[: min(array.ndim, 2)] + array.shape[2:] for array in arrays.values()]
    specs = [
        TensorSpec(name, arrays[name].dtype.name, shape) for name, shape in zip(arrays, shapes, strict=True)
    ]
    dims = [DimRange("batch", 2), DimRange("sequence", 10)]
    known = known_of_model(subject, specs, dims, arrays, 0)
    runner = TorchRunner(subject.call_named, subject.outputs)
    candidate = TorchRunner(lambda given: wrong(*given.values()), subject.outputs, "candidate")
    truth = TorchRunner(subject.call_named, subject.outputs, "torch-float64", "float64")
    made = comparison_cases(DEFAULT_SETTINGS, specs, dims, arrays, 0, known=known)
    return compare(runner, candidate, made, truth=truth)


@pytest.mark.parametrize("name", one_in(4, PAIRS))
@pytest.mark.slow_but_one
def test_what_is_wrong_is_not_equal(name):
    right, wrong, inputs = PAIRS[name]
    report = report_of(right, wrong, inputs)
    assert report.cases[0].label == "example"
    assert all(row.ok for row in report.cases[0].judgements), "the example shows it"
    assert (report.verdict == "equal") == (name in MISSED), str(report)


# What is right is equal in all other tests, too.
@pytest.mark.parametrize("name", one_in(9, PAIRS))
@pytest.mark.slow_but_one
def test_what_is_right_is_equal(name):
    right, _, inputs = PAIRS[name]
    report = report_of(right, right, inputs)
    assert report.verdict == "equal", str(report)


def test_there_are_enough_of_them_and_nine_of_ten_are_caught():
    assert len(PAIRS) >= 60
    assert len(MISSED) <= len(PAIRS) / 10
