"""`int` and `float` of a size stay a function of it; where a file needs the classes themselves, they are Python's."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from moe_export.export.frontend.load import load_subject
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.idioms_numbers import _NAMES, symbolic_numbers
from moe_export.export.tracing.trace import trace

HEADER = """
import torch
from torch import nn
{imports}

class Model(nn.Module):
    def forward(self, x):
        {body}

model, example_inputs = Model(), (torch.randn(6, 3),)
"""


def traced(folder: Path, body: str, imports: str = ""):
    path = folder / "counted.py"
    path.write_text(HEADER.format(body=body, imports=imports))
    return trace(load_subject(str(path)), DimRequest())


@pytest.mark.parametrize(
    "body",
    [
        "return x.cumsum(0) < int(x.shape[0] / 4 * 1.5)",
        "return x.cumsum(0) * float(x.shape[0])",
        "return x[: max(int(x.shape[0] * 0.5), 1)] * (1 if isinstance(3, int) else 2)",
        "return x * int('3') + int(2.7) + float(int(x.shape[0]))",
        "return x * min(x.shape[0], 7) + max(x.shape[0] - 8, 2)",
        "return x.cumsum(0) < max(min(x.shape[0], int(x.shape[0] * 0.6)), 4)",
        "return x[: max([2, 1])] + max(1, 2, key=lambda n: -n) + max((), default=3)",
    ],
)
def test_a_number_follows_the_size(tmp_path, body):
    program = traced(tmp_path, body).program.module()
    namespace = {"x": None, "max": max, "min": min}
    for rows in (4, 6, 9, 40):
        x = torch.rand(rows, 3)
        expected = eval(body.removeprefix("return "), namespace | {"x": x})
        torch.testing.assert_close(program(x)[0], expected)


@pytest.mark.parametrize(
    ("root", "imports"),
    [
        ("math.sqrt(x.shape[1])", "import math"),
        ("m.sqrt(x.shape[1] * 2 + 1) * m.pi", "import math as m"),
        ("sqrt(float(x.shape[1]))", "from math import sqrt"),
        ("math.sqrt(2.0) * math.floor(2.5)", "import math"),
    ],
)
def test_a_root_of_a_size_follows_it(tmp_path, root, imports):
    found = traced(tmp_path, f"return x / ({root})", imports)
    assert not any(isinstance(size, int) for size in found.inputs["x"])
    program, namespace = found.program.module(), {"m": math, "math": math, "sqrt": math.sqrt}
    for rows, width in ((2, 1), (6, 3), (5, 64), (3, 1000)):
        x = torch.rand(rows, width)
        torch.testing.assert_close(program(x)[0], x / eval(root, namespace | {"x": x}), rtol=0, atol=0)


def test_a_size_that_a_root_decides_is_free_where_it_is_a_square_and_names_are_put_back(tmp_path):
    path = tmp_path / "counted.py"
    body = "n = int(math.sqrt(x.shape[0]))\n        return x.reshape(n, n, 3).flip(0)"
    path.write_text(HEADER.format(body=body, imports="import math").replace("6, 3", "16, 3"))
    subject = load_subject(str(path))
    found = trace(subject, DimRequest())
    assert isinstance(found.inputs["x"][0], str)  # of which sizes, the domain says (test_conditions)
    for root in (2, 4, 5, 7):
        x = torch.rand(root**2, 3)
        assert torch.equal(found.program.module()(x)[0], x.reshape(root, root, 3).flip(0))
    assert sys.modules[type(subject.module).__module__].math is math


SAFE_ONE_HOT = """
def safe_one_hot(indices, most):
    return torch.nn.functional.one_hot(indices, max(indices.max() + 1, most))[..., :most]
"""


def test_a_one_hot_of_as_many_classes_as_there_are_indices(tmp_path):
    """As mixture-of-experts and st-moe-pytorch write it: what lies at or above `most` has no entry."""
    body = "return safe_one_hot((x.abs() * 5).long(), 3), safe_one_hot((x.abs() * 5).long(), x.shape[0])"
    program = traced(tmp_path, body, SAFE_ONE_HOT).program.module()
    for rows in (1, 2, 6, 9):
        x = torch.rand(rows, 3, generator=torch.Generator().manual_seed(rows))
        for found, most in zip(program(x), (3, rows), strict=True):
            assert torch.equal(found, ((x * 5).long()[..., None] == torch.arange(most)).long())


@pytest.mark.parametrize("name", ["max", "min"])
def test_of_tensors_a_tensor_and_of_integers_an_integer(name):
    plain, found = {"max": max, "min": min}[name], _NAMES[name]
    one, other = torch.tensor(3), torch.tensor(5)
    assert isinstance(found(one, other), torch.Tensor)
    assert found(one, other) == plain(3, 5)
    assert found(one, 4) == plain(3, 4)
    assert type(found(one, 4)) is int
    for values in ((2, 1), (torch.tensor(1.5), 2.0), ([3, 1, 2],), ("a", "b")):
        assert found(*values) == plain(*values)
    assert found(["aa", "b"], key=len) == plain(["aa", "b"], key=len)


INSTALLED = """
import torch
class Below(torch.nn.Module):
    def forward(self, x):
        return x.cumsum(0) < max(int(x.shape[0] * 0.5), 2)
"""


def test_a_package_is_seen_where_the_models_classes_stand(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "installed_below.py").write_text(INSTALLED)
    monkeypatch.syspath_prepend(folder)
    path = tmp_path / "uses.py"
    path.write_text(
        "import torch\nfrom installed_below import Below\nmodel, example_inputs = Below(), (torch.ones(6, 3),)\n"
    )
    program = trace(load_subject(str(path)), DimRequest()).program.module()
    for rows, most in ((10, 5), (2, 2), (40, 20)):
        (found,) = program(torch.ones(rows, 3))
        assert found.sum() == (most - 1) * 3


def test_a_file_that_was_imported_is_seen(tmp_path, monkeypatch):
    (tmp_path / "capacities_of_mine.py").write_text("def half(n):\n    return int(n * 0.5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    program = traced(tmp_path, "return x.cumsum(0) < half(x.shape[0])", "from capacities_of_mine import half")
    (found,) = program.program.module()(torch.ones(10, 3))
    assert found.sum() == 4 * 3


def test_names_are_given_back_and_other_uses_are_left_alone(tmp_path):
    path = tmp_path / "own.py"
    for text, changes in (("A = int(3)", True), ("A = int(3)\nB = dict(dtype=int)", False)):
        path.write_text(
            f"from torch import nn\n{text}\nclass M(nn.Module):\n    def forward(self, x: int): pass\n"
        )
        path = path.rename(tmp_path / f"own_{changes}.py")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with symbolic_numbers(module.M()):
            assert ("int" in vars(module)) is changes
        assert "int" not in vars(module)
        path = tmp_path / "own.py"
