"""What a fresh process waits for: the import, and the first call: `python -m bench.startup --help`."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import record

LIBRARIES = {"fastrnn": "fastrnn", "torch": "torch.nn"}
MODES = ("infer", "train")
DEFAULT_OUTPUT = record.result_file("startup")

# Runs in a fresh interpreter: seconds of `import torch`, of importing the library after it, and of its first call.
CHILD = """
import importlib, json, sys, time
clock = [time.perf_counter()]
import torch
clock.append(time.perf_counter())
library = importlib.import_module(sys.argv[1])
clock.append(time.perf_counter())
layer = getattr(library, sys.argv[2])(64, 64)
x = torch.randn(16, 4, 64)
train = sys.argv[3] == "train"
torch.set_grad_enabled(train)
start = time.perf_counter()
y, _ = layer(x)
if train:
    y.sum().backward()
first = time.perf_counter() - start
print(json.dumps({"import torch": clock[1] - clock[0], "import library": clock[2] - clock[1], "first call": first}))
"""


def fresh(library: str, cell: str, mode: str) -> dict[str, float]:
    """The seconds of one fresh process."""
    command = [sys.executable, "-c", CHILD, library, cell.upper(), mode]
    return json.loads(subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, check=True).stdout)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.startup", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (default %(default)s)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="(default %(default)s)")
    options = parser.parse_args(argv)
    record.one_tree()
    kinds = [(name, cell, mode) for cell in ("lstm", "gru", "rnn") for mode in MODES for name in LIBRARIES]
    fresh("fastrnn", "lstm", "infer")  # files into the system's cache
    taken: dict[tuple[str, str, str], list[dict[str, float]]] = {kind: [] for kind in kinds}
    console = Console(highlight=False)
    for name, cell, mode in track(kinds * options.repeats, "fresh processes", console=console, transient=True):
        taken[name, cell, mode].append(fresh(LIBRARIES[name], cell, mode))

    own = [process for (name, *_), processes in taken.items() if name == "fastrnn" for process in processes]
    imports = {key: [process[key] for process in own] for key in ("import torch", "import library")}
    first: list[dict[str, Any]] = [
        {"library": name, "cell": cell, "mode": mode, "seconds": [process["first call"] for process in processes]}
        for (name, cell, mode), processes in taken.items()
    ]
    content = {"import": imports, "first call": first}
    record.write(options.output, record.header(repeats=options.repeats) | content)

    table = Table("", "median ms")
    table.add_row("import torch", f"{statistics.median(imports['import torch']) * 1e3:.0f}")
    table.add_row("import fastrnn, after torch", f"{statistics.median(imports['import library']) * 1e3:.1f}")
    for row in first:
        label = f"first call: {row['library']} {row['cell']} {row['mode']}"
        table.add_row(label, f"{statistics.median(row['seconds']) * 1e3:.1f}")
    console.print(table, f"written: {options.output}")


if __name__ == "__main__":
    main()
