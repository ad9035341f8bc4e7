"""The operators under torch.func.vmap: the mapped axis becomes a part of the batch, or each member is a call of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import ops
from fastrnn.kernels.layer import layer_of


def _map_forward(info, in_dims, x, batch_sizes, h0, c0, weights, text, save, *more):
    """Map layer_forward."""
    V, at = info.batch_size, 0 if layer_of(text).batch_first else 1
    if batch_sizes is not None or _is_mapped(in_dims[4]) or _is_given(more):
        return _loop(ops.forward_op, V, in_dims, (x, batch_sizes, h0, c0, weights, text, save, *more)), (0, 0, 0, 0)
    x, h0, c0 = _fold(x, in_dims[0], at, V), _fold(h0, in_dims[2], 1, V), _fold(c0, in_dims[3], 1, V)
    y, h_n, c_n, saved = ops.forward_op(ops.unit_stride(x), None, h0, c0, weights, text, save)
    c_n, c_dim = (c_n, None) if c0 is None else (_unfold(c_n, 1, V), 1)
    saved_dim = 0 if save else None
    if save:
        saved = saved.unflatten(1, (x.shape[1 - at], V, h0.shape[1] // V)).movedim(2, 0).flatten(2, 3)
    return (_unfold(y, at, V), _unfold(h_n, 1, V), c_n, saved), (at, 1, c_dim, saved_dim)


def _map_backward(info, in_dims, dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, saved, text, needs, *more):
    """Map layer_backward; the gradients of weights are each member's own."""
    V, at, (need_dx, need_dh0, need_dw) = info.batch_size, 0 if layer_of(text).batch_first else 1, needs
    if batch_sizes is not None or need_dw or _is_mapped(in_dims[7]) or _is_given(more):
        arguments = dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, saved, text, needs, *more
        return _loop(ops.backward_op, V, in_dims, arguments), (0, 0, 0, 0)
    dy, x, y = (_fold(t, in_dims[k], at, V) for k, t in ((0, dy), (3, x), (8, y)))
    dh_n, dc_n, h0, c0 = (_fold(t, in_dims[k], 1, V) for k, t in ((1, dh_n), (2, dc_n), (5, h0), (6, c0)))
    saved = saved.expand(V, *saved.shape) if in_dims[9] is None else saved.movedim(in_dims[9], 0)
    saved = saved.unflatten(2, (x.shape[1 - at], h0.shape[1] // V)).movedim(0, 2).flatten(1, 3)
    inputs = ops.unit_stride(x), None, h0, c0
    dx, dh0, dc0, dw = ops.backward_op(dy, dh_n, dc_n, *inputs, weights, y.contiguous(), saved, text, needs)
    dx, x_dim = (_unfold(dx, at, V), at) if need_dx else (dx, None)
    dh0, h_dim = (_unfold(dh0, 1, V), 1) if need_dh0 else (dh0, None)
    dc0, c_dim = (dc0, None) if c0 is None or not need_dh0 else (_unfold(dc0, 1, V), 1)
    return (dx, dh0, dc0, dw), (x_dim, h_dim, c_dim, None)


def _map_checkpoint_forward(info, in_dims, *arguments):
    """Map checkpoint_forward; recompute mode has no effect under vmap."""
    return _map_forward(info, in_dims, *arguments[:6], False, *arguments[7:])


def _map_checkpoint_backward(info, in_dims, *arguments):
    """Map checkpoint_backward, of a call from before vmap: each member is a call."""
    return _loop(ops.checkpoint_backward, info.batch_size, in_dims, arguments), (0, 0, 0, 0)


for _name, _rule in (
    ("layer_forward", _map_forward),
    ("layer_backward", _map_backward),
    ("checkpoint_forward", _map_checkpoint_forward),
    ("checkpoint_backward", _map_checkpoint_backward),
):
    torch.library.register_vmap(f"fastrnn::{_name}", _rule, lib=ops.library)


def _is_mapped(dims: Sequence[int | None] | None) -> bool:
    """Is any tensor of a list mapped?"""
    return any(dim is not None for dim in dims or ())


def _is_given(more: Sequence[Tensor | None]) -> bool:
    """Is there an input of those that have defaults?"""
    return any(tensor is not None for tensor in more)


def _loop(op, size: int, in_dims: Sequence, arguments: Sequence) -> tuple[Any, ...]:
    """The op on each member of a mapped axis, stacked along a new first axis."""
    if size == 0:
        raise ValueError("vmap over an axis of size 0: a recurrent layer has no member to take the output's shape from")

    def member(argument, dim, v: int):
        if isinstance(argument, (list, tuple)):
            return [member(each, own, v) for each, own in zip(argument, dim or [None] * len(argument), strict=True)]
        return argument if dim is None else ops.unit_stride(argument.select(dim, v))

    def stacked(members: Any) -> Any:
        if isinstance(members[0], (list, tuple)):
            return [torch.stack(each) for each in zip(*members, strict=True)]
        return torch.stack(members)

    calls = [op(*(member(a, dim, v) for a, dim in zip(arguments, in_dims, strict=True))) for v in range(size)]
    return tuple(map(stacked, zip(*calls, strict=True)))


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
