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
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True)
class Cell:
    """A recurrent cell as the engines see it. They keep pre-activations of the input alone first, those of the state alone last.

    name:     the key under which ops and engines know the cell.
    mode:     torch.nn's name for it.
    function: what it is.
    """

    name: str
    mode: str
    function: Callable

    def of_kind(self, *kinds: type[Symbol]) -> list[str]:
        """List the arguments of these kinds, in order."""
        names = {kind.__name__ for kind in kinds}
        return [name for name, kind in self.function.__annotations__.items() if kind in names]

    @cached_property
    def derived(self) -> Derivation:
        """What engines calculate: forward and backward."""
        by_kind = [self.of_kind(kind) for kind in (Input, Gate, Hidden, State)]
        return Derivation(self.name, self.function, *by_kind, list(self.function.__annotations__))

    @cached_property
    def gates(self) -> int:
        """Row blocks of each of torch's weight matrices, `hidden_size` rows each."""
        return len(self.of_kind(Gate, Input))

    @cached_property
    def hidden(self) -> int:
        """Pre-activations of the input alone: so many come before the first that has a hidden part."""
        return len(self.of_kind(Input))

    @cached_property
    def input(self) -> tuple[int, ...]:
        """Row block in weight_ih of each pre-activation that has an input part."""
        blocks = self.of_kind(Gate, Input)
        return tuple(blocks.index(name) for name in (*self.of_kind(Input), *self.of_kind(Gate)))

    @cached_property
    def preactivations(self) -> int:
        """Pre-activations of a unit: more than `gates` where input and hidden parts of a gate are apart."""
        return self.hidden + self.gates

    @cached_property
    def slots(self) -> int:
        """Values that a step keeps for backward, of each unit; the last are its states."""
        return len(self.derived.kept) + len(self.derived.after)

    @cached_property
    def carry(self) -> str | None:
        """What enters element by element: "cell" (c, the last slot), "hidden" (h) or None."""
        states = self.of_kind(State)
        return "hidden" if states == ["h"] else "cell" if states else None


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
