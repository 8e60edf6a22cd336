"""Forms of operators that the exporter does not know by itself."""

from __future__ import annotations

import pytest
import torch
from slow_cases import one_in, slow
from torch import nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from moe_export.export import Options, export_subject
from moe_export.export.frontend.subject import make_subject
from moe_export.export.tracing.dims import DimRequest


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "function",
    one_in(
        2,
        [
            lambda x: (x.amax(), x.amin(), x.amax(keepdim=True)),
            lambda x: (x.amax((0, 2)), x.amin(dim=1, keepdim=True)),
            lambda x: x.sort(dim=1, stable=True, descending=True),
            lambda x: torch.sort(x, stable=True),
            lambda x: x.argsort(dim=1, stable=True),
            lambda x: torch.argsort(x, dim=-1, descending=True, stable=True),
            lambda x: (x.squeeze(2) + 1, x[:, :1].squeeze((1, 2)), x[..., :1].squeeze(-1)),
            lambda x: x.masked_select(x > 0).view(-1, 1) * 2,
        ],
    ),
    ids=[
        "amax",
        "amax of axes",
        "sort",
        "torch.sort",
        "argsort",
        "torch.argsort",
        "squeeze",
        "masked_select",
    ],
)
def test_decomposed_operators(tools, function):
    tools.equal(tools.graph(Calls(function), torch.randn(2, 3, 4)), torch.randn(4, 6, 5))


class Masks(nn.Module):
    """Booleans chosen by a mask: numbers, tensors and rows of either, written in every way."""

    def forward(self, x, y):
        mask, other = x > 0, y > 0.5
        put, picked = mask.clone(), mask.clone()
        put[other] = False
        picked[other] = (x < 0.1)[other]
        return (
            mask.masked_fill(other, False),
            mask.masked_fill(other, True),
            mask.masked_fill(other[:1], torch.tensor(True)),
            torch.where(mask, other, ~other & mask),
            torch.where(mask[:, :1], True, other),
            torch.where(mask[:, :1], False, other),
            torch.where(mask, other, False),
            torch.where(mask, other[:1], True),
            torch.where(mask, True, False),
            torch.where(mask, False, True),
            put,
            picked,
        )


@pytest.fixture(scope="module")
def masks(tools):
    graph = tools.graph(Masks(), torch.randn(4, 5), torch.randn(4, 5))
    assert not [node for node in graph.model.graph if node.op_type == "Where"]  # a CPU has none for booleans
    return graph


@pytest.mark.parametrize("sizes", [(4, 5), (1, 1), (1, 64), (33, 2), (7, 7)])
def test_booleans_are_chosen_without_where(tools, masks, sizes):
    for factor in (1.0, 0.0, -1.0):
        tools.equal(masks, factor * torch.randn(*sizes), torch.randn(*sizes))


class Repeats(nn.Module):
    """Rows that are repeated as often as another input's sizes say, as heads of keys are for those of queries."""

    def forward(self, x, y):
        each = y.shape[1] // x.shape[1]
        return (
            x.repeat_interleave(each, dim=-2) * 2,
            x.repeat_interleave(y.shape[0]),
            y.repeat_interleave(2, 2),
        )


@pytest.mark.parametrize(("heads", "queries"), [(2, 6), (3, 3), (4, 2), (1, 5)])
def test_rows_are_repeated_by_a_size(tools, repeats, heads, queries):
    tools.equal(repeats, torch.randn(3, heads, 5), torch.randn(4, queries, 3))


@pytest.fixture(scope="module")
def repeats(tools):
    return tools.graph(Repeats(), torch.randn(3, 2, 4), torch.randn(2, 4, 3))


class Untraced(nn.Module):
    """Operators for each of which the exporter would trace the whole program once more."""

    def forward(self, x):
        low = x > 0.1
        steps = x.diff(), x.diff(dim=1), x[:, :1].diff(dim=1), low.diff(dim=0)
        joined = x.diff(dim=1, prepend=x[:, :1]), x.diff(dim=0, append=x[:2]), x.diff(prepend=x, append=x)
        return low & (x < 0.9), low ^ (x[:1] > 0), low | True, *steps, *joined, x.diff(n=2, dim=-1)


def test_what_has_another_name_or_two_slices_is_not_traced_again(tools, monkeypatch):
    """A second difference and one of booleans stay as they are, and right."""
    x = torch.rand(3, 4, 5)
    tools.equal(tools.graph(Untraced(), x), torch.rand(2, 6, 7))
    tools.equal(tools.graph(Untraced(), x), torch.rand(1, 1, 3))
    monkeypatch.setattr(ExportedProgram, "run_decompositions", None)
    only = Calls(
        lambda x: (
            (x > 0) & (x < 1),
            (x > 0) | (x < -1),
            x.diff(),
            x.diff(dim=0),
            x.diff(dim=1, prepend=x[:, :1]),
        )
    )
    tools.equal(tools.graph(only, x), torch.rand(2, 6, 7))


@pytest.mark.parametrize("descending", [slow(False), True])
def test_a_stable_sort_is_stable(tools, descending):
    """As in sorting tokens by expert: nearly all values are equal."""
    graph = tools.graph(
        Calls(lambda x: x.sort(dim=-1, stable=True, descending=descending)),
        torch.zeros(2, 3, dtype=torch.int64),
    )
    tools.equal(graph, torch.randint(0, 3, (4, 200)))


class Logarithms(nn.Module):
    def forward(self, x, y):
        small = torch.expm1(x * 1e-7) * 1e7
        return F.logsigmoid(x), torch.logaddexp(x, y), torch.logaddexp(x[0], y), small, torch.expm1(x / 200)


def test_logarithms_of_what_no_float_holds(tools):
    x = torch.tensor([[-1e4, -90, -17, -1e-3, 0], [1e-3, 20, 90, 1e4, -torch.inf]])
    y = torch.tensor([[-1e4, 80, -3, 2e-3, 0], [-1e3, 20, 91, 1e4, -torch.inf]])
    graph = tools.graph(Logarithms(), x, y)
    wanted = [each.double() for each in Logarithms()(x.double(), y.double())]
    found = tools.run(graph.model, x=x, y=y)
    for one, other in zip(wanted, found.values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(other).double(), one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [slow(torch.float16), torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "function",
    one_in(
        5,
        [
            lambda x: x.amin(),
            lambda x: x.sum(1),
            lambda x: x.sum(),
            lambda x: torch.einsum("bld,bld->bl", x, x),
            lambda x: x.nansum(1),
            lambda x: x.prod(1),
            lambda x: x.cumsum(1),
            lambda x: x.amax(1) + 1,
            lambda x: x.mean(1),
            lambda x: x.softmax(1),
            lambda x: x.sum(1, dtype=torch.float32),
        ],
    ),
    ids=[
        "amin",
        "sum",
        "sum of all",
        "einsum",
        "nansum",
        "prod",
        "cumsum",
        "amax",
        "mean",
        "softmax",
        "wide",
    ],
)
def test_half_precision_stays_what_it_is(tmp_path, function, dtype):
    x = torch.rand(2, 3, 4).to(dtype)
    subject = make_subject(Calls(function), (x,), {}, source=tmp_path / "calls.py", how="")
    (graph,) = export_subject(subject, Options(simplify=False))
    kinds = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
    assert graph.model.graph.outputs[0].dtype.name == kinds[function(x).dtype]


class Router(nn.Module):
    """Two experts by sigmoid scores, with a bias as DeepSeek-V3 has it; their weights are set against each other."""

    def forward(self, logits):
        scores = logits.sigmoid()
        chosen = (scores + torch.linspace(0, 1e-3, logits.shape[-1])).topk(2, -1).indices
        weights = scores.gather(-1, chosen)
        return weights / weights.sum(-1, keepdim=True)


def test_scores_of_a_router_are_exact_where_they_are_small(tools):
    """ONNX Runtime's Sigmoid is off by 7 % at -14, and so would be the weights."""
    logits = torch.linspace(-14.5, -9, 24).reshape(4, 6)[:, [3, 0, 5, 1, 4, 2]]
    graph = tools.graph(Router(), logits)
    assert "Sigmoid" not in {node.op_type for node in graph.model.graph.all_nodes()}
    tools.equal(graph, logits, rtol=1e-6, atol=1e-6)
    for scale in (-80.0, -20.0, 0.0, 5.0, 100.0):
        tools.equal(graph, scale + torch.arange(6.0).expand(4, 6) / 7)


def test_a_sigmoid_that_nothing_is_chosen_by_is_one_node(tools):
    class Gated(nn.Module):
        def forward(self, x):
            return (x * x.sigmoid()) @ torch.ones(4, 4), (x.sigmoid() @ torch.ones(4, 6)).topk(2, -1).values

    graph = tools.graph(Gated(), torch.randn(3, 4))
    assert "Sigmoid" in {node.op_type for node in graph.model.graph.all_nodes()}


class Scattered(nn.Module):
    """Rows that several experts return, brought back to their tokens: some get two, some none."""

    def __init__(self, how, include_self):
        super().__init__()
        self.how, self.include_self = how, include_self

    def forward(self, x, rows, index):
        index = index[:, None].expand(-1, rows.shape[1])
        return x.scatter_reduce(0, index, rows, self.how, include_self=self.include_self)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("how", ["mean", slow("sum"), slow("prod")])
def test_scattered_rows(tools, how, include_self):
    graph = tools.graph(
        Scattered(how, include_self),
        torch.randn(5, 4),
        torch.randn(7, 4),
        torch.tensor([0, 1, 1, 3, 3, 3, 0]),
    )
    for tokens, rows in ((5, 7), (1, 3), (9, 1), (2, 40)):
        tools.equal(graph, torch.randn(tokens, 4), torch.randn(rows, 4), torch.randint(0, tokens, (rows,)))


class Regrouped(nn.Module):
    """Scores whose layout lets batch and tokens be one axis; the steps of the plan lay them out in another way."""

    def __init__(self):
        super().__init__()
        self.gates = nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x):
        scores = torch.einsum("bnd,hde->bhne", x, self.gates)
        return scores.transpose(0, 1).flatten(1, 2).softmax(1)


@pytest.mark.parametrize("static", [False, True])
def test_a_view_of_a_rewritten_einsum_in_another_layout(tools, static):
    graph = tools.graph(Regrouped(), torch.randn(2, 5, 4), dims=DimRequest(static=static))
    for batch, tokens in ((2, 5),) if static else ((1, 1), (3, 7), (2, 5)):
        tools.equal(graph, torch.randn(batch, tokens, 4))


class Generated(nn.Module):
    """Offsets into flat rows, of narrow integers and a size, under names that code generators use."""

    def forward(self, x):
        rows = torch.arange(2, dtype=torch.int32)
        flat = torch.multiply(rows, x.shape[1])
        filled = x.flatten().index_put((flat,), x[0, :1].expand(2))
        return x.flatten()[flat], torch.subtract(flat, x.shape[0]), torch.true_divide(x, rows[1]), filled


def test_index_arithmetic_in_narrow_integers(tools):
    graph = tools.graph(Generated(), torch.randn(3, 4))
    for shape in ((2, 1), (3, 4), (5, 9)):
        tools.equal(graph, torch.randn(shape))


def _put(index, value):
    """`y[index(x)] = value(x)` of a copy of x."""

    def function(x):
        y = x.clone()
        y[index(x)] = value(x) if callable(value) else value
        return y

    return function


def _doubled(x):
    y, mask = x.clone(), x > 0
    y[mask] = (x * 2)[mask]
    return y


def _of(dtype, number):
    def function(x):
        y = (x * 3).to(dtype)
        y[x > 0.5] = number
        return y

    return function


@pytest.mark.parametrize(
    "function",
    one_in(
        2,
        [
            _put(lambda x: x > 0, 0),
            _put(torch.isnan, 0.5),
            _put(lambda x: x[..., 0] > 0, -1.0),
            _put(lambda x: x[:, 0, 0] > 0, lambda x: x[0]),
            _put(lambda x: x[..., 0] > 0, lambda x: x[0, 0]),
            _put(lambda x: (slice(None), x[0, :, 0] > 0), lambda x: x.sum((0, 1))),
            _put(lambda x: x > 0, lambda x: x.sum()),
            _put(lambda x: x > 0, lambda x: x[0, 0, :1]),
            _doubled,
            _of(torch.int64, 7),
            _of(torch.int32, 7),
            _of(torch.float64, 0.1),
        ],
    ),
    ids=[
        "number",
        "nan",
        "rows",
        "blocks",
        "row",
        "axis",
        "tensor",
        "one",
        "same",
        "int64",
        "int32",
        "float64",
    ],
)
def test_what_is_written_under_a_mask_is_chosen(tools, function):
    graph = tools.graph(Calls(function), torch.randn(2, 3, 4))
    for x in (torch.randn(4, 6, 4), -torch.ones(1, 1, 4), torch.ones(3, 2, 4)):
        tools.equal(graph, x)
    assert "Where" in {node.op_type for node in graph.model.graph}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16])
def test_what_the_runtime_does_not_choose_is_written(tools, dtype):
    graph = tools.graph(Calls(lambda x: _of(dtype, 1)(x).float()), torch.randn(2, 3, 4))
    tools.equal(graph, torch.randn(4, 6, 5))


def test_what_one_mask_takes_and_another_writes_is_no_choice(tools):
    def function(x):
        y = x.clone()
        mask = x > 0
        y[mask] = x[mask].cumsum(0)
        y.index_put_((x > 1,), torch.ones(()), accumulate=True)
        return y

    tools.equal(tools.graph(Calls(function), torch.randn(2, 3, 4)), torch.randn(4, 6, 5))
