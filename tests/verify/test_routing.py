import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_export.verify import Margin, RoutingPair, Tolerance, judge_routing

PAIR = RoutingPair("idx", "weight", "scores")
NO_SCORES = RoutingPair("idx", "weight")
T, E, K = 6, 8, 3


def gate(seed=0, tokens=T, experts=E, k=K):
    """A real gate's outputs: the k best of softmax scores, normalised weights."""
    logits = np.random.default_rng(seed).normal(size=(tokens, experts))
    scores = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)
    idx = np.argsort(-scores, -1)[:, :k].astype(np.int64)
    weight = np.take_along_axis(scores, idx, -1)
    return {"idx": idx, "weight": weight / weight.sum(-1, keepdims=True), "scores": scores}


def copied(outputs):
    return {name: array.copy() for name, array in outputs.items() if name != "scores"}


def judged(reference, candidate, pair=PAIR, tolerance=None):
    return judge_routing(pair, reference, candidate, tolerance or Tolerance())


@given(st.integers(0, 10_000), st.sampled_from([PAIR, NO_SCORES]))
def test_the_order_of_a_tokens_experts_is_free(seed, pair):
    reference = gate(seed)
    shuffle = np.random.default_rng(seed).permuted(np.tile(np.arange(K), (T, 1)), axis=-1)
    candidate = {n: np.take_along_axis(reference[n], shuffle, -1) for n in ("idx", "weight")}
    ids, weights = judged(reference, candidate, pair)
    assert (ids.ok, weights.ok, ids.flips) == (True, True, 0)
    assert (ids.kind, weights.kind) == ("routing", "float")


def test_weights_that_stay_while_the_ids_move_are_wrong():
    reference = gate()
    candidate = copied(reference) | {"idx": reference["idx"][:, ::-1]}
    ids, weights = judged(reference, candidate)
    assert ids.ok
    assert not weights.ok
    assert weights.bad >= T


@pytest.mark.parametrize("pair", [PAIR, NO_SCORES])
def test_ids_off_by_one_are_wrong(pair):
    reference = gate()
    ids, _ = judged(reference, copied(reference) | {"idx": (reference["idx"] + 1) % E}, pair)
    assert not ids.ok
    assert "6 of 6 tokens go to another expert: token 0 to" in ids.reason
    assert ("no tie" in ids.reason) == (pair is PAIR)


def tied(gap):
    """Token 0: expert 1 is picked, expert 3 scores `gap` less."""
    scores = np.array([[0.1, 0.3, 0.4, 0.3 - gap], [0.4, 0.3, 0.2, 0.1]], np.float32)
    reference = {
        "idx": np.array([[2, 1], [0, 1]]),
        "weight": np.array([[0.4, 0.3], [0.4, 0.3]], np.float32),
        "scores": scores,
    }
    return reference, {
        "idx": np.array([[3, 2], [1, 0]]),
        "weight": np.array([[0.3, 0.4], [0.3, 0.4]], np.float32),
    }


def test_a_true_tie_is_excused_and_counted():
    for gap in (0, 1e-6):
        ids, weights = judged(*tied(gap))
        assert (ids.ok, ids.flips, weights.ok) == (True, 1, True)


def test_a_tie_outside_the_margin_is_not():
    ids, _ = judged(*tied(1e-3))
    assert (
        ids.reason == "1 of 2 tokens go to another expert: token 0 to 3, not 1 (scores 0.299 and 0.3, no tie)"
    )
    assert (ids.bad, ids.flips) == (1, 0)
    assert (ids.worst.index, ids.worst.candidate, ids.worst.reference) == ((0,), 3, 1)


def test_the_margin_of_a_tie_is_the_tolerance_of_the_scores():
    wide = Tolerance(outputs={"scores": Margin(0, 2e-3)})
    assert judged(*tied(1e-3), tolerance=wide)[0].ok


def test_without_scores_no_difference_is_excused():
    ids, _ = judged(*tied(0), pair=NO_SCORES)
    assert not ids.ok
    assert ids.reason == "1 of 2 tokens go to another expert: token 0 to 3, not 1"


@pytest.mark.parametrize("unknown", [[1], [3], [1, 3], [1, 2, 3]])
def test_a_nan_score_among_numbers_ties_with_nothing(unknown):
    reference, candidate = tied(0)
    reference["scores"][0, unknown] = np.nan
    assert not judged(reference, candidate)[0].ok


def test_where_all_scores_are_nan_any_experts_are_as_good_for_that_token_alone():
    reference, candidate = tied(0)
    reference["scores"][0] = np.nan
    ids, _ = judged(reference, candidate)
    assert (ids.ok, ids.flips) == (True, 1)
    candidate["idx"][1, 1] = 2  # the second token has scores
    assert not judged(reference, candidate)[0].ok
    candidate["idx"][1, 1], candidate["idx"][0] = 0, [3, 3]
    assert "named twice" in judged(reference, candidate)[0].reason


def test_several_ties_in_one_token_are_held_each_against_its_nearest():
    scores = np.array([[0.5, 0.5, 0.2, 0.2, 0.2]], np.float32)
    reference = {"idx": np.array([[0, 2]]), "scores": scores}
    pair = RoutingPair("idx", None, "scores")
    (ids,) = judged(reference, {"idx": np.array([[4, 1]])}, pair)
    assert (ids.ok, ids.flips) == (True, 1)
    (ids,) = judged(reference, {"idx": np.array([[3, 4]])}, pair)
    assert not ids.ok


def test_a_wrong_weight_of_an_expert_in_a_tie_is_wrong():
    reference, candidate = tied(0)
    candidate["weight"][0, 0] = 0.2
    ids, weights = judged(reference, candidate)
    assert ids.ok
    assert weights.bad == 1


def test_an_expert_named_twice_is_an_error_even_where_all_scores_tie():
    reference = gate()
    reference["scores"][:] = 0.125
    candidate = copied(reference)
    candidate["idx"][4] = [5, 2, 5]
    ids, weights = judged(reference, candidate)
    assert ids.reason == "an expert is named twice in 1 of 6 tokens: token 4 goes to [5, 2, 5]"
    assert not weights.ok
    ids, _ = judged(candidate | {"scores": reference["scores"]}, copied(reference))
    assert ids.reason.startswith("the reference: an expert is named twice")


def test_a_second_choice_that_is_the_first_once_more_on_both_sides_is_equal():
    """The other scores of a token have underflown to 0, and so has that of its first choice, taken away."""
    reference = gate()
    reference["idx"][4] = [5, 2, 5]
    candidate = copied(reference)
    assert [each.ok for each in judged(reference, candidate)] == [True, True]
    candidate["weight"][4, 2] += 0.1
    assert [each.ok for each in judged(reference, candidate)] == [True, False]


@pytest.mark.parametrize("outside", [-1, E])
def test_an_id_that_is_no_expert_is_an_error(outside):
    reference = gate()
    candidate = copied(reference)
    candidate["idx"][1, 0] = outside
    assert judged(reference, candidate)[0].reason == f"expert {outside} is none of the 8 with scores"


def test_leading_axes_may_differ_between_ids_and_scores():
    reference = gate()
    reference["scores"] = reference["scores"].reshape(2, 3, E)
    candidate = copied(reference) | {"idx": reference["idx"][:, ::-1], "weight": reference["weight"][:, ::-1]}
    assert all(found.ok for found in judged(reference, candidate))
    reference = {name: array.reshape(2, 3, -1) for name, array in reference.items()}
    candidate = {name: array.reshape(2, 3, -1) for name, array in candidate.items()}
    assert all(found.ok for found in judged(reference, candidate))


def test_top_one_without_an_axis_of_k():
    reference = gate(k=1)
    reference |= {"idx": reference["idx"][:, 0], "weight": reference["weight"][:, 0]}
    assert all(found.ok for found in judged(reference, copied(reference)))
    candidate = copied(reference)
    candidate["idx"][2] = (candidate["idx"][2] + 1) % E
    assert "1 of 6 tokens" in judged(reference, candidate)[0].reason


def test_no_tokens_are_no_error():
    reference = {name: array[:0] for name, array in gate().items()}
    assert all(found.ok for found in judged(reference, copied(reference)))
    assert all(found.ok for found in judged(reference, copied(reference), NO_SCORES))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"idx": np.zeros((T, K), np.int32)}, "dtype int32, expected int64"),
        ({"idx": np.zeros((T, K + 1), np.int64)}, "shape [6, 4], expected [6, 3]"),
        ({"idx": None}, "missing, expected int64[6, 3]"),
    ],
)
def test_ids_of_another_form_are_wrong_and_take_their_weights_along(change, reason):
    reference = gate()
    candidate = {n: a for n, a in (copied(reference) | change).items() if a is not None}
    ids, weights = judged(reference, candidate)
    assert ids.reason == reason
    assert weights.reason == "cannot be matched to the experts of 'idx'"


def test_weights_of_another_form_or_missing_are_wrong():
    reference = gate()
    candidate = copied(reference) | {"weight": reference["weight"].astype(np.float64)}
    assert judged(reference, candidate)[1].reason == "dtype float64, expected float32"
    assert judged(reference, {"idx": reference["idx"]})[1].reason == "missing, expected float32[6, 3]"


def test_what_cannot_be_a_routing_says_so():
    reference = gate()
    as_floats = {"idx": reference["weight"], "weight": reference["weight"]}
    assert (
        judged(as_floats, as_floats, NO_SCORES)[0].reason == "expert ids must be integers, these are float32"
    )
    short = reference | {"scores": reference["scores"][:4]}
    assert judged(short, copied(reference))[0].reason == "there are scores for 4 tokens, but ids for 6"
