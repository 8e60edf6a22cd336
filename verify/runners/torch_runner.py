"""PyTorch as an engine: any callable over named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_export.errors import UsageError
from moe_export.verify.judging.replay import Choice
from moe_export.verify.specs import Array, is_float, numpy_dtype

if TYPE_CHECKING:
    import torch


class TorchRunner:
    """Run a callable on torch tensors, without gradients.

    Args:
        call: Takes a dict of named tensors; returns a tensor, or a sequence with one tensor an output name.
            Put the module in eval mode first: active dropout never agrees with anything.
        output_names: Names of the outputs, in order.
        name: What reports call it.
        dtype: Cast float inputs to this. "float64" asks how far off float32 is: floats that the model makes or
            casts are float64 then, too. The module's own weights are the caller's to cast.
        device: Where inputs are put.
    """

    def __init__(
        self,
        call: Callable[[dict[str, torch.Tensor]], Any],
        output_names: Sequence[str],
        name: str = "torch",
        dtype: str | None = None,
        *,
        device: str = "cpu",
    ) -> None:
        self.name = name
        self._call = call
        self._output_names = tuple(output_names)
        self._dtype = dtype
        self._device = device

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; arrays in and out share no memory with the module.

        Raises:
            UsageError: An output is no tensor, or there are more or fewer outputs than names.
            Exception: Whatever the callable raises.
        """
        import torch

        tensors = {name: self._to_torch(array) for name, array in inputs.items()}
        with torch.no_grad(), self._mode():
            returned = self._call(tensors)
        outputs = (returned,) if isinstance(returned, torch.Tensor) else tuple(returned)
        self._check(outputs)
        return {name: to_numpy(out) for name, out in zip(self._output_names, outputs, strict=True)}

    def run_watched(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], tuple[Choice, ...]]:
        """Run once, and return the model's choices: every `topk` along a last axis, in order."""
        from moe_export.verify.runners.torch_modes import ChoiceWatcher

        with ChoiceWatcher() as watcher:
            outputs = self.run(inputs)
        return outputs, tuple(Choice(to_numpy(ids), to_numpy(scores)) for ids, scores in watcher.found)

    def run_under(
        self,
        inputs: Mapping[str, Array],
        choices: Sequence[Choice],
        rounded: tuple[int, float] | None = None,
    ) -> dict[str, Array] | None:
        """Run once as another program might: with running sums in the dtype itself.

        Args:
            inputs: By name.
            choices: Earlier choices of experts; none for the model's own.
            rounded: A seed and a relative step by which what ids look up is changed; None for not at all.

        Returns:
            None if the choices do not fit the model's own.
        """
        from moe_export.verify.runners.torch_modes import ChoiceForcer, PlainAccumulation, RoundedLookUps

        forcer = ChoiceForcer([to_torch(choice.ids, self._device) for choice in choices])
        with (
            PlainAccumulation(),
            RoundedLookUps(*rounded) if rounded is not None else nullcontext(),
            forcer if choices else nullcontext(),
        ):
            outputs = self.run(inputs)
        return outputs if forcer.fits or not choices else None

    def scores_under(
        self, inputs: Mapping[str, Array], choices: Sequence[Choice]
    ) -> tuple[Array, ...] | None:
        """The scores (..., E) of each choice, all earlier ones made as given; None if they do not fit the model's."""
        from moe_export.verify.runners.torch_modes import ChoiceForcer, ChoiceWatcher

        forcer = ChoiceForcer([to_torch(choice.ids, self._device) for choice in choices])
        with ChoiceWatcher() as watcher, forcer:
            self.run(inputs)
        return tuple(to_numpy(scores) for _, scores in watcher.found) if forcer.fits else None

    def _mode(self) -> AbstractContextManager[None]:
        if self._dtype != "float64":
            return nullcontext()
        from moe_export.float64 import in_float64

        return in_float64()

    def _to_torch(self, array: Array) -> torch.Tensor:
        cast = self._dtype is not None and is_float(array.dtype)
        return to_torch(
            array.astype(numpy_dtype(self._dtype)) if cast and self._dtype else array, self._device
        )

    def _check(self, outputs: tuple[Any, ...]) -> None:
        import torch

        if len(outputs) != len(self._output_names):
            names = ", ".join(self._output_names)
            raise UsageError(f"{self.name} returned {len(outputs)} outputs, but the names are: {names}")
        for name, out in zip(self._output_names, outputs, strict=True):
            if not isinstance(out, torch.Tensor):
                raise UsageError(f"output '{name}' of {self.name} is a {type(out).__name__}, not a tensor")


def to_torch(array: Array, device: str = "cpu") -> torch.Tensor:
    """A torch copy of a NumPy array; the types of ml_dtypes travel by their bits."""
    import torch

    copy = np.array(array, order="C")  # torch must not share memory: a model may write into its input
    if copy.dtype.kind in "biufc" and copy.dtype.isbuiltin == 1:
        return torch.from_numpy(copy).to(device)
    bits = torch.from_numpy(copy.view(f"uint{8 * copy.dtype.itemsize}"))
    kind: torch.dtype = getattr(torch, copy.dtype.name)
    return bits.view(kind).to(device)


def to_numpy(tensor: torch.Tensor) -> Array:
    """A NumPy copy of a torch tensor; bfloat16 and the 8-bit floats become types of ml_dtypes."""
    import torch

    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    name = str(plain.dtype).removeprefix("torch.")
    if plain.dtype == torch.bfloat16 or name.startswith("float8"):
        bits = plain.view(torch.uint16 if plain.dtype == torch.bfloat16 else torch.uint8)
        return np.array(bits.numpy()).view(numpy_dtype(name))
    return np.array(plain.numpy())
