"""Kernels with what they are started with, and how the host learns that the programs of one gave up waiting for each other.

Triton binds the fifty arguments of a kernel anew at each launch, which takes longer than many a scan. So a `Kernel` asks Triton
once, and keeps what the driver's own function needs. What changes from launch to launch are pointers and numbers: words of a
tape (tape.py), which the compiled runtime reads, here or when the whole pass is run again.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import selftest, tape
from .plan import COOPERATIVE

ALIGNED = 16  # bytes of a pointer, and of the distances between weights: what Triton compiles another kernel for
SHARED = 228 * 1024  # bytes of shared memory, beyond which a launch has to say more


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


class Distance(NamedTuple):
    """How many numbers further than the one before it each of some tensors lies: an argument, known when a kernel starts."""

    tensors: Sequence[Tensor]

    def __int__(self) -> int:
        first, second, *_ = self.tensors
        return (second.data_ptr() - first.data_ptr()) // first.element_size()


class Entry(NamedTuple):
    """What the driver needs to start a compiled kernel.

    together:   all its programs run at once (a cooperative launch).
    parameters: the names of its run-time arguments in order.
    nulls:      so many more are pointers to memory that our kernels do without.
    """

    function: int
    threads: int
    shared: int
    together: bool
    parameters: tuple[str, ...]
    nulls: int


class Kernel:
    """A kernel of Triton's with its compile-time arguments and options, on one device.

    Its run-time arguments are tensors, distances and numbers, of which `begin` and `end` may be two: a range of steps.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self.kernel, self.constants, self.options = kernel, constants, options
        self.entry: Entry | None = None  # once Triton has compiled it, where the driver's functions alone will do
        self._compiled: Any = None

    def launch(self, grid: tuple[int, ...], arguments: dict[str, Any], begin: int, end: int) -> Launch:
        """Its launch by Triton."""
        names = self.kernel.arg_names
        given = {name: arguments[name] for name in names if name in arguments} | self.constants
        given |= {name: step for name, step in (("begin", begin), ("end", end)) if name in names}
        plain = {name: int(value) if isinstance(value, Distance) else value for name, value in given.items()}
        return Launch(self.kernel, grid, plain, self.options)

    def start(self, *given: Any) -> None:
        """Start it through Triton; `given` as of `launch`."""
        launch = self.launch(*given)
        compiled = launch.run()
        if self._compiled is None and compiled is not None and is_aligned(self.kernel, launch.arguments):
            self._compiled, self.entry = compiled, entry_of(compiled)


def entry_of(compiled: Any) -> Entry | None:
    """None where a kernel asks for more than the driver's plain launches give, or has other parameters than we think."""
    known, parameters = compiled.metadata, []
    more = "launch_pdl", "global_scratch_size", "profile_scratch_size"
    if "ptx" not in compiled.asm or known.num_ctas != 1 or known.shared > SHARED or any(getattr(known, n, 0) for n in more):
        return None
    expected = []
    for name, kind in zip(compiled.src.fn.arg_names, compiled.src.signature.values(), strict=True):
        if kind != "constexpr":
            parameters.append(name)
            expected.append("u32" if kind == "i32" else "u64" if kind[0] == "*" or kind == "i64" else kind)
    header = re.search(r"\.entry \w+\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    declared = re.findall(r"\.param \.(\w+)", header[1]) if header else []
    nulls = len(declared) - len(expected)
    if nulls < 0 or declared != expected + ["u64"] * nulls:
        return None
    together = bool(getattr(known, "launch_cooperative_grid", False))
    return Entry(compiled.function, 32 * known.num_warps, known.shared, together, tuple(parameters), nulls)


def is_aligned(kernel: Any, arguments: dict[str, Any]) -> bool:
    """Are a JIT function's tensors, and the numbers that it is specialized for, multiples of ALIGNED, and the others short?"""
    specialized, others = 0, 0
    for parameter in kernel.params:
        value = arguments.get(parameter.name)
        if parameter.is_constexpr or value is None:
            continue
        if parameter.do_not_specialize:
            others = max(others, value)
        else:
            specialized |= value.data_ptr() if isinstance(value, Tensor) else int(value)
    return specialized % ALIGNED == 0 and others < 1 << 31


class Launches(NamedTuple):
    """Kernels with the same grid and arguments, started one after the other: once for all steps, or for each step in turn."""

    kernels: Sequence[Kernel]
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    steps: int = 0
    each: bool = False

    def start(self) -> None:
        """Start them, past Triton where it has compiled them for such arguments."""
        runtime = tape.on(next(value.device for value in self.arguments.values() if isinstance(value, Tensor)))
        if runtime and not tape.watched() and (words := self.words(lambda tensor: (tape.ADDRESS, tensor.data_ptr()))):
            runtime.launch(tape.in_bytes(words))
            return
        for kernel, begin, end in self._in_turn():
            kernel.start(self.grid, self.arguments, begin, end)

    def by_triton(self) -> list[Launch]:
        """What Triton would be asked for."""
        return [kernel.launch(self.grid, self.arguments, begin, end) for kernel, begin, end in self._in_turn()]

    def _in_turn(self) -> Iterator[tuple[Kernel, int, int]]:
        for begin in range(self.steps) if self.each else (0,):
            for kernel in self.kernels:
                yield kernel, begin, begin + 1 if self.each else self.steps

    def words(self, place: Callable[[Tensor], tuple[int, int]]) -> list[int] | None:
        """A step of a tape, given the place of each tensor; None where Triton has to see such arguments first."""
        entries = [kernel.entry for kernel in self.kernels]
        if None in entries or not all(is_aligned(kernel.kernel, self.arguments) for kernel in self.kernels):
            return None
        words = [tape.LAUNCH, self.steps, self.each, len(entries)]
        for entry in entries:
            assert entry is not None
            words += [entry.function, *self.grid, *(1,) * (3 - len(self.grid)), entry.threads, entry.shared, entry.together]
            words += [len(entry.parameters) + entry.nulls]
            for name in entry.parameters:
                value: Any = self.arguments.get(name)
                if isinstance(value, Tensor):
                    words += [tape.POINTER, *place(value)]
                elif isinstance(value, Distance):
                    words += [tape.DISTANCE, value.tensors[0].element_size(), len(value.tensors)]
                    words += [word for tensor in value.tensors for word in place(tensor)]
                else:
                    words += [tape.STEPS[name]] if name in tape.STEPS else [tape.NUMBER, value]
            words += [tape.NUMBER, 0] * entry.nulls
        return words


class Alarm:
    """A word in which a program says that it gave up at a barrier.

    word: int32 [1] in pinned memory of the host's, which kernels write to. So looking at it waits for nothing and copies
    nothing; a launch that runs while it is looked at is found at the next look.
    address: of the word, 0 where there is none.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._host, self.address = device, None, 0
        if device.type == "meta":
            self.word = torch.empty(1, dtype=torch.int32, device="meta")
            return
        self.word = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.address = self.word.data_ptr()
        self._host = ctypes.c_int32.from_address(self.address)

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
            tape.forget()
            raise RuntimeError(
                f"fastrnn: in an earlier call on {self.device}, programs of a persistent launch waited minutes for each other, "
                "and gave up: what that call returned is wrong. This process uses no persistent launches from now on."
            )


@cache
def alarm(device: torch.device) -> Alarm:
    """The alarm of a device."""
    return Alarm(device)
