"""PyTorch's recurrent layers: any length, from a file that was traced at one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from moe_export.export import Options, export_subject
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.export.recurrence.recurrent_layers import recurrent_layers_step_by_step
from moe_export.verify import OnnxRuntimeRunner

LAYERS = {
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True),
    "projected lstm": lambda: nn.LSTM(3, 4, proj_size=2, bias=False),
    "gru": lambda: nn.GRU(3, 4, 2, batch_first=True),
    "tanh": lambda: nn.RNN(3, 4, bidirectional=True, bias=False),
    "relu": lambda: nn.RNN(3, 4, nonlinearity="relu", batch_first=True),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 1, 3), (4, 3)])
def test_loops_compute_what_the_layer_does(name, shape):
    layer = LAYERS[name]().double()
    x = torch.randn(shape, dtype=torch.float64)
    wanted, state = layer(x)
    with recurrent_layers_step_by_step():
        found, own = layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own, state, rtol=1e-12, atol=1e-12)


class Tagger(nn.Module):
    """Time first in one layer, last in the other; its own start."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(3, 4, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 5)

    def forward(self, x):
        y, (hidden, _) = self.lstm(x)
        z, _ = self.gru(y.transpose(0, 1), hidden.new_ones(1, x.shape[0], 5))
        return z.transpose(0, 1), hidden


@pytest.mark.slow
def test_a_model_with_layers_is_right_at_any_length(tmp_path):
    model = Tagger().eval()
    subject = make_subject(model, (torch.randn(2, 6, 3),), {}, source=tmp_path / "tagger.py", how="test")
    (graph,) = export_subject(subject, Options(gates=False, simplify=False))
    assert list(graph.traced.inputs.values()) == [("batch", "sequence", 3)]
    assert len([note for note in graph.notes if "folded into one Scan" in note]) == 3
    write_model(graph.model, tmp_path / "tagger.onnx")
    runner = OnnxRuntimeRunner(tmp_path / "tagger.onnx")
    for batch, length in ((1, 1), (3, 2), (2, 63), (1, 257)):
        x = torch.randn(batch, length, 3)
        with torch.no_grad():
            wanted = [value.numpy() for value in model(x)]
        for found, right in zip(runner.run({"x": x.numpy()}).values(), wanted, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)
