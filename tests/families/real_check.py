"""Compare a graph with the module of a model file, or ask PyTorch's own exporter; imports nothing of moe-export.

    python real_check.py model.py --graph out/model.onnx [--sizes 8,16,32]
    python real_check.py model.py --torch

Each free dimension takes each size that the graph's metadata allow, the others keep the example's; then all take
random sizes. A float may differ from the module's float64 result by 1e-4, by 1e-3 of it, or by ten times what the
module's own float32 result is off; integers may not differ, and are compared as sets along the last axis.
Sizes that the module itself refuses are counted. So are dimensions that the graph fixes although the module takes
others. The last line printed is what was found: JSON for a graph, a word for PyTorch's exporter.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch.utils import _pytree as pytree

SIZES = (1, 2, 3, 5, 7, 13, 16, 17, 32, 33, 64, 65, 100, 130)
RANDOM_CASES = 6
LARGEST = 1 << 22
"""Elements of an input: sizes that make a larger one are not tried."""
Sizes = Mapping[str, int]


@dataclass
class Model:
    """The module of a model file and the call that the file shows."""

    module: torch.nn.Module
    leaves: list[Any]
    tree: Any
    wide: torch.nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.wide = copy.deepcopy(self.module).double()

    @classmethod
    def load(cls, path: str) -> Model:
        """Run a model file."""
        spec = importlib.util.spec_from_file_location("compared_model", path)
        assert spec is not None
        assert spec.loader is not None
        file = importlib.util.module_from_spec(spec)
        sys.modules["compared_model"] = file
        spec.loader.exec_module(file)
        given = file.example_inputs
        args, kwargs = ((), given) if isinstance(given, dict) else (tuple(given), {})
        module = file.model.eval()
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        leaves, tree = pytree.tree_flatten((bound.args, bound.kwargs))
        return cls(module, leaves, tree)

    @property
    def places(self) -> list[int]:
        """Which leaves are tensors."""
        return [place for place, leaf in enumerate(self.leaves) if torch.is_tensor(leaf)]

    def run(self, values: Sequence[Any], *, double: bool = False) -> list[torch.Tensor]:
        """The tensors that a fresh copy of the module returns."""
        given = [
            value.double()
            if double and torch.is_tensor(value) and value.is_floating_point()
            else (value.clone() if torch.is_tensor(value) else value)
            for value in values
        ]
        args, kwargs = pytree.tree_unflatten(given, self.tree)
        with torch.no_grad():
            found = copy.deepcopy(self.wide if double else self.module)(*args, **kwargs)
        found = found.to_tuple() if hasattr(found, "to_tuple") else found
        return [leaf.detach().clone() for leaf in pytree.tree_leaves(found) if torch.is_tensor(leaf)]


@dataclass
class Graph:
    """A graph in onnxruntime, its inputs in the module's order, and the sizes that it claims."""

    path: str
    checked: bool = True

    def __post_init__(self) -> None:
        model = onnx.load(self.path)
        if self.checked:
            onnx.checker.check_model(model, full_check=True)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        self.domain = facts.get("moe_export.domain", "")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self.session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        self.inputs = self.session.get_inputs()
        names = {
            size
            for each in self.inputs
            for size in each.shape
            if isinstance(size, str) and size.isidentifier()
        }
        self.bounds = {}
        for name in sorted(names):
            low, _, high = facts.get(f"moe_export.dim.{name}", "1:").partition(":")
            self.bounds[name] = (int(low or 1), int(high) if high else 1 << 30)

    def claims(self, sizes: Sizes) -> bool:
        """Whether the graph is said to be right at these sizes."""
        inside = all(low <= sizes[name] <= high for name, (low, high) in self.bounds.items())
        return inside and (not self.domain or bool(_number(self.domain, sizes)))

    def shape(self, position: int, sizes: Sizes) -> tuple[int, ...]:
        """The shape of an input at some sizes."""
        return tuple(
            size if isinstance(size, int) else int(_number(size, sizes))
            for size in self.inputs[position].shape
        )


def _number(expression: str, sizes: Sizes) -> Any:
    known = {"max": max, "min": min, "int": int, "floor": math.floor, "ceil": math.ceil}
    return eval(expression, {"__builtins__": {}}, known | dict(sizes))


def cases(
    graph: Graph, example: Sizes, sizes: Sequence[int], rng: np.random.Generator
) -> Iterator[dict[str, int]]:
    """Sizes that the graph claims: the example's, each dimension at each size, random combinations."""
    yield dict(example)
    for name, (low, high) in graph.bounds.items():
        for size in sorted({*sizes, low, min(high, 257)}):
            if size != example[name]:
                yield {**example, name: size}
    for _ in range(RANDOM_CASES):
        yield {name: int(rng.choice([size for size in sizes if size <= 33])) for name in graph.bounds}


def made(leaf: torch.Tensor, shape: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
    """Values like the example's: normal, or integers within its range."""
    if leaf.is_floating_point():
        return torch.from_numpy(rng.standard_normal(shape)).to(leaf.dtype)
    if leaf.dtype is torch.bool:
        return torch.from_numpy(rng.random(shape) < 0.7)
    low, high = int(leaf.min()), int(leaf.max())
    return torch.from_numpy(rng.integers(low, high + 1, shape)).to(leaf.dtype)


def difference(got: np.ndarray, want: torch.Tensor, exact: torch.Tensor) -> str:
    """What is wrong with one output, in words; empty if nothing is."""
    if got.shape != tuple(want.shape):
        return f"shape {got.shape} instead of {tuple(want.shape)}"
    expected = want.float().numpy() if want.dtype is torch.bfloat16 else want.numpy()
    if not want.is_floating_point():
        same = np.array_equal(
            np.sort(got, -1) if got.ndim else got, np.sort(expected, -1) if got.ndim else expected
        )
        return "" if same else f"{(got != expected).mean():.1%} of the integers differ"
    true = exact.double().numpy() if exact.shape == want.shape else expected
    if not np.array_equal(np.isnan(expected), np.isnan(got)):
        return "NaN elsewhere"
    finite = np.isfinite(true) & np.isfinite(expected)
    if not np.array_equal(expected[~finite], got[~finite], equal_nan=True):
        return "infinity elsewhere"
    true, expected, got = true[finite], expected[finite], got[finite].astype(np.float64)
    own = np.abs(true - expected).max(initial=0)
    over = np.abs(got - true) > 1e-4 + 1e-3 * np.abs(true) + 10 * own
    if not over.any():
        return ""
    off, scale = np.abs(got - true).max(initial=0), np.abs(true).max(initial=0)
    return f"{over.mean():.1%} differ by up to {off:.2g} of {scale:.2g} (float32 itself {own:.1g})"


def compare(model: Model, graph: Graph, sizes: Sequence[int]) -> dict[str, Any]:
    """Run both at every case."""
    places, rng = model.places, np.random.default_rng(0)
    known = [model.leaves[place] for place in places[: len(graph.inputs)]]
    example: dict[str, int] = {}
    for leaf, each in zip(known, graph.inputs, strict=True):
        example |= {size: leaf.shape[axis] for axis, size in enumerate(each.shape) if size in graph.bounds}
    tried, refused, wrong = 0, 0, []
    for number, case in enumerate(cases(graph, example, sizes, rng)):
        shapes = [graph.shape(position, case) for position in range(len(graph.inputs))]
        if not graph.claims(case) or max(map(math.prod, shapes), default=0) > LARGEST:
            continue
        values = list(model.leaves)
        for place, leaf, shape in zip(places, known, shapes, strict=False):
            values[place] = made(leaf, shape, rng) if number else leaf
        try:
            want = model.run(values)
        except Exception:
            refused += 1
            continue
        tried += 1
        try:
            exact = model.run(values, double=True)
        except Exception:
            exact = want
        feed = {each.name: values[place].numpy() for each, place in zip(graph.inputs, places, strict=False)}
        try:
            got = graph.session.run(None, feed)
        except Exception as error:
            wrong.append(f"{case}: onnxruntime fails: {str(error).splitlines()[0][:150]}")
            continue
        rows = zip(got, want, exact, strict=False)
        found = [(n, text) for n, row in enumerate(rows) if (text := difference(*row))]
        wrong += [f"{case}: output {n}: {text}" for n, text in found]
    return {"wrong": len(wrong), "text": _said(model, graph, tried, refused, wrong)}


def _said(model: Model, graph: Graph, tried: int, refused: int, wrong: Sequence[str]) -> str:
    shapes = ", ".join(f"{each.name} [{', '.join(map(str, each.shape))}]" for each in graph.inputs)
    limits = [f"{name} {low}..{high if high < 1 << 30 else ''}" for name, (low, high) in graph.bounds.items()]
    limits = [limit for limit in limits if not limit.endswith(" 1..")] + [graph.domain] * bool(graph.domain)
    parts = [shapes + (f" ({'; '.join(limits)})" if limits else "")]
    if wrong:
        parts.append(f"wrong at {len(wrong)} of {tried} sizes: {wrong[0]}")
    else:
        parts.append(f"right at {tried} sizes" + (f", {refused} refused by the module" if refused else ""))
    others = taken(model, graph)
    return "; ".join(
        [*parts, *([f"fixed though the module takes others: {', '.join(others)}"] if others else [])]
    )


def taken(model: Model, graph: Graph) -> list[str]:
    """Sizes that the graph fixes and the module would take otherwise: all axes of one size change together."""
    places, rng, found = model.places, np.random.default_rng(1), []
    known = [(place, model.leaves[place]) for place in places[: len(graph.inputs)]]
    fixed = {size for each in graph.inputs for size in each.shape if isinstance(size, int) and size > 0}
    for size in sorted(fixed):
        for other in (size + 1, 2 * size, size - 1):
            values = list(model.leaves)
            for (place, leaf), each in zip(known, graph.inputs, strict=False):
                pairs = zip(leaf.shape, each.shape, strict=True)
                shape = [other if old == size and now == size else old for old, now in pairs]
                values[place] = made(leaf, shape, rng) if shape != list(leaf.shape) else leaf
            try:
                model.run(values)
            except Exception:
                continue
            found.append(f"{size} (not {other})")
            break
    return found


def torchs(model: Model) -> str:
    """Whether PyTorch's exporter takes the module, at the example's sizes, and is right there."""
    args, kwargs = pytree.tree_unflatten(list(model.leaves), model.tree)
    want = model.run(model.leaves)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                copy.deepcopy(model.module), args, kwargs=kwargs, dynamo=True, verbose=False, optimize=False
            )
        program.save("torch.onnx")
    except BaseException as error:
        return f"refuses it ({type(error).__name__})"
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession("torch.onnx", options, providers=["CPUExecutionProvider"])
        feed = {
            each.name: model.leaves[p].numpy()
            for each, p in zip(session.get_inputs(), model.places, strict=False)
        }
        got = session.run(None, feed)
    except Exception as error:
        return f"takes it, onnxruntime fails ({type(error).__name__})"
    bad = any(difference(g, w, w) for g, w in zip(got, want, strict=False))
    return "takes it, and is wrong at the example" if bad else "takes it"


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--graph")
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--only-build", action="store_true")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(Path(asked.model).resolve().parent))
    model = Model.load(asked.model)
    if asked.only_build:
        model.run(model.leaves)
    elif asked.torch:
        print(f"\n{torchs(model)}")
    else:
        sizes = [int(size) for size in asked.sizes.split(",")]
        print(f"\n{json.dumps(compare(model, Graph(asked.graph), sizes))}")


if __name__ == "__main__":
    main()
