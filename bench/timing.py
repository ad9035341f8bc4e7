"""Interleaved timing: rivals take turns in random order, so that a change of the machine's mood meets them all."""

from __future__ import annotations

import argparse
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LEAST = 0.01  # seconds that a repeat takes at least
FEWEST = 5  # repeats, however slow
SETTLE = 0.02  # a call below it is made once untimed before each repeat: caches and threads are then its own again


def parser(program: str, description: str, output: Path) -> argparse.ArgumentParser:
    """The options of a benchmark that times cases one after the other and writes a file."""
    made = argparse.ArgumentParser(prog=program, description=description.splitlines()[0])
    made.add_argument("--seconds", type=float, default=2.0, help="of timing per case (default %(default)s)")
    made.add_argument("--repeats", type=int, default=50, help="at most so many of each rival (default %(default)s)")
    made.add_argument("--output", type=Path, default=output, help="(default %(default)s)")
    return made


def elapsed(run: Callable[[int], object], loops: int) -> float:
    """Seconds per loop."""
    start = time.perf_counter()
    run(loops)
    return (time.perf_counter() - start) / loops


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, and the 20th and 80th percentile."""
    low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"p20": low, "median": statistics.median(seconds), "p80": high}


def interleave(
    rivals: Mapping[str, Callable[[int], object]], seconds: float, most: int, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Time the rivals in rounds for about `seconds` together, at most `most` repeats each.

    Returns for each its loops per repeat, the seconds per call of every repeat in order, and their `summary`.
    """
    order = random.Random(seed)
    single = {}
    for name, run in rivals.items():
        run(1)
        single[name] = min(elapsed(run, 1) for _ in range(2))
    loops = {name: max(1, math.ceil(LEAST / value)) for name, value in single.items()}
    round_seconds = sum((loops[name] + (value < SETTLE)) * value for name, value in single.items())
    rounds = max(FEWEST, min(most, int(seconds / round_seconds)))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order.sample(list(rivals), len(rivals)):
                if single[name] < SETTLE:
                    rivals[name](1)
                times[name].append(elapsed(rivals[name], loops[name]))
    finally:
        gc.enable()
    return {name: {"loops": loops[name], "seconds": values, **summary(values)} for name, values in times.items()}
