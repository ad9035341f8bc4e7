"""A layer's first and second derivatives in plain torch operations, from the states that it went through.

Near those states each direction of a layer is linear, and what one step does is known before any loop over time: `slopes`, of
the cell's h and c by each pre-activation and by the state before, from the cell's own backward function. `push` carries changes
forward through time, `pull` gradients back: a step is one product and a few operations, and all other products are over the
rows of all steps at once. Out of place: autograd, forward mode and vmap go through all of it.

Letters as in reference.py; N rows of all steps one below the other in time's order, P pre-activations of a unit, Q one more where
the cell has a `carry`, S results of the cell that steps hand on: h, or h and c.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrnn.kernels.cells import CELLS, Cell, bind
from fastrnn.kernels.reference import NAMES, affine, at, first, order_of, preactivations, replace, where_positive


class Rows:
    """The rows of all steps: where they lie in x, y and dy, and how many each step has."""

    def __init__(self, x: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> None:
        self.packed, self.batch_first = batch_sizes is not None, batch_first
        if batch_sizes is None:
            self.batch, self.steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
            self.sizes = [self.batch] * self.steps
        else:
            self.sizes = batch_sizes.tolist()

    def of(self, tensor: Tensor | None, d: int = 0, directions: int = 1) -> Tensor | None:
        """[N, ...], of a direction its columns."""
        if tensor is None:
            return None
        if not self.packed:
            tensor = (tensor.transpose(0, 1) if self.batch_first else tensor).reshape(-1, tensor.shape[-1])
        return tensor if directions == 1 else tensor.chunk(directions, -1)[d]

    def join(self, rows: Tensor) -> Tensor:
        """The inverse of `of`."""
        if self.packed:
            return rows
        rows = rows.reshape(self.steps, self.batch, -1)
        return rows.transpose(0, 1).contiguous() if self.batch_first else rows


class Inputs(NamedTuple):
    """What a direction is a function of, or a change of each; None where there is none."""

    x: Tensor | None  # [N, I]
    h0: Tensor | None  # [B, R]
    c0: Tensor | None  # [B, H]
    w_ih: Tensor | None
    w_hh: Tensor | None
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


class Change(NamedTuple):
    """How what a block's steps compute changes."""

    x: Tensor | None
    a: Tensor  # [N, P, H], pre-activations
    h: Tensor  # [N, R], the state before each step
    p: Tensor | None  # [N, H]
    out: Tensor  # [N, H], the cell's h, before the projection
    y: Tensor  # [N, R]


class Gradients(NamedTuple):
    """Gradients of what a block's steps compute, or how they change."""

    input: Tensor  # [N, G * H], of the input products, gates in torch's order
    hidden: Tensor  # [N, G * H], of the hidden products
    h: Tensor  # [N, R], of the state after each step
    out: Tensor  # [N, H]
    c: Tensor | None  # [N, 1, H], of the cell state after each step but for what reaches it through the step's h


class Block:
    """Some consecutive steps of one direction of a layer, near the states that they went through."""

    def __init__(self, cell: Cell, weights: Inputs, sizes: list[int], order: range, units: Tensor, x, h, p, saved) -> None:
        self.cell, self.weights, self.sizes, self.order, self.x, self.h, self.p = cell, weights, sizes, order, x, h, p
        self.slots, self.out = saved[: max(cell.slots, 1)], saved[-1]
        d_out, *d_c = units.unbind()
        grads = _BACKWARD[cell.name](d_out, d_c[0] if d_c else None, *self.slots, p)
        self.slopes = torch.stack(grads, 2) if len(grads) > 1 else grads[0].unsqueeze(2)  # [S, N, Q, H]

    def push(self, x: Tensor | None, v: Inputs, h: Tensor, c: Tensor | None) -> tuple[Change, Tensor, Tensor | None]:
        """How all changes where the inputs change by v, x and the states by those given; the states then."""
        cell, weights, sizes, n = self.cell, self.weights, self.sizes, self.x.shape[0]
        w_hh, w_hr, B, H = weights.w_hh.T, weights.w_hr, h.shape[0], self.out.shape[-1]
        P, G = cell.preactivations, cell.gates
        from_x = total(product(x, weights.w_ih.T), product(self.x, v.w_ih, True), v.b_ih)
        from_h = total(product(self.h, v.w_hh, True), v.b_hh)
        direct = None
        if cell.hidden:
            zeros = h.new_zeros(1, G * H)
            from_x, from_h = (zeros if a is None else a for a in (from_x, from_h))
            known = list(preactivations(cell, from_x.expand(n, -1), from_h.expand(n, -1)))
            direct = total(*(self.slopes[:, :, k] * a for k, a in enumerate(known[: cell.hidden])))
            direct = direct.split(sizes, 1)
            a_hidden = torch.cat(known[cell.hidden :], -1).split(sizes)
        else:
            a = total(from_x, from_h)
            a_hidden = (h.new_zeros(1, G * H) if a is None else a).expand(n, -1).split(sizes)
        slopes = self.slopes[:, :, cell.hidden : P].flatten(2).split(sizes, 1)
        carried = self.slopes[:, :, P].split(sizes, 1) if cell.carry else None
        from_out = None if w_hr is None or v.w_hr is None else (self.out @ v.w_hr.T).split(sizes)
        T = len(sizes)
        a_s, h_s, p_s, out_s, y_s = ([None] * T for _ in range(5))
        for t in self.order:
            b = sizes[t]
            h_s[t] = h if b == B else h.narrow(0, 0, b)
            a_s[t] = torch.addmm(a_hidden[t], h_s[t], w_hh)
            result = slopes[t] * a_s[t]
            if G > 1:
                result = result.view(-1, b, G, H).sum(2)
            if carried is not None:
                p_s[t] = h_s[t] if c is None else c if b == B else c.narrow(0, 0, b)
                result = torch.addcmul(result, carried[t], p_s[t])
            if direct is not None:
                result = result + direct[t]
            out_s[t], *rest = result.unbind(0)
            y_s[t] = out_s[t]
            if w_hr is not None:
                y_s[t] = out_s[t] @ w_hr.T
                if from_out is not None:
                    y_s[t] = y_s[t] + from_out[t]
            h = y_s[t] if b == B else replace(h, y_s[t])
            if rest:
                c = rest[0] if b == B else replace(c, rest[0])
        hiddens = joined(a_s).view(n, G, H)
        a = torch.cat((torch.stack(known[: cell.hidden], 1), hiddens), 1) if cell.hidden else hiddens
        y = joined(y_s)
        out = y if w_hr is None else joined(out_s)
        return Change(x, a, joined(h_s), joined(p_s) if cell.carry else None, out, y), h, c

    def pull(self, dy, dh, dc, more_a=None, more_h=None, more_out=None) -> tuple[Gradients, Tensor, Tensor | None]:
        """Gradients of all from those of the outputs, and of ..."""
        cell, w_hh, w_hr, sizes, B = self.cell, self.weights.w_hh, self.weights.w_hr, self.sizes, dh.shape[0]
        P = cell.preactivations
        dys, more_a, more_h, more_out = (None if m is None else m.split(sizes) for m in (dy, more_a, more_h, more_out))
        slopes = [each.split(sizes) for each in self.slopes.unbind()]
        T = len(sizes)
        a_s, h_s, out_s, c_s = ([None] * T for _ in range(4))
        for t in reversed(self.order):
            b = sizes[t]
            d_h = dh if b == B else dh.narrow(0, 0, b)
            if dys is not None:
                d_h = d_h + dys[t]
            d_out = d_h
            if w_hr is not None:
                d_out = d_h @ w_hr
                if more_out is not None:
                    d_out = d_out + more_out[t]
            unit = d_out.unsqueeze(1)
            da = slopes[0][t] * unit if more_a is None else torch.addcmul(more_a[t], slopes[0][t], unit)
            if dc is not None:
                c_s[t] = dc if b == B else dc.narrow(0, 0, b)
                da = torch.addcmul(da, slopes[1][t], c_s[t])
                dc = da.narrow(1, P, 1) if b == B else replace(dc, da.narrow(1, P, 1))
            d_before = (da.narrow(1, cell.hidden, cell.gates) if cell.carry else da).reshape(b, -1) @ w_hh
            if cell.carry == "hidden":
                d_before = d_before + da[:, P]
            if more_h is not None:
                d_before = d_before + more_h[t]
            dh = d_before if b == B else replace(dh, d_before)
            a_s[t], h_s[t], out_s[t] = da, d_h, d_out
        h = joined(h_s)
        out = h if w_hr is None else joined(out_s)
        a = joined(a_s)
        # by narrow: a slice that takes all is an operation without a rule for is_grads_batched's mapping
        hidden = a.narrow(1, cell.hidden, cell.gates).reshape(a.shape[0], -1)
        inputs = torch.cat([a[:, cell.input.index(gate)] for gate in range(cell.gates)], -1) if cell.hidden else hidden
        return Gradients(inputs, hidden, h, out, None if dc is None else joined(c_s)), dh, dc

    def bend(self, grads: Gradients, v: Inputs, change: Change, dh, dc) -> tuple[Gradients, Tensor, Tensor | None]:
        """How `grads` change, where the layer's outputs have the same gradients but its inputs change by v."""
        kept_arguments, kept_calls = _KEPT[self.cell.name]
        a = [Dual(None if k is None else self.slots[k], da) for k, da in zip(kept_arguments, change.a.unbind(1))]
        p = None if change.p is None else Dual(self.p, change.p)
        values = iter(kept_calls)

        def elementary(function, derivative):
            def call(a):
                k = next(values)
                value = function(a.value) if k is None else self.slots[k]
                return Dual(value, lambda: derivative(a.change, value))

            return call

        forward = bind(
            self.cell.forward,
            sigmoid=elementary(torch.sigmoid, _sigmoid_backward),
            tanh=elementary(lambda a: None, _tanh_backward),
            relu=elementary(torch.relu, lambda d, h: where_positive(h, d)),
        )
        slots = [
            Dual(value, lambda slot=slot: slot.change)
            for value, slot in zip(self.slots, (lambda h, *s: s or (h,))(*forward(*a, p)))
        ]
        d_c = None if grads.c is None else Dual(grads.c.squeeze(1))
        results = _DUAL_BACKWARD[self.cell.name](Dual(grads.out), d_c, *slots, p)
        more_a = [torch.zeros_like(grads.out) if r.change is None else r.change for r in results]
        more_a = torch.stack(more_a, 1) if len(more_a) > 1 else more_a[0].unsqueeze(1)
        return self.pull(None, dh, dc, more_a, product(grads.hidden, v.w_hh), product(grads.h, v.w_hr))

    def of_weights(self, grads: Gradients, x: Tensor | None, h: Tensor | None, out: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of w_ih, w_hh and w_hr, from what they are multiplied with."""
        w_hr = None if self.weights.w_hr is None else product(grads.h.T, out)
        return product(grads.input.T, x), product(grads.hidden.T, h), None, None, w_hr

    def of_biases(self, grads: Gradients) -> tuple[Tensor | None, Tensor | None]:
        if self.weights.b_ih is None:
            return (None,) * 5
        d_input = grads.input.sum(0)
        return None, None, d_input, d_input if grads.hidden is grads.input else grads.hidden.sum(0), None


class Dual:
    """A number and how it changes, None for not at all, each worked out where it is asked for: a cell's arithmetic differentiates itself."""

    __slots__ = "_change", "_value"

    def __init__(self, value, change=None) -> None:
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
        return Dual(lambda: self.value - other.value, lambda: self.change - other.change)

    def __rsub__(self, other: int) -> Dual:
        return Dual(lambda: torch.rsub(self.value, other), lambda: None if self.change is None else -self.change)

    def __mul__(self, other: Dual) -> Dual:
        return Dual(lambda: self.value * other.value, lambda: self._product(other))

    def _product(self, other):
        if self.change is None:
            return None if other.change is None else self.value * other.change
        if other.change is None:
            return self.change * other.value
        return torch.addcmul(self.change * other.value, self.value, other.change)


_sigmoid_backward = torch.ops.aten.sigmoid_backward.default
_tanh_backward = torch.ops.aten.tanh_backward.default


def _dual_tanh(a: Dual) -> Dual:
    t = torch.tanh(a.value)
    return Dual(t, lambda: _tanh_backward(a.change, t))


def _dual_where_positive(h: Dual, dh: Dual) -> Dual:
    return Dual(
        lambda: where_positive(h.value, dh.value), lambda: None if dh.change is None else where_positive(h.value, dh.change)
    )


def _kept(cell: Cell):
    """Of the pre-activations, and of each call of an elementary function in the cell's forward function: the slot that is its value."""
    calls: list = []

    class Symbol:
        def __add__(self, other):
            return Symbol()

        __sub__ = __mul__ = __rsub__ = __add__

    def call(a):
        calls.append(Symbol())
        return calls[-1]

    a = [Symbol() for _ in range(cell.preactivations)]
    h, *slots = bind(cell.forward, sigmoid=call, tanh=call, relu=call)(*a, Symbol())
    places = {id(slot): k for k, slot in enumerate(slots or [h])}
    return [places.get(id(each)) for each in a], [places.get(id(each)) for each in calls]


_KEPT = {name: _kept(cell) for name, cell in CELLS.items()}
_DUAL_BACKWARD = {
    name: bind(cell.backward, tanh=_dual_tanh, where_positive=_dual_where_positive) for name, cell in CELLS.items()
}
_BACKWARD = {name: bind(cell.backward, **NAMES) for name, cell in CELLS.items()}


def joined(steps: list[Tensor]) -> Tensor:
    return torch.cat(steps) if len(steps) > 1 else steps[0]


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of those that are there, None of none."""
    found = None
    for term in terms:
        if term is not None:
            found = term if found is None else found + term
    return found


def product(a: Tensor | None, b: Tensor | None, transposed: bool = False) -> Tensor | None:
    """a @ b, or a @ b.T; None where a factor is."""
    return None if a is None or b is None else a @ (b.T if transposed else b)


import os

BLOCK = int(os.environ.get("BLOCK", 16384))  # numbers of a block of steps, per slot


def blocks_of(sizes: list[int], hidden: int) -> list[list[int]]:
    steps = max(1, BLOCK // (max(sizes) * hidden))
    return [sizes[t : t + steps] for t in range(0, len(sizes), steps)]


def states_before(sizes, order, after: Tensor, state: Tensor) -> Tensor:
    """State of the rows of each step before it, [N, ...], from those after it and the first one [B, ...]."""
    B = sizes[0]
    if len(sizes) == 1:
        return state if state.shape[0] == sizes[0] else first(sizes[0], state)
    if sizes[-1] == B:
        n = B * (len(sizes) - 1)
        return torch.cat((state, after.narrow(0, 0, n)) if order.step > 0 else (after.narrow(0, B, n), state))
    steps, before = after.split(sizes), [state] * len(sizes)
    for t in order:
        before[t] = first(sizes[t], state)
        state = replace(state, steps[t])
    return torch.cat(before)


class Direction:
    def __init__(self, rows: Rows, d, x, h0, c0, weights, y, saved, cell, reverse):
        kind = CELLS[cell]
        reverse = reverse != bool(d)
        D = len(h0)
        self.weights = Inputs(None, h0[d], at(c0, d), *(at(kind, d) for kind in weights))
        hidden = len(self.weights.w_hh) // kind.gates
        sizes = rows.sizes
        order = order_of(len(sizes), reverse)
        y = rows.of(y, d, D)
        slots = saved[d]
        h = states_before(sizes, order, y, h0[d])
        p = h if c0 is None else states_before(sizes, order, slots.narrow(-1, hidden * (kind.slots - 1), hidden), c0[d])
        slots = slots if slots.shape[-1] else y
        parts = blocks_of(sizes, hidden)
        self.rows = [sum(part) for part in parts]
        args = zip(*(self.split(each) for each in (rows.of(x), h, p, slots)))
        units = torch.eye(2, dtype=h.dtype, device=h.device) if kind.carry == "cell" else h.new_ones(1)
        units = units.reshape(-1, len(units), 1, 1)
        self.blocks = [
            Block(kind, self.weights, part, order_of(len(part), reverse), units, x, h, p, slots.split(hidden, -1))
            for part, (x, h, p, slots) in zip(parts, args)
        ]
        self.order = order_of(len(parts), reverse)

    def split(self, rows: Tensor | None) -> list:
        return [None] * len(self.rows) if rows is None else rows.split(self.rows)


def zeros_or(state, like):
    return state if state is not None or like is None else torch.zeros_like(like)


def layer_backward(
    dy,
    dh_n,
    dc_n,
    x,
    batch_sizes,
    h0,
    c0,
    w_ih,
    w_hh,
    b_ih,
    b_hh,
    w_hr,
    y,
    saved,
    cell,
    reverse=False,
    batch_first=False,
    need_dx=True,
    need_dh0=True,
    need_dw=True,
):
    rows, D, empty = Rows(x, batch_sizes, batch_first), len(w_ih), x.new_empty(0)
    dxs, dh0s, dc0s, dws = [], [], [], []
    for d in range(D):
        direction = Direction(rows, d, x, h0, c0, (w_ih, w_hh, b_ih, b_hh, w_hr), y, saved, cell, reverse)
        dys = direction.split(rows.of(dy, d, D))
        dh, dc = zeros_or(at(dh_n, d), h0[d]), zeros_or(at(dc_n, d), at(c0, d))
        dc = None if dc is None else dc.unsqueeze(1)
        dx, dw = [None] * len(dys), [None] * 5
        for k in reversed(direction.order):
            block = direction.blocks[k]
            grads, dh, dc = block.pull(dys[k], dh, dc)
            if need_dx:
                dx[k] = grads.input @ block.weights.w_ih
            if need_dw:
                dw = list(map(total, dw, block.of_weights(grads, block.x, block.h, block.out), block.of_biases(grads)))
        if need_dx:
            dxs.append(joined(dx))
        dh0s.append(dh)
        dc0s.append(None if dc is None else dc.squeeze(1))
        dws.append(dw)
    return (
        rows.join(total(*dxs)) if need_dx else empty,
        torch.stack(dh0s) if need_dh0 else empty,
        torch.stack(dc0s) if need_dh0 and c0 is not None else empty,
        *(empty if not need_dw or dw[0] is None else torch.cat(dw) for dw in zip(*dws)),
    )


def layer_double_backward(
    v,
    dy,
    dh_n,
    dc_n,
    x,
    batch_sizes,
    h0,
    c0,
    w_ih,
    w_hh,
    b_ih,
    b_hh,
    w_hr,
    y,
    saved,
    cell,
    reverse,
    batch_first,
    need_dx,
    need_dw,
):
    rows, D = Rows(x, batch_sizes, batch_first), len(w_ih)
    vx, vh0, vc0, *vw = v
    vw = [None if each is None else each.chunk(D) for each in vw]
    ys, h_ns, c_ns, dxs, dh0s, dc0s, dws = [], [], [], [], [], [], []
    for d in range(D):
        direction = Direction(rows, d, x, h0, c0, (w_ih, w_hh, b_ih, b_hh, w_hr), y, saved, cell, reverse)
        v = Inputs(None, at(vh0, d), at(vc0, d), *(at(each, d) for each in vw))
        vxs = direction.split(rows.of(vx))
        dys = direction.split(rows.of(dy, d, D))
        h, c = zeros_or(v.h0, h0[d]), zeros_or(v.c0, at(c0, d))
        changes = [None] * len(vxs)
        for k in direction.order:
            changes[k], h, c = direction.blocks[k].push(vxs[k], v, h, c)
        ys.append(joined([change.y for change in changes]))
        h_ns.append(h)
        c_ns.append(c)
        dh, dc = zeros_or(at(dh_n, d), h0[d]), zeros_or(at(dc_n, d), at(c0, d))
        dc = None if dc is None else dc.unsqueeze(1)
        dhb, dcb = torch.zeros_like(dh), None if dc is None else torch.zeros_like(dc)
        dx, dw = [None] * len(dys), [None] * 5
        for k in reversed(direction.order):
            block, change = direction.blocks[k], changes[k]
            grads, dh, dc = block.pull(dys[k], dh, dc)
            bent, dhb, dcb = block.bend(grads, v, change, dhb, dcb)
            if need_dx:
                dx[k] = total(bent.input @ block.weights.w_ih, product(grads.input, v.w_ih))
            if need_dw:
                one = block.of_weights(bent, block.x, block.h, block.out)
                two = block.of_weights(grads, change.x, change.h, change.out)
                dw = list(map(total, dw, one, two, block.of_biases(bent)))
        if need_dx:
            dxs.append(joined(dx))
        dh0s.append(dhb)
        dc0s.append(None if dcb is None else dcb.squeeze(1))
        dws.append(dw)
    stacked = c0 is not None
    return (
        None if dy is None else rows.join(ys[0] if D == 1 else torch.cat(ys, -1)),
        None if dh_n is None else torch.stack(h_ns),
        None if dc_n is None else torch.stack(c_ns),
        rows.join(total(*dxs)) if need_dx else None,
        torch.stack(dh0s),
        torch.stack(dc0s) if stacked else None,
        [each for kind in zip(*dws) if kind[0] is not None for each in kind],
    )
