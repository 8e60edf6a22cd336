"""`--hf`: a model as it is published, from its folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_export.cli import run
from moe_export.errors import UsageError
from moe_export.export.frontend.load import load_subject
from moe_export.export.frontend.pretrained import folder_of, tokenizer_files
from moe_export.export.weights import lazy
from moe_export.export.weights.lazy import lazy_weight_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("hub") / "tiny.v0.1"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=1, eos_token_id=39, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    words = Tokenizer(models.WordLevel({f"w{word}": word for word in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(place)
    return place


@pytest.mark.slow
def test_a_decoder_that_reads_text(folder, tmp_path, capsys):
    command = ["--hf", str(folder), "--decoder", "--no-verify", "-o", str(tmp_path)]
    assert run(command) == 0
    assert run(command) == 0  # its own files, and copies of the same tokenizer, are in nobody's way
    written = {path.name for path in tmp_path.iterdir()}
    files = {
        "model.onnx",
        "model.report.json",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files <= written
    assert json.loads((tmp_path / "genai_config.json").read_text())["model"]["eos_token_id"] == 39
    capsys.readouterr()
    assert run(["generate", str(tmp_path), "--prompt", "w5 w17", "--max-new-tokens", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prompt"] == [5, 17]
    assert document["text"].split() == [f"w{word}" for word in document["tokens"]]
    model = load_subject(folder).module
    ids = torch.tensor([[5, 17]])
    wanted = model.generate(ids, max_new_tokens=3, do_sample=False)[0, 2:].tolist()
    assert document["tokens"] == wanted[: len(document["tokens"])]


@pytest.mark.slow
def test_a_tokenizer_of_others_is_not_overwritten(folder, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert run(["--hf", str(folder), "--decoder", "--no-verify", "-o", str(tmp_path)]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "model.onnx").exists()


def test_the_folder_as_a_model(folder):
    subject = load_subject(folder)
    assert (subject.source.stem, list(subject.inputs)) == ("model", ["input_ids"])
    assert [path.name for path in tokenizer_files(folder)] == ["tokenizer.json", "tokenizer_config.json"]


def test_weights_of_a_large_model_stay_in_their_file(folder, monkeypatch):
    monkeypatch.setattr(lazy, "SMALL", 100)
    small, large = load_subject(folder), load_subject(folder, memory=1000)
    assert small.weights is None
    assert large.weights is not None
    assert not large.weights.absent
    assert large.weights.files == (folder / "model.safetensors",)
    for name, weight in large.module.named_parameters():
        assert torch.equal(weight, small.module.get_parameter(name))
        item = lazy_weight_of(weight)
        assert (item is not None) == (weight.nbytes > 100)
        assert item is None or item.recipe.byte_range().file == folder / "model.safetensors"


@pytest.fixture
def quantized(folder, tmp_path):
    """The folder with FP8 weights in blocks of 8 x 8, like DeepSeek-V3's; and the weights that they stand for."""
    state = load_file(folder / "model.safetensors")
    weights = {}
    for name in [name for name in state if ".mlp." in name]:
        rows, columns = state[name].shape
        blocks = state[name].view(rows // 8, 8, columns // 8, 8)
        scales = blocks.abs().amax((1, 3)) / 448
        spread = scales[:, None, :, None].expand(-1, 8, -1, 8).reshape(rows, columns)
        state[name] = (state[name] / spread).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scales
        weights[name] = state[name].float() * spread
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path, weights


def test_weights_that_are_stored_quantized_are_made_floats(quantized):
    """transformers itself would want a package for that, or a GPU."""
    place, weights = quantized
    subject = load_subject(place)
    own = subject.module.state_dict()
    assert len(weights) == 3
    for name, weight in weights.items():
        assert (own[name] == weight).all()
    assert "weights that are stored quantized" in subject.notes[-1]


def test_a_weight_that_is_not_stored_is_not_made_up(quantized):
    place, _ = quantized
    state = load_file(place / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"has no model\.norm\.weight"):
        load_subject(place)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["export"], "no model is named"),
        (["--hf", "nowhere"], "no such folder: nowhere"),
        (["--hf", "./no/where"], "no such folder: ./no/where"),
        (["model.py", "--decoder", "--step"], "contradict each other"),
        (["model.py", "--hf", "."], "stands in place of model.py"),
        (["--hf", "."], "is a folder without config.json"),
        (["--hf", "broken"], "transformers cannot load"),
        (["--hf", "broken", "--init", "a=1"], "--init and --input go with a class"),
    ],
)
def test_wrong_use(tmp_path, monkeypatch, capsys, arguments, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llama"}')
    assert run([*arguments, "-o", "out"]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_name_on_the_hub_that_it_does_not_give(monkeypatch):
    import huggingface_hub

    from moe_export import UsageError

    def absent(name, **how):
        raise OSError(f"no {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(
        UsageError, match="owner/model is no folder, and the hub did not give it: no owner/model"
    ):
        folder_of("owner/model")
