"""Python source in, Python source out: the same results, nothing evaluated twice, the rest of the file untouched."""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path

import pytest
import torch

from moe_export.cli import run
from moe_export.einsum_rewrite.codemod import rewrite_file
from moe_export.einsum_rewrite.equation import Equation
from moe_export.errors import UsageError

HEAD = "import torch\nimport einops\n"
TABLE = (Path(__file__).with_name("data") / "equations.tsv").read_text(encoding="utf-8")
ROWS = list(csv.DictReader(TABLE.splitlines(), delimiter="\t"))


def body(code: str, head: str = HEAD) -> str:
    """The rewritten source behind its imports."""
    return rewrite_file(head + code).code.removeprefix(head)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("y = torch.einsum('ij,jk->ik', a, b)\n", '# einsum "ij,jk->ik"\ny = a @ b\n'),
        (
            'd = einops.einsum(delta, A, "b l d_in, d_in n -> b l d_in n")\n',
            '# einsum "b l d_in, d_in n -> b l d_in n"\nd = delta.unsqueeze(-1) * A\n',
        ),
        ("y = torch.einsum('bi,bi->b', a + b, c).relu()\n", '# einsum "bi,bi->b"\ny = ((a + b) * c).sum(-1).relu()\n'),
        ("y = torch.einsum('ij,jk->ik', a, b).relu()\n", '# einsum "ij,jk->ik"\ny = (a @ b).relu()\n'),
        ("y = 2 * torch.einsum('i,i->i', a, b)\n", '# einsum "i,i->i"\ny = 2 * (a * b)\n'),
        ("f(torch.einsum('i,i->i', a, b), 3)\n", '# einsum "i,i->i"\nf(a * b, 3)\n'),
        ("y = torch.einsum('ij, jk', [a, b])\n", '# einsum "ij, jk"\ny = a @ b\n'),
        ("y = torch.einsum(a, [0, 1], b, [1, 2], [0, 2])\n", '# einsum "AB,BC->AC"\ny = a @ b\n'),
        ("y = torch.einsum('i''j,' 'jk->ik', a, b)\n", '# einsum "ij,jk->ik"\ny = a @ b\n'),
        ("y = einops.einsum(a, b, pattern='i, i -> i')\n", '# einsum "i, i -> i"\ny = a * b\n'),
        (
            "y = torch.einsum('ij,jk->ik', torch.einsum('ab,bc->ac', a, b), c)\n",
            '# einsum "ab,bc->ac"\n# einsum "ij,jk->ik"\ny = (a @ b) @ c\n',
        ),
        (
            "s = torch.einsum('...hqk,...khd->...qhd', p, v)\n",
            '# einsum "...hqk,...khd->...qhd"\ns = (p @ v.transpose(-3, -2)).transpose(-3, -2)\n',
        ),
        ("if x:\n    # why\n    y = torch.einsum('ii->i', a)  # diagonal\n",
         "if x:\n    # why\n    # einsum \"ii->i\"\n    y = a.diagonal(dim1=0, dim2=1)  # diagonal\n"),
        ("while torch.einsum('i,i->', a, b) > 0:\n    pass\n",
         '# einsum "i,i->"\nwhile (a * b).sum() > 0:\n    pass\n'),
    ],
)  # fmt: skip
def test_what_a_call_becomes(before, after):
    assert body(before) == after


@pytest.mark.parametrize(
    ("head", "call"),
    [
        ("import torch as t\n", "t.einsum('ij,jk->ik', a, b)"),
        ("from torch import einsum\n", "einsum('ij,jk->ik', a, b)"),
        ("from torch import einsum as es\n", "es('ij,jk->ik', a, b)"),
        ("import torch\nfrom einops import einsum\n", "einsum(a, b, 'i j, j k -> i k')"),
        ("import torch\nimport einops as eo\n", "eo.einsum(a, b, 'i j, j k -> i k')"),
        ("import torch\nfrom opt_einsum import contract\n", "contract('ij,jk->ik', a, b)"),
        ("import torch\nimport opt_einsum as oe\n", "oe.contract('ij,jk->ik', a, b)"),
    ],
)
def test_whose_einsum_it_is_is_read_off_the_imports(head, call):
    assert body(f"y = {call}\n", head).endswith("\ny = a @ b\n")


@pytest.mark.parametrize(
    ("head", "code"),
    [
        ("import numpy as np\nimport torch\n", "y = np.einsum('ij,jk->ik', a, b)\n"),
        ("import torch\n", "def einsum(*a): ...\ny = einsum('ij,jk->ik', a, b)\n"),
        ("import torch\n", "y = jnp.einsum('ij,jk->ik', a, b)\n"),
    ],
)
def test_another_einsum_is_none_of_ours(head, code):
    result = rewrite_file(head + code)
    assert result.code == head + code
    assert result.left == ()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("y = torch.einsum(eq, a, b)", "its equation is no string literal, and is only known at run time"),
        ("y = torch.einsum(f'{n}j,jk->ik', a, b)", "its equation is an f-string, and is only known at run time"),
        ("y = torch.einsum('ij,jk->ik', *ab)", "its operands are a starred list, whose length is not known here"),
        ("y = torch.einsum('ij,jk->ik', [*ab])", "its operands are a starred list, whose length is not known here"),
        ("y = torch.einsum('ij,jk->ik', ab)",
         "its equation names 2 operands and it has 1, or a list of them"),
        ("y = torch.einsum('ij,jk->iz', a, b)",
         "its equation is malformed: label 'z' is in the output, and no operand has it"),
        ("y = torch.einsum(a, rows, b, [1, 2])", "its equation is no string literal, and is only known at run time"),
        ("if x: y = torch.einsum('ij,jk->ik', a, b)",
         "it stands on the line of its `if` or `for`; give it a line of its own"),
        ("f = lambda: torch.einsum('bqhgd,bkhd->bhgqk', q(), k())",
         "its operands need lines of their own, and it stands in a Lambda"),
        ("y = f() + torch.einsum('ij,kj->ki', g(), h())",
         "its operands need lines of their own, and another call runs before it"),
        ("y = torch.einsum('...gi,gio,...->...go', a, b, c)",
         "its lines would depend on how many dimensions the ellipsis stands for"),
    ],
)  # fmt: skip
def test_what_cannot_be_known_is_left_alone_and_listed(code, reason):
    result = rewrite_file(HEAD + "x = 1\n" + code + "\n")
    assert result.code == HEAD + "x = 1\n" + code + "\n"
    (left,) = result.left
    assert (left.line, left.reason) == (4, reason)


def test_einops_without_torch_is_left_alone():
    code = "from einops import einsum\ny = einsum(a, b, 'i j, j k -> i k')\n"
    result = rewrite_file(code)
    assert result.code == code
    assert [left.reason for left in result.left] == [
        "nothing says that its operands are tensors of PyTorch: torch is not imported"
    ]


def test_operands_are_evaluated_once_and_in_order():
    source = HEAD + textwrap.dedent("""
        def f(g):
            return torch.einsum("bqhgd,bkhd->bhgqk", g("q", 2, 3, 5, 2, 7), g("k", 2, 4, 5, 7))

        def h(g):
            z = torch.einsum("ij,kj->ki", g("first", 2, 3), g("second", 4, 3)) * g("last", 4, 2)
            return z
    """)
    results = []
    for code in (source, rewrite_file(source).code):
        scope: dict = {}
        exec(code, scope)
        log: list[str] = []

        def make(name, *shape, log=log):
            log.append(name)
            return torch.arange(torch.Size(shape).numel()).reshape(shape) % 7 - 3

        results.append((scope["f"](make), scope["h"](make), log))
    (f0, h0, log0), (f1, h1, log1) = results
    assert log0 == log1 == ["q", "k", "first", "second", "last"]
    assert torch.equal(f0, f1)
    assert torch.equal(h0, h1)


def test_new_names_hide_nothing():
    code = "operand = product = 1\ny = torch.einsum('bqhgd,bkhd->bhgqk', q(), k())\n"
    assert "operand_2 = q()" in body(code)
    assert "product_2 = " in body(code)


def call_of(row: dict[str, str]) -> str:
    notation = "einops" if row["notation"] == "einops" else "torch"
    names = [f"x{index}" for index in range(len(Equation.parse(row["equation"], notation).inputs))]
    if notation == "einops":
        return f"einops.einsum({', '.join(names)}, {row['equation']!r})"
    return f"torch.einsum({row['equation']!r}, {', '.join(names)})"


def test_every_real_equation_is_rewritten():
    """All lines of one file; each is run on integers of two sizes and compared with the call that it replaced."""
    rows = [row for row in ROWS if _legal(row)]
    assert len(rows) > 390
    source = HEAD + "".join(f"def f{index}(*x):\n    ({_unpack(row)}) = x\n    return {call_of(row)}\n"
                            for index, row in enumerate(rows))  # fmt: skip
    result = rewrite_file(source)
    assert not result.left
    assert len(result.rewritten) + len(result.left) == len(rows)
    old, new = {}, {}
    exec(source, old)
    exec(result.code, new)
    for index, row in enumerate(rows):
        for dots, sizes in (((2, 3), (2, 3, 4)), ((), (3, 1, 2))):
            operands = _operands(row, dots, sizes)
            assert torch.equal(old[f"f{index}"](*operands), new[f"f{index}"](*operands)), row["equation"]


def _legal(row: dict[str, str]) -> bool:
    try:
        Equation.parse(row["equation"], "einops" if row["notation"] == "einops" else "torch")
    except UsageError:
        return False
    return True


def _unpack(row: dict[str, str]) -> str:
    count = len(Equation.parse(row["equation"], "einops" if row["notation"] == "einops" else "torch").inputs)
    return "".join(f"x{index}, " for index in range(count))


def _operands(row, dots, sizes):
    equation = Equation.parse(row["equation"], "einops" if row["notation"] == "einops" else "torch")
    labels = list(dict.fromkeys(label for term in equation.inputs for label in term))
    size_of = {label: sizes[index % len(sizes)] for index, label in enumerate(labels)}
    generator = torch.Generator().manual_seed(0)
    shapes = [
        [size for label in term for size in (dots if label == "..." else (size_of[label],))]
        for term in equation.inputs
    ]
    return [torch.randint(-4, 5, shape, generator=generator).double() for shape in shapes]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(HEAD + "# a comment\ny = torch.einsum('ij,jk->ik', a, b)\nz = torch.einsum(eq, a)\n")
    return path


NEW = HEAD + '# a comment\n# einsum "ij,jk->ik"\ny = a @ b\nz = torch.einsum(eq, a)\n'


def test_the_command_writes_another_file(file, capsys):
    before = file.read_text()
    out = file.with_name("new.py")
    assert run(["rewrite", str(file), "-o", str(out)]) == 0
    assert out.read_text() == NEW
    assert file.read_text() == before
    assert capsys.readouterr().out.splitlines() == [
        f"{file}:4: rewritten: 'ij,jk->ik' → a @ b",
        f"{file}:5: left alone: its equation is no string literal, and is only known at run time",
        "1 rewritten, 1 left alone",
    ]


def test_the_command_writes_in_place_and_keeps_the_mode(file):
    file.chmod(0o755)
    assert run(["rewrite", str(file), "--in-place", "-q"]) == 0
    assert file.read_text() == NEW
    assert file.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in file.parent.iterdir()] == ["model.py"]


def test_the_command_prints_a_diff(file, capsys):
    before = file.read_text()
    assert run(["rewrite", str(file), "--diff"]) == 0
    printed = capsys.readouterr().out
    assert "-y = torch.einsum('ij,jk->ik', a, b)\n+# einsum \"ij,jk->ik\"\n+y = a @ b\n" in printed
    assert file.read_text() == before


def test_check_fails_while_something_is_left_to_rewrite(file):
    before = file.read_text()
    assert run(["rewrite", str(file), "--check", "-q"]) == 1
    assert file.read_text() == before
    assert run(["rewrite", str(file), "--in-place", "-q"]) == 0
    assert run(["rewrite", str(file), "--check", "-q"]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "choose what to do with the rewritten source"),
        (["--diff", "--check"], "choose what to do with the rewritten source"),
    ],
)
def test_the_command_must_be_told_what_to_do(file, capsys, args, message):
    assert run(["rewrite", str(file), *args]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_there_or_no_python(tmp_path, capsys):
    assert run(["rewrite", str(tmp_path / "no.py"), "--check"]) == 2
    assert capsys.readouterr().err == f"error: no such file: {tmp_path / 'no.py'}\n"
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\ndef f(:\n")
    assert run(["rewrite", str(broken), "--check"]) == 2
    assert f"where: {broken}:2" in capsys.readouterr().err
