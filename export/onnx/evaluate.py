"""What nodes give for arrays that are known now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator


def evaluate(
    nodes: Sequence[ir.Node],
    values: Mapping[ir.Value, np.ndarray],
    wanted: Sequence[ir.Value],
    version: int,
) -> list[np.ndarray]:
    """What nodes give for arrays that are known now.

    Args:
        nodes: In order.
        values: What they take.
        wanted: Values among those that the nodes take or give.
        version: Opset.
    """
    known = dict(values)
    for node in nodes:
        if node.op_type == "Transpose":  # a view; the reference would copy
            array = known[node.inputs[0]]  # type: ignore[index]
            perm = node.attributes.get("perm")
            known[node.outputs[0]] = array.transpose(perm.as_ints() if perm else None)
            continue
        names = [f"i{index}" if value is not None else "" for index, value in enumerate(node.inputs)]
        results = [f"o{index}" for index in range(len(node.outputs))]
        proto = onnx.helper.make_node(node.op_type, names, results, domain=node.domain)
        proto.attribute.extend(ir.to_proto(attribute) for attribute in node.attributes.values())
        feeds = {
            name: known[value] for name, value in zip(names, node.inputs, strict=True) if value is not None
        }
        run = ReferenceEvaluator(proto, opsets={"": version}).run(None, feeds)
        known.update(zip(node.outputs, map(np.asarray, run), strict=True))
    return [known[value] for value in wanted]
