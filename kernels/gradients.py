"""First and second derivatives of a layer in plain torch operations, from the states that it went through.

Near those states each direction of a layer is linear, and what a step does to small changes is known before any loop over time:
`slopes`, which the cell's own backward function gives. `Block.push` carries changes forward through time and `Block.pull`
carries gradients back. A step of either is one product and a few operations; all other products are of many rows at once.
Steps come in blocks, so that the numbers of a block stay in the processor's cache from one operation to the next.

Nothing is done in place: autograd, forward mode and vmap pass through all of it, to any order.

Letters as in layer.py, and: N rows of all steps, or of a block's, one below the other in time's order; P pre-activations of a
unit; Q as many, and one more, for p, where the cell has a `carry`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from fastrnn.kernels.cells import CELLS, Cell, bind
from fastrnn.kernels.layer import Inputs, Layer, Needs, Outer, Steps, Weights
from fastrnn.kernels.reference import first, order_of, replace, where_positive

BLOCK = 16384  # units of a block's steps and rows: a few dozen tensors of so many numbers fit a core's cache


def layer_backward(
    outer: Outer, inputs: Inputs, weights: Sequence[Tensor], y: Tensor, saved: Tensor, layer: Layer, needs: Needs
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return the gradients dx, dh0, dc0, [0] where there is none, and those of all weights in a list, empty if not needed."""
    steps, empty = Steps(layer, inputs), inputs.x.new_empty(0)
    dxs, dh0s, dc0s, dws = [], [], [], []
    for d, own in enumerate(layer.by_direction(weights)):
        direction = Direction(layer, steps, d, inputs, own, y, saved)
        dys, state = direction.split(direction.columns(outer.dy)), direction.state(outer.dh_n, outer.dc_n)
        dx: list[Any] = [None] * len(dys)
        dw = Weights()
        for k in reversed(direction.order):
            block = direction.blocks[k]
            grads, state = block.pull(dys[k], state)
            dx[k] = torch.mm(grads.input, own.w_ih) if needs.dx else None
            dw = block.add_weights(dw, grads, block.x, block.h, block.out) if needs.dw else dw
        dxs.append(dx)
        dh0s.append(state.h)
        dc0s.append(state.c)
        dws += [each for each in dw if each is not None]
    return (
        steps.join(total(*map(joined, dxs))) if needs.dx else empty,
        torch.stack(dh0s) if needs.dh0 else empty,
        torch.stack(dc0s) if needs.dh0 and inputs.c0 is not None else empty,
        dws,
    )


def layer_double_backward(
    v: Sequence, outer: Outer, inputs: Inputs, weights: Sequence[Tensor], y: Tensor, saved: Tensor, layer: Layer, needs: Needs
) -> tuple[Outer, Inputs, list[Tensor]]:
    """Return gradients of layer_backward's `outer`, `inputs` and weights, from those of its results: v, with None for zeros.

    layer_backward is linear in `outer`: it is the transpose of the layer's derivative. So its results times v are `outer` times
    the change of the layer's outputs where the layer's inputs change by v. Hence the gradient of `outer` is that change, and
    the gradient of the layer's inputs is the change of layer_backward's results.
    """
    steps, (dy, dh_n, dc_n), c0 = Steps(layer, inputs), outer, inputs.c0
    vx, vh0, vc0, vw = v
    ys, h_ns, c_ns, dxs, dh0s, dc0s, dws = [], [], [], [], [], [], []
    vws = layer.by_direction(vw or [None] * len(weights))
    for d, (own, along) in enumerate(zip(layer.by_direction(weights), vws, strict=True)):
        direction = Direction(layer, steps, d, inputs, own, y, saved)
        blocks, order = direction.blocks, direction.order
        vxs, dys = direction.split(None if vx is None else steps.flat(vx)), direction.split(direction.columns(dy))
        changes: list[Any] = [None] * len(blocks)
        state = direction.state(vh0, vc0)
        for k in order:
            changes[k], state = blocks[k].push(vxs[k], along, state)
        ys.append(joined([change.y for change in changes]))
        h_ns.append(state.h)
        c_ns.append(state.c)
        state, bent_state = direction.state(dh_n, dc_n), direction.state(None, None)
        dx: list[Any] = [None] * len(blocks)
        dw = Weights()
        for k in reversed(order):
            block, change = blocks[k], changes[k]
            grads, state = block.pull(dys[k], state)
            bent, bent_state = block.bend(grads, along, change, bent_state)
            if needs.dx:
                dx[k] = total(torch.mm(bent.input, own.w_ih), _times(grads.input, along.w_ih))
            if needs.dw:
                dw = block.add_weights(dw, bent, block.x, block.h, block.out)
                dw = block.add_weights(dw, grads, change.x, change.h, change.out, biases=False)
        dxs.append(dx)
        dh0s.append(bent_state.h)
        dc0s.append(bent_state.c)
        dws += [each for each in dw if each is not None]
    changed = Outer(
        None if dy is None else steps.join(ys[0] if len(ys) == 1 else torch.cat(ys, -1)),
        None if dh_n is None else torch.stack(h_ns),
        None if dc_n is None else torch.stack(c_ns),
    )
    dx_all, dc0 = steps.join(total(*map(joined, dxs))) if needs.dx else None, None if c0 is None else torch.stack(dc0s)
    return changed, Inputs(dx_all, None, torch.stack(dh0s), dc0), dws


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

    def __init__(self, layer: Layer, steps: Steps, d: int, inputs: Inputs, weights: Weights, y: Tensor, saved: Tensor) -> None:
        self.layer, self.steps, self.d = layer, steps, d
        cell, sizes, reverse, x = CELLS[layer.cell], steps.sizes, layer.reverse != bool(d), steps.flat(inputs.x)
        hidden, order = weights.w_hh.shape[0] // cell.gates, order_of(len(sizes), reverse)
        h0, c0 = inputs.h0[d], None if inputs.c0 is None else inputs.c0[d]
        self.zeros = State(torch.zeros_like(h0), None if c0 is None else torch.zeros_like(c0))
        y = self.columns(y)
        slots = saved[d].split(hidden, -1) if cell.slots else (y,)
        h = before(order, sizes, y, h0)
        p = h if c0 is None else before(order, sizes, slots[cell.slots - 1], c0)
        length = max(1, BLOCK // max(1, sizes[0] * hidden))
        parts = [sizes[t : t + length] for t in range(0, len(sizes), length)]
        self.rows, self.order = [sum(part) for part in parts], order_of(len(parts), reverse)
        if c0 is None:
            units = h.new_ones(()), None
        else:  # [2, 1, 1]: a gradient of h, and none; none, and one of c
            units = torch.eye(2, dtype=h.dtype, device=h.device).view(2, 2, 1, 1).unbind()
        split = zip(*map(self.split, (x, h, p, *slots)), strict=True)
        self.blocks = [
            Block(cell, weights, part, order_of(len(part), reverse), units, *each)
            for part, each in zip(parts, split, strict=True)
        ]

    def columns(self, sequence: Tensor | None) -> Tensor | None:
        """Return this direction's share [N, R] of y, or of its gradient."""
        if sequence is None:
            return None
        rows = self.steps.flat(sequence)
        return rows if self.layer.directions == 1 else rows.chunk(2, -1)[self.d]

    def split(self, rows: Tensor | None) -> Sequence:
        """Return the rows of each block."""
        return [None] * len(self.rows) if rows is None else steps_of(rows, self.rows)

    def state(self, h: Tensor | None, c: Tensor | None) -> State:
        """Return this direction's part of the changes or gradients of states, zeros where there are none."""
        return State(self.zeros.h if h is None else h[self.d], self.zeros.c if c is None else c[self.d])


class Block:
    """Some steps of one direction, one after the other, near the states that they went through."""

    def __init__(self, cell: Cell, weights: Weights, sizes: list[int], order: range, units, x, h, p, *slots) -> None:
        self.cell, self.weights, self.sizes, self.order, self.x, self.h, self.p = cell, weights, sizes, order, x, h, p
        self.slots, self.out = slots[: max(cell.slots, 1)], slots[-1]
        self.rows, self.hidden = x.shape[0], self.out.shape[-1]
        self.arithmetic = arithmetic(cell.name)
        self.slopes = self.arithmetic.slopes(*units, *self.slots, p)  # of h [N, Q, H]; for lstm [2, N, Q, H], of c too
        self.by_state = [steps_of(each, sizes) for each in (self.slopes.unbind() if units[1] is not None else (self.slopes,))]

    def push(self, x: Tensor | None, v: Weights, state: State) -> tuple[Change, State]:
        """Return how all changes, and the state after, where x, the weights (by v) and the state before change by these."""
        cell, weights, sizes, (h, c) = self.cell, self.weights, self.sizes, state
        G, P, B, w_hh, w_hr = cell.gates, cell.preactivations, h.shape[0], weights.w_hh.T, weights.w_hr
        from_x = total(_times(x, weights.w_ih.T), _times(self.x, v.w_ih, True), v.b_ih)
        from_h = total(_times(self.h, v.w_hh, True), v.b_hh)
        a_inputs, a_hidden = self._preactivations(from_x, from_h)
        a_hidden = steps_of(a_hidden, sizes)
        # narrow and select: in torch 2.14 a slice of all is aten.alias, which the older of torch's two vmaps does not know
        slopes = steps_of(self.slopes.narrow(-2, cell.hidden, G).reshape(*self.slopes.shape[:-2], -1), sizes, -2)
        by_p = steps_of(self.slopes.select(-2, P), sizes, -2) if cell.carry else None
        # what the input alone does is known before the loop
        by_x = total(*(self.slopes.select(-2, k) * a for k, a in enumerate(a_inputs)))
        by_x = None if by_x is None else steps_of(by_x, sizes, -2)
        by_w_hr = None if v.w_hr is None else steps_of(torch.mm(self.out, v.w_hr.T), sizes)
        a_s, h_s, c_s, out_s, y_s = self._places(5)
        for t in self.order:
            b = sizes[t]
            h_s[t] = p = h if b == B else h.narrow(0, 0, b)
            a_s[t] = torch.mm(p, w_hh) + a_hidden[t]
            after = slopes[t] * a_s[t]  # [b, G * H], or [2, b, G * H]
            if G > 1:
                after = after.reshape(*after.shape[:-1], G, self.hidden).sum(-2)
            if c is not None:
                c_s[t] = p = c if b == B else c.narrow(0, 0, b)
            if by_p is not None:
                after = torch.addcmul(after, by_p[t], p)
            if by_x is not None:
                after = after + by_x[t]
            if c is not None:
                after, c_after = after.unbind()
                c = c_after if b == B else replace(c, c_after)
            out_s[t] = y_s[t] = after
            if w_hr is not None:
                y_s[t] = torch.mm(after, w_hr.T) if by_w_hr is None else torch.mm(after, w_hr.T) + by_w_hr[t]
            h = y_s[t] if b == B else replace(h, y_s[t])
        a, h_before, y = joined(a_s), joined(h_s), joined(y_s)
        a = [*a_inputs, *(a.split(self.hidden, -1) if G > 1 else (a,))]
        p = h_before if c is None else joined(c_s)
        return Change(x, a, h_before, p, y if w_hr is None else joined(out_s), y), State(h, c)

    def _preactivations(self, from_x: Tensor | None, from_h: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Return those of the input alone, each [N, H], and the others [N, G * H], but for the products with h."""
        cell, H, whole = self.cell, self.hidden, (self.rows, self.cell.gates * self.hidden)
        zeros = self.h.new_zeros(1, 1)
        if not cell.hidden:
            a = total(from_x, from_h)
            return [], (zeros if a is None else a).expand(whole)
        from_x = (zeros if from_x is None else from_x).expand(whole)
        gates, shared = from_x.split(H, -1), len(cell.input) - cell.hidden  # these stand first among torch's gates
        both = torch.cat((from_x.narrow(1, 0, shared * H), zeros.expand(self.rows, (cell.gates - shared) * H)), 1)
        return [gates[gate] for gate in cell.input[: cell.hidden]], total(both, from_h)

    def _places(self, count: int) -> list[list[Any]]:
        """Make lists for something of each step, which `order` fills."""
        return [[None] * len(self.sizes) for _ in range(count)]

    def pull(
        self,
        dy: Tensor | None,
        state: State,
        more_a: Tensor | None = None,
        more_h: Tensor | None = None,
        more_out: Tensor | None = None,
    ) -> tuple[Gradients, State]:
        """Return the gradients of all, and of the state before, from those of y and of the state after.

        more_a [N, Q, H] is added to those of the pre-activations and p, more_h [N, R] to those of the state before each step,
        more_out [N, H] to those of out.
        """
        cell, sizes, (dh, dc) = self.cell, self.sizes, state
        P, G, B, w_hh, w_hr = cell.preactivations, cell.gates, dh.shape[0], self.weights.w_hh, self.weights.w_hr
        dys, more_a, more_h, more_out = (
            None if each is None else steps_of(each, sizes) for each in (dy, more_a, more_h, more_out)
        )
        by_out, by_c = self.by_state[0], self.by_state[-1]
        a_s, y_s, out_s, c_s = self._places(4)
        for t in reversed(self.order):
            b = sizes[t]
            d_out = dh if b == B else dh.narrow(0, 0, b)
            y_s[t] = d_out = d_out if dys is None else d_out + dys[t]
            if w_hr is not None:
                d_out = torch.mm(d_out, w_hr) if more_out is None else torch.mm(d_out, w_hr) + more_out[t]
            out_s[t], d_out = d_out, d_out.unsqueeze(1)
            a_s[t] = da = by_out[t] * d_out if more_a is None else torch.addcmul(more_a[t], by_out[t], d_out)  # [b, Q, H]
            if dc is not None:
                c_s[t] = dc if b == B else dc.narrow(0, 0, b)
                a_s[t] = da = torch.addcmul(da, by_c[t], c_s[t].unsqueeze(1))
            d_p = da.select(1, P) if cell.carry else None
            d_before = torch.mm((da.narrow(1, cell.hidden, G) if cell.carry else da).reshape(b, -1), w_hh)
            if dc is not None:
                dc = d_p if b == B else replace(dc, d_p)
            elif d_p is not None:
                d_before = d_before + d_p
            if more_h is not None:
                d_before = d_before + more_h[t]
            dh = d_before if b == B else replace(dh, d_before)
        a, y = joined(a_s), joined(y_s)
        d_hidden = (a.narrow(1, cell.hidden, G) if cell.carry else a).reshape(self.rows, -1)
        d_input = d_hidden
        if cell.hidden:  # of those of the input alone in the place of those of h alone
            alone = [a.select(1, cell.input.index(gate)) for gate in range(len(cell.input) - cell.hidden, G)]
            d_input = torch.cat((d_hidden.narrow(1, 0, (G - len(alone)) * self.hidden), *alone), 1)
        out, d_c = y if w_hr is None else joined(out_s), None if dc is None else joined(c_s)
        return Gradients(d_input, d_hidden, y, out, d_c), State(dh, dc)

    def bend(self, grads: Gradients, v: Weights, change: Change, state: State) -> tuple[Gradients, State]:
        """Return how `grads` change with the block, and the gradient of the state before, from how the one after does."""
        more_a = self.arithmetic.bend(grads.out, grads.c, *self.slots, self.p, *change.a, change.p)
        return self.pull(None, state, more_a, _times(grads.hidden, v.w_hh), _times(grads.y, v.w_hr))

    def add_weights(self, so_far: Weights, grads: Gradients, x, h, out, biases: bool = True) -> Weights:
        """Add the gradients of weights, from what the steps multiply with them, None for nothing."""
        w_ih, w_hh, b_ih, b_hh, w_hr = so_far
        w_ih, w_hh = _add_product(w_ih, grads.input, x), _add_product(w_hh, grads.hidden, h)
        if self.weights.w_hr is not None:
            w_hr = _add_product(w_hr, grads.y, out)
        if biases and self.weights.b_ih is not None:
            b_ih, b_hh = total(b_ih, grads.input.sum(0)), total(b_hh, grads.hidden.sum(0))
        return Weights(w_ih, w_hh, b_ih, b_hh, w_hr)


class Arithmetic(NamedTuple):
    """What a cell's two functions give, as straight code on the numbers of many rows; see `arithmetic`.

    slopes:  (gradient of h, of c, slots..., p) -> gradients of the pre-activations and of p, stacked, [..., N, Q, H].
    bend:    (the same..., changes of the pre-activations..., of p) -> how these gradients change.
    """

    slopes: Callable[..., Tensor]
    bend: Callable[..., Tensor]


@functools.cache
def arithmetic(name: str) -> Arithmetic:
    """Trace a cell's backward function, and how its results change when the cell's arguments do."""
    cell = CELLS[name]
    grads_and_slots = ["d_out", "d_c", *(f"slot{k}" for k in range(max(cell.slots, 1))), "p"]
    symbols = Symbols()
    d_out, d_c, *slots, p = symbols.new(*grads_and_slots)
    slopes = [each.value for each in bind(cell.backward, **_ELEMENTARY)(*map(Dual, (d_out, d_c, *slots, p)))]
    by_step = symbols.function(torch.stack(slopes, -2))

    symbols = Symbols()
    d_out, d_c, *slots, p = symbols.new(*grads_and_slots)
    *changes, change_p = symbols.new(*(f"change{k}" for k in range(cell.preactivations)), "change_p")
    p = Dual(p, change_p if cell.carry else None)
    # slots hold the results of forward's elementary functions, which are not worked out again
    kept_a, kept_calls = _kept(cell)
    a = [Dual(None if k is None else slots[k], change) for k, change in zip(kept_a, changes, strict=True)]
    known = iter([None if k is None else slots[k] for k in kept_calls])
    names = {name: (lambda a, function=function: function(a, next(known))) for name, function in _ELEMENTARY.items()}
    h, *after = bind(cell.forward, **names)(*a, p)
    after = [Dual(slot, each.change) for slot, each in zip(slots, after or (h,), strict=True)]
    grads = bind(cell.backward, **_ELEMENTARY)(Dual(d_out), Dual(d_c), *after, p)
    bent = [torch.zeros_like(d_out) if each.change is None else each.change for each in grads]
    return Arithmetic(by_step, symbols.function(torch.stack(bent, -2)))


class Symbols(torch.fx.proxy.GraphAppendingTracer):
    """Records arithmetic, what is written twice once, to print it as a function."""

    def __init__(self) -> None:
        super().__init__(torch.fx.Graph())
        self.recorded: dict = {}

    def new(self, *names: str) -> list[torch.fx.Proxy]:
        return [torch.fx.Proxy(self.graph.placeholder(name), self) for name in names]

    def create_node(self, kind, target, args, kwargs, *more) -> torch.fx.Node:
        key = target, repr(args), repr(kwargs)
        if key not in self.recorded:
            self.recorded[key] = super().create_node(kind, target, args, kwargs, *more)
        return self.recorded[key]

    def function(self, result: torch.fx.Proxy) -> Callable[..., Tensor]:
        """Make a function of the symbols in the order in which they came, without what the result does not need."""
        self.graph.output(result.node)
        self.graph.eliminate_dead_code()
        return torch.fx.GraphModule({}, self.graph).forward


@dataclass(frozen=True)
class Dual:
    """A number, None where unknown, and its change, None where it has none. On these a cell's arithmetic derives itself."""

    value: Any
    change: Any = None

    def __add__(self, other: Dual) -> Dual:
        return Dual(_known(operator.add, self.value, other.value), total(self.change, other.change))

    def __sub__(self, other: Dual) -> Dual:
        change = self.change if other.change is None else -other.change if self.change is None else self.change - other.change
        return Dual(_known(operator.sub, self.value, other.value), change)

    def __rsub__(self, other: int) -> Dual:
        return Dual(_known(torch.rsub, self.value, other), None if self.change is None else -self.change)

    def __mul__(self, other: Dual) -> Dual:
        if self.change is None or other.change is None:
            one, two = (self, other) if self.change is None else (other, self)
            change = None if two.change is None else one.value * two.change
        else:
            change = torch.addcmul(self.change * other.value, self.value, other.change)
        return Dual(_known(operator.mul, self.value, other.value), change)


def _known(function: Callable, *values: Any) -> Any:
    return None if any(value is None for value in values) else function(*values)


def _elementary(function: Callable, derivative: Callable) -> Callable:
    """Make a function of a Dual, whose result may be known. derivative: of (change, result), the change of the result."""

    def apply(a: Dual, known: Any = None) -> Dual:
        value = _known(function, a.value) if known is None else known
        return Dual(value, None if a.change is None else derivative(a.change, value))

    return apply


_ELEMENTARY = {
    "sigmoid": _elementary(torch.sigmoid, torch.ops.aten.sigmoid_backward.default),
    "tanh": _elementary(torch.tanh, torch.ops.aten.tanh_backward.default),
    "relu": _elementary(torch.relu, lambda change, h: where_positive(h, change)),
    "where_positive": lambda h, dh: Dual(where_positive(h.value, dh.value), _known(where_positive, h.value, dh.change)),
}


def _kept(cell: Cell) -> tuple[list[int | None], list[int | None]]:
    """Find the slots that hold the cell's pre-activations, and those that hold what elementary functions give, call by call."""

    def call(a: torch.fx.Proxy) -> torch.fx.Proxy:
        calls.append(a + a)
        return calls[-1]

    *a, p = Symbols().new(*(f"a{k}" for k in range(cell.preactivations)), "p")
    calls: list[torch.fx.Proxy] = []
    h, *slots = bind(cell.forward, **dict.fromkeys(_ELEMENTARY, call))(*a, p)
    places = {id(slot): k for k, slot in enumerate(slots or [h])}
    return [places.get(id(each)) for each in a], [places.get(id(each)) for each in calls]


def total(*terms: Tensor | None) -> Tensor | None:
    """Return the sum of those that are there, None of none."""
    found = None
    for term in terms:
        if term is not None:
            found = term if found is None else found + term
    return found


def _times(a: Tensor | None, b: Tensor | None, transposed: bool = False) -> Tensor | None:
    return None if a is None or b is None else torch.mm(a, b.T if transposed else b)


def _add_product(so_far: Tensor | None, grads: Tensor, factor: Tensor | None) -> Tensor | None:
    if factor is None:
        return so_far
    return torch.mm(grads.T, factor) if so_far is None else torch.addmm(so_far, grads.T, factor)


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
