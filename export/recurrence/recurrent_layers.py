"""PyTorch's recurrent layers as loops over time while loops are folded: `nn.LSTM`, `nn.GRU`, `nn.RNN`.

A trace unrolls them and fixes their length; as loops they fold, into a Scan for each layer and direction. The gates'
inputs are computed for all steps by one product before the loop. Packed sequences are left to PyTorch.

Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html (i, f, g, o), and GRU (r, z, n).
Letters: l steps, b batch, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_export.export.tracing.other_forms import InOtherForms

State: TypeAlias = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Sequence[Tensor]], State]
"""The gates' inputs of a step (b, n*h), the state, and the weights and biases applied to it → the next state."""


def recurrent_layers_step_by_step() -> InOtherForms:
    """A context manager in which recurrent layers run as loops over time."""
    return InOtherForms(_FORMS)


def _layers(step: Step) -> Callable[..., Any]:
    def form(*args: Any, **kwargs: Any) -> Any:
        # With packed sequences, the second argument is their lengths, and the weights come later.
        if len(args) != 9 or kwargs or not isinstance(args[2], (list, tuple)):
            return NotImplemented
        return _all_layers(step, args)

    return form


def _all_layers(step: Step, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What `torch.lstm` and its like return: all outputs, and the last state of each layer and direction."""
    x, first, weights, biases, layers, dropout, training, bidirectional, batch_first = arguments
    states: tuple[Tensor, ...] = tuple(first) if isinstance(first, (list, tuple)) else (first,)
    directions = 2 if bidirectional else 1
    own = len(weights) // (layers * directions)  # weights of each; one more if there is a projection
    x = x.transpose(0, 1) if batch_first and x.dim() == 3 else x
    last: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            mine = weights[place * own : (place + 1) * own]
            start = tuple(state[place] for state in states)
            found, end = _one(step, x, start, mine, biases, backwards=direction == 1)
            outputs.append(found)
            last.append(end)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and training and layer < layers - 1:
            x = F.dropout(x, dropout)
    x = x.transpose(0, 1) if batch_first and x.dim() == 3 else x
    return (x, *(torch.stack(parts) for parts in zip(*last, strict=True)))


def _one(
    step: Step, x: Tensor, state: State, weights: Sequence[Tensor], biases: bool, *, backwards: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: (l, b, outputs), and the last state."""
    of_input, of_state, rest = weights[0], weights[1], weights[2:]
    given = F.linear(x, of_input, rest[0] if biases else None)  # (l, b, n*h)
    used = [of_state, rest[1] if biases else None, *rest[2 if biases else 0 :]]
    outputs = []
    count = x.shape[0]
    for place in range(count):
        state = step(given[count - 1 - place if backwards else place], state, used)  # type: ignore[arg-type]
        outputs.append(state[0])
    found = torch.stack(outputs)
    return (found.flip(0) if backwards else found), state


def _lstm(given: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    hidden, cell = state
    i, f, g, o = (given + F.linear(hidden, weights[0], weights[1])).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    return (F.linear(hidden, weights[2]) if len(weights) > 2 else hidden), cell


def _gru(given: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    (hidden,) = state
    r, z, n = given.chunk(3, -1)
    own_r, own_z, own_n = F.linear(hidden, weights[0], weights[1]).chunk(3, -1)
    update = (z + own_z).sigmoid()
    new = (n + (r + own_r).sigmoid() * own_n).tanh()
    return ((1 - update) * new + update * hidden,)


def _rnn(activation: Callable[[Tensor], Tensor]) -> Step:
    def step(given: Tensor, state: State, weights: Sequence[Tensor]) -> State:
        return (activation(given + F.linear(state[0], weights[0], weights[1])),)

    return step


_FORMS: dict[Any, Callable[..., Any]] = {
    torch.lstm: _layers(_lstm),
    torch.gru: _layers(_gru),
    torch.rnn_tanh: _layers(_rnn(torch.tanh)),
    torch.rnn_relu: _layers(_rnn(torch.relu)),
}
