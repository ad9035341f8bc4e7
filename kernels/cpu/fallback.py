"""The raw ops without the C++ runtime: the same kernels, compiled at run time and called from Python on one thread.

Compiled objects are kept in a directory that only the user can write, under a hash of everything that shaped them, and
loaded without importing numba.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..cells import CELLS
from ..layer import Inputs, Layer, Steps, layer_of
from ..user_cache import cache_directory
from . import processor
from .plan import FIELDS, L2_BYTES
from .processor import Tier
from .source import KERNELS, object_directory, shipped_directory

SHIPPED = "fastrnn_kernels"  # the directory beside a cell's module where a package may have its objects
TYPES = {torch.float32: "f32", torch.float64: "f64"}


@cache
def _engine():
    """LLVM's loader, and the objects it holds."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    # With llvmlite's memory for sections, of which those of an object lie together. LLVM's own takes any free place for each,
    # and code that is two gigabytes away from its constants kills the process.
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine, use_lmm=True)


@cache
def tier() -> Tier:
    """The tier that kernels are compiled for.

    Raises:
        ImportError: FASTRNN_ISA names none that this processor runs.
        RuntimeError: this processor runs none.
    """
    names = [tier.name for tier in processor.fitting() if not tier.less]
    if not names:
        raise RuntimeError(f"this processor is less than {processor.tiers()[-1].name}, the least that kernels are compiled for")
    return processor.chosen(names)


def compile_units(cell: str, scalar: str, passes: Sequence[str], tier: Tier) -> bool:
    """Write the objects of a cell's passes that are not to be had yet, at once, to the cache; is there anything to write?

    Raises:
        RuntimeError: they do not compile.
    """
    base, running = cache_directory(), {}
    for which in passes:
        if not objects(tier, (cell, scalar, which)):
            # Not in this process, where Numba may have other work; run from where `kernels` is a package of its own.
            command = ["-m", f"{KERNELS.name}.cpu.compile", str(base), tier.name, cell, scalar, which, CELLS[cell].definition]
            running[which] = subprocess.Popen([sys.executable, *command], cwd=KERNELS.parent, stderr=subprocess.PIPE, text=True)
    for which, process in running.items():
        _, words = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"fastrnn could not compile {' '.join((cell, scalar, which))}:\n{words}")
    return bool(running)


def objects(tier: Tier, unit: tuple[str, str, str]) -> list[Path]:
    """Find the objects of a pass of a cell, shipped with it or in the cache; none where they are in neither."""
    module = CELLS[unit[0]].function.__globals__.get("__file__")
    directories = [shipped_directory(Path(module).parent / SHIPPED, tier.name)] if module else []
    if importlib.util.find_spec("numba"):
        directories.append(object_directory(cache_directory(), tier.name))
    for directory in directories:
        found = [directory / f"{entry}.o" for entry in tier.entries(unit)]
        if all(path.exists() for path in found):
            return found
    return []


@cache
def addresses(cell: str, scalar: str, which: str, tier: Tier) -> list[int]:
    """Addresses of the compiled kernel of one pass, and of the function that lays out its workspace."""
    import llvmlite.binding as llvm

    compile_units(cell, scalar, (which,), tier)
    unit, engine = (cell, scalar, which), _engine()
    for path in objects(tier, unit):
        engine.add_object_file(llvm.object_file.ObjectFileRef.from_path(str(path)))
    engine.finalize_object()
    return [engine.get_function_address(entry) for entry in tier.entries(unit)]


@cache
def unit(cell: str, scalar: str, which: str):
    """(run, arrange) of one pass, as Python calls them."""
    int64, (run, arrange) = ctypes.c_int64, addresses(cell, scalar, which, tier())
    return ctypes.CFUNCTYPE(None, int64, int64)(run), ctypes.CFUNCTYPE(int64, int64, int64)(arrange)


class Call:
    """One record a direction, filled field by field as csrc/layer.cpp does, and everything they point to kept alive."""

    def __init__(self, layer: Layer, inputs: Inputs, weights: Sequence[Tensor]) -> None:
        x, D = inputs.x, layer.directions
        self.records = np.zeros(D, [(name, np.int64) for name in FIELDS])
        self.keep: list = [self.records]
        self.cell, self.scalar, self.steps = CELLS[layer.cell], TYPES[x.dtype], Steps(layer, inputs)
        self.H, self.R = weights[0].shape[0] // self.cell.gates, inputs.h0.shape[2]
        if weights[0].dtype == torch.bfloat16 and weights[1].shape[1] % 2 == 0:  # matrices as kernels read them
            self.weights = [w.contiguous() for w in weights]
        else:
            self.weights = [w.to(x.dtype).contiguous() for w in weights]
        sizes = {
            "steps": self.steps.steps,
            "padded_steps": self.steps.steps,
            "batch": self.steps.batch,
            "rows": self.steps.rows,
            "input_size": x.shape[-1],
            "hidden_size": self.H,
            "output_size": self.R,
            "heads": layer.heads,
            "bias": layer.bias,
            "projected": layer.projected,
            "half": self.weights[0].dtype == torch.bfloat16,
            "directions": D,
            "l2_bytes": L2_BYTES,
        }
        for name, value in sizes.items():
            self.records[name] = value
        batch_sizes = inputs.batch_sizes
        if batch_sizes is not None:
            offsets = torch.cumsum(batch_sizes, 0) - batch_sizes
            self.point("batch_sizes", [batch_sizes.contiguous()] * D)
            self.point("offsets", [offsets] * D)
            self.records["packed"] = 1
        if inputs.lengths is not None:
            self.order_rows(inputs.lengths)
        if inputs.resets is not None:
            self.point("resets", [inputs.resets] * D)
            strides = [
                inputs.resets.stride(self.steps.axis),
                inputs.resets.stride(-1 if self.steps.packed else 1 - self.steps.axis),
            ]
            self.records["resets_step"], self.records["resets_row"] = strides
        if inputs.mask is not None:
            self.point("mask", inputs.mask.contiguous())
        if inputs.noise is not None:
            self.rows("noise", inputs.noise, self.cell.noise * self.H)
        self.records["direction"] = np.arange(D)
        self.records["reverse"] = [layer.reverse ^ bool(d) for d in range(D)]
        self.rows("x", x)
        for name in layer.kinds():
            self.point(name, [getattr(own, name) for own in layer.by_direction(self.weights)])

    def order_rows(self, lengths: Tensor) -> None:
        """Have the kernel see the longest rows first; see `Call::lengths` in csrc/layer.cpp."""
        T = self.steps.steps
        if int(lengths.min()) < 0 or int(lengths.max()) > T:
            raise RuntimeError(f"fastrnn: lengths: expected numbers from 0 to {T}, got {lengths.tolist()}")
        steps = max(int(lengths.max()), min(T, 2))
        rows = (lengths > torch.arange(steps).unsqueeze(1)).sum(1)
        self.records["steps"], self.records["rows"] = steps, int(rows.sum())
        for name, numbers in (
            ("batch_sizes", rows),
            ("offsets", rows.cumsum(0) - rows),
            ("order", lengths.argsort(descending=True, stable=True)),
        ):
            self.point(name, [numbers] * len(self.records))

    def point(self, field: str, tensors) -> None:
        """Pointers to each direction's tensor."""
        for d, tensor in enumerate(tensors):
            self.records[field][d] = tensor.data_ptr()
        self.keep += list(tensors)

    def initial_states(self, field: str, at_reset: str, tensor: Tensor) -> None:
        """The same of the initial states, or their gradients, and of those that resets go back to."""
        self.point(field, tensor)
        self.point(at_reset, tensor[:, -self.steps.batch :])

    def rows(self, field: str, tensor: Tensor, width: int = 0) -> None:
        """Pointer and strides of a sequence; direction d starts d * width numbers into a row."""
        if tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        size = tensor.element_size()
        if self.steps.packed:
            step = row = tensor.stride(0)
        else:
            step, row = tensor.stride(self.steps.axis), tensor.stride(1 - self.steps.axis)
        self.keep.append(tensor)
        for d in range(len(self.records)):
            self.records[field][d] = tensor.data_ptr() + d * width * size
        self.records[f"{field}_step"], self.records[f"{field}_row"] = step * size, row * size

    def run(self, which: str) -> None:
        run, arrange = unit(self.cell.name, self.scalar, which)
        address = self.records.ctypes.data
        workspace = torch.empty(arrange(address, 1) + 64, dtype=torch.uint8)
        self.records["workspace"] = -(-workspace.data_ptr() // 64) * 64
        arrange(address, 1)
        run(address, 0)


def layer_forward(x, batch_sizes, h0, c0, weights, text, save, *more):
    """The op's implementation."""
    (D, _, R), layer = h0.shape, layer_of(text)
    call = Call(layer, Inputs(x, batch_sizes, h0, c0, *more), weights)
    B = call.steps.batch
    slots = call.cell.slots + layer.projected
    y = x.new_empty(*x.shape[:-1], D * R)
    h_n = x.new_empty(D, B, R)
    c_n = x.new_empty(D, B, c0.shape[2]) if c0 is not None else x.new_empty(0)  # absent outputs may not share memory
    saved = x.new_empty(D, call.steps.rows, slots * call.H) if save else x.new_empty(0)
    call.records["save"] = save
    call.rows("y", y, R)
    call.initial_states("h0", "h_reset", h0.contiguous())
    call.point("h_n", h_n)
    if c0 is not None:
        call.initial_states("c0", "c_reset", c0.contiguous())
        call.point("c_n", c_n)
    if save:
        call.point("saved", saved)
    call.run("forward")
    return y, h_n, c_n, saved


def layer_backward(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, saved, text, needs, *more):
    """The op's implementation."""
    layer, (need_dx, need_dh0, need_dw) = layer_of(text), needs
    call = Call(layer, Inputs(x, batch_sizes, h0, c0, *more), weights)
    dx = x.new_empty(x.shape) if need_dx else x.new_empty(0)
    dh0 = x.new_empty(h0.shape)
    dc0 = x.new_empty(c0.shape) if c0 is not None else x.new_empty(0)
    dw = [torch.empty_like(w, dtype=x.dtype if w.dim() == 1 else None) for w in call.weights] if need_dw else []
    call.records["need_dx"], call.records["need_dh0"], call.records["need_dw"] = need_dx, need_dh0, need_dw
    call.rows("y", y, call.R)
    call.rows("dy", torch.zeros_like(y) if dy is None else dy, call.R)
    if need_dx:
        call.rows("dx", dx)
    for name, tensor in (("dh_n", dh_n), ("dc_n", dc_n), ("saved", saved)):
        if tensor is not None:
            call.point(name, tensor.contiguous())
    for name, at_reset, tensor in (
        ("h0", "h_reset", h0), ("c0", "c_reset", c0), ("dh0", "dh_reset", dh0), ("dc0", "dc_reset", dc0)
    ):  # fmt: skip
        if tensor is not None and tensor.dim() > 1:
            call.initial_states(name, at_reset, tensor.contiguous())
    for name in layer.kinds() if need_dw else ():
        grads = [getattr(own, name) for own in layer.by_direction(dw)]
        call.point(f"d{name}_half" if grads[0].dtype == torch.bfloat16 else f"d{name}", grads)
    call.run("backward")
    if not need_dh0:  # they were the carried gradients' place
        dh0, dc0 = x.new_empty(0), x.new_empty(0)
    return dx, dh0, dc0, [grad.to(w.dtype) if w.dim() == 2 else grad for grad, w in zip(dw, weights, strict=False)]


def register() -> None:
    """Make these functions the CPU implementation of the raw ops."""
    library = torch.library.Library("fastrnn", "IMPL", "CPU")  # lives as long as the process: the ops hold it
    library.impl("layer_forward", layer_forward)
    library.impl("layer_backward", layer_backward)
    register.library = library  # type: ignore[attr-defined]
