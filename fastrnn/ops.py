"""The operators: one recurrent layer forward, and its gradients, each once for every cell and device. Schemas and fakes.

Raw ops. Engines register them per device; autograd.py and transforms.py make them differentiable and mappable wherever they are
called: eagerly, in a graph of torch.compile's or make_fx's, in an exported program. They assume T >= 1, B >= 1, one dtype and
one device.

    layer_forward -> y, h_n, c_n, saved
    layer_backward -> dx, dh0, dc0, dw

    x, batch_sizes, h0, c0   fastrnn.kernels.layer.Inputs
    dy, dh_n, dc_n           fastrnn.kernels.layer.Outer
    weights      as torch.nn lists a layer's: of direction 0 w_ih, w_hh, b_ih, b_hh, w_hr, those that are there, then of
                 direction 1. On the CPU, where all else is float32 and R is even, matrices may be bfloat16, and their gradients
                 are then, rounded once.
    layer        the text of a fastrnn.kernels.layer.Layer
    resets, lengths, mask, noise   also of Inputs; last, and with defaults, for programs that were exported before these were
    save         keep what layer_backward needs
    y            contiguous [T, B, D*R] | [B, T, D*R] | [N, D*R]
    h_n, c_n     [D, B, R] and [D, B, S*H] ([0] where there is none)
    saved        [D, rows, slots*H], rows step-major (also when batch_first) or packed; one more slot, the output before
                 the projection, where there is one. [0] without `save`.
    needs        fastrnn.kernels.layer.Needs
    dx           like x, contiguous; [0] if not needed
    dh0, dc0     like h0 and c0; [0] if not needed
    dw           of each weight, in their order; none at all if not needed

The same two in the recompute mode, over the raw ops of any engine, see checkpoint.py:

    checkpoint_forward -> y, h_n, c_n, kept
    checkpoint_backward -> as layer_backward

    segments     parts of about equal rows into which the steps are divided, from 1 to max(1, T // 2)
    weights      in x's dtype, all
    kept         [D, segments - 1, B, S*H], states before each segment but a direction's first, in the order they run; [0]
                 for cells that have none
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from fastrnn import checkpoint, dispatch
from fastrnn.kernels import gpu, gradients
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.layer import Inputs, Needs, Outer, layer_of

_INPUTS = "Tensor x, Tensor? batch_sizes, Tensor h0, Tensor? c0, Tensor[] weights"
_OUTER = "Tensor? dy, Tensor? dh_n, Tensor? dc_n"
_MORE = "Tensor? resets=None, Tensor? lengths=None, Tensor? mask=None, Tensor? noise=None"
_GRADIENTS = "(Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dw)"
library = torch.library.Library("fastrnn", "DEF")
for _schema in (
    f"layer_forward({_INPUTS}, str layer, bool save, {_MORE}) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)",
    f"layer_backward({_OUTER}, {_INPUTS}, Tensor y, Tensor saved, str layer, bool[3] needs, {_MORE}) -> {_GRADIENTS}",
    f"checkpoint_forward({_INPUTS}, str layer, SymInt segments, {_MORE}) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor kept)",
    f"checkpoint_backward({_OUTER}, {_INPUTS}, Tensor y, Tensor kept, str layer, SymInt segments, bool[3] needs, {_MORE}) "
    f"-> {_GRADIENTS}",
):
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
forward_op = torch.ops.fastrnn.layer_forward.default
backward_op = torch.ops.fastrnn.layer_backward.default
checkpoint_forward = torch.ops.fastrnn.checkpoint_forward.default
checkpoint_backward = torch.ops.fastrnn.checkpoint_backward.default
OPERATORS = forward_op, backward_op, checkpoint_forward, checkpoint_backward
library.impl("checkpoint_forward", checkpoint.forward, "CompositeExplicitAutograd")
library.impl("checkpoint_backward", checkpoint.backward, "CompositeExplicitAutograd")


def forward(inputs: Inputs, weights: Sequence[Tensor], text: str, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """layer_forward; on a GPU past the dispatcher where nobody would see the call there (a CPU's: `autograd.LayerFunction`)."""
    op = gpu.layer_forward if _past_the_dispatcher(inputs.x) else forward_op
    return op(*inputs[:4], weights, text, save, *inputs[4:])


def backward(
    outer: Outer, inputs: Inputs, weights: Sequence[Tensor], y: Tensor, saved: Tensor, text: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """layer_backward, likewise, where it is not to be differentiated."""
    past = not torch.is_grad_enabled() and _past_the_dispatcher(inputs.x)
    op = gpu.layer_backward if past else backward_op
    return op(*outer, *inputs[:4], weights, y, saved, text, needs, *inputs[4:])


def backward_of_states(
    outer: Outer, inputs: Inputs, weights: Sequence[Tensor], y: Tensor, saved: Tensor, text: str, needs: Needs, dc: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`backward` with gradients [D, N, S*H] of the states but h after each step: fused on a GPU where nobody observes the call.

    Elsewhere it is gradients.py's, which autograd, transforms and compilers see through, and which takes longer.
    """
    if not torch.is_grad_enabled() and _past_the_dispatcher(inputs.x):
        return gpu.layer_backward(*outer, *inputs[:4], weights, y, saved, text, list(needs), *inputs[4:], dc_steps=dc)
    return gradients.layer_backward(outer, inputs, weights, y, saved, layer_of(text), needs, dc)


def _past_the_dispatcher(x: Tensor) -> bool:
    plain = getattr(x, gpu.HERE) and type(x) in (Tensor, Parameter)
    return plain and not (torch.compiler.is_compiling() or dispatch.watched())


def unit_stride(tensor: Tensor) -> Tensor:
    """The engines read rows of x: elements next to each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


@torch.library.register_fake("fastrnn::layer_forward", lib=library)
def _fake_forward(x, batch_sizes, h0, c0, weights, text, save, *more):
    layer, (rows, _), (_, batch, width) = layer_of(text), weights[1].shape, h0.shape
    batch = batch // 2 if layer.restarts else batch
    cell = CELLS[layer.cell]
    hidden, steps = rows // cell.gates, x.shape[:-1]
    saved = (layer.directions, math.prod(steps), (cell.slots + layer.projected) * hidden) if save else (0,)
    return (
        x.new_empty((*steps, layer.directions * width)),
        x.new_empty((layer.directions, batch, width)),
        x.new_empty((layer.directions, batch, cell.states * hidden) if cell.states else (0,)),
        x.new_empty(saved),
    )


@torch.library.register_fake("fastrnn::layer_backward", lib=library)
def _fake_backward(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, saved, text, needs, *more):
    need_dx, need_dh0, need_dw = needs
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(h0.shape if need_dh0 else (0,)),
        x.new_empty((0,) if c0 is None or not need_dh0 else c0.shape),
        [x.new_empty(w.shape, dtype=w.dtype if w.dim() == 2 else x.dtype) for w in weights] if need_dw else [],
    )


@torch.library.register_fake("fastrnn::checkpoint_forward", lib=library)
def _(x, batch_sizes, h0, c0, weights, text, segments, *more):
    y, h_n, c_n, _ = _fake_forward(x, batch_sizes, h0, c0, weights, text, False)
    return y, h_n, c_n, x.new_empty((0,) if c0 is None else (c_n.shape[0], segments - 1, *c_n.shape[1:]))


@torch.library.register_fake("fastrnn::checkpoint_backward", lib=library)
def _(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, kept, text, segments, needs, *more):
    return _fake_backward(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, kept, text, needs)


dispatch.load()  # after the schemas that engines register against
