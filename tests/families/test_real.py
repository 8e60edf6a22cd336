"""Modules of PyPI's packages, as they are installed: a few of those that `make real` exports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
FEW = (
    "pytorch-mixtures:TopkMoE",
    "latent-moe:LatentMoE",
    "minimamba:MambaForCausalLM",
    "ncps:CfC",
    "compositional-attention-pytorch:CompositionalAttention",
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FEW)
def test_a_module_of_a_package_is_right_at_every_size_that_its_graph_claims(name):
    pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader of its own")
    command = [sys.executable, str(HERE / "real.py"), "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout.startswith("absent"):
        pytest.skip(f"the package cannot be installed here: {done.stdout.splitlines()[0]}")
    assert done.stdout.startswith("right"), done.stdout + done.stderr
    assert done.returncode == 0


def test_the_list_is_as_long_as_promised():
    """At least 40 modules of 20 packages, each of which names a version and everything else that it needs."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader of its own")
    table = tomllib.loads((HERE / "real.toml").read_text())
    modules, packages = table["module"], table["packages"]
    assert len(modules) >= 40
    assert len({each["package"] for each in modules}) >= 20
    needed = {need for each in packages.values() for need in each.get("needs", ())}
    assert {each["package"] for each in modules} | needed == set(packages)
    assert len({(each["package"], each["name"]) for each in modules}) == len(modules)
