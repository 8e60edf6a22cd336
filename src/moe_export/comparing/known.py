"""What is known of a model before a graph is held against it: what its cases cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_export.verify import Array, DimRange, TensorSpec
from moe_export.verify.inputs import case_maker
from moe_export.verify.known import Known
from moe_export.verify.torch_work import Run, price_of


def known_of_model(
    run: Run, specs: Sequence[TensorSpec], dims: Sequence[DimRange], example: Mapping[str, Array], seed: int
) -> Known:
    """What is known of a model.

    Args:
        run: Runs it on arrays.
        specs: The inputs.
        dims: The free dimensions.
        example: Its example inputs.
        seed: Of the values.
    """
    return Known(price=price_of(run, dims, case_maker(specs, example, seed)))
