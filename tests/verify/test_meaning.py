"""What integer inputs mean: the tables that they index, what a model takes, and the values that follow from it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe_export.verify import DimRange, TensorSpec, TorchRunner, cases, compare
from moe_export.verify.inputs.known import Known
from moe_export.verify.inputs.meaning import Asked, Meaning, Table, meanings_of
from moe_export.verify.inputs.torch_tables import watch_indices

ROWS = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("use", "within"),
    [
        (lambda ids: F.embedding(ids, ROWS), (0, 999)),
        (lambda ids: ROWS[ids], (0, 999)),
        (lambda ids: ROWS[ids.view(-1).unsqueeze(0) + 2], (-2, 997)),
        (lambda ids: ROWS.index_select(0, ids.reshape(-1)), (0, 999)),
        (lambda ids: F.one_hot(ids, 8), (0, 7)),
        (lambda ids: ROWS[:10].T.gather(1, ids[:, :4].to(torch.int64)), (0, 9)),
        (lambda ids: ROWS[ids] * F.embedding(ids - 1, ROWS[:50]), (1, 50)),
        (lambda ids: ROWS[ids * 2], None),
        (lambda ids: ids.float() @ torch.ones(6, 2), None),
    ],
)
def test_an_input_is_followed_to_the_tables_that_it_indexes(use, within):
    ids = torch.ones(2, 6, dtype=torch.int64)
    tables, _ = watch_indices(lambda given: use(given["ids"]), {"ids": ids})
    assert tables.get("ids") == within


@pytest.mark.parametrize("use", [lambda n: torch.ones(int(n)), torch.arange, lambda n: [0] * n.item()])
def test_what_python_reads_is_left_as_it_is(use):
    assert watch_indices(lambda given: use(given["n"]), {"n": torch.tensor(3)}) == ({}, {"n"})


def meaning(call, array, table=None, read=(), times=64):
    asked = Asked(lambda inputs: {"y": call(inputs["n"])}, {"n": array}, times)
    return meanings_of(asked, {"n": array}, {} if table is None else {"n": table}, read).get("n", Meaning())


def test_integers_go_beyond_the_example_below_zero_and_beyond_int32():
    found = meaning(lambda n: n * 2.0, np.array([3, 5]))
    assert found == Meaning((0, 19), None, (-19, 19), 2**40)
    assert meaning(lambda n: n * 2.0, np.array([3], np.int32)).large == 2**31 - 1
    assert meaning(lambda n: n * 2.0, np.array([3], np.uint8)) == Meaning((0, 15), None, None, 255)


def test_what_the_model_refuses_or_answers_with_nan_is_not_tried():
    def picky(n):
        if n.min() < 0 or n.max() > 5000:
            raise IndexError("out of range")
        return 1.0 / np.where(n == 0, np.nan, n)

    found = meaning(picky, np.array([3, 5]))
    assert found == Meaning((1, 19), None, None, 2**12)
    assert meaning(picky, np.array([3, 5]), times=1) == Meaning()
    assert meaning(picky, np.array([3, 5]), read=["n"]) == Meaning()


def test_a_table_that_grows_with_a_dimension():
    table = Table(0, 9, "sequence", 10)
    assert [table.high_at({"sequence": size}) for size in (1, 10, 30)] == [0, 9, 29]


IDS = TensorSpec("ids", "int64", ("batch", "sequence"))
DIMS = [DimRange("batch", 2), DimRange("sequence", 8)]


def with_ids(ids, known):
    return list(cases([IDS], DIMS, {"ids": ids}, known=known))


def test_every_row_of_a_table_is_looked_up_whatever_the_seed():
    known = Known(meanings={"ids": Meaning((0, 999), Table(0, 999))})
    found = with_ids(np.ones((2, 8), np.int64), known)
    ids = [case.inputs["ids"] for case in found if case.regime == "every id"]
    assert len(ids) <= 8
    assert set(np.concatenate([array.reshape(-1) for array in ids])) == set(range(1000))
    assert {int(case.inputs["ids"].max()) > 100 for case in found[1:4]} == {True}


def test_marks_that_are_ids_are_ids():
    known = Known(meanings={"ids": Meaning((0, 1), Table(0, 1))})
    found = with_ids(np.zeros((2, 8), np.int64), known)
    assert set(np.unique(found[1].inputs["ids"])) == {0, 1}
    assert {case.regime for case in found} == {"normal", "repeated token", "every id"}


def test_nan_for_values_that_nobody_promised_is_said_and_not_compared():
    def scores(given):
        return torch.ones(4, 4).masked_fill(~given["mask"], -torch.inf).softmax(-1)

    model = TorchRunner(scores, ["y"])
    candidate = TorchRunner(lambda given: torch.nan_to_num(scores(given)), ["y"])
    spec, mask = TensorSpec("mask", "bool", (4, 4)), np.tri(4, dtype=bool)
    report = compare(model, candidate, cases([spec], [], {"mask": mask}))
    assert report.exit_code == 0, str(report)
    assert (
        "output 'y' is undecided at all false: the reference is NaN in 16 of 16 elements" in report.warnings
    )
