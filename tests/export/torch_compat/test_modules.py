"""Calls of modules are seen and answered, and what `nn.Module` keeps is where it is looked for."""

from __future__ import annotations

import torch
from canaries import canary
from torch import nn

FILE = "export/torch_compat/modules.py"


def test_canary_calls_of_modules_are_seen_with_their_keyword_arguments():
    class Scaled(nn.Module):
        def forward(self, x, *, factor):
            return factor * x

    with canary(
        FILE,
        "`module(...)` goes through nn.Module.__call__",
        todo="find what torch/nn/modules/module.py gives `__call__` now, and see all calls there",
    ):
        from moe_export.export.torch_compat.modules import calls_of_modules

        seen = []

        def note(original, module, *args, **kwargs):
            seen.append((module, kwargs))
            return original(module, *args, **kwargs)

        module, before = Scaled(), nn.Module.__call__
        with calls_of_modules(note):
            assert module(torch.ones(1), factor=3).item() == 3
        assert seen == [(module, {"factor": 3})]
        assert nn.Module.__call__ is before


def test_canary_conversions_are_answered():
    with canary(
        FILE,
        "`module.to(...)` is nn.Module.to, and calls nothing of the same name for its submodules",
        todo="answer `to` where torch/nn/modules/module.py defines it now; export/tracing/idioms.py is who asks",
    ):
        from moe_export.export.torch_compat.modules import conversions

        module, before = nn.Sequential(nn.Linear(2, 2)), nn.Module.to
        with conversions(
            lambda original, self, *args: self if args == (torch.float64,) else original(self, *args)
        ):
            assert module.to(torch.float64)[0].weight.dtype is torch.float32
            assert module.to(torch.float16)[0].weight.dtype is torch.float16
        assert nn.Module.to is before


def test_canary_what_was_compiled_is_found():
    with canary(
        FILE,
        "torch.compile keeps the module as `_orig_mod`, and module.compile() its call as `_compiled_call_impl`",
        todo="see OptimizedModule in torch/_dynamo/eval_frame.py and Module.compile in torch/nn/modules/module.py",
    ):
        from moe_export.export.torch_compat.modules import compiled_inside, uncompile

        module = nn.Linear(2, 2)
        assert compiled_inside(torch.compile(module)) is module
        assert compiled_inside(module) is None
        module.compile(backend=lambda *_: 1 / 0)
        uncompile(module)
        assert module(torch.ones(2)).shape == (2,)


def test_canary_the_tables_are_the_modules_own():
    with canary(
        FILE,
        "parameters, buffers and submodules are dicts among a module's attributes",
        todo="see Module.__init__ in torch/nn/modules/module.py; export/frontend/state.py is who puts them back",
    ):
        from moe_export.export.torch_compat.modules import tables_of

        module = nn.Sequential(nn.BatchNorm1d(2))
        assert list(tables_of(module)["module"]) == ["0"]
        assert list(tables_of(module[0])["parameter"]) == ["weight", "bias"]
        assert "running_mean" in tables_of(module[0])["buffer"]
        for table in tables_of(module[0]).values():
            assert any(table is value for value in vars(module[0]).values())
        tables_of(module[0])["buffer"]["running_mean"] = torch.full((2,), 7.0)
        assert module[0].running_mean.tolist() == [7, 7]
