"""Compare a module on torch.nn and on fastrnn: check that both compute the same, then time them in turns.

`compare` is what a user calls, and what `python -m fastrnn bench` runs. The rest is shared with the project's benchmarks.
Interleaving is what makes the figures trustworthy: the rivals take turns in random order, so that a machine which is busy or
slow for a while slows both.
"""

from __future__ import annotations

import copy
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn.convert import convert, revert

LEAST = 0.01  # seconds that a repeat takes at least
FEWEST = 5  # repeats, however slow
# Threads that wait for work keep a processor busy. After a call torch's pool, which fastrnn uses too, does so for 4 to 11 ms on
# Zen 4, and openvino's for 1 ms; onnxruntime's does not where it is told to stop with the run. A rest of so many seconds before
# each repeat lets them fall asleep, so that nobody is timed beside them.
REST = 0.02
SETTLE = 0.02  # a call below it is made once untimed before each repeat: caches and threads are then its own again
# The relative L2 distance between two libraries' results that only a wrong result exceeds. In half precision that is much, as
# torch.nn rounds at every operation. TF32 is what float32 layers on a GPU compute in by default.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.05}
TF32_TOLERANCE = 1e-2

UNSTEADY = 1.3  # p80 over p20 of a library's times, above which other work is in them

NOT_STEADY = "These times vary a lot, so other work is running here. Stop it, or measure for more seconds."

Runner = Callable[[int], object]  # runs the work that many times


def elapsed(run: Runner, loops: int) -> float:
    """Measure the seconds per loop."""
    start = time.perf_counter()
    run(loops)
    return (time.perf_counter() - start) / loops


def summary(values: list[float]) -> dict[str, float]:
    """Compute the median, and the 20th and 80th percentile."""
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": low, "median": statistics.median(values), "p80": high}


def interleave(
    rivals: Mapping[str, Runner],
    seconds: float,
    most: int,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Time the rivals in rounds for about `seconds` together, at most `most` repeats each, with a rest before each repeat.

    progress: called with the rounds done and the rounds in all, between rounds.

    Returns for each its loops per repeat, the seconds per call of every repeat in order, and their `summary`.
    """
    order = random.Random(seed)
    single = {}
    for name, run in rivals.items():
        run(1)
        single[name] = min(elapsed(run, 1) for _ in range(2))
    loops = {name: max(1, math.ceil(LEAST / value)) for name, value in single.items()}
    round_seconds = sum(REST + (loops[name] + (value < SETTLE)) * value for name, value in single.items())
    rounds = max(FEWEST, min(most, int(seconds / round_seconds)))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            for name in order.sample(list(rivals), len(rivals)):
                time.sleep(REST)
                if single[name] < SETTLE:
                    rivals[name](1)
                times[name].append(elapsed(rivals[name], loops[name]))
            if progress:
                progress(done + 1, rounds)
    finally:
        gc.enable()
    return {name: {"loops": loops[name], "seconds": values, **summary(values)} for name, values in times.items()}


class Subject:
    """A module and its call, to be run and checked: forward for "infer", forward and backward for "train".

    module: returns its output first, a tensor or a packed sequence, or returns nothing else.
    input:  the call's first argument. In training, a tensor of floating point numbers gets a gradient, too.
    more:   the arguments that follow.
    dy:     the gradient of the output that training starts from.
    """

    def __init__(self, module: nn.Module, input: Any, mode: str, dy: Tensor, *more: Any) -> None:
        self.module, self.mode, self.dy, self.more = module.train(mode == "train"), mode, dy, more
        data = input.data if isinstance(input, PackedSequence) else input
        self.x = data.detach().requires_grad_(mode == "train" and data.is_floating_point())
        self.input = PackedSequence(self.x, *input[1:]) if isinstance(input, PackedSequence) else self.x

    def call(self) -> tuple[Tensor, Any]:
        """Run forward: (y, whatever else the module returned), y without its packing."""
        result = self.module(self.input, *self.more)
        output, *states = result if type(result) in (tuple, list) else (result,)
        return (output.data if isinstance(output, PackedSequence) else output), states

    def drop_gradients(self) -> None:
        """Set all gradients to None, as an optimizer's zero_grad does."""
        self.x.grad = None
        for parameter in self.module.parameters():
            parameter.grad = None

    def step(self) -> tuple[Tensor, Any]:
        """Run forward, and backward from `dy` to the input and all parameters."""
        self.drop_gradients()
        y, states = self.call()
        y.backward(self.dy)
        return y, states

    def run(self, loops: int) -> None:
        """Train or infer `loops` times, and wait until a GPU is done."""
        if self.mode == "train":
            for _ in range(loops):
                self.step()
        else:
            with torch.inference_mode():
                for _ in range(loops):
                    self.call()
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)

    def results(self) -> dict[str, Tensor]:
        """Run once and collect everything that a run yields, by name. Dropout draws the same numbers in each call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if self.mode == "infer":
                with torch.inference_mode():
                    y, states = self.call()
            else:
                y, states = self.step()
        found = {"y": y}
        for index, state in enumerate(_tensors(states)):
            found["h_n" if index == 0 else "c_n" if index == 1 else f"state {index}"] = state
        if self.mode == "train":
            named = {"x": self.x, **dict(self.module.named_parameters())}
            found |= {f"grad {name}": leaf.grad for name, leaf in named.items() if leaf.grad is not None}
        return {name: value.detach() for name, value in found.items()}


def _tensors(states: Any) -> Iterator[Tensor]:
    if isinstance(states, Tensor):
        yield states
    elif isinstance(states, (tuple, list)):
        for state in states:
            yield from _tensors(state)


def difference(a: Tensor, b: Tensor) -> float:
    """Compute the relative L2 distance of `a` from `b`; absolute where b is zero, as the gradient of w_hh after one step is."""
    distance, length = float((a.double() - b.double()).norm()), float(b.double().norm())
    return distance / length if length else distance


def differences(subject: Subject, truth: Subject) -> dict[str, float]:
    """Compute the `difference` of each of the subject's results from the truth's, by name."""
    found, expected = subject.results(), truth.results()
    return {name: difference(found[name], value) for name, value in expected.items()}


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured; prints itself as one line, and a second one where the times are not steady.

    mode:     "infer" or "train".
    times:    for "torch.nn" and "fastrnn", the seconds per call of each repeat, and their p20, median and p80.
    speed_up: torch.nn's time over fastrnn's in the same round: its p20, median and p80 over all rounds.
    error:    the largest relative L2 distance between the two libraries' results.
    """

    mode: str
    times: dict[str, dict[str, Any]]
    speed_up: dict[str, float]
    error: float

    @property
    def steady(self) -> bool:
        """Whether the times of both libraries stayed about the same, so that the speed-up can be trusted."""
        return all(times["p80"] <= UNSTEADY * times["p20"] for times in self.times.values())

    def __str__(self) -> str:
        theirs, ours = (milliseconds(self.times[name]["median"]) for name in ("torch.nn", "fastrnn"))
        low, middle, high = self.speed_up.values()
        what = "inference" if self.mode == "infer" else "training step"
        line = f"{what}: torch.nn {theirs}, fastrnn {ours}: {middle:.2f}x as fast ({low:.2f}x to {high:.2f}x)"
        return line if self.steady else f"{line}\n{NOT_STEADY}"

    __repr__ = __str__


def milliseconds(seconds: float) -> str:
    """Three digits of a time, in ms."""
    return f"{seconds * 1e3:.{max(0, 2 - math.floor(math.log10(seconds * 1e3)))}f} ms"


def compare(
    module: nn.Module,
    input: Tensor | PackedSequence,
    *more: Any,
    train: bool = False,
    seconds: float = 3.0,
    progress: Callable[[int, int], object] | None = None,
) -> Comparison:
    """Time a recurrent layer, or a model that holds some, on torch.nn and on fastrnn.

        layer, x = torch.nn.GRU(64, 128), torch.randn(100, 32, 64)
        print(compare(layer, x))
        print(compare(layer, x, train=True))

    Both libraries work on copies of `module`, with the same weights and the same input. Their results are compared before
    any time is taken. In training that holds for all gradients, too.

    Args:
        module: a layer of torch.nn or of fastrnn, or a model with such layers. It returns a tensor or a packed sequence, alone
            or first.
        input: the first argument of the call, on the device and in the dtype that are to be timed.
        more: further arguments of the call, such as an initial state.
        train: time forward and backward; else only forward, without gradients, in evaluation mode.
        seconds: how long to measure, about.
        progress: called between rounds with the rounds done and the rounds in all.

    Raises:
        ValueError: `module` holds no layer that fastrnn has.
        RuntimeError: the two libraries' results differ by more than rounding explains.
    """
    stock, own = revert(copy.deepcopy(module)), convert(copy.deepcopy(module))
    if not any(type(one) is not type(other) for one, other in zip(stock.modules(), own.modules(), strict=True)):
        raise ValueError(f"module: expected a layer that fastrnn has, or a model with one, got {type(module).__name__}")
    mode = "train" if train else "infer"
    with torch.no_grad():
        y, _ = Subject(stock, input, "infer", torch.empty(0), *more).call()
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    subjects = {"torch.nn": Subject(stock, input, mode, dy, *more), "fastrnn": Subject(own, input, mode, dy, *more)}
    error = _largest_difference(subjects["fastrnn"], subjects["torch.nn"])
    times = interleave({name: subject.run for name, subject in subjects.items()}, seconds, 200, progress=progress)
    rounds = zip(times["torch.nn"]["seconds"], times["fastrnn"]["seconds"], strict=True)
    return Comparison(mode, times, summary([theirs / ours for theirs, ours in rounds]), error)


def _largest_difference(subject: Subject, truth: Subject) -> float:
    """RuntimeError: it is more than rounding explains."""
    found = differences(subject, truth)
    for name, error in found.items():
        single = subject.x.is_cuda and subject.dy.dtype is torch.float32
        most = TF32_TOLERANCE if single else TOLERANCES.get(subject.dy.dtype, TOLERANCES[torch.float32])
        if not error <= most:
            raise RuntimeError(
                f"{name}: fastrnn's differs from torch.nn's by {error:.2g} (relative L2 distance), at most {most:g} was "
                "expected. No time was taken. Please report this."
            )
    return max(found.values())
