"""A team that turns out smaller than planned shares the planned workspace anew: one thread must fit it, or nothing does."""

import random

import pytest
import torch
from contract import CELLS, ROOT, python, same_bits

import fastrnn
from fastrnn.kernels.cpu.plan import FIELDS
from fastrnn.kernels.layer import Inputs, Layer

np = pytest.importorskip("numpy")
pytest.importorskip("numba")  # the extension keeps its functions to itself: its objects are asked, loaded one by one


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("cell", CELLS)
def test_one_thread_fits_the_workspace_of_any_team(cell, which):
    # in a process of its own: in one as large as the suite's, LLVM may find no room within reach of a loaded object's code
    python(f"import test_workspace; test_workspace.check({cell!r}, {which!r})", FASTRNN_CACHE_DIR=str(ROOT / "build"))


def check(cell, which, draws=2000):
    from fastrnn.kernels.cpu import fallback

    _, arrange = fallback.unit(cell, "f32", which)
    draw, at_once = random.Random(0), 0
    for _ in range(draws):
        directions = draw.choice((1, 2))
        layers = draw.choice((0, 2, 5)) if directions == 1 and which == "forward" else 0  # that run at once
        records = np.zeros(max(directions, layers), [(name, np.int64) for name in FIELDS])
        hidden = draw.choice((1, 7, 33, 64, 130, 512, 1024))
        projected = cell == "lstm" and hidden > 1 and draw.random() < 0.3
        sizes = {
            "steps": draw.choice((1, 2, 5, 60, 3000)),
            "batch": draw.choice((1, 2, 3, 5, 17, 200)),
            "input_size": draw.choice((1, 9, 64, 700)),
            "hidden_size": hidden,
            "output_size": hidden // 2 if projected else hidden,
            "projected": projected,
            "heads": draw.choice((1, 2, 4)) if hidden % 4 == 0 and not projected else 1,
            "half": hidden % 4 == 0 and not layers and draw.randrange(2),
            "directions": directions,
            "layers": layers,
            "save": draw.choice((0, 1)),
            "need_dx": draw.choice((0, 1)),
            "need_dh0": draw.choice((0, 1)),
            "need_dw": draw.choice((0, 1)),
            "l2_bytes": draw.choice((1 << 18, 1 << 20, 1 << 22)),
            # addresses, of which the arrangement asks whether they are there
            "resets": 0 if layers else draw.choice((0, 64)),
            "order": 0 if layers else draw.choice((0, 64)),
            "mask": 0 if layers else draw.choice((0, 64)),
        }
        sizes["padded_steps"] = sizes["steps"]
        sizes["rows"] = sizes["steps"] * sizes["batch"]
        for name, value in sizes.items():
            records[name] = value
        records["input_size"][1:] = sizes["output_size"] if layers else sizes["input_size"]
        threads = draw.choice((2, 3, 8, 13, 64))
        planned = arrange(records.ctypes.data, threads)
        if layers and not planned:  # they would rather not
            continue
        at_once += layers > 0
        records["workspace"] = 64
        needed = arrange(records.ctypes.data, 1)
        assert needed <= planned, f"{sizes}: one thread needs {needed} bytes, {planned} were planned for {threads}"
    assert at_once > draws // 50 or which == "backward"


def test_one_thread_runs_layers_that_were_to_run_at_once():
    python("import test_workspace; test_workspace.run_alone()", FASTRNN_CACHE_DIR=str(ROOT / "build"))


@torch.no_grad()
def run_alone():
    """As where no other thread comes in time."""
    from fastrnn.kernels.cpu import fallback

    module, x, y = fastrnn.GRU(37, 64, 2), torch.randn(100, 1, 37), torch.full((2, 100, 1, 64), torch.nan)
    h0, h_n, calls = torch.randn(2, 1, 64), torch.full((2, 1, 64), torch.nan), []
    for layer in range(2):
        inputs = Inputs(x if layer == 0 else y[0], None, h0[layer : layer + 1], None)
        call = fallback.Call(Layer("gru", bias=True), inputs, module.all_weights[layer])
        call.rows("y", y[layer], 64)
        call.point("h0", [h0[layer]])
        call.point("h_n", [h_n[layer]])
        calls.append(call)
    records = np.concatenate([call.records for call in calls])
    records["layers"] = 2
    run, arrange = fallback.unit("gru", "f32", "forward")
    planned = arrange(records.ctypes.data, 2)
    assert planned > 0
    workspace = torch.full((planned + 64,), 255, dtype=torch.uint8)
    records["workspace"] = -(-workspace.data_ptr() // 64) * 64
    assert arrange(records.ctypes.data, 1) <= planned
    run(records.ctypes.data, 0)
    expected, last = module(x, h0)
    same_bits(y[1], expected)
    same_bits(h_n, last)
