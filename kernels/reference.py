"""The definition the engines are held to: one recurrent layer as a slow, obvious time loop in torch over cells.py.

Plain differentiable torch operations, out of place: any dtype and device, any order of gradient, forward mode, vmap.
gradients.py has what follows from it, its first and second derivatives.
Results and the layout of `saved` are those of the raw ops in fastrnn/ops.py, letters those of layer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, abs, erf, exp, expm1, full_like, log, log1p, relu, sigmoid, sqrt, tanh, where
from torch.nn.functional import logsigmoid

from fastrnn.kernels.cells import CELLS, Cell
from fastrnn.kernels.layer import Inputs, Layer, States, Steps, Weights, initial_states


def maximum(a: Tensor | float, b: Tensor | float) -> Tensor:
    """torch.maximum, of which one may be a number."""
    return torch.maximum(*_tensors(a, b))


def minimum(a: Tensor | float, b: Tensor | float) -> Tensor:
    """torch.minimum, of which one may be a number."""
    return torch.minimum(*_tensors(a, b))


def row_mean(*values: Tensor) -> Tensor:
    """The mean of numbers [..., H] over the last axis and of all of them, [..., 1]."""
    total = values[0].mean(-1, keepdim=True)
    for each in values[1:]:
        total = total + each.mean(-1, keepdim=True)
    return total / len(values)


def row_rstd(*operands: Any) -> Tensor:
    """1 / sqrt(variance + eps) of the same numbers, eps the last operand; [..., 1]."""
    *values, eps = operands
    mean = row_mean(*values)
    variance = row_mean(*((each - mean).square() for each in values))
    return torch.rsqrt(variance + eps)


def _tensors(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    a = a if isinstance(a, Tensor) else torch.scalar_tensor(a, dtype=b.dtype, device=b.device)
    return a, b if isinstance(b, Tensor) else torch.scalar_tensor(b, dtype=a.dtype, device=a.device)


# The elementary functions are this module's, and the bound functions are too: there Dynamo looks them up.
NAMES: dict[str, Any] = {"__name__": __name__} | {
    function.__name__: function
    for function in (
        abs, erf, exp, expm1, full_like, log, log1p, maximum, minimum, relu, row_mean, row_rstd, sigmoid, sqrt, tanh,
        where
    )
} | {"logsigmoid": logsigmoid}  # fmt: skip
_FORWARD: dict[str, Callable[..., tuple[Tensor, ...]]] = {}


def of_tensors(name: str, *operands: Any) -> Tensor:
    """Apply an elementary function."""
    return NAMES[name](*operands)


def register(cell: Cell) -> None:
    """Make a cell known under its name."""
    CELLS[cell.name] = cell
    _FORWARD[cell.name] = cell.derived.forward.bind(NAMES)


for _cell in CELLS.values():
    register(_cell)


def layer_forward(
    inputs: Inputs, weights: Sequence[Tensor], layer: Layer, save: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layer's outputs y, h_n [D, B, R], c_n [D, B, S * H] or [0], and saved [D, rows, slots * H] or [0]."""
    kind, steps, x = CELLS[layer.cell], Steps(layer, inputs), inputs.x
    rows, within = steps.flat(x), steps.within()
    if within is not None:  # what stands past a length is not looked at, and is in no gradient
        rows = torch.where(within, rows, 0.0)
    done = [_forward(layer, inputs, steps, rows, d, own) for d, own in enumerate(layer.by_direction(weights))]
    states, carries, ys, kept = zip(*done, strict=True)
    y = steps.gathered([torch.cat(step, -1) for step in zip(*ys, strict=True)])
    empty = x.new_empty(0)
    c_n = torch.stack(carries) if kind.states else empty
    return y, torch.stack(states), c_n, torch.stack([torch.cat(slots) for slots in kept]) if save else empty


def carried_states(inputs: Inputs, layer: Layer, saved: Tensor) -> Tensor:
    """The states but h after each step [D, N, S * H], of what was saved; zeros past the lengths."""
    kind, within = CELLS[layer.cell], Steps(layer, inputs).within()
    units = saved.shape[-1] // (kind.slots + layer.projected)
    states = saved.narrow(-1, (kind.slots - kind.states) * units, kind.states * units)
    return states if within is None else torch.where(within, states, 0.0)


def _forward(layer: Layer, inputs: Inputs, steps: Steps, rows: Tensor, d: int, weights: Weights) -> tuple:
    """Direction d: last h [B, R] and c [B, S * H]; of each step in time's order, outputs [b, R], slots [b, slots*H].

    rows: of x, of all steps [N, I]. weights: of this direction.
    """
    kind, reverse, sizes = CELLS[layer.cell], layer.reverse != bool(d), steps.sizes
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    b_ih, own_weights = apart(kind, b_ih)
    from_x, product = rows @ w_ih.T, Product(layer, w_hh)
    of_xs = (from_x if b_ih is None else from_x + b_ih).split(sizes)
    begin, restart = initial_states(layer, inputs)
    (h, c), (h_reset, c_reset) = _of_direction(begin, d), _of_direction(restart, d)
    mask = None if inputs.mask is None else inputs.mask[d]
    # of each step: the cell's noise, each [b, H]; which rows [b, 1] are reset, and which are within their lengths
    noise = [*zip(*(part.split(sizes) for part in steps.noise_of(d, kind.noise)), strict=True)] or [()] * len(sizes)
    resets, within = (None if each is None else each.split(sizes) for each in (steps.restarted(), steps.within()))
    ys: list = [None] * len(sizes)
    kept: list = [None] * len(sizes)
    for t in order_of(len(sizes), reverse):
        b, here = sizes[t], None if within is None else within[t]
        p, q = first(b, h), None if c is None else first(b, c)
        if resets is not None:
            p = torch.where(resets[t], first(b, h_reset), p)
            q = None if c_reset is None or q is None else torch.where(resets[t], first(b, c_reset), q)
        before = states_before(kind, p, q)
        of_h = product(p if mask is None else p * first(b, mask))
        a = _preactivations(kind, of_xs[t], of_h if b_hh is None else of_h + b_hh)
        out, *found = _FORWARD[kind.name](*a, *before, *own_weights, *noise[t])
        if c is not None:
            after = found[-1] if kind.states == 1 else torch.cat(found[kind.kept :], -1)
            c = replace(c, after if here is None else torch.where(here, after, c))
        no_value = [out] * (kind.slots - kind.kept - kind.states)
        slots = [*found[: kind.kept], *no_value, *found[kind.kept :]]
        if w_hr is not None:
            slots.append(out)
            out = out @ w_hr.T
        h = replace(h, out if here is None else torch.where(here, out, h))
        ys[t] = out if here is None else torch.where(here, out, 0.0)
        kept[t] = torch.cat(slots, -1) if slots else out[:, :0]
    return h, c, ys, kept


def _of_direction(states: States, d: int) -> States:
    h, c = states
    return h[d], None if c is None else c[d]


class Product:
    """Products with W_hh [G * H, R], or with the blocks on its diagonal, of which it then is a column [G * H, H / heads]."""

    def __init__(self, layer: Layer, w_hh: Tensor) -> None:
        self.gates, self.heads = CELLS[layer.cell].gates, layer.heads
        self.transposed = w_hh.T if self.heads == 1 else self._of_heads(w_hh.T, self.gates)

    def __call__(self, h: Tensor) -> Tensor:
        """Return h [n, R] times W_hh transposed, [n, G * H]; or each gate's from an h of its own, of [G, n, R]."""
        if h.dim() == 3:
            by_gate = self.transposed.T.unflatten(0, (self.gates, -1))
            return torch.bmm(h, by_gate.transpose(1, 2)).transpose(0, 1).flatten(1)
        if self.heads == 1:
            return torch.mm(h, self.transposed)
        return self._whole(torch.bmm(self._of_heads(h, 1), self.transposed), self.gates)

    def back(self, d: Tensor) -> Tensor:
        """Return d [n, G * H] times W_hh, [n, R]."""
        if self.heads == 1:
            return torch.mm(d, self.transposed.T)
        return self._whole(torch.bmm(self._of_heads(d, self.gates), self.transposed.transpose(1, 2)), 1)

    def outer(self, d: Tensor, h: Tensor, so_far: Tensor | None) -> Tensor:
        """Return what d [n, G * H] and h [n, R] add to a gradient of W_hh, of which there is `so_far`."""
        if self.heads == 1:
            return torch.mm(d.T, h) if so_far is None else torch.addmm(so_far, d.T, h)
        blocks = torch.bmm(self._of_heads(h, 1).transpose(1, 2), self._of_heads(d, self.gates))
        added = self._whole(blocks, self.gates).T
        return added if so_far is None else so_far + added

    def _of_heads(self, rows: Tensor, gates: int) -> Tensor:
        """Return each head's part [heads, n, gates * H / heads] of rows [n, gates * H]."""
        n, width = rows.shape
        size = width // (gates * self.heads)
        return rows.reshape(n, gates, self.heads, size).permute(2, 0, 1, 3).reshape(self.heads, n, gates * size)

    def _whole(self, parts: Tensor, gates: int) -> Tensor:
        """Undo `_of_heads`."""
        heads, n, width = parts.shape
        return parts.reshape(heads, n, gates, width // gates).permute(1, 2, 0, 3).reshape(n, heads * width)


def _preactivations(kind: Cell, a_input: Tensor, a_hidden: Tensor) -> Iterator[Tensor]:
    """Pre-activations in the cell's order, each [b, H], from the products [b, G * H] in torch's gate order."""
    inputs, hiddens = a_input.chunk(kind.gates, -1), a_hidden.chunk(kind.gates, -1)
    for k in range(kind.preactivations):
        own = [inputs[kind.input[k]]] if k < len(kind.input) else []
        own += [hiddens[k - kind.hidden]] if k >= kind.hidden else []
        yield sum(own[1:], own[0])


def states_before(kind: Cell, h: Tensor, c: Tensor | None) -> list[Tensor]:
    """States as the cell takes them, each [b, H]."""
    others = iter(taken_apart(kind, c))
    return [h if name == "h" else next(others) for name, _ in kind.derived.before]


def taken_apart(kind: Cell, c: Tensor | None) -> Sequence[Tensor]:
    """States but h, each [..., H], which are side by side in c."""
    return () if c is None else (c,) if kind.states == 1 else c.chunk(kind.states, -1)


def apart(kind: Cell, b_ih: Tensor | None) -> tuple[Tensor | None, Sequence[Tensor]]:
    """Biases of the input products [G * H], and the cell's own weights [H], which stand behind them."""
    if not kind.weights or b_ih is None:
        return b_ih, ()
    parts = b_ih.chunk(kind.gates + kind.weights)
    return torch.cat(parts[: kind.gates]), parts[kind.gates :]


def order_of(length: int, reverse: bool) -> range:
    return range(length - 1, -1, -1) if reverse else range(length)


def first(b: int, state: Tensor) -> Tensor:
    """The first rows of a state [..., B, features]."""
    return state if b == state.shape[-2] else state.narrow(-2, 0, b)


def replace(state: Tensor, rows: Tensor) -> Tensor:
    """The first rows replaced: a row that has ended keeps its last state, in reverse one yet to begin its first."""
    b, B = len(rows), len(state)
    return rows if b == B else torch.cat((rows, state.narrow(0, b, B - b)))
