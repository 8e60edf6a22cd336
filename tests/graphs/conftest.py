"""One export that the tests of pictures share."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from moe_export.export.frontend.load import load_subject
from moe_export.export.pipeline import Options, export_subject


@pytest.fixture(scope="session")
def hybrid() -> ir.Model:
    return export_subject(load_subject("models/hybrid.py"), Options(gates=False))[0].model
