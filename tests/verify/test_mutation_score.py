"""Mutation tests on the models of this repository: every mutant that is not equivalent is caught."""

from pathlib import Path

import pytest

from moe_export.cli import run
from moe_export.commands.mutate import Score
from moe_export.comparing.mutation_process import Request, try_apart

MODELS = Path(__file__).resolve().parents[2] / "models"


def score_of(stem, folder, **options):
    assert run([str(MODELS / f"{stem}.py"), "-o", str(folder), "--no-verify", "--quiet"]) == 0
    trial = try_apart(Request(str(folder / f"{stem}.onnx"), str(MODELS / f"{stem}.py"), **options))
    return Score(trial.results, trial.cases)


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["moe_gate", "sparse_moe", "gshard_moe", "attention", "mamba2"])
def test_every_mutant_is_caught_by_the_outputs(stem, tmp_path):
    score = score_of(stem, tmp_path)
    assert score.count("survived") == 0, "\n".join(score.lines())
    assert score.count("caught") >= 15
    assert score.count("equivalent") + score.count("below rounding") <= 0.1 * len(score.results)


@pytest.mark.slow
@pytest.mark.parametrize(("stem", "least"), [("hybrid", 300), ("mamba", 90)])
def test_every_mutant_is_caught_by_the_nodes(stem, least, tmp_path):
    """Where the outputs hardly show a fault, which float64 says, the nodes do.

    The inputs of hybrid are ids, so no case makes a norm's input small and its epsilon large. One number of mamba's
    x_proj, off by 1e-3, changes no output by more than 4e-7 of the largest.
    """
    score = score_of(stem, tmp_path, inside=True)
    assert score.count("survived") == 0, "\n".join(score.lines())
    assert score.count("caught") >= least
    assert score.count("equivalent") + score.count("below rounding") <= 0.1 * len(score.results)
