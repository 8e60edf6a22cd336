"""Keys and values in one buffer: what a decoder's attention gives in any parts, wherever they are kept."""

from __future__ import annotations

from pathlib import Path

import families
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from moe_export import Decoder, UsageError
from moe_export.comparing.decoding import with_decoding
from moe_export.export.decoder.genai import FILE, genai_config
from moe_export.export.decoder.shared_buffers import BUFFER, DOMAIN, in_buffers, share_buffers
from moe_export.export.frontend.subject import make_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.export.pipeline import Options, check_attention, export_subject
from moe_export.running.choices import runner_of
from moe_export.verify import Report, Tolerance
from moe_export.verify import decoding as verified

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
TEXT = f"""<ir_version: 8, opset_import: ["" : 17]>
attention (
  float[batch, {HEADS}, sequence, {WIDTH}] q, float[batch, {KEY_HEADS}, sequence, {WIDTH}] k,
  float[batch, {KEY_HEADS}, sequence, {WIDTH}] v, int64[batch, sequence] ids,
  int64[batch, "past_sequence + sequence"] attention_mask,
  float[batch, {KEY_HEADS}, past_sequence, {WIDTH}] past_key,
  float[batch, {KEY_HEADS}, past_sequence, {WIDTH}] past_value
) => (
  float[batch, {HEADS}, sequence, {WIDTH}] y,
  float[batch, {KEY_HEADS}, "past_sequence + sequence", {WIDTH}] present_key,
  float[batch, {KEY_HEADS}, "past_sequence + sequence", {WIDTH}] present_value
) <
  int64 zero = {{0}}, int64 one = {{1}}, int64[1] two = {{2}}, int64[1] first = {{0}}, int64[2] inner = {{1, 2}},
  int64[1] minus = {{-1}}, float nothing = {{0}}, float low = {{-inf}}, float scale = {{0.4}}, float cap = {{1.5}},
  int64[5] several = {{1, 1, 2, 1, 1}}, int64[4] joined = {{0, {HEADS}, -1, {WIDTH}}}
> {{
  present_key = Concat<axis = -2>(past_key, k)
  past_shape = Shape<start = 2, end = 3>(past_key)
  past = Squeeze(past_shape)
  total_shape = Shape<start = 2, end = 3>(present_key)
  total = Squeeze(total_shape)
  every = Range(zero, total, one)
  new = Range(past, total, one)
  row = Unsqueeze(every, first)
  column = Unsqueeze(new, minus)
  causal = LessOrEqual(row, column)
  counts = Cast<to = 9>(attention_mask)
  counts_4 = Unsqueeze(counts, inner)
  seen = And(causal, counts_4)
  mask = Where(seen, nothing, low)
  present_value = Concat<axis = 2>(past_value, v)
  key_5 = Unsqueeze(present_key, two)
  key_many = Expand(key_5, several)
  keys = Reshape(key_many, joined)
  value_5 = Unsqueeze(present_value, two)
  value_many = Expand(value_5, several)
  values = Reshape(value_many, joined)
  turned = Transpose<perm = [0, 1, 3, 2]>(keys)
  product = MatMul(q, turned)
  scaled = Mul(product, scale)
  capped_in = Div(scaled, cap)
  capped = Tanh(capped_in)
  scores = Mul(cap, capped)
  masked = Add(scores, mask)
  weights = Softmax<axis = -1>(masked)
  y = MatMul(weights, values)
}}"""
PADDED = 2  # places in front of the last row that do not count


def model_of(text: str = TEXT) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.fixture(scope="module")
def both() -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]:
    model = model_of()
    found = session(model)
    assert share_buffers(model) == "keys and values of 1 layer may stay in one buffer (GroupQueryAttention)"
    return found, session(model)


@pytest.mark.parametrize("longer", [0, 3])
@pytest.mark.parametrize(
    ("batch", "new", "past"),
    [
        (2, 5, 0),
        (2, 1, 5),
        (2, 3, 5),
        (1, 3, 5),
        (2, 0, 5),
        (1, 0, 5),
        (2, 1, 0),
        (1, 1, 0),
        (1, 1, 9),
        (2, 2, 1),
        (3, 40, 0),
        (3, 17, 30),
        (1, 40, 30),
    ],
)
def test_any_part_is_what_it_was(both, batch, new, past, longer):
    """With a buffer that is longer, too, whatever is behind what counts."""
    draw = np.random.default_rng(0)

    def normal(*sizes):
        return draw.normal(size=sizes).astype(np.float32)

    mask = np.ones((batch, past + new), np.int64)
    if past + new > PADDED + 1:
        mask[-1, :PADDED] = 0
    given = {
        "q": normal(batch, HEADS, new, WIDTH),
        "k": normal(batch, KEY_HEADS, new, WIDTH),
        "v": normal(batch, KEY_HEADS, new, WIDTH),
        "ids": np.zeros((batch, new), np.int64),
        "attention_mask": mask,
    }
    kept = {name: normal(batch, KEY_HEADS, past, WIDTH) for name in ("past_key", "past_value")}
    rest = np.full((batch, KEY_HEADS, longer and new + longer, WIDTH), np.nan, np.float32)
    wanted = both[0].run(None, {**given, **kept})
    buffers = {name: np.concatenate([x, rest], 2) for name, x in kept.items()}
    found = both[1].run(None, {**given, **buffers})
    for name, one, other in zip(("y", "key", "value"), wanted, found, strict=True):
        np.testing.assert_allclose(other[:, :, : one.shape[2]], one, rtol=1e-5, atol=1e-6, err_msg=name)
    assert found[1].shape[2] == past + new + longer


def test_the_axis_of_a_buffer_says_so():
    model = model_of()
    assert not in_buffers(model.graph)
    share_buffers(model)
    assert in_buffers(model.graph)
    assert [str(size) for size in model.graph.outputs[1].shape][2] == BUFFER == verified.BUFFER
    assert model.opset_imports[DOMAIN] == 1
    assert not [node for node in model.graph if node.op_type in ("Concat", "Softmax")][1:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("attention_mask", "counted"), "it takes no attention_mask"),
        (("present_key = Concat<axis = -2>(past_key, k)", "present_key = Concat<axis = -2>(k, past_key)"),
         "past_key does not grow at its end"),
        (("(weights, values)", "(weights, keys)"), "keys is read by 2 nodes, not by one"),
        (("masked = Add(scores, mask)", "masked = Where(seen, scores, low)"), "past_key leads to Where"),
        (("Softmax<axis = -1>(masked)", "Softmax<axis = 2>(masked)"), "past_key leads to Softmax"),
        (("past = Squeeze(past_shape)", "past = Squeeze(past_shape)\n  more = Relu(past_key)"),
         "past_key is read by Concat, Relu, not by one Concat"),
        (("capped = Tanh(capped_in)", "capped = Sigmoid(capped_in)"), "past_key leads to Sigmoid"),
    ],
)  # fmt: skip
def test_what_has_another_form_is_left_as_it_is(change, reason):
    proto = onnx.parser.parse_model(TEXT.replace(*change))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    before = [node.op_type for node in model.graph]
    note = share_buffers(model)
    assert note.startswith("keys and values are copied for each token, not kept in one buffer: ")
    assert reason in note
    assert [node.op_type for node in model.graph] == before


def test_a_width_that_the_kernel_refuses():
    text = TEXT.replace(f", {WIDTH}]", ", 6]").replace(f"-1, {WIDTH}}}", "-1, 6}")
    assert "the width of a head must be a multiple of 8" in share_buffers(model_of(text))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"decoder": False}, "about a decoder's keys and values"),
        ({"target": "tensorrt"}, "is for onnxruntime-cpu, not for tensorrt"),
        ({"target": "onnxruntime-cuda"}, "is for onnxruntime-cpu, not for onnxruntime-cuda"),
    ],
)
def test_where_the_operator_is_not_run(options, reason):
    with pytest.raises(UsageError, match=reason):
        check_attention(Options(**({"decoder": True, "attention": "contrib"} | options)))


BY_NAME = {family.name: family for family in families.FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_families(name, tmp_path):
    """All parts, kept as they are and in buffers; and the text that a loop writes into one buffer, and genai's."""
    model = BY_NAME[name].build_lm()
    ids = {"input_ids": torch.randint(3, 32, (2, 7))}
    subject = make_subject(model, (), ids, source=Path(__file__), how="a test")
    options = Options(gates=False, simplify=False, decoder=True, attention="contrib")
    graph = export_subject(subject, options)[0]
    assert in_buffers(graph.model.graph), graph.notes
    path = tmp_path / "model.onnx"
    write_model(graph.model, path)
    report = with_decoding(
        Report("torch", "graph", ()), runner_of(path, "cpu"), graph.reference, Tolerance(), 0
    )
    assert report.verdict == "equal", str(report)
    assert "parts of 4, 3, 2, in buffers" in [case.label for case in report.cases]
    prompt, settings = torch.tensor([[5, 17, 9], [8, 30, 4]]), {"max_new_tokens": 20, "do_sample": False}
    (tmp_path / FILE).write_text(genai_config(graph.reference.module, graph.model.graph, path.name))
    assert '"past_present_share_buffer": true' in (tmp_path / FILE).read_text()
    wanted = model.generate(
        prompt[:1], min_new_tokens=20, **settings
    )  # its shortest length rules out the end
    assert text_of_genai(tmp_path, prompt[:1].numpy(), 23) == wanted[0].tolist()
    model.generation_config.eos_token_id = None
    wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert Decoder(path).generate(prompt.numpy(), max_new_tokens=20).tolist() == wanted.tolist()


def text_of_genai(folder: Path, prompt: np.ndarray, length: int) -> list[int]:
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install --no-deps onnxruntime-genai")
    parameters = genai.GeneratorParams(opened := genai.Model(str(folder)))
    parameters.set_search_options(max_length=length, min_length=length)
    generator = genai.Generator(opened, parameters)
    generator.append_tokens(prompt.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]
