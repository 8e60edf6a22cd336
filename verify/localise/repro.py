"""A fault as a self-contained folder: a small model, its inputs, the expected outputs, and a script.

The script needs onnxruntime and NumPy, and exits with 1 as long as the fault is there.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from moe_export.own_files import KEY, MARK
from moe_export.verify.judging.tolerance import DEFAULTS
from moe_export.verify.localise.level import Cut, Value
from moe_export.verify.specs import Array, is_float

MODEL, INPUTS, EXPECTED, SCRIPT = "model.onnx", "inputs.npz", "expected.npz", "run.py"

_SCRIPT = '''# {mark}
"""{title}

{about}
Run it: exit code 1 as long as the fault is there. It needs numpy and onnxruntime.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

RTOL = {rtol}
LEVEL = onnxruntime.GraphOptimizationLevel.{level}

here = Path(__file__).resolve().parent
options = onnxruntime.SessionOptions()
options.graph_optimization_level = LEVEL
options.log_severity_level = 4
inputs, expected = dict(np.load(here / "{inputs}")), dict(np.load(here / "{expected}"))
try:
    session = onnxruntime.InferenceSession(
        (here / "{model}").read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    found = dict(zip(expected, session.run(list(expected), inputs)))
except Exception as error:
    sys.exit(f"it fails: {{error}}")

faults = 0
for name, right in expected.items():
    got, rtol = found[name], RTOL[name]
    if got.shape != right.shape or got.dtype != right.dtype:
        print(f"{{name}}: {{got.dtype}}{{list(got.shape)}}, expected {{right.dtype}}{{list(right.shape)}}")
        faults += 1
        continue
    got, right = got.astype(np.float64), right.astype(np.float64)
    finite = np.isfinite(right)
    size = np.sqrt(np.mean(np.square(right[finite]))) if finite.any() else 0.0
    wrong = ~np.isclose(got, right, rtol=rtol, atol=rtol * size, equal_nan=True)
    with np.errstate(invalid="ignore"):
        largest = np.nanmax(np.abs(got - right), initial=0.0)
    print(f"{{name}}: {{wrong.sum()}} of {{wrong.size}} elements are wrong, largest difference {{largest:.3g}}")
    faults += bool(wrong.any())
sys.exit(1 if faults else 0)
'''
_LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


def write_repro(
    folder: Path, cut: Cut, about: str, *, level: str = "none", rtols: Mapping[str, float] | None = None
) -> list[Path]:
    """Write the folder.

    Args:
        folder: Created if missing; files of the same names are replaced.
        cut: The model, its inputs, and the expected outputs.
        about: What is wrong, for the script's first lines.
        level: How far onnxruntime must optimise the model for the fault to show.
        rtols: Tolerance of an output, relative to its size; by its dtype if it is not here.

    Returns:
        The files.

    Raises:
        ValueError: An input is a sequence, which these files cannot hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, inputs, expected = _plain(cut)
    tolerances = {
        name: (rtols or {}).get(name, _rtol(array))
        for name, array in zip(expected, cut.expected.values(), strict=True)
    }
    model.metadata_props.add(key=f"{KEY}repro", value=MODEL)
    onnx.save(model, folder / MODEL)
    _save(folder / INPUTS, inputs)
    _save(folder / EXPECTED, expected)
    title, _, rest = about.replace("\\", "/").replace('"""', "'''").partition("\n")
    text = _SCRIPT.format(
        mark=MARK,
        title=title,
        about=rest + "\n" if rest else "",
        rtol=json.dumps(tolerances),
        level=_LEVELS[level],
        inputs=INPUTS,
        expected=EXPECTED,
        model=MODEL,
    )
    (folder / SCRIPT).write_text(text, encoding="utf-8")
    return [folder / name for name in (SCRIPT, MODEL, INPUTS, EXPECTED)]


def _save(path: Path, arrays: Mapping[str, Array]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = MARK.encode()


def _rtol(value: Value) -> float:
    if isinstance(value, list) or not is_float(value.dtype):
        return 0.0
    return DEFAULTS.get(value.dtype.name, DEFAULTS["float32"]).rtol


def _plain(cut: Cut) -> tuple[onnx.ModelProto, dict[str, Array], dict[str, Array]]:
    """The model with float32 in place of the types that NumPy's files lack, cast at its border."""
    model = onnx.ModelProto()
    model.CopyFrom(cut.model)
    inputs, expected = _arrays(cut.inputs), _arrays(cut.expected)
    for value in model.graph.input:
        if inputs[value.name].dtype.isbuiltin != 1:
            name, element = value.name, value.type.tensor_type.elem_type
            inputs[f"{name}_wide"] = inputs.pop(name).astype(np.float32)
            value.name, value.type.tensor_type.elem_type = f"{name}_wide", onnx.TensorProto.FLOAT
            cast = onnx.helper.make_node("Cast", [f"{name}_wide"], [name], to=element)
            model.graph.node.insert(0, cast)
    for value in model.graph.output:
        if expected[value.name].dtype.isbuiltin != 1:
            name = value.name
            expected = {
                f"{key}_wide" if key == name else key: array.astype(np.float32) if key == name else array
                for key, array in expected.items()
            }
            value.name, value.type.tensor_type.elem_type = f"{name}_wide", onnx.TensorProto.FLOAT
            model.graph.node.append(
                onnx.helper.make_node("Cast", [name], [f"{name}_wide"], to=onnx.TensorProto.FLOAT)
            )
    return model, inputs, expected


def _arrays(values: Mapping[str, Value]) -> dict[str, Array]:
    if any(isinstance(value, list) for value in values.values()):
        raise ValueError("a sequence cannot be stored")
    return {name: value for name, value in values.items() if not isinstance(value, list)}
