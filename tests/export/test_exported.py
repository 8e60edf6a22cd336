"""`moe_export.export_model`: a module in memory to graphs, with the arguments of `torch.onnx.export`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import moe_export


class Experts(nn.Module):
    """Top-1 of four experts; x is (b, l, d)."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(d, 4)
        self.experts = nn.ModuleList(nn.Linear(d, d) for _ in range(4))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (chosen == number)).sum(-1, keepdim=True)
        return self.dropout(out) * scale


@pytest.fixture(scope="module")
def exported() -> tuple[nn.Module, moe_export.ExportedModel]:
    torch.manual_seed(0)
    module = Experts()
    return module, moe_export.export_model(module, (torch.randn(2, 5, 8),))


def run(model: onnx.ModelProto, **feeds: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: value.numpy() for name, value in feeds.items()})[0])


def test_three_lines(exported, tmp_path) -> None:
    module, program = exported
    path = program.save(tmp_path / "experts.onnx")
    report = program.verify()
    assert report.verdict == "equal"
    assert report.exit_code == 0
    x = torch.randn(3, 9, 8)
    with torch.no_grad():
        wanted = module.eval()(x)
    np.testing.assert_allclose(run(onnx.load(path), x=x), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run(onnx.load(path), x=x), run(program.model_proto, x=x))


def test_the_module_keeps_its_mode(exported) -> None:
    module = Experts().train()
    module.gate.eval()
    moe_export.export_model(module, torch.randn(1, 3, 8), simplify=False)
    assert module.training
    assert module.dropout.training
    assert not module.gate.training


@pytest.mark.slow
def test_a_wrong_graph_is_not_equal(exported) -> None:
    _, program = exported
    proto = program.model_proto
    wrong = replace(program, graph=replace(program.graph, model=program.model.clone()))
    bias = next(v for v in wrong.model.graph.initializers.values() if "experts.2.bias" in str(v.name))
    assert bias.const_value is not None
    bias.const_value = ir.tensor(bias.const_value.numpy() + np.float32(0.001))
    assert wrong.verify().verdict == "not equal"
    assert proto.SerializeToString() == program.model_proto.SerializeToString()


def test_the_router(exported, tmp_path) -> None:
    module, program = exported
    router = program.router()
    assert list(program.routers.values()) == [router]
    x = torch.randn(3, 4, 8)
    session = onnxruntime.InferenceSession(router.model_proto.SerializeToString())
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"x": x.numpy()}), strict=True))
    with torch.no_grad():
        wanted = module.gate(x).softmax(-1).topk(1)
    ids = [value for value in found.values() if value.dtype == np.int64]
    assert any(np.array_equal(value.reshape(-1), wanted.indices.numpy().reshape(-1)) for value in ids)
    assert router.verify().verdict == "equal"
    with pytest.raises(moe_export.UsageError, match="no router is called 'other'"):
        program.router("other")
    with pytest.raises(moe_export.UsageError, match="no router was found"):
        router.router()


def test_the_arguments_of_torch_onnx_export() -> None:
    module, x = Experts(), torch.randn(2, 5, 8)
    program = moe_export.export_model(
        module,
        (x,),
        {"scale": 2.0},
        dynamic_shapes={"x": {0: Dim("rows")}, "scale": None},
        input_names=["hidden"],
        output_names=["mixed"],
        opset=18,
    )
    proto = program.model_proto
    (given,), (made,) = proto.graph.input, proto.graph.output
    assert (given.name, made.name) == ("hidden", "mixed")
    assert [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim] == ["rows", 5, 8]
    assert proto.opset_import[0].version == 18
    wanted = module.eval()(torch.ones(4, 5, 8), 2.0).detach()
    np.testing.assert_allclose(run(proto, hidden=torch.ones(4, 5, 8)), wanted, rtol=1e-5, atol=1e-5)


def test_a_function() -> None:
    def route(x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("bd,ed->be", x, weight).softmax(-1)

    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    program = moe_export.export_model(route, (x, weight))
    np.testing.assert_allclose(
        run(program.model_proto, x=x, weight=weight), route(x, weight), rtol=1e-5, atol=1e-6
    )


def test_it_shows_itself(exported) -> None:
    _, program = exported
    assert str(program).startswith("the whole model: ")
    page = program._repr_html_()
    assert page.count("<svg") == 1
    assert "<script" not in page
    assert {"export_model", "ExportedModel"} <= set(dir(moe_export))


def test_files_of_others_stay(exported, tmp_path) -> None:
    _, program = exported
    (tmp_path / "notes.onnx").write_text("mine")
    with pytest.raises(moe_export.UsageError, match="overwrit"):
        program.save(tmp_path / "notes.onnx")
    assert (tmp_path / "notes.onnx").read_text() == "mine"
    with pytest.raises(moe_export.UsageError, match="onnx file"):
        program.save(tmp_path / "notes.txt")
    program.save(tmp_path / "graph.onnx")
    program.save(tmp_path / "graph.onnx")
    program.save(tmp_path / "notes.onnx", force=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["graph.onnx", "notes.onnx"]


@pytest.mark.parametrize(
    ("model", "args", "error"),
    [
        (object(), (), "a model is an nn.Module or a function"),
        (Experts(), (torch.randn(2, 5, 7),), "mat1 and mat2|shapes"),
        (Experts(), (), "example|argument"),
    ],
)
def test_wrong_arguments(model, args, error) -> None:
    with pytest.raises(moe_export.MoeExportError, match=error):
        moe_export.export_model(model, args)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PyTorch's exporter
def test_a_drop_in_for_torch_onnx_export(tmp_path) -> None:
    """The same call, its file run beside PyTorch's own."""
    module, x = Experts().eval(), torch.randn(2, 5, 8)
    given = {"input_names": ["hidden"], "output_names": ["mixed"], "opset_version": 18, "verbose": False}
    program = moe_export.onnx.export(module, (x,), tmp_path / "ours.onnx", dynamo=True, **given)
    assert isinstance(program, moe_export.ExportedModel)
    torch.onnx.export(module, (x,), tmp_path / "theirs.onnx", dynamo=True, **given)
    ours, theirs = (onnx.load(tmp_path / f"{name}.onnx") for name in ("ours", "theirs"))
    assert [value.name for value in ours.graph.input] == [value.name for value in theirs.graph.input]
    np.testing.assert_allclose(run(ours, hidden=x), run(theirs, hidden=x), rtol=1e-5, atol=1e-5)
    moe_export.onnx.export(module, (x,), tmp_path / "theirs.onnx")  # overwritten, as PyTorch does
    assert onnx.load(tmp_path / "theirs.onnx").producer_name != theirs.producer_name


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"export_params": False}, moe_export.UsageError, "export_params=False asks for a graph"),
        ({"custom_translation_table": {len: len}}, moe_export.UsageError, "custom_translation_table="),
        ({"keep_initializers": True}, TypeError, "unexpected keyword argument 'keep_initializers'"),
        ({"opset_version": 11}, moe_export.UsageError, "opset"),
    ],
)
def test_what_would_be_another_graph_is_refused(given, error, says, tmp_path) -> None:
    with pytest.raises(error, match=says):
        moe_export.onnx.export(Experts(), (torch.randn(2, 5, 8),), tmp_path / "block.onnx", **given)
    assert not list(tmp_path.iterdir())


def test_the_faulty_node_of_a_broken_graph_is_named(exported, tmp_path) -> None:
    module, program = exported
    broken, x = program.model_proto, torch.randn(2, 5, 8)
    softmax = next(node for node in broken.graph.node if node.op_type == "Softmax")
    softmax.op_type = "LogSoftmax"
    onnx.save(broken, tmp_path / "broken.onnx")
    fault = moe_export.localise_error(tmp_path / "broken.onnx", module, (x,))
    assert fault is not None
    assert str(fault).startswith(f"first faulty node: LogSoftmax {softmax.name}  test_exported.py:")
    assert (tmp_path / "fault" / "run.py") in fault.write(str(tmp_path / "fault"))


def test_an_equal_graph_has_no_faulty_node(exported, tmp_path) -> None:
    module, program = exported
    path = program.save(tmp_path / "experts.onnx")
    assert moe_export.localise_error(path, module, torch.randn(2, 5, 8)) is None
    engine = tmp_path / "experts.engine"
    engine.write_bytes(b"")
    with pytest.raises(moe_export.UsageError, match="is not a graph"):
        moe_export.localise_error(engine, module, torch.randn(2, 5, 8))


@pytest.mark.slow
def test_a_graph_against_a_module_and_against_a_graph(exported, tmp_path) -> None:
    module, program = exported
    path, x = program.save(tmp_path / "experts.onnx"), torch.randn(2, 5, 8)
    assert moe_export.verify_model(path, module, (x,)).verdict == "equal"
    assert moe_export.verify_model(path, path).verdict == "equal"
    other = Experts()
    assert moe_export.verify_model(path, other, (x,)).verdict == "not equal"
    with pytest.raises(moe_export.UsageError, match="example inputs"):
        moe_export.verify_model(path, module)
    with pytest.raises(moe_export.UsageError, match="inputs are those of a module"):
        moe_export.verify_model(path, path, (x,))
