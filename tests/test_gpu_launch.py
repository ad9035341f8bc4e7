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


def _started(
    cell: str, sizes: tuple, dtype: torch.dtype = torch.float32, packed: bool = False, marked: bool = False, **more
) -> list[list]:
    """What is started in each of three calls and their backward passes: (function, grid, numbers, pointers modulo 16)."""
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
    for _ in range(3):
        gpu_host.started.clear()
        y = module(x, **marks)[0]
        (y.data if packed else y).sum().backward()
        calls.append([_plain(arguments) for arguments in gpu_host.started])
    return calls


def _plain(arguments: tuple) -> tuple:
    *grid, stream, function, metadata, _, enter, leave = arguments[:9]
    assert stream == 0 and not getattr(enter, "calls", enter) and not getattr(leave, "calls", leave)
    values: list = []
    for value in arguments[9:]:
        if isinstance(value, torch.Tensor):
            values.append("pointer" if value.data_ptr() else 0)
        elif type(value) is int and value > 1 << 32:
            values.append("pointer")
        elif type(value) is int and abs(value) > 1 << 20:
            values.append("distance")
        else:
            values.append(value if isinstance(value, (int, bool, str, tuple)) else getattr(value, "__name__", str(value)))
    return tuple(grid), function, metadata, values


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_past_triton_has_the_arguments_of_one_by_triton(name, idle_process):
    """The first call of a kernel goes through Triton; the later ones do not."""
    first, second, third = idle_process(_started_of, name)
    assert len(first) >= 2 and first == second == third


def _started_of(name: str) -> list[list]:
    from fastrnn.kernels.gpu.launch import Kernel

    by_triton, before = [], Kernel._by_triton
    Kernel._by_triton = lambda self, *given: by_triton.append(self) or before(self, *given)  # type: ignore[method-assign]
    try:
        calls = _started(**CALLS[name])
    finally:
        Kernel._by_triton = before  # type: ignore[method-assign]
    assert by_triton, "nothing went through Triton"
    assert len(by_triton) < sum(map(len, calls)), "everything did"
    return calls


def _by_triton_after(change: str) -> tuple[int, int]:
    """Launches through Triton, and all, of a call whose kernels are known, after a change."""
    import triton

    import fastrnn
    from bench import gpu_host
    from fastrnn.kernels.gpu.launch import Kernel

    module, x = fastrnn.LSTM(5, 16), torch.randn(2, 3, 5)
    states = [torch.zeros(1 * 3 * 16 + 1)[:48].view(1, 3, 16) for _ in range(2)]
    counted, before = [], Kernel._by_triton
    with torch.no_grad():
        for _ in range(2):
            module(x, states)
        if change == "dtype":
            module, x, states = module.half(), x.half(), [state.half() for state in states]
            module(x, states)
            module, x, states = module.bfloat16(), x.bfloat16(), [state.bfloat16() for state in states]
        elif change == "alignment":
            states[0] = torch.zeros(1 * 3 * 16 + 1)[1:].view(1, 3, 16)
        elif change == "profiler":
            triton.knobs.runtime.launch_enter_hook.add(print)
        Kernel._by_triton = lambda self, *given: counted.append(self) or before(self, *given)  # type: ignore[method-assign]
        gpu_host.started.clear()
        try:
            module(x, states)
        finally:
            Kernel._by_triton = before  # type: ignore[method-assign]
            if change == "profiler":
                triton.knobs.runtime.launch_enter_hook.remove(print)
    return len(counted), len(gpu_host.started)


@pytest.mark.parametrize(("change", "all_of_them"), CHANGES)
def test_what_triton_has_to_see_it_sees(change, all_of_them, idle_process):
    """Another alignment is another kernel, as is another dtype of the same plan, and a profiler hears of every launch."""
    by_triton, launches = idle_process(_by_triton_after, change)
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
    given = gpu_host.started[-1][9:]
    return [first in given, (second - first) // 4 in given]


def test_weights_of_two_directions_are_not_copied(idle_process):
    assert idle_process(_copies) == [True, True]
