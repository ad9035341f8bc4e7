"""Cells that come with fastrnn, each from its paper; `fastrnn.cells` has them by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastrnn.cells import (
    CellFunction,
    Gate,
    Hidden,
    Input,
    State,
    Weight,
    cell,
    exp,
    logsigmoid,
    maximum,
    relu,
    sigmoid,
    tanh,
)
from fastrnn.kernels import cells


def _of_torch(function: Callable[..., Any]) -> CellFunction:
    """Make a cell of the function of a built-in one, which pickles find here."""
    made = cell(function)
    made.__module__ = __name__
    return made


lstm, gru = _of_torch(cells.lstm), _of_torch(cells.gru)


@cell
def peephole_lstm(i: Gate, f: Gate, g: Gate, o: Gate, c: State, p_i: Weight, p_f: Weight, p_o: Weight):
    """Gers, Schraudolph and Schmidhuber 2002: gates see the cell state, the output gate the new one."""
    i, f = sigmoid(i + p_i * c), sigmoid(f + p_f * c)
    c = f * c + i * tanh(g)
    return sigmoid(o + p_o * c) * tanh(c), c


@cell
def cifg(f: Gate, g: Gate, o: Gate, c: State):
    """An LSTM whose input gate is 1 - f (Greff et al. 2017, "CIFG")."""
    g = tanh(g)
    c = g + sigmoid(f) * (c - g)
    return sigmoid(o) * tanh(c), c


@cell
def mgu(f: Gate, n_x: Input, n_h: Hidden, h: State):
    """The minimal gated unit (Zhou et al. 2016, eqs. 4 to 6), its gate after the recurrent product as GRU's reset gate is."""
    f = sigmoid(f)
    return h + f * (tanh(n_x + f * n_h) - h)


@cell
def indrnn(a: Input, h: State, u: Weight):
    """The independently recurrent network (Li et al. 2018, eq. 2): each unit sees itself alone."""
    return relu(a + u * h)


@cell
def leaky_rnn(a: Gate, h: State, rate: Weight):
    """Leaky integration (Jaeger et al. 2007, eq. 4) in steps of 1; sigmoid(rate) is 1 / (time constant), for each unit."""
    return h + sigmoid(rate) * (tanh(a) - h)


@cell
def cfc(f: Gate, g: Gate, a: Gate, b: Gate):
    """The closed-form continuous-time network (Hasani et al. 2022, eq. 10) in steps of 1, without a backbone, as in ncps."""
    f = tanh(f)
    return f + sigmoid(a + b) * (tanh(g) - f)


@cell
def slstm(i: Gate, f: Gate, z: Gate, o: Gate, c: State, n: State, m: State):
    """xLSTM's sLSTM: exponential gates, a normaliser and a stabiliser (Beck et al. 2024, eqs. 8 to 17)."""
    log_f = logsigmoid(f)
    m_new = maximum(log_f + m, i)
    i, f = exp(i - m_new), exp(log_f + m - m_new)
    c, n = f * c + i * tanh(z), f * n + i
    return sigmoid(o) * c / n, c, n, m_new
