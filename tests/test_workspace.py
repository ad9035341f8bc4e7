"""A team that turns out smaller than planned shares the planned workspace anew: one thread must fit it, or nothing does."""

import random

import pytest
from contract import ROOT, python

from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.cpu.plan import FIELDS

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
    draw, found = random.Random(0), 0
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
            "half": hidden % 4 == 0 and not layers and draw.randrange(2),
            "directions": directions,
            "layers": layers,
            "save": draw.choice((0, 1)),
            "need_dx": draw.choice((0, 1)),
            "need_dh0": draw.choice((0, 1)),
            "need_dw": draw.choice((0, 1)),
            "l2_bytes": draw.choice((1 << 18, 1 << 20, 1 << 22)),
        }
        sizes["rows"] = sizes["steps"] * sizes["batch"]
        for name, value in sizes.items():
            records[name] = value
        threads = draw.choice((2, 3, 8, 13, 64))
        planned = arrange(records.ctypes.data, threads)
        if layers and not planned:  # they would rather not
            continue
        found += 1
        records["workspace"] = 64
        needed = arrange(records.ctypes.data, 1)
        assert needed <= planned, f"{sizes}: one thread needs {needed} bytes, {planned} were planned for {threads}"
    assert found > draws // 2
