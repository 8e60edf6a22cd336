"""What holds of sizes is noted, told and answered."""

from __future__ import annotations

import sympy
import torch
from canaries import canary
from torch import nn
from torch.export import Dim

FILE = "export/torch_compat/sizes.py"


class Alike(nn.Module):
    def forward(self, x, y):
        from moe_export.export.torch_compat.sizes import require

        require(x.shape[0] == y.shape[0])
        return x.sum() + y.sum()


class Chosen(nn.Module):
    def forward(self, x):
        rows = x[x > 0]
        return rows.sum() if rows.shape[0] > 3 else rows.sum() - 1


def sizes_of(program):
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    return [size for node in nodes for size in node.meta["val"].shape]


def test_canary_a_condition_is_noted_by_a_trace():
    with canary(
        FILE,
        "torch._check makes two sizes of a trace one",
        todo="see https://docs.pytorch.org/docs/stable/export.html for how a model states a condition now",
    ):
        free = ({0: Dim.AUTO}, {0: Dim.AUTO})
        program = torch.export.export(
            Alike(), (torch.ones(4), torch.ones(4)), dynamic_shapes=free, strict=False
        )
        first, second = sizes_of(program.run_decompositions({}))
        assert isinstance(first, torch.SymInt)
        assert str(first) == str(second)


def test_canary_what_only_the_data_knows_is_answered():
    with canary(
        FILE,
        "ShapeEnv.evaluate_expr raises GuardOnDataDependentSymNode for a condition that it cannot decide",
        todo="see evaluate_expr in torch/fx/experimental/symbolic_shapes.py; tracing/every_expert_hit.py answers",
    ):
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        from moe_export.export.torch_compat.sizes import undecided

        asked, before = [], ShapeEnv.evaluate_expr

        def answer(env, expression):
            asked.append((env, expression))
            return True

        with undecided(answer):
            program = torch.export.export(Chosen(), (torch.randn(9),), strict=False)
        assert ShapeEnv.evaluate_expr is before
        assert "sub" not in str(program.graph)
        env, condition = asked[-1]
        (symbol,) = condition.free_symbols
        assert condition.xreplace({symbol: sympy.Integer(4)}) == sympy.true
        assert env.var_to_range[symbol].lower == 0
        assert env.var_to_range[symbol].upper >= 9


def test_canary_remainders_are_told_from_other_conditions():
    class Folded(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 4) if x.shape[0] % 4 == 0 else x

    with canary(
        FILE,
        "`size % n` is Mod or PythonMod of torch.utils._sympy.functions, in a guard of the trace's shape environment",
        todo="find the class of a remainder there now; tracing/conditions.py and guards.py of export read guards",
    ):
        from moe_export.export.torch_compat.sizes import has_remainder

        program = torch.export.export(
            Folded(), (torch.ones(8),), dynamic_shapes=({0: Dim.AUTO},), strict=False
        )
        (size,) = sizes_of(program)
        assert size.node.hint == 8
        assert isinstance(size.node.expr, sympy.Symbol)
        guards = [guard.expr for guard in size.node.shape_env.guards]
        assert any(has_remainder(guard) for guard in guards)
        assert not has_remainder(size.node.expr > 3)


def test_canary_fake_results_are_cached_or_not():
    with canary(
        FILE,
        "torch._dynamo.config has fake_tensor_cache_enabled, which the fake tensors of a trace read",
        todo="find the setting in torch/_subclasses/fake_tensor.py; without it, `fake_results_cached` can do nothing",
    ):
        from torch._subclasses.fake_tensor import FakeTensorMode

        from moe_export.export.torch_compat.sizes import fake_results_cached

        for cached in (True, False):
            with fake_results_cached(cached):
                assert FakeTensorMode().cache_enabled is cached


def test_canary_where_a_size_is_fixed():
    from moe_export.export.torch_compat.sizes import sizes_fixed

    class Fixes(nn.Module):
        def forward(self, x, y):
            return x.sum() + y[:, : int(y.shape[1]) // 2].sum() + len(range(y.shape[1]))

    found = []
    with canary(
        FILE,
        "ShapeEnv._set_replacement is called where a size is taken for a number, and var_to_sources names its input",
        todo="find where torch.export logs that it specializes a symbol",
    ):
        free = ({0: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO})
        with sizes_fixed(lambda number, axis: found.append((number, axis))):
            torch.export.export(
                Wrapped(Fixes()), (torch.ones(3, 2), torch.ones(5, 6)), dynamic_shapes={"inputs": free}
            )
        assert set(found) == {(1, 1)}


def test_canary_a_condition_is_seen_where_it_is_noted():
    from moe_export.export.torch_compat.sizes import conditions_noted

    class Asks(nn.Module):
        def forward(self, x):
            asked.append(len(seen))
            y = x + 1 if x.shape[0] // 2 == 3 else x
            asked.append(len(seen))
            return y

    asked, seen = [], []
    with canary(
        FILE,
        "ShapeEnv._log_guard is called for each condition that goes into ShapeEnv.guards, while the line runs",
        todo="find what appends to ShapeEnv.guards in torch/fx/experimental/symbolic_shapes.py",
    ):
        with conditions_noted(seen.append):
            program = torch.export.export(
                Asks(), (torch.ones(6),), dynamic_shapes=({0: Dim.AUTO},), strict=False
            )
        size = sizes_of(program)[0]
        noted = [guard.expr for guard in size.node.shape_env.guards]
        there = [each for each in noted if isinstance(each, sympy.Eq) and each.rhs == 3]
        assert there
        assert seen.index(there[0]) in range(*asked[:2])


class Wrapped(nn.Module):
    """Takes its inputs as a tuple, as every traced model does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)
