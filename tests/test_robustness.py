"""Threads, forks, oversubscription, other processors; each in an interpreter of its own, where a hang is a failure."""

from __future__ import annotations

import os

import pytest
from contract import python

import fastrnn.kernels.cpu

# What a level costs is Numba's compilation, once: objects are kept between runs of the suite, by a hash of the kernels.
DEFAULT_LEVELS = ("x86-64-v3",)
LEVELS = ("x86-64-v3", "x86-64-v2", "x86-64")

PRELUDE = """
import os, threading, time, torch, fastrnn
from contract import Case, run, same_bits, twins

CASES = [Case("lstm", 33, 130, layers=2, bidirectional=True, batch=5, steps=9), Case("gru", 64, 64, batch=17, steps=20),
         Case("rnn_tanh", 32, 256, batch=2, steps=9), Case("lstm", 17, 33, batch=9, steps=12, layout="packed")]
MODULES = [twins(case, 0)[1] for case in CASES]
SAMPLES = [case.sample(0) for case in CASES]

def step(index):
    return run(MODULES[index], CASES[index], SAMPLES[index])

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
@pytest.mark.parametrize("shared", [True, False], ids=["one module", "a module each"])
def test_several_python_threads(shared, team, capsys):
    """Forward and backward from four at once, each with a team of its own: the same bits; slower, but no stall."""
    body = """
torch.set_num_threads(TEAM)
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
    output = script(body.replace("INDICES", indices).replace("TEAM", str(team)))
    with capsys.disabled():
        print(f"\n  teams of {team}, {output.splitlines()[0]}")  # reported, not gated: it is the machine's as much as ours


def test_more_threads_than_cores():
    """A team that cannot run at once must yield, not spin out its time slices: slow, but done."""
    script("""
expected = [step(index) for index in range(4)]
for count in (8, 16, 3):
    torch.set_num_threads(count)
    for index in range(4):
        for _ in range(5):
            same_bits(step(index), expected[index], f"{count} threads:")
print("done")
""")


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
""".replace("MEMORY", "True")
    )


def levels():
    for level in LEVELS:
        yield pytest.param(level, marks=() if level in DEFAULT_LEVELS else pytest.mark.slow)


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "AMD64"), reason="levels of x86-64")
@pytest.mark.parametrize("level", list(levels()))
def test_narrower_processors(level):
    """The contract over kernels compiled at run time for a narrower level; asked for by name, so without a warning."""
    cells = ("lstm", "gru") if level in DEFAULT_LEVELS else ("lstm", "gru", "rnn_tanh", "rnn_relu")
    dtypes = "(torch.float32,)" if level in DEFAULT_LEVELS else "(torch.float32, torch.float64)"
    output = script(
        f"""
from contract import assert_contract, cases
for cell in {cells}:
    for dtype in {dtypes}:
        factors = dict(
            cell=(cell,), dtype=(dtype,), input_size=(1, 17, 65), hidden_size=(1, 7, 33, 130), proj_size=(0, 5),
            bidirectional=(False, True), layout=("time", "batch", "packed"), batch=(1, 3, 17), steps=(1, 7),
            bias=(True, False),
        )
        for case in cases(factors):
            assert_contract(case, seeds=range(4))
        assert "{64 * 8}-bit" not in str(fastrnn.explain(MODULES[1], SAMPLES[1].x))
print("done")
""",
        FASTRNN_CPU=level,
        timeout=600,
    )
    assert output == "done\n"


def test_the_compiled_extension_is_what_is_tested():
    """Here and in test_engine.py, not what stands in for it."""
    assert fastrnn.kernels.cpu.load() == "compiled"
