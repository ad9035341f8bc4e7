"""The CPU engine's elementary functions, in units of the last place over the whole range of each dtype."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("numba", reason="compiles the functions, with numba")

from numba import njit, types

from fastrnn.kernels.cpu.elementary import elementary
from fastrnn.kernels.cpu.processor import Target
from fastrnn.kernels.cpu.vector import vector_library
from fastrnn.kernels.symbols import DERIVATIVES, NUMBERS

EXACT = {
    "abs": torch.abs,
    "erf": torch.erf,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "logsigmoid": torch.nn.functional.logsigmoid,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
}
BOUNDS = {"sigmoid": 90.0}  # exp of a number near 88 carries the rounding of its argument; that of others is none of theirs
SCALARS = {torch.float32: types.float32, torch.float64: types.float64}
TARGET = Target(16, 16)


def applied(name: str, x: torch.Tensor) -> torch.Tensor:
    """The function of each element of x."""
    v = vector_library(SCALARS[x.dtype], TARGET)
    function, load, store, lanes, size = elementary(v.type, TARGET)[name], v.load, v.store, v.lanes, v.size

    @njit
    def run(source, out, n):
        for i in range(0, n, lanes):
            store(out + i * size, function(load(source + i * size, n - i)), n - i)

    y = torch.empty_like(x)
    run(x.data_ptr(), y.data_ptr(), len(x))
    return y


@pytest.mark.parametrize("dtype", SCALARS, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_errors_in_units_of_the_last_place(name, dtype):
    eps, largest = torch.finfo(dtype).eps, 3 if dtype is torch.float32 else 4
    sizes = 10 ** torch.linspace(-30, largest, 5001, dtype=torch.float64)
    x = torch.cat((sizes, -sizes, torch.linspace(-6, 6, 2001, dtype=torch.float64))).to(dtype)
    truth = EXACT[name](x.double())
    found, nearest = applied(name, x), truth.to(dtype)
    normal = nearest.isfinite() & (nearest.abs() > torch.finfo(dtype).tiny)
    errors = ((found.double() - truth) / truth).abs()[normal] / eps
    bound = BOUNDS.get(name, 2.5) if dtype is torch.float32 else 20 * BOUNDS.get(name, 2.5)  # torch's own is no truth there
    assert errors.max() <= bound, f"{float(errors.max()):.3g} at {float(x[normal][errors.argmax()])}"
    rest = ~normal & (nearest.isinf() | nearest.isnan())
    torch.testing.assert_close(found[rest], nearest[rest], equal_nan=True)


@pytest.mark.parametrize("dtype", SCALARS, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_what_is_no_number(name, dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -1.0], dtype=dtype)
    torch.testing.assert_close(applied(name, x), EXACT[name](x), equal_nan=True)


def test_every_function_is_in_each_table():
    v = vector_library(types.float32, TARGET)
    assert DERIVATIVES.keys() == NUMBERS.keys()
    assert EXACT.keys() | {"maximum", "minimum", "where", "full_like"} == elementary(v.type, TARGET).keys()
