"""The kernels alone, without modules and autograd: `pytest bench/test_kernels.py`."""

from __future__ import annotations

import pytest
import torch

import fastrnn  # registers the operators  # noqa: F401
from fastrnn.kernels.cells import CELLS

SIZES = [(1, 100, 64), (1, 50, 1024), (32, 100, 64), (32, 100, 256), (128, 25, 512)]  # batch, steps, hidden


@pytest.fixture(params=SIZES, ids=lambda sizes: "B{} T{} H{}".format(*sizes))
def sizes(request):
    return request.param


@pytest.fixture(params=["lstm", "gru", "rnn_tanh"])
def arguments(request, sizes):
    """(tensors, cell) that layer_forward and layer_backward begin with: x, batch_sizes, h0, c0, weights and biases."""
    batch, steps, hidden = sizes
    torch.manual_seed(0)
    rows = CELLS[request.param].gates * hidden
    bound = hidden**-0.5
    x, h0 = torch.randn(steps, batch, hidden), torch.zeros(1, batch, hidden)
    weights = [[torch.empty(rows, hidden).uniform_(-bound, bound)] for _ in range(2)]
    biases = [[torch.empty(rows).uniform_(-bound, bound)] for _ in range(2)]
    return (x, None, h0, h0 if request.param == "lstm" else None, *weights, *biases, []), request.param


@pytest.mark.parametrize("save", [False, True], ids=["infer", "save"])
def test_forward(benchmark, arguments, save):
    tensors, cell = arguments
    benchmark(torch.ops.fastrnn.layer_forward, *tensors, cell, False, False, save)


def test_backward(benchmark, arguments):
    tensors, cell = arguments
    y, _, _, saved = torch.ops.fastrnn.layer_forward(*tensors, cell, False, False, True)
    dy = torch.randn_like(y)
    kept = (y, saved, cell, False, False)
    benchmark(torch.ops.fastrnn.layer_backward, dy, None, None, *tensors, *kept, need_dx=True, need_dh0=True, need_dw=True)
