"""Loops whose number of steps only the graph knows: one `Loop`, right for numbers of steps that no example had."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from moe_export.errors import Code, NotExportableError
from moe_export.export.options import Options
from moe_export.export.pipeline import export_subject
from moe_export.export.tracing.branch_code import converted


class Model(nn.Module):
    """A function with two layers at hand."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.cell, self.halt = function, nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def halting(self, x, n):
    done, h, steps = torch.zeros(x.shape[0]), x, 0
    while (done < 1).any() and steps < 30:
        h = torch.tanh(self.cell(h) + x * torch.einsum("bd,bd->b", h, x)[:, None])
        done = done + torch.sigmoid(self.halt(h)).squeeze(-1) * 0.2 / n
        steps += 1
    return h, done


def counted(self, x, n):
    h = x
    for _ in range(int(n)):
        h = torch.tanh(self.cell(h) + x)
    return h


def counted_in_steps(self, x, n):
    total = x.sum(1)
    for i in range(1, n.item() + 2, 3):
        total = total * 0.5 + i
    for i in range(int(n), -2, -2):
        total = total - i * 0.25
    return total


def looks_up(self, x, n):
    h = torch.zeros(x.shape[0])
    for i in range(int(n)):
        h = torch.tanh(h + x[:, i % 1] + x[..., -1] * x[0, i - i])
    return h


def breaks(self, x, n):
    h, total = x, 0.0
    for _ in range(60):
        before, h = h, torch.tanh(self.cell(h) * 0.5 + x)
        error = (h - before).abs().max()
        total = total + error.item()
        if error * n < 1e-3 or torch.isnan(error):
            break
    return h * total


def flag(self, x, n):
    done, state = False, (x, x * 2)
    while not done:
        one, two = state
        state = (two * 0.5, one * 0.7)
        if two.sum() > one.sum():
            state = (state[0], torch.relu(state[1]))
        done = state[0].abs().max() * n < 0.1
    return state


def nested(self, x, n):
    h, scale = x, torch.tensor(0.5)
    for _ in range(int(n)):
        k = n * 0 + 1
        while k < n:
            k = k * 2
            h = torch.tanh(self.cell(h) + x * scale)
    return h


def shifts(self, x, n):
    a = b = c = d = e = f = 0
    for i in range(int(n)):
        a, b, c, d, e, f = b, c, d, e, f, i
    return x + a + 10 * b + 100 * c


def unbounded(self, x, n):
    h = x + n
    while (h.abs() > 0.5).any():
        h = h * 0.5
    return h


LOOPS = [unbounded, shifts, halting, counted, counted_in_steps, breaks, flag, nested]


def _run(tools, function, *example):
    module = Model(function).eval()
    (graph,) = export_subject(tools.subject(module, *example), Options(gates=False))
    session = onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString())
    return module, graph, session


def _nodes(graph, op):
    return [node for node in graph.model.graph.all_nodes() if node.op_type == op]


@pytest.mark.parametrize("function", LOOPS, ids=lambda function: function.__name__)
def test_any_number_of_steps(tools, function) -> None:
    module, graph, session = _run(tools, function, torch.randn(3, 4), torch.tensor(3))
    assert _nodes(graph, "Loop")
    assert len(_nodes(graph, "Gemm") + _nodes(graph, "MatMul")) <= 6  # the steps that Python took, and one
    names = [each.name for each in session.get_inputs()]
    for rows, count, scale in ((1, 1, 1), (2, 2, 0), (5, 7, 3), (3, 30, 0.1)):
        given = (torch.randn(rows, 4) * scale, torch.tensor(count))
        with torch.no_grad():
            wanted = module(*given)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        found = session.run(None, {name: each.numpy() for name, each in zip(names, given, strict=True)})
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, -3])
def test_no_step_at_all(tools, count: int) -> None:
    _, _, session = _run(tools, counted, torch.randn(3, 4), torch.tensor(3))
    x = torch.randn(2, 4)
    (found,) = session.run(None, {"inputs.0": x.numpy(), "inputs.1": np.array(count)})
    np.testing.assert_array_equal(found, x.numpy())


def test_an_element_by_the_counter(tools) -> None:
    def rows(self, x, n):
        h = torch.zeros(x.shape[0], 4)
        for t in range(int(n)):
            h = torch.tanh(self.cell(h) + x[:, t] + x[..., -1 - t, :] * x[0, t, 1])
        return h

    module, graph, session = _run(tools, rows, torch.randn(3, 5, 4), torch.tensor(4))
    assert _nodes(graph, "Loop")
    for length, count in ((5, 5), (3, 1), (9, 8)):
        x = torch.randn(2, length, 4)
        with torch.no_grad():
            wanted = module(x, torch.tensor(count))
        (found,) = session.run(None, {"inputs.0": x.numpy(), "inputs.1": np.array(count)})
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)


def grows(self, x, n):
    for _ in range(int(n)):
        x = torch.cat([x, x], 1)
    return x


def widens(self, x, n):
    total = 0
    for _ in range(int(n)):
        total = total + x.sum().item()
    return x * total


def writes(self, x, n):
    seen = torch.zeros(4)
    for _ in range(int(n)):
        h = seen.add_(1)
    return x + seen + h


def iterates(self, x, n):
    layers = iter([self.cell, nn.Linear(4, 4), nn.Linear(4, 4), *[nn.Linear(4, 4) for _ in range(20)]])
    for _ in range(int(n)):
        layer = next(layers)
        x = layer(x)
    return x


def pops(self, x, n):
    scales = [0.1 * i for i in range(50)]
    for _ in range(int(n)):
        scale = scales.pop()
        x = x * scale
    return x


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (iterates, "takes something else in each step"),
        (pops, "takes something else in each step"),
        (grows, r"changes a tensor \(.*\) of float32 to a tensor \(.*, 2\*.*\) of float32"),
        (widens, "makes an integer a float"),
        (writes, "writes into a tensor from before it"),
    ],
    ids=["iterates", "pops", "grows", "widens", "writes"],
)
@pytest.mark.slow_but_one
def test_refused(tools, function, said: str) -> None:
    with pytest.raises(NotExportableError, match=said) as caught:
        _run(tools, function, torch.randn(3, 4), torch.tensor(3))
    assert caught.value.code is Code.VALUES_DECIDE
    assert "test_open_loops.py:" in str(caught.value)


@pytest.mark.slow
def test_a_few_steps_that_are_no_loop_are_ways(tools) -> None:
    """Each step gives another shape: the model is called once per way, as without a loop of the graph."""

    def narrows(self, x, n):
        for _ in range(2):
            x = torch.cat([x, x], 0)[:, :3]
            if x.sum() > n:
                break
        return x.sum(0)[:3]

    module, graph, session = _run(tools, narrows, torch.randn(3, 4), torch.tensor(0))
    assert not _nodes(graph, "Loop")
    for count in (-100, 0, 100):
        x = torch.randn(3, 4)
        (found,) = session.run(None, {"inputs.0": x.numpy(), "inputs.1": np.array(count)})
        np.testing.assert_allclose(found, module(x, torch.tensor(count)).numpy(), rtol=1e-5)


LEFT = """
def f(x, ys):
    for y in ys:
        x = x + y
    while x.sum() > 0:
        x = x - 1
    else:
        x = x * 2
    for i in range(3):
        if x.sum() > i:
            break
        x = x + 1
    while x.sum() > 0:
        ys.append(x)
        x = x - 1
    while x.sum() < 0:
        return x
"""


def test_left_as_it_is(tmp_path) -> None:
    path = tmp_path / "loops.py"
    path.write_text(LEFT)
    assert not converted(str(path)).codes


class Balances(nn.Module):
    """Scores are balanced over experts until they no longer change, then two are chosen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.experts = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

    def forward(self, x):
        scores = self.gate(x).exp()
        for _ in range(100):
            scores = scores / scores.sum(0, keepdim=True).sqrt()
            scores = scores / scores.sum(1, keepdim=True)
            if (scores.sum(0) - len(x) / 4).abs().max() < 0.2 * len(x):
                break
        weights, chosen = scores.topk(2, dim=-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


def test_a_gate_with_a_loop_is_cut_out(tools) -> None:
    module = Balances().eval()
    whole, gate = export_subject(tools.subject(module, torch.randn(6, 4)), Options())
    x = torch.randn(9, 4)
    with torch.no_grad():
        wanted = module(x)
    for graph in (whole, gate):
        assert _nodes(graph, "Loop")
        session = onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString())
        found = session.run(None, {"x": x.numpy()})
        if graph is whole:
            np.testing.assert_allclose(found[0], wanted.numpy(), rtol=1e-4, atol=1e-5)
