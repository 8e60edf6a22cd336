"""One export by one exporter, as `exporters.py` asks for it in a process of its own.

    python exporters_apart.py torch model.py out.onnx --free '{"x": ["batch", "seq"]}' --attempt named
    python exporters_apart.py moe-export model.py out.onnx --free '{"x": ["batch", "seq"]}' --attempt named

The last line printed is JSON: `wall`, seconds of the export alone; `cpu`, CPU seconds of the process until the graph is
written; of moe-export also its own `verdict`, and `verified`, CPU seconds until then (not with `--no-verify`); or the
`error` that it ends in.
"""

from __future__ import annotations

import argparse
import json
import resource
import runpy
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

OPSET = 18
"""What `torch.onnx.export(dynamo=True)` writes by itself; the same for both."""
Shapes = dict[str, dict[int, Any]] | None


def dynamic_shapes(free: Mapping[str, Sequence[str]], attempt: str) -> Shapes:
    """The argument of that name.

    Args:
        free: For each input the name of each free axis, "" for one that stays.
        attempt: `named` requires the axes to be free, `auto` lets PyTorch fix those that it cannot keep free, `none`
            says nothing: PyTorch fixes all of them, moe-export those that it cannot keep free.
    """
    if attempt == "none":
        return None
    auto = torch.export.Dim.AUTO
    return {
        each: {axis: auto if attempt == "auto" else name for axis, name in enumerate(names) if name}
        for each, names in free.items()
    }


def export(who: str, model: str, path: str, shapes: Shapes, *, verify: bool = True) -> dict[str, Any]:
    """Export a model file and write the graph."""
    torch.manual_seed(0)
    file = runpy.run_path(model)
    given, module = file["example_inputs"], file["model"].eval()
    args, kwargs = ((), given) if isinstance(given, dict) else (tuple(given), {})
    start = time.monotonic()
    if who == "torch":
        torch.onnx.export(
            module, args, path, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, opset_version=OPSET, verbose=False
        )  # fmt: skip
        return {"wall": time.monotonic() - start, "cpu": cpu_seconds()}
    import moe_export

    program = moe_export.export_model(module, args, kwargs, dynamic_shapes=shapes, opset=OPSET)
    program.save(path, force=True)
    found = {"wall": time.monotonic() - start, "cpu": cpu_seconds()}
    if not verify:
        return found
    return found | {"verdict": program.verify().verdict, "verified": cpu_seconds()}


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def reason(error: BaseException) -> str:
    """The error that an export ends in: the one that it came of, because PyTorch's exporter puts advice around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return f"{type(error).__name__}: {text[:300]}"


def main() -> None:
    """Print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("torch", "moe-export"))
    parser.add_argument("model")
    parser.add_argument("graph")
    parser.add_argument("--free", type=json.loads, required=True)
    parser.add_argument("--attempt", choices=("named", "auto", "none"), default="named")
    parser.add_argument("--no-verify", action="store_true")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    try:
        shapes = dynamic_shapes(asked.free, asked.attempt)
        found = export(asked.who, asked.model, asked.graph, shapes, verify=not asked.no_verify)
    except Exception as error:
        found = {"error": reason(error), "cpu": cpu_seconds()}
    print(f"\n{json.dumps(found)}")


if __name__ == "__main__":
    main()
