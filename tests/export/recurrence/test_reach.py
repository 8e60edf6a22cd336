"""A loop that changes at a step which nobody wrote down is folded as far as it is right, and the limit is said."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import slow
from torch import nn

from moe_export.export import Options, export_subject
from moe_export.export.frontend.subject import make_subject
from moe_export.export.recurrence.watch import Watch
from moe_export.export.tracing.lengths import Length


class Changing(nn.Module):
    """h = decay * h + x, and something else at a step that its code computes in another function."""

    def __init__(self, kind, change, last=False):
        super().__init__()
        self.kind, self.change, self.last = kind, float(change), last

    def limit(self):
        return round(self.change)

    def forward(self, x):
        h, out = torch.zeros(x.shape[0], 3), []
        if self.kind == "a long sequence" and x.shape[1] >= self.limit():
            return x.cumsum(1)
        for t in range(min(x.shape[1], self.limit()) if self.kind == "a shorter range" else x.shape[1]):
            if self.kind == "break" and t >= self.limit():
                break
            decay = 0.99 if self.kind != "another decay" or t < self.limit() else 0.5
            decay = 0 if self.kind == "a reset" and t == self.limit() else decay
            h = decay * h + x[:, t]
            if self.kind == "another operator" and t >= self.limit():
                h = h.tanh()
            out.append(h)
        return h if self.last else torch.stack(out, 1)


KINDS = ["a shorter range", "break", "another decay", "a reset", "another operator", "a long sequence"]


def subject_of(tmp_path, module):
    torch.manual_seed(0)
    return make_subject(module, (torch.randn(2, 7, 3),), {}, source=tmp_path, how="")


@pytest.mark.parametrize("last", [False, slow(True)])
@pytest.mark.parametrize("kind", KINDS)
def test_operators_of_another_kind_are_seen_at_a_great_length(tmp_path, kind, last):
    subject = subject_of(tmp_path, Changing(kind, 234, last))
    found = Watch(subject, [Length((("x", 1),))], [9], 0).first_unlike()
    assert found is not None
    assert 234 <= found <= 234 * 1.2  # a loop that ends early shows when a tenth of its operators is missing


def test_a_loop_that_goes_on_alike_is_not_suspected(tmp_path):
    subject = subject_of(tmp_path, Changing("", 0))
    assert Watch(subject, [Length((("x", 1),))], [9], 0).first_unlike() is None


def test_the_limit_is_said(tmp_path):
    graph = export_subject(subject_of(tmp_path, Changing("a reset", 143, last=True)), Options(opset=17))[0]
    assert [str(each) for each in graph.traced.domain.conditions] == ["sequence <= 143"]


@pytest.mark.slow
def test_a_limit_that_the_code_computes(tmp_path):
    class Window(nn.Module):
        def __init__(self):
            super().__init__()
            self.sizes = {"windows": [20, 3]}

        def forward(self, x):
            h = torch.zeros(x.shape[0], 3)
            for t in range(x.shape[1]):
                h = (0.5 if t == 17 * self.sizes["windows"][0] else 0.99) * h + x[:, t]
            return h

    graph = export_subject(subject_of(tmp_path, Window()), Options(opset=17))[0]
    assert [str(each) for each in graph.traced.domain.conditions] == ["sequence <= 340"]


class ASingleStep(nn.Module):
    """A running sum, with a way of its own for one step."""

    def forward(self, x):
        h, out = torch.zeros(x.shape[0], 3), []
        for t in range(x.shape[1]):
            h = 0.9 * h + x[:, t]
            out.append(h)
        if x.shape[1] == 1:
            return 2 * out[0][:, None]
        return torch.stack(out, 1)


def test_a_way_of_its_own_for_one_step_is_the_least_length(tmp_path):
    graph = export_subject(subject_of(tmp_path, ASingleStep()), Options(opset=17))[0]
    assert [str(each) for each in graph.traced.domain.conditions] == ["sequence >= 2"]


@pytest.mark.slow
def test_an_example_of_one_step_with_a_way_of_its_own_is_not_folded(tmp_path):
    subject = make_subject(ASingleStep(), (torch.randn(2, 1, 3),), {}, source=tmp_path, how="")
    graph = export_subject(subject, Options(opset=17))[0]
    assert graph.traced.inputs["x"][1] == 1
    assert [(each.axis, each.size) for each in graph.traced.fixed if each.model_takes_others] == [(1, 1)]


class LooksBack(nn.Module):
    """A sum over each step and up to `most` before it, of which there are fewer at first; then a recurrence."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, x):
        length, seen = x.shape[1], x
        for back in range(1, min(self.most + 1, length)):
            seen = seen + nn.functional.pad(x[:, : length - back], (0, 0, back, 0)) / back
        h, out = torch.zeros(x.shape[0], 3), []
        for t in range(length):
            h = torch.tanh(0.9 * h + seen[:, t])
            out.append(h)
        return torch.stack(out, 1)


# The example has 7 steps, the shortest trace 6; what is compared first is right from 2, 3, 5 or 13 on.
@pytest.mark.parametrize("most", [slow(2), 4, slow(5), slow(6), 7])
def test_a_window_that_is_not_full_yet_is_a_bound_beside_a_folded_loop(tmp_path, most):
    module = LooksBack(most)
    graph = export_subject(subject_of(tmp_path, module), Options(opset=17, recurrence="scan"))[0]
    assert [str(each) for each in graph.traced.domain.conditions] == [f"sequence >= {most}"]
    proto = ir.to_proto(graph.model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    for length in (most, most + 1, 7, 64):
        for batch in (1, 3):
            x = torch.randn(batch, length, 3)
            found = session.run(None, {"x": x.numpy()})[0]
            np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-4, atol=1e-5)


def test_a_window_wider_than_the_example_leaves_the_loop_as_it_is(tmp_path):
    graph = export_subject(subject_of(tmp_path, LooksBack(8)), Options(opset=17))[0]
    assert graph.traced.inputs["x"][1] == 7


class OneRow(nn.Module):
    """A running sum, with a way of its own for a batch of one, in front of the loop."""

    def forward(self, x):
        h, out = torch.zeros(x.shape[0], 3), []
        if x.shape[0] == 1:
            x = x - 5
        for t in range(x.shape[1]):
            h = 0.9 * h + x[:, t]
            out.append(h)
        return torch.stack(out, 1)


def test_a_way_of_its_own_for_a_batch_of_one_is_a_bound_beside_a_folded_loop(tmp_path):
    graph = export_subject(subject_of(tmp_path, OneRow()), Options(opset=17))[0]
    assert [str(each) for each in graph.traced.domain.conditions] == ["batch >= 2"]
