"""What we call of TensorRT exists: in TensorRT-RTX as it is installed, in full TensorRT as its names were kept."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tensorrt_names import bound, used, written

from moe_export import tensorrt_api
from moe_export.export.engines.module import load_module
from moe_export.tensorrt_api import OVERRIDDEN, RTX_ONLY

FULL = Path(__file__).with_name("tensorrt-11.4.txt")
ROOT = Path(__file__).parents[3]
USES = ("export/engines", "verify/runners", "src/moe_export/running")


def lines(product):
    """The lines of a product's bindings."""
    if product == "tensorrt":
        return FULL.read_text(encoding="ascii").splitlines()[1:]
    return list(bound(load_module().trt))


def agrees(ours, theirs):
    """Whether a call that fits our line fits theirs: parameters that are passed by position only may have any name."""
    pattern = re.sub(r"(?<=\\\(|, ):", r"\\w+:", re.escape(ours).replace(r",\ ", ", ").replace(r"\ ", " "))
    return re.fullmatch(pattern, theirs) is not None


def lacking(product):
    """The members of ours that a product does not have, or has with other parameters or another result."""
    there = lines(product)
    found = {
        f"{kind}.{member}": written(kind, member) for kind, members in used().items() for member in members
    }
    missing = {name for name, ours in found.items() if not any(agrees(ours, theirs) for theirs in there)}
    missing |= {f"{kind}.{member}" for kind, members in OVERRIDDEN.items() for member in members} - set(there)
    return missing | (used().keys() - set(there))


def test_tensorrt_rtx_has_all_that_is_used():
    assert lacking("tensorrt-rtx") == set()


def test_full_tensorrt_lacks_what_is_said_to_be_rtxs_alone():
    """A class that it lacks has no members."""
    missing = lacking("tensorrt")
    assert {name for name in missing if name in RTX_ONLY or name.partition(".")[0] in RTX_ONLY} == missing
    assert missing >= RTX_ONLY


def test_a_call_that_does_not_exist_is_found(monkeypatch):
    def set_tensor_address(self, name: str, address: int) -> bool: ...

    monkeypatch.setattr(tensorrt_api.IExecutionContext, "set_tensor_address", set_tensor_address)
    assert lacking("tensorrt") - RTX_ONLY >= {"IExecutionContext.set_tensor_address"}
    assert agrees("E.get(: int, : str)", "E.get(name: int, profile_index: str)")
    assert not agrees("E.get(: int, : str)", "E.get(name: str, profile_index: int)")


def results():
    """The functions of TensorRT whose result says whether they worked, by name."""
    found = set()
    for kind, members in used().items():
        for member in members:
            function = vars(getattr(tensorrt_api, kind, object)).get(member)
            if (
                member != "__init__"
                and callable(function)
                and function.__annotations__.get("return") != "None"
            ):
                found.add(member)
    return found


def dropped(tree):
    """Calls of those functions as statements of their own, by line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            function = node.value.func
            if isinstance(function, ast.Attribute) and function.attr in results():
                yield node.lineno


@pytest.mark.parametrize("room", USES)
def test_no_result_is_dropped(room):
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / room).rglob("*.py")
        for line in dropped(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def test_a_dropped_result_is_found():
    assert list(dropped(ast.parse("a = 1\ncontext.set_tensor_address('x', 0)\n"))) == [2]
