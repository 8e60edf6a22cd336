"""Whole models with loops over time: those shown here, and transformers' slow paths, on tiny random configurations."""

from __future__ import annotations

import itertools
from pathlib import Path

import hybrid_families
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import slow
from torch import Tensor, nn

from moe_export.export.frontend.load import load_subject
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.pipeline import Graph, Options, export_subject
from moe_export.export.recurrence.recurrences import fold_recurrences
from moe_export.export.scans.captures import captures_as_states
from moe_export.export.tracing.dims import DimRequest
from moe_export.export.tracing.lengths import Length, resized_together
from moe_export.export.tracing.needless import run_program
from moe_export.export.tracing.widest import widest_trace
from moe_export.verify.runners.openvino_runner import OpenVinoRunner

MODELS = Path(__file__).parents[3] / "models"


def exported(subject: Subject) -> Graph:
    return export_subject(subject, Options(gates=False, simplify=False, recurrence="scan"))[0]


def scans(graph: Graph) -> int:
    return sum(node.op_type == "Scan" for node in graph.model.graph.all_nodes())


def check(subject: Subject, graph: Graph, lengths: tuple[int, ...]) -> None:
    """Onnxruntime computes what the model does, and so does OpenVINO, with loops in the form that it reads."""
    model = graph.model.clone()
    captures_as_states(model)
    other = OpenVinoRunner(ir.to_proto(model).SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph.model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = next(iter(subject.inputs))
    for length in lengths:
        for batch in (1, 3):
            example = Length(((name, 1),)).resized(subject.inputs, length)
            example = Length(((name, 0),)).resized(example, batch)
            with torch.no_grad():
                wanted = subject.call_named(example)
            arrays = {key: tensor.numpy() for key, tensor in example.items()}
            for found in (session.run(None, arrays), list(other.run(arrays).values())):
                for a, b in zip(wanted, found, strict=True):
                    np.testing.assert_allclose(
                        b, a.numpy(), rtol=1e-4, atol=1e-5, err_msg=f"{length}, {batch}"
                    )


@pytest.mark.parametrize("name", ["mamba", slow("hybrid")])
def test_the_models_here_at_any_length_from_one_short_example(name: str) -> None:
    subject = load_subject(str(MODELS / f"{name}.py"))
    graph = exported(subject)
    assert scans(graph) == 1
    assert len(list(graph.model.graph.all_nodes())) <= 60 or name != "mamba"
    check(subject, graph, (1, 2, 7, 16, 63, 64, 257))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "loops"), [("Mamba", 2), ("FalconMamba", 2), ("Rwkv", 2), ("Jamba", 1), ("RecurrentGemma", 2)]
)
def test_slow_paths_of_transformers(name: str, loops: int) -> None:
    tokens = torch.randint(0, 50, (2, 10), generator=torch.Generator().manual_seed(0))
    subject = make_subject(
        hybrid_families.Last(hybrid_families.slow_path(name)),
        (tokens,),
        {},
        source=Path(__file__),
        how="a test",
    )
    graph = exported(subject)
    assert scans(graph) == loops
    check(subject, graph, (1, 2, 7, 16, 63, 257))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "loops"),
    [
        ("Mamba2", 0),
        ("Bamba", 0),
        ("GraniteMoeHybrid", 0),
        ("NemotronH", 0),
        ("Zamba2", 0),
        ("Lfm2", 0),
        ("Qwen3Next", 1),
    ],
)
def test_families_of_transformers_that_compute_chunks(name: str, loops: int) -> None:
    tokens = torch.randint(0, 50, (2, 10), generator=torch.Generator().manual_seed(0))
    subject = make_subject(
        hybrid_families.Last(hybrid_families.by_chunks(name)),
        (tokens,),
        {},
        source=Path(__file__),
        how="a test",
    )
    graph = export_subject(subject, Options(gates=False, simplify=False))[0]
    assert scans(graph) == loops
    check(subject, graph, (1, 2, 7, 16, 63, 64, 65, 257))


CHUNKED = ["Mamba2", "Bamba", "GraniteMoeHybrid", "NemotronH", "Zamba2", "FalconH1", "Qwen3Next"]


def mixer_of(model: nn.Module) -> nn.Module:
    """The module that computes chunks."""
    return next(
        module
        for module in model.modules()
        if type(module).__name__.endswith(("Mixer", "MambaLayer", "DeltaNet")) and hasattr(module, "A_log")
    )


def mixer_subject(name: str, chunk: int, length: int) -> Subject:
    mixer = mixer_of(hybrid_families.by_chunks(name, chunk))
    width = next(weight for key, weight in mixer.named_parameters() if "in_proj" in key).shape[1]
    states = torch.randn(2, length, width, generator=torch.Generator().manual_seed(0))
    return make_subject(mixer, (states,), {}, source=Path(__file__), how="a test")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "length"), [*((name, 7) for name in CHUNKED), *(("Qwen3Next", n) for n in (1, 16, 100))]
)
def test_chunked_mixers_have_any_length_from_an_example_of_one(name: str, length: int) -> None:
    """Qwen3-Next's delta rule is always in chunks of 64, and its example is of one chunk, a part, or more."""
    chunk = 64 if name == "Qwen3Next" else 16
    subject = mixer_subject(name, chunk, length)
    graph = export_subject(subject, Options(gates=False, simplify=False))[0]
    assert [dim.maximum for dim in graph.traced.dims] == [None, None]
    check(subject, graph, (1, 2, chunk - 1, chunk, chunk + 1, 3 * chunk + 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("chunk", "length"), [(16, 100), (64, 1), (64, 16), (256, 7), (256, 100)])
@pytest.mark.parametrize("name", [name for name in CHUNKED if name != "Qwen3Next"])
def test_chunked_mixers_are_traced_for_any_length_from_an_example_of_any(
    name: str, chunk: int, length: int
) -> None:
    """An example of one chunk, or of a part of one, says nothing of how many there are.

    The trace is judged, with the shapes that it records, which takes half the time of an export: what comes behind
    it knows these alone.
    """
    subject = mixer_subject(name, chunk, length)
    assert fold_recurrences(subject, DimRequest()).subject is subject  # there is no loop to fold
    traced = widest_trace(subject)
    assert [(dim.minimum, dim.maximum) for dim in traced.dims] == [(1, None), (1, None)]
    assert traced.conditions == ()
    (batch, sequence), axes = traced.dims, [Length((("hidden_states", axis),)) for axis in (0, 1)]
    for sizes in itertools.product((1, 3), (1, 2, chunk - 1, chunk, chunk + 1, 3 * chunk + 1)):
        example = resized_together(axes, subject.inputs, sizes)
        named = dict(zip((batch.name, sequence.name), sizes, strict=True))
        with torch.no_grad():
            wanted = subject.call_named(example)
            found = run_program(traced, list(example.values()), sizes=named)
        for a, b in zip(wanted, found, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5, err_msg=str(sizes))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHUNKED)
def test_chunked_models_have_any_length_from_an_example_of_one_chunk(name: str) -> None:
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    module = hybrid_families.Last(hybrid_families.by_chunks(name, 64))
    subject = make_subject(module, (tokens,), {}, source=Path(__file__), how="a test")
    graph = export_subject(subject, Options(gates=False, simplify=False))[0]
    check(subject, graph, (1, 2, 63, 64, 65, 193))


class ParallelScan(nn.Module):
    """Mamba's scan by doubling distances, log2(l) passes over the whole sequence, as parallel codes write it."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        distance = 1
        while distance < a.shape[1]:
            before_a = torch.nn.functional.pad(a, (0, 0, distance, -distance), value=1.0)
            before_b = torch.nn.functional.pad(b, (0, 0, distance, -distance))
            a, b = a * before_a, a * before_b + b
            distance *= 2
        return b


@pytest.mark.slow
def test_a_parallel_scan_is_never_silently_wrong() -> None:
    """Its number of passes follows the length in steps: a trace holds for a few lengths, so the traced one is fixed."""
    a, b = torch.rand(2, 10, 4), torch.randn(2, 10, 4)
    subject = make_subject(ParallelScan(), (a, b), {}, source=Path(__file__), how="a test")
    graph = export_subject(subject, Options(gates=False, simplify=False))[0]
    assert [graph.traced.inputs[name][1] for name in ("a", "b")] == [10, 10]
    assert any("length 10 is fixed" in note for note in graph.notes), graph.notes
