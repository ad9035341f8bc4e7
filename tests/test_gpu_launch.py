"""How kernels are started: past Triton's binding of arguments, and with the same arguments. A driver that does nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CALLS = {
    "single": {"cell": "LSTM", "sizes": (2, 3, 5, 16)},
    "persistent": {"cell": "LSTM", "sizes": (40, 3, 5, 128), "bidirectional": True},
    "projected": {"cell": "LSTM", "sizes": (3, 3, 5, 40), "proj_size": 24},
    "stepwise": {"cell": "GRU", "sizes": (2, 3, 5, 300), "batch_first": True, "dtype": torch.float16},
    "packed": {"cell": "RNN", "sizes": (6, 3, 5, 64), "packed": True},
    "marked": {"cell": "LSTM", "sizes": (3, 3, 5, 16), "bidirectional": True, "marked": True},
    "own": {"cell": "slstm", "sizes": (2, 3, 5, 16), "bidirectional": True, "num_heads": 2},
}


CHANGES = [("nothing", False), ("alignment", True), ("dtype", True), ("profiler", True)]


@pytest.fixture(scope="module")
def idle_process() -> Iterator[Callable]:
    """Calls a function in a process that takes CPU tensors for those of a GPU, whose launches do nothing."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_install) as worker:
        yield lambda function, *args: worker.submit(function, *args).result(timeout=300)


def _install() -> None:
    from bench import gpu_host

    torch.set_num_threads(1)
    gpu_host.install()


def _calls(
    cell: str, sizes: tuple, dtype: torch.dtype = torch.float32, packed: bool = False, marked: bool = False, **more
) -> list[list]:
    """What is started in each of four calls and their backward passes."""
    import fastrnn
    from bench import gpu_host

    T, B, I, H = sizes
    made = getattr(fastrnn, cell, None)  # else a cell of those that torch.nn has not
    module = (made or fastrnn.recurrent(getattr(fastrnn.cells, cell)))(I, H, **more)
    module, x = module.to(dtype), torch.randn(B, T, I, dtype=dtype)
    marks = {"resets": torch.rand(T, B) < 0.4, "lengths": torch.arange(B) + 1} if marked else {}
    if packed:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, [T, T - 2, 1], batch_first=True)
    elif not more.get("batch_first"):
        x = x.transpose(0, 1).contiguous()
    calls = []
    for _ in range(4):
        gpu_host.started.clear()
        y = module(x, **marks)[0]
        (y.data if packed else y).sum().backward()
        calls.append([_plain(started) for started in gpu_host.started])
    return calls


def _plain(started) -> tuple:
    """Without what differs from call to call: where memory is."""
    pointer, distance = 1 << 32, 1 << 20
    arguments = [
        "pointer" if value > pointer else "distance" if abs(value) > distance else value for value in started.arguments
    ]
    return started.function, started.blocks, started.together, arguments, started.by_triton


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_past_triton_has_the_arguments_of_one_by_triton(name, idle_process):
    """Triton makes each kernel's first launch, and none after it: neither where Python runs a pass nor where a tape does."""
    first, *others = idle_process(_calls_of, name)
    assert len(first) >= 2 and all(len(call) == len(first) for call in others)
    assert first[0][-1] and first[-1][-1], "Triton compiles"
    for call in others:
        assert [started[:-1] for started in call] == [started[:-1] for started in first]
        assert not any(started[-1] for started in call)


def _calls_of(name: str) -> list[list]:
    return _calls(**CALLS[name])


def _launches_after(change: str) -> tuple[int, int]:
    """Launches through Triton, and all, of a call whose kernels are known, after a change."""
    import triton

    import fastrnn
    from bench import gpu_host

    module, x = fastrnn.LSTM(5, 16), torch.randn(2, 3, 5)
    states = [torch.zeros(1 * 3 * 16 + 1)[:48].view(1, 3, 16) for _ in range(2)]
    with torch.no_grad():
        for _ in range(3):
            module(x, states)
        if change == "dtype":
            module, x, states = module.half(), x.half(), [state.half() for state in states]
            module(x, states)
            module, x, states = module.bfloat16(), x.bfloat16(), [state.bfloat16() for state in states]
        elif change == "alignment":
            states[0] = torch.zeros(1 * 3 * 16 + 1)[1:].view(1, 3, 16)
        elif change == "profiler":
            triton.knobs.runtime.launch_enter_hook.add(print)
        gpu_host.started.clear()
        try:
            module(x, states)
        finally:
            if change == "profiler":
                triton.knobs.runtime.launch_enter_hook.remove(print)
    return sum(started.by_triton for started in gpu_host.started), len(gpu_host.started)


@pytest.mark.parametrize(("change", "all_of_them"), CHANGES)
def test_what_triton_has_to_see_it_sees(change, all_of_them, idle_process):
    """Another alignment is another kernel, as is another dtype of the same plan, and a profiler hears of every launch."""
    by_triton, launches = idle_process(_launches_after, change)
    assert launches > 0 and by_triton == (launches if all_of_them else 0)


def _copies() -> list[int]:
    """Of both directions' recurrent weights, what a call's kernels are given: pointers, and how far apart."""
    import fastrnn
    from bench import gpu_host

    module = fastrnn.GRU(5, 64, bidirectional=True)
    with torch.no_grad():
        module(torch.randn(40, 3, 5))
        gpu_host.started.clear()
        module(torch.randn(40, 3, 5))
    first, second = (getattr(module, f"weight_hh_l0{suffix}").data_ptr() for suffix in ("", "_reverse"))
    given = gpu_host.started[-1].arguments
    return [first in given, (second - first) // 4 in given]


def test_weights_of_two_directions_are_not_copied(idle_process):
    assert idle_process(_copies) == [True, True]


def _in_cpp(change: str) -> tuple[bool, bool]:
    """Does a tape run a call of a module's: before a change, and with it?"""
    import contextlib
    import copy
    from unittest import mock

    import fastrnn
    from bench import gpu_host
    from fastrnn.kernels.gpu import launch, layer

    module, x, hx = fastrnn.LSTM(16, 32), torch.randn(4, 2, 16), None
    for _ in range(3):
        module(x)
    ran: list[str] = []

    def noted(*given):
        ran.append("python")
        return forward(*given)

    forward, within, expected = layer.forward, contextlib.nullcontext(), None
    with mock.patch.object(layer, "forward", noted):
        gpu_host.started.clear()
        module(x)
        before = not ran and len(gpu_host.started) == 1
        if change == "a mode":
            within = _Mode()
        elif change == "the torch profiler":
            within = torch.profiler.profile()
        elif change == "vmap":
            y = torch.func.vmap(lambda x: module(x)[0])(x.unsqueeze(0))
            return before, not ran and y.shape == (1, 4, 2, 32)
        elif change == "strides":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        elif change == "negated":
            x = torch.complex(x, x).conj().imag
        elif change == "a subclass":
            x = x.as_subclass(_Own)
        elif change == "a size":
            x = torch.randn(5, 2, 16)
        elif change == "another device":
            gpu_host.DEVICE[0] = 3
        elif change == "an alarm":
            launch.alarm(x.device).word.fill_(1)
            expected = "gave up"
        elif change == "precision":
            torch.backends.cudnn.rnn.fp32_precision = "ieee"
        elif change == "a weight of its own":
            module.weight_hh_l0 = torch.nn.Parameter(module.weight_hh_l0.double())
            expected = "same dtype|dtype|Double"
        elif change == "a hook on a method":
            module.check_input = lambda *given: None
        elif change == "recompute":
            within = fastrnn.recompute()
        elif change == "a method of its class":
            module = copy.deepcopy(module)
            module.__class__ = type("Derived", (fastrnn.LSTM,), {"check_input": lambda *given: None})
        elif change == "too many features":
            x, expected = torch.randn(4, 2, 17), "must be equal to input_size"
        elif change == "a state of another size":
            hx, expected = (torch.zeros(1, 3, 32), torch.zeros(1, 3, 32)), "Expected hidden"
        elif change == "nothing":
            pass
        else:
            raise AssertionError(change)
        gpu_host.started.clear()
        try:
            with within:
                if expected is None:
                    module(x, hx)
                else:
                    with pytest.raises((RuntimeError, ValueError), match=expected):
                        module(x, hx)
        finally:
            gpu_host.DEVICE[0] = -1
            torch.backends.cudnn.rnn.fp32_precision = "tf32"
        return before, not ran and len(gpu_host.started) == 1


class _Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Own(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("change", "by_tape"),
    [
        ("nothing", True),
        ("a hook on a method", True),  # torch.nn's own method runs first, and then the engine's operator
        ("a mode", False),
        ("the torch profiler", False),
        ("vmap", True),  # the operator's rule hands plain tensors on
        ("strides", False),
        ("negated", True),  # a copy, whose numbers are next to each other
        ("a subclass", False),
        ("a size", False),
        ("another device", False),
        ("an alarm", False),
        ("precision", False),
        ("a weight of its own", False),
        ("recompute", False),
        ("too many features", False),
        ("a state of another size", False),
    ],
)
def test_what_a_tape_must_not_take_it_leaves_to_python(change, by_tape, idle_process):
    assert idle_process(_in_cpp, change) == (True, by_tape)
