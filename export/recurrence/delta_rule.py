"""transformers' gated delta rules, step by step while loops are folded.

Qwen3-Next and its relatives have the rule in two forms that compute the same: over chunks of 64 steps, where a trace
unrolls the 63 rows of a triangular system at every length and only holds for the traced number of chunks; and step by
step. The second is a loop like any other: it folds into one Scan, for any length.

Source: https://huggingface.co/docs/transformers/model_doc/qwen3_next; the rule is that of arXiv:2412.06464.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from moe_export.export.torch_compat.transformers import function_taken

_CHUNKED, _STEPS = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"


def delta_rules_step_by_step() -> AbstractContextManager[None]:
    """A context manager in which models of transformers take the form that goes step by step."""
    return function_taken(_CHUNKED, _STEPS)
