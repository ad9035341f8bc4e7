"""The raw layer ops on a GPU: buffers, the products outside the scan (torch's), and the scan's launches.

Letters as in fastrnn/ops.py; N rows of the sequence, P pre-activations of a unit. Inside, sequences are step-major.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS, Cell
from ..layer import Inputs, Layer, Needs, Outer, Steps, layer_of
from . import DTYPES, device_of, meetings_of, sizes_of, tape
from . import backward as backward_kernels
from . import forward as forward_kernels
from .cell import PLAIN, PTX, bound
from .launch import Distance, Kernel, Launches, alarm
from .packed import rows_of_steps
from .plan import COOPERATIVE, Device, Plan, choose, stacked
from .precision import precision_of, products_in
from .rows import Reach, sets


class Call:
    """Sizes of a call, and what both passes derive from its arguments.

    Of layers that run at once, inputs has the states [layers, B, ...] and weights those of one layer after another. What a
    direction has of its own, each of these layers has, too: both are sides.

    run: what becomes of the launches, in their order; None starts them.
    """

    def __init__(
        self, layer: Layer, inputs: Inputs, weights: Sequence[Tensor], run: Callable[[Launches], object] | None = None
    ) -> None:
        self.layer, self.inputs, self.run, x = layer, inputs, run, inputs.x
        if x.dtype not in DTYPES:
            raise RuntimeError(f"fastrnn: the Triton engine takes {', '.join(map(str, DTYPES))}, got {x.dtype}")
        self.cell: Cell = CELLS[layer.cell]
        self.ptx = x.is_cuda and not torch.version.hip
        self.x, self.dtype, self.device = x, x.dtype, x.device
        self.sides, self.B, self.R = inputs.h0.shape
        self.D, self.heads = layer.directions, layer.heads
        self.layers = self.sides // self.D
        self.H, self.I, self.steps = weights[0].shape[0] // self.cell.gates, x.shape[-1], Steps(layer, inputs)
        self.T, self.N, self.packed = self.steps.steps, self.steps.rows, self.steps.packed
        self.batch_first = self.steps.axis == 1
        self.slots = (self.cell.slots + layer.projected) * self.H  # row width of `saved`
        self.nothing = _nothing(self.dtype, self.device)
        each = len(weights) // self.sides
        self.w_ih = weights[::each]
        self.matrices = self.apart("w_hh", weights[1::each])
        self.matrices |= self.apart("w_hr", weights[each - 1 :: each] if layer.projected else ())
        self.b_ih, self.b_hh = (weights[2::each], weights[3::each]) if layer.bias else ((), ())
        self.lengths = self.offsets = self.nothing
        if inputs.batch_sizes is not None:
            self.lengths, self.offsets = rows_of_steps(inputs.batch_sizes, self.B, self.N, self.device)
        self.ragged = inputs.lengths is not None
        if inputs.lengths is not None:
            self.lengths = inputs.lengths.contiguous()
        self.resets = self.nothing if inputs.resets is None else inputs.resets.contiguous().view(torch.uint8)
        self.masked, self.mask = inputs.mask is not None, self.nothing
        if inputs.mask is not None:
            self.mask = inputs.mask.to(self.dtype).contiguous()
        self.noise = self._noise_of_steps(inputs.noise)
        self.dc_steps: Tensor | None = None  # of backward

    def chosen(self, forward: bool) -> tuple[Plan, str]:
        """Plan and precision of a pass."""
        precision, device = precision_of(self.dtype), device_of(self.device)
        sizes = self.T, self.B, self.H, self.R
        return _chosen(self.layer, sizes, self.dtype, device, forward, precision, self.layers)

    def _noise_of_steps(self, noise: Tensor | None) -> dict[str, Any]:
        """The cell's noise, and how many numbers its steps and its rows are apart."""
        if (noise is not None) != (self.cell.noise > 0):
            raise RuntimeError(f"fastrnn: {self.cell.name} {'needs' if self.cell.noise else 'takes no'} noise")
        if noise is None:
            return {"noise": self.nothing, "noise_t": 0, "noise_b": 0}
        noise = noise.to(self.dtype)
        if noise.stride(-1) != 1:
            noise = noise.contiguous()
        of_rows, of_steps = noise.stride(1 - self.steps.axis), noise.stride(self.steps.axis)
        return {"noise": noise, "noise_t": of_steps, "noise_b": of_steps if self.packed else of_rows}

    def rows_made(self, *shape: int) -> Tensor:
        """Make a tensor of x's dtype with something for each row of x: zeros where rows past their lengths are not written."""
        return self.x.new_zeros(shape) if self.ragged else self.x.new_empty(shape)

    def below(self) -> Tensor:
        """Make room for the outputs of layers that run at once, but for those of the highest: [layers - 1, ...], as x is."""
        return self.rows_made(self.layers - 1, *self.x.shape[:-1], self.R)

    def input_weights(self, side: int) -> Tensor:
        """w_ih [G*H, I] of a side, gates in the order of the cell's arguments."""
        return _gates_in(self.cell.input, self.w_ih[side])

    def apart(self, name: str, own: Sequence[Tensor]) -> dict[str, Any]:
        """The weights of the first side, and how many numbers further those of each next one are.

        Nothing is copied where these lie equally far apart, as two always do, and those of layers in the one piece of memory
        that torch.nn makes for cuDNN.
        """
        if len(own) < 2:
            return {name: own[0].contiguous() if own else self.nothing, f"{name}_step": 0}
        own = [weight.contiguous() for weight in own]
        first = own[0]
        if first.is_meta:
            return {name: first, f"{name}_step": 0}
        steps = {after.data_ptr() - before.data_ptr() for before, after in pairwise(own)}
        if len(steps) > 1:
            return {name: torch.cat(own), f"{name}_step": first.numel()}
        return {name: first, f"{name}_step": Distance(own)}

    def biases(self) -> dict[str, Any]:
        """Both, likewise."""
        return self.apart("b_ih", self.b_ih) | self.apart("b_hh", self.b_hh)

    def own_weights(self) -> dict[str, Any]:
        """The cell's own, behind b_ih, likewise."""
        return self.apart("b_ih", self.b_ih if self.cell.weights else ())

    def kernels(self, forward: bool, save: bool, plan: Plan, precision: str, aligned: bool = False) -> dict[str, Kernel]:
        """The scan of a pass: its kernel, or that of each of its phases."""
        marks = self.packed, self.ragged, self.inputs.resets is not None, self.masked, self.dc_steps is not None
        sizes = self.layers, self.H, self.R
        own = _Compiled(self.layer, *sizes, self.dtype, self.device, self.ptx, *marks, forward, save, aligned)
        return _kernels(own, plan.tiles, precision)

    def _moments(self, plan: Plan, sets: int) -> Tensor:
        """Where the programs of a persistent launch exchange the moments of so many sets of their units' values."""
        if not sets:
            return self.nothing
        size = plan.groups * self.D * sets * 2 * plan.blocks * self.heads * plan.rows
        return torch.empty(size, dtype=torch.float32, device=self.device)

    def start(self, plan: Plan, kernels: dict[str, Kernel], arguments: dict[str, Any], steps: int) -> None:
        """Launch a scan: once for all steps, once for each range of rows, or once for each step and phase."""
        arguments |= {"T": self.T, "B": self.B, "N": self.N}
        groups, sides = -(-self.B // plan.rows), self.sides * self.heads
        if plan.schedule == "single":
            self.launch(Launches([kernels["both"]], (sides * groups,), arguments, steps))
        elif plan.schedule in COOPERATIVE:
            waves = -(-groups // plan.groups)
            counters = torch.zeros((waves, plan.groups * sides, 16), dtype=torch.int64, device=self.device)
            arguments["gave_up"] = alarm(self.device).word
            arguments["moments"] = self._moments(plan, kernels["both"].constants["SETS"])
            for wave in range(waves):
                of_wave = {"counters": counters[wave] if waves > 1 else counters, "first_row": wave * plan.groups * plan.rows}
                grid = (plan.blocks * sides * min(plan.groups, groups - wave * plan.groups),)
                self.launch(Launches([kernels["both"]], grid, arguments | of_wave, steps))
        else:
            nobody = _nothing(torch.int64, self.device)
            arguments |= {"counters": nobody, "gave_up": nobody, "moments": self.nothing, "first_row": 0}
            self.launch(Launches([*kernels.values()], (plan.blocks * sides * groups,), arguments, steps, each=True))

    def launch(self, launches: Launches) -> None:
        """Start kernels, or hand them to whoever wants them."""
        if self.run is None:
            launches.start()
        else:
            self.run(launches)


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where there is nothing to point to."""
    return torch.empty(0, dtype=dtype, device=device)


@lru_cache(4096)
def _chosen(
    layer: Layer,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: Device,
    forward: bool,
    precision: str,
    layers: int,
) -> tuple[Plan, str]:
    return choose(device, replace(sizes_of(layer, *sizes, dtype, precision), layers=layers), forward), precision


class _Compiled(NamedTuple):
    """What the kernels of a pass are compiled for, beside its plan. Letters as in `Call`.

    dtype: of the layer's tensors, on which those of the others depend.
    """

    layer: Layer
    layers: int
    H: int
    R: int
    dtype: torch.dtype
    device: torch.device
    ptx: bool
    packed: bool
    ragged: bool
    resets: bool
    masked: bool
    dc_steps: bool
    forward: bool
    save: bool
    aligned: bool


@lru_cache(1024)
def _kernels(own: _Compiled, tiles: tuple, precision: str) -> dict[str, Kernel]:
    """The kernels of a pass by phase, with all that they are compiled for."""
    layer, cell, functions = own.layer, CELLS[own.layer.cell], PTX if own.ptx else PLAIN
    schedule, units, outputs, rows, blocks, warps, registers, chunk, split, resident, stages, diagonal, span, feed = tiles
    alone = schedule == "single"
    reach = Reach(own.H // layer.heads, layer.heads, units, rows, 0 if alone else blocks) if cell.reduces else None
    constants = {
        "CELL": bound(cell, functions, own.forward, reach),
        "GATES": cell.gates,
        "PADDED": stacked(cell.gates),
        "HIDDEN": cell.hidden,
        "STATES": cell.states,
        "READS": int(cell.reads_hidden),
        "WEIGHTS": cell.weights,
        "NOISE": cell.noise,
        "KEPT": cell.kept,
        "SLOTS": cell.slots,
        "D": layer.directions,
        "HEADS": layer.heads,
        "H": own.H,
        "R": own.R,
        "PACKED": own.packed,
        "RAGGED": own.ragged,
        "RESETS": own.resets,
        "MASKED": own.masked,
        "BATCH_FIRST": layer.batch_first and not own.packed,
        "REVERSE": layer.reverse,
        "PROJECTED": layer.projected,
        "UNITS": units,
        "OUTPUTS": outputs,
        "ROWS": rows,
        "PRECISION": precision,
    }
    slots = (cell.slots + layer.projected) * own.H
    if own.forward:
        width = max(cell.gates * own.H, slots if own.save else 0)
        constants |= {"INPUT": cell.input, "W": width, "BIAS": layer.bias, "SAVE": own.save}
    else:
        constants |= {"OUTPUT": cell.derived.reads_output, "W": slots, "DC_STEPS": own.dc_steps}
    options: dict[str, Any] = {"num_warps": warps, "num_stages": 1}
    if registers:
        options["maxnreg"] = registers
    if alone:
        kernel = forward_kernels.single_forward if own.forward else backward_kernels.single_backward
        return {"both": Kernel(kernel, constants, options)}
    constants |= {
        "BLOCKS": blocks,
        "BK": chunk,
        "SPLIT": split,
        "RESIDENT": resident,
        "STAGES": stages,
        "SYNC": schedule in COOPERATIVE,
        "LAYERS": own.layers,
        "SPAN": span,
        "FEED": feed,
        "MEETINGS": meetings_of(cell)[not own.forward],
        "SETS": sets(cell, own.forward),
    }
    constants |= {"ALIGNED": own.aligned} if own.forward else {"DIAGONAL": diagonal}
    phases: tuple[str, ...] = ("both",)
    if schedule in COOPERATIVE:
        options["launch_cooperative_grid"] = True
    elif layer.projected:
        phases = ("gates", "project") if own.forward else ("state", "cell")
    kernel = forward_kernels.scan_forward if own.forward else backward_kernels.scan_backward
    return {phase: Kernel(kernel, constants | {"PHASE": phase}, options) for phase in phases}


def layer_forward(x, batch_sizes, h0, c0, weights, text, save, *more):
    """The op's implementation, on x's device and its current stream. more: the other fields of Inputs."""
    given = *Inputs(x, batch_sizes, h0, c0, *more), *weights

    def run(call: Call) -> Sequence[Tensor]:
        return forward(call, save, *call.chosen(forward=True))

    y, h_n, c_n, saved = _run(f"{text} forward{' saved' * save}", given, text, run)
    return y, h_n, c_n, saved


def layer_backward(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, saved, text, needs, *more, dc_steps=None):
    """The op's implementation, likewise; and with dc_steps, gradients [D, N, S * H] of the states but h after each step."""
    given = *Inputs(x, batch_sizes, h0, c0, *more), *weights

    def run(call: Call, y: Tensor, saved: Tensor, *outer: Tensor | None) -> Sequence[Tensor]:
        call.dc_steps = outer[3] if len(outer) > 3 else None
        *of_inputs, dw = backward(call, Outer(*outer[:3]), y, saved, Needs(*needs), *call.chosen(forward=False))
        return *of_inputs, *dw

    name = f"{text} backward{''.join(str(int(need)) for need in needs)}"
    outer = (dy, dh_n, dc_n) if dc_steps is None else (dy, dh_n, dc_n, dc_steps)
    dx, dh0, dc0, *dw = _run(name, given, text, run, (y, saved, *outer))
    return dx, dh0, dc0, dw


def _run(
    name: str,
    given: Sequence[Tensor | None],
    text: str,
    run: Callable[..., Sequence[Tensor]],
    more: Sequence[Tensor | None] = (),
) -> Sequence[Tensor]:
    """A pass of a layer, by a tape where there is one. given: its inputs and weights, and more tensors for `run`."""
    device = given[0].device  # type: ignore[union-attr]  # x is there
    alarm(device).check()

    def by_python(tensors: Sequence[Any], launch: Callable[[Launches], object] | None) -> Sequence[Tensor]:
        of_inputs = len(Inputs._fields)
        with _current(device):
            call = Call(layer_of(text), Inputs(*tensors[:of_inputs]), tensors[of_inputs : len(given)], launch)
            return run(call, *tensors[len(given) :])

    return tape.played(name, (*given, *more), by_python, alarm(device).address)


def layers_forward(x, batch_sizes, h0, c0, weights, text, save, resets=None, lengths=None):
    """`layer_forward` of layers of one direction that run at once: h0 and c0 have the states of each, and so do the results.

    The last result is what `layers_backward` takes as `below`, the outputs of all layers but the highest.
    """
    given = *Inputs(x, batch_sizes, h0, c0, resets, lengths), *weights

    def run(call: Call) -> Sequence[Tensor]:
        below = call.below()
        return *forward(call, save, *call.chosen(forward=True), below), below

    return _run(f"{text} layers forward{' saved' * save}", given, text, run)


def layers_backward(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, saved, below, text, needs, resets=None, lengths=None):
    """`layer_backward` of such layers."""
    given = *Inputs(x, batch_sizes, h0, c0, resets, lengths), *weights

    def run(call: Call, y: Tensor, saved: Tensor, below: Tensor, *outer: Tensor | None) -> Sequence[Tensor]:
        *of_inputs, dw = backward(call, Outer(*outer), y, saved, Needs(*needs), *call.chosen(forward=False), below)
        return *of_inputs, *dw

    name = f"{text} layers backward{''.join(str(int(need)) for need in needs)}"
    dx, dh0, dc0, *dw = _run(name, given, text, run, (y, saved, below, dy, dh_n, dc_n))
    return dx, dh0, dc0, dw


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a device the current one, on which Triton launches; most often it is."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _AS_IT_IS
    return torch.cuda.device(device)


_AS_IT_IS = contextlib.nullcontext()


def forward(call: Call, save: bool, plan: Plan, precision: str, below: Tensor | None = None):
    """y, h_n, c_n, saved; into `below` [layers - 1, ...] the outputs of all layers but the highest, see `Call.below`."""
    (x, _, h0, c0, *_), width = call.inputs, call.cell.gates * call.H
    # the projected input; the cell's slots are written over it
    kept = x.new_empty(call.sides, call.N, max(width, call.slots if save else 0))
    rows = call.steps.flat(x)
    with products_in(call.dtype, precision):
        for d in range(call.D):
            projected = kept.as_strided((call.N, width), (kept.shape[2], 1), d * kept[0].numel() if d else 0)
            torch.mm(rows, call.w_ih[d].t(), out=projected)
    h0 = h0.contiguous()
    y = call.rows_made(*x.shape[:-1], call.D * call.R)
    h_n = h0.clone() if call.ragged else x.new_empty((call.sides, call.B, call.R))
    states = [state for state in (c0, h0 if call.cell.reads_hidden else None) if state is not None]
    carry = _side_by_side(states) if states else call.nothing
    out = x.new_empty(call.D, call.B, call.H) if call.layer.projected and not save else call.nothing
    fed_by_scan = call.masked and plan.schedule != "single"
    arguments = {
        "kept": kept,
        "y": y,
        "ys": call.nothing if below is None else below,
        "out": out,
        "h0": h0 * call.mask if fed_by_scan else h0,
        "start": call.nothing if call.inputs.resets is None else carry.clone(),
        "carry": carry,
        "h_n": h_n,
        "lengths": call.lengths,
        "offsets": call.offsets,
        "resets": call.resets,
        "mask": call.mask,
        "fed": x.new_empty(2, call.sides, call.B, call.R) if fed_by_scan else call.nothing,
        **call.noise,
        **call.matrices,
        **call.apart("w_ih", call.w_ih[call.D :]),
        **call.biases(),
    }
    aligned = (call.R // call.heads * x.element_size()) % 16 == 0 and h0.data_ptr() % 16 == 0
    call.start(plan, call.kernels(True, save, plan, precision, aligned), arguments, call.T)
    c_n = call.nothing if c0 is None else _rounded(carry, c0.shape[-1], x.dtype)
    if not save:
        return y, h_n, c_n, call.nothing
    return y, h_n, c_n, kept if call.slots else x.new_empty(call.sides, call.N, 0)


def backward(
    call: Call, outer: Outer, y: Tensor, saved: Tensor, needs: Needs, plan: Plan, precision: str, below: Tensor | None = None
):
    """dx, dh0, dc0, and a list of dw. below: as `forward` filled it."""
    (x, _, h0, c0, *_), (dy, dh_n, dc_n), cell = call.inputs, outer, call.cell
    below = call.nothing if below is None else below
    sides, B, N, H, R, gates = call.sides, call.B, call.N, call.H, call.R, cell.gates
    da = call.rows_made(sides, N, cell.preactivations * H)
    dp = call.rows_made(sides, N, R) if call.layer.projected else call.nothing
    h0, y = h0.contiguous(), y.contiguous()
    dh_n = torch.zeros_like(h0) if dh_n is None else dh_n.contiguous()
    dh0 = dh_n.clone() if call.ragged else x.new_empty((sides, B, R))  # where a row has no steps
    # gradients of states and of the cell's own weights, and in a scan of h element by element
    of_states, in_scan = cell.states * H, plan.schedule != "single"
    width = of_states + (cell.weights + (cell.reads_hidden and in_scan)) * H
    carry = call.nothing
    if of_states and of_states == width and dc_n is not None:
        carry = _side_by_side([dc_n])
    elif width:
        carry = torch.zeros((sides, B, width), dtype=torch.float32, device=x.device)
        if of_states and dc_n is not None:
            carry[..., :of_states] = dc_n
    arguments = {
        "saved": saved.contiguous(),
        "y": y,
        "ys": below,
        "dy": torch.zeros_like(y) if dy is None else dy.contiguous(),
        "dys": torch.empty_like(below),
        "da": da,
        "dp": dp,
        "h0": h0,
        "c0": call.nothing if c0 is None else c0.contiguous(),
        "dh_n": dh_n,
        "dh0": dh0,
        "carry": carry,
        "lengths": call.lengths,
        "offsets": call.offsets,
        "resets": call.resets,
        "mask": call.mask,
        "dc_steps": call.nothing if call.dc_steps is None else call.dc_steps.contiguous(),
        **call.noise,
        **call.matrices,
        **call.apart("w_ih", [call.input_weights(side) for side in range(call.D, sides)]),
        **call.own_weights(),
    }
    summed, nothing = call.inputs.resets is not None and in_scan, call.nothing
    arguments["sums_h"] = torch.zeros_like(h0, dtype=torch.float32) if summed else nothing
    arguments["sums_c"] = h0.new_zeros((sides, B, of_states), dtype=torch.float32) if summed and of_states else nothing
    call.start(plan, call.kernels(False, True, plan, precision), arguments, call.T + 1)
    dc0 = nothing
    if needs.dh0 and of_states:
        if summed:
            carry[..., :of_states] += arguments["sums_c"]
        dc0 = _rounded(carry, of_states, x.dtype)
    d_input = d_hidden = da.unbind()
    if cell.hidden:
        d_input, d_hidden = da[..., : gates * H].unbind(), da[..., cell.hidden * H :].unbind()
    of_weights = carry[..., of_states : of_states + cell.weights * H] if cell.weights else nothing
    with products_in(call.dtype, precision):
        dx = _input_gradient(call, d_input) if needs.dx else nothing
        dw = _weight_gradients(call, d_input, d_hidden, of_weights, dp, [*below, y], h0, saved) if needs.dw else []
    return dx, dh0 if needs.dh0 else nothing, dc0, dw


def _side_by_side(states: list[Tensor]) -> Tensor:
    """States [D, B, ...] in float32 and memory of their own, which a scan writes over."""
    if len(states) > 1:
        return torch.cat([state.float() for state in states], -1)
    (state,) = states
    if state.dtype is torch.float32 and state.is_contiguous():
        return state.clone()
    return state.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _rounded(carry: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The first numbers of what a scan has left, contiguous."""
    carry = carry if carry.shape[-1] == width else carry[..., :width].contiguous()
    return carry if dtype is torch.float32 else carry.to(dtype)


def _input_gradient(call: Call, d_input: Sequence[Tensor]) -> Tensor:
    dx = torch.mm(d_input[0], call.input_weights(0))
    for d in range(1, call.D):
        dx.addmm_(d_input[d], call.input_weights(d))
    if call.batch_first:
        return dx.view(call.T, call.B, call.I).transpose(0, 1).contiguous()
    return dx.view(call.x.shape)


def _weight_gradients(call: Call, d_input, d_hidden, of_weights, dp, ys: Sequence[Tensor], h0, saved) -> list[Tensor]:
    """Of each weight, in the order of the weights, each in memory of its own. d_input, d_hidden: of each side [N, G*H].

    of_weights: of the cell's own weights, the sums over a row's steps [sides, B, W*H], float32.
    ys: of each layer.
    """
    cell, H = call.cell, call.H
    order = [cell.input.index(gate) for gate in range(cell.gates)]  # torch's gates among the cell's arguments
    given, grads = [call.steps.flat(each) for each in (call.x, *ys[:-1])], []
    given[0] = _within(call, given[0])
    for d in range(call.sides):
        layer, direction = divmod(d, call.D)
        w_hh, rows = call.x.new_empty((cell.gates * H, call.R // call.heads)), given[layer]
        _hidden_weight_gradient(call, direction, d_hidden[d], ys[layer], h0 if call.sides == 1 else h0[d], w_hh)
        grads += [_gates_in(order, torch.mm(d_input[d].t(), rows)), w_hh]
        if call.layer.bias:
            b_ih = d_input[d].sum(0)
            b_hh = d_hidden[d].sum(0) if cell.hidden else b_ih.clone()
            b_ih = _gates_in(order, b_ih)
            grads += [torch.cat([b_ih, of_weights[d].sum(0).to(b_ih.dtype)]) if cell.weights else b_ih, b_hh]
        if call.layer.projected:
            grads.append(torch.mm(dp[d].T, _within(call, saved[d][:, -H:])))
    return grads


def _within(call: Call, rows: Tensor) -> Tensor:
    """rows [N, W] of all steps with zeros past their lengths, where anything may stand: zero times it is not always zero."""
    if not call.ragged:
        return rows
    within, (N, W) = torch.empty_like(rows, memory_format=torch.contiguous_format), rows.shape
    kernel = _rows_within(call.device, call.dtype, W, rows.stride(0))
    grid = -(-N // kernel.constants["ROWS"]), -(-W // kernel.constants["COLUMNS"])
    call.launch(Launches([kernel], grid, {"within": within, "given": rows, "lengths": call.lengths, "N": N, "B": call.B}))
    return within


def _hidden_weight_gradient(call: Call, d: int, da: Tensor, y: Tensor, h0: Tensor, dw: Tensor) -> None:
    """dw [G*H, R / heads], out: the sum over steps of da^T [G*H, rows] with h [rows, R] as it entered the product of each.

    h0 [B, R], or [1, B, R].
    """
    B, N, R, resets = call.B, call.N, call.R, call.inputs.resets is not None
    backwards = call.layer.reverse != (d == 1)
    if not (call.packed or call.batch_first or call.ragged or resets or call.masked):  # that is y, a step later
        later = N - B
        _product_of_heads(call.heads, dw, da.narrow(0, later if backwards else 0, B), h0.view(B, R))
        if call.T > 1:
            first = y.storage_offset() + d * R + (B * call.D * R if backwards else 0)
            states = y.as_strided((later, R), (call.D * R, 1), first)
            _product_of_heads(call.heads, dw, da.narrow(0, 0 if backwards else B, later), states, add=True)
        return
    before = call.rows_made(N, R)
    blocks = -(-B // 16)
    arguments = {
        "before": before,
        "y": y,
        "h0": h0,
        "lengths": call.lengths,
        "offsets": call.offsets,
        "resets": call.resets,
        "mask": call.mask[d] if call.masked else call.mask,
        "T": call.T,
        "B": B,
        "blocks": blocks,
        "d": d,
    }
    marks = call.packed, call.ragged, resets, call.masked
    kernel = _states_before(call.device, call.dtype, call.layer, R, marks, backwards)
    grid = call.T * blocks, -(-R // kernel.constants["COLUMNS"])
    call.launch(Launches([kernel], grid, arguments))
    _product_of_heads(call.heads, dw, da, before)


def _product_of_heads(heads: int, dw: Tensor, da: Tensor, states: Tensor, add: bool = False) -> None:
    """dw [G*H, R / heads], out: the product of da^T [G*H, rows] with states [rows, R], each head's rows with its columns."""
    if heads == 1:
        dw.addmm_(da.t(), states, beta=int(add))
        return
    width = dw.shape[1]
    by_head = states.unflatten(1, (heads, width)).transpose(0, 1)  # [heads, rows, R / heads]
    for own, grads in zip(dw.split(heads * width), da.split(heads * width, 1), strict=True):  # of each gate
        own.view(heads, width, width).baddbmm_(grads.unflatten(1, (heads, width)).permute(1, 2, 0), by_head, beta=int(add))


@lru_cache(1024)
def _states_before(
    device: torch.device, dtype: torch.dtype, layer: Layer, R: int, marks: tuple[bool, bool, bool, bool], backwards: bool
) -> Kernel:
    """The kernel, on a device and of a dtype: it compiles another one for each. marks: PACKED, RAGGED, RESETS, MASKED."""
    packed, ragged, resets, masked = marks
    constants = {
        "D": layer.directions,
        "R": R,
        "PACKED": packed,
        "RAGGED": ragged,
        "RESETS": resets,
        "MASKED": masked,
        "BATCH_FIRST": layer.batch_first and not packed,
        "BACKWARDS": backwards,
        "ROWS": 16,
        "COLUMNS": _columns(R),
    }
    return Kernel(backward_kernels.states_before, constants, {"num_warps": 4})


@lru_cache(1024)
def _rows_within(device: torch.device, dtype: torch.dtype, W: int, step: int) -> Kernel:
    """The kernel, likewise."""
    constants = {"W": W, "STEP": step, "ROWS": 16, "COLUMNS": _columns(W)}
    return Kernel(backward_kernels.rows_within, constants, {"num_warps": 4})


def _columns(width: int) -> int:
    """Of a row, so many as a program copies."""
    return min(128, max(16, 1 << (width - 1).bit_length()))


def _gates_in(order: Sequence[int], w: Tensor) -> Tensor:
    """w [G*H, ...], its gates in another order."""
    if list(order) == list(range(len(order))):
        return w
    gates = w.chunk(len(order))
    return torch.cat([gates[gate] for gate in order])  # an index list would be copied from the CPU
