"""Every way of writing a loop over time becomes one Scan a loop, right at lengths that nobody traced."""

from __future__ import annotations

from pathlib import Path

import loops_over_time as ways
import loops_that_stay as refused
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import only
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.lengths import Length


def subject_of(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Subject:
    return make_subject(module, inputs, {}, source=Path(ways.__file__), how="a test")


def exported(subject: Subject, recurrence: str = "scan") -> Graph:
    options = Options(gates=False, simplify=False, recurrence=recurrence)  # type: ignore[arg-type]
    return export_subject(subject, options)[0]


def session(graph: Graph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    proto = ir.to_proto(graph.model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def along(subject: Subject, size: int) -> Length:
    """The axes of all inputs that have this size; each example has it once an input."""
    return Length(
        tuple(
            (name, tensor.shape.index(size))
            for name, tensor in subject.inputs.items()
            if size in tensor.shape
        )
    )


def equal(subject: Subject, graph: Graph, length: int, batch: int) -> bool:
    example = along(subject, ways.L).resized(subject.inputs, length)
    example = Length(tuple((name, 1 if length_first(subject) else 0) for name in example)).resized(
        example, batch
    )
    generator = torch.Generator().manual_seed(length)
    example = {
        name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in example.items()
    }
    with torch.no_grad():
        wanted = subject.call_named(example)
    found = session(graph).run(None, {name: tensor.numpy() for name, tensor in example.items()})
    return all(
        a.shape == b.shape and np.allclose(a.numpy(), b, rtol=1e-4, atol=1e-5)
        for a, b in zip(wanted, found, strict=True)
    )


def length_first(subject: Subject) -> bool:
    return all(tensor.shape[0] == ways.L for tensor in subject.inputs.values())


# A loop takes ten seconds to export.
@pytest.fixture(scope="module", params=only(["in_place", "growing_cat"], ways.LOOPS))
def way(request: pytest.FixtureRequest) -> tuple[Subject, Graph]:
    subject = subject_of(*ways.LOOPS[request.param])
    return subject, exported(subject)


@pytest.mark.parametrize(("length", "batch"), [(1, 1), (1, 3), (2, 3), (7, 1), (16, 3), (63, 1), (257, 1)])
@pytest.mark.slow_but_one
def test_it_is_right_at_other_lengths(way: tuple[Subject, Graph], length: int, batch: int) -> None:
    assert equal(*way, length, batch)


def test_the_loop_is_a_scan_and_nothing_is_left_of_the_marks(way: tuple[Subject, Graph]) -> None:
    nodes = list(way[1].model.graph.all_nodes())
    assert any(node.op_type == "Scan" for node in nodes)
    assert {node.domain for node in nodes} == {""}
    assert len(nodes) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", only(["strided"], ["in_place", "strided", "layers"]))
def test_the_graph_does_not_depend_on_the_length_of_the_example(name: str) -> None:
    module, inputs = ways.LOOPS[name]
    subject = subject_of(module, inputs)
    sizes = set()
    for length in (5, 33):
        example = along(subject, ways.L).resized(subject.inputs, length)
        graph = exported(subject_of(module, tuple(example.values())))
        sizes.add(tuple(sorted(node.op_type for node in graph.model.graph.all_nodes())))
    assert len(sizes) == 1


@pytest.mark.slow
def test_a_loop_over_rows_of_an_image_holds_for_any_height_and_width() -> None:
    subject = subject_of(ways.Rows(), (ways.randn(ways.B, 2, 5, 3),))
    graph = exported(subject)
    assert graph.traced.inputs["image"] == ("batch", "image_dim1", "height", "width")
    assert sum("over image.shape[2] * image.shape[3]," in note for note in graph.notes) == 1
    for batch, channels, height, width in (
        (1, 1, 1, 1),
        (3, 2, 12, 3),
        (2, 1, 1, 7),
        (2, 3, 9, 1),
        (1, 2, 4, 11),
    ):
        image = torch.randn(batch, channels, height, width)
        found = session(graph).run(None, {"image": image.numpy()})[0]
        assert np.allclose(found, ways.Rows()(image).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_loop_that_starts_anew_in_each_row_is_folded_over_one_length_at_most() -> None:
    subject = subject_of(ways.RowByRow(), (ways.randn(ways.B, 5, 3, 2),))
    graph = exported(subject)
    sizes = graph.traced.inputs["image"][1:3]
    assert any(isinstance(size, int) for size in sizes)
    assert any("fixed" in note for note in graph.notes)
    feeds = [size if isinstance(size, int) else 4 for size in sizes]
    image = torch.randn(3, *feeds, 2)
    found = session(graph).run(None, {"image": image.numpy()})[0]
    assert np.allclose(found, ways.RowByRow()(image).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", only(["half_way_back", "all_before", "counted"], refused.LOOPS))
def test_a_loop_that_cannot_be_folded_says_why_and_where(name: str) -> None:
    module, inputs, reason, marker = refused.LOOPS[name]
    subject = make_subject(module, inputs, {}, source=Path(refused.__file__), how="a test")
    with pytest.raises(NotExportableError, match=reason) as caught:
        exported(subject)
    assert "--recurrence unrolled" in str(caught.value.hint)
    if marker is not None:
        file, _, line = str(caught.value.where).rpartition(":")
        assert marker in Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_it_stays_unrolled_with_its_length_fixed_and_a_note() -> None:
    module, inputs, reason, _ = refused.LOOPS["half_way_back"]
    subject = make_subject(module, inputs, {}, source=Path(refused.__file__), how="a test")
    graph = exported(subject, "auto")
    assert graph.traced.inputs["x"][1] == refused.L
    assert "cannot be folded" in graph.notes[0]
    assert reason in graph.notes[0]


def test_a_length_that_was_asked_for_is_an_error_where_the_loop_cannot_be_folded() -> None:
    module, inputs, reason, _ = refused.LOOPS["half_way_back"]
    subject = make_subject(module, inputs, {}, source=Path(refused.__file__), how="a test")
    options = Options(dims=DimRequest(picked={("x", 1): "sequence"}), gates=False)
    with pytest.raises(NotExportableError, match=reason):
        export_subject(subject, options)


def test_unrolled_is_what_the_tracer_gives() -> None:
    subject = subject_of(*ways.LOOPS["backwards"])
    graph = exported(subject, "unrolled")
    assert graph.traced.inputs["x"][1] == ways.L
    assert not any(node.op_type == "Scan" for node in graph.model.graph.all_nodes())


@pytest.mark.slow
def test_strong_decay_stays_finite() -> None:
    subject = subject_of(*ways.LOOPS["sequential"])
    graph = exported(subject)
    example = along(subject, ways.L).resized(subject.inputs, 512)
    example["delta"] = torch.full_like(example["delta"], 100.0)
    found = session(graph).run(None, {name: tensor.numpy() for name, tensor in example.items()})[0]
    with torch.no_grad():
        (wanted,) = subject.call_named({name: tensor.double() for name, tensor in example.items()})
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-4)


class Rescaled(nn.Module):
    """Divides its weight when it is first called in eval mode, as transformers' RWKV does."""

    def __init__(self):
        super().__init__()
        self.linear, self.is_rescaled = nn.Linear(4, 4), False

    def forward(self, x):
        if not self.is_rescaled:
            with torch.no_grad():
                self.linear.weight.div_(2)
            self.is_rescaled = True
        h, found = torch.zeros(x.shape[0], 4), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.linear(h) + x[:, t])
            found.append(h)
        return torch.stack(found, 1)


@torch.no_grad()
def test_a_weight_that_the_first_call_writes_into_is_no_output_of_the_loop(tools):
    torch.manual_seed(0)
    module = Rescaled().eval()
    weight = module.linear.weight.clone()
    graph = tools.graph(module, torch.randn(2, 7, 4))
    assert "Scan" in [node.op_type for node in graph.model.graph]
    for length in (1, 2, 7, 12):
        module.is_rescaled, x = False, torch.randn(3, length, 4)
        module.linear.weight.copy_(weight)
        (found,) = tools.run(graph.model, x=x).values()
        np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-5, atol=1e-6)
