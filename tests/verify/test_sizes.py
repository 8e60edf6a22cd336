import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_export.errors import UsageError
from moe_export.verify import DimRange, TensorSpec
from moe_export.verify.inputs.sizes import MOST, long_sizes, shape_at, sizes_to_try


def tried(*dims, reserve=False, **options):
    return [sizes for sizes, is_reserve in sizes_to_try(dims, **options) if is_reserve == reserve]


def test_one_dimension_is_tried_at_one_beyond_below_twice_half_and_thrice():
    assert [s["sequence"] for s in tried(DimRange("sequence", 10))] == [1, 15, 9, 20, 5, 30]


def test_a_ladder_goes_on_from_there():
    found = tried(DimRange("batch", 2), DimRange("sequence", 10), numbers=())
    assert {2, 3, 8, 16, 33, 64, 130, 257, 513} <= {s["sequence"] for s in found}
    assert {8, 16, 33} <= {s["batch"] for s in found}


def test_each_number_is_tried_on_both_sides_and_as_a_chunk():
    found = [s["sequence"] for s in tried(DimRange("sequence", 10), numbers=[60, 48])]
    assert found[6:12] == [61, 60, 59, 49, 48, 47]
    assert {120, 181, 96, 145} <= set(found)


def test_two_dimensions_are_tried_near_a_small_number_at_once_and_near_a_large_one_alone():
    found = tried(DimRange("batch", 2), DimRange("sequence", 10), numbers=[48, 300])
    assert {"batch": 49, "sequence": 49} in found
    assert {"batch": 301, "sequence": 10} in found
    assert {"batch": 2, "sequence": 301} in found
    assert {"batch": 301, "sequence": 301} not in found


def test_a_product_of_dimensions_comes_to_a_number():
    found = tried(DimRange("batch", 2), DimRange("sequence", 10), numbers=[256])
    assert {"batch": 2, "sequence": 129} in found
    assert {"batch": 2, "sequence": 128} in found
    assert {"batch": 26, "sequence": 10} in found


def test_only_sizes_that_the_graph_is_said_to_be_right_for():
    found = tried(DimRange("sequence", 16), holds=lambda sizes: sizes["sequence"] % 8 == 0, numbers=[64])
    assert {s["sequence"] for s in found} == {8, 32, 48, 64, 128}


def test_there_are_no_more_than_so_many_whatever_the_numbers():
    dims = [DimRange("batch", 2), DimRange("sequence", 10), DimRange("width", 12)]
    found = tried(*dims, numbers=range(20, 2000, 7))
    assert len(found) == MOST
    assert found == tried(*dims, numbers=range(20, 2000, 7))
    assert found[:20] == tried(*dims, numbers=())[:20]


def test_the_longest_sizes_to_choose_from():
    (batch, sequence) = long_sizes([DimRange("batch", 2), DimRange("sequence", 10, 1, 600)])
    assert [s["batch"] for s in batch] == [4096, 2048, 1024, 513]
    assert [s["sequence"] for s in sequence] == [600, 513]
    assert list(long_sizes([DimRange("sequence", 10, 1, 16)])) == [[]]


def test_two_dimensions_change_together_and_each_alone():
    sizes = tried(DimRange("batch", 2), DimRange("sequence", 10))
    assert {"batch": 1, "sequence": 1} in sizes
    assert {"batch": 7, "sequence": 15} in sizes
    for batch in (1, 7, 4, 6):
        assert {"batch": batch, "sequence": 10} in sizes
    for sequence in (1, 15, 9, 20, 5, 30):
        assert {"batch": 2, "sequence": sequence} in sizes


def test_the_first_sizes_find_a_baked_one_and_two_swapped_dimensions():
    sizes = tried(DimRange("batch", 4), DimRange("sequence", 4))[:4]
    assert {"batch": 1, "sequence": 1} in sizes
    assert {"batch": 9, "sequence": 4} in sizes


def test_the_traced_size_is_not_tried_again_and_no_size_twice():
    sizes = tried(DimRange("batch", 1), DimRange("sequence", 2))
    assert {"batch": 1, "sequence": 2} not in sizes
    assert len(sizes) == len({tuple(s.items()) for s in sizes})


def test_no_size_below_a_minimum_of_two_is_tried():
    assert min(s["n"] for s in tried(DimRange("n", 8, minimum=2))) == 2


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
    spec = TensorSpec("x", "float32", ("batch", "2*sequence + 1", 4))
    assert shape_at(spec, {"batch": 3, "sequence": 5}) == (3, 11, 4)
    assert str(spec) == "x: float32[batch, 2*sequence + 1, 4]"
