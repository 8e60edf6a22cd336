"""Exporters are seen at the door with what they were given."""

from __future__ import annotations

import pytest
import torch
from canaries import canary
from torch import nn

from moe_export.export.torch_compat.export_calls import EXPORTERS, export_calls

FILE = "export/torch_compat/export_calls.py"


class Seen(Exception):
    """Ends a call at the door."""


@pytest.mark.parametrize("name", EXPORTERS)
def test_canary_an_exporter_names_the_model_and_its_arguments_as_before(name):
    owner, attribute = EXPORTERS[name]
    model, x, found = nn.Linear(2, 2), torch.ones(1, 2), {}

    def seen(called, given):
        found[called] = given
        raise Seen

    before = getattr(owner, attribute)
    with canary(
        FILE,
        f"`{name}` takes a model, called model, mod or func, and its arguments, called args, example_inputs or inputs",
        todo="let `read` in export/frontend/export_calls.py know the new names",
    ):
        with export_calls(seen, [].append), pytest.raises(Seen):
            getattr(owner, attribute)(model, (x,))
        given = found[name]
        assert model in [given.get(key) for key in ("model", "mod", "func")]
        assert next(given[key] for key in ("args", "example_inputs", "inputs") if key in given) == (x,)
        assert getattr(owner, attribute) is before


def test_scripting_gives_a_module_back_and_compiles_a_function():
    model = nn.Linear(2, 2)
    with export_calls(lambda name, given: None, [].append):
        assert torch.jit.script(model) is model
        assert isinstance(torch.jit.script(_twice), torch.jit.ScriptFunction)


def _twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
