"""What commands write is what the published schemas say; a document that was changed is not."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, get_args, get_type_hints

import onnx
import pytest
from jsonschema import Draft202012Validator, ValidationError
from onnx import numpy_helper
from pages import ROOT

from moe_export.commands.schema import DOCUMENTS, document
from moe_export.reports.json_schema import json_schema

SPARSE = ROOT / "models" / "sparse_moe.py"


def validate(name: str, found: Any) -> None:
    """Hold a document against its schema, in which a field without a type is wrong here."""
    schema = json_schema(document(name), closed=True)
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(found)


def changed(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A document with each of its fields left out, and with another type: an object, which none of them is."""
    return [
        *({name: value for name, value in found.items() if name != gone} for gone in found),
        *({**found, name: {"no": ["such"]}} for name in found),
        {**found, "schema": "moe-export/other/1"},
    ]


@pytest.fixture(scope="module")
def here(finished, tmp_path_factory):
    """The graphs of a block and of experts with a gate, and a graph that is wrong."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder


def printed(command: Any, *args: object, code: int = 0) -> Any:
    done = command(*args, "--json")
    assert done.code == code, done.err
    return json.loads(done.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_the_report_of_an_export(here):
    found = json.loads((here / "moe.report.json").read_text())
    assert len(found["graphs"]) == 2
    validate("report", found)
    for wrong in changed(found):
        with pytest.raises(ValidationError):
            validate("report", wrong)


def test_a_change_far_inside_is_found(here):
    found = json.loads((here / "moe.report.json").read_text())
    for path, value in (
        (("graphs", 0, "dynamic", 0, "maximum"), "many"),
        (("graphs", 1, "verification", "verdict"), "fine"),
        (("graphs", 0, "verification", "cases", 0, "judgements", 0, "max_abs"), None),
        (("graphs", 0, "verification", "outputs", 0, "worst", "index"), [0.5]),
    ):
        wrong = copy.deepcopy(found)
        inside = wrong
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = value
        with pytest.raises(ValidationError):
            validate("report", wrong)


def test_comparisons(command, here):
    graph, model = here / "block.onnx", here / "block.py"
    one = printed(command, "verify", graph, "--against", model, "-o", here / "r.json")
    assert json.loads((here / "r.json").read_text()) == one
    validate("verify", one)
    several = printed(command, "verify", graph, "--against", model, "--against", f"{graph}@onnx-reference")
    validate("verify-several", several)
    with pytest.raises(ValidationError):
        validate("verify", several)


@pytest.mark.slow
def test_a_faulty_node(command, here):
    broken = onnx.load(here / "block.onnx")
    for weight in broken.graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.ndim == 2:
            weight.CopyFrom(numpy_helper.from_array(values + values.dtype.type(0.1), weight.name))
    onnx.save(broken, here / "broken.onnx")
    found = printed(command, "verify", here / "broken.onnx", "--against", here / "block.py", code=1)
    assert found["why"]["faulty_node"]["op"]
    validate("verify", found)


def test_what_other_commands_print(command, here):
    graph = here / "moe.onnx"
    validate("check", printed(command, "check", graph, code=0))
    validate("diff", printed(command, "diff", graph, here / "moe.gate.onnx"))
    validate("explain", printed(command, "explain", "MX101"))
    source = here / "source.py"
    source.write_text('import torch\nx = torch.einsum("bd,d->bd", a, b)\ny = torch.einsum(what, a)\n')
    found = printed(command, "rewrite", source, "--check", code=1)
    assert [len(found["rewritten"]), len(found["left"])] == [1, 1]
    validate("rewrite", found)


def test_costs_of_ranks(command):
    validate("plan", printed(command, "plan", SPARSE))


@pytest.mark.slow
def test_measurements_mutants_and_ranks(command, here, tmp_path):
    graph, model = here / "block.onnx", here / "block.py"
    validate("bench", printed(command, "bench", graph, "--repeat", 2))
    validate("mutate", printed(command, "mutate", graph, "--against", model, code=0))
    report = printed(command, SPARSE, "-o", tmp_path, "--expert-parallel", 2)
    validate("report", report)
    validate("parallel", json.loads((tmp_path / report["parallel"]["manifest"]).read_text()))


@pytest.mark.slow
def test_engines(command, here, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    printed(command, "build", here / "block.onnx", "--engine", "sm89", "-o", tmp_path)
    validate("engines", json.loads((tmp_path / "block.engines.json").read_text()))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_schema_is_printed(command, name):
    schema = printed(command, "schema", name)
    Draft202012Validator.check_schema(schema)
    assert schema["title"] == schema["properties"]["schema"]["const"]
    assert schema["description"]


def test_a_name_that_there_is_not(command):
    done = command("schema", "repot")
    assert done.code == 2
    assert "there is no document repot, did you mean report?" in done.err
    assert "verify-several" in done.err


@dataclass
class Point:
    """Where.

    Attributes:
        at: Its place.
    """

    at: tuple[int, float]
    many: tuple[str, ...]


class Needed(TypedDict):
    schema: Literal["moe-export/tests/1"]
    size: int | None
    points: Annotated[list[dict[str, Any]], list[Point]]


class Sample(Needed, total=False):
    """One of each."""

    named: dict[str, bool]


def test_types_become_schemas():
    number = {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}
    assert json_schema(Sample) == {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:moe-export:tests:1",
        "title": "moe-export/tests/1",
        "description": "One of each.",
        "type": "object",
        "properties": {
            "schema": {"const": "moe-export/tests/1"},
            "size": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "points": {"type": "array", "items": {"$ref": "#/$defs/Point"}},
            "named": {"type": "object", "additionalProperties": {"type": "boolean"}},
        },
        "required": ["schema", "size", "points"],
        "$defs": {
            "Point": {
                "description": "Where.",
                "type": "object",
                "properties": {
                    "at": {
                        "type": "array",
                        "prefixItems": [{"type": "integer"}, number],
                        "minItems": 2,
                        "maxItems": 2,
                    },
                    "many": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["at", "many"],
            }
        },
    }
    with pytest.raises(TypeError, match="no JSON schema is known of <class 'object'>"):
        json_schema(TypedDict("Odd", {"schema": Literal["a/b/1"], "what": object}))


def test_each_version_that_is_written_has_a_schema():
    """Or is told here, with its reason."""
    written = {
        found
        for room in ("src", "export", "verify", "einsum_rewrite")
        for path in (ROOT / room).rglob("*.py")
        for found in re.findall(r'"(moe-export/[a-z-]+/\d+)"', path.read_text(encoding="utf-8"))
    }
    published = {get_args(get_type_hints(document(name))["schema"])[0] for name in DOCUMENTS}
    private = {
        "moe-export/errors/1",  # an attachment of Netron's, in its form
        "moe-export/golden/1",  # in the header of a safetensors file
        "moe-export/traffic/1",  # one process's, which another of ours reads
    }
    assert written - private == published
