"""ONNX Runtime as an engine: quiet on machines without a GPU, strict about its inputs."""

from __future__ import annotations

import ctypes
import io
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from moe_export.errors import MissingBackendError, UsageError
from moe_export.external_data import check_external_data
from moe_export.verify.runner import NoMemoryError, RunFailedError
from moe_export.verify.runners.onnxruntime_errors import has_no_memory, is_no_model, reason_of
from moe_export.verify.specs import Array, TensorSpec, describe, numpy_dtype

_PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
# By default CUDA computes float32 products in TF32, whose 10 bits are too few for a router's logits.
_SETTINGS: dict[str, dict[str, str]] = {"CUDAExecutionProvider": {"use_tf32": "0"}}

# Names that ONNX Runtime gives to element types, where NumPy calls them otherwise.
_DTYPES = {
    "float": "float32",
    "double": "float64",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
}
# Types that NumPy lacks cross the border by their bits, under ONNX's number for the type.
_BITS = {"bfloat16": 16, "float8_e4m3fn": 17, "float8_e4m3fnuz": 18, "float8_e5m2": 19, "float8_e5m2fnuz": 20}
# DequantizeLinear and MatMul become one operator that rounds activations to 8 bits, unless a session asks for float32.
_EXACT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "1")
_FATAL = 4  # only fatal messages: errors arrive as exceptions, and a second copy on stderr helps nobody
_WARNING = 2  # ONNX Runtime's own default


class OnnxRuntimeRunner:
    """Run an ONNX model with ONNX Runtime.

    Args:
        model: Path of an `.onnx` file, or its bytes (which cannot have external data).
        provider: "cpu", "cuda" or "tensorrt". Asked for CUDA, it runs on CUDA or not at all; likewise TensorRT.
        arena: Whether memory on the CPU is kept between operators; without, a run takes longer and less of it.
        exact: Whether products with packed weights are computed in float32; without, as ONNX Runtime does by default,
            which on a CPU is faster and rounds activations to 8 bits.
        threads: How many compute an operator on the CPU; None for as many as it chooses, a core each.

    Attributes:
        name: "onnxruntime-cpu", "onnxruntime-cuda" or "onnxruntime-tensorrt".
        inputs: The inputs; an axis without a size or name is called `<input>_dim<axis>`.
        outputs: The outputs.
        elsewhere: What a GPU's provider left to the CPU, as "2 of 40 nodes: NonZero, Shape"; empty if nothing.

    Raises:
        UsageError: No such file, no ONNX model in it, or one that ONNX Runtime refuses, with its reason.
        MissingBackendError: CUDA or TensorRT was asked for and cannot be used here.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        provider: str = "cpu",
        *,
        arena: bool = True,
        exact: bool = True,
        threads: int | None = None,
    ) -> None:
        if provider not in _PROVIDERS:
            raise UsageError(
                f"unknown ONNX Runtime provider '{provider}'", hint=f"use {', '.join(_PROVIDERS)}"
            )
        self.name = f"onnxruntime-{provider}"
        self._where = "<bytes>" if isinstance(model, bytes) else str(model)
        self._session = _open(model, self._where, provider, arena, exact, threads)
        self.inputs = tuple(self._spec(node, "input") for node in self._session.get_inputs())
        self.outputs = tuple(self._spec(node, "output") for node in self._session.get_outputs())
        self.elsewhere = "" if provider == "cpu" else left_to_the_cpu(self._session)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once on arrays of exactly the input names, dtypes and sizes of the graph.

        Raises:
            UsageError: A name, dtype or size that the graph does not take; it says what the graph takes.
            RunFailedError: ONNX Runtime failed on the way, with its reason; a `NoMemoryError` for want of memory.
        """
        inputs = {name: np.asarray(array) for name, array in inputs.items()}  # a scalar may come as a number
        self._check(inputs)
        try:
            if any(spec.dtype in _BITS for spec in self.inputs + self.outputs):
                return self._run_values(inputs)
            names = [spec.name for spec in self.outputs]
            arrays = self._session.run(names, inputs, _quiet_run())
            return {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)}
        except Exception as error:  # ONNX Runtime raises a class of its own a status code
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> RunFailedError:
        if has_no_memory(error):
            return NoMemoryError(f"{self.name} ran out of memory: {reason_of(error)}", where=self._where)
        return RunFailedError(f"{self.name} failed: {reason_of(error)}", where=self._where)

    def value_of(self, array: Array, device: str) -> Any:
        """An array as onnxruntime's own value, on `cpu` or `cuda`."""
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device)

    def run_bound(
        self, inputs: Mapping[str, Array], kept: Mapping[str, Any], device: str, into: Mapping[str, Any] = {}
    ) -> dict[str, Any]:
        """Run once on arrays and on values of an earlier run; the results stay where onnxruntime has them.

        Args:
            inputs: Arrays, by the inputs' names.
            kept: Values, by the inputs' names.
            device: Where results are made: `cpu` or `cuda`.
            into: Values that results are written into, by the outputs' names; they may be some of `kept`.

        Source: https://onnxruntime.ai/docs/api/python/api_summary.html (IOBinding)

        Raises:
            RunFailedError: ONNX Runtime failed on the way, with its reason; a `NoMemoryError` for want of memory.
        """
        binding = self._session.io_binding()
        # A value on the CPU is the memory of its array, which only the value keeps alive: they are held until the end.
        values = {**{name: self.value_of(array, device) for name, array in inputs.items()}, **kept}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for spec in self.outputs:
            if spec.name in into:
                binding.bind_ortvalue_output(spec.name, into[spec.name])
            else:
                binding.bind_output(spec.name, device)
        try:
            self._session.run_with_iobinding(binding, _quiet_run())
        except Exception as error:
            raise self._failed(error) from error
        # An output names the memory of a value that it was written into, and does not keep it alive: the value does.
        made = {spec.name: value for spec, value in zip(self.outputs, binding.get_outputs(), strict=True)}
        return {**made, **into}

    def _run_values(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        values = {spec.name: _to_value(inputs[spec.name], spec.dtype) for spec in self.inputs}
        names = [spec.name for spec in self.outputs]
        results = self._session.run_with_ort_values(names, values, _quiet_run())
        return {
            spec.name: _to_array(value, spec.dtype) for spec, value in zip(self.outputs, results, strict=True)
        }

    def _spec(self, node: Any, role: str) -> TensorSpec:
        match = re.fullmatch(r"tensor\((\w+)\)", node.type)
        if match is None:
            raise UsageError(
                f"{role} '{node.name}' is a {node.type}; only tensors can be compared", where=self._where
            )
        shape = (f"{node.name}_dim{axis}" if size is None else size for axis, size in enumerate(node.shape))
        return TensorSpec(node.name, _DTYPES.get(match[1], match[1]), tuple(shape))

    def _check(self, inputs: Mapping[str, Array]) -> None:
        expected = "the graph takes " + ("; ".join(map(str, self.inputs)) or "no inputs")
        wanted = {spec.name for spec in self.inputs}
        problems = [f"input '{name}' is missing" for name in sorted(wanted - inputs.keys())]
        problems += [f"unexpected input '{name}'" for name in sorted(inputs.keys() - wanted)]
        for spec in self.inputs:
            if spec.name in inputs and not _fits(inputs[spec.name], spec):
                problems.append(f"input '{spec.name}' is {describe(inputs[spec.name])}")
        if problems:
            raise UsageError(f"{'; '.join(problems)}; {expected}", where=self._where)


def left_to_the_cpu(session: Any) -> str:
    """Which nodes of an open session run on the CPU, counted by operator: "2 of 40 nodes: NonZero, Shape".

    ONNX Runtime silently falls back to the CPU for nodes that a provider cannot run; sizes stay there on purpose.

    Args:
        session: Opened with `record_placement`.

    Returns:
        Empty if there are none.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return "an unknown number of nodes (onnxruntime 1.24 and newer tell)"
    placed = session.get_provider_graph_assignment_info()
    nodes = [(part.ep_name, node.op_type) for part in placed for node in part.get_nodes()]
    left = Counter(operator for provider, operator in nodes if provider == "CPUExecutionProvider")
    named = ", ".join(
        f"{operator} ({count})" if count > 1 else operator for operator, count in sorted(left.items())
    )
    return f"{left.total()} of {len(nodes)} nodes: {named}" if left else ""


def record_placement(options: Any) -> None:
    """Have a session remember which provider took which node."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def specs_of(values: Any) -> tuple[TensorSpec, ...]:
    """The specs of a graph's inputs or outputs, as the ONNX file declares them."""
    from onnx import helper

    found = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape = tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_dim{axis}"
            for axis, dim in enumerate(tensor.shape.dim)
        )
        found.append(TensorSpec(value.name, dtype, shape))
    return tuple(found)


def _fits(array: Array, spec: TensorSpec) -> bool:
    if array.dtype.name != spec.dtype:
        return False
    if not spec.shape:  # a scalar, or a rank that the graph leaves open: a session shows both as []
        return True
    sizes = zip(spec.shape, array.shape, strict=False)
    return len(spec.shape) == array.ndim and all(isinstance(w, str) or w == got for w, got in sizes)


def _open(
    model: str | Path | bytes, where: str, provider: str, arena: bool, exact: bool, threads: int | None
) -> Any:
    import onnxruntime as ort

    if not isinstance(model, bytes) and not Path(model).is_file():
        raise UsageError(f"no such file: {where}", hint="give the path of an .onnx file")
    if _PROVIDERS[provider][0] not in ort.get_available_providers():
        raise MissingBackendError(f"this ONNX Runtime has no {provider} provider", hint=_how_to_have_it())
    if not isinstance(model, bytes):
        check_external_data(model)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.enable_cpu_mem_arena = arena
    if threads is not None:
        options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry(*_EXACT_PRODUCTS)
    if provider != "cpu":
        record_placement(options)
    ort.set_default_logger_severity(_FATAL)  # loading a provider logs there, not to the session
    try:
        source = model if isinstance(model, bytes) else str(model)
        with redirect_stdout(io.StringIO()):  # it prints which provider, and which library, it could not load
            if provider != "cpu" and hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # CUDA's libraries in packages (nvidia-*) are not where a loader looks
            session = ort.InferenceSession(
                source,
                options,
                providers=_PROVIDERS[provider],
                provider_options=[_SETTINGS.get(name, {}) for name in _PROVIDERS[provider]],
            )
    except Exception as error:
        raise _unreadable(error, where) from error
    finally:
        ort.set_default_logger_severity(_WARNING)
    if _PROVIDERS[provider][0] not in session.get_providers():  # it falls back to the CPU without a word
        raise MissingBackendError(
            f"ONNX Runtime cannot use {provider} here: it fell back to {session.get_providers()[0]}",
            hint="check the driver, and that onnxruntime-gpu finds the CUDA and cuDNN libraries it wants",
        )
    return session


def _how_to_have_it() -> str:
    """Both packages have the import name `onnxruntime`, so the one that was installed last is there, in part."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    if len(found) == 2:
        return (
            f"{' and '.join(found)} are both installed, and overwrite each other: uninstall both, "
            "then install onnxruntime-gpu alone"
        )
    return "install onnxruntime-gpu, in the place of onnxruntime"


def _unreadable(error: Exception, where: str) -> UsageError:
    if is_no_model(error):
        return UsageError("not an ONNX model, or a truncated one", where=where, hint="export it again")
    return UsageError(f"ONNX Runtime refuses the model: {reason_of(error)}", where=where)


def _quiet_run() -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = _FATAL
    return options


def _to_value(array: Array, dtype: str) -> Any:
    import onnxruntime as ort

    contiguous = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray turns () into (1,)
    if dtype not in _BITS:
        return ort.OrtValue.ortvalue_from_numpy(contiguous)
    bits = contiguous.view(f"uint{8 * contiguous.dtype.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BITS[dtype])


def _to_array(value: Any, dtype: str) -> Array:
    if dtype not in _BITS:
        return np.array(value.numpy())
    kind, shape = numpy_dtype(dtype), tuple(value.shape())
    size = int(np.prod(shape)) * kind.itemsize
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""  # OrtValue.numpy() knows no bfloat16
    return np.frombuffer(raw, dtype=kind).reshape(shape).copy()
