"""Kernels with what they are started with, and how the host learns that the programs of one gave up waiting for each other.

Triton binds the fifty arguments of a kernel anew at each launch, which takes longer than many a scan. So a `Kernel` asks Triton
once, and keeps what Triton compiled together with the compile-time arguments. What changes from launch to launch are pointers
and numbers, which go straight to the function that Triton made for the driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from operator import or_
from typing import Any

import torch
import triton
from torch import Tensor

from . import selftest
from .plan import COOPERATIVE

ALIGNED = 16  # bytes of a pointer, and of the distances between weights: what Triton compiles another kernel for


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> Any:
        """Start it, and return what Triton compiled; None in the interpreter."""
        return self.kernel[self.grid](**self.arguments, **self.options)


class Kernel:
    """A kernel of Triton's with its compile-time arguments and options, on one device.

    Its run-time arguments come first: tensors, then numbers, of which the last two may be `begin` and `end`, a range of steps.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self.kernel, self.constants, self.options = kernel, constants, options
        self._start: Callable[..., None] | None = None  # the driver's function, once it is known

    @cached_property
    def _names(self) -> tuple[list[str], list[str], list[str]]:
        """Of run-time arguments: tensors, numbers whose alignment Triton looks at, and others; for JIT functions only."""
        own = [each for each in self.kernel.params if each.name not in self.constants]
        tensors = [each.name for each in own if not each.annotation_type and not each.do_not_specialize]
        distances = [each.name for each in own if each.annotation_type]
        return tensors, distances, [each.name for each in own if each.do_not_specialize]

    def bind(
        self, grid: tuple[int, ...], arguments: dict[str, Any], run: Callable[[Launch], object] | None = None
    ) -> Callable[[int, int], object]:
        """What starts it for steps from `begin` to `end`, given all other arguments by name; or what hands that to `run`."""
        bound = None if run or self._start is None or _watched() else self._bind(grid, arguments)
        return bound or (lambda begin, end: self._by_triton(grid, arguments, run, begin, end))

    def _bind(self, grid: tuple[int, ...], arguments: dict[str, Any]) -> Callable[[int, int], object] | None:
        """None where a tensor is aligned otherwise than those it was compiled for."""
        tensors, distances, numbers = self._names
        pointers = [arguments[name].data_ptr() for name in tensors]
        steps = [arguments[name] for name in distances]
        if reduce(or_, steps, reduce(or_, pointers)) % ALIGNED:
            return None
        start, active = self._start, triton.runtime.driver.active
        stream = active.get_current_stream(active.get_current_device())
        first = *grid, *(1,) * (3 - len(grid)), stream, *self._handle, None, None, None, *pointers, *steps
        assert start is not None
        if numbers[-2:] == ["begin", "end"]:
            first, last = (*first, *[arguments[name] for name in numbers[:-2]]), self._last
            return lambda begin, end: start(*first, begin, end, *last)
        values = (*first, *[arguments[name] for name in numbers], *self._last)
        return lambda begin, end: start(*values)

    def _by_triton(self, grid, arguments: dict[str, Any], run: Callable[[Launch], object] | None, begin: int, end: int) -> None:
        names = self.kernel.arg_names
        given = {name: arguments[name] for name in names if name in arguments}
        if "begin" in names:
            given |= {"begin": begin, "end": end}
        launch = Launch(self.kernel, grid, given | self.constants, self.options)
        if run:
            run(launch)
            return
        compiled = launch.run()
        if torch.version.hip:  # where Triton compiles another kernel for tensors of 2 GB and more, too
            return
        pointers = [value.data_ptr() if isinstance(value, Tensor) else value for value in given.values()]
        if compiled is not None and self._start is None and self._is_aligned(pointers):
            self._handle = compiled.function, compiled.packed_metadata
            self._last = tuple(self.constants[name] for name in names if name in self.constants)
            self._start = compiled.run  # last: other threads look at it first

    def _is_aligned(self, given: list[int]) -> bool:
        tensors, distances, _ = self._names
        return reduce(or_, given[: len(tensors) + len(distances)]) % ALIGNED == 0


_HOOKS = triton.knobs.runtime


def _watched() -> bool:
    """Does a profiler of Triton's want to hear of launches?"""
    enter, leave = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Alarm:
    """A word in which a program says that it gave up at a barrier.

    word: int32 [1] in pinned memory of the host's, which kernels write to. So looking at it waits for nothing and copies
    nothing; a launch that runs while it is looked at is found at the next look.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._host = device, None
        if device.type == "meta":
            self.word = torch.empty(1, dtype=torch.int32, device="meta")
            return
        self.word = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._host = ctypes.c_int32.from_address(self.word.data_ptr())

    def rang(self) -> bool:
        """Did a program give up since the last look?"""
        if self._host is None or not self._host.value:
            return False
        self._host.value = 0
        return True

    def check(self) -> None:
        """Raise where an earlier launch gave up, and have the device do without such launches from now on.

        Raises:
            RuntimeError: it did.
        """
        if self.rang():
            for schedule in COOPERATIVE:
                selftest.switch_off(self.device, schedule, "in an earlier call programs waited for each other in vain")
            raise RuntimeError(
                f"fastrnn: in an earlier call on {self.device}, programs of a persistent launch waited minutes for each other, "
                "and gave up: what that call returned is wrong. This process uses no persistent launches from now on."
            )


@cache
def alarm(device: torch.device) -> Alarm:
    """The alarm of a device."""
    return Alarm(device)
