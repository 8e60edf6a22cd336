"""Kinds of values: what each is, which inputs follow it, and that a label and a seed make it again."""

import ml_dtypes
import numpy as np
import pytest

from moe_export.errors import UsageError
from moe_export.verify import DimRange, TensorSpec, cases
from moe_export.verify.regimes import REGIMES, padded

X = TensorSpec("x", "float32", ("batch", "seq", 4))
IDS = TensorSpec("ids", "int64", ("batch", "seq"))
MASK = TensorSpec("mask", "int64", ("batch", "seq"))
DIMS = [DimRange("batch", 2), DimRange("seq", 10)]


def example():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(0, 1, (2, 10, 4)).astype(np.float32),
        "ids": rng.choice([5, 17, 900], (2, 10)),
        "mask": np.ones((2, 10), np.int64),
    }


def made(names=("x",), **options):
    specs = [spec for spec in (X, IDS, MASK) if spec.name in names]
    found = cases(specs, DIMS, {name: example()[name] for name in names}, **options)
    return {(case.label, case.seed): case for case in found}


def values(regime, **options):
    return made(thorough=True, **options)[regime, 0].inputs["x"]


def test_without_thorough_only_the_four_that_find_most_at_the_traced_sizes():
    found = [case for case in made().values() if case.regime != "normal"]
    assert [case.label for case in found] == ["bfloat16 values", "zeros", "one token throughout", "large"]
    assert {tuple(case.sizes.values()) for case in found} == {(2, 10)}


def test_thorough_tries_all_at_the_traced_the_smallest_and_larger_sizes():
    found = [case for case in made(thorough=True).values() if case.regime != "normal"]
    assert {case.regime for case in found} == {regime.name for regime in REGIMES}
    assert {tuple(case.sizes.values()) for case in found} == {(2, 10), (1, 1), (7, 15)}
    assert "one token throughout, batch=7 seq=15" in {case.label for case in found}


def test_what_each_is():
    assert (values("bfloat16 values") == values("bfloat16 values").astype(ml_dtypes.bfloat16)).all()
    assert len(np.unique(values("grid"))) < 10
    assert not values("zeros").any()
    assert len(np.unique(values("one value"))) == 1
    for name in ("one token throughout", "held up", "held down"):
        assert len(np.unique(values(name).reshape(-1, 4), axis=0)) == 1
    assert values("large").std() > 10
    assert 0 < np.abs(values("small")).max() < 0.1
    largest = values("largest").astype(np.float64)
    # The order of a sum does not decide whether it is finite.
    assert 1e38 < np.abs(largest).sum(-1).max() < 3.5e38
    assert np.isfinite(values("largest")).all()
    assert 0 < np.abs(values("smallest")).max() < 1e-36


def test_what_is_never_negative_stays_so():
    positive = {"x": np.abs(example()["x"])}
    for case in cases([X], DIMS, positive, thorough=True):
        assert (case.inputs["x"] >= 0).all(), case.label


def test_ids_follow_one_token_throughout_and_stay_in_range():
    found = made(("ids",), thorough=True)
    assert len(np.unique(found["one token throughout", 0].inputs["ids"])) == 1
    for case in found.values():
        assert set(np.unique(case.inputs["ids"])) <= {5, 17, 900}
    assert {case.regime for case in found.values()} == {"normal", "one token throughout"}


def test_masks_end_early_and_leave_every_row_a_mark():
    case = made(("x", "mask"))["padded", 0]
    mask = case.inputs["mask"]
    assert set(np.unique(mask)) == {0, 1}
    assert (np.diff(mask, axis=-1) <= 0).all()
    assert (mask.sum(-1) >= 1).all()
    assert case.inputs["x"].std() > 0.5
    assert "padded" not in {label for label, _ in made(("x", "ids"))}


@pytest.mark.parametrize(
    ("mask", "closed"),
    [
        (np.ones((3, 8), bool), False),
        (np.ones((3, 8), np.float32), 0.0),
        (np.where(np.tri(8, dtype=bool), 0, -np.inf).astype(np.float32), -np.inf),
        (np.where(np.tri(8, dtype=bool), 0, -1e9).astype(np.float32), -1e9),
    ],
)
def test_kinds_of_masks(mask, closed):
    found = padded(mask, np.random.default_rng(0))
    assert (found[:, -1] == np.asarray(closed, mask.dtype)).all()
    assert found.dtype == mask.dtype


@pytest.mark.parametrize(
    "values",
    [np.arange(8), np.zeros((3, 8)), np.random.default_rng(0).normal(size=(3, 8)), np.array(True)],
    ids=["ids", "all open or all closed, who knows", "measurements", "scalar"],
)
def test_what_is_no_mask(values):
    assert padded(values, np.random.default_rng(0)) is None


def test_a_label_and_a_seed_make_the_same_values_again():
    one, two = made(thorough=True, seeds=2), made(thorough=True, seeds=2)
    for key, case in one.items():
        np.testing.assert_array_equal(case.inputs["x"], two[key].inputs["x"])
    assert not np.array_equal(one["large", 0].inputs["x"], one["large", 1].inputs["x"])
    alone = {case.label: case for case in cases([X], DIMS, {"x": example()["x"]}, seed=1)}
    np.testing.assert_array_equal(alone["large"].inputs["x"], one["large", 1].inputs["x"])


def test_sizes_that_were_asked_for():
    found = made(at=[{"seq": 123}])
    assert found["batch=2 seq=123", 0].inputs["x"].shape == (2, 123, 4)
    with pytest.raises(UsageError, match="there is no dynamic dimension 'sequence'"):
        made(at=[{"sequence": 3}])


def test_a_maximum_is_tried_unless_it_is_huge():
    def sizes(maximum):
        dims = [DimRange("batch", 2), DimRange("seq", 10, 1, maximum)]
        return {case.sizes["seq"] for case in cases([X], dims, {"x": example()["x"]})}

    assert 500 in sizes(500)
    assert 10**9 not in sizes(10**9)
