"""The definition: kernels/reference.py against torch.nn, and its backward pass against autograd through its forward."""

from __future__ import annotations

import pytest
import torch
from conftest import weight_names
from contract import CELLS
from torch import nn

from fastrnn.kernels import cells, gradients, reference
from fastrnn.kernels.layer import Inputs, Needs, Outer

FORMS = {
    "dense": {},
    "batch_first": {"batch_first": True},
    "two_directions": {"directions": 2},
    "no_bias": {"bias": False},
    "packed": {"packed": True},
    "packed_two": {"packed": True, "directions": 2},
}
CASES = [(cell, form, False) for cell in CELLS for form in FORMS] + [("lstm", form, True) for form in FORMS]


@pytest.fixture(params=CASES, ids=[f"{cell}-{form}{'-projected' * project}" for cell, form, project in CASES])
def arguments(request, make_layer) -> dict:
    cell, form, project = request.param
    return make_layer(cell, **FORMS[form], project=project, sizes=(5, 4, 3, 6))


def forward(arguments: dict, save: bool = True):
    *tensors, weights, layer = arguments.values()
    return reference.layer_forward(Inputs(*tensors), weights, layer, save)


def _torch(arguments: dict, **more):
    """torch.nn's module with these weights, called with these tensors: y and the states."""
    layer, weights = arguments["layer"], arguments["weights"]
    cell = layer.cell
    module = getattr(nn, {"lstm": "LSTM", "gru": "GRU"}.get(cell, "RNN"))(
        weights[0].shape[1],
        weights[0].shape[0] // cells.CELLS[cell].gates,
        bias=layer.bias,
        bidirectional=layer.directions == 2,
        batch_first=layer.batch_first,
        dtype=arguments["x"].dtype,
        **({"proj_size": weights[-1].shape[0]} if layer.projected else {}),
        **({"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}),
    )
    for parameter, value in zip(module.parameters(), weights, strict=True):
        parameter.data = value
    hx = arguments["h0"] if cell != "lstm" else (arguments["h0"], arguments["c0"])
    x = arguments["x"]
    if arguments["batch_sizes"] is not None:
        x = nn.utils.rnn.PackedSequence(x, arguments["batch_sizes"])
    y, states = module(x, hx)
    y = y.data if arguments["batch_sizes"] is not None else y
    return y, *(states if isinstance(states, tuple) else (states,))


def test_forward_is_torchs(arguments):
    y, h_n, c_n, saved = forward(arguments, False)
    found = (y, h_n, c_n) if arguments["layer"].cell == "lstm" else (y, h_n)
    for one, other in zip(found, _torch(arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert saved.shape == (0,)


def test_saved(arguments):
    """The slots of the contract, rows step-major in either layout; the last ones hold the states after each step."""
    y, _, c_n, saved = forward(arguments)
    layer, weights = arguments["layer"], arguments["weights"]
    kind = cells.CELLS[layer.cell]
    hidden = len(weights[0]) // kind.gates
    assert saved.shape == (layer.directions, y.shape[:-1].numel(), (kind.slots + layer.projected) * hidden)
    if kind.states == 1 and not kind.reads_hidden:
        c, b = saved[0].unflatten(1, (-1, hidden))[:, 4], c_n.shape[1]
        last = c_n[0]
        if arguments["batch_sizes"] is None:
            assert torch.equal(c[-b:], last)
        else:
            ends = arguments["batch_sizes"]
            assert torch.equal(c[-int(ends[-1]) :], last[: int(ends[-1])])
    if layer.projected:
        out = saved[0].unflatten(1, (-1, hidden))[:, -1] @ layer.by_direction(weights)[0].w_hr.T
        first = y.transpose(0, 1) if layer.batch_first else y
        torch.testing.assert_close(out, first.reshape(-1, y.shape[-1])[:, : out.shape[1]])


@pytest.mark.parametrize("reverse", [False, True])
def test_backward_is_the_gradient_of_forward(arguments, reverse):
    layer = arguments["layer"] = arguments["layer"]._replace(reverse=reverse)
    x, batch_sizes, h0, c0, weights = (arguments[name] for name in ("x", "batch_sizes", "h0", "c0", "weights"))
    leaves = {"x": x, "h0": h0} | ({} if c0 is None else {"c0": c0}) | dict(zip(weight_names(layer), weights))
    for leaf in leaves.values():
        leaf.requires_grad_()
    y, h_n, c_n, saved = forward(arguments)
    outputs = [y, h_n] + [c_n] * (c0 is not None)
    outer = Outer(*(torch.randn_like(out) for out in outputs), *[None] * (c0 is None))
    expected = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), outer[: len(outputs)])))
    call = outer, Inputs(x, batch_sizes, h0, c0), weights, y, saved, layer
    dx, dh0, dc0, dw = gradients.layer_backward(*call, Needs())
    found = {"x": dx, "h0": dh0} | ({} if c0 is None else {"c0": dc0}) | dict(zip(weight_names(layer), dw, strict=True))
    assert c0 is not None or dc0.shape == (0,)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-13, msg=lambda text, name=name: f"d{name}: {text}")
    for needs in (Needs(dx=False), Needs(dh0=False), Needs(dw=False)):
        dx, dh0, dc0, dw = gradients.layer_backward(*call, needs)
        assert (dx.numel() > 0) == needs.dx
        assert (dh0.numel() > 0) == needs.dh0
        assert (dc0.numel() > 0) == (needs.dh0 and c0 is not None)
        assert len(dw) == needs.dw * len(weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cell", CELLS)
def test_any_dtype(make_layer, cell, dtype):
    found = forward(make_layer(cell, dtype=dtype))
    assert all(out.dtype == dtype for out in found)
