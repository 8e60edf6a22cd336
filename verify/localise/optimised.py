"""Whether a graph is wrong by itself, or only as an engine runs it.

Onnxruntime may make a right graph wrong by its optimisation: then, from which level on and where. Another engine may
compute a node of it otherwise than onnxruntime: then, which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from moe_export.verify.localise.level import LEVELS, Engine, Session, Value
from moe_export.verify.localise.reference import GivenValues, GraphValues
from moe_export.verify.localise.search import Localisation, find_faulty_node


@dataclass(frozen=True)
class OptimiserFault:
    """A graph that is right as it is, and wrong as onnxruntime optimises it.

    Args:
        level: The lowest level at which it is wrong, one of `LEVELS`.
        localisation: The first faulty node of the optimised graph; the reference is the graph as it is.
    """

    level: str
    localisation: Localisation

    def __str__(self) -> str:
        return (
            f"the graph is right as it is; onnxruntime makes it wrong at optimisation level '{self.level}'\n"
            f"{self.localisation}"
        )


@dataclass(frozen=True)
class EngineFault:
    """A graph that is right as onnxruntime runs it, and wrong as another engine does.

    Args:
        engine: The other engine's name.
        localisation: The first node that it computes otherwise; the reference is onnxruntime, without optimisation.
    """

    engine: str
    localisation: Localisation

    def __str__(self) -> str:
        return f"onnxruntime computes the graph right, {self.engine} does not\n{self.localisation}"


def wrong_level(
    model: onnx.ModelProto, inputs: Mapping[str, Value], is_right: Callable[[Mapping[str, Value]], bool]
) -> str | None:
    """The lowest level of onnxruntime's optimisation at which a graph is wrong; None if it is right at all of them.

    Args:
        model: The graph.
        inputs: Its inputs, by name.
        is_right: Judges its outputs, by name. A level at which the graph fails is wrong.
    """
    names = [output.name for output in model.graph.output]
    for level in LEVELS:
        try:
            found = Session(model, level).run(inputs)
        except Exception:  # to fail is to be wrong
            return level
        if not is_right(dict(zip(names, found, strict=True))):
            return level
    return None


def find_optimiser_fault(model: onnx.ModelProto, inputs: Mapping[str, Value], level: str) -> OptimiserFault:
    """Find the node of the optimised graph that does not compute what the nodes it replaced did.

    Args:
        model: The graph as it is.
        inputs: The inputs that it is wrong on.
        level: The level at which it is wrong.
    """
    changed = optimised(model, level)
    right = GraphValues(model, inputs)
    shared = [name for name in right.names if name in {n for node in changed.graph.node for n in node.output}]
    return OptimiserFault(level, find_faulty_node(changed, inputs, GivenValues(right.values(shared))))


def find_engine_fault(
    model: onnx.ModelProto, inputs: Mapping[str, Value], name: str, engine: Engine
) -> EngineFault:
    """Find the node that an engine does not compute as onnxruntime does, on onnxruntime's values.

    Args:
        model: The graph, which onnxruntime computes right.
        inputs: The inputs that the engine gets wrong.
        name: The engine's name.
        engine: Runs a part of the graph.
    """
    right = GraphValues(model, inputs)
    values = GivenValues(right.values(list(right.level.producer)), level=right.level)
    return EngineFault(name, find_faulty_node(model, inputs, values, engine=engine))


def optimised(model: onnx.ModelProto, level: str) -> onnx.ModelProto:
    """The graph as onnxruntime runs it at a level."""
    with TemporaryDirectory(prefix="moe-export-") as folder:
        path = Path(folder, "optimised.onnx")
        Session(model, level, str(path))
        return onnx.load(path)
