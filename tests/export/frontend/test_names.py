"""Inputs and outputs are called as the model's code calls them, or else as other language models' graphs do."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn

WORDS, WIDTH, HEADS = 37, 8, 2
IDS = torch.randint(0, WORDS, (2, 5))


@dataclasses.dataclass
class Output:
    """As transformers' models return it."""

    logits: torch.Tensor
    past_key_values: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class Layer(NamedTuple):
    k: torch.Tensor
    v: torch.Tensor


class Language(nn.Module):
    """Attention over what earlier steps left, and scores for each word; returns what a function makes of both."""

    def __init__(self, function):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.function = function

    def forward(self, input_ids, past_key_values=()):
        x = self.embed(input_ids)
        batch, length, width = x.shape
        presents = []
        for keys, values in past_key_values:
            k, v = (
                torch.cat([past, x.view(batch, length, HEADS, -1).transpose(1, 2)], 2)
                for past in (keys, values)
            )
            q = x.view(batch, length, HEADS, -1).transpose(1, 2)
            mixed = torch.softmax(q @ k.transpose(2, 3), -1) @ v
            x = x + mixed.transpose(1, 2).reshape(batch, length, width)
            presents.append((k, v))
        return self.function(self.head(x), presents, x)


def cache(layers=2, past=3):
    shape = (2, HEADS, past, WIDTH // HEADS)
    return [(torch.randn(shape), torch.randn(shape)) for _ in range(layers)]


def pasts(count, name="past_key_values"):
    return [f"{name}.{layer}.{part}" for layer in range(count) for part in ("key", "value")]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda scores, presents, x: scores, ["logits"]),
        (lambda scores, presents, x: (scores,), ["logits"]),
        (lambda scores, presents, x: x, ["output"]),
        (lambda scores, presents, x: torch.softmax(scores, -1), ["output"]),
        (lambda scores, presents, x: (x, scores), ["output_0", "logits"]),
        (lambda scores, presents, x: (scores, scores + 1), ["output_0", "output_1"]),
        (lambda scores, presents, x: {"scores": scores}, ["scores"]),
        (lambda scores, presents, x: (scores, presents), ["logits", *pasts(2, "present")]),
        (lambda scores, presents, x: presents, pasts(2, "present")),
        (lambda scores, presents, x: (presents, scores, presents), [
            *pasts(2, "output_0"), "logits", *pasts(2, "output_2")
        ]),
        (lambda scores, presents, x: Output(scores, presents), ["logits", *pasts(2, "present")]),
        (lambda scores, presents, x: Output(scores, None, (x, x)), [
            "logits", "hidden_states.0", "hidden_states.1"
        ]),
        (lambda scores, presents, x: {"out": scores, "kv": presents}, ["out", *pasts(2, "kv")]),
        (lambda scores, presents, x: {"kv": [Layer(*pair) for pair in presents]}, [
            "kv.0.k", "kv.0.v", "kv.1.k", "kv.1.v"
        ]),
    ],
)  # fmt: skip
def test_what_a_language_model_returns(tools, function, names):
    subject = tools.subject(Language(function), IDS, cache())
    assert list(subject.inputs) == ["input_ids", *pasts(2)]
    assert list(subject.outputs) == names


def test_a_returned_letter_is_no_name_but_a_word_is(tools):
    class Letter(Language):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for layer in (torch.relu, self.head):
                x = layer(x)
            return x

    class Word(Language):
        def forward(self, input_ids):
            guess = self.head(self.embed(input_ids))
            return guess, None

    assert tools.subject(Letter(None), IDS).outputs == ("logits",)
    assert tools.subject(Word(None), IDS).outputs == ("guess",)


def test_a_table_as_wide_as_it_is_long_decides_nothing(tools):
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 8)

        def forward(self, ids):
            return self.embed(ids) + 1

    assert tools.subject(Square(), torch.randint(0, 8, (2, 5))).outputs == ("output",)


def test_what_carries_an_inputs_name_is_what_comes_out_of_it(tools):
    class Step(nn.Module):
        def forward(self, x, past_sum):
            return {"y": x + past_sum, "past_sum": past_sum + x, "x": x}

    subject = tools.subject(Step(), torch.ones(2, 3), torch.ones(2, 3))
    assert subject.outputs == ("y", "present_sum", "x_1")


def test_pairs_that_are_no_keys_and_values(tools):
    class Cells(nn.Module):
        def forward(self, x, states):
            return x, [(h + x, c * x) for h, c in states]

    pair = (torch.ones(2, 3), torch.ones(2, 3))
    subject = tools.subject(Cells(), torch.ones(2, 3), [pair, pair])
    assert list(subject.inputs) == ["x", "states.0.0", "states.0.1", "states.1.0", "states.1.1"]
    assert subject.outputs == (
        "output_0",
        *(f"output_1.{place}" for place in ("0.0", "0.1", "1.0", "1.1")),
    )


def test_the_length_of_a_cache_is_one_dimension(tools):
    model = Language(lambda scores, presents, x: (scores, presents))
    graph = tools.graph(model, IDS, cache())
    assert [dim.name for dim in graph.traced.dims] == ["batch", "sequence", "past_sequence"]
    assert not graph.traced.conditions
    shapes = {value.name: list(map(str, value.shape)) for value in graph.model.graph.outputs}
    assert shapes["logits"] == ["batch", "sequence", str(WORDS)]
    assert {tuple(shapes[name]) for name in pasts(2, "present")} == {
        ("batch", str(HEADS), "past_sequence + sequence", str(WIDTH // HEADS))
    }
    assert graph.traced.inputs["past_key_values.1.value"] == ("batch", HEADS, "past_sequence", WIDTH // HEADS)
    grown = [past for pair in cache(past=9) for past in pair]
    tools.equal(graph, torch.randint(0, WORDS, (2, 4)), *grown)
