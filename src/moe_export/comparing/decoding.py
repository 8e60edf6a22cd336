"""Hold a decoder, run in parts, against the model without a cache (see `verify/decoding`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from moe_export.comparing.artifacts import GraphRunner
from moe_export.export.decoder.whole import DecoderModule, Whole
from moe_export.export.frontend.subject import Subject
from moe_export.export.onnx.simplify import as_numpy
from moe_export.verify import Report, Tolerance, compare
from moe_export.verify.decoding import BUFFER, AtOnce, InParts, Results, decoding_cases
from moe_export.verify.runners.torch_runner import TorchRunner
from moe_export.verify.specs import Array


def with_decoding(
    report: Report, candidate: GraphRunner, reference: Subject, tolerance: Tolerance, seed: int
) -> Report:
    """The report with more cases: a prompt at once and in parts, padded rows, a text token by token.

    Args:
        report: Of the graph, call by call. Where the graph keeps keys and values in buffers, all is run in these, too.
        candidate: The graph.
        reference: Its decoder in PyTorch, whose model is asked without a cache.
        tolerance: For floats.
        seed: Of the tokens.
    """
    decoder = reference.module
    assert isinstance(decoder, DecoderModule)
    call = decoder.whole
    tokens = call.tokens
    of_tokens = decoder.results
    results = Results(of_tokens.each, of_tokens.last, _logits(candidate, of_tokens.each, call.words))
    draw = np.random.default_rng(seed)

    def make(name: str, count: int) -> Array:
        example = as_numpy(call.subject.inputs[name])
        if example.dtype.kind == "i":
            return draw.integers(0, call.words, (2, count)).astype(example.dtype)
        return draw.normal(example.mean(), example.std(), (2, count, *example.shape[2:])).astype(
            example.dtype
        )

    model = AtOnce(_run(call, decoder, None), results, "torch")
    truth = AtOnce(_run(call.wide(), decoder, "float64"), results, "torch in float64")
    buffers = any(BUFFER in spec.shape for spec in candidate.outputs)
    for buffered in (False, True) if buffers else (False,):
        in_parts = InParts(candidate, candidate.inputs, tokens, results, buffered=buffered)
        cases = decoding_cases(in_parts, model, make, seed, padded="attention_mask" in decoder.given)
        found = compare(
            model,
            in_parts,
            (replace(case, label=f"{case.label}, in buffers") for case in cases) if buffered else cases,
            tolerance=tolerance,
            routing=results.pairs,
            truth=truth,
            other_sizes=0,
        )
        report = replace(report, cases=(*report.cases, *found.cases))
    return report


def _logits(candidate: GraphRunner, outputs: Sequence[str], words: int) -> str | None:
    """The output that the next token is chosen by: the first with an entry for each token that there is."""
    return next(
        (spec.name for spec in candidate.outputs if spec.name in outputs and spec.shape[-1] == words), None
    )


def _run(
    call: Whole, decoder: DecoderModule, dtype: str | None
) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    def run(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return call.run(tensors, {name: tensors[name] for name in decoder.given})

    return TorchRunner(run, call.outputs, dtype=dtype).run
