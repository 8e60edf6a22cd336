"""Which files' globals a model can reach: however its code comes to them, and no others."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest
import torch

from moe_export.export.frontend.state import State

COUNTS = """
    CALLS = {}
    def count():
        CALLS["n"] = CALLS.get("n", 0) + 1
    class Counts:
        def __call__(self):
            count()
        @staticmethod
        def once():
            count()
    class Slots:
        __slots__ = ()
        def call(self):
            count()
    slots = Slots
    def counting(forward):
        def wrapped(*arguments):
            count()
            return forward(*arguments)
        return wrapped
    """
WAYS = {
    "imported_name": ("from counts import count", "", "count()"),
    "imported_module": ("import counts", "", "counts.count()"),
    "imported_inside": ("", "", "import counts; counts.count()"),
    "imported_inside_from": ("", "", "from counts import count; count()"),
    "by_name": ("import importlib", "", "importlib.import_module('cou' + 'nts').count()"),
    "by_table": ("import sys", "", "sys.modules['cou' + 'nts'].count()"),
    "object": ("from counts import Counts", "self.counts = Counts()", "self.counts()"),
    "object_with_slots": (
        "import counts; slots = counts.slots(); del counts",
        "self.slots = slots",
        "self.slots.call()",
    ),
    "object_of_a_list": ("", "import counts; self.counts = [counts.Counts()]", "self.counts[0]()"),
    "static": ("from counts import Counts", "", "Counts.once()"),
    "global_object": ("import counts; COUNTER = counts.Counts(); del counts", "", "COUNTER()"),
    "partial": (
        "import functools, counts; COUNTER = functools.partial(counts.count); del counts",
        "",
        "COUNTER()",
    ),
    "method": ("import counts; COUNTER = counts.Counts().__call__; del counts", "", "COUNTER()"),
    "decorator": ("import counts", "", "pass"),
    "through_another": ("import between", "", "between.call()"),
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Files that can be imported while the test runs."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return [importlib.import_module(name) for name in files]

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("way", WAYS)
def test_a_count_is_put_back_however_it_is_reached(way, written):
    header, setting, call = WAYS[way]
    decorator = "@counts.counting" if way == "decorator" else ""
    model = f"""
    {header}
    from torch import nn
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            {setting}
        {decorator}
        def forward(self, x):
            {call}
            return x
    """
    counts, _, file = written(
        counts=COUNTS, between="def call():\n    import counts\n    counts.count()\n", model_of_it=model
    )
    module = file.Model().eval()
    with State.of(module).kept():
        module(torch.ones(2))
        assert counts.CALLS == {"n": 1}
    assert counts.CALLS == {}, way


def layer(change):
    """A module of PyTorch's, changed."""
    module = torch.nn.Identity()
    change(module)
    return module


@pytest.mark.parametrize(
    "change",
    [
        lambda module, counts: setattr(module, "forward", counts.counting(module.forward)),
        lambda module, counts: module.register_forward_hook(lambda *_: counts.count()),
        lambda module, counts: module.register_forward_pre_hook(counting_hook(counts.count)),
        lambda module, counts: setattr(module, "forward", counts.Counts().__call__),
    ],
    ids=["patched", "hook", "hook_before", "method"],
)
def test_a_module_of_a_library_is_changed_by_the_users_functions(change, written):
    (counts,) = written(counts=COUNTS.replace("def __call__(self):", "def __call__(self, x=None):"))
    module = layer(lambda module: change(module, counts))
    with State.of(module).kept():
        module(torch.ones(2))
        assert counts.CALLS == {"n": 1}
    assert counts.CALLS == {}


def counting_hook(count):
    def hook(*_):
        count()

    return hook


def test_a_file_that_no_code_of_the_model_names_is_left_alone(written):
    other, file = written(
        unrelated="SEEN = {}",
        model_alone="""
        from torch import nn
        class Model(nn.Module):
            def forward(self, x):
                return x
        """,
    )
    with State.of(file.Model()).kept():
        other.SEEN["mine"] = 1  # by another thread, say
    assert other.SEEN == {"mine": 1}
