"""fastrnn.cell and fastrnn.recurrent: cells of one's own, those that come with fastrnn, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import io
import math
import pickle
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import bound, python, relative
from contract import threads as set_threads
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import cells, dispatch
from fastrnn.cells import Gate, Hidden, Input, State, Weight, exp, maximum, relu, sigmoid, tanh, where
from fastrnn.kernels import gradients, reference
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.layer import Inputs, Layer, Needs, Outer
from fastrnn.kernels.user_cache import cache_path

NATIVE = ["slstm", "peephole_lstm", "mgu", "indrnn", "wide"]  # what the others have is among what these have
FORMS = {
    "plain": {},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "two heads": {"num_heads": 2},
    "four heads": {"num_heads": 4, "bidirectional": True},
    "no bias": {"bias": False},
}


@fastrnn.cell
def odd(a: Gate, b: Input, e: Hidden, more: Hidden, c: State, h: State, w: Weight, d: State, scale=0.5):
    """One of everything, in no order."""
    c_next = where((a > 0) & ~(b > 1), c * sigmoid(b), w) + e**2 / (1 + abs(more))
    d = maximum(d * scale, tanh(a)) - exp(-relu(c_next))
    return tanh(d + h / (1 + exp(w))), c_next, d


@fastrnn.cell
def wide(a: Gate, b: Gate, e: Gate, f: Gate, g: Gate, i: Gate, j: Gate, k: Gate, c: State, d: State, m: State, n: State):
    """More gates and states than any that comes with fastrnn: the sums of a row do not fit a row of the usual size."""
    c, d = sigmoid(a) * c + tanh(b), sigmoid(e) * d + tanh(f)
    return tanh(g + i) * (c - d), c, d, m * sigmoid(j), n * 0.5 + tanh(k)


every_cell = pytest.mark.parametrize("name", [*cells.SHIPPED, "odd", "wide"])
every_form = pytest.mark.parametrize("form", FORMS)


def cell_of(name: str) -> cells.CellFunction:
    return {"odd": odd, "wide": wide}.get(name) or getattr(cells, name)


def layer_of(name: str, form: str = "plain", inputs: int = 5, hidden: int = 12, **more) -> fastrnn.recurrent.Recurrent:
    return fastrnn.recurrent(cell_of(name))(inputs, hidden, dtype=torch.float64, **FORMS[form], **more)


def sample(layer, steps: int = 4, batch: int = 3) -> tuple[Tensor, list[Tensor]]:
    """x and the initial states. Those are far from zero, which sLSTM divides by."""
    shape = (batch, steps) if layer.batch_first else (steps, batch)
    depth = layer.num_layers * (1 + layer.bidirectional)
    states = [torch.rand(depth, batch, layer.hidden_size).double() + 0.5 for _ in range(1 + layer.cell.definition.states)]
    return torch.randn(*shape, layer.input_size).double(), states


def run(layer, x, states) -> list[Tensor]:
    y, after = layer(x, None if not states else states[0] if len(states) == 1 else tuple(states))
    return [y, *((after,) if isinstance(after, Tensor) else after)]


def by_hand(layer, x: Tensor, states: list[Tensor]) -> list[Tensor]:
    """The same with the cell's own function, step by step, a product for each head."""
    kinds, H, heads, D = layer.cell.definition.kinds, layer.hidden_size, layer.num_heads, 1 + layer.bidirectional
    ys, lasts = (x.transpose(0, 1) if layer.batch_first else x), []
    for k in range(layer.num_layers):
        outputs = []
        for d in range(D):
            suffix = f"_l{k}" + "_reverse" * d
            get = {name.removesuffix(suffix): value for name, value in layer.named_parameters() if name.endswith(suffix)}
            now = dict(zip(["h", *carried(layer)], [state[k * D + d] for state in states], strict=True))
            found: list = [None] * len(ys)
            for t in reversed(range(len(ys))) if d else range(len(ys)):
                of_input = nn.functional.linear(ys[t], get["weight_ih"], get.get("bias_ih"))
                given = dict(zip([n for n in kinds if kinds[n] in ("Gate", "Input")], of_input.split(H, -1), strict=True))
                if "weight_hh" in get:
                    w = get["weight_hh"].view(-1, heads, H // heads, H // heads)
                    of_state = torch.einsum("bki,gkoi->bgko", now["h"].view(-1, heads, H // heads), w).flatten(1)
                    of_state = of_state + get.get("bias_hh", torch.zeros(()))
                    for n, part in zip(
                        [n for n in kinds if kinds[n] in ("Gate", "Hidden")], of_state.split(H, -1), strict=True
                    ):
                        given[n] = given[n] + part if n in given else part
                given |= {n: now[n] for n in kinds if kinds[n] == "State"}
                given |= {n: get[f"weight_{n}"] for n in kinds if kinds[n] == "Weight"}
                results = layer.cell(**given)
                results = results if isinstance(results, tuple) else (results,)
                now = dict(zip(now, results, strict=True))
                found[t] = results[0]
            outputs.append(torch.stack(found))
            lasts.append([*now.values()])
        ys = torch.cat(outputs, -1)
    return [ys.transpose(0, 1) if layer.batch_first else ys, *map(torch.stack, zip(*lasts, strict=True))]


def carried(layer) -> list[str]:
    return [name for name, kind in layer.cell.definition.kinds.items() if kind == "State" and name != "h"]


def results(function, layer, x: Tensor, states: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients of a random combination of them, by name."""
    leaves = {"x": x.clone().requires_grad_()} | {f"state {k}": s.clone().requires_grad_() for k, s in enumerate(states)}
    outputs = function(layer, leaves["x"], [leaves[f"state {k}"] for k in range(len(states))])
    draw = torch.Generator().manual_seed(1)
    loss = sum((each * torch.randn(each.shape, generator=draw).to(each)).sum() for each in outputs)
    leaves |= dict(layer.named_parameters())
    grads = torch.autograd.grad(loss, [*leaves.values()])
    found = {f"output {k}": each.detach() for k, each in enumerate(outputs)}
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@every_form
@every_cell
def test_a_layer_is_its_cell_step_by_step(name, form, monkeypatch):
    monkeypatch.setattr(dispatch, "forced", "reference")
    layer = layer_of(name, form)
    x, states = sample(layer)
    found, truth = (results(function, layer, x, states) for function in (run, by_hand))
    for key, value in truth.items():
        torch.testing.assert_close(found[key], value, rtol=1e-11, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    "name", [*NATIVE, *(pytest.param(n, marks=pytest.mark.slow) for n in [*cells.SHIPPED, "odd"] if n not in NATIVE)]
)
def test_compiled_kernels_are_within_the_contract(name, monkeypatch):
    """Each number in float32 against the truth in float64, and what plain operations make of it."""
    for form, hidden, steps, batch in (
        ("two layers, two directions", 33, 5, 7),
        ("two heads", 70, 3, 50),
        ("no bias", 16, 1, 1),
    ):
        torch.manual_seed(0)
        layer = layer_of(name, form, hidden=hidden)
        x, states = sample(layer, steps, batch)
        truth = results(by_hand, layer, x, states)
        single = copy.deepcopy(layer).float(), x.float(), [state.float() for state in states]
        found = results(run, *single)
        assert fastrnn.explain(single[0], single[1]).engine == "cpu"
        monkeypatch.setattr(dispatch, "forced", "reference")
        plain = results(run, *single)
        monkeypatch.undo()
        for key, value in truth.items():
            own, allowed = relative(found[key], value), bound(torch.float32, relative(plain[key], value))
            assert own <= allowed, f"{form}: {key}: {own:.2g} > {allowed:.2g}"


@every_cell
@pytest.mark.parametrize(("packed", "heads"), [(False, 1), (True, 1), (False, 2)])
def test_derived_gradients_are_those_of_autograd(name, packed, heads):
    """kernels/gradients.py, first and second order, through the ops' reference; two directions."""
    kind = cell_of(name).definition
    T, B, I, H, D = 3, 3, 2, 2 * heads, 2
    layer, sizes = Layer(kind.name, D, bias=True, heads=heads), torch.tensor([3, 3, 1]) if packed else None
    x = torch.randn(*((7, I) if packed else (T, B, I)), dtype=torch.float64)
    h0 = torch.rand(D, B, H, dtype=torch.float64) + 0.5
    c0 = torch.rand(D, B, kind.states * H, dtype=torch.float64) + 0.5 if kind.states else None
    shapes = (kind.gates * H, I), (kind.gates * H, H // heads), ((kind.gates + kind.weights) * H,), (kind.gates * H,)
    weights = [torch.randn(shape, dtype=torch.float64) for _ in range(D) for shape in shapes]
    leaves = [each.requires_grad_() for each in (x, h0, c0, *weights) if each is not None]
    inputs = Inputs(x, sizes, h0, c0)
    y, h_n, c_n, saved = reference.layer_forward(inputs, weights, layer, True)
    outputs = [y, h_n, *([c_n] if kind.states else [])]
    seeds = [torch.randn_like(each, requires_grad=True) for each in outputs]
    outer = Outer(*seeds, *[None] * (3 - len(seeds)))
    truth = torch.autograd.grad(outputs, leaves, seeds, create_graph=True)
    dx, dh0, dc0, dw = gradients.layer_backward(outer, inputs, weights, y, saved, layer, Needs())
    found = [dx, dh0, *([dc0] if kind.states else []), *dw]
    for k, (own, right) in enumerate(zip(found, truth, strict=True)):
        torch.testing.assert_close(own, right, rtol=1e-10, atol=1e-11, msg=lambda text, k=k: f"gradient {k}: {text}")

    # the gradient of <backward, v> by what is derived, and by autograd twice
    v = [torch.randn_like(each) for each in truth]
    right = torch.autograd.grad(truth, [*seeds, *leaves], v)
    states = v[1], v[2] if kind.states else None
    of = v[0], *states, v[len(v) - len(weights) :]
    with torch.no_grad():
        changed, bent, dw = gradients.layer_double_backward(of, outer, inputs, weights, y, saved, layer, Needs())
    own = [each for each in (*changed, bent.x, bent.h0, bent.c0, *dw) if each is not None]
    for k, (one, other) in enumerate(zip(own, right, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, k=k: f"second gradient {k}: {text}")


@pytest.mark.parametrize("name", ["slstm", "odd"])
def test_packed_and_unbatched(name, monkeypatch):
    monkeypatch.setattr(dispatch, "forced", "reference")
    layer = layer_of(name, "two layers, two directions")
    x, states = sample(layer, steps=5)
    lengths = torch.tensor([2, 5, 3])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y, after = layer(packed, tuple(states))
    assert isinstance(y, PackedSequence)
    padded, _ = pad_packed_sequence(y, batch_first=True)
    for b, length in enumerate(lengths.tolist()):
        alone, last = layer(x[b, :length], tuple(state[:, b] for state in states))
        torch.testing.assert_close(padded[b, :length], alone)
        for one, other in zip(after, last, strict=True):
            torch.testing.assert_close(one[:, b], other)


@pytest.mark.parametrize(("own", "torchs"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_weights_load_from_torch_nn(own, torchs, monkeypatch):
    monkeypatch.setattr(dispatch, "forced", "reference")
    layer, twin = layer_of(own, "two layers, two directions"), torchs(5, 12, 2, bidirectional=True, batch_first=True).double()
    layer.load_state_dict(twin.state_dict())
    x, states = sample(layer)
    y, after = twin(x, tuple(states) if len(states) == 2 else states[0])
    torch.testing.assert_close(run(layer, x, states), [y, *(after if isinstance(after, tuple) else (after,))])


def test_a_step_is_a_sequence_of_one(monkeypatch):
    monkeypatch.setattr(dispatch, "forced", "reference")
    layer = fastrnn.recurrent(cells.slstm)(5, 12, 2)
    x, state, outputs = torch.randn(4, 3, 5), None, []
    for row in x:
        y, state = layer.step(row, state)
        outputs.append(y)
    expected, last = layer(x)
    torch.testing.assert_close(torch.stack(outputs), expected)
    torch.testing.assert_close(state, last)
    with pytest.raises(ValueError, match="bidirectional"):
        layer_of("slstm", "four heads").step(x[0])


def test_copies_and_pickles():
    """By the function's import path."""
    layer = fastrnn.recurrent(cells.slstm)(3, 4)
    x = torch.randn(2, 1, 3)
    expected = layer(x)[0]
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert type(twin) is type(layer) and torch.equal(twin(x)[0], expected)
    local = fastrnn.recurrent(fastrnn.cell(relu_cell()))(3, 4)
    assert torch.equal(copy.deepcopy(local)(x)[0], local(x)[0])
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(local)


class Derived(fastrnn.recurrent(cells.mgu)):  # type: ignore[misc]
    """A class of one's own."""


def test_derived_classes_stay_themselves_in_copies_and_pickles():
    layer, x = Derived(3, 4), torch.randn(2, 1, 3)
    for twin in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is Derived and torch.equal(twin(x)[0], layer(x)[0])


def relu_cell():
    def of_one(a: Gate):
        return relu(a)

    return of_one


def test_compiles_and_exports():
    layer = fastrnn.recurrent(cells.slstm)(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    expected = layer(x)[0]
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0], expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x)[0], expected)
    weights = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, (x,))[0].square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, torch.stack((x, 2 * x)))
    layer(2 * x)[0].square().sum().backward()
    # vmap takes both inputs in one call, which adds up in another order
    torch.testing.assert_close(grads["weight_hh_l0"][1], layer.weight_hh_l0.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["leaky_rnn", "cfc"])
def test_inductor(name, monkeypatch):
    """Cells whose own weights stand behind biases in a tensor that inductor makes, and of more gates than torch.nn's."""
    monkeypatch.setattr(dispatch, "forced", "reference")  # no kernels are compiled for this test
    layer, x = fastrnn.recurrent(getattr(cells, name))(3, 4), torch.randn(3, 2, 3)
    compiled = torch.compile(layer, fullgraph=True)
    found, expected = ([y, *torch.autograd.grad(y.sum(), [*layer.parameters()])] for y in (compiled(x)[0], layer(x)[0]))
    torch.testing.assert_close(found, expected)


def test_second_derivatives_and_forward_mode():
    torch.manual_seed(0)
    layer = layer_of("peephole_lstm", hidden=3, inputs=2)
    x, states = sample(layer, steps=3, batch=2)
    inputs = [each.requires_grad_() for each in (x, *states)]
    torch.autograd.gradcheck(lambda x, *states: run(layer, x, states), inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(lambda x, *states: run(layer, x, states), inputs, fast_mode=True)


def test_half_precision_and_recompute():
    layer = fastrnn.recurrent(cells.slstm)(6, 8)
    x = torch.randn(20, 50, 6)
    expected = results(run, layer, x, [])
    layer.recompute = True
    for key, value in results(run, layer, x, []).items():
        # float32 sums of a thousand rows in another order
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    half = copy.deepcopy(layer).bfloat16()
    # bfloat16 has eight bits, and its roundings add up over twenty steps
    torch.testing.assert_close(half(x.bfloat16())[0].float(), layer(x)[0], rtol=0.1, atol=0.05)


def test_a_bare_cell_runs_on_tensors():
    a, c = torch.randn(2, 7, 5), torch.rand(7, 5)
    h, *_ = cells.cifg(*a, a[0], c)
    f, g, o = torch.sigmoid(a[0]), torch.tanh(a[1]), torch.sigmoid(a[0])
    torch.testing.assert_close(h, o * torch.tanh(f * c + (1 - f) * g))


def test_a_cell_of_lstms_arithmetic_is_derived_as_the_built_in_one():
    @fastrnn.cell
    def lstm(i: Gate, f: Gate, g: Gate, o: Gate, c: State):
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c

    built_in = fastrnn.kernels.cells.CELLS["lstm"]
    for own in (lstm, cells.lstm):
        assert own.definition.derived.backward.source() == built_in.derived.backward.source()
    assert "tanh(c_new)" in cells.lstm.source()


def test_dropout_draws_the_numbers_of_torch_nn(monkeypatch):
    monkeypatch.setattr(dispatch, "forced", "reference")  # nothing is compiled for this test
    sizes = {"input_size": 3, "hidden_size": 4, "num_layers": 3, "batch_first": True, "dropout": 0.5, "dtype": torch.float64}
    layer, theirs = fastrnn.recurrent(cells.gru)(**sizes), torch.nn.GRU(**sizes)
    layer.load_state_dict(theirs.state_dict())
    x, outputs = torch.randn(2, 5, 3, dtype=torch.float64), []
    for module in (layer, theirs):
        torch.manual_seed(0)
        outputs.append(module(x)[0])
    torch.testing.assert_close(*outputs)


def test_an_outer_recompute_reaches_the_layer(monkeypatch):
    layer, x, found = fastrnn.recurrent(cells.gru)(3, 4), torch.randn(5, 2, 3), []
    run_layer = reference.layer_forward

    def layer_forward(*args):
        found.append(fastrnn.checkpoint.is_on())
        return run_layer(*args)

    monkeypatch.setattr(dispatch, "forced", "reference")
    monkeypatch.setattr(reference, "layer_forward", layer_forward)
    layer(x)
    with fastrnn.recompute():
        layer(x)
    assert found == [False, True]


@fastrnn.cell
def named_as_what_is_kept(a: Gate, tanh_a: Weight, b: Gate, c: State, v0: Weight, backward: State):
    kept = exp(tanh(b) * 2) * exp(tanh(b) * 3)
    return tanh(a) * tanh_a + c * kept, tanh(a) * c * v0, sigmoid(backward) * b


def test_names_of_arguments_are_none_of_what_is_derived(monkeypatch):
    monkeypatch.setattr(dispatch, "forced", "reference")
    derived = named_as_what_is_kept.definition.derived
    assert all(dict(derived.inputs).get(name, node) is node for name, node in derived.kept)
    layer = fastrnn.recurrent(named_as_what_is_kept)(3, 4, dtype=torch.float64)
    x, states = sample(layer)
    truth = results(by_hand, layer, x, states)
    for key, value in results(run, layer, x, states).items():
        torch.testing.assert_close(value, truth[key], msg=lambda text, key=key: f"{key}: {text}")
    inputs = [each.requires_grad_() for each in (x[:2, :1], *(state[:, :1] for state in states))]
    torch.autograd.gradgradcheck(lambda x, *states: run(layer, x, states), inputs, fast_mode=True)


@fastrnn.cell
def of_constants(a: Gate, c: State):
    c = where(a > 0, 0.1, 0.7) * c + where(c > 1, 1, 3)
    return maximum(tanh(a), -1e30) * c, c


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_constants_have_the_cells_dtype(dtype, monkeypatch):
    """A choice of two numbers, and numbers that no int64 holds; in float64 to its last digits."""
    monkeypatch.setattr(dispatch, "forced", "reference")
    a, c = torch.tensor([-0.5, 0.3, 2.0], dtype=dtype), torch.tensor([0.2, 1.5, 3.0], dtype=dtype)
    number = {key: torch.tensor(value, dtype=dtype) for key, value in {"low": 0.1, "high": 0.7, "one": 1, "three": 3}.items()}
    c_new = torch.where(a > 0, number["low"], number["high"]) * c + torch.where(c > 1, number["one"], number["three"])
    for own, right in zip(of_constants(a, c=c), (torch.tanh(a) * c_new, c_new), strict=True):
        assert own.dtype == dtype and torch.equal(own, right)
    layer = fastrnn.recurrent(of_constants)(3, 3, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(3))
    y, (_, c_n) = layer(a.view(1, 1, 3), (torch.zeros(1, 1, 3, dtype=dtype), c.view(1, 1, 3)))
    assert y.dtype == c_n.dtype == dtype and torch.equal(c_n.flatten(), c_new)
    y.sum().backward()
    assert cells_read_again(of_constants)


def cells_read_again(cell) -> bool:
    return fastrnn.kernels.cells.read(cell.definition.definition).name == cell.definition.name


# --- what is refused

TENSOR = torch.ones(3)


def branch(a: Gate):
    return a if a > 0 else -a


def torchs(a: Gate):
    return torch.tanh(a)


def a_global(a: Gate):
    return TENSOR * a


def maths(a: Gate):
    return math.tanh(a)  # type: ignore[arg-type]


def numpys(a: Gate):
    return np.tanh(a)  # type: ignore[call-overload]


def too_few(a: Gate, c: State):
    return tanh(a + c)


def unused(a: Gate, b: Gate):
    return tanh(a)


def no_kind(a: Gate, b):
    return tanh(a + b)


def loop(a: Gate):
    return sum(unit for unit in a)  # type: ignore[attr-defined]


def index(a: Gate):
    return a[0] * a


def power(a: Gate):
    return a**1.5


def method(a: Gate):
    return a.sigmoid()


def condition(a: Gate):
    return a * (a > 0)


def constant(a: Gate):
    return 1.0


def product(a: Gate):
    return a @ a


def misnamed(h: Gate):
    return tanh(h)


def no_input(h: State, c: State):
    return h + c, c


def named_exp(exp: Gate):
    return tanh(exp)


def named_full_like(a: Gate, full_like: State):
    return tanh(a), full_like + a


def named_fused(a: Gate, addcmul: Weight):
    return tanh(a) * addcmul


def infinite(a: Gate):
    return maximum(a, -math.inf)


def undefined(a: Gate):
    return tanh(a) * math.nan


def beyond_floats(a: Gate):
    return a + 10**400


def a_condition(a: Gate):
    return a > 0


def a_state_of_conditions(a: Gate, c: State):
    return tanh(a), (a > 0) | (c > 0)


def one_of_three(a: Gate):
    return where(a > 0)


def two_of_one(a: Gate):
    return tanh(a, a)


async def asynchronous(a: Gate):
    return tanh(a)


def generator(a: Gate):
    yield tanh(a)


def number_as_condition(a: Gate):
    return where(1, tanh(a), a)


def number_among_conditions(a: Gate):
    return where((a > 0) & True, tanh(a), a)


def no_power(a: Gate):
    return a**0


def power_of_a_number(a: Gate):
    return 2**a


LEAKED: list = []


@fastrnn.cell
def leaking(a: Gate):
    LEAKED.append(a)
    return tanh(a)


def leaked(a: Gate):
    return tanh(a) * LEAKED[0]


def leaked_result(a: Gate, c: State):
    return tanh(a) * c, LEAKED[0]


def too_large(a: Gate):
    return tanh(a) * exp(1000)


def of_a_negative_number(a: Gate):
    return tanh(a) * cells.log(-1)


def divided_by_zero(a: Gate, scale=0.0):
    return tanh(a) * (1 / scale)


REFUSED = {
    asynchronous: "async def, or yield: .* write def and return",
    generator: "async def, or yield: .* write def and return",
    number_as_condition: "where wants a condition, such as x > 0, got 1",
    number_among_conditions: "and wants a condition, such as x > 0, got True",
    no_power: r"\*\* 0: the power of a value is a whole number from 1 to 8",
    power_of_a_number: r"2 \*\* a value: write exp\(x \* log\(2\)\)",
    leaked: "a value of another cell's function",
    leaked_result: "a value of another cell's function",
    too_large: r"exp\(1000\): math range error; a constant is a finite number",
    of_a_negative_number: r"log\(-1\): .*; a constant is a finite number",
    divided_by_zero: "zero; a constant is a finite number",
    branch: r"where\(condition, a, b\)",
    torchs: r"fastrnn\.cells\.tanh",
    a_global: "kind Weight",
    maths: r"functions of fastrnn\.cells in the place of math's",
    numpys: r"functions of fastrnn\.cells",
    too_few: "1 results, expected 2: the output, c",
    unused: "b is not used",
    no_kind: "write b: Gate",
    loop: "without the loop",
    index: "an argument of its own",
    power: r"exp\(p \* log\(x\)\)",
    method: r"write sigmoid\(x\)",
    condition: r"where\(condition, 1, 0\)",
    constant: "calculated from its arguments",
    product: "declare an argument as Gate",
    misnamed: "write another, or h: State",
    no_input: "a layer needs one",
    infinite: "a constant is a finite number",
    undefined: "a constant is a finite number",
    beyond_floats: "a constant is a finite number",
    a_condition: r"the output is a condition; write where\(condition, 1, 0\)",
    a_state_of_conditions: "the state c is a condition",
    one_of_three: "where: expected 3 arguments, got 1",
    two_of_one: "tanh: expected 1 argument, got 2",
    named_exp: "exp: the argument has the name of .* write another name",
    named_full_like: "full_like: the argument has the name of",
    named_fused: "addcmul: the argument has the name of",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_bad_cells_are_refused_with_the_line_and_the_remedy(function):
    with pytest.raises(TypeError, match=REFUSED[function]) as caught:
        fastrnn.cell(function)
    assert re.search(rf"{function.__name__}, line \d+ of .*test_cells.py: ", str(caught.value))


def test_flags_and_powers_of_numbers():
    """A condition that is a constant chooses, and a power may be a float that is whole."""

    @fastrnn.cell
    def written(a: Gate, squared=True):
        return where(squared, (1 + exp(a)) ** 2.0, a) * (1 + exp(a)) ** -0.5

    @fastrnn.cell
    def meant(a: Gate):
        b = 1 + exp(a)
        return b * b * (1 / cells.sqrt(b))

    assert written.source().replace("written", "meant") == meant.source()
    assert sigmoid(-1000) == 0 and sigmoid(1000) == 1
    with pytest.raises(OverflowError, match=r"exp\(1000\): math range error"):
        exp(1000)


def test_a_thousand_operations_in_a_row(monkeypatch):
    def long(a: Gate, c: State):
        for _ in range(600):
            c = 0.99 * c + a
        return tanh(c), c

    monkeypatch.setattr(dispatch, "forced", "reference")
    cell = fastrnn.cell(long)
    assert cells_read_again(cell)
    layer = fastrnn.recurrent(cell)(2, 3, dtype=torch.float64)
    x, states = sample(layer, steps=2)
    truth = results(by_hand, layer, x, states)
    for key, value in results(run, layer, x, states).items():
        torch.testing.assert_close(value, truth[key], msg=lambda text, key=key: f"{key}: {text}")


def test_a_function_named_as_an_operation_is_refused():
    def sigmoid(a: Gate):
        return cells.sigmoid(a)

    with pytest.raises(TypeError, match=r"sigmoid: the name is that of an operation .* write another"):
        fastrnn.cell(sigmoid)


TWINS = ("gru", nn.GRU), ("lstm", nn.LSTM)


def outcome(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("GRU", "Gru").replace("LSTM", "Lstm")
    return "no error"


@pytest.mark.parametrize(("own", "torchs"), TWINS)
def test_wrong_calls_are_refused_in_the_words_of_torch_nn(own, torchs, monkeypatch):
    """Calls with one, two or no mistakes, drawn at random: the first that torch.nn finds is the one that is named."""
    monkeypatch.setattr(dispatch, "forced", "reference")
    draw, found = random.Random(0), set()
    for _ in range(400):
        D, L, batch_first, T, B = draw.choice([1, 2]), draw.choice([1, 2]), draw.random() < 0.5, draw.choice([0, 1, 3, 3, 3]), 2
        options = {"num_layers": L, "bidirectional": D == 2, "batch_first": batch_first}
        layer, twin = fastrnn.recurrent(getattr(cells, own))(3, 4, **options), torchs(3, 4, **options)
        kind, I = draw.choice(["dense", "unbatched", "packed", "odd"]), draw.choice([3, 3, 3, 2, 5])
        dtype = draw.choice([*[torch.float32] * 6, torch.float64, torch.int64, torch.bfloat16])
        lead = [L * D] if kind == "unbatched" else [L * D, B]
        shape = {"dense": (B, T, I) if batch_first else (T, B, I), "unbatched": (T, I), "odd": (2,) * draw.choice([0, 1, 4])}
        x = torch.zeros(shape.get(kind, (3, B, I)), dtype=dtype)
        if kind == "packed":
            x = pack_padded_sequence(x, torch.tensor([1, 3]), enforce_sorted=False)
            x = x._replace(data=x.data[None]) if draw.random() < 0.1 else x

        def state(lead=lead):
            size, which = [*lead, 4], draw.random()
            if which < 0.25:
                size[draw.randrange(len(size))] += draw.choice([-1, 1])
            return torch.zeros(size[1:] if 0.25 < which < 0.35 else [1, *size] if 0.35 < which < 0.4 else size)

        states = None if draw.random() < 0.3 else (state(), state()) if own == "lstm" else state()
        if kind == "packed":  # torch.nn's LSTM does not look at it, and its GRU sorts the states of any batch
            zeros = torch.zeros(*lead, 4)
            fitting = ((zeros, zeros) if own == "lstm" else zeros) if states is None else states
            expected = outcome(twin.check_forward_args, x.data, fitting, x.batch_sizes)
        else:
            expected = outcome(twin, x, states)
        assert outcome(layer, x, states) == expected
        found.add(re.sub(r"[\d()\[\], ]+", " ", expected))
    assert len(found) > 9  # kinds of words


def test_states_of_another_kind_dtype_or_device(monkeypatch):
    """What torch.nn's modules stumble over, each in other words."""
    monkeypatch.setattr(dispatch, "forced", "reference")
    x, h = torch.zeros(2, 1, 3), torch.zeros(1, 1, 4)
    two, one = (fastrnn.recurrent(cell)(3, 4) for cell in (cells.lstm, cells.gru))
    for layer, states, words in (
        (one, (h,), r"TypeError: hx: expected a tensor h, got tuple \(Tensor \[1, 1, 4\]\)"),
        (two, (h, 1), r"TypeError: hx: expected a tuple of tensors \(h, c\), got tuple \(Tensor \[1, 1, 4\], int\)"),
        (two, h, r"TypeError: hx: expected a tuple of tensors \(h, c\), got Tensor"),
        (one, h.double(), "RuntimeError: .* not the same dtype, found input tensor with Float and hidden tensor with Double"),
        (two, (h, h.long()), "RuntimeError: .* not the same dtype, found input tensor with Float and hidden tensor with Long"),
        (
            two,
            (h, h.to("meta")),
            "RuntimeError: .* not at the same device, found input tensor at cpu and hidden tensor at meta",
        ),
    ):
        assert re.match(words, outcome(layer, x, states)), outcome(layer, x, states)
        assert re.match(words, outcome(layer, pack_padded_sequence(x, torch.tensor([2])), states))
    assert "parameter tensor at cpu" in outcome(one, x.to("meta"))


def test_wrong_arguments_are_refused_in_the_words_of_torch_nn():
    for arguments in (
        (3, 4.0), ("3", 4), (3, 0), (-1, 4), (3, 4, 0), (3, 4, 1.5), (3, 4, 1, 1), (3, 4, 1, True, None),
        (3, 4, 2, True, False, 2), (3, 4, 2, True, False, "half"), (3, 4, 2, True, False, True),
    ):  # fmt: skip
        expected = outcome(nn.GRU, *arguments)
        assert expected != "no error" and outcome(fastrnn.recurrent(cells.gru), *arguments) == expected
    for module in (nn.GRU, fastrnn.recurrent(cells.slstm)):
        with pytest.warns(UserWarning, match="non-zero dropout expects num_layers greater than 1"):
            module(3, 4, dropout=0.5)
    torch.manual_seed(0)
    fastrnn.recurrent(cells.gru)(3, 4, device="meta")
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)  # what checks the arguments draws no numbers


def test_bad_arguments():
    Layer = fastrnn.recurrent(cells.slstm)
    with pytest.raises(TypeError, match=r"cell: expected a cell that fastrnn.cell has made"):
        fastrnn.recurrent(tanh)
    for error, words, options in (
        (ValueError, "num_heads: expected a divisor of hidden_size 4, got 3", {"num_heads": 3}),
        (ValueError, "num_heads: expected a divisor of hidden_size 4, got 0", {"num_heads": 0}),
        (ValueError, r"num_heads: expected a divisor of hidden_size 4, got 2\.0", {"num_heads": 2.0}),
        (TypeError, "recompute should be of type bool, got: int", {"recompute": 1}),
        (TypeError, "bidirectional should be of type bool, got: int", {"bidirectional": 2}),
    ):
        with pytest.raises(error, match=words):
            Layer(3, 4, **options)
    layer, x, state = Layer(3, 4), torch.zeros(2, 1, 3), torch.zeros(1, 1, 4)
    for error, words, states in (
        (TypeError, r"a tuple of tensors \(h, c, n, m\)", state),
        (RuntimeError, r"Expected hidden\[2\] size \(1, 1, 4\), got \[1, 2, 4\]", (state, state, torch.zeros(1, 2, 4), state)),
        (
            RuntimeError,
            r"3-D input, hx, cx, nx and mx should also be 3-D but got \(3-D, 3-D, 2-D, 3-D\) tensors",
            (state, state, state[0], state),
        ),
    ):
        with pytest.raises(error, match=words):
            layer(x, states)
    for batch_first in (False, True):
        with pytest.raises(RuntimeError, match=r"input\.size"):
            Layer(3, 4, batch_first=batch_first).step(torch.zeros(2, 5))
    layer.flatten_parameters()


# --- against independent implementations


def test_cfc_is_that_of_ncps(monkeypatch):
    ncps = pytest.importorskip("ncps.torch", reason="ncps is not installed: pip install ncps")
    monkeypatch.setattr(dispatch, "forced", "reference")
    twin = ncps.CfC(5, 12, backbone_layers=0, batch_first=False).double()
    layer = layer_of("cfc")
    own = twin.rnn_cell
    kinds = own.ff1, own.ff2, own.time_a, own.time_b
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.cat([each.weight[:, :5] for each in kinds]))
        layer.weight_hh_l0.copy_(torch.cat([each.weight[:, 5:] for each in kinds]))
        layer.bias_ih_l0.copy_(torch.cat([each.bias for each in kinds]))
        layer.bias_hh_l0.zero_()
    x, _ = sample(layer)
    y, h = layer(x)
    expected, last = twin(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(h[0], last)


def xlstms_loop():
    """The package's own functions, without what the rest of it needs."""
    spec = importlib.util.find_spec("xlstm")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("xlstm is not installed: pip install --no-deps xlstm")
    path = Path(spec.submodule_search_locations[0]) / "blocks" / "slstm" / "src" / "vanilla" / "__init__.py"
    own = importlib.util.spec_from_file_location("xlstm_vanilla", path, submodule_search_locations=[str(path.parent)])
    sys.modules["xlstm_vanilla"] = module = importlib.util.module_from_spec(own)
    own.loader.exec_module(module)
    return lambda x, states, w, b: module.slstm_forward(x, states, w, b, module.slstm_pointwise_function_registry["slstm"])


def test_slstm_is_that_of_xlstm(monkeypatch):
    """Values and gradients, with heads, against the package's own loop."""
    loop = xlstms_loop()
    monkeypatch.setattr(dispatch, "forced", "reference")
    H, heads, size = 12, 4, 3
    layer = layer_of("slstm", num_heads=heads)
    x, _ = sample(layer)
    y, _ = layer(x)
    raw = nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
    w = layer.weight_hh_l0.view(4, heads, size, size).transpose(0, 1).reshape(heads, 4 * size, size)
    states, _, _ = loop(raw, torch.zeros(4, x.shape[1], H, dtype=torch.float64), w, layer.bias_hh_l0)
    torch.testing.assert_close(y, states[0, 1:])
    seed = torch.randn_like(y)
    weights = [*layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(y, weights, seed), torch.autograd.grad(states[0, 1:], weights, seed), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_package_ships_its_kernels(tmp_path):
    """The command fills the cache and the directory beside the cell's module, where a process finds them without numba."""
    module = tmp_path / "package.py"
    module.write_text("import fastrnn\nfrom fastrnn.cells import Gate, tanh\n@fastrnn.cell\ndef own(a: Gate): return tanh(a)\n")
    cache, shipped = tmp_path / "cache", tmp_path / "fastrnn_kernels"
    found = python(
        f"from fastrnn.__main__ import main; main(['compile', 'package:own', '--output', {str(shipped)!r}])",
        cwd=tmp_path,
        FASTRNN_CACHE_DIR=str(cache),
    )
    assert "package:own: forward and backward, float32" in found
    assert len([*cache.glob("kernels-*/*own*.o")]) == len([*shipped.glob("kernels-*/*own*.o")]) == 4
    use = (
        "import sys; sys.modules['numba'] = None; import fastrnn, package, torch; layer = fastrnn.recurrent(package.own)(3, 4);"
        "layer(torch.ones(2, 2, 3))[0].sum().backward(); print(fastrnn.explain(layer, torch.ones(2, 2, 3)).engine)"
    )
    empty = tmp_path / "empty"
    assert python(use, cwd=tmp_path, FASTRNN_CACHE_DIR=str(empty)).strip() == "cpu" and not [*empty.glob("*")]
    (directory,) = shipped.iterdir()
    directory.rename(directory.with_name(directory.name[:-1]))  # those of other kernels
    assert python(
        "import fastrnn, package; from fastrnn.kernels.cpu import fallback, load\n"
        "print(fallback.objects(load()[1], (package.own.definition.name, 'f32', 'forward')))",
        cwd=tmp_path,
        FASTRNN_CACHE_DIR=str(empty),
    ).strip() == "[]"  # fmt: skip


HEADS = [(33, 3), (40, 5), (6, 6), (256, 4)]  # units, heads


@pytest.mark.parametrize(("cell", "threads"), [("lstm", 1), ("gru", 2), ("rnn_tanh", 1)])
def test_heads_on_the_cpu_engine(cell, threads):
    """The operators of built-in cells against the definition: heads of any size, rows and steps, dense and packed."""
    kind, draw = CELLS[cell], torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    for H, heads in HEADS:
        for B, T, D, sizes in (
            (1, 1, 1, None),
            (1, 4, 1, None),
            (3, 3, 2, None),
            (50, 3, 1, None),
            (9, 1, 1, None),
            (4, 3, 2, [4, 3, 1]),
        ):
            layer, I = Layer(cell, D, B > 1, heads=heads), 5
            batch_sizes = None if sizes is None else torch.tensor(sizes)
            x, h0 = random(*((T, B, I) if sizes is None else (sum(sizes), I))), random(D, B, H)
            c0 = random(D, B, H) if kind.states else None
            shapes = [(kind.gates * H, I), (kind.gates * H, H // heads), *[(kind.gates * H,)] * 2 * layer.bias]
            weights = [random(*shape) for _ in range(D) for shape in shapes]
            leaves = [each for each in (x, h0, c0, *weights) if each is not None]
            count = 2 + bool(kind.states)
            with set_threads(threads):
                own = torch.ops.fastrnn.layer_forward(x, batch_sizes, h0, c0, weights, layer.text(), True)[:count]
                right = reference.layer_forward(Inputs(x, batch_sizes, h0, c0), weights, layer, True)[:count]
                seeds = [random(*each.shape).detach() for each in right]
                found, truth = ([*each, *torch.autograd.grad(each, leaves, seeds)] for each in (own, right))
            for k, (one, other) in enumerate(zip(found, truth, strict=True)):
                case = f"{layer.text()}, {H} units, {B} rows, result {k}: "
                torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12, msg=lambda text, case=case: case + text)


def fast(layer, *given, step: bool = False):
    """What the fast path makes of a call, or None where it declines."""
    if step:
        return dispatch.native.step(layer.__dict__, layer._fastrnn_fast_path, *given, None)
    return dispatch.native.forward(layer.__dict__, layer._fastrnn_fast_path, *given, layer.recompute)


native = pytest.mark.skipif(dispatch.native is None, reason="there is no compiled runtime")


@native
@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("form", FORMS)
def test_the_fast_path_does_what_the_fallback_does(name, form):
    """Outputs, states and gradients to the bit. It declines matrices that lack blocks, and own weights alone."""
    layer = layer_of(name, form).float()
    x, states = sample(layer, steps=3)
    x, states = x.float(), [state.float() for state in states]
    hx = states[0] if len(states) == 1 else tuple(states)
    declined = name == "indrnn" or (form == "no bias" and name == "peephole_lstm")
    for given in (None, hx):
        with torch.no_grad():
            y, after = layer._fastrnn_fallback(x, given)
            found = fast(layer, x, given)
        assert (found is None) == declined
        if found is not None:
            assert torch.equal(found[0], y)
            torch.testing.assert_close(found[1], after, rtol=0, atol=0)
    if declined:
        return
    slowly = results(lambda layer, x, states: flat(layer._fastrnn_fallback(x, as_given(states))), layer, x, states)
    own = results(lambda layer, x, states: flat(fast(layer, x, as_given(states))), layer, x, states)
    for key, value in slowly.items():
        assert torch.equal(own[key], value), key
    if not layer.bidirectional:
        time = 1 if layer.batch_first else 0
        row = x.select(time, 0)
        for given in (None, hx):
            y, after = fast(layer, row, given, step=True)
            with torch.no_grad():
                expected, last = layer._fastrnn_fallback(row.unsqueeze(time), given)
            assert torch.equal(y, expected.squeeze(time))
            torch.testing.assert_close(after, last, rtol=0, atol=0)


def as_given(states: list[Tensor]):
    return states[0] if len(states) == 1 else tuple(states)


def flat(result) -> list[Tensor]:
    y, after = result
    return [y, *((after,) if isinstance(after, Tensor) else after)]


@native
def test_the_fast_path_declines_what_is_out_of_the_ordinary():
    layer = layer_of("slstm", "two layers, two directions").float().eval()
    x = torch.randn(3, 4, 5)
    with torch.no_grad():
        layer(x)  # compiled now
        assert fast(layer, x, None) is not None
        h = torch.zeros(4, 3, 12)
        for hx in (h, (h, h), (h, h, h, h[:2]), (h, h, h, h.double()), [h, h, h, None]):
            assert fast(layer, x, hx) is None
        assert (
            fast(layer, x[0], None) is None and fast(layer, x.double(), None) is None and fast(layer, x[..., :4], None) is None
        )
        layer.num_heads = 2
        assert fast(layer, x, None) is None
        layer.num_heads, layer.check_input = 1, lambda *given: None
        assert fast(layer, x, None) is None
        del layer.check_input
        torch.nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", nn.Identity())
        assert fast(layer, x, None) is None
        dropping = layer_of("slstm", num_layers=2, dropout=0.5).float()
        assert fast(dropping, x, None) is None and fast(dropping.eval(), x, None) is not None

    class Overriding(fastrnn.recurrent(cells.slstm)):  # type: ignore[misc]
        def _fastrnn_weights(self):
            return super()._fastrnn_weights()

    assert Overriding._fastrnn_fast_path is None and Derived._fastrnn_fast_path == cells.mgu.definition.name


@native
@pytest.mark.parametrize("name", ["slstm", "peephole_lstm"])
def test_frozen_layers(name):
    layer = layer_of(name, "two layers, two directions" if name == "slstm" else "plain").float().eval()
    x, states = sample(layer)
    x, states = x.float(), as_given([state.float() for state in states])
    with torch.no_grad():
        expected, last = layer(x, states)
        frozen = fastrnn.freeze(copy.deepcopy(layer))
        assert type(frozen).__name__.startswith("Frozen") and isinstance(frozen, type(layer))
        for parameter in frozen.parameters():
            parameter.data.zero_()  # the panels are what it computes with
        y, after = frozen(x, states)
        assert torch.equal(y, expected)
        torch.testing.assert_close(after, last, rtol=0, atol=0)
        if not layer.bidirectional:
            one, _ = frozen.step(x[0], states)
            torch.testing.assert_close(one, expected[0])
        assert fastrnn.explain(frozen, x).engine == "cpu"
    with pytest.raises(RuntimeError, match="thaw"):
        frozen(x.clone().requires_grad_(), states)
    with pytest.raises(RuntimeError, match="thaw"):
        frozen.train()
    frozen.load_state_dict(layer.state_dict())
    assert torch.equal(frozen(x, states)[0], expected)
    twin = pickle.loads(pickle.dumps(frozen))
    assert type(twin) is type(layer) and torch.equal(twin(x, states)[0], expected)
    thawed = fastrnn.thaw(frozen)
    assert thawed is frozen and type(thawed) is type(layer) and torch.equal(thawed.train()(x, states)[0], expected)
    with pytest.raises(RuntimeError, match="training"):
        fastrnn.freeze(thawed)


@pytest.mark.skipif(sys.platform != "linux", reason="takes memory by Linux's mmap")
def test_a_process_whose_free_memory_lies_in_pieces():
    """Code and constants may be no more than 2 GiB apart; here there is a small hole, and much farther down the rest."""
    code = """
import ctypes, llvmlite.binding, torch, fastrnn
from fastrnn import cells

layer = fastrnn.recurrent(cells.mgu)(3, 4)
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
reserve = lambda size: libc.mmap(None, size, 0, 0x4022, -1, 0)  # private, anonymous, without memory: addresses alone
wall, size = reserve(8 << 30), 1 << 32
while size >= 4096:  # whatever is free above
    found = reserve(size)
    if found < wall or found == 2**64 - 1:
        if found != 2**64 - 1:
            libc.munmap(found, size)
        size //= 2
libc.munmap(wall + (8 << 30) - 36 * 1024, 32 * 1024)
layer(torch.randn(5, 2, 3))[0].sum().backward()
print("finite", bool(layer.weight_hh_l0.grad.isfinite().all()))
"""
    assert "finite True" in python(code, FASTRNN_CACHE_DIR=str(cache_path()))  # where the tests above have it
