"""The picture of a routing: every token, slot and load is in it, for 3 tokens and for 3,000."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_export.errors import UsageError
from moe_export.export.frontend.load import load_subject
from moe_export.export.gates.dispatch import Dispatch, find_dispatches
from moe_export.export.gates.picture import draw
from moe_export.models.gshard_moe import top1gating

ROOT = Path(__file__).parents[3]


def worked_example() -> tuple[Dispatch, torch.Tensor]:
    """GShard's: tokens of ones, twos and threes, two experts with two slots each."""
    choices = torch.tensor([[5.0, 0.0], [0.0, 5.0], [5.0, 0.0]])
    _, mask, _ = top1gating(choices, capacity_factor=1.0, min_capacity=1)
    dispatch = Dispatch("gate", None, 2, choices.argmax(1, keepdim=True).numpy())
    tokens = torch.tensor([[1.0] * 4, [2.0] * 4, [3.0] * 4])
    return dispatch, torch.einsum("sec,sm->ecm", mask.type_as(tokens), tokens)


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_the_worked_example_and_its_picture_in_the_readme(tmp_path):
    dispatch, dispatched = worked_example()
    expected = [[[1, 1, 1, 1], [3, 3, 3, 3]], [[2, 2, 2, 2], [0, 0, 0, 0]]]
    assert dispatched.int().tolist() == expected
    # The slots that the picture shows are those of the model's own mask.
    for token, (expert, slot) in enumerate(zip(dispatch.indices[:, 0], dispatch.slots[:, 0], strict=True)):
        assert dispatched[expert, slot].tolist() == [token + 1] * 4
    draw([dispatch], tmp_path / "drawn.svg", 2)
    shown = ROOT / "docs" / "gshard_dispatch.svg"
    assert texts(shown) == texts(tmp_path / "drawn.svg")
    assert "(docs/gshard_dispatch.svg)" in (ROOT / "README.md").read_text()


def test_slots_are_taken_by_first_choices_first():
    dispatch = Dispatch("gate", None, 3, np.array([[0, 1], [1, 0], [0, 2]]))
    assert dispatch.loads.tolist() == [3, 2, 1]
    assert dispatch.slots.tolist() == [[0, 1], [0, 2], [1, 0]]


@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(0, 2, 1), (1, 1, 1), (3, 2, 2), (33, 4, 2), (3000, 256, 8)]
)
def test_any_size_is_drawn_and_all_loads_are_in_it(tokens, experts, k, tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.permutation(experts)[:k] for _ in range(tokens)]
    indices = np.array(rows, dtype=np.int64).reshape(tokens, k)
    dispatch = Dispatch("moe", None, experts, indices, rng.random((tokens, k)))
    draw([dispatch, dispatch], tmp_path / "routing.svg")
    words = texts(tmp_path / "routing.svg")
    assert words.count(f"moe: {tokens} tokens to {experts} experts") == 2
    if experts <= 64:
        assert [word.strip() for word in words if word.startswith(" ")] == [
            str(n) for n in dispatch.loads
        ] * 2
    draw([dispatch], tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("tokens", "mapped"), [(20, False), (512, True)])
def test_sixty_four_experts_are_each_named(tokens, mapped, tmp_path):
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation(64)[:6] for _ in range(tokens)])
    draw([Dispatch("moe", None, 64, indices)], tmp_path / "routing.svg")
    words = texts(tmp_path / "routing.svg")
    assert [word for word in words if word.startswith("expert ")] == [f"expert {n}" for n in range(64)]
    assert ("a column: 6 tokens" in words) == mapped
    assert ("token 7" in words) != mapped  # few tokens are named one by one
    assert ("<image" in (tmp_path / "routing.svg").read_text()) == mapped


def test_tokens_beyond_the_capacity_are_counted_as_dropped(tmp_path):
    dispatch = Dispatch("moe", None, 2, np.array([[0], [0], [0], [1]]))
    draw([dispatch], tmp_path / "routing.svg", 2)
    assert "moe: 4 tokens to 2 experts, 1 dropped" in texts(tmp_path / "routing.svg")


def test_an_expert_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="expert 2 of a gate over 2 experts"):
        Dispatch("moe", None, 2, np.array([[2]]))


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"a picture is a \.png or a \.svg file, not routing\.gif"):
        draw([worked_example()[0]], tmp_path / "routing.gif")


def test_what_a_model_does_with_its_example_inputs():
    subject = load_subject(str(ROOT / "models" / "moe_gate.py"))
    (dispatch,) = find_dispatches(subject)
    with torch.no_grad():
        indices, weights = subject.module(*subject.inputs.values())[:2]
    assert np.array_equal(np.sort(dispatch.indices), np.sort(indices.reshape(dispatch.indices.shape).numpy()))
    assert dispatch.weights.sum() == pytest.approx(float(weights.sum()), rel=1e-5)
