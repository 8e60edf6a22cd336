"""Exchanges as nodes that an engine knows, in place of borders of a graph: `--collectives graph`.

| target | sum | rows |
|---|---|---|
| `onnxruntime-*` | `com.microsoft::AllReduce` | `com.microsoft::AllToAll`, `group_size` ranks |
| `tensorrt*` | `DistCollective`, `collective_operation` "all_reduce" | the same, "all_to_all" |

ONNX Runtime has these operators where it was built with NCCL; which process is which rank, its environment says (MPI).
TensorRT's parser makes an `IDistCollectiveLayer` of the node: multi-device inference, TensorRT 11 and NCCL. Names are
in small letters there, and `root` is -1 for what has no root: so its parser asks for, and refuses anything else.
Parts are of equal size, so rows need a fixed capacity. Sources: the operators' schemas in ONNX Runtime; TensorRT's
documentation of the layer, and what the parser of TensorRT-RTX 1.7 makes of such nodes.
"""

from __future__ import annotations

from typing import Any, Literal

import onnx_ir as ir

from moe_export.errors import Code, NotExportableError
from moe_export.export.onnx.provenance import source_location
from moe_export.export.parallel.stages import ALL_REDUCE, is_exchange

Collectives = Literal["runner", "graph"]
ORT_DOMAIN, TRT_DOMAIN = "com.microsoft", "trt"
_TYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE}


def write_collectives(model: ir.Model, ranks: int, target: str) -> None:
    """Replace every exchange of a rank's graph by collectives; in place.

    Args:
        model: With exchanges as nodes, each `all_to_all` with a capacity.
        ranks: R.
        target: The engine.

    Raises:
        NotExportableError: A type that the engine's collectives do not have.
    """
    for node in [node for node in model.graph if is_exchange(node)]:
        made = []
        for given, value in zip(node.inputs, node.outputs, strict=True):
            assert given is not None
            if node.op_type == ALL_REDUCE and value.dtype not in _TYPES:
                raise NotExportableError(
                    f"collectives sum float32, float16 and float64, not {value.dtype}",
                    code=Code.RANKS_FORM,
                    where=source_location(node),
                )
            made.append(_collective(node, given, ranks, target.startswith("tensorrt")))
            made[-1].outputs[0].type, made[-1].outputs[0].shape = value.type, value.shape
            made[-1].outputs[0].name = value.name
            made[-1].metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], made, node.outputs, [one.outputs[0] for one in made]
        )
    domain = TRT_DOMAIN if target.startswith("tensorrt") else ORT_DOMAIN
    model.opset_imports.pop("moe_export", None)
    model.opset_imports[domain] = 1


def _collective(node: ir.Node, given: ir.Value, ranks: int, tensorrt: bool) -> ir.Node:
    reduces = node.op_type == ALL_REDUCE
    if not tensorrt:
        facts: dict[str, Any] = {} if reduces else {"group_size": ranks}
        return ir.node(node.op_type, [given], facts, domain=ORT_DOMAIN, name=node.name)
    facts = {
        "collective_operation": "all_reduce" if reduces else "all_to_all",
        "reduce_op": "sum" if reduces else "none",
        "root": -1,
        "group_size": 0,
        "nb_rank": ranks,
    }
    return ir.node("DistCollective", [given], facts, domain=TRT_DOMAIN, name=node.name)
