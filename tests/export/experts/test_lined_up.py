"""Code that lines up all token-expert pairs at once is understood as experts, whatever sorts, gathers and slices."""

from __future__ import annotations

from pathlib import Path

import lined_up as models
import numpy as np
import onnx_ir as ir
import pytest
import torch
from opened import session_of, subject_of
from slow_cases import only
from torch import nn

from moe_export.export.engines.build import build_engines
from moe_export.export.experts.recognise import find_experts
from moe_export.export.frontend.subject import make_subject
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.tracing.trace import trace

EXPORTED = [models.MoeInfer, models.WrittenInPlace, models.GroupedMatmul, models.Einsums]
TRACED = [idiom for idiom in models.LINED_UP if idiom not in EXPORTED]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


# Each time every idiom is recognised in its trace, or is exported.
@pytest.mark.parametrize("idiom", only(EXPORTED, models.LINED_UP), ids=lambda idiom: idiom.__name__)
def test_every_idiom_is_understood_and_right(idiom):
    module = idiom().eval()
    graph = export_subject(subject_of(module), Options(gates=False, simplify=False))[0]
    (note,) = [note for note in graph.notes if "experts at" in note]
    assert note.startswith(f"6 experts at {Path(models.__file__)}:")
    assert "lowered as" in note
    # The gate's TopK is the only one: what the code sorted, the lowering sorts by counting.
    assert operators(graph.model).count("TopK") == 1
    session = session_of(graph.model)
    for tokens in (0, 1, 3, 15, 64, 257):
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            exact = module.reference(x).numpy()
            expected = module(x).numpy() if tokens else exact
        (got,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-5)
    for expert in range(6):  # every token's first choice is this one
        x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(expert)) * 0.01
        x = x + module.gate.weight[expert].detach() * 20
        with torch.no_grad():
            assert set(module.route(x[0])[1][:, 0].tolist()) == {expert}
            expected = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("idiom", models.LINED_UP, ids=lambda idiom: idiom.__name__)
def test_every_idiom_builds_for_every_gpu(idiom):
    """8,192 tokens in two slots: far above the 3,840 at which TensorRT's TopK stops."""
    module = idiom().eval()
    graph = export_subject(subject_of(module), Options(gates=False, target="tensorrt"))[0]
    x = torch.randn(1, 33, 16)
    with torch.no_grad():
        expected = module(x).numpy()
    np.testing.assert_allclose(
        session_of(graph.model).run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5
    )
    capabilities = ["sm75", "sm86", "sm89", "sm120"]
    engines = build_engines(graph.model, capabilities, {"batch": (1, 1, 1), "sequence": (1, 128, 8192)})
    assert [engine.capability for engine in engines] == capabilities


class ExpertChoice(nn.Module):
    """Each expert chooses its tokens (arXiv:2202.09368), and how many follows from the number of tokens."""

    def __init__(self, d: int = 16, experts: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(d, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, d, 24) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, 24, d) * 0.2)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        capacity = (tokens.shape[0] * 2 + 3) // 4
        weights, chosen = self.router(tokens).softmax(-1).t().topk(capacity, dim=-1)
        rows = torch.bmm(nn.functional.gelu(torch.bmm(tokens[chosen], self.up)), self.down)
        rows = (rows * weights.unsqueeze(-1)).reshape(-1, x.shape[-1])
        return torch.zeros_like(tokens).index_add(0, chosen.reshape(-1), rows).view_as(x)


def test_experts_that_choose_their_tokens_are_right_at_any_number_of_tokens():
    module = ExpertChoice().eval()
    session = session_of(export_subject(subject_of(module), Options(gates=False))[0].model)
    for tokens in (1, 3, 15, 64, 257):
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("idiom", only(TRACED, models.LINED_UP), ids=lambda idiom: idiom.__name__)
def test_a_body_is_one_experts_work_on_rows_of_the_input(idiom):
    """Nothing of S rows is left outside: what the body reads has N rows, and weights are stored once."""
    module = idiom().eval()
    program = trace(subject_of(module)).program
    _, blocks, refused = find_experts(program)
    assert refused == ()
    (block,) = blocks
    assert block.count == 6
    assert tuple(block.indices.meta["val"].shape[1:]) == (2,)
    tokens = block.indices.meta["val"].shape[0]
    assert {str(node.meta["val"].shape[0]) for node in block.shared} == {str(tokens)}
    for weight in block.weights:
        nodes = weight.separate or (weight.stack,)
        assert all(node.op == "placeholder" for node in nodes)
        assert len(nodes) == 6 or nodes[0].meta["val"].shape[0] == 6


class OtherOrder(models.FusedWeights):
    """A bias that is lined up with sorted rows, but was never sorted: each sorted row is a token of its own then."""

    def moe(self, x, weights, indices):
        flat = indices.flatten()
        order = torch.argsort(flat, stable=True)
        numbers = torch.arange(flat.shape[0]).unsqueeze(1) / 100
        rows = x[order // self.k] * weights.flatten()[order, None] + numbers
        hidden = nn.functional.silu(torch.bmm(rows.unsqueeze(1), self.up[flat[order]]))
        rows = torch.bmm(hidden, self.down[flat[order]]).squeeze(1)
        return torch.zeros_like(x).index_add(0, order // self.k, rows)


class MixesPairs(models.FusedWeights):
    """The rows of all pairs are normalised together."""

    def moe(self, x, weights, indices):
        rows = torch.einsum("nh,nkhf->nkf", x, self.up[indices])
        rows = rows - rows.mean(dim=0, keepdim=True)
        return torch.einsum("nkf,nkfh,nk->nh", rows, self.down[indices], weights)


def test_sorted_rows_that_are_no_pairs_are_tokens():
    module = OtherOrder().eval()
    graph = export_subject(subject_of(module), Options(gates=False, simplify=False))[0]
    assert any("lowered as" in note for note in graph.notes)
    session = session_of(graph.model)
    for tokens in (1, 3, 15, 64):
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected = module(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5)


def test_what_depends_on_other_pairs_is_no_body():
    program = trace(subject_of(MixesPairs().eval())).program
    _, blocks, (found,) = find_experts(program)
    assert blocks == ()
    assert found.startswith(f"the code of the experts at {__file__}:")
    assert (
        " stays as it was written: the experts mix rows: what pairs get depends on other pairs, after "
        in found
    )


class TooFewExperts(models.FusedWeights):
    def __init__(self):
        super().__init__()
        self.down = nn.Parameter(torch.randn(7, 24, 16))

    def moe(self, x, weights, indices):
        rows = torch.einsum("nh,nkhf->nkf", x, self.up[indices])
        return torch.einsum("nkf,nkfh,nk->nh", rows, self.down[indices], weights)


def test_stacks_of_other_sizes_are_refused_with_the_line():
    program = trace(subject_of(TooFewExperts().eval())).program
    _, blocks, refused = find_experts(program)
    assert blocks == ()
    (reason,) = refused
    assert reason.startswith(f"the code of the experts at {__file__}:")
    assert reason.endswith("p_model_down holds the weights of 7 experts, and 6 are used [MX501]")


def test_the_trace_of_stacked_weights_does_not_grow_with_the_experts():
    sizes = []
    for count in (8, 64):
        module = models.Einsums()
        module.num_experts, module.gate = count, nn.Linear(16, count, bias=False)
        for name in ("up", "down", "bias"):
            shape = getattr(module, name).shape[1:]
            setattr(module, name, nn.Parameter(torch.randn(count, *shape)))
        sizes.append(len(trace(subject_of(module.eval())).program.graph.nodes))
    assert sizes[0] == sizes[1]


class FewerThanChosen(models.Block):
    """The last two experts were taken out, and the gate still chooses them: their tokens get nothing."""

    def moe(self, x, weights, indices):
        out = torch.zeros_like(x)
        for number in range(self.num_experts - 2):
            token, slot = torch.where(indices == number)
            out = out.index_add(0, token, self.experts[number](x[token]) * weights[token, slot, None])
        return out


def test_choices_without_an_expert_add_nothing_in_a_loop():
    """A loop takes no notice of experts that it does not run over, so their tokens' pairs name no expert."""
    program = trace(subject_of(FewerThanChosen().eval())).program
    _, (block,), reasons = find_experts(program)
    assert (block.count, block.wraps, reasons) == (4, False, ())


def test_pairs_that_a_capacity_leaves_out_add_nothing():
    module = models.Capacity().eval()
    graph = export_subject(subject_of(module), Options(gates=False, simplify=False))[0]
    (note,) = [note for note in graph.notes if "experts at" in note]
    assert "lowered as" in note
    assert "NonZero" not in operators(graph.model)
    session = session_of(graph.model)
    left_out = 0
    for batch, length in ((2, 5), (1, 1), (3, 15), (1, 64), (2, 257)):
        x = torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected = module(x).numpy()
        left_out += int((expected == 0).all(-1).sum())
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5)
    assert left_out > 100


def test_experts_that_are_not_dropped_all_stay():
    _, blocks, _ = find_experts(trace(subject_of(models.NotDropped().eval())).program)
    assert blocks == ()


class HashRouted(nn.Module):
    """Hash layers (arXiv:2106.04426): the token's number says its expert, and is looked up among the embeddings."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        self.up = nn.Parameter(torch.randn(4, 16, 24) * 0.2)
        self.down = nn.Parameter(torch.randn(4, 24, 16) * 0.2)

    def forward(self, ids):
        flat = ids.reshape(-1)
        tokens = self.embedding(flat)
        expert = flat % 4
        hidden = torch.relu(torch.bmm(tokens.unsqueeze(1), self.up[expert]))
        return torch.bmm(hidden, self.down[expert]).squeeze(1).view(*ids.shape, 16)


def test_a_number_that_is_looked_up_elsewhere_too_still_says_the_expert():
    module = HashRouted().eval()
    ids = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(0))
    subject = make_subject(module, (ids,), {}, source=Path(__file__), how="test")
    graph = export_subject(subject, Options(gates=False, simplify=False))[0]
    (note,) = [note for note in graph.notes if "experts at" in note]
    assert note.startswith("4 experts at ")
    assert note.endswith("(lowered as 'slices')")
    session = session_of(graph.model)
    for tokens in (1, 3, 64):
        ids = torch.randint(0, 50, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected = module(ids).numpy()
        np.testing.assert_allclose(session.run(None, {"ids": ids.numpy()})[0], expected, rtol=1e-5, atol=1e-5)
