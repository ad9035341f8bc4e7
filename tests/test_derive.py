"""kernels/derive.py: what is derived from a cell's function against autograd through it, and that it is as small as by hand."""

from __future__ import annotations

import ast
from collections import Counter

import pytest
import torch
from contract import assert_derivative, numbers

from fastrnn.kernels import gradients, reference
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.derive import Derivation
from fastrnn.kernels.symbols import tanh, where

KEPT = {
    "rnn_tanh": [],
    "rnn_relu": [],
    "lstm": ["sigmoid_i", "sigmoid_f", "tanh_g", "sigmoid_o"],
    "gru": ["tanh", "sigmoid_r", "sigmoid_z", "n_h"],
}
# Of forward and backward as people write them: operations with numbers, elementary functions.
OPERATIONS = {"rnn_tanh": (0, 1, 3, 0), "rnn_relu": (0, 1, 1, 1), "lstm": (4, 5, 22, 1), "gru": (5, 3, 16, 0)}


@pytest.fixture(params=KEPT)
def cell(request):
    return CELLS[request.param]


def test_gradients_are_those_of_autograd(cell):
    assert_derivative(cell, rtol=1e-13, atol=1e-14)


def test_changes_are_those_of_forward_mode(cell):
    """How backward's results change with forward's arguments, against forward mode through both functions."""
    derived, names = cell.derived, gradients.NAMES | gradients.FUSED
    given: dict = {}
    inputs = numbers(derived.forward, given)
    seeds = [torch.randn(5, 7, dtype=torch.float64) for _ in range(1 + len(derived.after))]

    def backward(*inputs):
        results = derived.forward.bind(reference.NAMES)(*inputs)
        known = {name: value for (name, _), value in zip(derived.forward.results, results, strict=True)}
        known |= dict(zip((name for name, _ in derived.forward.parameters), inputs, strict=True))
        known |= dict(zip((name for name, _ in derived.backward.parameters), seeds, strict=False))
        own = derived.backward.bind(reference.NAMES)(*(known[name] for name, _ in derived.backward.parameters))
        return tuple(own), {name: known[name] for name, _ in derived.backward.parameters}

    along = tuple(torch.randn_like(each) for each in inputs)
    _, truths, known = torch.func.jvp(backward, tuple(inputs), along, has_aux=True)
    for printer in (None, gradients.Fused):
        own = derived.bend.bind(names, printer)(*known.values(), *along)
        for (name, _), found, truth in zip(derived.bend.results, own, truths, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_kept(cell):
    """As few values as by hand: the second tanh of an LSTM costs less than a slot."""
    assert [name.rstrip("_0123456789") for name, _ in cell.derived.kept] == KEPT[cell.name]
    assert cell.slots == len(KEPT[cell.name]) + len(cell.derived.after)
    assert cell.derived.reads_output == (cell.slots == 0)


def test_no_more_operations_than_by_hand(cell):
    def count(code) -> tuple[int, int]:
        found = Counter(type(node).__name__ for node in ast.walk(ast.parse(code.source())))
        return found["BinOp"] + found["Compare"] + found["UnaryOp"], found["Call"]

    counted = *count(cell.derived.forward), *count(cell.derived.backward)
    assert all(own <= by_hand for own, by_hand in zip(counted, OPERATIONS[cell.name], strict=True)), counted


def test_a_result_that_is_constant():
    """A state that no gradient reaches has one of zeros, not a number."""

    def step(a, c):
        return tanh(a), where(c > 0, a, 2 * a)

    derived = Derivation("step", step, [], ["a"], [], ["c"], [], [], ["a", "c"])
    given: dict = {}
    d_a, d_c = derived.backward.bind(reference.NAMES)(*numbers(derived.backward, given))
    assert torch.equal(d_c, torch.zeros(5, 7, dtype=torch.float64)) and d_a.shape == d_c.shape
