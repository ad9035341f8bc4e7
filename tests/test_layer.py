"""What a layer is: the object, its text in Python and in C++, and which shapes fit each other."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from conftest import weight_names
from contract import CELLS
from torch import nn

import fastrnn
from fastrnn import dispatch
from fastrnn.kernels.layer import Inputs, Layer, Steps, layer_of, misfit

LAYERS = [
    Layer(cell, directions, *flags)
    for cell in CELLS
    for directions in (1, 2)
    for flags in itertools.product((False, True), repeat=4)
    if cell == "lstm" or not flags[1]  # which nothing else can project
]


def test_the_text_says_all():
    assert len({layer.text() for layer in LAYERS}) == len(LAYERS)
    for layer in LAYERS:
        assert layer_of(layer.text()) == layer
        assert len(layer.by_direction(weight_names(layer))) == layer.directions
    assert Layer("lstm", 2, True, False, True, True).text() == "lstm directions=2 bias reverse batch_first"


@pytest.mark.parametrize("text", ["gru2", "gru more", "gru bias=", "gru bias=1", "", "gru directions", "gru cell=lstm"])
def test_a_wrong_text_is_refused(text):
    with pytest.raises(ValueError):
        layer_of(text)


@pytest.mark.skipif(dispatch.native is None, reason="there is no compiled runtime")
def test_the_runtime_has_the_same_text(make_layer):
    """It reads each, and writes what Python would."""
    for layer in LAYERS:
        arguments = make_layer(*layer[:3], int(layer.projected), False, layer.batch_first, layer.reverse)
        *tensors, _ = arguments.values()
        y, *_ = torch.ops.fastrnn.layer_forward(*tensors, layer.text(), False)
        assert y.shape == (*arguments["x"].shape[:2], layer.directions * arguments["h0"].shape[-1])
    for layer in LAYERS:
        if layer.reverse:
            continue
        kind = {"lstm": nn.LSTM, "gru": nn.GRU}.get(layer.cell, nn.RNN)
        own = {"nonlinearity": layer.cell[4:]} if kind is nn.RNN else {"proj_size": 2} if layer.projected else {}
        module = getattr(fastrnn, kind.__name__)(
            3, 4, bias=layer.bias, batch_first=layer.batch_first, bidirectional=layer.directions == 2, **own
        )
        y, _ = module(torch.randn(2, 2, 3))
        assert y.grad_fn.options == (layer.text(), 0)
        assert dispatch.layer_of_module(module) == layer


def _wrong(name: str, arguments: dict) -> dict:
    """The arguments with one tensor of another shape."""
    if name not in arguments:
        at = weight_names(arguments["layer"]).index(name)
        weights = arguments["weights"]
        return arguments | {
            "weights": [*weights[:at], torch.zeros([size + 1 for size in weights[at].shape]), *weights[at + 1 :]]
        }
    return arguments | {name: torch.zeros([size + 1 for size in arguments[name].shape])}


@pytest.mark.parametrize("name", ["h0", "c0", "w_ih0", "b_ih0", "b_hh1", "w_hh1", "w_hr1"])
def test_what_does_not_fit_is_named(make_layer, name):
    arguments = make_layer("lstm", directions=2, project=3, sizes=(3, 2, 4, 5))
    for given, expected in ((arguments, None), (_wrong(name, arguments), name.rstrip("01") if "_" in name else name)):
        *tensors, weights, layer = given.values()
        found = misfit(layer, Inputs(*tensors), weights)
        assert found is None if expected is None else found.startswith(f"{expected}: expected ")


def test_layers_on_top_of_each_other_fit(make_layer):
    """Those above the lowest take what all directions of the one below give."""
    lowest = make_layer("gru", directions=2, sizes=(3, 2, 4, 5))
    above = make_layer("gru", directions=2, sizes=(3, 2, 10, 5))
    states = torch.cat((lowest["h0"], above["h0"]))
    inputs, layer = Inputs(lowest["x"], None, states, None), lowest["layer"]
    assert misfit(layer, inputs, lowest["weights"] + above["weights"], 2) is None
    assert misfit(layer, inputs, lowest["weights"] * 2, 2).startswith("w_ih: expected (15, 10), got (15, 4)")
    assert misfit(layer, inputs, lowest["weights"], 2).startswith("weights: expected 4 for each of 2 layers")
    assert misfit(layer, inputs._replace(h0=lowest["h0"]), lowest["weights"] + above["weights"], 2).startswith("h0: expected")


@pytest.mark.parametrize("form", [{}, {"batch_first": True}, {"packed": True}], ids=str)
def test_rows_of_steps(make_layer, form):
    """Each way to take a sequence apart agrees with the others, and is undone."""
    *tensors, _, layer = make_layer("gru", **form, sizes=(4, 3, 2, 5)).values()
    steps, x = Steps(layer, Inputs(*tensors)), tensors[0]
    rows = steps.flat(x)
    assert len(rows) == steps.rows == sum(steps.sizes) and len(steps.sizes) == steps.steps == 4
    assert torch.equal(torch.cat(list(steps.each(x))), rows)
    assert torch.equal(steps.join(rows), x) and torch.equal(steps.gathered(list(steps.each(x))), x)
    part = steps.part(x, 1, 3)
    assert torch.equal(part if steps.packed else part.transpose(0, steps.axis).flatten(0, 1), torch.cat(steps.each(x)[1:3]))


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.nn's forward assigns `_flat_weights`
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of bytes, by torch 2.10's own torch.export.load
def test_an_exported_program_prints_and_loads_the_layer():
    module, x = fastrnn.LSTM(3, 4, bidirectional=True, batch_first=True).eval(), torch.randn(2, 5, 3)
    program = torch.export.export(module, (x,))
    assert "lstm directions=2 bias batch_first" in str(program.graph)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    for one, other in zip(*(torch.utils._pytree.tree_leaves(f(x)) for f in (torch.export.load(saved).module(), module))):
        torch.testing.assert_close(one, other)
