"""Which schedules prove themselves on a device: a test at its first use, whose result the user's cache keeps.

A device is known by its name, its driver, Triton and the sources of the kernels: where one of them changes, it is tested again.
The test meets at barriers, with programs that soon give up, and then runs one small layer of each schedule in both passes,
against the reference in float64. A schedule that fails is off on that device, and so is the engine where that is "stepwise",
the only one that takes every layer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import gradients
from ..layer import Inputs, Layer, Needs, Outer
from ..user_cache import cache_path
from .plan import COOPERATIVE

SCHEDULES = "stepwise", "single", *COOPERATIVE
ROUNDS, POLLS = 64, 1 << 20  # of the barrier: less than a second, should all be in vain
BOUND = 2.0**-5  # relative L2 error of a result in float16, which rounds to 2**-11: only a wrong one passes it
_SOURCES = Path(__file__).parent
_off: dict[torch.device, dict[str, str]] = {}
_one_at_a_time = threading.Lock()


def off(device: torch.device) -> dict[str, str]:
    """Why each schedule that is off on a device is so, by name; the device is tested where nobody knows yet."""
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


def switch_off(device: torch.device, schedule: str, reason: str) -> None:
    """Have this process do without a schedule on a device."""
    _off[device] = _off.get(device, {}) | {schedule: reason}


def _find(device: torch.device) -> dict[str, str] | None:
    known = identity(device)
    if (kept := _read(known)) is not None:
        return kept
    if torch.cuda.is_current_stream_capturing():
        return None
    found, lasts = _in_a_thread(device)
    for schedule, reason in found.items():
        rest = "its layers run torch.nn's own code" if schedule == "stepwise" else "other schedules take its layers"
        warnings.warn(
            f"fastrnn: the {schedule} schedule fails its self-test on {known['device']}, and {rest}: {reason}",
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
    """Test a device: why each schedule that fails does so, and whether that may be kept: lack of memory passes."""
    from . import device_of_itself

    found, lasts = {}, True
    with torch.cuda.device(device), torch.no_grad():
        target = device_of_itself(device)
        for schedule in SCHEDULES:
            try:
                meets = schedule in COOPERATIVE and target.backend == "cuda"
                fault = barrier_fault(device, target.multiprocessors) if meets else None
                fault = fault or layer_fault(schedule, device, target)
            except Exception as error:  # whatever a compiler or a driver has to say
                fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                lasts = lasts and not isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if fault:
                found[schedule] = fault
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


def layer_fault(schedule: str, device: torch.device, target: Any) -> str | None:
    """What is wrong with a small LSTM of both directions, or of three layers at once, in float16 under a schedule, or None."""
    from .launch import alarm
    from .layer import Call, backward, forward
    from .plan import Sizes, choose

    T, B, I, H = 5, 20, 8, 48
    D, layers = (1, 3) if schedule == "wavefront" else (2, 1)
    sides = D * layers
    sizes = Sizes(T, B, H, H, D, 4, 2, "ieee", layers=layers)
    try:
        plans = [choose(target, sizes, forward=which, schedule=schedule) for which in (True, False)]
    except ValueError:  # the device has no such schedule
        return None
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=random) * (H**-0.5 if shape[-1] == H else 1)).to(torch.float16)

    layer = Layer("lstm", D, bias=True)
    inputs = Inputs(draw(T, B, I), None, draw(sides, B, H), draw(sides, B, H))
    weights = [draw(*shape) for shape in ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,)) * D]
    weights += [draw(*shape) for shape in ((4 * H, H), (4 * H, H), (4 * H,), (4 * H,)) * (layers - 1)]
    outer = Outer(draw(T, B, D * H), draw(sides, B, H), draw(sides, B, H))

    def wide(tensors: Any) -> Any:
        return [None if tensor is None else tensor.double() for tensor in tensors]

    (y, h_n, c_n, _), passes = gradients.layers_forward(Inputs(*wide(inputs)), wide(weights), layer)
    grads = gradients.layers_backward(Outer(*wide(outer)), passes)
    expected = {"y": y, "h_n": h_n, "c_n": c_n, **_named(layers, layer, grads)}

    def here(tensors: Any) -> Any:
        return [None if tensor is None else tensor.to(device) for tensor in tensors]

    call = Call(layer, Inputs(*here(inputs)), here(weights))
    below = call.below()
    y, h_n, c_n, saved = forward(call, True, plans[0], "ieee", below)
    grads = backward(call, Outer(*here(outer)), y, saved, Needs(), plans[1], "ieee", below)
    found = {"y": y, "h_n": h_n, "c_n": c_n, **_named(layers, layer, grads)}
    errors = {name: float((found[name].cpu().double() - right).norm() / right.norm()) for name, right in expected.items()}
    if alarm(device).rang():
        return "programs of a layer waited for each other in vain"
    wrong = [f"{name} differs by {error:.2g}" for name, error in errors.items() if not error <= BOUND]  # NaN is wrong too
    return f"of a small layer {', '.join(wrong)}" if wrong else None


def _named(layers: int, layer: Layer, grads: Any) -> dict[str, Tensor]:
    dx, dh0, dc0, dw = grads
    names = [f"d{kind}[{side}]" for side in range(layers * layer.directions) for kind in layer.kinds()]
    return {"dx": dx, "dh0": dh0, "dc0": dc0} | dict(zip(names, dw, strict=True))


# The cache


def identity(device: torch.device) -> dict[str, str]:
    """What a result is good for."""
    import triton

    return {
        "device": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "triton": triton.__version__,
        "kernels": _kernels(),
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
            return {schedule: str(reason) for schedule, reason in content["off"].items() if schedule in SCHEDULES}
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
