"""Loops over experts, in every shape, become sorted pairs: right for every routing, and small."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import experts_idioms as idioms
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from opened import session_of, subject_of
from slow_cases import only, slow
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export.axes.one_hot import one_hot_mask_of
from moe_export.export.engines.build import build_engines
from moe_export.export.experts.choose import LOWERINGS, choose
from moe_export.export.experts.expand import Bodies, expand_experts
from moe_export.export.experts.outline import outline_experts
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.translate import name_at_opset, translate
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.tracing.trace import trace

STANDARD = [name for name in LOWERINGS if name not in ("contrib", "trt_moe")]
CAPABILITIES = ("sm75", "sm86", "sm89", "sm120")


def graph_of(module: nn.Module, lowering: str = "auto"):
    options = Options(experts=lowering, gates=False, simplify=False)
    return export_subject(subject_of(module), options)[0]


def lowered(
    module: nn.Module, names: Iterable[str] = ("slices", "blocks")
) -> dict[str, tuple[onnxruntime.InferenceSession, list[str], ir.Model]]:
    """One trace, written in several forms."""
    outlined = outline_experts(trace(subject_of(module)))
    assert len(outlined.blocks) == 1
    translated, bodies, found = translate(outlined.traced, 17), Bodies(), {}
    for name in names:
        model = translated.clone()
        notes = expand_experts(model, outlined.blocks, name, bodies=bodies)
        name_at_opset(model, outlined.traced, 17, Path(__file__).parent)
        found[name] = (session_of(model), notes, model)
    return found


def assert_right(
    module: nn.Module, name: str, graph: tuple[onnxruntime.InferenceSession, list[str], ir.Model]
):
    session, (note,), _ = graph
    assert note.startswith(f"6 experts at {Path(idioms.__file__)}:")
    assert note.endswith(f"(lowered as {name!r})")
    for batch, length in ((2, 5), (1, 1), (1, 3), (3, 5), (8, 8), (1, 257)):
        x = torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected, exact = module(x).numpy(), module.reference(x).numpy()
        (got,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)


def test_every_idiom_is_understood_and_right(idiom):
    module = idiom().eval()
    assert_right(module, "slices", lowered(module, ("slices",))["slices"])


class Halves(nn.Module):
    """Experts whose first product is cut in two, its shape nowhere noted; group-limited scores as in DeepSeek."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Parameter(torch.randn(6, 16))
        self.up, self.down = nn.Parameter(torch.randn(6, 16, 48)), nn.Parameter(torch.randn(6, 24, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, 16)
        scores = (tokens @ self.gate.T).sigmoid()
        weights, indices = scores.topk(2, dim=-1)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        out = torch.zeros_like(tokens)
        for expert in range(6):
            token, slot = torch.where(indices == expert)
            value, gate = (tokens[token] @ self.up[expert]).chunk(2, dim=-1)
            rows = (nn.functional.gelu(gate) * value) @ self.down[expert]
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out.view(x.shape)


def test_halves_of_a_product_at_opset_17():
    module = Halves()
    for form, (session, _, _) in lowered(module, ["slices", "loop", "blocks"]).items():
        for x in (torch.randn(3, 7, 16), torch.full((1, 2, 16), -1e4)):
            with torch.no_grad():
                expected = module(x).numpy()
            (got,) = session.run(None, {"x": x.numpy()})
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4, err_msg=form)


@pytest.mark.slow
def test_every_idiom_builds_for_every_gpu(idiom):
    """8,192 tokens in two slots: far above the 3,840 at which TensorRT's TopK stops."""
    module = idiom().eval()
    graph = lowered(module, ("blocks",))["blocks"]
    assert_right(module, "blocks", graph)
    engines = build_engines(graph[2], CAPABILITIES, {"batch": (1, 1, 1), "sequence": (1, 128, 8192)})
    assert [engine.capability for engine in engines] == list(CAPABILITIES)


def test_all_tokens_to_one_expert():
    module = idioms.TopOne().eval()
    graphs = lowered(module, STANDARD)
    for expert in range(6):
        x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(expert))
        # Every token points along this expert's row of the gate.
        x = x * 0.01 + module.gate.weight[expert].detach() * 50
        with torch.no_grad():
            assert set(module.route(x[0])[1].tolist()) == {expert}
            expected = module(x).numpy()
        for session, _, _ in graphs.values():
            np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5)


def test_no_token_at_all_and_weights_stored_once():
    module = idioms.SkipEmpty().eval()
    weights = sum(parameter.nbytes for parameter in module.parameters())
    for session, _, model in lowered(module, STANDARD).values():
        (got,) = session.run(None, {"x": np.zeros((2, 0, 16), np.float32)})
        assert got.shape == (2, 0, 16)
        stored = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        assert weights * 0.95 < stored < weights * 1.05  # equal biases are one


class Grouped(idioms.Block):
    """Experts whose rows are reshaped to groups: an expert may have no row, and cannot be vectorised."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(indices == number)
            rows = nn.functional.group_norm(expert(x[token]), 2, expert.down.bias)
            out = out.index_add(0, token, rows * weights[token, slot, None])
        return out


@pytest.mark.parametrize(("lowering", "target"), [("auto", "tensorrt"), ("keep", "onnxruntime-cpu")])
def test_experts_without_a_row_that_reshape_their_rows(lowering, target):
    module = Grouped().eval()
    options = Options(experts=lowering, target=target, gates=False, simplify=False)
    graph = export_subject(subject_of(module), options)[0]
    if lowering == "auto":
        (note,) = [note for note in graph.notes if "lowered as" in note]
        assert "lowered as 'slices', not 'blocks': an expert cannot be computed for several" in note
    session = session_of(graph.model)
    for tokens in (1, 2, 9):
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5)


class OfImages(nn.Module):
    """Images go to convolutions: a row is an image, of any height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 3)
        self.experts = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1) for _ in range(3)])

    def forward(self, x):
        weights, indices = self.gate(x.mean((2, 3))).softmax(-1).topk(2, dim=-1)
        out = x.new_zeros(x.shape[0], 4, *x.shape[2:])
        for number, expert in enumerate(self.experts):
            image, slot = torch.where(indices == number)
            out = out.index_add(0, image, expert(x[image]) * weights[image, slot, None, None, None])
        return out


def test_rows_of_free_sizes():
    module = OfImages().eval()
    subject = make_subject(module, (torch.randn(2, 3, 8, 8),), {}, source=Path(__file__), how="test")
    for target, note in (
        ("onnxruntime-cpu", "'slices'"),
        ("tensorrt", "takes a fixed number of them, as a conv"),
    ):
        graph = export_subject(subject, Options(target=target, gates=False, simplify=False))[0]
        assert any(note in each for each in graph.notes)
    session = session_of(graph.model)
    for sizes in ((2, 8, 8), (3, 5, 9), (1, 1, 1)):
        x = torch.randn(sizes[0], 3, *sizes[1:])
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotExportableError, match=r"rows of fixed sizes.*\n.*test_experts.py:[0-9]+"):
        export_subject(subject, Options(experts="loop", gates=False))


class Dropping(idioms.Block):
    """Tokens far from the origin are dropped: -1 and the number of experts stand for no expert."""

    def moe(self, x, weights, indices):
        far = x.norm(dim=-1, keepdim=True) > 4
        indices = torch.where(far, torch.tensor([[-1, self.num_experts]]), indices)
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, slot = torch.where(indices == expert)
            out = out.index_add(0, token, self.experts[expert](x[token]) * weights[token, slot, None])
        return out


def test_a_pair_of_no_expert_adds_nothing():
    module = Dropping().eval()
    x = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(x).numpy()
    nothing = (expected == 0).all(-1)
    assert 3 < nothing.sum() < 24
    for session, _, _ in lowered(module, STANDARD).values():
        got = session.run(None, {"x": x.numpy()})[0]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        assert (got[nothing] == 0).all()


class Passing(idioms.Block):
    """The first choice takes a token's row over; a token far from the origin passes all experts by."""

    def moe(self, x, weights, indices):
        far = x.norm(dim=-1) > 5
        chosen = torch.where(far, -1, indices[:, 0])
        out = x.clone()
        for expert in range(self.num_experts):
            mask = chosen == expert
            out[mask] = self.experts[expert](x[mask])
        return out


class FromTheEnd(idioms.Block):
    """Looked-up weights, as PyTorch counts: -1 is the last expert."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(self.num_experts, 16, 16) / 4)

    def moe(self, x, weights, indices):
        far = x.norm(dim=-1, keepdim=True) > 5
        indices = torch.where(far, torch.tensor([[-1, -3]]), indices)
        rows = torch.einsum("nd,nkdh->nkh", x, self.stack[indices]).relu()
        return (rows * weights.unsqueeze(-1)).sum(1)


class Kept(idioms.Block):
    """Tokens that an expert has no room for, or that are far, are left out of its mask: `(indices == e) & kept`."""

    def moe(self, x, weights, indices):
        one_hot = nn.functional.one_hot(indices[:, 0], self.num_experts)
        place = ((one_hot.cumsum(0) - 1) * one_hot).sum(-1)
        kept = (place < 2)[:, None] & (x.norm(dim=-1, keepdim=True) < 5)
        kept = kept & (weights > 0)
        out = x.clone()
        for expert in range(self.num_experts):
            token, slot = ((indices == expert) & kept).nonzero(as_tuple=True)
            out.index_add_(0, token, self.experts[expert](x[token]) * weights[token, slot, None])
        return out


class NullExperts(idioms.Block):
    """The gate has more experts than weights: the last two do nothing."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for expert in range(self.num_experts - 2):
            token, slot = torch.where(indices == expert)
            out.index_add_(0, token, self.experts[expert](x[token]) * weights[token, slot, None])
        return out


class OtherOrder(idioms.Block):
    """Rows in the order of the slots, weights in that of the tokens: not each row's own weight."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = indices == number
            _, token = torch.where(mask.T)
            out.index_add_(0, token, expert(x[token]) * weights[mask].view(-1, 1))
        return out


@pytest.mark.parametrize("block", [Passing, FromTheEnd, slow(Kept), slow(NullExperts)])
def test_rare_routings_outside_the_experts_mean_what_they_mean_in_torch(block):
    torch.manual_seed(2)
    module = block().eval()
    usual = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(0))
    for name, (session, notes, _) in lowered(module, ("slices", "dense")).items():
        for factor in (0.5, 1.0, 3.0):  # no token is far, some are, all are
            x = usual * factor
            with torch.no_grad():
                expected = module(x).numpy()
            (got,) = session.run(None, {"x": x.numpy()})
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=f"{name}: {notes}")


def test_weights_in_another_order_than_the_rows_are_not_taken_for_theirs():
    assert outline_experts(trace(subject_of(OtherOrder().eval()))).blocks == ()


def test_a_loop_graph_does_not_grow_with_the_experts():
    sizes = []
    for count in (8, 16):
        block = idioms.SkipEmpty(experts=count).eval()
        sizes.append(sum(1 for _ in graph_of(block, "loop").model.graph.all_nodes()))
    assert sizes[0] == sizes[1] <= 100


class Fused(nn.Module):
    """All experts' weights in two tensors, looked up by pair."""

    def __init__(self, experts: int, d: int = 16, hidden: int = 24):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(d, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, d, 2 * hidden) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, hidden, d) * 0.1)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weights, indices = torch.topk(self.router(rows).softmax(-1), 2)
        chosen = indices.reshape(-1)
        gate, value = torch.bmm(rows.repeat_interleave(2, 0).unsqueeze(1), self.up[chosen]).chunk(2, -1)
        out = torch.bmm(nn.functional.silu(gate) * value, self.down[chosen]).view(*weights.shape, -1)
        return (out * weights.unsqueeze(-1)).sum(1).view(x.shape)


@pytest.mark.parametrize("target", ["onnxruntime-cpu", slow("tensorrt")])
def test_a_block_with_many_experts_is_as_small_as_one_with_more(target):
    sizes = []
    for experts in (128, 256):
        module = Fused(experts).eval()
        options = Options(gates=False, simplify=False, target=target)
        model = export_subject(subject_of(module), options)[0].model
        sizes.append(sum(1 for _ in model.graph.all_nodes()))
        x = torch.randn(2, 33, 16)
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(
            session_of(model).run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5
        )
    assert max(sizes) <= 100
    assert abs(sizes[0] - sizes[1]) <= 5


def test_auto_is_a_loop_above_64_experts():
    choices = [choose("auto", count, "onnxruntime-cpu") for count in (8, 64, 65, 256)]
    assert choices == ["slices", "slices", "loop", "loop"]
    assert choose("slices", 256, "onnxruntime-cpu") == "slices"
    assert choose("auto", 8, "tensorrt") == choose("auto", 256, "onnxruntime-cuda") == "blocks"


class FeedForward(idioms.Block):
    """Experts that onnxruntime has an operator for, with each of its activations."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        bias = kind != "swiglu"
        shapes = ((24, 16), (16, 24), (24, 16))
        self.mats = nn.ModuleList(
            nn.ModuleList(nn.Linear(i, o, bias=bias) for o, i in shapes) for _ in range(self.num_experts)
        )
        self.kind = kind

    def expert(self, number, x):
        up, down, value = self.mats[number]
        if self.kind == "swiglu":
            return down(nn.functional.silu(up(x)) * value(x))
        activations = {
            "identity": lambda rows: rows,
            "gelu": lambda rows: nn.functional.gelu(rows, approximate="tanh"),
        }
        return down(activations.get(self.kind, getattr(nn.functional, self.kind, None))(up(x)))

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for number in range(self.num_experts):
            token, slot = torch.where(indices == number)
            out = out.index_add(0, token, self.expert(number, x[token]) * weights[token, slot, None])
        return out


@pytest.mark.parametrize("kind", only(["gelu", "swiglu"], ["relu", "gelu", "silu", "identity", "swiglu"]))
def test_contrib_is_one_operator_that_follows_the_routing_of_the_model(kind):
    module = FeedForward(kind).eval()
    ((session, _, model),) = lowered(module, ["contrib"]).values()
    assert sum(node.op_type == "MoE" for node in model.graph) == 1
    for tokens in (1, 3, 15, 64, 257):
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5)


def test_contrib_refuses_an_expert_that_the_operator_does_not_compute():
    with pytest.raises(NotExportableError, match=r"MoE does not compute such an expert") as caught:
        graph_of(idioms.SkipEmpty().eval(), "contrib")
    assert str(Path(idioms.__file__)) in str(caught.value)


def test_keep_leaves_the_loop_as_it_was_written():
    graph = graph_of(idioms.SkipEmpty().eval(), "keep")
    assert not any("lowered" in note for note in graph.notes)
    assert sum(node.op_type == "NonZero" for node in graph.model.graph.all_nodes()) == 6


class MixesRows(idioms.Block):
    """An expert that normalises over its tokens: what a token gets depends on the others."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, slot = torch.where(indices == expert)
            rows = self.experts[expert](x[token])
            rows = rows - rows.sum(0, keepdim=True)
            out = out.index_add(0, token, rows * weights[token, slot, None])
        return out


class OneDiffers(idioms.Block):
    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, slot = torch.where(indices == expert)
            rows = self.experts[expert](x[token])
            if expert == 3:
                rows = rows.relu()
            out = out.index_add(0, token, rows * weights[token, slot, None])
        return out


class Incomplete(idioms.Block):
    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for expert in range(1, self.num_experts):
            token, slot = torch.where(indices == expert)
            out = out.index_add(0, token, self.experts[expert](x[token]) * weights[token, slot, None])
        return out


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (MixesRows, "what it gives for a token depends on the other tokens, after `sum` at"),
        (OneDiffers, "expert 3 computes something else than expert 0"),
        (Incomplete, "the loop runs over experts [1, 2, 3, 4, 5], not over 0 to 4"),
    ],
)
def test_what_is_refused_says_why_and_stays_right(block, reason):
    module = block().eval()
    graph = graph_of(module, "auto")
    (note,) = [note for note in graph.notes if "stays as it was written" in note]
    assert note.startswith(f"the loop over experts at {__file__}:")
    assert reason in note
    assert note.endswith(" [MX501]")
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        expected = module(x).numpy()
    got = session_of(graph.model).run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_an_ordinary_index_add_is_no_expert():
    class Scatter(nn.Module):
        def forward(self, x):
            rows = torch.where(x[:, 0, 0] > 0)[0]
            return torch.zeros_like(x).index_add(0, rows, x[rows])

    outlined = outline_experts(trace(subject_of(Scatter().eval())))
    assert outlined.blocks == ()
    assert outlined.refused == ()


def test_one_hot_masks_are_read_through_any_order_of_axes():
    class Mark(nn.Module):
        def forward(self, x):
            indices = torch.topk(x, 2, dim=-1)[1]
            one_hot = nn.functional.one_hot(indices, 16).to(torch.bool)
            moved = one_hot.permute(2, 0, 1).transpose(1, 2)
            return moved[4], (indices == 4).any(-1)

    traced = trace(make_subject(Mark(), (torch.randn(5, 16),), {}, source=Path(__file__), how="test"))
    outputs = next(node for node in traced.program.graph.nodes if node.op == "output").args[0]
    first, second = (one_hot_mask_of(node) for node in outputs)
    assert (first.axes, first.expert) == (("slot", "token"), 4)
    assert (second.axes, second.expert) == (("token",), 4)
    assert first.indices is second.indices
