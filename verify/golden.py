"""Golden tensors: inputs and outputs of a run, in one safetensors file, for machines without that engine.

The tensors are called `3.in.x`, `3.out.y` and, of what the engine chose among scores, `3.ids.0` and `3.scores.0`;
3 is the number of the case. The metadata `moe_export.golden` is JSON:

    {"schema": "moe-export/golden/1", "engine": "torch", "about": {...}, "routing": [["idx", "weight", "scores"]],
     "dtypes": {"3.in.x": "bfloat16"}, "cases": [{"label": ..., "seed": ..., "sizes": {...}, "regime": ...}]}

Types that NumPy lacks are stored by their bits, under `dtypes`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_export.errors import UsageError
from moe_export.verify.inputs.cases import Case
from moe_export.verify.judging.replay import Choice
from moe_export.verify.runner import Runner
from moe_export.verify.specs import Array, RoutingPair, TensorSpec, numpy_dtype

SCHEMA = "moe-export/golden/1"
_KEY = "moe_export.golden"


@dataclass(frozen=True, eq=False)
class GoldenCase:
    """One recorded case: inputs, outputs, and the choices among scores."""

    case: Case
    outputs: Mapping[str, Array]
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, eq=False)
class Golden:
    """The contents of a golden file.

    Args:
        engine: What computed the outputs.
        cases: At least one.
        routing: Outputs that are expert ids, with weights and scores.
        about: Where it came from.
    """

    engine: str
    cases: tuple[GoldenCase, ...]
    routing: tuple[RoutingPair, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"golden {self.engine}"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs, with the sizes of the first case."""
        return tuple(
            TensorSpec(name, array.dtype.name, array.shape)
            for name, array in self.cases[0].case.inputs.items()
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(self.cases[0].outputs)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The stored outputs for stored inputs."""
        return dict(self.find(inputs).outputs)

    def run_watched(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], tuple[Choice, ...]]:
        """The same, with the choices."""
        stored = self.find(inputs)
        return dict(stored.outputs), stored.choices

    def find(self, inputs: Mapping[str, Array]) -> GoldenCase:
        """The case with these inputs.

        Raises:
            UsageError: There is none.
        """
        for stored in self.cases:
            own = stored.case.inputs
            if own is inputs or (own.keys() == inputs.keys() and all(_same(own[n], inputs[n]) for n in own)):
                return stored
        raise UsageError("the golden file holds no outputs for these inputs")


def _same(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


class Recorder:
    """Records the inputs and outputs of an engine, case by case."""

    def __init__(self) -> None:
        self.recorded: list[GoldenCase] = []
        self.engine = ""
        self.routing: tuple[RoutingPair, ...] = ()
        self._case: Case | None = None

    def watch(self, cases: Iterable[Case]) -> Iterator[Case]:
        """The same cases; the recorder notes which one is running."""
        for case in cases:
            self._case = case
            yield case

    def on(self, runner: Runner) -> Runner:
        """The same engine; its outputs are recorded, and its choices if it supports `run_watched`."""
        self.engine = runner.name
        return _Recorded(runner, self)

    def keep(self, outputs: Mapping[str, Array], choices: tuple[Choice, ...]) -> None:
        """Record the current case."""
        assert self._case is not None
        self.recorded.append(GoldenCase(self._case, outputs, choices))


def recorded(
    recorder: Recorder | None, runner: Runner, cases: Iterator[Case], routing: Sequence[RoutingPair] = ()
) -> tuple[Runner, Iterator[Case]]:
    """A reference and its cases, recorded; unchanged if there is no recorder.

    Args:
        recorder: Records inputs and outputs.
        runner: The reference.
        cases: What it will run.
        routing: Its outputs that are expert indices.
    """
    if recorder is None:
        return runner, cases
    recorder.routing = tuple(routing)
    return recorder.on(runner), recorder.watch(cases)


class _Recorded:
    def __init__(self, runner: Runner, recorder: Recorder) -> None:
        self.name, self._runner, self._recorder = runner.name, runner, recorder

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        watched = getattr(self._runner, "run_watched", None)
        outputs, choices = watched(inputs) if watched else (self._runner.run(inputs), ())
        self._recorder.keep(outputs, choices)
        return dict(outputs)


def save_golden(golden: Golden, path: Path) -> None:
    """Write a golden file.

    Raises:
        UsageError: There is nothing to write, or the file cannot be written.
    """
    from safetensors.numpy import save_file

    if not golden.cases:
        raise UsageError("there is nothing to record: no case ran")
    arrays: dict[str, Array] = {}
    for index, stored in enumerate(golden.cases):
        arrays |= {f"{index}.in.{name}": array for name, array in stored.case.inputs.items()}
        arrays |= {f"{index}.out.{name}": array for name, array in stored.outputs.items()}
        for number, choice in enumerate(stored.choices):
            arrays |= {f"{index}.ids.{number}": choice.ids, f"{index}.scores.{number}": choice.scores}
    dtypes = {name: array.dtype.name for name, array in arrays.items() if array.dtype.isbuiltin != 1}
    document = {
        "schema": SCHEMA,
        "engine": golden.engine,
        "about": dict(golden.about),
        "routing": [[pair.indices, pair.weights, pair.scores] for pair in golden.routing],
        "dtypes": dtypes,
        "cases": [_facts(stored.case) for stored in golden.cases],
    }
    bits = {
        name: np.ascontiguousarray(
            array.view(f"uint{8 * array.dtype.itemsize}") if name in dtypes else array
        ).reshape(array.shape)
        for name, array in arrays.items()
    }
    try:
        save_file(bits, path, {_KEY: json.dumps(document)})
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}") from None


def _facts(case: Case) -> dict[str, Any]:
    return {"label": case.label, "seed": case.seed, "sizes": dict(case.sizes), "regime": case.regime}


def load_golden(path: Path) -> Golden:
    """Read a golden file.

    Raises:
        UsageError: There is none, or it was not recorded by this tool.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UsageError(
            f"no such file: {path}", hint="moe-export verify model.py --record golden.safetensors makes one"
        )
    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(_KEY)
            arrays = {name: file.get_tensor(name) for name in file.keys()} if text else {}  # noqa: SIM118
        document = json.loads(text) if text else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is no safetensors file, or a damaged one: {error}") from None
    if document.get("schema") != SCHEMA:
        found = document.get("schema") or "no golden tensors"
        raise UsageError(
            f"{path} holds {found}, not {SCHEMA}",
            hint="record it again with this version; as inputs alone, give it as --input-file",
        )
    for name, dtype in document["dtypes"].items():
        arrays[name] = arrays[name].view(numpy_dtype(dtype))
    stored = tuple(_case(index, facts, arrays) for index, facts in enumerate(document["cases"]))
    pairs = tuple(RoutingPair(*names) for names in document["routing"])
    return Golden(document["engine"], stored, pairs, document["about"])


def _case(index: int, facts: Mapping[str, Any], arrays: Mapping[str, Array]) -> GoldenCase:
    inputs = _group(arrays, f"{index}.in.")
    ids, scores = _group(arrays, f"{index}.ids."), _group(arrays, f"{index}.scores.")
    for array in inputs.values():
        array.setflags(write=False)
    case = Case(facts["label"], facts["seed"], facts["sizes"], inputs, regime=facts["regime"])
    numbers = sorted(ids, key=int)
    choices = tuple(Choice(ids[number], scores[number]) for number in numbers)
    return GoldenCase(case, _group(arrays, f"{index}.out."), choices)


def _group(arrays: Mapping[str, Array], start: str) -> dict[str, Array]:
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def read_inputs(path: Path, names: Sequence[str]) -> dict[str, Array]:
    """One set of inputs from a `.safetensors` or an `.npz` file, whose tensors are called as the inputs are.

    Raises:
        UsageError: There is no such file, it cannot be read, or it lacks an input.
    """
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    kind = "npz" if path.suffix == ".npz" else "safetensors"
    try:
        found = _read_npz(path) if kind == "npz" else _read_safetensors(path)
    except Exception as error:  # a class of its own for each kind of damage
        raise UsageError(
            f"cannot read {path} as {kind}: {error}", hint="inputs come as .safetensors or as .npz"
        ) from None
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(
            f"{path} lacks the input '{missing[0]}'",
            hint=f"it holds {', '.join(found) or 'nothing'}; the model takes {', '.join(names)}",
        )
    return {name: found[name] for name in names}


def _read_npz(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _read_safetensors(path: Path) -> dict[str, Array]:
    """Every tensor; bfloat16, which the library reads only for PyTorch, from the bytes."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), memoryview(raw)[8 + size :]
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            array = np.frombuffer(data[start:end], numpy_dtype(_SAFETENSORS[entry["dtype"]]))
            found[name] = array.reshape(entry["shape"]).copy()
    return found


_SAFETENSORS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
