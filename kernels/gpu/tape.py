"""A pass of the engine as a tape: what it does with its tensors' memory, recorded once and run again by csrc/replay.cpp.

Between a call and its launches lie a dozen operations of torch's and a hundred lines of Python, whose results depend on sizes
alone. So a pass that is asked for again, with tensors of the same dtypes, sizes and strides, is recorded while Python runs it:
which memory it takes, and which of the operations below it does in which order. The runtime repeats that with other tensors. A
pass that does anything else, or that reads a number from a tensor, has no tape.

A tape is a list of 64-bit numbers. Places are the arguments' memory and then what the pass makes; a place of ADDRESS is none of
these, and its offset is an address.

    bytes of the workspace, the address of the device's alarm or 0
    the number of places made, and of each WORKSPACE offset, or RESULT dtype dimensions sizes strides
    the number of results, and of each k for the k-th RESULT, or -1 - k for the k-th of those that never change
    steps: MM out a b; ADDMM out a b beta; BADDBMM out a b beta; COPY out from; ZERO out; SUM out of; CAT out axis count arrays
           LAUNCH steps each count, and of each kernel function blocks[3] threads shared together count parameters
    array: place offset dtype dimensions sizes strides, with the offset in bytes
    parameter: POINTER place offset; DISTANCE itemsize count (place offset)...; NUMBER value; BEGIN; END
"""

from __future__ import annotations

import array
import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .. import cpu
from . import packed, selftest
from .precision import precision_of, products_for, set_products

WORKSPACE, RESULT = range(2)
MM, ADDMM, BADDBMM, COPY, ZERO, SUM, CAT, LAUNCH = range(8)
POINTER, DISTANCE, NUMBER, BEGIN, END = range(5)
STEPS = {"begin": BEGIN, "end": END}
ADDRESS = -1  # a place of no argument's
ROOM = 256  # bytes, of which each part of a workspace has a multiple

# c10::ScalarType, by which torch's C functions know dtypes.
_DTYPES = {
    torch.uint8: 0,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}

MOST = 4096  # passes that are remembered; beyond that all are forgotten
_asked_for: dict[int, bool] = {}  # by the hashes of their keys, which may be long: whether they are worth recording


def played(
    name: str,
    tensors: Sequence[Tensor | None],
    run: Callable[[Sequence[Any], Callable | None], Sequence[Tensor]],
    alarm: int,
) -> Sequence[Tensor]:
    """The results of a pass, from its tape where there is one.

    name: everything about it but these tensors, of which some may be absent, but not the first.
    run: the pass in Python, given the tensors and what becomes of its launches; None starts them.
    alarm: the address of a word that a tape looks at before it begins.
    """
    device = tensors[0].device  # type: ignore[union-attr]  # x is there
    runtime = on(device)
    found = runtime and runtime.replay(name, tuple(tensors))
    if isinstance(found, list):
        return found
    if found is None or not _is_worth_recording(hash(found), device):
        return run(tensors, None)
    recorder = Recorder(tensors)
    with recorder:
        results = run(recorder.arguments, recorder.launch)
    words = recorder.words(results, alarm)
    if words is None:
        _asked_for[hash(found)] = False
    else:
        runtime.keep(found, in_bytes(words), tuple(recorder.alive))
    return results


def in_bytes(words: Sequence[int]) -> bytes:
    """Words as the runtime reads them."""
    return array.array("q", words).tobytes()


def _is_worth_recording(key: int, device: torch.device) -> bool:
    """Is a pass asked for again that may have a tape? Many have lengths that are never seen again.

    Recording takes longer than running. A graph is captured once, maybe on a device that is not tested yet, see selftest.py.
    """
    if key in _asked_for:
        return _asked_for[key] and not packed.capturing(device)
    if len(_asked_for) >= MOST:
        forget()
    _asked_for[key] = True
    return False


def forget() -> None:
    """Drop all tapes: something else than tensors has changed."""
    _asked_for.clear()
    if runtime := on_gpu():
        runtime.forget()


class Recorder(TorchDispatchMode):
    """What a pass does with tensors that it is given: `words` of a tape.

    arguments: these tensors under names of their own: two of them may be one.
    launch:    what the pass hands its launches to.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.arguments = [None if tensor is None else tensor.detach() for tensor in tensors]
        self.alive: list[Any] = []  # what a tape holds an address of
        self.fault: str | None = None  # why there is no tape
        self._steps: list[int] = []
        self._made: list[_Made] = []
        self._device = next(tensor.device for tensor in tensors if tensor is not None)
        self._at: dict[int, tuple[Tensor, int, int]] = {}  # by its id, a tensor with its place, and the address of that
        for place, tensor in enumerate(self.arguments):
            if tensor is not None:
                self._at[id(tensor)] = tensor, place, tensor.data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if note := _NOTES.get(func):
            note(self, found, *args, **kwargs)
        elif func._schema.is_mutable or not self._views(found, args[0] if args else None):
            self.fault = f"{func} has no place on a tape"
        return found

    def _views(self, found: Any, of: Any) -> bool:
        """Note what shares the memory of an argument; False where something does not."""
        views = found if isinstance(found, (list, tuple)) else [found]
        if not isinstance(of, Tensor) or not all(isinstance(view, Tensor) for view in views):
            return False
        storage = of.untyped_storage().data_ptr()
        if any(view.untyped_storage().data_ptr() != storage for view in views):
            return False
        _, place, address = self._found(of)
        for view in views:
            self._at[id(view)] = view, place, address
        return True

    def _found(self, tensor: Tensor) -> tuple[Tensor, int, int]:
        """Where a tensor is. One that was there before the pass is at its address for ever."""
        if id(tensor) not in self._at:
            self.alive.append(tensor)
            self._at[id(tensor)] = tensor, ADDRESS, 0
        return self._at[id(tensor)]

    def place(self, tensor: Tensor) -> tuple[int, int]:
        """The place of a tensor's memory, and the bytes before its first number. An empty one is nowhere."""
        _, place, address = self._found(tensor)
        if not tensor.numel():
            return ADDRESS, 0
        if place >= len(self.arguments):
            made = self._made[place - len(self.arguments)]
            made.last = len(self._steps)
        return place, tensor.data_ptr() - address

    def make(self, tensor: Tensor) -> Tensor:
        """Note that the pass has taken memory."""
        self._check_device(tensor)
        self._at[id(tensor)] = tensor, len(self.arguments) + len(self._made), tensor.data_ptr()
        self._made.append(_Made(tensor, len(self._steps), len(self._steps)))
        return tensor

    def step(self, operation: int, out: Tensor, *operands: Any) -> None:
        """Note an operation on tensors and numbers, which writes the first of them."""
        if self._found(out)[1] < len(self.arguments):
            self.fault = "an argument is written"
        self._steps.append(operation)
        for operand in (out, *operands):
            self._steps += self._array(operand) if isinstance(operand, Tensor) else [operand]

    def launch(self, launches: Any) -> None:
        """Start them, and note that."""
        words = launches.words(self.place)
        if words is None:
            self.fault = "a kernel has not been compiled for such arguments yet"
        else:
            self._steps += words
            self.alive += launches.kernels
        with _disable_current_modes():
            launches.start()

    def _array(self, tensor: Tensor) -> list[int]:
        self._check_device(tensor)
        return [*self.place(tensor), *_form(tensor)]

    def _check_device(self, tensor: Tensor) -> None:
        if tensor.device != self._device:
            self.fault = "a tensor is elsewhere"

    def words(self, results: Sequence[Tensor], alarm: int) -> list[int] | None:
        """The tape of the pass, which returned these; None where it has none."""
        first, constants, found = len(self.arguments), list[Tensor](), list[_Made | int]()
        for result in results:
            _, place, _ = self._found(result)
            if place == ADDRESS:
                constants.append(result)
                found.append(-len(constants))
                continue
            made = self._made[place - first] if place >= first else None
            if made is None or made.is_result or not made.is_whole(result):
                self.fault = "a result is part of something"
                return None
            made.is_result, made.tensor = True, result
            found.append(made)
        if self.fault:
            return None
        size = _arrange([made for made in self._made if not made.is_result])
        words = [size, alarm, len(self._made)]
        for made in self._made:
            words += [RESULT, *_form(made.tensor)] if made.is_result else [WORKSPACE, made.offset]
        self.alive[:0] = constants  # where the runtime finds them
        among = [made for made in self._made if made.is_result]
        order = [each if isinstance(each, int) else among.index(each) for each in found]
        return [*words, len(order), *order, *self._steps]


def _form(tensor: Tensor) -> list[int]:
    return [_DTYPES[tensor.dtype], tensor.dim(), *tensor.shape, *tensor.stride()]


class _Made:
    """Memory that a pass takes, and the first and last words of its steps that need it."""

    def __init__(self, tensor: Tensor, first: int, last: int) -> None:
        self.tensor, self.first, self.last = tensor, first, last
        self.is_result, self.offset = False, 0
        self.bytes = -(-tensor.untyped_storage().nbytes() // ROOM) * ROOM

    def is_whole(self, tensor: Tensor) -> bool:
        """Is this tensor all of it, and nothing else?"""
        same = tensor.data_ptr() == self.tensor.data_ptr() and tensor.numel() == self.tensor.numel()
        return same and tensor.is_contiguous() and tensor.dtype is self.tensor.dtype


def _arrange(parts: list[_Made]) -> int:
    """Give each part of a workspace an offset, so that those needed at one time have memory apart; return the size of all."""
    placed: list[_Made] = []
    for part in sorted(parts, key=lambda part: -part.bytes):
        part.offset = 0
        for other in sorted(placed, key=lambda other: other.offset):
            at_once = part.first <= other.last and other.first <= part.last
            if at_once and part.offset < other.offset + other.bytes and other.offset < part.offset + part.bytes:
                part.offset = other.offset + other.bytes
        placed.append(part)
    return max((part.offset + part.bytes for part in placed), default=0)


def _note_copy(recorder: Recorder, found: Tensor, source: Tensor, **_: Any) -> None:
    recorder.step(COPY, recorder.make(found), source)


def _note_copied(recorder: Recorder, found: Tensor, to: Tensor, source: Tensor, non_blocking: bool = False) -> None:
    recorder.step(COPY, to, source)


def _note_zeros(recorder: Recorder, found: Tensor, *_: Any, **__: Any) -> None:
    recorder.step(ZERO, recorder.make(found))


def _note_made(recorder: Recorder, found: Tensor, *_: Any, **__: Any) -> None:
    recorder.make(found)


def _note_product(recorder: Recorder, found: Tensor, a: Tensor, b: Tensor, *, out: Tensor | None = None) -> None:
    recorder.step(MM, recorder.make(found) if out is None else out, a, b)


def _note_added(operation: int) -> Callable:
    def note(recorder: Recorder, found: Tensor, out: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> None:
        if alpha != 1 or beta not in (0, 1):
            recorder.fault = "a product is scaled"
        recorder.step(operation, out, a, b, int(beta))

    return note


def _note_sum(
    recorder: Recorder, found: Tensor, of: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> None:
    if dim != [0] or keepdim or dtype is not None:
        recorder.fault = "a sum is not over the first axis"
    recorder.step(SUM, recorder.make(found), of)


def _note_joined(recorder: Recorder, found: Tensor, parts: Sequence[Tensor], dim: int = 0) -> None:
    recorder.step(CAT, recorder.make(found), dim, len(parts), *parts)


_aten = torch.ops.aten
_NOTES: dict[Any, Callable] = {
    **dict.fromkeys((_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default), _note_made),
    **dict.fromkeys((_aten.zeros.default, _aten.new_zeros.default, _aten.zeros_like.default), _note_zeros),
    **dict.fromkeys((_aten.clone.default, _aten._to_copy.default), _note_copy),
    **dict.fromkeys((_aten.mm.default, _aten.mm.out), _note_product),
    _aten.addmm_.default: _note_added(ADDMM),
    _aten.baddbmm_.default: _note_added(BADDBMM),
    _aten.copy_.default: _note_copied,
    _aten.sum.dim_IntList: _note_sum,
    _aten.cat.default: _note_joined,
}


@cache
def on_gpu() -> Any:
    """The compiled runtime, told what it needs of torch and the driver; None where a part is missing, or on ROCm."""
    try:
        if torch.version.hip or cpu.load()[0] != "compiled":
            return None
        driver = ctypes.CDLL("libcuda.so.1")
        products = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
        connect("cuda", driver, products, torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream)
    except (OSError, AttributeError, ImportError, RuntimeError):  # kernels then start through Triton
        return None
    return cpu.runtime_module()


def on(device: torch.device) -> Any:
    """The same, and None where replaying has failed the self-test of a device."""
    return None if selftest.REPLAY in selftest.known(device) else on_gpu()


def connect(device: str, driver: Any, products: Any, current_device: Callable, current_stream: Callable) -> None:
    """Tell the runtime of a kind of device.

    driver: has CUDA's functions, and products torch's C functions of that device, as ctypes does.
    current_device, current_stream: the index of the current device, and the handle of the current stream on it.
    """
    functions = driver.cuLaunchKernel, driver.cuLaunchCooperativeKernel, driver.cuCtxGetCurrent, driver.cuStreamIsCapturing
    functions += tuple(getattr(products, f"aoti_torch_{device}_{name}_out") for name in ("mm", "addmm", "baddbmm"))
    addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
    wrap = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
    cpu.runtime_module().connect(device, tuple(addresses), current_device, current_stream, settings, set_products, wrap)


def settings(float32: bool) -> tuple[str, tuple[str, str] | None] | None:
    """The precision of products in kernels, and what torch's have to be set to for that and be set back to, if not as they are.

    None in the place of both where Triton has to make the launches itself, because a profiler listens to it.
    """
    if watched():
        return None
    precision = precision_of(torch.float32) if float32 else "ieee"
    return precision, products_for(precision) if float32 else None


_HOOKS = triton.knobs.runtime


def watched() -> bool:
    """Does a profiler of Triton's want to hear of launches?"""
    enter, leave = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
