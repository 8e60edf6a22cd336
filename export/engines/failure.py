"""What TensorRT says when it refuses a graph, translated: each message finds its node, and its rule if it is known."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

from moe_export.export.engines.module import Module, errors_in
from moe_export.export.engines.refusal import Refusal, all_nodes, refusal_at
from moe_export.export.engines.rules import BY_POSITION, MOST_K, find_refusals
from moe_export.tensorrt_api import ILogger, OnnxParser

_QUOTED = re.compile(r"'([^']+)'|\"([^\"]+)\"|\{([^{}]+)\}|(?<=[:\s])([\w./]+)(?=[\s:(,.\]])")
_NOISE = re.compile(
    r" In \w+ at \S+:\d+|\(In \w+ at \S+:\d+ ?|\[\w+\.\w+:\d+: \w+\] |/_src/\S+|\w+::\w+: Error Code \d+: "
    r"|\[[\w.]+::\w+::\d+\] Error Code \d+: "
)
# A parser that finds no driver adds that to what it says of a node.
_NO_DRIVER = re.compile(r" ?Cuda Runtime \(cudaError 35:[^)]*\)+")
_NUMBER = re.compile(r"_\d+$")
_NOT_THE_REASON = re.compile(r"catchCudaError|CUDA driver version is insufficient")
_CORNER = re.compile(r"Profile k(?P<corner>MIN|OPT|MAX) values are not self-consistent\. (?P<why>.*)")
_VIOLATED = re.compile(
    r"k(?P<corner>MIN|OPT|MAX) values for profile \d+ violate shape constraints: (?P<why>.*)", re.DOTALL
)
_OTHER_SIZES = "other sizes: --range DIM=MIN:OPT:MAX"
_CORNERS = {"MIN": "least", "OPT": "best", "MAX": "greatest"}

# What the builder says → what it means, and what avoids it.
_MEANINGS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"FP32 GEMM is not supported"),
        "TensorRT-RTX has no float32 matrix product for Turing (sm75)",
        "--dtype float16, or build for sm80 and newer",
    ),
    (
        re.compile(r"HW-specific datatypes: b16"),
        "these GPUs have no bfloat16",
        "--dtype float16, or build for sm80 and newer",
    ),
    (re.compile(r"K exceeds the maximum value"), f"TensorRT's TopK takes K up to {MOST_K}", BY_POSITION),
    (
        re.compile(r"IRecurrenceLayer.*different shapes"),
        "TensorRT's loops carry tensors of one shape, and one of this graph's changes its shape",
        "--recurrence scan, or --experts blocks, carries none that grows",
    ),
    (
        re.compile(r"within workspace limit"),
        "the workspace is too small for an operation",
        "a larger --workspace",
    ),
    (
        re.compile(r"has no runners that implement it"),
        "TensorRT has nothing that computes this operator",
        "",
    ),
)


def parse_refusals(parser: OnnxParser, model: ir.Model, module: Module) -> tuple[Refusal, ...]:
    """What a parser refused, node by node. It stops at the first, so what is known of the others is added."""
    known = find_refusals(model, module.name, module.version).refused
    places = {refusal.node for refusal in known}
    named = _by_name(model)
    main = list(model.graph)
    told = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = named.get(error.node_name())
        number = error.node()
        if node is None and 0 <= number < len(main) and main[number].op_type == error.node_operator():
            node = main[number]
        found = refusal_at(node, f"TensorRT's parser: {_clean(error.desc())}")
        if node is None:
            # Some errors name no node. The rules explain them, if they find anything.
            told += [found] if not known else []
        elif found.node not in places:
            told.append(found)
    return tuple(dict.fromkeys([*told, *known]))


def build_refusals(log: ILogger, model: ir.Model, capability: str, module: Module) -> tuple[Refusal, ...]:
    """What a builder said when it made no engine, each with the node that it names."""
    known = find_refusals(
        model, module.name, module.version
    ).refused  # what the parser let pass and the builder does not
    places = {refusal.node for refusal in known}
    named = _by_name(model)
    texts = errors_in(log)
    reasons = [text for text in texts if not _NOT_THE_REASON.search(text)] or texts
    told = [_translated(text, _node_named_in(text, named), capability) for text in reasons]
    found = [*known, *(refusal for refusal in told if refusal.node not in places)]
    return tuple(dict.fromkeys(found)) or (Refusal("TensorRT made no engine and gave no reason"),)


def _translated(text: str, node: ir.Node | None, capability: str) -> Refusal:
    for pattern, meaning, hint in _MEANINGS:
        if pattern.search(text):
            return refusal_at(node, meaning, hint, capability)
    if match := _VIOLATED.search(text):
        return refusal_at(node, _at_corner(match, _clean(match["why"]).removesuffix(")")), _OTHER_SIZES)
    return refusal_at(node, f"TensorRT's builder: {_clean(text)}", capability=capability)


def corner_refusals(log: ILogger, model: ir.Model) -> tuple[Refusal, ...]:
    """Sizes of a profile at which the graph cannot run. The builder only warns of them, and builds."""
    named = _by_name(model)
    found = []
    for _, text in log.messages:
        if match := _CORNER.search(text):
            why = _clean(match["why"]).split(" Instruction:")[0].split(" Condition ")[0]
            found.append(refusal_at(_node_named_in(text, named), _at_corner(match, why), _OTHER_SIZES))
    return tuple(dict.fromkeys(found))


def _at_corner(match: re.Match[str], why: str) -> str:
    return f"at the {_CORNERS[match['corner']]} sizes of the profile: {why}"


def _by_name(model: ir.Model) -> Mapping[str, ir.Node]:
    return {node.name: node for node in all_nodes(model) if node.name}


def _node_named_in(text: str, named: Mapping[str, ir.Node]) -> ir.Node | None:
    for match in _QUOTED.finditer(text):
        word = next(group for group in match.groups() if group)
        # A node that became several layers has them numbered: `node_topk_1`.
        for name in (word, _NUMBER.sub("", word)):
            if name in named:
                return named[name]
    return None


def _clean(text: str) -> str:
    """A message without the places in TensorRT's own source."""
    short = re.sub(r"\s+", " ", _NOISE.sub("", text)).strip()
    return _NO_DRIVER.sub("", short).strip() or short
