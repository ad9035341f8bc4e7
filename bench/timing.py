"""What benchmarks share: their command line, and the timing of fastrnn/timing.py, as `python -m fastrnn bench` has it."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastrnn.timing import Runner as Runner
from fastrnn.timing import interleave as interleave
from fastrnn.timing import summary as summary


def parser(program: str, description: str, output: Path) -> argparse.ArgumentParser:
    """Make the options of a benchmark that times cases one after the other and writes a file."""
    made = argparse.ArgumentParser(prog=program, description=description.splitlines()[0])
    made.add_argument("--seconds", type=float, default=2.0, help="of timing per case (default %(default)s)")
    made.add_argument("--repeats", type=int, default=50, help="at most so many of each rival (default %(default)s)")
    made.add_argument("--output", type=Path, default=output, help="(default %(default)s)")
    return made
