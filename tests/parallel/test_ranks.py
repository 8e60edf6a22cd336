"""The graphs of all ranks, side by side in one process, give what the whole model gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from parallel_stack import EXPERTS, INNER, LAYERS, ROUTINGS, STACK, WIDTH, export, routed

from moe_export.cli import run
from moe_export.verify import OnnxRuntimeRunner
from moe_export.verify.parallel.in_graph import open_rank
from moe_export.verify.parallel.manifest import read_manifest
from moe_export.verify.parallel.rank import Together
from moe_export.verify.parallel.slices import Joined, Sliced, Slices

SIZES = [(4, 5), (3, 5), (1, 1), (7, 3)]


def both(path):
    """All ranks, and the whole model, run on each rank's part where tokens are a rank's own."""
    manifest = read_manifest(path)
    together = Together([open_rank(manifest, rank) for rank in range(manifest.ranks)])
    whole = OnnxRuntimeRunner(manifest.whole)
    if manifest.exchange == "all_reduce":
        return together, whole
    slices = Slices(manifest.ranks, manifest.inputs, manifest.outputs)
    return Joined(together.name, together.run_each, slices), Sliced(whole, slices)


def assert_same(path, routings=ROUTINGS, sizes=SIZES):
    ranks, whole = both(path)
    for kind in routings:
        for batch, length in sizes:
            inputs = {"x": routed(kind, batch, length)}
            found, wanted = ranks.run(inputs), whole.run(inputs)
            for name, array in wanted.items():
                np.testing.assert_allclose(found[name], array, 1e-5, 1e-6, err_msg=f"{kind} {batch}x{length}")


@pytest.mark.parametrize(
    "options", [("2",), pytest.param(("4", "--exchange", "all_to_all"), marks=pytest.mark.slow)], ids=" ".join
)
def test_every_routing_and_sizes_that_do_not_divide(exports, options):
    assert_same(exports.of("--expert-parallel", *options))


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["all_reduce", "all_to_all"])
@pytest.mark.parametrize(
    "form", ["slices", "loop", "blocks", "dense", "gather", "dense capacity", "loop capacity"]
)
def test_every_form(tmp_path, form, exchange):
    name, _, capacity = form.partition(" ")
    if exchange == "all_to_all" and name in ("blocks", "gather"):
        pytest.skip("these do not compute rows that other ranks sent; the next test says what they say")
    if capacity and exchange == "all_reduce":
        pytest.skip("an all_reduce sends no rows")
    options = ["--exchange-rows", 100] if capacity else []
    path = export(tmp_path, "--expert-parallel", 3, "--experts", name, "--exchange", exchange, *options)
    assert_same(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--experts", "blocks", "--exchange", "all_to_all"], "does not compute rows that other ranks sent"),
        (["--experts", "keep"], "cannot be spread over ranks"),
        (["--experts", "contrib"], "com.microsoft.MoE"),
    ],
)
def test_forms_that_cannot_say_why(tmp_path, capsys, options, says):
    source = tmp_path / "stack.py"
    source.write_text(STACK)
    code = run(
        [str(source), "-o", str(tmp_path / "out"), "--no-verify", "-q", "--expert-parallel", "2", *options]
    )
    assert code == 3
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_more_ranks_than_experts_and_a_placement_with_an_idle_rank(tmp_path):
    placement = tmp_path / "placement.json"
    placement.write_text(json.dumps({"0": [3, 3, 3, 1, 1, 1], "layers.1": [0, 1, 0, 1, 0, 1]}))
    for exchange in ("all_reduce", "all_to_all"):
        folder = tmp_path / exchange
        folder.mkdir()
        path = export(folder, "--expert-parallel", 4, "--placement", placement, "--exchange", exchange)
        manifest = read_manifest(path)
        assert [graph.experts for graph in manifest.graphs] == [
            ((), (0, 2, 4)), ((3, 4, 5), (1, 3, 5)), ((), ()), ((0, 1, 2), ()),
        ]  # fmt: skip
        assert_same(path)
    options = ["--exchange", "all_to_all"]  # ranks without experts have tokens of their own
    assert_same(export(tmp_path, "--expert-parallel", EXPERTS + 2, *options), ["balanced"])


def test_more_ranks_than_experts_are_refused(tmp_path, capsys):
    source = tmp_path / "stack.py"
    source.write_text(STACK)
    assert run([str(source), "-o", str(tmp_path / "out"), "-q", "--expert-parallel", "99"]) == 2
    told = capsys.readouterr().err
    assert f"no layer has more than {EXPERTS} experts, so that {99 - EXPERTS} ranks would have none" in told
    assert "stack.py:" in told
    assert f"--expert-parallel {EXPERTS} or fewer" in told
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_half_precision_is_refused_with_its_reason_before_anything_is_loaded(tmp_path, capsys):
    assert run([str(tmp_path / "none.py"), "--expert-parallel", "2", "--dtype", "bfloat16"]) == 2
    told = capsys.readouterr().err
    assert "nearly equal may go to another expert on ranks" in told
    assert "leave --dtype bfloat16 away" in told


@pytest.mark.slow
def test_pairs_beyond_a_capacity_add_nothing(exports):
    """Every token to experts 0 and 1, on rank 0: of each rank's pairs the first C are computed."""
    capacity = 3
    path = exports.of("--expert-parallel", 2, "--exchange", "all_to_all", "--exchange-rows", capacity)
    manifest = read_manifest(path)
    together = Together([open_rank(manifest, rank) for rank in range(2)])
    inputs = {"x": routed("expert 0", 1, 4)}
    found = together.run_each([inputs, inputs])
    for (
        outputs
    ) in found:  # of 8 pairs, sorted by expert, 3 of expert 0 have a place; the fourth token has none
        whole = OnnxRuntimeRunner(manifest.whole).run(inputs)["output"]
        assert not np.allclose(outputs["output"], whole, atol=1e-4)
        assert np.isfinite(outputs["output"]).all()
    np.testing.assert_array_equal(found[0]["output"], found[1]["output"])
    rows = [sent.rows for sent in together.ranks[0].sent]
    assert rows == [(capacity, capacity)] * (2 * LAYERS)
    none = [sent for sent in together.ranks[0].sent if sent.back and sent.layer == 0]
    assert none[0].row_bytes == 4 * WIDTH


def test_a_rank_computes_only_the_pairs_of_its_experts(exports):
    """No row of another rank's experts is computed: the profile of a rank's graph shows as many as it has."""
    manifest = read_manifest(exports.of("--expert-parallel", 2))
    graph = onnx.load(manifest.graphs[1].stages[0])
    split = next(node for node in graph.graph.node if node.op_type == "Split")
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(split.input[0]))
    runner = OnnxRuntimeRunner(graph.SerializeToString())
    for kind, rows in (("expert 0", 0), ("expert 3", 40), ("balanced", 20)):
        found = runner.run({"x": routed(kind, 4, 5)})[split.input[0]]
        assert abs(len(found) - rows) <= (2 if kind == "balanced" else 0)


def test_a_rank_holds_its_experts_and_what_all_hold(exports):
    manifest = read_manifest(exports.of("--expert-parallel", 2))
    one = 4 * 2 * WIDTH * INNER
    for graph in manifest.graphs:
        assert 3 * LAYERS * one <= graph.expert_bytes <= 3 * LAYERS * one + 4000
        assert sum(path.stat().st_size for path in graph.stages) >= graph.bytes
    document = json.loads(manifest.path.read_text())
    sizes = [sum(tensor["bytes"] for tensor in graph["tensors"]) for graph in document["graphs"]]
    assert sizes == [graph["bytes"] for graph in document["graphs"]]


def test_every_field_of_the_manifest_is_documented(exports):
    """docs/parallel.md names each field that an export writes."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "parallel.md").read_text()
    document = json.loads(exports.of("--expert-parallel", "2").read_text())
    assert [name for name in fields(document) if f"`{name}`" not in text] == []


def fields(value):
    """Every name of a nested document, once."""
    if isinstance(value, dict):
        found = list(value)
        for part in value.values():
            found += fields(part)
        return list(dict.fromkeys(found))
    if isinstance(value, list):
        return list(dict.fromkeys(name for part in value for name in fields(part)))
    return []


@pytest.mark.slow
def test_the_report_of_an_export_tells_of_the_ranks(tmp_path, capsys):
    export(tmp_path, "--expert-parallel", 2, "--collectives", "graph")
    report = json.loads((tmp_path / "stack.report.json").read_text())
    assert report["parallel"]["ranks"] == 2
    assert report["parallel"]["verification"]["verdict"] == "equal"
    graph = onnx.load(tmp_path / "stack.rank0.stage0.onnx")
    made = [node for node in graph.graph.node if node.domain == "com.microsoft"]
    assert [node.op_type for node in made] == ["AllReduce"] * LAYERS


@pytest.mark.slow
@pytest.mark.parametrize(
    "exchange", [["all_reduce"], ["all_to_all", "--exchange-rows", 200]], ids=lambda item: item[0]
)
def test_tensorrt_reads_its_collectives(tmp_path, exchange):
    tensorrt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    path = export(
        tmp_path, "--expert-parallel", 2, "--collectives", "graph", "--target", "tensorrt", "--experts", "dense",
        "--exchange", *exchange,
    )  # fmt: skip
    for graph in read_manifest(path).graphs:
        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        network = tensorrt.Builder(logger).create_network(0)
        parser = tensorrt.OnnxParser(network, logger)
        assert parser.parse(graph.stages[0].read_bytes()), parser.get_error(0).desc()
        kinds = [str(network.get_layer(number).type) for number in range(network.num_layers)]
        values = {"all_reduce": 1, "all_to_all": 3}[exchange[0]]
        assert kinds.count("LayerType.DIST_COLLECTIVE") == values * LAYERS
    assert_same(path)
