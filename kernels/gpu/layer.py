"""The raw layer ops on a GPU: buffers, the products outside the scan (torch's), and the scan's launches.

Letters as in fastrnn/ops.py; N rows of the sequence, P pre-activations of a unit. Inside, sequences are step-major.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS, Cell
from ..layer import Inputs, Layer, Needs, Outer, Steps, layer_of
from . import DTYPES, device_of, sizes_of
from . import backward as backward_kernels
from . import forward as forward_kernels
from .cell import PLAIN, PTX, bound
from .launch import Launch, alarm
from .plan import Plan, choose, stacked
from .precision import precision_of, products_in


class Call:
    """Sizes of a call, and what both passes derive from its arguments.

    run: what becomes of the launches, in their order.
    """

    def __init__(
        self, layer: Layer, inputs: Inputs, weights: Sequence[Tensor], run: Callable[[Launch], object] = Launch.run
    ) -> None:
        self.layer, self.inputs, self.run, x = layer, inputs, run, inputs.x
        if x.dtype not in DTYPES:
            raise RuntimeError(f"fastrnn: the Triton engine takes {', '.join(map(str, DTYPES))}, got {x.dtype}")
        self.cell: Cell = CELLS[layer.cell]
        self.cells = PTX if x.is_cuda and not torch.version.hip else PLAIN
        self.x, self.dtype, self.device = x, x.dtype, x.device
        self.D, self.B, self.R = inputs.h0.shape
        self.heads = layer.heads
        self.H, self.I, self.steps = weights[0].shape[0] // self.cell.gates, x.shape[-1], Steps(layer, inputs)
        self.T, self.N, self.packed = self.steps.steps, self.steps.rows, self.steps.packed
        self.batch_first = self.steps.axis == 1
        self.slots = (self.cell.slots + layer.projected) * self.H  # row width of `saved`
        nothing, own = x.new_empty(0), layer.by_direction(weights)
        self.w_ih = [direction.w_ih for direction in own]
        self.w_hh, self.w_hr, self.b_ih, self.b_hh = (
            nothing if kind[0] is None else _stack(kind)
            for kind in zip(*((each.w_hh, each.w_hr, each.b_ih, each.b_hh) for each in own), strict=True)
        )
        self.nothing = nothing
        self.lengths, self.offsets = self._rows_of_steps(inputs.batch_sizes)
        self.ragged = inputs.lengths is not None
        if inputs.lengths is not None:
            self.lengths = inputs.lengths
        self.resets = nothing if inputs.resets is None else inputs.resets.contiguous().view(torch.uint8)

    def chosen(self, forward: bool) -> tuple[Plan, str]:
        """Plan and precision of a pass."""
        sizes = sizes_of(self.layer, self.T, self.B, self.H, self.R, self.dtype)
        return choose(device_of(self.device), sizes, forward), precision_of(self.dtype)

    def _rows_of_steps(self, batch_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Steps of each row [B] and rows before each step [T], int64, on the device by one copy."""
        if batch_sizes is None:
            return self.nothing, self.nothing
        if bool((batch_sizes.diff() > 0).any()) or int(batch_sizes[-1]) <= 0:
            raise RuntimeError("fastrnn: batch_sizes must be positive and not increase")
        if int(batch_sizes[0]) != self.B or int(batch_sizes.sum()) != self.N:
            raise RuntimeError("fastrnn: batch_sizes do not fit x or the states")
        offsets = batch_sizes.cumsum(0) - batch_sizes
        lengths = self.T - torch.searchsorted(batch_sizes.flip(0), torch.arange(self.B), right=True)
        both = torch.cat((lengths, offsets))
        if self.device.type == "cuda":
            both = both.pin_memory().to(self.device, non_blocking=True)
        return both[: self.B], both[self.B :]

    def rows_made(self, *shape: int) -> Tensor:
        """Make a tensor of x's dtype with something for each row of x: zeros where rows past their lengths are not written."""
        return self.x.new_zeros(shape) if self.ragged else self.x.new_empty(shape)

    def input_weights(self, d: int) -> Tensor:
        """w_ih [G*H, I] of a direction, gates in the order of the cell's arguments."""
        return _gates_in(self.cell.input, self.w_ih[d])

    def constants(self, plan: Plan, precision: str) -> dict[str, Any]:
        """Compile-time arguments that both passes share."""
        cell = self.cell
        constants = {
            "GATES": cell.gates,
            "PADDED": stacked(cell.gates),
            "HIDDEN": cell.hidden,
            "STATES": cell.states,
            "READS": int(cell.reads_hidden),
            "WEIGHTS": cell.weights,
            "KEPT": cell.kept,
            "SLOTS": cell.slots,
            "D": self.D,
            "HEADS": self.heads,
            "H": self.H,
            "R": self.R,
            "PACKED": self.packed,
            "RAGGED": self.ragged,
            "RESETS": self.inputs.resets is not None,
            "BATCH_FIRST": self.batch_first,
            "REVERSE": self.layer.reverse,
            "PROJECTED": self.layer.projected,
            "UNITS": plan.units,
            "OUTPUTS": plan.outputs,
            "ROWS": plan.rows,
            "PRECISION": precision,
        }
        if plan.schedule != "single":
            constants |= {
                "BLOCKS": plan.blocks,
                "BK": plan.chunk,
                "SPLIT": plan.split,
                "RESIDENT": plan.resident,
                "STAGES": plan.stages,
                "SYNC": plan.schedule == "persistent",
            }
        return constants

    def launches(
        self, plan: Plan, single, scan, arguments: dict[str, Any], steps: int, phases: Sequence[str]
    ) -> Iterator[Launch]:
        """The launches of a pass, in order: one for all steps, one for each range of rows, or one for each step and phase."""
        options: dict[str, Any] = {"num_warps": plan.warps, "num_stages": 1}
        if plan.registers:
            options["maxnreg"] = plan.registers
        sizes, sides = {"T": self.T, "B": self.B, "N": self.N}, self.D * self.heads
        blocks_of_rows = -(-self.B // plan.rows)
        if plan.schedule == "single":
            yield Launch(single, (sides * blocks_of_rows,), arguments | sizes, options)
            return
        if plan.schedule == "persistent":
            waves = -(-blocks_of_rows // plan.groups)
            counters = torch.zeros(waves, plan.groups * sides, 16, dtype=torch.int64, device=self.device)
            for wave in range(waves):
                groups = min(plan.groups, blocks_of_rows - wave * plan.groups)
                given = {"counters": counters[wave], "first_row": wave * plan.groups * plan.rows, "begin": 0, "end": steps}
                given["gave_up"] = alarm(self.device).word
                grid = (plan.blocks * sides * groups,)
                yield Launch(
                    scan, grid, arguments | sizes | given | {"PHASE": "both"}, options | {"launch_cooperative_grid": True}
                )
            return
        counters = torch.empty(0, dtype=torch.int64, device=self.device)
        for step in range(steps):
            for phase in phases:
                given = {"counters": counters, "first_row": 0, "begin": step, "end": step + 1, "PHASE": phase}
                given["gave_up"] = counters  # nobody waits
                yield Launch(scan, (plan.blocks * sides * blocks_of_rows,), arguments | sizes | given, options)


def _refuse_noise(*given) -> None:
    """Raise where a call brings a mask or noise; `dispatch.why_not_own` keeps such calls away."""
    if any(each is not None for each in given):
        raise RuntimeError("fastrnn: the Triton engine has neither recurrent dropout nor zoneout")


def layer_forward(x, batch_sizes, h0, c0, weights, text, save, resets=None, lengths=None, mask=None, noise=None):
    """The op's implementation, on x's device and its current stream."""
    _refuse_noise(mask, noise)
    alarm(x.device).check()
    call = Call(layer_of(text), Inputs(x, batch_sizes, h0, c0, resets, lengths), weights)
    with torch.cuda.device(x.device):
        return forward(call, save, *call.chosen(forward=True))


def layer_backward(
    dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, saved, text, needs, resets=None, lengths=None, mask=None, noise=None
):
    """The op's implementation, on x's device and its current stream."""
    _refuse_noise(mask, noise)
    alarm(x.device).check()
    call = Call(layer_of(text), Inputs(x, batch_sizes, h0, c0, resets, lengths), weights)
    with torch.cuda.device(x.device):
        return backward(call, Outer(dy, dh_n, dc_n), y, saved, Needs(*needs), *call.chosen(forward=False))


def forward(call: Call, save: bool, plan: Plan, precision: str):
    """y, h_n, c_n, saved."""
    (x, _, h0, c0, *_), gates = call.inputs, call.cell.gates
    # the projected input; the cell's slots are written over it
    kept = x.new_empty(call.D, call.N, max(gates * call.H, call.slots if save else 0))
    rows = call.steps.flat(x)
    with products_in(call.dtype, precision):
        for d in range(call.D):
            torch.mm(rows, call.input_weights(d).T, out=kept[d][:, : gates * call.H])
    h0 = h0.contiguous()
    y, h_n = call.rows_made(*x.shape[:-1], call.D * call.R), h0.clone() if call.ragged else torch.empty_like(h0)
    states = [*([c0] if c0 is not None else []), *([h0] if call.cell.reads_hidden else [])]
    carry = torch.cat([state.float() for state in states], -1) if states else call.nothing
    arguments = {
        "kept": kept,
        "y": y,
        "h0": h0,
        "start": call.nothing if call.inputs.resets is None else carry.clone(),
        "carry": carry,
        "w_hh": call.w_hh,
        "w_hr": call.w_hr,
        "b_ih": call.b_ih,
        "b_hh": call.b_hh,
        "h_n": h_n,
        "lengths": call.lengths,
        "offsets": call.offsets,
        "resets": call.resets,
        "CELL": bound(call.cell, call.cells, True),
        "INPUT": call.cell.input,
        "W": kept.shape[-1],
        "BIAS": call.layer.bias,
        "SAVE": save,
        **call.constants(plan, precision),
    }
    if plan.schedule != "single":
        arguments["out"] = x.new_empty(call.D, call.B, call.H) if call.layer.projected and not save else call.nothing
        arguments["ALIGNED"] = (call.R // call.heads * x.element_size()) % 16 == 0 and arguments["h0"].data_ptr() % 16 == 0
    phases = ("gates", "project") if call.layer.projected else ("both",)
    kernels = forward_kernels.single_forward, forward_kernels.scan_forward
    for launch in call.launches(plan, *kernels, arguments, call.T, phases):
        call.run(launch)
    c_n = x.new_empty(0) if c0 is None else carry[..., : c0.shape[-1]].to(x.dtype).contiguous()
    saved = x.new_empty(0)
    if save:
        saved = kept if call.slots else x.new_empty(call.D, call.N, 0)
    return y, h_n, c_n, saved


def backward(call: Call, outer: Outer, y: Tensor, saved: Tensor, needs: Needs, plan: Plan, precision: str):
    """dx, dh0, dc0, and a list of dw."""
    (x, _, h0, c0, *_), (dy, dh_n, dc_n) = call.inputs, outer
    D, B, N, H, R, cell = call.D, call.B, call.N, call.H, call.R, call.cell
    da = call.rows_made(D, N, cell.preactivations * H)
    dp = call.rows_made(D, N, R) if call.layer.projected else call.nothing
    h0, y = h0.contiguous(), y.contiguous()
    dh_n = torch.zeros_like(h0) if dh_n is None else dh_n.contiguous()
    dh0 = dh_n.clone() if call.ragged else torch.empty_like(h0)  # where a row has no steps
    # gradients of states and of the cell's own weights, and in a scan of h element by element
    width = cell.states + cell.weights + (cell.reads_hidden and plan.schedule != "single")
    carry = torch.zeros(D, B, width * H, dtype=torch.float32, device=x.device)
    of_states = carry[..., : cell.states * H]
    of_weights = carry[..., cell.states * H : (cell.states + cell.weights) * H]
    if dc_n is not None:
        of_states.copy_(dc_n)
    arguments = {
        "saved": saved.contiguous(),
        "y": y,
        "dy": torch.zeros_like(y) if dy is None else dy.contiguous(),
        "da": da,
        "dp": dp,
        "h0": h0,
        "c0": call.nothing if c0 is None else c0.contiguous(),
        "dh_n": dh_n,
        "dh0": dh0,
        "carry": carry,
        "w_hh": call.w_hh,
        "w_hr": call.w_hr,
        "b_ih": call.b_ih,
        "lengths": call.lengths,
        "offsets": call.offsets,
        "resets": call.resets,
        "CELL": bound(call.cell, call.cells, False),
        "OUTPUT": cell.derived.reads_output,
        "W": call.slots,
        **call.constants(plan, precision),
    }
    if plan.schedule != "single":
        arguments["DIAGONAL"] = plan.diagonal
        sums = [h0, of_states] if call.inputs.resets is not None else []
        sums = [torch.zeros_like(state, dtype=torch.float32) for state in sums] or [call.nothing] * 2
        arguments["sums_h"], arguments["sums_c"] = sums
    phases = ("state", "cell") if call.layer.projected else ("both",)
    kernels = backward_kernels.single_backward, backward_kernels.scan_backward
    for launch in call.launches(plan, *kernels, arguments, call.T + 1, phases):
        call.run(launch)
    if plan.schedule != "single" and call.inputs.resets is not None:
        of_states += arguments["sums_c"]
    dc0 = of_states.to(x.dtype).contiguous() if needs.dh0 and cell.states else x.new_empty(0)
    d_input, d_hidden = da[..., : cell.gates * H], da[..., cell.hidden * H :]
    with products_in(call.dtype, precision):
        dx = _input_gradient(call, d_input) if needs.dx else x.new_empty(0)
        dw = _weight_gradients(call, d_input, d_hidden, of_weights, dp, y, h0, saved) if needs.dw else []
    return dx, dh0 if needs.dh0 else x.new_empty(0), dc0, dw


def _input_gradient(call: Call, d_input: Tensor) -> Tensor:
    dx = d_input[0] @ call.input_weights(0)
    for d in range(1, call.D):
        dx.addmm_(d_input[d], call.input_weights(d))
    if call.batch_first:
        return dx.view(call.T, call.B, call.I).transpose(0, 1).contiguous()
    return dx.view(call.x.shape)


def _weight_gradients(call: Call, d_input, d_hidden, of_weights, dp, y, h0, saved) -> list[Tensor]:
    """Of each weight, in the order of the weights, each in memory of its own.

    of_weights: of the cell's own weights, the sums over a row's steps [D, B, W*H], float32.
    """
    cell, H = call.cell, call.H
    order = [cell.input.index(gate) for gate in range(cell.gates)]  # torch's gates among the cell's arguments
    within = call.steps.within()  # past the lengths anything may stand, and zero times it is not always zero
    rows, grads = call.steps.flat(call.x), []
    rows = rows if within is None else torch.where(within, rows, 0.0)
    for d in range(call.D):
        w_hh = call.x.new_empty(cell.gates * H, call.R // call.heads)
        _hidden_weight_gradient(call, d, d_hidden[d], y, h0[d], w_hh)
        grads += [_gates_in(order, torch.mm(d_input[d].T, rows)), w_hh]
        if call.layer.bias:
            b_ih = d_input[d].sum(0)
            b_hh = d_hidden[d].sum(0) if cell.hidden else b_ih.clone()
            b_ih = _gates_in(order, b_ih)
            grads += [torch.cat([b_ih, of_weights[d].sum(0).to(b_ih.dtype)]) if cell.weights else b_ih, b_hh]
        if call.layer.projected:
            out = saved[d][:, -H:] if within is None else torch.where(within, saved[d][:, -H:], 0.0)
            grads.append(torch.mm(dp[d].T, out))
    return grads


def _hidden_weight_gradient(call: Call, d: int, da: Tensor, y: Tensor, h0: Tensor, dw: Tensor) -> None:
    """dw [G*H, R / heads], out: the sum over steps of da^T [G*H, rows] with the state [rows, R] that each began with."""
    B, N, R = call.B, call.N, call.R
    backwards = call.layer.reverse != (d == 1)
    if not (
        call.packed or call.batch_first or call.ragged or call.inputs.resets is not None
    ):  # those states are y, a step later
        states = y.view(N, call.D * R)[:, d * R : (d + 1) * R]
        first, later, earlier = (
            (slice(N - B, N), slice(N - B), slice(B, N)) if backwards else (slice(B), slice(B, N), slice(N - B))
        )
        _product_of_heads(call.heads, dw, da[first], h0)
        if call.T > 1:
            _product_of_heads(call.heads, dw, da[later], states[earlier], add=True)
        return
    before = call.rows_made(N, R)
    columns = min(128, max(16, 1 << (R - 1).bit_length()))
    blocks = -(-B // 16)
    arguments = {
        "before": before,
        "y": y,
        "h0": h0,
        "lengths": call.lengths,
        "offsets": call.offsets,
        "resets": call.resets,
        "T": call.T,
        "B": B,
        "blocks": blocks,
        "d": d,
        "D": call.D,
        "R": R,
        "PACKED": call.packed,
        "RAGGED": call.ragged,
        "RESETS": call.inputs.resets is not None,
        "BATCH_FIRST": call.batch_first,
        "BACKWARDS": backwards,
        "ROWS": 16,
        "COLUMNS": columns,
    }
    call.run(Launch(backward_kernels.states_before, (call.T * blocks, -(-R // columns)), arguments, {"num_warps": 4}))
    _product_of_heads(call.heads, dw, da, before)


def _product_of_heads(heads: int, dw: Tensor, da: Tensor, states: Tensor, add: bool = False) -> None:
    """dw [G*H, R / heads], out: the product of da^T [G*H, rows] with states [rows, R], each head's rows with its columns."""
    if heads == 1:
        dw.addmm_(da.T, states, beta=int(add))
        return
    width = dw.shape[1]
    by_head = states.unflatten(1, (heads, width)).transpose(0, 1)  # [heads, rows, R / heads]
    for own, grads in zip(dw.split(heads * width), da.split(heads * width, 1), strict=True):  # of each gate
        own.view(heads, width, width).baddbmm_(grads.unflatten(1, (heads, width)).permute(1, 2, 0), by_head, beta=int(add))


def _gates_in(order: Sequence[int], w: Tensor) -> Tensor:
    """w [G*H, ...], its gates in another order."""
    if list(order) == list(range(len(order))):
        return w
    gates = w.chunk(len(order))
    return torch.cat([gates[gate] for gate in order])  # an index list would be copied from the CPU


def _stack(weights: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(weights)) if len(weights) > 1 else weights[0].contiguous().unsqueeze(0)
