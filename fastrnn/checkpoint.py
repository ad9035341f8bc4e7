"""Recompute mode: a layer keeps states instead of gates, and backward redoes the gates, a segment of steps at a time.

Checkpointing in time, over the raw layer ops, so for every engine: forward keeps y, in which all h are, and the cell state c
before each segment; backward takes the segments from the last that ran to the first, runs forward again on each from its
first states, now keeping the gates, and layer_backward on it with the gradients of its final states.

Letters: T steps, B rows of a batch, N rows of all steps, H hidden size, R projected size or H, D directions.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.layer import Inputs, Layer, Outer, Steps, initial_states, layer_of

SEGMENT_ROWS = 768  # rows of a segment at least: with fewer, packing weights and adding up their gradients takes the time


class _Mode(threading.local):
    def __init__(self) -> None:  # once a thread
        self.recompute = False


_mode = _Mode()


@contextmanager
def recompute(enabled: bool = True) -> Iterator[None]:
    """Have the layers that run inside the block keep less for their backward pass, which then takes longer.

    ::

        with fastrnn.recompute():
            output, state = lstm(x)
        output.sum().backward()

    The layers keep their output, and an LSTM some of its cell states, in place of every gate of every step. Backward computes
    the gates again. Outputs have the same bits as without it (except in bfloat16 with AMX), and gradients differ by rounding.
    An RNN keeps only its output anyway. Layers that were made with `recompute=True` always run in this way.

    The mode holds for the thread that entered the block. It has no effect under torch.func, in forward mode, and where
    torch.nn's own code runs.

    Args:
        enabled: False ends the effect of an outer block.
    """
    outer = _mode.recompute
    _mode.recompute = enabled
    try:
        yield
    finally:
        _mode.recompute = outer


def is_on() -> bool:
    """Is the mode on, in this thread?"""
    return _mode.recompute


def segments_wanted(layer: Layer, inputs: Inputs) -> int:
    """Segments into which the current mode divides a layer's steps; 0: it keeps the gates."""
    if not _mode.recompute or CELLS[layer.cell].slots == 0:
        return 0
    steps = Steps(layer, inputs)
    return count_segments(steps.steps, steps.rows, steps.batch, layer.cell, layer.projected)


def count_segments(steps: int, rows: int, batch: int, cell: str, projected: bool = False) -> int:
    """How many segments take the least memory: n of them keep n * batch times the states, and the slots of rows / n rows.

    That is least at n = sqrt(rows * slots / (states * batch)). A cell without a state but h keeps nothing for a segment, so n
    is then bound by SEGMENT_ROWS alone. steps T, rows N, batch B; 1 <= n <= max(1, T // 2).
    """
    most = min(steps // 2, rows // SEGMENT_ROWS)
    if states := CELLS[cell].states:
        slots = CELLS[cell].slots + 1 + projected  # and the output of the second run
        most = min(most, int(math.sqrt(rows * slots / (states * batch))))
    return max(most, 1)


def bounds(offsets: Sequence[int], segments: int) -> list[int]:
    """First step of each segment, and T: about equal rows, and two steps at least, because engines may round one otherwise.

    offsets [T + 1]: rows before each step. 2 * segments <= T, or segments 1.
    """
    steps, found = len(offsets) - 1, [0]
    for k in range(1, segments):
        nearest = bisect_left(offsets, k * offsets[-1] / segments)
        found.append(min(max(nearest, found[-1] + 2), steps - 2 * (segments - k)))
    return [*found, steps]


def forward(x, batch_sizes, h0, c0, weights, text, segments, *more) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op checkpoint_forward, see ops.py."""
    inputs, layer = Inputs(x, batch_sizes, h0, c0, *more), layer_of(text)
    steps, (begin, _) = _Segments(layer, inputs), initial_states(layer, inputs)
    D, B, R = begin[0].shape
    kept = x.new_empty((0,) if c0 is None else (D, segments - 1, B, c0.shape[2]))
    if kept.numel() == 0:
        y, h_n, c_n, _ = _layer_forward(inputs, weights, text, False)
        return y, h_n, c_n, kept
    y = x.new_empty((*x.shape[:-1], D * R))
    h_n, c_n = (state.clone(memory_format=torch.contiguous_format) for state in begin if state is not None)
    for d, (own, own_weights) in enumerate(steps.each_direction(weights)):
        for k, (start, stop) in enumerate(steps.segments(segments, own.reverse)):
            if k > 0:
                kept[d, k - 1] = c_n[d]
            b = steps.sizes[start]
            h, c = h_n[d : d + 1, :b], c_n[d : d + 1, :b]
            part, h_last, c_last, _ = _layer_forward(steps.inputs(d, start, stop, h, c), own_weights, own.text(), False)
            steps.part(y, start, stop).narrow(-1, d * R, R).copy_(part)
            h.copy_(h_last)
            c.copy_(c_last)
    return y, h_n, c_n, kept


def backward(
    dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, kept, text, segments, needs, *more
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The op checkpoint_backward, see ops.py."""
    inputs, layer, (need_dx, need_dh0, need_dw) = Inputs(x, batch_sizes, h0, c0, *more), layer_of(text), needs
    if segments == 1:
        saved = _layer_forward(inputs, weights, text, True)[3]
        return _layer_backward(Outer(dy, dh_n, dc_n), inputs, weights, y, saved, text, needs)
    steps, ((h_begin, c_begin), restart) = _Segments(layer, inputs), initial_states(layer, inputs)
    R = h0.shape[2]
    dx = x.new_empty(x.shape if need_dx else (0,))
    # gradients of the states after the segments that are still to come, in the end of the first ones; and of those that resets
    # go back to, so far
    dh, dc = _zeros(x, h_begin), _zeros(x, c_begin)
    dh_reset, dc_reset = (_zeros(x, None if inputs.resets is None else state) for state in restart)
    for carried, final in ((dh, dh_n), (dc, dc_n)):
        if final is not None:
            carried.copy_(final)
    sums: list[Tensor] = []
    for d, (own, own_weights) in enumerate(steps.each_direction(weights)):
        y_own, dy_own = y.narrow(-1, d * R, R), None if dy is None else dy.narrow(-1, d * R, R)
        order, totals = steps.segments(segments, own.reverse), None
        for k in reversed(range(segments)):
            start, stop = order[k]
            b = steps.sizes[start]
            h = h_begin[d : d + 1]
            h = steps.before(y_own, h, start, stop, own.reverse) if k > 0 else h[:, :b]
            c = None if c_begin is None else kept[d, k - 1 : k, :b] if k > 0 else c_begin[d : d + 1, :b]
            part, need_states = steps.inputs(d, start, stop, h, c), need_dh0 or k > 0
            saved = _layer_forward(part, own_weights, own.text(), True)[3]
            dh_here, dc_here = dh[d : d + 1, :b], None if c0 is None else dc[d : d + 1, :b]
            outer = Outer(None if dy_own is None else steps.part(dy_own, start, stop), dh_here, dc_here)
            dx_part, dh_part, dc_part, dw_part = _layer_backward(
                outer, part, own_weights, steps.part(y_own, start, stop), saved, own.text(), (need_dx, need_states, need_dw)
            )
            for here, at_reset, found in ((dh_here, dh_reset, dh_part), (dc_here, dc_reset, dc_part)):
                if here is not None and need_states:
                    here.copy_(found[:, :b])
                    if own.restarts:
                        at_reset[d : d + 1, :b].add_(found[:, b:])
            if need_dx and d == 0:
                steps.part(dx, start, stop).copy_(dx_part)
            elif need_dx:
                steps.part(dx, start, stop).add_(dx_part)
            if totals is None:
                totals = dw_part
            else:
                for total, grad in zip(totals, dw_part, strict=True):
                    total.add_(grad)
                    del grad
            del saved, dx_part, dw_part  # before the next segment makes its own
        sums += totals or []
    if not need_dh0:
        dh, dc = x.new_empty(0), x.new_empty(0)
    elif layer.restarts:
        dh, dc = torch.cat((dh, dh_reset), 1), dc if c0 is None else torch.cat((dc, dc_reset), 1)
    elif inputs.resets is not None:
        dh, dc = dh + dh_reset, dc + dc_reset
    return dx, dh, dc, sums


def _zeros(x: Tensor, state: Tensor | None) -> Tensor:
    """Make zeros for the gradient of a state; a tensor without numbers where there is none. x: of the same kind."""
    return x.new_empty(0) if state is None else torch.zeros_like(state, memory_format=torch.contiguous_format)


def _layer_forward(inputs: Inputs, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.fastrnn.layer_forward.default(*inputs[:4], *args, *inputs[4:])


def _layer_backward(outer: Outer, inputs: Inputs, *args) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return torch.ops.fastrnn.layer_backward.default(*outer, *inputs[:4], *args, *inputs[4:])


class _Segments(Steps):
    """The steps of a sequence, in segments."""

    def __init__(self, layer: Layer, inputs: Inputs) -> None:
        super().__init__(layer, inputs)
        self.layer, self.x, self.mask = layer, inputs.x, inputs.mask
        _, self.restart = initial_states(layer, inputs)

    def each_direction(self, weights: Sequence[Tensor]) -> Iterator[tuple[Layer, Sequence[Tensor]]]:
        """Take the layer apart: each direction as a layer of its own, and its weights.

        A segment begins with states that are not those to which its resets go back.
        """
        count, restarts = len(self.layer.kinds()), self.resets is not None
        for d in range(self.directions):
            own = self.layer._replace(directions=1, reverse=self.layer.reverse != bool(d), restarts=restarts)
            yield own, weights[d * count : (d + 1) * count]

    def segments(self, count: int, backwards: bool) -> list[tuple[int, int]]:
        """First step and the one past the last of each segment, in the order they run."""
        found = list(pairwise(bounds(self.offsets, count)))
        return found[::-1] if backwards else found

    def inputs(self, d: int, start: int, stop: int, h: Tensor, c: Tensor | None) -> Inputs:
        """What a layer is given that runs these steps from these states, in direction d."""
        x, sizes = self.part(self.x, start, stop), None if self.batch_sizes is None else self.batch_sizes[start:stop]
        resets, lengths, mask, noise = self.resets, self.lengths, self.mask, self.noise
        mask = None if mask is None else mask[d : d + 1, : h.shape[1]]
        noise = None if noise is None else self.part(noise, start, stop).chunk(self.directions, -1)[d]
        lengths = None if lengths is None else (lengths - start).clamp(0, stop - start)
        if resets is not None:
            resets, (h_reset, c_reset), b = self.part(resets, start, stop), self.restart, h.shape[1]
            h = torch.cat((h, h_reset[d : d + 1, :b]), 1)
            c = None if c is None or c_reset is None else torch.cat((c, c_reset[d : d + 1, :b]), 1)
        return Inputs(x, sizes, h, c, resets, lengths, mask, noise)

    def before(self, y: Tensor, h0: Tensor, start: int, stop: int, backwards: bool) -> Tensor:
        """h [1, B, R] of the rows of a segment, not the first to run, before it; y of its direction, h0 [1, B, R]."""
        previous, b = stop if backwards else start - 1, self.sizes[start]
        h = self.part(y, previous, previous + 1)
        if not self.packed:
            h = h.transpose(0, self.axis)
            return h if self.lengths is None else torch.where((previous < self.lengths)[None, :, None], h, h0)
        begun = min(b, self.sizes[previous])  # in reverse, other rows begin within the segment
        return torch.cat((h[:begun], h0[0, begun:b])).unsqueeze(0)
