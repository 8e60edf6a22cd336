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


def written(name, folder):
    model = BY_NAME[name].build_lm()
    ids = {"input_ids": torch.randint(3, 32, (2, 7))}
    subject = make_subject(model, (), ids, source=folder / "model.py", how="a test")
    graph = export_subject(subject, Options(gates=False, simplify=False, decoder=True))[0]
    write_model(graph.model, folder / "model.onnx")
    text = genai_config(graph.reference.module, graph.model.graph, "model.onnx")
    (folder / FILE).write_text(text)
    return model


@pytest.mark.parametrize("name", one_in(len(CARRIED), CARRIED))
def test_its_greedy_text_is_that_of_transformers(name, tmp_path):
    model = written(name, tmp_path)
    config = json.loads((tmp_path / FILE).read_text())["model"]
    key_heads = model.config.num_key_value_heads
    assert config["vocab_size"] == model.get_input_embeddings().num_embeddings
    assert config["decoder"]["num_key_value_heads"] == key_heads
    assert kind_of(tmp_path / FILE) == "report"
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install --no-deps onnxruntime-genai")
    opened = genai.Model(str(tmp_path))
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
