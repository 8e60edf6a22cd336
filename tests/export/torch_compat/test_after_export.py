"""What reads an exported file is answered where no file was written."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from canaries import canary

from moe_export.export.frontend.export_calls import Made
from moe_export.export.torch_compat.after_export import READERS, without_files

FILE = "export/torch_compat/after_export.py"


@pytest.mark.parametrize(("module", "name"), READERS)
def test_canary_each_reader_is_there_and_answered(module, name):
    owner = pytest.importorskip(module)
    before = getattr(owner, name, None)
    with canary(FILE, f"`{module}.{name}` reads a file that it is given", todo="name what took its place"):
        assert before is not None
        with without_files(["net.onnx"], Made, made := Made()):
            assert getattr(importlib.import_module(module), name)("here/net.onnx") is made
        assert getattr(owner, name) is before


def test_what_has_nothing_to_do_with_an_export_is_done(tmp_path):
    with without_files(["net.onnx"], Made, Made()):
        subprocess.run([sys.executable, "-c", f"open({str(tmp_path / 'made')!r}, 'w')"], check=True)
        assert subprocess.run(["trtexec", "--onnx=net.onnx"], check=True).returncode
        assert onnx.checker.check_model(onnx.load(Path("net.onnx"))) is not None
        with pytest.raises(FileNotFoundError):
            onnx.load("another.onnx")
        assert os.system("exit 0") == 0
    assert (tmp_path / "made").exists()
