"""Numbers in bfloat16 to float32, and back; and matrices transposed."""

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


@cache
def make_turn(v: VectorLibrary):
    """turn(job, _): transpose a matrix.

    job: address of int64 source, bytes from one of its rows to the next, rows, columns, destination, bytes from one of its rows
    to the next.
    """
    lanes, size, transpose, load_scalar, store_scalar = v.lanes, v.size, v.transpose, v.load_scalar, v.store_scalar

    @njit(**options)
    def turn(job, _):
        source, source_row, rows = load_int(job), load_int(job + 8), load_int(job + 16)
        columns, out, out_row = load_int(job + 24), load_int(job + 32), load_int(job + 40)
        for r in range(0, rows, lanes):
            for c in range(0, columns, lanes):
                at, to = source + r * source_row + c * size, out + c * out_row + r * size
                if r + lanes <= rows and c + lanes <= columns:
                    transpose(at, source_row, to, out_row)
                else:
                    for i in range(min(lanes, rows - r)):
                        for j in range(min(lanes, columns - c)):
                            store_scalar(to + j * out_row + i * size, load_scalar(at + i * source_row + j * size))

    return turn
