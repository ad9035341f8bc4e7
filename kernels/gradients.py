"""First and second derivatives of a layer in plain torch operations, from the states that it went through.

Near those states each direction of a layer is linear, and what a step does to small changes is known before any loop over time:
`slopes`, which the cell's derivative gives. `Block.push` carries changes forward through time and `Block.pull`
carries gradients back. A step of either is one product and a few operations; all other products are of many rows at once.
Steps come in blocks, so that the numbers of a block stay in the processor's cache from one operation to the next.

Where a cell has reductions over the units of a row, each unit's change is in all units' results. Its derivatives are those that
autograd finds of the reference (`_by_reference`).

Nothing is done in place: autograd, forward mode and vmap pass through all of it, to any order.

Letters as in layer.py, and: N rows of all steps, or of a block's, one below the other in time's order; P pre-activations of a
unit; Q as many, and one more for each state that enters element by element and each weight of the cell's own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn.kernels import reference
from fastrnn.kernels.cells import CELLS, Cell
from fastrnn.kernels.derive import Printer
from fastrnn.kernels.layer import Inputs, Layer, Needs, Outer, Steps, Weights, initial_states
from fastrnn.kernels.reference import (
    NAMES,
    Product,
    apart,
    carried_states,
    first,
    layer_forward,
    order_of,
    replace,
    states_before,
    taken_apart,
)
from fastrnn.kernels.symbols import Symbol, is_number

BLOCK = 16384  # units of a block's steps and rows: a few dozen tensors of so many numbers fit a core's cache


def layer_backward(
    outer: Outer,
    inputs: Inputs,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Tensor,
    layer: Layer,
    needs: Needs,
    dc: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return the gradients dx, dh0, dc0, [0] where there is none, and those of all weights in a list, empty if not needed.

    dc [D, N, S * H]: gradients of the states but h after each step.
    """
    if CELLS[layer.cell].reduces:
        return _by_reference(outer, inputs, weights, layer, needs, dc)
    steps, empty = Steps(layer, inputs), inputs.x.new_empty(0)
    dxs, dh0s, dc0s, dws = [], [], [], []
    for d, own in enumerate(layer.by_direction(weights)):
        direction = Direction(layer, steps, d, inputs, own, y, saved)
        dys, state = direction.split(direction.columns(outer.dy)), direction.state(outer.dh_n, outer.dc_n)
        dcs = direction.split(None if dc is None else dc[d])
        dx: list[Any] = [None] * len(dys)
        dw = Weights()
        for k in reversed(direction.order):
            block = direction.blocks[k]
            grads, state = block.pull(dys[k], state, more_c=dcs[k])
            dx[k] = torch.mm(grads.input, own.w_ih) if needs.dx else None
            dw = block.add_weights(dw, grads, block.x, block.h, block.out) if needs.dw else dw
        dxs.append(dx)
        state = direction.initial(state)
        dh0s.append(state.h)
        dc0s.append(state.c)
        dws += [each for each in dw if each is not None]
    return (
        steps.join(total(*map(joined, dxs))) if needs.dx else empty,
        torch.stack(dh0s) if needs.dh0 else empty,
        torch.stack(dc0s) if needs.dh0 and inputs.c0 is not None else empty,
        dws,
    )


def layers_forward(inputs: Inputs, weights: Sequence[Tensor], layer: Layer) -> tuple[tuple[Tensor, ...], list[tuple]]:
    """Run layers on top of each other, as many as there are states of: y, h_n, c_n and saved; and what backward takes."""
    count, passes, results, y = len(inputs.h0) // layer.directions, [], [], inputs.x
    each = len(weights) // count
    for index in range(count):
        h0, c0 = (None if state is None else state.chunk(count)[index] for state in inputs[2:4])
        own = inputs._replace(x=y, h0=h0, c0=c0), weights[index * each : (index + 1) * each]
        y, *after = reference.layer_forward(*own, layer, True)
        passes.append((*own, y, after[-1], layer))
        results.append(after)
    return (y, *map(torch.cat, zip(*results, strict=True))), passes


def layers_backward(outer: Outer, passes: list[tuple]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return the gradients of such layers as `layer_backward` does."""
    dx, states, dws = outer.dy, [], []
    for index in reversed(range(len(passes))):
        dh_n, dc_n = (None if grad is None else grad.chunk(len(passes))[index] for grad in outer[1:])
        inputs, weights, y, saved, layer = passes[index]
        dx, *of_states, dw = layer_backward(Outer(dx, dh_n, dc_n), inputs, weights, y, saved, layer, Needs())
        states.insert(0, of_states)
        dws = dw + dws
    return dx, *map(torch.cat, zip(*states, strict=True)), dws


def layer_double_backward(
    v: Sequence, outer: Outer, inputs: Inputs, weights: Sequence[Tensor], y: Tensor, saved: Tensor, layer: Layer, needs: Needs
) -> tuple[Outer, Inputs, list[Tensor]]:
    """Return gradients of layer_backward's `outer`, `inputs` and weights, from those of its results: v, with None for zeros.

    layer_backward is linear in `outer`: it is the transpose of the layer's derivative. So its results times v are `outer` times
    the change of the layer's outputs where the layer's inputs change by v. Hence the gradient of `outer` is that change, and
    the gradient of the layer's inputs is the change of layer_backward's results.
    """
    if CELLS[layer.cell].reduces:
        return _twice_by_reference(v, outer, inputs, weights, layer, needs)
    steps, (dy, dh_n, dc_n), c0 = Steps(layer, inputs), outer, inputs.c0
    vx, vh0, vc0, vw = v
    ys, h_ns, c_ns, dxs, dh0s, dc0s, dws = [], [], [], [], [], [], []
    vws = layer.by_direction(vw or [None] * len(weights))
    for d, (own, along) in enumerate(zip(layer.by_direction(weights), vws, strict=True)):
        direction = Direction(layer, steps, d, inputs, own, y, saved)
        blocks, order = direction.blocks, direction.order
        product = None if along.w_hh is None else Product(layer, along.w_hh)
        vxs = direction.split(None if vx is None else direction.known(steps.flat(vx)))
        dys = direction.split(direction.columns(dy))
        changes: list[Any] = [None] * len(blocks)
        state = direction.change(vh0, vc0)
        for k in order:
            changes[k], state = blocks[k].push(vxs[k], along, product, state)
        ys.append(joined([change.y for change in changes]))
        h_ns.append(state.h)
        c_ns.append(state.c)
        state, bent_state = direction.state(dh_n, dc_n), direction.state(None, None)
        dx: list[Any] = [None] * len(blocks)
        dw = Weights()
        for k in reversed(order):
            block, change = blocks[k], changes[k]
            grads, state = block.pull(dys[k], state)
            bent, bent_state = block.bend(grads, along, product, change, bent_state)
            if needs.dx:
                dx[k] = total(torch.mm(bent.input, own.w_ih), _times(grads.input, along.w_ih))
            if needs.dw:
                dw = block.add_weights(dw, bent, block.x, block.h, block.out)
                dw = block.add_weights(dw, grads, change.x, change.h, change.out, biases=False)
        dxs.append(dx)
        bent_state = direction.initial(bent_state)
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


def _by_reference(
    outer: Outer, inputs: Inputs, weights: Sequence[Tensor], layer: Layer, needs: Needs, dc: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`layer_backward`, by autograd through the reference."""
    x, h0, c0 = inputs.x, inputs.h0, inputs.c0
    empty, states = x.new_empty(0), (h0,) if c0 is None else (h0, c0)
    asked = *(x,) * needs.dx, *states * needs.dh0, *tuple(weights) * needs.dw
    if not asked:
        return empty, empty, empty, []

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        own = inputs._replace(x=next(left) if needs.dx else x)
        if needs.dh0:
            own = own._replace(h0=next(left), c0=None if c0 is None else next(left))
        y, h_n, c_n, saved = layer_forward(own, [*left] if needs.dw else weights, layer, True)
        results = (y, h_n, c_n if c0 is not None else None, None if dc is None else carried_states(own, layer, saved))
        return tuple(each for each, grad in zip(results, (*outer, dc), strict=True) if grad is not None and each is not None)

    grads = [grad for grad in (outer.dy, outer.dh_n, outer.dc_n if c0 is not None else None, dc) if grad is not None]
    left = iter(_pulled_back(run, asked, grads))
    dx = next(left) if needs.dx else empty
    dh0 = next(left) if needs.dh0 else empty
    dc0 = next(left) if needs.dh0 and c0 is not None else empty
    return dx, dh0, dc0, [*left]


def _twice_by_reference(
    v: Sequence, outer: Outer, inputs: Inputs, weights: Sequence[Tensor], layer: Layer, needs: Needs
) -> tuple[Outer, Inputs, list[Tensor]]:
    """`layer_double_backward`, by autograd through `_by_reference`."""
    vx, vh0, vc0, vw = v
    c0, of_outer = inputs.c0, [place for place, grad in enumerate(outer) if grad is not None]
    asked = [outer[place] for place in of_outer] + [inputs.x, inputs.h0, *(() if c0 is None else (c0,)), *weights]
    along = vx, vh0, None if c0 is None else vc0, *(vw or [None] * len(weights))

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        changed: list[Any] = [None] * len(outer)
        for place in of_outer:
            changed[place] = next(left)
        own = inputs._replace(x=next(left), h0=next(left), c0=None if c0 is None else next(left))
        every = Needs(vx is not None, vh0 is not None or vc0 is not None, vw is not None)
        dx, dh0, dc0, dw = _by_reference(Outer(*changed), own, [*left], layer, every, None)
        results = dx, dh0, dc0, *(dw if every.dw else weights)
        return tuple(each for each, grad in zip(results, along, strict=True) if grad is not None)

    left = iter(_pulled_back(run, asked, [grad for grad in along if grad is not None]))
    found: list[Any] = [None] * len(outer)
    for place in of_outer:
        found[place] = next(left)
    dx, dh0 = next(left), next(left)
    dc0 = None if c0 is None else next(left)
    return Outer(*found), Inputs(dx if needs.dx else None, None, dh0, dc0), [*left] if needs.dw else []


def _pulled_back(run: Callable[..., tuple[Tensor, ...]], given: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the gradients of what a function is given from those of its results, themselves differentiable where asked for."""
    if torch._C._are_functorch_transforms_active():
        return torch.func.vjp(run, *given)[1](tuple(grads))
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [each.view_as(each) if again and each.requires_grad else each.detach().requires_grad_() for each in given]
        results = run(*leaves)
        if not results:
            return [torch.zeros_like(each) for each in given]
        return torch.autograd.grad(results, leaves, grads, create_graph=again, materialize_grads=True)


class State(NamedTuple):
    """A direction's states, a change of them, or their gradients: [B, R] and, where there are others, [B, S * H].

    restart: the same of the states that resets go back to: their change, or the sum of their gradients so far.
    """

    h: Tensor
    c: Tensor | None
    restart: State | None = None


class Change(NamedTuple):
    """How what a block computes changes."""

    x: Tensor | None  # [N, I]
    a: Sequence[Tensor]  # P times [N, H], pre-activations
    h: Tensor  # [N, R], the hidden state that enters the product of each step
    inner: Sequence[Tensor]  # each [N, H], the states that enter element by element, and the cell's own weights
    out: Tensor  # [N, H], the cell's h, before the projection
    y: Tensor  # [N, R]


class Gradients(NamedTuple):
    """Gradients of what a block computes, or how they change."""

    input: Tensor  # [N, G * H], of the products with x, in torch's gate order
    hidden: Tensor  # [N, G * H], of the products with h
    own: Tensor | None  # [N, W * H], of the cell's own weights
    y: Tensor  # [N, R]
    out: Tensor  # [N, H]
    c: Tensor | None  # [N, S * H], of the states, but for what reaches them through the same step


class Direction:
    """One direction of a layer, near the states that it went through, as blocks of steps."""

    def __init__(self, layer: Layer, steps: Steps, d: int, inputs: Inputs, weights: Weights, y: Tensor, saved: Tensor) -> None:
        self.layer, self.steps, self.d = layer, steps, d
        cell, sizes, reverse, x = CELLS[layer.cell], steps.sizes, layer.reverse != bool(d), steps.flat(inputs.x)
        hidden, order = weights.w_hh.shape[0] // cell.gates, order_of(len(sizes), reverse)
        begin, restart = (State(h[d], None if c is None else c[d]) for h, c in initial_states(layer, inputs))
        self.within, resets = steps.within(), steps.restarted()
        self.zeros = State(torch.zeros_like(begin.h), None if begin.c is None else torch.zeros_like(begin.c))
        if resets is not None:
            self.zeros = self.zeros._replace(restart=self.zeros)
        x, y, own_saved = self.known(x), self.known(self.columns(y)), saved[d]
        if not torch.is_grad_enabled():  # else it is the reference's, where zeros would be the singular points of some cells
            own_saved = self.known(own_saved)
        slots = own_saved.split(hidden, -1) if cell.slots else ()
        h, c = before(order, sizes, y, begin.h), None
        if begin.c is not None:
            c = before(order, sizes, own_saved.narrow(-1, (cell.slots - cell.states) * hidden, cell.states * hidden), begin.c)
        # backwards, what is past the last step of a row was not before it
        for where, state in ((steps.lasts() if reverse else None, begin), (resets, restart)):
            if where is not None:
                h = torch.where(where, steps.repeated(state.h), h)
                c = None if c is None or state.c is None else torch.where(where, steps.repeated(state.c), c)
        out = y if weights.w_hr is None else slots[-1]
        kept = [*slots[: cell.kept], *slots[cell.slots - cell.states : cell.slots], *(out,)[: cell.derived.reads_output]]
        kept += [*states_before(cell, h, c), *steps.noise_of(d, cell.noise)]
        mask = None if inputs.mask is None else steps.repeated(inputs.mask[d])
        length = max(1, BLOCK // max(1, sizes[0] * hidden))
        parts = [sizes[t : t + length] for t in range(0, len(sizes), length)]
        self.rows, self.order = [sum(part) for part in parts], order_of(len(parts), reverse)
        if begin.c is None:
            units: Sequence[Tensor] = (h.new_ones(()),)
        else:  # [1 + S, 1, 1]: a gradient of h, and none of the others; one of the first of these, and so on
            count = 1 + cell.states
            units = torch.eye(count, dtype=h.dtype, device=h.device).view(count, count, 1, 1).unbind()
        split = zip(*map(self.split, (resets, self.within, mask, x, h, out, *kept)), strict=True)
        product = Product(layer, weights.w_hh)
        self.blocks = [
            Block(cell, weights, product, part, order_of(len(part), reverse), units, *each)
            for part, each in zip(parts, split, strict=True)
        ]

    def known(self, rows: Any) -> Any:
        """Return rows of all steps with zeros past the lengths, where anything may stand."""
        return rows if self.within is None else torch.where(self.within, rows, 0.0)

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
        """Return this direction's part of the gradients of final states, zeros where there are none."""
        zeros = self.zeros
        return State(zeros.h if h is None else h[self.d], zeros.c if c is None else c[self.d], zeros.restart)

    def change(self, h: Tensor | None, c: Tensor | None) -> State:
        """Return this direction's part of the changes of initial states, and of those that resets go back to."""
        if not self.layer.restarts:
            state = self.state(h, c)
            return state._replace(restart=state)
        zeros = self.zeros
        (h, h_reset), (c, c_reset) = ((None, None) if each is None else each[self.d].chunk(2) for each in (h, c))
        restart = State(zeros.h if h_reset is None else h_reset, zeros.c if c_reset is None else c_reset)
        return State(zeros.h if h is None else h, zeros.c if c is None else c, restart)

    def initial(self, state: State) -> State:
        """Return the gradients of initial states, from those that reached the first step and those that resets took."""
        if state.restart is None:
            return state
        (h, c, _), restart = state, state.restart
        if self.layer.restarts:
            return State(torch.cat((h, restart.h)), None if c is None else torch.cat((c, restart.c)))
        return State(h + restart.h, None if c is None else c + restart.c)


class Block:
    """Some steps of one direction, one after the other, near the states that they went through."""

    def __init__(
        self, cell: Cell, weights: Weights, product: Product, sizes: list[int], order: range, units, resets, within, mask, *rows
    ) -> None:
        self.cell, self.weights, self.product, self.sizes, self.order = cell, weights, product, sizes, order
        # of each step, which rows [b, 1] are reset, and which are within their lengths; or None. And the
        # factors [b, R] of h where it enters the product
        self.resets, self.within, self.mask = (
            None if each is None else steps_of(each, sizes) for each in (resets, within, mask)
        )
        x, h, out, *kept = rows
        self.x, self.h, self.out = x, h if mask is None else h * mask, out
        self.rows, self.hidden = x.shape[0], out.shape[-1]
        noise = len(kept) - cell.noise
        self.kept = *kept[:noise], *apart(cell, weights.b_ih)[1], *kept[noise:]
        self.arithmetic = arithmetic(cell.name)
        self.slopes = self.arithmetic.slopes(*units, *self.kept)  # of h [N, Q, H]; with states [1 + S, N, Q, H], of them too
        self.by_state = [steps_of(each, sizes) for each in (self.slopes.unbind() if len(units) > 1 else (self.slopes,))]

    def push(self, x: Tensor | None, v: Weights, along: Product | None, state: State) -> tuple[Change, State]:
        """Return how all changes, and the state after, where x, the weights (by v) and the state before change by these.

        along: products with v.w_hh, if there is one.
        """
        cell, weights, sizes, (h, c, restart) = self.cell, self.weights, self.sizes, state
        G, P, w_hr = cell.gates, cell.preactivations, weights.w_hr
        v_b_ih, v_own = apart(cell, v.b_ih)
        from_x = total(_times(x, weights.w_ih.T), _times(self.x, v.w_ih, True), v_b_ih)
        from_h = total(None if along is None else along(self.h), v.b_hh)
        a_inputs, a_hidden = self._preactivations(from_x, from_h)
        a_hidden = steps_of(a_hidden, sizes)
        # narrow and select: in torch 2.14 a slice of all is aten.alias, which the older of torch's two vmaps does not know
        slopes = steps_of(self.slopes.narrow(-2, cell.hidden, G).reshape(*self.slopes.shape[:-2], -1), sizes, -2)
        states = range(P, P + len(cell.derived.before))
        by_states = [steps_of(self.slopes.select(-2, k), sizes, -2) for k in states]
        # what the input alone and the cell's own weights do is known before the loop
        known = [*enumerate(a_inputs), *enumerate(v_own, states.stop)]
        by_x = total(*(self.slopes.select(-2, k) * a for k, a in known))
        by_x = None if by_x is None else steps_of(by_x, sizes, -2)
        by_w_hr = None if v.w_hr is None else steps_of(torch.mm(self.out, v.w_hr.T), sizes)
        a_s, h_s, inner_h, c_s, out_s, y_s = self._places(6)
        for t in self.order:
            inner_h[t] = p = self._before(t, h, None if restart is None else restart.h)
            h_s[t] = self._entering(t, p)
            a_s[t] = self.product(h_s[t]) + a_hidden[t]
            after = slopes[t] * a_s[t]  # [b, G * H], or [2, b, G * H]
            if G > 1:
                after = after.reshape(*after.shape[:-1], G, self.hidden).sum(-2)
            if c is not None:
                c_s[t] = self._before(t, c, None if restart is None else restart.c)
            for by_one, before_one in zip(by_states, states_before(cell, p, c_s[t]), strict=True):
                after = torch.addcmul(after, by_one[t], before_one)
            if by_x is not None:
                after = after + by_x[t]
            if c is not None:
                after, *others = after.unbind()
                c = self._after(t, others[0] if cell.states == 1 else torch.cat(others, -1), c)
            out_s[t] = y_s[t] = after if self.within is None else torch.where(self.within[t], after, 0.0)
            if w_hr is not None:
                y_s[t] = torch.mm(after, w_hr.T) if by_w_hr is None else torch.mm(after, w_hr.T) + by_w_hr[t]
            h = self._after(t, y_s[t], h)
        a, h_before, y = joined(a_s), joined(h_s), joined(y_s)
        a = [*a_inputs, *(a.split(self.hidden, -1) if G > 1 else (a,))]
        inner = states_before(cell, h_before if self.mask is None else joined(inner_h), None if c is None else joined(c_s))
        inner += [each.expand_as(self.out) for each in v_own] or [torch.zeros_like(self.out)] * cell.weights
        return Change(x, a, h_before, inner, y if w_hr is None else joined(out_s), y), State(h, c, restart)

    def _before(self, t: int, state: Tensor, restart: Any) -> Tensor:
        """Return the rows of step t of a state, from before it."""
        rows = first(self.sizes[t], state)
        return rows if self.resets is None else torch.where(self.resets[t], first(self.sizes[t], restart), rows)

    def _entering(self, t: int, rows: Tensor) -> Tensor:
        """Return rows of h of step t as they enter the product, or their gradient from what enters."""
        return rows if self.mask is None else rows * self.mask[t]

    def _after(self, t: int, rows: Tensor, state: Tensor) -> Tensor:
        """Return a state with the rows of step t replaced, but for those past their lengths."""
        return replace(state, rows if self.within is None else torch.where(self.within[t], rows, first(len(rows), state)))

    def _stopped(self, t: int, rows: Tensor, so_far: Any) -> tuple[Tensor, Any]:
        """Return a gradient of the states before step t without what is of those that resets go back to, and these' with it."""
        if self.resets is None:
            return rows, so_far
        taken = first(len(rows), so_far) + torch.where(self.resets[t], rows, 0.0)
        return torch.where(self.resets[t], 0.0, rows), replace(so_far, taken)

    def _preactivations(self, from_x: Tensor | None, from_h: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Return those of the input alone, each [N, H], and the others [N, G * H], but for the products with h."""
        cell, H, whole = self.cell, self.hidden, (self.rows, self.cell.gates * self.hidden)
        zeros = self.h.new_zeros(1, 1)
        if not cell.hidden:
            a = total(from_x, from_h)
            return [], (zeros if a is None else a).expand(whole)
        from_x = (zeros if from_x is None else from_x).expand(whole)
        blocks = from_x.split(H, -1)
        alone, shared = ([blocks[k] for k in part] for part in (cell.input[: cell.hidden], cell.input[cell.hidden :]))
        return alone, total(torch.cat((*shared, zeros.expand(self.rows, cell.hidden * H)), 1), from_h)

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
        more_c: Tensor | None = None,
    ) -> tuple[Gradients, State]:
        """Return the gradients of all, and of the state before, from those of y and of the state after.

        more_a [N, Q, H] is added to those of the pre-activations, states and weights, more_h [N, R] to those of the hidden
        state that enters the product of each step, more_out [N, H] to those of out, more_c [N, S * H] to those of the states
        after each step.
        """
        cell, sizes, (dh, dc, restart) = self.cell, self.sizes, state
        dh_reset, dc_reset = (None, None) if restart is None else restart[:2]
        P, G, B, w_hr = cell.preactivations, cell.gates, dh.shape[0], self.weights.w_hr
        dys, more_a, more_h, more_out, more_c = (
            None if each is None else steps_of(each, sizes) for each in (dy, more_a, more_h, more_out, more_c)
        )
        by_out, *by_others = self.by_state
        states = [name for name, _ in cell.derived.before]
        a_s, y_s, out_s, c_s = self._places(4)
        for t in reversed(self.order):
            b = sizes[t]
            d_out = dh if b == B else dh.narrow(0, 0, b)
            d_out = d_out if dys is None else d_out + dys[t]
            y_s[t] = d_out = d_out if self.within is None else torch.where(self.within[t], d_out, 0.0)
            if w_hr is not None:
                d_out = torch.mm(d_out, w_hr) if more_out is None else torch.mm(d_out, w_hr) + more_out[t]
            out_s[t], d_out = d_out, d_out.unsqueeze(1)
            a_s[t] = da = by_out[t] * d_out if more_a is None else torch.addcmul(more_a[t], by_out[t], d_out)  # [b, Q, H]
            if dc is not None:
                d_c = dc if b == B else dc.narrow(0, 0, b)
                d_c = d_c if more_c is None else d_c + more_c[t]
                c_s[t] = d_c if self.within is None else torch.where(self.within[t], d_c, 0.0)
                for by_one, d_one in zip(by_others, taken_apart(cell, c_s[t].unsqueeze(1)), strict=True):
                    a_s[t] = da = torch.addcmul(da, by_one[t], d_one)
            if self.within is not None:
                a_s[t] = da = torch.where(self.within[t].unsqueeze(1), da, 0.0)
            d_before = self.product.back(_narrow(da, cell.hidden, G).reshape(b, -1))
            d_before = self._entering(t, d_before if more_h is None else d_before + more_h[t])
            d_states = {name: da.select(1, P + k) for k, name in enumerate(states)}
            if "h" in d_states:
                d_before = d_before + d_states.pop("h")
            if dc is not None:
                d_c = torch.cat([*d_states.values()], -1) if cell.states > 1 else next(iter(d_states.values()))
                d_c, dc_reset = self._stopped(t, d_c, dc_reset)
                dc = self._after(t, d_c, dc)
            d_before, dh_reset = self._stopped(t, d_before, dh_reset)
            dh = self._after(t, d_before, dh)
        a, y = joined(a_s), joined(y_s)
        d_hidden = _narrow(a, cell.hidden, G).reshape(self.rows, -1)
        d_input = d_hidden
        if cell.hidden:
            d_input = torch.cat([a.select(1, cell.input.index(block)) for block in range(G)], 1)
        out, d_c = y if w_hr is None else joined(out_s), None if dc is None else joined(c_s)
        own = a.narrow(1, a.shape[1] - cell.weights, cell.weights).reshape(self.rows, -1) if cell.weights else None
        restart = None if restart is None else State(dh_reset, dc_reset)
        return Gradients(d_input, d_hidden, own, y, out, d_c), State(dh, dc, restart)

    def bend(
        self, grads: Gradients, v: Weights, along: Product | None, change: Change, state: State
    ) -> tuple[Gradients, State]:
        """Return how `grads` change with the block, and the gradient of the state before, from how the one after does."""
        outer = grads.out, *taken_apart(self.cell, grads.c)
        more_a = self.arithmetic.bend(*outer, *self.kept, *change.a, *change.inner)
        return self.pull(None, state, more_a, None if along is None else along.back(grads.hidden), _times(grads.y, v.w_hr))

    def add_weights(self, so_far: Weights, grads: Gradients, x, h, out, biases: bool = True) -> Weights:
        """Add the gradients of weights, from what the steps multiply with them, None for nothing."""
        w_ih, w_hh, b_ih, b_hh, w_hr = so_far
        w_ih, w_hh = _add_product(w_ih, grads.input, x), self.product.outer(grads.hidden, h, w_hh)
        if self.weights.w_hr is not None:
            w_hr = _add_product(w_hr, grads.y, out)
        if biases and self.weights.b_ih is not None:
            of_input = grads.input if grads.own is None else torch.cat((grads.input, grads.own), 1)
            b_ih, b_hh = total(b_ih, of_input.sum(0)), total(b_hh, grads.hidden.sum(0))
        return Weights(w_ih, w_hh, b_ih, b_hh, w_hr)


class Arithmetic(NamedTuple):
    """What is derived from a cell, on the numbers of many rows; see `derive.Derivation`.

    slopes:  (parameters of backward...) -> gradients of the pre-activations, states and weights, stacked, [..., N, Q, H].
    bend:    (the same..., changes of the pre-activations, states and weights...) -> how these gradients change.
    """

    slopes: Callable[..., Tensor]
    bend: Callable[..., Tensor]


@functools.cache
def arithmetic(name: str) -> Arithmetic:
    """Make these functions of a cell."""
    derived, names = CELLS[name].derived, NAMES | FUSED
    functions = (code.bind(names, Fused) for code in (derived.backward, derived.bend))
    return Arithmetic(*(functools.partial(_stacked, function) for function in functions))


def _stacked(function: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> Tensor:
    found = function(*given)
    if any(each.shape != found[0].shape for each in found):
        shape = torch.broadcast_shapes(*(each.shape for each in found))
        found = tuple(each if each.shape == shape else each.expand(shape) for each in found)
    return torch.stack(found, -2)


FUSED = {
    "addcmul": torch.addcmul,
    "sigmoid_backward": torch.ops.aten.sigmoid_backward.default,
    "tanh_backward": torch.ops.aten.tanh_backward.default,
}


class Fused(Printer):
    """Writes operations of torch's that do several at once: each reads and writes whole tensors.

    A variable is freed after its last use, so that the next takes its memory, which is in the processor's cache.
    """

    def source(self) -> str:
        head, *lines = super().source().splitlines()
        last = {name: index for index, line in enumerate(lines) for name in re.findall(r"[a-z_]\w*", line)}
        made = {line.split()[0] for line in lines[:-1]}
        for name, index in last.items():
            if name in made and index < len(lines) - 1:
                lines[index] += f"; {name} = None"
        return "\n".join((head, *lines)) + "\n"

    def operation(self, node: Symbol) -> tuple:
        function, first, last = node.operation, node.operands[0], node.operands[-1]
        if function == "mul" and self._is(last, "sub") and is_number(last.operands[0], 1):
            inner = last.operands[1]
            if self._is(first, "mul", once=True) and first.operands[1] is inner:
                return "sigmoid_backward", *first.operands
            if self._is(inner, "mul") and inner.operands[0] is inner.operands[1]:
                return "tanh_backward", first, inner.operands[0]
        if (
            function in ("add", "sub")
            and self._is(last, "mul", once=True)
            and isinstance(first, Symbol)
            and len(last.inputs) == 2
        ):
            return "addcmul", first, *last.operands, *["value=-1"][: function == "sub"]
        if function == "add" and self._is(first, "mul", once=True) and isinstance(last, Symbol) and len(first.inputs) == 2:
            return "addcmul", last, *first.operands
        return super().operation(node)

    def _is(self, node: Any, operation: str, once: bool = False) -> bool:
        """Is a node the result of an operation, which nothing else needs?"""
        found = isinstance(node, Symbol) and node.operation == operation and node.index not in self.names
        return found and (node.index in self.single or not once)


def _narrow(a: Tensor, start: int, length: int) -> Tensor:
    """Return a part of axis 1; all of it as it is, because torch's older vmap does not know aten.alias."""
    return a if length == a.shape[1] else a.narrow(1, start, length)


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
