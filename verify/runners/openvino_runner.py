"""OpenVINO as an engine, on the CPU: a second opinion on a graph that ONNX Runtime has run.

It computes in float32 where the graph says so (by default it may choose bfloat16), and half precision in float32,
rounded where a value goes out. Sizes stay free: a model is compiled once, whatever sizes it is run at. int64 is
computed as int32 and float64 as float32; integers that int32 does not hold are refused here rather than cut off.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_export.errors import MissingBackendError, UsageError
from moe_export.external_data import check_external_data
from moe_export.verify.runner import RunFailedError
from moe_export.verify.runners.onnxruntime_runner import specs_of
from moe_export.verify.runners.openvino_errors import (
    hint_for,
    is_no_model,
    miscomputed,
    nodes_of,
    place_of,
    reason_of,
)
from moe_export.verify.specs import Array, TensorSpec, describe, numpy_dtype

# What NumPy lacks crosses the border by its bits, under OpenVINO's name for the type.
_BITS = {"bfloat16": "bf16", "float8_e4m3fn": "f8e4m3", "float8_e5m2": "f8e5m2"}
_NAMES = {theirs: ours for ours, theirs in _BITS.items()}
_CONFIGURATION = {
    "INFERENCE_PRECISION_HINT": "f32",
    "EXECUTION_MODE_HINT": "ACCURACY",  # or it may quantize what a product reads
    "PERFORMANCE_HINT": "LATENCY",
    "ENABLE_CPU_PINNING": False,  # on a machine that others use, a thread bound to a busy core takes twice as long
}
_WIDE = ("int64", "uint64", "uint32")


class OpenVinoRunner:
    """Run an ONNX model with OpenVINO on the CPU.

    Args:
        model: Path of an `.onnx` file, or its bytes (which cannot have external data).
        threads: How many it computes with; None for as many as it chooses, a core each.

    Attributes:
        inputs: The inputs; an axis without a size or name is called `<input>_dim<axis>`.
        outputs: The outputs.

    Raises:
        UsageError: No such file, no ONNX model in it, or one that OpenVINO refuses, with its reason, the node and
            the model's line.
        MissingBackendError: OpenVINO is not installed.
    """

    name = "openvino"

    def __init__(self, model: str | Path | bytes, *, threads: int | None = None) -> None:
        self._where = "<bytes>" if isinstance(model, bytes) else str(model)
        core = _core()
        proto = _read(model, self._where)
        self._graph = proto.graph
        wrong = miscomputed(proto.graph)
        if wrong is not None:
            node, why, hint = wrong
            raise UsageError(why, where=f"{self._where}: {place_of(node)}", hint=hint)
        asked = _CONFIGURATION if threads is None else {**_CONFIGURATION, "INFERENCE_NUM_THREADS": threads}
        try:
            source = model if isinstance(model, bytes) else str(model)
            self._compiled: Any = core.compile_model(core.read_model(source), "CPU", asked)
        except Exception as error:  # OpenVINO raises RuntimeError, whatever it is
            raise self._refused(error) from error
        held = {tensor.name for tensor in proto.graph.initializer}
        self.inputs = specs_of([value for value in proto.graph.input if value.name not in held])
        self.outputs = specs_of(proto.graph.output)
        self._request: Any = self._compiled.create_infer_request()
        # An input that nothing reads is gone from the compiled model.
        self._taken = {name: port for port in self._compiled.inputs for name in port.get_names()}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Raises:
            UsageError: An input is missing, or of another dtype or rank.
            RunFailedError: OpenVINO failed on the way, with its reason, the node and the model's line; or an integer
                is too large for it.
        """
        arrays = {spec.name: self._checked(spec, inputs) for spec in self.inputs}
        given = {port: _to_tensor(arrays[name]) for name, port in self._taken.items() if name in arrays}
        try:
            self._request.infer(given, share_inputs=True)
            found = [self._request.get_output_tensor(place) for place in range(len(self.outputs))]
            pairs = zip(self.outputs, found, strict=True)
            return {spec.name: _to_array(tensor, spec.dtype) for spec, tensor in pairs}
        except Exception as error:
            raise RunFailedError(
                f"openvino failed: {reason_of(error)}", where=self._place(error, self._made_from)
            ) from error

    def _checked(self, spec: TensorSpec, inputs: Mapping[str, Array]) -> Array:
        found = inputs.get(spec.name)
        array = None if found is None else np.asarray(found)  # a scalar may come as a number
        if array is None or array.dtype.name != spec.dtype or array.ndim != len(spec.shape):
            got = "missing" if array is None else describe(array)
            raise UsageError(f"input '{spec.name}' is {got}; the graph takes {spec}", where=self._where)
        if spec.dtype in _WIDE and array.size and not _fits_int32(array):
            raise RunFailedError(
                f"openvino computes {spec.dtype} as int32, which does not hold {spec.name}'s values",
                where=self._where,
            )
        return array

    def _refused(self, error: Exception) -> UsageError:
        if is_no_model(error):
            return UsageError(
                "not an ONNX model, or a truncated one", where=self._where, hint="export it again"
            )
        return UsageError(
            f"OpenVINO refuses the model: {reason_of(error)}", where=self._place(error), hint=hint_for(error)
        )

    def _place(self, error: Exception, *made_from: Any) -> str:
        """The file, and the node with its line, where the message names one."""
        nodes = nodes_of(error, self._graph, *made_from)
        return ": ".join([self._where, *(place_of(node) for node in nodes[:1])])

    def _made_from(self, name: str) -> list[str]:
        """Names of the nodes that one of the compiled model was made from."""
        for node in self._compiled.get_runtime_model().get_ops():
            if node.get_friendly_name() == name:
                return str(node.get_rt_info()["originalLayersNames"].astype(str)).split(",")
        return []


def run_part(model: Any, inputs: Mapping[str, Any], level: str) -> list[Array]:
    """Run a part of a graph, whose outputs need no types.

    Args:
        model: An `onnx.ModelProto`.
        inputs: Its inputs, by name.
        level: Nothing: OpenVINO always optimises.

    Raises:
        Exception: OpenVINO refuses the part, or fails.
    """
    core = _core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", _CONFIGURATION)
    given = {
        port: _to_tensor(inputs[name])
        for port in compiled.inputs
        for name in port.get_names()
        if name in inputs
    }
    request = compiled.create_infer_request()
    request.infer(given, share_inputs=True)
    found = [request.get_output_tensor(place) for place in range(len(model.graph.output))]
    return [_to_array(tensor, _NAMES.get(str(tensor.element_type.get_type_name()), "")) for tensor in found]


def _core() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingBackendError(
            "OpenVINO is not installed", hint="pip install 'moe-export[openvino]'"
        ) from error
    return openvino.Core()


def _read(model: str | Path | bytes, where: str) -> Any:
    """The graph's inputs, outputs and nodes, without weights that are stored beside it."""
    import onnx

    if not isinstance(model, bytes):
        if not Path(model).is_file():
            raise UsageError(f"no such file: {where}", hint="give the path of an .onnx file")
        check_external_data(model)
    try:
        source = io.BytesIO(model) if isinstance(model, bytes) else str(model)
        proto = onnx.load(source, load_external_data=False)
    except Exception as error:
        raise UsageError(
            "not an ONNX model, or a truncated one", where=where, hint="export it again"
        ) from error
    if not proto.graph.node and not proto.graph.output:
        raise UsageError("not an ONNX model, or a truncated one", where=where, hint="export it again")
    return proto


def _fits_int32(array: Array) -> bool:
    limits = np.iinfo(np.int32)
    return bool(array.min() >= limits.min and array.max() <= limits.max)


def _to_tensor(array: Array) -> Any:
    import openvino

    contiguous = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray turns () into (1,)
    if array.dtype.name not in _BITS:
        return openvino.Tensor(contiguous)
    bits = contiguous.view(f"uint{8 * array.dtype.itemsize}")
    return openvino.Tensor(bits, list(array.shape), getattr(openvino.Type, _BITS[array.dtype.name]))


def _to_array(tensor: Any, dtype: str) -> Array:
    """A copy: the next run writes into the same memory."""
    shape = tuple(tensor.shape)
    if dtype not in _BITS:
        return np.array(tensor.data).reshape(shape)
    kind = numpy_dtype(dtype)
    return np.frombuffer(tensor.data.tobytes(), kind).reshape(shape).copy()
