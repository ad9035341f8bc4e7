"""The self-test of a GPU without one: what it finds, what is kept, and what becomes of a schedule that fails. A fake device."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_layers

import fastrnn
from fastrnn import dispatch
from fastrnn.__main__ import info
from fastrnn.kernels import gpu
from fastrnn.kernels.gpu import selftest
from fastrnn.kernels.gpu.launch import Alarm, alarm
from fastrnn.kernels.gpu.plan import COOPERATIVE, Sizes, choose
from fastrnn.kernels.layer import Layer

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DEVICE = torch.device("cuda", 0)
LARGE = 500, 64, 768  # T, B, H: of a persistent plan, wherever there is one
RUN = selftest.run


class Fake:
    """A device that says of itself what it is told to, and what its self-test finds."""

    def __init__(self) -> None:
        self.capability, self.found, self.lasts, self.tests, self.capturing = (8, 6), {}, True, 0, False

    def properties(self, device) -> SimpleNamespace:
        major, minor = self.capability
        return SimpleNamespace(major=major, minor=minor, multi_processor_count=132, gcnArchName="gfx942:sramecc+")

    def run(self, device) -> tuple[dict[str, str], bool]:
        self.tests += 1
        return self.found, self.lasts


@pytest.fixture
def fake(monkeypatch, tmp_path) -> Iterator[Fake]:
    made = Fake()
    monkeypatch.setenv("FASTRNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", made.properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake 1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(selftest, "run", made.run)
    monkeypatch.setattr(selftest, "_driver", lambda: "driver 1")
    monkeypatch.setattr(selftest, "_off", {})
    monkeypatch.setattr(gpu, "asked", None)
    monkeypatch.setattr(gpu, "device_of_itself", lambda device: triton_layers.H100)
    gpu._unsupported.cache_clear()
    gpu._device.cache_clear()
    yield made
    gpu._unsupported.cache_clear()
    gpu._device.cache_clear()


def another_process() -> None:
    selftest._off.clear()


def schedule(T: int, B: int, H: int) -> str:
    return choose(gpu.device_of(DEVICE), Sizes(T, B, H, H, 1, 4, 2, "ieee"), True).schedule


@needs_triton
def test_a_device_that_passes_is_on_and_tested_once(fake):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.why_not(DEVICE) is None and schedule(*LARGE) == "persistent"
        another_process()
        assert gpu.why_not(DEVICE) is None and schedule(*LARGE) == "persistent"
    assert fake.tests == 1


@needs_triton
def test_a_wavefront_that_fails_leaves_layers_to_run_one_after_another(fake):
    call = Layer("lstm"), (500, 32, 512, 512), torch.float16, DEVICE, 4, True
    assert gpu.layers_at_once(*call) == (4,)
    another_process()
    fake.found = {"wavefront": "dw_ih[2] differs by 1"}
    selftest._path(selftest.identity(DEVICE)).unlink()
    with pytest.warns(
        RuntimeWarning, match=r"the wavefront schedule fails its self-test on Fake 1, and other schedules take its"
    ):
        assert gpu.layers_at_once(*call) == (1, 1, 1, 1)
    assert schedule(*LARGE) == "persistent"


@needs_triton
@pytest.mark.parametrize("name", ["persistent", "single"])
def test_a_schedule_that_fails_is_off(fake, name):
    fake.found = {name: "y differs by 1"}
    with pytest.warns(RuntimeWarning, match=f"the {name} schedule fails its self-test on Fake 1.*: y differs by 1") as seen:
        assert gpu.why_not(DEVICE) is None
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    assert schedule(*LARGE) == {"persistent": "stepwise", "single": "persistent"}[name]
    assert schedule(500, 64, 16) != name
    for _ in range(2):
        text = gpu.describe(Layer("lstm"), *LARGE, LARGE[-1], torch.float16, DEVICE, False)
        assert text.endswith(f"; no {name} schedule: y differs by 1")
        assert dict(info())["engine, cuda:0"].startswith(f"fastrnn's Triton kernels, without the {name} schedule: y differs")
        another_process()  # which says so without a warning, and without a test
    assert fake.tests == 1


@needs_triton
def test_where_replaying_fails_python_runs_every_pass(fake):
    fake.found = {"replay": "stepwise: of a small layer y differs by 1"}
    with pytest.warns(
        RuntimeWarning, match="the replay of passes fails its self-test on Fake 1, and Python runs every"
    ) as seen:
        assert gpu.why_not(DEVICE) is None
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    assert schedule(*LARGE) == "persistent"
    text = gpu.describe(Layer("lstm"), *LARGE, LARGE[-1], torch.float16, DEVICE, False)
    assert text.endswith("; no replay of passes: stepwise: of a small layer y differs by 1")
    assert ", without the replay of passes: stepwise: of a small" in dict(info())["engine, cuda:0"]


@needs_triton
def test_only_what_passes_is_replayed(fake, monkeypatch):
    """What a replay throws is its own fault, and not that of the schedule, whose layer has run before."""
    ran = []

    def layer_fault(schedule, device, target, replayed=False):
        ran.append((schedule, replayed))
        if replayed and schedule == "persistent":
            raise RuntimeError("CUDA error 700")
        return "y differs by 1" if schedule == "single" else None

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(selftest, "barrier_fault", lambda *given: None)
    monkeypatch.setattr(selftest, "layer_fault", layer_fault)
    assert RUN(DEVICE) == ({"single": "y differs by 1", "replay": "RuntimeError: CUDA error 700"}, True)
    assert ran == [*((name, False) for name in selftest.SCHEDULES), ("stepwise", True), ("persistent", True)]


@needs_triton
def test_where_the_stepwise_schedule_fails_the_engine_is_off(fake):
    fake.found = {"stepwise": "CompilationError: no"}
    with pytest.warns(RuntimeWarning, match="its layers run torch.nn's own code"):
        assert gpu.why_not(DEVICE) == "the engine fails its self-test there: CompilationError: no"


@needs_triton
def test_what_passes_is_not_kept(fake):
    fake.found, fake.lasts = {"persistent": "OutOfMemoryError: 2 MiB"}, False
    with pytest.warns(RuntimeWarning):
        gpu.why_not(DEVICE)
    another_process()
    fake.found, fake.lasts = {}, True
    assert schedule(*LARGE) == "persistent" and fake.tests == 2


@needs_triton
@pytest.mark.parametrize("change", ["device", "driver", "torch", "triton", "kernels", "runtime"])
def test_another_device_driver_triton_or_fastrnn_is_tested_again(fake, monkeypatch, change):
    gpu.why_not(DEVICE)
    known = selftest.identity(DEVICE)
    monkeypatch.setattr(selftest, "identity", lambda device: known | {change: "another"})
    another_process()
    gpu.why_not(DEVICE)
    assert fake.tests == 2


@needs_triton
@pytest.mark.parametrize("content", ["", "{", "[]", '{"off": 3}', '{"for": {}, "off": {"persistent": "no"}}'])
def test_a_spoilt_file_is_no_result(fake, content):
    gpu.why_not(DEVICE)
    (path,) = Path(selftest.cache_path()).glob("gpu-*.json")
    assert json.loads(path.read_text())["off"] == {}
    path.write_text(content)
    another_process()
    assert gpu.why_not(DEVICE) is None and fake.tests == 2


@needs_triton
def test_no_place_to_write(fake, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTRNN_CACHE_DIR", str(tmp_path / "file"))
    assert gpu.why_not(DEVICE) is None
    another_process()
    assert gpu.why_not(DEVICE) is None and fake.tests == 2


@needs_triton
def test_nothing_is_tried_while_a_graph_is_captured(fake):
    fake.capturing = True
    assert gpu.why_not(DEVICE) is None and schedule(*LARGE) == "stepwise" and fake.tests == 0
    fake.capturing = False
    assert schedule(*LARGE) == "persistent" and fake.tests == 1


@needs_triton
def test_the_environment_decides(fake, monkeypatch):
    fake.found = {"persistent": "no", "stepwise": "no"}
    monkeypatch.setattr(gpu, "asked", "0")
    assert gpu.why_not(DEVICE) == "FASTRNN_TRITON=0"
    monkeypatch.setattr(gpu, "asked", "1")
    assert gpu.why_not(DEVICE) is None and schedule(*LARGE) == "persistent" and fake.tests == 0
    monkeypatch.setattr(gpu, "asked", "yes")
    with pytest.raises(RuntimeError, match="FASTRNN_TRITON=yes: expected 0, 1 or nothing"):
        gpu.why_not(DEVICE)


@needs_triton
def test_what_is_too_old(fake, monkeypatch):
    fake.capability = (7, 5)
    monkeypatch.setattr(gpu, "asked", "1")
    assert gpu.why_not(DEVICE) == "compute capability 7.5, it takes 8.0 and above"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    gpu._unsupported.cache_clear()
    assert gpu.why_not(DEVICE) is None  # gfx942


@needs_triton
def test_a_launch_that_gave_up_is_told_at_the_next_call(fake):
    """And the device then does without persistent launches."""
    assert schedule(*LARGE) == "persistent"
    ours = Alarm(torch.device("cpu"))  # a word of the host's, as on a GPU
    ours.device = DEVICE
    ours.check()
    ours.word.fill_(1)
    with pytest.raises(RuntimeError, match="in an earlier call on cuda:0, programs of a persistent launch waited"):
        ours.check()
    ours.check()
    assert schedule(*LARGE) == "stepwise"
    off = gpu.off(DEVICE)
    assert off.keys() == {"persistent", "wavefront"} and all("waited for each other in vain" in why for why in off.values())


@needs_triton
def test_a_call_looks_at_the_alarm(monkeypatch):
    """The raw ops do, before anything else."""
    monkeypatch.setattr(selftest, "_off", {})
    here, inputs = torch.device("cpu"), [torch.zeros(1)] * 4
    calls = (*inputs, [], "lstm", True), (None, None, None, *inputs, [], *inputs[:2], "lstm", [True] * 3)
    for op, given in zip((gpu.layer_forward, gpu.layer_backward), calls, strict=True):
        alarm(here).word.fill_(1)
        with pytest.raises(RuntimeError, match="waited minutes for each other"):
            op(*given)
    assert not alarm(here).rang()


def test_a_process_without_a_gpu_tests_nothing(monkeypatch):
    monkeypatch.setattr(selftest, "run", None)
    module, x = fastrnn.LSTM(4, 5), torch.randn(3, 2, 4)
    assert fastrnn.explain(module, x).engine == "cpu" or dispatch.forced


# What it runs, in the interpreter


def _layer_faults(schedule: str, wrong: bool) -> str | None:
    from fastrnn.kernels.gpu import layer as engine

    right = engine._weight_gradients

    def halved(*args):
        gradients = right(*args)
        gradients[5] *= 0.5
        return gradients

    engine._weight_gradients = halved if wrong else right
    try:
        return selftest.layer_fault(schedule, torch.device("cpu"), triton_layers.H100)
    finally:
        engine._weight_gradients = right


@needs_triton
@pytest.mark.parametrize("schedule", ["single", "stepwise", "persistent", "wavefront"])
def test_the_layer_of_each_schedule(schedule, interpreted):
    if schedule not in COOPERATIVE:  # which take long to interpret, and of which the other gradients are right below, too
        assert interpreted(_layer_faults, schedule, False) is None
    assert interpreted(_layer_faults, schedule, True) == "of a small layer dw_hh[1] differs by 0.5"


def _alone(function: Callable, *args) -> str | None:
    """Call it where no program of a launch runs before the one ahead has ended, nor waits for more than 8 polls."""
    from fastrnn.kernels.gpu import barrier

    interpreted = barrier.wait.rewrite()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_layers, "Programs", triton_layers.Alone)
        patch.setattr(interpreted, "__defaults__", (8,))
        return function(*args)


@needs_triton
def test_the_barrier(interpreted):
    """Where programs do not run at once, two of them do not meet: the first gives up, and says so."""
    fault = "2 programs of a cooperative launch do not meet"
    for programs in (1, 2):
        assert interpreted(selftest.barrier_fault, torch.device("cpu"), programs) is None
    assert interpreted(_alone, selftest.barrier_fault, torch.device("cpu"), 2, 8) == fault


@needs_triton
@pytest.mark.parametrize("schedule", COOPERATIVE)
def test_a_launch_whose_programs_do_not_meet_ends(schedule, interpreted):
    found = interpreted(_alone, selftest.layer_fault, schedule, torch.device("cpu"), triton_layers.H100)
    assert found == "programs of a layer waited for each other in vain"
