"""Engines are really built, on a machine without a GPU, by TensorRT-RTX."""

from __future__ import annotations

import subprocess
import sys

import onnx
import onnx_ir as ir
import pytest

from moe_export.errors import MissingBackendError, NotExportableError, UsageError
from moe_export.export.engines.build import build_engines
from moe_export.export.engines.module import load_module


def test_an_engine_is_built_for_each_capability(linear):
    engines = build_engines(linear, ["sm86", "SM120", "sm86"], {"rows": (1, 16, 64)})
    assert [engine.capability for engine in engines] == ["sm86", "sm120"]
    for engine in engines:
        assert engine.size == len(engine.plan) > 1000
        assert (engine.module, engine.version) == ("tensorrt-rtx", load_module().version)
        assert [str(found) for found in engine.profiles[0].values()] == ["1:16:64"]
    assert engines[0].plan != engines[1].plan


def test_a_file_a_proto_and_an_ir_model_are_taken(linear, tmp_path):
    onnx.save(linear, tmp_path / "linear.onnx")
    for model in (tmp_path / "linear.onnx", str(tmp_path / "linear.onnx"), linear, ir.from_proto(linear)):
        assert build_engines(model, ["portable"])[0].size > 1000


def test_external_weights_are_found(onnx_graph, tmp_path):
    weight = ", ".join(["1"] * 32)
    text = f"g (float[rows, 32] x) => (float[rows, 32] y) <float[32] w = {{{weight}}}> {{ y = Add(x, w) }}"
    model = ir.from_proto(onnx_graph(text))
    ir.save(model, tmp_path / "m.onnx", external_data="m.onnx.data", size_threshold_bytes=1)
    assert (tmp_path / "m.onnx.data").exists()
    for given in (tmp_path / "m.onnx", ir.load(tmp_path / "m.onnx")):
        assert build_engines(given, ["sm89"])[0].size > 1000


def test_several_profiles_are_in_one_engine(linear):
    (engine,) = build_engines(linear, ["sm89"], [{"rows": (1, 1, 1)}, {"rows": (2, 16, 64)}])
    assert [str(profile["rows"]) for profile in engine.profiles] == ["1:1:1", "2:16:64"]


@pytest.mark.parametrize("wanted", [["sm42"], ["sm89", "ada"], ["8.9"]])
def test_an_unknown_capability_lists_those_that_there_are(linear, wanted):
    with pytest.raises(UsageError, match="no engine can be built for") as error:
        build_engines(linear, wanted)
    assert "sm75, sm80, sm86, sm89, sm120, sm121, portable, current" in error.value.hint


@pytest.mark.parametrize("wanted", [[], ["", " "]])
def test_no_capability_is_an_error(linear, wanted):
    with pytest.raises(UsageError, match="no compute capability"):
        build_engines(linear, wanted)


def test_without_a_gpu_none_is_built_for_it(linear):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(MissingBackendError, match="cannot build for the GPU of this machine") as error:
        build_engines(linear, ["current"], module="tensorrt-rtx")
    assert "sm89" in error.value.hint


def test_an_unknown_module_is_refused(linear):
    with pytest.raises(UsageError, match="no engine builder 'tensorflow'"):
        build_engines(linear, ["sm89"], module="tensorflow")


@pytest.mark.parametrize("name", ["missing.onnx", "text.onnx", "empty.onnx"])
def test_what_is_no_model_is_refused(tmp_path, name):
    (tmp_path / "text.onnx").write_text("this is no model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no file|is not an ONNX model"):
        build_engines(tmp_path / name, ["sm89"])


def test_a_refusal_names_the_node_the_line_and_the_module(onnx_graph):
    model = onnx_graph(
        "g (float[rows] x) => (int64[1, found] y) { a = Abs(x) y = NonZero(a) }",
        source="model.py:12",
        module="experts.3",
    )
    model.graph.node[1].name = "node_nonzero"
    with pytest.raises(NotExportableError) as error:
        build_engines(model, ["sm89"])
    assert "NonZero node_nonzero, model.py:12, module experts.3" in error.value.where


CODE = """
import sys
sys.modules["tensorrt_rtx"] = None  # as if it were not installed: `import` raises
from moe_export.errors import MissingBackendError
from moe_export.export.engines.build import build_engines
import onnx
model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> g (float[n] x) => (float[n] y) { y = Abs(x) }')
try:
    build_engines(model, ["sm89"])
except MissingBackendError as error:
    print(error.exit_code, error)
"""


def test_without_the_module_it_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("4 tensorrt-rtx ")
    assert "pip install 'moe-export[rtx]'" in done.stdout


def test_it_is_imported_when_the_first_engine_is_built():
    found = "[name for name in sys.modules if name.startswith('tensorrt')]"
    code = f"import sys, moe_export.export.engines.build; print({found})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
