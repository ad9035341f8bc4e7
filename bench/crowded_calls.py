"""Time one process's calls in one situation: bench.crowded starts this file, in the interpreter of the build that it measures.

    python bench/crowded_calls.py '{"library": "fastrnn", "situation": "quiet", "threads": 2, "seconds": 0.5,
                                    "jobs": [[["LSTM", 320, 1, 60], "infer"]]}'

It needs torch and fastrnn alone, and prints what it found for each job as JSON, times in microseconds. The busy processes that
it starts end with it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Keeps a core busy until whoever started it is gone; with an argument, for so many seconds in turns with as many of rest.
BUSY = """
import os, sys, time
parent, burst, begin = os.getppid(), float(sys.argv[1]), time.monotonic()
while os.getppid() == parent:
    if burst and (time.monotonic() - begin) // burst % 2:
        time.sleep(burst - (time.monotonic() - begin) % burst)
    for _ in range(20_000):
        pass
"""
SETTLE = 2.0  # seconds of calls beside a neighbour before any of them is timed
BURST = 0.3
PYTHON_THREADS = 4
Call = Callable[[], object]


@contextlib.contextmanager
def neighbours(count: int, burst: float = 0.0) -> Iterator[None]:
    """So many busy processes inside the block."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY, str(burst)]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def make_call(library: str, point: list[Any], mode: str, others: int) -> Call:
    """A call of a module with data of its own. mode: "infer", or "train" for a training step without an optimizer.

    others: threads for torch's own operations between the module's, where these are not to have as many; else 0.
    """
    cell, hidden, batch, steps = point
    torch.manual_seed(0)
    module = getattr(importlib.import_module(library), cell)(hidden, hidden)
    x = torch.randn(steps, batch, hidden)
    own = torch.get_num_threads()

    def infer() -> None:
        with torch.inference_mode():
            module(x)

    def train() -> None:
        module.zero_grad()
        y = module(x)[0]
        torch.set_num_threads(others or own)
        loss = y.sum()
        torch.set_num_threads(own)
        loss.backward()

    return train if mode == "train" else infer


def timed(call: Call, seconds: float, least: int = 12) -> list[float]:
    """Microseconds of each call, for so many seconds and at least so many calls."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < least:
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Percentiles and mean."""
    parts = statistics.quantiles(times, n=100, method="inclusive")
    return {"p50": statistics.median(times), "p90": parts[89], "p99": parts[98], "mean": statistics.fmean(times)}


def allowed() -> int:
    """Threads that a call of this thread may use now; 0 where the build does not say."""
    from fastrnn.kernels import cpu

    threads = getattr(cpu.runtime_module(), "threads", None)
    return threads()[0] if threads else 0


def smaller_team(call: Call, seconds: float) -> dict[str, float]:
    """Milliseconds of the longest time in which calls might not use all threads."""
    longest, since, most = 0.0, None, allowed()
    end = time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        call()
        since = None if allowed() >= most else since or now
        longest = max(longest, time.perf_counter() - (since or time.perf_counter()))
    return {"longest ms": 1e3 * longest}


def from_python_threads(call: Call, threads: int, seconds: float) -> dict[str, float]:
    """Calls a second of PYTHON_THREADS threads together."""
    done, end = [0] * PYTHON_THREADS, time.perf_counter() + seconds

    def work(index: int) -> None:
        torch.set_num_threads(threads)  # torch keeps the number per thread
        while not done[index] or time.perf_counter() < end:
            call()
            done[index] += 1

    workers = [threading.Thread(target=work, args=(index,)) for index in range(PYTHON_THREADS)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"calls a second": sum(done) / (time.perf_counter() - start)}


def measure(
    library: str,
    situation: str,
    threads: int,
    seconds: float,
    jobs: list[list[Any]],
    busy: int = 1,
    cpus: int = 0,
    others: int = 0,
) -> list[dict[str, float]]:
    """What a situation does to the calls of each job, a point and a mode.

    situation: "quiet" (nothing runs beside the calls), "neighbour" (`busy` processes do, and did for SETTLE seconds), "after"
    (they ended a second ago), "bursts" (they run for BURST seconds and rest for as long), "python threads" (four call a
    module at the same time, in inference: gradients of one module are no business of several threads), "smaller team"
    (quiet, and asked of the team and not of times).
    cpus: run on so many only, if not 0. others: see `make_call`.
    """
    if cpus:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
    torch.set_num_threads(threads)
    calls = [make_call(library, point, mode, others) for point, mode in jobs]
    for call in calls:
        timed(call, 0, least=3)
    if situation == "python threads":
        return [from_python_threads(call, threads, seconds) for call in calls]
    if situation == "smaller team":
        return [smaller_team(call, seconds) for call in calls]
    with neighbours(0 if situation == "quiet" else busy, BURST if situation == "bursts" else 0):
        if situation in ("neighbour", "after"):
            timed(calls[0], SETTLE)
        if situation != "after":
            return [summary(timed(call, seconds)) for call in calls]
    timed(calls[0], 1)
    return [summary(timed(call, seconds)) for call in calls]


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
