"""What the room promises as a whole."""

import ast
import subprocess
import sys
from pathlib import Path

import moe_export.verify

FOLDER = Path(__file__).parents[2] / "verify"
BELOW = {
    "moe_export.domain",
    "moe_export.errors",
    "moe_export.external_data",
    "moe_export.float64",
    "moe_export.own_files",
    "moe_export.tensorrt_api",
}  # what every room may know


def test_importing_it_is_lean():
    heavy = "{'torch', 'onnxruntime', 'onnx', 'rich'}"
    code = f"import sys, moe_export.verify; print(*({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_it_knows_no_other_room():
    for file in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_export"):
                assert node.module in BELOW or node.module.startswith("moe_export.verify"), file


def test_every_public_name_is_there_and_documented():
    for name in moe_export.verify.__all__:
        public = getattr(moe_export.verify, name)
        if callable(public):
            assert public.__doc__, name


def test_the_picture_names_every_file():
    picture = moe_export.verify.__doc__
    for file in FOLDER.rglob("*.py"):
        name = file.relative_to(FOLDER).with_suffix("").as_posix()
        assert file.stem in ("__init__", "__main__") or f"`{name}`" in picture, name
