"""What `make gpu` does, a function a part: each gives rows, and ends when its seconds are over."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import exports
import numpy as np
import onnx
import test_experts_bench as blocks
import test_recurrence_bench as loops
import torch
from device import Budget, Device, Graph, Run, medians, on_device
from exports import Exports
from openvino_compare import at_length

from moe_export.export.engines.build import build_engines
from moe_export.export.frontend.load import load_subject
from moe_export.running.engines import run_status
from moe_export.verify.cost.graph_cost import cost_of
from moe_export.verify.runners.onnxruntime_runner import specs_of

MODELS = ("attention", "gshard_moe", "hybrid", "mamba", "mamba2", "moe_gate", "sparse_moe")
ROOT = Path(__file__).resolve().parents[2]
MOST = 8 * 2**30
"""Bytes of the intermediate values of a form that is still measured: `gather` holds a matrix a pair."""
COMPILING = 45
"""Seconds that must be left to begin with torch.compile, which cannot be stopped."""
MARK = "pytest.mark." + "gpu"
FEW = 64
"""Steps of a loop, up to which torch.compile is given it: it writes each of them out."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        lengths: Of models.
        experts: `(experts, chosen a token)` of blocks.
        tokens: Of blocks.
        steps: Of recurrences.
        models: Names of files in models/.
    """

    lengths: tuple[int, ...] = (128, 2048)
    experts: tuple[tuple[int, int], ...] = ((8, 2), (64, 8), (256, 8))
    tokens: tuple[int, ...] = (1, 16, 128, 1024, 8192)
    steps: tuple[int, ...] = (64, 512, 2048, 8192)
    models: tuple[str, ...] = MODELS


SMALL = Sizes((32,), ((8, 2),), (1, 16), (64,), ("attention", "mamba", "sparse_moe"))
"""A rehearsal of a minute or two."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a part is given."""

    device: Device
    sizes: Sizes
    exports: Exports
    budget: Budget


def tests(work: Work) -> list[Row]:
    """The tests that need a GPU: how each went, with the reason of what was skipped."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
        ]
        # Collecting all others would take a minute.
        marked = [
            str(file)
            for file in sorted((ROOT / "tests").rglob("test_*.py"))
            if MARK in file.read_text("utf-8")
        ]
        try:
            subprocess.run(
                [*command, *marked], cwd=ROOT, capture_output=True, timeout=work.budget.seconds, check=False
            )
        except subprocess.TimeoutExpired:
            work.budget.cut.append("the tests marked `gpu`: none has a result, as they did not end in time")
            return []
        return [_outcome(case) for case in ElementTree.parse(report).iter("testcase")]


def _outcome(case: ElementTree.Element) -> Row:
    name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            return {
                "test": name,
                "outcome": kind,
                "reason": (found.get("message") or "").splitlines()[0][:200],
            }
    return {"test": name, "outcome": "passed", "reason": ""}


def models(work: Work) -> list[Row]:
    """Each file of models/: onnxruntime, eager, torch.compile; numbers against eager on the CPU."""
    rows = []
    for name in work.sizes.models:
        if not work.budget.allows(f"models/{name}.py"):
            continue
        subject = load_subject(str(exports.MODELS / f"{name}.py"))
        graphs = _graphs(work, f"models/{name}.py", exports.model, name, "onnxruntime-cuda")
        for length in work.sizes.lengths if graphs else ():
            proto = onnx.load(graphs["onnxruntime-cuda"])
            inputs = at_length(subject, specs_of(proto.graph.input), length)
            cost = cost_of(proto, inputs)
            what = {"graph": f"models/{name}.py", "sizes": f"1 x {length}"}
            bound = work.device.roofline(cost.total.flops, cost.bytes_moved)
            named = {"": graphs["onnxruntime-cuda"]}
            rows.append(_row(work, what, named, inputs, subject.module, bound=bound))
    return rows


def experts(work: Work) -> list[Row]:
    """Blocks of experts in every form, with the roofline of what their routing asks for."""
    rows = []
    for count, k in work.sizes.experts:
        if not work.budget.allows(f"{count} experts"):
            continue
        graphs = _graphs(work, f"{count} experts", exports.experts, count, k)
        for tokens in work.sizes.tokens if graphs else ():
            x = np.random.default_rng(0).standard_normal((tokens, blocks.H)).astype(np.float32)
            pairs, each = tokens * k, 3 * blocks.H * blocks.I
            hit = count * (1 - (1 - 1 / count) ** pairs)
            held = {"gather": 4 * pairs * each, "dense": 4 * count * tokens * 3 * blocks.I}
            fitting = {form: path for form, path in graphs.items() if held.get(form, 0) < MOST}
            what = {"graph": f"{count} experts, {k} a token", "sizes": f"{tokens} tokens"}
            bound = work.device.roofline(2 * pairs * each, 4 * hit * each)
            module = blocks.Block(count, k).eval()
            rows.append(_row(work, what, fitting, {"x": x}, module, bound=bound, compiled=count <= 8))
    return rows


def recurrences(work: Work) -> list[Row]:
    """Loops over time in every form."""
    rows = []
    for name in exports.RECURRENCES:
        if not work.budget.allows(name):
            continue
        graphs = _graphs(work, name, exports.recurrence, name)
        for steps in work.sizes.steps if graphs else ():
            inputs = loops.example(name, steps)
            moved = sum(array.nbytes for array in inputs.values())
            module = loops.MODULES[name]().eval()
            what = {"graph": name, "sizes": f"{steps} steps"}
            bound = work.device.roofline(0, moved)
            rows.append(_row(work, what, graphs, inputs, module, bound=bound, compiled=steps <= FEW))
    return rows


def engines(work: Work) -> list[Row]:
    """TensorRT engines of models/, built for this GPU, run and compared; without one, built for sm89."""
    capability = "current" if work.device.kind == "cuda" else "sm89"
    rows = []
    for name in work.sizes.models:
        if not work.budget.allows(f"the engine of models/{name}.py"):
            continue
        graphs = _graphs(work, f"models/{name}.py", exports.model, name, "tensorrt")
        for module in ("tensorrt-rtx", "tensorrt") if graphs else ():
            rows.append(
                {"graph": f"models/{name}.py", "builder": module}
                | _engine(graphs["tensorrt"], capability, module)
            )
    return rows


def _engine(graph: Path, capability: str, module: str) -> Row:
    try:
        (engine,) = build_engines(graph, [capability], module=module)
        path = graph.with_name(f"{graph.stem}.{engine.capability}.engine")
        path.write_bytes(engine.plan)
        status, report = run_status(path, graph, engine.capability, module)
    except Exception as error:  # an engine that is refused is a row of the page
        return {"status": f"not built: {str(error).splitlines()[0][:160]}"}
    worst = max((row.max_abs for row in report.rows), default=0.0) if report is not None else None
    return {"status": status, "seconds": round(engine.seconds, 1), "largest difference": worst}


def _graphs(
    work: Work, what: str, make: Callable[..., dict[str, Path]], *arguments: object
) -> dict[str, Path]:
    try:
        return work.exports.get(work.budget.left, make, *arguments)
    except Exception as error:  # one that cannot be exported, or not in time, ends nothing else
        work.budget.cut.append(
            f"{what}: {type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}"
        )
        return {}


def _row(
    work: Work,
    what: Row,
    graphs: Mapping[str, Path],
    inputs: Mapping[str, Any],
    module: torch.nn.Module,
    *,
    bound: float,
    compiled: bool = True,
) -> Row:
    """One graph, or one in several forms, at one size."""
    label = " ".join(map(str, what.values()))
    if not work.budget.allows(label):
        return what | {"ms": {}, "reasons": {"all": "cut"}}
    reasons: dict[str, str] = {}
    runs: dict[str, Run] = {}
    with torch.no_grad():
        right = _arrays(module.cpu()(**on_device(inputs, Device("cpu"))))
        differences = {}
        for form, path in graphs.items():
            try:
                graph = Graph(path, work.device)
                differences[form] = _difference(right, graph.outputs(inputs))
                runs[f"onnxruntime {form}".strip()] = graph.bound(inputs)
            except Exception as error:
                reasons[f"onnxruntime {form}".strip()] = str(error).splitlines()[0][:160]
        here = on_device(inputs, work.device)
        module = module.to(work.device.kind)
        runs["eager"] = lambda: module(**here)
        if not compiled or work.budget.left < COMPILING:
            reasons["torch.compile"] = (
                "left out: it writes out each step or expert" if not compiled else "no time is left"
            )
        elif work.device.kind == "cpu" and not shutil.which("g++"):
            reasons["torch.compile"] = "no compiler on this machine"
        else:
            try:
                fast = torch.compile(module)
                fast(**here)
                runs["torch.compile"] = lambda: fast(**here)
            except Exception as error:
                reasons["torch.compile"] = str(error).splitlines()[0][:160]
        found = medians(runs, work.device, work.budget)
    return what | {"ms": found, "differences": differences, "bound_ms": bound, "reasons": reasons}


def _arrays(result: Any) -> list[np.ndarray]:
    values = result if isinstance(result, (tuple, list)) else [result]
    return [value.cpu().numpy() for value in values]


def _difference(right: list[np.ndarray], found: list[np.ndarray]) -> float:
    """The largest of all outputs, relative to 1 and to the largest value.

    Choices are compared as sets, and NaN is equal to itself.
    """
    worst = 0.0
    for want, got in zip(right, found, strict=True):
        ours, theirs = (np.sort(np.atleast_1d(each).astype(float)) for each in (got, want))
        if ours.shape != theirs.shape or (np.isnan(ours) != np.isnan(theirs)).any():
            return float("inf")
        ours, theirs = ours[~np.isnan(ours)], theirs[~np.isnan(theirs)]
        if ours.size:
            worst = max(worst, float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())))
    return worst
