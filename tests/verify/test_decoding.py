"""A decoder run in parts, against one run over all: engines of a few lines that remember, or do not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from moe_export.verify import Tolerance, compare
from moe_export.verify.decoding import AtOnce, InParts, Results, decoding_cases
from moe_export.verify.specs import Array, TensorSpec

WORDS = 11
RESULTS = Results(["logits"], [], "logits")
INPUTS = (
    TensorSpec("ids", "int64", ("batch", "sequence")),
    TensorSpec("attention_mask", "int64", ("batch", "past_sequence + sequence")),
    TensorSpec("position_ids", "int64", ("batch", "sequence")),
    TensorSpec("past_key_values.0.key", "float32", ("batch", 1, "past_sequence", 1)),
)


def logits_of(ids: Array, mask: Array, places: Array) -> Array:
    """The sum so far of the tokens that count, and the place, as a bump over the words."""
    total = (ids * mask).cumsum(1) + places
    words = np.arange(WORDS)
    found: Array = -((words - total[..., None] % WORDS) ** 2).astype(np.float32)
    return found


def whole(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"logits": logits_of(inputs["ids"], inputs["attention_mask"], inputs["position_ids"])}


class Sums:
    """The decoder: keeps all tokens as keys."""

    name = "sums"

    def __init__(self, forgets: bool = False, masked: bool = True, off: float = 0.0) -> None:
        self.forgets, self.masked, self.off = forgets, masked, off

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert set(inputs) == {spec.name for spec in INPUTS}
        ids, mask, kept = inputs["ids"], inputs["attention_mask"], inputs["past_key_values.0.key"]
        assert mask.shape[1] == kept.shape[2] + ids.shape[1]
        past = kept[:, 0, :, 0] * (0 if self.forgets else 1)
        everything = np.concatenate([past.astype(np.int64), ids], 1)
        places = np.concatenate([past.astype(np.int64) * 0, inputs["position_ids"]], 1)
        found = logits_of(everything, mask if self.masked else np.ones_like(mask), places)
        present = np.concatenate([kept, ids[:, None, :, None].astype(np.float32)], 2)
        return {"logits": found[:, kept.shape[2] :] + np.float32(self.off), "present.0.key": present}


def report_of(decoder: Sums):
    draw = np.random.default_rng(1)
    in_parts = InParts(decoder, INPUTS, ["ids"], RESULTS)
    model = AtOnce(whole, RESULTS, "whole")
    made = decoding_cases(
        in_parts, model, lambda name, count: draw.integers(1, WORDS, (2, count)), 0, padded=True
    )
    return compare(
        model,
        in_parts,
        made,
        tolerance=Tolerance(),
        routing=RESULTS.pairs,
        other_sizes=0,
    )


def test_all_parts_are_equal():
    report = report_of(Sums())
    assert report.verdict == "equal", str(report)
    assert [case.label for case in report.cases] == [
        "prompt at once", "token by token", "a prompt of 4, then token by token", "parts of 4, 3, 2", "parts of 1, 8",
        "a text of 64 tokens",
    ]  # fmt: skip


@pytest.mark.parametrize("decoder", [Sums(forgets=True), Sums(masked=False), Sums(off=0.01)])
def test_what_is_wrong_is_seen(decoder):
    report = report_of(decoder)
    assert report.verdict == "not equal"
    assert any(row.output == "logits" and not row.equal for row in report.rows)


def test_a_decoder_that_only_forgets_is_right_at_once():
    report = report_of(Sums(forgets=True))
    wrong = [case.label for case in report.cases if any(not judged.ok for judged in case.judgements)]
    assert "prompt at once" not in wrong
    assert "token by token" in wrong


@pytest.mark.parametrize(("longest", "made"), [(70, 64), (69, 32), (38, 32), (37, 16)])
def test_a_text_is_no_longer_than_the_model_takes(longest, made):
    def limited(inputs):
        if inputs["ids"].shape[1] > longest:
            raise IndexError("no such place")
        return whole(inputs)

    in_parts = InParts(Sums(), INPUTS, ["ids"], RESULTS)
    draw = np.random.default_rng(1)
    model = AtOnce(limited, RESULTS, "limited")
    *_, text = decoding_cases(in_parts, model, lambda _, n: draw.integers(1, WORDS, (2, n)), 0, padded=True)
    assert text.label == f"a text of {made} tokens"
    assert text.inputs["ids"].shape == (2, 6 + made)
