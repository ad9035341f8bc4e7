"""Peak memory of a training step, fastrnn against torch.nn: `python -m bench.memory --help`.

Each pair of figures comes of a process of its own. It makes the model, the input and the output's gradient, and takes a
step of a tiny model of the same kind, so that code and threads are loaded. Then, twice: it drops all gradients, gives
free heap back to the system, resets the kernel's high-water mark of resident memory, and takes a training step. A
figure is how far that step raises the mark above the memory resident before the first: outputs, what backward keeps,
gradients, workspace, and what a library sets up for these sizes and keeps.

Linux counts resident pages in batches: two figures that differ by less than RESOLUTION are the same. The C library is
told to map and unmap each larger block on its own (ALLOCATOR), for all libraries alike: otherwise holes in its heap, a
matter of luck, move the figures by a quarter.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from bench import record
from bench.grid import Case, cases

LIBRARIES = {"fastrnn": "fastrnn", "torch": "torch.nn"}
STEPS = ("first", "later")
RESOLUTION = 2**19
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384", "MALLOC_TOP_PAD_": "0"}
DEFAULT_OUTPUT = record.result_file("memory")


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(rows[field].split()[0]) * 1024


def peaks(case: Case, library: str, threads: int, recompute: bool = False) -> list[int]:
    """Bytes by which each of STEPS raises this process's peak, fastrnn in its recompute mode or not. For a fresh process."""
    import torch

    import fastrnn
    from bench.subjects import Subject

    torch.set_num_threads(threads)
    module = importlib.import_module(library)
    subject = Subject(case, module)
    tiny = replace(case, point=replace(case.point, batch=2, hidden=8, input=8, steps=7))
    raised = []
    with fastrnn.recompute(recompute):
        Subject(tiny, module).step()
        baseline = 0
        for _ in STEPS:
            subject.drop_gradients()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
            baseline = baseline or _status("VmRSS")
            subject.step()
            raised.append(_status("VmHWM") - baseline)
    return raised


def fresh(case: Case, library: str, threads: int, recompute: bool = False) -> list[int]:
    """`peaks` in a process of its own."""
    options = {"--case": case.name, "--library": library, "--threads": str(threads)}
    command = [sys.executable, "-m", "bench.memory", *(word for option in options.items() for word in option)]
    command += ["--recompute"] * recompute
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **ALLOCATOR}
    run = subprocess.run(command, cwd=record.ROOT, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{case.name} on {library} failed:\n{run.stderr}")
    return json.loads(run.stdout)


def measure(case: Case, threads: int, repeats: int, recompute: bool = False) -> dict[str, Any]:
    """The record of one case; the libraries take turns."""
    rounds = [{name: fresh(case, library, threads, recompute) for name, library in LIBRARIES.items()} for _ in range(repeats)]
    taken = {name: {step: [r[name][at] for r in rounds] for at, step in enumerate(STEPS)} for name in LIBRARIES}
    medians = {name: {step: int(statistics.median(v)) for step, v in steps.items()} for name, steps in taken.items()}
    return {"name": case.name, "point": asdict(case.point), "cell": case.cell, "median": medians, "peaks": taken}


def above(result: dict[str, Any], resolution: int = RESOLUTION) -> bool:
    """Whether fastrnn takes more than torch.nn, in either step."""
    own, other = (result["median"][name] for name in LIBRARIES)
    return any(own[step] > other[step] + resolution for step in STEPS)


def line(result: dict[str, Any]) -> str:
    """One case for the terminal."""
    colour = "red" if above(result) else "green"
    medians = {name: [result["median"][name][step] / 2**20 for step in STEPS] for name in LIBRARIES}
    figures = [f"{name} {first:8.2f} {later:8.2f} MiB" for name, (first, later) in medians.items()]
    return f"{result['name']:36} [{colour}]{'   '.join(figures)}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="cases such as 'few lstm train B1 T100 H64'")
    parser.add_argument("--repeats", type=int, default=1, help="processes per case and library (default %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default %(default)s)")
    parser.add_argument("--recompute", action="store_true", help="fastrnn in its recompute mode")
    parser.add_argument("--output", type=Path, help=f"(default {DEFAULT_OUTPUT} for the whole grid as it is, else none)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--library", choices=LIBRARIES.values(), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    training = list(cases(options.only, modes=("train",)))
    if options.case:
        (case,) = (case for case in training if case.name == options.case)
        print(json.dumps(peaks(case, options.library, options.threads, options.recompute)))
        return
    record.one_tree()
    console = Console(highlight=False, soft_wrap=True)
    results = []
    for case in track(training, "peak memory", console=console, transient=True):
        results.append(measure(case, options.threads, options.repeats, options.recompute))
        console.print(line(results[-1]))
    output = options.output or (DEFAULT_OUTPUT if not (options.only or options.recompute) else None)
    if output:
        settings = {name: getattr(options, name) for name in ("threads", "repeats", "recompute")}
        record.write(output, record.header(resolution=RESOLUTION, **settings) | {"cases": results})
        console.print(f"written: {output}")


if __name__ == "__main__":
    main()
