"""What packing does to a model that is never in memory as a whole: the figures, and the limits on them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import streamed_moe
import torch

from moe_export.cli import run
from moe_export.comparing.layerwise_exports import Parts, effect_by_runs
from moe_export.export import Options, export_subject, load_subject
from moe_export.export.onnx.external_weights import Storage
from moe_export.export.onnx.serialize import write_model
from moe_export.export.weights.lazy import in_memory
from moe_export.large.packed_weights import packed_values
from moe_export.verify import Tolerance

SIZES = (6, 256, 64, 3, 300)
"""Experts, hidden, inner, layers, vocabulary."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    streamed_moe.write_files(folder, SIZES)
    return folder


@pytest.fixture(scope="module")
def checked(folder):
    """The graph with experts in 4 bits, verified block by block."""
    subject = load_subject(str(folder / "model.py"), memory=1)
    (graph,) = export_subject(subject, Options(opset=21, gates=False, weights_dtype="int4"))
    storage = Storage(folder=folder)
    write_model(graph.model, folder / "packed.onnx", storage)
    parts = Parts(None, storage)
    assert parts.wanted(graph, folder / "packed.onnx")
    found = parts.verified(graph, folder / "packed.onnx", Tolerance(), 0)
    assert found.report.exit_code == 0
    return found


def by_hand(subject, case):
    """What the model gives, and which experts each layer takes for each token, with its weights in memory."""
    module, taken = subject.module, []
    hooks = [
        layer.router.register_forward_hook(
            lambda _, __, scores: taken.append(scores.float().softmax(-1).topk(4, -1)[1].sort(-1)[0])
        )
        for layer in module.layers
    ]
    with in_memory(module), torch.no_grad():
        given = module(torch.tensor(case.inputs["input_ids"]))
    for hook in hooks:
        hook.remove()
    return given.double().numpy(), torch.stack(taken)


def test_outputs_and_flips_are_those_of_the_model_as_a_whole(checked):
    effect = effect_by_runs(checked.graph, checked.runs)
    subject, quantized = checked.graph.reference, checked.graph.quantized
    floats = [by_hand(subject, case) for case, _ in checked.runs]
    with packed_values(subject.weights, quantized) as replaced:
        assert replaced
        packed = [by_hand(subject, case) for case, _ in checked.runs]
    moved = sum(np.square(a - b).sum() for (a, _), (b, _) in zip(floats, packed, strict=True))
    own = sum(np.square(a).sum() for a, _ in floats)
    assert effect.outputs == {"logits": pytest.approx(np.sqrt(moved / own), rel=0.02)}
    flips = [(a != b).any(-1).sum(-1) for (_, a), (_, b) in zip(floats, packed, strict=True)]
    assert [router.module for router in effect.routers] == ["layers.0", "layers.1", "layers.2"]
    tokens = sum(taken.shape[1] for _, taken in floats)
    for router, expected in zip(effect.routers, sum(flips).tolist(), strict=True):
        assert router.tokens == tokens
        assert abs(router.flipped - expected) <= 2  # products of float16 are summed in another order
    assert effect.routers[0].flipped == 0  # nothing before it is packed
    assert effect.routers[2].flipped > 0
    assert effect.counted
    assert len(effect.weights) == 3 * 3 * 6


def test_the_model_has_its_own_weights_again(checked):
    subject = checked.graph.reference
    before = {name: item.recipe for name, item in subject.weights.items.items()}
    effect_by_runs(checked.graph, checked.runs)
    assert {name: item.recipe for name, item in subject.weights.items.items()} == before
    assert subject.weights.absent


def test_choices_that_cannot_be_matched_are_not_counted(checked):
    case, ran = checked.runs[0]
    fewer = type(ran)(ran.blocks, ran.outputs, ran.chose[1:], ran.tables)
    effect = effect_by_runs(checked.graph, [(case, fewer)])
    assert not effect.counted
    assert effect.routers == ()
    assert "tokens that go to other experts were not counted" in list(effect.lines())[-1]


@pytest.mark.parametrize(
    ("limits", "code", "said"),
    [
        (("--max-error", "0.5", "--max-flips", "80%"), 0, ""),
        (("--max-error", "0.001"), 1, "logits moves by"),
        (("--max-flips", "0"), 1, "tokens of layers.2 go to other experts, more than --max-flips 0"),
    ],
)
def test_limits_hold_block_by_block(folder, tmp_path, capsys, limits, code, said):
    command = ["export", str(folder / "model.py"), "--no-gate", "--memory", "1KB", "--weights-dtype", "int4"]
    assert run([*command, "-o", str(tmp_path), *limits]) == code
    assert said in capsys.readouterr().out
    entry = json.loads((tmp_path / "model.report.json").read_text())["graphs"][0]
    assert entry["packing"]["outputs"]["logits"] > 0.01
    kept = tmp_path / ("model.onnx" if code == 0 else "model.rejected.onnx")
    assert onnx.load(kept, load_external_data=False).graph.node
