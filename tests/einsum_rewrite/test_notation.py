"""Reading equations: every notation, every form of call."""

from __future__ import annotations

import einops
import pytest
import torch

from moe_export.einsum_rewrite import Equation, einsum, plan_einsum
from moe_export.einsum_rewrite.notation import deduce


def _integers(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) - 3


X, W, V = _integers(2, 3, 4), _integers(4, 5), _integers(2, 3)


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("ba", "ab"),
        ("bA", "Ab"),
        ("ij,jk", "ik"),
        ("ii", ""),
        ("illj", "ij"),
        ("...ij,jk", "...ik"),
        ("i...,...i", "..."),
        ("zB,Ba", "az"),
        ("", ""),
    ],
)
def test_implicit_output(text: str, output: str) -> None:
    assert "".join(Equation.parse(text).output) == output


def test_spaces_mean_nothing_in_torch_and_everything_in_einops() -> None:
    assert Equation.parse(" m r , nr -> m n").inputs == (("m", "r"), ("n", "r"))
    assert Equation.parse("m r , nr -> m nr", "einops").inputs == (("m", "r"), ("nr",))


@pytest.mark.parametrize(
    ("text", "ranks", "notation"),
    [
        ("b l d_in, d_in n -> b l d_in n", None, "einops"),
        ("x1 y, y -> x1", None, "einops"),
        ("ij,jk", None, "torch"),
        ("batch dim, dim -> batch", None, "einops"),
        ("... head dim, head dim -> ... head", None, "einops"),
        ("b i j pde, pde -> b i j", None, "einops"),
        ("mr, nr->mn", None, "torch"),
        ("...ijh, ...ijc->...ihc", None, "torch"),
        ("dim -> dim", None, "torch"),
        ("dim -> dim", [1], "einops"),
        ("mr, nr->mr nr", [1, 1], "einops"),
        ("b ij, b -> b ij", [2, 1], "einops"),
        ("b ij, b -> b ij", [3, 1], "torch"),
        ("b l d, d n -> b l n", None, "torch"),
    ],
)
def test_the_notation_of_a_bare_string(text: str, ranks: list[int] | None, notation: str) -> None:
    assert deduce(text, ranks) == notation


def test_a_caller_can_force_the_notation() -> None:
    assert plan_einsum("ab cd -> cd ab").output == ("cd", "ab")
    assert plan_einsum("ab cd -> cd ab", notation="torch").output == ("c", "d", "a", "b")
    assert plan_einsum("dim -> dim", (7,)).sizes == {"dim": 7}


@pytest.mark.parametrize(
    "args",
    [
        ("bld,dn->bln", X, W),
        ("bld,dn->bln", [X, W]),
        ("bld,dn->bln", (X, W)),
        ("b l d, d n", X, W),
        ("...d,dn", [X, W]),
        ("...d,dn->n...", X, W),
        ("...d,dn->n", X, W),
        ("bld->", X),
        ("ZaB,Bd->adZ", X, W),
        (X, [0, 1, 2], W, [2, 3], [0, 1, 3]),
        (X, [0, 1, 2], W, [2, 3]),
        (X, [30, 1, 2], W, [2, 3], [3, 30]),
        (X, [..., 2], W, [2, 3], [..., 3]),
        (V, [0, 1]),
        (V, [26, 0]),
    ],
)
def test_every_form_of_torchs_call(args: tuple[object, ...]) -> None:
    assert torch.equal(einsum(*args), torch.einsum(*args))


@pytest.mark.parametrize(
    "args",
    [
        (X, W, "batch len d_in, d_in n -> batch len n"),
        (X, W, "... d_in, d_in n -> n ..."),
        (X, "a b c ->"),
        (X, V, "b l d, b l -> d b"),
        (W, W, "d n, d m -> n m"),
        (_integers(3, 3), "i i -> i"),
    ],
)
def test_every_form_of_einops_call(args: tuple[object, ...]) -> None:
    assert torch.equal(einsum(*args), einops.einsum(*args))


def test_sublists_are_spelled_in_letters() -> None:
    equation = Equation.from_sublists([[0, ..., 26], [26, 51]], [..., 51])
    assert str(equation) == "A...a,az->...z"
    assert equation == Equation.parse("A...a,az->...z")


def test_letters_of_long_names() -> None:
    equation = Equation.parse("b l d_in, d_in n, ... -> b n ...", "einops")
    assert equation.letters == "abc,cd,...->ad..."


def test_the_columns_point_at_the_labels() -> None:
    equation = Equation.parse("b d_in, d_in -> b", "einops")
    assert equation.columns == ((0, 2), (8,))
