"""Tables that a model keeps by length: the graph computes them for any length, as a fresh model does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_export.export.tracing.keyed_by_sizes import KeyedBySizes

_MASKS = {}


class Masks:
    """An object that a module holds."""

    def __init__(self):
        self.made = {}

    def of(self, length):
        if length not in self.made:
            self.made[length] = torch.ones(length, length).tril()
        return self.made[length]


class Keeps(nn.Module):
    tables = {}  # noqa: RUF012  of the class, on purpose

    def __init__(self):
        super().__init__()
        self.masks, self.nested, self.holder = {}, {"of": {}}, Masks()

    def mask(self, length):
        return torch.ones(length, length).tril()


class ByLength(Keeps):
    def forward(self, x):
        length = x.shape[1]
        if length not in self.masks:
            self.masks[length] = self.mask(length)
        return x @ self.masks[length]


class ByTuple(Keeps):
    def forward(self, x):
        key = (x.shape[1], x.dtype, str(x.device))
        mask = self.masks.get(key)
        if mask is None:
            mask = self.masks[key] = self.mask(x.shape[1])
        return x @ mask


class Nested(Keeps):
    def forward(self, x):
        return x @ self.nested["of"].setdefault(x.shape[1], self.mask(x.shape[1]))


class OfClass(Keeps):
    def forward(self, x):
        try:
            mask = self.tables[x.shape[1]]
        except KeyError:
            mask = self.tables[x.shape[1]] = self.mask(x.shape[1])
        return x @ mask


class OfObject(Keeps):
    def forward(self, x):
        return x @ self.holder.of(x.shape[1])


class OfFile(Keeps):
    def forward(self, x):
        _MASKS.setdefault(x.shape[1], self.mask(x.shape[1]))
        return x @ _MASKS[x.shape[1]]


def remembered(function):
    """As people write it where `functools` has it."""
    table, calls = {}, 0

    def remembering(length):
        nonlocal calls
        calls += 1
        if length not in table:
            table[length] = function(length)
        return table[length]

    return remembering


@remembered
def mask_of(length):
    return torch.ones(length, length).tril()


class OfDecorator(Keeps):
    def forward(self, x):
        return x @ mask_of(x.shape[1])


class OfDefault(Keeps):
    def forward(self, x, made={}):  # noqa: B006  people write it
        return x @ made.setdefault(x.shape[1], self.mask(x.shape[1]))


class Evicts(Keeps):
    def forward(self, x):
        length = x.shape[1]
        if len(self.masks) > 4:
            self.masks.clear()
        self.masks[length] = self.mask(length)
        self.masks[length + 1] = self.masks.pop(length)
        mask = self.masks[length + 1]
        del self.masks[length + 1]
        assert length not in self.masks
        return x @ mask


@pytest.mark.parametrize(
    "module", [ByLength, ByTuple, Nested, OfClass, OfObject, OfFile, OfDecorator, OfDefault, Evicts]
)
@pytest.mark.slow_but_one
def test_a_table_by_length_leaves_the_length_free(tools, module):
    model = module()
    graph = tools.graph(model, torch.randn(2, 5))
    assert graph.traced.inputs == {"x": ("batch", "x_dim1")}
    assert str(graph.traced.domain) == ""
    for size in ((2, 5), (1, 1), (3, 8)):
        x = torch.randn(*size)
        assert torch.allclose(
            torch.from_numpy(tools.run(graph.model, x=x)["output"]), x @ torch.ones(size[1], size[1]).tril()
        )
    assert (model.masks, model.nested, model.holder.made, Keeps.tables, _MASKS) == (
        {},
        {"of": {}},
        {},
        {},
        {},
    )
    held = [cell.cell_contents for cell in mask_of.__closure__]
    assert (0 in held, {} in held, OfDefault.forward.__defaults__) == (True, True, ({},))
    assert all(
        type(each) is dict for each in (model.masks, model.nested, model.holder.made, Keeps.tables, _MASKS)
    )


class Special(nn.Module):
    """What is in the table from the start is no cache: it differs from what would be computed."""

    def __init__(self, *lengths):
        super().__init__()
        self.table = {length: 100.0 + length for length in lengths}

    def forward(self, x):
        return x + self.table.get(x.shape[1], 0.0)


@pytest.mark.slow
def test_numbers_that_are_there_before_bound_the_graph(tools):
    graph = tools.graph(Special(8, 3), torch.randn(2, 5))
    assert {str(condition) for condition in graph.traced.conditions} == {"x_dim1 != 8", "x_dim1 != 3"}
    tools.equal(graph, torch.randn(3, 7))
    assert tools.graph(Special(5, 3), torch.randn(2, 5)).traced.inputs == {"x": ("batch", 5)}
    assert tools.graph(Special(*range(10, 200)), torch.randn(2, 5)).traced.inputs == {"x": ("batch", 5)}


def test_two_sizes_that_may_be_one_key(tools):
    class First(nn.Module):
        """Where both sizes are equal, the second finds what the first has left."""

        def __init__(self):
            super().__init__()
            self.found = {}

        def forward(self, x):
            self.found.setdefault(x.shape[0], x.mean())
            self.found.setdefault(x.shape[1], x.sum())
            return x * self.found[x.shape[0]] + self.found[x.shape[1]]

    graph = tools.graph(First(), torch.randn(2, 5))
    assert [str(condition) for condition in graph.traced.conditions] == ["x_dim1 != batch"]
    tools.equal(graph, torch.randn(4, 6))


def test_without_sizes_it_is_a_dict():
    table = KeyedBySizes({"a": 1, (2, "b"): 3})
    table["c"] = table.pop("a")
    table.setdefault("c", 5)
    del table[2, "b"]
    assert (table, table.get("d", 4), "c" in table, table.pop("d", 6)) == ({"c": 1}, 4, True, 6)
    for act in (lambda: table["d"], lambda: table.pop("d"), lambda: table.__delitem__("d")):
        with pytest.raises(KeyError):
            act()
