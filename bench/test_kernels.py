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
    """(tensors, text of the layer) of layer_forward and layer_backward: x, batch_sizes, h0, c0 and the list of weights."""
    batch, steps, hidden = sizes
    torch.manual_seed(0)
    rows = CELLS[request.param].gates * hidden
    bound = hidden**-0.5
    x, h0 = torch.randn(steps, batch, hidden), torch.zeros(1, batch, hidden)
    weights = [torch.empty(shape).uniform_(-bound, bound) for shape in [(rows, hidden)] * 2 + [(rows,)] * 2]
    return (x, None, h0, h0 if request.param == "lstm" else None, weights), f"{request.param} bias"


@pytest.mark.parametrize("save", [False, True], ids=["infer", "save"])
def test_forward(benchmark, arguments, save):
    tensors, text = arguments
    benchmark(torch.ops.fastrnn.layer_forward, *tensors, text, save)


def test_backward(benchmark, arguments):
    tensors, text = arguments
    y, _, _, saved = torch.ops.fastrnn.layer_forward(*tensors, text, True)
    dy, needs = torch.randn_like(y), [True, True, True]
    benchmark(torch.ops.fastrnn.layer_backward, dy, None, None, *tensors, y, saved, text, needs)
