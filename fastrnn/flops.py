"""What torch.utils.flop_counter counts for the operators: two operations for each weight and row, as for torch.nn's layers."""

from __future__ import annotations

import math
from types import ModuleType

import torch

from fastrnn.kernels.layer import layer_of


def count_operations(counter: ModuleType) -> None:
    """Tell torch.utils.flop_counter how many operations each operator has. It gives shapes in the place of tensors."""

    def forward(x, batch_sizes, h0, c0, weights, *options, out_shape):
        return 2 * math.prod(x[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)

    def backward(dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, saved, text, *segments_needs_and_more, out_shape):
        rows = math.prod(x[:-1])
        need_dx, need_dh0, need_dw = next(each for each in segments_needs_and_more if isinstance(each, (list, tuple)))
        layer, count = layer_of(text), 0
        carried = rows if need_dh0 else rows - h0[1] // (1 + layer.restarts)  # from a step to the one before
        for own in layer.by_direction(weights):
            w_ih, w_hh, w_hr = (0 if shape is None else math.prod(shape) for shape in (own.w_ih, own.w_hh, own.w_hr))
            count += w_ih * need_dx * rows + w_hh * carried + w_hr * rows + (w_ih + w_hh + w_hr) * need_dw * rows
        return 2 * count

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
