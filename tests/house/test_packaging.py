"""The wheel holds every package folder, and nothing beside `moe_export`; an index would take it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no TOML reader of its own")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("einsum_rewrite", "export", "verify", "models")


def package_folders() -> set[str]:
    found = {"moe_export"}
    for path in (ROOT / "src" / "moe_export").rglob("__init__.py"):
        found.add(".".join(path.parent.relative_to(ROOT / "src").parts))
    for room in ROOMS:
        for path in (ROOT / room).rglob("__init__.py"):
            found.add(".".join(("moe_export", *path.parent.relative_to(ROOT).parts)))
    return found


def test_every_package_folder_is_listed():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == package_folders()


def test_every_room_is_mapped():
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    assert mapped == {"moe_export": "src/moe_export"} | {f"moe_export.{room}": room for room in ROOMS}


def test_no_folder_with_python_files_lacks_an_init():
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_dependency_is_pinned():
    pins = {
        re.match(r"[\w-]+", line)[0].replace("_", "-").lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    wanted = PROJECT["project"]["dependencies"] + [
        item for extra in PROJECT["project"]["optional-dependencies"].values() for item in extra
    ]
    names = {re.match(r"[\w-]+", item)[0].replace("_", "-").lower() for item in wanted}
    assert names - pins == set()


def test_the_two_onnxruntimes_exclude_each_other():
    from packaging.requirements import Requirement

    both = [
        Requirement(item) for item in PROJECT["project"]["dependencies"] if item.startswith("onnxruntime")
    ]
    platforms = [
        {"sys_platform": system, "platform_machine": machine, "python_version": version}
        for system, machine in (
            ("linux", "x86_64"),
            ("linux", "aarch64"),
            ("linux", "ppc64le"),
            ("win32", "AMD64"),
            ("win32", "ARM64"),
            ("darwin", "arm64"),
            ("darwin", "x86_64"),
        )
        for version in ("3.10", "3.11", "3.14")
    ]
    for platform in platforms:
        assert sum(item.marker.evaluate(platform) for item in both) == 1, platform


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the files that git knows, as a release would build it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            folder,
            source,
        ],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_one_import_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"moe_export"}
    modules = {str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {f"moe_export/{module}" for module in modules} <= set(names)
    own = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "moe_export").rglob("*.py")}
    assert own <= set(names)


def test_the_wheel_holds_data_commands_and_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    for package, files in PROJECT["tool"]["setuptools"]["package-data"].items():
        assert {f"{package}/{file}" for file in files} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    entries = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "moe-export = moe_export.__main__:main" in entries


def test_an_index_would_take_the_wheel(wheel):
    pytest.importorskip("twine", reason="twine checks what an index shows: pip install 'moe-export[dev]'")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout
