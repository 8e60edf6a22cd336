"""A model is traced where the trace holds for the most sizes, and the rest is said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from slow_cases import slow
from torch import nn

from moe_export.export.frontend.subject import make_subject
from moe_export.export.tracing.dims import DimRequest, limits_of
from moe_export.export.tracing.needless import run_program
from moe_export.export.tracing.widest import widest_trace


class Chunked(nn.Module):
    """Sums within chunks, as SSD does: the last chunk is filled up."""

    def __init__(self, chunk, table=None):
        super().__init__()
        self.chunk = chunk
        self.table = nn.Parameter(torch.randn(table, 4)) if table else None

    def forward(self, x):
        length = x.shape[1]
        if self.table is not None:
            x = x + self.table[torch.arange(length)]
        padded = F.pad(x, (0, 0, 0, (self.chunk - length % self.chunk) % self.chunk))
        chunks = padded.reshape(x.shape[0], -1, self.chunk, x.shape[2])
        before = F.pad(chunks.sum(2).cumsum(1), (0, 0, 1, 0))[:, :-1]
        return (chunks.cumsum(2) + before[:, :, None]).reshape(padded.shape)[:, :length]


class WholeChunks(Chunked):
    def forward(self, x):
        chunks = x.reshape(x.shape[0], x.shape[1] // self.chunk, self.chunk, x.shape[2])
        return (chunks * chunks.shape[1]).sum(2)


class Until(nn.Module):
    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        return 2 * x if x.shape[1] > self.limit else x + 1


def widest(tmp_path, module, *sizes, request=None):
    torch.manual_seed(0)
    subject = make_subject(module, (torch.randn(*sizes, 4),), {}, source=tmp_path, how="")
    return subject, widest_trace(subject, request)


def right(subject, traced, *sizes):
    x = torch.randn(*sizes, 4)
    return torch.allclose(subject.call([x])[0], run_program(traced, [x])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [slow(1), 7, slow(64)])
def test_one_chunk_in_the_example_and_any_number_in_the_graph(tmp_path, length):
    subject, traced = widest(tmp_path, Chunked(64), 2, length)
    assert traced.inputs["x"][:2] == ("batch", "sequence")
    assert limits_of(traced.dims, traced.conditions) == []
    assert all(right(subject, traced, 3, size) for size in (1, 2, 63, 64, 65, 127, 128, 129, 193, 256, 500))
    if length > 1:
        assert tuple(traced.example["x"].shape[:2]) == (2, length)  # it stays the user's


def test_a_table_that_is_shorter_than_several_chunks(tmp_path):
    subject, traced = widest(tmp_path, Chunked(16, table=60), 2, 9)
    # No guard says how long the table is: the model itself refuses more.
    assert limits_of(traced.dims, traced.conditions) == []
    assert all(right(subject, traced, 2, size) for size in (1, 15, 16, 17, 33, 59, 60))


def test_whole_chunks(tmp_path):
    subject, traced = widest(tmp_path, WholeChunks(8), 2, 8)
    assert all(right(subject, traced, 3, size) for size in (8, 16, 24, 80))
    assert not traced.domain.holds({"batch": 2, "sequence": 9})


class Windows(nn.Module):
    """Sums within windows of an image (b, h, w, 4) that has whole ones only."""

    def forward(self, x):
        b, h, w, c = x.shape
        windows = x.view(b, h // 3, 3, w // 3, 3, c).transpose(2, 3).contiguous().view(-1, 9, c).cumsum(1)
        return windows.view(b, h // 3, w // 3, 3, 3, c).transpose(2, 3).contiguous().view(b, h, w, c)


def test_whole_windows_of_an_image_are_two_conditions(tmp_path):
    subject, traced = widest(tmp_path, Windows(), 2, 6, 12)
    sizes = dict(zip(("b", "h", "w"), traced.inputs["x"], strict=False))
    named = {str(each) for each in traced.domain.conditions if "%" in str(each)}
    assert named == {f"{sizes['h']} % 3 == 0", f"{sizes['w']} % 3 == 0"}
    assert len(limits_of(traced.dims, traced.conditions)) <= 5
    for shape in ((3, 6, 9), (1, 3, 12), (2, 30, 6), (5, 9, 9)):
        assert right(subject, traced, *shape)
        assert traced.domain.holds(dict(zip(sizes.values(), shape, strict=True)))
    assert not traced.domain.holds(dict(zip(sizes.values(), (2, 7, 9), strict=True)))


@pytest.mark.parametrize("limit", [slow(30), 48])
def test_where_the_model_does_something_else_the_graph_ends(tmp_path, limit):
    subject, traced = widest(tmp_path, Until(limit), 2, 10)
    assert limits_of(traced.dims, traced.conditions) == [f"sequence 1..{limit}"]
    assert right(subject, traced, 2, limit)
    assert not right(subject, traced, 2, limit + 1)
    subject, traced = widest(tmp_path, Until(limit), 2, 100)
    assert limits_of(traced.dims, traced.conditions) == [f"sequence {limit + 1}.."]
    assert right(subject, traced, 2, limit + 1)
    assert not right(subject, traced, 2, limit)


def test_a_size_that_equals_a_width_by_chance(tmp_path):
    class Joined(nn.Module):
        def forward(self, x):
            return x + 1 if x.shape[1] != x.shape[2] else x.transpose(1, 2) + 1

    subject, traced = widest(tmp_path, Joined(), 2, 10)
    assert all(right(subject, traced, 2, size) for size in (3, 5, 10))
    domain = traced.domain
    assert not domain.holds(
        {"batch": 2, "sequence": 4, "x_dim2": 4} | {dim.name: 4 for dim in traced.dims[1:]}
    )


def test_what_is_not_asked_to_be_free_stays(tmp_path):
    _, traced = widest(tmp_path, Chunked(64), 2, 16, request=DimRequest(static=True))
    assert traced.inputs["x"] == (2, 16, 4)
    assert traced.dims == ()


@pytest.mark.parametrize("dtype", [slow(torch.float16), torch.bfloat16])
def test_how_a_processor_rounds_decides_about_no_condition(tmp_path, dtype):
    class Rounded(nn.Module):
        """Rounds otherwise than its trace, as some processors do where operators are taken apart."""

        def forward(self, x):
            y = x[:, -13:].cumsum(1)
            narrow = y.dtype in (torch.float16, torch.bfloat16) and not torch.compiler.is_exporting()
            return y * 1.004 if narrow else y

    subject = make_subject(Rounded(), (torch.randn(2, 7, 4).to(dtype),), {}, source=tmp_path, how="")
    assert limits_of((traced := widest_trace(subject)).dims, traced.conditions) == []


class OneStep(nn.Module):
    """One token has a way of its own, as a cached step has; a mask that hides nothing of one token is none."""

    def __init__(self, differs):
        super().__init__()
        self.differs = differs

    def forward(self, x):
        scores = x @ x.transpose(1, 2)
        if x.shape[1] != 1:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -1e9)
            if self.differs:
                scores = 2 * scores
        return scores


def test_what_is_different_for_one_token_begins_at_two(tmp_path):
    subject, traced = widest(tmp_path, OneStep(differs=True), 2, 5)
    assert limits_of(traced.dims, traced.conditions) == ["sequence 2.."]
    assert right(subject, traced, 1, 2)
    assert not right(subject, traced, 2, 1)


def test_what_is_the_same_for_one_token_begins_at_one(tmp_path):
    subject, traced = widest(tmp_path, OneStep(differs=False), 2, 5)
    assert limits_of(traced.dims, traced.conditions) == []
    assert right(subject, traced, 2, 1)
