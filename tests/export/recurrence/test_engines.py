"""Mamba's loop builds as a TensorRT engine, for a length from 1 to 4,096."""

from __future__ import annotations

from pathlib import Path

import pytest
from slow_cases import slow

from moe_export.export.engines.build import build_engines
from moe_export.export.frontend.load import load_subject
from moe_export.export.pipeline import Options, export_subject

MODEL = Path(__file__).parents[3] / "models" / "mamba.py"


@pytest.mark.parametrize("unroll", [1, slow(4)])
def test_a_loop_builds_for_any_length(unroll):
    model = export_subject(load_subject(str(MODEL)), Options(gates=False, unroll=unroll))[0].model
    assert sum(node.op_type == "Scan" for node in model.graph) >= 1
    (engine,) = build_engines(model, ["sm89"], {"batch": (1, 1, 1), "sequence": (1, 512, 4096)})
    assert 0 < engine.size < 16 * 2**20
