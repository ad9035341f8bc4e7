"""What every page of the gallery shares: its options, a progress bar, a race of the two libraries, its results and its figure.

page = Page(__file__, __doc__)  # reads the command line
for epoch in page.progress(range(page.pick(20, 2))):  # 20, or 2 with --quick
    ...
page.race(model, train, batches)  # seconds per epoch on torch.nn and on fastrnn
page.result("accuracy", 0.93, {"the most frequent class": 0.21})
page.save(figure)
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import fastrnn
from fastrnn.timing import TF32_TOLERANCE, elapsed, interleave

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
RACE_BATCHES = 2  # from all over an epoch
RACE_TOLERANCE = 1e-3  # of the two libraries' losses after the same few steps
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.3,
    "figure.dpi": 100,
}


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


class Page:
    """A page's options, and what it shows.

    quick:  little data and few epochs, to see that the page runs; its results are poor.
    device: where the models are.
    seed:   torch was seeded with it.
    extra:  the page's own options; `Page(..., strategy="ddp")` adds `--strategy`, and its default.
    """

    def __init__(self, file: str, doc: str | None, **extra: str) -> None:
        self.name = Path(file).stem
        title = next(line for line in (doc or self.name).splitlines() if line.strip("= "))
        parser = argparse.ArgumentParser(description=title)
        parser.add_argument("--quick", action="store_true", help="a few seconds only: see that it runs")
        parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="(default %(default)s)")
        parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
        parser.add_argument("--output", type=Path, default=Path("build/gallery"), help="for the figure (default %(default)s)")
        for name, default in extra.items():
            parser.add_argument(f"--{name}", default=default, help="(default %(default)s)")
        options = parser.parse_args()
        self.extra: dict[str, str] = {name: getattr(options, name) for name in extra}
        self.quick: bool = options.quick
        self.device: torch.device = options.device
        self.seed: int = options.seed
        self.output: Path = options.output
        torch.manual_seed(self.seed)
        matplotlib.use("Agg")
        matplotlib.rcParams.update(STYLE)

    def pick(self, full: T, quick: T) -> T:
        """`full`, or `quick` where the page shall take a few seconds only."""
        return quick if self.quick else full

    def progress(self, items: Sequence[T], what: str = "training") -> Iterator[T]:
        """Iterate over `items` beside a progress bar on stderr, so that what a page prints stays clean."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield from bar.track(items, description=what)

    def shuffled(self, items: Sequence[T], size: int) -> list[list[T]]:
        """The items in random order, in parts of `size`: the batches of an epoch."""
        order = torch.randperm(len(items)).tolist()
        return [[items[at] for at in order[start : start + size]] for start in range(0, len(order), size)]

    def race(
        self,
        model: nn.Module,
        train: Callable[[Any, torch.optim.Optimizer, Sequence[Any]], float],
        batches: Iterable[Any],
    ) -> None:
        """Print the seconds per epoch on torch.nn and on fastrnn, taken in turns on copies of `model` and a few batches.

        Args:
            model: as it is before or after training; it stays so.
            train: `train(model, optimizer, batches)` takes a step for each batch and returns the mean loss.
            batches: those of an epoch.

        Raises:
            RuntimeError: the two libraries' losses differ by more than rounding explains.
        """
        epoch = list(batches)
        count = self.pick(RACE_BATCHES, 1)
        some = epoch[:: max(1, len(epoch) // count)][:count]
        models = {"torch.nn": fastrnn.revert(copy.deepcopy(model)), "fastrnn": copy.deepcopy(model)}
        losses, runs = {}, {}
        for name, copied in models.items():
            optimizer = torch.optim.Adam(copied.parameters(), lr=1e-4)
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)  # dropout draws the same numbers for both
                losses[name] = train(copied, optimizer, some)

            runs[name] = functools.partial(train, copied, optimizer, some)
        theirs, ours = losses["torch.nn"], losses["fastrnn"]
        if not abs(theirs - ours) <= (RACE_TOLERANCE if self.device.type == "cpu" else TF32_TOLERANCE) * abs(theirs):
            raise RuntimeError(f"race: expected the same losses on both libraries, got {theirs} and {ours}")
        threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
        with torch.random.fork_rng():  # so that a page's results do not depend on how often this trained
            a, b = (time * len(epoch) / len(some) for time in self.seconds(runs, 8.0).values())
        print(f"loss of the same steps: torch.nn {theirs:.4f}, fastrnn {ours:.4f}")
        print(f"seconds per epoch on {threads}: torch.nn {a:.2f}, fastrnn {b:.2f}: {self.faster(a, b)}")

    def seconds(self, calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        """The least seconds of a call of each, timed in turns for about so many seconds together; with --quick once each.

        Other work on the machine can only add to a time, so the least one is the call's own.
        """
        runs = {name: functools.partial(_repeat, call) for name, call in calls.items()}
        if self.quick:
            return {name: elapsed(run, 1) for name, run in runs.items()}
        return {name: min(times["seconds"]) for name, times in interleave(runs, seconds, most=50).items()}

    def faster(self, before: float, after: float) -> str:
        """How many times as fast it is after as before, which the few steps of a quick run do not tell."""
        return self.pick(f"{before / after:.2f} times as fast", "too short to tell, leave out --quick")

    def result(self, metric: str, value: float, baselines: Mapping[str, float], lower: bool = False, unit: str = "") -> None:
        """Print a metric beside that of the baselines, and whether it beats them all.

        Args:
            metric: its name.
            value: of the page's model.
            baselines: by name, measured on the same held-out data.
            lower: less is better.
            unit: what is written after each number; "%" multiplies them by 100.
        """
        scale, unit = (100.0, " %") if unit == "%" else (1.0, f" {unit}" if unit else "")
        others = ", ".join(f"{name} {other * scale:.4g}{unit}" for name, other in baselines.items())
        better = all(value < other if lower else value > other for other in baselines.values())
        worse = "does not beat the baseline" + self.pick("", ", which takes a run without --quick")
        verdict = "beats the baseline" if better else worse
        print(f"{metric}: {value * scale:.4g}{unit} ({others}): {verdict}")

    def save(self, figure: Figure) -> None:
        """Write the page's figure as a PNG named after the page."""
        self.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.output / f"{self.name}.png", dpi=80)
