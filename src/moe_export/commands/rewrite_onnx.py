"""`moe-export rewrite model.onnx -o out.onnx`: the same graph without Einsum, each site proved."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

import moe_export
from moe_export.commands.console import Console
from moe_export.einsum_rewrite.onnx_model import Options, Rewriting, rewrite_in_place
from moe_export.errors import Code, NotExportableError, UsageError
from moe_export.export.onnx.external_weights import DATA_SUFFIX
from moe_export.export.onnx.serialize import staging, write_model
from moe_export.external_data import check_external_data
from moe_export.own_files import KEY, require_free

MOST_SITES = 40
"""More sites than this are only counted, unless evidence or JSON was asked for."""


def run_rewrite_onnx(
    source: str, output: str | None, options: Options, prove: bool, force: bool, console: Console
) -> int:
    """Run the command; the exit code: 3 if an Einsum had to stay."""
    if output is None:
        raise UsageError("-o is missing: where shall the rewritten graph go?", hint="-o out.onnx")
    model = _load(Path(source))
    outside = _outside_weights(model, Path(source).parent)
    read = [Path(source), *outside]
    require_free(Path(output), "graph", inputs=read, force=force)
    model.metadata_props[f"{KEY}rewritten"] = moe_export.__version__
    with console.step(f"rewrite {source}"):
        done = rewrite_in_place(model, options)
        with staging(Path(output).absolute().parent, inputs=read, force=force) as folder:
            _write(model, folder / Path(output).name, bool(outside))
    _tell(done, source, output, prove, console)
    return NotExportableError.exit_code if done.refused else 0


def _load(path: Path) -> ir.Model:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    check_external_data(path)
    try:
        return ir.load(path)
    except Exception as error:  # protobuf, text and data errors have no common class
        raise UsageError(f"{path} is not an ONNX file: {error}") from error


def _outside_weights(model: ir.Model, folder: Path) -> list[Path]:
    """The files that hold weights of the model."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    names = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return [folder / name for name in sorted(names)]


def _write(model: ir.Model, path: Path, outside: bool) -> None:
    """Weights that lay outside the file lie outside the new one."""
    try:
        if not outside:
            write_model(model, path)
            return
        data = path.with_name(f"{path.name}{DATA_SUFFIX}")
        ir.save(model, path, external_data=data.name)
        if data.exists() and not data.stat().st_size:
            data.unlink()  # what was left is small enough to lie in the graph
    except FileNotFoundError as error:
        raise UsageError(f"the weights of the model are not there: {error}") from error


def _tell(done: Rewriting, source: str, output: str, prove: bool, console: Console) -> None:
    kinds = Counter((site.equation, site.became) for site in done.sites)
    rewritten = [site for site in done.sites if not site.kept]
    left = len(done.refused) + len(done.sites) - len(rewritten)
    console.say(f"{source} -> {output}: {_count(rewritten)} rewritten, {left} left")
    for (equation, became), times in sorted(kinds.items(), key=lambda item: -item[1])[:MOST_SITES]:
        console.say(f"  {times:>4} x  {equation}  became  {became}")
    if len(kinds) > MOST_SITES:
        console.say(f"  ... and {len(kinds) - MOST_SITES} more kinds")
    if prove:
        console.say()
        for site, proof in zip(done.sites, done.proofs, strict=True):
            console.say(f"{site.where}: {proof or 'kept as it is'}")
    for refused in done.refused:
        console.say(Code.EINSUM.mark(str(refused)))
        if refused.error.hint:
            console.say(f"  hint: {refused.error.hint}")
    console.json(json.dumps(_document(done, source, output), indent=2))


def _count(sites: list[Any]) -> str:
    return f"{len(sites)} einsum{'s' * (len(sites) != 1)}"


def _document(done: Rewriting, source: str, output: str) -> dict[str, Any]:
    return {
        "model": source,
        "output": output,
        "sites": [
            {
                "node": site.node,
                "where": site.where,
                "equation": site.equation,
                "became": site.became,
                "flops": str(site.flops),
                "largest": str(site.largest),
                "proof": None if proof is None else str(proof),
            }
            for site, proof in zip(done.sites, done.proofs, strict=True)
        ],
        "left": [
            {
                "node": refused.node,
                "equation": refused.equation,
                "reason": refused.error.what,
                "code": Code.EINSUM.number,
            }
            for refused in done.refused
        ],
    }
