"""What is measured: a grid of points (sizes), each as LSTM, GRU and RNN, for inference and for training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
CELLS = tuple(GATES)
MODES = ("train", "infer")
GROUPS = {"few": "few rows", "middle": "middle", "large": "large", "apart": "apart"}


@dataclass(frozen=True)
class Point:
    """One set of sizes. fill: share of steps x batch that is not padding; below 1 the sequence is packed."""

    group: str
    batch: int
    hidden: int
    steps: int
    input: int = 0  # 0: as hidden
    layers: int = 1
    directions: int = 1
    fill: float = 1.0
    modes: tuple[str, ...] = MODES

    @property
    def input_size(self) -> int:
        return self.input or self.hidden

    @property
    def packed(self) -> bool:
        return self.fill < 1

    @property
    def simple(self) -> bool:
        """One layer, one direction, dense."""
        return (self.layers, self.directions, self.fill) == (1, 1, 1)

    @property
    def name(self) -> str:
        """Such as B32 T100 H256: what differs from the plain case follows."""
        name = f"B{self.batch} T{self.steps} H{self.hidden}"
        if self.input_size != self.hidden:
            name += f" I{self.input_size}"
        if (self.layers, self.directions) != (1, 1):
            name += f" {self.layers}x{self.directions}"
        return name + f" {self.fill:.0%}" * self.packed

    def lengths(self) -> list[int]:
        """Steps of each sequence of the batch, longest first: evenly spread, their mean `fill` of the longest."""
        if not self.packed:
            return [self.steps] * self.batch
        shortest = (2 * self.fill - 1) * self.steps
        stride = (self.steps - shortest) / (self.batch - 1)
        return [round(self.steps - row * stride) for row in range(self.batch)]


def _points(group: str, batches: tuple[int, ...], sizes: tuple[tuple[int, int], ...]) -> list[Point]:
    return [Point(group, batch, hidden, steps) for batch in batches for hidden, steps in sizes]


GRID: tuple[Point, ...] = (
    # A service answering one request, or a control loop: latency, and the weights' way through the caches.
    *_points("few", (1,), ((64, 100), (128, 100), (256, 100), (512, 50), (1024, 50))),
    *_points("few", (4, 8), ((128, 100), (256, 100))),
    # Ordinary training.
    *_points("middle", (32,), ((64, 100), (128, 100), (256, 100), (512, 50))),
    *_points("middle", (64,), ((512, 100),)),  # torch's own fastrnns benchmark
    # Products so large that a library's GEMM is at its best.
    *_points("large", (128,), ((256, 50), (512, 50), (1024, 25))),
    *_points("large", (32,), ((1024, 25), (2048, 10))),
    # One step at a time: what a call costs.
    *_points("apart", (1, 8), ((64, 1), (256, 1))),
    Point("apart", 1, 64, 100, layers=2),
    Point("apart", 16, 256, 64, layers=2, directions=2),
    Point("apart", 32, 256, 100, fill=0.57),
    # The pair that papers on CPUs report.
    Point("apart", 1, 200, 15, input=250, modes=("infer",)),
    Point("apart", 128, 1024, 50, modes=("train",)),
)


@dataclass(frozen=True)
class Case:
    """A point of the grid as one cell in one mode."""

    point: Point
    cell: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.point.group} {self.cell} {self.mode} {self.point.name}"


def cases(only: str = "", modes: tuple[str, ...] = MODES) -> Iterator[Case]:
    """The grid's cases whose name the regular expression `only` finds, point by point."""
    for point in GRID:
        for cell in CELLS:
            for mode in point.modes:
                case = Case(point, cell, mode)
                if mode in modes and re.search(only, case.name):
                    yield case
