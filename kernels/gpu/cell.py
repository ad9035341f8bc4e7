"""Cells as Triton functions, and the elementary functions that they are made of.

There are two sets: with PTX's own approximations of 2^x and 1/x, each right to two units in the last place, for CUDA; and
with Triton's, which guard against subnormal numbers that no gate can tell from zero, for ROCm and the interpreter.

What a cell's function is printed as (derive.py) is the text that Triton compiles. Triton keeps the machine code in its own
cache, under a hash of that text and of all it calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import triton
import triton.language as tl

from ..cells import Cell, bind
from . import rows


@triton.jit
def _exp2_ptx(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal_ptx(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _exp2(x):
    return tl.exp2(x)


@triton.jit
def _reciprocal(x):
    return 1 / x


def _sigmoid(x):
    return reciprocal(1 + exp2(-1.4426950408889634 * x))  # noqa: F821 (bound below)


def _tanh(x):
    """From 2^x where the difference loses nothing, and where it would the series up to x^11: relative error 1e-7 at 0.4."""
    far = 1 - 2 * reciprocal(1 + exp2(2.8853900817779268 * x))  # noqa: F821 (bound below)
    q = x * x
    series = -1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 + q * (-1382 / 155925))))
    return tl.where(tl.abs(x) < 0.4, x + x * q * series, far)


def _exp(x):
    """2^n e^r, x = n ln 2 + r with 0 <= r < ln 2: 2^x alone would have the rounding of x log2(e), many units of a large x."""
    x = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))  # NaN stays
    n = tl.floor(1.4426950408889634 * x)
    r = (
        x - n * 0.693359375
    ) + n * 2.12194440e-4  # Cephes: ln 2 in two parts, the first of so few bits that n times it is exact
    return exp2(n) * exp2(1.4426950408889634 * r)  # noqa: F821 (bound below)


def _expm1(x):
    """Taylor's series up to x^10 where the difference would lose much."""
    series = 1 / 720 + x * (1 / 5040 + x * (1 / 40320 + x * (1 / 362880 + x * (1 / 3628800))))
    series = 1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * series))))
    return tl.where(tl.abs(x) < 0.7, x * series, exp(x) - 1)  # noqa: F821 (bound below)


def _log(x):
    """x = 2^e m, m from sqrt(1/2) to sqrt(2): e ln 2 + 2 artanh(s), s = (m - 1) / (m + 1)."""
    small = x < 1.1754943508222875e-38
    bits = tl.where(small, x * 18014398509481984.0, x).to(tl.int32, bitcast=True) - 0x3F3504F3
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    e = (bits >> 23).to(tl.float32) - tl.where(small, 54.0, 0.0)
    s = (m - 1) / (m + 1)
    q = s * s
    series = 2 / 3 + q * (2 / 5 + q * (2 / 7 + q * (2 / 9 + q * (2 / 11))))
    found = e * 0.693359375 + (2 * s + (s * q * series - e * 2.12194440e-4))
    return tl.where((x > 0) & (x < float("inf")), found, tl.where(x == 0, float("-inf"), tl.where(x > 0, x, float("nan"))))


def _log1p(x):
    """log(u) and what u = 1 + x has lost."""
    u = 1 + x
    found = log(u)  # noqa: F821 (bound below)
    return tl.where((u > 0) & (u < float("inf")), found - ((u - 1) - x) / u, found)


def _logsigmoid(x):
    """min(x, 0) - log(1 + y), y = e^-|x|: 2 artanh(s), s = y / (2 + y) up to 1/3."""
    y = exp(-tl.abs(x))  # noqa: F821 (bound below)
    s = y * reciprocal(2 + y)  # noqa: F821 (bound below)
    q = s * s
    series = 2 / 9 + q * (2 / 11 + q * (2 / 13 + q * (2 / 15)))
    series = 2 + q * (2 / 3 + q * (2 / 5 + q * (2 / 7 + q * series)))
    return tl.where(x < 0, x, 0.0) - s * series  # NaN stays by y


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # NaN stays


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def sqrt(x):
    return tl.sqrt_rn(x)


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def full_like(x, number):
    return tl.full(x.shape, number, x.dtype)


PLAIN_FUNCTIONS = {
    "abs": absolute, "erf": erf, "full_like": full_like, "maximum": maximum, "minimum": minimum, "relu": relu, "sqrt": sqrt,
    "where": where,
}  # fmt: skip


class Functions:
    """What cells are made of, by name, over one 2^x and one 1/x."""

    def __init__(self, exp2: Any, reciprocal: Any) -> None:
        names = {"exp2": exp2, "reciprocal": reciprocal, "tl": tl}
        for function in (_sigmoid, _tanh, _exp, _expm1, _log, _log1p, _logsigmoid):  # each over those before it
            names[function.__name__[1:]] = triton.jit(bind(function, **names))
        self.by_name = {"__name__": __name__, **names, **PLAIN_FUNCTIONS}  # tl: Triton's interpreter looks for it


PTX, PLAIN = Functions(_exp2_ptx, _reciprocal_ptx), Functions(_exp2, _reciprocal)


@cache
def bound(cell: Cell, functions: Functions, forward: bool, reach: rows.Reach | None = None) -> Any:
    """A pass of a cell as a Triton function, with h behind the other states among parameters and results.

    reach: of a cell that reduces over the units of a row; then the function may have more parameters, see rows.py.
    """
    code = cell.derived.forward if forward else cell.derived.backward
    states = [name for name, _ in cell.derived.before]
    later = len(states) - 1 - states.index("h") if cell.reads_hidden else 0
    code = replace(code, parameters=_moved(code.parameters, "h", later), results=_moved(code.results, "d_h", later))
    if reach is None:
        return triton.jit(code.bind(functions.by_name))
    names = functions.by_name | rows.FUNCTIONS
    if not reach.blocks:
        return triton.jit(code.bind(names, rows.printer_of(reach.head)))
    return rows.between_programs(cell, forward, code, names, reach)


def _moved(named: Sequence[tuple[str, Any]], name: str, later: int) -> tuple[tuple[str, Any], ...]:
    """The same with one of them, if it is there, so many places later."""
    names = [each for each, _ in named]
    if name not in names:
        return tuple(named)
    at = names.index(name)
    return *named[:at], *named[at + 1 : at + 1 + later], named[at], *named[at + 1 + later :]
