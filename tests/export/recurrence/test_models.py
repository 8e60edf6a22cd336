"""Whole models with loops over time: those shown here, and transformers' slow paths, on tiny random configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from moe_export.export.load import load_subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.recurrence.lengths import Length
from moe_export.export.subject import Subject, make_subject

MODELS = Path(__file__).parents[3] / "models"
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "use_cache": False}


def exported(subject: Subject) -> Graph:
    return export_subject(subject, Options(gates=False, simplify=False, recurrence="scan"))[0]


def scans(graph: Graph) -> int:
    return sum(node.op_type == "Scan" for node in graph.model.graph.all_nodes())


def check(subject: Subject, graph: Graph, lengths: tuple[int, ...]) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = next(iter(subject.inputs))
    for length in lengths:
        for batch in (1, 3):
            example = Length(((name, 1),)).resized(subject.inputs, length)
            example = Length(((name, 0),)).resized(example, batch)
            with torch.no_grad():
                wanted = subject.call_named(example)
            found = session.run(None, {key: tensor.numpy() for key, tensor in example.items()})
            for a, b in zip(wanted, found, strict=True):
                np.testing.assert_allclose(b, a.numpy(), rtol=1e-4, atol=1e-5, err_msg=f"{length}, {batch}")


@pytest.mark.parametrize("name", ["mamba", "hybrid"])
def test_the_models_here_at_any_length_from_one_short_example(name: str) -> None:
    subject = load_subject(str(MODELS / f"{name}.py"))
    graph = exported(subject)
    assert scans(graph) == 1
    check(subject, graph, (1, 2, 7, 16, 63, 64, 257))


def test_a_mamba_block_has_at_most_60_nodes() -> None:
    graph = exported(load_subject(str(MODELS / "mamba.py")))
    assert len(list(graph.model.graph.all_nodes())) <= 60


class Last(nn.Module):
    """A transformers model from tokens to hidden states, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden


def _transformers(name: str) -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "Mamba":
        config = transformers.MambaConfig(**SIZES, state_size=4, use_mambapy=False)
    elif name == "FalconMamba":
        config = transformers.FalconMambaConfig(**SIZES, state_size=4)
    elif name == "RecurrentGemma":
        config = transformers.RecurrentGemmaConfig(
            **{**SIZES, "num_hidden_layers": 3}, intermediate_size=32, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, lru_width=16, attention_window_size=64,
        )  # fmt: skip
    elif name == "Jamba":
        config = transformers.JambaConfig(
            **SIZES, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, num_experts=2,
            num_experts_per_tok=1, mamba_d_state=4, use_mamba_kernels=False, attn_layer_period=2,
            attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        )  # fmt: skip
    else:
        config = transformers.RwkvConfig(**SIZES, attention_hidden_size=16, intermediate_size=32)
    model: nn.Module = getattr(transformers, f"{name}Model")(config)
    return model.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "loops"), [("Mamba", 2), ("FalconMamba", 2), ("Rwkv", 2), ("Jamba", 1), ("RecurrentGemma", 2)]
)
def test_slow_paths_of_transformers(name: str, loops: int) -> None:
    tokens = torch.randint(0, 50, (2, 10), generator=torch.Generator().manual_seed(0))
    subject = make_subject(Last(_transformers(name)), (tokens,), {}, source=Path(__file__), how="a test")
    graph = exported(subject)
    assert scans(graph) == loops
    check(subject, graph, (1, 2, 7, 16, 63, 257))


def _by_chunks(name: str) -> nn.Module:
    """Families whose own code computes chunks, or a gated delta rule, or convolutions only."""
    transformers: Any = pytest.importorskip("transformers")
    heads = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    mamba = {
        "mamba_d_state": 4,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    }
    options: dict[str, dict[str, Any]] = {
        "Mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        "Bamba": {**heads, **mamba, "attn_layer_indices": [1]},
        "GraniteMoeHybrid": {
            **heads, **mamba, "layer_types": ["mamba", "attention"], "num_local_experts": 2,
            "num_experts_per_tok": 1, "shared_intermediate_size": 16,
        },
        "NemotronH": {
            **heads, "hybrid_override_pattern": "M*", "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8,
            "ssm_state_size": 4, "n_groups": 1, "chunk_size": 8,
        },
        "Zamba2": {
            **heads, "mamba_d_state": 4, "mamba_headdim": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 4,
        },
        "Lfm2": {**heads, "layer_types": ["conv", "full_attention"]},
        "Qwen3Next": {
            **heads, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention"],
            "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
    }  # fmt: skip
    sizes = {**SIZES, "num_hidden_layers": 1 if name in ("Mamba2", "Qwen3Next") else 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **options[name])
    model: nn.Module = getattr(transformers, f"{name}Model")(config)
    return model.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "loops"),
    [
        ("Mamba2", 0),
        ("Bamba", 0),
        ("GraniteMoeHybrid", 0),
        ("NemotronH", 0),
        ("Zamba2", 0),
        ("Lfm2", 0),
        ("Qwen3Next", 1),
    ],
)
def test_families_of_transformers_that_compute_chunks(name: str, loops: int) -> None:
    tokens = torch.randint(0, 50, (2, 10), generator=torch.Generator().manual_seed(0))
    subject = make_subject(Last(_by_chunks(name)), (tokens,), {}, source=Path(__file__), how="a test")
    graph = export_subject(subject, Options(gates=False, simplify=False))[0]
    assert scans(graph) == loops
    check(subject, graph, (1, 2, 7, 16, 63, 64, 65, 257))


class ParallelScan(nn.Module):
    """Mamba's scan by doubling distances, log2(l) passes over the whole sequence, as parallel codes write it."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        distance = 1
        while distance < a.shape[1]:
            before_a = torch.nn.functional.pad(a, (0, 0, distance, -distance), value=1.0)
            before_b = torch.nn.functional.pad(b, (0, 0, distance, -distance))
            a, b = a * before_a, a * before_b + b
            distance *= 2
        return b


@pytest.mark.slow
def test_a_parallel_scan_is_never_silently_wrong() -> None:
    """Its number of passes follows the length in steps: the lengths with as many passes, and no others, are free."""
    a, b = torch.rand(2, 10, 4), torch.randn(2, 10, 4)
    subject = make_subject(ParallelScan(), (a, b), {}, source=Path(__file__), how="a test")
    graph = export_subject(subject, Options(gates=False, simplify=False))[0]
    length = graph.traced.inputs["a"][1]
    (dim,) = [dim for dim in graph.traced.dims if dim.name == length]
    assert (dim.minimum, dim.maximum) == (9, 16)
