"""What a model changes when it is called: every call, and the graph, starts from the same state."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict, deque
from functools import cache, cached_property, lru_cache

import pytest
import torch
from torch import nn

from moe_export.export.frontend.state import State

_TABLES = {}
_CALLS = 0


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("cache", None)
        self.register_buffer("constant", torch.tensor([float("nan")]))

    def forward(self, x):
        self.calls += 1
        self.cache = x
        return x + self.calls


def test_changed_and_restored():
    model = nn.Sequential(Counter())
    before = State.of(model)
    tensor = model[0].calls
    model(torch.ones(1))
    assert before.changed() == {"buffer 0.calls", "buffer 0.cache"}
    before.restore()
    assert before.changed() == set()
    assert model[0].calls is tensor
    assert model[0].cache is None


class Holder:
    def __init__(self):
        self.length, self.seen = 0, []


class Everywhere(nn.Module):
    """Writes to whatever a module can hold."""

    def __init__(self):
        super().__init__()
        self.count, self.tables, self.recent = 0, {"a": {}}, deque([1], maxlen=2)
        self.holder, self.sizes, self.loose = Holder(), set(), torch.zeros(2)

    def forward(self, x):
        self.count += 1
        self.tables["a"][len(x)] = x
        self.recent.append(len(x))
        self.holder.length = len(x)
        self.holder.seen.append(x)
        self.sizes.add(len(x))
        self.loose.data += 1  # PyTorch does not count this as a write
        self.made = x
        return x


def test_whatever_a_module_can_hold():
    model = Everywhere()
    before = State.of(model)
    model(torch.ones(3))
    assert before.changed() == {
        "attribute count",
        "attribute tables['a'][3]",
        "attribute recent",
        "attribute holder.length",
        "attribute holder.seen",
        "attribute sizes",
        "attribute loose",
        "attribute made",
    }
    before.restore()
    assert before.changed() == set()
    assert (model.count, model.tables, list(model.recent), model.holder.seen) == (0, {"a": {}}, [1], [])
    assert not hasattr(model, "made")
    assert torch.equal(model.loose, torch.zeros(2))


def test_globals_of_the_users_file():
    class Global(nn.Module):
        def forward(self, x):
            global _CALLS  # noqa: PLW0603
            _CALLS += 1
            _TABLES[len(x)] = x
            return x

    before = State.of(Global()).with_globals()
    Global()(torch.ones(3))
    assert before.changed() == {"global _CALLS of test_state.py", "global _TABLES of test_state.py[3]"}
    before.restore()
    assert (_CALLS, _TABLES) == (0, {})


_MODULES = sys.modules


def test_a_module_that_a_call_imports_stays_imported():
    """`from sys import modules`, as beartype has it: Python's table is no state of the model."""

    class Imports(nn.Module):
        def forward(self, x):
            sys.modules.setdefault("imported_by_a_call", types.ModuleType("imported_by_a_call"))
            return x

    before = State.of(Imports()).with_globals()
    Imports()(torch.ones(3))
    assert before.changed() == set()
    before.restore()
    assert _MODULES.pop("imported_by_a_call", None) is not None


def test_globals_that_others_change_between_two_calls_stay(tools):
    class Plain(nn.Module):
        def forward(self, x):
            return x + 1

    subject = tools.subject(Plain(), torch.ones(2, 3))
    _TABLES["mine"] = 1
    subject.call([torch.ones(2, 3)])
    assert _TABLES.pop("mine") == 1


def test_a_weight_that_a_call_writes_to(tools):
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.1))
    weight = model[0].weight.detach().clone()
    subject = tools.subject(model, torch.arange(3))
    assert subject.cached == {"parameter 0.weight"}
    subject.call([torch.arange(5)])
    assert torch.equal(model[0].weight, weight)


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        self.total += x.sum(0)
        return x + self.total


def test_every_call_of_a_subject_starts_anew(tools):
    subject = tools.subject(Running(), torch.ones(2, 3))
    assert subject.changed == {"buffer total"}
    x = torch.randn(4, 3)
    assert torch.equal(subject.call([x])[0], subject.call([x])[0])
    assert torch.equal(subject.module.total, torch.zeros(3))


def test_the_graph_starts_from_the_files_values(tools):
    graph = tools.graph(Running(), torch.ones(2, 3))
    tools.equal(graph, torch.randn(4, 3))
    tools.equal(graph, torch.randn(1, 3))
    note = "buffer total changes with every call of the model; the graph always starts from its first value [MX104]"
    assert note in graph.notes


def test_a_counter_that_is_no_buffer(tools):
    class Calls(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    graph = tools.graph(Calls(), torch.ones(2, 3))
    tools.equal(graph, torch.randn(4, 3))
    assert any(note.startswith("attribute calls changes with every call") for note in graph.notes)


def test_a_cache_that_grows_on_demand(tools):
    class Rotary(nn.Module):
        cached = None

        def forward(self, x):
            if self.cached is None or len(self.cached) < x.shape[1]:
                self.cached = torch.arange(x.shape[1]).float().cos()
            return x * self.cached[: x.shape[1]]

    graph = tools.graph(Rotary(), torch.ones(2, 3))
    tools.equal(graph, torch.randn(4, 3))
    assert (
        "set by the model's first call, and left out here before each call: attribute cached" in graph.notes
    )


def test_a_buffer_that_forward_registers(tools):
    class Registers(nn.Module):
        def forward(self, x):
            if not hasattr(self, "places") or len(self.places) < x.shape[1]:
                self.register_buffer("places", torch.arange(x.shape[1]).float(), persistent=False)
            return x + self.places[: x.shape[1]]

    graph = tools.graph(Registers(), torch.ones(2, 3))
    for size in ((4, 3), (1, 7)):
        x = torch.randn(*size)
        assert torch.equal(
            torch.from_numpy(tools.run(graph.model, x=x)["output"]), x + torch.arange(size[1]).float()
        )
    assert [note for note in graph.notes if "call" in note] == [
        "set by the model's first call, and left out here before each call: buffer places"
    ]


def test_what_no_later_call_reads_is_said_to_be_left_out(tools):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            self.loss = x.mean()
            return x.softmax(-1)

    graph = tools.graph(Loss(), torch.randn(2, 3))
    tools.equal(graph, torch.randn(4, 3))
    assert (
        "set by each call, and not seen in the outputs of the next one: attribute calls, attribute loss; "
        "the graph does not have it: return it from forward to keep it"
    ) in graph.notes
    assert not any("MX104" in note for note in graph.notes)


def test_a_weight_that_every_call_writes_to(tools):
    class Decays(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            with torch.no_grad():
                self.weight.mul_(0.5)
            return x * self.weight

    subject = tools.subject(Decays(), torch.randn(2, 3))
    assert (subject.changed, subject.cached, subject.unread) == ({"parameter weight"}, set(), set())


class Numbered(nn.Module):
    calls = 0

    def forward(self, x, seen=[]):  # noqa: B006  people write it
        type(self).calls += 1
        type(self).last = len(x)
        seen.append(len(x))
        return x * self.calls + len(seen)


def test_attributes_of_a_class_and_defaults_start_anew(tools):
    graph = tools.graph(Numbered(), torch.randn(2, 3))
    tools.equal(graph, torch.randn(4, 3))
    assert (Numbered.calls, hasattr(Numbered, "last"), Numbered.forward.__defaults__) == (0, False, ([],))
    changed = tools.subject(Numbered(), torch.randn(2, 3)).changed
    assert changed == {"class attribute Numbered.calls", "variable seen of Numbered.forward"}


def test_what_python_and_libraries_remember_is_no_state_of_the_model(tools, tmp_path, monkeypatch):
    (tmp_path / "library-1.0.dist-info").mkdir()
    files = {
        "_strptime": "_strptime.py",
        "compiled": "compiled.so",
        "library": "library.py",
        "mine": "mine/own.py",
    }
    for name, file in files.items():
        module = types.ModuleType(name)
        module.__file__, module.TABLE = str(tmp_path / file), {}
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(tmp_path)

    class Fills(nn.Module):
        def forward(self, x):
            for name in files:
                sys.modules[name].TABLE["x"] = 1
            return x + 1

    assert not tools.subject(Fills(), torch.ones(2, 3)).cached
    assert sys.modules["library"].TABLE == {}
    assert sys.modules["_strptime"].TABLE == {"x": 1}


class Rotation(nn.Module):
    """A table in a buffer, and beside it how much of it is filled: one without the other is a table of zeros."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(64, 4))
        self.filled = 0

    def forward(self, x):
        length = x.shape[1]
        if self.filled < length:
            self.table[:length] = torch.arange(length)[:, None] * torch.ones(4)
            self.filled = length
        return x + self.table[:length]


def test_a_buffer_and_what_stands_beside_it_stay_together(tools):
    graph = tools.graph(Rotation(), torch.ones(2, 3, 4))
    x = torch.randn(2, 3, 4)
    found = tools.run(graph.model, x=x)["output"]
    assert torch.allclose(torch.from_numpy(found), x + torch.arange(3)[:, None])


@lru_cache
def _table(length):
    return torch.arange(length).float() + 1


@cache
def _scale(length):
    return length**-0.5


class Remembered(nn.Module):
    def forward(self, x):
        return x * _table(x.shape[1]) * _scale(x.shape[1]) * self.share(x.shape[1])

    @staticmethod
    @lru_cache(8)
    def share(length):
        return torch.ones(length) / length


def test_tables_behind_a_memory_of_results(tools):
    graph = tools.graph(Remembered(), torch.ones(2, 5))
    for length in (1, 3, 9):
        x = torch.randn(2, length)
        tools.equal(graph, x)
        assert torch.allclose(Remembered()(x), x * _table(length) * length**-0.5 / length)


def test_a_property_that_is_computed_once(tools):
    class Once(nn.Module):
        @cached_property
        def scale(self):
            return torch.full((3,), 2.0)

        def forward(self, x):
            return x * self.scale

    model = Once()
    tools.equal(tools.graph(model, torch.ones(2, 3)), torch.randn(4, 3))
    assert torch.equal(model(torch.ones(1, 3)), torch.full((1, 3), 2.0))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)), "1 (Dropout)"),
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "1 (BatchNorm1d)"),
        (nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0)), None),
        (nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)).eval(), None),
    ],
)
def test_train_mode_is_said_where_it_counts(tools, model, said):
    notes = " ".join(tools.subject(model, torch.randn(2, 3)).notes)
    assert ("train mode" in notes) is (said is not None)
    assert said is None or said in notes
    assert not any(part.training for part in model.modules())


def test_a_forward_that_asks_for_the_mode(tools):
    class Asks(nn.Module):
        def forward(self, x):
            return x + 1 if self.training else x

    assert "train mode" in tools.subject(Asks(), torch.randn(2, 3)).notes[0]


class Makes(OrderedDict):
    """transformers keeps classes in a dict that builds one at each access."""

    def __getitem__(self, key):
        raise RuntimeError(f"{key} was asked for")

    def items(self):
        """As a dict of the library does that imports what it lists."""
        raise RuntimeError("all were asked for")


def test_a_dict_that_makes_what_it_is_asked_for_is_only_looked_at():
    model = nn.ReLU()
    model.table = Makes(gelu=nn.GELU)
    before = State.of(model)
    assert not before.changed()
    model.table["tanh"] = nn.Tanh
    assert before.changed() == {"attribute table['tanh']"}
    before.restore()
    assert list(model.table) == ["gelu"]


def test_a_program_of_before_is_no_state(tools):
    """In a notebook it is a global of the user's, and holds what was saved for it: each export would save the last."""
    model = nn.Linear(2, 2)
    model.programs = []
    before = len(State.of(model)._items)
    subject = tools.subject(nn.Linear(2, 2), torch.randn(3, 2))
    model.programs.append(subject)
    assert len(State.of(model)._items) == before
