"""Half precision on a CPU: computed in float32, every result rounded once; and autocast."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch
from contract import CELLS, Case, arguments, assert_contract, cases, relative, run, same_bits, twins
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import dispatch

HALF = torch.float16, torch.bfloat16
GRID = {
    "cell": tuple(CELLS),
    "input_size": (1, 17, 64),
    "hidden_size": (1, 7, 33, 34, 64),  # kernels read matrices in bfloat16 where it is even
    "layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, False),
    "layout": ("time", "batch", "strided", "packed", "unsorted", "unbatched"),
    "batch": (1, 3, 17),
    "steps": (1, 7, 40),
    "hx": (True, False),
    "loss": ("all", "output", "h_n"),
    "grad": ("all", "input", "weights"),
    "proj_size": (0, 1, 18, 33),
}
both = pytest.mark.parametrize("dtype", HALF, ids=str)
torchs_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of code of its own


@pytest.mark.parametrize("case", cases({**GRID, "dtype": HALF}), ids=str)
def test_contract(case):
    assert_contract(case)


@torchs_warnings
@pytest.mark.parametrize("hidden", [33, 34])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_second_derivatives(name, hidden):
    """Of a layer whose kernels read bfloat16, and of one that is cast: as near as the type goes."""
    ours = getattr(fastrnn, name)(9, hidden, dtype=torch.bfloat16)
    truth = getattr(nn, name)(9, hidden, dtype=torch.float64)
    truth.load_state_dict(ours.state_dict())
    x, seconds = torch.randn(5, 3, 9).bfloat16(), []
    for module in (ours, truth):
        own = x.to(module.weight_hh_l0.dtype).clone().requires_grad_()
        first = torch.autograd.grad(module(own)[0].sum(), (own, module.weight_hh_l0), create_graph=True)
        seconds.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), (own, *module.parameters())))
    for found, expected in zip(*seconds, strict=True):
        assert found.dtype == torch.bfloat16
        assert relative(found, expected) < 4 * torch.finfo(torch.bfloat16).eps


@both
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name, dtype):
    ours = getattr(fastrnn, name)(9, 33, dtype=dtype)
    truth = copy.deepcopy(ours).double()
    x = torch.randn(5, 9).to(dtype).requires_grad_()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found, expected = ours(x), getattr(nn, name).forward(truth, x.double())
        for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected)), strict=True):
            assert one.dtype == dtype
            assert relative(one.detach(), other.detach()) < torch.finfo(dtype).eps / 2


@both
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell", "GRU"])
def test_autocast_of_what_is_carried(name, dtype):
    """Cells and GRU have torch.nn's dtypes whatever input and state have; LSTMCell's state is not rounded from step to step."""
    stock, ours = (getattr(library, name)(3, 4) for library in (nn, fastrnn))
    for x_dtype, state_dtype in itertools.product((torch.float32, dtype), (None, torch.float32, torch.bfloat16, torch.float16)):
        x = torch.randn((2, 3) if name.endswith("Cell") else (5, 2, 3)).to(x_dtype)
        state = None if state_dtype is None else torch.zeros((2, 4) if name.endswith("Cell") else (1, 2, 4), dtype=state_dtype)
        given = (state, state) if name == "LSTMCell" and state is not None else state
        with torch.autocast("cpu", dtype):
            found, expected = ([t.dtype for t in tree_leaves(module(x, given))] for module in (ours, stock))
        assert found == expected, (x_dtype, state_dtype)


def test_autocast_does_not_stall_a_cell():
    """A cell state that grows by a tenth a step: in bfloat16 it would stand still at 32."""
    cell, state = fastrnn.LSTMCell(1, 1), None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for parameter in cell.parameters():
            parameter.zero_()
        cell.bias_ih.copy_(torch.tensor([20.0, 20.0, 0.1, 20.0]))
        for _ in range(1000):
            state = cell(torch.zeros(1, 1), state)
    assert abs(float(state[1]) - 1000 * math.tanh(0.1)) < 0.1


@both
@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell, dtype):
    """torch.nn's dtypes in every mix of them, and the numbers of float32; gradients in the parameters' own dtype."""
    case = Case(cell, 9, 33, layers=2, steps=9)
    stock, ours = twins(case, 0)
    sample = case.sample(0)
    expected = run(stock, case, sample)
    with torch.autocast("cpu", dtype):
        found = run(ours, case, sample)
    for name, value in expected.items():
        cast = not name.startswith("d") and cell != "gru"
        assert found[name].dtype == (dtype if cast else torch.float32), name
        assert relative(found[name], value) < 4 * torch.finfo(dtype).eps, name  # layers, and gradients come in, rounded
    for x in (sample.x, sample.x.to(dtype)):
        with torch.autocast("cpu", dtype), torch.no_grad():
            try:
                like, like_state = stock(x)
                expected_dtypes = [t.dtype for t in (like, *like_state)]
            except RuntimeError as error:  # oneDNN's LSTM wants AVX-512 for half precision: what it gives there
                assert cell == "lstm" and "could not create a primitive" in str(error)
                expected_dtypes = [dtype] * 3
            for training in (False, True):
                y, state = ours.train(training)(x)
                assert [t.dtype for t in (y, *state)] == expected_dtypes


@torchs_warnings
def test_autocast_reaches_functional_transforms():
    """Inside them a layer is plain operations, which must not be cast a second time."""
    module = fastrnn.GRU(4, 5)
    x = torch.randn(3, 2, 4)
    expected = torch.func.jvp(lambda x: module(x)[0], (x,), (x,))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.func.jvp(lambda x: module(x)[0], (x,), (x,))
    torch.testing.assert_close(found, expected)


@torchs_warnings
@both
@pytest.mark.parametrize("cell", CELLS)
def test_compiled(cell, dtype):
    case = Case(cell, 9, 33, steps=9, dtype=dtype)
    _, ours = twins(case, 0)
    expected = run(ours, case, case.sample(0))
    torch._dynamo.reset()  # it allows a function, and forward is one for all modules, eight compilations
    ours.compile(fullgraph=True, backend="aot_eager")
    for name, value in run(ours, case, case.sample(0)).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@both
def test_step(dtype):
    """A stream: the same as the sequence, into tensors of the caller's too."""
    module = fastrnn.LSTM(9, 33, dtype=dtype)
    x = torch.randn(4, 2, 9).to(dtype)
    state = None
    for t in range(4):
        y, state = module.step(x[t], state)
    whole, _ = module(x)
    assert y.dtype == dtype
    assert relative(y, whole[-1].detach()) < 4 * torch.finfo(dtype).eps  # the state is rounded between steps
    out = torch.empty_like(y), tuple(torch.empty_like(s) for s in state)
    assert module.step(x[0], state, out=out)[0] is out[0]
    torch.testing.assert_close(out[0], module.step(x[0], state)[0])


@pytest.mark.parametrize("steps", [1, 7, 40])
@pytest.mark.parametrize("batch", [1, 5, 17])
@pytest.mark.parametrize("case", [Case(cell, 17, 34, layers=2, bidirectional=True) for cell in CELLS] + [
    Case("lstm", 9, 33, proj_size=18, bias=False, layout="batch"), Case("gru", 300, 258, layout="packed"),
    Case("rnn_tanh", 130, 65),
], ids=str)  # fmt: skip
def test_compressed(case, batch, steps):
    """To the bit what float32 gives over rounded weights; with gradients too, to x and to the weights as they are.

    But for a single step, which takes numbers in bfloat16 in pairs, and for tiles: they sum in another order, and backward
    multiplies 16 bits of a gradient there.
    """
    case = dataclasses.replace(case, batch=batch, steps=steps)
    _, ours = twins(case, 0)
    for name, parameter in ours.named_parameters():
        if name.startswith("weight"):
            parameter.data = parameter.data.bfloat16().float()
    small = fastrnn.compress(copy.deepcopy(ours))
    assert {p.dtype for p in small.parameters() if p.dim() == 2} == {torch.bfloat16}
    sample = case.sample(0)
    given = arguments(case, sample.x, sample.states, sample.lengths)
    explanation = fastrnn.explain(small, *given)
    assert explanation.engine == "cpu"
    in_tiles = "in tiles" in str(explanation)
    same = same_bits if steps > 1 and not in_tiles else nearly_the_same
    with torch.no_grad():
        same(*(_flat(module(*given)) for module in (small, ours)))
    found, expected = run(small, case, sample), run(ours, case, sample)
    for name, value in expected.items():
        gradient_in_tiles = in_tiles and name.startswith("d")
        check = functools.partial(nearly_the_same, bound=2**-16) if gradient_in_tiles else same
        check(found[name], value.to(found[name].dtype), name)
    same_bits(_flat(small.float()(*given)), _flat(ours(*given)))


def nearly_the_same(found, expected, name="", bound=1e-6):
    """Rounding of float32 apart, or another bound; or rounding of bfloat16 where sums have been rounded to it."""
    for key in expected if isinstance(expected, dict) else [None]:
        one, other = (found, expected) if key is None else (found[key], expected[key])
        assert relative(one, other) < (bound if one.dtype == torch.float32 else 2**-9), f"{name}{key}"


def _flat(result) -> dict[str, torch.Tensor]:
    output, state = result
    data = output.data if isinstance(output, PackedSequence) else output
    states = state if isinstance(state, tuple) else (state,)
    return {f"{index}": value.detach() for index, value in enumerate((data, *states))}


@pytest.mark.parametrize("steps", [1, 7, 900])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_same_bits_without_gradients(name, options, steps):
    """Which take another way, for few numbers a native one."""
    module = getattr(fastrnn, name)(9, 34, dtype=torch.bfloat16, **options)
    x = torch.randn(steps, 3, 9, dtype=torch.bfloat16)
    x[0, 0, 0] = torch.nan
    depth = module.num_layers * (1 + module.bidirectional)
    h, c = torch.randn(2, depth, 3, 34, dtype=torch.bfloat16)
    state = (h, c) if name == "LSTM" else h
    expected, last = module(x, state)
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)  # a NaN may have other bits
    with torch.no_grad():
        found, found_last = module(x, state)
        same(found, expected)
        for one, other in zip(*(s if name == "LSTM" else (s,) for s in (found_last, last)), strict=True):
            same(one, other)
        if steps == 1 and not module.bidirectional:
            same(module.step(x[0], state)[0], expected[0])


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_compressed_cells(name):
    cell = getattr(fastrnn, name)(9, 34)
    small = fastrnn.compress(copy.deepcopy(cell))
    x = torch.randn(5, 9)
    for parameter in cell.parameters():
        parameter.data = parameter.data.bfloat16().float() if parameter.dim() == 2 else parameter.data
    with torch.no_grad():
        for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (small(x), cell(x))), strict=True):
            nearly_the_same(one, other)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_compressed_where_another_engine_runs(name, backend, monkeypatch):
    """It gets the weights in float32."""
    monkeypatch.setattr(dispatch, "forced", backend)
    monkeypatch.setattr(dispatch, "native", dispatch.native if backend is None else None)
    module = fastrnn.compress(getattr(fastrnn, name)(4, 6, 2))
    wide, x = copy.deepcopy(module).float(), torch.randn(5, 2, 4)
    lengths = torch.tensor([5, 3])
    for given in (x, pack_padded_sequence(x, lengths)):
        torch.testing.assert_close(_flat(module(given)), _flat(wide(given)))
    cells = fastrnn.compress(getattr(fastrnn, f"{name}Cell")(4, 6))
    torch.testing.assert_close(cells(x[0]), copy.deepcopy(cells).float()(x[0]))
    if backend == "reference":  # which is plain operations and takes, or refuses, what they do
        return
    assert module(torch.randn(5, 0, 4))[0].shape == (5, 0, 6)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=r"does not match compressed weights, which take torch.float32"):
            module(x.to(dtype))


def test_compressed_on_another_device():
    """There torch.nn's path runs, in float32."""
    for name in ("RNN", "LSTM", "GRU"):
        module = fastrnn.compress(getattr(fastrnn, name)(4, 6)).to("meta")
        y, _ = module(torch.randn(5, 2, 4, device="meta"))
        assert (y.shape, y.dtype, y.device.type) == ((5, 2, 6), torch.float32, "meta")


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated", "ignore::torch.jit.TracerWarning")
def test_compressed_is_traced():
    module, x = fastrnn.compress(fastrnn.GRU(4, 6)), torch.randn(5, 2, 4)
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


def test_compression_is_read_as_it_is():
    """No copy in float32 is made of large weights, in a sequence or a step; and what is not float32 is left alone."""
    module = fastrnn.compress(fastrnn.GRU(8, 512))
    x = torch.randn(3, 1, 8)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True, acc_events=True) as seen:
        module(x)
        module.step(x[0], None)
    assert "aten::_to_copy" not in {event.name for event in seen.events()}
    with torch.profiler.profile(record_shapes=True, acc_events=True) as seen:
        module(x)[0].sum().backward()
    copied = [event.input_shapes for event in seen.events() if event.name == "aten::_to_copy"]
    assert not any(shapes and len(shapes[0]) == 2 for shapes in copied), copied
    double = fastrnn.compress(fastrnn.LSTM(3, 4, dtype=torch.float64))
    assert {p.dtype for p in double.parameters()} == {torch.float64}


def test_the_error_of_compression():
    """As docs/performance.md states it: of weights and of a layer's outputs, relative L2."""
    torch.manual_seed(0)
    module = fastrnn.LSTM(256, 256)
    small = fastrnn.compress(copy.deepcopy(module))
    x = torch.randn(100, 4, 256)
    with torch.no_grad():
        assert relative(small.weight_hh_l0.float(), module.weight_hh_l0) < 2**-9
        assert 1e-4 < relative(small(x)[0], module(x)[0]) < 2e-3
