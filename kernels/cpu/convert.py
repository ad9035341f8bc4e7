"""Numbers in bfloat16 to float32, and back."""

from __future__ import annotations

from functools import cache

from numba import njit

from .product import options
from .vector import VectorLibrary, load_int


@cache
def make_conversion(v: VectorLibrary, name: str):
    """convert(job, _), by name "widen" or "round": job is the address of an int64 source, destination and count of numbers."""
    lanes, size, widens = v.lanes, v.size, name == "widen"
    load, store = (v.half.load, v.store) if widens else (v.load, v.half.store)
    source_size, out_size = (2, size) if widens else (size, 2)

    @njit(**options)
    def convert(job, _):
        source, out, count = load_int(job), load_int(job + 8), load_int(job + 16)
        for i in range(0, count, lanes):
            store(out + i * out_size, load(source + i * source_size, count - i), count - i)

    return convert
