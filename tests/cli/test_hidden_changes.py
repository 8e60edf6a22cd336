"""No model that does something else at a size or value which its example does not show is wrong with "equal".

Each is exported: right at all sizes, or limited to a domain that the graph states. What is right is judged here by a
plain comparison of PyTorch and ONNX Runtime at the hidden sizes, without any code of `verify`.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hidden_changes import CONSTANTS, TEMPLATES, source_of

from moe_export.domain import Domain

EVERY = [(template, constant) for template in TEMPLATES for constant in CONSTANTS]
FEW = [pair for number, pair in enumerate(EVERY) if number % 20 == 0]


def stated(model: onnx.ModelProto) -> Domain:
    """The sizes that a graph says it is right for."""
    facts = {entry.key: entry.value for entry in model.metadata_props}
    texts = [facts["moe_export.domain"]] if facts.get("moe_export.domain") else []
    for key, bounds in facts.items():
        if key.startswith("moe_export.dim."):
            name, (low, _, high) = key.removeprefix("moe_export.dim."), bounds.partition(":")
            texts += [f"{name} >= {low}"] + ([f"{name} <= {high}"] if high else [])
    return Domain.of(*texts)


def sizes_near(constant: int) -> list[tuple[int, int]]:
    lengths = (1, constant - 1, constant, constant + 1, 2 * constant, 2 * constant + 1, 3 * constant + 1)
    return (
        [(2, n) for n in lengths] + [(n, 7) for n in lengths] + [(2, constant // 2), (2, constant // 2 + 1)]
    )


def wrong_at(file: Path, source: Path, constant: int) -> list[str]:
    """Where the graph is silently wrong, within what it says it is right for."""
    found = runpy.run_path(str(source))
    module, (example,) = found["model"], found["example_inputs"]
    model = onnx.load(file)
    domain, session = stated(model), onnxruntime.InferenceSession(str(file))
    (given,) = session.get_inputs()
    rng, wrong = np.random.default_rng(0), []
    for batch, sequence in sizes_near(constant):
        sizes = dict(zip(given.shape, (batch, sequence, *example.shape[2:]), strict=True))
        fixed = any(isinstance(name, int) and name != size for name, size in sizes.items())
        if fixed or not domain.holds({name: size for name, size in sizes.items() if isinstance(name, str)}):
            continue
        shape = (batch, sequence, *example.shape[2:])
        floats = example.is_floating_point()
        x = (
            rng.standard_normal(shape)
            if floats
            else rng.integers(0, 3 * constant if constant < 100 else 300, shape)
        )
        x = torch.from_numpy(x).to(example.dtype)
        want = module(x).numpy()
        try:
            (got,) = session.run(None, {given.name: x.numpy()})
        except Exception as error:
            wrong.append(f"{sizes}: {error}")
            continue
        if got.shape != want.shape or not np.allclose(got, want, 1e-3, 1e-4):
            wrong.append(f"{sizes}: differs")
    return wrong


def judged(command, tmp_path, template, constant):
    source = tmp_path / "net.py"
    source.write_text(source_of(template, constant))
    done = command(source, "-o", tmp_path / "out", "--quiet")
    assert done.code == 0, done.out + done.err
    assert wrong_at(tmp_path / "out" / "net.onnx", source, constant) == []


@pytest.mark.parametrize(("template", "constant"), FEW)
@pytest.mark.slow_but_one
def test_some_are_not_silently_wrong(command, tmp_path, template, constant):
    judged(command, tmp_path, template, constant)


@pytest.mark.slow
@pytest.mark.parametrize(("template", "constant"), [pair for pair in EVERY if pair not in FEW])
def test_none_of_the_others_is(command, tmp_path, template, constant):
    judged(command, tmp_path, template, constant)
