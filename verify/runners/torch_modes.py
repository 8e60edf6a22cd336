"""What PyTorch's operators do while a model runs: choices recorded or replayed, sums and look-ups rounded otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moe_export.verify.torch_compat import OperatorMode

_aten = torch.ops.aten


class ChoiceWatcher(OperatorMode):
    """Records each choice of the largest values along an axis, in order.

    Attributes:
        found: (positions, scores) of every `topk`, the axis of the choice moved to the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def ran(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        dim = _chosen_along(func, args, kwargs)
        if dim is not None:
            positions, scores = (value.detach().movedim(dim, -1).clone() for value in (result[1], args[0]))
            self.found.append((positions, scores))
        return result


class ChoiceForcer(OperatorMode):
    """Replaces each choice of the largest values along an axis by an earlier one, in order.

    Args:
        ids: Positions, the axis of the choice at the end.

    Attributes:
        fits: Whether as many choices were made, of the same sizes.
    """

    def __init__(self, ids: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._ids = list(ids)
        self._wrong = False

    @property
    def fits(self) -> bool:
        """Whether every stored choice was used, and there was no other."""
        return not self._ids and not self._wrong

    def ran(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        dim = _chosen_along(func, args, kwargs)
        return result if dim is None else self._instead(args[0], dim, result)

    def _instead(self, scores: torch.Tensor, dim: int, own: Any) -> Any:
        if not self._ids:
            self._wrong = True
            return own
        ids = self._ids.pop(0).movedim(-1, dim)
        if ids.shape != own[1].shape:
            self._wrong = True
            return own
        return type(own)((scores.gather(dim, ids), ids))


def _chosen_along(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """The axis along which an operator chooses the largest values; None if it does not."""
    if func is not _aten.topk.default or not (args[3] if len(args) > 3 else kwargs.get("largest", True)):
        return None
    return args[2] if len(args) > 2 else -1


_RUNNING: dict[Callable[..., Any], Any] = {_aten.cumsum.default: np.add, _aten.cumprod.default: np.multiply}


class PlainAccumulation(OperatorMode):
    """Running sums and products of float32 are added up one by one, each rounded to float32.

    PyTorch keeps them in float64 on a CPU (`at::acc_type<float, is_cuda=false>` is double), and rounds what it gives.
    ONNX's CumSum promises no such thing, and onnxruntime does not do it: https://onnx.ai/onnx/operators/onnx__CumSum.html
    """

    def ran(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        add = _RUNNING.get(func)
        if add is None or result.dtype != torch.float32 or result.dim() == 0:
            return result
        terms = args[0].detach().cpu().to(torch.float32).numpy()
        return torch.from_numpy(add.accumulate(terms, axis=args[1])).to(result.device)


class RoundedLookUps(OperatorMode):
    """What ids look up is changed by one rounding, up or down: for a model of ids, inputs that differ as little.

    Args:
        seed: Of the directions.
        step: The rounding, relative; at least that of the table's dtype.
    """

    def __init__(self, seed: int, step: float) -> None:
        super().__init__()
        self._generator = np.random.default_rng(seed)
        self._step = step

    def ran(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        if func is not _aten.embedding.default or not result.dtype.is_floating_point:
            return result
        step = max(self._step, torch.finfo(result.dtype).eps)
        signs = torch.from_numpy(self._generator.choice([-1.0, 1.0], tuple(result.shape))).to(result.device)
        return (result.double() * (1 + step * signs)).to(result.dtype)
