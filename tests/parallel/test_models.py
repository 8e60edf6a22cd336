"""Models on ranks, as real processes: the blocks of models/, a hybrid of Mamba, attention and experts, Mixtral."""

from __future__ import annotations

from pathlib import Path

import pytest
import streamed_moe
from parallel_stack import export

from moe_export.cli import run
from moe_export.verify.parallel.manifest import read_manifest

MODELS = Path(__file__).resolve().parents[2] / "models"
MIXTRAL = """
import torch
from transformers import MixtralConfig, MixtralForCausalLM

torch.manual_seed(0)
config = MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
)
model = MixtralForCausalLM(config).eval()
example_inputs = {"input_ids": torch.randint(0, 64, (3, 7)), "use_cache": False}
"""


def checked(torchrun, path):
    manifest = read_manifest(path)
    done = torchrun(manifest.ranks, path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " matches " in done.stdout
    return manifest


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["all_reduce", "all_to_all"])
@pytest.mark.parametrize(("name", "ranks"), [("sparse_moe", 4), ("hybrid", 2), ("gshard_moe", 3)])
def test_models(torchrun, tmp_path, name, ranks, exchange):
    text = (MODELS / f"{name}.py").read_text()
    path = export(tmp_path, "--expert-parallel", ranks, "--exchange", exchange, text=text, name=name)
    manifest = checked(torchrun, path)
    assert sorted(expert for graph in manifest.graphs for expert in graph.experts[0]) == list(
        range(manifest.layers[0].experts)
    )


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["all_reduce", "all_to_all"])
def test_mixtral(torchrun, tmp_path, exchange):
    pytest.importorskip("transformers", reason="transformers is not installed")
    path = export(tmp_path, "--expert-parallel", 4, "--exchange", exchange, text=MIXTRAL, name="mixtral")
    manifest = checked(torchrun, path)
    assert [layer.experts for layer in manifest.layers] == [4, 4]
    assert len(manifest.graphs[0].stages) == (3 if exchange == "all_reduce" else 5)
    one = 3 * 32 * 48 * 4
    for graph in manifest.graphs:
        assert 2 * one <= graph.expert_bytes <= 2 * one + 6000


@pytest.mark.slow
def test_weights_in_files_are_never_in_memory_as_a_whole(torchrun, tmp_path):
    """Each rank's file refers to its own experts' rows; what all ranks have is stored once."""
    streamed_moe.write_files(tmp_path, (4, 128, 96, 2, 600))
    command = ["export", tmp_path / "model.py", "-o", tmp_path, "--no-gate", "-q", "--memory", "1KB"]
    assert run([*map(str, command), "--expert-parallel", "2"]) == 0
    manifest = checked(torchrun, tmp_path / "model.parallel.json")
    stored = sum(path.stat().st_size for path in tmp_path.glob("model.rank*.onnx"))
    assert stored < sum(graph.bytes for graph in manifest.graphs) / 4
