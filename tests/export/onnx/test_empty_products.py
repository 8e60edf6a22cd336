"""A sum over no elements is 0, in ONNX Runtime too."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from slow_cases import one_in
from torch import nn

from moe_export.export import Options, export_subject
from moe_export.export.frontend.subject import make_subject


class Product(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.weight, self.vector = form, torch.randn(4, 5), torch.randn(60)

    def forward(self, x):
        return self.form(self, x)


MAY_BE_EMPTY = {
    "a transposed batch": lambda self, x: x[:, 1:].transpose(1, 2) @ x[:, 1:],
    "a vector": lambda self, x: x.transpose(1, 2)[..., 13:] @ self.vector[: x.shape[1]][13:],
    "a vector first": lambda self, x: self.vector[: x.shape[1]][13:] @ x[:, 13:],
    "a matrix and a batch": lambda self, x: x[0, 1:].T @ x[:, 1:],
    "batches in another order": lambda self, x: x[:, 1:].permute(2, 0, 1) @ x[:, 1:].permute(2, 1, 0),
    "batches that are repeated": lambda self, x: x[:1, 1:].transpose(1, 2) @ x[:, None, 1:],
    "what a mask selects": lambda self, x: x[0, x[0, :, 0] > 99].T @ x[:, x[0, :, 0] > 99],
    "nothing at all": lambda self, x: x[:, :, :0] @ self.weight[:0],
}  # fmt: skip
NEVER = {
    "weights": lambda self, x: x @ self.weight,
    "tokens": lambda self, x: x.transpose(1, 2) @ x,
    "more than tokens": lambda self, x: (y := torch.cat([x, x], 1)).transpose(1, 2) @ y,
    "two matrices": lambda self, x: x[0, 1:].T @ x[0, 1:],
}


def exported(tmp_path, form):
    torch.manual_seed(0)
    subject = make_subject(Product(form), (torch.randn(2, 7, 4),), {}, source=tmp_path, how="")
    return subject, export_subject(subject, Options(opset=17))[0].model


@pytest.mark.parametrize("name", one_in(3, MAY_BE_EMPTY))
def test_a_sum_over_nothing_is_zero(tmp_path, name):
    subject, model = exported(tmp_path, MAY_BE_EMPTY[name])
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for length in (20, 1, 13, 1, 14, 1, 7):  # the memory of a longer run is what a shorter one finds
        x = torch.randn(3, length, 4)
        (found,) = session.run(None, {"x": x.numpy()})
        wanted = subject.call([x])[0].numpy()
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, 1e-5, 1e-5)


@pytest.mark.parametrize("name", one_in(2, NEVER))
def test_a_product_that_is_never_empty_stays_as_it_is(tmp_path, name):
    _, model = exported(tmp_path, NEVER[name])
    assert [node.op_type for node in model.graph if node.op_type in ("MatMul", "Gemm", "Einsum")] == [
        "MatMul"
    ]
