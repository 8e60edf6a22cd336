"""`moe-export model.py`: files, options, exit codes, and what is printed where."""

from __future__ import annotations

import json
from types import SimpleNamespace

import onnx
import pytest
from slow_cases import slow

from moe_export.commands.export import site_lines
from moe_export.commands.export_document import given_away


def test_the_main_road(command, write, listing, tmp_path, texts):
    path = write(texts["gate"], "moe.py")
    done = command(path, "--opset", 17, "-o", "out")
    assert done.code == 0
    assert listing(tmp_path / "out") == ["moe.gate.onnx", "moe.onnx", "moe.report.json"]
    assert "model: Moe, `model` and `example_inputs`" in done.out
    assert "out/moe.onnx  (the whole model: " in done.out
    assert "out/moe.gate.onnx  (the gate of gate: " in done.out
    assert "onnxruntime-cpu matches torch" in done.out
    assert "written: out/moe.onnx, out/moe.gate.onnx, out/moe.report.json" in done.out
    assert "tracing: " in done.err
    for name in ("moe.onnx", "moe.gate.onnx"):
        onnx.checker.check_model(str(tmp_path / "out" / name), full_check=True)


def test_the_metadata_of_a_file(finished):
    model = onnx.load(finished / "moe.gate.onnx")
    facts = {entry.key.removeprefix("moe_export."): entry.value for entry in model.metadata_props}
    assert model.producer_name == "moe-export"
    assert {key: facts[key] for key in ("source", "opset", "kind", "module")} == {
        "source": "moe.py",
        "opset": "17",
        "kind": "gate",
        "module": "gate",
    }
    assert not [value for value in facts.values() if "/" in value]


def test_the_report(finished):
    report = json.loads((finished / "moe.report.json").read_text())
    assert report["verdict"] == "equal"
    assert report["opset"] == 17
    model, gate = report["graphs"]
    assert str(finished.parent) not in json.dumps(report)  # a report is given to others
    assert (model["file"], gate["file"]) == ("moe.onnx", "moe.gate.onnx")
    assert model["inputs"] == {"x": ["batch", 8]}
    assert gate["outputs"] == {"topk_idx": ["batch", 2], "topk_weight": ["batch", 2]}
    assert model["dynamic"] == [{"name": "batch", "traced": 6, "minimum": 1, "maximum": None}]
    assert (
        len({case["label"] for case in model["verification"]["cases"] if case["outcome"] == "compared"}) >= 5
    )


def test_notes_tell_lines_without_absolute_paths(tmp_path):
    note = f"4 experts at {tmp_path}/inner/moe.py:93: (lowered as 'slices')"
    assert given_away(note, tmp_path) == "4 experts at inner/moe.py:93: (lowered as 'slices')"
    beside = "loop at ../lib/loop.py:47: over x.shape[1], 12 ops per step"
    assert given_away(beside, tmp_path) == beside


def test_json_is_one_document_and_nothing_else(command, write, texts):
    text = (
        texts["model"].replace("return self", "print('from forward'); return self")
        + "print('from the file')\n"
    )
    done = command(write(text, "loud.py"), "--json")
    assert done.code == 0
    assert json.loads(done.out)["source"] == "loud.py"
    assert done.err.splitlines()[0] == "from the file"


def test_quiet_prints_nothing(command, write, texts):
    done = command(write(texts["model"] + "print('hello')\n"), "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_plain_text_where_it_is_no_terminal(command, write, texts):
    done = command(write(texts["model"]))
    assert "\x1b" not in done.out + done.err
    assert "\r" not in done.out + done.err


@pytest.mark.slow
def test_what_the_model_prints_is_shown_once(command, write, texts):
    text = texts["model"].replace("return self", "print('from forward'); return self")
    done = command(write(text))
    assert (done.out + done.err).count("from forward") == 1


def test_two_gates_are_numbered(command, write, listing, tmp_path, texts):
    text = (
        texts["gate"].replace("model = Moe()", "model = nn.Sequential(Moe(), Moe())").replace('{"x": ', "(")
    )
    done = command(write(text.replace("8)}", "8),)"), "two.py"), "--no-verify", "--no-simplify")
    assert done.code == 0
    names = ["two.gate.0.onnx", "two.gate.1.onnx", "two.onnx", "two.py", "two.report.json"]
    assert listing(tmp_path) == names
    assert "the gate of 0.gate" in done.out
    assert "the gate of 1.gate" in done.out


@pytest.mark.parametrize(
    ("gate", "files"),
    [slow((("--no-gate",), [])), (("--gate", "gate"), ["moe.gate.onnx"])],
    ids=["none", "one"],
)
def test_choosing_gates(command, write, listing, tmp_path, texts, gate, files):
    path = write(texts["gate"], "moe.py")
    assert command(path, "-o", "out", *gate, "--no-verify", "--no-simplify").code == 0
    assert listing(tmp_path / "out") == [*files, "moe.onnx", "moe.report.json"]


def test_a_model_that_is_only_a_gate_says_so(command, write, texts):
    text = texts["gate"].replace("model = Moe()", "model = Gate()")
    done = command(write(text), "--no-simplify")
    assert done.code == 0
    assert "The model is only a gate: its graph and the gate graph are the same." in done.out


def test_a_class_from_the_command_line(command, write, tmp_path, texts):
    path = write(texts["block"], "block.py")
    done = command(f"{path}:Block", "--init", "dim=6", "--input", "x=2x5x6:float32", "--no-verify")
    assert done.code == 0
    shape = onnx.load(tmp_path / "block.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["batch", "sequence", 6]


def test_dynamic_and_static(command, write, tmp_path, texts):
    path = write(texts["model"], "net.py")
    assert command(path, "--static", "--dynamic", "x:1=time", "--no-verify").code == 0
    shape = onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == [2, "time", 4]


@pytest.mark.parametrize("opset", [slow(17), slow(18), 21])
def test_the_opset_is_the_one_asked_for(command, write, tmp_path, texts, opset):
    assert command(write(texts["model"], "net.py"), "--opset", opset).code == 0
    (entry,) = onnx.load(tmp_path / "net.onnx").opset_import
    assert entry.version == opset


@pytest.mark.slow
def test_a_second_export_replaces_the_first(command, write, older, tmp_path, texts):
    path = write(texts["model"], "net.py")
    older(tmp_path / "net.onnx")
    assert command(path, "--no-verify").code == 0
    assert onnx.load(tmp_path / "net.onnx").graph.node


def test_a_script_that_changes_its_folder_does_not_change_where_files_go(
    command, write, listing, tmp_path, texts
):
    (tmp_path / "elsewhere").mkdir()
    text = f"import os\nos.chdir({str(tmp_path / 'elsewhere')!r})\n" + texts["model"]
    assert command(write(text, "net.py"), "-o", "out", "--no-verify").code == 0
    assert listing(tmp_path / "elsewhere") == []
    assert listing(tmp_path / "out") == ["net.onnx", "net.report.json"]


def test_a_graph_that_is_not_equal_is_not_left_in_place(
    command, write, older, listing, tmp_path, texts, monkeypatch
):
    """Exit 1; the graph is kept under another name, and an older good one is not touched."""
    from moe_export.export import stages

    def spoil(model, example):
        from moe_export.export.onnx.simplify import Simplified

        for value in model.graph.initializers.values():
            if value.const_value.dtype.name == "FLOAT":
                import onnx_ir as ir

                value.const_value = ir.tensor(value.const_value.numpy() * 1.01, name=value.name)
        return Simplified(model, "spoiled")

    monkeypatch.setattr(stages, "simplify", spoil)
    good = older(tmp_path / "net.onnx")
    done = command(write(texts["model"], "net.py"), "--report", tmp_path / "net.xml", "--github")
    assert done.code == 1
    assert "onnxruntime-cpu against torch: not equal" in done.out
    assert "::error file=" in done.out
    assert "<failure" in (tmp_path / "net.xml").read_text()
    assert "NOT EQUAL to the model; the graphs are kept as *.rejected.onnx" in done.out
    assert listing(tmp_path) == ["net.onnx", "net.py", "net.rejected.onnx", "net.report.json", "net.xml"]
    assert (tmp_path / "net.onnx").read_bytes() == good
    assert json.loads((tmp_path / "net.report.json").read_text())["verdict"] == "not equal"


def test_a_tolerance_that_nothing_meets(command, write, texts):
    path = write(texts["model"].replace("relu()", "softmax(-1).log().cumsum(1).exp()"))
    assert command(path, "--rtol", "0", "--atol", "0").code == 1


def test_without_verification_nothing_is_claimed(command, write, tmp_path, texts):
    done = command(write(texts["model"], "net.py"), "--no-verify")
    assert done.code == 0
    assert "equal" not in done.out
    assert json.loads((tmp_path / "net.report.json").read_text())["verdict"] == "not verified"


def test_other_names(write, command, tmp_path, texts):
    model = write(texts["model"], "net.py")
    names = ("--input-names", "past.0.key", "--output-names", "a/b")
    done = command(model, "-o", "out", "--dynamic", "past.0.key:0=rows", *names)
    assert done.code == 0, done.err
    graph = onnx.load(tmp_path / "out" / "net.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)][:1] == ["past.0.key"]
    assert graph.output[0].name == "a/b"
    assert command("verify", "out/net.onnx", "--against", model).code == 0
    many = command(model, "-o", "more", "--output-names", ",".join("abcdefgh"))
    assert many.code == 2
    assert "8 output names for" in many.err
    twice = command(model, "-o", "more", "--output-names", "a,a")
    assert "--output-names 'a,a' is not NAME,NAME,..." in twice.err


def test_a_script_that_ends_in_an_export_of_its_own(write, command, tmp_path, texts):
    """The call itself would fail: there are more rows in its example than it says."""
    script = write(
        texts["block"]
        + """
if __name__ == "__main__":
    torch.onnx.export(
        Block(), (torch.randn(2, 3, 4),), "own.onnx", input_names=["hidden"], output_names=["scores"],
        dynamic_shapes={"x": {0: torch.export.Dim("rows", max=1)}},
    )
""",
        "script.py",
    )
    done = command(script, "-o", "out")
    assert done.code == 0
    assert "hidden [rows, 3, 4]" in done.out
    model = onnx.load(tmp_path / "out" / "script.onnx")
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["hidden", "scores"]
    assert not (tmp_path / "own.onnx").exists()
    assert command("verify", "out/script.onnx", "--against", script).code == 0


@pytest.mark.parametrize(
    ("module", "where"), [("", "m.py:3"), ("model", "m.py:3"), ("model.moe", "m.py:3 in moe")]
)
def test_an_einsum_is_named_by_its_line_and_its_module_if_it_is_in_one(module, where):
    site = SimpleNamespace(file="m.py", line=3, module=module, equation="bd,bd->b", became="multiply, sum")
    assert list(site_lines([site])) == [f"einsum 'bd,bd->b' at {where}: multiply, sum"]
