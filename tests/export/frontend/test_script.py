"""Running a user's file leaves no trace in the process beyond what it imports."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from moe_export.errors import UsageError
from moe_export.export.frontend.script import run_file


def test_a_file_that_ends_without_a_call(write):
    module, call = run_file(write("x = 3\n"), as_script=False, stop_at_call=True)
    assert module.x == 3
    assert call is None


def test_it_runs_on_after_the_call_if_not_told_to_stop(write):
    path = write("nn.Linear(2, 2)(torch.ones(1, 2))\nDONE = True\n")
    module, call = run_file(path, as_script=False, stop_at_call=False)
    assert module.DONE
    assert type(call.module) is nn.Linear
    assert run_file(path, as_script=False, stop_at_call=True)[0] is None


def test_the_process_is_as_it_was(write):
    before = (sys.argv, sys.modules["__main__"], nn.Module.__call__, sys.stdout)
    text = (
        "import sys\nassert sys.argv == [__file__]\nassert __name__ == '__main__'\nnn.ReLU()(torch.ones(2))\n"
    )
    _, call = run_file(write(text), as_script=True, stop_at_call=True)
    assert call is not None
    assert (sys.argv, sys.modules["__main__"], nn.Module.__call__, sys.stdout) == before


def test_it_is_as_it_was_after_an_error_too(write):
    before = (sys.argv, sys.modules["__main__"], nn.Module.__call__)
    with pytest.raises(UsageError, match="raised ZeroDivisionError"):
        run_file(write("1 / 0\n"), as_script=True, stop_at_call=True)
    assert (sys.argv, sys.modules["__main__"], nn.Module.__call__) == before


def test_its_prints_do_not_reach_stdout(write, capsys):
    run_file(write("print('hello')\n"), as_script=False, stop_at_call=True)
    assert capsys.readouterr() == ("", "hello\n")


def test_nothing_is_written_beside_the_file(write):
    path = write("x = 1\n")
    run_file(path, as_script=False, stop_at_call=True)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_its_future_imports_are_its_own(write):
    """The annotations of a file without `from __future__ import annotations` are evaluated."""
    module, _ = run_file(write("def f(x: int): ...\n"), as_script=False, stop_at_call=True)
    assert module.f.__annotations__ == {"x": int}


def test_dataclasses_and_pickles_find_the_module(write):
    text = """
import dataclasses, pickle
@dataclasses.dataclass
class Config:
    size: "int" = 4
assert pickle.loads(pickle.dumps(Config(5))).size == 5
"""
    run_file(write(text), as_script=False, stop_at_call=True)
    run_file(write(text), as_script=True, stop_at_call=True)


def test_the_outermost_call_is_the_first_to_begin(write):
    text = """
class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ReLU()
    def forward(self, x):
        return self.inner(x)
Outer()(torch.ones(2))
"""
    _, call = run_file(write(text), as_script=False, stop_at_call=False)
    assert type(call.module).__name__ == "Outer"


def test_a_syntax_error_in_an_imported_file_is_not_this_files(write):
    write("def f(:\n", "broken_of_mine.py", header="")
    with pytest.raises(UsageError, match="raised SyntaxError") as caught:
        run_file(write("import broken_of_mine\n"), as_script=False, stop_at_call=True)
    assert "has a syntax error" not in str(caught.value)
