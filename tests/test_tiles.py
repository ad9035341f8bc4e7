"""Products in tile registers, whose instructions are emulated here, and forward passes that are made of them."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba")

from fastrnn.kernels.cpu import fallback, plan  # noqa: E402 (after the skip)
from fastrnn.kernels.cpu.processor import Target, Tier  # noqa: E402 (after the skip)
from fastrnn.kernels.cpu.source import KERNELS  # noqa: E402 (after the skip)
from fastrnn.kernels.cpu.tiles import PARTS, make_pack_tiles, make_split, make_tile_product  # noqa: E402 (after the skip)
from fastrnn.kernels.cpu.vector import vector_library  # noqa: E402 (after the skip)

EMULATED = Target(64, 32, "emulated")
V = vector_library(numba.types.float32, EMULATED)
UNITS = V.lanes


@pytest.fixture(scope="module", params=[1, 3, 4], ids=lambda columns: f"{columns} columns")
def multiply(request):
    """(call, columns): call(rows [count, depth], weights [columns * UNITS, depth] in bfloat16) -> product, parts of a row."""
    columns = request.param
    parts_of, split = make_split(V)
    pack_tiles, product = make_pack_tiles(V), make_tile_product(V, EMULATED, columns)

    @numba.njit
    def run(count, table, weights, depth, blocks, panel, rows, sums, space):
        parts = parts_of(count, table, depth)
        split(count, table, depth, parts, rows)
        for column in range(columns):
            tile = panel + column * plan.TILE_BYTES
            pack_tiles(weights + column * 2 * UNITS * depth, UNITS, depth, tile, columns * plan.TILE_BYTES)
        product(count, rows, parts, panel, blocks, sums, space)
        return parts

    def call(rows, weights):
        count, depth = rows.shape
        blocks = plan.tile_blocks(depth)
        sizes = {
            "panel": blocks * columns * plan.TILE_BYTES,
            "split_rows": PARTS * plan.split_bytes(count, depth),
            "sums": plan.ROW_BLOCK * columns * plan.LINE,
            "space": plan.TILE_SPACE_BYTES,
        }
        memory = {name: np.full(size // 4, math.nan, np.float32) for name, size in sizes.items()}  # what is not written is NaN
        table = np.array([row.data_ptr() for row in rows], np.int64)
        addresses = [array.ctypes.data for array in memory.values()]
        parts = run(count, table.ctypes.data, weights.data_ptr(), depth, blocks, *addresses)
        return torch.from_numpy(memory["sums"]).view(-1, columns * UNITS)[:count].clone(), parts

    return call, columns


def data(count, depth, columns):
    return torch.randn(count, depth), torch.randn(columns * UNITS, depth).to(torch.bfloat16)


def exactly(rows, weights):
    """The product in float64, and how far one in float32 may be from it."""
    (_, depth), (rows, weights) = rows.shape, (rows.double(), weights.double())
    return rows @ weights.T, 2**-24 * (depth / 2 + 4) * (rows.abs() @ weights.abs().T)


@pytest.mark.parametrize("depth", [1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize("count", [1, 5, 6, 16, 17, 48])
def test_as_exact_as_float32(multiply, count, depth):
    call, columns = multiply
    rows, weights = data(count, depth, columns)
    product, parts = call(rows, weights)
    truth, bound = exactly(rows, weights)
    assert parts == PARTS
    assert ((product - truth).abs() <= bound).all()


def test_rows_in_bfloat16_are_one_part_and_the_same_bits(multiply):
    call, columns = multiply
    rows, weights = data(20, 40, columns)
    rows = rows.to(torch.bfloat16).float()
    product, parts = call(rows, weights)
    rows_too = rows.clone()
    rows_too[7] += 1e-4
    other, parts_too = call(rows_too, weights)
    others = torch.arange(20) != 7
    assert (parts, parts_too) == (1, PARTS)
    assert torch.equal(product[others], other[others])


def test_a_rows_bits_do_not_depend_on_its_company(multiply):
    call, columns = multiply
    rows, weights = data(48, 70, columns)
    product, _ = call(rows, weights)
    for row in (0, 7, 47):
        assert torch.equal(call(rows[row : row + 1], weights)[0][0], product[row])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38, 1e-30])
def test_extreme_numbers(multiply, value):
    call, columns = multiply
    rows, weights = data(3, 33, columns)
    rows[1, 32] = value
    product, _ = call(rows, weights)
    truth, bound = exactly(rows, weights)
    assert torch.equal(product.isnan(), truth.float().isnan()) and torch.equal(product.isinf(), truth.float().isinf())
    finite = truth.float().isfinite()
    assert ((product.double() - truth).abs() <= bound)[finite].all()


def test_every_nan_stays_one(multiply):
    """Signalling ones too, whose upper half alone would be an infinity."""
    call, columns = multiply
    rows, weights = data(2, 8, columns)
    rows.view(torch.int32)[1, 3] = 0x7F800001
    product, _ = call(rows, weights)
    assert product[1].isnan().all() and product[0].isfinite().all()


# --- whole forward passes

WRITE = """
from pathlib import Path
from {kernels}.cpu.compile import write_unit
from {kernels}.cpu.processor import Target, Tier
write_unit(Path("{directory}"), Tier("emulated", "{processor}", {target!r}), ("{cell}", "f32", "forward"))
"""


@pytest.fixture(scope="module", params=["lstm", *(pytest.param(c, marks=pytest.mark.slow) for c in ("gru", "rnn_tanh"))])
def unit(request, tmp_path_factory):
    """(cell, its forward pass and what lays out its workspace), compiled in a process of their own as fallback.py's are."""
    import llvmlite.binding as llvm

    cell, directory, processor = request.param, tmp_path_factory.mktemp("emulated"), llvm.get_host_cpu_name()
    code = WRITE.format(kernels=KERNELS.name, directory=directory, processor=processor, target=EMULATED, cell=cell)
    subprocess.run([sys.executable, "-c", code], cwd=KERNELS.parent, check=True)
    engine = fallback._engine()
    entries = Tier("emulated", processor, EMULATED).entries((cell, "f32", "forward"))
    for entry in entries:
        engine.add_object_file(llvm.object_file.ObjectFileRef.from_path(str(directory / f"{entry}.o")))
    engine.finalize_object()
    run, arrange = map(engine.get_function_address, entries)
    int64 = ctypes.c_int64
    return cell, (ctypes.CFUNCTYPE(None, int64, int64)(run), ctypes.CFUNCTYPE(int64, int64, int64)(arrange))


@pytest.fixture
def forward(unit, monkeypatch):
    """(layer_forward of the emulated tier, its cell, whether each of its calls was in tiles)."""
    cell, functions = unit
    monkeypatch.setattr(fallback, "unit", lambda *_: functions)
    in_tiles, run = [], fallback.Call.run

    def watched(call, which):
        run(call, which)
        in_tiles.append(bool(call.records["tiles"].all()))

    monkeypatch.setattr(fallback.Call, "run", watched)
    return fallback.layer_forward, cell, in_tiles


@pytest.mark.parametrize("layer", [
    {"sizes": (4, 17, 3, 6)},
    {"sizes": (3, 40, 33, 34), "directions": 2, "reverse": True, "batch_first": True},
    {"sizes": (5, 33, 40, 100), "packed": True, "bias": False},
    {"sizes": (2, 300, 7, 16)},
    {"sizes": (3, 20, 130, 66), "project": 10},
], ids=str)  # fmt: skip
def test_forward(forward, make_layer, plain_layer, layer):
    run, cell, in_tiles = forward
    if layer.get("project") and cell != "lstm":
        pytest.skip("only LSTM has projections")
    given = make_layer(cell, dtype=torch.float32, **layer)
    for name in ("w_ih", "w_hh", "w_hr"):
        given[name] = [w.div(4).to(torch.bfloat16) for w in given[name]]
    if given["batch_sizes"] is not None:
        given |= {"batch_sizes": torch.tensor([33, 20, 16, 2, 1]), "x": given["x"][:72]}
    found = run(**given, save=False)
    assert in_tiles == [True]
    expected = plain_layer(**{name: doubled(value) for name, value in given.items()})
    for name, value, truth in zip(("y", "h_n", "c_n"), found, expected, strict=False):
        if truth is not None:
            error = float((value.double() - truth).norm() / truth.norm())
            assert error < 1e-6, f"{name}: {error:.1e}"


def doubled(value):
    """Numbers, and lists of them, in float64."""
    if isinstance(value, list):
        return [doubled(member) for member in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("rows", [16, 17])
def test_few_rows_and_single_steps_are_not_in_tiles(forward, make_layer, rows, steps):
    run, cell, in_tiles = forward
    given = make_layer(cell, dtype=torch.float32, sizes=(steps, rows, 3, 6))
    run(**given | {name: [w.to(torch.bfloat16) for w in given[name]] for name in ("w_ih", "w_hh", "w_hr")}, save=False)
    assert in_tiles == [steps > 1 and rows > 16]


def test_rows_have_the_same_bits_in_other_company(forward, make_layer):
    """In another tile, and in another block of TILE_BLOCK_ROWS."""
    run, cell, _ = forward
    given = make_layer(cell, dtype=torch.float32, sizes=(3, 300, 20, 34))
    given |= {name: [w.to(torch.bfloat16) for w in given[name]] for name in ("w_ih", "w_hh", "w_hr")}
    whole, part = run(**given, save=False)[0], slice(117, 140)
    states = {name: given[name][:, part] for name in ("h0", "c0") if given[name] is not None}
    assert torch.equal(run(**given | states | {"x": given["x"][:, part]}, save=False)[0], whole[:, part])
