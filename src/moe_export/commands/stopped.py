"""`--stop-after STAGE --show`: what a stage of the pipeline made, as text; for contributors, and for bug reports."""

from __future__ import annotations

from moe_export.commands.console import Console
from moe_export.export.frontend.subject import Subject
from moe_export.export.options import Options
from moe_export.export.stages import PIPELINE, Draft, Model, Program, between, run


def show_stage(name: str, subject: Subject, options: Options, console: Console, *, show: bool) -> int:
    """Run the pipeline up to a stage, and write nothing.

    Args:
        name: The last stage.
        subject: The model.
        options: The user's choices.
        console: Where the text goes.
        show: Whether to print what the stage made, and not only how large it is.
    """
    made = run(between(PIPELINE[0].name, name), Model.of(subject, options.dims), options, console.step)
    for note in made.notes:
        console.say(f"note: {note}")
    text = text_of(made)
    console.say(
        text
        if show
        else f"after {name}: a {type(made).__name__}, {len(text.splitlines())} lines; --show prints it"
    )
    return 0


def text_of(made: Model | Program | Draft) -> str:
    """What a stage made: the module, the FX graph or the ONNX graph, without weights."""
    if isinstance(made, Draft):
        return str(made.model)
    if isinstance(made, Program):
        domain = str(made.traced.domain)
        return "\n".join([*([f"# right for {domain}"] if domain else []), str(made.traced.program.graph)])
    folded = getattr(made.recurrent.subject.module, "graph", None)
    return str(made.subject.module) if folded is None or made.unrolled is None else str(folded)
