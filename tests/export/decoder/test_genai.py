"""onnxruntime-genai runs a decoder as it is, and makes the text that transformers makes."""

from __future__ import annotations

import json

import families
import numpy as np
import pytest
import torch
from slow_cases import one_in

from moe_export.export.decoder.genai import FILE, genai_config
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.export.pipeline import Options, export_subject
from moe_export.own_files import kind_of

BY_NAME = {family.name: family for family in families.FAMILIES}
# What its runtime can carry: keys and values of one width, and as many heads, in every layer.
CARRIED = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe"]


HYBRID = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
STATES = {
    "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
HYBRIDS = {
    "lfm2": ("Lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
    "bamba": ("Bamba", {**STATES, "num_hidden_layers": 4, "attn_layer_indices": [1, 2]}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **STATES,
            "num_hidden_layers": 2,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
        },
    ),
}


def hybrid(name):
    import transformers

    torch.manual_seed(0)
    model, sizes = HYBRIDS[name]
    config = getattr(transformers, f"{model}Config")(**HYBRID, **sizes)
    return getattr(transformers, f"{model}ForCausalLM")(config).eval()


def written(model, folder):
    ids = {"input_ids": torch.randint(3, 32, (2, 7))}
    subject = make_subject(model, (), ids, source=folder / "model.py", how="a test")
    graph = export_subject(subject, Options(gates=False, simplify=False, decoder=True))[0]
    write_model(graph.model, folder / "model.onnx")
    text = genai_config(graph.reference.module, graph.model.graph, "model.onnx")
    (folder / FILE).write_text(text)
    return json.loads(text)["model"]


@pytest.mark.parametrize("name", one_in(len(CARRIED), CARRIED))
def test_its_greedy_text_is_that_of_transformers(name, tmp_path):
    model = BY_NAME[name].build_lm()
    config = written(model, tmp_path)
    key_heads = model.config.num_key_value_heads
    assert config["vocab_size"] == model.get_input_embeddings().num_embeddings
    assert config["decoder"]["num_key_value_heads"] == key_heads
    assert kind_of(tmp_path / FILE) == "report"
    assert "layer_types" not in config["decoder"]
    check_text(model, tmp_path)


@pytest.mark.parametrize("name", one_in(len(HYBRIDS), HYBRIDS))
def test_layers_that_keep_states_are_named(name, tmp_path):
    """Without their kinds the runtime hands in no states: it looks for them in layers that are said to have some."""
    model = hybrid(name)
    kinds = written(model, tmp_path)["decoder"]["layer_types"]
    own = model.config.layer_types
    assert [kind == "full_attention" for kind in kinds] == [
        kind in ("attention", "full_attention") for kind in own
    ]
    check_text(model, tmp_path)


def check_text(model, folder):
    """That the runtime's greedy text is that of transformers."""
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install --no-deps onnxruntime-genai")
    opened = genai.Model(str(folder))
    parameters = genai.GeneratorParams(opened)
    parameters.set_search_options(max_length=64, min_length=64)
    generator = genai.Generator(opened, parameters)
    ids = [5, 17, 9, 8, 30]
    generator.append_tokens(np.array([ids], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)]
    wanted = model.generate(torch.tensor([ids]), max_length=64, min_length=64, do_sample=False)[0].tolist()
    assert found == wanted
