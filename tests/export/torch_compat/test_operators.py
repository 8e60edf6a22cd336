"""Operators say what they take, tensors how often they were written to."""

from __future__ import annotations

import operator

import torch
from canaries import canary

FILE = "export/torch_compat/operators.py"


def test_canary_an_operator_names_its_arguments():
    with canary(
        FILE,
        "OpOverload._schema lists the arguments of an operator",
        todo="see OpOverload in torch/_ops.py; export/recurrence/induction_sequences.py is who asks",
    ):
        from moe_export.export.torch_compat.operators import arguments_of

        found = arguments_of(torch.ops.aten.add.Tensor)
        assert [argument.name for argument in found] == ["self", "other", "alpha"]
        assert [argument.kwarg_only for argument in found] == [False, False, True]
        assert [str(argument.type) for argument in found] == ["Tensor", "Tensor", "number"]
        assert arguments_of(operator.add) == []


def test_canary_writes_are_counted():
    with canary(
        FILE,
        "Tensor._version grows with every write",
        todo="compare values in export/frontend/state.py, or see docs.pytorch.org/docs/stable/notes/autograd.html",
    ):
        from moe_export.export.torch_compat.operators import writes_to

        tensor = torch.zeros(3)
        before = writes_to(tensor)
        tensor[0] = 1
        assert writes_to(tensor) > before
        with torch.inference_mode():
            assert writes_to(torch.zeros(3)) == 0


def test_canary_a_view_is_counted_with_its_owner():
    with canary(
        FILE,
        "Tensor._base is what a tensor is a view of, without gradients, too, and their writes are counted together",
        todo="find out what a slice shares its values with in export/tracing/expert_slices.py",
    ):
        from moe_export.export.torch_compat.operators import owner_of, writes_to

        with torch.no_grad():
            tensor = torch.zeros(3, 2)
            part = tensor[1:][:, 0]
            assert owner_of(part) is tensor
            assert owner_of(tensor) is tensor
            before = writes_to(tensor)
            part.add_(1)
            assert writes_to(tensor) > before
            assert writes_to(tensor.clone()) == 0


def test_canary_grouped_products_have_these_two_names():
    with canary(
        FILE,
        "torch.nn.functional.grouped_mm calls torch._grouped_mm, and a function mode sees one of them",
        todo="give the names that it has now to GROUPED_MM; src/moe_export/float64.py tells them by their names",
    ):
        from moe_export.export.torch_compat.operators import GROUPED_MM
        from moe_export.export.tracing.other_forms import InOtherForms

        called = []
        forms = dict.fromkeys(GROUPED_MM, lambda *_, **__: called.append(True))
        rows, stack = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(2, 8, 8, dtype=torch.bfloat16)
        with InOtherForms(forms):
            torch.nn.functional.grouped_mm(rows, stack, offs=torch.tensor([1, 4], dtype=torch.int32))
        assert called == [True]
        assert {function.__name__.lstrip("_") for function in GROUPED_MM} == {"grouped_mm"}


def test_canary_what_writes_or_holds_a_graph_is_seen():
    with canary(
        FILE,
        "OpOverload._schema.is_mutable, and HigherOrderOperator as the type of operators that hold graphs",
        todo="see torch/_ops.py; return False from is_functional until then: tracing is slower, and right",
    ):
        from moe_export.export.torch_compat.operators import is_functional

        class Adds(torch.nn.Module):
            def forward(self, x):
                return x.reshape(-1) + 1

        class Writes(torch.nn.Module):
            def forward(self, x):
                y = torch.zeros_like(x)
                y[0] = x[0]
                return y

        class Holds(torch.nn.Module):
            def forward(self, x):
                with torch.set_grad_enabled(not torch.is_grad_enabled()):
                    y = x + 1
                return y * 2

        graphs = [
            torch.export.export(module(), (torch.ones(3, 2),)).graph for module in (Adds, Writes, Holds)
        ]
        assert [is_functional(graph) for graph in graphs] == [True, False, False]


def test_canary_what_an_operator_does_beside_computing():
    with canary(
        FILE,
        "schemas say which operators write or return views, the table of kernels which are made of others",
        todo="let effect_of return UNKNOWN: run_decompositions takes over in export/tracing/functionalize.py",
    ):
        from moe_export.export.torch_compat.operators import Effect, effect_of, without_writing

        aten = torch.ops.aten
        expected = {
            aten.add.Tensor: Effect.NONE,
            aten.linear.default: Effect.NONE,
            operator.getitem: Effect.NONE,
            aten.add_.Tensor: Effect.WRITES,
            aten.index_put_.default: Effect.WRITES,
            aten.select.int: Effect.VIEWS,
            aten.split.Tensor: Effect.VIEWS,
            aten.reshape.default: Effect.COMPOSITE,
            aten.to.dtype: Effect.COMPOSITE,
            aten.dropout.default: Effect.COMPOSITE,
            aten.unsqueeze_.default: Effect.UNKNOWN,
            aten.add.out: Effect.FILLS,
            aten.topk.values: Effect.UNKNOWN,
            torch.ops.higher_order.cond: Effect.UNKNOWN,
        }
        assert {target: effect_of(target) for target in expected} == expected
        assert without_writing(aten.index_put_.default) is aten.index_put.default
        assert without_writing(aten.add_.Tensor) is aten.add.Tensor
        assert without_writing(aten.add.out) is aten.add.Tensor
        assert without_writing(aten.mm.out) is aten.mm.default
        assert without_writing(aten.topk.values) is None
