"""The precision of float32 products, in kernels and around them: what torch.nn's recurrent layers follow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_RNN: Any = torch.backends.cudnn.rnn  # its setting is no annotated attribute
_MATMUL = torch.backends.cuda.matmul


def precision_of(dtype: torch.dtype) -> str:
    """Of products in kernels: of float32 "tf32" or "tf32x3", as torch.backends.cudnn.rnn says; of half precision "ieee".

    "tf32x3" is float32 by three products of tensor cores: each operand is split into two numbers of TF32, and what the product
    of the two small halves would add is below float32's rounding. ROCm has no such products, and multiplies in "ieee".
    """
    if dtype is not torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if _RNN.fp32_precision == "tf32" else "tf32x3"


def products_in(dtype: torch.dtype, precision: str) -> contextlib.AbstractContextManager[None]:
    """torch's products on a GPU, of float32 in this precision; the setting is the whole process's, and restored."""
    wanted = products_wanted(dtype, precision)
    return contextlib.nullcontext() if wanted is None else _float32_products_in(wanted)


def products_wanted(dtype: torch.dtype, precision: str) -> str | None:
    """What torch's products have to be set to for that; None where they may stay as they are."""
    if dtype is not torch.float32:
        return None
    wanted = "tf32" if precision == "tf32" else "ieee"
    return None if _MATMUL.fp32_precision == wanted else wanted


def set_products(precision: str) -> str:
    """Set torch's products, and return what they were set to."""
    before = _MATMUL.fp32_precision
    _MATMUL.fp32_precision = precision
    return before


@contextlib.contextmanager
def _float32_products_in(precision: str) -> Iterator[None]:
    before = set_products(precision)
    try:
        yield
    finally:
        set_products(before)
