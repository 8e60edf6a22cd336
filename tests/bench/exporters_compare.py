"""Compare a graph with its module at the example's sizes and at others; imports neither exporter.

    python exporters_compare.py model.py out.onnx --free '{"x": ["batch", "seq"]}' --cases '[{"batch": 3, "seq": 17}]'

`--free` names the free axes of each input, in order; "" is an axis that stays. A float may differ from the module's
float64 result by 1e-4, by 1e-3 of it, or by ten times what the module's own float32 result is off
(`real_check.difference`); where an operator has no float64 form, the float32 result is taken for it. Nothing is read
of a graph but its inputs, its nodes and, where it states the sizes for which it holds, those. The last line printed is
JSON:

    nodes      of the graph, of subgraphs and of functions
    invalid    what onnx.checker has against it
    fixed      the free axes that the graph fixes
    tried      a number of sizes
    wrong      `[sizes, what is wrong]` for each that differs
    unclaimed  sizes for which the graph is said not to hold
    refused    sizes that the module refuses
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from real_check import Graph, Model, difference, made

Free = Mapping[str, Sequence[str]]
Sizes = Mapping[str, int]


class Comparison:
    """A module, a graph of it, and which axis of which input has which name."""

    def __init__(self, model: str, path: str, free: Free) -> None:
        torch.manual_seed(0)
        self.module, self.graph, self.free = Model.load(model), Graph(path, checked=False), free
        leaves = [self.module.leaves[place] for place in self.module.places]
        self.known = dict(zip(free, leaves, strict=True))
        self.example = {
            name: leaf.shape[axis] for each, leaf in self.known.items() for axis, name in self.named(each)
        }
        shapes = {each.name: each.shape for each in self.graph.inputs}
        # An input that nothing depends on may be missing; otherwise they are in the module's order.
        self.inputs = (
            {name: name for name in shapes}
            if set(shapes) <= set(free)
            else dict(zip(shapes, free, strict=True))
        )
        self.axes = [
            (shape[axis], name)
            for given, shape in shapes.items()
            for axis, name in self.named(self.inputs[given])
        ]
        """`(size or name in the graph, our name)` of each free axis."""
        self.fixed = sorted({name for size, name in self.axes if isinstance(size, int)})

    def named(self, name: str) -> list[tuple[int, str]]:
        """`(axis, name)` of an input's free axes."""
        return [(axis, size) for axis, size in enumerate(self.free[name]) if size]

    def takes(self, sizes: Sizes) -> bool:
        """Whether the axes that the graph fixes have these sizes."""
        return all(sizes[name] == self.example[name] for name in self.fixed)

    def claims(self, sizes: Sizes) -> bool:
        """Whether the graph is said to hold at these sizes; it is where it says nothing."""
        return self.graph.claims({own: sizes[name] for own, name in self.axes if isinstance(own, str)})

    def values(self, sizes: Sizes, rng: np.random.Generator | None) -> list[Any]:
        """Arguments of these sizes with random values, or the example's."""
        values = list(self.module.leaves)
        for place, (each, leaf) in zip(self.module.places, self.known.items(), strict=True):
            shape = list(leaf.shape)
            for axis, name in self.named(each):
                shape[axis] = sizes[name]
            values[place] = leaf if rng is None else made(leaf, shape, rng)
        return values

    def difference(self, values: Sequence[Any], want: Sequence[torch.Tensor]) -> str:
        """What is wrong with the graph's outputs; empty if nothing is."""
        try:
            exact = self.module.run(values, double=True)
        except Exception:  # an operator without a float64 form
            exact = list(want)
        tensors = dict(zip(self.free, (values[place] for place in self.module.places), strict=True))
        try:
            got = self.graph.session.run(
                None, {own: tensors[each].numpy() for own, each in self.inputs.items()}
            )
        except Exception as error:
            return f"onnxruntime fails: {first_line(error)}"
        rows = zip(in_one_order(got), in_one_order(want), in_one_order(exact), strict=True)
        return next((text for row in rows if (text := difference(*row))), "")


def compare(model: str, path: str, free: Free, cases: Sequence[Sizes]) -> dict[str, Any]:
    """Run a graph and its module at the example and at other sizes; see the top of this file for what is returned."""
    written = onnx.load(path)
    found: dict[str, Any] = {"nodes": node_count(written), "invalid": "", "tried": 0}
    found |= {name: [] for name in ("fixed", "wrong", "unclaimed", "refused")}
    try:
        onnx.checker.check_model(written, full_check=True)
    except Exception as error:
        found["invalid"] = first_line(error)
    try:
        both = Comparison(model, path, free)
    except Exception as error:
        return found | {"tried": 1, "wrong": [["any size", f"onnxruntime fails: {first_line(error)}"]]}
    rng = np.random.default_rng(0)
    for number, sizes in enumerate([both.example, *cases]):
        if not both.takes(sizes):
            continue
        values, said = both.values(sizes, rng if number else None), in_words(sizes)
        try:
            want = both.module.run(values)
        except Exception:
            found["refused"].append(said)
            continue
        if not both.claims(sizes):
            found["unclaimed"].append(said)
            continue
        found["tried"] += 1
        text = both.difference(values, want)
        found["wrong"] += [[said, text]] if text else []
    return found | {"fixed": both.fixed}


def in_one_order(outputs: Sequence[Any]) -> list[Any]:
    """Choices in ascending order, and with them what has their shape: `topk(sorted=False)` promises none.

    Choices are integers with an axis of choices, such as the expert ids of a router beside its weights.
    """
    tensors = [torch.as_tensor(each) for each in outputs]
    choices = [each for each in tensors if not each.is_floating_point() and each.dim() > 1]
    for order in [each.argsort(dim=-1, stable=True) for each in choices]:
        tensors = [each.gather(-1, order) if each.shape == order.shape else each for each in tensors]
    return [new if torch.is_tensor(old) else new.numpy() for new, old in zip(tensors, outputs, strict=True)]


def node_count(model: onnx.ModelProto) -> int:
    """Nodes of a graph, of the subgraphs of its nodes, and of its functions."""

    def count(nodes: Sequence[onnx.NodeProto]) -> int:
        inner = [graph for node in nodes for each in node.attribute for graph in (each.g, *each.graphs)]
        return len(nodes) + sum(count(graph.node) for graph in inner)

    return count(model.graph.node) + sum(count(function.node) for function in model.functions)


def in_words(sizes: Sizes) -> str:
    """`batch 3, seq 17`."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("graph")
    parser.add_argument("--free", type=json.loads, required=True)
    parser.add_argument("--cases", type=json.loads, default=[])
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"\n{json.dumps(compare(asked.model, asked.graph, asked.free, asked.cases))}")


if __name__ == "__main__":
    main()
