"""Kinds of values: what each is, which inputs follow it, and that a label and a seed make it again."""

import ml_dtypes
import numpy as np
import pytest

from moe_export.errors import UsageError
from moe_export.verify import DimRange, TensorSpec, cases
from moe_export.verify.inputs.known import Known
from moe_export.verify.inputs.regimes import MASKS, REGIMES, SIGNED, mask_values

X = TensorSpec("x", "float32", ("batch", "sequence", 4))
IDS = TensorSpec("ids", "int64", ("batch", "sequence"))
MASK = TensorSpec("mask", "int64", ("batch", "sequence"))
DIMS = [DimRange("batch", 2), DimRange("sequence", 10)]


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
    assert [case.label for case in found] == ["bfloat16 values", "zeros", "repeated token", "large values"]
    assert {tuple(case.sizes.values()) for case in found} == {(2, 10)}


def test_thorough_tries_all_at_the_traced_the_smallest_and_larger_sizes():
    found = [case for case in made(thorough=True).values() if case.regime != "normal"]
    assert {case.regime for case in found} == {regime.name for regime in REGIMES}
    assert {tuple(case.sizes.values()) for case in found} == {(2, 10), (1, 1), (7, 15)}
    assert "repeated token, batch=7 sequence=15" in {case.label for case in found}


def test_what_each_is():
    assert (values("bfloat16 values") == values("bfloat16 values").astype(ml_dtypes.bfloat16)).all()
    assert len(np.unique(values("grid"))) < 10
    assert not values("zeros").any()
    assert len(np.unique(values("one value"))) == 1
    for name in ("repeated token", "held up", "held down"):
        assert len(np.unique(values(name).reshape(-1, 4), axis=0)) == 1
    assert values("large values").std() > 10
    assert 0 < np.abs(values("small")).max() < 0.1
    largest = values("largest").astype(np.float64)
    # The order of a sum does not decide whether it is finite.
    assert 1e38 < np.abs(largest).sum(-1).max() < 3.5e38
    assert np.isfinite(values("largest")).all()
    assert 0 < np.abs(values("smallest")).max() < 1e-36


def test_what_is_never_negative_stays_so():
    positive = {"x": np.abs(example()["x"])}
    for case in cases([X], DIMS, positive, thorough=True):
        assert (case.inputs["x"] >= 0).all() or case.regime == SIGNED, case.label


def test_ids_follow_one_token_throughout_and_stay_in_range():
    found = made(("ids",), thorough=True)
    assert len(np.unique(found["repeated token", 0].inputs["ids"])) == 1
    for case in found.values():
        assert set(np.unique(case.inputs["ids"])) <= {5, 17, 900}
    assert {case.regime for case in found.values()} == {"normal", "repeated token"}


def test_masks_end_and_begin_early_and_leave_every_row_a_mark():
    found = made(("x", "mask"))
    for label, falls in (("padded", True), ("padded left", False)):
        mask = found[label, 0].inputs["mask"]
        assert set(np.unique(mask)) == {0, 1}
        assert ((np.diff(mask, axis=-1) <= 0) == falls).any(-1).all()
        assert (np.abs(np.diff(mask, axis=-1)).sum(-1) == 1).all()
    assert found["padded", 0].inputs["x"].std() > 0.5
    assert found["all true", 0].inputs["mask"].all()
    assert not found["all false", 0].inputs["mask"].any()
    assert set(np.unique(found["random mask", 0].inputs["mask"])) == {0, 1}
    assert not {label for label, _ in made(("x", "ids"))} & MASKS.keys()


PADDED_MASKS = [
    (np.ones((3, 8), bool), False),
    (np.zeros((3, 8), bool), False),  # True for what is ignored: padded left is padded, then
    (np.ones((3, 8), np.float32), 0.0),
    (np.where(np.tri(8, dtype=bool), 0, -np.inf).astype(np.float32), -np.inf),
    (np.where(np.tri(8, dtype=bool), 0, -1e9).astype(np.float32), -1e9),
]


@pytest.mark.parametrize(("mask", "closed"), PADDED_MASKS)
def test_kinds_of_masks(mask, closed):
    spec = TensorSpec("mask", mask.dtype.name, mask.shape)
    found = {case.label: case.inputs["mask"] for case in cases([spec], [], {"mask": mask})}
    assert (found["padded"][:, -1] == np.asarray(closed, mask.dtype)).all()
    assert (found["padded left"][:, 0] == np.asarray(closed, mask.dtype)).all()
    assert (found["all false"] == np.asarray(closed, mask.dtype)).all()
    assert {array.dtype for array in found.values()} == {mask.dtype}


def test_a_flag_is_tried_both_ways():
    spec = TensorSpec("flag", "bool", ())
    found = {case.label: case.inputs["flag"] for case in cases([spec], [], {"flag": np.array(True)})}
    assert (bool(found["all true"]), bool(found["all false"])) == (True, False)
    assert "padded" not in found


@pytest.mark.parametrize(
    "values",
    [np.arange(8), np.zeros((3, 8)), np.random.default_rng(0).normal(size=(3, 8))],
    ids=["ids", "all open or all closed, who knows", "measurements"],
)
def test_what_is_no_mask(values):
    assert mask_values(values) is None


@pytest.mark.parametrize(
    ("example", "tried"), [(np.ones, True), (np.zeros, True), (np.abs, True), (np.array, False)]
)
def test_floats_are_normal_whatever_the_example_was(example, tried):
    x = np.random.default_rng(0).normal(size=(2, 10, 4))
    given = (np.full(x.shape, example(())) if example in (np.ones, np.zeros) else example(x)).astype(
        np.float32
    )
    found = {case.label: case.inputs["x"] for case in cases([X], DIMS, {"x": given})}
    assert (SIGNED in found) == tried
    if tried:
        assert -0.3 < found[SIGNED].mean() < 0.3
        assert 0.7 < found[SIGNED].std() < 1.3


def test_an_example_that_nobody_filled_in_is_normal_in_every_case():
    known = Known(unfilled=frozenset({"x"}))
    for case in cases([X], DIMS, {"x": np.zeros((2, 10, 4), np.float32)}, known=known):
        if case.label not in ("example", "zeros"):
            assert (case.inputs["x"] < 0).any() or case.inputs["x"].size < 9, case.label


def test_a_label_and_a_seed_make_the_same_values_again():
    one, two = made(thorough=True, seeds=2), made(thorough=True, seeds=2)
    for key, case in one.items():
        np.testing.assert_array_equal(case.inputs["x"], two[key].inputs["x"])
    assert not np.array_equal(one["large values", 0].inputs["x"], one["large values", 1].inputs["x"])
    alone = {case.label: case for case in cases([X], DIMS, {"x": example()["x"]}, seed=1)}
    np.testing.assert_array_equal(alone["large values"].inputs["x"], one["large values", 1].inputs["x"])


def test_sizes_that_were_asked_for():
    found = made(at=[{"sequence": 123}])
    assert found["batch=2 sequence=123", 0].inputs["x"].shape == (2, 123, 4)
    with pytest.raises(UsageError, match="there is no dynamic dimension 'length'"):
        made(at=[{"length": 3}])


def test_a_maximum_is_tried_unless_it_is_huge():
    def sizes(maximum):
        dims = [DimRange("batch", 2), DimRange("sequence", 10, 1, maximum)]
        return {case.sizes["sequence"] for case in cases([X], dims, {"x": example()["x"]})}

    assert 500 in sizes(500)
    assert 10**9 not in sizes(10**9)
