"""Every cell, once: what one unit does in one step, forward and its vector-Jacobian product side by side.

A cell is plain arithmetic over whatever an engine hands it: torch tensors (reference.py), registers full of lanes (cpu/),
blocks of a GPU program. `sigmoid`, `tanh`, `relu` and `where_positive` are free names here; each engine binds its own
(see `bind`).

Terms, per unit:
    a_*     pre-activation of a gate: input product + hidden product + biases
    h, c    hidden and cell state; p is the state before the step that enters element by element (`carry`)
    slots   what a step keeps for its backward pass, in this order, one value per unit

Formulas: https://docs.pytorch.org/docs/stable/generated/torch.nn.{RNN,LSTM,GRU}.html. In GRU the reset gate multiplies
`W_hn h + b_hn`, so the hidden part of the candidate, m, is a pre-activation of its own.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass


def rnn_tanh_forward(a, p):
    h = tanh(a)  # noqa: F821 (bound by the engine)
    return (h,)


def rnn_tanh_backward(dh, dc, h, p):
    da = dh * (1 - h * h)
    return (da,)


def rnn_relu_forward(a, p):
    h = relu(a)  # noqa: F821
    return (h,)


def rnn_relu_backward(dh, dc, h, p):
    da = where_positive(h, dh)  # noqa: F821
    return (da,)


def lstm_forward(a_i, a_f, a_g, a_o, p):
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)  # noqa: F821
    c = f * p + i * g
    h = o * tanh(c)  # noqa: F821
    return h, i, f, g, o, c


def lstm_backward(dh, dc, i, f, g, o, c, p):
    u = tanh(c)  # noqa: F821
    dc = dc + dh * o * (1 - u * u)
    da_i = dc * g * i * (1 - i)
    da_f = dc * p * f * (1 - f)
    da_g = dc * i * (1 - g * g)
    da_o = dh * u * o * (1 - o)
    return da_i, da_f, da_g, da_o, dc * f


def gru_forward(a_n, a_r, a_z, m, p):
    r, z = sigmoid(a_r), sigmoid(a_z)  # noqa: F821
    n = tanh(a_n + r * m)  # noqa: F821
    h = n + z * (p - n)
    return h, n, r, z, m


def gru_backward(dh, dc, n, r, z, m, p):
    da_n = dh * (1 - z) * (1 - n * n)
    da_r = da_n * m * r * (1 - r)
    da_z = dh * (p - n) * z * (1 - z)
    dm = da_n * r
    return da_n, da_r, da_z, dm, dh * z


@dataclass(frozen=True)
class Cell:
    """A recurrent cell as the engines see it.

    name:     the key under which ops and engines know the cell.
    mode:     torch.nn's name for it.
    gates:    gates in torch's weight matrices, each `hidden_size` rows.
    input:    torch's gate index of each input pre-activation, in the order of the forward function's arguments.
    hidden:   position of the first hidden pre-activation among those arguments; the hidden ones stand in torch's order.
    forward:  (pre-activations..., p) -> (h, slots...).
    backward: (dh, dc, slots..., p) -> (pre-activations' gradients..., dp); a cell without slots keeps h in their place,
              a cell without a carry returns no dp. dp is the gradient of c for `carry == "cell"`, and what reaches h past
              the gates for `carry == "hidden"`.
    slots:    number of values kept per unit.
    carry:    what p is: "cell" (c, the last slot), "hidden" (h) or None.
    """

    name: str
    mode: str
    gates: int
    input: tuple[int, ...]
    hidden: int
    forward: Callable
    backward: Callable
    slots: int
    carry: str | None

    @property
    def preactivations(self) -> int:
        """Pre-activations of a unit: more than `gates` where input and hidden parts of a gate are apart."""
        return self.hidden + self.gates


CELLS = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", "RNN_TANH", 1, (0,), 0, rnn_tanh_forward, rnn_tanh_backward, 0, None),
        Cell("rnn_relu", "RNN_RELU", 1, (0,), 0, rnn_relu_forward, rnn_relu_backward, 0, None),
        Cell("lstm", "LSTM", 4, (0, 1, 2, 3), 0, lstm_forward, lstm_backward, 5, "cell"),
        Cell("gru", "GRU", 3, (2, 0, 1), 1, gru_forward, gru_backward, 4, "hidden"),
    )
}


def bind(function: Callable, **names) -> Callable:
    """The same function with the engine's own `sigmoid`, `tanh`, `relu`, `where_positive` as its global names."""
    return types.FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__)
