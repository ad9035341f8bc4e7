"""The Triton engine: whole-sequence kernels behind the raw layer ops, for CUDA and ROCm.

Importing it imports no triton: the first call does.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from .. import gradients, reference
from ..cells import CELLS, Cell
from ..layer import Inputs, Layer, Needs, Outer, Steps, layer_of
from . import plan, selftest
from .precision import precision_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HERE = "is_cuda"  # of a tensor: whether it is on a device of this engine's
_libraries: list[torch.library.Library] = []  # an op is implemented as long as its library lives
asked = os.environ.get("FASTRNN_TRITON") or None  # "0": not at all, "1": without a self-test; an empty variable is no choice


def why_not(device: torch.device) -> str | None:
    """Why no kernel runs on this device of type "cuda" (ROCm's have it too), or None.

    RuntimeError: FASTRNN_TRITON is neither 0 nor 1.
    """
    if asked not in (None, "0", "1"):
        raise RuntimeError(f"FASTRNN_TRITON={asked}: expected 0, 1 or nothing")
    if asked == "0":
        return "FASTRNN_TRITON=0"
    if reason := _unsupported(device):
        return reason
    reason = off(device).get("stepwise")
    return reason and f"the engine fails its self-test there: {reason}"


# What torch.compiler.assume_constant_result would do, but without importing Dynamo: it does not look into this function.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]  # undeclared


def off(device: torch.device) -> dict[str, str]:
    """Why each part that a device does without is off, by name. At the first call the device is tested."""
    return selftest.known(device) if asked == "1" else selftest.off(device)


@cache
def _unsupported(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return f"{device} is not available"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        architecture = properties.gcnArchName.split(":")[0]
        return None if architecture in ("gfx90a", "gfx942") else f"{architecture}, it takes gfx90a and gfx942"
    architecture = f"compute capability {properties.major}.{properties.minor}"
    return None if properties.major >= 8 else f"{architecture}, it takes 8.0 and above"


def device_of(device: torch.device) -> plan.Device:
    """What plans depend on."""
    return _device(device, tuple(sorted(off(device))))


@cache
def _device(device: torch.device, off: tuple[str, ...]) -> plan.Device:
    return replace(device_of_itself(device), off=off)


def device_of_itself(device: torch.device) -> plan.Device:
    """The same, whatever is off there."""
    from triton.runtime import driver

    properties = torch.cuda.get_device_properties(device)
    shared_bytes = driver.active.utils.get_device_properties(
        torch.cuda.current_device() if device.index is None else device.index
    )["max_shared_mem"]
    if torch.version.hip:
        return plan.Device("hip", 0, properties.multi_processor_count, shared_bytes)
    return plan.Device("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count, shared_bytes)


def sizes_of(layer: Layer, T: int, B: int, H: int, R: int, dtype: torch.dtype, precision: str | None = None) -> plan.Sizes:
    """What a plan depends on: heads are layers of their own that run beside each other, as directions are.

    precision: of products, or as torch is set.
    """
    cell, heads, precision = CELLS[layer.cell], layer.heads, precision or precision_of(dtype)
    directions = layer.directions * heads
    one = T, B, H // heads, R // heads, directions, cell.gates, dtype.itemsize, precision, values_of(cell)
    return plan.Sizes(*one, meetings_of(cell), heads) if cell.reduces else plan.Sizes(*one)


@cache
def meetings_of(cell: Cell) -> tuple[int, int]:
    """plan.Sizes.meetings of a cell."""
    if not cell.reduces:
        return 0, 0
    forward, backward = cell.derived.forward_stages, cell.derived.backward_stages
    return sum(bool(stage.reductions) for stage in forward), sum(bool(stage.reductions) for stage in backward)


def values_of(cell: Cell) -> int:
    """plan.Sizes.values of a cell."""
    loaded = cell.kept + 2 * cell.states + cell.derived.reads_output + cell.reads_hidden + cell.noise
    return loaded + cell.states + cell.reads_hidden + cell.weights


def cudnn_is_faster(
    device: plan.Device, layer: Layer, sizes: tuple[int, int, int, int], dtype: torch.dtype, layers: int, packed: bool
) -> bool:
    """Is a call of T steps, B rows, H units and R outputs (sizes) left to torch.nn? See plan.py."""
    return _cudnn_is_faster(device, layer, sizes, dtype, layers, packed, precision_of(dtype))


@lru_cache(4096)
def _cudnn_is_faster(device, layer, sizes, dtype, layers, packed, precision) -> bool:
    T, B, H, R = sizes
    name = str(dtype).removeprefix("torch.")
    return plan.cudnn_is_faster(device, sizes_of(layer, T, B, H, R, dtype, precision), layers, name, packed)


def layers_at_once(
    layer: Layer, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, layers: int, training: bool
) -> tuple[int, ...]:
    """So many of these layers as run at once, the lowest first. sizes: T, B, H and R."""
    never = layer.directions > 1 or layer.heads > 1 or CELLS[layer.cell].reduces
    if never or layers == 1 or dtype is torch.float64:
        return (1,) * layers
    return _layers_at_once(device_of(device), layer, sizes, dtype, layers, training, precision_of(dtype))


@lru_cache(4096)
def _layers_at_once(device, layer, sizes, dtype, layers, training, precision) -> tuple[int, ...]:
    T, B, H, R = sizes
    return plan.layers_at_once(device, sizes_of(layer, T, B, H, R, dtype, precision), layers, training)


def describe(
    layer: Layer,
    T: int,
    B: int,
    H: int,
    R: int,
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    layers: int = 1,
) -> str:
    """How the engine would run a layer, in words. T steps, B rows, H units, R outputs (projection, or H).

    layers: so many that run at once.
    """
    if dtype is torch.float64:
        return "the reference, operation by operation: the kernels have no float64"
    target, sizes = device_of(device), replace(sizes_of(layer, T, B, H, R, dtype), layers=layers)
    passes = {"forward": True, "backward": False} if training else {"forward": True}
    words = [f"{layers} layers at once"] * (layers > 1)
    for name, forward in passes.items():
        found = _plan(target, sizes, forward)
        words.append(f"{name}: {found or 'the reference, operation by operation: no schedule reduces so many units of a row'}")
    return "; ".join(words + [f"no {selftest.in_words(part)}: {off(device)[part]}" for part in target.off])


def _plan(target: plan.Device, sizes: plan.Sizes, forward: bool) -> plan.Plan | None:
    """The plan of a pass; None where the device has none, as may be with reductions over the units of a row."""
    try:
        return plan.choose(target, sizes, forward)
    except ValueError:
        return None


def _by_reference(inputs: Inputs, weights: Sequence[Tensor], layer: Layer, forward: bool) -> bool:
    """Does the reference run a pass: of float64, in which the kernels do not multiply, or one that has no plan?"""
    x, cell = inputs.x, CELLS[layer.cell]
    if x.dtype is torch.float64 or not cell.reduces:
        return x.dtype is torch.float64
    steps, R = Steps(layer, inputs), inputs.h0.shape[2]
    sizes = sizes_of(layer, steps.steps, steps.batch, weights[0].shape[0] // cell.gates, R, x.dtype)
    return _plan(device_of(x.device), sizes, forward) is None


def _without_autocast(op: Callable) -> Callable:
    """What is multiplied around the kernels has the dtypes that it should: autocast would change them."""

    def run(*args, **more):
        if not torch.is_autocast_enabled("cuda"):
            return op(*args, **more)
        with torch.autocast("cuda", enabled=False):
            return op(*args, **more)

    return run


@_without_autocast
def layer_forward(x, batch_sizes, h0, c0, weights, text, save, *more):
    """The raw op's implementation: the kernels, or the reference. more: the other fields of Inputs."""
    inputs, own = Inputs(x, batch_sizes, h0, c0, *more), layer_of(text)
    if _by_reference(inputs, weights, own, True):
        return reference.layer_forward(inputs, weights, own, save)
    from . import layer

    return layer.layer_forward(x, batch_sizes, h0, c0, weights, text, save, *more)


@_without_autocast
def layer_backward(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, saved, text, needs, *more, dc_steps=None):
    """The raw op's implementation, likewise; and with dc_steps, gradients [D, N, S * H] of the states but h after each step."""
    inputs, own = Inputs(x, batch_sizes, h0, c0, *more), layer_of(text)
    if _by_reference(inputs, weights, own, False):
        outer = Outer(dy, dh_n, dc_n)
        *of_inputs, dw = gradients.layer_backward(outer, inputs, weights, y, saved, own, Needs(*needs), dc_steps)
        return *of_inputs, [grad.clone() if grad is before else grad for before, grad in zip((None, *dw), dw, strict=False)]
    from . import layer

    return layer.layer_backward(
        dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, saved, text, needs, *more, dc_steps=dc_steps
    )


@_without_autocast
def layers_forward(*given):
    """`layer_forward` of layers that run at once, see layer.py; not of float64."""
    from . import layer

    return layer.layers_forward(*given)


@_without_autocast
def layers_backward(*given):
    """`layer_backward`, likewise."""
    from . import layer

    return layer.layers_backward(*given)


@cache
def register() -> None:
    """Make this engine the implementation of the raw ops on CUDA and ROCm devices."""
    library = torch.library.Library("fastrnn", "IMPL", "CUDA")
    library.impl("layer_forward", layer_forward)
    library.impl("layer_backward", layer_backward)
    _libraries.append(library)
