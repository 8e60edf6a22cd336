"""Export Mixture-of-Experts and Mamba-style PyTorch blocks to verified ONNX graphs and GPU engines.

`import moe_export` is lean: torch, onnx and onnxruntime are imported by the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_export.einsum_rewrite import einsum, plan_einsum, rewrite_onnx, rewrite_program, rewrite_source
    from moe_export.equivalence import assert_equivalent, localise_error, verify_model
    from moe_export.errors import (
        EquationError,
        MissingBackendError,
        MoeExportError,
        NotExportableError,
        UsageError,
    )
    from moe_export.exported import ExportedModel, export_model
    from moe_export.running.decoding import Decoder

__version__ = metadata.version("moe-export")

# name → the module that defines it; looked up on first use (PEP 562).
_LAZY = {
    "einsum": "moe_export.einsum_rewrite",
    "plan_einsum": "moe_export.einsum_rewrite",
    "rewrite_onnx": "moe_export.einsum_rewrite",
    "rewrite_program": "moe_export.einsum_rewrite",
    "rewrite_source": "moe_export.einsum_rewrite",
    "Decoder": "moe_export.running.decoding",
    "ExportedModel": "moe_export.exported",
    "export_model": "moe_export.exported",
    "localise_error": "moe_export.equivalence",
    "assert_equivalent": "moe_export.equivalence",
    "verify_model": "moe_export.equivalence",
    "EquationError": "moe_export.errors",
    "MissingBackendError": "moe_export.errors",
    "MoeExportError": "moe_export.errors",
    "NotExportableError": "moe_export.errors",
    "UsageError": "moe_export.errors",
}

__all__ = [
    "Decoder",
    "EquationError",
    "ExportedModel",
    "MissingBackendError",
    "MoeExportError",
    "NotExportableError",
    "UsageError",
    "__version__",
    "assert_equivalent",
    "einsum",
    "export_model",
    "localise_error",
    "plan_einsum",
    "rewrite_onnx",
    "rewrite_program",
    "rewrite_source",
    "verify_model",
]


def __getattr__(name: str) -> Any:
    if name == "onnx":
        return import_module("moe_export.onnx")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moe_export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(
        [*__all__, "onnx"]
    )  # not for `import *`, which would put it in the place of the package onnx
