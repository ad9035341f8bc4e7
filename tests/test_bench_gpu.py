"""The benchmark of GPUs without one: its points, its command line, its peers, and what it makes of times."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from contract import relative
from torch import nn

pytest.importorskip("triton", reason="triton is not installed")

from bench import gpu, gpu_peers  # which import triton

CELLS = ("LSTM", "GRU", "RNN")


def test_points_have_the_shapes_that_others_measure():
    points = list(gpu.points())
    names = [point.name for point in points]
    assert len(names) == len(set(names))
    for name in (
        "flashrnn LSTM bf16 H768 B16 T1024",
        "deepbench LSTM fp16 H256 B16 T150",
        "deepbench GRU tf32 H2816 B32 T187",
        "deepbench RNN fp16 H1760 B32 T50",
        "bonito LSTM fp16 H384 B64 T1600 L5",
    ):
        assert name in names
    assert {point.format for point in points} == set(gpu.FORMATS) == set(gpu.TOLERANCE)


def test_the_command_line(capsys, monkeypatch):
    assert gpu.parse([]).peers == []
    options = gpu.parse(["--peers", "torch,loop,flashrnn", "--only", "^bonito", "--seconds", "0.3"])
    assert (options.peers, options.only, options.seconds) == (["loop", "flashrnn"], "^bonito", 0.3)
    with pytest.raises(SystemExit):
        gpu.parse(["--peers", "torch,haste"])
    assert "argument --peers: expected of torch, torchrl, loop, flashrnn, got haste" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1 and capsys.readouterr().err == "bench.gpu: no GPU here\n"


def test_a_peer_that_is_not_there_is_left_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = gpu_peers.present(["torchrl", "loop", "flashrnn"])
    assert found == (["loop"], {"torchrl": "torchrl is not installed", "flashrnn": "flashrnn is not installed"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda *given, **more: None)
    found = gpu_peers.present(["torchrl", "loop", "flashrnn"])
    assert found == (["torchrl", "loop"], {"flashrnn": "there is no nvcc to compile its kernels with"})


def _flashrnn(inputs, recurrent, biases, *, function, backend, dtype):
    """What the package computes, by its documentation: gates i, f, z, o of an LSTM; n, r, z and a second n of a GRU."""
    B, T, G, heads, H = inputs.shape
    assert recurrent.shape == (G, heads, H, H) and biases.shape == (G + (function == "gru"), heads, H) and heads == 1
    assert (backend, dtype) == ("cuda_fused", "float32")
    h = c = inputs.new_zeros(B, H)
    states = []
    for t in range(T):
        a = torch.einsum("bk,ghdk->bghd", h, recurrent)[:, :, 0]
        x, b = inputs[:, t, :, 0], biases[:, 0]
        if function == "gru":
            r, z = (x[:, 0] + a[:, 1] + b[1]).sigmoid(), (x[:, 1] + a[:, 2] + b[2]).sigmoid()
            h = z * h + (1 - z) * (x[:, 2] + b[3] + r * (a[:, 0] + b[0])).tanh()
        elif function == "lstm":
            i, f, g, o = (x + a + b).unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            h = (x + a + b)[:, 0].tanh()
        states.append(torch.stack((h, c))[:, :, None])  # [states, B, heads, H]
    return torch.stack(states, 2), None


def _torchrl(x, *given, input_precision):
    """lstm_triton and gru_triton, by their documentation: states of each step, which only resets read but for the first."""
    *states, w_ih, w_hh, b_ih, b_hh, resets = given
    B, T, I = x.shape
    assert resets.shape == (B, T) and resets.dtype is torch.bool and input_precision in ("ieee", "none", "tf32")
    H = w_hh.shape[1]
    assert not resets.any() and all(state.shape == (B, T, H) and not state.any() for state in states)
    module = {2: nn.LSTM, 1: nn.GRU}[len(states)](I, H, batch_first=True)
    weights = dict(zip(dict(module.named_parameters()), (w_ih, w_hh, b_ih, b_hh), strict=True))
    return torch.func.functional_call(module, weights, (x,))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", gpu_peers.PEERS)
def test_a_peer_computes_what_torch_does(name, cell, monkeypatch):
    """Two layers; what a GPU would compute is computed by what the packages say of themselves."""
    peer = gpu_peers.PEERS[name]
    if cell not in peer.cells:
        assert peer.leaves(cell, "tf32", 1, False) == "it has LSTM, GRU in tf32, fp32"
        return
    monkeypatch.setitem(sys.modules, "flashrnn", SimpleNamespace(flashrnn=_flashrnn))
    kernels = SimpleNamespace(_rnn_triton=SimpleNamespace(lstm_triton=_torchrl, gru_triton=_torchrl))
    monkeypatch.setitem(sys.modules, "torchrl.modules.tensordict_module", kernels)
    for parent in ("torchrl", "torchrl.modules"):
        monkeypatch.setitem(sys.modules, parent, SimpleNamespace())
    monkeypatch.setattr(torch, "compile", lambda step, **given: step)
    torch.manual_seed(0)
    module, x = getattr(nn, cell)(6, 6, 2), torch.randn(5, 3, 6, requires_grad=True)
    leaves = {"x": x, **dict(module.named_parameters())}
    expected, found = module(x)[0], peer.stack(module)(x)
    assert relative(found.detach().double(), expected.detach().double()) < 1e-6
    dy = torch.randn_like(expected)
    gradients = (torch.autograd.grad(y, list(leaves.values()), dy) for y in (found, expected))
    for leaf, ours, theirs in zip(leaves, *gradients, strict=True):
        assert relative(ours.double(), theirs.double()) < 1e-5, leaf


@pytest.fixture
def here(monkeypatch):
    """The benchmark on CPU tensors; a call takes 3 ms, of which the device works 2 and the host 1."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "set_precision", lambda precision: None)
    monkeypatch.setattr(gpu.Subject, "peak_bytes", lambda self: 7)
    monkeypatch.setattr(torch, "compile", lambda step, **given: step)

    def timed(run, busy=0.0):
        run()
        assert busy in (0.0, 1e-3)  # what the host takes
        return (2e-3 if busy else 3e-3), 1e-3

    monkeypatch.setattr(gpu, "timed", timed)


def test_host_time_and_device_time_stand_apart(here):
    result = gpu.measure(gpu.Point("odd", "GRU", 5, 3, 4, "fp32"), 0.01, ["loop", "flashrnn"])
    assert result["faults"] == [] and result["left_out"] == {"flashrnn": "it has LSTM, GRU, RNN in fp16, bf16"}
    for mode in ("forward", "train"):
        found = result[mode]
        rivals = {"fastrnn", "torch", "loop"}
        assert rivals == found["times"].keys() == found["us_a_step"].keys() == result["peak_bytes"].keys()
        assert all(found["host_us"][name] == pytest.approx(1000) for name in rivals)
        assert all(found["device_us"][name] == pytest.approx(2000) for name in rivals)
        assert found["times"]["loop"]["median"] == 3e-3 and found["us_a_step"]["loop"] == pytest.approx(750)
    text = gpu.line(result)
    assert "forward 1.00x (us a step: fastrnn 750.00, torch 750.00, loop 750.00; a call of fastrnn: 1000 us of the host" in text
    assert "2000 of the device)" in text and "flashrnn left out: it has LSTM, GRU, RNN in fp16, bf16" in text


def test_a_peer_that_computes_something_else_is_left_out(here, monkeypatch):
    point = gpu.Point("odd", "LSTM", 5, 3, 4, "fp32")
    expected = gpu.Subject(point, nn).results()

    def scaled(cell, weights):
        run = gpu_peers._loop(cell, weights)
        return lambda x: 1.5 * run(x)

    def broken(cell, weights):
        raise RuntimeError("no kernel\nfor this shape")

    for layer, reason in ((scaled, "y differs by 0.5, x differs by 0.5"), (broken, "RuntimeError: no kernel for this shape")):
        monkeypatch.setitem(gpu_peers.PEERS, "other", gpu_peers.Peer(lambda: None, ("LSTM",), ("fp32",), layer))
        found = gpu.peer_of("other", point, expected)
        assert isinstance(found, str) and found.startswith(reason)
    two_way = gpu.Point("odd", "LSTM", 5, 3, 4, "fp32", directions=2)
    assert gpu.peer_of("loop", two_way, expected) == "it has one direction and dense input"
    assert isinstance(gpu.peer_of("loop", point, expected), gpu.Subject)
