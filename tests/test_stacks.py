"""Layers on top of each other that run at the same time: the same bits as one after the other."""

import pytest
import torch
from contract import same_bits, threads
from torch import nn

import fastrnn
from fastrnn.kernels import cpu

OPTIONS = [
    ("LSTM", {}),
    ("LSTM", {"batch_first": True, "bias": False}),
    ("LSTM", {"proj_size": 9}),
    ("GRU", {}),
    ("GRU", {"dtype": torch.float64}),
    ("RNN", {"nonlinearity": "relu"}),
]


def at_once(module, x):
    """Are all layers of this call said to run at once?"""
    schedule = fastrnn.explain(module, x).schedule
    return all("at the same time" in line for line in schedule) and len(schedule) == module.num_layers


def results(module, x, state=None):
    y, last = module(x, state)
    return {"y": y} | {f"state {i}": part for i, part in enumerate(last if isinstance(last, tuple) else (last,))}


@pytest.mark.parametrize("layers", [2, 3, 5])
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
@torch.no_grad()
def test_same_bits(name, options, layers, poison):
    module = getattr(fastrnn, name)(37, 33, layers, **options).eval()
    dtype = module.weight_ih_l0.dtype
    found = 0
    for batch in (1, 3):
        for steps in (2, 9, 80, 500):
            x = torch.randn(steps, batch, 37, dtype=dtype)
            x = x.transpose(0, 1).contiguous() if module.batch_first else x
            states = [torch.randn(layers, batch, size, dtype=dtype) for size in (module.proj_size or 33, 33)]
            for state in (None, tuple(states) if name == "LSTM" else states[0]):
                with threads(1):
                    expected = results(module, x, state)
                    assert not at_once(module, x)
                for count in (2, 3, 8):
                    with threads(count):
                        found += at_once(module, x)
                        same_bits(results(module, x, state), expected, f"B {batch} T {steps}, {count} threads:")
    assert found >= 8


@torch.no_grad()
def test_blocks_shorter_than_the_sequence_allows():
    """Pre-activations have to stay in L2."""
    module = fastrnn.LSTM(64, 64, 2)
    x = torch.randn(3000, 4, 64)
    with threads(2):
        assert at_once(module, x)
        found = results(module, x)
    with threads(1):
        same_bits(found, results(module, x))


@torch.no_grad()
def test_crews_of_several_threads():
    module, x = fastrnn.GRU(100, 128, 2), torch.randn(100, 1, 100)
    with threads(1):
        expected = results(module, x)
    with threads(8):
        for line in fastrnn.explain(module, x).schedule:
            assert "at the same time" in line and "4 x units" in line
        same_bits(results(module, x), expected)


@torch.no_grad()
def test_frozen():
    module = fastrnn.GRU(20, 40, 2).eval()
    x = torch.randn(100, 1, 20)
    with threads(2):
        expected = results(module, x)
        frozen = fastrnn.freeze(module)
        assert at_once(frozen, x)
        same_bits(results(frozen, x), expected)


def test_what_runs_one_after_the_other():
    """What has no native call of its own, what cannot, and what is faster so."""
    small, x = fastrnn.LSTM(64, 64, 2), torch.randn(100, 1, 64)
    packed = nn.utils.rnn.pack_sequence([x[:, 0]])
    with threads(2):
        assert not at_once(small, x)  # gradients
        with torch.no_grad():
            assert at_once(small, x)
            assert not at_once(small, packed)
            assert not at_once(small, x[:1])
            assert not at_once(small, x[:, 0])
            assert not at_once(fastrnn.LSTM(64, 64, 2, dtype=torch.float16), x.half())
            with torch.autocast("cpu"):
                assert not at_once(small, x)
            assert not at_once(fastrnn.LSTM(9000, 64, 2), x.expand(100, 1, 64).repeat(1, 1, 141)[..., :9000])
            assert not at_once(small, x.expand(100, 500, 64).repeat(10, 1, 1))  # what goes between them would take memory
            assert not at_once(fastrnn.LSTM(64, 64, 2, bidirectional=True), x)
            dropping = fastrnn.LSTM(64, 64, 2, dropout=0.5)
            assert not at_once(dropping, x)
            assert at_once(dropping.eval(), x)
            assert not at_once(fastrnn.LSTM(64, 2048, 2), x)
            assert not at_once(fastrnn.compress(fastrnn.LSTM(64, 64, 2)), x)


@torch.no_grad()
def test_explain_reckons_with_the_runtimes_cache(monkeypatch):
    """Not with the size of L2 that Python says, which it may not know."""
    runtime, module, x = cpu.runtime_module(), fastrnn.LSTM(512, 512), torch.randn(100, 32, 512)
    assert runtime.l2_bytes >= 256 * 1024
    schedules = []
    with threads(2):
        for l2_bytes in (1 << 18, 1 << 30):
            monkeypatch.setattr(runtime, "l2_bytes", l2_bytes)
            schedules.append(fastrnn.explain(module, x).schedule)
    assert schedules[0] != schedules[1]
