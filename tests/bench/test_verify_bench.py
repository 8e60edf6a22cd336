"""A full verification of a block takes seconds: every kind of values, every size, a float64 run where sides differ."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from moe_export.comparing.checking import verify_graph
from moe_export.comparison_settings import ComparisonSettings
from moe_export.export import Options, export_subject, load_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.verify import Tolerance

MODELS = Path(__file__).parents[2] / "models"


@pytest.mark.parametrize("name", ["sparse_moe", "gshard_moe", "mamba", "mamba2", "hybrid", "attention"])
def test_a_full_verification_takes_under_twenty_seconds(name, tmp_path, capsys):
    (graph, *_) = export_subject(load_subject(str(MODELS / f"{name}.py")), Options())
    write_model(graph.model, tmp_path / "model.onnx")
    seconds, counts = {}, {}
    for word, settings in (("usual", ComparisonSettings()), ("thorough", ComparisonSettings(thorough=True))):
        start = time.perf_counter()
        report, _ = verify_graph(graph, tmp_path / "model.onnx", tolerance=Tolerance(), settings=settings)
        seconds[word], counts[word] = time.perf_counter() - start, len(report.cases)
        assert report.exit_code == 0, str(report)
    with capsys.disabled():
        print(
            f"\n{name}: usual {counts['usual']} cases {seconds['usual']:.2f} s, "
            f"thorough {counts['thorough']} cases {seconds['thorough']:.2f} s"
        )
    assert seconds["thorough"] < 20
