"""Masks with a capacity are understood as experts: the products with them go, and dropped tokens stay dropped."""

from __future__ import annotations

from pathlib import Path

import capacity as models
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from opened import session_of, subject_of
from slow_cases import only, slow
from torch import nn

from moe_export.export.engines.build import build_engines
from moe_export.export.experts.expand import expand_experts
from moe_export.export.experts.outline import outline_experts
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.translate import name_at_opset, translate
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.tracing.trace import trace

TOKENS = (1, 3, 15, 64, 257)


def routings(module: nn.Module):
    """Random tokens, and for each expert tokens that all choose it: most of them are dropped."""
    for tokens in TOKENS:
        x = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        yield x
        for row in module.router.weight.detach():
            yield x * 0.01 + row * 30
    yield torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(7))


def assert_equal(session: onnxruntime.InferenceSession, module: nn.Module) -> None:
    for x in routings(module):
        with torch.no_grad():
            expected = module(x).numpy()
        (got,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def values_with(model: ir.Model, axes: int) -> list[str]:
    """Values of so many axes or more."""
    return [
        value.name
        for node in model.graph
        for value in node.outputs
        if value.shape is not None and len(value.shape) >= axes
    ]


@pytest.mark.parametrize(
    "idiom", only([models.Groups, models.RoomyOneHot], models.SPARSE), ids=lambda idiom: idiom.__name__
)
def test_masks_become_pairs_of_tokens_and_experts(idiom):
    module = idiom().eval()
    graph = export_subject(subject_of(module), Options(gates=False, simplify=False))[0]
    assert [fixed.axis for fixed in graph.traced.fixed] == [2]  # the features; batch and length are free
    (note,) = [note for note in graph.notes if "experts at" in note]
    assert note.startswith(f"4 experts at {models.__file__}:")
    assert note.endswith("(lowered as 'slices')")
    assert_equal(session_of(graph.model), module)


def test_tokens_are_dropped_where_the_model_drops_them():
    """All tokens choose one expert: a quarter of them finds a slot, and the others get nothing."""
    module = models.FirstChoice().eval()
    session = session_of(export_subject(subject_of(module), Options(gates=False))[0].model)
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0)) * 0.01
    x = x + module.router.weight[2].detach() * 30
    (got,) = session.run(None, {"x": x.numpy()})
    served = np.abs(got[0]).sum(-1) > 0
    assert served.tolist() == [True] * 20 + [False] * 44  # 64 / 4 * 1.25 slots, in the order of the tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "idiom", [models.TwoChoices, models.Groups, models.FixedCapacity], ids=lambda i: i.__name__
)
def test_every_form_is_right(idiom):
    module = idiom().eval()
    outlined = outline_experts(trace(subject_of(module)))
    assert outlined.refused == ()
    assert len(outlined.blocks) == 1
    for form in ("dense", "blocks", "gather", "loop"):
        model = translate(outlined.traced, 17)
        expand_experts(model, outlined.blocks, form)
        name_at_opset(model, outlined.traced, 17, Path(__file__).parent)
        assert not values_with(model, 4) or form == "dense" or idiom is models.Groups
        assert_equal(session_of(model), module)


@pytest.mark.parametrize("dtype", [slow(torch.float16), torch.bfloat16, slow(torch.float32)], ids=str)
def test_a_little_of_the_other_experts_is_no_rounding(tmp_path, dtype):
    class Slightly(models.FirstChoice):
        def each(self, slots):
            return self.stacked(slots) + 0.01 * slots.softmax(0)

    example = (torch.randn(2, 9, 16).to(dtype),)
    outlined = outline_experts(
        trace(make_subject(Slightly().eval().to(dtype), example, {}, source=tmp_path, how=""))
    )
    assert outlined.blocks == ()
    assert "the experts mix their rows" in outlined.refused[0]


REASONS = {
    models.SharedSlots: "two choices may share a slot",
    models.MixedSlots: "the expert mixes rows",
    models.MixedExperts: "the experts mix their rows, or differ in more than their weights",
    models.OddExpert: "expert 3 computes something else than expert 0, at ",
    models.Reversed: "expert 1 computes something else than expert 0, at ",
    models.Flipped: "the expert mixes rows",
    models.BiasOfSlots: "the experts read `p_model_experts_3_of_slots`, which differs from slot to slot",
    models.NextExpert: "the experts mix their rows, or differ in more than their weights",
}


@pytest.mark.parametrize("idiom", REASONS, ids=lambda idiom: idiom.__name__)
def test_what_is_not_proved_stays_as_written_and_says_why(idiom):
    outlined = outline_experts(trace(subject_of(idiom().eval())))
    (reason,) = outlined.refused
    assert outlined.blocks == ()
    assert "as it was written: " in reason or "as they were written: " in reason
    assert f"{models.__file__}:" in reason
    assert REASONS[idiom] in reason


@pytest.mark.slow
@pytest.mark.parametrize("idiom", REASONS, ids=lambda idiom: idiom.__name__)
def test_what_stays_as_written_is_right(idiom):
    module = idiom().eval()
    assert_equal(session_of(export_subject(subject_of(module), Options(gates=False))[0].model), module)


def test_soft_mixtures_are_no_masks():
    module = models.SoftMixture().eval()
    graph = export_subject(subject_of(module), Options(gates=False, simplify=False))[0]
    assert not [note for note in graph.notes if "experts" in note]
    assert_equal(session_of(graph.model), module)


@pytest.mark.slow
@pytest.mark.parametrize("idiom", models.SPARSE, ids=lambda idiom: idiom.__name__)
def test_every_idiom_builds_for_every_gpu(idiom):
    module = idiom().eval()
    graph = export_subject(subject_of(module), Options(gates=False, target="tensorrt"))[0]
    assert_equal(session_of(graph.model), module)
    capabilities = ["sm75", "sm86", "sm89", "sm120"]
    engines = build_engines(graph.model, capabilities, {"batch": (1, 1, 1), "sequence": (1, 128, 8192)})
    assert [engine.capability for engine in engines] == capabilities
