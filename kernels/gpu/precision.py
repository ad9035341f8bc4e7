"""The precision of float32 products, in kernels and around them: what torch.nn's recurrent layers follow."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

_C: Any = torch._C  # of which torch's annotations leave these two out; torch.backends' attributes ask them, and take longer
_set_to = _C._get_fp32_precision_getter
set_products = functools.partial(_C._set_fp32_precision_setter, "cuda", "matmul")


def precision_of(dtype: torch.dtype) -> str:
    """Of products in kernels: of float32 "tf32" or "tf32x3", as torch.backends.cudnn.rnn says; of half precision "ieee".

    "tf32x3" is float32 by three products of tensor cores: each operand is split into two numbers of TF32, and what the product
    of the two small halves would add is below float32's rounding. ROCm has no such products, and multiplies in "ieee".
    """
    if dtype is not torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if _set_to("cuda", "rnn") == "tf32" else "tf32x3"


def products_for(precision: str) -> tuple[str, str] | None:
    """What torch's products on a GPU have to be set to, for float32 in this precision, and are set to; None if that is it."""
    wanted, before = "tf32" if precision == "tf32" else "ieee", _set_to("cuda", "matmul")
    return None if before == wanted else (wanted, before)


@contextlib.contextmanager
def products_in(dtype: torch.dtype, precision: str) -> Iterator[None]:
    """torch's products on a GPU, of float32 in this precision; the setting is the whole process's, and restored."""
    change = products_for(precision) if dtype is torch.float32 else None
    if change is None:
        yield
        return
    wanted, before = change
    set_products(wanted)
    try:
        yield
    finally:
        set_products(before)
