"""What two things limit, measured: products and reading weights. `python -m bench.roofline --help`.

A layer multiplies, at the rate of a library at best; and each step reads the recurrent weights, at the rate at
which memory, or the cache that holds them, gives them. The longer of the two times is the recurrence's; the other products,
which wait for no step, add theirs. `report` divides that by what a case of bench.run took.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from rich.console import Console

from bench import record, timing
from bench.grid import GATES, Point

DEFAULT_OUTPUT = record.result_file("roofline")
MATRIX = 2048  # units of the product that sets the rate
KIB = (256, 1024, 3072, 4096, 12288, 16384, 49152, 65536)  # W_hh of every cell of the grid from H 256 on


def forward_operations(point: Point, cell: str) -> int:
    """Multiplications and additions of one layer's products, forward, of every step."""
    rows = sum(point.lengths())
    return 2 * rows * GATES[cell] * point.hidden * (point.input_size + point.hidden)


def weight_bytes(point: Point, cell: str) -> int:
    """Of W_hh in float32, which a step reads."""
    return 4 * GATES[cell] * point.hidden**2


def least_seconds(point: Point, cell: str, mode: str, rates: dict[str, Any]) -> float:
    """The roofline. Backward does twice forward's operations; half of its recurrence's are the weights' gradient, after it."""
    stream = rates["bytes_per_second"]
    nearest = min(stream, key=lambda kib: abs(int(kib) * 1024 - weight_bytes(point, cell)))
    layer = forward_operations(point, cell) / rates["operations_per_second"]
    recurrent = layer * point.hidden / (point.input_size + point.hidden)
    reading = point.steps * weight_bytes(point, cell) / stream[nearest]
    layers, recurrences = {"infer": (1, 1), "train": (3, 2)}[mode]
    return layers * layer + recurrences * max(0, reading - recurrent)


@numba.njit(parallel=True, fastmath=True)
def add_up(rows, times):
    """Each row added up by a thread of its own, so many times over: what reading takes, and no more."""
    sums = np.zeros(len(rows), np.float32)
    for row in numba.prange(len(rows)):
        total = np.float32(0)
        for _ in range(times):
            for k in range(rows.shape[1]):
                total += rows[row, k]
        sums[row] = total
    return sums


def measure(seconds: float, most: int) -> dict[str, Any]:
    """Both rates, of medians, as the times are that they are compared with."""
    a, b, out = (torch.randn(MATRIX, MATRIX) for _ in range(3))

    def multiply(loops: int) -> None:
        for _ in range(loops):
            torch.mm(a, b, out=out)

    rates: dict[str, Any] = {
        "operations_per_second": 2 * MATRIX**3 / timing.interleave({"mm": multiply}, seconds, most)["mm"]["median"]
    }
    rates["bytes_per_second"] = {}
    threads = torch.get_num_threads()
    numba.set_num_threads(threads)
    for kib in KIB:
        weights = torch.ones(threads, kib * 256 // threads).numpy()

        def read(loops: int, weights: np.ndarray = weights) -> None:
            add_up(weights, 10 * loops)

        taken = timing.interleave({"read": read}, seconds, most)["read"]
        rates["bytes_per_second"][str(kib)] = 10 * kib * 1024 / taken["median"]
    return rates


def main(argv: list[str] | None = None) -> None:
    options = timing.parser("bench.roofline", __doc__, DEFAULT_OUTPUT).parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    with torch.inference_mode():
        rates = measure(options.seconds, options.repeats)
    console.print(f"products: {rates['operations_per_second'] / 1e9:.0f} GFLOP/s")
    for kib, rate in rates["bytes_per_second"].items():
        console.print(f"reading {int(kib) / 1024:g} MiB: {rate / 1e9:.1f} GB/s")
    settings = {"threads": torch.get_num_threads(), "seconds": options.seconds, "repeats": options.repeats}
    record.write(options.output, record.header(dtype="float32", **settings) | rates)


if __name__ == "__main__":
    main()
