"""The plan: by calculation, without weights, and the same figures as the graphs of ranks have when they run."""

from __future__ import annotations

import json

import pytest
from parallel_stack import EXPERTS, INNER, LAYERS, STACK, WIDTH, routed

from moe_export.cli import run
from moe_export.errors import UsageError
from moe_export.export.quantize.scheme import Scheme
from moe_export.large.planning import human, numbers, plan, weights_of
from moe_export.large.planning_count import count
from moe_export.large.planning_model import load_weightless, trace_weightless
from moe_export.options.memory import parse_bytes
from moe_export.verify.parallel.in_graph import open_rank
from moe_export.verify.parallel.manifest import read_manifest
from moe_export.verify.parallel.rank import Together

ONE = 4 * 2 * WIDTH * INNER
SMALL = 6000  # bytes of constants that a rank's graphs hold beside the weights: shapes, numbers of experts


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    source = tmp_path_factory.mktemp("plan") / "stack.py"
    source.write_text(STACK)
    model = load_weightless(str(source))
    assert not model.made
    assert all(value.is_meta for value in model.module.parameters())
    return trace_weightless(model)


@pytest.fixture(scope="module")
def counted(traced):
    return count(traced)


def test_what_is_counted(counted):
    assert counted.bytes == LAYERS * (EXPERTS * ONE + 4 * (WIDTH * WIDTH + WIDTH))
    assert [block.bytes_each for block in counted.blocks] == [(ONE,) * EXPERTS] * LAYERS
    for block in counted.blocks:
        assert (block.experts, block.slots, block.partial) == (EXPERTS, 2, 4 * WIDTH)
        assert (block.there, block.back) == (4 * WIDTH + 8, 4 * WIDTH)
        products = 2 * 2 * WIDTH * INNER
        assert products <= block.flops <= products + 4 * (INNER + 2 * WIDTH)
        assert block.tokens(counted.dims) == 20


def test_packed_experts_are_counted_packed(traced, counted):
    found = count(traced, Scheme.of("int4", None))
    elements = ONE // 4
    packed = elements // 2 + 4 * elements // min(32, WIDTH, INNER)
    assert [block.bytes_each for block in found.blocks] == [(packed,) * EXPERTS] * LAYERS
    assert (found.dense_bytes, found.parameters) == (counted.dense_bytes, counted.parameters)
    assert found.bytes == counted.bytes - LAYERS * EXPERTS * (ONE - packed)


@pytest.mark.parametrize(("ranks", "gpus"), [([1], 1), ([1, 2, 4, 8], 8), ([1, 2, 4, 6], 6)])
def test_which_numbers_of_ranks(ranks, gpus):
    assert numbers(gpus) == ranks


def test_thousands_of_ranks(counted):
    found = plan(counted, 10**6, 4096)
    assert found.splits[-1].ranks == 4096
    weights = [split.weights for split in found.splits]
    assert weights == sorted(weights, reverse=True)
    assert (
        weights[-1] == counted.dense_bytes + LAYERS * ONE
    )  # a rank with an expert of each layer is the fullest
    for split in found.splits:
        assert (
            sum(weights_of(counted, split.ranks))
            == counted.dense_bytes * split.ranks + LAYERS * EXPERTS * ONE
        )


def test_where_it_stops_fitting(counted):
    dense, experts = counted.dense_bytes, LAYERS * EXPERTS * ONE
    assert plan(counted, dense - 1, 8).fits_from is None
    two = dense + experts // 2
    found = plan(counted, two + 2000, 8)
    assert found.fits_from == 2
    assert max(found.splits[0].batch.values()) == 0
    batches = [split.batch["all_reduce"] for split in found.splits]
    assert batches == sorted(batches)


def test_the_largest_batch_is_the_largest(counted):
    from moe_export.large.planning import activations

    memory = 60_000
    for split in plan(counted, memory, 4).splits:
        for way, batch in split.batch.items():
            if batch:
                left = memory - split.weights
                first = next(iter(counted.dims))
                assert activations(counted, split.ranks, way, {**counted.dims, first: batch}) <= left
                assert activations(counted, split.ranks, way, {**counted.dims, first: batch + 1}) > left


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("exchange", ["all_reduce", "all_to_all"])
def test_the_plan_is_what_the_ranks_have_and_send(exports, counted, ranks, exchange):
    """Weights of each rank as its files hold them; bytes a token as they were measured, for an even routing."""
    manifest = read_manifest(exports.of("--expert-parallel", ranks, "--exchange", exchange))
    planned = weights_of(counted, ranks)
    for graph, size in zip(manifest.graphs, planned, strict=True):
        assert size <= graph.bytes <= size + SMALL
    together = Together([open_rank(manifest, rank) for rank in range(ranks)])
    split = next(split for split in plan(counted, 10**9, 4).splits if split.ranks == ranks)
    tokens = EXPERTS * 4
    inputs = {"x": routed("balanced", 4, EXPERTS)}
    together.run_each([inputs] * ranks)
    for rank in together.ranks:
        sent = sum(one.bytes for one in rank.sent)
        if exchange == "all_reduce":
            assert sent == tokens * (split.reduced or sum(block.partial for block in counted.blocks))
        elif EXPERTS % ranks == 0:
            assert sent == pytest.approx(tokens * split.rows, rel=0.02)
    if exchange == "all_to_all":  # the experts do not divide by 4: over all ranks it comes to the same
        whole = sum(one.bytes for rank in together.ranks for one in rank.sent)
        assert whole == pytest.approx(ranks * tokens * split.rows, rel=0.02)


def test_the_command(tmp_path, capsys):
    source = tmp_path / "stack.py"
    source.write_text(STACK)
    assert run(["plan", str(source), "--gpu-memory", "11KB", "--gpus", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sizes"] == {"batch": 4, "sequence": 5}
    assert [split["ranks"] for split in found["splits"]] == [1, 2, 4]
    assert found["fits_from"] == 2
    assert found["notes"] == []


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("1.5 MiB", 1572864), ("512", 512), ("2 kb", 2000)]
)
def test_sizes_are_understood(text, size):
    assert parse_bytes(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["much", "-3GB", "0", ""])
def test_what_is_no_size(text, tmp_path, capsys):
    with pytest.raises(UsageError, match="--gpu-memory is a size, not"):
        parse_bytes(text, "--gpu-memory")
    assert run(["plan", str(tmp_path / "x.py"), "--gpu-memory", text]) == 2
    assert f"--gpu-memory is a size, not {text!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def model():\n    return 1 / 0\nexample_inputs = ()\n", "raised ZeroDivisionError"),
        ("model = 3 .__class__\nexample_inputs = ()\n", "is a int, not an nn.Module"),
        ("x = 1\n", "no model in net.py"),
        ("x = (\n", "syntax"),
    ],
)
def test_a_file_without_a_model_says_so(tmp_path, capsys, text, says):
    source = tmp_path / "net.py"
    source.write_text(text)
    assert run(["plan", str(source)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


def test_sizes_are_told():
    assert [human(size) for size in (7, 24_576, 80e9, 123_456_789)] == ["7 B", "24.6 KB", "80.0 GB", "123 MB"]


@pytest.mark.slow
def test_a_model_of_billions_of_parameters_is_planned_without_their_bytes(tmp_path, capsys):
    """Mixtral 8x7B's layers at their real size, 8 of them: 47 GB that this machine never holds."""
    import resource

    pytest.importorskip("transformers", reason="transformers is not installed")
    source = tmp_path / "mixtral.py"
    source.write_text(
        "import torch\n"
        "from transformers import MixtralConfig, MixtralForCausalLM\n"
        "model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=8))\n"
        "example_inputs = {'input_ids': torch.randint(0, 100, (2, 64)), 'use_cache': False}\n"
    )
    assert run(["plan", str(source), "--gpu-memory", "24GB", "--gpus", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    each = 3 * 4096 * 14336 * 4
    assert [layer["bytes"] for layer in found["layers"]] == [[each] * 8] * 8
    assert found["fits_from"] == 4
    assert found["splits"][2]["weights"] == found["dense_bytes"] + 8 * 2 * each
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * 2**20  # KiB
