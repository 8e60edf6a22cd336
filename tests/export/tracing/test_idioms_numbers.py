"""`int` and `float` of a size stay a function of it; where a file needs the classes themselves, they are Python's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from moe_export.export.frontend.load import load_subject
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.idioms_numbers import symbolic_numbers
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
    ],
)
def test_a_number_follows_the_size(tmp_path, body):
    program = traced(tmp_path, body).program.module()
    namespace = {"x": None, "max": max}
    for rows in (4, 6, 9, 40):
        x = torch.rand(rows, 3)
        expected = eval(body.removeprefix("return "), namespace | {"x": x})
        torch.testing.assert_close(program(x)[0], expected)


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
