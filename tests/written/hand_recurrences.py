"""The best graphs that were made by hand for Mamba's recurrences, and what exporters write: what ours is held against.

Letters: b batch, l length, d channels, n state size, h heads, p size of a head, t, s steps of a chunk, c chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

D, N = 256, 16
H, P = 4, 64
A1 = -np.tile(np.arange(1, N + 1, dtype=np.float32), (D, 1))
A2 = -np.linspace(1, 16, H).astype(np.float32)


class Builder:
    """Nodes and constants of a graph."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def many(self, op: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        names = [f"{self.name}{len(self.nodes)}_{place}" for place in range(count)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        return self.many(op, 1, *inputs, **attributes)[0]

    def constant(self, array: Any) -> str:
        name = f"{self.name}c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64))

    def graph(self, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> onnx.GraphProto:
        def values(shapes: dict[str, list[Any]]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()]

        return helper.make_graph(self.nodes, "g", values(inputs), values(outputs), self.constants)

    def model(self, inputs: dict[str, list[Any]], result: str, shape: list[Any]) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [result], ["y"]))
        graph = self.graph(inputs, {"y": shape})
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model


INPUTS1 = {"u": ["b", "l", D], "delta": ["b", "l", D], "B": ["b", "l", N], "C": ["b", "l", N]}
INPUTS2 = {"x": ["b", "l", H, P], "dt": ["b", "l", H], "B": ["b", "l", N], "C": ["b", "l", N]}


def mamba_scan() -> onnx.ModelProto:
    """A step an iteration, discretised in the body."""
    g, body = Builder(), Builder("body")
    last, row = g.ints(-1), g.ints(1)
    decay = body("Exp", body("Mul", body("Unsqueeze", "delta_t", last), g.constant(A1)))
    added = body("Mul", body("Unsqueeze", body("Mul", "delta_t", "u_t"), last), body("Unsqueeze", "B_t", row))
    h = body("Add", body("Mul", decay, "h"), added)
    y = body("Squeeze", body("MatMul", h, body("Unsqueeze", "C_t", last)), last)
    inputs = {"h": ["b", D, N], "delta_t": ["b", D], "u_t": ["b", D], "B_t": ["b", N], "C_t": ["b", N]}
    first = g("ConstantOfShape", g("Concat", g("Shape", "u", start=0, end=1), g.ints(D, N), axis=0))
    _, ys = g.many(
        "Scan", 2, first, "delta", "u", "B", "C", num_scan_inputs=4, scan_input_axes=[1] * 4,
        scan_output_axes=[1], body=body.graph(inputs, {h: ["b", D, N], y: ["b", D]}),
    )  # fmt: skip
    return g.model(INPUTS1, g("Add", ys, g("Mul", "u", g.constant(np.ones(D, np.float32)))), ["b", "l", D])


def mamba_scan_wide() -> onnx.ModelProto:
    """A step an iteration, discretised in the body, the state (n, d): operators run along the longer axis."""
    g, body = Builder(), Builder("body")
    row, column = g.ints(2), g.ints(3)
    delta, u, c = (g("Unsqueeze", name, row) for name in ("delta", "u", "C"))
    decay = body("Exp", body("Mul", "delta_t", g.constant(np.ascontiguousarray(A1.T))))
    added = body("Mul", "B_t", body("Mul", "delta_t", "u_t"))
    h = body("Add", body("Mul", decay, "h"), added)
    y = body("MatMul", "C_t", h)
    inputs = {
        "h": ["b", N, D],
        "delta_t": ["b", 1, D],
        "u_t": ["b", 1, D],
        "B_t": ["b", N, 1],
        "C_t": ["b", 1, N],
    }
    first = g("ConstantOfShape", g("Concat", g("Shape", "u", start=0, end=1), g.ints(N, D), axis=0))
    _, ys = g.many(
        "Scan", 2, first, delta, u, g("Unsqueeze", "B", column), c, num_scan_inputs=4, scan_input_axes=[1] * 4,
        scan_output_axes=[1], body=body.graph(inputs, {h: ["b", N, D], y: ["b", 1, D]}),
    )  # fmt: skip
    skip = g("Mul", "u", g.constant(np.ones(D, np.float32)))
    return g.model(INPUTS1, g("Add", g("Squeeze", ys, row), skip), ["b", "l", D])


def mamba_scan_steps(steps: int = 16) -> onnx.ModelProto:
    """Several steps per iteration, discretised together."""
    g, body = Builder(), Builder("body")
    last, row = g.ints(-1), g.ints(2)
    length = g("Shape", "u", start=1, end=2)
    pads = g("Concat", g.ints(0, 0, 0, 0), g("Mod", g("Neg", length), g.ints(steps)), g.ints(0), axis=0)
    decay = body("Exp", body("Mul", body("Unsqueeze", "delta_t", last), g.constant(A1)))
    added = body("Mul", body("Unsqueeze", body("Mul", "delta_t", "u_t"), last), body("Unsqueeze", "B_t", row))
    decays, all_added = (body.many("Split", steps, v, axis=1) for v in (decay, added))
    h, states = "h", []
    for a, b in zip(decays, all_added, strict=True):
        h = body("Add", body("Mul", a, h), b)
        states.append(h)
    y = body("MatMul", body("Concat", *states, axis=1), body("Unsqueeze", "C_t", last))
    y = body("Squeeze", y, last)
    sizes = {"delta_t": D, "u_t": D, "B_t": N, "C_t": N}
    inputs = {"h": ["b", 1, D, N], **{name: ["b", steps, size] for name, size in sizes.items()}}
    first = g("ConstantOfShape", g("Concat", g("Shape", "u", start=0, end=1), g.ints(1, D, N), axis=0))
    iterations = [
        g("Reshape", g("Pad", name, pads), g.ints(0, -1, steps, size))
        for name, size in (("delta", D), ("u", D), ("B", N), ("C", N))
    ]
    _, ys = g.many(
        "Scan", 2, first, *iterations, num_scan_inputs=4, scan_input_axes=[1] * 4, scan_output_axes=[1],
        body=body.graph(inputs, {h: ["b", 1, D, N], y: ["b", steps, D]}),
    )  # fmt: skip
    ys = g("Slice", g("Reshape", ys, g.ints(0, -1, D)), g.ints(0), length, g.ints(1))
    return g.model(INPUTS1, g("Add", ys, g("Mul", "u", g.constant(np.ones(D, np.float32)))), ["b", "l", D])


def mamba_unrolled(length: int) -> onnx.ModelProto:
    """What exporters write: discretised before, seven nodes a step."""
    g = Builder()
    last = g.ints(-1)
    delta = g("Unsqueeze", "delta", last)
    decay = g("Exp", g("Mul", delta, g.constant(A1)))
    added = g("Mul", g("Mul", delta, g("Unsqueeze", "B", g.ints(2))), g("Unsqueeze", "u", last))
    h = g("ConstantOfShape", g("Concat", g("Shape", "u", start=0, end=1), g.ints(D, N), axis=0))
    rows = []
    for t in range(length):
        at = g.constant(np.array(t, np.int64))
        h = g("Add", g("Mul", g("Gather", decay, at, axis=1), h), g("Gather", added, at, axis=1))
        read = g("Unsqueeze", g("Gather", "C", at, axis=1), last)
        rows.append(g("Unsqueeze", g("Squeeze", g("MatMul", h, read), last), g.ints(1)))
    ys = g("Concat", *rows, axis=1)
    return g.model(INPUTS1, g("Add", ys, g("Mul", "u", g.constant(np.ones(D, np.float32)))), ["b", length, D])


def mamba2_unrolled(length: int) -> onnx.ModelProto:
    """What exporters write for a loop over the steps of Mamba-2."""
    g = Builder()
    h = g("ConstantOfShape", g("Concat", g("Shape", "x", start=0, end=1), g.ints(H, P, N), axis=0))
    rows = []
    for t in range(length):
        at = g.constant(np.array(t, np.int64))
        x, dt, b, c = (g("Gather", name, at, axis=1) for name in ("x", "dt", "B", "C"))
        decay = g("Unsqueeze", g("Exp", g("Mul", dt, g.constant(A2))), g.ints(2, 3))
        u = g("Unsqueeze", g("Mul", g("Unsqueeze", dt, g.ints(2)), x), g.ints(3))
        h = g("Add", g("Mul", h, decay), g("Mul", u, g("Unsqueeze", b, g.ints(1, 2))))
        flat = g("MatMul", g("Reshape", h, g.ints(0, H * P, N)), g("Unsqueeze", c, g.ints(2)))
        y = g(
            "Add", g("Reshape", flat, g.ints(0, H, P)), g("Mul", x, g.constant(np.ones((H, 1), np.float32)))
        )
        rows.append(g("Unsqueeze", y, g.ints(1)))
    return g.model(INPUTS2, g("Concat", *rows, axis=1), ["b", length, H, P])


def mamba2_chunks(steps: int = 32, exact: bool = True) -> onnx.ModelProto:
    """State space duality over chunks, a scan over the chunks' states.

    The segments are summed each by itself (`exact`), or are differences of cumulative sums, as it is usually written.
    """
    g = Builder()
    length = g("Shape", "x", start=1, end=2)
    filling = g("Mod", g("Neg", length), g.ints(steps))

    def filled(value: str, axes: int) -> str:
        behind = [g.ints(*[0] * (axes - 2))] if axes > 2 else []
        return g("Pad", value, g("Concat", g.ints(*[0] * (axes + 1)), filling, *behind, axis=0))

    u = g("Mul", "x", g("Unsqueeze", "dt", g.ints(3)))
    u = g(
        "Transpose", g("Reshape", filled(u, 4), g.ints(0, -1, steps, H, P)), perm=[0, 1, 3, 2, 4]
    )  # b c h s p
    logs = g("Reshape", filled(g("Mul", "dt", g.constant(A2)), 3), g.ints(0, -1, steps, H))
    logs = g("Transpose", logs, perm=[0, 1, 3, 2])  # b c h t
    columns = g(
        "Transpose", g("Reshape", filled("B", 3), g.ints(0, -1, steps, N)), perm=[0, 1, 3, 2]
    )  # b c n s
    rows = g("Reshape", filled("C", 3), g.ints(0, -1, steps, N))  # b c t n
    seen = np.tril(np.ones((steps, steps), np.float32))
    since = g("MatMul", logs, g.constant(seen.T.copy()))
    unseen = np.where(seen > 0, 0, -np.inf).astype(np.float32)
    if exact:
        r, t, s = np.ix_(*[np.arange(steps)] * 3)
        ones = ((r > s) & (r <= t)).astype(np.float32).reshape(steps, -1)
        sums = g(
            "Gemm", g("Reshape", logs, g.ints(-1, steps)), g.constant(ones), g.constant(unseen.reshape(1, -1))
        )
        shape = g("Concat", g("Shape", logs), g.ints(steps), axis=0)
        within = g("Reshape", g("Exp", sums), shape)
    else:
        sums = g("Sub", g("Unsqueeze", since, g.ints(4)), g("Unsqueeze", since, g.ints(3)))
        within = g("Exp", g("Add", sums, g.constant(unseen)))
    since = g("Exp", since)
    inside = g("MatMul", g("Mul", within, g("Unsqueeze", g("MatMul", rows, columns), g.ints(2))), u)
    to_end = g("Gather", within, g.constant(np.array(steps - 1, np.int64)), axis=3)
    scaled = g("Mul", g("Unsqueeze", columns, g.ints(2)), g("Unsqueeze", to_end, g.ints(3)))
    added = g("MatMul", scaled, u)  # b c h n p
    whole = g("Unsqueeze", g("Gather", since, g.ints(steps - 1), axis=3), g.ints(4))
    body = Builder("body")
    h = body("Add", body("Mul", "h", "a"), "s")
    before = body("Identity", "h")
    size = ["b", H, N, P]
    graph = body.graph({"h": size, "a": ["b", H, 1, 1], "s": size}, {h: size, before: size})
    first = g("ConstantOfShape", g("Concat", g("Shape", "x", start=0, end=1), g.ints(H, N, P), axis=0))
    _, starts = g.many(
        "Scan",
        2,
        first,
        whole,
        added,
        body=graph,
        num_scan_inputs=2,
        scan_input_axes=[1, 1],
        scan_output_axes=[1],
    )
    read = g("Mul", g("Unsqueeze", rows, g.ints(2)), g("Unsqueeze", since, g.ints(4)))
    y = g("Transpose", g("Add", inside, g("MatMul", read, starts)), perm=[0, 1, 3, 2, 4])
    y = g("Slice", g("Reshape", y, g.ints(0, -1, H, P)), g.ints(0), length, g.ints(1))
    y = g("Add", y, g("Mul", "x", g.constant(np.ones((H, 1), np.float32))))
    return g.model(INPUTS2, y, ["b", "l", H, P])
