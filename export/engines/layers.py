"""What an engine is made of: its layers as plain data, and the memory that it takes, without running it.

The engine itself can only be read where a GPU is. What the builder was given (the network) and what it says while it
builds are there everywhere.
"""

from __future__ import annotations

import re
from typing import Any

from moe_export.tensorrt_api import ILayer, ILogger, INetworkDefinition, ITensor

_KERNEL = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: (?P<rest>.*)")
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<shape>[^\]]*)\], .*?Datatype: (?P<dtype>\w+)"
)
_MEMORY = {
    "activations": re.compile(r"Total Activation Memory: (\d+) bytes"),
    "weights": re.compile(r"Total Weights Memory: (\d+) bytes"),
    "scratch": re.compile(r"Max Scratch Memory: (\d+) bytes"),
}
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def network_layers(network: INetworkDefinition) -> list[dict[str, Any]]:
    """The layers that the parser made of the graph, in order, with the ONNX node that each one is for.

    A shape's unknown size is -1.
    """
    return [_layer(network.get_layer(index)) for index in range(network.num_layers)]


def _layer(layer: ILayer) -> dict[str, Any]:
    nodes = _ONNX_LAYER.findall(layer.metadata or "")
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    return {
        "name": layer.name,
        "type": layer.type.name,
        "nodes": list(dict.fromkeys(nodes)),
        "outputs": [_tensor(tensor) for tensor in outputs if tensor is not None],
    }


def _tensor(tensor: ITensor) -> dict[str, Any]:
    try:
        shape = list(tensor.shape)
    except ValueError:  # its rank is known only when it runs
        shape = None
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": shape}


def compiled_layers(log: ILogger) -> list[dict[str, Any]]:
    """The kernels of the engine: what the builder fused the network's layers into, as it says in its log."""
    texts = [text for _, text in log.messages if text.startswith("Layers:")]
    found = map(_KERNEL.match, texts[-1].splitlines() if texts else ())
    return [_kernel(match) for match in found if match]


def _kernel(match: re.Match[str]) -> dict[str, Any]:
    inputs, _, rest = match["rest"].partition("Constants: [")
    constants, _, outputs = rest.partition("Outputs: [")
    if not rest:  # a layer that has no constants
        inputs, _, outputs = match["rest"].partition("Outputs: [")
    return {
        "name": match["name"],
        "type": match["kind"],
        "nodes": list(dict.fromkeys(_ONNX_LAYER.findall(match["rest"]))),
        "inputs": _tensors(inputs),
        "constants": _tensors(constants),
        "outputs": _tensors(outputs),
    }


def _tensors(text: str) -> list[dict[str, Any]]:
    return [
        {
            "name": match["name"],
            "dtype": match["dtype"].lower(),
            "shape": [int(size) for size in match["shape"].split(",") if size],
        }
        for match in _TENSOR.finditer(text)
    ]


def memory(log: ILogger) -> dict[str, int]:
    """Bytes for activations, weights and scratch at the greatest sizes, as far as the builder says them."""
    found = {}
    for name, pattern in _MEMORY.items():
        for _, text in log.messages:
            if match := pattern.search(text):
                found[name] = int(match[1])
    return found
