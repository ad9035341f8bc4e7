"""Which parts of the engine prove themselves on a device: a test at its first use, whose result the user's cache keeps.

A device is known by its name, its driver, torch, Triton and the sources of the kernels and of the compiled runtime: where one
of them changes, it is tested again. The test meets at barriers, with programs that soon give up, and then runs one small layer
of each schedule in both passes, against the reference in float64. A schedule that fails is off on that device, and so is the
engine where that is "stepwise", the only one that takes every layer. Then the layers run again, with other numbers each time,
so that their passes are recorded and replayed (tape.py). Where that fails, Python runs all passes on that device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import cpu, gradients
from ..layer import Inputs, Layer, Needs, Outer
from ..user_cache import cache_path
from .plan import COOPERATIVE, Plan

SCHEDULES = "stepwise", "single", *COOPERATIVE
REPLAY = "replay"  # of passes, by the compiled runtime
PARTS = *SCHEDULES, REPLAY
ROUNDS, POLLS = 64, 1 << 20  # of the barrier: less than a second, should all be in vain
BOUND = 2.0**-5  # relative L2 error of a result in float16, which rounds to 2**-11: only a wrong one passes it
_SOURCES = Path(__file__).parent
_off: dict[torch.device, dict[str, str]] = {}
_one_at_a_time = threading.Lock()


def off(device: torch.device) -> dict[str, str]:
    """Why each part that is off on a device is so, by name; the device is tested where nobody knows yet."""
    if device not in _off:
        with _one_at_a_time:
            if device not in _off:
                found = _find(device)
                if found is None:  # a graph is being captured, in which nothing can be tried
                    return dict.fromkeys(COOPERATIVE, "it is not tested yet: call the layer once before a graph is captured")
                _off[device] = found
    return _off[device]


def known(device: torch.device) -> dict[str, str]:
    """The same, as far as it is known without a test."""
    return _off.get(device, {})


def switch_off(device: torch.device, part: str, reason: str) -> None:
    """Have this process do without a part on a device."""
    _off[device] = _off.get(device, {}) | {part: reason}


def in_words(part: str) -> str:
    """A part, after an article."""
    return "replay of passes" if part == REPLAY else f"{part} schedule"


_INSTEAD = {"stepwise": "its layers run torch.nn's own code", REPLAY: "Python runs every pass"}


def _find(device: torch.device) -> dict[str, str] | None:
    known = identity(device)
    if (kept := _read(known)) is not None:
        return kept
    if torch.cuda.is_current_stream_capturing():
        return None
    found, lasts = _in_a_thread(device)
    for part, reason in found.items():
        rest = _INSTEAD.get(part, "other schedules take its layers")
        warnings.warn(
            f"fastrnn: the {in_words(part)} fails its self-test on {known['device']}, and {rest}: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    if lasts:
        _write(known, found)
    return found


def _in_a_thread(device: torch.device) -> tuple[dict[str, str], bool]:
    """`run` in a thread of its own, which no mode, transform, stream or current device of the caller's reaches."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run(device)), name="fastrnn-selftest")
    thread.start()
    thread.join()
    return results[0]


def run(device: torch.device) -> tuple[dict[str, str], bool]:
    """Test a device: why each part that fails does so, and whether that may be kept, which a lack of memory may not."""
    from . import device_of_itself

    found: dict[str, str] = {}
    lasts = True
    with torch.cuda.device(device), torch.no_grad():
        target = device_of_itself(device)
        for part in PARTS:
            try:
                if part == REPLAY:
                    fault = replay_fault([schedule for schedule in SCHEDULES if schedule not in found], device, target)
                else:
                    meets = part in COOPERATIVE and target.backend == "cuda"
                    fault = barrier_fault(device, target.multiprocessors) if meets else None
                    fault = fault or layer_fault(part, device, target)
            except Exception as error:  # whatever a compiler or a driver has to say
                fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                lasts = lasts and not isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if fault:
                found[part] = fault
    return found, lasts


def barrier_fault(device: torch.device, programs: int, polls: int = POLLS) -> str | None:
    """What is wrong with barriers between so many programs, or None."""
    from .barrier import meet
    from .launch import Alarm, Launch

    alarm, counter = Alarm(device), torch.zeros(16, dtype=torch.int64, device=device)
    stored, wrong = (torch.zeros(size, dtype=torch.int32, device=device) for size in (ROUNDS * programs, 1))
    given = {"counter": counter, "stored": stored, "wrong": wrong, "gave_up": alarm.word, "rounds": ROUNDS, "POLLS": polls}
    Launch(meet, (programs,), given, {"num_warps": 4, "launch_cooperative_grid": True}).run()
    missed = int(wrong)  # waits for the device
    if alarm.rang():
        return f"{programs} programs of a cooperative launch do not meet"
    return f"programs did not see what others stored before a barrier, {missed} times" if missed else None


def layer_fault(schedule: str, device: torch.device, target: Any, replayed: bool = False) -> str | None:
    """What is wrong with a small LSTM of both directions, or of three layers at once, in float16 under a schedule, or None.

    replayed: with three calls of it, each with other numbers. The first runs in Python, the second is recorded, the third is
              replayed. All tensors live until the last call has ended: a tape that keeps an address finds old numbers there.
    """
    from .launch import alarm
    from .plan import Sizes, choose

    D, layers = (1, 3) if schedule == "wavefront" else (2, 1)
    sizes = Sizes(T, B, H, H, D, 4, 2, "ieee", layers=layers)
    try:
        plans = [choose(target, sizes, forward=which, schedule=schedule) for which in (True, False)]
    except ValueError:  # the device has no such schedule
        return None
    small = [_SmallLayer(D, layers, torch.Generator().manual_seed(seed)) for seed in range(3 if replayed else 1)]
    given = [layer.on(device) for layer in small]
    found = [layer.run(tensors, plans, schedule if replayed else None) for layer, tensors in zip(small, given, strict=True)]
    if alarm(device).rang():
        return "programs of a layer waited for each other in vain"
    for results, layer in zip(found, small, strict=True):
        expected = layer.expected()
        errors = {name: float((results[name].cpu().double() - right).norm() / right.norm()) for name, right in expected.items()}
        wrong = [f"{name} differs by {error:.2g}" for name, error in errors.items() if not error <= BOUND]  # NaN is wrong too
        if wrong:
            return f"of a small layer {', '.join(wrong)}"
    return None


def replay_fault(schedules: Sequence[str], device: torch.device, target: Any) -> str | None:
    """What is wrong with passes under these schedules once they are replayed, or None."""
    for schedule in schedules:
        if fault := layer_fault(schedule, device, target, replayed=True):
            return f"{schedule}: {fault}"
    return None


T, B, I, H = 5, 20, 8, 48  # of the small layer: steps, rows, inputs, units


class _SmallLayer:
    """An LSTM with its inputs, weights and outer gradients, all in float16."""

    def __init__(self, directions: int, layers: int, random: torch.Generator) -> None:
        self.layer, self.layers = Layer("lstm", directions, bias=True), layers
        sides = directions * layers

        def draw(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=random) * (H**-0.5 if shape[-1] == H else 1)).to(torch.float16)

        self.inputs = Inputs(draw(T, B, I), None, draw(sides, B, H), draw(sides, B, H))
        self.weights = [draw(*shape) for shape in ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,)) * directions]
        self.weights += [draw(*shape) for shape in ((4 * H, H), (4 * H, H), (4 * H,), (4 * H,)) * (layers - 1)]
        self.outer = Outer(draw(T, B, directions * H), draw(sides, B, H), draw(sides, B, H))

    def expected(self) -> dict[str, Tensor]:
        """Results and gradients by name, of the reference in float64."""

        def wide(tensors: Any) -> Any:
            return [None if tensor is None else tensor.double() for tensor in tensors]

        (y, h_n, c_n, _), passes = gradients.layers_forward(Inputs(*wide(self.inputs)), wide(self.weights), self.layer)
        return self._named(y, h_n, c_n, *gradients.layers_backward(Outer(*wide(self.outer)), passes))

    def on(self, device: torch.device) -> list[Tensor | None]:
        """Its tensors on a device: inputs, weights, outer gradients."""
        tensors = *self.inputs, *self.weights, *self.outer
        return [None if tensor is None else tensor.to(device) for tensor in tensors]

    def run(self, tensors: Sequence[Tensor | None], plans: Sequence[Plan], name: str | None) -> dict[str, Tensor]:
        """`expected` of the engine, given `on`, by the plans of both passes. name: of their tapes; None: they have none."""
        from . import tape
        from .launch import alarm
        from .layer import Call, backward, forward

        given, outer = tensors[: -len(self.outer)], tensors[-len(self.outer) :]

        def call(tensors: Sequence[Any], launch: Any) -> Call:
            inputs = len(Inputs._fields)
            return Call(self.layer, Inputs(*tensors[:inputs]), tensors[inputs : len(given)], launch)

        def run_forward(tensors: Sequence[Any], launch: Any) -> Any:
            own = call(tensors, launch)
            below = own.below()
            return *forward(own, True, plans[0], "ieee", below), below

        def run_backward(tensors: Sequence[Any], launch: Any) -> Any:
            y, saved, below, *outer = tensors[len(given) :]
            own = call(tensors, launch)
            *of_inputs, dw = backward(own, Outer(*outer), y, saved, Needs(), plans[1], "ieee", below)
            return *of_inputs, *dw

        def run(which: str, tensors: Sequence[Any], own: Any) -> Any:
            if name is None:
                return own(tensors, None)
            return tape.played(f"self-test {name} {which}", tensors, own, alarm(tensors[0].device).address)

        y, h_n, c_n, saved, below = run("forward", given, run_forward)
        dx, dh0, dc0, *dw = run("backward", (*given, y, saved, below, *outer), run_backward)
        return self._named(y, h_n, c_n, dx, dh0, dc0, dw)

    def _named(self, *found: Any) -> dict[str, Tensor]:
        *others, dw = found
        names = [f"d{kind}[{side}]" for side in range(self.layers * self.layer.directions) for kind in self.layer.kinds()]
        return dict(zip(("y", "h_n", "c_n", "dx", "dh0", "dc0", *names), (*others, *dw), strict=True))


# The cache


def identity(device: torch.device) -> dict[str, str]:
    """What a result is good for."""
    import triton

    return {
        "device": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": _kernels(),
        "runtime": cpu.runtime_module().built_from if cpu.EXTENSION else "",
    }


@cache
def _driver() -> str:
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().splitlines()[0]
    if torch.version.cuda:
        return f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]  # which a build for CPUs has not
    return f"ROCm {torch.version.hip}"


@cache
def _kernels() -> str:
    """A hash of what the kernels are made from, which says more than fastrnn's version does."""
    paths = sorted([*_SOURCES.glob("*.py"), *(_SOURCES.parent / f"{name}.py" for name in ("cells", "derive", "symbols"))])
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def _path(known: dict[str, str]) -> Path:
    return cache_path() / f"gpu-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]}.json"


def _read(known: dict[str, str]) -> dict[str, str] | None:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(_path(known).read_text())
        if isinstance(content, dict) and content.get("for") == known and isinstance(content.get("off"), dict):
            return {part: str(reason) for part, reason in content["off"].items() if part in PARTS}
    return None


def _write(known: dict[str, str], found: dict[str, str]) -> None:
    """Whole or not at all; where there is no place to write, the next process tests again."""
    path = _path(known)
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w") as file:
            json.dump({"for": known, "off": found}, file, indent=1)
        os.replace(part, path)
