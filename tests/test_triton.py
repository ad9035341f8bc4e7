"""The Triton engine without a GPU: its kernels in Triton's interpreter, its plans, and what its kernels compile to.

The interpreter runs programs one after another, so most layers run the steps of a persistent launch one launch each. Where
programs have to meet within a step they take turns (triton_layers.Programs); a real barrier is test_gpu.py's.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
import triton_layers
from contract import CELLS, pairwise
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_layers import Layer

import fastrnn
from bench import gpu_resources, record, report
from bench.gpu_resources import TARGETS
from fastrnn import cells, dispatch
from fastrnn.kernels import gpu
from fastrnn.kernels.gpu.plan import Device, Sizes, choose, layers_at_once, shared_bytes
from fastrnn.kernels.gpu.precision import precision_of, products_in
from fastrnn.kernels.layer import Inputs
from fastrnn.kernels.layer import Layer as Description

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


# --- kernels, in the interpreter

FACTORS = {
    "cell": tuple(CELLS),
    "tiles": ("single", "split", "resident", "wide"),
    "directions": (1, 2),
    "reverse": (False, True),
    "layout": ("time", "batch", "packed"),
    "bias": (True, False),
    "project": (False, True),
    "save": (True, False),
    "incoming": ("all", "dy", "dh_n", "dc_n"),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "marks": ("none", "resets", "lengths", "both"),
    "sizes": ((4, 3, 5, 19), (3, 18, 2, 7), (1, 4, 9, 33), (6, 5, 17, 40)),
}


def _possible(row: dict) -> bool:
    lstm = row.get("cell", "lstm") == "lstm"
    if row.get("tiles") == "single" and row.get("dtype") is torch.float32 and "sizes" in row and row["sizes"][3] > 32:
        return False  # no program holds such weights in registers
    if row.get("layout") == "packed" and row.get("marks") in ("lengths", "both"):
        return False
    return (lstm or not row.get("project")) and (lstm or row.get("incoming") != "dc_n")


LAYERS = [Layer(**row) for row in pairwise(FACTORS, _possible)]


@needs_triton
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_kernels(layer, interpreted):
    """Outputs, states, what is saved and every gradient, by name."""
    assert interpreted(triton_layers.faults, layer) == []


def _stacks() -> Iterator[Layer]:
    """Two to four layers at once, in every combination of two of these; in fewer sizes than one layer is."""
    factors = {name: FACTORS[name] for name in ("cell", "reverse", "layout", "bias", "save", "dtype")}
    fewer = {"incoming": ("all", "dh_n"), "marks": ("none", "both"), "layers": (2, 3, 4)}
    sizes = (5, 3, 5, 19), (3, 18, 2, 7), (1, 4, 9, 33)

    def possible(row: dict) -> bool:  # of lower layers nobody tells the reference on which side of relu half precision landed
        return _possible(row) and (row.get("cell") != "rnn_relu" or row.get("dtype", torch.float32) is torch.float32)

    for row in pairwise(factors | fewer | {"sizes": sizes}, possible):
        yield Layer(tiles="resident", **row)


STACKS = list(_stacks())


@needs_triton
@pytest.mark.parametrize("layer", STACKS, ids=str)
def test_layers_at_once(layer, interpreted):
    """As `test_kernels`, in one launch whose programs wait for those of their layer and of the one below or above."""
    assert interpreted(triton_layers.faults, layer) == []


OWN = ("slstm", "peephole_lstm", "odd", "mgu", "wide", "indrnn", "cifg", "leaky_rnn", "cfc", "every_function", "lstm", "gru")
OF_OWN = {
    "tiles": FACTORS["tiles"],
    "heads": (1, 2, 4),
    "directions": (2, 1),
    "layout": FACTORS["layout"],
    "dtype": FACTORS["dtype"],
    "marks": ("none", "both", "resets"),
}


def _quick(row: dict) -> bool:
    """Half precision, which is run on three seeds, in few programs."""
    few = row.get("heads", 1) == row.get("directions", 1) == 1
    return _possible(row) and (few or row.get("dtype", torch.float32) is torch.float32)


JUMPS = ("odd", "every_function")  # not continuous: what half precision rounds decides by chance on which side a number is


def _own_layers() -> Iterator[Layer]:
    every, smooth = itertools.cycle(OWN), itertools.cycle(cell for cell in OWN[::-1] if cell not in JUMPS)
    for row in pairwise(OF_OWN, _quick):
        yield Layer(next(every if row["dtype"] is torch.float32 else smooth), **row, sizes=(2, 3, 5, 19))


OWN_LAYERS = list(_own_layers())


@needs_triton
@pytest.mark.parametrize("layer", OWN_LAYERS, ids=str)
def test_cells_of_ones_own(layer, interpreted):
    """Cells that come with fastrnn, one with everything, one with many gates and states, one of every function."""
    assert interpreted(triton_layers.faults, layer) == []


WITH_NOISE = {
    "noise": ("both", "mask", "zoneout", "evaluation"),
    "cell": ("lstm", "gru", "rnn_tanh", "slstm"),
    "tiles": FACTORS["tiles"],
    "heads": (1, 2),
    "project": (False, True),
    "save": (True, False),
    "reverse": (False, True),
    **{name: OF_OWN[name] for name in ("directions", "layout", "dtype", "marks")},
}
NOISY = [
    Layer(**row, sizes=(3, 4, 2, 19))
    for row in pairwise(WITH_NOISE, lambda row: _quick(row) and not (row.get("project") and row.get("heads", 1) > 1))
]


@needs_triton
@pytest.mark.parametrize("layer", NOISY, ids=str)
def test_masks_and_noise(layer, interpreted):
    """What recurrent dropout and zoneout bring to a call, with all else that a call may have."""
    assert interpreted(triton_layers.faults, layer) == []


NORMED = {
    "cell": ("lstm", "gru", "rnn_tanh"),
    "tiles": FACTORS["tiles"],
    "noise": ("none", "both"),
    "heads": (1, 2),
    **{name: OF_OWN[name] for name in ("directions", "layout", "dtype", "marks")},
}


def _normed_layers() -> Iterator[Layer]:
    def possible(row: dict) -> bool:
        return _quick(row) and not (row.get("heads", 1) > 1 and row.get("tiles") == "single")  # which has all that is reduced

    for row in pairwise(NORMED, possible):
        yield Layer(**row, norm=True, sizes=(2, 3, 2, 7 if row["heads"] > 1 else 19))
    for tiles, dtype in (("single", torch.bfloat16), ("split", torch.float32), ("resident", torch.float16)):
        yield Layer(tiles=tiles, dtype=dtype, norm=True, project=True, sizes=(2, 3, 2, 19))


@needs_triton
@pytest.mark.parametrize("layer", [*_normed_layers()], ids=str)
def test_layer_norm(layer, interpreted):
    """In a single program, and in several that exchange what they know of a row."""
    assert interpreted(triton_layers.faults, layer) == []


OF_STATES = [
    Layer("lstm", "single", directions=2, layout="batch", marks="both", dc_steps=True),
    Layer("lstm", "split", layout="packed", reverse=True, project=True, dc_steps=True),
    Layer("slstm", "resident", heads=2, directions=2, marks="resets", dc_steps=True, sizes=(3, 3, 2, 7)),
    Layer("lstm", "wide", norm=True, dtype=torch.bfloat16, marks="lengths", dc_steps=True, sizes=(3, 3, 2, 19)),
]


@needs_triton
@pytest.mark.parametrize("layer", OF_STATES, ids=str)
def test_gradients_of_every_state(layer, interpreted):
    """What a caller's gradient of each step's c adds to those that are carried back."""
    assert interpreted(triton_layers.faults, layer) == []


TOGETHER = [
    Layer("lstm", "split", directions=2, project=True, marks="both", together=True),
    Layer("gru", "resident", layout="packed", noise="both", dtype=torch.float16, together=True, sizes=(3, 18, 3, 35)),
]


@needs_triton
@pytest.mark.parametrize("layer", TOGETHER, ids=str)
def test_programs_that_meet(layer, interpreted):
    """A persistent launch, whose programs take turns: what one needs of others is there when they have met."""
    assert interpreted(triton_layers.faults, layer) == []


@needs_triton
def test_a_missing_meeting_is_found(interpreted):
    """The control of the tests above: without the first meeting of a step others' moments are those of the step before."""
    assert interpreted(_faults_without_a_meeting)


def _faults_without_a_meeting() -> list[str]:
    from fastrnn.kernels.gpu import barrier, rows

    right = rows.FUNCTIONS["meet"]
    rows.FUNCTIONS["meet"] = lambda counter, met, gave_up, programs: barrier.arrive(counter)
    try:
        return triton_layers.faults(Layer("rnn_tanh", "split", norm=True, sizes=(2, 3, 2, 70)))
    finally:
        rows.FUNCTIONS["meet"] = right


def test_where_no_schedule_has_layer_norm(monkeypatch):
    """Stepwise launches have not, nor single programs of one head among several: the reference runs."""
    monkeypatch.setattr(gpu, "device_of", lambda device: triton_layers.H100)
    for H, words in (
        (768, "forward: persistent, 16 units"),
        (9000, "forward: the reference, operation by operation: no schedule"),
    ):
        own = Description(Layer(norm=True).kind.name, bias=True)
        assert gpu.describe(own, 64, 16, H, H, torch.float16, torch.device("cuda"), True).startswith(words)
    sizes = Sizes(64, 16, 64, 64, 2, 4, 2, "ieee", meetings=(2, 4), heads=2)
    assert choose(triton_layers.H100, sizes, True).schedule == "persistent"
    with pytest.raises(ValueError, match=r"schedule: expected one that .* has"):
        choose(triton_layers.H100, sizes, True, "stepwise")
    for lacking in (replace(sizes, H=5000, R=5000), replace(sizes, B=10)):
        device = replace(triton_layers.H100, off=("persistent",)) if lacking.B == 10 else triton_layers.H100
        with pytest.raises(ValueError, match=r"schedule: expected one that .* has"):
            choose(device, lacking, False)


@needs_triton
def test_noise_goes_with_cells_that_ask_for_it():
    """Others would read past an end."""
    from fastrnn.kernels.gpu.layer import Call

    layer = Layer(noise="zoneout")
    made = layer.arguments()
    *given, weights, own = made.values()
    inputs = Inputs(*given)
    with pytest.raises(RuntimeError, match=r"fastrnn: lstm_zoneout_.* needs noise"):
        Call(own, inputs._replace(noise=None), weights)
    with pytest.raises(RuntimeError, match="fastrnn: lstm takes no noise"):
        Call(own._replace(cell="lstm"), inputs, weights)


NOISE = {"recurrent_dropout": 0.3, "zoneout": 0.2}


@needs_triton
@pytest.mark.parametrize(
    ("cell", "heads", "settings"),
    [("slstm", 2, {}), pytest.param("odd", 1, {}, marks=pytest.mark.slow), ("mgu", 1, NOISE | {"layer_norm": True})],
    ids=str,
)
def test_modules_of_cells_of_ones_own(cell, heads, settings, interpreted):
    """First and second derivatives, mapped, compiled and recomputed, in two directions."""
    assert interpreted(triton_layers.faults_of_module, cell, heads, settings) == []


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("cell", OWN)
@pytest.mark.parametrize("tiles", FACTORS["tiles"])
def test_cells_of_ones_own_in_every_combination(cell, tiles, interpreted):
    factors = {**OF_OWN, "cell": (cell,), "tiles": (tiles,), "reverse": (False, True), "save": (True, False)}
    factors |= {"incoming": ("all", "dy", "dh_n", "dc_n"), "sizes": ((4, 3, 3, 29), (5, 18, 2, 16))}
    factors["dtype"] = (torch.float32,) if cell in JUMPS else FACTORS["dtype"]
    states = Layer(cell).kind.states
    for row in pairwise(factors, lambda row: _possible({**row, "cell": "lstm" if states else "gru"})):
        assert interpreted(triton_layers.faults, Layer(**row)) == [], row


_WHOLE = {**FACTORS, "sizes": ((5, 18, 3, 37), (3, 5, 2, 29)), "incoming": ("all",), "save": (True,), "bias": (True,)}
_WHOLE |= {"marks": ("none", "both")}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tiles", FACTORS["tiles"])
def test_kernels_in_every_combination(cell, tiles, interpreted):
    factors = {**_WHOLE, "cell": (cell,), "tiles": (tiles,)}
    for row in (dict(zip(factors, values)) for values in itertools.product(*factors.values())):
        if _possible(row):
            assert interpreted(triton_layers.faults, Layer(**row)) == [], row


@needs_triton
@pytest.mark.parametrize("tiles", ["split", "wide"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_kernels_with_the_chosen_chunks(cell, tiles, interpreted):
    """Chunks as on a device: longer than the sum, and no divisor of it."""
    assert interpreted(triton_layers.faults, Layer(cell, tiles, chunk=0, sizes=(2, 2, 3, 70))) == []


FLOAT32 = [
    Layer(cell, tiles, precision="tf32x3") for cell, tiles in (("lstm", "resident"), ("gru", "wide"), ("lstm", "single"))
]


@needs_triton
@pytest.mark.parametrize("layer", FLOAT32, ids=str)
def test_float32_by_three_products_of_tensor_cores(layer, interpreted):
    """What a GPU runs in IEEE precision; the interpreter multiplies in float32 at once."""
    assert interpreted(triton_layers.faults, layer) == []


@needs_triton
def test_a_wrong_kernel_is_found(interpreted):
    """The control of the tests above: one gradient of one cell off by one part in a thousand is named."""
    assert any(fault.startswith("db_hh0: error") for fault in interpreted(_faults_with_a_wrong_cell))


def _faults_with_a_wrong_cell() -> list[str]:
    from fastrnn.kernels.gpu import layer as engine

    right = engine._weight_gradients

    def wrong(*args):
        gradients = right(*args)  # of W_ih, W_hh, b_ih and b_hh
        gradients[3] *= 1.001
        return gradients

    engine._weight_gradients = wrong
    try:
        return triton_layers.faults(Layer("gru", "single"))
    finally:
        engine._weight_gradients = right


@needs_triton
def test_elementary_functions(interpreted):
    """Relative error within 4 eps, near zero too; infinities and NaN as in torch."""
    errors = interpreted(triton_layers.elementary_errors)
    # 2^x of a number near 88 carries the rounding of its argument: sigmoid(-x) and no more than that many times
    bounds = {name: 4 if name != "sigmoid -1" else 90 for name in errors}
    assert {name: e for name, e in errors.items() if e > bounds[name] * torch.finfo(torch.float32).eps} == {}


# --- plans

DEVICES = [device for _, device in TARGETS.values()] + [Device("cuda", 86, 46, 99 * 1024), Device("cuda", 90, 8, 227 * 1024)]
PRECISIONS = ((2, "ieee"), (4, "tf32"), (4, "tf32x3"), (4, "ieee"))


def _draw(draw: random.Random) -> Sizes:
    H = draw.choice((1, 3, 16, 33, 64, 100, 128, 192, 256, 500, 768, 1024, 2048, 5000, 20000))
    T, B = draw.choice((1, 2, 50, 1000, 200_000)), draw.choice((1, 2, 16, 33, 64, 128, 1000, 100_000))
    gates = draw.choice((1, 2, 3, 4, 8, 33))
    R = draw.randint(1, H) if gates == 4 else H
    return Sizes(T, B, H, R, draw.choice((1, 2, 8)), gates, *draw.choice(PRECISIONS), values=draw.choice((1, 7, 14)))


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_plan_is_complete_and_fits(device):
    draw = random.Random(0)
    for _ in range(1000):
        sizes, forward = _draw(draw), draw.random() < 0.5
        plan = choose(device, sizes, forward)
        assert plan == choose.__wrapped__(device, sizes, forward)  # not remembered: chosen again
        assert shared_bytes(device, sizes, forward, plan) <= device.shared_bytes
        assert plan.units * plan.blocks >= sizes.H and plan.outputs * plan.blocks >= sizes.R, (sizes, plan)
        if plan.schedule == "persistent":  # every program has a multiprocessor of its own
            assert device.backend == "cuda"
            assert plan.blocks * sizes.D * plan.groups <= device.multiprocessors
        if plan.schedule == "single":
            assert plan.blocks == 1


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        (Sizes(1024, 16, 768, 768, 1, 4, 2, "ieee"), "persistent 16 kept", "persistent 16 kept"),
        (Sizes(1500, 32, 1024, 1024, 1, 3, 2, "ieee"), "persistent 16 kept", "persistent 16 kept"),
        (Sizes(512, 32, 128, 128, 1, 4, 2, "ieee"), "persistent 16 kept", "persistent 16 kept"),
        (Sizes(512, 32, 64, 64, 1, 4, 2, "ieee"), "single 16", "single 16"),
        (Sizes(10, 100_000, 64, 64, 1, 4, 2, "ieee"), "single 16", "single 16"),
        (Sizes(25, 64, 2048, 2048, 1, 4, 2, "ieee"), "persistent 64", "persistent 64"),
        (Sizes(25, 64, 9000, 9000, 1, 4, 2, "ieee"), "stepwise 64", "stepwise 64"),
        (Sizes(1, 64, 512, 512, 1, 4, 2, "ieee"), "stepwise 64", "persistent 16 kept"),
    ],
    ids=str,
)
def test_what_an_h100_runs(sizes, forward, backward):
    """Schedule, rows of a program, and whether it keeps its weights."""
    found = [choose(triton_layers.H100, sizes, which) for which in (True, False)]
    words = [f"{plan.schedule} {plan.rows}" + " kept" * plan.resident for plan in found]
    assert words == [forward, backward]


@pytest.mark.parametrize(
    ("sizes", "layers", "parts"),
    [
        (Sizes(256, 32, 512, 512, 1, 4, 2, "ieee"), 4, (4,)),
        (Sizes(256, 32, 512, 512, 1, 4, 4, "tf32"), 4, (4,)),
        (Sizes(256, 32, 512, 512, 1, 4, 4, "tf32"), 5, (3, 2)),
        (Sizes(256, 16, 768, 768, 1, 4, 2, "ieee"), 3, (2, 1)),
        (Sizes(256, 32, 1536, 1536, 1, 4, 2, "ieee"), 2, (1, 1)),  # one of them has the whole device
        (Sizes(3, 32, 512, 512, 1, 4, 2, "ieee"), 4, (1, 1, 1, 1)),  # fewer steps than a span
        (Sizes(256, 32, 512, 256, 1, 4, 2, "ieee"), 2, (1, 1)),  # projected
        (Sizes(256, 32, 512, 512, 1, 4, 4, "tf32x3"), 2, (1, 1)),
    ],
    ids=str,
)
def test_which_layers_run_at_once(sizes, layers, parts):
    """On an H100, as many as fit and as the estimate says are faster so, and in any other part none at all."""
    assert layers_at_once(triton_layers.H100, sizes, layers, training=True) == parts
    for forward in (True, False):
        for count in set(parts) - {1}:
            plan = choose(triton_layers.H100, replace(sizes, layers=count), forward)
            assert plan.blocks * count * plan.groups <= triton_layers.H100.multiprocessors
    without = replace(triton_layers.H100, off=("wavefront",))
    assert layers_at_once(without, sizes, layers, training=True) == (1,) * layers


@needs_triton
@pytest.mark.parametrize("sizes", [[2, 1], [1, 2], [2, 2, 2], [5, 0], [6, -1]])
def test_malformed_packed_sequences_are_refused(sizes):
    """They would have kernels read and write beyond x and y."""
    from fastrnn.kernels.gpu.layer import Call

    x, h0, w_ih, w_hh = torch.randn(5, 3), torch.zeros(1, sizes[0], 4), torch.randn(12, 3), torch.randn(12, 4)
    with pytest.raises(RuntimeError, match="fastrnn: batch_sizes "):
        Call(Description("gru"), Inputs(x, torch.tensor(sizes), h0, None), [w_ih, w_hh])


def test_a_schedule_can_be_named():
    sizes = Sizes(100, 16, 4096, 4096, 1, 4, 2, "ieee")
    assert choose(triton_layers.H100, sizes, True, "stepwise").schedule == "stepwise"
    with pytest.raises(ValueError, match=r"schedule: expected .*, got single"):
        choose(triton_layers.H100, sizes, True, "single")


def test_a_launch_has_as_many_rows_as_fit_its_grid():
    """A range of rows a launch, where the grid of all would not fit."""
    case = gpu_resources.Case("sm_90", "lstm", True, torch.float16, "ieee", 1000, 1024, 1024, 1, False, None)
    plan = choose(TARGETS["sm_90"][1], gpu_resources.sizes_of(case), True, "persistent")
    started = [launch for launch in gpu_resources.launches(replace(case, plan=plan)) if "CELL" in launch.arguments]
    first = [launch.arguments["first_row"] for launch in started]
    assert first == list(range(0, 1000, plan.groups * plan.rows)) and len(first) > 1
    assert all(launch.grid[0] <= 132 and launch.options["launch_cooperative_grid"] for launch in started)
    assert all(launch.arguments["SYNC"] for launch in started)


# --- compiled code


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    with gpu_resources.pool() as workers:
        yield workers


def _assert_resources(cases: list, workers: ProcessPoolExecutor) -> None:
    wrong = [f"{usage.case}: {faults}" for usage in workers.map(gpu_resources.measure, cases) if (faults := usage.faults())]
    assert not wrong, "\n".join(wrong)


SLOW = {"sm_80", "sm_100"}  # half a minute each, for the same kernels and nearly the same plans as sm_90's


@needs_triton
@pytest.mark.parametrize("target", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TARGETS])
def test_resources(target, compilers):
    """What is chosen for small, middle and large layers compiles with few spills if any, within the device's limits."""
    _assert_resources(_chosen(target, ("lstm", "gru"), units=(64, 768), rows=(16,)), compilers)


def _chosen(target: str, cells, layers: int = 1, **limits) -> list:
    """Plans that are chosen for layers of one direction, so many at once, and none that has to be named."""
    found = [case for case in gpu_resources.cases(target, cells, **limits) if case.D == 1 and case.layers == layers]
    device = TARGETS[target][1]
    return [case for case in found if choose(device, gpu_resources.sizes_of(case), case.forward) == case.plan]


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(SLOW))])
def test_resources_of_layers_at_once(target, compilers):
    cells = ("lstm",) if target == "sm_90" else ("lstm", "gru", "rnn_tanh")
    cases = _chosen(target, cells, layers=4, units=(512,), rows=(32,))
    assert {case.plan.schedule for case in cases} == {"wavefront"}
    _assert_resources(cases, compilers)


@needs_triton
@pytest.mark.parametrize("target", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TARGETS])
def test_every_function_compiles(target, monkeypatch):
    monkeypatch.setattr(cells, "every_function", triton_layers.every_function, raising=False)
    for forward in (True, False):
        assert _compiled(target, forward, "single", H=32, cell="every_function").asm


@needs_triton
def test_resources_of_a_cell_of_ones_own(compilers):
    """The cell with the most states and the longest formulas of those that come with fastrnn; the others are slow tests."""
    cases = [case for case in _chosen("sm_90", ("slstm",), units=(768,), rows=(16,)) if case.dtype is torch.float16]
    assert len(cases) == 2
    _assert_resources(cases, compilers)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("cell", gpu_resources.OWN)
@pytest.mark.parametrize("target", [name for name in TARGETS if name != "gfx942"])
def test_resources_of_cells_of_ones_own(target, cell, compilers):
    """Dense and in one direction; and packed, in two directions, with four heads."""
    _assert_resources(list(gpu_resources.cases(target, (cell,), units=(64, 256, 768, 2048), rows=(16, 64))), compilers)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_resources_of_every_plan(target, compilers):
    _assert_resources(list(gpu_resources.cases(target)), compilers)


@needs_triton
@pytest.mark.parametrize("more", [{}, {"noisy": True}, {"normed": True}], ids=lambda more: "".join(more) or "plain")
@pytest.mark.parametrize("target", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TARGETS])
def test_resources_with_resets_and_lengths(target, more, compilers):
    """They, and masks and noise, or layer norm, take no more than the bounds by which plans are chosen."""
    sizes = [("lstm", 64), ("lstm", 768), ("gru", 768), ("rnn_tanh", 64)]
    if more == {"normed": True} and TARGETS[target][1].backend == "hip":  # programs do not meet there: one takes all units
        sizes = [("lstm", 32), ("gru", 32), ("rnn_tanh", 64)]
    plain = [
        gpu_resources.Case(target, cell, forward, torch.float16, "ieee", 64, H, H, 1, False, None, marked=True, **more)
        for cell, H in sizes
        for forward in (True, False)
    ]
    device = TARGETS[target][1]
    _assert_resources(
        [replace(case, plan=choose(device, gpu_resources.sizes_of(case), case.forward)) for case in plain], compilers
    )


def _compiled(target: str, forward: bool, schedule: str, B: int = 16, H: int = 768, **changes):
    case = gpu_resources.Case(target, "lstm", forward, torch.float16, "ieee", B, H, H, 1, False, None)
    case = replace(case, **changes)
    case = replace(case, plan=case.plan or choose(TARGETS[target][1], gpu_resources.sizes_of(case), forward, schedule))
    (launch,) = (launch for launch in gpu_resources.launches(case) if "CELL" in launch.arguments)
    return gpu_resources.compile_launch(launch, target)


@needs_triton
@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_what_programs_exchange_is_ordered(target, forward):
    """One release and one acquire at gpu scope, between CTA barriers; what others have stored is loaded past L1, after it."""
    code = _compiled(target, forward, "persistent").asm["ptx"]
    (release,) = (found.start() for found in re.finditer(r"atom\.global\.gpu\.release", code))
    (acquire,) = (found.start() for found in re.finditer(r"(atom|ld)\.global\.gpu\.acquire", code))  # adding 0 is a load
    assert release < acquire
    assert "bar.sync" in code[:release] and "bar.sync" in code[acquire:]
    exchanged = [load.start() for load in re.finditer(r"ld\.global\.cg\.v4", code)]
    assert exchanged and "ld.global.cg.b16" not in code  # 16 bytes at a time
    # the loop's head, where h is loaded, stands before the barrier; nothing is loaded so between arrival and return
    assert not [at for at in exchanged if release < at < acquire]


@needs_triton
@pytest.mark.parametrize("forward", [True, False])
def test_no_program_waits_for_ever(forward):
    """A loop of polls has a bound, which is in the code, and what is beyond it writes the host's word."""
    code = _compiled("sm_90", forward, "persistent").asm["ptx"]
    assert re.search(r"setp\.\w+\.[su]32 .*268435456", code) or re.search(r"26843545[56]", code)
    assert len(re.findall(r"atom\.global\.gpu\.relaxed", code)) == 1


@needs_triton
@pytest.mark.parametrize("schedule", ["single", "stepwise", "persistent", "wavefront"])
@pytest.mark.parametrize("forward", [True, False])
def test_lengths_are_run_time_arguments(forward, schedule):
    """Another T, B, first row or range of steps is the same kernel, whether it is one or a multiple of 16 or not."""
    case = gpu_resources.Case("sm_90", "lstm", forward, torch.float16, "ieee", 32, 64, 64, 1, False, None)
    case = replace(case, layers=2 if schedule == "wavefront" else 1)
    plan = choose(TARGETS["sm_90"][1], gpu_resources.sizes_of(case), forward, schedule)
    scans = [launch for launch in gpu_resources.launches(replace(case, plan=plan)) if "CELL" in launch.arguments]
    assert scans
    for launch in scans:
        numbers = {name for name, value in launch.arguments.items() if isinstance(value, int)}
        free = {each.name for each in launch.kernel.params if each.name in numbers and not each.annotation_type}
        free -= {each.name for each in launch.kernel.params if each.is_constexpr}
        assert {"T", "B", "N"} <= free == {each.name for each in launch.kernel.params if each.do_not_specialize}


@needs_triton
@pytest.mark.parametrize(("target", "instruction"), [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05.mma")])
def test_tensor_cores_are_used(target, instruction):
    assert instruction in _compiled(target, True, "single", H=64).asm["ptx"]


# --- dispatch


def test_what_is_left_to_cudnn_is_what_it_was_faster_at():
    """The rule against the times it is made from: forward and training step both one way, by a tenth, and it agrees."""
    points = json.loads((record.RESULTS / "gpu.json").read_text())["points"]
    decided = 0
    for point in points:
        ratios = [point[mode]["ratio"] for mode in ("forward", "train")]
        if max(ratios) < 1 / 1.1 or min(ratios) > 1.1:
            assert report.left_to_cudnn(point["point"]) == (max(ratios) < 1), (point["name"], ratios)
            decided += 1
    assert decided > 80


@pytest.fixture
def set_precision():
    """Set what torch.nn's layers may round float32 to; not by monkeypatch, as torch 2.10 has such attributes and lists none."""
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    yield lambda precision: setattr(rnn, "fp32_precision", precision)
    rnn.fp32_precision = before


def test_calls_are_left_to_cudnn_by_their_sizes(monkeypatch, set_precision):
    monkeypatch.setattr(gpu, "device_of", lambda device: triton_layers.H100)

    def left(cell, T, B, H, layers=1, directions=1, batch_first=False, batch_sizes=None, dtype=torch.float16):
        x = torch.empty(*((B, T) if batch_first else (T, B)), 5, dtype=dtype, device="meta")
        w_hh = torch.empty({"lstm": 4, "gru": 3}.get(cell, 1) * H, H, device="meta")
        own = Description(cell, directions, batch_first=batch_first)
        return dispatch.leaves_to_cudnn(own, x, batch_sizes, w_hh, layers)

    assert left("lstm", 500, 16, 768) and left("lstm", 500, 16, 768, batch_first=True)
    assert not left("lstm", 500, 64, 768) and not left("lstm", 500, 64, 768, batch_first=True)
    assert left("lstm", 64, 500, 768) and left("lstm", 64, 500, 768, batch_first=True)
    assert not left("lstm", 500, 16, 768, layers=2) and not left("lstm", 500, 16, 768, directions=2)
    assert not left("lstm", 500, 16, 768, batch_sizes=torch.full((500,), 16)) and not left("lstm", 500, 16, 700)
    assert left("lstm", 500, 64, 2048, layers=2) and not left("rnn_relu", 500, 64, 2048)
    assert not left("lstm", 500, 32, 1536, layers=2) and left("lstm", 500, 32, 1600, layers=2)  # weights no longer stay
    assert left("gru", 1, 64, 512)
    set_precision("ieee")
    assert left("gru", 500, 64, 512, dtype=torch.float32) and not left("gru", 500, 64, 512)  # as are parts of numbers
    assert left("gru", 500, 64, 128, dtype=torch.float32) and not left("gru", 500, 64, 256, dtype=torch.float32)
    assert left("gru", 500, 64, 256, dtype=torch.float64)
    small = ("lstm", 500, 16, 768)
    with fastrnn.recompute():
        assert not left(*small)
    with torch.autograd.forward_ad.dual_level():
        assert not left(*small)
    seen = []
    torch.func.vmap(lambda x: seen.append(left(*small)) or x)(torch.zeros(2))
    assert seen == [False]
    traced = torch.compile(lambda x: x + left(*small), backend="eager", fullgraph=True)
    assert traced(torch.zeros(1)) == 0
    monkeypatch.setattr(gpu, "device_of", lambda device: TARGETS["sm_100"][1])
    assert not left(*small)
    monkeypatch.setattr(dispatch, "forced", "triton")
    assert not left("gru", 1, 64, 512)


def test_a_wide_projection_fits():
    """Its own product is streamed while the recurrent weights stay."""
    for H, R, number in ((1600, 1408, (2, "ieee")), (800, 704, (4, "tf32"))):
        sizes = Sizes(100, 16, H, R, 1, 4, *number)
        plan = choose(triton_layers.H100, sizes, True)
        streamed = plan.stages * (plan.outputs + plan.rows) * plan.chunk * sizes.bytes_
        kept = 64 * -(-R // plan.chunk) * plan.chunk * sizes.bytes_ * plan.resident
        assert kept + streamed <= triton_layers.H100.shared_bytes


def test_reasons(monkeypatch):
    module, x = fastrnn.LSTM(4, 5), torch.randn(3, 2, 4)
    assert fastrnn.explain(module, x).declined["triton"] == "device cpu"
    monkeypatch.setattr(dispatch, "forced", "triton")
    monkeypatch.setattr(dispatch, "native", None)  # as where it is forced from the start
    with pytest.raises(RuntimeError, match="FASTRNN_BACKEND=triton: the engine cannot run this call: device cpu"):
        module(x)
    monkeypatch.setattr(dispatch, "forced", None)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastrnn::layer_forward", "CUDA")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is said where there is no GPU")
def test_reasons_where_there_is_no_gpu():
    with FakeTensorMode():
        x = torch.empty(3, 2, 4, device="cuda")
        states, weights = [torch.empty(1, 2, 5, device="cuda")], [torch.empty(15, 4, device="cuda")]
        assert dispatch.choose(x, None, states, weights) == "torch"
        assert re.search("not (available|installed)", dispatch.why_not_triton(x, None, states, weights))
        mixed = x.double(), None, states, weights
        assert "dtypes differ" in dispatch.why_not_triton(*mixed)


def test_explained_as_on_a_gpu(monkeypatch):
    """The schedule of each layer, where a GPU is at hand."""
    monkeypatch.setattr(gpu, "device_of", lambda device: triton_layers.H100)
    text = gpu.describe(Description("lstm"), 1024, 16, 768, 768, torch.float16, torch.device("cuda"), True)
    assert text.startswith("forward: persistent, 16 units x 16 rows a program, weights stay in the program, about ")
    assert "; backward: persistent" in text


def test_float32_follows_torch_nns_setting(set_precision):
    set_precision("ieee")
    assert precision_of(torch.float32) == "tf32x3"
    set_precision("tf32")
    assert precision_of(torch.float32) == "tf32"
    assert precision_of(torch.bfloat16) == "ieee"


def test_products_outside_the_scan_follow_it_too():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for precision, setting in (("tf32", "tf32"), ("tf32x3", "ieee"), ("ieee", "ieee")):
        with products_in(torch.float32, precision):
            assert matmul.fp32_precision == setting
        assert matmul.fp32_precision == before
