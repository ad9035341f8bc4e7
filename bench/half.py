"""Weights in bfloat16: `python -m bench.half --help`.

Inference and training of bfloat16 layers, fastrnn's and torch.nn's, beside fastrnn's float32 and, in inference, a float32 layer
whose matrices `fastrnn.compress` holds in bfloat16. Checked first, then timed in turns, as in bench.run.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from rich.console import Console

import fastrnn
from bench import record, timing
from bench.grid import Case, cases
from bench.subjects import Subject
from fastrnn.timing import TOLERANCES, Runner, difference

POINTS = r"^(few .* B1 T50|middle .* B32 T50|large .* B32 T25|apart .* T1 H256)"
TOLERANCE = TOLERANCES[torch.bfloat16]
DEFAULT_OUTPUT = record.result_file("half")


def _cast(subject: Subject, dtype: torch.dtype) -> Subject:
    """The subject in another dtype."""
    subject.module.to(dtype)
    subject.x = subject.x.detach().to(dtype).requires_grad_(subject.x.requires_grad)
    subject.input, subject.dy = subject.x, subject.dy.to(dtype)
    return subject


def measure(case: Case, seconds: float, most: int, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """The record of one case."""
    subjects = {
        "fastrnn": _cast(Subject(case, fastrnn), torch.bfloat16),
        "torch": _cast(Subject(case, torch.nn), torch.bfloat16),
        "fastrnn float32": Subject(case, fastrnn),
    }
    if case.mode == "infer":
        subjects["fastrnn compressed"] = copy.deepcopy(subjects["fastrnn float32"])
        fastrnn.compress(subjects["fastrnn compressed"].module)
    y = subjects["fastrnn float32"].results()["y"]
    errors = {name: difference(subject.results()["y"], y) for name, subject in subjects.items()}
    result: dict[str, Any] = {"name": case.name, "cell": case.cell, "mode": case.mode, "errors": errors}
    if max(errors.values()) <= tolerance:
        runners: dict[str, Runner] = {name: subject.run for name, subject in subjects.items()}
        times = timing.interleave(runners, seconds, most)
        result["ratios"] = {name: taken["median"] / times["fastrnn"]["median"] for name, taken in times.items()}
        result["times"] = times
    return result


def main(argv: list[str] | None = None) -> int:
    parser = timing.parser("bench.half", __doc__, DEFAULT_OUTPUT)
    parser.add_argument("--only", default=POINTS, metavar="REGEX", help="cases of bench.run (default %(default)s)")
    options = parser.parse_args(argv)
    record.one_tree()
    console, results = Console(highlight=False, soft_wrap=True), []
    for case in cases(options.only):
        if case.point.packed:
            continue
        results.append(measure(case, options.seconds, options.repeats))
        ratios = results[-1].get("ratios")
        told = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items() if ratio != 1) if ratios else "[red]wrong"
        console.print(f"{case.name:36} {told}")
    record.write_cases(options, results, dtype="bfloat16")
    return any("ratios" not in result for result in results)


if __name__ == "__main__":
    raise SystemExit(main())
