"""What PyTorch and its like do not promise is named in `torch_compat` alone, and each file of it has a canary."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import canaries
import pytest
from private_names import found_in

ROOT = Path(__file__).resolve().parents[2]
DOOR = ROOT / "export" / "torch_compat"
ROOMS = ("einsum_rewrite", "export", "models", "src", "verify")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def is_door(path: Path) -> bool:
    return "torch_compat" in (path.parent.name, path.stem)


def test_nothing_outside_the_door_is_private_or_patched():
    texts = [(str(path.relative_to(ROOT)), path.read_text()) for path in FILES]
    found = found_in(texts, apart=[str(path.relative_to(ROOT)) for path in FILES if is_door(path)])
    assert not found, "\n".join(["name it in export/torch_compat, with a canary:", *found])


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "import torch._dynamo.config as config",
        "from torch.utils import _pytree as pytree",
        "from torch.onnx._internal.exporter import x",
        "from onnxscript.rewriter._matcher import math",
        "import torch\ntorch._check(True)",
        "import torch\ntorch._C._nn._parse_to()",
        "from torch import fx\nfx.proxy.TracerBase._filter_traceback_frames",
        "import torch.nn as nn\nkind = nn.Module\nkind._apply",
        "def f(program): return program._graph_module_flat_inputs()",
        "def f(module): return module.inner._parameters",
        "def f(module): return getattr(module, '_orig_mod', None)",
        "def f(module): return hasattr(module, '_hf_hook')",
        "from unittest import mock",
        "import unittest.mock",
        "from unittest.mock import patch",
        "import torch\ntorch.nn.Module.to = None",
        "import torch\ndel torch.nn.Module.to",
        "from torch import nn\nsetattr(nn.Module, 'to', None)",
        "import builtins\nbuiltins.len = None",
        "import onnxruntime\nonnxruntime.InferenceSession.run = None",
    ],
)
def test_what_is_private_or_patched_is_seen(code):
    assert found_in([("code.py", code), ("other.py", "_mine = 1")])
    assert not found_in([("code.py", code), ("other.py", "_mine = 1")], apart=["code.py"])


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.ops.aten._to_copy.default",
        "import torch\n_aten = torch.ops.aten\n_aten._softmax.default",
        "from moe_export.export import _mine",
        "class A:\n    def f(self): self._own = 1\n    def g(self, other): return self._own + other._mine",
        "import sys\nsys._getframe(1)",
        "import sys\nsys.argv = []",
        "def f(row): return row._replace(x=1)",
        "import torch\ntorch.nn.Module.__call__",
        "def f(node): node.meta = {}",
        "from torch import nn\ndef f(module: nn.Module, x): setattr(module, 'weight', x)",
    ],
)
def test_what_is_neither_is_not(code):
    assert not found_in([("code.py", code), ("other.py", "_mine = 1")])


@pytest.mark.parametrize("path", sorted(DOOR.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_file_of_the_door_says_why_and_has_a_canary(path):
    told = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert re.search(r"^Seen in (torch|transformers|onnxscript) \d+\.\d+\.\d+", told, re.MULTILINE)
    assert "Why: " in told
    assert f"`{path.stem}`" in (DOOR / "__init__.py").read_text()
    tests = (ROOT / "tests" / "export" / "torch_compat" / f"test_{path.stem}.py").read_text()
    assert "def test_canary_" in tests
    assert f"export/torch_compat/{path.name}" in tests


def test_a_canary_says_what_to_do():
    said = r"torch \S+ with onnxscript \S+ no longer does what door\.py relies on: it sings \(.*gone.*\)\. To do: feed"
    with (
        pytest.raises(pytest.fail.Exception, match=said),
        canaries.canary("door.py", "it sings", todo="feed it"),
    ):
        raise AttributeError("gone")
