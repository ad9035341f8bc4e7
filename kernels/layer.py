"""What a recurrent layer is, and what it is given: the two small objects that travel whole through operators and engines.

Letters: T steps, B rows of a batch, N rows of all steps, I input size, H hidden size, G gates, R projected size or H,
D directions, b rows of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import CELLS

States = tuple[Tensor, Tensor | None]  # h and c


class Layer(NamedTuple):
    """What a recurrent layer is, apart from its numbers, which its tensors bring along.

    Fields have defaults, so that the text of a layer stays readable when more are added.

    cell:        a key of cells.CELLS.
    directions:  1 or 2; the second runs opposite to the first.
    bias:        it has b_ih and b_hh.
    projected:   it has w_hr, which makes the output and the next state of R numbers of the cell's H.
    reverse:     the first direction runs from the last step to the first.
    batch_first: dense sequences are [B, T, ...], not [T, B, ...].
    heads:       W_hh has so many blocks on its diagonal, and no more: units see the H / heads states of their own head.
    restarts:    resets go back to other states than the layer begins with, which stand behind these: h0 and c0 have 2 * B rows.
    """

    cell: str
    directions: int = 1
    bias: bool = False
    projected: bool = False
    reverse: bool = False
    batch_first: bool = False
    heads: int = 1
    restarts: bool = False

    def text(self) -> str:
        """Write it as operators take it, and as csrc/layer.cpp reads it: "lstm directions=2 bias batch_first"."""
        numbers = ("directions", self.directions), ("heads", self.heads)
        words = [self.cell, *(f"{name}={number}" for name, number in numbers if number != 1)]
        flags = (
            ("bias", self.bias),
            ("projected", self.projected),
            ("reverse", self.reverse),
            ("batch_first", self.batch_first),
            ("restarts", self.restarts),
        )
        return " ".join(words + [name for name, has in flags if has])

    def kinds(self) -> tuple[str, ...]:
        """Names of the weights of a direction, in order: fields of `Weights`."""
        return ("w_ih", "w_hh", *("b_ih", "b_hh") * self.bias, *("w_hr",) * self.projected)

    def by_direction(self, weights: Sequence) -> list[Weights]:
        """Take a layer's weights apart, or something for each of them: torch.nn lists those of one direction after another."""
        kinds = self.kinds()
        return [Weights(**dict(zip(kinds, weights[d * len(kinds) :], strict=False))) for d in range(self.directions)]


@cache
def layer_of(text: str) -> Layer:
    """Read what `Layer.text` wrote.

    Raises:
        ValueError: there is no such cell, or a layer has no such property.
    """
    cell, *words = text.split() or [""]
    properties: dict[str, Any] = {}
    for name, sign, value in (word.partition("=") for word in words):
        if type(Layer._field_defaults.get(name)) is (int if sign else bool):
            properties[name] = int(value) if sign else True
    if cell not in CELLS or len(properties) != len(words):
        raise ValueError(f"layer: expected one of {', '.join(CELLS)}, and some of {', '.join(Layer._fields[1:])}, got {text!r}")
    return Layer(cell, **properties)


class Weights(NamedTuple):
    """The weights of a direction, their gradients, or a vector for each; None where there is none.

    w_ih [G*H, I], w_hh [G*H, R], with heads [G*H, H / heads], b_ih and b_hh [G*H], w_hr [R, H]. Of a cell with W weights of its
    own for each unit b_ih is [(G + W)*H], and these stand behind the biases.
    """

    w_ih: Any = None
    w_hh: Any = None
    b_ih: Any = None
    b_hh: Any = None
    w_hr: Any = None


class Inputs(NamedTuple):
    """What a layer is given beside its weights.

    x:           dense [T, B, I], or [B, T, I] with batch_first; or packed [N, I].
    batch_sizes: of a packed sequence, int64 [T] on the CPU: rows of each step, never increasing, sum N.
    h0:          [D, B, R], or where the layer restarts [D, 2 * B, R].
    c0:          [D, B, S*H], for cells that have states but h: S of them, side by side; 2 * B rows where the layer restarts.
    resets:      bool, a number a row of x: [T, B], [B, T] with batch_first, or packed [N]. Where it is True, the states before
                 that step, in the order of each direction, are h0 and c0, or the last B rows of these where the layer restarts.
    lengths:     of the rows of a dense sequence, int64 [B] on x's device, from 0 to T. A row has no steps past its length: y
                 is zero there, and the direction that runs backwards begins at the last step within it.
    mask:        factors [D, B, R] of the hidden state where it enters the recurrent product, the same in each step. Or
                 [D, G, B, R], where it enters each gate's, which the reference alone can do, and not with heads: the engines
                 multiply the rows of all gates with the same numbers.
    noise:       for cells that have K arguments of kind Noise, so many numbers for each unit: D * K * H for each row of x, of
                 one direction after the other. Its strides may be 0.
    """

    x: Tensor
    batch_sizes: Tensor | None
    h0: Tensor
    c0: Tensor | None
    resets: Tensor | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None
    noise: Tensor | None = None


class Outer(NamedTuple):
    """The gradients that come into a layer: of y, h_n and c_n. None stands for zeros."""

    dy: Tensor | None
    dh_n: Tensor | None
    dc_n: Tensor | None


class Needs(NamedTuple):
    """Which gradients are asked for: of x, of both initial states, of all weights."""

    dx: bool = True
    dh0: bool = True
    dw: bool = True


def initial_states(layer: Layer, inputs: Inputs) -> tuple[States, States]:
    """Return h and c of the initial states, and of those that resets go back to, each [D, B, ...]."""
    h, c = inputs.h0, inputs.c0
    if not layer.restarts:
        return (h, c), (h, c)
    (h, h_reset), (c, c_reset) = h.chunk(2, 1), (None, None) if c is None else c.chunk(2, 1)
    return (h, c), (h_reset, c_reset)


class Steps:
    """Where the rows of all steps of a sequence lie, and how many each step has.

    packed: whether rows are [N, ...], without an axis for the steps.
    axis:   the axis of a sequence that has the steps, or, where packed, all rows.
    """

    def __init__(self, layer: Layer, inputs: Inputs) -> None:
        x, self.batch_sizes, h0, _, self.resets, self.lengths, _, self.noise = inputs
        self.directions = layer.directions
        self.packed = self.batch_sizes is not None
        self.axis = 1 if layer.batch_first and not self.packed else 0
        self.steps = x.shape[self.axis] if self.batch_sizes is None else len(self.batch_sizes)
        self.batch = h0.shape[1] // 2 if layer.restarts else h0.shape[1]
        self.rows = x.shape[0] if self.packed else self.steps * self.batch

    @property  # not a cached one, which takes a lock in Python 3.11, and Dynamo does not know
    def sizes(self) -> list[int]:
        """Rows of each step [T]."""
        return [self.batch] * self.steps if self.batch_sizes is None else self.batch_sizes.tolist()

    @cached_property
    def offsets(self) -> Sequence[int]:
        """Rows of a packed sequence before each step [T + 1], otherwise just the steps' numbers."""
        return range(self.steps + 1) if self.batch_sizes is None else [0, *self.batch_sizes.cumsum(0).tolist()]

    def flat(self, sequence: Tensor) -> Tensor:
        """Return the rows of all steps [N, ...], one step after the other."""
        if self.packed:
            return sequence
        return (sequence.transpose(0, 1) if self.axis else sequence).reshape(-1, sequence.shape[-1])

    def join(self, rows: Tensor) -> Tensor:
        """Undo `flat`."""
        if self.packed:
            return rows
        rows = rows.reshape(self.steps, self.batch, -1)
        return rows.transpose(0, 1).contiguous() if self.axis else rows

    def each(self, sequence: Tensor) -> Sequence[Tensor]:
        """Return the rows [b, ...] of every step."""
        return sequence.split(self.sizes) if self.packed else sequence.unbind(self.axis)

    def gathered(self, steps: list[Tensor]) -> Tensor:
        """Undo `each`."""
        return torch.cat(steps) if self.packed else torch.stack(steps, self.axis)

    def of_each(self, rows: Tensor) -> Tensor:
        """Return rows [D, N, ...], one step after the other, as a sequence is: [D, T, B, ...], [D, B, T, ...] or packed."""
        if self.packed:
            return rows
        rows = rows.unflatten(1, (self.steps, self.batch))
        return rows.transpose(1, 2) if self.axis else rows

    def repeated(self, state: Tensor) -> Tensor:
        """Return the rows [N, ...] of a state [B, ...], for each step those that it has."""
        return torch.cat([state.narrow(0, 0, b) for b in self.sizes]) if self.packed else state.repeat(self.steps, 1)

    def noise_of(self, d: int, count: int) -> Sequence[Tensor]:
        """Return the noise of a direction, each [N, H], of a cell that has so much."""
        if self.noise is None or not count:
            return ()
        return self.flat(self.noise).chunk(self.directions, -1)[d].chunk(count, -1)

    def part(self, sequence: Tensor, start: int, stop: int) -> Tensor:
        """Return a view of the rows of these steps."""
        return sequence.narrow(self.axis, self.offsets[start], self.offsets[stop] - self.offsets[start])

    def within(self) -> Tensor | None:
        """Return which rows of all steps [N, 1] are within their lengths; None where all are."""
        if self.lengths is None:
            return None
        times = torch.arange(self.steps, device=self.lengths.device)
        return (times.unsqueeze(1) < self.lengths).reshape(-1, 1)

    def restarted(self) -> Tensor | None:
        """Return which rows of all steps [N, 1] resets are at; None where there are none."""
        return None if self.resets is None else self.flat(self.resets.unsqueeze(-1))

    def lasts(self) -> Tensor | None:
        """Return which rows of all steps [N, 1] are the last within their lengths; None where there are none."""
        if self.lengths is None:
            return None
        times = torch.arange(self.steps, device=self.lengths.device)
        return (times.unsqueeze(1) == self.lengths - 1).reshape(-1, 1)


def misfit(layer: Layer, inputs: Inputs, weights: Sequence[Tensor], layers: int = 1) -> str | None:
    """Say which tensor does not have the shape, or batch_sizes the dtype, that the others ask for; None where all fit.

    layers: so many layers stand on top of each other, of which these are the weights and the states, the lowest first.
    That batch_sizes sum up to the rows of x, and that weights are of one dtype and device, is not looked at here.
    """
    x, batch_sizes, h0, c0, resets, lengths, mask, noise = inputs
    cell, D = CELLS[layer.cell], layer.directions
    if x.dim() != (3 if batch_sizes is None else 2):
        return f"x: expected {'[T, B, I]' if batch_sizes is None else '[N, I]'}, got {tuple(x.shape)}"
    if batch_sizes is not None and (batch_sizes.dtype is not torch.int64 or batch_sizes.dim() != 1):
        return f"batch_sizes: expected int64 [T], got {batch_sizes.dtype} {tuple(batch_sizes.shape)}"
    if (c0 is not None) != (cell.states > 0):
        return f"c0: {'needed by' if cell.states else 'not an argument of'} cell {layer.cell!r}"
    if reason := misfit_of_weights(layer, weights, x.shape[-1], layers):
        return reason
    rows, width = weights[1].shape[0], weights[1].shape[1] * layer.heads
    fold = 2 if layer.restarts else 1
    batch = h0.shape[1] // fold if batch_sizes is not None and h0.dim() == 3 else x.shape[0 if layer.batch_first else 1]
    if type(batch_sizes) is Tensor and not torch.compiler.is_compiling() and int(batch_sizes[0]) != batch:
        return f"batch_sizes: expected {batch} rows in the first step, as the states have, got {int(batch_sizes[0])}"
    for name, state, size in (("h0", h0, width), ("c0", c0, rows // cell.gates * cell.states)):
        if state is not None and state.shape != (layers * D, fold * batch, size):
            return f"{name}: expected {(layers * D, fold * batch, size)}, got {tuple(state.shape)}"
    if layer.restarts and resets is None:
        return "resets: expected by a layer that restarts"
    by_gate = (D, cell.gates, batch, width) if layer.heads == 1 else None
    if mask is not None and mask.shape not in ((D, batch, width), by_gate):
        return f"mask: expected {(D, batch, width)}, got {tuple(mask.shape)}"
    if noise is not None and noise.shape != (*x.shape[:-1], D * cell.noise * (rows // cell.gates)):
        return f"noise: expected {(*x.shape[:-1], D * cell.noise * (rows // cell.gates))}, got {tuple(noise.shape)}"
    if resets is not None and (resets.dtype is not torch.bool or resets.shape != x.shape[:-1] or resets.device != x.device):
        axes = "[N]" if batch_sizes is not None else "[B, T]" if layer.batch_first else "[T, B]"
        return f"resets: expected bool {axes}, {_described(x.shape[:-1], x)}, got {_described(resets.shape, resets, True)}"
    return None if lengths is None else _misfit_of_lengths(lengths, x, batch_sizes, batch, x.shape[layer.batch_first])


def _misfit_of_lengths(lengths: Tensor, x: Tensor, batch_sizes: Tensor | None, batch: int, steps: int) -> str | None:
    """Say what is wrong with the lengths of rows; with the numbers only where nothing has to be waited for."""
    if batch_sizes is not None:
        return f"lengths: expected None with packed input, which has its own, got {_described(lengths.shape, lengths, True)}"
    if lengths.dtype is not torch.int64 or lengths.shape != (batch,) or lengths.device != x.device:
        return f"lengths: expected int64 [B], {_described((batch,), x)}, got {_described(lengths.shape, lengths, True)}"
    if type(lengths) is not Tensor or not lengths.is_cpu or torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active() or not batch:
        return None
    least, most = (int(bound) for bound in lengths.aminmax())
    if least < 0 or most > steps:
        return f"lengths: expected numbers from 0 to {steps}, the steps of the input, got {least if least < 0 else most}"
    return None


def _described(shape: Sequence[int], tensor: Tensor, dtype: bool = False) -> str:
    return f"{f'{tensor.dtype} ' * dtype}{tuple(shape)} on {tensor.device}"


def misfit_of_weights(layer: Layer, weights: Sequence[Tensor], input_size: int, layers: int = 1) -> str | None:
    """Say which weight does not have the shape that the layer and the others ask for; None where all fit. As in `misfit`."""
    cell, D, kinds = CELLS[layer.cell], layer.directions, layer.kinds()
    if layer.projected and (cell.reads_hidden or not cell.states):
        return f"w_hr: cell {layer.cell!r} has no projection"
    if layer.projected and layer.heads > 1:
        return f"w_hr: a layer of {layer.heads} heads has no projection"
    if len(weights) != layers * D * len(kinds):
        return f"weights: expected {len(kinds)} for each of {layers} layers and {D} directions, got {len(weights)}"
    if weights[1].dim() != 2:
        return f"w_hh: expected [G * H, R], got {tuple(weights[1].shape)}"
    (rows, of_head), heads = weights[1].shape, layer.heads
    hidden, width = rows // cell.gates, of_head * heads
    if heads < 1 or hidden * cell.gates != rows or (width != hidden and not layer.projected):
        columns = "R" if layer.projected else "H" if heads == 1 else f"H / {heads}"
        return f"w_hh: expected {cell.gates} * H rows and {columns} columns, got {(rows, of_head)}"
    if cell.weights and not layer.bias:
        return f"b_ih: needed by cell {layer.cell!r}, whose own weights stand behind the biases"
    biases = [(rows + cell.weights * hidden,), (rows,)]
    expected: list[tuple[int, ...]] = [(rows, input_size), (rows, of_head), *biases * layer.bias]
    expected += [(width, hidden)] * layer.projected
    for index, weight in enumerate(weights):
        if index == D * len(kinds):
            expected[0] = rows, D * width
        if weight.shape != expected[index % len(kinds)]:
            return f"{kinds[index % len(kinds)]}: expected {expected[index % len(kinds)]}, got {tuple(weight.shape)}"
    return None
