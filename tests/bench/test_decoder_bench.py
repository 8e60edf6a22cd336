"""On a CPU, one thread each: a decoder against the graphs that it takes the place of, and against eager PyTorch.

    prompt   512 tokens at once           against the whole model's graph
    token    one token after those        against the graph of one step (`--step`)
    text     512 tokens, then 64 more     against `generate` of transformers
    builder  the same text                against the graph that onnxruntime-genai's own builder makes; ours with keys
                                          and values that are copied, and in buffers (`--attention contrib`)

Four layers at d = 512, batch 1, random weights: experts (8, 2 of them a token), and a hybrid (three layers of Mamba-2,
one of attention, experts). Times are medians in ms; all forms take turns in random order.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from moe_export import Decoder
from moe_export.export.decoder.genai import FILE, genai_config
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.export.pipeline import Graph, Options, export_subject

transformers: Any = pytest.importorskip("transformers")

PROMPT, NEW, WORDS = 512, 64, 1000
ROUNDS = 15
NOISE = 1.1
"""Other work on the machine: how much slower than the mark ours may look."""
SIZES = {
    "vocab_size": WORDS, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def experts() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def hybrid() -> Any:
    config = transformers.GraniteMoeHybridConfig(
        **SIZES, layer_types=["mamba", "mamba", "attention", "mamba"], num_local_experts=8, num_experts_per_tok=2,
        shared_intermediate_size=512, mamba_n_heads=16, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=64,
        mamba_chunk_size=64,
    )  # fmt: skip
    return transformers.GraniteMoeHybridForCausalLM(config)


def dense() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def tokenizer() -> Any:
    """One word for each id."""
    tokenizers: Any = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))


MODELS: dict[str, Callable[[], Any]] = {"experts": experts, "hybrid": hybrid}


@pytest.fixture(autouse=True)
def one_thread_for_eager() -> Iterator[None]:
    """As many as onnxruntime is given."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def exported(model: Any, **options: Any) -> tuple[Graph, ...]:
    ids = {"input_ids": torch.randint(3, WORDS, (2, 12))}
    subject = make_subject(model, (), ids, source=Path(__file__), how="bench")
    return export_subject(subject, Options(gates=False, simplify=False, **options))


def session(graph: Graph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def medians(runs: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """In ms; the forms take turns in an order that is drawn for each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


class Fed:
    """A session of a decoder or of a step, fed with tokens and with what it keeps."""

    def __init__(self, graph: Graph) -> None:
        self._session = session(graph)
        self._inputs = self._session.get_inputs()

    def first(self) -> dict[str, np.ndarray]:
        """What it keeps before the first token."""
        return {
            value.name: np.zeros(
                [1 if size == "batch" else 0 if isinstance(size, str) else size for size in value.shape], np.float32
            )
            for value in self._inputs
            if value.name.startswith("past_key_values.")
        }  # fmt: skip

    def run(self, ids: np.ndarray, kept: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Logits, and what it keeps for the next call, by the names of inputs."""
        past = next((x.shape[2] for name, x in kept.items() if name.endswith(".key")), 0)
        count = past + ids.shape[1]
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(past, count)[None],
            **kept,
        }
        names = [value.name for value in self._session.get_outputs()]
        fed = {value.name: given[value.name] for value in self._inputs}
        return dict(zip(names, self._session.run(None, fed), strict=True))

    def after(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """What it keeps after tokens."""
        found = self.run(ids, self.first())
        return {name: found[name.replace("past_key_values", "present")] for name in self.first()}


@pytest.mark.parametrize("name", MODELS)
def test_against_the_graphs_that_it_replaces(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids = np.random.default_rng(0).integers(3, WORDS, (1, PROMPT))
    (decoder,) = exported(model, decoder=True)
    whole, step = exported(model, decode=True)
    write_model(decoder.model, tmp_path / "model.onnx")
    ours, stepped, at_once = Fed(decoder), Fed(step), session(whole)
    kept, token = ours.after(ids), ids[:, :1]
    wanted = at_once.run(["logits"], {"input_ids": ids})[0]
    np.testing.assert_allclose(ours.run(ids, ours.first())["logits"], wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        ours.run(token, kept)["logits"], stepped.run(token, kept)["logits"], rtol=1e-3, atol=1e-4
    )
    row = medians(
        {
            "prompt": lambda: ours.run(ids, ours.first()),
            "whole": lambda: at_once.run(None, {"input_ids": ids}),
            "token": lambda: ours.run(token, kept),
            "step": lambda: stepped.run(token, kept),
        }
    )
    print(f"\n{name:8s}" + "  ".join(f"{key} {value:.2f} ms" for key, value in row.items()))
    print(
        f"        {len(list(decoder.model.graph.all_nodes()))} nodes, step {len(list(step.model.graph.all_nodes()))}"
    )
    assert row["prompt"] < 1.1 * NOISE * row["whole"]
    assert row["token"] < 1.1 * NOISE * row["step"]


@pytest.mark.parametrize("name", MODELS)
def test_against_eager(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids = torch.randint(3, WORDS, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    write_model(exported(model, decoder=True)[0].model, tmp_path / "model.onnx")
    decoder = Decoder(tmp_path / "model.onnx", threads=1)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    row = medians(
        {
            "ours": lambda: decoder.generate(ids.numpy(), max_new_tokens=NEW),
            "eager": lambda: model.generate(ids, **settings),
        },
        rounds=5,
    )
    print(f"\n{name:8s}" + "  ".join(f"{key} {value:.0f} ms" for key, value in row.items()))
    assert row["eager"] > 3 * row["ours"]


def test_against_the_runtimes_own_builder(tmp_path: Path) -> None:
    """All graphs under onnxruntime-genai; a model without experts, which both take, in float32."""
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install --no-deps onnxruntime-genai")
    torch.manual_seed(0)
    model = dense().eval()
    model.save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")  # its builder copies one, and makes none
    for name, options in (("copied", {}), ("buffered", {"attention": "contrib"})):
        (graph,) = exported(model, decoder=True, **options)
        (tmp_path / name).mkdir()
        write_model(graph.model, tmp_path / name / "model.onnx")
        config = genai_config(graph.reference.module, graph.model.graph, "model.onnx")
        (tmp_path / name / FILE).write_text(config)
        assert f'"past_present_share_buffer": {str(name == "buffered").lower()}' in config
    theirs = tmp_path / "theirs"
    command = [
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(tmp_path / "source"), "-o", str(theirs),
        "-p", "fp32", "-e", "cpu", "-c", str(tmp_path / "cache"),
    ]  # fmt: skip
    built = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if not (theirs / FILE).is_file():
        pytest.skip(f"its builder does not work here: {built.stderr.strip().splitlines()[-1]}")
    ids = np.random.default_rng(0).integers(3, WORDS, (1, PROMPT)).astype(np.int32)

    def runs(folder: Path) -> Callable[[], list[int]]:
        document = json.loads((folder / FILE).read_text())
        document["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": 1}
        (folder / FILE).write_text(json.dumps(document))
        opened = genai.Model(str(folder))

        def run() -> list[int]:
            parameters = genai.GeneratorParams(opened)
            parameters.set_search_options(max_length=PROMPT + NEW, min_length=PROMPT + NEW, do_sample=False)
            generator = genai.Generator(opened, parameters)
            generator.append_tokens(ids)
            while not generator.is_done():
                generator.generate_next_token()
            return [int(token) for token in generator.get_sequence(0)]

        return run

    forms = {name: runs(tmp_path / name) for name in ("copied", "buffered", "theirs")}
    assert forms["copied"]() == forms["buffered"]() == forms["theirs"]()
    row = medians(forms, rounds=9)
    print("\n" + "  ".join(f"{key} {value:.0f} ms" for key, value in row.items()))
    assert row["buffered"] < NOISE * row["theirs"]
