"""`make gpu`: everything that needs a GPU, in under ten minutes; one JSON and one page.

    tests         the tests that are marked `gpu`
    models        models/ in onnxruntime on CUDA, against eager and torch.compile
    experts       blocks of experts in every form
    recurrences   loops over time in every form
    engines       TensorRT engines of models/, run and compared

Each part has its own seconds; what they did not reach is named on the page. `--cpu` rehearses it with the CPU in the
place of the GPU, which the page says; it is written into `build/gpu`, and docs/gpu.md stays as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "written")]
# Processes that export import the same modules.
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:3], os.environ.get("PYTHONPATH", "")])

SECONDS = {"tests": 110, "models": 110, "experts": 150, "recurrences": 90, "engines": 70}
"""530 together: what is under way when they are over is ended, not cut."""
SCHEMA = "moe-export/gpu/1"


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; the exit code: 0 if nothing failed, 1 if a test or a comparison did, 4 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="rehearse, with the CPU in the GPU's place")
    parser.add_argument("--small", action="store_true", help="few and small sizes")
    parser.add_argument("--share", type=float, default=1.0, help="of each part's seconds")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", help="where the results go")
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS), help="these parts")
    asked = parser.parse_args(arguments)

    import torch  # before onnxruntime, which finds CUDA's libraries in it

    if not asked.cpu and not torch.cuda.is_available():
        print(
            "error: no GPU that PyTorch can use\n  hint: `make gpu GPU=--cpu` rehearses without one",
            file=sys.stderr,
        )
        return 4
    import exports
    import page
    import parts
    from device import Budget, Device

    start = time.monotonic()
    device = Device("cpu" if asked.cpu else "cuda")
    sizes = parts.SMALL if asked.small else parts.Sizes()
    document: dict[str, Any] = {"schema": SCHEMA, "device": device.name, "versions": versions(), "parts": {}}
    with TemporaryDirectory(prefix="moe-export-") as folder:
        making = exports.Exports(Path(folder), max(1, min(4, (os.cpu_count() or 2) // 2)))
        announce(making, sizes, asked.only)
        for name in asked.only:
            budget = Budget(SECONDS[name] * asked.share)
            rows = getattr(parts, name)(parts.Work(device, sizes, making, budget))
            seconds = time.monotonic() - budget.started
            document["parts"][name] = {"rows": rows, "cut": budget.cut, "seconds": round(seconds, 1)}
            print(f"{name}: {len(rows)} rows, {len(budget.cut)} cut, {seconds:.0f} s", flush=True)
        making.stop()
    document |= {"flops_per_second": device.speed[0], "bytes_per_second": device.speed[1]}
    document["seconds"] = round(time.monotonic() - start, 1)
    asked.build.mkdir(parents=True, exist_ok=True)
    (asked.build / "gpu.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = page.render(document)
    (asked.build / "gpu.md").write_text(text, encoding="utf-8")
    if not asked.cpu and list(asked.only) == list(SECONDS):
        page.store(text)
    print(f"written: {asked.build / 'gpu.json'}, {asked.build / 'gpu.md'}; {document['seconds']:.0f} s")
    return int(page.failed(document))


def announce(making: Any, sizes: Any, only: list[str]) -> None:
    """Begin with the exports, in the order in which they are needed."""
    import exports

    if "models" in only:
        for name in sizes.models:
            making.start(exports.model, name, "onnxruntime-cuda")
    if "experts" in only:
        for count, k in sizes.experts:
            making.start(exports.experts, count, k)
    if "recurrences" in only:
        for name in exports.RECURRENCES:
            making.start(exports.recurrence, name)
    if "engines" in only:
        for name in sizes.models:
            making.start(exports.model, name, "tensorrt")


def versions() -> dict[str, str]:
    """What is installed, and the machine."""
    import torch

    found = {"Python": platform.python_version(), "CUDA": str(torch.version.cuda)}
    for name in ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt-rtx-cu13", "tensorrt", "moe-export"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
