"""A module is left in train mode where nobody says `model.eval()`. A graph is of the model in eval mode, and says so.

It is worth a word only where the two differ, and whether they do is tried: the model runs once in either mode.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout

import torch
from torch import nn

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


def note_on_mode(
    module: nn.Module, awake: Sequence[nn.Module], run: Callable[[], Sequence[torch.Tensor]]
) -> tuple[str, ...]:
    """What to say of a model that was found in train mode: nothing if it computes the same in eval mode.

    Args:
        module: The model, in eval mode; it is so afterwards.
        awake: Its modules that were found in train mode.
        run: Runs it once; whoever calls puts its state back.
    """
    if not awake:
        return ()
    paths = {part: path for path, part in module.named_modules()}
    known = [
        f"{paths[part]} ({type(part).__name__})" if paths.get(part) else type(part).__name__
        for part in awake
        if _is_another_in_training(part)
    ]
    if not known and not _differs(awake, run):
        return ()
    what = ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
    return (
        "the model was in train mode, where it computes something else"
        + (f": {what}" if what else "")
        + "; the graph is of the model in eval mode",
    )


def _is_another_in_training(part: nn.Module) -> bool:
    """Dropout that drops something, and norms that keep statistics."""
    if isinstance(part, _DROPOUT):
        return part.p > 0
    return isinstance(part, _NORMS) and part.running_mean is not None


def _differs(awake: Sequence[nn.Module], run: Callable[[], Sequence[torch.Tensor]]) -> bool:
    """Whether the model gives something else in train mode, or cannot be run in it."""
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        torch.manual_seed(0)
        expected = run()
        for part in awake:
            part.training = True
        try:
            torch.manual_seed(0)
            found = run()
        except Exception:  # whatever a model raises
            return True
        finally:
            for part in awake:
                part.training = False
    return len(found) != len(expected) or not all(
        one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in zip(found, expected, strict=True)
    )
