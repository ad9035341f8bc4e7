"""Every cell, once: what one unit does in one step, as a function whose signature says what it is given.

Kinds of arguments, by their annotations, per unit:
    Gate     a pre-activation: input product + hidden product + biases
    Input    the input's product and bias alone
    Hidden   the hidden state's product and bias alone
    State    what the step before has left; `h` is the output itself as it enters element by element

A function returns the output, then each state but h in their order. Row blocks of weight_ih and weight_hh stand in the order of
the arguments that have them. Derivatives, and what is kept for backward, are derived (derive.py).

Formulas: https://docs.pytorch.org/docs/stable/generated/torch.nn.{RNN,LSTM,GRU}.html. In GRU the reset gate multiplies
`W_hn h + b_hn`, so the hidden part of the candidate is an argument of its own.
"""

from __future__ import annotations

import types
from collections.abc import Callable

from .derive import Derivation
from .symbols import Symbol, relu, sigmoid, tanh


class Gate(Symbol):
    """A pre-activation: the row block's products with the input and with the hidden state, and both biases."""


class Input(Symbol):
    """The row block's product with the input, and its bias, alone."""


class Hidden(Symbol):
    """The row block's product with the hidden state, and its bias, alone."""


class State(Symbol):
    """A value that is carried from step to step."""


KINDS = "Input", "Gate", "Hidden", "State"


def rnn_tanh(a: Gate):
    return tanh(a)


def rnn_relu(a: Gate):
    return relu(a)


def lstm(i: Gate, f: Gate, g: Gate, o: Gate, c: State):
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def gru(r: Gate, z: Gate, n_x: Input, n_h: Hidden, h: State):
    n = tanh(n_x + sigmoid(r) * n_h)
    return n + sigmoid(z) * (h - n)


class Cell:
    """A recurrent cell as the engines see it. They keep pre-activations of the input alone first, of the state alone last.

    name:           the key under which ops and engines know the cell.
    mode:           torch.nn's name for it.
    derived:        what engines calculate: forward and backward.
    gates:          row blocks of each of torch's weight matrices, `hidden_size` rows each.
    hidden:         pre-activations of the input alone: so many come before the first that has a hidden part.
    input:          row block in weight_ih of each pre-activation that has an input part.
    preactivations: of a unit: more than `gates` where input and hidden parts of a gate are apart.
    slots:          values that a step keeps for backward, of each unit; the last is its state.
    carry:          what enters element by element: "cell" (c, the last slot), "hidden" (h) or None.

    Attributes are plain values: Dynamo reads them.
    """

    def __init__(self, name: str, mode: str, function: Callable) -> None:
        self.name, self.mode = name, mode
        kinds = function.__annotations__  # names of kinds, as this module's annotations are not evaluated
        alone, shared, hidden, states = ([each for each in kinds if kinds[each] == kind] for kind in KINDS)
        blocks = [each for each in kinds if each in alone or each in shared]
        self.derived = Derivation(name, function, alone, shared, hidden, states, list(kinds))
        self.gates, self.hidden, self.preactivations = len(blocks), len(alone), len(alone) + len(shared) + len(hidden)
        self.input = tuple(blocks.index(each) for each in (*alone, *shared))
        self.slots = len(self.derived.kept) + len(self.derived.after)
        self.carry = "hidden" if states == ["h"] else "cell" if states else None


CELLS = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", "RNN_TANH", rnn_tanh),
        Cell("rnn_relu", "RNN_RELU", rnn_relu),
        Cell("lstm", "LSTM", lstm),
        Cell("gru", "GRU", gru),
    )
}


def bind(function: Callable, **names) -> Callable:
    """Return the same function with these global names in the place of its own."""
    return types.FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__)
