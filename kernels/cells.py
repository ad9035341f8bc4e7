"""Every cell, once: what one unit does in one step, as a function whose signature says what it is given.

Kinds of arguments, by their annotations, per unit:
    Gate     a pre-activation: input product + hidden product + biases
    Input    the input's product and bias alone
    Hidden   the hidden state's product and bias alone
    State    what the step before has left; `h` is the output itself as it enters element by element
    Weight   a learned value
    Noise    a number that the call brings for each row, unit and step; it has no gradient

A function returns the output, then each state but h in their order. Row blocks of weight_ih and weight_hh stand in the order of
the arguments that have them. Derivatives, and what is kept for backward, are derived (derive.py).

Formulas: https://docs.pytorch.org/docs/stable/generated/torch.nn.{RNN,LSTM,GRU}.html. In GRU the reset gate multiplies
`W_hn h + b_hn`, so the hidden part of the candidate is an argument of its own.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Callable, Mapping

from . import symbols
from .derive import Derivation
from .symbols import Symbol, relu, sigmoid, tanh


class Gate(Symbol):
    """A pre-activation: the row block's products with the input and with the hidden state, and both biases."""


class Input(Symbol):
    """The row block's product with the input, and its bias, alone."""


class Hidden(Symbol):
    """The row block's product with the hidden state, and its bias, alone."""


class State(Symbol):
    """A value that is carried from step to step. `h` is the output, where it enters element by element."""


class Weight(Symbol):
    """A learned value."""


class Noise(Symbol):
    """A number that the call brings for each row, unit and step, and that has no gradient."""


KINDS = {kind.__name__: kind for kind in (Gate, Input, Hidden, State, Weight)}  # those that whoever writes a cell knows


def rnn_tanh(a: Gate):
    return tanh(a)


def rnn_relu(a: Gate):
    return relu(a)


def lstm(i: Gate, f: Gate, g: Gate, o: Gate, c: State):
    """Hochreiter and Schmidhuber 1997, with forget gates (Gers et al. 2000): torch.nn.LSTM's arithmetic and layout."""
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def gru(r: Gate, z: Gate, n_x: Input, n_h: Hidden, h: State):
    """Cho et al. 2014, with the reset gate after the product: torch.nn.GRU's arithmetic and layout."""
    n = tanh(n_x + sigmoid(r) * n_h)
    return n + sigmoid(z) * (h - n)


class Cell:
    """A recurrent cell as the engines see it. They keep pre-activations of the input alone first, of the state alone last.

    Both weight matrices have as many row blocks: where a cell has more parts of the one kind than of the other, some have a row
    block of zeros in the other matrix.

    name:           the key under which ops and engines know the cell.
    mode:           torch.nn's name for it, or none.
    kinds:          of the function's arguments, names of KINDS.
    parts:          names of the arguments that have a row block in weight_ih, one in weight_hh, a weight of their own ("ih",
                    "hh", "own").
    derived:        what engines calculate: forward and backward.
    gates:          row blocks of each weight matrix, `hidden_size` rows each.
    hidden:         pre-activations of the input alone: so many come before the first that has a hidden part.
    input:          row block in weight_ih of each pre-activation that has an input part; in weight_hh they stand in order.
    preactivations: of a unit: more than `gates` where input and hidden parts of a gate are apart.
    states:         states but h, of each unit. c0 has them side by side.
    reads_hidden:   whether h enters element by element.
    weights:        learned values of each unit. They stand behind the gates' biases in b_ih.
    noise:          numbers that a call brings for each row, unit and step, side by side in a row of `Inputs.noise`.
    kept, slots:    values that a step keeps for backward, of each unit. Of the slots the first `kept` are derived.kept, the
                    last are the states. There is room for the gates' pre-activations.
    reduces:        whether there are reductions over the units of a row.
    meetings:       of a step, forward and backward, of threads that share its rows.
    reduced:        numbers of a unit that reductions read, in a step, forward and backward.
    stopped:        gradients of each unit that a reset stops: of the gates, of the states, and of h if it enters element by
                    element.

    Attributes are plain values: Dynamo reads them.
    """

    def __init__(self, name: str, mode: str, function: Callable, kinds: Mapping[str, str]) -> None:
        self.name, self.mode, self.function, self.kinds = name, mode, function, dict(kinds)
        alone, shared, hidden, states, weights, noise = (
            [each for each in kinds if kinds[each] == kind] for kind in ("Input", "Gate", "Hidden", "State", "Weight", "Noise")
        )
        of = {"ih": ("Gate", "Input"), "hh": ("Gate", "Hidden"), "own": ("Weight",)}
        self.parts = {part: [each for each in kinds if kinds[each] in own] for part, own in of.items()}
        pairs = min(len(alone), len(hidden))
        self.input_parts = [each for each in kinds if each in shared or each in alone or each in hidden[pairs:]]
        self.hidden_parts = [
            *(each for each in kinds if each in shared or each in alone[pairs:] or each in hidden[pairs:]),
            *hidden[:pairs],
        ]
        shared = self.hidden_parts[: len(self.hidden_parts) - pairs]
        alone, hidden = alone[:pairs], hidden[:pairs]
        self.derived = Derivation(name, function, alone, shared, hidden, states, weights, noise, list(kinds))
        self.gates, self.hidden, self.preactivations = len(self.input_parts), pairs, len(shared) + 2 * pairs
        self.input = tuple(self.input_parts.index(each) for each in (*alone, *shared))
        self.states, self.reads_hidden, self.weights = len(self.derived.after), "h" in states, len(weights)
        self.noise, self.reduces, self.meetings, self.reduced = len(noise), self.derived.reduces, (1, 1), (0, 0)
        if self.reduces:  # forward's product is met for too, as all of a row is reduced that it gives
            passes = self.derived.forward_stages, self.derived.backward_stages
            forward, backward = (sum(stage.waits for stage in own) for own in passes)
            self.meetings = 2 + forward, 1 + backward
            read, read_back = (
                {i.index for stage in own for _, node in stage.reductions for i in node.inputs} for own in passes
            )
            self.reduced = len(read), len(read_back)
        self.stopped = self.gates + self.states + self.reads_hidden
        self.kept = len(self.derived.kept)
        self.slots = self.kept + self.states
        if self.slots or self.gates > 1:
            self.slots = max(self.slots, self.gates)

    @property
    def definition(self) -> str:
        """The cell as text, from which `read` makes it again."""
        return json.dumps({"name": self.derived.name, "kinds": self.kinds, "source": self.derived.definition.source()})


def define(function: Callable, kinds: Mapping[str, str]) -> Cell:
    """Make a cell of a function and its arguments' kinds, names of KINDS. Its name says what it is, whoever defines it.

    Raises:
        Refused: the function does what no engine can.
    """
    cell = Cell(function.__name__, "", function, kinds)
    cell.name += f"_{hashlib.sha256(cell.definition.encode()).hexdigest()[:12]}"
    return cell


def read(definition: str) -> Cell:
    """Make a cell of its definition."""
    given = json.loads(definition)
    space = {name: getattr(symbols, name) for name in symbols.NUMBERS if hasattr(symbols, name)}
    space["full_like"] = lambda like, number: number
    exec(given["source"], space)
    return define(space[given["name"]], given["kinds"])


CELLS = {
    name: Cell(name, mode, function, function.__annotations__)  # which are names, as this module does not evaluate them
    for name, mode, function in (
        ("rnn_tanh", "RNN_TANH", rnn_tanh),
        ("rnn_relu", "RNN_RELU", rnn_relu),
        ("lstm", "LSTM", lstm),
        ("gru", "GRU", gru),
    )
}


def bind(function: Callable, **names) -> Callable:
    """Return the same function with these global names in the place of its own."""
    return types.FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__)
