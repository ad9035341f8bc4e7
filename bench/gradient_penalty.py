"""Training with a gradient penalty: `python -m bench.gradient_penalty --help`.

A recurrent critic in the manner of WGAN-GP: its score, the gradient of the score by the input, how far the length of that
gradient is from one, and the gradient of both by all parameters, which is a double backward. Checked first, then timed in
turns, as in bench.run.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import fastrnn
from bench import record, timing
from bench.grid import CELLS, Case, Point
from bench.subjects import Subject
from fastrnn.timing import TOLERANCES, Runner, differences

POINTS = (
    Point("few", 1, 16, 3),
    Point("few", 4, 16, 10),
    Point("middle", 32, 64, 50),
    Point("middle", 32, 128, 50),
    Point("apart", 32, 128, 50, fill=0.57),
    Point("apart", 32, 128, 50, layers=2, directions=2),
)
WEIGHT = 10.0  # of the penalty, as WGAN-GP has it
DEFAULT_OUTPUT = record.result_file("penalty")


class Critic(Subject):
    """A module whose training step has a gradient penalty."""

    def step(self) -> tuple[Tensor, Any]:
        self.drop_gradients()
        y, states = self.call()
        score = (y * self.dy).sum()
        (slope,) = torch.autograd.grad(score, self.x, create_graph=True)
        penalty = (slope.norm(dim=-1) - 1).square().sum()
        (score + WEIGHT * penalty).backward()
        return y, states


def measure(case: Case, seconds: float, most: int, tolerance: float = TOLERANCES[torch.float32]) -> dict[str, Any]:
    """Record one case."""
    own, other = Critic(case, fastrnn), Critic(case, torch.nn)
    found = differences(own, other)
    faults = [f"{name} differs by {value:.2g}" for name, value in found.items() if not value <= tolerance]
    result: dict[str, Any] = {"name": case.name, "point": asdict(case.point), "cell": case.cell, "faults": faults}
    if not faults:
        runners: dict[str, Runner] = {"fastrnn": own.run, "torch": other.run}
        times = timing.interleave(runners, seconds, most)
        result |= {"ratios": {"torch": times["torch"]["median"] / times["fastrnn"]["median"]}, "times": times}
    return result


def main(argv: list[str] | None = None) -> int:
    parser = timing.parser("bench.gradient_penalty", __doc__, DEFAULT_OUTPUT)
    options = parser.parse_args(argv)
    record.one_tree()
    console, results = Console(highlight=False, soft_wrap=True), []
    for point in POINTS:
        for cell in CELLS:
            results.append(measure(Case(point, cell, "train"), options.seconds, options.repeats))
            ratios = results[-1].get("ratios")
            told = f"{ratios['torch']:.2f}x" if ratios else f"[red]wrong: {', '.join(results[-1]['faults'])}"
            console.print(f"{results[-1]['name']:36} {told}")
    record.write_cases(options, results)
    return any(result["faults"] for result in results)


if __name__ == "__main__":
    raise SystemExit(main())
