"""Read `parallel.json`: which graphs the ranks run, and what they exchange between them.

Every error names the field in which it was found. docs/parallel.md documents the fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moe_export.errors import UsageError
from moe_export.verify.specs import DimRange, TensorSpec

SCHEMA = "moe-export/parallel/1"
KINDS = ("all_reduce", "all_to_all")


@dataclass(frozen=True)
class Layer:
    """A block of experts.

    Attributes:
        module: Its path in the model.
        experts: How many.
        slots: Choices of a token.
        placement: The rank of each expert.
    """

    module: str
    experts: int
    slots: int
    placement: tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """What all ranks exchange at one place.

    Attributes:
        kind: One of `KINDS`.
        layer: Of the experts that it is for.
        after: The stage behind which it happens.
        back: Whether rows go back to their tokens.
        capacity: Rows for each rank, if that is fixed.
        row_bytes: Of each value, the bytes of one row.
        rows: Of each value, the size of its first axis, as an expression of dimensions; None if the data decide.
    """

    kind: str
    layer: int
    after: int
    back: bool
    capacity: int | None
    row_bytes: tuple[int, ...]
    rows: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Names:
    """The names in one rank's graphs of the values of an exchange; see `Exchange`."""

    sends: tuple[str, ...]
    gives: tuple[str, ...]
    counts: str | None
    counted: str | None


@dataclass(frozen=True)
class RankFiles:
    """The graphs of one rank.

    Attributes:
        rank: Which.
        experts: For each layer, its experts.
        stages: Files, in order.
        names: For each exchange.
        bytes: Of weights.
        expert_bytes: Of the experts' weights.
    """

    rank: int
    experts: tuple[tuple[int, ...], ...]
    stages: tuple[Path, ...]
    names: tuple[Names, ...]
    bytes: int
    expert_bytes: int


@dataclass(frozen=True)
class Manifest:
    """All of it.

    Attributes:
        path: Of the manifest.
        ranks: How many.
        exchange: One of `KINDS`.
        capacity: Rows for each rank, if that is fixed.
        in_graph: Whether the graphs hold collectives of an engine's own.
        whole: The whole model's graph; None if there is none.
        example: Example inputs (`.safetensors`); None if there are none.
        inputs, outputs: Of the model.
        dims: Its dimensions.
        layers: Its blocks of experts.
        exchanges: In order.
        graphs: Of each rank.
    """

    path: Path
    ranks: int
    exchange: str
    capacity: int | None
    in_graph: bool
    whole: Path | None
    example: Path | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: tuple[DimRange, ...]
    layers: tuple[Layer, ...]
    exchanges: tuple[Exchange, ...]
    graphs: tuple[RankFiles, ...]


def find_manifest(place: str | Path) -> Path:
    """A manifest, or the one in a folder.

    Raises:
        UsageError: There is none, or there are several.
    """
    path = Path(place)
    if not path.is_dir():
        return path
    found = sorted(path.glob("*parallel.json"))
    if len(found) != 1:
        names = ", ".join(one.name for one in found)
        raise UsageError(
            f"{path} holds {len(found)} manifests" + (f": {names}" if found else ""),
            hint="moe-export model.py --expert-parallel 4 -o FOLDER writes one; name the one that is meant",
        )
    return found[0]


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check it.

    Raises:
        UsageError: It cannot be read, or a field is missing or is not what it must be; names the field.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {error}") from None
    return _Reader(path).read(document)


class _Reader:
    """Reads the fields of one manifest."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, document: Any) -> Manifest:
        top = self._object(document, "")
        if top.get("schema") != SCHEMA:
            self._wrong("schema", f"is {top.get('schema')!r}, and this reads {SCHEMA!r}")
        ranks = self._number(top, "ranks", "", least=1)
        exchanges = tuple(
            self._exchange(item, f"exchanges[{number}]")
            for number, item in enumerate(self._list(top, "exchanges", ""))
        )
        layers = tuple(
            self._layer(item, f"layers[{number}]", ranks)
            for number, item in enumerate(self._list(top, "layers", ""))
        )
        graphs = self._list(top, "graphs", "")
        if len(graphs) != ranks:
            self._wrong("graphs", f"has {len(graphs)} entries, and there are {ranks} ranks")
        for number, exchange in enumerate(exchanges):
            if exchange.layer >= len(layers):
                self._wrong(f"exchanges[{number}].layer", f"is {exchange.layer} of {len(layers)} layers")
        return Manifest(
            path=self._path,
            ranks=ranks,
            exchange=self._one_of(top, "exchange", "", KINDS),
            capacity=self._optional_number(top, "capacity", ""),
            in_graph=self._one_of(top, "collectives", "", ("runner", "graph")) == "graph",
            whole=self._file(top, "whole"),
            example=self._file(top, "example"),
            inputs=self._specs(top, "inputs"),
            outputs=self._specs(top, "outputs"),
            dims=tuple(
                self._dim(item, f"dims[{number}]") for number, item in enumerate(self._list(top, "dims", ""))
            ),
            layers=layers,
            exchanges=exchanges,
            graphs=tuple(
                self._graph(item, f"graphs[{rank}]", rank, exchanges, len(layers))
                for rank, item in enumerate(graphs)
            ),
        )

    def _layer(self, item: Any, where: str, ranks: int) -> Layer:
        found = self._object(item, where)
        experts = self._number(found, "experts", where, least=1)
        placement = tuple(self._numbers(found, "placement", where))
        if len(placement) != experts or any(not 0 <= rank < ranks for rank in placement):
            self._wrong(f"{where}.placement", f"is not {experts} numbers of ranks, 0 to {ranks - 1}")
        slots = self._number(found, "slots", where, least=1)
        return Layer(self._text(found, "module", where), experts, slots, placement)

    def _exchange(self, item: Any, where: str) -> Exchange:
        found = self._object(item, where)
        values = [
            self._object(value, f"{where}.values[{number}]")
            for number, value in enumerate(self._list(found, "values", where))
        ]
        return Exchange(
            kind=self._one_of(found, "kind", where, KINDS),
            layer=self._number(found, "layer", where),
            after=self._number(found, "after", where),
            back=bool(found.get("back")),
            capacity=self._optional_number(found, "capacity", where),
            row_bytes=tuple(
                self._number(value, "bytes_per_row", f"{where}.values[{number}]", least=1)
                for number, value in enumerate(values)
            ),
            rows=tuple((value.get("shape") or [None])[0] for value in values),
        )

    def _graph(
        self, item: Any, where: str, rank: int, exchanges: Sequence[Exchange], layers: int
    ) -> RankFiles:
        found = self._object(item, where)
        stages = [self._path.parent / str(name) for name in self._list(found, "stages", where)]
        for number, stage in enumerate(stages):
            if not stage.is_file():
                self._wrong(f"{where}.stages[{number}]", f"is {stage.name}, which is not there")
        names = [
            self._names(one, f"{where}.exchanges[{number}]")
            for number, one in enumerate(self._list(found, "exchanges", where))
        ]
        if len(names) != len(exchanges):
            self._wrong(
                f"{where}.exchanges", f"has {len(names)} entries, and there are {len(exchanges)} exchanges"
            )
        experts = self._list(found, "experts", where)
        if len(experts) != layers:
            self._wrong(f"{where}.experts", f"has {len(experts)} entries, and there are {layers} layers")
        return RankFiles(
            rank=rank,
            experts=tuple(tuple(int(expert) for expert in one) for one in experts),
            stages=tuple(stages),
            names=tuple(names),
            bytes=self._number(found, "bytes", where),
            expert_bytes=self._number(found, "expert_bytes", where),
        )

    def _names(self, item: Any, where: str) -> Names:
        found = self._object(item, where)
        sends = tuple(str(name) for name in self._list(found, "sends", where))
        gives = tuple(str(name) for name in self._list(found, "gives", where))
        if len(sends) != len(gives):
            self._wrong(f"{where}.gives", f"has {len(gives)} entries, and sends has {len(sends)}")
        return Names(sends, gives, found.get("counts"), found.get("counted"))

    def _dim(self, item: Any, where: str) -> DimRange:
        found = self._object(item, where)
        most = self._optional_number(found, "maximum", where)
        least = self._number(found, "minimum", where)
        return DimRange(self._text(found, "name", where), self._number(found, "traced", where), least, most)

    def _specs(self, top: Mapping[str, Any], name: str) -> tuple[TensorSpec, ...]:
        found = []
        for number, item in enumerate(self._list(top, name, "")):
            where = f"{name}[{number}]"
            value = self._object(item, where)
            shape = tuple(
                size if isinstance(size, int) else str(size) for size in self._list(value, "shape", where)
            )
            found.append(
                TensorSpec(self._text(value, "name", where), self._text(value, "dtype", where), shape)
            )
        return tuple(found)

    def _file(self, top: Mapping[str, Any], name: str) -> Path | None:
        return None if top.get(name) is None else self._path.parent / self._text(top, name, "")

    def _object(self, item: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(item, dict):
            self._wrong(where or "it", f"is a {type(item).__name__}, not an object")
        return item

    def _get(self, found: Mapping[str, Any], name: str, where: str) -> Any:
        if name not in found:
            self._wrong(_path(where, name), "is missing")
        return found[name]

    def _list(self, found: Mapping[str, Any], name: str, where: str) -> list[Any]:
        value = self._get(found, name, where)
        if not isinstance(value, list):
            self._wrong(_path(where, name), f"is a {type(value).__name__}, not a list")
        return list(value)

    def _numbers(self, found: Mapping[str, Any], name: str, where: str) -> list[int]:
        values = self._list(found, name, where)
        for number, value in enumerate(values):
            if not isinstance(value, int) or isinstance(value, bool):
                self._wrong(f"{_path(where, name)}[{number}]", f"is {value!r}, not a number")
        return values

    def _number(self, found: Mapping[str, Any], name: str, where: str, least: int = 0) -> int:
        value = self._get(found, name, where)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self._wrong(_path(where, name), f"is {value!r}, not a number of {least} or more")
        return int(value)

    def _optional_number(self, found: Mapping[str, Any], name: str, where: str) -> int | None:
        return None if found.get(name) is None else self._number(found, name, where)

    def _text(self, found: Mapping[str, Any], name: str, where: str) -> str:
        value = self._get(found, name, where)
        if not isinstance(value, str):
            self._wrong(_path(where, name), f"is {value!r}, not a text")
        return str(value)

    def _one_of(self, found: Mapping[str, Any], name: str, where: str, allowed: Sequence[str]) -> str:
        value = self._text(found, name, where)
        if value not in allowed:
            self._wrong(_path(where, name), f"is {value!r}, not {' or '.join(allowed)}")
        return value

    def _wrong(self, field: str, what: str) -> NoReturn:
        raise UsageError(
            f"{self._path.name}: {field} {what}",
            where=str(self._path),
            hint="moe-export model.py --expert-parallel N writes it anew",
        )


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
