"""The operators differentiated: `run_layer` is the entry from Python.

Reverse mode runs through the autograd.Function `LayerFunction`, whose backward is the op layer_backward, itself differentiable
by `BackwardFunction` to any order through the reference. Forward mode runs the reference on dual numbers.

Each transform of torch.func is a level of the dispatcher, and each level calls the ops' kernels anew, with tensors of that
level. So the autograd.Functions here see one level at a time (torch calls that `_SingleLevelFunction`), and grad, vmap, jvp and
functionalize, nested in any order and compiled or not, need no rule beyond the kernels here and in transforms.py.

The Functions take their arguments flat: the fields of `Inputs`, the layer as text, segments (0, or as many as recompute mode
divides the steps into), then each weight. csrc/gradients.cpp reads the same.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_legacy_batchedtensor, peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import Function, _SingleLevelFunction

from fastrnn import checkpoint, dispatch, ops
from fastrnn.kernels import gpu, gradients, reference
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.layer import Inputs, Layer, Needs, Outer, layer_of

_OPTIONS, _WEIGHTS = 8, 10  # the places of the layer's text and of the first weight among the arguments of a Function


def run_layer(
    inputs: Inputs, weights: Sequence[Tensor], layer: Layer, of_cell: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer, differentiable: y, h_n, and c_n for lstm, None otherwise; or several that run at once.

    The states say how many, of which `dispatch.layers_at_once` has said so. The results then have the states of each.
    of_cell: it is an LSTMCell's step and the like, whose results have dtypes of their own under autocast.
    """
    if getattr(inputs.x, gpu.HERE):
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda") if of_cell else torch.float16
            return _under_autocast(run_layer, inputs, weights, layer, dtype)
    elif _is_mixed(inputs, weights):
        return _in_float32(inputs, weights, layer, of_cell)
    wanted, text = torch.is_grad_enabled() and _requires_grad(*inputs, *weights), layer.text()
    if len(inputs.h0) > layer.directions:
        if wanted:
            y, h_n, *c_n = LayersFunction.apply(*inputs, text, 0, *weights)
            return y, h_n, c_n[0] if c_n else None
        y, h_n, c_n, *_ = gpu.layers_forward(*inputs[:4], weights, text, False, *inputs[4:6])
        return y, h_n, None if inputs.c0 is None else c_n
    segments = 0
    if wanted and not torch._C._are_functorch_transforms_active():
        segments = checkpoint.segments_wanted(layer, inputs)
    if wanted and not (torch.compiler.is_compiling() or dispatch.watched()):
        y, h_n, c_n, _ = LayerFunction.apply(*inputs, text, segments, *weights)
    elif segments:
        y, h_n, c_n, _ = ops.checkpoint_forward(*inputs[:4], weights, text, segments, *inputs[4:])
    else:
        y, h_n, c_n, _ = ops.forward(inputs, weights, text, False)
    return y, h_n, None if inputs.c0 is None else c_n


def run_states(inputs: Inputs, weights: Sequence[Tensor], layer: Layer) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`run_layer` without recompute mode, and the states but h after every step [D, N, S * H], rows step-major or packed."""
    if inputs.c0 is None:
        return *run_layer(inputs, weights, layer), None
    if getattr(inputs.x, gpu.HERE):
        if torch.is_autocast_enabled("cuda"):
            return _under_autocast(run_states, inputs, weights, layer, torch.float16)
    elif _is_mixed(inputs, weights):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs.x.dtype
        with torch.autocast("cpu", enabled=False):
            found = run_states(_cast(inputs), [weight.float() for weight in weights], layer)
        y, h_n, c_n, states = (_to(each, dtype) for each in found)
        return y, h_n, c_n, states
    wanted, text = torch.is_grad_enabled() and _requires_grad(*inputs, *weights), layer.text()
    if wanted and not (torch.compiler.is_compiling() or dispatch.watched()):
        y, h_n, c_n, states = StatesFunction.apply(*inputs, text, 0, *weights)
        return y, h_n, c_n, states
    if wanted or dispatch.forward_mode() or torch._C._are_functorch_transforms_active():
        y, h_n, c_n, saved = reference.layer_forward(inputs, weights, layer, True)
    else:
        y, h_n, c_n, saved = ops.forward(inputs, weights, text, True)
    return y, h_n, c_n, reference.carried_states(inputs, layer, saved)


def _is_mixed(inputs: Inputs, weights: Sequence[Tensor]) -> bool:
    """Is a call in half precision or under autocast, on a CPU?"""
    return inputs.x.is_cpu and (weights[0].dtype in dispatch.HALF or torch.is_autocast_enabled("cpu"))


def _in_float32(inputs: Inputs, weights: Sequence[Tensor], layer: Layer, of_cell: bool):
    """`run_layer` in half precision or under autocast, on a CPU: all of it in float32, and each result rounded once.

    Matrices in bfloat16 are read as they are, but where a transform, a compiler or recompute mode wants plain operations.
    """
    dtype, autocast = inputs.x.dtype, torch.is_autocast_enabled("cpu")
    c_n: Tensor | None
    if autocast:  # as torch.nn does: of its GRU, and of LSTMCell, only the products are cast
        dtype, carried = torch.get_autocast_dtype("cpu"), inputs.h0 if layer.cell == "gru" else inputs.c0 if of_cell else None
        dtype = dtype if carried is None else torch.promote_types(dtype, carried.dtype)
    with torch.autocast("cpu", enabled=False) if autocast else contextlib.nullcontext():
        as_they_are = _takes_half(weights) and not (dispatch.forward_mode() or torch._C._are_functorch_transforms_active())
        wanted = torch.is_grad_enabled() and _requires_grad(*inputs, *weights)
        if as_they_are and not wanted:
            y, h_n, c_n, _ = ops.forward(_cast(inputs), _cast_vectors(weights), layer.text(), False)
        elif as_they_are and not (autocast or torch.compiler.is_compiling() or checkpoint.segments_wanted(layer, inputs)):
            y, h_n, c_n = HalfFunction.apply(*inputs, layer.text(), 0, *weights)
        else:
            y, h_n, c_n = run_layer(_cast(inputs), [weight.float() for weight in weights], layer)
        return _to(y, dtype), _to(h_n, dtype), None if inputs.c0 is None else _to(c_n, dtype)


def _under_autocast(run: Callable, inputs: Inputs, weights: Sequence[Tensor], layer: Layer, dtype: torch.dtype) -> tuple:
    """`run`, which is one of those above, under autocast on a GPU: layers in float16, and a cell's step in autocast's dtype.

    So torch does, in aten/src/ATen/cudnn/AutocastRNN.cpp and with its list of what is cast, autocast_mode.h.
    """
    with torch.autocast("cuda", enabled=False):
        return run(_cast(inputs, dtype), [_to(weight, dtype) for weight in weights], layer)


def _cast(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Inputs:
    """The same in one dtype, whatever it was."""
    x, batch_sizes, h0, c0, resets, lengths, mask, noise = inputs
    x, h0, c0, mask, noise = (_to(tensor, dtype) for tensor in (x, h0, c0, mask, noise))
    return Inputs(x, batch_sizes, h0, c0, resets, lengths, mask, noise)


def _cast_vectors(weights: Sequence[Tensor]) -> list[Tensor]:
    """The same in float32 but for matrices, which layer_forward reads in bfloat16."""
    return [weight if weight.dim() == 2 else weight.float() for weight in weights]


def _to(tensor: Any, dtype: torch.dtype | None) -> Any:
    """tensor.to(dtype) in half the time, for what may be absent."""
    if tensor is None or tensor.dtype is dtype:
        return tensor
    return tensor.float() if dtype is torch.float32 else tensor.bfloat16() if dtype is torch.bfloat16 else tensor.to(dtype)


def _takes_half(weights: Sequence[Tensor]) -> bool:
    """Are the matrices in bfloat16, of a kind that layer_forward reads?"""
    return weights[1].shape[1] % 2 == 0 and all(w.dtype is torch.bfloat16 for w in weights if w.dim() == 2)


def _forward_kernel(op, checkpointed: bool):
    """Make the kernel for autograd of layer_forward, or of checkpoint_forward."""

    def kernel(keys, *arguments):
        *tensors, weights, text, last = arguments[:7]
        inputs, forward_mode = Inputs(*tensors, *arguments[7:]), _at_forward_mode()
        wanted = torch.is_grad_enabled() and _requires_grad(*inputs, *weights)
        if not (wanted or forward_mode):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)
        # matrices may be in bfloat16, which neither the reference nor `LayerFunction` takes
        weights = [weight.to(inputs.x.dtype) for weight in weights]
        if forward_mode:  # no `jvp` rule: dual numbers flow through plain operations
            return reference.layer_forward(inputs, weights, layer_of(text), not checkpointed and last)
        # torch.func's levels cannot take recompute mode's steps apart
        segments = last if checkpointed and not torch._C._are_functorch_transforms_active() else 0
        with enable_single_level_autograd_function():
            y, h_n, c_n, saved = LayerFunction.apply(*inputs, text, segments, *weights)
        # last: of layer_forward, whether to save; an op has a tensor in each place
        empty = inputs.x.new_empty(0)
        return y, h_n, empty if c_n is None else c_n, saved if last else empty

    return kernel


def _backward_kernel(op, checkpointed: bool):
    """Make the kernel for autograd of layer_backward, or of checkpoint_backward."""

    def kernel(keys, *arguments):
        given = 13 if checkpointed else 12  # but for the inputs that have defaults
        outer, (weights, y, saved, text, *last) = Outer(*arguments[:3]), arguments[7:given]
        inputs = Inputs(*arguments[3:7], *arguments[given:])
        wanted = torch.is_grad_enabled() and _requires_grad(*outer, *inputs, *weights)
        forward_mode = _at_forward_mode()
        if not (wanted or forward_mode):
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)
        segments, needs = last if checkpointed else (0, *last)
        weights = [weight.to(inputs.x.dtype) for weight in weights]
        if forward_mode:
            return _gradients(outer, inputs, weights, text, needs)
        with enable_single_level_autograd_function():
            dx, dh0, dc0, *dw = BackwardFunction.apply(*outer, *inputs, y, saved, text, segments, needs, *weights)
        return dx, dh0, dc0, dw

    return kernel


for _op, _kernel in (
    (ops.forward_op, _forward_kernel(ops.forward_op, False)),
    (ops.checkpoint_forward, _forward_kernel(ops.checkpoint_forward, True)),
    (ops.backward_op, _backward_kernel(ops.backward_op, False)),
    (ops.checkpoint_backward, _backward_kernel(ops.checkpoint_backward, True)),
):
    ops.library.impl(_op, _kernel, "Autograd", with_keyset=True)


def _at_forward_mode() -> bool:
    """Is forward mode what the current level of torch.func's transforms does, or, without them, torch.autograd?

    A compiled jvp opens its level without torch.autograd.forward_ad's knowing.
    """
    if torch._C._are_functorch_transforms_active():
        return peek_interpreter_stack().key() == TransformType.Jvp
    return dispatch.forward_mode()


class _Function(_SingleLevelFunction):
    """An autograd.Function that differentiates one level of torch.func's transforms, or of torch.autograd without them."""

    apply: Any  # its C base's, which torch's annotations leave out
    _compiled_autograd_key = staticmethod(Function._compiled_autograd_key)  # what torch's compiled autograd looks for


class LayerFunction(_Function):
    """`run_layer` with a gradient; the last output is `saved`, or what recompute mode keeps."""

    @staticmethod
    def forward(ctx, *inputs):
        output = dispatch.native and dispatch.native.layer_forward(inputs)
        y, h_n, c_n, saved = (output or _forward_by_operators(inputs))[:4]
        _keep(ctx, inputs, y, saved, bool(output))
        ctx.mark_non_differentiable(*((saved,) if c_n is None or c_n.dim() > 1 else (c_n, saved)))
        return y, h_n, c_n, saved

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _):
        return LayerFunction.gradients(ctx, Outer(dy, dh_n, dc_n), _kept(ctx))

    @staticmethod
    def gradients(ctx, outer: Outer, kept: tuple):
        """Of the inputs in turn. What was kept may come in another dtype than it was kept in."""
        found = _runtime_backward(outer, kept, ctx.options, ctx.needs_input_grad)
        if found is not None:
            return found
        *tensors, y, saved = kept[:_WEIGHTS]
        inputs, weights, (text, segments) = Inputs(*tensors), kept[_WEIGHTS:], ctx.options
        if all(grad is None for grad in outer):
            return (None,) * (_WEIGHTS + len(weights))
        need_dx, _, *states = ctx.needs_input_grad[:4]
        need_dw, by_old_vmap = any(ctx.needs_input_grad[_WEIGHTS:]), mapped_by_old_vmap(outer)
        if torch.is_grad_enabled() or dispatch.forward_mode() or by_old_vmap:
            _check_apart(ctx)
            need_dw = need_dw and _asks_for_any(ctx, len(weights), y.numel())
        needs = [need_dx, any(states), need_dw]
        if by_old_vmap:
            dx, dh0, dc0, dw = _gradients(outer, inputs, weights, text, needs)
        elif torch.is_grad_enabled() and not (torch.compiler.is_compiling() or dispatch.watched()):
            dx, dh0, dc0, *dw = BackwardFunction.apply(*outer, *inputs, y, saved, text, segments, needs, *weights)
        else:
            dx, dh0, dc0, dw = _backward_by_operators(outer, inputs, weights, y, saved, text, segments, needs)
        dh0, dc0 = (dh0, None if inputs.c0 is None else dc0) if any(states) else (None, None)
        return dx if need_dx else None, None, dh0, dc0, *[None] * 6, *(dw if need_dw else [None] * len(weights))


def _forward_by_operators(inputs: tuple) -> tuple[Tensor, ...]:
    """Return y, h_n, c_n, saved of the arguments of a Function."""
    *tensors, text, segments = inputs[:_WEIGHTS]
    weights = inputs[_WEIGHTS:]
    if not (segments or torch._C._are_functorch_transforms_active()):
        return ops.forward(Inputs(*tensors), weights, text, True)
    with _outer_levels():
        if segments:
            return ops.checkpoint_forward(*tensors[:4], weights, text, segments, *tensors[4:])
        return ops.forward(Inputs(*tensors), weights, text, True)


def _without_gradients(*inputs) -> tuple[Tensor, ...]:
    """The same without `saved`, of a call on a GPU that is not differentiated."""
    *tensors, text, _ = inputs[:_WEIGHTS]
    return ops.forward(Inputs(*tensors), inputs[_WEIGHTS:], text, False)


def _backward_by_operators(outer: Outer, inputs: Inputs, weights, y, saved, text: str, segments: int, needs: list[bool]):
    """Return dx, dh0, dc0 and the list of dw."""
    if segments:
        return ops.checkpoint_backward(*outer, *inputs[:4], weights, y, saved, text, segments, needs, *inputs[4:])
    return ops.backward(outer, inputs, weights, y, saved, text, needs)


def _keep(ctx, inputs: tuple, y: Tensor, saved: Tensor, eager: bool) -> None:
    """Keep for backward the inputs of a Function here, y and saved: what `_kept` returns.

    autograd watches what it saves: backward raises if that has been changed in place. What backward does not need may be
    changed, as in torch.nn. It is kept apart, for a second derivative, which does need it.

    eager: no compiler and no transform sees the call, nor is it in recompute mode.
    """
    ctx.options = inputs[_OPTIONS:_WEIGHTS]
    ctx.set_materialize_grads(False)
    if not (eager or _is_eager(inputs[_WEIGHTS - 1])):
        ctx.apart = None
        ctx.save_for_backward(*inputs[:_OPTIONS], y, saved, *inputs[_WEIGHTS:])
        return
    numbers = inputs[2].numel() // (1 + layer_of(inputs[_OPTIONS]).restarts)  # of h0 before the first step
    one_step = bool(y.numel() == numbers)  # sizes may be symbols, whose truth no cache of torch 2.10 finds
    unneeded, *selectors = _unneeded(ctx.needs_input_grad, inputs[_OPTIONS], one_step)
    if unneeded and unneeded[0] < _WEIGHTS:
        # An input that is no leaf may become a function of the output, in place, and a reference from here would be a cycle.
        unneeded = tuple(index for index in unneeded if index >= _WEIGHTS or inputs[index].is_leaf)
        inputs = tuple(
            given.detach() if index in unneeded and index < _WEIGHTS and not given.requires_grad else given
            for index, given in enumerate(inputs)
        )
        selectors = list(_selectors(unneeded, len(inputs)))
    watched, unwatched, order = selectors
    tensors = *inputs, y, saved
    ctx.save_for_backward(*watched(tensors))
    apart = unwatched(tensors)
    ctx.apart = order, apart, [_version(tensor) for tensor in apart]


def _is_eager(segments: int) -> bool:
    return not (segments or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


@functools.cache
def _unneeded(needs: tuple[bool, ...], text: str, one_step: bool) -> tuple:
    """Which arguments of a Function its backward does not need where `needs` are asked for, by index; and _selectors of these.

    Cells that read the state itself, as GRU's, always need h0, those with weights of their own the biases they stand behind.
    """
    layer = layer_of(text)
    own = layer.by_direction(range(_WEIGHTS, len(needs)))
    unneeded: list[int] = []
    if not any(needs[weights.w_ih] for weights in own):
        unneeded += [0]
    if not any(needs[weights.w_hh] for weights in own) and not CELLS[layer.cell].reads_hidden:
        unneeded += [2]
    if not needs[0]:
        unneeded += [weights.w_ih for weights in own]
    if one_step and not needs[2]:
        unneeded += [weights.w_hh for weights in own]
    if layer.bias:
        unneeded += [] if CELLS[layer.cell].weights else [weights.b_ih for weights in own]
        unneeded += [weights.b_hh for weights in own]
    return tuple(unneeded), *_selectors(tuple(unneeded), len(needs))


@functools.cache
def _selectors(unneeded: tuple[int, ...], count: int) -> tuple[Callable, Callable, Callable]:
    """Make functions that take the others and these out of `count` inputs, y and saved, and one that joins them again."""
    everything = [*range(_OPTIONS), count, count + 1, *range(_WEIGHTS, count)]
    others = [index for index in everything if index not in unneeded]
    together = [*others, *unneeded]
    return _selector(others), _selector(unneeded), _selector([together.index(index) for index in everything])


def _selector(indices: Sequence[int]) -> Callable[[tuple], tuple]:
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda items: tuple(items[index] for index in indices)


def _kept(ctx) -> tuple[Any, ...]:
    """Return the inputs, y, saved and the weights, of those that `_keep` kept."""
    if ctx.apart is None:
        return ctx.saved_tensors
    order, apart, _ = ctx.apart
    return order(ctx.saved_tensors + apart)


def _asks_for_any(ctx, last: int, numbers: int) -> bool:
    """Does this pass of autograd ask for the gradient of any of the last inputs? needs_input_grad only says if it might.

    True as well where finding out takes longer than a gradient of so few numbers.
    """
    if numbers < 4096 or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    for node, _ in ctx.next_functions[-last:]:
        try:
            if node is not None and torch._C._will_engine_execute_node(node):
                return True
        except RuntimeError:  # of a leaf whose gradient autograd.grad returns
            return True
    return False


def _check_apart(ctx) -> None:
    """Raise autograd's error where something has been changed that only a second derivative needs."""
    if ctx.apart is None:
        return
    _, apart, versions = ctx.apart
    for tensor, version in zip(apart, versions, strict=True):
        if _version(tensor) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} instead. "
                "It is needed because the gradient is itself differentiated (create_graph=True)."
            )


def _version(tensor: Tensor) -> int | None:
    """How often a tensor has been changed in place. Tensors made in inference mode do not count that."""
    return None if tensor.is_inference() else tensor._version


def _runtime_backward(outer: tuple, kept: tuple, options: tuple, needs: tuple):
    """Return the gradients of a Function's arguments in turn, from the runtime; None where others are to see the call.

    That is the dispatcher or autograd: the runtime declines what is watched or differentiated.
    """
    if not dispatch.native or torch.compiler.is_compiling() or mapped_by_old_vmap(outer):
        return None
    return dispatch.native.layer_backward(outer, kept, options, needs)


@contextlib.contextmanager
def _outer_levels() -> Iterator[None]:
    """Within an autograd.Function, call an op of which the outer transforms of torch.func take their own derivatives.

    A Function switches differentiation off for what it calls, for all levels of transforms, where only its own is done with.
    """
    if torch._C._are_functorch_transforms_active():
        with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            yield
    else:
        yield


class StatesFunction(_Function):
    """`LayerFunction` of a cell with states but h, whose last output is these after every step; without recompute mode.

    A gradient of that output is carried back by the kernels, and where these decline as `ops.backward_of_states` says.
    """

    @staticmethod
    def forward(ctx, *inputs):
        output = dispatch.native and dispatch.native.layer_forward(inputs)
        y, h_n, c_n, saved = (output or _forward_by_operators(inputs))[:4]
        _keep(ctx, inputs, y, saved, bool(output))
        return y, h_n, c_n, reference.carried_states(Inputs(*inputs[:_OPTIONS]), layer_of(inputs[_OPTIONS]), saved).clone()

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, d_states):
        outer, kept = Outer(dy, dh_n, dc_n), _kept(ctx)
        if d_states is None:
            return LayerFunction.gradients(ctx, outer, kept)
        d_states = d_states.contiguous()
        found = _runtime_backward((*outer, d_states), kept, ctx.options, ctx.needs_input_grad)
        if found is not None:
            return found
        _check_apart(ctx)
        *tensors, y, saved = kept[:_WEIGHTS]
        inputs, weights, layer = Inputs(*tensors), kept[_WEIGHTS:], layer_of(ctx.options[0])
        if torch.is_grad_enabled() or mapped_by_old_vmap((*outer, d_states)):
            y, _, _, saved = reference.layer_forward(inputs, weights, layer, True)
        need_dx, _, *states = ctx.needs_input_grad[:4]
        needs = Needs(need_dx, any(states), any(ctx.needs_input_grad[_WEIGHTS:]))
        dx, dh0, dc0, dw = ops.backward_of_states(outer, inputs, weights, y, saved, ctx.options[0], needs, d_states)
        of_states = (dh0, dc0) if needs.dh0 else (None, None)
        return dx if need_dx else None, None, *of_states, *[None] * (_WEIGHTS - 4), *(dw if needs.dw else [None] * len(weights))


class HalfFunction(_Function):
    """`LayerFunction` of matrices in bfloat16, all else in any dtype: in float32, each result and gradient rounded once."""

    @staticmethod
    def forward(ctx, *inputs):
        output = dispatch.native and dispatch.native.layer_forward(inputs)
        if output:
            y, h_n, c_n, saved, wide_y = output
            wide_y = y if wide_y is None else wide_y
        else:
            dtype = inputs[0].dtype
            wide = *_cast(Inputs(*inputs[:_OPTIONS])), *inputs[_OPTIONS:_WEIGHTS], *_cast_vectors(inputs[_WEIGHTS:])
            found = dispatch.native and dispatch.native.layer_forward(wide)
            wide_y, h_n, c_n, saved, *_ = found or _forward_by_operators(wide)
            y, h_n, c_n = _to(wide_y, dtype), _to(h_n, dtype), None if inputs[3] is None else _to(c_n, dtype)
        _keep(ctx, inputs, wide_y, saved, bool(output))
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, *grads):
        outer, kept = Outer(*grads), _kept(ctx)
        found = _runtime_backward(outer, kept, ctx.options, ctx.needs_input_grad)
        if found is not None:
            return found
        dispatch.check_memory(*outer, *kept)
        *tensors, y, saved = kept[:_WEIGHTS]
        inputs, weights = Inputs(*tensors), list(kept[_WEIGHTS:])
        dtypes = inputs.x.dtype, None, inputs.h0.dtype, inputs.h0.dtype, *[None] * 6, *[weight.dtype for weight in weights]
        plain = not (dispatch.forward_mode() or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active())
        if not plain or mapped_by_old_vmap(outer):
            weights = [weight.float() for weight in weights]
        outer = Outer(*(_to(grad, torch.float32) for grad in outer))
        found = LayerFunction.gradients(ctx, outer, (*_cast(inputs), y, saved, *weights))
        return tuple(_to(grad, dtype) for grad, dtype in zip(found, dtypes, strict=True))


class CellFunction(_Function):
    """`LayerFunction` of one step, without axes of time and directions: x [B, I], h [B, R], c [B, H] -> h, and c for lstm."""

    @staticmethod
    def forward(ctx, *inputs):
        output = dispatch.native.layer_forward(inputs)
        eager = output is not None
        if not eager:
            y, h, c, saved = _forward_by_operators((*map(_unsqueezed, inputs[:4]), *inputs[4:]))
            output = y[0], h[0].clone(), c[0].clone() if len(c) else None, saved  # of a view torch would forbid changes
        y, h, c, saved, *_ = output
        _keep(ctx, inputs, y, saved, eager)
        return (h,) if inputs[3] is None else (h, c)

    @staticmethod
    def backward(ctx, dh, dc=None):
        kept = _kept(ctx)
        found = _runtime_backward(Outer(dh, None, dc), kept, ctx.options, ctx.needs_input_grad)
        if found is None:
            outer = Outer(_unsqueezed(dh), None, _unsqueezed(dc))
            y = _OPTIONS  # and what stands before it
            found = LayerFunction.gradients(ctx, outer, (*map(_unsqueezed, kept[: y + 1]), *kept[y + 1 :]))
            found = *(None if grad is None else grad.squeeze(0) for grad in found[:4]), *found[4:]
        return found


class LayersFunction(_Function):
    """`LayerFunction` of layers that run at once, on a GPU: y, h_n, and c_n for lstm. It keeps what each of them would.

    What autograd differentiates again, or maps over gradients, runs them one after another.
    """

    @staticmethod
    def forward(ctx, *inputs):
        given, text, weights = inputs[:_OPTIONS], inputs[_OPTIONS], inputs[_WEIGHTS:]
        y, h_n, c_n, saved, below = gpu.layers_forward(*given[:4], weights, text, True, *given[4:6])
        ctx.options = text
        ctx.save_for_backward(*given, y, saved, below, *weights)
        ctx.set_materialize_grads(False)
        return (y, h_n) if given[3] is None else (y, h_n, c_n)

    @staticmethod
    def backward(ctx, *grads):
        outer, needed = Outer(*grads, *[None] * (3 - len(grads))), ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(needed)
        if all(grad is None for grad in outer):
            return tuple(found)
        *tensors, y, saved, below = ctx.saved_tensors[: _OPTIONS + 3]
        inputs, weights = Inputs(*tensors), ctx.saved_tensors[_OPTIONS + 3 :]
        if torch.is_grad_enabled() or dispatch.forward_mode() or mapped_by_old_vmap(outer):
            return _gradients_one_by_one(outer, inputs, weights, ctx.options, needed)
        need_dx, _, *states = needed[:4]
        needs = [need_dx, any(states), any(needed[_WEIGHTS:])]
        call = *inputs[:4], weights, y, saved, below, ctx.options, needs, *inputs[4:6]
        dx, dh0, dc0, dw = gpu.layers_backward(*outer, *call)
        found[0] = dx if need_dx else None
        if any(states):
            found[2:4] = dh0, None if inputs.c0 is None else dc0
        found[_WEIGHTS:] = dw or found[_WEIGHTS:]
        return tuple(found)


def _gradients_one_by_one(outer: Outer, inputs: Inputs, weights: Sequence[Tensor], text: str, needed: Sequence[bool]):
    """Gradients of the arguments of `LayersFunction`, where each layer runs again as a node of its own."""
    arguments: list[Any] = [*inputs, text, 0, *weights]
    with torch.enable_grad():
        for index, need in enumerate(needed):
            if need:  # one may be a function of another
                arguments[index] = arguments[index].view_as(arguments[index])
        again, own, layers = Inputs(*arguments[:_OPTIONS]), arguments[_WEIGHTS:], len(inputs.h0)
        each, y, states = len(own) // layers, again.x, []
        for index in range(layers):
            c0 = None if again.c0 is None else again.c0[index : index + 1]
            of_layer = again._replace(x=y, h0=again.h0[index : index + 1], c0=c0)
            y, *after = run_layer(of_layer, own[index * each : (index + 1) * each], layer_of(text))
            states.append(after)
        h_n, c_n = (None if of_all[0] is None else torch.cat(of_all) for of_all in zip(*states, strict=True))
        pairs = [(output, grad) for output, grad in zip((y, h_n, c_n), outer, strict=True) if grad is not None]
        wanted = [index for index, need in enumerate(needed) if need]
        outputs, grads = zip(*pairs, strict=True)
    of_wanted = torch.autograd.grad(
        outputs, [arguments[index] for index in wanted], grads, create_graph=torch.is_grad_enabled(), allow_unused=True
    )
    found: list[Tensor | None] = [None] * len(needed)
    for index, grad in zip(wanted, of_wanted, strict=True):
        found[index] = grad
    return tuple(found)


class BackwardFunction(_Function):
    """The gradients of `LayerFunction`: dx, dh0, dc0 and each dw; kernels/gradients.py has their own gradients."""

    @staticmethod
    def forward(ctx, *arguments):
        outer, inputs = Outer(*arguments[:3]), Inputs(*arguments[3:11])
        (y, saved, text, segments, needs), weights = arguments[11:16], arguments[16:]
        ctx.options = text, segments, needs
        ctx.save_for_backward(*outer, *inputs, y, saved, *weights)
        ctx.set_materialize_grads(False)
        need_dx, need_dh0, need_dw = needs
        needed = need_dx, False, need_dh0, need_dh0, *(False,) * 6, *(need_dw,) * len(weights)
        found = _runtime_backward(outer, (*inputs, y, saved, *weights), (text, segments), needed)
        if found is not None:
            (dx, _, dh0, dc0), dw = found[:4], found[_WEIGHTS:]
            empty = inputs.x.new_empty(0)
            return *(empty if grad is None else grad for grad in (dx, dh0, dc0)), *(dw if need_dw else ())
        with _outer_levels():
            dx, dh0, dc0, dw = _backward_by_operators(outer, inputs, weights, y, saved, text, segments, needs)
        return dx, dh0, dc0, *dw

    @staticmethod
    def backward(ctx, *grads):
        *tensors, y, saved = ctx.saved_tensors[:13]
        outer, inputs, weights = Outer(*tensors[:3]), Inputs(*tensors[3:]), ctx.saved_tensors[13:]
        if all(grad is None for grad in grads):
            return (None,) * (16 + len(weights))
        (text, segments, (need_dx, need_dh0, need_dw)), (ddx, ddh0, ddc0, *ddw) = ctx.options, grads
        v = ddx if need_dx else None, *((ddh0, ddc0) if need_dh0 else (None, None)), ddw if need_dw else None
        # y and saved are functions of the rest, and their share of a third derivative is taken through it
        if torch.is_grad_enabled():
            y, _, _, saved = reference.layer_forward(inputs, weights, layer_of(text), True)
        elif segments:
            y, _, _, saved = ops.forward(inputs, weights, text, True)
        need_dw = any(ctx.needs_input_grad[16:]) and _asks_for_any(ctx, len(weights), y.numel())
        needs = Needs(ctx.needs_input_grad[3], True, need_dw)
        outer, inputs, dw = gradients.layer_double_backward(v, outer, inputs, weights, y, saved, layer_of(text), needs)
        return *outer, *inputs, *(None,) * 5, *(dw or (None,) * len(weights))


def _gradients(outer: Outer, inputs: Inputs, weights: Sequence[Tensor], text: str, needs: list[bool]):
    """What layer_backward returns, as plain operations on the layer's inputs."""
    layer = layer_of(text)
    y, _, _, saved = reference.layer_forward(inputs, weights, layer, True)
    return gradients.layer_backward(outer, inputs, weights, y, saved, layer, Needs(*needs))


def mapped_by_old_vmap(grads: Sequence[Tensor | None]) -> bool:
    """autograd.grad(is_grads_batched=True) maps by a mechanism older than torch.func's, without rules for our ops."""
    for grad in grads:
        if grad is not None and is_legacy_batchedtensor(grad):
            return True
    return False


def _requires_grad(*tensors: Tensor | None) -> bool:
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _unsqueezed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


if dispatch.native:
    _pattern = torch.empty(1, dtype=torch.float32, device="cpu")
    _functions = LayerFunction.apply, HalfFunction.apply, CellFunction.apply, checkpoint.is_on, torch.cat
    dispatch.native.differentiate(*_functions, _pattern, _without_gradients, dispatch.takes_on_gpu)
