"""Passes of the GPU engine that are recorded and run again, without a GPU: launches from C++ come back to the interpreter."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton_layers
from contract import relative

import fastrnn
from fastrnn import dispatch
from fastrnn.kernels import cpu, gpu

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or dispatch.native is None, reason="needs triton and the compiled runtime"
)


@pytest.fixture(scope="module")
def replaying() -> Iterator[Callable]:
    """Calls a function in a process that takes CPU tensors for a GPU's. New memory is full of large numbers there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_PERTURB_", "1")
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=_install) as worker:
            yield lambda function, *args: worker.submit(function, *args).result(timeout=300)


def _install() -> None:
    triton_layers.interpret()
    torch.set_num_threads(1)
    from dataclasses import replace

    from fastrnn.kernels.gpu import layer, tape
    from fastrnn.kernels.gpu.launch import Entry, Kernel

    target = replace(triton_layers.H100, off=("persistent",))
    gpu.HERE, gpu.why_not, gpu.off = "is_cpu", lambda device: None, lambda device: {"persistent": "interpreted"}
    gpu.device_of = layer.device_of = lambda device: target  # type: ignore[assignment]
    gpu.plan.cudnn_is_faster = lambda *given: False
    start = Kernel.start

    def started(self: Kernel, grid: tuple, arguments: dict, begin: int, end: int) -> None:
        start(self, grid, arguments, begin, end)
        if self.entry is None:
            own = [name for name in self.kernel.arg_names if name not in self.constants]
            self.kernel.params = [_parameter(self.kernel, name) for name in self.kernel.arg_names]
            self.entry = Entry(len(KNOWN), 1, 0, False, tuple(own), 0)
            KNOWN.append((self, {name: getattr(arguments.get(name), "dtype", None) for name in own}))

    Kernel.start = started  # type: ignore[method-assign]
    tape.on_gpu = cpu.runtime_module
    driver = SimpleNamespace(cuLaunchKernel=INTERPRET, cuLaunchCooperativeKernel=INTERPRET, cuCtxGetCurrent=None)
    tape.connect(
        "cpu", driver, ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")), lambda: DEVICE[0], int
    )


KNOWN: list[tuple[Any, dict]] = []  # kernels by their handles, with the dtypes of their arguments
DEVICE = [-1]  # the current one
PLAYED = [0]  # launches from C++


def _parameter(kernel: Any, name: str) -> SimpleNamespace:
    constant = "constexpr" in str(kernel.fn.__annotations__.get(name))
    return SimpleNamespace(name=name, is_constexpr=constant, do_not_specialize=name in kernel.kwargs["do_not_specialize"])


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t, *[ctypes.c_uint] * 7, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))
def INTERPRET(handle, x, y, z, *rest):
    """Start a kernel as the driver would, from the addresses of its arguments."""
    PLAYED[0] += 1
    kernel, dtypes = KNOWN[handle]
    given: dict[str, Any] = {}
    for at, (name, dtype) in zip(rest[-1], dtypes.items()):
        value = ctypes.c_int64.from_address(at).value
        if dtype is None:
            given[name] = value
        elif value:
            given[name] = torch.frombuffer((ctypes.c_char * 16).from_address(value), dtype=dtype)
        else:
            given[name] = torch.empty(0, dtype=dtype)
    kernel.kernel[(x, y, z)](**given, **kernel.constants, **kernel.options)
    return 0


def _results(module: Any, x: torch.Tensor, states: Any, marks: dict) -> dict[str, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    initial = [state.clone().requires_grad_() for state in states]
    lstm = isinstance(module, torch.nn.LSTM)
    y, last = module(leaf, (tuple(initial) if lstm else initial[0]) if initial else None, **marks)
    after = last if lstm else (last,)
    loss = y.double().square().sum() + sum(each.double().sin().sum() for each in after)
    module.zero_grad()
    loss.backward()
    found = {"y": y.detach(), "dx": leaf.grad, **{f"state {k}": each.detach() for k, each in enumerate(after)}}
    found |= {f"dstate {k}": each.grad for k, each in enumerate(initial)}
    return found | {f"d{name}": weight.grad.clone() for name, weight in module.named_parameters()}


def _errors(
    cell: str, sizes: dict, dtype: torch.dtype, begun: bool, marked: tuple[str, ...]
) -> tuple[dict[str, float], list[int], list[int]]:
    """The largest error by name over four calls of other numbers each, and how many passes of each ran in Python and in C++."""
    from fastrnn.kernels.gpu import layer as engine

    torch.manual_seed(0)
    T, B, I, H = sizes.pop("T", 3), 3, 5, sizes.pop("H", 16)
    ours = getattr(fastrnn, cell)(I, H, **sizes)
    truth = getattr(torch.nn if not marked else fastrnn, cell)(I, H, **sizes).double()
    worst: dict[str, float] = {}
    in_python, in_cpp = [0] * 4, [0] * 4
    passes = {name: getattr(engine, name) for name in ("forward", "backward")}
    with pytest.MonkeyPatch.context() as patch:
        for name, run in passes.items():

            def counted(*given, run=run):
                in_python[call] += 1
                return run(*given)

            patch.setattr(engine, name, counted)
        for call in range(4):
            weights = {name: torch.randn_like(weight) * H**-0.5 for name, weight in ours.state_dict().items()}
            ours.float().load_state_dict(weights)
            ours = ours.to(dtype)
            truth.load_state_dict({name: weight.double() for name, weight in ours.state_dict().items()})
            x = torch.randn(B, T, I) if sizes.get("batch_first") else torch.randn(T, B, I)
            depth = sizes.get("num_layers", 1) * (1 + sizes.get("bidirectional", False))
            states = [torch.randn(depth, B, H) for _ in range(1 + (cell == "LSTM"))] if begun else []
            every = {"resets": torch.rand(T, B) < 0.4, "lengths": torch.tensor([3, 0, 2])}
            marks = {name: every[name] for name in marked}
            x, states = x.to(dtype), [state.to(dtype) for state in states]
            before = PLAYED[0]
            found = _results(ours, x, states, marks)
            in_cpp[call] = PLAYED[0] - before
            with pytest.MonkeyPatch.context() as alone:
                alone.setattr(dispatch, "forced", "reference")
                alone.setattr(dispatch, "native", None)
                expected = _results(truth, x.double(), [state.double() for state in states], marks)
            for name, right in expected.items():
                worst[name] = max(worst.get(name, 0.0), relative(found[name].double(), right))
    return worst, in_python, in_cpp


def _odd_errors() -> dict[str, float]:
    """Of calls whose tensors share memory, are to be read negated, or repeat a number, in turns with others of their sizes."""
    torch.manual_seed(0)
    ours, errors = fastrnn.LSTM(16, 16), {}
    truth = torch.nn.LSTM(16, 16).double()
    truth.load_state_dict(ours.state_dict())
    one = torch.randn(1, 1, 16).expand(1, 3, 16).contiguous()
    forms = {
        "one state": (torch.randn(3, 3, 16), (one, one)),
        "two states": (torch.randn(3, 3, 16), (one, -one)),
        "a state that is a step": (lambda x: (x, (x[:1], x[1:2])))(torch.randn(3, 3, 16)),
        "negated": (torch.complex(torch.randn(3, 3, 16), torch.randn(3, 3, 16)).conj().imag, (one, one)),
        "repeated": (torch.randn(3, 3, 1).expand(3, 3, 16), (one, one)),
        "transposed": (torch.randn(3, 3, 16).transpose(0, 1), (one, one)),
    }
    with torch.no_grad():
        for _ in range(3):
            for name, (x, states) in forms.items():
                expected = truth(x.double(), tuple(state.double() for state in states))[0]
                errors[name] = relative(ours(x, states)[0].double(), expected)
    return errors


def test_tensors_of_all_kinds(replaying):
    """A tape knows arguments by their places, not by their memory."""
    assert {name: error for name, error in replaying(_odd_errors).items() if not error < 3e-6} == {}


def _faults() -> dict[str, str | None]:
    """Why passes have no tape, by what they do."""
    from fastrnn.kernels.gpu.tape import Recorder

    def written(x):
        return [x.add_(1)]

    def copied_onto(x):
        return [x.copy_(torch.zeros_like(x))]

    passes = {
        "an operation of another kind": lambda x: [x + 1],
        "a number is read": lambda x: [x * 0 + x.sum().item()],
        "an argument is written": written,
        "an argument is copied onto": copied_onto,
        "random numbers": lambda x: [torch.rand_like(x)],
        "a result is a part": lambda x: [torch.zeros(4, 6)[:2]],
        "a result is an argument": lambda x: [x],
        "two results are one": lambda x: [torch.zeros(6)] * 2,
        "a sum over another axis": lambda x: [x.sum(1)],
        "a scaled product": lambda x: [torch.zeros(4, 4).addmm_(x, x.t(), alpha=2)],
        "memory of another device": lambda x: [x.to("meta")],
        "nothing": lambda x: [x.clone(), torch.mm(x, x.t()), torch.cat([x, x]), x.sum(0)],
    }
    found = {}
    for name, run in passes.items():
        recorder = Recorder([torch.randn(4, 6)])
        with recorder:
            results = run(*recorder.arguments)
        words = recorder.words(results, 0)
        found[name] = None if words else recorder.fault
    return found


def test_passes_without_a_tape(replaying):
    faults = replaying(_faults)
    assert [name for name, fault in faults.items() if fault is None] == ["nothing"]


def _self_test(schedule: str, wrong: bool) -> tuple[str | None, int]:
    """What the self-test says of replays, and how many kernels C++ has started. wrong: a workspace is all one place."""
    from fastrnn.kernels.gpu import selftest, tape

    arrange = tape._arrange

    def in_one_place(parts):
        size = arrange(parts)
        for part in parts:
            part.offset = 0
        return size

    tape.forget()
    before = PLAYED[0]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if wrong:
            patch.setattr(tape, "_arrange", in_one_place)
        fault = selftest.replay_fault([schedule, "wavefront"], torch.device("cpu"), triton_layers.H100)
    return fault, PLAYED[0] - before


@pytest.mark.parametrize(("schedule", "launches"), [("single", 1 + 1), ("stepwise", 5 + 6)])
def test_the_self_test_replays(schedule, launches, replaying):
    """The third call of three. launches: of both passes, which C++ starts in the call that is recorded, too."""
    assert replaying(_self_test, schedule, False) == (None, 2 * launches)
    fault, _ = replaying(_self_test, schedule, True)
    assert fault is not None and fault.startswith(f"{schedule}: of a small layer ") and "differs" in fault


def _off() -> tuple[dict[str, float], list[int], list[int]]:
    """`_errors` on a device on which replaying is off."""
    from fastrnn.kernels.gpu import selftest, tape

    tape.forget()
    selftest.switch_off(torch.device("cpu"), selftest.REPLAY, "it is tried")
    try:
        return _errors("LSTM", {}, torch.float32, True, False)
    finally:
        selftest._off.clear()


def test_where_replaying_is_off_python_runs_every_pass(replaying):
    errors, in_python, in_cpp = replaying(_off)
    assert {name: error for name, error in errors.items() if not error < 3e-6} == {}
    assert in_python == [2] * 4 and in_cpp == [0] * 4


def test_parts_of_a_workspace_share_memory_only_where_no_step_needs_both():
    from types import SimpleNamespace

    from fastrnn.kernels.gpu.tape import _arrange

    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        numbers = torch.randint(1, 9, (12, 3), generator=random).tolist()
        parts = [SimpleNamespace(bytes=256 * size, first=first, last=first + length) for size, first, length in numbers]
        total = _arrange(parts)
        for index, one in enumerate(parts):
            assert one.offset >= 0 and one.offset + one.bytes <= total
            for other in parts[:index]:
                if one.first <= other.last and other.first <= one.last:
                    assert one.offset + one.bytes <= other.offset or other.offset + other.bytes <= one.offset
        assert total <= sum(part.bytes for part in parts)


CASES = {
    "lstm": ("LSTM", {}, torch.float32, False, ()),
    "gru from a state": ("GRU", {}, torch.float32, True, ()),
    "rnn in half precision": ("RNN", {}, torch.float16, True, ()),
    "lstm in bfloat16": ("LSTM", {}, torch.bfloat16, True, ()),
    "two directions, batch first": ("LSTM", {"bidirectional": True, "batch_first": True}, torch.float32, True, ()),
    "three layers": ("GRU", {"num_layers": 3, "bidirectional": True, "bias": False}, torch.float32, True, ()),
    "projected": ("LSTM", {"proj_size": 7, "H": 20}, torch.float32, False, ()),
    "stepwise": ("LSTM", {"T": 2, "H": 80, "proj_size": 70}, torch.float32, False, ()),
    "resets and lengths": ("LSTM", {"bidirectional": True}, torch.float32, False, ("resets", "lengths")),
    "resets": ("LSTM", {}, torch.float32, False, ("resets",)),
    "resets from a state": ("LSTM", {"bidirectional": True}, torch.float32, True, ("resets",)),
    "resets in bfloat16 from a state": ("GRU", {}, torch.bfloat16, True, ("resets",)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pass_that_is_run_again_computes_with_the_numbers_it_is_given(name, replaying):
    """The first call of each pass runs in Python, the second is recorded, and those after it run in C++ alone."""
    errors, in_python, in_cpp = replaying(_errors, *CASES[name])
    bound = 3e-6 if CASES[name][2] is torch.float32 else 2e-2
    assert {name: error for name, error in errors.items() if not error < bound} == {}
    layers = CASES[name][1].get("num_layers", 1)
    assert in_cpp[-1] > 8 or name != "stepwise"
    assert in_python[0] == 2 * layers and in_cpp[-1] >= 2 * layers
    passes = [2, 2, 1, 1] if name == "resets and lengths" else [2, 2, 0, 0]  # whose backward asks where rows end
    if layers == 1:  # else layers of one size share their tapes
        assert in_python == passes
    else:
        assert in_python[-1] == 0
