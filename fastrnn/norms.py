"""Layer normalisation inside of a cell (Ba, Kiros and Hinton 2016), as in Haste's LayerNormLSTM and LayerNormGRU.

Both products of a step are normalised over the row, all their gates (and heads) together, and multiplied with a gain; biases
are added after. Where the cell has a state c and no other but h, the output is calculated from the normalised c, which itself
is carried on as it is::

    norm(v) = (v - mean(v)) / sqrt(var(v) + eps), eps = 1e-5
    gates   = norm(W_ih x) * norm_ih + b_ih + norm(W_hh h) * norm_hh + b_hh
    LSTM:   h = o * tanh(norm(c) * norm_c + norm_c_bias)
    GRU:    n = tanh(norm(W_ih x)_n * norm_ih_n + b_in + r * (norm(W_hh h)_n * norm_hh_n + b_hn))

A normalised cell is a derived cell: each Gate of the plain one becomes an Input and a Hidden, and gains, shifts and biases are
Weights, in this order: the plain cell's own, the biases in the order of the pre-activations, norm_ih, norm_hh, norm_c,
norm_c_bias. Both biases that the engines add to the products are zeros.

Letters as in kernels/layer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrnn.kernels.cells import CELLS, Cell
from fastrnn.kernels.symbols import ancestors, row_mean, row_rstd

EPS = 1e-5  # as torch.nn.LayerNorm
PARAMETERS = "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"  # of torch.nn's layers
GAINS, SHIFTS = ("norm_ih", "norm_hh", "norm_c"), ("norm_c_bias",)


def shapes(cell: Cell, hidden: int) -> dict[str, tuple[int]]:
    """Return the parameters that a layer and direction of a cell has more, by the beginning of their names."""
    found = {"norm_ih": len(cell.parts["ih"]), "norm_hh": len(cell.parts["hh"])}
    if normalises_state(cell):
        found |= {"norm_c": 1, "norm_c_bias": 1}
    return {name: (blocks * hidden,) for name, blocks in found.items() if blocks}


def reset(module: Any, suffixes: Sequence[str]) -> None:
    """Set gains to ones and shifts to zeros, of the parameters that are there yet."""
    for suffix in suffixes:
        for name in (*GAINS, *SHIFTS):
            if (parameter := module._parameters.get(name + suffix)) is not None:
                nn.init.constant_(parameter, name in GAINS)


def normalises_state(cell: Cell) -> bool:
    """Is c the cell's only state but h, and the output calculated from the new one?"""
    (_, output), *after = cell.derived.definition.results
    return [name for name, _ in after] == ["c_new"] and any(node is after[0][1] for node in ancestors([output]))


class Normed:
    """How the cell derived from a plain one is given what the plain one was given.

    kinds:  of its arguments.
    hidden: names of the hidden parts, by those of the plain cell's arguments.
    """

    def __init__(self, plain: Cell) -> None:
        self.plain, self.kinds, self.hidden = plain, dict[str, str](), dict[str, str]()
        for name, kind in plain.kinds.items():
            self.kinds[name] = "Input" if kind == "Gate" else kind
            if kind == "Gate":
                self.hidden[name] = self._add(f"{name}_h", "Hidden", plain.kinds)
            elif kind == "Hidden":
                self.hidden[name] = name
        self.biases = {name: self._add(f"bias_{name}") for name in preactivations(plain)}
        self.gain_ih = {name: self._add(f"gain_ih_{name}") for name in plain.parts["ih"]}
        self.gain_hh = {name: self._add(f"gain_hh_{name}") for name in plain.parts["hh"]}
        self.of_state = [self._add(name) for name in ("gain_c", "shift_c")] if normalises_state(plain) else []

    def _add(self, name: str, kind: str = "Weight", taken: Any = ()) -> str:
        while name in self.kinds or name in taken:
            name += "_"
        self.kinds[name] = kind
        return name

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the plain cell's arguments, from the derived one's."""
        found = {name: given[name] for name, kind in self.plain.kinds.items() if kind in ("State", "Weight")}
        of_input = {name: given[name] for name in self.gain_ih}
        of_hidden = {name: given[self.hidden[name]] for name in self.gain_hh}
        for values, gains in ((of_input, self.gain_ih), (of_hidden, self.gain_hh)):
            for name, value in zip(values, normalised([*values.values()]) if values else (), strict=True):
                value = value * given[gains[name]]
                found[name] = found[name] + value if name in found else value
        return found | {name: found[name] + given[bias] for name, bias in self.biases.items()}

    def state(self, given: dict[str, Any]) -> Callable[[Any], Any]:
        """Return what is done to c where the output is calculated from it."""
        gain, shift = (given[name] for name in self.of_state)
        return lambda c: normalised([c])[0] * gain + shift


def normalised(values: Sequence[Any]) -> list[Any]:
    """Return values of a unit, normalised over those of all units of its row together."""
    mean, factor = row_mean(*values), row_rstd(*values, EPS)
    return [(value - mean) * factor for value in values]


def preactivations(cell: Cell) -> list[str]:
    """Return the names of the plain cell's arguments that have biases."""
    return [name for name, kind in cell.kinds.items() if kind in ("Gate", "Input", "Hidden")]


class Arrangement(NamedTuple):
    """Names of a plain cell's arguments, as those of a derived cell stand in its matrices and vectors.

    gates:     row blocks of each matrix of the derived cell.
    ih, hh:    those that have a row block in the plain cell's matrices.
    of_input, of_hidden: those that have one in the derived cell's, or others, whose row blocks are zeros.
    biases:    of pre-activations, which have one each, in turn: so many whose bias is the sum of one of the input's and one of
               the state's, or of these alone.
    own:       the plain cell's own weights.
    norms:     the beginnings of the names of the parameters in `shapes`.
    """

    gates: int
    ih: tuple[str, ...]
    hh: tuple[str, ...]
    of_input: tuple[str, ...]
    of_hidden: tuple[str, ...]
    biases: tuple[tuple[bool, bool, int], ...]
    own: tuple[str, ...]
    norms: tuple[str, ...]


def arrangement(name: str, derived_name: str) -> Arrangement:
    """Return the arrangement of a plain and a derived cell of these names."""
    return _arrangement(name, derived_name)


# What torch.compiler.assume_constant_result would do, but without importing Dynamo: it does not look into this function.
arrangement._dynamo_marked_constant = True  # type: ignore[attr-defined]  # undeclared


@cache
def _arrangement(name: str, derived_name: str) -> Arrangement:
    plain, derived = CELLS[name], CELLS[derived_name]
    plain_names = {own: name for name, own in Normed(plain).hidden.items()}
    of_hidden = [plain_names.get(name, name) for name in derived.hidden_parts]
    ih, hh, own = (tuple(plain.parts[part]) for part in ("ih", "hh", "own"))
    sources = groupby((name in ih, name in hh) for name in preactivations(plain))
    biases = tuple((*source, len([*names])) for source, names in sources)
    return Arrangement(
        derived.gates, ih, hh, tuple(derived.input_parts), tuple(of_hidden), biases, own, tuple(shapes(plain, 1))
    )


def weights(module: Any, suffix: str, plain: str, derived: str) -> list[Tensor]:
    """Return the weights of a layer's direction as the engines take them for the derived cell: w_ih, w_hh, b_ih, b_hh, w_hr."""
    of, H = arrangement(plain, derived), module.hidden_size
    given: dict[str, Any] = {name: getattr(module, name + suffix, None) for name in PARAMETERS}
    w_ih, w_hh, b_ih, b_hh, w_hr = given.values()
    w_hh = w_ih.new_zeros(0, H // module._fastrnn_layer().heads) if w_hh is None else w_hh
    norms = [getattr(module, name + suffix) for name in of.norms]
    zeros = norms[0].new_zeros(of.gates * H)
    behind = [getattr(module, f"weight_{name}{suffix}") for name in of.own]
    if not module.bias:
        behind.append(norms[0].new_zeros(sum(count for *_, count in of.biases) * H))
    else:
        of_input = _apart(b_ih, [count * H for there, _, count in of.biases if there])
        of_hidden = _apart(b_hh, [count * H for _, there, count in of.biases if there])
        for from_input, from_hidden, _ in of.biases:
            both = [next(bias) for bias, there in ((of_input, from_input), (of_hidden, from_hidden)) if there]
            behind.append(both[0] + both[1] if len(both) > 1 else both[0])
    return [
        blocks(w_ih, of.ih, of.of_input, H),
        blocks(w_hh, of.hh, of.of_hidden, H),
        torch.cat([zeros, *behind, *norms]),
        zeros,
        *([] if w_hr is None else [w_hr]),
    ]


def _apart(bias: Tensor | None, sizes: list[int]) -> Iterator[Tensor]:
    """Return the parts of a bias, in as few operations as there are: each takes longer than its numbers do."""
    return iter([] if bias is None else [bias] if len(sizes) == 1 else bias.split(sizes))


def blocks(w: Tensor, names: Sequence[str], wanted: Sequence[str], H: int) -> Tensor:
    """Return the row blocks of w, which have these names, in another order, with zeros for those that are not there."""
    if list(names) == list(wanted):
        return w
    found = dict(zip(names, w.split(H) if len(w) else (), strict=True))
    return torch.cat([found[name] if name in found else w.new_zeros(H, *w.shape[1:]) for name in wanted])
