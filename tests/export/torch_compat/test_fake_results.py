"""Fake results that are looked up are those that PyTorch works out, and nothing else that comes of a call is lost."""

from __future__ import annotations

import inspect
from collections import Counter
from unittest import mock

import pytest
import torch
from canaries import canary
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moe_export.export.torch_compat.fake_results import fake_results_remembered
from moe_export.export.torch_compat.sizes import undecided

LIMIT = 3


class Expert(nn.Module):
    def __init__(self, hidden=6, activation=torch.relu, scale=1.0, bias=True):
        super().__init__()
        self.up, self.down = nn.Linear(4, hidden, bias=bias), nn.Linear(hidden, 4)
        self.activation, self.scale, self.counter = activation, scale, 0

    def forward(self, x):
        self.counter += 1
        x = self.down(self.activation(self.up(x)) * self.scale)
        return x if self.counter < LIMIT else x + self.counter


class Mixture(nn.Module):
    """Experts of a kind on the rows that chose them: (n, 4) → (n, 4)."""

    def __init__(self, *experts):
        super().__init__()
        self.router = nn.Linear(4, len(experts))
        self.experts = nn.ModuleList(experts)

    def forward(self, x):
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (token,) = torch.where(chosen == number)
            rows = expert(x[token])
            out.index_add_(0, token, rows.flip(-1) if number == 2 else rows)
        return out


class Weighted(Mixture):
    """The same with a weight for each row, whose width the trace finds out to be fixed as it goes."""

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out[token] += weights[token, slot, None] * expert(x[token])
        return out


class Called(nn.Module):
    """A function as a module: (n, 4) → anything."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output.half())
    return module


def conditions(x):
    """Each number of rows has a condition of its own, and another that both share."""
    first, second = (x[torch.where(x[:, column] > 0)[0]] for column in (0, 1))
    torch._check(first.shape[0] == second.shape[0])
    third, fourth = (x[torch.where(x[:, column] > 0)[0]] for column in (2, 3))
    torch._check(third.shape[0] < 7)
    return first * second, third * 2, fourth * 2, first.sum(0) + third.sum(0)


def masks(x):
    """The rows of one mask twice, and of another."""
    one, other = x[:, 0] > 0, x[:, 1] > 0
    return x[one] + x[one], x[other] * 2, x[one].relu()


def layouts(x):
    """Results whose strides are not those of their shape, and arguments that come back."""
    turned = x.t() * 2
    same = nn.functional.dropout(turned, 0.5, training=False)
    return (
        turned + x.t(),
        (x + 1).t() + turned,
        same.add_(1),
        (same.double() + 1).float(),
        turned.contiguous(),
    )


def sizes(x):
    """Sizes that are computed, of the input and of rows that only data knows."""
    rows = x[torch.where(x[:, 0] > 0)[0]]
    other = x[torch.where(x[:, 1] > 0)[0]]
    both = [torch.cat([each, x, each]) * 2 for each in (rows, other)]
    return *both, torch.full((rows.shape[0] * 2,), 1.5) + 1, torch.full((other.shape[0] * 2,), 1.5) + 1


def compared(x):
    """Numbers of several types, that are one less, equal and one more, with results of all shapes."""
    whole = (x * 2).long()
    found = [whole == number for number in (0, 1, 2)] + [whole[0] >= number for number in (0, 1)]
    found += [x > number for number in (0.5, 1, True)] + [(x > 0) != number for number in (True, False)]
    return *found, *(torch.where(found[number])[0] for number in range(3))


tied = Expert()
MODELS = {
    "alike": lambda: Mixture(*(Expert() for _ in range(5))),
    "weighted": lambda: Weighted(*(Expert() for _ in range(3))),
    "another hidden size": lambda: Mixture(Expert(), Expert(), Expert(hidden=8), Expert()),
    "another activation": lambda: Mixture(Expert(), Expert(activation=torch.sigmoid), Expert()),
    "another scale": lambda: Mixture(Expert(), Expert(scale=2.0), Expert(scale=2), Expert()),
    "no bias": lambda: Mixture(Expert(), Expert(bias=False), Expert()),
    "tied": lambda: Mixture(tied, Expert(), tied, Expert(), tied),
    "a hook": lambda: Mixture(Expert(), hooked(Expert()), Expert()),
    "conditions": lambda: Called(conditions),
    "masks": lambda: Called(masks),
    "layouts": lambda: Called(layouts),
    "sizes": lambda: Called(sizes),
    "compared": lambda: Called(compared),
}


def described(program):
    """What a program says: its nodes, what is known of each, and the conditions on its sizes."""
    lines = [str(program.graph), str(program.range_constraints)]
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            known = (value.shape, value.stride(), value.storage_offset(), value.dtype, value.device)
            lines.append(f"{node}: {known} {value.requires_grad}")
        else:
            lines.append(f"{node}: {value}")
    return lines


def exported(module):
    with torch.no_grad():
        args = (torch.randn(5, 4),)
        free = ({0: Dim.AUTO, 1: Dim.AUTO},)  # the second is fixed by the first layer
        return described(torch.export.export(module.eval(), args, dynamic_shapes=free, strict=False))


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_is_the_one_that_pytorch_makes(name):
    theirs = exported(MODELS[name]())
    with fake_results_remembered():
        ours = exported(MODELS[name]())
    assert ours == theirs


def test_alike_experts_are_worked_out_once():
    worked_out = Counter()
    original = FakeTensorMode._dispatch_impl

    def counted(mode, func, *rest):
        worked_out[func] += 1
        return original(mode, func, *rest)

    with mock.patch.object(FakeTensorMode, "_dispatch_impl", counted), fake_results_remembered():
        exported(Mixture(*(Expert() for _ in range(2))))
        two = worked_out[torch.ops.aten.addmm.default]
        exported(Mixture(*(Expert() for _ in range(LIMIT + 5))))
    assert worked_out[torch.ops.aten.addmm.default] == 2 * two
    assert worked_out[torch.ops.aten.eq.Scalar] == 2  # once a trace, whatever the number


def test_a_tensor_that_is_written_to_is_known_to_have_changed():
    with fake_results_remembered(), torch.no_grad(), FakeTensorMode(shape_env=ShapeEnv()):
        x = torch.ones(3, 4)
        versions = [x.add_(1)._version for _ in range(4)]
        grown = [torch.ones(3).resize_(5).shape[0] for _ in range(3)]
    assert versions == [1, 2, 3, 4]
    assert grown == [5, 5, 5]


def test_a_question_about_one_number_of_rows_is_asked_about_the_next():
    """What the answer depends on may be the line that asks."""
    asked = []

    def answer(env, expression):
        asked.append(str(expression))
        return False

    def questions(x):
        rows = [x[torch.where(x[:, column] > 0)[0]] for column in range(3)]
        return tuple(each * 2 if each.shape[0] > 1000 else each * 3 for each in rows)

    with fake_results_remembered(), undecided(answer):
        exported(Called(questions))
    assert len(asked) == 3


def test_canary_pytorch_works_results_out_where_we_look():
    names = (
        "guards", "replacements", "divisible", "var_to_range", "pending_fresh_unbacked_symbols", "size_like",
        "deferred_runtime_asserts", "num_deferred_runtime_asserts", "_version_counter",
        "_replacements_version_counter",
    )  # fmt: skip
    with canary(
        "export/torch_compat/fake_results.py",
        "FakeTensorMode._dispatch_impl(func, types, args, kwargs) works a result out, and ShapeEnv has what it changes",
        todo="look up results where PyTorch works them out now, or take `fake_results_remembered` out of the trace",
    ):
        parameters = list(inspect.signature(FakeTensorMode._dispatch_impl).parameters)
        assert parameters == ["self", "func", "types", "args", "kwargs"]
        assert [name for name in names if not hasattr(ShapeEnv(), name)] == []
