"""Shims for packages of GPU kernels that a model file imports and that are not installed: the same in plain PyTorch.

Only what the user's own files import gets a shim. A library that asks whether a package is there, to choose
between its kernel and its own code, gets the true answer.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import FrameType, ModuleType

from moe_export.export.frontend.source import is_user_file

_FORMS = "moe_export.export.frontend.mamba_kernels"

# Module → the names that it has. The modules above each one are empty packages.
_MODULES: Mapping[str, tuple[str, ...]] = {
    "mamba_ssm": ("selective_scan_fn",),
    "mamba_ssm.ops.selective_scan_interface": ("selective_scan_fn",),
    "mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined",),
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update",),
    "mamba_ssm.ops.triton.layernorm_gated": ("RMSNorm", "rmsnorm_fn"),
    "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_interface": ("causal_conv1d_fn", "causal_conv1d_update"),
}
_PACKAGES = {
    ".".join(parts[:depth])
    for parts in (name.split(".") for name in _MODULES)
    for depth in range(1, len(parts) + 1)
}


class _KernelShims(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules above, asked last, for imports of the user's files."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        parent = fullname.rpartition(".")[0]
        known = not parent or isinstance(getattr(sys.modules.get(parent), "__loader__", None), _KernelShims)
        if fullname not in _PACKAGES or not known or not _asked_by_user():
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        forms = importlib.import_module(_FORMS)
        for name in _MODULES.get(module.__name__, ()):
            setattr(module, name, getattr(forms, name))


def _asked_by_user() -> bool:
    """Whether the import stands in a file of the user's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith("<frozen importlib") and name != __file__:
            return is_user_file(name)
        frame = frame.f_back
    return False


def install_kernel_shims() -> None:
    """From now on, for the rest of the process: models import lazily."""
    if not any(isinstance(finder, _KernelShims) for finder in sys.meta_path):
        sys.meta_path.append(_KernelShims())
