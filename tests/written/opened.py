"""What several tests open in the same way: a module as a subject, a graph in onnxruntime, every node of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from moe_export.export.frontend.subject import Subject, make_subject


def subject_of(module: nn.Module) -> Subject:
    """A block that takes tokens of 16 numbers, with an example of 2 times 5."""
    torch.manual_seed(1)
    return make_subject(module, (torch.randn(2, 5, 16),), {}, source=Path(__file__), how="test")


def session_of(model: ir.Model) -> onnxruntime.InferenceSession:
    """A graph, checked in full, ready to run."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of bodies behind the one that has them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)
