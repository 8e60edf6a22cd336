"""The JSON Schema of a document, derived from the types that its code is written with.

    class Mutants(TypedDict):                     {"title": "Mutants", "type": "object",
        \"\"\"How many mutants were caught.\"\"\"  →   "description": "How many mutants were caught.",
        caught: int                                "properties": {"caught": {"type": "integer"}},
        score: float | None                        "required": ["caught"], ...}

A document is a `TypedDict`, so mypy holds the code that makes it to the same type. A dataclass stands for what
`dataclasses.asdict` makes of it. `Annotated[T, U]` is a T in the code and a U in the document.

Source: https://json-schema.org/draft/2020-12
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN: Mapping[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    # JSON has no numbers for these three
    float: {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]},
    type(None): {"type": "null"},
    Any: {},
}


def json_schema(document: type, *, closed: bool = False) -> dict[str, Any]:
    """The schema of a document.

    Args:
        document: A TypedDict, whose field `schema` is a literal.
        closed: Whether a field that it does not name is wrong. A version of a document may gain fields.
    """
    made = _Schema(closed)
    root = made.of(document)
    name = get_args(get_type_hints(document)["schema"])[0]
    return {
        "$schema": DRAFT,
        "$id": "urn:" + name.replace("/", ":"),
        "title": name,
        **made.definitions.pop(root["$ref"].rpartition("/")[2]),
        "$defs": made.definitions,
    }


class _Schema:
    """A schema in the making; each class is a definition of its own, which may be in several places."""

    def __init__(self, closed: bool) -> None:
        self._closed = closed
        self.definitions: dict[str, Any] = {}

    def of(self, kind: Any) -> dict[str, Any]:
        """The schema of a type."""
        if kind in _PLAIN:
            return dict(_PLAIN[kind])
        origin, inner = get_origin(kind), get_args(kind)
        if origin is Annotated:
            return self.of(inner[1])
        if origin is Literal:
            return {"const": inner[0]} if len(inner) == 1 else {"enum": list(inner)}
        if origin in (Union, types.UnionType):
            ways = [self.of(each) for each in inner]
            return {"anyOf": [way for each in ways for way in each.get("anyOf", [each])]}
        if origin in (list, tuple, Sequence):
            return self._array(inner)
        if origin in (dict, Mapping):
            return {"type": "object", "additionalProperties": self.of(inner[1])}
        return self._class(kind)

    def _array(self, inner: Sequence[Any]) -> dict[str, Any]:
        if len(inner) == 1 or inner[-1] is Ellipsis:
            return {"type": "array", "items": self.of(inner[0])}
        items = [self.of(each) for each in inner]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}

    def _class(self, kind: Any) -> dict[str, Any]:
        if dataclasses.is_dataclass(kind):
            names = {field.name for field in dataclasses.fields(kind)}
            return self._reference(kind, names, names)
        if is_typeddict(kind):
            return self._reference(kind, kind.__annotations__, kind.__required_keys__)
        raise TypeError(f"no JSON schema is known of {kind}")

    def _reference(self, kind: Any, names: Any, required: Any) -> dict[str, Any]:
        name = kind.__name__
        if name not in self.definitions:
            self.definitions[name] = {}  # it may hold itself
            hints = get_type_hints(kind, include_extras=True)
            self.definitions[name] = {
                "description": (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " "),
                "type": "object",
                "properties": {field: self.of(hint) for field, hint in hints.items() if field in names},
                "required": [field for field in hints if field in required],
                **({"additionalProperties": False} if self._closed else {}),
            }
        return {"$ref": f"#/$defs/{name}"}
