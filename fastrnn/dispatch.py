"""Which engine runs a call, and why each other would not.

Engines, in order of preference:
    cpu        fastrnn.kernels.cpu, compiled kernels for plain CPU tensors
    triton     fastrnn.kernels.gpu, Triton kernels for plain tensors on a GPU
    reference  fastrnn.kernels.reference, the slow definition; only when forced
    torch      torch.nn's own path, which takes everything

The environment variable FASTRNN_BACKEND, read once at import, forces one of them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import checkpoint, features
from fastrnn.kernels import cpu, gpu
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.layer import Layer, layer_of


def forward_mode() -> bool:
    """Is a level of forward-mode differentiation open? torch.func's levels open one of torch.autograd's too."""
    return forward_ad._current_level >= 0


forced = os.environ.get("FASTRNN_BACKEND") or None  # an empty variable is no choice

FUSED = frozenset(("cpu", "triton"))  # engines behind the raw ops
native: Any = None  # the compiled runtime with the fast path of a call, csrc/modules.cpp, where there is one
_PLAIN = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor))
HALF = frozenset((torch.float16, torch.bfloat16))
_AUTOCAST = HALF | {torch.float32}  # what autocast casts
_CPU_DTYPES = (*cpu.DTYPES, *sorted(HALF, key=str))
_GPU_DTYPES = (*gpu.DTYPES, torch.float64)  # the last through the reference
# Where one of these returns something true, somebody watches calls from outside, who would not see those on the fast path.
_WATCHERS = (
    torch._C._get_tracing_state,
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch.autograd._profiler_enabled,
)
BY_MODE = {cell.mode: cell.name for cell in CELLS.values()}  # names of cells by torch.nn's
unavailable: str | None = "its operators are not registered yet"  # or None


def mode_of(module: nn.RNNBase | nn.RNNCellBase) -> str:
    """Return which cell torch.nn's forward of this module runs, a key of BY_MODE unless an attribute is wrong."""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return "LSTM"
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return "GRU"
    return module.mode if isinstance(module, nn.RNNBase) else f"RNN_{module.nonlinearity}".upper()


def layer_of_module(module: Any) -> Layer:
    """Describe a layer of a module of torch.nn's, or a cell's single step, by the module's attributes."""
    cell = BY_MODE[mode_of(module)]
    if not isinstance(module, nn.RNNBase):
        return Layer(cell, bias=module.bias)
    layer = Layer(cell, 1 + module.bidirectional, module.bias, module.proj_size > 0, False, module.batch_first)
    if not getattr(module, "_fastrnn_features", False):
        return layer
    heads: Any = module.num_heads
    norm: Any = module.layer_norm
    return layer._replace(cell=features.cell_name(module), heads=heads, bias=module.bias or norm)


def watched() -> bool:
    """Might somebody look at a call from outside? Not under a compiler, whose every call may be traced."""
    return torch._C._is_any_autocast_enabled() or _watched_but_for_autocast()


def _watched_but_for_autocast() -> bool:
    return forward_mode() or any(watches() for watches in _WATCHERS)


def load() -> None:
    """Have the engines register their operators; where the CPU's cannot, remember why: torch.nn takes its calls."""
    global native, unavailable
    gpu.register()
    try:
        if cpu.load()[0] == "compiled" and forced in (None, "cpu"):
            native = cpu.runtime_module()
            native.watch(_WATCHERS, torch._C._is_any_autocast_enabled, vars(forward_ad))
        unavailable = None
    except RuntimeError as error:
        unavailable = str(error)
        warnings.warn(f"torch.nn's own path runs, fastrnn's CPU engine cannot: {error}", RuntimeWarning, stacklevel=2)


def choose(
    x: Tensor, batch_sizes: Tensor | None, states: Sequence[Tensor], weights: Sequence[Tensor], compressed: bool = False
) -> str:
    """Return the name of the engine that runs this call. compressed: the weights are those of a layer that was compressed.

    Raises:
        RuntimeError: FASTRNN_BACKEND names no engine, or one that cannot run the call; or the CPU engine would read memory that
            is not there.
    """
    engine = forced or ("triton" if getattr(x, gpu.HERE, False) else "cpu")
    if engine not in _WHY_NOT:
        raise RuntimeError(f"FASTRNN_BACKEND={forced}: no such engine, expected one of {', '.join(_WHY_NOT)}")
    if reason := why_not(engine, x, batch_sizes, states, weights, compressed):
        if forced:
            raise RuntimeError(f"FASTRNN_BACKEND={forced}: the engine cannot run this call: {reason}")
        return "torch"
    if engine == "cpu":
        check_memory(x, batch_sizes, *states, *weights)
    return engine


def choose_own(cell: str, *call: Any) -> str:
    """Return the engine of a layer that torch.nn has not: of any cell, maybe with noise; the reference where no fused one can.

    call: the arguments of `choose`.
    """
    engine = choose(*call)
    return "reference" if engine == "torch" or why_not_own(engine, cell) else engine


def why_not_own(engine: str, cell: str) -> str | None:
    """Say why an engine declines a cell, whatever the call; None where it does not."""
    return cpu.why_not_cell(cell) if engine == "cpu" else None


def why_not(engine: str, x, batch_sizes, states, weights, compressed: bool) -> str | None:
    """Say why an engine declines a call; None where it takes it. The CPU engine reads compressed matrices as they are."""
    if compressed and engine == "cpu" and has_compressed(x, weights) and not torch.is_autocast_enabled("cpu"):
        weights = [weight for weight in weights if weight.dim() != 2]
    return _WHY_NOT[engine](x, batch_sizes, states, weights)


def check_memory(*tensors: Tensor | None) -> None:
    """Raise what torch.nn raises where a tensor's storage has been freed, or made smaller than its sizes and strides say.

    The compiled runtime checks that itself. This is for what Python does with the tensors before they get there. Under a mode
    or a transform, whose tensors may have no memory of their own, it is left to the runtime.
    """
    if native and not torch.compiler.is_compiling() and not watched():
        native.check_memory(tensors)


def leaves_to_cudnn(layer: Layer, x: Tensor, batch_sizes, w_hh: Tensor, layers: int) -> bool:
    """Does the Triton engine leave a call that it could take to torch.nn, because cuDNN is faster?

    x: a module's input. Not where `may_leave` says no.
    """
    dtype = dtype_on_gpu(x)
    if not may_leave() or dtype is torch.float64:
        return may_leave()
    T, B = steps_and_rows(x, batch_sizes, layer.batch_first)
    H, R = w_hh.shape[0] // CELLS[layer.cell].gates, w_hh.shape[1]
    return gpu.cudnn_is_faster(gpu.device_of(x.device), layer, (T, B, H, R), dtype, layers, batch_sizes is not None)


def takes_on_gpu(text: str, x: Tensor, w_hh: Tensor, layers: int) -> bool:
    """Does the Triton engine run layers of this text one by one, given plain tensors on one device and of a dtype it has?"""
    layer = layer_of(text)
    if forced or gpu.why_not(x.device) or leaves_to_cudnn(layer, x, None, w_hh, layers):
        return False
    return all(set(layers_at_once(layer, x, None, w_hh, layers, training)) == {1} for training in (False, True))


def layers_at_once(
    layer: Layer, x: Tensor, batch_sizes: Tensor | None, w_hh: Tensor, layers: int, training: bool
) -> tuple[int, ...]:
    """So many layers as the Triton engine runs at once, as one node of autograd's, the lowest first: (2, 1), two of three.

    Where somebody watches, each runs alone. Whatever runs a stack on that engine layer by layer asks this first. (The CPU
    engine's fast path, which has all layers of a call at hand, decides for itself.) x: as a module is given it.
    """
    if torch.compiler.is_compiling() or checkpoint.is_on() or _watched_but_for_autocast():
        return (1,) * layers
    T, B = steps_and_rows(x, batch_sizes, layer.batch_first)
    sizes = T, B, w_hh.shape[0] // CELLS[layer.cell].gates, w_hh.shape[1] * layer.heads
    return gpu.layers_at_once(layer, sizes, dtype_on_gpu(x), x.device, layers, training)


def may_leave() -> bool:
    """May the Triton engine leave calls to cuDNN? Not where it is forced, nor for what cuDNN has not or is no part of."""
    return not (
        forced
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_mode()
        or checkpoint.is_on()
    )


def steps_and_rows(x: Tensor, batch_sizes: Tensor | None, batch_first: bool) -> tuple[int, int]:
    """Return the steps and the rows of a module's input."""
    if batch_sizes is not None:
        return len(batch_sizes), int(batch_sizes[0])
    if x.dim() == 2:
        return x.shape[0], 1
    return (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])


def why_not_cpu(x, batch_sizes, states, weights) -> str | None:
    """Why the compiled CPU engine declines a call, or None where it takes it, half precision through float32."""
    mixed = torch.is_autocast_enabled("cpu")
    dtypes = _AUTOCAST if mixed else _CPU_DTYPES
    return _why_not_fused(x, batch_sizes, states, weights, "is_cpu", dtypes, mixed) or unavailable


def has_compressed(x, weights) -> bool:
    """Are x and its weights of the dtypes that `fastrnn.compress` makes: matrices in bfloat16, all else in float32?"""
    if getattr(weights[0], "dtype", None) is not torch.bfloat16 or type(x) not in _PLAIN or x.dtype is not torch.float32:
        return False
    return all(
        type(weight) in _PLAIN
        and weight.dtype is (torch.bfloat16 if weight.dim() == 2 else torch.float32)
        and weight.device == x.device
        and weight.layout is torch.strided
        for weight in weights
    )


def why_not_triton(x, batch_sizes, states, weights) -> str | None:
    """Why the Triton engine declines a call, or None where it takes it."""
    mixed = torch.is_autocast_enabled("cuda")
    reason = _why_not_fused(x, batch_sizes, states, weights, gpu.HERE, _AUTOCAST if mixed else _GPU_DTYPES, mixed)
    if reason is None and mixed:
        reason = _why_not_autocast(x)
    if reason is None and any(tensor.device != x.device for tensor in (*states, *weights)):
        reason = "tensors on several devices"
    return reason or gpu.why_not(x.device)


def _why_not_autocast(x) -> str | None:
    """Under autocast torch.nn's layers compute in float16 where cuDNN takes the input, and in autocast's dtype elsewhere."""
    if not torch.backends.cudnn.enabled:
        return "autocast without cuDNN"
    if x.dtype is torch.bfloat16 and (torch.backends.cudnn.version() or 0) < 91300 and not torch.version.hip:
        return "bfloat16 input under autocast, which cuDNN takes from 9.13 on"
    return None


def dtype_on_gpu(x: Tensor) -> torch.dtype:
    """Return what the Triton engine computes in."""
    return torch.float16 if torch.is_autocast_enabled("cuda") else x.dtype


def _why_not_fused(
    x, batch_sizes, states, weights, here: str, dtypes: Collection[torch.dtype], mixed: bool = False
) -> str | None:
    """What every fused engine declines. Cheap checks: they are on every call.

    here: the attribute of a tensor that says that it is on a device of the engine's. mixed: dtypes need not be the same.
    """
    if type(x) not in _PLAIN:
        return f"{type(x).__name__} is not a plain tensor"
    dtype = x.dtype
    if dtype not in dtypes:
        return f"{dtype}{' under autocast' * mixed}, it takes {', '.join(sorted(map(str, dtypes)))}"
    same = dtypes if mixed else (dtype,)
    for tensor in (x, *states, *weights):  # the usual case first
        if type(tensor) in _PLAIN and tensor.dtype in same and getattr(tensor, here) and tensor.layout is torch.strided:
            continue
        if type(tensor) not in _PLAIN:
            return f"{type(tensor).__name__} is not a plain tensor"
        if tensor.dtype not in same:
            return f"dtypes differ: {dtype} and {tensor.dtype}"
        return f"layout {tensor.layout}" if getattr(tensor, here) else f"device {tensor.device}"
    if x.is_nested:
        return "nested tensor"
    if 0 in x.shape:
        return f"empty input {tuple(x.shape)}"
    if weights and 0 in weights[-1].shape:  # whose rows are units, or its columns
        return "no hidden units"
    if batch_sizes is not None and not batch_sizes.is_cpu:
        return f"batch_sizes on {batch_sizes.device}"
    if torch.compiler.is_compiling():
        if torch.onnx.is_in_onnx_export():
            return "ONNX export"
    elif torch.jit.is_tracing():
        return "torch.jit.trace or ONNX export"
    return None


def why_not_reference(x, batch_sizes, states, weights) -> str | None:
    """Why the reference loop declines a call, or None."""
    if any(not isinstance(tensor, Tensor) for tensor in (x, *states, *weights)):
        return "an argument is not a tensor"
    if 0 in x.shape:
        return f"empty input {tuple(x.shape)}"
    return "no hidden units" if weights and 0 in weights[-1].shape else None


def why_not_torch(x, batch_sizes, states, weights) -> None:
    """torch.nn takes every call."""


_WHY_NOT = {"cpu": why_not_cpu, "triton": why_not_triton, "reference": why_not_reference, "torch": why_not_torch}


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints itself.

    Attributes:
        engine: the engine that would run the call.
        declined: why each other engine would not run it, by name.
        schedule: what the engine says it would do, a line for each layer.
        threads: of the CPU engine, how many it would use at most, and what limits them.
    """

    engine: str
    declined: dict[str, str]
    schedule: tuple[str, ...] = ()
    threads: str = ""

    def __str__(self) -> str:
        lines = [f"engine: {self.engine}"]
        lines += [f"  threads: {self.threads}"] * bool(self.threads)
        lines += [f"  layer {index}: {line}" for index, line in enumerate(self.schedule)]
        lines += [f"not {name}: {reason}" for name, reason in self.declined.items()]
        return "\n".join(lines)

    __repr__ = __str__


def explain(
    module: nn.Module, input: Tensor | PackedSequence, hx=None, *, resets: Any = None, lengths: Any = None
) -> Explanation:
    """Say which engine would run `module(input, hx)`, why each other engine would not, and how; nothing is computed.

    Args:
        module: an RNN, LSTM, GRU or one of the cells. For a torch.nn module, the answer is what fastrnn would do with it.
        input: the call's input. An input that the module would refuse is not looked for.
        hx: the call's initial state, or None.
        resets, lengths: those of the call, or None.

    Raises:
        TypeError: module is none of these.
        ValueError: input has too few dimensions, or too many.
        RuntimeError: FASTRNN_BACKEND names no engine, or one that cannot run the call.
    """
    if own := getattr(type(module), "_fastrnn_explain", None):  # of fastrnn.keras
        return own(module, input, hx)
    if not isinstance(module, (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCellBase)):
        raise TypeError(f"module: expected a recurrent layer or cell, got {type(module).__name__}")
    x, batch_sizes = (input.data, input.batch_sizes) if isinstance(input, PackedSequence) else (input, None)
    dims = (1, 2) if isinstance(module, nn.RNNCellBase) else (2, 3)
    if x.dim() not in dims:
        raise ValueError(f"input: expected {dims[0]} or {dims[1]} dimensions, got {x.dim()}")
    states = () if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    weights = [parameter for parameter in _weights(module) if parameter is not None]
    call = x, batch_sizes, states, weights, getattr(module, "_fastrnn_compressed", False)
    engine, marked = choose(*call), resets is not None or lengths is not None
    own = getattr(module, "_fastrnn_features", False)
    cell = features.cell_name(module) if own else None
    if cell:
        engine = choose_own(cell, *call)
    if left := engine == "triton" and not (marked or own) and _left_to_cudnn(module, x, batch_sizes, weights[1]):
        engine = "torch"
    elif marked and engine == "torch":
        engine = "reference"
    idle = f"{forced} is forced" if forced else f"{engine} takes the call"
    declined = {name: why_not(name, *call) or idle for name in _WHY_NOT if name != engine}
    if left:
        declined["triton"] = "cuDNN is faster for such a call; FASTRNN_BACKEND=triton has it all the same"
    if marked:
        declined["torch"] = "torch.nn has neither resets nor lengths"
    if cell:
        for name in FUSED & declined.keys():
            declined[name] = why_not(name, *call) or why_not_own(name, cell) or idle
        declined["torch"] = f"torch.nn has no {features.described(module)[2:]}"
    if engine != "reference":
        declined["reference"] = "the definition, slow: it runs only where FASTRNN_BACKEND=reference"
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *states, *weights))
    half = weights[0].dtype is torch.bfloat16
    schedule = _schedule(module, x, batch_sizes, states, training, half) if engine in FUSED else ()
    return Explanation(engine, declined, schedule, cpu.team()[1] if engine == "cpu" else "")


def _left_to_cudnn(module: nn.Module, x: Tensor, batch_sizes: Tensor | None, w_hh: Tensor) -> bool:
    if not isinstance(module, nn.RNNBase):
        return may_leave()  # a cell's one step
    return leaves_to_cudnn(layer_of_module(module), x, batch_sizes, w_hh, module.num_layers)


def _weights(module: Any) -> list[Tensor | None]:
    if isinstance(module, nn.RNNBase):
        return list(module._flat_weights)
    return [module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh]


def _schedule(
    module: Any, x: Tensor, batch_sizes: Tensor | None, states: tuple[Tensor, ...], training: bool, half: bool
) -> tuple[str, ...]:
    """What the engine says it would do in each layer. half: its matrices are in bfloat16."""
    I, H = module.input_size, module.hidden_size
    size = 8 if x.dtype is torch.float64 else 4

    layer = layer_of_module(module)

    def describe(T: int, B: int, I: int, R: int, layers: int = 1) -> str:
        if getattr(x, gpu.HERE):
            return gpu.describe(layer, T, B, H, R, dtype_on_gpu(x), x.device, training, layers)
        return cpu.describe(layer, T, B, I, H, R, training, half, layers, module.input_size, size)

    if not isinstance(module, nn.RNNBase):
        return (describe(1, x.shape[0] if x.dim() == 2 else 1, I, H),)
    T, B = steps_and_rows(x, batch_sizes, module.batch_first)
    R = module.proj_size or H
    sizes = [I] + [layer.directions * R] * (module.num_layers - 1)
    if getattr(x, gpu.HERE):
        dropped = module.training and module.dropout > 0
        alone = dropped or (getattr(module, "_fastrnn_features", False) and features.noise_of(module) is not None)
        parts: tuple[int, ...] = (1,) * module.num_layers
        if not alone:
            w_hh: Any = module._flat_weights[1]
            parts = layers_at_once(layer, x, batch_sizes, w_hh, module.num_layers, training)
        return tuple(describe(T, B, H, R, count) for count in parts for _ in range(count))
    # As far as that can be told from here: what the runtime's way from module to result takes, which has all layers at hand.
    plain = batch_sizes is None and x.dim() == 3 and x.dtype in cpu.DTYPES and not watched()
    plain = plain and not (module.training and module.dropout > 0) and all(state.is_contiguous() for state in states)
    plain = plain and all(name in module._parameters for name in module._flat_weights_names)
    layers = module.num_layers if plain else 1
    return tuple(describe(T, B, size, R, layers) for size in sizes)
