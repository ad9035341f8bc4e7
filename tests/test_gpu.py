"""The Triton engine on a GPU: the kernels' own tests again, the barrier, and what only a device has."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import triton_layers
from contract import CELLS, Case, Error, arguments, relative, run, same_bits, twins
from test_triton import FLOAT32, LAYERS, OWN_LAYERS, STACKS
from torch.nn.utils.rnn import PackedSequence
from triton_layers import Layer

import fastrnn
from fastrnn import dispatch
from fastrnn.kernels import gpu
from fastrnn.kernels.gpu import selftest
from fastrnn.kernels.gpu.launch import Alarm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part:UserWarning"),  # torch.nn's own, in bfloat16
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),  # in torch 2.11
]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """The engine takes calls, too, that it would leave to cuDNN, with every schedule, whatever the self-test finds."""
    monkeypatch.setattr(gpu, "asked", "1")
    monkeypatch.setattr(dispatch, "forced", "triton")


def _target():
    return gpu.device_of(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("layer", [*LAYERS, *OWN_LAYERS, *STACKS], ids=str)
def test_kernels(layer):
    assert triton_layers.faults(layer, "cuda", _target()) == []


def test_elementary_functions():
    """PTX's own 2^x and 1/x: two more units in the last place than what the interpreter tests."""
    errors = triton_layers.elementary_errors("cuda")
    bounds = {name: 6 if name != "sigmoid -1" else 90 for name in errors}  # test_triton.py says why
    assert {name: e for name, e in errors.items() if e > bounds[name] * torch.finfo(F32).eps} == {}


CASES = [
    Case("lstm", 33, 100, batch=5, steps=9, dtype=F32),
    Case("lstm", 128, 768, batch=16, steps=40, dtype=F16),
    Case("lstm", 64, 512, layers=2, bidirectional=True, batch=33, steps=20, dtype=BF16),
    Case("lstm", 40, 96, proj_size=31, bidirectional=True, batch=7, steps=12, dtype=F32),
    Case("gru", 96, 1000, batch=20, steps=25, dtype=BF16),
    Case("gru", 17, 65, layers=2, layout="packed", batch=19, steps=30, dtype=F32),
    Case("gru", 256, 256, layout="batch", batch=200, steps=10, dtype=F16),
    Case("rnn_tanh", 50, 300, layout="unsorted", batch=40, steps=30, bidirectional=True, dtype=F16),
    Case("rnn_relu", 5, 33, layout="unbatched", steps=50, dtype=F16),
    Case("lstm", 64, 2048, batch=64, steps=8, dtype=F16),
    Case("lstm", 64, 640, batch=300, steps=8, layout="packed", dtype=BF16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case):
    """Every tensor's error within 2 times cuDNN's own at the same dtype, and 4 eps; of float32 one eps of TF32.

    cuDNN takes TF32 for some sizes only, and float32 itself for the others.
    """
    slack = 4 * torch.finfo(case.dtype).eps if case.dtype is not F32 else 2**-10
    errors: dict[str, tuple[Error, Error]] = {}
    for seed in range(4):
        stock, ours = twins(case, seed)
        sample = case.sample(seed)
        truth = run(copy.deepcopy(stock).double(), case, sample.to(torch.float64))
        theirs, mine = (run(module.cuda(), case, sample.to("cuda")) for module in (stock, ours))
        given = arguments(case, sample.to("cuda").x, sample.to("cuda").states, sample.lengths)
        assert fastrnn.explain(ours, *given).engine == "triton"
        for name, value in truth.items():
            pair = errors.setdefault(name, (Error(), Error()))
            for error, found in zip(pair, (theirs[name], mine[name])):
                error.add(found.cpu(), value)
    wrong = {
        name: (ours.relative, stock.relative)
        for name, (stock, ours) in errors.items()
        if not ours.relative <= 2 * stock.relative + slack
    }
    assert not wrong, f"ours, cuDNN's: {wrong}"


@pytest.mark.parametrize("layer", FLOAT32, ids=str)
def test_float32_by_three_products_of_tensor_cores(layer):
    """As exact as float32's own."""
    assert triton_layers.faults(layer, "cuda", _target()) == []


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_autocast(cell, dtype):
    """Dtypes of results and gradients are torch.nn's, with a GradScaler too."""
    stock = getattr(torch.nn, cell)(24, 96, 2, device="cuda")
    ours = getattr(fastrnn, cell)(24, 96, 2, device="cuda")
    ours.load_state_dict(stock.state_dict())
    x, found = torch.randn(7, 5, 24, device="cuda"), []
    for module in (stock, ours):
        leaf, scaler = x.clone().requires_grad_(), torch.amp.GradScaler("cuda", init_scale=1024.0)
        with torch.autocast("cuda", dtype):
            y, state = module(leaf)
            loss = y.float().square().mean()
        scaler.scale(loss).backward()
        states = state if cell == "LSTM" else (state,)
        found.append([y.detach(), *(each.detach() for each in states), leaf.grad, *(p.grad for p in module.parameters())])
    for theirs, mine in zip(*found, strict=True):
        assert mine.dtype is theirs.dtype and relative(mine.double(), theirs.double()) < 2e-2


def test_float64_is_right_and_differentiable_twice(monkeypatch):
    monkeypatch.setattr(dispatch, "forced", None)
    module = fastrnn.GRU(3, 4, device="cuda", dtype=torch.float64)
    x = torch.randn(3, 2, 3, device="cuda", dtype=torch.float64, requires_grad=True)
    assert fastrnn.explain(module, x).engine == "torch"
    monkeypatch.setattr(dispatch, "forced", "triton")
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))
    torch.testing.assert_close(module(x)[0], torch.compile(module, fullgraph=True)(x)[0])


def test_what_cudnn_is_faster_at_is_left_to_it(monkeypatch):
    monkeypatch.setattr(dispatch, "forced", None)
    small, large = (fastrnn.RNN(5, H, device="cuda", dtype=F16) for H in (64, 640))
    x = torch.randn(9, 3, 5, device="cuda", dtype=F16)
    explanation = fastrnn.explain(small, x)
    assert explanation.engine == "torch" and "cuDNN is faster" in explanation.declined["triton"]
    assert fastrnn.explain(large, x).engine == "triton"
    assert fastrnn.explain(fastrnn.LSTMCell(5, 640, device="cuda", dtype=F16), x[0]).engine == "torch"


# --- the barrier


def test_selftest():
    """Every schedule passes, with margin: a wrong result is far from what float16 rounds to."""
    assert selftest.run(torch.device("cuda", torch.cuda.current_device())) == ({}, True)


@pytest.mark.skipif(bool(torch.version.hip) or dispatch.native is None, reason="needs CUDA and the compiled runtime")
def test_the_third_call_is_replayed(monkeypatch):
    """Python runs the first two of each pass, and records the second."""
    from fastrnn.kernels.gpu import layer, tape

    passes, ran = {name: getattr(layer, name) for name in ("forward", "backward")}, []
    for name, own in passes.items():
        monkeypatch.setattr(layer, name, lambda *given, name=name, own=own: (ran.append(name), own(*given))[1])
    tape.forget()
    module, truth = fastrnn.LSTM(16, 256, device="cuda"), torch.nn.LSTM(16, 256, device="cuda", dtype=torch.float64)
    truth.load_state_dict(module.state_dict())
    for _ in range(4):
        x = torch.randn(9, 3, 16, device="cuda", requires_grad=True)
        wide = x.detach().double().requires_grad_()
        y, right = module(x)[0], truth(wide)[0]
        (dx,), (right_dx,) = (torch.autograd.grad(out.sum(), leaf) for out, leaf in ((y, x), (right, wide)))
        assert relative(y.detach().double(), right.detach()) < 1e-2 and relative(dx.double(), right_dx) < 1e-2
    assert ran == ["forward", "backward"] * 2


def test_programs_that_do_not_meet_give_up():
    """Two meet, of which one waits for a third: the launch ends, and says so."""
    from fastrnn.kernels.gpu.barrier import meet

    device = torch.device("cuda", torch.cuda.current_device())
    counter, gave_up = torch.zeros(16, dtype=torch.int64, device=device), Alarm(device)
    stored, wrong = torch.zeros(2, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    counter[0] = -1
    meet[(2,)](counter, stored, wrong, gave_up.word, 1, 1 << 16, launch_cooperative_grid=True)
    torch.cuda.synchronize()
    assert gave_up.rang() and not gave_up.rang()


LONG = [
    Layer("lstm", "resident", 0, dtype=F16, sizes=(2000, 16, 16, 768)),
    Layer("gru", "resident", 0, directions=2, layout="packed", dtype=BF16, sizes=(1000, 30, 16, 500)),
    Layer("rnn_tanh", "split", 0, reverse=True, dtype=F16, sizes=(3000, 16, 16, 1000)),
    Layer("lstm", "wide", 0, project=False, directions=2, dtype=F16, sizes=(1000, 64, 16, 512)),
    Layer("lstm", "split", 0, project=True, dtype=F32, sizes=(500, 20, 16, 300)),
    Layer("slstm", "resident", 0, heads=4, dtype=F16, sizes=(500, 16, 16, 192)),  # a barrier for each head
    Layer("peephole_lstm", "wide", 0, heads=2, directions=2, dtype=BF16, sizes=(500, 40, 16, 500)),
]


@pytest.mark.parametrize("layer", LONG, ids=str)
def test_a_persistent_launch_has_the_bits_of_one_launch_a_step(layer, monkeypatch):
    """The same arithmetic in the same order; what differs is how programs wait for each other. 50 runs."""
    target = _target()
    plan = Layer.plan
    assert plan(layer, True, target, False).schedule == "persistent"
    kernels = triton_layers.kernels(layer, "cuda", target)
    persistent = kernels()
    for _ in range(50):
        same_bits(kernels(), persistent, "run to run")
    monkeypatch.setattr(Layer, "plan", lambda self, *given: replace(plan(self, *given), schedule="stepwise"))
    same_bits(triton_layers.kernels(layer, "cuda", target)(), persistent, "stepwise")


DEEP = [
    Layer("lstm", "resident", 0, layers=4, dtype=F16, sizes=(1000, 32, 16, 512)),
    Layer("gru", "resident", 0, layers=3, layout="packed", dtype=BF16, sizes=(1000, 30, 16, 250)),
    Layer("rnn_tanh", "resident", 0, layers=2, reverse=True, marks="both", dtype=F16, sizes=(1000, 60, 16, 640)),
]


@pytest.mark.parametrize("layer", DEEP, ids=str)
def test_a_wavefront_has_the_same_bits_from_run_to_run(layer):
    """Whichever layer is ahead of which. 50 runs; the first is right."""
    assert triton_layers.faults(layer, "cuda", _target()) == []
    kernels = triton_layers.kernels(layer, "cuda", _target())
    expected = kernels()
    for _ in range(50):
        same_bits(kernels(), expected, "run to run")


def test_other_work_on_the_device():
    """A cooperative launch beside streams that keep every multiprocessor busy: it waits for room, and returns."""
    module = fastrnn.LSTM(768, 768, device="cuda", dtype=F16)
    x = torch.randn(200, 16, 768, device="cuda", dtype=F16)
    expected = module(x)[0]
    streams = [torch.cuda.Stream() for _ in range(4)]
    big = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    outputs = []
    for _ in range(10):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if index % 2:
                    torch.mm(big, big)
                else:
                    outputs.append(module(x)[0])
    torch.cuda.synchronize()
    for output in outputs:
        same_bits(output, expected)


# --- sizes


@pytest.mark.parametrize("cell", CELLS)
def test_200_000_steps(cell):
    layer = Layer(cell, "single", dtype=F32, sizes=(200_000, 2, 3, 16))
    found = triton_layers.kernels(layer, "cuda", _target())()
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("cell", CELLS)
def test_100_000_rows(cell):
    module = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU}.get(cell, fastrnn.RNN)(8, 32, device="cuda")
    x = torch.randn(6, 100_000, 8, device="cuda", requires_grad=True)
    y, _ = module(x)
    y.sum().backward()
    rows = [0, 1, 31_337, 99_999]
    alone = x[:, rows].detach().requires_grad_()
    expected, _ = module(alone)
    expected.sum().backward()
    assert relative(y.detach()[:, rows], expected.detach()) < 1e-3  # TF32
    assert relative(x.grad[:, rows], alone.grad) < 1e-3


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31():
    """T * B * 5 * H passes it in what is saved."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB")
    module = fastrnn.LSTM(16, 256, device="cuda", dtype=F16)
    x = torch.randn(1100, 2000, 16, device="cuda", dtype=F16)
    y, _ = module(x)
    y[-1].sum().backward()
    rows = [0, 1999]
    assert relative(y.detach()[-5:, rows], module(x[:, rows])[0].detach()[-5:]) < 1e-2
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


# --- a device's own


@pytest.mark.parametrize("form", ["dense", "marked", "packed"])
def test_graph_capture(form):
    """With lengths and resets too, which a graph reads when it runs, and packed, whose lengths it holds."""
    module = fastrnn.GRU(128, 512, device="cuda", dtype=F16)
    x = torch.randn(50, 16, 128, device="cuda", dtype=F16, requires_grad=True)
    lengths, marks, given = torch.arange(16, device="cuda") * 3, {}, x
    if form == "marked":
        marks = {"lengths": lengths, "resets": torch.rand(50, 16, device="cuda") < 0.1}
    if form == "packed":
        batch_sizes = torch.tensor([16] * 20 + [9] * 20 + [2] * 10)
        x = torch.randn(int(batch_sizes.sum()), 128, device="cuda", dtype=F16, requires_grad=True)
        given = PackedSequence(x, batch_sizes)

    def step():
        y, _ = module(given, **marks)
        y = y.data if form == "packed" else y
        return y.detach(), *torch.autograd.grad(y.sum(), [x, *module.parameters()])  # no graph stays, bound to a stream

    expected = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    lengths.add_(2)
    with torch.no_grad():
        x.mul_(0.5)
    expected = step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for found, value in zip(captured, expected):
        same_bits(found, value)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_own_device(monkeypatch):
    module = fastrnn.LSTM(16, 32, device="cuda:1")
    x = torch.randn(5, 3, 16, device="cuda:1", requires_grad=True)
    with torch.cuda.device(0):
        y, _ = module(x)
        y.sum().backward()
    assert x.grad.device == y.device == torch.device("cuda:1")
    monkeypatch.setattr(dispatch, "forced", None)
    assert relative(y.detach().cpu(), module.cpu()(x.detach().cpu())[0].detach()) < 1e-2  # TF32


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_second_derivatives_and_compiled(dtype):
    """What the kernels do not do themselves is the reference's there too; Dynamo sees the same operators."""
    torch.manual_seed(0)
    module = fastrnn.LSTM(5, 16, device="cuda", dtype=dtype)
    x = torch.randn(4, 3, 5, device="cuda", dtype=dtype, requires_grad=True)
    (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    plain = torch.nn.LSTM(5, 16, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    at = x.detach().double().cpu().requires_grad_()
    (first,) = torch.autograd.grad(plain(at)[0].square().sum(), at, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), at)
    assert relative(second.cpu(), expected) < (5e-3 if dtype is F32 else 5e-2)  # TF32 and bfloat16 products, twice
    same_bits(torch.compile(module, fullgraph=True)(x)[0], module(x)[0])


def test_peak_memory():
    """A training step needs no more than cuDNN's."""
    peaks = []
    for library in (torch.nn, fastrnn):
        module = library.LSTM(768, 768, device="cuda", dtype=F16)
        x = torch.randn(1024, 16, 768, device="cuda", dtype=F16, requires_grad=True)
        module(x)[0].sum().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        module(x)[0].sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= peaks[0], f"{peaks[1] / 2**20:.0f} MiB, cuDNN {peaks[0] / 2**20:.0f}"
