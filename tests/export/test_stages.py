"""The way of a model is a tuple: it fits together, no stage changes what it was given, and a false claim is caught."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from slow_cases import slow
from torch import nn

from moe_export.export.frontend.load import load_subject
from moe_export.export.frontend.subject import make_subject
from moe_export.export.options import Options
from moe_export.export.stages import PIPELINE, Draft, Model, Program, between, run, with_stage, without
from moe_export.export.tracing.dims import DimRequest
from moe_export.options.option import STAGES

ROOT = Path(__file__).resolve().parents[2]


class Mixed(nn.Module):
    """An einsum, a loop over a length, and what onnxsim can shorten."""

    def forward(self, x):
        x = torch.einsum("bld,bld->bld", x, x)
        state, found = torch.zeros_like(x[:, 0]), []
        for step in range(x.shape[1]):
            state = state * 0.5 + x[:, step]
            found.append(state)
        return torch.stack(found, 1).unsqueeze(0).squeeze(0)


def mixed():
    return make_subject(Mixed(), (torch.randn(2, 5, 4),), {}, source=Path(__file__), how="a test")


def text_of(value):
    """All that a stage could have changed of what it was given."""
    if isinstance(value, Model):
        return repr((value.subject.inputs.keys(), value.dims, value.recurrent.notes, value.notes))
    if isinstance(value, Program):
        program = value.traced.program
        nodes = [
            (node.name, node.op, str(node.target), str(node.args), str(node.kwargs))
            for node in program.graph.nodes
        ]
        return repr(
            (nodes, program.graph_signature, value.traced.inputs, value.traced.conditions, value.notes)
        )
    return repr((ir.to_proto(value.model).SerializeToString(deterministic=True), value.notes))


@pytest.mark.parametrize("name", ["loop and einsum", "experts"])
@pytest.mark.parametrize("dtype", [slow("float32"), "float16"])
def test_no_stage_changes_what_it_was_given(name, dtype):
    subject = mixed() if name == "loop and einsum" else load_subject(str(ROOT / "models" / "sparse_moe.py"))
    options = Options(dtype=dtype)
    value = Model.of(subject, DimRequest())
    for stage in PIPELINE:
        before = text_of(value)
        made = run((stage,), value, options)
        assert text_of(value) == before, f"{stage.name} changed what it was given"
        assert isinstance(made, stage.gives)
        value = made
    assert list(value.model.graph.all_nodes())


def test_a_program_may_be_translated_twice():
    program = run(between("fold", "einsums"), Model.of(mixed(), DimRequest()), Options())
    first, second = (run(between("translate", "precision"), program, Options()) for _ in range(2))
    assert text_of(first) == text_of(second)


def test_the_stages_fit_together_and_have_names_of_their_own():
    assert len({stage.name for stage in PIPELINE}) == len(PIPELINE)
    assert (PIPELINE[0].requires, PIPELINE[-1].gives) == (Model, Draft)
    for stage in PIPELINE:
        if stage.requires is stage.gives:
            assert stage not in without(stage.name)
        elif stage not in (PIPELINE[0], PIPELINE[-1]):
            with pytest.raises(ValueError, match="takes none"):
                without(stage.name)
    for wrong in (
        lambda: without("fuse"),
        lambda: between("fuse", "name"),
        lambda: with_stage(PIPELINE, "fuse"),
    ):
        with pytest.raises(ValueError, match="no stage is called fuse"):
            wrong()


@pytest.mark.parametrize("name", ["einsums", "expand"])
def test_a_stage_that_does_nothing_is_caught_by_its_claim(name):
    stages = with_stage(PIPELINE, name, run=lambda value, options: value)
    with pytest.raises(AssertionError, match="are left"):
        run(stages, Model.of(mixed(), DimRequest()), Options())


def test_a_stage_that_loses_a_block_of_experts_is_caught():
    program = run(
        between("fold", "einsums"),
        Model.of(load_subject(str(ROOT / "models" / "sparse_moe.py")), DimRequest()),
        Options(),
    )
    with pytest.raises(AssertionError, match="blocks of experts"):
        run(between("translate", "translate"), replace(program, blocks=()), Options())


def test_left_out_stages_leave_the_model_as_it_was_written():
    draft = run(
        without("fold", "outline", "einsums", "expand", "simplify", "order", "precision"),
        Model.of(mixed(), DimRequest()),
        Options(),
    )
    operators = [node.op_type for node in draft.model.graph.all_nodes()]
    assert "Einsum" in operators
    assert "Scan" not in operators


def test_the_page_shows_the_stages_as_they_are():
    """docs/architecture.md lists every stage, in order, with what it takes and gives."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` → `(\w+)` \|", page, re.MULTILINE)
    assert rows == [(stage.name, stage.requires.__name__, stage.gives.__name__) for stage in PIPELINE]


def test_the_command_line_knows_the_names():
    assert tuple(stage.name for stage in PIPELINE) == STAGES
