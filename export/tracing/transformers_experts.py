"""transformers' mixtures of experts: traced so that all families with stacked weights look alike, run as written.

transformers keeps a registry of ways to run such experts; a configuration names the one to take. Its loop over the
hit experts and its sorted form depend on the data or have no ONNX form. The way that looks up the weights of each
pair traces for any model and any number of experts in the same few nodes, and `experts/pairs` understands it. Run, it
copies the weights of each pair of a token and an expert, so what only runs a model takes the loop, which copies none.

Source: https://huggingface.co/docs/transformers/experts_interface
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from moe_export.export.torch_compat.transformers import experts_taken

_TRACEABLE = "batched_mm"
_AS_WRITTEN = "eager"


def traceable_experts() -> AbstractContextManager[None]:
    """While it runs, experts of transformers take the way that can be traced, whatever their model is set to."""
    return experts_taken(_TRACEABLE)


def experts_as_written() -> AbstractContextManager[None]:
    """While it runs, experts of transformers take the loop that stands in their model's file.

    In float64, too: `grouped_mm`, which models are set to, has no kernel for it, and widens all experts of a layer.
    """
    return experts_taken(_AS_WRITTEN)
