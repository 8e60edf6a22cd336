"""The rooms depend on one another in one direction, and importing them stays cheap."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "models": set(),
    "einsum_rewrite": {"errors", "graph_builder"},
    "verify": {"errors", "domain", "external_data", "float64", "own_files", "tensorrt_api"},
    "export": {
        "errors",
        "disk",
        "domain",
        "external_data",
        "float64",
        "graph_builder",
        "own_files",
        "tensorrt_api",
        "einsum_rewrite",
    },
}
BELOW = {
    "models",
    "einsum_rewrite",
    "verify",
    "export",
    "errors",
    "disk",
    "domain",
    "external_data",
    "float64",
    "graph_builder",
    "own_files",
    "tensorrt_api",
    "backends",
    "options",
    "comparison_settings",
    "supervisor",
}
# What puts the rooms together, in order: one imports those before it.
TOGETHER = ("running", "large", "pictures", "comparing", "reports", "exported", "commands")
# What lies in `export`, rooms and single files, in order: one imports those before it.
EXPORT = (
    "torch_compat",
    "sizes",
    "weights",
    "frontend",
    "axes",
    "tracing",
    "onnx",
    "gates",
    "recurrence",
    "decoder",
    "experts",
    "scans",
    "precision",
    "quantize",
    "engines",
    "options",
    "stages",
    "pipeline",
    "parallel",
    "__init__",
)
SOURCES = {
    "moe_export": ROOT / "src" / "moe_export",
    **{f"moe_export.{room}": ROOT / room for room in ALLOWED},
}


def imported(path: Path, of: str = "moe_export") -> set[str]:
    """The parts of a package that a file imports: `moe_export.verify.judging.judge` counts as `verify`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.removeprefix(f"{of}.").split(".")[0] for name in names if name.startswith(f"{of}.")}
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below_it(room):
    for path in (ROOT / room).rglob("*.py"):
        assert imported(path) <= ALLOWED[room] | {room}, path


@pytest.mark.parametrize("room", TOGETHER)
def test_what_puts_the_rooms_together_has_one_direction(room):
    allowed = BELOW | set(TOGETHER[: TOGETHER.index(room) + 1])
    folder = ROOT / "src" / "moe_export" / room
    paths = [*folder.rglob("*.py"), *folder.parent.glob(f"{room}.py")]
    assert paths
    for path in paths:
        assert imported(path) <= allowed, path


def test_what_lies_in_export_has_one_direction():
    within = {path.stem for path in (ROOT / "export").iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert within | {path.stem for path in (ROOT / "export").glob("*.py")} == set(EXPORT)
    for place, room in enumerate(EXPORT):
        files = [*(ROOT / "export" / room).rglob("*.py"), *(ROOT / "export").glob(f"{room}.py")]
        for path in files:
            found = imported(path, "moe_export.export")
            assert found <= set(EXPORT[: place + 1]), f"{path} imports {found - set(EXPORT[: place + 1])}"


def test_the_map_of_export_is_true():
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.split("| in `export` | what for |")[1].split("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)/?`", row.split("|")[1])]
    assert (*named, "__init__") == EXPORT


def module_files() -> dict[str, Path]:
    """Every module of ours, by its name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports_of(path: Path, known: Collection[str]) -> set[str]:
    """The modules that a file imports: at once, when a function runs, or for its types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & set(known)


def circle_in(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules, each of which imports the next, and the last the first; empty if there are none."""
    left = {name: set(others) for name, others in imports.items()}
    while free := {name for name, others in left.items() if not others}:
        left = {name: others - free for name, others in left.items() if name not in free}
    path: list[str] = []
    name = min(left, default=None)
    while name is not None and name not in path:
        path.append(name)
        name = min(left[name])
    return path[path.index(name) :] if name is not None else []


def test_no_file_imports_one_that_imports_it():
    files = module_files()
    assert len(files) > 350
    circle = circle_in({name: imports_of(path, files) - {name} for name, path in files.items()})
    assert not circle, " → ".join([*circle, circle[0]])


def test_circles_are_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxsim", "netron", "transformers", "rich"}


@pytest.mark.parametrize(
    "code",
    [
        "import moe_export",
        "import moe_export.verify",
        "import moe_export.cli",
        "from moe_export.cli import run; run(['--version'])",
    ],
)
def test_it_imports_nothing_heavy(code):
    assert modules_after(code) & HEAVY == set()


def test_help_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "moe_export", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in loaded  # the list is really there
    assert loaded & HEAVY == set()


@pytest.mark.parametrize(
    "command",
    [
        "check ONNX",
        "diff ONNX ONNX",
        "rewrite ONNX -o rewritten.onnx",
        "verify ONNX --against ONNX",
        "view ONNX -o graph.svg",
    ],
)
def test_what_knows_only_onnx_imports_no_pytorch(command, tmp_path):
    x, y = (onnx.helper.make_tensor_value_info(name, 1, ["n", 2]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Exp", ["x"], ["y"])], "exp", [x], [y])
    path = tmp_path / "exp.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path
    )
    words = command.replace("ONNX", path.as_posix()).replace("-o r", f"-o {tmp_path.as_posix()}/r")
    words = words.replace("-o g", f"-o {tmp_path.as_posix()}/g")
    loaded = modules_after(f"from moe_export.cli import run; assert run({words.split()!r}) == 0")
    assert "onnx" in loaded
    assert "torch" not in loaded


def test_a_name_of_the_export_room_is_the_same_whatever_was_imported_before():
    import moe_export.export as room

    assert modules_after("import moe_export.export") & HEAVY == set()
    assert room.trace.__module__ == "moe_export.export.tracing.trace"
    importlib.import_module("moe_export.export.tracing.trace")
    assert callable(room.trace)
    assert sorted(room.__all__) == dir(room)
    for name in room.__all__:
        assert getattr(room, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        room.unknown  # noqa: B018
