"""`export`, with the signature of `torch.onnx.export`: a script that exports needs another import, and nothing else.

    from moe_export import onnx                         # was: from torch import onnx
    onnx.export(model, (x,), "model.onnx", input_names=["x"], opset_version=17)

Source: https://docs.pytorch.org/docs/stable/onnx_export.html
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_export.errors import UsageError
from moe_export.exported import ExportedModel, export_model

OPSET = 17
_INDIFFERENT = frozenset(
    {
        "verbose", "dynamo", "external_data", "report", "profile", "dump_exported_program", "artifacts_dir",
        "do_constant_folding", "autograd_inlining", "fallback",
    }
)  # fmt: skip
"""What says how PyTorch goes about it, or what it writes besides the graph."""
_AS_USUAL: Mapping[str, tuple[Any, ...]] = {
    "export_params": (True,),
    "keep_initializers_as_inputs": (False, None),
    "custom_translation_table": (None, {}),
    "custom_opsets": (None, {}),
    "export_modules_as_functions": (False, ()),
    "training": (None, "TrainingMode.EVAL", "TrainingMode.PRESERVE"),
    "operator_export_type": (None, "OperatorExportTypes.ONNX"),
}
"""What would make another graph, with the values for which it makes the graph that is made here."""


def export(  # noqa: PLR0913  the arguments of torch.onnx.export
    model: Any,
    args: Any = (),
    f: str | os.PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    dynamic_shapes: Any = None,
    dynamic_axes: Mapping[str, Any] | None = None,
    optimize: bool = True,
    verify: bool = False,
    **others: Any,
) -> ExportedModel:
    """Export a module as `torch.onnx.export` is asked to.

    Args:
        model: As in `export_model`.
        args: Likewise.
        f: The file `*.onnx` to write; one that stands there is overwritten, as PyTorch does.
        kwargs: Likewise.
        input_names: Likewise.
        output_names: Likewise.
        opset_version: 17 or newer; 17 if None.
        dynamic_shapes: Likewise.
        dynamic_axes: Likewise.
        optimize: Whether to try onnxsim.
        verify: Whether to compare the graph with the module, before a file is written.
        others: The other arguments of `torch.onnx.export`. Those that do not change the graph are ignored.

    Returns:
        The graph; `model_proto` and `save` are those of PyTorch's `ONNXProgram`.

    Raises:
        UsageError: An argument asks for another graph than is made here, or they do not fit the model.
        NotExportableError: The model has no ONNX form.
        AssertionError: With `verify`: the graph differs from the module. Nothing is written.
        TypeError: `torch.onnx.export` has no such argument.
    """
    for name, value in others.items():
        _require_usual(name, value)
    program = export_model(
        model,
        args,
        kwargs,
        dynamic_shapes=dynamic_shapes,
        dynamic_axes=dynamic_axes,
        input_names=input_names,
        output_names=output_names,
        opset=opset_version or OPSET,
        simplify=optimize,
    )
    if verify:
        report = program.verify()
        if report.exit_code:
            raise AssertionError(f"the graph is not what {type(model).__name__} computes\n\n{report}")
    if f is not None:
        program.save(Path(f), force=True)
    return program


def _require_usual(name: str, value: Any) -> None:
    if name in _INDIFFERENT:
        return
    if name not in _AS_USUAL:
        raise TypeError(f"export() got an unexpected keyword argument {name!r}")
    usual = _AS_USUAL[name]
    if value not in usual and str(value) not in usual:
        raise UsageError(
            f"{name}={value!r} asks for a graph that moe-export does not make",
            hint=f"leave out {name}, or use torch.onnx.export",
        )
