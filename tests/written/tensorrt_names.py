"""The names of TensorRT's bindings that `tensorrt_api` uses, a line each, to be compared and kept.

    python tests/written/tensorrt_names.py tensorrt > tests/export/engine/tensorrt-11.4.txt

`IExecutionContext.set_tensor_address(name: str, memory: int) -> bool` is a function, an overloaded one has several
lines; of the types only str, int and bool are kept. `BuilderFlag.TF32` is a member of an enumeration, or a property.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_type_hints

from moe_export import tensorrt_api
from moe_export.tensorrt_api import OVERRIDDEN, TensorRt

_PLAIN = {"typing.SupportsInt": "int", "int": "int", "str": "str", "bool": "bool"}
_HEAD = re.compile(
    r"^(?:\d+\. )?(?P<name>\w+)\((?:self: [\w.]+(?:, )?)?(?P<parameters>.*)\) -> (?P<result>.+)$",
    re.MULTILINE,
)
_MODULE = "TensorRt"


def used() -> dict[str, list[str]]:
    """The classes that are used, and the members of each; constructors where they are called."""
    found: dict[str, list[str]] = {name: [] for name in OVERRIDDEN}
    for name, kind in vars(tensorrt_api).items():
        if inspect.isclass(kind) and kind.__module__ == tensorrt_api.__name__ and name == kind.__name__:
            members = {*vars(kind).get("__annotations__", ()), *vars(kind)} - {"messages"}
            found[name] = sorted(member for member in members if not member.startswith("_"))
    del found["Named"]
    found[_MODULE] = [name for name, member in vars(TensorRt).items() if _is_function(name, member)]
    for name, hint in vars(TensorRt)["__annotations__"].items():
        if hint.startswith("Callable"):
            found[name].append("__init__")
    return found


def _is_function(name: str, member: Any) -> bool:
    return inspect.isfunction(member) and not name.startswith("_")


def written(kind: str, member: str) -> str:
    """The line of a member of ours."""
    if member == "__init__":
        hint = get_type_hints(TensorRt, vars(tensorrt_api))[kind]
        names = {tensorrt_api.ILogger: "logger", tensorrt_api.INetworkDefinition: "network"}
        given = [names.get(one, one.__name__.lower().removeprefix("icuda")) for one in hint.__args__[:-1]]
        return _line(kind, member, [(name, "") for name in given], "None")
    function = vars(getattr(tensorrt_api, kind)).get(member)
    if not inspect.isfunction(function):
        return f"{kind}.{member}"
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    named = [("" if one.kind is one.POSITIONAL_ONLY else one.name, one.annotation) for one in parameters]
    return _line(kind, member, named, signature.return_annotation)


def bound(module: Any) -> Iterator[str]:
    """The lines of a module; what it does not have has none."""
    for kind, members in sorted(used().items()):
        found = module if kind == _MODULE else getattr(module, kind, None)
        if found is None:
            continue
        yield kind
        for member in members:
            yield from _lines_of(kind, member, found)
        for method in OVERRIDDEN.get(kind, ()):
            if f"def {method}(self" in found.__doc__:
                yield f"{kind}.{method}"


def _lines_of(kind: str, member: str, found: Any) -> Iterator[str]:
    if not hasattr(found, member):
        return
    heads = [head for head in _HEAD.finditer(getattr(found, member).__doc__ or "") if head["name"] == member]
    if not heads:
        yield f"{kind}.{member}"
    for head in heads:
        parts = [part.partition(" = ")[0] for part in _split(head["parameters"] or "")]
        yield _line(kind, member, [(name, dtype) for name, _, dtype in map(_pair, parts)], head["result"])


def _pair(part: str) -> tuple[str, str, str]:
    return part.partition(": ")


def _split(parameters: str) -> list[str]:
    """At the commas that are in no bracket."""
    return [part for part in re.split(r", (?![^\[<]*[\]>])", parameters) if part]


def _line(kind: str, member: str, parameters: list[tuple[str, Any]], result: Any) -> str:
    texts = [f"{name}: {_PLAIN.get(str(dtype), '')}".removesuffix(": ") for name, dtype in parameters]
    kept = _PLAIN.get(str(result), "")
    return f"{kind}.{member}({', '.join(texts)})" + (f" -> {kept}" if kept else "")


if __name__ == "__main__":
    imported = import_module(sys.argv[1])
    print(f"# {imported.__version__}")
    print("\n".join(bound(imported)))
