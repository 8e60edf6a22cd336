"""What is known of a model before a graph is held against it: what its cases cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_export.export.subject import Subject
from moe_export.verify import Array, DimRange, TensorSpec, TorchRunner
from moe_export.verify.inputs import case_maker
from moe_export.verify.known import Known
from moe_export.verify.torch_work import price_of


def known_of_model(
    model: Subject,
    specs: Sequence[TensorSpec],
    dims: Sequence[DimRange],
    example: Mapping[str, Array],
    seed: int,
) -> Known:
    """What is known of a model.

    Args:
        model: Runs here to be counted, whatever it is compared by.
        specs: The inputs.
        dims: The free dimensions.
        example: Its example inputs.
        seed: Of the values.
    """
    runner = TorchRunner(model.call_named, model.outputs)
    return Known(price=price_of(runner.run, dims, case_maker(specs, example, seed)))
