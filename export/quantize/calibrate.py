"""`--calibrate FILE`: what products of packed weights really get, so that rounding can be fed back (`feedback`).

    float graph ─ with each product's input as an output ─ onnxruntime on the user's inputs ─▶ X of each product
      X (T, K) ─▶ moments (K, K) of a weight, added up over files ─▶ its codes ─▶ `Grid`

Rows come out of the float graph itself. There, an expert's product gets the tokens that the router sends to it and no
others, whatever the module looked like, and no name of a layer is needed. All inputs are those of the float model: what
packing does to earlier layers is not in them.

Moments of many experts are large (K = 4096: 128 MiB). So products are taken in groups whose moments fit in `_ROOM`,
each with a graph of its own that ends there; what two products share, as an expert's gate and up, is taken once. Codes
are kept, moments are not.

Only products in the main graph with a weight of their own can be watched: experts as slices, and linear layers. Where
experts are picked out of a stack (`loop`, `gather`, `blocks`, `contrib`), or get all tokens (`dense`), the model is
written as slices once more, and what is watched there belongs to the expert of the stack that has the same elements:

    W (E, K, N) ─ expert e ─▶ elements ═ W_e (K, N) of the graph with slices ─▶ its inputs ─▶ codes of expert e
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from moe_export.errors import UsageError
from moe_export.export.onnx.float32_kernels import with_float32_kernels
from moe_export.export.onnx.serialize import write_model
from moe_export.export.quantize.feedback import Moments, rounded_with_feedback
from moe_export.export.quantize.find import Candidate, find_weights
from moe_export.export.quantize.packed import Grid
from moe_export.export.quantize.rounding import Array
from moe_export.export.weights.files import open_weights
from moe_export.export.weights.recipe import np_dtype

_ROOM = 256 * 2**20
"""Bytes of moments that are added up at the same time."""
_WIDE = ".float32"
"""What a watched value is called in float32: onnxruntime gives NumPy no bfloat16."""
_FEW = 4
"""Weights that are named of those that no token reached, or that cannot be watched."""


@dataclass(frozen=True)
class _Watched:
    """The input of a product: a value of the float graph, (..., K), or (K, T) if `turned`."""

    name: str
    turned: bool


@dataclass(frozen=True)
class _Place:
    """One weight, an expert of a stack or all of what is none, and what it is multiplied with."""

    grid: Grid
    index: int
    inputs: tuple[_Watched, ...]


@dataclass(frozen=True)
class Calibration:
    """What became of a calibration.

    Attributes:
        tokens: How many each weight got; those of a stack are called `W[expert]`.
        blind: Weights whose products cannot be watched.
    """

    tokens: Mapping[str, int]
    blind: tuple[str, ...]

    def notes(self) -> Iterator[str]:
        """Lines for the report."""
        counts = sorted(count for count in self.tokens.values() if count)
        if counts:
            yield f"{len(counts)} weights rounded by what {counts[0]} to {counts[-1]} tokens make of them (--calibrate)"
        unreached = [name for name, count in self.tokens.items() if not count]
        if unreached:
            yield f"no token of --calibrate reached, and rounded to the nearest: {_named(unreached)}"
        if self.blind:
            yield (f"not calibrated, because no graph has their products one by one: {_named(self.blind)}")


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more


def calibrate(
    model: ir.Model,
    weights: Sequence[Candidate],
    grids: Mapping[str, Grid],
    files: Sequence[Path],
    apart: Callable[[], ir.Model] | None = None,
) -> Calibration:
    """Put weights on their grids by what they are multiplied with.

    Args:
        model: The float graph; it stays as it is.
        weights: Those that are to be packed, in it or a copy of it.
        grids: By the weights' names; they are given codes.
        files: The inputs, each a file of arrays by the graph's names.
        apart: Makes the float graph of the same model in which each expert has products of its own.

    Raises:
        UsageError: A file cannot be read, or does not fit the graph.
    """
    watched = {weight.name: _inputs_of(weight) for weight in weights}
    seen = {name: _Place(grids[name], 0, inputs) for name, inputs in watched.items() if inputs}
    tokens = _put_all(model, seen, files)
    blind = [name for name, inputs in watched.items() if not inputs]
    if blind and apart is not None:
        other = apart()
        stacked = _seen_apart(other, {name: grids[name] for name in blind})
        for places in stacked.values():
            tokens |= _put_all(other, places, files)
        blind = [name for name in blind if name not in stacked]
    return Calibration(tokens, tuple(blind))


def _put_all(model: ir.Model, places: Mapping[str, _Place], files: Sequence[Path]) -> dict[str, int]:
    """Round weights by what a graph multiplies them with; how many tokens each got."""
    tokens: dict[str, int] = {}
    with TemporaryDirectory(prefix="moe-export-") as folder:
        for group in _groups(places):
            moments = _moments(model, group, files, Path(folder, "watched.onnx"))
            for name, place in group.items():
                own = moments[name]
                tokens[name] = own.tokens
                if own.tokens:
                    _put(place, own)
    return tokens


def _seen_apart(model: ir.Model, grids: Mapping[str, Grid]) -> dict[str, dict[str, _Place]]:
    """Of stacks, those whose experts all have products of their own in a graph: by their elements."""
    known: dict[bytes, list[tuple[_Watched, ...]]] = defaultdict(list)
    for weight in find_weights(model, "*", whole=False)[0]:
        inputs = _inputs_of(weight)
        if inputs:
            array = weight.source.array()
            known[_elements(array if weight.axis == 0 else array.T)].append(inputs)
    found: dict[str, dict[str, _Place]] = {}
    for name, grid in grids.items():
        left = {key: list(inputs) for key, inputs in known.items()}
        places: dict[str, _Place] = {}
        for index in range(grid.count):
            same = left.get(_elements(grid.columns(index)))
            if not same:
                break
            # Of experts that are alike, each is another one, in the order that they stand in.
            inputs = same.pop(0) if len(same) > 1 else same[0]
            places[f"{name}[{index}]" if grid.count > 1 else name] = _Place(grid, index, inputs)
        if len(places) == grid.count:
            found[name] = places
    return found


def _elements(columns: Array) -> bytes:
    """What tells a weight (K, N) from others."""
    digest = hashlib.sha256(f"{columns.shape} {columns.dtype}".encode())
    digest.update(np.ascontiguousarray(columns).view(np.uint8).data)
    return digest.digest()


def _inputs_of(weight: Candidate) -> tuple[_Watched, ...]:
    """What a weight is multiplied with, by each of its products; nothing if one cannot be seen."""
    found = []
    for product in weight.products:
        place = next((at for at, value in enumerate(product.inputs) if value is weight.value), None)
        if product not in weight.readers or place != 1 or len(weight.value.shape or ()) != 2:
            return ()
        other = product.inputs[0]
        if product.graph is not weight.value.graph or other is None or other.is_initializer():
            return ()
        turned = product.op_type == "Gemm" and bool(product.attributes.get_int("transA", 0))
        found.append(_Watched(str(other.name), turned))
    return tuple(found)


def _groups(places: Mapping[str, _Place]) -> Iterator[dict[str, _Place]]:
    """Weights whose moments fit in the room, those with the same inputs in one group."""
    by_inputs: dict[tuple[_Watched, ...], dict[str, _Place]] = {}
    for name, place in places.items():
        by_inputs.setdefault(place.inputs, {})[name] = place
    group: dict[str, _Place] = {}
    taken = 0
    for own in by_inputs.values():
        size = 8 * next(iter(own.values())).grid.summed ** 2
        if group and taken + size > _ROOM:
            yield group
            group, taken = {}, 0
        group |= own
        taken += size
    if group:
        yield group


def _moments(
    model: ir.Model, group: Mapping[str, _Place], files: Sequence[Path], path: Path
) -> dict[str, Moments]:
    """The moments of each weight of a group; weights with the same inputs share them."""
    made = {place.inputs: Moments.none(place.grid.summed) for place in group.values()}
    names = {each.name for inputs in made for each in inputs}
    session = _ending_at(model, names, path)
    taken = [value.name for value in session.get_inputs()]
    for file in files:
        given = _read(file, taken)
        try:
            values = session.run(None, given)
        except Exception as error:  # of a class of its own for each status
            reason = " ".join(str(error).split())
            raise UsageError(f"--calibrate {file}: the graph does not run on it: {reason}") from error
        outputs = (value.name.removesuffix(_WIDE) for value in session.get_outputs())
        found = {**given, **dict(zip(outputs, values, strict=True))}
        for inputs, moments in made.items():
            for each in inputs:
                moments.add(_rows(found[each.name], turned=each.turned))
    return {name: made[place.inputs] for name, place in group.items()}


def _read(file: Path, names: Sequence[str]) -> dict[str, Array]:
    """The inputs in a file.

    Raises:
        UsageError: It cannot be read, or lacks one.
    """
    if not file.is_file():
        raise UsageError(f"no such file: {file}", hint="--calibrate FILE, seen from where the command runs")
    if file.suffix == ".npz":
        try:
            with np.load(file, allow_pickle=False) as held:
                found = {name: held[name] for name in names if name in held.files}
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {file} as npz: {error}") from error
    else:
        stored = open_weights(file)
        found = {name: stored[name].array() for name in names if name in stored}
    if missing := [name for name in names if name not in found]:
        raise UsageError(f"{file} lacks the input '{missing[0]}'", hint=f"the model takes {', '.join(names)}")
    return found


def _rows(array: Array, *, turned: bool) -> Array:
    rows = array.T if turned else array
    return rows.reshape(-1, rows.shape[-1])


def _ending_at(model: ir.Model, names: set[str], path: Path) -> Any:
    """A session of the float graph with these values, in float32, as its only outputs."""
    import onnxruntime

    copy = with_float32_kernels(model)
    given = {value.name for value in copy.graph.inputs}
    made = [value for node in copy.graph for value in node.outputs if value.name in names - given]
    copy.graph.outputs.clear()
    for value in made:
        wide = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}{_WIDE}")
        wide.outputs[0].name, wide.outputs[0].type = wide.name, ir.TensorType(ir.DataType.FLOAT)
        copy.graph.append(wide)
        copy.graph.outputs.append(wide.outputs[0])
    write_model(copy, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _put(place: _Place, moments: Moments) -> None:
    """Round a weight, and keep its codes."""
    grid = place.grid
    columns = grid.columns(place.index)
    found = rounded_with_feedback(columns, grid.scheme, moments, np_dtype(grid.scale_dtype))
    grid.keep(place.index, found)
