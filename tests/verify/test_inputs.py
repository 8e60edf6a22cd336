from itertools import islice

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_export.errors import UsageError
from moe_export.verify import DimRange, TensorSpec, cases
from moe_export.verify.inputs.regimes import MASKS, SIGNED

X = TensorSpec("x", "float32", ("batch", "sequence", 4))
IDS = TensorSpec("ids", "int64", ("batch", "sequence"))
MASK = TensorSpec("mask", "bool", ("sequence",))
DIMS = [DimRange("batch", 2), DimRange("sequence", 10)]


def example(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(3, 0.5, (2, 10, 4)).astype(np.float32),
        "ids": rng.choice([5, 17, 900], (2, 10)),
        "mask": np.ones(10, bool),
    }


def made(specs, dims, example, seed=0):
    return {case.label: case for case in cases(specs, dims, example, seed)}


def test_the_example_itself_comes_first_then_new_values_at_its_sizes():
    given_inputs = example()
    first, second = islice(cases([X, IDS, MASK], DIMS, given_inputs), 2)
    assert first.label == "example"
    assert first.sizes == second.sizes == {"batch": 2, "sequence": 10}
    for name, array in given_inputs.items():
        np.testing.assert_array_equal(first.inputs[name], array)
    assert second.label == "new values"
    assert not np.array_equal(second.inputs["x"], given_inputs["x"])


def test_a_shared_dimension_has_one_size_in_all_inputs():
    for case in cases([X, IDS, MASK], DIMS, example()):
        batch, sequence = case.sizes["batch"], case.sizes["sequence"]
        assert case.inputs["x"].shape == (batch, sequence, 4)
        assert case.inputs["ids"].shape == (batch, sequence)
        assert case.inputs["mask"].shape == (sequence,)


def test_derived_dimensions_follow_and_impossible_sizes_are_left_out():
    spec = TensorSpec("x", "float32", ("2*s0", "s0 - 3"))
    found = list(cases([spec], [DimRange("s0", 5)], {"x": np.ones((10, 2), np.float32)}))
    assert {case.inputs["x"].shape for case in found} >= {(10, 2), (20, 7), (8, 1)}
    assert all(case.sizes["s0"] >= 3 for case in found)


def test_floats_keep_mean_and_deviation_and_dtype():
    case = made([X], DIMS, {"x": example()["x"]})["batch=6 sequence=30"]
    values = case.inputs["x"]
    assert values.dtype == np.float32
    assert abs(values.mean() - 3) < 0.15
    assert abs(values.std() - 0.5) < 0.1


def test_integers_of_which_nothing_is_known_are_the_examples_own_and_marks_vary_in_their_regimes():
    for case in cases([X, IDS, MASK], DIMS, example()):
        assert set(np.unique(case.inputs["ids"])) <= {5, 17, 900}
        assert case.inputs["mask"].all() or case.regime in MASKS
        assert case.inputs["ids"].dtype == np.int64


def test_a_float_mask_keeps_its_marks():
    mask = np.where(np.tri(10, dtype=bool), 0, -np.inf).astype(np.float32)
    found = cases(
        [TensorSpec("m", "float32", ("sequence", "sequence"))], [DimRange("sequence", 10)], {"m": mask}
    )
    assert all(set(np.unique(case.inputs["m"])) <= {0.0, -np.inf} for case in found)


def test_what_was_never_negative_stays_so():
    x = np.random.default_rng(0).uniform(0, 1, (2, 10, 4)).astype(np.float32)
    found = list(cases([X], DIMS, {"x": x}))
    assert all((case.inputs["x"] >= 0).all() for case in found if case.regime != SIGNED)
    assert [case.label for case in found if (case.inputs["x"] < 0).any()] == [SIGNED]


def test_bfloat16_and_empty_examples():
    spec = TensorSpec("x", "bfloat16", ("n",))
    x = np.arange(6).astype(ml_dtypes.bfloat16)
    assert {c.inputs["x"].dtype for c in cases([spec], [DimRange("n", 6)], {"x": x})} == {x.dtype}
    spec = TensorSpec("x", "float32", ("n", 0))
    empty = {"x": np.zeros((6, 0), np.float32)}
    assert {c.inputs["x"].size for c in cases([spec], [DimRange("n", 6)], empty)} == {0}


@given(st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_inputs(seed):
    one, two = (list(islice(cases([X, IDS], DIMS, e, seed), 5)) for e in [sub(example()), sub(example())])
    for a, b in zip(one, two, strict=True):
        assert (a.label, a.seed, a.sizes) == (b.label, seed, b.sizes)
        assert all(np.array_equal(a.inputs[name], b.inputs[name]) for name in ("x", "ids"))


def sub(inputs):
    return {name: inputs[name] for name in ("x", "ids")}


def test_another_seed_and_another_case_give_other_values():
    one, two = made([X], DIMS, {"x": example()["x"]}), made([X], DIMS, {"x": example()["x"]}, seed=1)
    label = "batch=7 sequence=15"
    assert not np.array_equal(one[label].inputs["x"], two[label].inputs["x"])
    assert not np.array_equal(one["new values"].inputs["x"], one["example"].inputs["x"])


def test_a_further_input_leaves_the_values_of_the_others():
    alone = made([X], DIMS, {"x": example()["x"]})["batch=7 sequence=15"]
    together = made([IDS, X], DIMS, sub(example()))["batch=7 sequence=15"]
    np.testing.assert_array_equal(alone.inputs["x"], together.inputs["x"])


def test_two_inputs_of_one_shape_differ():
    specs = [TensorSpec(name, "float32", ("n",)) for name in "ab"]
    x = np.random.default_rng(0).normal(size=6).astype(np.float32)
    case = made(specs, [DimRange("n", 6)], {"a": x, "b": x})["n=11"]
    assert not np.array_equal(case.inputs["a"], case.inputs["b"])


def test_cases_are_lazy_and_read_only():
    stream = cases([X], [DimRange("batch", 2), DimRange("sequence", 10)], {"x": example()["x"]})
    case = next(stream)
    with pytest.raises(ValueError, match="read-only"):
        case.inputs["x"][0] = 0
    x = example()["x"]
    next(cases([X], DIMS, {"x": x}))
    x[0] = 1  # the caller's own array stays the caller's


def test_nothing_dynamic_gives_the_example_and_new_values():
    spec = TensorSpec("x", "float32", (2, 3))
    found = list(cases([spec], [], {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}))
    assert [(case.label, case.sizes) for case in found if case.regime == "normal"] == [
        ("example", {}),
        ("new values", {}),
    ]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 10, 5), np.float32), r"'x' is float32\[2, 10, 5\], expected float32\[2, 10, 4\]"),
        (
            np.zeros((2, 10, 4)),
            r"'x' is float64\[2, 10, 4\], expected float32\[2, 10, 4\] \(x: float32\[batch, sequence, 4\]\)",
        ),
        (np.zeros((3, 10, 4), np.float32), r"'x' is float32\[3, 10, 4\], expected float32\[2, 10, 4\]"),
    ],
)
def test_an_example_that_does_not_fit_is_refused_at_the_call(array, message):
    with pytest.raises(UsageError, match=message):
        cases([X], DIMS, {"x": array})


def test_wrong_names_and_unknown_dimensions_are_refused_at_the_call():
    with pytest.raises(UsageError, match=r"example inputs are \['y'\], but the model takes \['x'\]"):
        cases([X], DIMS, {"y": example()["x"]})
    with pytest.raises(UsageError, match="dimension 'sequence' has no range"):
        cases([X], DIMS[:1], {"x": example()["x"]})
    with pytest.raises(UsageError, match="unknown dtype 'float7'"):
        cases([TensorSpec("x", "float7", (1,))], [], {"x": np.zeros(1)})
