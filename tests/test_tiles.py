"""Products in tile registers, whose instructions are emulated here, and passes that are made of them."""

from __future__ import annotations

import ctypes
import fcntl
import math
import subprocess
import sys

import numpy as np
import pytest
import test_workspace
import torch
from conftest import of_operator, weight_names
from contract import ROOT

numba = pytest.importorskip("numba")

from fastrnn.kernels.cpu import fallback, plan  # noqa: E402 (after the skip)
from fastrnn.kernels.cpu.processor import Target, Tier  # noqa: E402 (after the skip)
from fastrnn.kernels.cpu.source import KERNELS, object_directory  # noqa: E402 (after the skip)
from fastrnn.kernels.cpu.tiles import (  # noqa: E402 (after the skip)
    make_pack_columns_block,
    make_pack_rows_block,
    make_parts_of,
    make_split,
    make_tile_product,
)
from fastrnn.kernels.cpu.vector import vector_library  # noqa: E402 (after the skip)

EMULATED = Target(64, 32, "emulated")
V = vector_library(numba.types.float32, EMULATED)
UNITS = V.lanes


@pytest.fixture(scope="module", params=[(3, 3, 1), (4, 3, 1), (4, 2, 2)], ids="columns and parts {0}".format)
def multiply(request):
    """(call, data, parts of a row).

    call(rows [count, depth], weights [columns * UNITS, depth]) -> product, parts in which rows were.
    data(count, depth) -> rows, weights: of one part (in bfloat16), as of a matrix, or of two, like operands of gradients.
    """
    columns, most, panel_parts = request.param
    parts_of, split, of_parts = (
        make_parts_of(V, most),
        make_split(V),
        make_tile_product(V, EMULATED, columns, most, panel_parts),
    )
    exact = make_tile_product(V, EMULATED, columns, 1) if panel_parts == 1 else of_parts
    pack_columns_block, pack_rows_block = make_pack_columns_block(V), make_pack_rows_block(V)
    dtype, size = (torch.bfloat16, 2) if panel_parts == 1 else (torch.float32, 4)

    @numba.njit
    def run(count, table, weights, weight_rows, depth, blocks, panel, rows, sums):
        parts = max(panel_parts, parts_of(count, table, depth))
        split(count, table, depth, parts, rows)
        for block in range(blocks):
            first = block * plan.TILE_DEPTH
            n = min(plan.TILE_DEPTH, depth - first)
            for column in range(columns):
                out = panel + (block * columns + column) * panel_parts * plan.TILE_BYTES
                if panel_parts == 1:
                    source = weights + size * (column * UNITS * depth + first)
                    pack_columns_block(source, size * depth, UNITS, n, out)
                else:
                    rows_at = weight_rows + 8 * first
                    pack_rows_block(rows_at, column * UNITS, n, columns * UNITS, 0, panel_parts, out)
        if parts == 1:
            exact(count, rows, panel, blocks, sums)
        else:
            of_parts(count, rows, panel, blocks, sums)
        return parts

    def call(rows, weights):
        count, depth = rows.shape
        blocks = plan.tile_blocks(depth)
        sizes = {
            "panel": blocks * columns * panel_parts * plan.TILE_BYTES,
            "split_rows": plan.split_bytes(count, depth, most),
            "sums": plan.ROW_BLOCK * columns * plan.LINE,
        }
        memory = {name: np.full(size // 4, math.nan, np.float32) for name, size in sizes.items()}  # what is not written is NaN
        addresses = [array.ctypes.data for array in memory.values()]
        turned = weights.T.contiguous()  # a row for each k
        tables = [np.array([row.data_ptr() for row in matrix], np.int64) for matrix in (rows, turned)]
        table, weight_rows = (table.ctypes.data for table in tables)
        parts = run(count, table, weights.data_ptr(), weight_rows, depth, blocks, *addresses)
        return torch.from_numpy(memory["sums"]).view(-1, columns * UNITS)[:count].clone(), parts

    return call, lambda count, depth: (torch.randn(count, depth), torch.randn(columns * UNITS, depth).to(dtype)), most


def exactly(rows, weights, parts):
    """The product in float64, and how far one may be from it: by what is left out of two parts, and rounding of sums."""
    (_, depth), (rows, weights) = rows.shape, (rows.double(), weights.double())
    left_out = 0 if parts == 3 else 2**-17 if weights.to(torch.bfloat16).equal(weights) else 2**-15
    return rows @ weights.T, (left_out + 2**-24 * (depth / 2 + 4)) * (rows.abs() @ weights.abs().T)


@pytest.mark.parametrize("depth", [1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize("count", [1, 5, 6, 16, 17, 48])
def test_as_exact_as_its_parts(multiply, count, depth):
    call, data, most = multiply
    rows, weights = data(count, depth)
    product, parts = call(rows, weights)
    truth, bound = exactly(rows, weights, parts)
    assert parts == most
    assert ((product - truth).abs() <= bound).all()


def test_rows_in_bfloat16_are_exact_and_the_same_bits(multiply):
    """In one part, where panels have one, or in two."""
    call, data, most = multiply
    rows, weights = data(20, 40)
    rows = rows.to(torch.bfloat16).float()
    product, parts = call(rows, weights)
    rows_too = rows.clone()
    rows_too[7] += 1e-4
    other, parts_too = call(rows_too, weights)
    others = torch.arange(20) != 7
    assert parts_too == most
    assert torch.equal(product[others], other[others])
    if weights.dtype == torch.bfloat16:
        truth, bound = exactly(rows, weights, 3)
        assert parts == 1
        assert ((product - truth).abs() <= bound).all()


def test_a_rows_bits_do_not_depend_on_its_company(multiply):
    call, data, _ = multiply
    rows, weights = data(48, 70)
    product, _ = call(rows, weights)
    for row in (0, 7, 47):
        assert torch.equal(call(rows[row : row + 1], weights)[0][0], product[row])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38, torch.finfo(torch.float32).max, 1e-30])
def test_extreme_numbers(multiply, value):
    call, data, _ = multiply
    rows, weights = data(3, 33)
    weights = weights.to(torch.bfloat16).to(weights.dtype)  # exact in one part: what is left of them is zero
    rows[1, 32] = value
    product, parts = call(rows, weights)
    truth, bound = exactly(rows, weights, parts)
    if weights.dtype == torch.bfloat16 or math.isfinite(value):
        assert torch.equal(product.isnan(), truth.float().isnan()) and torch.equal(product.isinf(), truth.float().isinf())
    else:  # an infinity meets the zeros that are left of a panel's numbers
        assert product[1].isnan().all()
    finite = truth.float().isfinite()
    assert ((product.double() - truth).abs() <= bound)[finite].all()


def test_every_nan_stays_one(multiply):
    """Signalling ones too, whose upper half alone would be an infinity."""
    call, data, _ = multiply
    rows, weights = data(2, 8)
    rows.view(torch.int32)[1, 3] = 0x7F800001
    product, _ = call(rows, weights)
    assert product[1].isnan().all() and product[0].isfinite().all()


# --- whole passes

WRITE = """
from pathlib import Path
from {kernels}.cpu.compile import write_unit
from {kernels}.cpu.processor import Target, Tier
write_unit(Path("{directory}"), Tier("emulated", "{processor}", {target!r}), ("{cell}", "f32", "{which}"))
"""


@pytest.fixture(scope="module", params=["lstm", *(pytest.param(c, marks=pytest.mark.slow) for c in ("gru", "rnn_tanh"))])
def units(request):
    """(cell, of each pass: itself and what lays out its workspace), compiled in processes of their own as fallback.py's are.

    They are kept between runs of the suite, under build/.
    """
    import llvmlite.binding as llvm

    cell, processor = request.param, llvm.get_host_cpu_name()
    directory = object_directory(ROOT / "build", f"emulated-{processor}-{EMULATED.vector_bytes}")
    names = {"kernels": KERNELS.name, "directory": directory, "processor": processor, "target": EMULATED, "cell": cell}
    tier = Tier("emulated", processor, EMULATED)
    entries_of = {which: tier.entries((cell, "f32", which)) for which in ("forward", "backward")}
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a worker waits for another that compiles the same
        missing = [which for which, own in entries_of.items() if not all((directory / f"{name}.o").exists() for name in own)]
        codes = [WRITE.format(**names, which=which) for which in missing]
        compilers = [subprocess.Popen([sys.executable, "-c", code], cwd=KERNELS.parent) for code in codes]
        assert [compiler.wait() for compiler in compilers] == [0] * len(missing)
    engine, int64, functions = fallback._engine(), ctypes.c_int64, {}
    for which, entries in entries_of.items():
        for entry in entries:
            engine.add_object_file(llvm.object_file.ObjectFileRef.from_path(str(directory / f"{entry}.o")))
        engine.finalize_object()
        run, arrange = map(engine.get_function_address, entries)
        functions[which] = ctypes.CFUNCTYPE(None, int64, int64)(run), ctypes.CFUNCTYPE(int64, int64, int64)(arrange)
    return cell, functions


@pytest.fixture
def emulated(units, monkeypatch):
    """(the cell, a list: whether each pass of fallback.py's, which are the emulated tier's now, was in tiles)."""
    cell, functions = units
    monkeypatch.setattr(fallback, "unit", lambda cell, scalar, which: functions[which])
    in_tiles, run = [], fallback.Call.run

    def watched(call, which):
        run(call, which)
        in_tiles.append(bool(call.records["tiles"].all()))

    monkeypatch.setattr(fallback.Call, "run", watched)
    return cell, in_tiles


LAYERS = [
    {"sizes": (4, 5, 3, 6)},
    {"sizes": (3, 40, 33, 34), "directions": 2, "reverse": True, "batch_first": True},
    {"sizes": (5, 33, 40, 100), "packed": True, "bias": False},
    {"sizes": (2, 300, 7, 16)},
    {"sizes": (3, 20, 130, 66), "project": 10},
    {"sizes": (13, 40, 520, 64)},  # operands in two groups of panels, two of rows; panels where dW_hh will be
    {"sizes": (40, 27, 5, 6)},  # three blocks of time
    {"sizes": (4, 5, 40, 6), "packed": True, "lengths": [5, 1, 1]},  # gradients of so few rows that they are not in tiles
]


@pytest.fixture
def given(make_layer):
    """given(cell, options of make_layer) -> arguments of layer_forward, matrices in bfloat16 and the rest in float32."""

    def make(cell, layer):
        if layer.get("project") and cell != "lstm":
            pytest.skip("only LSTM has projections")
        layer = {"lengths": [33, 20, 16, 2, 1]} | layer
        batch_sizes = torch.tensor(layer.pop("lengths"))
        arguments = make_layer(cell, dtype=torch.float32, **layer)
        arguments["weights"] = [w.div(4).to(torch.bfloat16) if w.dim() == 2 else w for w in arguments["weights"]]
        if arguments["batch_sizes"] is not None:
            arguments |= {"batch_sizes": batch_sizes, "x": arguments["x"][: batch_sizes.sum()]}
        return arguments

    return make


def doubled(value):
    """Numbers, and lists of them, in float64."""
    if isinstance(value, list):
        return [doubled(member) for member in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_both_passes(emulated, given, plain_layer, layer, poison):
    """By name: results are as near as float32 is, gradients as two parts are, those of matrices rounded but for a few ties."""
    cell, in_tiles = emulated
    arguments = given(cell, layer)
    double = {name: doubled(value) for name, value in arguments.items()}
    flat = {name: value for name, value in double.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}
    flat |= zip(weight_names(arguments["layer"]), double["weights"])
    leaves = [leaf.requires_grad_() for leaf in flat.values()]
    names = ("y", "h_n", "c_n")[: 3 if cell == "lstm" else 2]
    expected = dict(zip(names, plain_layer(**double), strict=False))
    gradients = {name: torch.randn(value.shape) for name, value in expected.items()}
    grads = torch.autograd.grad(list(expected.values()), leaves, [value.double() for value in gradients.values()])
    expected |= {f"d{name}": grad for name, grad in zip(flat, grads, strict=True)}

    *inputs, weights, text = of_operator(arguments)
    y, h_n, c_n, saved = fallback.layer_forward(*inputs, weights, text, True)
    found = {"y": y, "h_n": h_n, "c_n": c_n}
    outer = gradients["y"], gradients["h_n"], gradients.get("c_n")
    dx, dh0, dc0, dw = fallback.layer_backward(*outer, *inputs, weights, y, saved, text, (True, True, True))
    found |= {"dx": dx, "dh0": dh0, "dc0": dc0}
    found |= {f"d{name}": value for name, value in zip(weight_names(arguments["layer"]), dw, strict=True)}
    assert in_tiles == [True, True]
    for name, value in expected.items():
        rounded = found[name].dtype == torch.bfloat16
        truth = value.detach().to(torch.bfloat16).double() if rounded else value.detach()
        error = float((found[name].double() - truth).norm() / truth.norm())
        bound = 1e-6 if name in names else 2**-10 if rounded else 2**-17
        assert error < bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("rows", [4, 5])
def test_few_rows_and_single_steps_are_not_in_tiles(emulated, given, rows, steps):
    cell, in_tiles = emulated
    fallback.layer_forward(*of_operator(given(cell, {"sizes": (steps, rows, 3, 6)})), False)
    assert in_tiles == [steps > 1 and rows > 4]


def test_rows_have_the_same_bits_in_other_company(emulated, given):
    """In another tile, and in another block of plan.SPLIT_ROWS."""
    cell, _ = emulated
    arguments = given(cell, {"sizes": (3, 300, 20, 34)})
    rows = {"x", "h0", "c0"}
    dy, dh_n, part = torch.randn(3, 300, 34), torch.randn(1, 300, 34), slice(117, 140)
    results = []
    for some in (slice(None), part):
        cut = arguments | {name: value[:, some] for name, value in arguments.items() if name in rows and value is not None}
        *tensors, text = of_operator(cut)
        y, *_, saved = fallback.layer_forward(*tensors, text, True)
        outer = dy[:, some], dh_n[:, some], None
        dx, dh0, *_ = fallback.layer_backward(*outer, *tensors, y, saved, text, (True, True, False))
        results.append((y, dx, dh0))
    for whole, own in zip(*results, strict=True):
        assert torch.equal(own, whole[:, part])


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_one_thread_fits_the_workspace_of_any_team(emulated, which):
    test_workspace.check(emulated[0], which, 300)
