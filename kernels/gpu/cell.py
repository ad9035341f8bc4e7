"""The cells of cells.py as Triton functions, and the elementary functions they are written with."""

from __future__ import annotations

import triton
import triton.language as tl

from ..cells import CELLS, bind


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """From exp where the difference loses nothing, and where it would the series up to x^11: relative error 1e-8 at 0.35."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    q = x * x
    series = -1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 + q * (-1382 / 155925))))
    return tl.where(tl.abs(x) < 0.35, x + x * q * series, tl.where(x < 0, -far, far))


@triton.jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # NaN stays


@triton.jit
def where_positive(h, dh):
    return tl.where(h <= 0, 0.0, dh)


_NAMES = {"sigmoid": sigmoid, "tanh": tanh, "relu": relu, "where_positive": where_positive, "tl": tl}
FORWARD = {name: triton.jit(bind(cell.forward, **_NAMES)) for name, cell in CELLS.items()}
BACKWARD = {name: triton.jit(bind(cell.backward, **_NAMES)) for name, cell in CELLS.items()}
