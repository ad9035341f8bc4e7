"""Resets and lengths: the definition against a loop over rows, the CPU engine against that, modules and transforms."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import weight_names
from contract import CELLS, FIXED, ROOT, Error, bound, same_bits, threads
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import autograd, checkpoint, dispatch, features, ops
from fastrnn.kernels import gradients, reference
from fastrnn.kernels.cpu import fallback
from fastrnn.kernels.layer import Inputs, Needs, Outer, Steps, misfit

MARKS = ("resets", "lengths", "both", "packed", "restarts", "packed_restarts")  # restarts: to other states; with lengths
FORMS = {
    "plain": {},
    "batch_first": {"batch_first": True, "bias": False},
    "two_directions": {"directions": 2},
    "reverse": {"reverse": True, "batch_first": True},
}
LAYERS = [(cell, form, False) for cell in CELLS for form in FORMS] + [("lstm", form, True) for form in FORMS]
every_layer = pytest.mark.parametrize(
    ("cell", "form", "project"), LAYERS, ids=[f"{cell}-{form}{'-projected' * project}" for cell, form, project in LAYERS]
)
every_mark = pytest.mark.parametrize("marks", MARKS)


def make(make_layer, cell: str, form: str, project, marks: str, sizes=(6, 5, 3, 4), dtype=torch.float64):
    """Inputs, weights scaled as torch.nn's, and the layer; what stands past the lengths is NaN."""
    form_given, packed = FORMS[form], marks.startswith("packed")
    made = make_layer(
        cell, project=project, packed=packed, sizes=sizes, **(form_given | ({"batch_first": False} if packed else {}))
    )
    layer, (T, B, _, H) = made["layer"], sizes
    x, resets, lengths = made["x"], None, None
    if marks != "lengths":
        resets = torch.rand(x.shape[:-1]) < 0.3
        if not packed:  # one row is never reset, and one at every step
            by_row = resets if layer.batch_first else resets.T
            by_row[1 % B], by_row[-1] = False, True
    if marks in ("lengths", "both", "restarts"):
        lengths = torch.randint(0, T + 1, (B,))
        lengths[0], lengths[-1] = 0, T - T // 4
        past = torch.arange(T) >= lengths.unsqueeze(1)
        x[past if layer.batch_first else past.T] = torch.nan
    weights = [w / H**0.5 for w in made["weights"]]
    states = [None if state is None else state.to(dtype) for state in (made["h0"], made["c0"])]
    if "restarts" in marks:
        layer = layer._replace(restarts=True)
        states = [None if state is None else torch.cat((state, torch.randn_like(state)), 1) for state in states]
    return Inputs(x.to(dtype), made["batch_sizes"], *states, resets, lengths), [w.to(dtype) for w in weights], layer


def names_of(layer, inputs: Inputs) -> list[str]:
    return ["x", "h0", *["c0"] * (inputs.c0 is not None), *weight_names(layer)]


def results(function, inputs: Inputs, weights, layer, seed: int = 1) -> dict[str, torch.Tensor]:
    """Outputs of function(inputs, weights, layer) by name, and every gradient of a randomly weighted sum of them."""
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.x, inputs.h0, inputs.c0, *weights) if t is not None]
    x, h0, *rest = leaves
    given = inputs._replace(x=x, h0=h0, c0=rest.pop(0) if inputs.c0 is not None else None)
    outputs = list(function(given, rest, layer)[: 2 + (inputs.c0 is not None)])
    draw = torch.Generator().manual_seed(seed)
    outer = [torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype) for out in outputs]
    if inputs.lengths is not None:  # nobody may read the gradients of what is zero in any case
        past = ~Steps(layer, inputs).within()
        past = past.view(-1, len(inputs.lengths))
        outer[0][past.T if layer.batch_first else past] = torch.nan
    grads = torch.autograd.grad(outputs, leaves, outer)
    found = dict(zip(("y", "h_n", "c_n"), (out.detach() for out in outputs)))
    return found | {f"d{name}": grad for name, grad in zip(names_of(layer, inputs), grads, strict=True)}


def row_by_row(inputs: Inputs, weights, layer):
    """The same, each row by itself, its steps cut at resets: what the definition has to be."""
    x, _, h0, c0, resets, lengths, *_ = inputs
    steps, each = Steps(layer, inputs._replace(resets=None, lengths=None)), len(layer.kinds())
    one, xs = layer._replace(directions=1, reverse=False, batch_first=False, restarts=False), steps.each(x)
    marks = None if resets is None else steps.each(resets)
    zero, found, h_n, c_n = torch.zeros(h0.shape[2], dtype=x.dtype), {}, [], []
    for d, b in itertools.product(range(layer.directions), range(steps.batch)):
        own = [t for t in range(len(xs)) if b < len(xs[t])]
        own = own if lengths is None else own[: int(lengths[b])]
        first, restart = (
            (h0[d, row][None, None], None if c0 is None else c0[d, row][None, None])
            for row in (b, b + steps.batch * layer.restarts)
        )
        h, c = first
        for t in own[::-1] if layer.reverse != bool(d) else own:
            h, c = restart if marks is not None and marks[t][b] else (h, c)
            given = Inputs(xs[t][b][None, None], None, h, c)
            y, h, after, _ = reference.layer_forward(given, weights[d * each : (d + 1) * each], one)
            found[t, b, d], c = y[0, 0], None if c0 is None else after
        h_n.append(h[0, 0])
        c_n += [] if c is None else [c[0, 0]]
    ys = [
        torch.stack([torch.cat([found.get((t, b, d), zero) for d in range(layer.directions)]) for b in range(len(xs[t]))])
        for t in range(len(xs))
    ]
    shape = h0.shape[0], steps.batch
    y, h = steps.gathered(ys), torch.stack(h_n).unflatten(0, shape)
    return y, h, torch.stack(c_n).unflatten(0, shape) if c_n else None


def close(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@every_mark
@every_layer
def test_the_definition(make_layer, cell, form, project, marks):
    """Against each row by itself, which is cut where it is reset; and gradients.py against autograd."""
    inputs, weights, layer = make(make_layer, cell, form, project, marks)
    expected = results(row_by_row, inputs, weights, layer)
    close(results(reference.layer_forward, inputs, weights, layer), expected)

    def by_gradients(inputs, weights, layer):
        x, batch_sizes, h0, c0, resets, lengths, *_ = inputs
        return _ByGradients.apply(layer, resets, lengths, batch_sizes, x, h0, c0, *weights)

    close(results(by_gradients, inputs, weights, layer), expected)


class _ByGradients(torch.autograd.Function):
    """The reference, with its derivative by kernels/gradients.py."""

    @staticmethod
    def forward(ctx, layer, resets, lengths, batch_sizes, x, h0, c0, *weights):
        inputs = Inputs(x, batch_sizes, h0, c0, resets, lengths)
        y, h_n, c_n, saved = reference.layer_forward(inputs, weights, layer, True)
        if lengths is not None:
            saved = torch.where(Steps(layer, inputs).within(), saved, torch.nan)
        ctx.given = inputs, weights, y, saved, layer
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        inputs, weights, y, saved, layer = ctx.given
        outer = Outer(dy, dh_n, dc_n if inputs.c0 is not None else None)
        dx, dh0, dc0, dw = gradients.layer_backward(outer, inputs, weights, y, saved, layer, Needs())
        return *(None,) * 4, dx, dh0, dc0 if inputs.c0 is not None else None, *dw


@every_mark
@every_layer
def test_the_engine(make_layer, poison, cell, form, project, marks):
    """The CPU engine's error against the definition in float64, next to the definition's own error in float32."""
    _assert_engine(make_layer, cell, form, project, marks, torch.float32)


@every_mark
@pytest.mark.parametrize(("cell", "project"), [("lstm", True), ("gru", False)])
def test_the_engine_in_float64(make_layer, poison, cell, project, marks):
    """Every formula has been held to the definition above: what is left is the type, whose vectors are half as long."""
    _assert_engine(make_layer, cell, "two_directions", project, marks, torch.float64)


def _assert_engine(make_layer, cell, form, project, marks, dtype) -> None:
    errors: dict[str, tuple[Error, Error]] = {}
    for sizes in ((11, 9, 5, 37), (40, 3, 9, 16), (1, 4, 3, 17), (6, 1, 2, 15))[: 2 if marks.startswith("packed") else 4]:
        inputs, weights, layer = make(make_layer, cell, form, 7 * project, marks, sizes, dtype)
        wide = [None if t is None else t.double() if t.is_floating_point() else t for t in inputs]
        truth = results(reference.layer_forward, Inputs(*wide), [w.double() for w in weights], layer)
        own = truth if dtype in FIXED else results(reference.layer_forward, inputs, weights, layer)
        for count in (1, 3):
            with threads(count):
                found = results(autograd.run_layer, inputs, weights, layer)
            for name, value in truth.items():
                assert found[name].shape == value.shape and found[name].dtype == dtype, name
                of_own, error = errors.setdefault(name, (Error(), Error()))
                of_own.add(own[name], value)
                error.add(found[name], value)
    for name, (of_own, error) in errors.items():
        allowed = bound(dtype, of_own.relative)
        assert error.relative <= allowed, f"{name}: error {error.relative:.3g} > {allowed:.3g}"


# --- bits


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_are_those_of_packed_rows(make_layer, cell, restarts):
    """Of outputs, states and their gradients: a row's depend neither on how it is given, nor on the others, nor on the team."""
    T, B, I, H = 9, 13, 5, 70
    made = make_layer(cell, directions=2, sizes=(T, B, I, H), dtype=torch.float32)
    lengths = torch.randint(1, T + 1, (B,))
    lengths[3], resets = 1, torch.rand(T, B) < 0.2
    x, weights, layer = made["x"], [w / H**0.5 for w in made["weights"]], made["layer"]._replace(restarts=restarts)
    states = [made["h0"], made["c0"]]
    if restarts:
        states = [None if state is None else torch.cat((state, torch.randn_like(state)), 1) for state in states]
    given = Inputs(x, None, *states, resets, lengths)
    outer = torch.randn(T, B, 2 * H)

    def run(given, outer):
        leaves = [t.detach().requires_grad_() for t in (given.x, given.h0, given.c0) if t is not None]
        own = given._replace(x=leaves[0], h0=leaves[1], c0=leaves[2] if given.c0 is not None else None)
        y, h_n, c_n = autograd.run_layer(own, weights, layer)
        return (y, h_n, c_n), torch.autograd.grad([y, h_n], leaves, [outer, torch.ones_like(h_n)])

    with threads(1):
        (y, h_n, c_n), (dx, dh0, *dc0) = run(given, outer)
    packed, marks, grads = (
        pack_padded_sequence(each, lengths, enforce_sorted=False) for each in (x, resets.unsqueeze(-1), outer)
    )
    order, back = packed.sorted_indices, packed.unsorted_indices
    rows, back_rows, own_rows = order, back, torch.tensor([3])
    if restarts:
        rows, back_rows, own_rows = (torch.cat((each, each + B)) for each in (order, back, own_rows))
    states = [None if state is None else state[:, rows] for state in (given.h0, given.c0)]
    with threads(3):
        (py, ph, pc), (pdx, pdh0, *pdc0) = run(Inputs(packed.data, packed.batch_sizes, *states, marks.data[:, 0]), grads.data)
    for name, one, other in (("y", y, py), ("dx", dx, pdx)):
        padded, _ = pad_packed_sequence(PackedSequence(other, packed.batch_sizes, order, back), total_length=T)
        same_bits(one, padded, name)
    pairs = ("h_n", h_n, ph), ("c_n", c_n, pc), ("dh0", dh0, pdh0), *(("dc0", *pair) for pair in zip(dc0, pdc0))
    for name, one, other in pairs:
        if one is not None:
            same_bits(one, other[:, back_rows if name.startswith("d") else back], name)
    states = [None if state is None else state[:, own_rows] for state in (given.h0, given.c0)]
    alone = Inputs(x[:, 3:4], None, *states, resets[:, 3:4], lengths[3:4])
    (own_y, *_), (own_dx, *_) = run(alone, outer[:, 3:4].contiguous())
    same_bits(own_y, y[:, 3:4])
    same_bits(own_dx, dx[:, 3:4])


@pytest.mark.parametrize("marks", ["both", "packed", "restarts", "packed_restarts"])
def test_without_the_runtime(make_layer, marks, monkeypatch):
    """The same kernels called from Python."""
    monkeypatch.setenv("FASTRNN_CACHE_DIR", str(ROOT / "build"))  # where those that setup.py compiled lie
    inputs, weights, layer = make(make_layer, "lstm", "two_directions", 3, marks, (7, 5, 3, 9), torch.float32)
    (*tensors, resets, lengths, _, _), text, operators = inputs, layer.text(), torch.ops.fastrnn
    mask = (torch.rand(2, Steps(layer, inputs).batch, 3) > 0.3) / 0.7
    with threads(1):
        more = resets, lengths, mask
        expected = operators.layer_forward(*tensors, weights, text, True, *more)
        found = fallback.layer_forward(*tensors, weights, text, True, *more)
        (y, h_n, c_n, saved), needs = expected, [True, True, True]
        given = *(torch.ones_like(each) for each in (y, h_n, c_n)), *tensors, weights, y, saved, text, needs, *more
        gradients = operators.layer_backward(*given), fallback.layer_backward(*given)
    for one, other in zip(
        (*expected[:3], *gradients[0][:3], *gradients[0][3]), (*found[:3], *gradients[1][:3], *gradients[1][3])
    ):
        same_bits(one, other)
    if lengths is not None:
        with pytest.raises(RuntimeError, match="lengths: expected numbers from 0 to 7"):
            fallback.layer_forward(*tensors, weights, text, True, None, lengths + 3)


def test_the_function():
    """functional.layer, and whose gradients it has."""
    x, h0 = torch.randn(6, 3, 4), torch.randn(1, 3, 5, requires_grad=True)
    w = {"cell": "gru", "w_ih": [torch.randn(15, 4)], "w_hh": [torch.randn(15, 5)]}
    resets, lengths = torch.zeros(6, 3, dtype=torch.bool), torch.tensor([6, 0, 4])
    resets[3] = True
    y, h_n, c_n = fastrnn.functional.layer(x, h0, **w, resets=resets, lengths=lengths)
    again, _, _ = fastrnn.functional.layer(x[3:], h0, **w)
    torch.testing.assert_close(y[3:, 0], again[:, 0])
    assert torch.equal(h_n[0, 1], h0[0, 1]) and c_n is None
    (from_first,) = torch.autograd.grad(y[:3, 0].sum(), h0, retain_graph=True)
    (from_reset,) = torch.autograd.grad(y[3:, 0].sum(), h0)  # no gradient crosses the reset
    (expected,) = torch.autograd.grad(again[:, 0].sum(), h0)
    torch.testing.assert_close(from_reset[0, 0], expected[0, 0])
    assert from_first[0, 0].abs().sum() > 0 and from_first[0, 1:].abs().sum() == 0
    with pytest.raises(ValueError, match="resets: expected bool"):
        fastrnn.functional.layer(x, h0, **w, resets=resets.T)


# --- modules


def by_torch(module: nn.Module, x, hx, resets, lengths):
    """torch.nn's module [T, B] on each row by itself, cut at resets: output, states."""
    lstm, outputs, finals = isinstance(module, nn.LSTM), [], []
    for b in range(x.shape[1]):
        state, ys = tuple(s[:, b : b + 1] for s in hx) if lstm else hx[:, b : b + 1], []
        for t in range(x.shape[0] if lengths is None else int(lengths[b])):
            y, state = module(x[t : t + 1, b : b + 1], None if resets is not None and resets[t, b] else state)
            ys.append(y[:, 0])
        ys = torch.cat(ys) if ys else x.new_zeros(0, module.proj_size or module.hidden_size)
        outputs.append(torch.cat((ys, ys.new_zeros(x.shape[0] - len(ys), ys.shape[1]))))
        finals.append(state if lstm else (state,))
    after = tuple(torch.cat(each, 1) for each in zip(*finals))
    return torch.stack(outputs, 1), after if lstm else after[0]


@pytest.mark.parametrize("layout", ["time", "batch", "unbatched", "packed", "packed_data"])
@pytest.mark.parametrize(("name", "options"), [("RNN", {}), ("GRU", {}), ("LSTM", {}), ("LSTM", {"proj_size": 3})], ids=str)
def test_modules(name, options, layout):
    """Two layers, against torch.nn's, which run each row's episodes one after the other."""
    T, B = 7, 1 if layout == "unbatched" else 4
    stock = getattr(nn, name)(5, 6, 2, dtype=torch.float64, **options)
    ours = getattr(fastrnn, name)(5, 6, 2, dtype=torch.float64, batch_first=layout == "batch", **options)
    ours.load_state_dict(stock.state_dict())
    x, resets = torch.randn(T, B, 5, dtype=torch.float64), torch.rand(T, B) < 0.3
    hx = tuple(torch.randn(2, B, size, dtype=torch.float64) for size in (stock.proj_size or 6, 6))
    hx = hx if name == "LSTM" else hx[1]
    lengths = torch.tensor([3, 7, 1, 5]) if "packed" in layout else torch.randint(0, T + 1, (B,))
    y, state = by_torch(stock, x, hx, resets, lengths)
    if layout == "unbatched":
        own_hx = tuple(s[:, 0] for s in hx) if name == "LSTM" else hx[:, 0]
        found, after = ours(x[:, 0], own_hx, resets=resets[:, 0], lengths=lengths[0])
        found, after = found.unsqueeze(1), tuple(s.unsqueeze(1) for s in after) if name == "LSTM" else after.unsqueeze(1)
    elif "packed" in layout:
        packed, marks = (pack_padded_sequence(each, lengths, enforce_sorted=False) for each in (x, resets))
        found, after = ours(packed, hx, resets=marks if layout == "packed" else marks.data)
        found, _ = pad_packed_sequence(found, total_length=T)
    elif layout == "batch":
        found, after = ours(x.transpose(0, 1), hx, resets=resets.T, lengths=lengths)
        found = found.transpose(0, 1)
    else:
        found, after = ours(x, hx, resets=resets, lengths=lengths)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(after, state)
    if layout == "time":  # without a state, from zeros
        zeros = tuple(map(torch.zeros_like, hx)) if name == "LSTM" else torch.zeros_like(hx)
        torch.testing.assert_close(ours(x, resets=resets), ours(x, zeros, resets=resets))
        none, every = torch.zeros(T, B, dtype=torch.bool), torch.full((B,), T)
        torch.testing.assert_close(ours(x, hx, resets=none, lengths=every), ours(x, hx))


EVERY_CALL = list(itertools.product((False, True), (1, 2), (1, 2), (None, [6, 3, 0]), (False, True)))


@pytest.mark.parametrize("make", [fastrnn.LSTM, fastrnn.GRU, fastrnn.recurrent(fastrnn.cells.lstm)], ids=["lstm", "gru", "own"])
@pytest.mark.parametrize(("batch_first", "layers", "directions", "lengths", "learned"), EVERY_CALL)
def test_a_call_that_begins_elsewhere(make, batch_first, layers, directions, lengths, learned, monkeypatch):
    """From other states than resets go back to: output, states and gradients as those of single steps."""
    if make not in (fastrnn.LSTM, fastrnn.GRU):
        monkeypatch.setattr(dispatch, "forced", "reference")  # nothing is compiled for this test
    draw, T, B, H, lstm = torch.Generator().manual_seed(0), 6, 3, 4, make is not fastrnn.GRU
    options = {"num_layers": layers, "bidirectional": directions == 2, "learn_initial_state": learned, "dtype": torch.float64}
    module = make(3, H, batch_first=batch_first, **options)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 2

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    x, resets = random(T, B, 3), torch.rand(T, B, generator=draw) < 0.3
    resets[:, 0] = False
    count = T if lengths is None else lengths
    hx = [random(layers * directions, B, H) for _ in range(1 + lstm)]
    fresh = features.initial_states(module, B) if learned else [torch.zeros_like(state) for state in hx]
    given = {"resets": resets.T if batch_first else resets, "lengths": lengths and torch.tensor(lengths), "all_states": True}
    y, last, every = module(x.transpose(0, 1) if batch_first else x, tuple(hx) if lstm else hx[0], **given)
    last, every = (each if lstm else (each,) for each in (last, every))
    if batch_first:
        y, every = y.transpose(0, 1), [each.transpose(1, 2) for each in every]

    one, ends, output = type(module)(H, H, dtype=torch.float64), {}, x
    for k, (layer, d) in enumerate(itertools.product(range(layers), range(directions))):
        suffix = f"_l{layer}" + "_reverse" * d
        own = {f"{name}_l0": getattr(module, f"{name}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        if d == 0:
            below, rows = output, {}
        one.input_size = below.shape[-1]
        for b in range(B):
            state = [each[k, b][None, None] for each in hx]
            steps = range(count if isinstance(count, int) else count[b])
            for t in reversed(steps) if d else steps:
                state = [each[k, b][None, None] for each in fresh] if resets[t, b] else state
                call = below[t, b][None, None], tuple(state) if lstm else state[0]
                rows[t, b, d], state = torch.func.functional_call(one, own, call)
                state = list(state) if lstm else [state]
            ends[k, b] = [each[0, 0] for each in state]
        zero = x.new_zeros(1, 1, H)
        output = torch.cat(
            [torch.cat([rows.get((t, b, d), zero) for t in range(T) for b in range(B)]) for d in range(d + 1)], -1
        )
        output = output.view(T, B, -1)
    count = range(len(hx[0]))
    finals = [torch.stack([torch.stack([ends[k, b][s] for b in range(B)]) for k in count]) for s in range(len(hx))]
    expected = [output, *finals]
    torch.testing.assert_close([y, *last], expected)
    top = every[0].unflatten(0, (layers, directions))[-1]
    torch.testing.assert_close(torch.cat(list(top), -1), output)
    leaves = [x, *hx, *module.parameters()]
    seeds = [torch.randn(each.shape, generator=draw, dtype=torch.float64) for each in expected]
    for own, right in zip(
        torch.autograd.grad([y, *last], leaves, seeds, allow_unused=True),
        torch.autograd.grad(expected, leaves, seeds, allow_unused=True),
        strict=True,
    ):  # a state that no row goes back to has a gradient of zeros, or none
        torch.testing.assert_close(*(torch.zeros(()) if each is None or not each.any() else each for each in (own, right)))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_no_row_has_a_step(name, steps):
    """Lengths of zero, and calls whose rows are all reset before their first step: nothing is left as memory was."""
    layer, x = getattr(fastrnn, name)(4, 16, 2, bidirectional=True), torch.randn(steps, 4, 4, requires_grad=True)
    hx = [torch.randn(4, 4, 16, requires_grad=True) for _ in range(1 + (name == "LSTM"))]
    given = tuple(hx) if name == "LSTM" else hx[0]
    for _ in range(3):
        dirt = [torch.full((n,), torch.nan) for n in range(1, 4000, 7)]
        del dirt
        y, state = layer(x, given, lengths=torch.zeros(4, dtype=torch.int64))
        state = state if name == "LSTM" else (state,)
        assert not y.any() and all(map(torch.equal, state, hx))
        grads = torch.autograd.grad(y.sum() + sum(each.sum() for each in state), [x, *layer.parameters(), *hx])
        assert not any(grad.any() for grad in grads[: -len(hx)]) and all((grad == 1).all() for grad in grads[-len(hx) :])
    first = torch.zeros(steps, 4, dtype=torch.bool)
    first[0] = first[-1] = True
    results = []
    for begin in (None, tuple(torch.full_like(state, torch.nan) for state in hx)):
        begin = begin[0] if begin and name != "LSTM" else begin
        y, _ = layer(x, begin, resets=first)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("layout", ["two directions", "packed"])
def test_what_is_not_used_of_a_call_may_overflow(layout):
    """Steps after a reset, from the states before it, are no part of the result."""
    layer = fastrnn.RNN(3, 4, nonlinearity="relu", bidirectional=layout != "packed")
    for name, weight in layer.named_parameters():
        weight.data = 2 * torch.eye(4) if name.startswith("weight_hh") else weight.data
    x, resets = torch.rand(200, 2, 3), (torch.arange(200) % 10 == 5).unsqueeze(1).expand(200, 2)
    hx = torch.rand(1 + layer.bidirectional, 2, 4)
    if layout == "packed":
        x, resets = (pack_padded_sequence(each, torch.tensor([200, 200])) for each in (x, resets))
    y, _ = layer(x, hx, resets=resets)
    y = y.data if layout == "packed" else y
    grads = torch.autograd.grad(y.sum(), list(layer.parameters()))
    assert y.isfinite().all() and all(grad.isfinite().all() for grad in grads)


def test_layers_of_own_cells():
    """A cell of three states beside h: resets and lengths on the compiled engine, against the reference."""
    layer = fastrnn.recurrent(fastrnn.cells.slstm)(3, 5, 2, bidirectional=True, batch_first=True, dtype=torch.float64)
    x, resets, lengths = torch.randn(4, 6, 3, dtype=torch.float64), torch.rand(4, 6) < 0.3, torch.tensor([6, 0, 2, 5])
    x[1, :] = torch.nan
    found = layer(x, resets=resets, lengths=lengths)
    for b in range(4):
        y, after = x.new_zeros(1, 0, 10), None
        if lengths[b]:
            y, after = layer(x[b : b + 1, : lengths[b]], resets=resets[b : b + 1, : lengths[b]])
        torch.testing.assert_close(found[0][b, : lengths[b]], y[0])
        assert found[0][b, lengths[b] :].abs().sum() == 0
        for one, other in zip(found[1], after or [torch.zeros(4, 1, 5, dtype=torch.float64)] * len(found[1])):
            torch.testing.assert_close(one[:, b], other[:, 0])
    with pytest.raises(ValueError, match=r"resets: expected bool \[B, T\], \(4, 6\)"):
        layer(x, resets=resets.float())


def test_dropout_between_layers():
    """torch.nn's numbers, in both layouts, which turn between the layers."""
    x, resets = torch.randn(6, 3, 4), torch.rand(6, 3) < 0.3
    time, batch = (fastrnn.GRU(4, 5, 3, dropout=0.5, batch_first=batch_first) for batch_first in (False, True))
    batch.load_state_dict(time.state_dict())
    torch.manual_seed(3)
    expected, _ = time(x, resets=resets)
    torch.manual_seed(3)
    found, _ = batch(x.transpose(0, 1).contiguous(), resets=resets.T.contiguous())
    torch.testing.assert_close(found.transpose(0, 1), expected)


class Counted(fastrnn.GRU):
    """A class of a user's own."""


def test_who_runs_it():
    layer, x, resets = Counted(3, 4), torch.randn(5, 2, 3), torch.zeros(5, 2, dtype=torch.bool)
    choice = fastrnn.explain(layer, x, resets=resets)
    assert choice.engine == "cpu" and choice.declined["torch"] == "torch.nn has neither resets nor lengths"
    torch.testing.assert_close(layer(x, resets=resets), layer(x))
    meta = fastrnn.explain(layer, x.to("meta"), resets=resets)
    assert meta.engine == "reference"


WRONG = {
    "resets of float": (
        {"resets": torch.zeros(5, 2)},
        ValueError,
        r"resets: expected bool \[T, B\], \(5, 2\) on cpu, got torch.fl",
    ),
    "turned": ({"resets": torch.zeros(2, 5) > 0}, ValueError, r"resets: expected bool .* got torch.bool \(2, 5\)"),
    "a list": ({"resets": [True]}, TypeError, "resets: expected a tensor or None, got list"),
    "negative": ({"lengths": torch.tensor([-1, 2])}, ValueError, "lengths: expected numbers from 0 to 5, .* got -1"),
    "too long": ({"lengths": torch.tensor([1, 6])}, ValueError, "lengths: expected numbers from 0 to 5, .* got 6"),
    "int32": ({"lengths": torch.tensor([1, 2], dtype=torch.int32)}, ValueError, r"lengths: expected int64 \[B\], \(2,\)"),
    "too many": ({"lengths": torch.tensor([1, 2, 3])}, ValueError, r"lengths: expected int64 .* got torch.int64 \(3,\)"),
    "elsewhere": ({"lengths": torch.tensor([1, 2], device="meta")}, ValueError, "lengths: expected .* on cpu, got .* on meta"),
    "a number": ({"lengths": 3}, TypeError, "lengths: expected a tensor or None, got int"),
    "packed resets": (
        {"resets": pack_padded_sequence(torch.zeros(5, 2, dtype=torch.bool), torch.tensor([5, 2]))},
        ValueError,
        "resets: expected a tensor, as the input is one",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit(wrong):
    given, error, words = WRONG[wrong]
    for layer in (fastrnn.LSTM(3, 4), fastrnn.recurrent(fastrnn.cells.mgu)(3, 4)):
        with pytest.raises(error, match=words):
            layer(torch.randn(5, 2, 3), **given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_states_of_another_dtype(name, learned, dtype):
    layer = getattr(fastrnn, name)(3, 4, learn_initial_state=learned)
    x, state, resets = torch.randn(5, 2, 3), torch.ones(1, 2, 4, dtype=dtype), torch.zeros(5, 2, dtype=torch.bool)
    hx = (state, state) if name == "LSTM" else state
    for marks in ({"lengths": torch.tensor([5, 3])}, {"resets": resets}):
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x, hx, **marks)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_dtypes_under_autocast(name):
    layer = getattr(fastrnn, name)(3, 4)
    x, state, resets = torch.randn(5, 2, 3), torch.ones(1, 2, 4, dtype=torch.bfloat16), torch.zeros(5, 2, dtype=torch.bool)
    hx = (state, state) if name == "LSTM" else state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, marked = layer(x, hx)[0], layer(x, hx, resets=resets)[0]
    assert plain.dtype is marked.dtype is torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"num_heads": 2}], ids=["plain", "heads"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_states_on_another_device(name, options):
    layer = getattr(fastrnn, name)(3, 4, **options)
    x, state, resets = torch.randn(5, 2, 3), torch.ones(1, 2, 4, device="meta"), torch.zeros(5, 2, dtype=torch.bool)
    hx = (state, state) if name == "LSTM" else state
    for marks in ({}, {"lengths": torch.tensor([5, 3])}, {"resets": resets}):
        with pytest.raises(RuntimeError, match="found input tensor at cpu and hidden tensor at meta"):
            layer(x, hx, **marks)


def test_what_does_not_fit_packed_input():
    layer, packed = fastrnn.GRU(3, 4), pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 2]))
    marks = torch.zeros(5, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="lengths: expected None with packed input"):
        layer(packed, lengths=torch.tensor([5, 2]))
    with pytest.raises(ValueError, match=r"resets: expected bool \[N\], \(7,\) on cpu, got torch.bool \(5, 2\)"):
        layer(packed, resets=marks)
    with pytest.raises(ValueError, match="resets: expected the lengths and the order of the packed input"):
        layer(packed, resets=pack_padded_sequence(marks, torch.tensor([5, 3])))
    with pytest.raises(ValueError, match=r"resets: expected bool \[T\] without a batch"):
        layer(torch.randn(5, 3), resets=marks)
    with pytest.raises(RuntimeError, match="Expected hidden size"):  # torch.nn's own checks
        layer(torch.randn(5, 2, 3), torch.zeros(1, 3, 4), resets=marks)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        layer(torch.randn(0, 2, 3), lengths=torch.zeros(2, dtype=torch.int64))
    assert layer(torch.randn(5, 0, 3), resets=marks[:, :0])[0].shape == (5, 0, 4)
    with pytest.raises(ValueError, match="GRU: Expected input to be 2D or 3D, got 1D instead"):
        layer(torch.randn(3), resets=marks)
    with pytest.raises(ValueError, match="RNN: Expected input to be 2D or 3D, got 4D tensor instead"):
        fastrnn.RNN(3, 4)(torch.randn(1, 5, 2, 3), resets=marks)


def test_the_runtime_checks_lengths_itself(make_layer):
    """Whoever calls the operator gets no read past the end."""
    made = make_layer("gru", sizes=(4, 3, 2, 5), dtype=torch.float32)
    *tensors, weights, layer = made.values()
    for lengths in ([5, 1, 1], [-1, 0, 0]):
        with pytest.raises(RuntimeError, match="lengths: expected numbers from 0 to 4"):
            torch.ops.fastrnn.layer_forward(*tensors, weights, layer.text(), False, None, torch.tensor(lengths))
    for resets in (torch.zeros(4, 2, dtype=torch.bool), torch.zeros(4, 3)):
        with pytest.raises(RuntimeError, match="resets: expected bool for each row of x"):
            torch.ops.fastrnn.layer_forward(*tensors, weights, layer.text(), False, resets)
    with pytest.raises(RuntimeError, match=r"lengths: expected int64 \[B\]"):
        torch.ops.fastrnn.layer_forward(*tensors, weights, layer.text(), False, None, torch.tensor([1, 2]))
    restarts, none = layer._replace(restarts=True), torch.zeros(4, 3, dtype=torch.bool)
    assert misfit(restarts, Inputs(*tensors, none), weights) == "h0: expected (1, 6, 5), got (1, 3, 5)"
    with pytest.raises(RuntimeError, match="a state's shape or dtype does not fit the layer"):
        torch.ops.fastrnn.layer_forward(*tensors, weights, restarts.text(), False, none)
    x, sizes, h0, _ = tensors
    given = x, sizes, torch.cat((h0, h0), 1), None
    assert misfit(restarts, Inputs(*given), weights) == "resets: expected by a layer that restarts"
    with pytest.raises(RuntimeError, match="a layer that restarts needs resets"):
        torch.ops.fastrnn.layer_forward(*given, weights, restarts.text(), False)


# --- transforms


@pytest.fixture(params=[False, True], ids=["back", "elsewhere"])
def call(request):
    """(function of (x, h, c), these tensors, resets, lengths) of a small bidirectional LSTM, and the reference as the same.

    Resets go back to h and c, or elsewhere.
    """
    module = fastrnn.LSTM(3, 4, bidirectional=True, learn_initial_state=request.param, dtype=torch.float64)
    if request.param:
        for name, parameter in module.named_parameters():
            parameter.data = torch.randn_like(parameter) if name.startswith("initial") else parameter.data
    x, h, c = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3, 3), (2, 3, 4), (2, 3, 4)))
    resets, lengths = torch.rand(5, 3) < 0.4, torch.tensor([2, 5, 0])

    weights, layer = module._flat_weights, fastrnn.dispatch.layer_of_module(module)
    kinds = {name: weights[k::4] for k, name in enumerate(("w_ih", "w_hh", "b_ih", "b_hh"))}

    def ours(x, h, c, resets=resets, lengths=lengths):
        if request.param and resets is not None:
            y, (h_n, c_n) = module(x, (h, c), resets=resets, lengths=lengths)
        else:
            y, h_n, c_n = fastrnn.functional.layer(x, h, c, cell="lstm", **kinds, resets=resets, lengths=lengths)
        return y.sin().sum() + (h_n * c_n).sum()

    def plain(x, h, c, resets=resets, lengths=lengths):
        restarts = request.param and resets is not None
        if restarts:
            h, c = (torch.cat(pair, 1) for pair in zip((h, c), features.initial_states(module, 3)))
        given = Inputs(x, None, h, c, resets, lengths)
        y, h_n, c_n, _ = reference.layer_forward(given, weights, layer._replace(restarts=restarts))
        return y.sin().sum() + (h_n * c_n).sum()

    return module, ours, plain, (x, h, c), resets, lengths


def test_double_backward_and_func(call):
    _, ours, plain, tensors, *_ = call
    for transform in (
        lambda f: torch.func.hessian(f, (0, 1, 2)),
        lambda f: lambda *t: torch.func.jvp(torch.func.grad(f, (0, 1, 2)), t, tuple(map(torch.cos, t))),
        lambda f: torch.func.grad(lambda *t: sum(g.pow(2).sum() for g in torch.func.grad(f, (0, 1, 2))(*t)), (0, 1, 2)),
    ):
        torch.testing.assert_close(transform(ours)(*tensors), transform(plain)(*tensors))
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(ours, leaves) and torch.autograd.gradgradcheck(ours, leaves)


def test_vmap(call):
    """Over the input, over the marks, and over the states."""
    _, ours, plain, (x, h, c), resets, lengths = call
    more = torch.stack((resets, ~resets)), torch.stack((lengths, 5 - lengths))
    for given, dims in (
        ((torch.stack((x, x.cos())), h, c, resets, lengths), (0, None, None, None, None)),
        ((x, h, c, *more), (None, None, None, 0, 0)),
        ((x, torch.stack((h, h.cos()), 1), c, more[0], lengths), (None, 1, None, 0, None)),
    ):
        for f in (lambda f: f, lambda f: torch.func.grad(f, (0, 1))):
            torch.testing.assert_close(torch.func.vmap(f(ours), dims)(*given), torch.func.vmap(f(plain), dims)(*given))


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights:UserWarning")  # of torch.nn's modules too
def test_compile_and_export(call):
    """One graph, for other lengths too, with the op and not its steps in it."""
    module, ours, _, tensors, resets, lengths = call
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for marks in ((resets, lengths), (~resets, lengths.flip(0)), (resets, None), (None, lengths)):
        mine, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
        found, expected = (torch.autograd.grad(f(*t, *marks), t) for f, t in ((compiled, mine), (ours, theirs)))
        torch.testing.assert_close(found, expected)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = module

        def forward(self, x, resets, lengths):
            return self.rnn(x, resets=resets, lengths=lengths)

    program = torch.export.export(Model(), (tensors[0], resets, lengths), strict=False)
    assert any("fastrnn.layer_forward" in str(node.target) for node in program.graph.nodes)
    given = tensors[0].cos(), ~resets, lengths.flip(0)
    torch.testing.assert_close(program.module()(*given), Model()(*given))


@pytest.mark.parametrize("marks", ["both", "packed_restarts"])
def test_opcheck(make_layer, marks):
    inputs, weights, layer = make(make_layer, "lstm", "batch_first", False, marks)
    tensors = *[None if t is None else t.nan_to_num() if t.is_floating_point() else t for t in inputs[:4]], weights
    more, text = inputs[4:], layer.text()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fastrnn.layer_forward, (*tensors, text, True, *more), test_utils=checks[:2])
    y, _, _, saved = torch.ops.fastrnn.layer_forward(*tensors, text, True, *more)
    given = (torch.randn_like(y), None, None, *tensors, y, saved, text, [True, True, True], *more)
    torch.library.opcheck(torch.ops.fastrnn.layer_backward, given, test_utils=checks)
    torch.library.opcheck(torch.ops.fastrnn.checkpoint_forward, (*tensors, text, 1, *more), test_utils=checks)


def test_recompute(call, monkeypatch):
    monkeypatch.setattr(checkpoint, "SEGMENT_ROWS", 1)
    module, ours, _, tensors, *_ = call
    learned = [parameter for name, parameter in module.named_parameters() if name.startswith("initial")]
    mine, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    expected = torch.autograd.grad(ours(*theirs), [*theirs, *learned])
    with fastrnn.recompute():
        torch.testing.assert_close(torch.autograd.grad(ours(*mine), [*mine, *learned]), expected)


@every_mark
@pytest.mark.parametrize(("cell", "project"), [("lstm", 3), ("lstm", 0), ("gru", 0)])
@pytest.mark.parametrize("form", FORMS)
def test_segments_of_recompute_mode(make_layer, cell, project, form, marks):
    """Of every count: a segment begins with other states than its resets go back to, and rows end within it."""
    inputs, weights, layer = make(make_layer, cell, form, project, marks, (9, 4, 3, 5))
    tensors, more, text = (*inputs[:4], weights), inputs[4:], layer.text()
    y, h_n, c_n, saved = torch.ops.fastrnn.layer_forward(*tensors, text, True, *more)
    outer = [torch.randn_like(each) if each.numel() else None for each in (y, h_n, c_n)]
    for needs in ([True, True, True], [True, False, True]):
        *expected, dw = torch.ops.fastrnn.layer_backward(*outer, *tensors, y, saved, text, needs, *more)
        for segments in range(1, 5):
            *found, kept = torch.ops.fastrnn.checkpoint_forward(*tensors, text, segments, *more)
            for one, other in zip(found, (y, h_n, c_n), strict=True):
                same_bits(one, other)
            *found, own = torch.ops.fastrnn.checkpoint_backward(*outer, *tensors, y, kept, text, segments, needs, *more)
            # float64, whose sums over steps have parts here: that rounds otherwise, and no more
            torch.testing.assert_close([*found, *own], [*expected, *dw], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype, autocast):
    """Each result is float32's, rounded once."""
    torch.manual_seed(0)
    module = fastrnn.GRU(8, 16, 1)
    wide = fastrnn.GRU(8, 16, 1)
    wide.load_state_dict({name: value.to(dtype).float() for name, value in module.state_dict().items()})
    x, resets, lengths = torch.randn(12, 10, 8).to(dtype), torch.rand(12, 10) < 0.2, torch.randint(0, 13, (10,))
    expected, _ = wide(x.float(), resets=resets, lengths=lengths)
    if autocast:
        with torch.autocast("cpu", dtype):
            found, _ = module(x.float(), resets=resets, lengths=lengths)
    else:
        module = module.to(dtype)
        found, _ = module(x, resets=resets, lengths=lengths)
        (expected.sum() + 0).backward()
        found.float().sum().backward()
        torch.testing.assert_close(module.weight_hh_l0.grad.float(), wide.weight_hh_l0.grad, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_frozen_and_compressed():
    x, resets, lengths = torch.randn(6, 3, 8), torch.rand(6, 3) < 0.3, torch.tensor([6, 0, 3])
    for change in (fastrnn.freeze, fastrnn.compress):
        layer = fastrnn.LSTM(8, 16, 2).eval()
        with torch.no_grad():
            expected = layer(x, resets=resets, lengths=lengths)
            tolerance = {} if change is fastrnn.freeze else {"rtol": 2e-2, "atol": 2e-2}
            torch.testing.assert_close(change(layer)(x, resets=resets, lengths=lengths), expected, **tolerance)


# --- the states of every step


@pytest.mark.parametrize("layout", ["time", "batch", "unbatched", "packed"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "slstm"])
def test_all_states(name, layout):
    """Of every step, layer and direction, with their gradients: those of a call that ends there."""
    T, B, own = 5, 1 if layout == "unbatched" else 3, name == "slstm"
    kind = fastrnn.recurrent(fastrnn.cells.slstm) if own else getattr(fastrnn, name)
    layer = kind(3, 4, 2, bidirectional=True, dtype=torch.float64, batch_first=layout == "batch")
    x, resets = torch.randn(T, B, 3, dtype=torch.float64), torch.rand(T, B) < 0.3
    lengths = torch.tensor([4, 5, 2])[:B]

    def every_state(x):
        """[L * D, T, B, ...] of each state, zeros past the lengths."""
        if layout == "unbatched":
            output, after, states = layer(x[:, 0], resets=resets[:, 0], lengths=lengths[0], all_states=True)
            states = [each.unsqueeze(2) for each in (states if isinstance(states, tuple) else (states,))]
            return output.unsqueeze(1), after, states
        if layout == "packed":
            given, marks = (pack_padded_sequence(each, lengths, enforce_sorted=False) for each in (x, resets))
            output, after, states = layer(given, resets=marks, all_states=True)
            states = [
                torch.stack([pad_packed_sequence(output._replace(data=rows), total_length=T)[0] for rows in each])
                for each in (states if isinstance(states, tuple) else (states,))
            ]
            return pad_packed_sequence(output, total_length=T)[0], after, states
        if layout == "batch":
            output, after, states = layer(x.transpose(0, 1), resets=resets.T, lengths=lengths, all_states=True)
            states = [each.transpose(1, 2) for each in (states if isinstance(states, tuple) else (states,))]
            return output.transpose(0, 1), after, states
        output, after, states = layer(x, resets=resets, lengths=lengths, all_states=True)
        return output, after, list(states) if isinstance(states, tuple) else [states]

    output, after, states = every_state(x)
    after = list(after) if isinstance(after, tuple) else [after]
    torch.testing.assert_close(output, torch.cat((states[0][2], states[0][3]), -1))  # of the upper layer's directions
    assert len(states) == len(after)
    for each, last in zip(states, after):
        last = last.unsqueeze(1) if layout == "unbatched" else last
        for b, length in enumerate(lengths):
            torch.testing.assert_close(each[::2, length - 1, b], last[::2, b])
            torch.testing.assert_close(each[1::2, 0, b], last[1::2, b])
            assert each[:, length:, b].abs().sum() == 0
    # the lower layer's forward direction knows nothing of later steps
    if layout == "time":
        for t in (0, 2):
            _, ends = layer(x[: t + 1], resets=resets[: t + 1])
            for each, end in zip(states, ends if isinstance(ends, tuple) else (ends,)):
                torch.testing.assert_close(each[0, t, lengths > t], end[0, lengths > t])
    # gradients: by finite differences, of the first and of the second order
    x.requires_grad_()
    draws = [torch.randn_like(each) for each in states]

    def weighed(x):
        output, _, states = every_state(x)
        return (output.sum() + sum((each * draw).sum() for each, draw in zip(states, draws))).sin()

    assert torch.autograd.gradcheck(weighed, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(weighed, (x,), fast_mode=True)


@every_mark
@pytest.mark.parametrize("project", [0, 3])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_all_states_in_the_kernels(make_layer, poison, form, project, marks, monkeypatch):
    """Those of every step's c, alone and beside others, with the same bits on each team."""
    monkeypatch.setattr(ops, "backward_of_states", None)  # the torch operations that other calls take
    inputs, weights, layer = make(make_layer, "lstm", form, project, marks, (9, 7, 3, 19))

    def plain(inputs, weights, layer):
        y, h_n, c_n, saved = reference.layer_forward(inputs, weights, layer, True)
        return y, h_n, c_n, reference.carried_states(inputs, layer, saved)

    def gradients_by(run, alone):
        x, h, c, *own = (each.detach().clone().requires_grad_() for each in (inputs.x, inputs.h0, inputs.c0, *weights))
        outputs = run(inputs._replace(x=x, h0=h, c0=c), own, layer)[3 if alone else 0 :]
        draw = torch.Generator().manual_seed(1)
        outer = [torch.randn(each.shape, generator=draw, dtype=torch.float64) for each in outputs]
        return torch.autograd.grad(outputs, [x, h, c, *own], outer, allow_unused=True, materialize_grads=True)

    for alone in (False, True):
        expected = gradients_by(plain, alone)
        with threads(1):
            found = gradients_by(autograd.run_states, alone)
        with threads(3):
            again = gradients_by(autograd.run_states, alone)
        names = names_of(layer, inputs)
        close(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))
        for name, one, other in zip(names, found, again, strict=True):
            same_bits(one, other, name)


def test_all_states_elsewhere():
    """Without a gradient, in half precision, compiled, mapped, and of the function."""
    layer, x = fastrnn.LSTM(3, 4, 2), torch.randn(5, 2, 3)
    resets = torch.rand(5, 2) < 0.3
    expected = layer(x, resets=resets, all_states=True)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, resets=resets, all_states=True), expected)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, resets=resets, all_states=True), expected)
    mapped = torch.func.vmap(lambda x: layer(x, all_states=True))(torch.stack((x, x.cos())))
    torch.testing.assert_close(mapped[2][1][0], layer(x, all_states=True)[2][1])
    _, _, (h, c) = layer.bfloat16()(x.bfloat16(), resets=resets, all_states=True)
    assert h.dtype == c.dtype == torch.bfloat16
    torch.testing.assert_close(c.float(), expected[2][1], rtol=5e-2, atol=5e-2)
    with pytest.raises(TypeError, match="all_states: expected a bool, got 1"):
        layer(x, all_states=1)
    with pytest.raises(TypeError, match=r"LSTM.forward\(\) got an unexpected keyword argument 'reset'"):
        layer(x, reset=resets)
    found = layer(x.bfloat16(), resets=None, lengths=None, all_states=False)
    torch.testing.assert_close(found, layer(x.bfloat16()))
    w_ih, w_hh = torch.randn(1, 12, 3), torch.randn(1, 12, 4)
    y, _, c_n, (h, c) = fastrnn.functional.layer(
        x, torch.zeros(1, 2, 4), cell="gru", w_ih=[*w_ih], w_hh=[*w_hh], all_states=True
    )
    assert torch.equal(h[0], y) and c is None and c_n is None
