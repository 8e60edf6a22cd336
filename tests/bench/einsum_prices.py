"""Finds the prices of `onnxruntime-cpu` (einsum_rewrite/targets) on this machine.

    python tests/bench/einsum_prices.py --equations 400

Random equations of two operands, each computed by every plan that is weighed, on one thread, in one order drawn anew
each round. Of many sets of prices around those in use, the best are averaged: those with which the plan of the least
price takes least longer than the fastest plan. They are found on one half of the equations and judged on the other.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from moe_export.einsum_rewrite.binding import bind
from moe_export.einsum_rewrite.equation import Equation
from moe_export.einsum_rewrite.onnx_constants import MovedConstants
from moe_export.einsum_rewrite.onnx_writer import GraphEngine, write
from moe_export.einsum_rewrite.plan import Plan
from moe_export.einsum_rewrite.planner import candidates
from moe_export.einsum_rewrite.prices import Prices
from moe_export.einsum_rewrite.targets import Target, read_target
from moe_export.graph_builder import Names

ENGINE = "onnxruntime-cpu"
SIZES = (4, 8, 16, 32, 64, 128, 256)
LARGEST = 2**21
"""Elements of an operand or a result."""
WEIGHED = 30
"""Plans of one equation, the cheapest first."""
ROUNDS = 9
SETS = 1500
KEPT = 40
PRICED = [field.name for field in fields(Target) if field.type == "float"]

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Measured:
    """One equation: `units` (plans, 1 + prices), so that `units @ (1, *prices)` are the prices of its plans."""

    equation: str
    units: np.ndarray
    seconds: np.ndarray

    def lost(self, prices: np.ndarray) -> float:
        """How much longer the cheapest plan takes than the fastest, as a logarithm."""
        return math.log(self.seconds[(self.units @ prices).argmin()] / self.seconds.min())


def drawn(draw: random.Random) -> tuple[str, Shapes]:
    """An equation of two operands that share a label, and sizes that are worth a measurement."""
    while True:
        labels = "abcdefg"[: draw.randint(2, 5)]
        terms = ["".join(draw.sample(labels, draw.randint(1, len(labels)))) for _ in range(2)]
        used = sorted({*terms[0], *terms[1]})
        kept = [one for one in used if draw.random() < 0.7 or (one in terms[0]) != (one in terms[1])]
        draw.shuffle(kept)
        size = {label: draw.choice(SIZES) for label in used}
        counts = [math.prod(size[label] for label in term) for term in (*terms, kept)]
        work = math.prod(size.values())
        if kept and set(terms[0]) & set(terms[1]) and max(counts) <= LARGEST and 2**15 <= work <= 2**27:
            shapes = tuple(tuple(size[label] for label in term) for term in terms)
            return f"{','.join(terms)}->{''.join(kept)}", shapes


def graph_of(plan: Plan, shapes: Shapes) -> onnx.ModelProto:
    """The plan as a model of its own."""
    inputs = [
        ir.Value(name=f"x{k}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for k, shape in enumerate(shapes)
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 17}, name="plan")
    constants = MovedConstants(graph, Names({"y"}), inline=False, read_external=False)
    engine = GraphEngine(ir.Node("", "Einsum", inputs, name="einsum"), 17, constants)
    result = write(plan, inputs, engine, None)
    result.name = "y"
    result.type = ir.TensorType(ir.DataType.FLOAT)
    graph.extend(engine.nodes)
    graph.outputs.append(result)
    return ir.to_proto(ir.Model(graph, ir_version=10))


def _seconds(models: Sequence[onnx.ModelProto], shapes: Shapes) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal(shape, dtype=np.float32) for shape in shapes]
    runs = []
    for model in models:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for k, array in enumerate(arrays):
            binding.bind_cpu_input(f"x{k}", array)
        binding.bind_output("y")
        session.run_with_iobinding(binding)
        runs.append((session, binding))
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for k in random.sample(range(len(runs)), len(runs)):
            session, binding = runs[k]
            started = time.perf_counter()
            session.run_with_iobinding(binding)
            found[k].append(time.perf_counter() - started)
    return np.array([min(times) for times in found])


def measured(text: str, shapes: Shapes) -> Measured:
    """Time every plan of an equation."""
    equation = Equation.parse(text, "torch")
    plans = [plan for _, plan in candidates(equation, shapes, ENGINE)][:WEIGHED]
    sizes = dict(bind(equation, shapes).sizes)
    none = dict.fromkeys(PRICED, 0.0)
    ones = [Prices(sizes, {}, Target("one", **none | {name: 1.0})) for name in PRICED]
    rest = Prices(sizes, {}, Target("none", **none))
    units = [[rest.plan(plan), *(one.plan(plan) - rest.plan(plan) for one in ones)] for plan in plans]
    return Measured(text, np.array(units), _seconds([graph_of(plan, shapes) for plan in plans], shapes))


def lost(rows: Sequence[Measured], prices: np.ndarray) -> float:
    """The geometric mean of the time of the cheapest plan over that of the fastest."""
    return math.exp(statistics.fmean(row.lost(prices) for row in rows))


def found(rows: Sequence[Measured], start: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The geometric mean of the best of many sets of prices around `start`; its first entry is the unit."""
    varies = np.arange(len(start)) > 0
    sets = [start * np.exp(generator.normal(0, 0.8, len(start)) * varies) for _ in range(SETS)]
    best = sorted(sets, key=lambda prices: lost(rows, prices))[:KEPT]
    return np.exp(np.mean([np.log(np.maximum(prices, 1e-9)) for prices in best], axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--equations", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, generator = random.Random(given.seed), np.random.default_rng(given.seed)
    rows = [measured(*drawn(draw)) for _ in range(given.equations)]
    start = np.array([1.0, *(getattr(read_target(ENGINE), name) for name in PRICED)])
    halves = rows[::2], rows[1::2]
    print(f"cheapest / fastest plan, {len(rows)} equations: {lost(rows, start):.3f} with the prices in use")
    for here, other in (halves, halves[::-1]):
        prices = found(here, start, generator)
        print(f"found on one half {lost(here, prices):.3f}, judged on the other {lost(other, prices):.3f}")
    prices = found(rows, start, generator)
    print(f"found on all {lost(rows, prices):.3f}:")
    print(*(f"  {name} = {value:.3g}" for name, value in zip(PRICED, prices[1:], strict=True)), sep="\n")


if __name__ == "__main__":
    main()
