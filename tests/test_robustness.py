"""Threads, forks, oversubscription; each in an interpreter of its own, where a hang is a failure."""

from __future__ import annotations

import pytest
import torch
from contract import python

import fastrnn.kernels.cpu

PRELUDE = """
import os, threading, time, torch, fastrnn, fastrnn.kernels.cpu
from contract import Case, run, same_bits, twins

CASES = [Case("lstm", 33, 130, layers=2, bidirectional=True, batch=5, steps=9), Case("gru", 64, 64, batch=17, steps=20),
         Case("rnn_tanh", 32, 256, batch=2, steps=9), Case("lstm", 17, 33, batch=9, steps=12, layout="packed")]
STACK = fastrnn.GRU(33, 33, 3).requires_grad_(False)  # its layers run at the same time where there are threads
MODULES = [twins(case, 0)[1] for case in CASES]
SAMPLES = [case.sample(0) for case in CASES]

def step(index):
    y, last = STACK(SAMPLES[0].x.new_ones(100, 1, 33).cumsum(0) / 100)
    return run(MODULES[index], CASES[index], SAMPLES[index]) | {"stack's y": y, "stack's state": last}

def spent(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
"""


def script(body: str, **options) -> str:
    output = python(PRELUDE + body, **options)
    assert output.endswith("done\n"), output
    return output


@pytest.mark.parametrize("team", [1, 2, 4])
@pytest.mark.parametrize("limited", [True, False], ids=["as many as can run", "as many as asked for"])
@pytest.mark.parametrize("shared", [True, False], ids=["one module", "a module each"])
def test_several_python_threads(shared, limited, team, capsys):
    """Forward and backward from four at once, each with a team of its own: the same bits; slower, but no stall."""
    body = """
torch.set_num_threads(TEAM)
fastrnn.kernels.cpu.runtime_module().set_limits(LIMITED)
assert (fastrnn.kernels.cpu.team()[0] > 1) == ("at the same time" in str(fastrnn.explain(STACK, torch.zeros(100, 1, 33))))
expected = [step(index) for index in range(4)]
failed = []

def work(index):
    torch.set_num_threads(TEAM)  # torch keeps the number per thread
    try:
        for _ in range(25):
            same_bits(step(index), expected[index], f"thread of module {index}:")
    except BaseException as error:
        failed.append(error)

alone = sum(spent(lambda: work(index)) for index in INDICES)
threads = [threading.Thread(target=work, args=(index,)) for index in INDICES]
together = spent(lambda: [[thread.start() for thread in threads], [thread.join() for thread in threads]])
if failed:
    raise failed[0]
print(f"100 steps: {alone:.2f} s one after another, {together:.2f} s from four threads at once")
print("done")
"""
    indices = "[0, 0, 0, 0]" if shared else "range(4)"
    output = script(body.replace("INDICES", indices).replace("TEAM", str(team)).replace("LIMITED", str(limited)))
    with capsys.disabled():
        print(f"\n  teams of {team}, {output.splitlines()[0]}")  # reported, not gated: it is the machine's as much as ours


@pytest.mark.parametrize("limited", [True, False], ids=["as many as can run", "as many as asked for"])
def test_more_threads_than_cores(limited):
    """The usual team is no larger; one that cannot run at once must yield, not spin out its time slices: slow, but done."""
    body = """
expected = [step(index) for index in range(4)]
fastrnn.kernels.cpu.runtime_module().set_limits(LIMITED)
for count in (8, 32, 3):
    torch.set_num_threads(count)
    for index in range(4):
        for _ in range(5):
            same_bits(step(index), expected[index], f"{count} threads:")
print("done")
"""
    script(body.replace("LIMITED", str(limited)))


def test_backward_in_another_thread():
    script("""
expected = step(0)
x = SAMPLES[0].x.clone().requires_grad_()
output, _ = MODULES[0](x, tuple(SAMPLES[0].states))
grads = []
thread = threading.Thread(target=lambda: grads.append(torch.autograd.grad(output.sum(), x)[0]))
thread.start(), thread.join()
assert torch.equal(grads[0], torch.autograd.grad(MODULES[0](x, tuple(SAMPLES[0].states))[0].sum(), x)[0])
print("done")
""")


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "used before"])
def test_forked_loader_workers(before):
    """Workers of a DataLoader run the module, before and after the parent did: the same bits, then the parent again."""
    body = """
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: value.clone() for name, value in step(index % 4).items()}

if BEFORE:
    earlier = [step(index) for index in range(4)]
loader = torch.utils.data.DataLoader(
    Data(), num_workers=2, batch_size=None, multiprocessing_context="fork", timeout=60
)
found = list(loader)
for index, value in enumerate(found):
    same_bits(value, step(index % 4), f"item {index}:")
if BEFORE:
    for index in range(4):
        same_bits(step(index), earlier[index], "the parent:")
print("done")
"""
    script(body.replace("BEFORE", str(before)))


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used before"])
def test_forked_child(used):
    """os.fork, then the module in the child, on one thread as torch itself asks for once the parent had a team."""
    script(
        """
expected = [step(index) for index in range(4)] if USED else None
child = os.fork()
if child == 0:
    try:
        torch.set_num_threads(1)
        found = [step(index) for index in range(4)]
        if expected:
            for index in range(4):
                same_bits(found[index], expected[index], "the child:")
        os._exit(0)
    except BaseException as error:
        print(error, flush=True)
        os._exit(1)
assert os.waitpid(child, 0)[1] == 0
found = [step(index) for index in range(4)]
print("done")
""".replace("USED", str(used))
    )


def test_sizes_beyond_memory_are_refused():
    """2**43 numbers and more that are one number expanded: an error of the allocator's, before anything is written."""
    script("""
for dtype in (torch.float32, torch.float64):
    for shape in ((2**20, 2**20, 8), (2**40, 1, 8), (2**28, 2**28, 8)):
        for module in (fastrnn.LSTM(8, 8, dtype=dtype), fastrnn.GRU(8, 8, dtype=dtype), fastrnn.RNN(8, 8, dtype=dtype)):
            x = torch.zeros(1, dtype=dtype).expand(shape)
            state = torch.zeros(1, dtype=dtype).expand(1, shape[1], 8)
            try:
                module(x, (state, state) if isinstance(module, torch.nn.LSTM) else state)
            except (RuntimeError, MemoryError):
                continue
            raise AssertionError(f"{shape} was not refused")
print("done")
""")


@pytest.mark.parametrize("shape", [(2**31, 2**31, 2), (2**62, 1, 2), (2**32, 2**32, 2)], ids=str)
def test_sizes_that_overflow_are_refused(shape):
    """By the raw op itself, before it asks for memory: their product is no number of 64 bits."""
    x, h0, w = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(4, 4)
    with pytest.raises(RuntimeError, match=r"too large for 64 bits to count|overflow"):  # torch's word where expand refuses
        given = x.expand(shape), None, h0.expand(1, shape[1], 4), None, [w[:, :2], w]
        torch.ops.fastrnn.layer_forward(*given, "rnn_tanh", False)


IDLE = """
def assert_idle():
    # torch's own threads spin a while after a call: longer where they have to share their core
    deadline = time.monotonic() + 20
    while True:
        begin = time.process_time()
        time.sleep(0.5)
        spent = time.process_time() - begin
        if spent < 0.25:
            return
        assert time.monotonic() < deadline, f"{spent:.2f} s of processor time spent in 0.5 s of waiting"
"""


def test_keyboard_interrupt():
    """Wherever it comes, it is raised, no thread stays behind, and the next call is right."""
    script(
        IDLE
        + """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is not there where the shell ignores it, in the background
torch.set_num_threads(2)
expected = [step(index) for index in range(4)]
for delay in (0.03, 0.05, 0.08, 0.13):
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        while True:
            for index in range(4):
                step(index)
    except KeyboardInterrupt:
        timer.join()
    assert_idle()
    for index in range(4):
        same_bits(step(index), expected[index], f"after an interrupt at {delay} s:")
print("done")
"""
    )


def test_errors():
    """A call that the runtime refuses leaves no thread behind, and the next one is right."""
    script(
        IDLE
        + """
torch.set_num_threads(2)
expected = [step(index) for index in range(4)]
x, h0, w, b = torch.zeros(5, 3, 8), torch.zeros(1, 3, 8), torch.zeros(8, 8), torch.zeros(8)
good = x, None, h0, None, [w, w, b, b], "rnn_tanh bias"
torch.ops.fastrnn.layer_forward(*good, True)
wrong = [(0, x[:, :2]), (0, x.double()), (2, h0[:, :2]), (4, [w[:, 1:], w, b, b]), (4, [w]), (4, [w, w, b, b[1:]])]
wrong += [(5, text) for text in ("rnn_tanh", "rnn_tanh bias directions=2", "rnn_tanh bias more", "rnn", "", " ")]
for place, bad in wrong:
    given = [bad if index == place else value for index, value in enumerate(good)]
    try:
        torch.ops.fastrnn.layer_forward(*given, True)
    except RuntimeError:
        continue
    raise AssertionError(f"argument {place} was taken")
assert_idle()
for index in range(4):
    same_bits(step(index), expected[index], "after errors:")
print("done")
"""
    )


def test_offsets_beyond_2_31():
    """A view whose rows lie 2**32 numbers apart, in memory that is never touched between them."""
    script(
        """
try:
    base = torch.empty(2**32 + 64)
except RuntimeError:
    print("done")  # a machine that does not promise what it may not have
    raise SystemExit
x = base.as_strided((3, 2, 8), (8, 2**32, 1))
value = torch.randn(3, 2, 8)
x.copy_(value)
module = fastrnn.GRU(8, 16)
same_bits(module(x)[0].detach(), module(value)[0].detach())
print("done")
"""
    )


def test_the_compiled_extension_is_what_is_tested():
    """Here and in test_engine.py, not what stands in for it."""
    assert fastrnn.kernels.cpu.load()[0] == "compiled"
