"""`moe-export generate`, and `moe_export.Decoder` behind it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from counting_decoder import WORDS, continued, write_decoder
from onnx import TensorProto, helper

from moe_export import Decoder, UsageError
from moe_export.cli import run


@pytest.fixture
def graph(tmp_path):
    return write_decoder(tmp_path / "model.onnx")


def test_text_and_speed(graph, capsys):
    assert run(["generate", str(graph.parent), "--ids", "5,17", "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(" ".join(map(str, continued([5, 17], 4)[2:])))
    assert "2 tokens of a prompt, 4 new ones: " in said


def test_json(graph, capsys):
    assert run(["generate", str(graph), "--ids", "5", "--max-new-tokens", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["prompt"], document["tokens"]) == ([5], continued([5], 3)[1:])
    assert document["prompt_tokens_per_second"] > 0


def test_it_ends_where_the_text_does(graph, capsys):
    made = continued([5], 6)[1:]
    config = {"model": {"eos_token_id": made[2], "decoder": {"filename": "model.onnx"}}}
    (graph.parent / "genai_config.json").write_text(json.dumps(config))
    assert run(["generate", str(graph.parent), "--ids", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == made[:3]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "one of --prompt and --ids"),
        (["--ids", "5", "--prompt", "a"], "one of --prompt and --ids"),
        (["--ids", "5,x"], "is not a list of token ids"),
        (["--ids", str(WORDS)], f"token ids are 0 to {WORDS - 1}"),
        (["--ids", "-1"], f"token ids are 0 to {WORDS - 1}"),
        (["--prompt", "once"], "has no tokenizer"),
        (["--ids", "5", "--max-new-tokens", "0"], "0 is not in the range"),
    ],
)
def test_wrong_use(graph, capsys, arguments, error):
    assert run(["generate", str(graph.parent), *arguments]) == 2
    assert error in capsys.readouterr().err


def test_a_folder_without_one_graph(graph, capsys):
    write_decoder(graph.with_name("other.onnx"))
    assert run(["generate", str(graph.parent), "--ids", "5"]) == 2
    assert "has no one graph to run: model.onnx, other.onnx" in capsys.readouterr().err


def test_a_graph_that_is_no_decoder(tmp_path, capsys):
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        *([helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])] for name in "xy"),
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "x.onnx",
    )
    assert run(["generate", str(tmp_path), "--ids", "5"]) == 2
    assert "no decoder" in capsys.readouterr().err


def test_rows_and_draws(graph):
    decoder = Decoder(graph)
    assert decoder.generate([[5, 17], [3, 4]], max_new_tokens=5).tolist() == [
        continued([5, 17], 5),
        continued([3, 4], 5),
    ]
    drawn = [decoder.generate([[5]], max_new_tokens=9, top_k=3, seed=seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert decoder.generate([[5]], max_new_tokens=1).shape == (1, 2)
    assert decoder.speed is not None
    assert decoder.speed.decode == 0


def test_a_row_that_has_ended_repeats_its_end(graph):
    first = continued([5], 8)
    text = Decoder(graph).generate([[5], [6]], max_new_tokens=8, stop=[first[3]])
    assert text[0].tolist() == first[:4] + [first[3]] * (text.shape[1] - 4)


@pytest.mark.parametrize("ids", [[], [[]], [[1, 2], [3]]])
def test_a_prompt_is_rows_of_one_length(graph, ids):
    with pytest.raises(UsageError, match="rows of one length"):
        Decoder(graph).generate(ids)


def test_the_likeliest_of_many(graph):
    """Drawn from as many as there are words, the draw follows the probabilities: a one-hot of logits 0 and 1."""
    text = Decoder(graph).generate(np.full((400, 1), 5), max_new_tokens=1, top_k=WORDS)
    share = (text[:, 1] == continued([5], 1)[1]).mean()
    assert abs(share - np.e / (np.e + WORDS - 1)) < 0.08
