"""`continue_loops`: loops of a folded decoder that start from zeros start from the states that go in instead.

    before   present[b, d, s] = loop(zeros[b, d, s], ...)        past[b, d, s] is read by nothing
    after    present[b, d, s] = loop(past[b, d, s], ...)

Libraries run a recurrence over several tokens from an empty state although they are given one (the first version of
Mamba in transformers 5.23): right for a prompt, and wrong for its second part. Which state was meant is seen in what
the loop's last one is called when it comes out. That this makes the decoder right is not known here: it is proved by
comparing it, in parts, with the model.

Letters: b batch, d channels, s states of a channel.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from moe_export.export.decoder.whole import DecoderModule, TokenOutputs, Whole
from moe_export.export.recurrence.fold import FoldedModule
from moe_export.export.recurrence.loop_body import LoopBody
from moe_export.export.recurrence.step_model import present_of

aten = torch.ops.aten

_ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
_FULL = (aten.full.default, aten.new_full.default)
_COPIES = (aten.clone.default, aten._to_copy.default, aten.alias.default)


class ContinuedDecoder(DecoderModule):
    """A folded decoder, whose outputs have names.

    Args:
        whole: What its results are held against.
        given: The mask and the positions, where it takes them.
        outputs: Names of what it gives, in order.
        results: Which of these belong to which tokens.
        folded: Computes them.
    """

    def __init__(
        self,
        whole: Whole,
        given: Sequence[str],
        outputs: Sequence[str],
        results: TokenOutputs,
        folded: nn.Module,
    ) -> None:
        super().__init__(whole, given, results)
        self.folded, self._outputs = folded, tuple(outputs)

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """One call."""
        return dict(zip(self._outputs, self.folded(*tensors), strict=True))


def continue_loops(
    module: FoldedModule, inputs: Sequence[str], outputs: Sequence[str], states: Sequence[str]
) -> tuple[str, ...]:
    """Start loops from the states that go in; changes the module's graph.

    Args:
        module: A decoder with its loops folded.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order.
        states: The inputs among them that are kept from call to call, and do not grow.

    Returns:
        The states that a loop now starts from.
    """
    nodes = list(module.graph.nodes)
    pasts = dict(zip(inputs, (node for node in nodes if node.op == "placeholder"), strict=True))
    (output,) = (node for node in nodes if node.op == "output")
    results: Mapping[str, Any] = dict(zip(outputs, output.args[0], strict=True))
    found = tuple(name for name in states if _started(results.get(present_of(name)), pasts[name]))
    module.graph.eliminate_dead_code()
    module.graph.lint()
    return found


def _started(result: Any, past: fx.Node) -> bool:
    """Start the loop whose last state is a result from a past that nothing reads; whether there is one."""
    place = _last_state(result)
    if place is None or past.users:
        return False
    loop, index = place
    first = loop.args[0][index]
    if not _is_zeros(first):
        return False
    states = tuple(past if at == index else state for at, state in enumerate(loop.args[0]))
    loop.args = (states, *loop.args[1:])
    return True


def _last_state(node: Any) -> tuple[Any, int] | None:
    """The loop, and the number of its state, that a value is the last one of; None of any other value."""
    while isinstance(node, fx.Node) and node.target in _COPIES:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    loop, index = node.args
    if not isinstance(loop, fx.Node) or not isinstance(loop.target, LoopBody) or not isinstance(index, int):
        return None
    return (loop, index) if index < loop.target.states else None


def _is_zeros(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.target in _COPIES:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return False
    filled = node.args[-1] if node.target is aten.new_full.default else None
    filled = node.args[1] if node.target is aten.full.default else filled
    return node.target in _ZEROS or (
        node.target in _FULL and isinstance(filled, (int, float)) and filled == 0
    )
