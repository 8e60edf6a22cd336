"""On a CPU, one thread each: our recurrences against eager PyTorch, the unrolled graph and the best by hand.

    form   L   eager   unrolled   by hand …   ours

D = 256 and N = 16 (4 heads of 64 for Mamba-2), batch 1; times are medians, in ms. All forms take iterations, several
runs in a row each: after a single run of the unrolled graph, whose nodes and values fill the caches, the next form
would pay for reading its own again (1.6 ms instead of 1.0), which no server does that runs one model.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hand_recurrences as hand
import maximum_loops as loops
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from moe_export.export.engines.build import build_engines
from moe_export.export.frontend.subject import make_subject
from moe_export.export.pipeline import Options, export_subject
from moe_export.export.tracing.dims import DimRequest

ROUNDS = 15
IN_A_ROW = 5
PROCESSES = 7
NOISE = 1.1
"""Other work on the machine: how much further from the best by hand ours may look than the 1.1 it is held to."""


class Mamba(nn.Module):
    """The scan of models/mamba.py."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.D = nn.Parameter(torch.from_numpy(hand.A1)), nn.Parameter(torch.ones(hand.D))

    def forward(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        decay = torch.exp(delta.unsqueeze(-1) * self.A)
        added = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
        h = u.new_zeros(u.shape[0], hand.D, hand.N)
        ys = []
        for t in range(u.shape[1]):
            h = decay[:, t] * h + added[:, t]
            ys.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
        return torch.stack(ys, 1) + u * self.D


class Mamba2(nn.Module):
    """A decay a head, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.D = nn.Parameter(torch.from_numpy(hand.A2)), nn.Parameter(torch.ones(hand.H))

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], hand.H, hand.P, hand.N)
        ys = []
        for t in range(x.shape[1]):
            decay = torch.exp(dt[:, t] * self.A)[..., None, None]
            h = h * decay + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]
            ys.append(torch.einsum("bhpn,bn->bhp", h, C[:, t]) + self.D[:, None] * x[:, t])
        return torch.stack(ys, 1)


class GatedDelta(nn.Module):
    """The gated delta rule of 4 heads, keys and values of 64 (arXiv:2412.06464)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        k = torch.nn.functional.normalize(k, dim=-1)
        s = q.new_zeros(q.shape[0], hand.H, hand.P, hand.P)
        ys = []
        for t in range(q.shape[1]):
            s = s * torch.exp(-g[:, t])[..., None, None]
            held = (s * k[:, t].unsqueeze(-1)).sum(-2)
            s = s + k[:, t].unsqueeze(-1) * ((v[:, t] - held) * beta[:, t].unsqueeze(-1)).unsqueeze(-2)
            ys.append((s * q[:, t].unsqueeze(-1)).sum(-2))
        return torch.stack(ys, 1)


class GatedLinear(nn.Module):
    """Gated linear attention of 4 heads, keys and values of 64, a decay for each key (arXiv:2312.06635)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        s = q.new_zeros(q.shape[0], hand.H, hand.P, hand.P)
        ys = []
        for t in range(q.shape[1]):
            s = torch.exp(-g[:, t]).unsqueeze(-1) * s + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            ys.append((q[:, t].unsqueeze(-2) @ s).squeeze(-2))
        return torch.stack(ys, 1)


class KeyDelta(nn.Module):
    """A delta rule with a decay for each key."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        k = torch.nn.functional.normalize(k, dim=-1)
        s = q.new_zeros(q.shape[0], hand.H, hand.P, hand.P)
        ys = []
        for t in range(q.shape[1]):
            s = torch.exp(-g[:, t]).unsqueeze(-1) * s
            held = (s * k[:, t].unsqueeze(-1)).sum(-2)
            s = s + k[:, t].unsqueeze(-1) * (v[:, t] - held).unsqueeze(-2)
            ys.append((q[:, t].unsqueeze(-2) @ s).squeeze(-2))
        return torch.stack(ys, 1)


class Rwkv7(nn.Module):
    """RWKV-7 (arXiv:2503.14456): reads by one key, stores under another, a decay for each."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a = torch.nn.functional.normalize(a, dim=-1)
        b = a * torch.sigmoid(b)
        s = q.new_zeros(q.shape[0], hand.H, hand.P, hand.P)
        ys = []
        for t in range(q.shape[1]):
            read = s @ -a[:, t].unsqueeze(-1)
            kept = s * torch.exp(-g[:, t]).unsqueeze(-2)
            s = kept + read * b[:, t].unsqueeze(-2) + v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
            ys.append((s @ q[:, t].unsqueeze(-1)).squeeze(-1))
        return torch.stack(ys, 1)


MODULES: dict[str, type[nn.Module]] = {
    "mamba": Mamba,
    "mamba2": Mamba2,
    "delta": GatedDelta,
    "gated linear": GatedLinear,
    "key delta": KeyDelta,
    "rwkv7": Rwkv7,
    "mlstm": loops.FromNothing,
}
SHAPES = {
    "mamba": hand.INPUTS1,
    "mamba2": hand.INPUTS2,
    "delta": {name: ["b", "l", hand.H, hand.P] for name in "qkv"}
    | {name: ["b", "l", hand.H] for name in ("g", "beta")},
    "gated linear": {name: ["b", "l", hand.H, hand.P] for name in "qkvg"},
    "key delta": {name: ["b", "l", hand.H, hand.P] for name in "qkvg"},
    "rwkv7": {name: ["b", "l", hand.H, hand.P] for name in "qkvgab"},
    "mlstm": {n: ["b", "l", hand.H, hand.P] for n in "qkv"} | {n: ["b", "l", hand.H] for n in "if"},
}


@pytest.fixture(autouse=True)
def one_thread_for_eager() -> Iterator[None]:
    """As many as onnxruntime gets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(name: str, length: int, most: float = 0.1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = SHAPES[name]
    sizes = {"b": 1, "l": length}
    found = {key: [sizes.get(size, size) for size in shape] for key, shape in shapes.items()}
    values = {key: generator.standard_normal(shape).astype(np.float32) for key, shape in found.items()}
    for step, largest in (("delta", most), ("dt", most), ("g", most), ("beta", 1.0)):
        if step in found:
            values[step] = generator.uniform(0, largest, found[step]).astype(np.float32)
    return values


def exported(name: str, recurrence: str = "auto") -> onnx.ModelProto:
    module = MODULES[name]()
    inputs = tuple(
        torch.from_numpy(value).repeat(2, *[1] * (value.ndim - 1)) for value in example(name, 8).values()
    )
    subject = make_subject(module, inputs, {}, source=Path(__file__), how="bench")
    picked = {(key, axis): size for key in subject.inputs for axis, size in ((0, "batch"), (1, "sequence"))}
    options = Options(
        dims=DimRequest(static=True, picked=picked), gates=False, simplify=False, recurrence=recurrence
    )  # type: ignore[arg-type]
    return ir.to_proto(export_subject(subject, options)[0].model)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def medians(runs: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            for _ in range(IN_A_ROW):
                start = time.perf_counter()
                runs[name]()
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def nodes(graph: onnx.GraphProto) -> int:
    inner = (nodes(a.g) for node in graph.node for a in node.attribute if a.HasField("g"))
    return len(graph.node) + sum(inner)


def measured(name: str, models: dict[str, onnx.ModelProto], length: int) -> dict[str, float]:
    """Medians; every form is held against float64 first."""
    module = MODULES[name]()
    feed = example(name, length)
    tensors = {key: torch.from_numpy(value) for key, value in feed.items()}
    with torch.no_grad():
        wanted = module.double()(**{key: tensor.double() for key, tensor in tensors.items()}).numpy()
        module = module.float()
        runs: dict[str, Callable[[], object]] = {"eager": lambda: module(**tensors)}
        for key, model in models.items():
            one = session(model)
            np.testing.assert_allclose(one.run(None, feed)[0], wanted, rtol=1e-4, atol=2e-5, err_msg=key)
            runs[key] = lambda one=one: one.run(None, feed)
        row = medians(runs, ROUNDS if length < 2000 else 7)
    print(f"\n{name} {length:5d} " + "  ".join(f"{key} {value:.2f} ms" for key, value in row.items()))
    print(" " * 12 + "  ".join(f"{key} {nodes(model.graph)} nodes" for key, model in models.items()))
    return row


def test_mamba(tmp_path: Path) -> None:
    ours = exported("mamba")
    assert nodes(ours.graph) <= 60
    by_hand = {
        "1 step": hand.mamba_scan(), "16 steps": hand.mamba_scan_steps(), "wide": hand.mamba_scan_wide()
    }  # fmt: skip
    factors: dict[int, tuple[float, float]] = {}
    for length in (64, 512, 2048):
        unrolled = {"unrolled": hand.mamba_unrolled(length)} if length < 2000 else {}
        row = measured("mamba", {**unrolled, **by_hand, "ours": ours}, length)
        assert row["ours"] < 1.1 * NOISE * min(row[name] for name in by_hand)
        factors[length] = (row.get("unrolled", 0) / row["ours"], row["eager"] / row["ours"])
    assert factors[512][0] >= 2.5
    found = sorted(against_eager(ours, tmp_path))
    print("times faster than eager, L = 512: " + "  ".join(f"{factor:.1f}" for factor in found))
    if statistics.median(found) < 6:
        pytest.xfail(f"the mark of 6 times faster than eager is missed: {statistics.median(found):.1f} times")


def against_eager(ours: onnx.ModelProto, folder: Path) -> list[float]:
    """How many times faster than eager PyTorch, in several processes.

    Eager PyTorch takes 17 or 34 ms for the same, as a process keeps its large buffers or gets them from the system
    each time; ours takes the same in all of them. So one process says little.
    """
    onnx.save(ours, folder / "ours.onnx")
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(hand.__file__).parent)]!r}\n"
    code += f"import test_recurrence_bench as bench; bench.print_factor({str(folder / 'ours.onnx')!r})"
    command = [sys.executable, "-c", code]
    runs = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(PROCESSES))
    return [float(run.stdout.split()[-1]) for run in runs]


def print_factor(path: str) -> None:
    """Eager PyTorch's time over that of a graph, at 512 steps."""
    torch.set_num_threads(1)
    row = measured("mamba", {"ours": onnx.load(path)}, 512)
    print(row["eager"] / row["ours"])


def test_mamba_2() -> None:
    ours, scan = exported("mamba2"), exported("mamba2", "scan")
    by_hand = {"chunks": hand.mamba2_chunks(), "chunks, inexact": hand.mamba2_chunks(exact=False)}
    factors: dict[int, float] = {}
    for length in (64, 512, 2048):
        unrolled = {"unrolled": hand.mamba2_unrolled(length)} if length < 2000 else {}
        row = measured("mamba2", {**unrolled, **by_hand, "scan": scan, "ours": ours}, length)
        assert row["ours"] < 1.1 * NOISE * row["chunks"]
        assert row["ours"] < row["scan"] / 3
        factors[length] = row.get("unrolled", 0) / row["ours"]
        if length == 512:
            inexact = row["unrolled"] / row["chunks, inexact"]
    if factors[512] < 25:
        pytest.xfail(
            f"the mark of 25 times faster than unrolled is missed: {factors[512]:.1f} times; "
            f"the usual form, which is not exact, is {inexact:.1f} times faster here"
        )


@pytest.mark.parametrize("name", ["mamba2", "delta"])
def test_onnxruntimes_own_operator(name: str) -> None:
    """`--recurrence contrib`. The floor: 4 (delta: 6) FLOPs an entry of the state and step, 8 (50) MFLOP at L = 512."""
    models = {key: exported(name, key) for key in ("auto", "scan", "contrib")}
    rows = {length: measured(name, models, length) for length in (64, 512, 2048)}
    assert nodes(models["contrib"].graph) < nodes(models["auto"].graph)
    assert rows[512]["contrib"] < rows[512]["scan"] / 3
    assert rows[512]["auto"] < rows[512]["scan"] / 3
    assert rows[512]["auto"] < 3 * NOISE * rows[512]["contrib"]
    if rows[512]["contrib"] > rows[512]["auto"]:
        slower = rows[512]["contrib"] / rows[512]["auto"]
        pytest.xfail(f"onnxruntime's operator takes {slower:.1f} times as long as chunks on this processor")


@pytest.mark.parametrize("name", ["gated linear", "key delta", "rwkv7"])
def test_a_decay_for_each_key(name: str) -> None:
    """Chunks against single steps, and against onnxruntime's operator, which does not compute RWKV-7."""
    forms = ("auto", "scan") if name == "rwkv7" else ("auto", "scan", "contrib")
    models = {key: exported(name, key) for key in forms}
    rows = {length: measured(name, models, length) for length in (64, 512, 2048)}
    assert rows[64]["auto"] < 0.7 * NOISE * rows[64]["scan"]
    assert rows[512]["auto"] < 0.5 * NOISE * rows[512]["scan"]
    if "contrib" in forms:
        assert rows[512]["auto"] < 3 * NOISE * rows[512]["contrib"]


def test_a_running_maximum_is_a_loop_of_its_own() -> None:
    models = {key: exported("mlstm", key) for key in ("auto", "scan")}
    rows = {length: measured("mlstm", models, length) for length in (64, 512, 2048)}
    assert rows[512]["auto"] < 0.5 * NOISE * rows[512]["scan"]


def test_strong_decay_is_where_the_forms_differ() -> None:
    """dt to 3, A to -16: errors against float64, relative where values are large."""
    feed = example("mamba2", 512, most=3.0)
    module = Mamba2().double()
    with torch.no_grad():
        wanted = module(**{key: torch.from_numpy(value).double() for key, value in feed.items()}).numpy()
    errors = {}
    forms = {"ours": "auto", "scan": "scan", "contrib": "contrib"}
    models = {key: exported("mamba2", recurrence) for key, recurrence in forms.items()}
    models |= {"by hand": hand.mamba2_chunks(), "inexact": hand.mamba2_chunks(exact=False)}
    for name, model in models.items():
        found = session(model).run(None, feed)[0]
        assert np.isfinite(found).all()
        errors[name] = float((np.abs(found - wanted) / np.maximum(1, np.abs(wanted))).max())
    print("\n" + "  ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert errors["ours"] < 1e-5
    assert errors["contrib"] < 1e-5


_MEMORY = """
import sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.enable_cpu_mem_arena = 1, False
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = dict(np.load(sys.argv[2]))
short = {key: np.ascontiguousarray(value[:, :1]) for key, value in feed.items()}
session.run(None, short)
def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is used now
before = status("VmRSS")
result = session.run(None, feed)[0]
print(status("VmHWM") - before - result.nbytes / 2**20)
"""


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_memory_at_2048_steps(name: str, tmp_path: Path) -> None:
    """Above inputs and outputs, in MB of 2**20: the peak of the process."""
    np.savez(tmp_path / "feed.npz", **example(name, 2048))
    models = {"ours": exported(name)}
    if name == "mamba":
        models |= {"1 step": hand.mamba_scan(), "16 steps": hand.mamba_scan_steps()}
    else:
        models |= {"by hand": hand.mamba2_chunks(), "scan": exported(name, "scan")}
    used = {}
    for key, model in models.items():
        onnx.save(model, tmp_path / "model.onnx")
        command = [sys.executable, "-c", _MEMORY, str(tmp_path / "model.onnx"), str(tmp_path / "feed.npz")]
        used[key] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"\n{name} " + "  ".join(f"{key} {value:.1f} MB" for key, value in used.items()))
    if name == "mamba":
        assert used["ours"] <= 1.1 * min(used["1 step"], used["16 steps"])
        assert used["ours"] <= 7
    else:
        assert used["ours"] <= 1.1 * used["by hand"]


@pytest.mark.parametrize(
    ("name", "recurrence"), [("mamba", "scan"), ("mamba2", "scan"), ("mamba2", "chunked")]
)
def test_an_engine_for_1_to_4096_steps_is_built_in_under_2_s(name: str, recurrence: str) -> None:
    """The faster of two builds: the first one loads the builder's library."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds engines without a GPU")
    model = exported(name, recurrence)
    ranges = {"batch": (1, 1, 4), "sequence": (1, 512, 4096)}
    built = [
        build_engines(model, [capability], ranges)[0] for capability in ("sm120", "sm89", "sm120", "sm89")
    ]
    best = {
        engine.capability: min(e.seconds for e in built if e.capability == engine.capability)
        for engine in built
    }
    print(f"\n{name} {recurrence} " + "  ".join(f"{key} {value:.2f} s" for key, value in best.items()))
    assert max(best.values()) < 2
