"""The ONNX project's own evaluator as an engine: slow, in NumPy, and what the operators are defined by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_export.errors import UsageError
from moe_export.external_data import check_external_data
from moe_export.verify.runner import RunFailedError, one_line
from moe_export.verify.runners.onnxruntime_runner import specs_of
from moe_export.verify.specs import Array


class OnnxReferenceRunner:
    """Run an ONNX model with `onnx.reference`.

    Args:
        model: Path of an `.onnx` file.

    Attributes:
        inputs: The inputs.
        outputs: The outputs.

    Raises:
        UsageError: No such file, or no model in it that the evaluator takes.
    """

    name = "onnx-reference"

    def __init__(self, model: str | Path) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        self._where = str(model)
        if not Path(model).is_file():
            raise UsageError(f"no such file: {model}", hint="give the path of an .onnx file")
        check_external_data(model)
        try:
            proto = onnx.load(model)
            self._evaluator: Any = ReferenceEvaluator(proto)
        except Exception as error:  # a class of its own for every kind of file that is no model
            raise UsageError(
                f"onnx.reference refuses the model: {one_line(error)}", where=self._where
            ) from error
        held = {tensor.name for tensor in proto.graph.initializer}
        self.inputs = specs_of([value for value in proto.graph.input if value.name not in held])
        self.outputs = specs_of(proto.graph.output)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Raises:
            UsageError: An input is missing, or of another dtype.
            RunFailedError: The evaluator failed.
        """
        for spec in self.inputs:
            array = inputs.get(spec.name)
            if array is None or array.dtype.name != spec.dtype:
                found = "missing" if array is None else array.dtype.name
                raise UsageError(f"input '{spec.name}' is {found}; the graph takes {spec}", where=self._where)
        try:
            with np.errstate(all="ignore"):
                found = self._evaluator.run(None, {spec.name: inputs[spec.name] for spec in self.inputs})
        except Exception as error:
            raise RunFailedError(f"{self.name} failed: {one_line(error)}", where=self._where) from error
        return {spec.name: np.asarray(array) for spec, array in zip(self.outputs, found, strict=True)}
