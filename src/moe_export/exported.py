"""`export_model`: from a module in memory to verified graphs, in Python.

    program = export_model(block, (x,))
    print(program)                     # nodes, sizes, what was recognised
    program.save("block.onnx")
    program.router().save("router.onnx")
    assert program.verify().verdict == "equal"

The arguments are those of `torch.onnx.export`, under their names. The stages are those of the command line
(`export_subject`); what it adds are files, engines, ranks and a report.
"""

from __future__ import annotations

import html
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
from torch import nn

from moe_export.comparing.checking import verify_graph
from moe_export.comparing.localising import graph_options
from moe_export.comparison_settings import ComparisonSettings
from moe_export.errors import UsageError
from moe_export.export.engines.profiles import dim_facts
from moe_export.export.experts.choose import Choice, Target
from moe_export.export.frontend.export_calls import read
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.onnx.serialize import staging, write_model
from moe_export.export.options import Options
from moe_export.export.pipeline import Graph, describe, export_subject
from moe_export.export.recurrence.recurrences import Mode
from moe_export.export.tracing.dims import limits_of, requested
from moe_export.own_files import require_free
from moe_export.pictures.picture import svg_of
from moe_export.pictures.sketch import sketch_of
from moe_export.verify import Report, Tolerance


@dataclass(frozen=True)
class ExportedModel:
    """A graph that was exported, with the module that it is verified against.

    Attributes:
        graph: The graph, its dimensions, what was rewritten.
        subject: The module with its example inputs.
        options: What it was exported with.
        routers: The graph of each router, by the path of its module; empty for the graph of a router.
    """

    graph: Graph = field(repr=False)
    subject: Subject = field(repr=False)
    options: Options = field(repr=False)
    routers: Mapping[str, ExportedModel] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> ir.Model:
        """The graph as `onnx_ir` holds it."""
        return self.graph.model

    @cached_property
    def model_proto(self) -> onnx.ModelProto:
        """The graph as protobuf, weights included: up to 2 GiB. `save` writes more."""
        return ir.to_proto(self._described())

    @property
    def notes(self) -> tuple[str, ...]:
        """What was recognised, and what a user should know: sizes that are fixed, loops that were folded."""
        return self.graph.notes

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the graph; from 2 GiB on with its weights in a file beside it.

        Args:
            path: A file `*.onnx`. A graph that moe-export wrote there before is replaced.
            force: Also replace a file that somebody else wrote.

        Returns:
            The path.

        Raises:
            UsageError: The file is somebody else's, or is no `*.onnx`.
        """
        path = Path(path)
        if path.suffix != ".onnx":
            raise UsageError(f"a graph is an .onnx file, not {path}", hint='save("model.onnx")')
        require_free(path, "graph", force=force)
        with staging(path.parent.absolute(), inputs=(), force=force) as folder:
            write_model(self._described(), folder / path.name)
        return path

    def router(self, module: str | None = None) -> ExportedModel:
        """The graph of one router ("gate-only"): from the model's inputs to its choice of experts.

        Args:
            module: The path of its module; not needed where there is one router.

        Raises:
            UsageError: There is none, or none of that name, or several and no name.
        """
        if module is None and len(self.routers) == 1:
            return next(iter(self.routers.values()))
        if module is not None and module in self.routers:
            return self.routers[module]
        known = ", ".join(map(repr, self.routers))
        if not known:
            raise UsageError(
                "no router was found in the model", hint="print(program.notes) says what was found"
            )
        if module is None:
            raise UsageError(f"the model has several routers: {known}", hint="router(NAME) gives one of them")
        raise UsageError(f"no router is called {module!r}", hint=f"the model's are {known}")

    def verify(
        self,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        seed: int = 0,
        thorough: bool = False,
        provider: Literal["cpu", "cuda"] = "cpu",
    ) -> Report:
        """Run the graph in onnxruntime and the module in PyTorch on the same inputs, at many sizes, and compare.

        Args:
            rtol: As in `numpy.testing.assert_allclose`; None takes the default of each output's dtype.
            atol: Likewise.
            seed: Of the inputs.
            thorough: More kinds of values, at more sizes.
            provider: Where onnxruntime runs.

        Returns:
            The report: `print` shows it, `verdict` and `exit_code` sum it up.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write_model(self._described(), path)
            report, _ = verify_graph(
                self.graph,
                path,
                tolerance=Tolerance(rtol, atol),
                seed=seed,
                provider=provider,
                settings=ComparisonSettings(thorough=thorough),
            )
        return report

    def __str__(self) -> str:
        return "\n".join((summary(self.graph), *(f"  note: {note}" for note in self.notes)))

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        picture = svg_of([sketch_of(self.model, type(self.subject.module).__name__, None)])
        return f"<p>{html.escape(summary(self.graph))}</p><ul>{notes}</ul>{picture}"

    def _described(self) -> ir.Model:
        model = self.model.clone()
        describe(model, facts_of(self.graph, self.subject, self.options))
        return model


def export_model(  # noqa: PLR0913  the arguments of torch.onnx.export, and the options of an export
    model: nn.Module | Callable[..., Any],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    dynamic_axes: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int = 17,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    target: Target = "onnxruntime-cpu",
    experts: Choice = "auto",
    recurrence: Mode = "auto",
    decoder: bool = False,
    attention: Literal["standard", "contrib"] = "standard",
    simplify: bool = True,
    weights_dtype: Literal["float32", "int8", "int4", "float8e4m3"] = "float32",
    quantize: str = "experts",
    block_size: int | None = None,
    zero_points: bool = False,
    calibrate: Sequence[str | Path] = (),
) -> ExportedModel:
    """Export a module, and the graphs of its routers.

    Args:
        model: A module or a function. It is exported in eval mode, and left in the mode that it was in.
        args: Example arguments: a tensor or a tuple, whose last entry may be a dict of arguments by name.
        kwargs: Example arguments by name.
        dynamic_shapes: The free dimensions, as `torch.onnx.export` takes them. Without it and `dynamic_axes`, every
            dimension for which the graph holds is free.
        dynamic_axes: The same by the names of inputs.
        input_names: Of the graph, in order; the names of forward's parameters by default.
        output_names: Likewise; by default what `return` calls them.
        opset: 17 or newer.
        dtype: What the parts of the graph that can bear it compute in.
        target: The engine that the graph is for.
        experts: How experts are written.
        recurrence: How loops over a length are written.
        decoder: Whether the graph is that of new tokens after earlier ones, of a language model that keeps a cache.
        attention: How a decoder's attention is written.
        simplify: Whether to try onnxsim.
        weights_dtype: What weights are stored as; the opset follows.
        quantize: Which weights: `experts`, `linear`, `all`, or patterns of names.
        block_size: Weights of an output that share a scale.
        zero_points: Whether these have zero points, too.
        calibrate: Files of inputs that rounding goes by.

    Returns:
        The graph: `save`, `verify`, `router`.

    Raises:
        UsageError: The arguments do not fit the model, or it raises on them.
        NotExportableError: The model has no ONNX form, with the line of it that has none.
    """
    found = read(
        {
            "model": model,
            "args": args,
            "kwargs": kwargs,
            "dynamic_shapes": dynamic_shapes,
            "dynamic_axes": dynamic_axes,
            "input_names": input_names,
            "output_names": output_names,
            "f": None,
        }
    )
    if found is None:
        raise UsageError(f"a model is an nn.Module or a function, not a {type(model).__name__}")
    module, bound, named, asked = found
    with _mode_kept(module):
        subject = make_subject(
            module, bound, named, source=_file_of(module), how="`export_model`", asked=asked
        )
        options = Options(
            opset=opset,
            dims=requested(subject, (), False),
            simplify=simplify,
            experts=experts,
            recurrence=recurrence,
            decoder=decoder,
            attention=attention,
            target=target,
            dtype=dtype,
            weights_dtype=weights_dtype,
            quantize=quantize,
            block_size=block_size,
            zero_points=zero_points,
            calibrate=tuple(map(str, calibrate)),
        ).at_opset()
        whole, *others = export_subject(subject, options)
    routers = {each.path: ExportedModel(each, subject, options) for each in others if each.kind == "gate"}
    return ExportedModel(whole, subject, options, routers)


@contextmanager
def _mode_kept(module: nn.Module) -> Iterator[None]:
    """Put back what was in train mode: an export looks at the module in eval mode."""
    training = [each for each in module.modules() if each.training]
    try:
        yield
    finally:
        for each in training:
            each.training = True


def _file_of(module: nn.Module) -> Path:
    """The file of the module's class; of a class typed in, the folder that Python runs in."""
    try:
        return Path(inspect.getfile(type(module)))
    except (TypeError, OSError):
        return Path.cwd() / "model.py"


def facts_of(graph: Graph, subject: Subject, options: Options) -> dict[str, str]:
    """What a file says of how it was made."""
    return {
        "version": metadata.version("moe-export"),
        "source": subject.source.name,
        "opset": str(options.opset),
        "options": graph_options(options),
        "kind": graph.kind,
        "module": graph.path,
        "dtype": graph.dtype,
        **dim_facts(graph.traced.dims, graph.traced.conditions),
    }


def summary(graph: Graph) -> str:
    """One line: what it computes, its nodes, its inputs and the sizes that it holds for."""
    count = sum(1 for _ in graph.model.graph.all_nodes())
    shapes = ", ".join(
        f"{name} [{', '.join(map(str, shape))}]" for name, shape in graph.traced.inputs.items()
    )
    kinds = {"model": "the whole model", "decoder": "the decoder", "step": "one step"}
    what = kinds.get(graph.kind, f"the gate of {graph.path}")
    limits = "".join(f"; {limit}" for limit in limits_of(graph.traced.dims, graph.traced.conditions))
    nodes = "1 node" if count == 1 else f"{count} nodes"
    return f"{what}: {nodes}, opset {graph.model.opset_imports['']}, {shapes}{limits}"
