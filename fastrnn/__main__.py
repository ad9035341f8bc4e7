"""The command line: `python -m fastrnn info`, `bench` and `compile`.

`info` says what is installed and which engine runs where. `bench` times one layer on torch.nn and on fastrnn. `compile`
compiles the kernels of cells of one's own beforehand.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastrnn
from fastrnn import dispatch, machine
from fastrnn.cells import CellFunction
from fastrnn.kernels import cpu, gpu
from fastrnn.kernels.user_cache import cache_path
from fastrnn.timing import NOT_STEADY, Comparison, compare, milliseconds

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 1 where the results differ. Bad arguments exit with 2."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command == "info":
        print(aligned(info()))
        return 0
    if options.command == "compile":
        return compile_cells(options, parser)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda was asked for, but torch finds no GPU here")
    try:
        bench(options)
    except RuntimeError as error:  # wrong results, FASTRNN_BACKEND, memory
        print(f"fastrnn: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastrnn", description="Drop-in RNN, LSTM and GRU layers for torch.nn.")
    parser.add_argument("--version", action="version", version=f"fastrnn {fastrnn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,bench,compile}")
    commands.add_parser("info", help="say what is installed, and which engine runs where", description=info.__doc__)
    timed = commands.add_parser(
        "bench",
        help="time one layer on torch.nn and on fastrnn",
        description="Time one layer on torch.nn and on fastrnn, in turns. Both must compute the same before they are timed.",
        epilog="For a model of your own: from fastrnn.timing import compare; print(compare(model, batch))",
    )
    timed.add_argument("--cell", choices=("lstm", "gru", "rnn"), default="lstm", help="(default %(default)s)")
    timed.add_argument("--hidden", type=_positive, default=256, metavar="N", help="units of the layer (default %(default)s)")
    timed.add_argument("--input", type=_positive, metavar="N", help="features of the input (default: as --hidden)")
    timed.add_argument("--batch", type=_positive, default=32, metavar="N", help="sequences in a batch (default %(default)s)")
    timed.add_argument("--steps", type=_positive, default=100, metavar="N", help="time steps (default %(default)s)")
    timed.add_argument("--layers", type=_positive, default=1, metavar="N", help="layers on each other (default %(default)s)")
    timed.add_argument("--bidirectional", action="store_true", help="run in both directions")
    timed.add_argument("--train", action="store_true", help="time forward and backward (default: forward alone)")
    timed.add_argument("--threads", type=_positive, metavar="N", help="threads of both libraries (default: torch's own choice)")
    timed.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="(default %(default)s)")
    timed.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default %(default)s)")
    timed.add_argument("--seconds", type=_seconds, default=3.0, metavar="S", help="of timing, about (default %(default)s)")
    compiled = commands.add_parser(
        "compile",
        help="compile kernels of cells beforehand",
        description="Compile the kernels of cells of one's own beforehand.",
    )
    compiled.add_argument("cells", nargs="+", metavar="package.module:name", help="a cell that fastrnn.cell has made")
    compiled.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(default %(default)s)")
    compiled.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="copy them there: cells find them in the directory fastrnn_kernels beside their module",
    )
    compiled.add_argument(
        "--tiers", metavar="NAMES", help="of processors, with commas, or all; with --output (default: this processor's)"
    )
    return parser


def compile_cells(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Fill the user's cache, and a directory, with the kernels of cells, by the names under which they are imported."""
    from fastrnn.kernels.cpu import fallback, processor
    from fastrnn.kernels.cpu.source import shipped_directory

    known = {tier.name: tier for tier in processor.tiers()}
    own = cpu.load()[1].name
    tiers = [*known] if options.tiers == "all" else (options.tiers or own).split(",")
    if unknown := [name for name in tiers if name not in known]:
        parser.error(f"argument --tiers: expected all, or some of {','.join(known)}, got {unknown[0]!r}")
    if options.tiers and not options.output:
        parser.error("argument --tiers: expected --output too; the cache is this processor's")
    sys.path.insert(0, os.getcwd())
    scalar, passes = "f64" if options.dtype == "float64" else "f32", ("forward", "backward")
    for name in options.cells:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            parser.error(f"argument package.module:name: {name}: {error}")
        if not isinstance(found, CellFunction):
            parser.error(f"argument package.module:name: {name}: expected a cell that fastrnn.cell has made, got {found!r}")
        cell = found.definition.name
        if not options.output:
            cpu.prepare_cell(cell, DTYPES[options.dtype], True)
            print(f"{name}: forward and backward, {options.dtype}, are in {_cache()}")
        for tier in (known[tier] for tier in tiers if options.output):
            fallback.compile_units(cell, scalar, passes, tier)
            directory = shipped_directory(options.output, tier.name)
            directory.mkdir(parents=True, exist_ok=True)
            for path in (path for which in passes for path in fallback.objects(tier, (cell, scalar, which))):
                if path.parent != directory:
                    shutil.copy(path, directory)
            print(f"{name}: forward and backward, {options.dtype}, for {tier.name}, are in {directory}")
    return 0


def _positive(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) <= 3600:
            return value
    raise argparse.ArgumentTypeError(f"expected seconds above 0, at most 3600, got {text!r}")


# info


def info() -> list[tuple[str, str]]:
    """Say what is installed, what the process may use, and which engine runs on each device."""
    caches = ", ".join(f"{name} {size}" for name, size in machine.caches().items())
    rows = [
        ("fastrnn", f"{fastrnn.__version__}, in {Path(fastrnn.__file__).parent}"),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", str(torch.__version__)),
        ("triton", _version("triton") or "not installed; the GPU engine needs it"),
        ("numba", _version("numba") or "not installed; it is needed only where no compiled kernels fit the processor"),
        ("processor", machine.processor() + f" ({caches})" * bool(caches)),
        ("CPUs", f"{machine.cpus()} of {os.cpu_count()} may be used by this process{_quota()}"),
        ("threads", str(torch.get_num_threads()) if dispatch.unavailable else cpu.team()[1]),
        ("engine, cpu", _cpu_engine()),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            rows.append((f"engine, {device}", f"{_gpu_engine(device)} ({torch.cuda.get_device_name(device)})"))
    else:
        rows.append(("engine, cuda", "none: torch finds no GPU here"))
    rows.append(("kernel cache", _cache()))
    rows += [(name, value) for name, value in sorted(os.environ.items()) if name.startswith("FASTRNN_")]
    return rows


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _quota() -> str:
    """The quota of the process's control group, as the runtime reads it; nothing where there is no runtime to ask."""
    if dispatch.unavailable or cpu.load()[0] != "compiled":
        return ""
    quota = cpu.runtime_module().cpu_quota("")
    return ", and there is no quota" if math.isinf(quota) else f", and a quota grants it the time of {quota:g}"


def _cpu_engine() -> str:
    if dispatch.forced not in (None, "cpu"):
        return f"{dispatch.forced}, because FASTRNN_BACKEND says so"
    if dispatch.unavailable:
        return f"torch.nn's own code, because {dispatch.unavailable}"
    how, tier = cpu.load()
    if how == "run time":
        return f"fastrnn, {tier.name}: kernels are compiled when first used, and run on one thread"
    others = [name for name in cpu.runtime_module().tiers() if name != tier.name]
    return f"fastrnn, {tier.name}" + f" (also compiled for this processor: {', '.join(others)})" * bool(others)


def _gpu_engine(device: torch.device) -> str:
    if dispatch.forced not in (None, "triton"):
        return f"{dispatch.forced}, because FASTRNN_BACKEND says so"
    reason = gpu.why_not(device)
    if reason:
        return f"torch.nn's own code, because {reason}"
    off = "".join(f", without the {gpu.selftest.in_words(part)}: {why}" for part, why in gpu.off(device).items())
    return f"fastrnn's Triton kernels{off}"


def _cache() -> str:
    path = cache_path()
    return f"{path}{'' if path.exists() else ', empty'} (kernels that were compiled at run time, and self-tests of GPUs)"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns: the first to the left, the last as it is, those between to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others[:-1], widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells, others[-1]]))
    return "\n".join(lines)


# bench


def bench(options: argparse.Namespace) -> None:
    """Time the layer that the options describe, and print what came of it.

    Raises:
        RuntimeError: fastrnn's results are not torch.nn's.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype, inputs = DTYPES[options.dtype], options.input or options.hidden
    made = {"bidirectional": options.bidirectional, "device": options.device, "dtype": dtype}
    layer = getattr(nn, options.cell.upper())(inputs, options.hidden, options.layers, **made)
    x = torch.randn(options.steps, options.batch, inputs).to(options.device, dtype)
    where = torch.cuda.get_device_name() if x.is_cuda else f"{torch.get_num_threads()} threads of {machine.processor()}"
    print(f"{layer}, batch {options.batch}, {options.steps} steps, {options.dtype}, on {where}")
    with torch.set_grad_enabled(options.train):
        explanation = fastrnn.explain(layer, x)
    print(f"engine: {explanation.engine}" + f" ({explanation.schedule[0]})" * bool(explanation.schedule))
    with _progress() as progress:
        result = compare(layer, x, train=options.train, seconds=options.seconds, progress=progress)
    _print_table(result)
    print(f"Both compute the same: the largest relative difference of a result is {result.error:.0e}.")
    if not result.steady:
        print(NOT_STEADY)


def _rows(result: Comparison) -> list[list[str]]:
    head = ["training step" if result.mode == "train" else "inference", "p20", "p50", "p80"]
    taken = [[name, *(milliseconds(times[p]) for p in ("p20", "median", "p80"))] for name, times in result.times.items()]
    return [head, *taken, ["speed-up", *(f"{value:.2f}x" for value in result.speed_up.values())]]


def _print_table(result: Comparison) -> None:
    head, *rows = _rows(result)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join(line.rstrip() for line in aligned([[*row, ""] for row in (head, *rows)]).splitlines()))
        return
    table = Table(head[0], highlight=False)
    for name in head[1:]:
        table.add_column(name, justify="right")
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1], style="bold")
    Console().print(table)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], object]]:
    """Show a bar, drawn between rounds only: a thread that draws would run while the rivals are timed."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield _plain_progress
        return
    columns: list[Any] = [TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, auto_refresh=False, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, refresh=True)

        yield show


def _plain_progress(done: int, total: int) -> None:
    if sys.stdout.isatty():
        print(f"\rround {done} of {total}", end="\n" if done == total else "", flush=True)


if __name__ == "__main__":
    sys.exit(main())
