"""The definition: kernels/reference.py against torch.nn, and its backward pass against autograd through its forward."""

from __future__ import annotations

import pytest
import torch
from contract import CELLS
from torch import nn

from fastrnn.kernels import cells, gradients, reference

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


def _torch(arguments: dict, **more):
    """torch.nn's module with these weights, called with these tensors: y and the states."""
    kinds = [arguments[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")]
    cell, w_hr = arguments["cell"], arguments["w_hr"]
    module = getattr(nn, {"lstm": "LSTM", "gru": "GRU"}.get(cell, "RNN"))(
        kinds[0][0].shape[1],
        arguments["w_hh"][0].shape[0] // cells.CELLS[cell].gates,
        bias=bool(kinds[2]),
        bidirectional=len(kinds[0]) == 2,
        batch_first=arguments["batch_first"],
        dtype=arguments["x"].dtype,
        **({"proj_size": w_hr[0].shape[0]} if w_hr else {}),
        **({"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}),
    )
    flat = [kind[d] for d in range(len(kinds[0])) for kind in kinds if kind]
    for parameter, value in zip(module.parameters(), flat, strict=True):
        parameter.data = value
    hx = arguments["h0"] if cell != "lstm" else (arguments["h0"], arguments["c0"])
    x = arguments["x"]
    if arguments["batch_sizes"] is not None:
        x = nn.utils.rnn.PackedSequence(x, arguments["batch_sizes"])
    y, states = module(x, hx)
    y = y.data if arguments["batch_sizes"] is not None else y
    return y, *(states if isinstance(states, tuple) else (states,))


def test_forward_is_torchs(arguments):
    y, h_n, c_n, saved = reference.layer_forward(**arguments)
    found = (y, h_n, c_n) if arguments["cell"] == "lstm" else (y, h_n)
    for one, other in zip(found, _torch(arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert saved.shape == (0,)


def test_saved(arguments):
    """The slots of the contract, rows step-major in either layout; the last ones hold the states after each step."""
    y, _, c_n, saved = reference.layer_forward(**arguments, save=True)
    kind, (rows, _) = cells.CELLS[arguments["cell"]], arguments["w_hh"][0].shape
    hidden, projected = rows // kind.gates, bool(arguments["w_hr"])
    assert saved.shape == (len(arguments["w_ih"]), y.shape[:-1].numel(), (kind.slots + projected) * hidden)
    if kind.carry == "cell":
        c, b = saved[0].unflatten(1, (-1, hidden))[:, 4], c_n.shape[1]
        last = c_n[0]
        if arguments["batch_sizes"] is None:
            assert torch.equal(c[-b:], last)
        else:
            ends = arguments["batch_sizes"]
            assert torch.equal(c[-int(ends[-1]) :], last[: int(ends[-1])])
    if projected:
        out = saved[0].unflatten(1, (-1, hidden))[:, -1] @ arguments["w_hr"][0].T
        first = y.transpose(0, 1) if arguments["batch_first"] else y
        torch.testing.assert_close(out, first.reshape(-1, y.shape[-1])[:, : out.shape[1]])


@pytest.mark.parametrize("reverse", [False, True])
def test_backward_is_the_gradient_of_forward(arguments, reverse):
    arguments["reverse"] = reverse
    names = [name for name in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr") if _some(arguments[name])]
    leaves = {}
    for name in names:
        value = arguments[name]
        leaves[name] = [t.requires_grad_() for t in value] if isinstance(value, list) else [value.requires_grad_()]
    y, h_n, c_n, saved = reference.layer_forward(**arguments, save=True)
    outputs = [y, h_n] + [c_n] * (arguments["cell"] == "lstm")
    d_outputs = [torch.randn_like(out) for out in outputs]
    flat = [leaf for name in names for leaf in leaves[name]]
    expected = iter(torch.autograd.grad(outputs, flat, d_outputs))
    options = [arguments.pop(name) for name in ("cell", "reverse", "batch_first")]
    tensors = list(arguments.values())
    dc_n = d_outputs[2] if len(d_outputs) == 3 else None
    grads = gradients.layer_backward(*d_outputs[:2], dc_n, *tensors, y, saved, *options)
    for name, grad in zip(("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr"), grads, strict=True):
        if name not in names:
            assert grad.shape == (0,), name
            continue
        want = [next(expected) for _ in leaves[name]]
        want = torch.cat(want) if name.startswith(("w_", "b_")) else want[0]
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-13, msg=lambda text, name=name: f"d{name}: {text}")
    for needs in ((False, True, True), (True, False, True), (True, True, False)):
        dx, dh0, dc0, *dw = gradients.layer_backward(*d_outputs[:2], dc_n, *tensors, y, saved, *options, *needs)
        need_dx, need_dh0, need_dw = needs
        assert (dx.numel() > 0) == need_dx
        assert (dh0.numel() > 0) == need_dh0
        assert (dc0.numel() > 0) == (need_dh0 and "c0" in names)
        assert (dw[0].numel() > 0) == need_dw


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cell", CELLS)
def test_any_dtype(make_layer, cell, dtype):
    found = reference.layer_forward(**make_layer(cell, dtype=dtype), save=True)
    assert all(out.dtype == dtype for out in found)


def _some(value) -> bool:
    return value is not None and len(value) > 0
