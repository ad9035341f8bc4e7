"""First and second derivatives of a layer in plain torch operations, from the states that it went through.

Near those states each direction of a layer is linear, and what a step does to small changes is known before any loop over time:
`slopes`, which the cell's own backward function gives. `Block.push` carries changes forward through time and `Block.pull`
carries gradients back. A step of either is one product and a few operations; all other products are of many rows at once.
Steps come in blocks, so that the numbers of a block stay in the processor's cache from one operation to the next.

Nothing is done in place: autograd, forward mode and vmap pass through all of it, to any order.

Letters as in reference.py, and: N rows of all steps, or of a block's, one below the other in time's order; P pre-activations of
a unit; Q as many, and one more where the cell has a `carry`; S states of the cell: h, or h and c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.kernels.cells import CELLS, Cell, bind
from fastrnn.kernels.reference import NAMES, at, first, order_of, preactivations, replace, where_positive

BLOCK = 16384  # units of a block's steps and rows: a few dozen tensors of so many numbers fit a core's cache


def layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor],
    b_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    y: Tensor,
    saved: Tensor,
    cell: str,
    reverse: bool = False,
    batch_first: bool = False,
    need_dx: bool = True,
    need_dh0: bool = True,
    need_dw: bool = True,
) -> tuple[Tensor, ...]:
    """Return the gradients dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr; [0] where there is none.

    The two directions' gradients of a weight are one below the other.
    """
    rows, empty = Rows(x, batch_sizes, batch_first), x.new_empty(0)
    dxs, dh0s, dc0s, dws = [], [], [], []
    for d in range(len(w_ih)):
        weights = Weights(*(at(kind, d) for kind in (w_ih, w_hh, b_ih, b_hh, w_hr)))
        direction = Direction(CELLS[cell], rows, d, reverse != bool(d), x, h0, c0, weights, y, saved)
        dys, state = direction.split(rows.of(dy, d, len(w_ih))), direction.state(dh_n, dc_n)
        dx, dw = [None] * len(dys), Weights()
        for k in reversed(direction.order):
            block = direction.blocks[k]
            grads, state = block.pull(dys[k], state)
            dx[k] = grads.input @ weights.w_ih if need_dx else None
            dw = block.add_weights(dw, grads, block.x, block.h, block.out) if need_dw else dw
        dxs.append(dx)
        dh0s.append(state.h)
        dc0s.append(state.c)
        dws.append(dw)
    return (
        rows.join(total(*map(joined, dxs))) if need_dx else empty,
        torch.stack(dh0s) if need_dh0 else empty,
        torch.stack(dc0s) if need_dh0 and c0 is not None else empty,
        *(empty if dw[0] is None else torch.cat(dw) for dw in zip(*dws, strict=True)),
    )


def layer_double_backward(
    v: Sequence[Tensor | None],
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor],
    b_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    y: Tensor,
    saved: Tensor,
    cell: str,
    reverse: bool,
    batch_first: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of dy, dh_n, dc_n, x, h0, c0 and of each weight, or None, from those of layer_backward's results, v.

    layer_backward is linear in dy, dh_n and dc_n: it is the transpose of the layer's derivative. So its results times v are dy,
    dh_n and dc_n times the change of the layer's outputs where the layer's inputs change by v. Hence the gradient of dy, dh_n
    and dc_n is that change, and the gradient of the layer's inputs is the change of layer_backward's results.
    """
    rows, D = Rows(x, batch_sizes, batch_first), len(w_ih)
    vx, vh0, vc0, *vw = v
    vw = [None if each is None else each.chunk(D) for each in vw]
    ys, h_ns, c_ns, dxs, dh0s, dc0s, dws = [], [], [], [], [], [], []
    for d in range(D):
        weights = Weights(*(at(kind, d) for kind in (w_ih, w_hh, b_ih, b_hh, w_hr)))
        direction = Direction(CELLS[cell], rows, d, reverse != bool(d), x, h0, c0, weights, y, saved)
        blocks, order, along = direction.blocks, direction.order, Weights(*(at(kind, d) for kind in vw))
        vxs, dys = direction.split(rows.of(vx)), direction.split(rows.of(dy, d, D))
        changes, state = [None] * len(blocks), direction.state(vh0, vc0)
        for k in order:
            changes[k], state = blocks[k].push(vxs[k], along, state)
        ys.append(joined([change.y for change in changes]))
        h_ns.append(state.h)
        c_ns.append(state.c)
        state, bent_state = direction.state(dh_n, dc_n), direction.state(None, None)
        dx, dw = [None] * len(blocks), Weights()
        for k in reversed(order):
            block, change = blocks[k], changes[k]
            grads, state = block.pull(dys[k], state)
            bent, bent_state = block.bend(grads, along, change, bent_state)
            if need_dx:
                dx[k] = total(bent.input @ weights.w_ih, None if along.w_ih is None else grads.input @ along.w_ih)
            if need_dw:
                dw = block.add_weights(dw, bent, block.x, block.h, block.out)
                dw = block.add_weights(dw, grads, change.x, change.h, change.out, biases=False)
        dxs.append(dx)
        dh0s.append(bent_state.h)
        dc0s.append(bent_state.c)
        dws.append(dw)
    return (
        None if dy is None else rows.join(ys[0] if D == 1 else torch.cat(ys, -1)),
        None if dh_n is None else torch.stack(h_ns),
        None if dc_n is None else torch.stack(c_ns),
        rows.join(total(*map(joined, dxs))) if need_dx else None,
        torch.stack(dh0s),
        None if c0 is None else torch.stack(dc0s),
        [each for kind in zip(*dws, strict=True) if kind[0] is not None for each in kind],
    )


class Rows:
    """Where the rows of all steps lie in x, y and their gradients, and how many each step has."""

    def __init__(self, x: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> None:
        self.packed, self.batch_first = batch_sizes is not None, batch_first
        if batch_sizes is None:
            self.batch, self.steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
            self.sizes = [self.batch] * self.steps
        else:
            self.sizes = batch_sizes.tolist()

    def of(self, tensor: Tensor | None, d: int = 0, directions: int = 1) -> Tensor | None:
        """Return [N, ...]; of a tensor that holds both directions, the columns of one."""
        if tensor is not None and not self.packed:
            tensor = (tensor.transpose(0, 1) if self.batch_first else tensor).reshape(-1, tensor.shape[-1])
        return tensor if tensor is None or directions == 1 else tensor.chunk(directions, -1)[d]

    def join(self, rows: Tensor) -> Tensor:
        """Undo `of`."""
        if self.packed:
            return rows
        rows = rows.reshape(self.steps, self.batch, -1)
        return rows.transpose(0, 1).contiguous() if self.batch_first else rows


class Weights(NamedTuple):
    """The weights of a direction, their gradients, or a vector for each; None where there is none."""

    w_ih: Tensor | None = None
    w_hh: Tensor | None = None
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


class State(NamedTuple):
    """A direction's state, a change of it, or its gradient: [B, R] and, for lstm, [B, H]."""

    h: Tensor
    c: Tensor | None


class Change(NamedTuple):
    """How what a block computes changes."""

    x: Tensor | None  # [N, I]
    a: Sequence[Tensor]  # P times [N, H], pre-activations
    h: Tensor  # [N, R], the state before each step
    p: Tensor | None  # [N, H]
    out: Tensor  # [N, H], the cell's h, before the projection
    y: Tensor  # [N, R]


class Gradients(NamedTuple):
    """Gradients of what a block computes, or how they change."""

    input: Tensor  # [N, G * H], of the products with x, in torch's gate order
    hidden: Tensor  # [N, G * H], of the products with h
    y: Tensor  # [N, R]
    out: Tensor  # [N, H]
    c: Tensor | None  # [N, H], of the cell state, but for what reaches it through the same step's h


class Direction:
    """One direction of a layer, near the states that it went through, as blocks of steps."""

    def __init__(self, cell: Cell, rows: Rows, d: int, reverse: bool, x, h0, c0, weights: Weights, y, saved) -> None:
        hidden, sizes, order = weights.w_hh.shape[0] // cell.gates, rows.sizes, order_of(len(rows.sizes), reverse)
        self.d, self.first = d, State(h0[d], at(c0, d))
        y = rows.of(y, d, len(h0))
        slots = saved[d].split(hidden, -1) if cell.slots else (y,)
        h = p = before(order, sizes, y, self.first.h)
        if cell.carry == "cell":
            p = before(order, sizes, slots[cell.slots - 1], self.first.c)
        steps = max(1, BLOCK // max(1, sizes[0] * hidden))
        parts = [sizes[t : t + steps] for t in range(0, len(sizes), steps)]
        self.rows, self.order = [sum(part) for part in parts], order_of(len(parts), reverse)
        S = 2 if cell.carry == "cell" else 1
        units = torch.eye(S, dtype=h.dtype, device=h.device).view(S, S, 1, 1)
        split = [self.split(each) for each in (rows.of(x), h, p, *slots)]
        self.blocks = [
            Block(cell, weights, part, order_of(len(part), reverse), units, *each)
            for part, *each in zip(parts, *split, strict=True)
        ]

    def split(self, rows: Tensor | None) -> Sequence[Tensor] | list[None]:
        """Return the rows of each block."""
        return [None] * len(self.rows) if rows is None else steps_of(rows, self.rows)

    def state(self, h: Tensor | None, c: Tensor | None) -> State:
        """Return this direction's part of the changes or gradients of states, zeros where there are none."""
        return State(*(_zeros(own) if t is None else t[self.d] for t, own in zip((h, c), self.first, strict=True)))


class Block:
    """Some steps of one direction, one after the other, near the states that they went through."""

    def __init__(self, cell: Cell, weights: Weights, sizes: list[int], order: range, units: Tensor, x, h, p, *slots) -> None:
        self.cell, self.weights, self.sizes, self.order, self.x, self.h, self.p = cell, weights, sizes, order, x, h, p
        self.slots, self.out = slots[: max(cell.slots, 1)], slots[-1]
        self.rows, self.hidden = x.shape[0], self.out.shape[-1]
        d_h, *d_c = units.unbind()
        grads = _BACKWARD[cell.name](d_h, d_c[0] if d_c else None, *self.slots, p)
        self.slopes = torch.stack(grads, 2) if len(grads) > 1 else grads[0].unsqueeze(2)  # [S, N, Q, H]

    def push(self, x: Tensor | None, v: Weights, state: State) -> tuple[Change, State]:
        """Return how all changes where x, the weights (v) and the state before change by these; and how the state after."""
        cell, weights, sizes, (h, c) = self.cell, self.weights, self.sizes, state
        G, P, B, w_hh, w_hr = cell.gates, cell.preactivations, h.shape[0], weights.w_hh.T, weights.w_hr
        from_x = total(_times(x, weights.w_ih.T), _times(self.x, v.w_ih, True), v.b_ih)
        from_h = total(_times(self.h, v.w_hh, True), v.b_hh)
        a_inputs, a_hidden = self._preactivations(from_x, from_h)
        a_hidden = steps_of(a_hidden, sizes)
        # narrow: a slice of the whole is aten.alias in torch 2.14, which the older of torch's two vmaps does not know
        slopes = steps_of(self.slopes.narrow(2, cell.hidden, P - cell.hidden).flatten(2), sizes, 1)
        by_p = steps_of(self.slopes[:, :, P], sizes, 1) if cell.carry else None
        # what the input alone does is known before the loop
        by_x = total(*(self.slopes[:, :, k] * a for k, a in enumerate(a_inputs)))
        by_x = None if by_x is None else steps_of(by_x, sizes, 1)
        by_w_hr = None if v.w_hr is None else steps_of(self.out @ v.w_hr.T, sizes)
        a_s, h_s, p_s, out_s, y_s = (list(sizes) for _ in range(5))
        for t in self.order:
            b = sizes[t]
            h_s[t] = h if b == B else h.narrow(0, 0, b)
            a_s[t] = torch.addmm(a_hidden[t], h_s[t], w_hh)
            after = slopes[t] * a_s[t]  # [S, b, G * H]
            if G > 1:
                after = after.view(-1, b, G, self.hidden).sum(2)
            if by_p is not None:
                p_s[t] = h_s[t] if c is None else c if b == B else c.narrow(0, 0, b)
                after = torch.addcmul(after, by_p[t], p_s[t])
            if by_x is not None:
                after = after + by_x[t]
            out_s[t], *c_after = after.unbind()
            y_s[t] = out_s[t]
            if w_hr is not None:
                y_s[t] = out_s[t] @ w_hr.T if by_w_hr is None else torch.addmm(by_w_hr[t], out_s[t], w_hr.T)
            h = y_s[t] if b == B else replace(h, y_s[t])
            if c_after:
                c = c_after[0] if b == B else replace(c, c_after[0])
        a = [*a_inputs, *joined(a_s).view(-1, G, self.hidden).unbind(1)]
        y = joined(y_s)
        p = joined(p_s) if cell.carry else None
        return Change(x, a, joined(h_s), p, y if w_hr is None else joined(out_s), y), State(h, c)

    def _preactivations(self, from_x: Tensor | None, from_h: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Return those of the input alone, each [N, H], and the others [N, G * H], to which the hidden product is added."""
        whole = self.rows, self.cell.gates * self.hidden
        if not self.cell.hidden:
            a = total(from_x, from_h)
            return [], (self.h.new_zeros(1, 1) if a is None else a).expand(whole)
        both = ((self.h.new_zeros(1, 1) if a is None else a).expand(whole) for a in (from_x, from_h))
        a = list(preactivations(self.cell, *both))
        return a[: self.cell.hidden], torch.cat(a[self.cell.hidden :], -1)

    def pull(
        self,
        dy: Tensor | None,
        state: State,
        more_a: Tensor | None = None,
        more_h: Tensor | None = None,
        more_out: Tensor | None = None,
    ) -> tuple[Gradients, State]:
        """Return the gradients of all, and of the state before, from those of y and of the state after.

        more_a [N, Q, H], more_h [N, R] and more_out [N, H] are added to those of pre-activations and p, of the state before
        each step, and of out.
        """
        cell, sizes, (dh, dc) = self.cell, self.sizes, state
        P, B, w_hh, w_hr = cell.preactivations, dh.shape[0], self.weights.w_hh, self.weights.w_hr
        dys, more_a, more_h, more_out = (
            None if each is None else steps_of(each, sizes) for each in (dy, more_a, more_h, more_out)
        )
        by_out, *by_c = (steps_of(each, sizes) for each in self.slopes.unbind())
        a_s, y_s, out_s, c_s = (list(sizes) for _ in range(4))
        for t in reversed(self.order):
            b = sizes[t]
            d_out = dh if b == B else dh.narrow(0, 0, b)
            y_s[t] = d_out = d_out if dys is None else d_out + dys[t]
            if w_hr is not None:
                d_out = d_out @ w_hr if more_out is None else torch.addmm(more_out[t], d_out, w_hr)
            out_s[t], d_out = d_out, d_out.unsqueeze(1)
            da = by_out[t] * d_out if more_a is None else torch.addcmul(more_a[t], by_out[t], d_out)  # [b, Q, H]
            if dc is not None:
                c_s[t] = dc if b == B else dc.narrow(0, 0, b)
                da = torch.addcmul(da, by_c[0][t], c_s[t].unsqueeze(1))
                dc = da[:, P] if b == B else replace(dc, da[:, P])
            d_hidden = (da.narrow(1, cell.hidden, cell.gates) if cell.carry else da).reshape(b, -1)
            d_before = d_hidden @ w_hh if more_h is None else torch.addmm(more_h[t], d_hidden, w_hh)
            if cell.carry == "hidden":
                d_before = d_before + da[:, P]
            dh = d_before if b == B else replace(dh, d_before)
            a_s[t] = da
        a, y = joined(a_s), joined(y_s)
        hidden = (a.narrow(1, cell.hidden, cell.gates) if cell.carry else a).reshape(self.rows, -1)
        inputs = torch.cat([a[:, cell.input.index(gate)] for gate in range(cell.gates)], -1) if cell.hidden else hidden
        return Gradients(inputs, hidden, y, y if w_hr is None else joined(out_s), None if dc is None else joined(c_s)), State(
            dh, dc
        )

    def bend(self, grads: Gradients, v: Weights, change: Change, state: State) -> tuple[Gradients, State]:
        """Return how `grads` and the gradient of the state before change with the block, from that of the state after."""
        p = None if change.p is None else Dual(self.p, change.p)
        d_c = None if grads.c is None else Dual(grads.c)
        da = _DUAL_BACKWARD[self.cell.name](Dual(grads.out), d_c, *self._slots(change, p), p)
        more_a = [torch.zeros_like(grads.out) if each.change is None else each.change for each in da]
        more_a = torch.stack(more_a, 1) if len(more_a) > 1 else more_a[0].unsqueeze(1)
        return self.pull(None, state, more_a, _times(grads.hidden, v.w_hh), _times(grads.y, v.w_hr))

    def _slots(self, change: Change, p: Dual | None) -> list[Dual]:
        """Return the slots and how they change: what the cell's forward function says of its arguments' change."""
        a_kept, calls_kept = _KEPT[self.cell.name]
        a = [Dual(None if k is None else self.slots[k], da) for k, da in zip(a_kept, change.a, strict=True)]
        known = iter([None if k is None else self.slots[k] for k in calls_kept])
        names = {name: (lambda a, function=function: function(a, next(known))) for name, function in _ELEMENTARY.items()}
        h, *slots = bind(self.cell.forward, **names)(*a, p)
        return [Dual(value, slot.change) for value, slot in zip(self.slots, slots or (h,), strict=True)]

    def add_weights(self, so_far: Weights, grads: Gradients, x, h, out, biases: bool = True) -> Weights:
        """Add the gradients of weights, from what the steps multiply with them, None for nothing."""
        w_ih, w_hh, b_ih, b_hh, w_hr = so_far
        w_ih, w_hh = _add_product(w_ih, grads.input, x), _add_product(w_hh, grads.hidden, h)
        if self.weights.w_hr is not None:
            w_hr = _add_product(w_hr, grads.y, out)
        if biases and self.weights.b_ih is not None:
            b_ih, b_hh = total(b_ih, grads.input.sum(0)), total(b_hh, grads.hidden.sum(0))
        return Weights(w_ih, w_hh, b_ih, b_hh, w_hr)


class Dual:
    """A number with how it changes, None for not at all; each worked out when it is asked for.

    On these a cell's arithmetic differentiates itself.
    """

    __slots__ = "_change", "_value"

    def __init__(self, value: Tensor | Callable | None, change: Tensor | Callable | None = None) -> None:
        self._value, self._change = value, change

    @property
    def value(self) -> Tensor:
        if callable(self._value):
            self._value = self._value()
        return self._value

    @property
    def change(self) -> Tensor | None:
        if callable(self._change):
            self._change = self._change()
        return self._change

    def __add__(self, other: Dual) -> Dual:
        return Dual(lambda: self.value + other.value, lambda: total(self.change, other.change))

    def __sub__(self, other: Dual) -> Dual:
        return Dual(
            lambda: self.value - other.value, lambda: total(self.change, None if other.change is None else -other.change)
        )

    def __rsub__(self, other: int) -> Dual:
        return Dual(lambda: torch.rsub(self.value, other), lambda: None if self.change is None else -self.change)

    def __mul__(self, other: Dual) -> Dual:
        return Dual(lambda: self.value * other.value, lambda: self._product_rule(other))

    def _product_rule(self, other: Dual) -> Tensor | None:
        if self.change is None or other.change is None:
            one, two = (self, other) if self.change is None else (other, self)
            return None if two.change is None else one.value * two.change
        return torch.addcmul(self.change * other.value, self.value, other.change)


def _elementary(function: Callable, derivative: Callable) -> Callable:
    """Make a function of a Dual, whose value may be known, from the derivative's product with a change, given the value."""

    def apply(a: Dual, known: Tensor | None = None) -> Dual:
        result = Dual(lambda: function(a.value) if known is None else known)
        result._change = lambda: derivative(a.change, result.value)
        return result

    return apply


_ELEMENTARY = {
    "sigmoid": _elementary(torch.sigmoid, torch.ops.aten.sigmoid_backward.default),
    "tanh": _elementary(torch.tanh, torch.ops.aten.tanh_backward.default),
    "relu": _elementary(torch.relu, lambda change, h: where_positive(h, change)),
}


def _where_positive(h: Dual, dh: Dual) -> Dual:
    return Dual(None, None if dh.change is None else where_positive(h.value, dh.change))


def _kept(cell: Cell) -> tuple[list[int | None], list[int | None]]:
    """Find which slots hold the cell's pre-activations, and the results of its elementary functions, in turn."""

    class Symbol:
        def __add__(self, other: Symbol) -> Symbol:
            return Symbol()

        __mul__ = __sub__ = __rsub__ = __add__

    def call(a: Symbol) -> Symbol:
        calls.append(Symbol())
        return calls[-1]

    a, calls = [Symbol() for _ in range(cell.preactivations)], []
    h, *slots = bind(cell.forward, **dict.fromkeys(_ELEMENTARY, call))(*a, Symbol())
    places = {id(slot): k for k, slot in enumerate(slots or [h])}
    return [places.get(id(each)) for each in a], [places.get(id(each)) for each in calls]


_KEPT = {name: _kept(cell) for name, cell in CELLS.items()}
_BACKWARD = {name: bind(cell.backward, **NAMES) for name, cell in CELLS.items()}
_DUAL_BACKWARD = {name: bind(cell.backward, **_ELEMENTARY, where_positive=_where_positive) for name, cell in CELLS.items()}


def total(*terms: Tensor | None) -> Tensor | None:
    """Return the sum of those that are there, None of none."""
    found = None
    for term in terms:
        if term is not None:
            found = term if found is None else found + term
    return found


def _times(a: Tensor | None, b: Tensor | None, transposed: bool = False) -> Tensor | None:
    return None if a is None or b is None else a @ (b.T if transposed else b)


def _add_product(so_far: Tensor | None, grads: Tensor, factor: Tensor | None) -> Tensor | None:
    if factor is None:
        return so_far
    return grads.T @ factor if so_far is None else torch.addmm(so_far, grads.T, factor)


def _zeros(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.zeros_like(like)


def before(order: range, sizes: list[int], after: Tensor, state: Tensor) -> Tensor:
    """Return the state of each step's rows before it, [N, ...], from those after it and the first one [B, ...]."""
    if len(sizes) == 1:
        return state
    if sizes[-1] == sizes[0]:
        rest = after.shape[0] - sizes[0]
        return torch.cat((state, after.narrow(0, 0, rest)) if order.step > 0 else (after.narrow(0, sizes[0], rest), state))
    steps, found = steps_of(after, sizes), [state] * len(sizes)
    for t in order:
        found[t] = first(sizes[t], state)
        state = replace(state, steps[t])
    return torch.cat(found)


def steps_of(rows: Tensor, sizes: list[int], dim: int = 0) -> Sequence[Tensor]:
    """Split rows into those of each step, or of each block."""
    return (rows,) if len(sizes) == 1 else torch.split_with_sizes(rows, sizes, dim)


def joined(steps: Sequence) -> Tensor:
    """Undo `steps_of`."""
    return torch.cat(steps) if len(steps) > 1 else steps[0]
