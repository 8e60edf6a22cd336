"""The graph that TensorRT's parser reads: the user's file, or one that is fitted to the GPUs that an engine is for.

A builder parses it, and so does what puts the weights back into an engine that was built without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir

from moe_export.errors import UsageError
from moe_export.export.engines import turing
from moe_export.export.engines.module import RTX
from moe_export.export.onnx.functions import without_functions
from moe_export.external_data import check_external_data

_INLINE = 2**31 - 2**24  # protobuf cannot hold 2 GiB


def read_graph(model: str | Path | onnx.ModelProto | ir.Model) -> tuple[ir.Model, Path | None]:
    """A model for TensorRT's parser, its functions written out, and its file if it has one.

    Raises:
        UsageError: There is no such file, or no ONNX model in it.
    """
    if isinstance(model, ir.Model):
        return model, None
    if isinstance(model, onnx.ModelProto):
        return ir.from_proto(model), None
    path = Path(model)
    if not path.is_file():
        raise UsageError(f"no file {path}", hint="give an .onnx file")
    check_external_data(path)
    try:
        graph = ir.load(path)
    except Exception as error:
        raise UsageError(f"{path} is not an ONNX model: {error}") from error
    if not graph.graph.outputs:
        raise UsageError(f"{path} is not an ONNX model: it has no outputs", hint="give an .onnx file")
    return without_functions(graph), path


def fitted(
    graph: ir.Model, path: Path | None, capability: str, product: str
) -> tuple[ir.Model, Path | None, tuple[str, ...]]:
    """The graph as these GPUs can compute it, its file if that is the user's, and what was changed.

    Args:
        graph: The graph.
        path: Its file.
        capability: The GPUs, `sm75`.
        product: `tensorrt-rtx` or `tensorrt`.
    """
    if capability == turing.CAPABILITY and product == RTX:
        changed, count = turing.without_float32_products(graph)
        if count:
            return changed, None, (turing.NOTE.format(count=count),)
    return graph, path, ()


@contextmanager
def as_file(graph: ir.Model, path: Path | None) -> Iterator[Path]:
    """The file of a graph, for a parser that reads weights of any size; a temporary one if it has none."""
    if path is not None:
        yield path
        return
    with TemporaryDirectory(prefix="moe-export-") as folder:
        weights = [value.const_value for value in graph.graph.initializers.values()]
        large = sum(weight.nbytes for weight in weights if weight is not None) > _INLINE
        outside = large or any(isinstance(weight, ir.ExternalTensor) for weight in weights)
        file = Path(folder, "model.onnx")
        ir.save(graph, file, external_data="model.onnx.data" if outside else None)
        yield file


@contextmanager
def as_built(path: Path, capability: str, product: str) -> Iterator[Path]:
    """The file that an engine of a graph was built from."""
    graph, file = read_graph(path)
    changed, kept, _ = fitted(graph, file, capability, product)
    with as_file(changed, kept) as found:
        yield found
