"""What every model file promises: `model`, `example_inputs`, a demonstration, and a trace."""

import functools
import importlib
import math
import runpy
from pathlib import Path

import pytest
import torch

MODELS = Path(__file__).resolve().parents[2] / "models"
NAMES = sorted(path.stem for path in MODELS.glob("*.py") if path.stem != "__init__")

# What each demonstration prints.
PRINTED = {
    "attention": ["out (2, 7, 32)"],
    "gshard_moe": [
        "dispatched [[[1, 1, 1, 1], [3, 3, 3, 3]], [[2, 2, 2, 2], [0, 0, 0, 0]]]",
        "output (2, 10, 32)",
        "l_aux ()",
    ],
    "hybrid": ["logits (2, 10, 100)"],
    "mamba": ["y (2, 10, 32)"],
    "mamba2": ["y (2, 24, 32)"],
    "moe_gate": ["topk_idx (20, 2)", "topk_weight (20, 2)", "aux_loss 0"],
    "sparse_moe": ["output (2, 10, 32)", "expert_weights (20, 2)"],
}

# The dimensions of each input that stay symbolic when all may. A Python loop over time fixes its length.
DYNAMIC = {
    "attention": {"values": [0, 1], "keys": [0, 1], "query": [0, 1], "mask": [0, 1]},
    "gshard_moe": {"hidden_states": [0, 1]},
    "hybrid": {"input_ids": [0]},
    "mamba": {"x": [0]},
    "mamba2": {"u": [0, 1]},
    "moe_gate": {"hidden_states": [0, 1]},
    "sparse_moe": {"hidden_states": [0, 1]},
}


def subject(name):
    """The module in eval mode and its example inputs as positional and named arguments."""
    module = importlib.import_module(f"moe_export.models.{name}")
    inputs = module.example_inputs
    inputs = inputs() if callable(inputs) else inputs
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    return module.model.eval(), args, kwargs


def tensors(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [output for output in outputs if isinstance(output, torch.Tensor)]


def other_sizes(name, key, tensor, grow):
    """Two leading sizes: three sequences, `grow` times as long, in whole chunks where there are chunks."""
    step = 8 if name == "mamba2" else 1
    grown = [step * math.ceil(size * grow / step) for size in tensor.shape[:2]]
    wanted = grown if key == "mask" else [3, grown[1]]  # the mask has two lengths and no batch
    return [size if i in DYNAMIC[name][key] else tensor.shape[i] for i, size in enumerate(wanted)]


def resized(tensor, sizes):
    """A tensor of the same kind with other leading sizes."""
    shape = [*sizes, *tensor.shape[len(sizes) :]]
    if tensor.dtype == torch.int64:
        return torch.randint(0, 100, shape)
    return torch.ones(shape).tril().bool() if tensor.dtype == torch.bool else torch.randn(shape)


@pytest.fixture
def plain_einsum(monkeypatch):
    """torch.einsum without a contraction path: opt_einsum would read the sizes, and fix every one of them."""
    monkeypatch.setattr(torch.backends.opt_einsum, "enabled", False)


@functools.cache
def traced(name):
    model, args, kwargs = subject(name)
    auto = [dict.fromkeys(range(t.dim()), torch.export.Dim.AUTO) for t in [*args, *kwargs.values()]]
    shapes = dict(zip(kwargs, auto, strict=True)) if kwargs else tuple(auto)
    return torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes)


def test_the_tables_above_name_every_file():
    assert list(PRINTED) == list(DYNAMIC) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_runs_as_a_script(name, capsys):
    runpy.run_path(str(MODELS / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == PRINTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_is_seeded(name):
    """Two loads of the file give the same parameters and the same example."""
    first, second = (runpy.run_path(str(MODELS / f"{name}.py")) for _ in range(2))
    parameters = [list(loaded["model"].state_dict().values()) for loaded in (first, second)]
    assert len(parameters[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))
    examples = [loaded["example_inputs"] for loaded in (first, second)]
    examples = [example() if callable(example) else example for example in examples]
    values = [list(e.values()) if isinstance(e, dict) else list(e) for e in examples]
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_example_runs_and_is_finite(name):
    model, args, kwargs = subject(name)
    outputs = tensors(model(*args, **kwargs))
    assert len(outputs) > 0
    assert all(output.isfinite().all() for output in outputs)
    assert all(size > 1 for tensor in [*args, *kwargs.values()] for size in tensor.shape)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_traces_with_its_sizes_free(name, plain_einsum):
    program = traced(name)
    shapes = {
        node.name: [i for i, size in enumerate(node.meta["val"].shape) if not str(size).isdigit()]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    }
    assert shapes == DYNAMIC[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grow", [0.5, 1.0, 2.0, 5.0])
@torch.no_grad()
def test_the_trace_is_right_at_other_sizes(name, grow, plain_einsum):
    model, args, kwargs = subject(name)
    examples = dict(zip(DYNAMIC[name], args, strict=True)) if args else kwargs
    inputs = {key: resized(tensor, other_sizes(name, key, tensor, grow)) for key, tensor in examples.items()}
    expected = tensors(model(**inputs))
    module = traced(name).module()
    actual = tensors(module(*inputs.values()) if args else module(**inputs))
    for wanted, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, wanted)
