"""The gate does not cry wolf: a right graph passes with every kind of values, under many seeds.

Every model of the repository, as exported, in float32 and in half precision; three seeds in the fast run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_export.comparing.checking import verify_graph
from moe_export.export import Options, export_subject, load_subject
from moe_export.export.write import write_model
from moe_export.verify import Tolerance
from moe_export.wishes import Wish

MODELS = sorted(
    path for path in (Path(__file__).parents[2] / "models").glob("*.py") if path.stem != "__init__"
)


def refused(path: Path, folder: Path, seeds: int, options: Options, thorough: bool = True) -> list[str]:
    """The reports of graphs that do not pass, as text."""
    found = []
    for number, graph in enumerate(export_subject(load_subject(str(path)), options)):
        file = folder / f"{number}.onnx"
        write_model(graph.model, file)
        report, _ = verify_graph(graph, file, tolerance=Tolerance(), wish=Wish(thorough, seeds))
        assert len(report.compared) > 10
        if report.exit_code:
            found.append(f"{path.stem} {graph.kind}\n{report}")
    return found


@pytest.mark.parametrize("path", MODELS[-2:], ids=lambda path: path.stem)
def test_few_seeds(path, tmp_path):
    assert refused(path, tmp_path, 3, Options()) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_hundred_seeds(path, tmp_path):
    assert refused(path, tmp_path, 100, Options()) == []


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_other_opsets(path, tmp_path, opset):
    assert refused(path, tmp_path, 100, Options(opset=opset)) == []


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["dense", "slices", "blocks", "gather", "loop"])
def test_every_lowering_of_experts(tmp_path, experts):
    path = next(path for path in MODELS if path.stem == "sparse_moe")
    assert refused(path, tmp_path, 100, Options(experts=experts)) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_half_precision_as_it_is_verified_by_default(path, tmp_path, dtype):
    assert refused(path, tmp_path, 100, Options(dtype=dtype), thorough=False) == []
