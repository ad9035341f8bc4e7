"""How long Python takes from a module's call to the launch of its kernels, and from a gradient to theirs. It needs no GPU.

    python -m bench.gpu_host [--seconds 1] [--profile] [--device cuda]

Kernels are compiled for an H100, by Triton as it is, and launched through a driver whose launches do nothing; tensors are a
CPU's, which the GPU engine takes for its own. So this does not see what a launch costs inside the driver, what torch's products
and allocations cost beyond those of a CPU, and the crossing of threads in autograd, which has one for each GPU. Products and
buffers are small, so that their arithmetic is below a microsecond. With --device cuda a GPU runs the layers, and all of that is
seen: the device has nothing to do when a call begins, and nobody waits for it within one. The status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import ctypes
import itertools
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch.nn.utils.rnn import PackedSequence
from triton.backends.compiler import GPUTarget

import fastrnn
from bench import record
from fastrnn.kernels import cpu, gpu
from fastrnn.kernels.gpu import tape
from fastrnn.kernels.gpu.plan import Device

GOALS = {"forward": 40.0, "backward": 60.0}  # microseconds a layer
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
    "RNN": ("RNN", {}),
    "LSTM, two directions": ("LSTM", {"bidirectional": True}),
    "LSTM, batch first": ("LSTM", {"batch_first": True}),
    "LSTM, three layers": ("LSTM", {"num_layers": 3}),
    "LSTM, packed": ("LSTM", {}),
}
H100 = Device("cuda", 90, 132, 227 * 1024)
STEPS, ROWS, INPUTS, UNITS = 4, 2, 16, 16


class Started(NamedTuple):
    """A launch: the driver's handle of its kernel, how many programs, whether they run at once, and its run-time arguments.

    by_triton: Triton made it.
    """

    function: int
    blocks: tuple[int, int, int]
    together: bool
    arguments: list[int]
    by_triton: bool


started: list[Started] = []  # while calls are not timed
_kinds: dict[int, list[str]] = {}  # of each kernel's arguments, which Triton starts first


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds, self.together = list(source.signature.values()), bool(metadata.launch_cooperative_grid)

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *given: Any) -> None:
        arguments = [value for value, kind in zip(given[-len(self.kinds) :], self.kinds, strict=True) if kind != "constexpr"]
        plain = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
        _kinds[function] = [kind for kind in self.kinds if kind != "constexpr"]
        started.append(Started(function, (x, y, z), self.together, plain, True))


class _Utils:
    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        return 1, next(_handles), 32, 0, 1024  # handles of the module and of the function, registers, spills, threads at most

    def unload_module(self, *arguments: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": H100.shared_bytes}


_handles = itertools.count(1)
_START = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t, *[ctypes.c_uint] * 7, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))


def _noted(together: bool) -> Any:
    def start(function: int, x: int, y: int, z: int, *rest: Any) -> int:
        numbers = zip(rest[-1], _kinds[function])
        values = [(ctypes.c_int32 if kind == "i32" else ctypes.c_int64).from_address(at).value for at, kind in numbers]
        started.append(Started(function, (x, y, z), together, values, False))
        return 0

    return _START(start)


DEVICE = [-1]  # the current one, as torch numbers a CPU
NOTED = _noted(False), _noted(True)  # the driver's functions, for plain launches and cooperative ones
IDLE = (ctypes.CDLL(None).pthread_condattr_destroy,) * 2  # which does nothing and returns 0, in place of these


def use(functions: tuple[Any, Any]) -> None:
    """Have these functions make the launches that Triton does not."""
    launch, together = functions
    none = dict.fromkeys(("cuCtxGetCurrent", "cuStreamIsCapturing"))
    driver = SimpleNamespace(cuLaunchKernel=launch, cuLaunchCooperativeKernel=together, **none)
    tape.connect(
        "cpu", driver, ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")), lambda: DEVICE[0], int
    )


class IdleDriver:
    """What Triton asks of a driver, for an H100 that does nothing."""

    launcher_cls, utils = _Launcher, _Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", H100.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def take_all() -> None:
    """Leave no call to cuDNN."""
    gpu.plan.cudnn_is_faster = lambda *given: False


def install() -> None:
    """Have this process take CPU tensors for those of a GPU that does nothing."""
    triton.runtime.driver.set_active(IdleDriver())
    gpu.HERE, gpu.why_not, gpu.device_of = "is_cpu", lambda device: None, lambda device: H100
    use(NOTED)
    tape.on_gpu = cpu.runtime_module  # type: ignore[assignment]  # which has a cache
    take_all()
    # a function in the place of a class, for there is no device to make the current one
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment, misc, return-value]


def numbers(y: torch.Tensor | PackedSequence) -> torch.Tensor:
    """Return those of a sequence, packed or not."""
    return y.data if isinstance(y, PackedSequence) else y


def prepare(name: str, device: str = "cpu") -> dict[str, Callable[[], object]]:
    """Forward and backward of a layer, ready to be timed; the first call has compiled its kernels."""
    cell, sizes = LAYERS[name]
    module = getattr(fastrnn, cell)(INPUTS, UNITS, device=device, **sizes)
    x = torch.randn(STEPS, ROWS, INPUTS, device=device, requires_grad=True)
    given: Any = x
    if "packed" in name:
        batch_sizes = torch.tensor([ROWS] * (STEPS - 1) + [1])
        x = torch.randn(int(batch_sizes.sum()), INPUTS, device=device, requires_grad=True)
        given = PackedSequence(x, batch_sizes)
    leaves, dy = [x, *module.parameters()], torch.ones_like(numbers(module(given)[0]))
    kept: list[torch.Tensor] = []

    def forward() -> None:
        kept[:] = [numbers(module(given)[0])]

    def backward() -> None:
        torch.autograd.grad(kept.pop(), leaves, dy)

    def inference() -> None:
        with torch.no_grad():
            module(given)

    return {"forward": forward, "backward": backward, "inference": inference}


def measure(name: str, seconds: float, device: str = "cpu") -> dict[str, Any]:
    """Microseconds a layer, the median of calls, and launches of a training step's."""
    passes = prepare(name, device)
    for _ in range(3):
        for run in passes.values():
            run()
    count = 0
    times: dict[str, list[float]] = {each: [] for each in passes}
    for each in ("forward", "backward"):
        started.clear()
        passes[each]()
        count += len(started)
    if device == "cpu":
        use(IDLE)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for each, run in passes.items():
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            times[each].append(time.perf_counter() - begin)
    layers = LAYERS[name][1].get("num_layers", 1)
    if device == "cpu":
        use(NOTED)
    result: dict[str, Any] = {each: 1e6 * statistics.median(taken) / layers for each, taken in times.items()}
    return result | {"launches": count / layers}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_host", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each layer (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default %(default)s)")
    parser.add_argument("--profile", action="store_true", help="say where an LSTM's time goes")
    options = parser.parse_args(argv)
    record.one_tree()
    torch.set_num_threads(1)
    if options.device == "cpu":
        install()
    else:
        take_all()
    if options.profile:
        passes, profile = prepare("LSTM", options.device), cProfile.Profile()
        with profile:
            for _ in range(2000):
                passes["forward"]()
                passes["backward"]()
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        return 0
    missed = []
    print(f"{'microseconds a layer':24}{'forward':>10}{'backward':>10}{'inference':>11}{'launches':>10}")
    for name in LAYERS:
        found = measure(name, options.seconds, options.device)
        print(f"{name:24}{found['forward']:10.0f}{found['backward']:10.0f}{found['inference']:11.0f}{found['launches']:10.1f}")
        if "packed" not in name:  # which Python takes to the engine, by torch.nn's own code
            missed += [f"{name} {each}" for each, goal in GOALS.items() if found[each] > goal]
    print(
        f"goals: {GOALS['forward']:.0f} forward, {GOALS['backward']:.0f} backward"
        + f"; missed by {', '.join(missed)}" * bool(missed)
    )
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
