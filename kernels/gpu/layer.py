"""The raw layer ops on a GPU: buffers, the products outside the scan (torch's), and the scan's launches.

Letters as in fastrnn/ops.py; N rows of the sequence, P pre-activations of a unit. Inside, sequences are step-major.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS, Cell
from ..layer import Inputs, Layer, Needs, Outer, Steps, layer_of
from . import DTYPES, device_of, sizes_of
from . import backward as backward_kernels
from . import forward as forward_kernels
from .cell import PLAIN, PTX
from .launch import Kernel, Launch, alarm
from .plan import Device, Plan, choose
from .precision import precision_of, products_in


class Call:
    """Sizes of a call, and what both passes derive from its arguments.

    run: what becomes of the launches, in their order; None starts them.
    """

    def __init__(
        self, layer: Layer, inputs: Inputs, weights: Sequence[Tensor], run: Callable[[Launch], object] | None = None
    ) -> None:
        self.layer, self.inputs, self.run, x = layer, inputs, run, inputs.x
        if x.dtype not in DTYPES:
            raise RuntimeError(f"fastrnn: the Triton engine takes {', '.join(map(str, DTYPES))}, got {x.dtype}")
        self.cell: Cell = CELLS[layer.cell]
        self.ptx = x.is_cuda and not torch.version.hip
        self.x, self.dtype, self.device = x, x.dtype, x.device
        self.D, self.B, self.R = inputs.h0.shape
        self.H, self.I, self.steps = weights[0].shape[0] // self.cell.gates, x.shape[-1], Steps(layer, inputs)
        self.T, self.N, self.packed = self.steps.steps, self.steps.rows, self.steps.packed
        self.batch_first = self.steps.axis == 1
        self.slots = (self.cell.slots + layer.projected) * self.H  # row width of `saved`
        self.nothing = _nothing(self.dtype, self.device)
        each = len(weights) // self.D
        self.w_ih = weights[::each]
        self._alive: list[Tensor] = []  # what kernels reach by a distance from something else
        self.matrices = self._apart("w_hh", weights[1::each])
        self.matrices |= self._apart("w_hr", weights[each - 1 :: each] if layer.projected else ())
        self.biases = (weights[2::each], weights[3::each]) if layer.bias else ((), ())
        self.lengths, self.offsets = self._rows_of_steps(inputs.batch_sizes)

    def chosen(self, forward: bool) -> tuple[Plan, str]:
        """Plan and precision of a pass."""
        precision = precision_of(self.dtype)
        return _chosen(self.layer, self.T, self.B, self.H, self.R, self.dtype, device_of(self.device), forward, precision)

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
        both = torch.cat((lengths, lengths.new_empty(self.B % 2), offsets))  # which start at multiples of 16 bytes
        if self.device.type == "cuda":
            both = both.pin_memory().to(self.device, non_blocking=True)
        return both[: self.B], both[self.B + self.B % 2 :]

    def input_weights(self, d: int) -> Tensor:
        """w_ih [G*H, I] of a direction, gates in the order of the cell's arguments."""
        return _gates_in(self.cell.input, self.w_ih[d])

    def _apart(self, name: str, own: Sequence[Tensor]) -> dict[str, Any]:
        """The weights of the first direction, and how many numbers further those of the second are: nothing is copied."""
        if len(own) < 2:
            return {name: own[0].contiguous() if own else self.nothing, f"{name}_step": 0}
        first, *second = [weight.contiguous() for weight in own]
        if first.is_meta:
            return {name: first, f"{name}_step": 0}
        self._alive += second
        return {name: first, f"{name}_step": (second[0].data_ptr() - first.data_ptr()) // first.element_size()}

    def bias(self) -> dict[str, Any]:
        """Both, likewise."""
        return self._apart("b_ih", self.biases[0]) | self._apart("b_hh", self.biases[1])

    def kernels(self, forward: bool, save: bool, plan: Plan, precision: str, aligned: bool = False) -> dict[str, Kernel]:
        """The scan of a pass: its kernel, or that of each of its phases."""
        sizes = self.D, self.H, self.R
        return _kernels(self.layer, sizes, self.device, self.ptx, self.packed, forward, save, plan.tiles, precision, aligned)

    def start(self, plan: Plan, kernels: dict[str, Kernel], arguments: dict[str, Any], steps: int) -> None:
        """Launch a scan: once for all steps, once for each range of rows, or once for each step and phase."""
        arguments |= {"T": self.T, "B": self.B, "N": self.N}
        groups, run = -(-self.B // plan.rows), self.run
        if plan.schedule == "single":
            kernels["both"].bind((self.D * groups,), arguments, run)(0, steps)
        elif plan.schedule == "persistent":
            waves = -(-groups // plan.groups)
            counters = torch.zeros((waves, plan.groups * self.D, 16), dtype=torch.int64, device=self.device)
            arguments["gave_up"] = alarm(self.device).word
            for wave in range(waves):
                arguments["counters"] = counters[wave] if waves > 1 else counters
                arguments["first_row"] = wave * plan.groups * plan.rows
                grid = (plan.blocks * self.D * min(plan.groups, groups - wave * plan.groups),)
                kernels["both"].bind(grid, arguments, run)(0, steps)
        else:
            nobody = _nothing(torch.int64, self.device)
            arguments |= {"counters": nobody, "gave_up": nobody, "first_row": 0}
            bound = [kernel.bind((plan.blocks * self.D * groups,), arguments, run) for kernel in kernels.values()]
            for step in range(steps):
                for launch in bound:
                    launch(step, step + 1)


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where there is nothing to point to."""
    return torch.empty(0, dtype=dtype, device=device)


@lru_cache(4096)
def _chosen(
    layer: Layer, T: int, B: int, H: int, R: int, dtype: torch.dtype, device: Device, forward: bool, precision: str
) -> tuple[Plan, str]:
    return choose(device, sizes_of(layer, T, B, H, R, dtype, precision), forward), precision


@lru_cache(1024)
def _kernels(
    layer: Layer,
    sizes: tuple[int, int, int],
    device: torch.device,
    ptx: bool,
    packed: bool,
    forward: bool,
    save: bool,
    tiles: tuple,
    precision: str,
    aligned: bool,
) -> dict[str, Kernel]:
    """The kernels of a pass by phase, with all that they are compiled for. sizes: D, H, R."""
    cell, cells, (D, H, R) = CELLS[layer.cell], PTX if ptx else PLAIN, sizes
    schedule, units, outputs, rows, blocks, warps, registers, chunk, split, resident, stages, diagonal = tiles
    constants = {
        "GATES": cell.gates,
        "HIDDEN": cell.hidden,
        "SLOTS": cell.slots,
        "CARRY": cell.carry or "none",
        "D": D,
        "H": H,
        "R": R,
        "PACKED": packed,
        "BATCH_FIRST": layer.batch_first and not packed,
        "REVERSE": layer.reverse,
        "PROJECTED": layer.projected,
        "UNITS": units,
        "OUTPUTS": outputs,
        "ROWS": rows,
        "PRECISION": precision,
    }
    slots = (cell.slots + layer.projected) * H
    if forward:
        constants |= {
            "CELL": cells.forward[cell.name],
            "INPUT": cell.input,
            "W": max(cell.gates * H, slots if save else 0),
            "BIAS": layer.bias,
            "SAVE": save,
        }
    else:
        constants |= {"CELL": cells.backward[cell.name], "W": slots}
    options: dict[str, Any] = {"num_warps": warps, "num_stages": 1}
    if registers:
        options["maxnreg"] = registers
    if schedule == "single":
        kernel = forward_kernels.single_forward if forward else backward_kernels.single_backward
        return {"both": Kernel(kernel, constants, options)}
    constants |= {
        "BLOCKS": blocks,
        "BK": chunk,
        "SPLIT": split,
        "RESIDENT": resident,
        "STAGES": stages,
        "SYNC": schedule == "persistent",
    }
    constants |= {"ALIGNED": aligned} if forward else {"DIAGONAL": diagonal}
    phases: tuple[str, ...] = ("both",)
    if schedule == "persistent":
        options["launch_cooperative_grid"] = True
    elif layer.projected:
        phases = ("gates", "project") if forward else ("state", "cell")
    kernel = forward_kernels.scan_forward if forward else backward_kernels.scan_backward
    return {phase: Kernel(kernel, constants | {"PHASE": phase}, options) for phase in phases}


def layer_forward(x, batch_sizes, h0, c0, weights, text, save):
    """The op's implementation, on x's device and its current stream."""
    alarm(x.device).check()
    call = Call(layer_of(text), Inputs(x, batch_sizes, h0, c0), weights)
    with _current(x.device):
        return forward(call, save, *call.chosen(forward=True))


def layer_backward(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, saved, text, needs):
    """The op's implementation, on x's device and its current stream."""
    alarm(x.device).check()
    call = Call(layer_of(text), Inputs(x, batch_sizes, h0, c0), weights)
    with _current(x.device):
        return backward(call, Outer(dy, dh_n, dc_n), y, saved, Needs(*needs), *call.chosen(forward=False))


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a device the current one, on which Triton launches; most often it is."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _AS_IT_IS
    return torch.cuda.device(device)


_AS_IT_IS = contextlib.nullcontext()


def forward(call: Call, save: bool, plan: Plan, precision: str):
    """y, h_n, c_n, saved."""
    (x, _, h0, c0), width = call.inputs, call.cell.gates * call.H
    # the projected input; the cell's slots are written over it
    kept = x.new_empty(call.D, call.N, max(width, call.slots if save else 0))
    rows = call.steps.flat(x)
    with products_in(call.dtype, precision):
        for d in range(call.D):
            projected = kept.as_strided((call.N, width), (kept.shape[2], 1), d * kept[0].numel() if d else 0)
            torch.mm(rows, call.input_weights(d).t(), out=projected)
    y, h_n = x.new_empty((*x.shape[:-1], call.D * call.R)), x.new_empty((call.D, call.B, call.R))
    carry, h0 = call.nothing, h0.contiguous()
    if call.cell.carry is not None:
        carry = _copied(h0 if c0 is None else c0)
    out = x.new_empty(call.D, call.B, call.H) if call.layer.projected and not save else call.nothing
    arguments = {
        "kept": kept,
        "y": y,
        "out": out,
        "h0": h0,
        "carry": carry,
        "h_n": h_n,
        "lengths": call.lengths,
        "offsets": call.offsets,
        **call.matrices,
        **call.bias(),
    }
    aligned = (call.R * x.element_size()) % 16 == 0 and h0.data_ptr() % 16 == 0
    call.start(plan, call.kernels(True, save, plan, precision, aligned), arguments, call.T)
    c_n = call.nothing
    if call.cell.carry == "cell":
        c_n = carry if x.dtype is torch.float32 else carry.to(x.dtype)
    if not save:
        return y, h_n, c_n, call.nothing
    return y, h_n, c_n, kept if call.slots else x.new_empty(call.D, call.N, 0)


def backward(call: Call, outer: Outer, y: Tensor, saved: Tensor, needs: Needs, plan: Plan, precision: str):
    """dx, dh0, dc0, and a list of dw."""
    (x, _, h0, c0), (dy, dh_n, dc_n) = call.inputs, outer
    D, B, N, H, R, gates, hidden = call.D, call.B, call.N, call.H, call.R, call.cell.gates, call.cell.hidden
    da, dp = x.new_empty(D, N, call.cell.preactivations * H), x.new_empty(D, N, R) if call.layer.projected else call.nothing
    dh0, h0, y = x.new_empty(D, B, R), h0.contiguous(), y.contiguous()
    carry = call.nothing
    if call.cell.carry is not None and dc_n is not None:
        carry = _copied(dc_n)
    elif call.cell.carry is not None:
        carry = torch.zeros((D, B, H), dtype=torch.float32, device=x.device)
    arguments = {
        "saved": saved.contiguous(),
        "y": y,
        "dy": torch.zeros_like(y) if dy is None else dy.contiguous(),
        "da": da,
        "dp": dp,
        "h0": h0,
        "c0": call.nothing if c0 is None else c0.contiguous(),
        "dh_n": torch.zeros_like(h0) if dh_n is None else dh_n.contiguous(),
        "dh0": dh0,
        "carry": carry,
        "lengths": call.lengths,
        "offsets": call.offsets,
        **call.matrices,
    }
    call.start(plan, call.kernels(False, True, plan, precision), arguments, call.T + 1)
    nothing = call.nothing
    dc0 = nothing
    if needs.dh0 and call.cell.carry == "cell":
        dc0 = carry if x.dtype is torch.float32 else carry.to(x.dtype)
    d_input = d_hidden = da.unbind()
    if call.cell.preactivations > gates:
        d_input, d_hidden = da[..., : gates * H].unbind(), da[..., hidden * H :].unbind()
    with products_in(call.dtype, precision):
        dx = _input_gradient(call, d_input) if needs.dx else nothing
        dw = _weight_gradients(call, d_input, d_hidden, dp, y, h0, saved) if needs.dw else []
    return dx, dh0 if needs.dh0 else nothing, dc0, dw


def _copied(state: Tensor) -> Tensor:
    """A state in float32 and memory of its own, which a scan writes over."""
    if state.dtype is torch.float32 and state.is_contiguous():
        return state.clone()
    return state.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _input_gradient(call: Call, d_input: Sequence[Tensor]) -> Tensor:
    dx = torch.mm(d_input[0], call.input_weights(0))
    for d in range(1, call.D):
        dx.addmm_(d_input[d], call.input_weights(d))
    if call.batch_first:
        return dx.view(call.T, call.B, call.I).transpose(0, 1).contiguous()
    return dx.view(call.x.shape)


def _weight_gradients(call: Call, d_input, d_hidden, dp, y, h0, saved) -> list[Tensor]:
    """Of each weight, in the order of the weights, each in memory of its own. d_input, d_hidden: of each direction [N, G*H]."""
    cell, H = call.cell, call.H
    order = [cell.input.index(gate) for gate in range(cell.gates)]  # torch's gates among the cell's arguments
    rows, grads = call.steps.flat(call.x), []
    for d in range(call.D):
        w_hh = call.x.new_empty((cell.gates * H, call.R))
        _hidden_weight_gradient(call, d, d_hidden[d], y, h0 if call.D == 1 else h0[d], w_hh)
        grads += [_gates_in(order, torch.mm(d_input[d].t(), rows)), w_hh]
        if call.layer.bias:
            b_ih = d_input[d].sum(0)
            grads += [_gates_in(order, b_ih), d_hidden[d].sum(0) if cell.hidden else b_ih.clone()]
        if call.layer.projected:
            grads.append(torch.mm(dp[d].T, saved[d][:, -H:]))
    return grads


def _hidden_weight_gradient(call: Call, d: int, da: Tensor, y: Tensor, h0: Tensor, dw: Tensor) -> None:
    """dw [G*H, R], out: the sum over all steps of da^T [G*H, rows] with the state [rows, R] that the step began with.

    h0 [B, R], or [1, B, R].
    """
    B, N, R = call.B, call.N, call.R
    backwards = call.layer.reverse != (d == 1)
    if not (call.packed or call.batch_first):  # those states are y, a step later
        da, later = da.t(), N - B
        torch.mm(da.narrow(1, later if backwards else 0, B), h0.view(B, R), out=dw)
        if call.T > 1:
            states = y.as_strided((later, R), (call.D * R, 1), d * R + (B * call.D * R if backwards else 0))
            dw.addmm_(da.narrow(1, 0 if backwards else B, later), states)
        return
    before = y.new_empty(N, R)
    columns = min(128, max(16, 1 << (R - 1).bit_length()))
    blocks = -(-B // 16)
    arguments = {
        "before": before,
        "y": y,
        "h0": h0,
        "lengths": call.lengths,
        "offsets": call.offsets,
        "T": call.T,
        "B": B,
        "blocks": blocks,
        "d": d,
    }
    kernel = _states_before(call.device, call.D, R, call.packed, call.batch_first, backwards, columns)
    kernel.bind((call.T * blocks, -(-R // columns)), arguments, call.run)(0, 0)
    torch.mm(da.T, before, out=dw)


@lru_cache(1024)
def _states_before(
    device: torch.device, D: int, R: int, packed: bool, batch_first: bool, backwards: bool, columns: int
) -> Kernel:
    constants = {"D": D, "R": R, "PACKED": packed, "BATCH_FIRST": batch_first, "BACKWARDS": backwards}
    return Kernel(backward_kernels.states_before, constants | {"ROWS": 16, "COLUMNS": columns}, {"num_warps": 4})


def _gates_in(order: Sequence[int], w: Tensor) -> Tensor:
    """w [G*H, ...], its gates in another order."""
    if list(order) == list(range(len(order))):
        return w
    gates = w.chunk(len(order))
    return torch.cat([gates[gate] for gate in order])  # an index list would be copied from the CPU
