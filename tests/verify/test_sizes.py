import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_export.errors import UsageError
from moe_export.verify import DimRange, TensorSpec
from moe_export.verify.sizes import shape_at, sizes_to_try


def tried(*dims, reserve=False):
    return [sizes for sizes, is_reserve in sizes_to_try(dims) if is_reserve == reserve]


def test_one_dimension_is_tried_at_one_beyond_below_twice_half_and_thrice():
    assert [s["seq"] for s in tried(DimRange("seq", 10))] == [1, 15, 9, 20, 5, 30]


def test_two_dimensions_change_together_and_each_alone():
    sizes = tried(DimRange("batch", 2), DimRange("seq", 10))
    assert {"batch": 1, "seq": 1} in sizes
    assert {"batch": 7, "seq": 15} in sizes
    for batch in (1, 7, 4, 6):
        assert {"batch": batch, "seq": 10} in sizes
    for seq in (1, 15, 9, 20, 5, 30):
        assert {"batch": 2, "seq": seq} in sizes


def test_the_first_sizes_find_a_baked_one_and_two_swapped_dimensions():
    sizes = tried(DimRange("batch", 4), DimRange("seq", 4))[:4]
    assert {"batch": 1, "seq": 1} in sizes
    assert {"batch": 9, "seq": 4} in sizes


def test_the_traced_size_is_not_tried_again_and_no_size_twice():
    sizes = tried(DimRange("batch", 1), DimRange("seq", 2))
    assert {"batch": 1, "seq": 2} not in sizes
    assert len(sizes) == len({tuple(s.items()) for s in sizes})


def test_a_minimum_of_two_is_the_tracers_and_one_is_tried_all_the_same():
    assert 1 in [s["n"] for s in tried(DimRange("n", 8, minimum=2))]


def test_a_larger_minimum_and_the_maximum_are_kept_and_both_are_tried():
    sizes = [s["n"] for s in tried(DimRange("n", 8, minimum=6, maximum=12))]
    assert min(sizes) == 6
    assert max(sizes) == 12


def test_a_dimension_without_room_is_not_tried():
    assert tried(DimRange("n", 3, minimum=3, maximum=3)) == []
    assert tried(DimRange("n", 2, minimum=2, maximum=2)) == []
    assert tried() == []


def test_multiples_wait_in_reserve_for_models_that_refuse_other_sizes():
    assert [s["n"] for s in tried(DimRange("n", 64), reserve=True)] == [256, 320, 384]


@given(st.integers(3, 50), st.integers(0, 50), st.integers(1, 60))
def test_every_size_is_in_range(minimum, slack, traced):
    dim = DimRange("n", min(max(traced, minimum), minimum + slack), minimum, minimum + slack)
    for sizes, _ in sizes_to_try([dim, DimRange("m", 4)]):
        assert minimum <= sizes["n"] <= minimum + slack
        assert sizes["m"] >= 1


def test_an_empty_range_is_refused():
    with pytest.raises(UsageError, match="dimension 'n': maximum 2 is below minimum 5"):
        DimRange("n", 3, 5, 2)


def test_the_shape_of_an_input():
    spec = TensorSpec("x", "float32", ("batch", "2*seq + 1", 4))
    assert shape_at(spec, {"batch": 3, "seq": 5}) == (3, 11, 4)
    assert str(spec) == "x: float32[batch, 2*seq + 1, 4]"
