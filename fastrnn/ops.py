"""The operators: one recurrent layer forward, and its gradients, each once for every cell and device.

Raw ops. Engines register them per device; the kernels for autograd and vmap, which are here, make them differentiable and
mappable wherever they are called: eagerly, in a graph of torch.compile's or make_fx's, in an exported program.
They assume T >= 1, B >= 1, one dtype and one device.

    layer_forward -> y, h_n, c_n, saved
    layer_backward -> dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr

    x            dense [T, B, I], or [B, T, I] with batch_first; or packed [N, I] with
    batch_sizes  int64 [T] on the CPU, rows of each step, never increasing, sum N
    h0, c0       [D, B, R], [D, B, S*H] (only of cells with states but h: S of these side by side; lstm has one)
    w_ih, ...    one tensor a direction, D in {1, 2}: w_ih [G*H, I], w_hh [G*H, R], b_* [G*H] or no tensors,
                 w_hr [R, H] or no tensors. Of a cell with W weights of its own for each unit, b_ih is [(G+W)*H], and these
                 stand behind the biases. Direction 1 runs opposite to direction 0. On the CPU, where all else is float32 and
                 R is even, matrices may be bfloat16, and their gradients are then, rounded once.
    cell         a key of fastrnn.kernels.cells.CELLS
    reverse      direction 0 runs from the last step to the first
    save         keep what layer_backward needs
    y            contiguous [T, B, D*R] | [B, T, D*R] | [N, D*R]
    h_n, c_n     [D, B, R], like c0 ([0] where there is none)
    saved        [D, rows, slots*H], rows step-major (also when batch_first) or packed; one more slot, the output before
                 the projection, where there is one. [0] without `save`.
    dx, dw_*     like x, contiguous; weights' gradients one below the other, dw_ih [D*G*H, I] and so on. [0] where not needed
                 or not there.
    dh0, dc0     like h0 and c0; [0] without need_dh0, which asks for both.

The same two in the recompute mode, over the raw ops of any engine, see checkpoint.py:

    checkpoint_forward -> y, h_n, c_n, kept
    checkpoint_backward -> as layer_backward

    segments     parts of about equal rows into which the steps are divided, from 1 to max(1, T // 2)
    weights      in x's dtype, all
    kept         [D, segments - 1, B, S*H], states before each segment but a direction's first, in the order they run; [0]
                 for cells that have none

`layer` is the entry from Python. Reverse mode runs through the autograd.Function `Layer`, whose backward is the op
layer_backward, itself differentiable by `LayerBackward` to any order through the reference. vmap folds the mapped axis into the
batch, or loops. Forward mode runs the reference on dual numbers.

Each transform of torch.func is a level of the dispatcher, and each level calls the ops' kernels anew, with tensors of that
level. So the autograd.Functions here see one level at a time (torch calls that `_SingleLevelFunction`), and grad, vmap, jvp and
functionalize, nested in any order and compiled or not, need no rule beyond these kernels.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_legacy_batchedtensor, peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import Function, _SingleLevelFunction
from torch.nn import Parameter

from fastrnn import checkpoint, dispatch
from fastrnn.kernels import gpu, gradients, reference
from fastrnn.kernels.cells import CELLS

Kinds: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]

_LAYER = (
    "Tensor x, Tensor? batch_sizes, Tensor h0, Tensor? c0, "
    "Tensor[] w_ih, Tensor[] w_hh, Tensor[] b_ih, Tensor[] b_hh, Tensor[] w_hr"
)
_library = torch.library.Library("fastrnn", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    f"layer_forward({_LAYER}, str cell, bool reverse, bool batch_first, bool save) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)",
    tags=_tags,
)
_library.define(
    f"layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, {_LAYER}, Tensor y, Tensor saved, "
    "str cell, bool reverse, bool batch_first, bool need_dx, bool need_dh0, bool need_dw) -> (Tensor dx, "
    "Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh, Tensor dw_hr)",
    tags=_tags,
)
_library.define(
    f"checkpoint_forward({_LAYER}, str cell, bool reverse, bool batch_first, SymInt segments) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor kept)",
    tags=_tags,
)
_library.define(
    f"checkpoint_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, {_LAYER}, Tensor y, Tensor kept, "
    "str cell, bool reverse, bool batch_first, SymInt segments, bool need_dx, bool need_dh0, bool need_dw) -> (Tensor dx, "
    "Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh, Tensor dw_hr)",
    tags=_tags,
)
_forward_op = torch.ops.fastrnn.layer_forward.default
_backward_op = torch.ops.fastrnn.layer_backward.default
_checkpoint_forward = torch.ops.fastrnn.checkpoint_forward.default
_checkpoint_backward = torch.ops.fastrnn.checkpoint_backward.default
OPERATORS = _forward_op, _backward_op, _checkpoint_forward, _checkpoint_backward
_library.impl("checkpoint_forward", checkpoint.forward, "CompositeExplicitAutograd")
_library.impl("checkpoint_backward", checkpoint.backward, "CompositeExplicitAutograd")


def _forward_autograd(op, checkpointed: bool):
    """Make the kernel for autograd of layer_forward, or of checkpoint_forward."""

    def kernel(keys, x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first, last):
        forward_mode = _at_forward_mode()
        wanted = torch.is_grad_enabled() and _requires_grad((x, h0, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr), c0)
        if not (wanted or forward_mode):
            with torch._C._AutoDispatchBelowAutograd():
                layer = x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first
                return op.redispatch(keys & torch._C._after_autograd_keyset, *layer, last)
        # matrices may be in bfloat16, which neither the reference nor `Layer` takes
        w_ih, w_hh, b_ih, b_hh, w_hr = ([w.to(x.dtype) for w in kind] for kind in (w_ih, w_hh, b_ih, b_hh, w_hr))
        if forward_mode:  # no `jvp` rule: dual numbers flow through plain operations
            layer = x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first
            return reference.layer_forward(*layer, not checkpointed and last)
        # torch.func's levels cannot take recompute mode's steps apart
        segments = last if checkpointed and not torch._C._are_functorch_transforms_active() else 0
        with enable_single_level_autograd_function():
            options = cell, reverse, batch_first, segments, len(w_ih)
            y, h_n, c_n, saved = Layer.apply(x, batch_sizes, h0, c0, *options, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr)
        # last: of layer_forward, whether to save; an op has a tensor in each place
        return y, h_n, x.new_empty(0) if c_n is None else c_n, saved if last else x.new_empty(0)

    return kernel


def _backward_autograd(op, checkpointed: bool):
    """Make the kernel for autograd of layer_backward, or of checkpoint_backward."""

    def kernel(
        keys, dy, dh_n, dc_n, x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y, saved, cell, reverse, batch_first, *last
    ):  # fmt: skip
        given = [tensor for tensor in (dy, dh_n, dc_n, c0) if tensor is not None]
        wanted = torch.is_grad_enabled() and _requires_grad((x, h0, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *given), None)
        forward_mode = _at_forward_mode()
        if not (wanted or forward_mode):
            with torch._C._AutoDispatchBelowAutograd():
                layer = x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y, saved, cell, reverse, batch_first
                return op.redispatch(keys & torch._C._after_autograd_keyset, dy, dh_n, dc_n, *layer, *last)
        segments, *needs = last if checkpointed else (0, *last)
        weights = [weight.to(x.dtype) for weight in (*w_ih, *w_hh, *b_ih, *b_hh, *w_hr)]
        options = cell, reverse, batch_first, segments, len(w_ih), *needs
        if forward_mode:
            return _gradients(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, options)
        with enable_single_level_autograd_function():
            return LayerBackward.apply(dy, dh_n, dc_n, x, batch_sizes, h0, c0, y, saved, *options, *weights)

    return kernel


def _at_forward_mode() -> bool:
    """Is forward mode what the current level of torch.func's transforms does, or, without them, torch.autograd?

    A compiled jvp opens its level without torch.autograd.forward_ad's knowing.
    """
    if torch._C._are_functorch_transforms_active():
        return peek_interpreter_stack().key() == TransformType.Jvp
    return dispatch.forward_mode()


def _map_forward(info, in_dims, x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first, save):
    """layer_forward under vmap: the mapped axis becomes a part of the batch, or each member is a call."""
    V, at = info.batch_size, 0 if batch_first else 1
    weights, options = (w_ih, w_hh, b_ih, b_hh, w_hr), (cell, reverse, batch_first, save)
    if batch_sizes is not None or _any_mapped(in_dims[4:9]):
        return _loop(_forward_op, V, in_dims, (x, batch_sizes, h0, c0, *weights, *options)), (0, 0, 0, 0)
    x, h0, c0 = _fold(x, in_dims[0], at, V), _fold(h0, in_dims[2], 1, V), _fold(c0, in_dims[3], 1, V)
    y, h_n, c_n, saved = _forward_op(unit_stride(x), None, h0, c0, *weights, *options)
    c_n, c_dim = (c_n, None) if c0 is None else (_unfold(c_n, 1, V), 1)
    saved_dim = 0 if save else None
    if save:
        saved = saved.unflatten(1, (x.shape[1 - at], V, h0.shape[1] // V)).movedim(2, 0).flatten(2, 3)
    return (_unfold(y, at, V), _unfold(h_n, 1, V), c_n, saved), (at, 1, c_dim, saved_dim)


def _map_backward(
    info, in_dims, dy, dh_n, dc_n, x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y, saved,
    cell, reverse, batch_first, need_dx, need_dh0, need_dw
):  # fmt: skip
    """layer_backward under vmap, in the same way; the gradients of weights are each member's own."""
    V, at = info.batch_size, 0 if batch_first else 1
    weights, options = (w_ih, w_hh, b_ih, b_hh, w_hr), (cell, reverse, batch_first, need_dx, need_dh0, need_dw)
    if batch_sizes is not None or need_dw or _any_mapped(in_dims[7:12]):
        arguments = dy, dh_n, dc_n, x, batch_sizes, h0, c0, *weights, y, saved, *options
        return _loop(_backward_op, V, in_dims, arguments), (0,) * 8
    dy, x, y = (_fold(t, in_dims[k], at, V) for k, t in ((0, dy), (3, x), (12, y)))
    dh_n, dc_n, h0, c0 = (_fold(t, in_dims[k], 1, V) for k, t in ((1, dh_n), (2, dc_n), (5, h0), (6, c0)))
    saved = saved.expand(V, *saved.shape) if in_dims[13] is None else saved.movedim(in_dims[13], 0)
    saved = saved.unflatten(2, (x.shape[1 - at], h0.shape[1] // V)).movedim(0, 2).flatten(1, 3)
    dx, dh0, dc0, *empty = _backward_op(dy, dh_n, dc_n, unit_stride(x), None, h0, c0, *weights, y.contiguous(), saved, *options)
    dx, x_dim = (_unfold(dx, at, V), at) if need_dx else (dx, None)
    dh0, h_dim = (_unfold(dh0, 1, V), 1) if need_dh0 else (dh0, None)
    dc0, c_dim = (dc0, None) if c0 is None or not need_dh0 else (_unfold(dc0, 1, V), 1)
    return (dx, dh0, dc0, *empty), (x_dim, h_dim, c_dim, *(None,) * 5)


def _map_checkpoint_forward(info, in_dims, *arguments):
    """checkpoint_forward under vmap, where recompute mode has no effect."""
    return _map_forward(info, in_dims, *(*arguments[:-1], False))


def _map_checkpoint_backward(info, in_dims, *arguments):
    """checkpoint_backward under vmap, of a call from before it: each member is a call."""
    return _loop(_checkpoint_backward, info.batch_size, in_dims, arguments), (0,) * 8


for _op, _kernel in (
    (_forward_op, _forward_autograd(_forward_op, False)),
    (_checkpoint_forward, _forward_autograd(_checkpoint_forward, True)),
    (_backward_op, _backward_autograd(_backward_op, False)),
    (_checkpoint_backward, _backward_autograd(_checkpoint_backward, True)),
):
    _library.impl(_op, _kernel, "Autograd", with_keyset=True)
torch.library.register_vmap("fastrnn::layer_forward", _map_forward, lib=_library)
torch.library.register_vmap("fastrnn::layer_backward", _map_backward, lib=_library)
torch.library.register_vmap("fastrnn::checkpoint_forward", _map_checkpoint_forward, lib=_library)
torch.library.register_vmap("fastrnn::checkpoint_backward", _map_checkpoint_backward, lib=_library)


def _forward(x, *args):
    """layer_forward; on a GPU past the dispatcher where nobody would see the call there (a CPU's: `Layer.forward`)."""
    return (gpu.layer_forward if _past_the_dispatcher(x) else _forward_op)(x, *args)


def _backward(dy, dh_n, dc_n, x, *args):
    """layer_backward, likewise, where it is not to be differentiated."""
    past = not torch.is_grad_enabled() and _past_the_dispatcher(x)
    return (gpu.layer_backward if past else _backward_op)(dy, dh_n, dc_n, x, *args)


def _past_the_dispatcher(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling() and type(x) in (Tensor, Parameter) and not dispatch.watched()


@torch.library.register_fake("fastrnn::layer_forward", lib=_library)
def _fake_forward(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first, save):
    rows, directions, batch = x.shape[:-1], len(w_ih), h0.shape[1]
    hidden, width = w_hh[0].shape[0] // CELLS[cell].gates, w_hh[0].shape[1]
    slots = CELLS[cell].slots + bool(w_hr)
    saved = (directions, math.prod(rows), slots * hidden) if save else (0,)
    c_n = (directions, batch, CELLS[cell].states * hidden) if CELLS[cell].states else (0,)
    return (
        x.new_empty((*rows, directions * width)),
        x.new_empty((directions, batch, width)),
        x.new_empty(c_n),
        x.new_empty(saved),
    )


@torch.library.register_fake("fastrnn::layer_backward", lib=_library)
def _fake_backward(
    dy, dh_n, dc_n, x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y, saved,
    cell, reverse, batch_first, need_dx, need_dh0, need_dw
):  # fmt: skip
    def joined(weights):
        shape = (len(weights) * weights[0].shape[0], *weights[0].shape[1:]) if need_dw and weights else (0,)
        return x.new_empty(shape, dtype=weights[0].dtype if len(shape) == 2 else x.dtype)

    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(h0.shape if need_dh0 else (0,)),
        x.new_empty((0,) if c0 is None or not need_dh0 else c0.shape),
        *map(joined, (w_ih, w_hh, b_ih, b_hh, w_hr)),
    )


@torch.library.register_fake("fastrnn::checkpoint_forward", lib=_library)
def _(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first, segments):
    y, h_n, c_n, _ = _fake_forward(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first, False)
    return y, h_n, c_n, x.new_empty((0,) if c0 is None else (h0.shape[0], segments - 1, *c0.shape[1:]))


@torch.library.register_fake("fastrnn::checkpoint_backward", lib=_library)
def _(
    dy, dh_n, dc_n, x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y, kept,
    cell, reverse, batch_first, segments, need_dx, need_dh0, need_dw
):  # fmt: skip
    layer = x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr
    return _fake_backward(dy, dh_n, dc_n, *layer, y, kept, cell, reverse, batch_first, need_dx, need_dh0, need_dw)


def count_operations(counter: ModuleType) -> None:
    """Tell torch.utils.flop_counter the products of the raw ops, two operations for each weight and row, as of torch.nn's."""

    def of(weights, rows: int) -> int:
        return 2 * rows * sum(map(math.prod, weights))

    def forward(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, *options, out_shape):
        return of((*w_ih, *w_hh, *w_hr), math.prod(x[:-1]))

    def backward(dy, dh_n, dc_n, x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, *options, out_shape):
        rows, (need_dx, need_dh0, need_dw) = math.prod(x[:-1]), options[-3:]
        carried = rows if need_dh0 else rows - h0[1]  # from a step to the one before
        return of(w_ih, need_dx * rows) + of(w_hh, carried) + of(w_hr, rows) + of((*w_ih, *w_hh, *w_hr), need_dw * rows)

    def again(*args, out_shape):
        return backward(*args, out_shape=out_shape) + forward(*args[3:], out_shape=out_shape)

    formulas = {
        "layer_forward": forward,
        "layer_backward": backward,
        "checkpoint_forward": forward,
        "checkpoint_backward": again,
    }
    for name, formula in formulas.items():
        counter.register_flop_formula(getattr(torch.ops.fastrnn, name))(formula)


def layer(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor],
    b_hh: Sequence[Tensor],
    w_hr: Sequence[Tensor],
    cell: str,
    reverse: bool = False,
    batch_first: bool = False,
    of_cell: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer, differentiable: y, h_n, and c_n for lstm, None otherwise. Arguments are the raw ops', see above.

    of_cell: it is an LSTMCell's step and the like, whose results have dtypes of their own under autocast.
    """
    if x.is_cpu and (w_ih[0].dtype in dispatch.HALF or torch.is_autocast_enabled("cpu")):
        return _in_float32(x, batch_sizes, h0, c0, (w_ih, w_hh, b_ih, b_hh, w_hr), cell, reverse, batch_first, of_cell)
    weights = (*w_ih, *w_hh, *b_ih, *b_hh, *w_hr)
    wanted = torch.is_grad_enabled() and _requires_grad((x, h0, *weights), c0)
    segments = 0
    if wanted and not torch._C._are_functorch_transforms_active():
        segments = checkpoint.segments_wanted(x, batch_sizes, h0.shape[1], cell, len(w_hr) > 0)
    if wanted and not (torch.compiler.is_compiling() or dispatch.watched()):
        y, h_n, c_n, _ = Layer.apply(x, batch_sizes, h0, c0, cell, reverse, batch_first, segments, len(w_ih), *weights)
    else:
        arguments = x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first
        y, h_n, c_n, _ = _checkpoint_forward(*arguments, segments) if segments else _forward(*arguments, False)
    return y, h_n, None if c0 is None else c_n


def _in_float32(x, batch_sizes, h0, c0, weights, cell, reverse, batch_first, of_cell):
    """`layer` in half precision or under autocast, on a CPU: all of it in float32, and each result rounded once.

    Matrices in bfloat16 are read as they are, but where a transform, a compiler or recompute mode wants plain operations.
    """
    dtype, autocast = x.dtype, torch.is_autocast_enabled("cpu")
    if autocast:  # as torch.nn does: of its GRU, and of LSTMCell, only the products are cast
        dtype, carried = torch.get_autocast_dtype("cpu"), h0 if cell == "gru" else c0 if of_cell else None
        dtype = dtype if carried is None else torch.promote_types(dtype, carried.dtype)
    with torch.autocast("cpu", enabled=False) if autocast else contextlib.nullcontext():
        as_they_are = _takes_half(weights) and not (dispatch.forward_mode() or torch._C._are_functorch_transforms_active())
        wanted = torch.is_grad_enabled() and _requires_grad((x, h0, *itertools.chain(*weights)), c0)
        if as_they_are and not wanted:
            x, h0, c0, flat = _all_but_matrices(x, h0, c0, itertools.chain(*weights))
            kinds = _kinds(flat, len(weights[0]))
            y, h_n, c_n, _ = _forward(x, batch_sizes, h0, c0, *kinds, cell, reverse, batch_first, False)
        elif as_they_are and not (
            autocast
            or torch.compiler.is_compiling()
            or checkpoint.segments_wanted(x, batch_sizes, h0.shape[1], cell, len(weights[-1]) > 0)
        ):
            options = cell, reverse, batch_first, 0, len(weights[0])
            y, h_n, c_n = HalfLayer.apply(x, batch_sizes, h0, c0, *options, *itertools.chain(*weights))
        else:
            x, h0, c0 = (_to(tensor, torch.float32) for tensor in (x, h0, c0))
            w_ih, w_hh, b_ih, b_hh, w_hr = ([weight.float() for weight in kind] for kind in weights)
            y, h_n, c_n = layer(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first)
        return _to(y, dtype), _to(h_n, dtype), None if c0 is None else _to(c_n, dtype)


def _all_but_matrices(x, h0, c0, weights):
    """The same in float32, whatever it was, but for matrices, which layer_forward reads in bfloat16."""
    x, h0, c0 = (_to(tensor, torch.float32) for tensor in (x, h0, c0))
    return x, h0, c0, [weight if weight.dim() == 2 else weight.float() for weight in weights]


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """tensor.to(dtype) in half the time, for what may be absent."""
    if tensor is None or tensor.dtype is dtype:
        return tensor
    return tensor.float() if dtype is torch.float32 else tensor.bfloat16() if dtype is torch.bfloat16 else tensor.to(dtype)


def _takes_half(weights: Kinds) -> bool:
    """Are these matrices in bfloat16 that layer_forward reads?"""
    w_ih, w_hh, _, _, w_hr = weights
    return w_hh[0].shape[1] % 2 == 0 and all(w.dtype is torch.bfloat16 for w in (*w_ih, *w_hh, *w_hr))


class _Function(_SingleLevelFunction):
    """An autograd.Function that differentiates one level of torch.func's transforms, or of torch.autograd without them."""

    apply: Any  # its C base's, which torch's annotations leave out
    _compiled_autograd_key = staticmethod(Function._compiled_autograd_key)  # what torch's compiled autograd looks for


class Layer(_Function):
    """`layer` with a gradient. Arguments are flat, weights as `_kinds` takes them apart; the last output is `saved`.

    segments: 0, or as many as recompute mode divides the steps into; `saved` is then what it keeps.
    """

    @staticmethod
    def forward(ctx, *inputs):
        output = dispatch.native and dispatch.native.layer_forward(inputs)
        y, h_n, c_n, saved = (output or _forward_by_operators(inputs))[:4]
        _keep(ctx, inputs, y, saved, bool(output))
        ctx.mark_non_differentiable(*((saved,) if c_n is None or c_n.dim() > 1 else (c_n, saved)))
        return y, h_n, c_n, saved

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _):
        return Layer.gradients(ctx, dy, dh_n, dc_n, _kept(ctx))

    @staticmethod
    def gradients(ctx, dy, dh_n, dc_n, saved_tensors):
        """Of the inputs in turn. Saved tensors may come in another dtype than they were saved in."""
        found = _native_backward(ctx, dy, dh_n, dc_n, saved_tensors)
        if found is not None:
            return found
        x, batch_sizes, h0, c0, y, saved, *weights = saved_tensors
        cell, reverse, batch_first, segments, directions = ctx.options
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * (9 + len(weights))
        need_dx, _, *states = ctx.needs_input_grad[:4]
        need_dh0, need_dw = any(states), any(ctx.needs_input_grad[9:])
        if torch.is_grad_enabled() or dispatch.forward_mode() or _vmapped_the_old_way(dy, dh_n, dc_n):
            _check_apart(ctx)
            need_dw = need_dw and _asks_for_any(ctx, len(weights), y.numel())
        needs = need_dx, need_dh0, need_dw
        if _vmapped_the_old_way(dy, dh_n, dc_n):
            grads = _gradients(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, (*ctx.options, *needs))
        elif torch.is_grad_enabled() and not (torch.compiler.is_compiling() or dispatch.watched()):
            grads = LayerBackward.apply(dy, dh_n, dc_n, x, batch_sizes, h0, c0, y, saved, *ctx.options, *needs, *weights)
        else:
            layer = x, batch_sizes, h0, c0, *_kinds(weights, directions), y, saved, cell, reverse, batch_first
            if segments:
                grads = _checkpoint_backward(dy, dh_n, dc_n, *layer, segments, *needs)
            else:
                grads = _backward(dy, dh_n, dc_n, *layer, *needs)
        dx, dh0, dc0, *joined = grads
        if need_dw:
            kinds = len(weights) // directions
            dw = [*joined[:2], joined[4]] if kinds == 3 else joined[:kinds]  # as _kinds has them
            if directions > 1:  # each in memory of its own: what is done to one in place is not done to another
                dw = [part.clone() for grad in dw for part in grad.chunk(directions)]
        else:
            dw = [None] * len(weights)
        dh0, dc0 = (dh0, None if c0 is None else dc0) if need_dh0 else (None, None)
        return dx if need_dx else None, None, dh0, dc0, *(None,) * 5, *dw


def _forward_by_operators(inputs: tuple) -> tuple[Tensor, ...]:
    """Return y, h_n, c_n, saved of `Layer`'s inputs."""
    x, batch_sizes, h0, c0, cell, reverse, batch_first, segments, directions, *weights = inputs
    layer = x, batch_sizes, h0, c0, *_kinds(weights, directions), cell, reverse, batch_first
    with _outer_levels():
        return _checkpoint_forward(*layer, segments) if segments else _forward(*layer, True)


def _keep(ctx, inputs: tuple, y: Tensor, saved: Tensor, eager: bool) -> None:
    """Keep for backward the inputs of a Function here, y and saved: what `_kept` returns.

    autograd watches what it saves: backward raises if that has been changed in place. What backward does not need may be
    changed, as in torch.nn. It is kept apart, for a second derivative, which does need it.

    eager: no compiler and no transform sees the call, nor is it in recompute mode.
    """
    ctx.options = inputs[4:9]
    ctx.set_materialize_grads(False)
    if not (eager or _is_eager(inputs[7])):
        ctx.apart = None
        ctx.save_for_backward(*inputs[:4], y, saved, *inputs[9:])
        return
    one_step = y.numel() == inputs[2].numel()  # of h0
    unneeded, *selectors = _unneeded(ctx.needs_input_grad, inputs[4], inputs[8], one_step)
    if unneeded and unneeded[0] < 9:
        # An input that is no leaf may become a function of the output, in place, and a reference from here would be a cycle.
        unneeded = tuple(index for index in unneeded if index >= 9 or inputs[index].is_leaf)
        inputs = tuple(
            given.detach() if index in unneeded and index < 9 and not given.requires_grad else given
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
def _unneeded(needs: tuple[bool, ...], cell: str, directions: int, one_step: bool) -> tuple:
    """Which inputs of `Layer` its backward does not need where `needs` are asked for, by index; and _selectors of these.

    Cells that read the state itself, as GRU's, always need h0, those with weights of their own the biases they stand behind.
    """
    w_ih, w_hh, *biases = (range(9 + k * directions, 9 + (k + 1) * directions) for k in range((len(needs) - 9) // directions))
    unneeded: list[int] = []
    if not any(needs[index] for index in w_ih):
        unneeded += [0]
    if not any(needs[index] for index in w_hh) and not CELLS[cell].reads_hidden:
        unneeded += [2]
    if not needs[0]:
        unneeded += w_ih
    if one_step and not needs[2]:
        unneeded += w_hh
    if len(biases) > 1:  # one alone is W_hr
        unneeded += [*([] if CELLS[cell].weights else biases[0]), *biases[1]]
    return tuple(unneeded), *_selectors(tuple(unneeded), len(needs))


@functools.cache
def _selectors(unneeded: tuple[int, ...], count: int) -> tuple[Callable, Callable, Callable]:
    """Make functions that take the others and these out of `count` inputs, y and saved, and one that joins them again."""
    everything = [0, 1, 2, 3, count, count + 1, *range(9, count)]
    others = [index for index in everything if index not in unneeded]
    together = [*others, *unneeded]
    return _selector(others), _selector(unneeded), _selector([together.index(index) for index in everything])


def _selector(indices: Sequence[int]) -> Callable[[tuple], tuple]:
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda items: tuple(items[index] for index in indices)


def _kept(ctx) -> tuple[Any, ...]:
    """Return x, batch_sizes, h0, c0, y, saved and the weights, of those that `_keep` kept."""
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


def _native_backward(ctx, dy, dh_n, dc_n, saved_tensors):
    """Return what Layer.gradients does, in the same way; None where the dispatcher, or autograd, is to see the call."""
    return _runtime_backward((dy, dh_n, dc_n), saved_tensors, ctx.options, ctx.needs_input_grad)


def _runtime_backward(outer: tuple, kept: tuple, options: tuple, needs: tuple):
    """Return the gradients of `Layer`'s inputs, from the runtime past the dispatcher, or None."""
    if not dispatch.native or torch.compiler.is_compiling() or _vmapped_the_old_way(*outer):
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


class HalfLayer(_Function):
    """`Layer` of matrices in bfloat16, and of all else in any dtype: in float32, each result and gradient rounded once."""

    @staticmethod
    def forward(ctx, *inputs):
        output = dispatch.native and dispatch.native.layer_forward(inputs)
        if output:
            y, h_n, c_n, saved, wide_y = output
            wide_y = y if wide_y is None else wide_y
        else:
            x, batch_sizes, h0, c0 = inputs[:4]
            dtype = x.dtype
            x, h0, c0, flat = _all_but_matrices(x, h0, c0, inputs[9:])
            wide = x, batch_sizes, h0, c0, *inputs[4:9], *flat
            found = dispatch.native and dispatch.native.layer_forward(wide)
            wide_y, h_n, c_n, saved, *_ = found or _forward_by_operators(wide)
            y, h_n, c_n = _to(wide_y, dtype), _to(h_n, dtype), None if c0 is None else _to(c_n, dtype)
        _keep(ctx, inputs, wide_y, saved, bool(output))
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        kept = _kept(ctx)
        found = _native_backward(ctx, dy, dh_n, dc_n, kept)
        if found is not None:
            return found
        dispatch.check_memory(dy, dh_n, dc_n, *kept)
        x, batch_sizes, h0, c0, y, saved, *weights = kept
        dtypes = x.dtype, None, h0.dtype, h0.dtype, *(None,) * 5, *[weight.dtype for weight in weights]
        plain = not (dispatch.forward_mode() or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active())
        if not plain or _vmapped_the_old_way(dy, dh_n, dc_n):
            weights = [weight.float() for weight in weights]
        dy, dh_n, dc_n, x, h0, c0 = (_to(tensor, torch.float32) for tensor in (dy, dh_n, dc_n, x, h0, c0))
        found = Layer.gradients(ctx, dy, dh_n, dc_n, (x, batch_sizes, h0, c0, y, saved, *weights))
        return tuple(_to(grad, dtype) for grad, dtype in zip(found, dtypes, strict=True))


class CellLayer(_Function):
    """`Layer` of one step, without the axes of time and directions: x [B, I], h [B, R], c [B, H] -> h, and c for lstm."""

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
        found = _native_backward(ctx, dh, None, dc, kept)
        if found is None:
            dh, dc, *tensors = map(_unsqueezed, (dh, dc, *kept[:5]))
            found = Layer.gradients(ctx, dh, None, dc, (*tensors, *kept[5:]))
            found = *(None if grad is None else grad.squeeze(0) for grad in found[:4]), *found[4:]
        return found


class LayerBackward(_Function):
    """The gradients of `Layer`, as layer_backward returns them; kernels/gradients.py has their own gradients."""

    @staticmethod
    def forward(
        ctx, dy, dh_n, dc_n, x, batch_sizes, h0, c0, y, saved,
        cell, reverse, batch_first, segments, directions, need_dx, need_dh0, need_dw, *weights
    ):  # fmt: skip
        ctx.options = cell, reverse, batch_first, segments, directions, need_dx, need_dh0, need_dw
        ctx.save_for_backward(dy, dh_n, dc_n, x, batch_sizes, h0, c0, y, saved, *weights)
        ctx.set_materialize_grads(False)
        if directions == 1:  # the runtime returns the weights' gradients of each direction apart
            kept = x, batch_sizes, h0, c0, y, saved, *weights
            needs = need_dx, False, need_dh0, need_dh0, *(False,) * 5, *(need_dw,) * len(weights)
            found = _runtime_backward((dy, dh_n, dc_n), kept, ctx.options[:5], needs)
            if found is not None:
                w_ih, w_hh, b_ih, b_hh, w_hr = ((*kind, None)[0] for kind in _kinds(found[9:], 1))
                grads = found[0], found[2], found[3], w_ih, w_hh, b_ih, b_hh, w_hr
                return tuple(x.new_empty(0) if grad is None else grad for grad in grads)
        layer = dy, dh_n, dc_n, x, batch_sizes, h0, c0, *_kinds(weights, directions), y, saved, cell, reverse, batch_first
        with _outer_levels():
            if segments:
                return _checkpoint_backward(*layer, segments, need_dx, need_dh0, need_dw)
            return _backward(*layer, need_dx, need_dh0, need_dw)

    @staticmethod
    def backward(ctx, *grads):
        dy, dh_n, dc_n, x, batch_sizes, h0, c0, y, saved, *weights = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * (17 + len(weights))
        cell, reverse, batch_first, segments, directions, *needs = ctx.options
        needed = needs[0], needs[1], needs[1], *(needs[2],) * 5
        wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        layer = x, batch_sizes, h0, c0, *_kinds(weights, directions)
        # y and saved are functions of the rest, and their share of a third derivative is taken through it
        if torch.is_grad_enabled():
            y, _, _, saved = reference.layer_forward(*layer, cell, reverse, batch_first, True)
        elif segments:
            y, _, _, saved = _forward(*layer, cell, reverse, batch_first, True)
        need_dx = ctx.needs_input_grad[3]
        need_dw = any(ctx.needs_input_grad[17:]) and _asks_for_any(ctx, len(weights), y.numel())
        dy, dh_n, dc_n, dx, dh0, dc0, dw = gradients.layer_double_backward(
            wanted, dy, dh_n, dc_n, *layer, y, saved, cell, reverse, batch_first, need_dx, need_dw
        )
        return dy, dh_n, dc_n, dx, None, dh0, dc0, *(None,) * 10, *(dw or [None] * len(weights))


def _gradients(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, options):
    """What layer_backward returns, as plain operations on the layer's inputs."""
    cell, reverse, batch_first, _, directions, *needs = options
    inputs = x, batch_sizes, h0, c0, *_kinds(weights, directions)
    y, _, _, saved = reference.layer_forward(*inputs, cell, reverse, batch_first, True)
    return gradients.layer_backward(dy, dh_n, dc_n, *inputs, y, saved, cell, reverse, batch_first, *needs)


def _kinds(weights: Sequence[Tensor], directions: int) -> Kinds:
    """w_ih, w_hh, b_ih, b_hh, w_hr, one tensor a direction each, from the flat sequence of those that are there."""
    kinds = [list(weights[k * directions : (k + 1) * directions]) for k in range(len(weights) // directions)]
    w_ih, w_hh, *biases = kinds[: 4 if len(kinds) > 3 else 2]
    b_ih, b_hh = biases or ([], [])
    return w_ih, w_hh, b_ih, b_hh, kinds[-1] if len(kinds) in (3, 5) else []


def _vmapped_the_old_way(*grads: Tensor | None) -> bool:
    """autograd.grad(is_grads_batched=True) maps by a mechanism older than torch.func's, without rules for our ops."""
    for grad in grads:
        if grad is not None and is_legacy_batchedtensor(grad):
            return True
    return False


def _requires_grad(tensors: Sequence[Tensor], c0: Tensor | None) -> bool:
    for tensor in tensors:
        if tensor.requires_grad:
            return True
    return c0 is not None and c0.requires_grad


def _any_mapped(kinds: Sequence[Sequence[int | None] | None]) -> bool:
    return any(dim is not None for dims in kinds for dim in dims or ())


def _loop(op, size: int, in_dims: Sequence, arguments: Sequence) -> tuple[Tensor, ...]:
    """The op on each member of a mapped axis, stacked along a new first axis."""
    if size == 0:
        raise ValueError("vmap over an axis of size 0: a recurrent layer has no member to take the output's shape from")

    def member(argument, dim, v: int):
        if isinstance(argument, (list, tuple)):
            return [member(each, own, v) for each, own in zip(argument, dim or [None] * len(argument), strict=True)]
        return argument if dim is None else unit_stride(argument.select(dim, v))

    calls = [op(*(member(a, dim, v) for a, dim in zip(arguments, in_dims, strict=True))) for v in range(size)]
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))


def _fold(tensor: Tensor | None, dim: int | None, at: int, size: int) -> Tensor | None:
    """The mapped axis folded into the batch axis `at`, members outermost; what is not mapped is repeated."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
    else:
        tensor = tensor.movedim(dim, at)
    return tensor.flatten(at, at + 1)


def _unfold(tensor: Tensor, at: int, size: int) -> Tensor:
    return tensor.unflatten(at, (size, tensor.shape[at] // size))


def _unsqueezed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


def unit_stride(tensor: Tensor) -> Tensor:
    """The engines read rows of x: elements next to each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


dispatch.load()  # after the schemas it registers against
if dispatch.native:
    _pattern = torch.empty(1, dtype=torch.float32, device="cpu")
    dispatch.native.differentiate(Layer.apply, HalfLayer.apply, CellLayer.apply, checkpoint.is_on, torch.cat, _pattern)
