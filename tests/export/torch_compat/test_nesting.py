"""Nested arguments are taken apart as `torch.export` does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from canaries import canary

FILE = "export/torch_compat/nesting.py"


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


def test_canary_trees_are_flattened_in_the_order_of_their_paths():
    with canary(
        FILE,
        "torch.utils._pytree flattens, names and restores nested values",
        todo="torch.utils may have a public pytree by now; else import it from where torch/export/__init__.py does",
    ):
        from moe_export.export.torch_compat.nesting import pytree

        tree = ((1, {"b": 2, "a": [3, None]}), 4)
        flat, spec = pytree.tree_flatten(tree)
        assert flat == [1, 2, 3, None, 4]
        assert pytree.tree_unflatten(flat, spec) == tree
        assert pytree.tree_leaves(tree) == flat
        assert pytree.tree_map(lambda leaf: leaf and leaf + 1, tree) == ((2, {"b": 3, "a": [4, None]}), 5)
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
        assert paths == ["[0][0]", "[0][1]['b']", "[0][1]['a'][0]", "[0][1]['a'][1]", "[1]"]


def test_canary_a_registered_dataclass_is_known():
    with canary(
        FILE,
        "torch.export.register_dataclass enters a class in torch.utils._pytree.SUPPORTED_NODES",
        todo="ask torch.utils._pytree in another way whether a class is registered; export/frontend/pytree.py asks",
    ):
        from moe_export.export.torch_compat.nesting import pytree

        torch.export.register_dataclass(Pair)
        assert Pair in pytree.SUPPORTED_NODES
        x = torch.ones(2)
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(Pair(x, x))[0]]
        assert paths == [".left", ".right"]


def test_canary_the_exporter_takes_inputs_apart_in_the_same_order():
    class Sum(torch.nn.Module):
        def forward(self, pair, more):
            return pair["b"] + 2 * pair["a"] + 3 * more[0]

    with canary(
        FILE,
        "torch.export flattens its inputs in the order of torch.utils._pytree",
        todo="flatten as torch.export does: see ExportedProgram.call_spec",
    ):
        from moe_export.export.torch_compat.nesting import pytree

        tensors = [torch.zeros(size) for size in ((4, 1), (1, 3), (1,))]
        args = ({"b": tensors[0], "a": tensors[1]}, [tensors[2]])
        program = torch.export.export(Sum(), args)
        nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
        assert [tuple(node.meta["val"].shape) for node in nodes] == [
            tuple(leaf.shape) for leaf in pytree.tree_leaves(args)
        ]
