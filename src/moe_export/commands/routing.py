"""`moe-export routing model.py`: which token goes to which expert, as a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path

from moe_export.commands.console import Console
from moe_export.commands.parallel import draw_ranks
from moe_export.errors import MissingBackendError, UsageError
from moe_export.export.frontend.load import load_subject, split_spec
from moe_export.export.gates.dispatch import Dispatch, find_dispatches
from moe_export.export.gates.picture import FORMATS, draw
from moe_export.export.onnx.serialize import staging
from moe_export.own_files import put_text, require_free


def run_routing(
    model: str,
    output: str | None,
    gate: str | None,
    capacity: int | None,
    ranks: str | None,
    init: tuple[str, ...],
    inputs: tuple[str, ...],
    console: Console,
    force: bool = False,
) -> int:
    """Run the command; the exit code."""
    if output is not None and Path(output).suffix not in FORMATS:
        raise UsageError(f"a picture is a {' or a '.join(FORMATS)} file, not {output}")
    path = Path(output or f"{split_spec(model)[0].stem}.routing.svg")
    require_free(path, "picture" if path.suffix == ".png" else "text", force=force)
    with console.user_code():
        with console.step(f"loading {model}"):
            subject = load_subject(model, init=init, inputs=inputs)
        with console.step("finding the gates"):
            found = _wanted(find_dispatches(subject), gate)
    if ranks is not None:
        batch = len(next(iter(subject.inputs.values())))
        return _draw_ranks(found, ranks, path, batch, force, console)
    last = f"written: {path}"
    try:
        with staging(path.absolute().parent, force=force) as temporary:
            draw(found, temporary / path.name, capacity)
    except MissingBackendError as error:
        if output is not None:
            raise
        last = f"no picture: {error.what}; {error.hint}"
    console.json(json.dumps([_document(dispatch) for dispatch in found], indent=2))
    for dispatch in found:
        console.say(
            f"{dispatch.path} at {dispatch.line}: {len(dispatch.indices)} tokens, {dispatch.experts} experts"
        )
        console.say(f"  load: {' '.join(map(str, dispatch.loads))}")
        idle = int((dispatch.loads == 0).sum())
        if idle:
            console.say(f"  {idle} of the experts got no token")
    console.say(last)
    return 0


def _draw_ranks(
    found: tuple[Dispatch, ...], manifest: str, path: Path, batch: int, force: bool, console: Console
) -> int:
    if path.suffix != ".svg":
        raise UsageError(f"a picture of ranks is an .svg file, not {path.name}")
    text, lines = draw_ranks(found, manifest, batch)
    put_text(path, text, force=force)
    for line in (*lines, f"written: {path}"):
        console.say(line)
    return 0


def _wanted(found: tuple[Dispatch, ...], gate: str | None) -> tuple[Dispatch, ...]:
    if not found:
        raise UsageError(
            "no gate was recognised in this model",
            hint="a gate chooses among experts by topk, argmax or max along the last dimension",
        )
    wanted = tuple(dispatch for dispatch in found if gate is None or dispatch.path == gate)
    if not wanted:
        paths = ", ".join(dispatch.path for dispatch in found)
        raise UsageError(f"no gate in module {gate!r}", hint=f"the gates of this model: {paths}")
    return wanted


def _document(dispatch: Dispatch) -> dict[str, object]:
    return {
        "module": dispatch.path,
        "line": dispatch.line,
        "experts": dispatch.experts,
        "indices": dispatch.indices.tolist(),
        "weights": None if dispatch.weights is None else dispatch.weights.tolist(),
        "slots": dispatch.slots.tolist(),
        "loads": dispatch.loads.tolist(),
    }
