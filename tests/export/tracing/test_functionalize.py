"""A trace made functional node by node computes what the model does, with the operators that PyTorch's way gives."""

from __future__ import annotations

import random
from collections import Counter
from unittest import mock

import pytest
import torch
from slow_cases import only
from torch import nn
from torch.export import Dim, ExportedProgram

from moe_export.export.torch_compat.operators import Effect, effect_of, is_batched
from moe_export.export.tracing.functionalize import functionalized
from moe_export.export.tracing.programs import without_unread_constants

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch.export's own


class _Model(nn.Module):
    def __init__(self, run) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs):
        return self.run(*inputs)


def exported(run, *inputs, free=True):
    module = run if isinstance(run, nn.Module) else _Model(run)
    shapes = tuple((*[Dim.AUTO] * (each.dim() - 1), None) for each in inputs) if free else None
    dynamic = {"inputs": shapes} if free else None
    with torch.no_grad():
        return module, torch.export.export(module, inputs, dynamic_shapes=dynamic)


def made_here(program: ExportedProgram, **options) -> ExportedProgram | None:
    """The functional program; None where PyTorch's own way was taken."""
    with mock.patch.object(ExportedProgram, "run_decompositions", return_value=None):
        return functionalized(program, **options)


def operators(program: ExportedProgram) -> Counter:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def rows(x):
    out = torch.zeros_like(x)
    for t in range(3):
        out[:, t] = x[:, t] if t == 0 else out[:, t - 1] * 0.5 + x[:, t]
    return out


def parts_of_parts(x):
    out = x.clone()
    out[:, :2, 1:3] += 1
    out.transpose(1, 2)[:, 0].mul_(2)
    out.unsqueeze(0).permute(0, 3, 2, 1)[0, 1].add_(3)
    return out


def through_a_reshape(x):
    out = torch.zeros_like(x)
    flat = out.view(-1, x.shape[-1])
    flat[0] = 7.0
    flat[torch.tensor([1, 2])] += x.reshape(-1, x.shape[-1])[:2]
    return out


def by_out(x):
    out, other = torch.empty_like(x), torch.zeros(x.shape[0], x.shape[1])
    torch.add(x, 1, out=out)
    torch.mul(out[:, 0], 2, out=out[:, 1])
    torch.sum(out, dim=2, out=other)
    return torch.sin(out, out=out), other


def twice_through_one_view(x):
    out = x * 1
    first = out[:, 0]
    first.mul_(2)
    first.add_(1)
    return out, first


def parts_of_all(x):
    """`out[:]` is an alias, and there is nothing of size 1 to squeeze: each of these views is all of its source."""
    out = x * 1
    whole = out[:]
    whole.mul_(2)
    part = whole[:, 1:]
    part.add_(1)
    whole.squeeze(2).mul_(3)
    whole[:, 0].sub_(1)
    return out, whole, part


def views_from_before(x):
    out = x.clone()
    before, part = out[:, 0], out.split(2, -1)[1]
    out.add_(1)
    before.mul_(2)
    return before * out[:, 1], part, out


def scattered(x):
    out = torch.zeros(x.shape[0], 5).scatter_(1, x[:, 0, :2].argsort(1), 1.0)
    out.index_add_(0, torch.tensor([0]), torch.ones(1, 5))
    return out.masked_fill_(out > 1, -1.0).clamp_(min=-0.5)


def others_made_of_others(x):
    a, b = x.chunk(2, -1)
    return (
        x.flatten(1).contiguous().to(torch.float64), x.mT, a + b, x.reshape(x.shape[0], -1).type_as(a),
        x.unflatten(2, (2, -1)), x.expand_as(x), x.movedim(0, 1), torch.einsum("bnd,bnd->b", x, x), x.split(2, -1)[1],
    )  # fmt: skip


def dropped_in_training(x):
    return nn.functional.dropout(x, 0.5, training=False) + 1


FUNCTIONS = [
    rows, parts_of_parts, through_a_reshape, by_out, twice_through_one_view, parts_of_all, views_from_before,
    scattered, others_made_of_others, dropped_in_training,
]  # fmt: skip


@pytest.mark.parametrize("run", FUNCTIONS, ids=lambda run: run.__name__)
def test_what_it_computes_and_of_which_operators(run):
    module, program = exported(run, torch.randn(2, 4, 4))
    found, theirs = made_here(program), program.run_decompositions({})
    assert found is not None
    assert all(effect_of(node.target) in (Effect.NONE, Effect.VIEWS) for node in found.graph.nodes)
    # Neither has an operator that the other has not, but that copies and sizes are asked for less often.
    spared = {
        "aten.clone.default",
        "aten.copy.default",
        "aten.sym_size.int",
        "<built-in function mul>",
        "<built-in function floordiv>",
    }
    assert set(operators(found)) - spared == set(operators(theirs)) - spared
    assert sum(operators(found).values()) <= sum(operators(theirs).values()) + 2
    for shape in ((2, 4, 4), (3, 5, 4), (1, 4, 4)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = module(x.clone())
        torch.testing.assert_close(found.module()(x), expected, rtol=0, atol=0)


def test_as_called_keeps_what_the_model_calls():
    def run(x):
        out = x.reshape(x.shape[0], -1)
        out = out * 1
        out[:, 0] = 0
        return out.unflatten(1, (2, -1))

    module, program = exported(run, torch.randn(2, 4, 4))
    found = made_here(program, as_called=True)
    assert {"aten.reshape.default", "aten.unflatten.int"} <= set(operators(found))
    assert not [node for node in found.graph.nodes if effect_of(node.target) is Effect.WRITES]
    x = torch.randn(2, 4, 4)
    torch.testing.assert_close(found.module()(x), module(x), rtol=0, atol=0)
    _, pure = exported(lambda x: x.reshape(-1), torch.randn(2, 3))
    assert made_here(pure, as_called=True) is pure


def write_to_the_input(x):
    return x.add_(1) * 2


def an_overlap(x):
    out = torch.zeros_like(x)
    out.diagonal(0, 1, 2).add_(1)
    return out


def in_a_branch(x):
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, *inputs):
        self.count.add_(1)
        return inputs[0] + self.count


@pytest.mark.parametrize(
    "run",
    [write_to_the_input, an_overlap, in_a_branch, Counts()],
    ids=["input", "overlap", "branch", "buffer"],
)
def test_what_is_not_understood_is_left_to_pytorch(run):
    module, program = exported(run, torch.ones(2, 3, 3), free=False)
    assert made_here(program) is None
    if isinstance(run, Counts):
        return  # it counts on whoever runs it
    x = torch.randn(2, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(functionalized(program).module()(x.clone()), module(x.clone()))


VIEWS = [
    lambda x, n: x[:, n % x.shape[1]] if x.dim() > 1 else x,
    lambda x, n: x[n % 2 :],
    lambda x, n: x.transpose(0, -1),
    lambda x, n: x.unsqueeze(n % (x.dim() + 1)),
    lambda x, n: x.flatten(),
    lambda x, n: x.permute(*range(1, x.dim()), 0),
    lambda x, n: x.reshape(-1, x.shape[-1]),
    lambda x, n: x[:],
    lambda x, n: x.squeeze(n % x.dim()),
]
WRITES = [
    lambda x, y, n: x.add_(1),
    lambda x, y, n: x.mul_(n % 5),
    lambda x, y, n: x.copy_(y.sum() * torch.ones_like(x)),
    lambda x, y, n: x.masked_fill_(x > 1, 0.5),
    lambda x, y, n: x.__setitem__(0, y.sum()),
    lambda x, y, n: x.__setitem__((..., slice(0, 1)), float(n % 5)),
]


def random_program(seed: int):
    """Values, views of them, and writes to both, in any order; all of them are returned."""
    choose = random.Random(seed)
    steps = [
        (choose.random(), choose.randrange(99), choose.randrange(99), choose.randrange(99)) for _ in range(9)
    ]

    def run(x):
        values = [x * 2, x + 1]
        for kind, one, other, n in steps:
            value, second = values[one % len(values)], values[other % len(values)]
            if kind < 0.45:
                values.append(VIEWS[n % len(VIEWS)](value, other))
            elif kind < 0.9:
                WRITES[n % len(WRITES)](value, second, n)
            else:
                values.append(value * 3)
        return tuple(values)

    return run


def whole_numbers(seed: int) -> torch.Tensor:
    """In float64, so that sums are exact in any order."""
    return torch.randint(-3, 4, (2, 3, 4), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("part", only([0, 1], range(10)))
def test_random_programs_of_views_and_writes(part):
    here = 0
    for seed in range(20 * part, 20 * (part + 1)):
        module, program = exported(random_program(seed), whole_numbers(seed), free=seed % 2 == 0)
        found = made_here(program, as_called=seed % 3 == 0)
        if found is None:
            continue
        here += 1
        x = whole_numbers(seed + 1)
        with torch.no_grad():
            got, expected = found.module()(x), module(x)
        for place, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(one, other), (seed, place)
    assert here > 12


class _Nested(nn.Module):
    """A matrix for each row of a batch, made under one `vmap` and read under another."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.rand(4))
        self.matrix = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        def row(each, step):
            matrix = (step * self.rate).exp()[:, None] * self.matrix
            return torch.vmap(lambda one: matrix @ one)(each)

        return torch.vmap(row)(x, x.mean((1, 2)))


@pytest.mark.parametrize("as_called", [False, True])
def test_a_vmap_within_a_vmap_leaves_nothing_behind(as_called: bool) -> None:
    module, x = _Nested(), torch.randn(2, 5, 3)
    shapes = ({1: Dim.AUTO},)
    program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False)
    assert program.graph_signature.inputs_to_lifted_tensor_constants  # what escaped
    assert is_batched(program.graph)
    kept = without_unread_constants(program)
    assert not kept.graph_signature.inputs_to_lifted_tensor_constants
    functional = functionalized(kept, as_called=as_called)
    assert not is_batched(functional.graph)
    for length in (1, 5, 8):
        x = torch.randn(2, length, 3)
        torch.testing.assert_close(functional.module()(x), module(x))


def test_a_constant_that_is_read_stays() -> None:
    _, program = exported(lambda x: x + torch.tensor([1.0, 2.0]), torch.randn(3, 2))
    assert program.graph_signature.inputs_to_lifted_tensor_constants
    assert without_unread_constants(program) is program
