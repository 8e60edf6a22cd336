"""Every dimension is free unless the model fixes it; refusals name the line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_export.errors import NotExportableError
from moe_export.export.frontend.subject import make_subject
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.trace import quiet, trace
from moe_export.export.tracing.traced_dims import rename


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


class Unrolled(nn.Module):
    """Weights that differ from step to step, so that the loop cannot be anything but unrolled."""

    def forward(self, x):
        state = x[:, 0]
        for step in range(x.shape[1]):
            state = torch.sin(state) if step % 2 else state * x[:, step].exp() + step * step
        return state


class Patches(nn.Module):
    """A loop whose length is a product of two sizes."""

    def forward(self, image):
        tokens = image[..., ::4, ::4].flatten(2)
        state = tokens[..., 0]
        for place in range(tokens.shape[2]):
            state = torch.sin(state) if place % 2 else state * tokens[..., place]
        return state


class Heads(nn.Module):
    """Heads are folded into the batch of one input, and taken out by that of the other, as in attention with a mask."""

    def forward(self, x, mask):
        folded = (x[..., None] * torch.ones(8)).transpose(1, 2).reshape(x.shape[0] * 8, -1)
        return folded.view(mask.shape[0], 8, -1).sum(1) * mask


class Chunks(nn.Module):
    """A loop over the chunks of a padded length."""

    def forward(self, x):
        padded = F.pad(x, (0, (4 - x.shape[1] % 4) % 4))
        state = x[:, :4] * 0
        for chunk in range(padded.shape[1] // 4):
            state = state * 0.5 + padded[:, 4 * chunk : 4 * chunk + 4]
        return state


class Doubling(nn.Module):
    """Spans of doubled length: five passes from 17 to 32."""

    def forward(self, x):
        span = 1
        while span < x.shape[1]:
            x = torch.cat([x[:, :span], x[:, span:] + x[:, :-span]], 1)
            span *= 2
        return x


class Table(nn.Module):
    """Positions for 24 tokens, and a window of 3."""

    def forward(self, x):
        return (x + torch.arange(24.0)[: x.shape[1]]).unfold(1, 3, 1).sum(-1)


class Repeats(nn.Module):
    def forward(self, x):
        return torch.cat([x for _ in range(int(x.sum()))])


def test_free_dimensions_and_their_names(tools):
    traced = trace(tools.subject(Linear(), torch.ones(2, 3, 4)))
    assert traced.inputs == {"x": ("batch", "sequence", 4)}
    assert [(dim.name, dim.traced, dim.minimum) for dim in traced.dims] == [
        ("batch", 2, 1),
        ("sequence", 3, 1),
    ]
    assert [(fixed.axis, fixed.model_takes_others) for fixed in traced.fixed] == [(2, False)]


def test_dimensions_that_depend_on_each_other_share_a_name(tools):
    class Product(nn.Module):
        def forward(self, left, right):
            return left @ right

    traced = trace(tools.subject(Product(), torch.ones(2, 3, 4), torch.ones(2, 4, 5)))
    assert traced.inputs == {
        "left": ("batch", "sequence", "left_dim2"),
        "right": ("batch", "left_dim2", "right_dim2"),
    }


def test_an_expression_of_a_dimension(tools):
    class Halves(nn.Module):
        def forward(self, x, y):
            return torch.cat([x, x]) + y

    traced = trace(tools.subject(Halves(), torch.ones(3, 2), torch.ones(6, 2)))
    assert traced.inputs["y"][0] == "2*batch"


def test_static_and_picked(tools):
    subject = tools.subject(Linear(), torch.ones(2, 3, 4))
    assert trace(subject, DimRequest(static=True)).inputs == {"x": (2, 3, 4)}
    assert trace(subject, DimRequest(True, {("x", 1): "time"})).inputs == {"x": (2, "time", 4)}
    assert trace(subject, DimRequest(False, {("x", 1): "time"})).inputs == {"x": ("batch", "time", 4)}


def test_a_loop_over_time_fixes_its_length_and_says_so(tools):
    traced = trace(tools.subject(Unrolled(), torch.ones(2, 5, 4)))
    assert traced.inputs == {"x": ("batch", 5, "x_dim2")}
    loop = next(
        number
        for number, line in enumerate(Path(__file__).read_text().splitlines(), 1)
        if "range(x.shape[1])" in line
    )
    assert [str(fixed) for fixed in traced.fixed] == [
        f"x: length 5 is fixed by {__file__}:{loop} (sequence, dimension 1): the trace depends on it: "
        "a loop over it was unrolled, or its size became a constant [MX201]"
    ]


@pytest.mark.parametrize(("module", "size"), [(Unrolled(), 5), (nn.Flatten(0, 1), None)])
def test_a_picked_dimension_that_is_fixed_is_refused(tools, module, size):
    subject = tools.subject(module, torch.ones(2, 5, 4))
    name = next(iter(subject.inputs))
    request = DimRequest(False, {(name, 1): "time"})
    if size is None:
        assert trace(subject, request).inputs[name][1] == "time"
        return
    with pytest.raises(NotExportableError) as caught:
        trace(subject, request)
    assert "dimension 1 of x cannot be dynamic: it is fixed at 5 by the model" in str(caught.value)
    assert "leave --dynamic x:1 away to export it fixed" in str(caught.value)


def test_data_dependent_control_flow_names_the_line(tools):
    with pytest.raises(NotExportableError) as caught:
        trace(tools.subject(Repeats(), torch.ones(2, 3)))
    said = str(caught.value)
    assert "torch.export cannot trace Repeats: GuardOnDataDependentSymNode" in said
    assert f"where: {__file__}:{Repeats.forward.__code__.co_firstlineno + 1}\n" in said
    assert "write it with torch.where, masks, or a loop over all experts" in said


def test_what_cannot_be_traced_for_another_reason_gets_another_hint(tools):
    class Numpy(nn.Module):
        def forward(self, x):
            return torch.from_numpy(x.numpy() * 2)

    with pytest.raises(NotExportableError) as caught:
        trace(tools.subject(Numpy(), torch.ones(2, 3)))
    assert "that line runs, but not while it is traced" in str(caught.value)
    assert "torch.where" not in str(caught.value)


def test_the_whole_trace_is_silent(tools, capfd):
    class Loud(nn.Module):
        def forward(self, x):
            print("in forward")
            sys.stderr.write("on stderr\n")
            return Repeats()(x)

    subject = tools.subject(Loud(), torch.ones(2, 3))
    capfd.readouterr()
    with pytest.raises(NotExportableError):
        trace(subject)
    assert capfd.readouterr() == ("", "")


def test_quiet_gives_back_what_it_took():
    before = (sys.stdout, sys.stderr)
    with quiet():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before


def test_einsums_do_not_fix_sizes(tools):
    class Three(nn.Module):
        def forward(self, a, b, c):
            return torch.einsum("bij,bjk,bkl->bil", a, b, c)

    traced = trace(tools.subject(Three(), torch.ones(2, 3, 4), torch.ones(2, 4, 5), torch.ones(2, 5, 6)))
    assert all(isinstance(size, str) for shape in traced.inputs.values() for size in shape)


def test_numbers_that_the_model_computes_are_told_from_constants(tools):
    class Numbers(nn.Module):
        def forward(self, x):
            return x + 1, x.shape[0], 7, x.sum().item()

    traced = trace(tools.subject(Numbers(), torch.ones(2, 3)))
    assert traced.computed == {"output_1", "output_3"}
    assert traced.outputs == ("output_0",)


def test_rename():
    assert rename("2*s77 + s7", {"s77": "batch", "s7": "sequence"}) == "2*batch + sequence"


def test_first_dimensions_of_one_size_are_one_batch_unless_the_user_names_them(tools):
    class Apart(nn.Module):
        def forward(self, x, flags):
            return x.sum(-1), flags.cumsum(-1)  # nothing says that they are equally many

    module, arrays = Apart(), (torch.ones(2, 3), torch.ones(2, 5))
    traced = trace(tools.subject(module, *arrays))
    assert [shape[0] for shape in traced.inputs.values()] == ["batch", "batch"]
    assert len({dim.name for dim in traced.dims}) == len(traced.dims)
    assert list(traced.dim_names().values()).count("batch") == 2
    named = trace(tools.subject(module, *arrays), DimRequest(picked={("flags", 0): "other"}))
    assert [shape[0] for shape in named.inputs.values()] == ["batch", "other"]
    unequal = trace(tools.subject(module, torch.ones(2, 3), torch.ones(4, 5)))
    assert [shape[0] for shape in unequal.inputs.values()] == ["batch", "flags_batch"]


def test_sizes_that_are_right_only_together_are_fixed(tools):
    """The tracer leaves both free, and notes that their product is 8."""
    traced = trace(tools.subject(Patches(), torch.randn(2, 3, 8, 16)))
    assert traced.inputs["image"] == ("batch", "image_dim1", 8, 16)
    assert {(fixed.input, fixed.axis) for fixed in traced.fixed} == {("image", 2), ("image", 3)}
    assert all(fixed.model_takes_others for fixed in traced.fixed)


def test_sizes_that_must_be_one_size_stay_free(tools):
    traced = trace(tools.subject(Heads(), torch.randn(2, 5), torch.ones(2, 5)))
    assert traced.inputs == {"x": ("batch", "x_dim1"), "mask": ("batch", "x_dim1")}
    assert traced.fixed == ()


@pytest.mark.parametrize(("module", "size"), [(Chunks(), 10), (Doubling(), 20)])
def test_a_size_that_is_right_only_within_a_range_is_fixed(tools, module, size):
    traced = trace(tools.subject(module, torch.randn(2, size)))
    assert traced.inputs["x"] == ("batch", size)
    assert [fixed.model_takes_others for fixed in traced.fixed] == [True]


def test_a_size_that_the_model_takes_only_within_a_range_stays_free(tools):
    (batch, length) = trace(tools.subject(Table(), torch.randn(2, 12))).dims
    assert (batch.maximum, length.minimum, length.maximum) == (None, 3, 24)


def test_a_model_that_takes_whole_chunks_takes_other_sizes(tools):
    class Whole(nn.Module):
        def forward(self, x):
            return torch.stack([part.sum(-1) for part in x.view(x.shape[0], -1, 4).unbind(1)])

    (fixed,) = trace(tools.subject(Whole(), torch.randn(2, 12))).fixed
    assert (fixed.axis, fixed.model_takes_others) == (1, True)


def test_the_width_of_a_row_is_not_said_to_be_fixed_by_the_trace(tools):
    """`x.view(-1, 4)` runs on rows of twice the width, and makes two of each."""

    class Rows(nn.Module):
        def forward(self, x):
            return torch.relu(x.view(-1, 4)).view(x.shape)

    traced = trace(tools.subject(Rows(), torch.randn(2, 3, 4)))
    assert not any(fixed.model_takes_others for fixed in traced.fixed)


def test_a_trace_as_called_is_functional_all_the_same():
    """Operators stay as the model calls them, but none that writes; what others expect is made of it later."""
    from moe_export.export.torch_compat.operators import is_functional
    from moe_export.export.tracing.trace import functional

    class Writes(nn.Module):
        def forward(self, x):
            y = torch.zeros_like(x)
            y[:, 0] = x[:, 1]
            return y.flatten(1)

    class Views(nn.Module):
        def forward(self, x):
            return x.flatten(1).unflatten(1, (-1, 2)) * 2

    for module in (Writes(), Views()):
        example = torch.randn(3, 4)
        subject = make_subject(module, (example,), {}, source=Path(__file__), how="a test")
        called = trace(subject, as_called=True)
        assert is_functional(called.program.graph)
        later, usual = functional(called), trace(subject)
        operators = [
            [str(node.target) for node in traced.program.graph.nodes if node.op == "call_function"]
            for traced in (later, usual)
        ]
        assert operators[0] == operators[1]
        assert torch.equal(later.program.module()(example)[0], module(example))
