"""docs/notebook.ipynb runs from top to bottom, and shows what its text says."""

from __future__ import annotations

import pytest
from pages import ROOT

nbformat = pytest.importorskip(
    "nbformat", reason="the notebook is run by nbclient: pip install 'moe-export[dev]'"
)
nbclient = pytest.importorskip(
    "nbclient", reason="the notebook is run by nbclient: pip install 'moe-export[dev]'"
)
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def test_the_notebook_is_short_and_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) == 12
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> list[str]:
    """What each cell of code shows: text that it prints, or its value as HTML."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # with two threads on busy cores each waits for the other
        nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
        ).execute()
    return [
        "".join(each["text"] if each.output_type == "stream" else each.data["text/html"] for each in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]  # fmt: skip


def test_a_program_shows_its_notes_and_a_picture(shown):
    assert "4 experts at" in shown[1]
    assert "x [batch, sequence, 16]" in shown[1]
    assert "<svg" in shown[1]


def test_it_is_equal_at_other_sizes(shown):
    assert "onnxruntime-cpu matches torch" in shown[2]
    assert "batch 1..4096, sequence 1..4096" in shown[2]


def test_the_router_alone_gives_experts_and_weights(shown):
    assert "token 0 goes to experts [3 0] with weights [0.402 0.248]" in shown[3]
    assert "<svg" in shown[3]


def test_the_faulty_node_is_named(shown):
    assert "first faulty node: Tanh experts.2.erf" in shown[4]
    assert "it is Tanh, in the reference Erf" in shown[4]
    assert "fault/run.py" in shown[5]
