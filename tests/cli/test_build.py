"""`moe-export build` and `--engine`: engines that TensorRT-RTX really builds, without a GPU."""

from __future__ import annotations

import json

import onnx
import pytest

from moe_export.export.engines.build import has_gpu
from moe_export.export.engines.module import load_module

STATUS = "built, not run" if has_gpu() else "built, not run: no GPU"
VERSION = load_module().version


def test_engines_are_written_beside_the_graph_with_a_report(command, finished, tmp_path):
    done = command(
        "build", finished / "moe.onnx", "--engine", "sm89, SM120", "--range", "batch=1:16:64", "-o", "out"
    )
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "moe.engines.json").read_text())
    assert [found["file"] for found in report["engines"]] == ["moe.sm89.engine", "moe.sm120.engine"]
    for found in report["engines"]:
        assert (tmp_path / "out" / found["file"]).stat().st_size == found["size"] > 1000
        assert (found["module"], found["version"]) == ("tensorrt-rtx", VERSION)
        assert found["profiles"] == [{"batch": [1, 16, 64]}]
        assert found["status"] == STATUS
        assert found["seconds"] > 0
        assert found["memory"]["activations"] > 0
        assert f"out/{found['file']}  (tensorrt-rtx {VERSION}, " in done.out
    assert "profile: batch 1:16:64" in done.out
    assert "report: out/moe.engines.json" in done.out


def test_json_is_one_document(command, finished):
    done = command("build", finished / "block.onnx", "--engine", "portable", "-o", "out", "--json")
    assert json.loads(done.out)["engines"][0]["capability"] == "portable"


def test_quiet_says_nothing(command, finished):
    done = command("build", finished / "block.onnx", "--engine", "sm89", "-o", "out", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_the_layers_name_the_nodes_of_the_graph(command, finished, tmp_path):
    assert command("build", finished / "moe.onnx", "--engine", "sm89", "--layers", "-o", "out").code == 0
    layers = json.loads((tmp_path / "out" / "moe.sm89.layers.json").read_text())
    names = {node.name for node in onnx.load(finished / "moe.onnx").graph.node}
    for part in ("network", "engine"):
        found = {node for layer in layers[part] for node in layer["nodes"]}
        assert found & names, part
    kernels = [layer for layer in layers["engine"] if layer["type"] == "gemm"]
    assert kernels
    assert all(layer["outputs"][0]["dtype"] == "float" and layer["outputs"][0]["shape"] for layer in kernels)


def test_each_range_is_a_profile(command, finished, tmp_path):
    args = ("--range", "batch=1:2:4,sequence=1", "--range", "sequence=2:8:16,batch=1")
    assert command("build", finished / "block.onnx", "--engine", "sm89", *args, "-o", "out").code == 0
    report = json.loads((tmp_path / "out" / "block.engines.json").read_text())
    assert report["engines"][0]["profiles"] == [
        {"batch": [1, 2, 4], "sequence": [1, 1, 1]},
        {"batch": [1, 1, 1], "sequence": [2, 8, 16]},
    ]


def test_export_builds_engines_of_the_model_and_its_gate(command, write, texts, tmp_path, listing):
    model = write(texts["gate"], "moe.py")
    done = command(model, "-o", "out", "--engine", "sm86", "--range", "batch=1:4:8", "--quiet")
    assert done.code == 0, done.err
    assert listing(tmp_path / "out") == [
        "moe.gate.onnx", "moe.gate.sm86.engine", "moe.onnx", "moe.report.json", "moe.sm86.engine",
    ]  # fmt: skip
    report = json.loads((tmp_path / "out" / "moe.report.json").read_text())
    for graph in report["graphs"]:
        (engine,) = graph["engines"]
        assert engine["file"] == graph["file"].replace(".onnx", ".sm86.engine")
        assert engine["profiles"] == [{"batch": [1, 4, 8]}]
        assert engine["status"] == STATUS


def test_no_engine_is_built_of_a_graph_that_is_not_equal(command, write, tmp_path, listing):
    model = write(
        """
        class Noise(nn.Module):
            def forward(self, x):
                return x + torch.rand_like(x)

        model = Noise()
        example_inputs = (torch.randn(2, 3),)
        """
    )
    done = command(model, "-o", "out", "--engine", "sm86", "--atol", "1e-9", "--rtol", "1e-9")
    assert done.code != 0
    assert not [name for name in listing(tmp_path) if name.endswith(".engine")]


def test_a_graph_says_at_which_sizes_it_is_right(finished):
    model = onnx.load(finished / "block.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["moe_export.dim.batch"] == "1:"
    assert facts["moe_export.dim.sequence"] == "1:"


@pytest.mark.parametrize(
    ("args", "said", "hint"),
    [
        (("--engine", "sm99"), "no engine can be built for 'sm99'", "sm75, sm80, sm86, sm89, sm120"),
        (("--engine", ","), "no compute capability", "sm75"),
        (("--engine", "sm89", "--range", "len=1:2:3"), "no dynamic dimension 'len'", "there are: batch, sequence"),
        (("--engine", "sm89", "--range", "sequence=8:4:2"), "the sizes are not in order", "sequence=1:512:4096"),
        (("--engine", "sm89", "--range", "sequence"), "is not NAME=MIN:OPT:MAX", "sequence=1:512:4096"),
        (("--engine", "sm89", "--workspace", "much"), "--workspace is a size, not 'much'", "512MiB"),
        (("--engine", "sm89", "--timing-cache", "t"), "a timing cache is of no use to tensorrt-rtx", "runs first"),
    ],
)  # fmt: skip
def test_wrong_use_says_what_exists(command, finished, args, said, hint, listing, tmp_path):
    done = command("build", finished / "block.onnx", *args, "-o", "out")
    assert done.code == 2
    assert said in done.err
    assert hint in done.err
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "option", [("--range", "sequence=1"), ("--workspace", "1GB"), ("--layers",), ("--refit",)]
)
def test_an_option_of_engines_without_one_is_wrong_use(command, finished, option):
    done = command(finished / "block.py", "-o", "out", *option)
    assert done.code == 2
    assert f"{option[0]} goes with --engine" in done.err


def test_a_missing_graph_is_wrong_use(command):
    done = command("build", "nowhere.onnx", "--engine", "sm89")
    assert done.code == 2
    assert "no file nowhere.onnx" in done.err


def test_a_workspace_that_is_too_small_is_said(command, finished):
    done = command("build", finished / "moe.onnx", "--engine", "sm89", "--workspace", "1B", "-o", "out")
    assert done.code == 3
    assert "workspace" in done.err


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here, and it can do this")
@pytest.mark.parametrize("option", ["--refit", "--strip-weights"])
def test_replaceable_weights_need_a_gpu(command, finished, option, listing, tmp_path):
    done = command("build", finished / "moe.onnx", "--engine", "sm89", option, "-o", "out")
    assert done.code == 4
    assert "needs a GPU to build an engine whose weights can be replaced or left out" in done.err
    assert listing(tmp_path) == []


def test_a_builder_that_is_not_there_is_missing(command, finished):
    from importlib.util import find_spec

    if find_spec("tensorrt") is not None:
        pytest.skip("full TensorRT is installed here")
    done = command("build", finished / "block.onnx", "--engine", "current", "--builder", "tensorrt")
    assert done.code == 4
    assert "pip install 'moe-export[tensorrt]'" in done.err


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_what_must_run_and_cannot_is_a_missing_backend(command, finished, write, texts, listing, tmp_path):
    done = command("build", finished / "block.onnx", "--engine", "sm89", "--require-run", "-o", "out")
    assert done.code == 4
    assert "built, not run: no GPU (--require-run)" in done.err
    assert listing(tmp_path / "out") == ["block.engines.json", "block.sm89.engine"]
    done = command(finished / "block.py", "--engine", "sm89", "--require-run", "-o", "exported", "-q")
    assert done.code == 4
    assert "block.sm89.engine" in listing(tmp_path / "exported")


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_verify_of_an_engine_needs_a_gpu(command, finished):
    assert command("build", finished / "block.onnx", "--engine", "sm89", "-o", "out", "-q").code == 0
    done = command("verify", "out/block.sm89.engine", "--against", finished / "block.py")
    assert done.code == 4
    assert "built, not run: no GPU" in done.err


def test_tf32_is_off_unless_it_is_asked_for(command, finished, tmp_path):
    for args, settings in (((), {}), (("--tf32",), {"tf32": True})):
        assert command("build", finished / "block.onnx", "--engine", "sm89", "-o", "out", *args).code == 0
        report = json.loads((tmp_path / "out" / "block.engines.json").read_text())
        assert report["engines"][0]["settings"] == settings


def test_values_of_an_input_that_decides_shapes_are_ranges(command, tmp_path):
    text = "g (float[n, 6] x, int64[2] s) => (float[a, b] y) { y = Reshape(x, s) }"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}'), tmp_path / "m.onnx")
    done = command("build", "m.onnx", "--engine", "sm89", "--range", "n=2:4:8,s_0=2:4:8,s_1=6")
    assert done.code == 0, done.err
    assert "profile: n 2:4:8, s_0 2:4:8, s_1 6:6:6" in done.out
    report = json.loads((tmp_path / "m.engines.json").read_text())
    assert report["engines"][0]["profiles"] == [{"n": [2, 4, 8], "s_0": [2, 4, 8], "s_1": [6, 6, 6]}]
    done = command("build", "m.onnx", "--engine", "sm89", "--force")
    assert done.code == 2
    assert "--range s_0=MIN:OPT:MAX,s_1=MIN:OPT:MAX" in done.err


def test_options_of_full_tensorrt_are_refused_by_tensorrt_rtx(command, finished):
    for option, said in (
        (("--version-compatible",), "runs with the version that built it only"),
        (("--platform", "windows"), "runs on Linux and Windows as it is"),
    ):
        done = command("build", finished / "block.onnx", "--engine", "sm89", *option, "-o", "out")
        assert done.code == 2
        assert said in done.err
