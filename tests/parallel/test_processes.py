"""Ranks as real processes that exchange through gloo: their outputs, what they sent, and what happens when one dies."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
from parallel_stack import EXPERTS, LAYERS, ROUTINGS, WIDTH, routed
from safetensors.numpy import save_file

from moe_export.export.parallel.picture import flow
from moe_export.verify.parallel.manifest import read_manifest

WAYS = [("4", "--exchange", "all_to_all")]
SLOW_WAYS = [
    ("2",),
    ("4",),
    ("2", "--exchange", "all_to_all"),
    ("3",),
    ("3", "--exchange", "all_to_all", "--exchange-rows", "90"),
]


def own_inputs(folder):
    """Balanced, skewed and one-expert routings, at sizes that no number of ranks divides; one is a single token."""
    files = []
    for kind in ROUTINGS:
        for batch, length in ((4, 5), (3, 7), (1, 1)):
            path = folder / f"{kind.replace(' ', '_')}_{batch}x{length}.safetensors"
            save_file({"x": routed(kind, batch, length)}, path)
            files += ["--input-file", path]
    return files


def check(torchrun, path, folder):
    report, traffic = folder / "report.json", folder / "traffic.json"
    ranks = read_manifest(path).ranks
    done = torchrun(ranks, path, *own_inputs(folder), "--output", report, "--traffic", traffic)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["verdict"] == "equal"
    labels = [case["label"] for case in found["cases"] if case["outcome"] == "compared"]
    assert {"balanced_4x5.safetensors", "skewed_3x7.safetensors", "expert_5_1x1.safetensors"} <= set(labels)
    assert "token 7 throughout" in labels
    return json.loads(traffic.read_text())["runs"]


def assert_stated(path, traffic):
    """What the ranks gave is what the manifest says of each row, and the picture of the batch."""
    manifest = read_manifest(path)
    run = traffic[1]  # the first file of `own_inputs`: balanced, 4 rows of 5 tokens
    tokens = routed("balanced", 4, 5).reshape(-1, WIDTH)
    indices = np.argsort(-tokens[:, :EXPERTS], axis=1)[:, :2]
    for sent in run:
        exchange = next(
            one for one in manifest.exchanges if (one.layer, one.back) == (sent["layer"], sent["back"])
        )
        assert sent["row_bytes"] == sum(exchange.row_bytes)
    for number, layer in enumerate(manifest.layers):
        sizes = [sum(one.row_bytes) for one in manifest.exchanges if one.layer == number]
        about = (layer.module, manifest.exchange, layer.placement, manifest.ranks)
        stated = flow(about, indices, 4, (sizes[0], sizes[1] if len(sizes) > 1 else 0))
        mine = [sent for sent in run if sent["layer"] == number]
        assert sum(sent["bytes"] for sent in mine) == stated.bytes
        if manifest.exchange == "all_to_all":
            measured = [sent["rows"] for sent in mine if not sent["back"]]
            assert measured == stated.between.tolist()


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_processes_give_what_the_whole_model_gives(exports, torchrun, tmp_path, way):
    path = exports.of("--expert-parallel", *way)
    assert_stated(path, check(torchrun, path, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("way", SLOW_WAYS, ids=" ".join)
def test_more_ways(exports, torchrun, tmp_path, way):
    path = exports.of("--expert-parallel", *way)
    traffic = check(torchrun, path, tmp_path)
    if "--exchange-rows" not in way:
        assert_stated(path, traffic)
    else:
        assert {tuple(sent["rows"]) for sent in traffic[0]} == {(90, 90, 90)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "exchange", [["all_reduce"], ["all_to_all", "--exchange-rows", "200"]], ids=lambda item: item[0]
)
def test_collectives_in_the_graph_exchange_the_same(exports, torchrun, tmp_path, exchange):
    path = exports.of("--expert-parallel", 2, "--collectives", "graph", "--exchange", *exchange)
    traffic = check(torchrun, path, tmp_path)
    assert len(traffic[0]) == 2 * LAYERS * (1 if exchange[0] == "all_reduce" else 3)


def test_a_rank_that_is_killed_is_named_by_the_others_within_ten_seconds(exports, start):
    path = exports.of("--expert-parallel", "4", "--exchange", "all_to_all")
    ranks = start(4, path, "--repeat", 10**6)
    ranks.wait_for("all are here")
    ranks.hit(2, signal.SIGKILL)
    for number, ended in enumerate(ranks.ended(but=2)):
        assert ended.code == 1, ended.text
        assert ended.seconds < 10
        assert "rank 2 is gone" in ended.text, (number, ended.text)
        assert "Traceback" not in ended.text


@pytest.mark.slow
@pytest.mark.parametrize("way", [("2",), ("4",), ("4", "--exchange", "all_to_all")], ids=" ".join)
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "SIGTERM"])
@pytest.mark.parametrize("victim", [0, 1])
def test_whoever_dies_however(exports, start, way, how, victim):
    path = exports.of("--expert-parallel", *way)
    ranks = start(int(way[0]), path, "--repeat", 10**6, "--timeout", 6)
    ranks.wait_for("all are here")
    ranks.hit(victim, signal.Signals[how])
    for ended in ranks.ended(but=victim):
        assert ended.code == 1, ended.text
        assert ended.seconds < 10, ended.text
        assert f"rank {victim} is {'stopped' if how == 'SIGSTOP' else 'gone'}" in ended.text


@pytest.mark.slow
def test_under_torchrun_a_dead_rank_ends_all(exports, tmp_path):
    """`torchrun` ends the others itself; whoever is faster, nothing hangs, and somebody says who is gone."""
    import os
    import subprocess
    import sys
    import time

    path = exports.of("--expert-parallel", "2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "moe_export.verify.parallel", str(path), "--repeat", "1000000"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            if "all are here" in line:
                break
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        begun = time.monotonic()
        os.kill(int(children[-1]), signal.SIGKILL)
        text, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - begun < 20
    assert "SIGKILL" in text or "is gone" in text


def test_the_number_of_processes_is_that_of_the_graphs(exports, start):
    path = exports.of("--expert-parallel", "2")
    (ended,) = start(1, path).ended()
    assert ended.code == 2
    assert "1 processes were started, and the graphs are for 2 ranks" in ended.text
    assert "torchrun --nproc-per-node 2" in ended.text


@pytest.mark.slow
def test_a_rank_that_never_comes(exports, start):
    path = exports.of("--expert-parallel", "2")
    ranks = start(2, path, "--join", 4)
    ranks.hit(1, signal.SIGKILL)
    (ended,) = ranks.ended(but=1)
    assert ended.code == 1
    assert "not all of the 2 ranks came within 4 s" in ended.text


def test_a_wrong_graph_is_not_equal(exports, start, tmp_path):
    """A rank with another rank's weights: the gate must be able to fail."""
    import shutil

    path = exports.of("--expert-parallel", "2")
    folder = tmp_path / "wrong"
    shutil.copytree(path.parent, folder)
    shutil.copy(folder / "stack.rank0.stage0.onnx", folder / "stack.rank1.stage0.onnx")
    ended = start(2, folder).ended()
    assert [one.code for one in ended] == [1, 1]
    assert "NOT EQUAL" in ended[0].text.upper()
