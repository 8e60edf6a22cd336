"""`moe-export generate out`: text from a decoder, as it comes, and how fast it came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypedDict

from moe_export.commands.console import Console
from moe_export.errors import UsageError
from moe_export.running.decoding import Decoder


class TextDocument(TypedDict):
    """A text that a decoder continued, by token ids: `moe-export generate --json`."""

    schema: Literal["moe-export/text/1"]
    prompt: list[int]
    tokens: list[int]
    text: str | None
    prompt_tokens_per_second: float
    new_tokens_per_second: float


def run_generate(
    decoder: str,
    prompt: str | None,
    ids: str | None,
    max_new_tokens: int,
    top_k: int,
    seed: int,
    console: Console,
) -> int:
    """Run the command; the exit code."""
    path = _graph_of(Path(decoder))
    if (prompt is None) == (ids is None):
        raise UsageError("a prompt is text or ids: give one of --prompt and --ids", hint="--ids 5,17,33")
    tokenizer = None if prompt is None else _tokenizer_of(path.parent)
    given = _numbers(ids) if ids is not None else tokenizer(prompt)["input_ids"]  # type: ignore[misc]
    with console.step(f"loading {path}"):
        opened = Decoder(path)
    steps = opened.stream(
        [given], max_new_tokens=max_new_tokens, top_k=top_k, seed=seed, stop=_ends_of(path.parent)
    )
    made: list[int] = []
    shown = 0
    for step in steps:
        made.append(int(step[0]))
        text = _text(tokenizer, given, made)
        if not (console.quiet or console.as_json):
            print(text[shown:], end="", flush=True, file=console.out)
        shown = len(text)
    assert opened.speed is not None
    console.say()
    speeds = f"{opened.speed.prompt:.0f} tokens/s of the prompt, {opened.speed.decode:.0f} new tokens/s"
    console.say(f"\n{len(given)} tokens of a prompt, {len(made)} new ones: {speeds}")
    document: TextDocument = {
        "schema": "moe-export/text/1",
        "prompt": given,
        "tokens": made,
        "text": None if tokenizer is None else _text(tokenizer, given, made),
        "prompt_tokens_per_second": opened.speed.prompt,
        "new_tokens_per_second": opened.speed.decode,
    }
    console.json(json.dumps(document, indent=2))
    return 0


def _text(tokenizer: Any, given: list[int], made: list[int]) -> str:
    """What the new tokens say; their numbers where nobody knows."""
    if tokenizer is None:
        return " ".join(map(str, made))
    whole: str = tokenizer.decode([*given, *made], skip_special_tokens=True)
    return whole[len(tokenizer.decode(given, skip_special_tokens=True)) :].rstrip("\N{REPLACEMENT CHARACTER}")


def _graph_of(place: Path) -> Path:
    """The decoder's graph: the file, or the one that a folder's genai_config.json names, or its only one."""
    if not place.is_dir():
        return place
    config = place / "genai_config.json"
    if config.is_file():
        try:
            return place / str(json.loads(config.read_text())["model"]["decoder"]["filename"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                "it names no decoder", where=str(config), hint="give the graph, or export it again"
            ) from error
    graphs = sorted(place.glob("*.onnx"))
    if len(graphs) != 1:
        names = ", ".join(graph.name for graph in graphs) or "none"
        raise UsageError(f"{place} has no one graph to run: {names}", hint="give the file of the decoder")
    return graphs[0]


def _ends_of(folder: Path) -> list[int]:
    """The ids at which a text ends, as genai_config.json has them; none without it."""
    config = folder / "genai_config.json"
    if not config.is_file():
        return []
    found = json.loads(config.read_text()).get("model", {}).get("eos_token_id", [])
    return found if isinstance(found, list) else [found]


def _tokenizer_of(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except ImportError as error:
        raise UsageError(
            "--prompt needs transformers", hint="pip install transformers, or give --ids"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} has no tokenizer: {str(error).splitlines()[0]}",
            hint="copy the model's tokenizer files there (tokenizer.json, tokenizer_config.json), or give --ids",
        ) from error


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--ids {text!r} is not a list of token ids", hint="--ids 5,17,33") from error
