"""The pass over exported programs: what is left, what is kept, and that it still computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import einops
import numpy as np
import onnxruntime
import pytest
import torch
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from moe_export.einsum_rewrite import einsum, plan_einsum, rewrite_program
from moe_export.einsum_rewrite.targets import target_for

# Torch's own copies of its tree specs trip over torch's own deprecation.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

EINSUM = torch.ops.aten.einsum.default


class Attention(torch.nn.Module):
    """Operands as a list, as in many a tutorial."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        energy = torch.einsum("nqhd,nkhd->nhqk", [q, k])
        return torch.einsum("nhql,nlhd->nqhd", [energy, v])

    @staticmethod
    def inputs(n: int, q: int, k: int) -> tuple[torch.Tensor, ...]:
        return _integers((n, q, 2, 3), (n, k, 2, 3), (n, k, 2, 3))


class Mamba(torch.nn.Module):
    """The discretisation and one step of a selective scan, in einops."""

    def forward(self, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        dA = einops.einsum(delta, A, "b l d_in, d_in n -> b l d_in n")
        dBu = einops.einsum(
            delta,
            B,
            u,
            "b l d_in, b l n, b l d_in -> b l d_in n",
        )
        h = dA[:, 0] + dBu[:, 0]
        return einops.einsum(h, B[:, 0], "b d_in n, b n -> b d_in")

    @staticmethod
    def inputs(b: int, s: int, n: int) -> tuple[torch.Tensor, ...]:
        return _integers((b, s, 6), (6, n), (b, s, n), (b, s, 6))


class ChunkedSSD(torch.nn.Module):
    """Mamba-2's diagonal blocks; the groups of B and C have size 1 where the heads have many."""

    def forward(self, C: torch.Tensor, B: torch.Tensor, L: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, L, X)

    @staticmethod
    def inputs(b: int, c: int, s: int) -> tuple[torch.Tensor, ...]:
        return _integers((b, c, s, 1, 4), (b, c, s, 1, 4), (b, 3, c, s, s), (b, c, s, 3, 2))


class Grouped(torch.nn.Module):
    """Folded rows with two dynamic sizes in them: the reshape has to look one up."""

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("btkgh,bskh->bkgts", q, k)

    @staticmethod
    def inputs(b: int, t: int, g: int) -> tuple[torch.Tensor, ...]:
        return _integers((b, t, 2, g, 4), (b, 5, 2, 4))


class Oddities(torch.nn.Module):
    """A diagonal, an ellipsis that is summed out, ellipses of unequal rank, a weight, and nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(_integers((5, 4))[0])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            torch.einsum("bii->bi", x),
            torch.einsum("...i->i", x),
            torch.einsum("...i,...i->...", y, x),
            torch.einsum("oi,b...i->b...o", self.weight, x),
            torch.einsum("i->i", y),
        )

    @staticmethod
    def inputs(b: int, _s: int, _n: int) -> tuple[torch.Tensor, ...]:
        return _integers((b, 4, 4), (4,))


def _integers(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Small integers in float32: every engine must get them exactly right."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)


MODELS = [Attention, Mamba, ChunkedSSD, Grouped, Oddities]
TARGETS = ["onnx", "onnxruntime-cpu", "tensorrt"]
SIZES = [(2, 5, 3), (3, 9, 2), (1, 4, 7), (4, 2, 6)]


def export(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> ExportedProgram:
    dims = tuple(tuple(Dim.AUTO for _ in x.shape) for x in inputs)
    # opt_einsum would compare sizes while torch traces, which makes dynamic ones static.
    with torch.backends.opt_einsum.flags(enabled=False):
        return torch.export.export(model.eval(), inputs, dynamic_shapes=dims, strict=False)


def _targets(program: ExportedProgram) -> list[Any]:
    bodies = [m for m in program.graph_module.modules() if isinstance(m, GraphModule)]
    return [node.target for body in bodies for node in body.graph.nodes]


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _check_equal(got: Any, expected: Any) -> None:
    got, expected = _tuple(got), _tuple(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", MODELS)
def test_no_einsum_is_left_and_the_program_computes_the_same(kind: Any, target: str) -> None:
    model = kind()
    program = export(model, kind.inputs(*SIZES[0]))
    rewritten, sites = rewrite_program(program, target)
    assert EINSUM in _targets(program), "the input program must stay as it is"
    assert EINSUM not in _targets(rewritten)
    assert len(sites) == _targets(program).count(EINSUM)
    runs = rewritten.module()
    decomposed = rewritten.run_decompositions().module()
    for sizes in SIZES:
        inputs = kind.inputs(*sizes)
        _check_equal(runs(*inputs), model(*inputs))
        _check_equal(decomposed(*inputs), model(*inputs))


class Scattered(torch.nn.Module):
    """Of the plans of this equation, the one of fewest nodes has a permute that ONNX Runtime's CPU is slow at."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.einsum("abc,bcd->cda", x, y)


def test_the_engine_decides_on_the_plan() -> None:
    program = export(Scattered(), (torch.randn(128, 128, 32), torch.randn(128, 32, 32)))
    plans = {target: rewrite_program(program, target)[1][0].plan for target in TARGETS}
    for target, plan in plans.items():
        assert plan.steps == plan_einsum("abc,bcd->cda", (128, 128, 32), (128, 32, 32), target=target).steps
    assert plans["onnx"].steps != plans["onnxruntime-cpu"].steps
    (name,) = [node.name for node in program.graph.nodes if node.target is EINSUM]
    for names, expected in (({name}, "onnx"), ({"another"}, "onnxruntime-cpu")):
        (site,) = rewrite_program(program, "onnxruntime-cpu", names)[1]
        assert site.plan.steps == plans[expected].steps


@pytest.mark.parametrize(
    ("engine", "target"),
    [("onnxruntime-cpu", "onnxruntime-cpu"), ("onnxruntime-cuda", "onnxruntime-cuda"), ("tensorrt", "tensorrt"),
     ("tensorrt-sm100", "tensorrt"), ("openvino", "onnx")],
)  # fmt: skip
def test_every_engine_has_a_target(engine: str, target: str) -> None:
    assert target_for(engine) == target


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", MODELS)
def test_no_guard_is_added_and_no_dimension_becomes_static(kind: Any, target: str) -> None:
    program = export(kind(), kind.inputs(*SIZES[0]))
    text, ranges = str(program), str(program.range_constraints)
    tensors = [n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    shapes = tensors[0].fake_mode.shape_env
    guards, replaced = len(shapes.guards), dict(shapes.replacements)
    rewritten, _ = rewrite_program(program, target)
    assert str(program) == text
    assert str(rewritten.range_constraints) == ranges
    assert len(shapes.guards) == guards
    assert shapes.replacements == replaced
    output = program.graph.output_node().args[0]
    rewritten_output = rewritten.graph.output_node().args[0]
    for old, new in zip(output, rewritten_output, strict=True):
        assert str(old.meta["val"].shape) == str(new.meta["val"].shape)


@pytest.mark.parametrize("kind", MODELS)
def test_onnx_has_no_einsum_and_onnxruntime_agrees_at_other_sizes(kind: Any, tmp_path: Path) -> None:
    model = kind()
    rewritten, _ = rewrite_program(export(model, kind.inputs(*SIZES[0])))
    onnx = torch.onnx.export(rewritten, dynamo=True, verbose=False)
    assert onnx is not None
    assert "Einsum" not in {node.op_type for node in onnx.model.graph}
    onnx.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for sizes in SIZES:
        inputs = kind.inputs(*sizes)
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        expected = _tuple(model(*inputs))
        for a, b in zip(session.run(None, feeds), expected, strict=True):
            np.testing.assert_array_equal(a, b.detach().numpy())


def test_sites_name_the_line_the_equation_and_the_steps() -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Mamba()

        def forward(
            self, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, u: torch.Tensor
        ) -> torch.Tensor:
            return self.mixer(delta, A, B, u)

    _, sites = rewrite_program(export(Outer(), Mamba.inputs(2, 5, 3)))
    lines = Path(__file__).read_text().splitlines()
    assert [site.equation for site in sites] == [
        "b l d_in, d_in n -> b l d_in n",
        "b l d_in, b l n, b l d_in -> b l d_in n",
        "b d_in n, b n -> b d_in",
    ]
    for site in sites:
        assert site.module == "mixer"
        assert site.file is not None
        assert Path(site.file).name == Path(__file__).name
        assert "einops.einsum(" in lines[site.line - 1]
    assert sites[0].became == "unsqueeze, multiply"
    assert sites[1].became == "multiply, unsqueeze, unsqueeze, multiply"
    assert str(sites[0]).endswith(" in mixer: 'b l d_in, d_in n -> b l d_in n' became unsqueeze, multiply")
    assert sites[0].where == f"{sites[0].file}:{sites[0].line}"


class Scanned(torch.nn.Module):
    """The einsum stands in a method: torch.export records only where forward called it."""

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x + 1
        return self.step(y, w)

    def step(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = x * 2
        x = x.relu()
        x = x - 1
        x = x.abs()
        x = x + 3
        x = x.neg()
        return einops.einsum(x, w, "time d_state, d_inner d_state -> d_inner time")


def test_an_einsum_in_a_method_is_found_in_its_file() -> None:
    _, (site,) = rewrite_program(export(Scanned(), _integers((3, 4), (5, 4))))
    terms = ["time d_state", "d_inner d_state"]
    assert site.equation == f"{terms[0]}, {terms[1]} -> d_inner time"
    assert site.line is not None
    assert site.equation in Path(__file__).read_text().splitlines()[site.line - 1]


def test_flops_are_numbers_when_the_program_is_static() -> None:
    inputs = Mamba.inputs(2, 5, 3)
    program = torch.export.export(Mamba(), inputs, strict=False)
    _, sites = rewrite_program(program)
    assert [site.flops.number for site in sites] == [2 * 5 * 6 * 3, 2 * 5 * 6 + 2 * 5 * 6 * 3, 2 * 2 * 6 * 3]
    assert [site.largest.number for site in sites][:2] == [180, 180]


def test_new_nodes_carry_the_trace_of_the_einsum() -> None:
    program = export(Attention(), Attention.inputs(2, 5, 3))
    old = [node for node in program.graph.nodes if node.target is EINSUM]
    rewritten, _ = rewrite_program(program)
    new = [node for node in rewritten.graph.nodes if node.op == "call_function"]
    told = {
        f'{node.meta["stack_trace"]}\n  File "<einsum {node.args[0]}>", line 1, in einsum' for node in old
    }
    assert {node.meta["stack_trace"] for node in new} == told
    assert all(node.meta["nn_module_stack"] == old[0].meta["nn_module_stack"] for node in new)
    assert all("val" in node.meta for node in new)


def test_bodies_of_control_flow_are_rewritten() -> None:
    class Branches(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return torch.einsum("bi,bj->bij", x, y)

            def swapped(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return torch.einsum("bi,bj->bij", y, x) + 1

            return torch.cond(x.sum() > 0, product, swapped, (x, y))

    model, (x, y) = Branches(), _integers((3, 4), (3, 4))
    program = torch.export.export(model, (x, y), strict=False)
    assert _targets(program).count(EINSUM) == 2
    rewritten, sites = rewrite_program(program)
    assert EINSUM not in _targets(rewritten)
    assert EINSUM in _targets(program), "the bodies of the input must stay as they are"
    assert [site.became for site in sites] == ["unsqueeze, unsqueeze, multiply"] * 2
    for sign in (1, -1):
        _check_equal(rewritten.module()(sign * x.abs(), y), model(sign * x.abs(), y))


def test_a_program_that_keeps_module_signatures() -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.inner(q, k, v) * 2

    inputs = Attention.inputs(2, 5, 3)
    program = torch.export.export(Outer(), inputs, strict=True, preserve_module_call_signature=("inner",))
    rewritten, sites = rewrite_program(program)
    assert len(sites) == 2
    unflattened = torch.export.unflatten(rewritten)
    _check_equal(unflattened(*inputs), Outer()(*inputs))


def test_einsum_of_this_package_is_traced_with_dynamic_sizes() -> None:
    class Direct(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return einsum("btkgh,bskh->bkgts", q, k)

    program = export(Direct(), Grouped.inputs(2, 5, 3))
    assert EINSUM not in _targets(program)
    for sizes in SIZES:
        inputs = Grouped.inputs(*sizes)
        _check_equal(program.module()(*inputs), Grouped()(*inputs))


def test_a_program_without_einsum_passes_through() -> None:
    class Plain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    program = export(Plain(), _integers((2, 3)))
    rewritten, sites = rewrite_program(program)
    assert sites == []
    assert str(rewritten) == str(program)


def test_sizes_that_only_the_data_know() -> None:
    class Hit(torch.nn.Module):
        """Tokens of one expert: how many there are is known when the model runs."""

        def forward(self, x: torch.Tensor, mask: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x[torch.nonzero(mask)[:, 0]]
            return (
                torch.einsum("thd,hde->the", y, w),
                torch.einsum("thd,shd->hts", y, x),
                torch.einsum("tij,thd->ijhd", y, y),
            )

    x, w = _integers((6, 3, 4), (3, 4, 5))
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    program = torch.export.export(Hit(), (x, mask, w), strict=False)
    rewritten, sites = rewrite_program(program)
    assert len(sites) == 3
    for hit in (mask, 1 - mask, torch.zeros_like(mask), torch.ones_like(mask)):
        _check_equal(rewritten.module()(x, hit, w), Hit()(x, hit, w))


def test_strict_export_keeps_an_einsum_that_the_pass_rewrites() -> None:
    class Direct(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return einsum("btkgh,bskh->bkgts", q, k), einsum(q, k, "b t k g h, b s k h -> b k")

    inputs = Grouped.inputs(2, 5, 3)
    program = torch.export.export(Direct(), inputs, strict=True)
    rewritten, sites = rewrite_program(program)
    assert len(sites) == 2
    _check_equal(rewritten.module()(*inputs), Direct()(*inputs))
