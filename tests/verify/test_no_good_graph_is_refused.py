"""No false alarms: a right graph passes with every kind of values, under many seeds.

Every model of the repository, as exported, in float32 and in half precision; three seeds in the fast run. Then models
that lose many digits: sums that cancel, 24 layers, logits of a language model; with one thread of onnxruntime and two.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from slow_cases import slow
from threads import onnxruntime_threads

from moe_export.comparing.apart import fork_model
from moe_export.comparing.checking import verify_graph
from moe_export.comparison_settings import ComparisonSettings
from moe_export.export import Options, export_subject, load_subject
from moe_export.export.onnx.serialize import write_model
from moe_export.verify import Tolerance

MODELS = sorted(
    path for path in (Path(__file__).parents[2] / "models").glob("*.py") if path.stem != "__init__"
)


def refused(path: Path, folder: Path, seeds: int, options: Options, thorough: bool = True) -> list[str]:
    """The reports of graphs that do not pass, as text."""
    found = []
    for number, graph in enumerate(export_subject(load_subject(str(path)), options)):
        file = folder / f"{number}.onnx"
        write_model(graph.model, file)
        report, _ = verify_graph(
            graph, file, tolerance=Tolerance(), settings=ComparisonSettings(thorough, seeds)
        )
        assert len(report.compared) > 10
        if report.exit_code:
            found.append(f"{path.stem} {graph.kind}\n{report}")
    return found


@pytest.mark.parametrize("path", [MODELS[-2], slow(MODELS[-1])], ids=lambda path: path.stem)
def test_few_seeds(path, tmp_path):
    assert refused(path, tmp_path, 3, Options()) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_hundred_seeds(path, tmp_path):
    assert refused(path, tmp_path, 100, Options()) == []


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_other_opsets(path, tmp_path, opset):
    assert refused(path, tmp_path, 100, Options(opset=opset)) == []


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["dense", "slices", "blocks", "gather", "loop"])
def test_every_lowering_of_experts(tmp_path, experts):
    path = next(path for path in MODELS if path.stem == "sparse_moe")
    assert refused(path, tmp_path, 100, Options(experts=experts)) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_half_precision_as_it_is_verified_by_default(path, tmp_path, dtype):
    assert refused(path, tmp_path, 100, Options(dtype=dtype), thorough=False) == []


HEADER = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\ntorch.manual_seed(0)\n"
CANCELS = """
class Cancels(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 256), nn.Linear(256, 32)

    def forward(self, x):
        y = self.down(torch.tanh(self.up(x))).exp()
        scores = x @ x.transpose(-1, -2)
        return (y * 100).cumsum(-1) - 100 * y.sum(-1, keepdim=True), (scores - scores.mean(-1, keepdim=True)) @ x

model = Cancels()
example_inputs = (torch.randn(2, 10, 32),)
"""
DEEP = """
class Block(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.one, self.two = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        q, k, v = self.qkv(self.one(x)).chunk(3, -1)
        x = x + self.out((4 * q @ k.transpose(-1, -2)).softmax(-1) @ v)
        return x + 8 * self.down(F.silu(8 * self.up(self.two(x))))

model = nn.Sequential(*(Block() for _ in range(24)), nn.Linear(32, 50))
example_inputs = (torch.randn(2, 10, 32),)
"""
LANGUAGE = """
from transformers import MixtralConfig, MixtralForCausalLM

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm = MixtralForCausalLM(MixtralConfig(
            vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
            initializer_range=0.3,
        ))

    def forward(self, input_ids):
        return self.lm(input_ids=input_ids, use_cache=False).logits

model = Model().eval()
example_inputs = {"input_ids": torch.randint(0, 96, (2, 14))}
"""


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        pytest.param(CANCELS, 2, id="sums that cancel", marks=pytest.mark.slow),
        pytest.param(DEEP, 20, id="24 layers", marks=pytest.mark.slow),
        pytest.param(LANGUAGE, 20, id="a language model", marks=pytest.mark.slow),
    ],
)
def test_models_that_lose_digits(text, seeds, tmp_path):
    (tmp_path / "net.py").write_text(HEADER + text)
    subject = load_subject(str(tmp_path / "net.py"), apart=fork_model)
    graph = export_subject(subject, Options(gates=False))[0]
    write_model(graph.model, tmp_path / "net.onnx")
    ratios = []
    for threads in (1, 2):
        with onnxruntime_threads(threads):
            report, _ = verify_graph(
                graph, tmp_path / "net.onnx", tolerance=Tolerance(), settings=ComparisonSettings(seeds=seeds)
            )
        assert report.verdict == "equal", str(report)
        ratios += [found.standing.ratio for _, found in report.by_float64]
    assert ratios, "all of them are beyond the plain tolerance"
