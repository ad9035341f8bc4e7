"""Recurrent layers on a GPU against torch.nn with cuDNN, timed by CUDA events.

    python -m bench.gpu [--only REGEX] [--seconds 1] [--output FILE]

Forward without a gradient, and a training step's forward and backward, rivals in turns and on inputs that rotate, so that none
finds its own in the cache; peak memory of a training step; for one layer, microseconds a step beside the least that its
schedule can take, a barrier and the bytes that a step moves through L2, both measured here by kernels that do nothing else.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from bench import record
from bench.timing import summary
from fastrnn import dispatch
from fastrnn.kernels.gpu.barrier import arrive, wait
from fastrnn.kernels.gpu.launch import alarm

FORMATS = {
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
MAIN = "fp16", "bf16", "tf32"
INPUTS = 4  # that rotate
TOLERANCE = {
    "fp16": 1e-2,
    "bf16": 5e-2,
    "tf32": 1e-2,
    "fp32": 1e-4,
}  # relative L2: only a wrong result passes it
DEFAULT_OUTPUT = record.RESULTS / "gpu.json"


@dataclass(frozen=True)
class Point:
    """A module and its call; fill < 1: packed, lengths evenly spread so that they fill so much."""

    group: str
    cell: str
    H: int
    B: int
    T: int
    format: str
    layers: int = 1
    directions: int = 1
    fill: float = 1.0

    @property
    def name(self) -> str:
        more = f" L{self.layers}" * (self.layers > 1) + " two-way" * (self.directions > 1) + " packed" * (self.fill < 1)
        return f"{self.group} {self.cell} {self.format} H{self.H} B{self.B} T{self.T}{more}"


def points() -> Iterator[Point]:
    """The shapes people measure: FlashRNN, DeepBench, torch's fastrnns, bonito; and what cuDNN treats differently."""
    for cell in ("LSTM", "GRU", "RNN"):
        for format in MAIN:
            yield Point("flashrnn", cell, 768, 16, 1024, format)
            yield Point("fastrnns", cell, 512, 64, 100, format)
            yield Point("small", cell, 128, 32, 512, format)
            yield Point("small", cell, 64, 256, 512, format)
            yield Point("small", cell, 192, 16, 512, format)
            yield Point("two-way", cell, 512, 32, 256, format, directions=2)
            yield Point("layers", cell, 512, 32, 256, format, layers=4)
            yield Point("packed", cell, 512, 64, 256, format, fill=0.57)
            yield Point("odd", cell, 500, 20, 256, format)
    for format in MAIN:
        for H, B in ((512, 16), (512, 32), (1024, 32), (1024, 64), (1536, 32), (2048, 64), (4096, 16)):
            yield Point("deepbench", "LSTM", H, B, 25, format)
        yield Point("deepbench", "LSTM", 256, 16, 150, format)
        yield Point("deepbench", "GRU", 512, 32, 1500, format)
        yield Point("deepbench", "GRU", 1024, 32, 1500, format)
        yield Point("deepbench", "GRU", 2816, 32, 187, format)
        yield Point("deepbench", "RNN", 1760, 32, 50, format)
        yield Point("deepbench", "RNN", 2560, 32, 50, format)
    for H in (256, 512, 768, 1024):
        yield Point("persistent", "LSTM", H, 16, 512, "fp16")
        yield Point("persistent", "LSTM", H, 64, 512, "fp16")
    for cell, H in (("LSTM", 256), ("LSTM", 512), ("GRU", 256), ("GRU", 512)):
        yield Point("ieee", cell, H, 32, 256, "fp32")
    yield Point("bonito", "LSTM", 384, 64, 1600, "fp16", layers=5)


class Subject:
    """A module of a library, the same weights and inputs for each, on the GPU."""

    def __init__(self, point: Point, library: Any) -> None:
        dtype = FORMATS[point.format][0]
        torch.manual_seed(0)
        sizes = {"num_layers": point.layers, "bidirectional": point.directions == 2}
        self.module: nn.RNNBase = getattr(library, point.cell)(point.H, point.H, **sizes).to("cuda", dtype)
        self.inputs: list[Any] = []
        self.leaves: list[Tensor] = []
        for _ in range(INPUTS):
            if point.fill < 1:
                spread = torch.linspace(point.T, point.T * (2 * point.fill - 1), point.B).round().clamp(1)
                batch_sizes = (spread > torch.arange(point.T)[:, None]).sum(1)
                leaf = torch.randn(int(batch_sizes.sum()), point.H).to("cuda", dtype).requires_grad_()
                self.inputs.append(PackedSequence(leaf, batch_sizes))
            else:
                leaf = torch.randn(point.T, point.B, point.H).to("cuda", dtype).requires_grad_()
                self.inputs.append(leaf)
            self.leaves.append(leaf)
        self.dy = torch.randn(*self.leaves[0].shape[:-1], point.H * point.directions).to("cuda", dtype)
        self.turn = 0

    def output(self, turn: int) -> Tensor:
        y = self.module(self.inputs[turn % INPUTS])[0]
        return y.data if isinstance(y, PackedSequence) else y

    def forward(self) -> None:
        self.turn += 1
        with torch.no_grad():
            self.output(self.turn)

    def train(self) -> None:
        self.turn += 1
        self.leaves[self.turn % INPUTS].grad = None
        self.module.zero_grad(set_to_none=True)
        self.output(self.turn).backward(self.dy)

    def results(self) -> dict[str, Tensor]:
        y = self.output(0)
        leaves = {"x": self.leaves[0], **dict(self.module.named_parameters())}
        return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), self.dy)))}

    def peak_bytes(self) -> int:
        self.train()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.train()
        return torch.cuda.max_memory_allocated() - before


def seconds_of(run: Callable[[], object]) -> float:
    """Of one call, on the device, its launches included."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleave(rivals: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, float]]:
    """Times of the rivals in random order, for about so long together."""
    order = random.Random(0)
    for run in rivals.values():
        for _ in range(3):
            run()
    once = sum(seconds_of(run) for run in rivals.values())
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(max(7, min(200, int(seconds / once)))):
        for name in order.sample(list(rivals), len(rivals)):
            times[name].append(seconds_of(rivals[name]))
    return {name: summary(values) for name, values in times.items()}


@triton.jit
def meet(counter, gave_up, rounds):
    for i in range(rounds):
        arrive(counter)
        wait(counter, (i + 1) * tl.num_programs(0).to(tl.int64), gave_up)


@triton.jit
def read(source, sink, rounds):
    at = tl.arange(0, 16384)
    total = tl.zeros((16384,), tl.float32)
    for _ in range(rounds):
        total += tl.load(source + at, volatile=True)
    tl.store(sink + tl.program_id(0), tl.sum(total, 0))


def barrier_microseconds(programs: int, rounds: int = 2000) -> float:
    """A meeting of so many programs that do nothing else."""
    gave_up = alarm(torch.device("cuda")).word

    def run() -> None:
        counter = torch.zeros(16, dtype=torch.int64, device="cuda")
        meet[(programs,)](counter, gave_up, rounds, num_warps=8, launch_cooperative_grid=True)

    run()
    return statistics.median(seconds_of(run) for _ in range(7)) / rounds * 1e6


def l2_gigabytes(programs: int, rounds: int = 2000) -> float:
    """A second, when so many programs read the same 64 KiB again and again, past L1."""
    source, sink = torch.ones(16384, device="cuda"), torch.zeros(programs, device="cuda")

    def run() -> None:
        read[(programs,)](source, sink, rounds, num_warps=8)

    run()
    return programs * rounds * 65536 / statistics.median(seconds_of(run) for _ in range(7)) / 1e9


def measure(point: Point, seconds: float) -> dict[str, Any]:
    """The record of one point."""
    rnn: Any = torch.backends.cudnn.rnn  # its setting is no annotated attribute
    rnn.fp32_precision = FORMATS[point.format][1]
    torch.backends.cuda.matmul.fp32_precision = FORMATS[point.format][1]
    ours, theirs = Subject(point, fastrnn), Subject(point, nn)
    found, expected = ours.results(), theirs.results()
    result: dict[str, Any] = {"name": point.name, "point": asdict(point)}
    explanation = fastrnn.explain(ours.module, ours.inputs[0])
    result |= {"engine": explanation.engine, "schedule": list(explanation.schedule)}
    result["faults"] = [
        f"{name} differs by {difference:.2g}"
        for name, value in expected.items()
        if not (difference := float((found[name] - value).double().norm() / value.double().norm())) <= TOLERANCE[point.format]
    ]
    if result["faults"]:
        return result
    for mode in ("forward", "train"):
        times = interleave({"fastrnn": getattr(ours, mode), "torch": getattr(theirs, mode)}, seconds)
        steps = point.T * point.layers
        result[mode] = {
            "times": times,
            "ratio": times["torch"]["median"] / times["fastrnn"]["median"],
            "us_a_step": {name: 1e6 * taken["median"] / steps for name, taken in times.items()},
        }
    result["peak_bytes"] = {"fastrnn": ours.peak_bytes(), "torch": theirs.peak_bytes()}
    return result


def header() -> dict[str, Any]:
    """Device, versions and the limits that a step is held against."""
    properties = torch.cuda.get_device_properties(0)
    counts = [
        count for count in (16, 48, 64, 96, properties.multi_processor_count) if count <= properties.multi_processor_count
    ]
    return record.header() | {
        "device": {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        },
        "barrier_us": {count: barrier_microseconds(count) for count in counts},
        "l2_gb_s": {count: l2_gigabytes(count) for count in counts},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="points such as 'flashrnn LSTM fp16 H768 B16 T1024'")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per point and mode (default %(default)s)")
    parser.add_argument("--output", type=Path, help=f"(default {DEFAULT_OUTPUT} for all points, else none)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu: no GPU here", file=sys.stderr)
        return 1
    record.one_tree()
    dispatch.forced = "triton"  # also where it would leave the call to cuDNN
    content, results = header(), []
    print(content["device"]["name"], "barrier", content["barrier_us"], "L2 GB/s", content["l2_gb_s"])
    output = options.output or (DEFAULT_OUTPUT if not options.only else None)
    for point in points():
        if not re.search(options.only, point.name):
            continue
        results.append(measure(point, options.seconds))
        print(line(results[-1]), flush=True)
        if output:  # after each point: a machine may be taken away
            record.write(output, content | {"points": results})
    return any(result["faults"] for result in results)


def line(result: dict[str, Any]) -> str:
    """One point for the terminal."""
    if result["faults"]:
        return f"{result['name']}: wrong: {', '.join(result['faults'])}"
    words = [
        f"{mode} {result[mode]['ratio']:.2f}x ({result[mode]['us_a_step']['fastrnn']:.2f} us a step,"
        f" torch {result[mode]['us_a_step']['torch']:.2f})"
        for mode in ("forward", "train")
    ]
    memory = result["peak_bytes"]["fastrnn"] / max(result["peak_bytes"]["torch"], 1)
    return f"{result['name']}: {', '.join(words)}, memory {memory:.2f}"


if __name__ == "__main__":
    sys.exit(main())
