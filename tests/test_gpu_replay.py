"""Passes of the GPU engine that are recorded and run again, without a GPU: launches from C++ come back to the interpreter."""

from __future__ import annotations

import contextlib
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
from test_gpu_modules import at_once
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

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

    from fastrnn.kernels.gpu import layer, packed
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
    packed.capturing = lambda device: CAPTURE.on
    _connect()


def _connect(**products: Any) -> None:
    """Have C++ launch kernels in the interpreter. products: in the place of torch's own, by name."""
    from fastrnn.kernels.gpu import tape

    tape.on_gpu = cpu.runtime_module
    launch = dict.fromkeys(("cuLaunchKernel", "cuLaunchCooperativeKernel"), INTERPRET)
    driver = SimpleNamespace(**launch, cuCtxGetCurrent=None, cuStreamIsCapturing=IS_CAPTURING)
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    own = {name: getattr(torch_cpu, name) for name in (f"aoti_torch_cpu_{each}_out" for each in ("mm", "addmm", "baddbmm"))}
    tape.connect("cpu", driver, SimpleNamespace(**own | products), lambda: DEVICE[0], int)


KNOWN: list[tuple[Any, dict]] = []  # kernels by their handles, with the dtypes of their arguments
DEVICE = [-1]  # the current one
PLAYED = [0]  # launches from C++
CAPTURE = SimpleNamespace(on=False)  # of a CUDA graph


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


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int))
def IS_CAPTURING(stream, status):
    """Say whether a stream is capturing, as the driver would."""
    status[0] = CAPTURE.on
    return 0


def _results(module: Any, x: torch.Tensor, states: Any, marks: dict, lengths: Any = None) -> dict[str, torch.Tensor]:
    """Of a call and its backward pass, by name. lengths: those of the rows of x, which is packed."""
    leaf = x.clone().requires_grad_()
    initial = [state.clone().requires_grad_() for state in states]
    lstm = isinstance(module, torch.nn.LSTM)
    given = leaf if lengths is None else pack_padded_sequence(leaf, lengths, module.batch_first, enforce_sorted=False)
    y, last = module(given, (tuple(initial) if lstm else initial[0]) if initial else None, **marks)
    y, after = y.data if isinstance(y, PackedSequence) else y, last if lstm else (last,)
    loss = y.double().square().sum() + sum(each.double().sin().sum() for each in after)
    module.zero_grad()
    loss.backward()
    found = {"y": y.detach(), "dx": leaf.grad, **{f"state {k}": each.detach() for k, each in enumerate(after)}}
    found |= {f"dstate {k}": each.grad for k, each in enumerate(initial)}
    return found | {f"d{name}": weight.grad.clone() for name, weight in module.named_parameters()}


@contextlib.contextmanager
def _run_by_python() -> Iterator[list[str]]:
    """The passes that Python runs, which become more and more."""
    from fastrnn.kernels.gpu import layer

    ran: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward"):
            own = getattr(layer, name)
            patch.setattr(layer, name, lambda *given, name=name, own=own: (ran.append(name), own(*given))[1])
        yield ran


def _errors(
    cell: str, sizes: dict, dtype: torch.dtype, begun: bool, marked: tuple[str, ...]
) -> tuple[dict[str, float], list[int], list[int]]:
    """The largest error by name over four calls of other numbers each, and how many passes of each ran in Python and in C++."""
    torch.manual_seed(0)
    T, B, I, H, lengths = sizes.pop("T", 3), 3, 5, sizes.pop("H", 16), sizes.pop("lengths", None)
    ours = getattr(fastrnn, cell)(I, H, **sizes)
    truth = getattr(torch.nn if not marked else fastrnn, cell)(I, H, **sizes).double()
    worst: dict[str, float] = {}
    in_python, in_cpp = [0] * 4, [0] * 4
    with _run_by_python() as ran:
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
            before, ran[:] = PLAYED[0], []
            found = _results(ours, x, states, marks, lengths)
            in_python[call], in_cpp[call] = len(ran), PLAYED[0] - before
            with pytest.MonkeyPatch.context() as alone:
                alone.setattr(dispatch, "forced", "reference")
                alone.setattr(dispatch, "native", None)
                expected = _results(truth, x.double(), [state.double() for state in states], marks, lengths)
            for name, right in expected.items():
                worst[name] = max(worst.get(name, 0.0), relative(found[name].double(), right))
    return worst, in_python, in_cpp


FEATURES = {
    "zoneout": ({"zoneout": 0.2}, {}),
    "recurrent dropout": ({"recurrent_dropout": 0.2}, {}),
    "layer norm": ({"layer_norm": True}, {}),
    "heads": ({"num_heads": 2}, {}),
    "a learned state": ({"learn_initial_state": True}, {}),
    "resets": ({}, {"resets": torch.arange(9).view(3, 3) % 4 == 1}),
    "every state": ({}, {"all_states": True}),
}


def _last_in_python(settings: dict, marks: dict) -> list[str]:
    """The passes of the fourth call that Python runs."""
    module = fastrnn.LSTM(5, 16, **settings)
    with _run_by_python() as ran:
        for _ in range(4):
            ran.clear()
            y, (_, c), *after_steps = module(torch.randn(3, 3, 5, requires_grad=True), **marks)
            (y.sum() + c.sum() + sum(each.sum() for pair in after_steps for each in pair)).backward()
        return [*ran]


@pytest.mark.parametrize("feature", FEATURES)
def test_what_torch_nn_has_not_is_replayed_too(feature, replaying):
    assert replaying(_last_in_python, *FEATURES[feature]) == []


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


def _errors_of_lengths() -> tuple[dict[str, float], list[int]]:
    """Of packed rows of other lengths in turns, with as many steps and rows in all; and the passes of each that Python runs."""
    torch.manual_seed(0)
    ours, errors, in_python = fastrnn.GRU(5, 16), {}, []
    truth = torch.nn.GRU(5, 16).double()
    truth.load_state_dict(ours.state_dict())
    with _run_by_python() as ran:
        for turn in range(3):
            for lengths in ([4, 3, 1], [4, 2, 2], [2, 4, 2]):  # of the last two, the same batch_sizes
                x, ran[:] = torch.randn(4, 3, 5), []
                found = _results(ours, x, [], {}, lengths)
                in_python.append(len(ran))
                expected = _results(truth, x.double(), [], {}, lengths)
                errors |= {f"{turn} {lengths} {name}": relative(found[name].double(), expected[name]) for name in expected}
    return errors, in_python


def test_packed_rows_of_other_lengths(replaying):
    """A tape is for these batch_sizes alone; all sizes of tensors are those of the others."""
    errors, in_python = replaying(_errors_of_lengths)
    assert {name: error for name, error in errors.items() if not error < 3e-6} == {}
    assert in_python == [2, 2, 2, 2, 0, 0, 0, 0, 0]


def _in_one_piece(module: torch.nn.Module) -> None:
    """Have the parameters of layers of one size lie equally far apart, as cuDNN has them."""
    flat = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    for weight, own in zip(module.parameters(), flat.split([weight.numel() for weight in module.parameters()])):
        weight.data = own.view_as(weight)


def _errors_at_once() -> tuple[dict[str, float], list[int]]:
    """Of two modules of three layers at once, and the passes that Python runs in each call. The first's lie in one piece."""
    from fastrnn.kernels.gpu import layer as engine

    torch.manual_seed(0)
    engine._chosen.cache_clear()
    errors, in_python = {}, []
    both = [fastrnn.GRU(16, 16, 3) for _ in range(2)]
    _in_one_piece(both[0])
    with at_once(3) as started, _run_by_python() as ran:
        for call, which in enumerate((0, 0, 0, 1, 0)):
            x, ran[:] = torch.randn(4, 3, 16), []
            found = _results(both[which], x, [], {})
            in_python.append(len(ran))
            truth = torch.nn.GRU(16, 16, 3).double()
            truth.load_state_dict(both[which].state_dict())
            expected = _results(truth, x.double(), [], {})
            errors |= {f"{call} {name}": relative(found[name].double(), expected[name]) for name in expected}
    assert started == [3] * 5
    engine._chosen.cache_clear()
    return errors, in_python


def test_layers_at_once(replaying):
    """How far apart their weights lie is the same between all of them, or Python runs the pass."""
    errors, in_python = replaying(_errors_at_once)
    assert {name: error for name, error in errors.items() if not error < 3e-6} == {}
    assert in_python == [2, 2, 0, 2, 0]


@ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3)
def FAIL(out, a, b):
    """A product of torch's that raises."""
    return 1


def _where_a_product_fails() -> tuple[list[int], float]:
    """The passes that Python runs in calls before and after products fail in C++, and the error of the last."""
    module, x, found = fastrnn.GRU(5, 16), torch.randn(3, 2, 5), []
    truth = torch.nn.GRU(5, 16).double()
    truth.load_state_dict(module.state_dict())
    with torch.no_grad(), _run_by_python() as ran:
        try:
            for call in range(4):
                if call == 3:
                    _connect(aoti_torch_cpu_mm_out=FAIL)
                ran.clear()
                y = module(x)[0]
                found.append(len(ran))
        finally:
            _connect()
        return found, relative(y.double(), truth(x.double())[0])


def test_where_an_operation_of_torchs_fails_python_runs_the_pass(replaying):
    """It fails there too, with torch's words: as where deterministic algorithms are asked for that cuBLAS has not."""
    ran, error = replaying(_where_a_product_fails)
    assert ran == [1, 1, 0, 1] and error < 3e-6


# --- while a CUDA graph is captured


class _Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Note what a graph cannot hold: numbers of the CPU's that are read, copied or waited for."""

    def __init__(self, batch_sizes: torch.Tensor) -> None:
        super().__init__()
        self.memory, self.seen = batch_sizes.untyped_storage().data_ptr(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        named = any(word in str(func) for word in ("_local_scalar_dense", "pin_memory", "nonzero", "equal"))
        if named or (kwargs or {}).get("pin_memory") or ("_to_copy" in str(func) and (kwargs or {}).get("device")):
            self.seen.append(str(func))
        elif any(tensor.untyped_storage().data_ptr() == self.memory for tensor in tensors):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _copies(kind: str) -> list[list[str]]:
    """What each of two training steps does that a graph cannot hold."""
    from fastrnn.kernels.gpu import packed

    packed._kept.clear()
    torch.manual_seed(0)
    B, sizes = 3, torch.tensor([3, 2, 2, 1])
    marks = {"resets": torch.rand(8) < 0.4}
    x, batch_sizes = (torch.randn(8, 5), sizes) if kind == "packed" else (torch.randn(4, B, 5), None)
    if kind == "lengths":
        marks = {"resets": torch.rand(4, B) < 0.4, "lengths": torch.tensor([4, 0, 2])}
    weights = list(fastrnn.LSTM(5, 16).parameters())
    h0, c0, found = torch.randn(1, B, 16), torch.randn(1, B, 16), []
    more = marks.get("resets"), marks.get("lengths")
    copied, copies = packed._copied, _Copies(sizes)  # of which no mode sees the first
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_copied", lambda *given: (copies.seen.append("rows of steps"), copied(*given))[1])
        for _ in range(2):
            copies.seen = []
            with copies:
                y, h_n, c_n, saved = gpu.layer_forward(x, batch_sizes, h0, c0, weights, "lstm bias", True, *more)
                gpu.layer_backward(y, h_n, c_n, x, batch_sizes, h0, c0, weights, y, saved, "lstm bias", [True] * 3, *more)
            found.append(copies.seen)
    return found


@pytest.mark.parametrize("kind", ["packed", "lengths"])
def test_a_second_step_copies_nothing_from_the_cpu(kind, replaying):
    assert replaying(_copies, kind) == [["rows of steps"] * (kind == "packed"), []]


def _captured() -> dict[str, Any]:
    """What becomes of packed calls in the capture of a graph."""
    from fastrnn.kernels.gpu import packed, tape

    torch.manual_seed(0)
    tape.forget()
    packed._kept.clear()
    module, truth = fastrnn.GRU(5, 16), torch.nn.GRU(5, 16).double()
    truth.load_state_dict(module.state_dict())
    x, lengths, found = torch.randn(4, 3, 5), [4, 2, 1], {"unknown": ""}
    with pytest.MonkeyPatch.context() as patch, _run_by_python() as ran:
        patch.setattr(CAPTURE, "on", True)
        try:
            _results(module, x, [], {}, lengths)
        except RuntimeError as error:
            found["unknown"] = str(error)
        CAPTURE.on = False
        for _ in range(3):
            _results(module, x, [], {}, lengths)
        CAPTURE.on, ran[:] = True, []
        results, found["ran"] = _results(module, x, [], {}, lengths), [*ran]
        expected = _results(truth, x.double(), [], {}, lengths)
        found["error"] = max(relative(results[name].double(), expected[name]) for name in expected)
        (captured,) = packed._captured.values()
        CAPTURE.on = False
        patch.setattr(packed, "MOST", 2)
        for length in (1, 2, 3):
            _results(module, x, [], {}, [4, 3, length])
        found["kept"] = len(packed._kept)
        patch.setattr(packed, "_stream", lambda device: 7)
        found["stays"] = packed.rows_of_steps(torch.tensor([3, 2, 1, 1]), 3, 7, x.device) is captured
        other = packed.rows_of_steps(torch.tensor([3, 3, 2, 1]), 3, 9, x.device)
        patch.setattr(packed, "_stream", lambda device: 8)
        found["of a stream"] = packed.rows_of_steps(torch.tensor([3, 3, 2, 1]), 3, 9, x.device) is not other
    return found


def test_a_graph_keeps_what_it_reads(replaying):
    """Python runs a packed pass while a graph is captured: it sees to it that the rows of its steps stay where they are."""
    found = replaying(_captured)
    assert "run once what is to be captured" in found["unknown"] and found["ran"] == ["forward", "backward"]
    assert found["error"] < 3e-6 and found["kept"] == 2 and found["stays"] and found["of a stream"]


def _in_python_after_a_capture() -> list[int]:
    """How many passes Python runs in each of four calls, of which the first two are captured."""
    from fastrnn.kernels.gpu import tape

    tape.forget()
    module, x, found = fastrnn.RNN(5, 16), torch.randn(3, 2, 5), []
    with torch.no_grad(), _run_by_python() as ran, pytest.MonkeyPatch.context() as patch:
        for call in range(4):
            patch.setattr(CAPTURE, "on", call < 2)
            ran.clear()
            module(x)
            found.append(len(ran))
    return found


def test_no_pass_is_recorded_while_a_graph_is(replaying):
    """The device may not be tested yet, and has fewer schedules then."""
    assert replaying(_in_python_after_a_capture) == [1, 1, 1, 0]


def _recordings() -> list[int]:
    """How many passes of each of five calls are recorded, of which none gets a tape."""
    from fastrnn.kernels.gpu import tape

    tape.forget()
    module, x, found, made = fastrnn.LSTM(5, 16), torch.randn(3, 2, 5), [], []
    with pytest.MonkeyPatch.context() as patch:
        init = tape.Recorder.__init__
        patch.setattr(tape.Recorder, "__init__", lambda self, tensors: (made.append(self), init(self, tensors))[1])
        patch.setattr(tape.Recorder, "words", lambda *given: None)
        for _ in range(5):
            made.clear()
            module(x)[0].sum().backward()
            found.append(len(made))
    return found


def test_a_pass_without_a_tape_is_recorded_once(replaying):
    """Recording takes longer than running."""
    assert replaying(_recordings) == [0, 2, 0, 0, 0]


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
        "a copy on another device": lambda x: [x.to("meta")],
        "memory of another device": lambda x: [x.clone(), torch.empty(3, device="meta")][:1],
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
        fault = selftest.replay_fault([schedule], torch.device("cpu"), triton_layers.H100)
    return fault, PLAYED[0] - before


@pytest.mark.parametrize(("schedule", "launches"), [("single", 1 + 1), ("stepwise", 5 + 6)])
def test_the_self_test_replays(schedule, launches, replaying):
    """The third call of three. launches: of both passes, which C++ starts in the call that is recorded, too."""
    assert replaying(_self_test, schedule, False) == (None, 2 * launches)
    fault, _ = replaying(_self_test, schedule, True)
    assert fault is not None and fault.startswith(f"{schedule}: of a small layer ") and "differs" in fault


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["persistent", "wavefront"])
def test_the_self_test_replays_programs_that_meet(schedule, replaying):
    """All of a workspace in one place would have them wait for each other."""
    assert replaying(_self_test, schedule, False)[0] is None


def _off() -> tuple[dict[str, float], list[int], list[int]]:
    """`_errors` on a device on which replaying is off."""
    from fastrnn.kernels.gpu import selftest, tape

    tape.forget()
    selftest.switch_off(torch.device("cpu"), selftest.REPLAY, "it is tried")
    try:
        return _errors("LSTM", {}, torch.float32, True, ())
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
    "resets": ("LSTM", {"H": 24}, torch.float32, False, ("resets",)),
    "resets from a state": ("LSTM", {"bidirectional": True}, torch.float32, True, ("resets",)),
    "resets in bfloat16 from a state": ("GRU", {}, torch.bfloat16, True, ("resets",)),
    "packed": ("LSTM", {"bidirectional": True, "lengths": [1, 3, 2]}, torch.float32, True, ()),
    "packed, batch first": ("GRU", {"batch_first": True, "lengths": [3, 3, 1]}, torch.float32, False, ()),
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
    if layers == 1:  # else layers of one size share their tapes
        assert in_python == [2, 2, 0, 0]
    else:
        assert in_python[-1] == 0
