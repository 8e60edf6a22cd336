"""A full verification of a block takes seconds: every kind of values, every size, a float64 run where sides differ."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe_export.comparing.checking import verify_graph
from moe_export.comparison_settings import ComparisonSettings
from moe_export.export import Options, export_subject, load_subject
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.models.mamba import MambaBlock, RMSNorm
from moe_export.models.sparse_moe import SparseMoe
from moe_export.verify import Tolerance

MODELS = Path(__file__).parents[2] / "models"


@pytest.mark.parametrize("name", ["sparse_moe", "gshard_moe", "mamba", "mamba2", "hybrid", "attention"])
def test_a_full_verification_takes_under_twenty_seconds(name, tmp_path, capsys):
    (graph, *_) = export_subject(load_subject(str(MODELS / f"{name}.py")), Options())
    write_model(graph.model, tmp_path / "model.onnx")
    seconds, counts = {}, {}
    for word, settings in (("usual", ComparisonSettings()), ("thorough", ComparisonSettings(thorough=True))):
        start = time.perf_counter()
        report, _ = verify_graph(graph, tmp_path / "model.onnx", tolerance=Tolerance(), settings=settings)
        seconds[word], counts[word] = time.perf_counter() - start, len(report.cases)
        assert report.exit_code == 0, str(report)
    with capsys.disabled():
        print(
            f"\n{name}: usual {counts['usual']} cases {seconds['usual']:.2f} s, "
            f"thorough {counts['thorough']} cases {seconds['thorough']:.2f} s"
        )
    assert seconds["thorough"] < 20


LAYERS = 24
_SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256,
}  # fmt: skip


class Logits(nn.Module):
    """A language model of transformers without its cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, use_cache=False).logits
        return logits


class Hybrid(nn.Module):
    """In each layer a Mamba block and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.norms = nn.ModuleList([RMSNorm(32) for _ in range(2 * LAYERS)])
        self.mambas = nn.ModuleList([MambaBlock(32) for _ in range(LAYERS)])
        self.experts = nn.ModuleList([SparseMoe(32, 64, 4, 2) for _ in range(LAYERS)])
        self.head = nn.Linear(32, 128, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in range(LAYERS):
            x = x + self.mambas[layer](self.norms[2 * layer](x))
            x = x + self.experts[layer](self.norms[2 * layer + 1](x))[0]
        return self.head(x)


def deep(name: str) -> nn.Module:
    """A model of 24 layers and tiny widths."""
    transformers = pytest.importorskip("transformers", reason="Mixtral and DeepSeek-V3 are its models")
    torch.manual_seed(0)
    if name == "Mixtral":
        config = transformers.MixtralConfig(**_SMALL, num_key_value_heads=2, num_local_experts=4)
        return Logits(transformers.MixtralForCausalLM(config)).eval()
    if name == "DeepSeek-V3":
        config = transformers.DeepseekV3Config(
            **_SMALL, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=8, n_group=2, topk_group=1,
            n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8,
        )  # fmt: skip
        return Logits(transformers.DeepseekV3ForCausalLM(config)).eval()
    return Hybrid().eval()


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3", "Mamba and experts"])
def test_24_layers_are_verified_in_under_thirty_seconds(name, tmp_path, capsys):
    """CPU seconds of this process: other work on the machine does not count. The export takes far longer."""
    example = (torch.randint(0, 128, (2, 10), generator=torch.Generator().manual_seed(0)),)
    subject = make_subject(deep(name), example, {}, source=Path(__file__), how="bench")
    (graph, *_) = export_subject(subject, Options(gates=False))
    write_model(graph.model, tmp_path / "model.onnx")
    start, clock = time.process_time(), time.perf_counter()
    report, _ = verify_graph(
        graph, tmp_path / "model.onnx", tolerance=Tolerance(), settings=ComparisonSettings()
    )
    seconds, passed = time.process_time() - start, time.perf_counter() - clock
    with capsys.disabled():
        print(f"\n{name}: {len(report.cases)} cases, {seconds:.1f} s of CPU, {passed:.1f} s by the clock")
    assert report.exit_code == 0, str(report)
    assert seconds < 30
