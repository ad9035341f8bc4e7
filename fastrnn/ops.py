"""The operators: one recurrent layer forward, and its gradients, each once for every cell and device.

Raw ops (engines register them per device; differentiated by `layer`, or where a program calls them by `_meets_autograd`).
They assume T >= 1, B >= 1, one dtype and one device.

    layer_forward -> y, h_n, c_n, saved
    layer_backward -> dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr

    x            dense [T, B, I], or [B, T, I] with batch_first; or packed [N, I] with
    batch_sizes  int64 [T] on the CPU, rows of each step, never increasing, sum N
    h0, c0       [D, B, R], [D, B, H] (lstm only)
    w_ih, ...    one tensor a direction, D in {1, 2}: w_ih [G*H, I], w_hh [G*H, R], b_* [G*H] or no tensors,
                 w_hr [R, H] or no tensors. Direction 1 runs opposite to direction 0. On the CPU, where all else is
                 float32 and R is even, matrices may be bfloat16, and their gradients are then, rounded once.
    cell         a key of fastrnn.kernels.cells.CELLS
    reverse      direction 0 runs from the last step to the first
    save         keep what layer_backward needs
    y            contiguous [T, B, D*R] | [B, T, D*R] | [N, D*R]
    h_n, c_n     [D, B, R], [D, B, H] (lstm, otherwise [0])
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
    kept         [D, segments - 1, B, H], cell states before each segment but a direction's first, in the order they run; [0]
                 for cells that have none

`layer` is the differentiable entry: reverse mode through `Layer`, whose backward is `LayerBackward`, differentiable to
any order through the reference; vmap by folding or looping; forward mode by running the reference on dual numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function
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
_library.impl("checkpoint_forward", checkpoint.forward, "CompositeExplicitAutograd")
_library.impl("checkpoint_backward", checkpoint.backward, "CompositeExplicitAutograd")


def _meets_autograd(op, segments: bool):
    """The ops' kernel for autograd, which they meet on their own in a program of torch.export's: `Layer`, and its gradients."""

    def kernel(keys, x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first, last):
        wanted = torch.is_grad_enabled() and _requires_grad((x, h0, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr), c0)
        if not (wanted or dispatch.forward_mode()):
            with torch._C._AutoDispatchBelowAutograd():
                layer = x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first
                return op.redispatch(keys & torch._C._after_autograd_keyset, *layer, last)
        # matrices may be in bfloat16, which neither of the two takes
        w_ih, w_hh, b_ih, b_hh, w_hr = ([w.to(x.dtype) for w in kind] for kind in (w_ih, w_hh, b_ih, b_hh, w_hr))
        if dispatch.forward_mode() or torch._C._are_functorch_transforms_active():
            return reference.layer_forward(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first)
        options = cell, reverse, batch_first, last if segments else 0, len(w_ih)
        kept = Layer.apply(x, batch_sizes, h0, c0, *options, *w_ih, *w_hh, *b_ih, *b_hh, *w_hr)
        return kept if last else (*kept[:3], x.new_empty(0))  # last: of layer_forward, whether to save

    return kernel


_library.impl("layer_forward", _meets_autograd(_forward_op, False), "Autograd", with_keyset=True)
_library.impl("checkpoint_forward", _meets_autograd(_checkpoint_forward, True), "Autograd", with_keyset=True)


def _forward(x, *args):
    """layer_forward; on a GPU past the dispatcher where nobody would see the call there (a CPU's calls: `_short_forward`)."""
    return (gpu.layer_forward if _past_the_dispatcher(x) else _forward_op)(x, *args)


def _backward(dy, dh_n, dc_n, x, *args):
    """layer_backward, likewise."""
    return (gpu.layer_backward if _past_the_dispatcher(x) else _backward_op)(dy, dh_n, dc_n, x, *args)


def _past_the_dispatcher(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling() and type(x) in (Tensor, Parameter) and not dispatch.watched()


@torch.library.register_fake("fastrnn::layer_forward", lib=_library)
def _fake_forward(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first, save):
    rows, directions, batch = x.shape[:-1], len(w_ih), h0.shape[1]
    hidden, width = w_hh[0].shape[0] // CELLS[cell].gates, w_hh[0].shape[1]
    slots = CELLS[cell].slots + bool(w_hr)
    saved = (directions, math.prod(rows), slots * hidden) if save else (0,)
    c_n = (directions, batch, hidden) if CELLS[cell].carry == "cell" else (0,)
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
    compiling, transformed = torch.compiler.is_compiling(), torch._C._are_functorch_transforms_active()
    weights = (*w_ih, *w_hh, *b_ih, *b_hh, *w_hr)
    if dispatch.forward_mode() or (compiling and transformed):
        # not a `jvp` rule: dual numbers flow through plain operations, and Dynamo refuses a Function that has one;
        # of a Function's vmap rule, and of its backward inside torch.func.grad, Dynamo knows nothing
        y, h_n, c_n, _ = reference.layer_forward(
            x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first
        )
    elif transformed or (torch.is_grad_enabled() and _requires_grad((x, h0, *weights), c0)):
        function = Layer if compiling or transformed else EagerLayer
        # the rules for torch.func's transforms know the gates only
        segments = 0 if transformed else checkpoint.segments_wanted(x, batch_sizes, h0.shape[1], cell, len(w_hr) > 0)
        if torch.compiler.is_exporting():  # the program holds the op, which meets autograd when it runs
            arguments = x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first
            y, h_n, c_n, _ = _checkpoint_forward(*arguments, segments) if segments else _forward(*arguments, False)
        else:
            y, h_n, c_n, _ = function.apply(x, batch_sizes, h0, c0, cell, reverse, batch_first, segments, len(w_ih), *weights)
    else:
        y, h_n, c_n, _ = _forward(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first, False)
    return y, h_n, c_n if cell == "lstm" else None


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


class Layer(Function):
    """`layer` with a gradient. Arguments are flat, weights as `_kinds` takes them apart; the last output is `saved`.

    segments: 0, or as many as recompute mode divides the steps into; `saved` is then what it keeps.
    """

    @staticmethod
    def forward(x, batch_sizes, h0, c0, cell, reverse, batch_first, segments, directions, *weights):
        kinds = _kinds(weights, directions)
        if segments:
            return _checkpoint_forward(x, batch_sizes, h0, c0, *kinds, cell, reverse, batch_first, segments)
        return _forward(x, batch_sizes, h0, c0, *kinds, cell, reverse, batch_first, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, _, c_n, saved = output
        ctx.options = inputs[4:9]
        ctx.save_for_backward(*inputs[:4], y, saved, *inputs[9:])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*((saved,) if c_n is None or c_n.dim() > 1 else (c_n, saved)))

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _):
        return Layer.gradients(ctx, dy, dh_n, dc_n, ctx.saved_tensors)

    @staticmethod
    def gradients(ctx, dy, dh_n, dc_n, saved_tensors):
        """Of the inputs in turn. Saved tensors may come in another dtype than they were saved in."""
        found = _short_backward(ctx, dy, dh_n, dc_n, saved_tensors)
        if found is not None:
            return found
        x, batch_sizes, h0, c0, y, saved, *weights = saved_tensors
        cell, reverse, batch_first, segments, directions = ctx.options
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * (9 + len(weights))
        need_dx, _, *states = ctx.needs_input_grad[:4]
        need_dh0, need_dw = any(states), any(ctx.needs_input_grad[9:])
        options = cell, reverse, batch_first, segments, directions, need_dx, need_dh0, need_dw
        compiling = torch.compiler.is_compiling()
        if not compiling and (dispatch.forward_mode() or _vmapped_the_old_way(dy, dh_n, dc_n)):
            grads = _gradients(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, options)
        elif not compiling and (torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()):
            function = LayerBackward if torch._C._are_functorch_transforms_active() else EagerLayerBackward
            grads = function.apply(dy, dh_n, dc_n, x, batch_sizes, h0, c0, y, saved, *options, *weights)
        else:
            grads = LayerBackward.forward(dy, dh_n, dc_n, x, batch_sizes, h0, c0, y, saved, *options, *weights)
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

    @staticmethod
    def vmap(info, in_dims, x, batch_sizes, h0, c0, cell, reverse, batch_first, segments, directions, *weights):
        V, at = info.batch_size, 0 if batch_first else 1
        options = cell, reverse, batch_first, segments, directions
        if batch_sizes is not None or _any_mapped(in_dims[9:]):
            outputs = _loop(Layer, V, in_dims, (x, batch_sizes, h0, c0, *options, *weights))
            return outputs, (0, 0, 0, 0)
        x, h0, c0 = _fold(x, in_dims[0], at, V), _fold(h0, in_dims[2], 1, V), _fold(c0, in_dims[3], 1, V)
        y, h_n, c_n, saved = Layer.apply(unit_stride(x), None, h0, c0, *options, *weights)
        c_n, c_dim = (c_n, None) if c0 is None else (_unfold(c_n, 1, V), 1)
        saved = saved.unflatten(1, (x.shape[1 - at], V, h0.shape[1] // V)).movedim(2, 0).flatten(2, 3)
        return (_unfold(y, at, V), _unfold(h_n, 1, V), c_n, saved), (at, 1, c_dim, 0)


def _short_forward(inputs: tuple) -> tuple:
    """Layer.forward, past the dispatcher where nobody would see the call there: it takes longer than a small step does."""
    return (dispatch.native and dispatch.native.layer_forward(inputs)) or Layer.forward(*inputs)


def _short_backward(ctx, dy, dh_n, dc_n, saved_tensors):
    """Layer.gradients in the same way, or None where the dispatcher, or autograd, is to see the call."""
    if not dispatch.native or torch.compiler.is_compiling() or _vmapped_the_old_way(dy, dh_n, dc_n):
        return None
    return dispatch.native.layer_backward((dy, dh_n, dc_n), saved_tensors, ctx.options, ctx.needs_input_grad)


class EagerLayer(Function):
    """`Layer` where no transform is active: with setup_context torch inspects forward's signature, 90 us a call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _short_forward(inputs)[:4]
        Layer.setup_context(ctx, inputs, output)
        return output

    backward = Layer.backward


# Function.apply would look for wrappers of transforms that have ended, of which there are none among plain tensors.
apply_eagerly = super(Function, EagerLayer).apply


class HalfLayer(Function):
    """`EagerLayer` of matrices in bfloat16, and of all else in any dtype: in float32, each result and gradient rounded once."""

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
            wide_y, h_n, c_n, saved, *_ = _short_forward((x, batch_sizes, h0, c0, *inputs[4:9], *flat))
            y, h_n, c_n = _to(wide_y, dtype), _to(h_n, dtype), None if c0 is None else _to(c_n, dtype)
        ctx.options = inputs[4:9]
        ctx.save_for_backward(*inputs[:4], wide_y, saved, *inputs[9:])
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        saved_tensors = ctx.saved_tensors
        found = _short_backward(ctx, dy, dh_n, dc_n, saved_tensors)
        if found is not None:
            return found
        x, batch_sizes, h0, c0, y, saved, *weights = saved_tensors
        dtypes = x.dtype, None, h0.dtype, h0.dtype, *(None,) * 5, *[weight.dtype for weight in weights]
        plain = not (dispatch.forward_mode() or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active())
        if not plain or _vmapped_the_old_way(dy, dh_n, dc_n):
            weights = [weight.float() for weight in weights]
        dy, dh_n, dc_n, x, h0, c0 = (_to(tensor, torch.float32) for tensor in (dy, dh_n, dc_n, x, h0, c0))
        found = Layer.gradients(ctx, dy, dh_n, dc_n, (x, batch_sizes, h0, c0, y, saved, *weights))
        return tuple(map(_to, found, dtypes))


apply_half = super(Function, HalfLayer).apply


class CellLayer(Function):
    """`EagerLayer` of one step, without the axes of time and directions: x [B, I], h [B, R], c [B, H] -> h, and c for lstm."""

    @staticmethod
    def forward(ctx, *inputs):
        output = dispatch.native.layer_forward(inputs)
        if output is None:
            y, h, c, saved = Layer.forward(*map(_unsqueezed, inputs[:4]), *inputs[4:])
            output = y[0], h[0].clone(), c[0].clone() if len(c) else None, saved  # of a view torch would forbid changes
        y, h, c, saved, *_ = output
        ctx.options = inputs[4:9]
        ctx.save_for_backward(*inputs[:4], y, saved, *inputs[9:])
        ctx.set_materialize_grads(False)
        return (h,) if inputs[3] is None else (h, c)

    @staticmethod
    def backward(ctx, dh, dc=None):
        saved_tensors = ctx.saved_tensors
        found = _short_backward(ctx, dh, None, dc, saved_tensors)
        if found is None:
            dh, dc, *tensors = map(_unsqueezed, (dh, dc, *saved_tensors[:5]))
            found = Layer.gradients(ctx, dh, None, dc, (*tensors, *saved_tensors[5:]))
            found = *(None if grad is None else grad.squeeze(0) for grad in found[:4]), *found[4:]
        return found


apply_cell = super(Function, CellLayer).apply


class LayerBackward(Function):
    """The gradients of `Layer`, as layer_backward returns them; their own gradients come from the reference."""

    @staticmethod
    def forward(
        dy, dh_n, dc_n, x, batch_sizes, h0, c0, y, saved,
        cell, reverse, batch_first, segments, directions, need_dx, need_dh0, need_dw, *weights
    ):  # fmt: skip
        layer = dy, dh_n, dc_n, x, batch_sizes, h0, c0, *_kinds(weights, directions), y, saved, cell, reverse, batch_first
        if segments:
            return _checkpoint_backward(*layer, segments, need_dx, need_dh0, need_dw)
        return _backward(*layer, need_dx, need_dh0, need_dw)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[9:17]
        ctx.save_for_backward(*inputs[:9], *inputs[17:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        dy, dh_n, dc_n, x, batch_sizes, h0, c0, y, saved, *weights = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * (17 + len(weights))
        cell, reverse, batch_first, segments, directions, *needs = ctx.options
        grads = [grad if need else None for grad, need in zip(grads, (needs[0], needs[1], needs[1], *(needs[2],) * 5))]
        layer = x, batch_sizes, h0, c0, *_kinds(weights, directions)
        # y and saved are functions of the rest, and their share of a third derivative is taken through it
        if torch.is_grad_enabled():
            y, _, _, saved = reference.layer_forward(*layer, cell, reverse, batch_first, True)
        elif segments:
            y, _, _, saved = _forward(*layer, cell, reverse, batch_first, True)
        need_dx, need_dw = ctx.needs_input_grad[3], any(ctx.needs_input_grad[17:])
        dy, dh_n, dc_n, dx, dh0, dc0, dw = gradients.layer_double_backward(
            grads, dy, dh_n, dc_n, *layer, y, saved, cell, reverse, batch_first, need_dx, need_dw
        )
        return dy, dh_n, dc_n, dx, None, dh0, dc0, *(None,) * 10, *(dw or [None] * len(weights))

    @staticmethod
    def vmap(
        info, in_dims, dy, dh_n, dc_n, x, batch_sizes, h0, c0, y, saved,
        cell, reverse, batch_first, segments, directions, need_dx, need_dh0, need_dw, *weights
    ):  # fmt: skip
        V, at = info.batch_size, 0 if batch_first else 1
        options = cell, reverse, batch_first, segments, directions, need_dx, need_dh0, need_dw
        if batch_sizes is not None or segments or need_dw or _any_mapped(in_dims[17:]):
            arguments = dy, dh_n, dc_n, x, batch_sizes, h0, c0, y, saved, *options, *weights
            return _loop(LayerBackward, V, in_dims, arguments), (0,) * 8
        dy, x, y = (_fold(t, in_dims[k], at, V) for k, t in ((0, dy), (3, x), (7, y)))
        dh_n, dc_n, h0, c0 = (_fold(t, in_dims[k], 1, V) for k, t in ((1, dh_n), (2, dc_n), (5, h0), (6, c0)))
        saved = saved.expand(V, *saved.shape) if in_dims[8] is None else saved.movedim(in_dims[8], 0)
        saved = saved.unflatten(2, (x.shape[1 - at], h0.shape[1] // V)).movedim(0, 2).flatten(1, 3)
        dx, dh0, dc0, *empty = LayerBackward.apply(
            dy, dh_n, dc_n, unit_stride(x), None, h0, c0, y.contiguous(), saved, *options, *weights
        )
        dx, x_dim = (_unfold(dx, at, V), at) if need_dx else (dx, None)
        dh0, h_dim = (_unfold(dh0, 1, V), 1) if need_dh0 else (dh0, None)
        dc0, c_dim = (dc0, None) if c0 is None or not need_dh0 else (_unfold(dc0, 1, V), 1)
        return (dx, dh0, dc0, *empty), (x_dim, h_dim, c_dim, *(None,) * 5)


class EagerLayerBackward(Function):
    """`LayerBackward` where no transform is active, as `EagerLayer` is to `Layer`."""

    @staticmethod
    def forward(ctx, *inputs):
        output = LayerBackward.forward(*inputs)
        LayerBackward.setup_context(ctx, inputs, output)
        return output

    backward = LayerBackward.backward


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


def _any_mapped(in_dims: Sequence[int | None]) -> bool:
    return any(dim is not None for dim in in_dims)


def _loop(function: type[Function], size: int, in_dims: Sequence[int | None], arguments: Sequence) -> tuple[Tensor, ...]:
    """The function on each member of a mapped axis, stacked along a new first axis."""
    if size == 0:
        raise ValueError("vmap over an axis of size 0: a recurrent layer has no member to take the output's shape from")
    members = [
        function.apply(
            *(a if dim is None else unit_stride(a.select(dim, v)) for a, dim in zip(arguments, in_dims, strict=True))
        )
        for v in range(size)
    ]
    return tuple(torch.stack(outputs) for outputs in zip(*members, strict=True))


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
    dispatch.native.differentiate(apply_eagerly, apply_half, apply_cell, checkpoint.is_on, torch.cat, _pattern)
