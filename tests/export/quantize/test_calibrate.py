"""Weights rounded by what their products really get: each expert's own tokens, from running the float graph."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from moe_export import cli
from moe_export.errors import UsageError
from moe_export.export import Options
from moe_export.export.quantize import calibrate as calibrating
from moe_export.export.quantize.quantize import quantize
from moe_export.export.quantize.scheme import Scheme
from moe_export.export.stages import Draft, between, run
from moe_export.verify import OnnxRuntimeRunner

INT4 = Scheme.of("int4", 16)


def saved(folder, rows, name="hidden_states"):
    path = folder / f"rows{len(list(folder.iterdir()))}.npz"
    np.savez(path, **{name: rows.astype(np.float32)})
    return path


@pytest.fixture
def rows(tmp_path):
    """Two files of inputs that are correlated, and others of their kind."""
    draw = np.random.default_rng(5)
    mixed = draw.standard_normal((24, 24)) / np.sqrt(1 + 3 * np.arange(24))[:, None]
    seen, unseen = (draw.standard_normal((4, 200, 24)) @ mixed for _ in range(2))
    return [saved(tmp_path, seen[:1]), saved(tmp_path, seen[1:])], seen, unseen.astype(np.float32)


def output(model, rows):
    return OnnxRuntimeRunner(ir.to_proto(model.clone()).SerializeToString()).run({"hidden_states": rows})[
        "output"
    ]


def test_the_model_moves_less_on_inputs_that_were_not_seen(float_graph, rows):
    model = float_graph("slices")
    files, _, unseen = rows
    exact = output(model, unseen)
    error = {
        files: np.linalg.norm(output(quantize(model, INT4, "all", files=files).model, unseen) - exact)
        for files in ((), tuple(files))
    }
    assert error[tuple(files)] < 0.8 * error[()]


def test_an_experts_weights_get_the_tokens_that_the_router_sends_to_it(float_graph, program, rows):
    files, seen, _ = rows
    found = quantize(float_graph("slices"), INT4, "all", files=files)
    gate = program.model.subject.module.gate.weight.detach()
    chosen = (torch.from_numpy(seen.reshape(-1, 24)).float() @ gate.T).topk(2).indices
    counts = torch.bincount(chosen.flatten(), minlength=4).tolist()
    tokens = found.calibration.tokens
    for expert, count in enumerate(counts):
        own = {tokens[name] for name in tokens if name.startswith(f"experts.{expert}.")}
        assert own == {count}
    assert {tokens[name] for name in tokens if name.startswith("shared_experts.")} == {800}
    assert not found.calibration.blind
    assert (
        f"15 weights rounded by what {min(counts)} to 800 tokens make of them (--calibrate)" in found.notes()
    )


@pytest.mark.parametrize(
    "scheme", [INT4, Scheme.of("int8", None, zero_points=True), Scheme.of("float8e4m3", None)]
)
def test_a_calibrated_graph_is_what_its_weights_say(float_graph, results, rows, scheme):
    found = quantize(float_graph("slices"), scheme, "all", files=rows[0])
    np.testing.assert_allclose(
        results(found.model)["output"], results(found.exact)["output"], rtol=1e-5, atol=1e-6
    )
    nearest = quantize(float_graph("slices"), scheme, "all")
    assert not np.allclose(
        results(nearest.model)["output"], results(found.model)["output"], rtol=1e-5, atol=1e-6
    )


def test_experts_that_no_token_reached_are_named_and_rounded_to_the_nearest(float_graph, tmp_path):
    model = float_graph("slices")
    found = quantize(model, INT4, "experts", files=[saved(tmp_path, np.ones((1, 1, 24)))])
    unreached = [name for name, count in found.calibration.tokens.items() if not count]
    assert len(unreached) == 6  # two experts of four, of three weights each
    note = next(note for note in found.notes() if "no token" in note)
    assert note.startswith(f"no token of --calibrate reached, and rounded to the nearest: {unreached[0]}, ")
    assert note.endswith(" and 2 more")
    nearest = {weight.name: weight.grid for weight in quantize(model, INT4, "experts").weights}
    for weight in found.weights:
        assert weight.grid.calibrated == (weight.name not in unreached)
        if weight.name in unreached:
            assert (weight.grid.rounded(0).codes == nearest[weight.name].rounded(0).codes).all()


def experts_of(found):
    """Codes (E, K, N) by the experts' weights, whether they are stacked or not; the summed axis first."""
    rows = {}
    for weight in found.weights:
        grid = weight.grid
        for index in range(grid.count):
            codes = grid.rounded(index).codes
            rows[grid.columns(index).tobytes()] = codes if grid.inner_axis == 0 else codes.T
    return rows


@pytest.mark.parametrize("lowering", ["loop", "gather", "blocks", "dense"])
@pytest.mark.parametrize("scheme", [INT4, Scheme.of("int8", None)], ids=["int4", "int8"])
def test_experts_of_a_stack_get_the_tokens_of_each(float_graph, results, rows, lowering, scheme):
    """As if they were apart: the same codes, to the last one."""
    apart = quantize(float_graph("slices"), scheme, "experts", files=rows[0])
    found = quantize(
        float_graph(lowering), scheme, "experts", files=rows[0], apart=lambda: float_graph("slices")
    )
    assert len(found.weights) == 3
    assert not found.calibration.blind
    assert sorted(found.calibration.tokens.values()) == sorted(apart.calibration.tokens.values())
    assert all(name.endswith("]") for name in found.calibration.tokens)
    wanted, codes = experts_of(apart), experts_of(found)
    assert wanted.keys() == codes.keys()
    assert all((wanted[key] == codes[key]).all() for key in wanted)
    np.testing.assert_allclose(
        results(found.model)["output"], results(found.exact)["output"], rtol=1e-5, atol=1e-5
    )


def test_an_expert_of_a_stack_that_no_token_reached_is_named(float_graph, tmp_path):
    files = [saved(tmp_path, np.ones((1, 1, 24)))]
    found = quantize(float_graph("loop"), INT4, "experts", files=files, apart=lambda: float_graph("slices"))
    note = next(note for note in found.notes() if "no token" in note)
    unreached = [name for name, count in found.calibration.tokens.items() if not count]
    assert len(unreached) == 6
    assert unreached[0] in note
    nearest = quantize(float_graph("loop"), INT4, "experts")
    for weight, other in zip(found.weights, nearest.weights, strict=True):
        for index in range(4):
            same = (weight.grid.rounded(index).codes == other.grid.rounded(index).codes).all()
            assert same or f"{weight.name}[{index}]" not in unreached


def test_experts_that_are_alike_are_told_apart_by_their_order(float_graph, rows):
    """Two experts of the same weights get different tokens, so they are rounded differently."""

    def alike(model):
        model = model.clone()
        for name, value in model.graph.initializers.items():
            if name.startswith("experts.3.") or (value.const_value.shape.rank() == 3 and "experts" in name):
                other = name.replace("experts.3.", "experts.1.")
                array = value.const_value.numpy().copy()
                if other != name:
                    array = model.graph.initializers[other].const_value.numpy()
                else:
                    array[3] = array[1]
                value.const_value = ir.tensor(array)
        return model

    apart = quantize(alike(float_graph("slices")), INT4, "experts", files=rows[0])
    found = quantize(
        alike(float_graph("loop")), INT4, "experts", files=rows[0],
        apart=lambda: alike(float_graph("slices")),
    )  # fmt: skip
    counts = list(found.calibration.tokens.values())
    assert sorted(counts) == sorted(apart.calibration.tokens.values())
    assert len(set(counts[:4])) == 4


def test_a_stack_whose_experts_stand_nowhere_apart_is_not_watched(float_graph, rows):
    for apart in (None, lambda: float_graph("loop")):
        found = quantize(float_graph("loop"), INT4, "all", files=rows[0], apart=apart)
        assert len(found.calibration.blind) == 3
        assert len(found.calibration.tokens) == 3  # the shared expert's
        assert any("not calibrated, because no graph has their products" in note for note in found.notes())


def test_few_moments_at_a_time_are_as_good(float_graph, rows, monkeypatch):
    whole = quantize(float_graph("slices"), INT4, "all", files=rows[0])
    monkeypatch.setattr(calibrating, "_ROOM", 3 * 8 * 37**2)
    parts = quantize(float_graph("slices"), INT4, "all", files=rows[0])
    assert whole.calibration == parts.calibration
    for one, other in zip(whole.weights, parts.weights, strict=True):
        assert (one.grid.rounded(0).codes == other.grid.rounded(0).codes).all()


def test_half_precision(program, rows):
    options = Options(opset=21, experts="slices", simplify=False, dtype="float16")
    model = run(between("einsums", "precision"), program, options).model
    found = quantize(model, INT4, "experts", files=rows[0])
    assert len(found.calibration.tokens) == 12
    assert all(weight.grid.source.dtype is ir.DataType.FLOAT16 for weight in found.weights)


@pytest.mark.parametrize(
    ("rows", "name", "says"),
    [
        (np.zeros((1, 3, 24)), "x", "lacks the input 'hidden_states'"),
        (np.zeros((1, 3, 23)), "hidden_states", "--calibrate .*rows0.npz: the graph does not run on it"),
    ],
)
def test_files_that_are_none_of_inputs(float_graph, tmp_path, rows, name, says):
    with pytest.raises(UsageError, match=says):
        quantize(float_graph("slices"), INT4, "experts", files=[saved(tmp_path, rows, name)])
    with pytest.raises(UsageError, match="no such file"):
        quantize(float_graph("slices"), INT4, "experts", files=[tmp_path / "rows.npz"])
    (tmp_path / "rows.npz").write_text("rows")
    with pytest.raises(UsageError, match=r"cannot read .*rows\.npz as npz"):
        quantize(float_graph("slices"), INT4, "experts", files=[tmp_path / "rows.npz"])


def test_safetensors(float_graph, rows, tmp_path):
    save_file({"hidden_states": torch.from_numpy(rows[1]).float()}, tmp_path / "rows.safetensors")
    one, other = (
        quantize(float_graph("slices"), INT4, "experts", files=files).calibration
        for files in (rows[0], [tmp_path / "rows.safetensors"])
    )
    assert one == other


def test_a_graph_that_is_never_run_as_a_whole_is_not_calibrated(float_graph, program):
    subject = replace(program.model.subject, weights=SimpleNamespace(absent=True))
    draft = Draft(replace(program, model=replace(program.model, subject=subject)), float_graph("slices"))
    options = Options(opset=21, weights_dtype="int4", calibrate=("rows.npz",))
    with pytest.raises(UsageError, match="its weights are larger than --memory"):
        run(between("quantize", "quantize"), draft, options)


def test_graphs_of_ranks_are_not_calibrated(capsys):
    options = ["--weights-dtype", "int4", "--calibrate", "rows.npz", "--expert-parallel", "2"]
    assert cli.run(["model.py", *options]) == 2
    assert "leave --calibrate or --expert-parallel away" in capsys.readouterr().err
