"""The definition the engines are held to: one recurrent layer as a slow, obvious time loop in torch over cells.py.

Plain differentiable torch operations, out of place: any dtype and device, any order of gradient, forward mode, vmap.
gradients.py has what follows from it, its first and second derivatives.
Results and the layout of `saved` are those of the raw ops in fastrnn/ops.py, letters those of layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, relu, sigmoid, tanh

from fastrnn.kernels.cells import CELLS, Cell, bind
from fastrnn.kernels.layer import Inputs, Layer, Steps, Weights


def where_positive(h: Tensor, dh: Tensor) -> Tensor:
    return torch.where(h <= 0, torch.zeros_like(dh), dh)


# The cells' free names are this module's, and the bound functions are too: there Dynamo looks them up.
_NAMES = {
    "__name__": __name__,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "relu": relu,
    "where_positive": where_positive,
}
_FORWARD = {name: bind(cell.forward, **_NAMES) for name, cell in CELLS.items()}


def layer_forward(
    inputs: Inputs, weights: Sequence[Tensor], layer: Layer, save: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layer's outputs y, h_n [D, B, R], c_n [D, B, H] or [0], and saved [D, rows, slots * H] or [0]."""
    kind, steps, (x, _, h0, c0) = CELLS[layer.cell], Steps(layer, inputs), inputs
    xs = steps.each(x)
    ys, states, carries, kept = [], [], [], []
    for d, own in enumerate(layer.by_direction(weights)):
        h, c, out, slots = _forward(kind, xs, h0[d], None if c0 is None else c0[d], own, layer.reverse != bool(d))
        ys.append(out)
        kept.append(torch.cat(slots))
        states.append(h)
        carries.append(c)
    y = steps.gathered([torch.cat(step, -1) for step in zip(*ys, strict=True)])
    empty = x.new_empty(0)
    c_n = torch.stack(carries) if kind.carry == "cell" else empty
    return y, torch.stack(states), c_n, torch.stack(kept) if save else empty


def _forward(kind: Cell, xs, h: Tensor, c: Tensor | None, weights: Weights, reverse: bool):
    """One direction: last h [B, R] and c [B, H]; of each step in time's order, outputs [b, R], slots [b, slots*H]."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    ys: list = [None] * len(xs)
    kept: list = [None] * len(xs)
    for t in order_of(len(xs), reverse):
        b = len(xs[t])
        p = first(b, h if c is None else c)
        a = _preactivations(kind, _affine(xs[t], w_ih, b_ih), _affine(first(b, h), w_hh, b_hh))
        out, *slots = _FORWARD[kind.name](*a, p)
        if c is not None:
            c = replace(c, slots[-1])
        if w_hr is not None:
            slots.append(out)
            out = out @ w_hr.T
        h = replace(h, out)
        ys[t], kept[t] = out, torch.cat(slots, -1) if slots else out[:, :0]
    return h, c, ys, kept


def _preactivations(kind: Cell, a_input: Tensor, a_hidden: Tensor) -> Iterator[Tensor]:
    """Arguments of the cell's forward function, each [b, H], from the products [b, G * H] in torch's gate order."""
    inputs, hiddens = a_input.chunk(kind.gates, -1), a_hidden.chunk(kind.gates, -1)
    for k in range(kind.preactivations):
        own = [inputs[kind.input[k]]] if k < len(kind.input) else []
        own += [hiddens[k - kind.hidden]] if k >= kind.hidden else []
        yield sum(own[1:], own[0])


def _affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x @ w.T if b is None else x @ w.T + b


def order_of(length: int, reverse: bool) -> range:
    return range(length - 1, -1, -1) if reverse else range(length)


def first(b: int, state: Tensor) -> Tensor:
    return state if b == len(state) else state.narrow(0, 0, b)


def replace(state: Tensor, rows: Tensor) -> Tensor:
    """The first rows replaced: a row that has ended keeps its last state, in reverse one yet to begin its first."""
    b, B = len(rows), len(state)
    return rows if b == B else torch.cat((rows, state.narrow(0, b, B - b)))
