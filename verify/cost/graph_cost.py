"""What a graph costs at one size: FLOPs, bytes of weights, and the memory that its values need at once.

One run of ONNX Runtime's CPU provider with all optimisations off, and its profile, which tells the shapes of every
node each time that it ran: also inside the bodies of `Scan` and `Loop`, and where sizes depend on the data.

Counted are a multiplication and an addition as one FLOP each (so 2 m n k for a matrix product), any other elementwise
operator as one for each element that it gives, a reduction as one for each that it takes, and what moves data as none.
`_PER_ELEMENT` lists what is several steps at once. An operator that is not known here is named, and counts nothing.

Memory is the largest sum of values that are alive at the same time, the graph run in its own order, each value freed
behind its last reader: what an engine needs that neither fuses nor computes in place. Views (`Reshape` and the like)
are free; weights and the graph's inputs do not count; what a sequence holds does not either.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import onnx
from onnx.inliner import inline_local_functions

from moe_export.verify.bodies import all_nodes, bodies, reads
from moe_export.verify.cost.einsum_cost import einsum_flops
from moe_export.verify.specs import Array

Shape = Sequence[int]

_BYTES = {
    "float": 4, "double": 8, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1,
}  # fmt: skip
_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
_MOVES = _VIEWS | {
    "Transpose", "Concat", "Split", "Slice", "Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND",
    "Expand", "Tile", "Pad", "Cast", "CastLike", "Shape", "Size", "Range", "Constant", "ConstantOfShape", "OneHot",
    "NonZero", "TopK", "Where", "Trilu", "SequenceInsert", "SequenceConstruct", "SequenceEmpty", "SequenceAt",
    "ConcatFromSequence", "SplitToSequence", "Compress", "EyeLike", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
_CONTROL = {"If", "Loop", "Scan"}
_REDUCTIONS = {
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSumExp", "CumSum", "ArgMax", "ArgMin", "GlobalAveragePool",
}  # fmt: skip
_PER_ELEMENT = {
    "Softmax": 5, "LogSoftmax": 6, "LayerNormalization": 8, "SimplifiedLayerNormalization": 6, "RMSNormalization": 6,
    "GroupNormalization": 8, "InstanceNormalization": 8, "BatchNormalization": 4, "Gelu": 5, "Swish": 2, "HardSwish": 3,
    "Softplus": 2, "Mish": 4, "QuickGelu": 3,
    **dict.fromkeys((
        "Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Sum", "Mean", "Neg", "Abs", "Sign", "Reciprocal",
        "Sqrt", "Exp", "Log", "Erf", "Sin", "Cos", "Tan", "Sinh", "Cosh", "Asin", "Acos", "Atan", "Sigmoid", "Tanh",
        "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "HardSigmoid", "Clip", "Floor", "Ceil", "Round", "Equal",
        "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf", "BitShift",
    ), 1),
}  # fmt: skip

_OF_4_BITS = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1}
"""Types of which a byte holds two."""


@dataclass(frozen=True)
class Work:
    """What a graph, or a block of it, costs.

    Attributes:
        nodes: Nodes, those in the bodies of loops among them, each once.
        flops: Of one run.
        weight_bytes: Of the initializers that it reads.
        activation_bytes: See the module's docstring; of a block: of the values that its nodes make.
        milliseconds: Time of its nodes in the profiled, unoptimised run: useful as a share, not as a latency.
    """

    nodes: int
    flops: int
    weight_bytes: int
    activation_bytes: int
    milliseconds: float


class CostEntry(TypedDict):
    """What a graph costs at one size, and each block of it."""

    nodes: int
    flops: int
    weight_bytes: int
    activation_bytes: int
    milliseconds: float
    border_bytes: int
    blocks: Annotated[dict[str, dict[str, Any]], dict[str, Work]]
    uncounted: list[str]


@dataclass(frozen=True)
class Cost:
    """What a graph costs at one size.

    Attributes:
        total: All of it.
        blocks: By the name of the block; each block's modules and what is within them.
        border_bytes: Of the graph's inputs and outputs.
        uncounted: Operators whose FLOPs are not known.
    """

    total: Work
    blocks: Mapping[str, Work]
    border_bytes: int
    uncounted: tuple[str, ...] = ()

    @property
    def bytes_moved(self) -> int:
        """The least that one run reads and writes: each weight, input and output once."""
        return self.total.weight_bytes + self.border_bytes

    def to_dict(self) -> CostEntry:
        """Plain data: FLOPs, bytes, and the same for each block."""
        return {
            "nodes": self.total.nodes,
            "flops": self.total.flops,
            "weight_bytes": self.total.weight_bytes,
            "activation_bytes": self.total.activation_bytes,
            "milliseconds": self.total.milliseconds,
            "border_bytes": self.border_bytes,
            "blocks": {name: asdict(work) for name, work in self.blocks.items()},
            "uncounted": list(self.uncounted),
        }


def cost_of(
    model: str | Path | onnx.ModelProto, inputs: Mapping[str, Array], blocks: Mapping[str, str] | None = None
) -> Cost:
    """Run a graph once and count.

    Args:
        model: The graph; a file of more than 2 GB of weights is not supported here.
        inputs: What it is run on, by name.
        blocks: Name → module path, for figures of parts (`parts_of`). A node belongs to the block with the longest
            path that its own `module` metadata lies in.

    Raises:
        Exception: Whatever ONNX Runtime raises for a graph that it cannot run.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model if isinstance(model, onnx.ModelProto) else onnx.load(model))
    if proto.functions:
        proto = inline_local_functions(proto)
    nodes = _named(proto.graph)
    runs = _profiled(proto, inputs)
    return _Count(proto.graph, nodes, runs).cost(inputs, blocks or {})


def parts_of(model: onnx.ModelProto) -> dict[str, str]:
    """The blocks of experts and the recurrences of a graph, and the modules beside them: name → module path.

    Read off the `block` and `module` metadata of its nodes. Beside the blocks stand the outermost modules that neither
    hold a block nor lie in one.
    """
    nodes = [*all_nodes(model.graph), *(node for function in model.functions for node in function.node)]
    facts = [{entry.key: entry.value for entry in node.metadata_props} for node in nodes]
    kinds: dict[str, list[str]] = {}
    for kind, _, path in (fact["block"].partition(":") for fact in facts if "block" in fact):
        if kind not in kinds.setdefault(path, []):
            kinds[path].append(kind)
    blocks = {f"{path} ({', '.join(found)})": path for path, found in kinds.items()}
    outer = dict.fromkeys(_outermost(fact.get("module", ""), list(kinds)) for fact in facts)
    return blocks | {path: path for path in outer if path}


def _outermost(module: str, blocks: Sequence[str]) -> str:
    """The shortest path that a module lies in and that holds no block; "" if it lies in a block."""
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        path = ".".join(parts[:length])
        if "model" in blocks or path in blocks or path == "model":
            return ""
        if not any(block.startswith(f"{path}.") for block in blocks):
            return path
    return ""


def _named(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Every node by a unique name, which is assigned to it."""
    nodes = {f"n{number}": node for number, node in enumerate(all_nodes(graph))}
    for name, node in nodes.items():
        node.name = name
    return nodes


@dataclass(frozen=True)
class _Run:
    """One execution of a node."""

    inputs: tuple[Shape, ...]
    outputs: tuple[tuple[str, Shape], ...]
    milliseconds: float


def _profiled(proto: onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, list[_Run]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        session.run(None, dict(inputs))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs: dict[str, list[_Run]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs.setdefault(event["name"].removesuffix("_kernel_time"), []).append(_run(event))
    return runs


def _run(event: Mapping[str, Any]) -> _Run:
    given = [next(iter(value.items())) for value in event["args"]["output_type_shape"] if value]
    taken = [next(iter(value.values())) for value in event["args"]["input_type_shape"] if value]
    return _Run(tuple(taken), tuple(given), event["dur"] / 1000)


class _Count:
    """Totals over the executions of a graph's nodes."""

    def __init__(
        self, graph: onnx.GraphProto, nodes: Mapping[str, onnx.NodeProto], runs: Mapping[str, Sequence[_Run]]
    ) -> None:
        self._graph = graph
        self._nodes = nodes
        self._runs = runs
        self._sizes: dict[str, int] = {}
        self._flops: dict[str, int] = {}
        self._unknown: set[str] = set()
        for name, node in nodes.items():
            self._count(name, node)
        self._weights = {value.name: _tensor_bytes(value) for value in graph.initializer}

    def _count(self, name: str, node: onnx.NodeProto) -> None:
        given = [value for value in node.output if value]
        flops = 0
        for run in self._runs.get(name, ()):
            for value, (kind, shape) in zip(given, run.outputs, strict=False):
                size = prod(shape) * _BYTES.get(kind, 1)
                self._sizes[value] = max(self._sizes.get(value, 0), size)
            flops += self._flops_of(node, run)
        self._flops[name] = flops

    def _flops_of(self, node: onnx.NodeProto, run: _Run) -> int:
        found = flops_of(node, run.inputs, [shape for _, shape in run.outputs])
        if found is None:
            self._unknown.add(f"{node.domain}.{node.op_type}".lstrip("."))
        return found or 0

    def cost(self, inputs: Mapping[str, Array], blocks: Mapping[str, str]) -> Cost:
        own = {name: _block_of(node, blocks) for name, node in self._nodes.items()}
        border = sum(np.asarray(array).nbytes for array in inputs.values())
        border += sum(self._sizes.get(value.name, 0) for value in self._graph.output)
        parts = {block: self._work(lambda name, block=block: own[name] == block) for block in blocks}  # type: ignore[misc]
        return Cost(self._work(lambda name: True), parts, border, tuple(sorted(self._unknown)))

    def _work(self, counts: Callable[[str], bool]) -> Work:
        names = [name for name in self._nodes if counts(name)]
        read = {value for name in names for value in self._nodes[name].input}
        made = {value for name in names for value in self._nodes[name].output}
        loops = {name for name in self._nodes if bodies(self._nodes[name])}
        return Work(
            nodes=len(names),
            flops=sum(self._flops[name] for name in names),
            weight_bytes=sum(self._weights.get(value, 0) for value in read),
            activation_bytes=self._peak(self._graph, made),
            milliseconds=sum(
                run.milliseconds for name in names if name not in loops for run in self._runs.get(name, ())
            ),
        )

    def _peak(self, graph: onnx.GraphProto, made: set[str]) -> int:
        """The largest sum of the bytes of `made` values that are alive at the same time."""
        owner: dict[str, str] = {}  # a view → whose memory it is
        last: dict[str, int] = {}
        for index, node in enumerate(graph.node):
            for value in reads(node):
                last[owner.get(value, value)] = index
            if node.op_type in _VIEWS:
                owner[node.output[0]] = owner.get(node.input[0], node.input[0])
        last.update({owner.get(value.name, value.name): len(graph.node) for value in graph.output})
        freed: dict[int, list[str]] = {}
        alive = most = 0
        for index, node in enumerate(graph.node):
            inner = max((self._peak(body, made) for body in bodies(node).values()), default=0)
            for value in node.output:
                if value in made and value not in owner and node.op_type != "Constant":
                    alive += self._sizes.get(value, 0)
                    freed.setdefault(last.get(value, index), []).append(value)
            most = max(most, alive + inner)
            alive -= sum(self._sizes.get(value, 0) for value in freed.pop(index, ()))
        return most


def _block_of(node: onnx.NodeProto, blocks: Mapping[str, str]) -> str:
    """The block that a node belongs to; "" for none."""
    module = next((entry.value for entry in node.metadata_props if entry.key == "module"), "")
    within = [
        (len(path), block)
        for block, path in blocks.items()
        if path in ("", "model") or module == path or module.startswith(f"{path}.")
    ]
    return max(within)[1] if within else ""


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    count = int(prod(tensor.dims))
    if tensor.data_type in _OF_4_BITS:
        return -(-count // 2)
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def flops_of(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int | None:
    """FLOPs of one run of a node, as counted in the module's docstring; None if its operator is not known.

    Args:
        node: The node.
        inputs: Shapes of the inputs that it has.
        outputs: Shapes of the outputs that it has.
    """
    kind = node.op_type
    if node.domain == "com.microsoft" and kind in _CONTRIB:
        return _CONTRIB[kind](node, inputs)
    if kind in _MOVES or kind in _CONTROL:
        return 0
    given = prod(outputs[0]) if outputs else 0
    if kind == "Einsum":
        return einsum_flops(_equation(node), inputs)
    if kind == "MatMul":
        return 2 * given * inputs[0][-1]
    if kind == "Gemm":
        contracted = inputs[0][0] if _attribute(node, "transA") else inputs[0][1]
        return 2 * given * contracted + given * (len(inputs) > 2)
    if kind == "Conv":
        return 2 * given * prod(inputs[1][1:]) + given * (len(inputs) > 2)
    if kind == "ConvTranspose":
        return 2 * prod(inputs[0]) * prod(inputs[1][1:])
    each = _PER_ELEMENT.get(kind)
    if kind in _REDUCTIONS:
        given, each = prod(inputs[0]), 1
    return None if each is None else given * each


def _moe_flops(node: onnx.NodeProto, inputs: Sequence[Shape]) -> int:
    """Each of N tokens multiplies with the matrices of k of E experts; a matrix is (E, a, b)."""
    tokens = prod(inputs[0][:-1])
    matrices = [shape for shape in inputs[2:] if len(shape) == 3]
    return 2 * tokens * (_attribute(node, "k") or 1) * sum(prod(shape[1:]) for shape in matrices)


def _attention_flops(node: onnx.NodeProto, inputs: Sequence[Shape]) -> int:
    """A step decays the state (B, H, a, b), adds a product and reads; a delta rule reads once more before it."""
    rule = next(
        (attribute.s for attribute in node.attribute if attribute.name == "update_rule"), b"gated_delta"
    )
    each = 4 + (b"gated" in rule) + 2 * (b"delta" in rule)
    return each * inputs[0][1] * prod(inputs[3])


_CONTRIB = {"MoE": _moe_flops, "LinearAttention": _attention_flops}


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), 0)


def _equation(node: onnx.NodeProto) -> str:
    return next(str(attribute.s, "utf-8") for attribute in node.attribute if attribute.name == "equation")
