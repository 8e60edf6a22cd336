"""Half precision: which nodes compute in float16 or bfloat16, and where the casts stand.

The rules are those of `torch.autocast`, on the finished graph:

1. matrix products and convolutions are narrow, and so is what only narrow values go into;
2. what sums, exponentiates, divides by a norm or counts stays float32 (`WIDE`), and so does what reads both kinds;
3. the logits that experts are chosen by are float32 from the product on: one flipped expert costs more than the gate;
4. so is what a Scan reads, and its body, and with it every recurrent state (and the bodies of Loop and If); a product
   of decays (of anything that comes from `exp`, `softplus` or `cumsum`) is part of a recurrence too;
5. what ONNX does not allow in the narrow type at the graph's opset is float32.

Inputs and outputs keep their types. A value is cast at most once, where a narrow node first reads it or the other way
round; weights are converted in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from moe_export.errors import UsageError
from moe_export.export.onnx.bodies import bodies
from moe_export.export.onnx.counted_sizes import without_counted
from moe_export.export.onnx.provenance import MODULE
from moe_export.export.onnx.types_lacking import with_kinds
from moe_export.export.precision.casts import write_casts

DTYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_NAMES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}

PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose"})
CHOICES = frozenset({"TopK", "ArgMax", "ArgMin"})
DECAYS = frozenset({"Exp", "Softplus", "CumSum"})
WIDE = (
    CHOICES
    | DECAYS
    | frozenset(
        """
    Softmax LogSoftmax Hardmax Log Pow Sqrt Reciprocal Sin Cos Range EyeLike QuantizeLinear
    DequantizeLinear LayerNormalization RMSNormalization GroupNormalization InstanceNormalization
    BatchNormalization LpNormalization MeanVarianceNormalization ReduceMean ReduceSum ReduceProd
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare RandomNormal RandomNormalLike
    RandomUniform RandomUniformLike
    """.split()  # noqa: SIM905 (a table that people read)
    )
)
_CONSTANTS = frozenset({"Constant"})
_PERHAPS_FLOAT = (ir.DataType.FLOAT, None)


@dataclass(frozen=True)
class Precision:
    """What became of a graph.

    Attributes:
        model: The graph in mixed precision.
        narrow: How many nodes compute in the narrow type.
        wide: How many stay float32.
        casts: How many casts there are between them.
    """

    model: ir.Model
    narrow: int
    wide: int
    casts: int

    def note(self, dtype: str) -> str:
        """A line for the report."""
        return f"{dtype}: {self.narrow} nodes, {self.wide} stay float32, {self.casts} casts between them"


def lower_precision(model: ir.Model, dtype: str, keep: Sequence[str] = ()) -> Precision:
    """Let the float32 parts of a graph that can bear it compute in a narrow type.

    Args:
        model: The graph; it is changed. Inputs and outputs keep their types.
        dtype: `float16` or `bfloat16`.
        keep: Paths of modules that stay float32, with all that is in them.
    """
    if any(value.dtype is None for node in model.graph for value in node.outputs):
        model = ShapeInferencePass()(model).model
        for value in (value for node in model.graph.all_nodes() for value in node.outputs):
            value.shape = without_counted(value.shape)
    narrow_type = DTYPES[dtype]
    wide = _wide_nodes(model, narrow_type, keep)
    casts = write_casts(model, wide, narrow_type)
    narrow = [node for node in model.graph if node not in wide and _has_float(node)]
    return Precision(model, len(narrow), len([node for node in wide if _has_float(node)]), casts)


def check_kept(model: ir.Model, keep: Sequence[str]) -> None:
    """Refuse modules that are to stay float32 and that the graph has nothing of.

    Raises:
        UsageError: There is one; names those that the graph has.
    """
    nodes = list(model.graph.all_nodes())
    for module in keep:
        if not any(_kept(node, [module]) for node in nodes):
            paths = sorted({node.metadata_props.get(MODULE, "") for node in nodes} - {""})
            raise UsageError(
                f"--float32 {module}: no operator of the graph is of a module of this path",
                hint=f"modules of the graph: {', '.join(paths[:8])}" if paths else None,
            )


def _wide_nodes(model: ir.Model, dtype: ir.DataType, keep: Sequence[str]) -> set[ir.Node]:
    """The nodes that stay float32, in one walk in order."""
    opset = model.opset_imports.get("", 17)
    sources = _sources(model.graph)
    wide: set[ir.Node] = set()
    values: set[ir.Value] = {value for value in model.graph.inputs if _is_float(value)}
    decays: set[ir.Value] = set()
    for node in model.graph:
        read = [value for value in node.inputs if value is not None and _is_float(value)]
        changing = [value for value in read if not _is_constant(value)]
        decaying = any(value in decays for value in changing)
        product = node.op_type in PRODUCTS
        if node.op_type in DECAYS or (decaying and not product and node.op_type not in WIDE):
            decays.update(node.outputs)
        stays = (
            node in sources
            or node.op_type in WIDE
            or _kept(node, keep)
            or not _allowed(node, dtype, opset)
            or _counts(node)
            or (decaying if product else any(value in values for value in changing))
        )
        if stays and node.op_type not in _CONSTANTS:
            wide.add(node)
            values.update(value for value in node.outputs if _is_float(value))
    return wide


def _sources(graph: ir.Graph) -> set[ir.Node]:
    """The nodes behind a choice among scores, or behind a recurrence, back to the products that made what they read."""
    scans = [value for node in graph if node.op_type == "Scan" for value in node.inputs]
    return behind_choices(graph) | _behind(graph, scans)


def behind_choices(graph: ir.Graph) -> set[ir.Node]:
    """The nodes from a choice among scores back to the products that made them: a router, from its product on."""
    return _behind(graph, [node.inputs[0] for node in graph if node.op_type in CHOICES])


def _behind(graph: ir.Graph, values: Iterable[ir.Value | None]) -> set[ir.Node]:
    """The nodes that values come from, back to products, these included."""
    found: set[ir.Node] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        node = value.producer() if value is not None else None
        if node is None or node in found or node.graph is not graph:
            continue
        found.add(node)
        if node.op_type not in PRODUCTS:
            pending += [value for value in node.inputs if value is not None and value.dtype in _PERHAPS_FLOAT]
    return found


def _kept(node: ir.Node, keep: Sequence[str]) -> bool:
    path = node.metadata_props.get(MODULE, "")
    return any(path == module or path.startswith(f"{module}.") for module in keep)


def _counts(node: ir.Node) -> bool:
    """Whether it makes floats of integers: float16 has none above 2048."""
    source = node.inputs[0] if node.op_type == "Cast" and node.inputs else None
    return source is not None and not _is_float(source) and source.dtype is not ir.DataType.BOOL


def _allowed(node: ir.Node, dtype: ir.DataType, opset: int) -> bool:
    """Whether ONNX has the operator in the narrow type, and it is one whose types follow its inputs."""
    if node.domain not in {"", "ai.onnx"} or bodies(node):
        return False
    if any(
        value.type is not None and not isinstance(value.type, ir.TensorType) for value in _all_values(node)
    ):
        return False  # a sequence
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    pairs = [*with_kinds(node.inputs, schema.inputs), *with_kinds(node.outputs, schema.outputs)]
    allowed = {rule.type_param_str: set(rule.allowed_type_strs) for rule in schema.type_constraints}
    return all(
        _NAMES[dtype] in allowed.get(kind, {kind})
        for value, kind in pairs
        if value is not None and _is_float(value)
    )


def _all_values(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    yield from node.outputs


def _has_float(node: ir.Node) -> bool:
    return node.op_type not in {*_CONSTANTS, "Cast"} and any(
        value.dtype in {ir.DataType.FLOAT, *DTYPES.values()} for value in _all_values(node)
    )


def _is_float(value: ir.Value) -> bool:
    return value.dtype is ir.DataType.FLOAT


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type in _CONSTANTS)
