"""The stage: a graph whose weights are packed, and the graph in float that it must compute the same as."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from moe_export.errors import UsageError
from moe_export.export.onnx.recipes import has_recipes
from moe_export.export.quantize.calibrate import Calibration, calibrate
from moe_export.export.quantize.find import Left, find_weights
from moe_export.export.quantize.packed import Grid, values_of
from moe_export.export.quantize.qmoe import split_moe
from moe_export.export.quantize.scheme import Scheme
from moe_export.export.quantize.write import Writer
from moe_export.export.weights.recipe import RecipeTensor, recipe_of

_FEW = 3
"""Weights that are named of those that are left in float; the others are counted."""


@dataclass(frozen=True)
class Packed:
    """One weight that was packed.

    Attributes:
        name: Of the initializer in the float graph.
        kind: `experts`, `linear`, ... (`find.Kind`).
        grid: The weight and its grid.
    """

    name: str
    kind: str
    grid: Grid

    @property
    def before(self) -> int:
        """Bytes as float."""
        return self.grid.source.nbytes


@dataclass(frozen=True)
class Quantized:
    """What became of a graph.

    Attributes:
        model: The graph with packed weights.
        floats: The graph as it was.
        exact: The same with the weights that the packed ones stand for: what `model` must compute.
        scheme: How weights are packed.
        weights: Those that are.
        left: Those that were asked for and are not.
        others: How many others could be, where none of those that were asked for was found.
        calibration: What rounding knew of inputs; None if nothing.
    """

    model: ir.Model
    floats: ir.Model
    exact: ir.Model
    scheme: Scheme
    weights: tuple[Packed, ...]
    left: tuple[Left, ...]
    others: int = 0
    calibration: Calibration | None = None

    def notes(self) -> tuple[str, ...]:
        """Lines for the report."""
        if not self.weights:
            others = f"; --quantize all would pack {self.others}" if self.others else ""
            return (
                f"{self.scheme.packing}: no weight of what was asked for was found{others}",
                *self._left(),
            )
        added = set(self.model.graph.initializers) - set(self.floats.graph.initializers)
        after = sum(_bytes(self.model.graph.initializers[name]) for name in added)
        before = sum(weight.before for weight in self.weights)
        kinds = " and ".join(dict.fromkeys(weight.kind for weight in self.weights))
        count = f"{len(self.weights)} weight{'s' * (len(self.weights) > 1)} of {kinds}"
        sizes = f"{before / 2**20:,.2f} → {after / 2**20:,.2f} MiB"
        opset = self.model.opset_imports[""]
        known = self.calibration.notes() if self.calibration is not None else ()
        return (f"{count} in {self.scheme}: {sizes} (opset {opset})", *self._left(), *known)

    def _left(self) -> tuple[str, ...]:
        reasons: dict[str, list[str]] = defaultdict(list)
        for one in self.left:
            reasons[one.reason].append(one.name)
        return tuple(
            f"left in float, {reason}: {', '.join(names[:_FEW])}"
            + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")
            for reason, names in reasons.items()
        )


def _bytes(value: ir.Value) -> int:
    recipe = recipe_of(value)
    if recipe is not None:
        return recipe.nbytes
    return value.const_value.nbytes if value.const_value is not None else 0


def quantize(
    model: ir.Model,
    scheme: Scheme,
    asked: str,
    *,
    whole: bool = True,
    files: Sequence[Path] = (),
    apart: Callable[[], ir.Model] | None = None,
) -> Quantized:
    """Pack weights of a graph.

    Args:
        model: The graph; it is not changed.
        scheme: How.
        asked: Which, as for `find_weights`.
        whole: Whether the graph is that of the whole model, so that each pattern matches a weight of it.
        files: Inputs that rounding goes by, for as many weights as they reach.
        apart: Makes the float graph with a product for each expert, where stacked ones are seen one by one.

    Raises:
        UsageError: The opset is too low, a pattern matches no weight, or a file is none of inputs.
        NotExportableError: A weight has no packed form where it stands.
    """
    if model.opset_imports[""] < scheme.opset:
        raise UsageError(
            f"{scheme} has no operator in opset {model.opset_imports['']}", hint=f"--opset {scheme.opset}"
        )
    packed = model.clone()
    found, left = find_weights(packed, asked, whole=whole)
    found, more = split_moe(found, scheme)
    left += more
    grids = {weight.name: Grid(weight.source, weight.axis, scheme) for weight in found}
    calibration = calibrate(model, found, grids, files, apart) if files and found else None
    writer = Writer(packed, streamed=has_recipes(model))
    weights = tuple(Packed(weight.name, weight.kind, grids[weight.name]) for weight in found)
    for weight in found:
        writer.put(weight, grids[weight.name])
    others = len(split_moe(find_weights(packed, "all")[0], scheme)[0]) if not found else 0
    return Quantized(packed, model, _exact(model, weights), scheme, weights, tuple(left), others, calibration)


def _exact(model: ir.Model, weights: Sequence[Packed]) -> ir.Model:
    """The float graph with what the packed weights stand for, computed from the weights anew."""
    copy = model.clone()
    for weight in weights:
        value = copy.graph.initializers[weight.name]
        value.const_value = RecipeTensor(values_of(weight.grid), weight.name)
    return copy
