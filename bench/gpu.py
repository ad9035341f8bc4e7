"""Recurrent layers on a GPU against torch.nn with cuDNN and peers, timed by CUDA events.

    python -m bench.gpu [--only REGEX] [--seconds 1] [--peers torch,torchrl,loop,flashrnn] [--output FILE]

Forward without a gradient, and a training step's forward and backward, rivals in turns and on inputs that rotate, so that none
finds its own in the cache; peak memory of a training step; for one layer, microseconds a step beside the least that its
schedule can take, a barrier and the bytes that a step moves through L2, both measured here by kernels that do nothing else.

A call's time is that on the device from the first launch to the end, while the host launches. Beside it stand the two parts:
how long the host takes until the call returns, and how long the device takes once everything has been launched.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from bench import gpu_peers, record
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
DEVICE = "cuda"
INPUTS = 4  # that rotate
TOLERANCE = {
    "fp16": 1e-2,
    "bf16": 5e-2,
    "tf32": 1e-2,
    "fp32": 1e-4,
}  # relative L2: only a wrong result passes it
CYCLES = 4e9  # a second, more than any device has: how long it is kept busy
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
        self.module: nn.RNNBase = getattr(library, point.cell)(point.H, point.H, **sizes).to(DEVICE, dtype)
        self.inputs: list[Any] = []
        self.leaves: list[Tensor] = []
        for _ in range(INPUTS):
            if point.fill < 1:
                spread = torch.linspace(point.T, point.T * (2 * point.fill - 1), point.B).round().clamp(1)
                batch_sizes = (spread > torch.arange(point.T)[:, None]).sum(1)
                leaf = torch.randn(int(batch_sizes.sum()), point.H).to(DEVICE, dtype).requires_grad_()
                self.inputs.append(PackedSequence(leaf, batch_sizes))
            else:
                leaf = torch.randn(point.T, point.B, point.H).to(DEVICE, dtype).requires_grad_()
                self.inputs.append(leaf)
            self.leaves.append(leaf)
        self.dy = torch.randn(*self.leaves[0].shape[:-1], point.H * point.directions).to(DEVICE, dtype)
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

    def differences(self, expected: dict[str, Tensor], format: str) -> list[str]:
        """What is not as expected, in words."""
        found = self.results()
        errors = {name: float((found[name] - one).double().norm() / one.double().norm()) for name, one in expected.items()}
        return [f"{name} differs by {error:.2g}" for name, error in errors.items() if not error <= TOLERANCE[format]]

    def peak_bytes(self) -> int:
        self.train()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.train()
        return torch.cuda.max_memory_allocated() - before


class PeerSubject(Subject):
    """A peer with the weights and inputs of torch.nn's module."""

    def __init__(self, point: Point, peer: gpu_peers.Peer) -> None:
        super().__init__(point, nn)
        self.run = peer.stack(self.module)

    def output(self, turn: int) -> Tensor:
        return self.run(self.inputs[turn % INPUTS])


def peer_of(name: str, point: Point, expected: dict[str, Tensor]) -> PeerSubject | str:
    """A peer that computes what is expected, or why it is left out."""
    peer = gpu_peers.PEERS[name]
    if reason := peer.leaves(point.cell, point.format, point.directions, point.fill < 1):
        return reason
    try:
        subject = PeerSubject(point, peer)
        return ", ".join(subject.differences(expected, point.format)) or subject
    except Exception as error:  # whatever a compiler, or a library of others, has to say
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def timed(run: Callable[[], object], busy: float = 0) -> tuple[float, float]:
    """Seconds of one call: on the device, its launches included, and on the host, until it returns.

    busy: for so long the device has something else to do at first, so that launches wait for it and not it for them.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if busy:
        torch.cuda._sleep(int(busy * CYCLES))
    start.record()
    begin = time.perf_counter()
    run()
    host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, host


def seconds_of(run: Callable[[], object]) -> float:
    """Of one call, on the device, its launches included."""
    return timed(run)[0]


def interleave(rivals: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, Any]]:
    """Times of the rivals in random order, for about so long together; and in microseconds their two parts."""
    order = random.Random(0)
    for run in rivals.values():
        for _ in range(3):
            run()
    once = sum(seconds_of(run) for run in rivals.values())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for _ in range(max(7, min(200, int(seconds / once)))):
        for name in order.sample(list(rivals), len(rivals)):
            times[name].append(timed(rivals[name]))
    host = {name: statistics.median(host for _, host in values) for name, values in times.items()}
    device = {name: statistics.median(timed(run, host[name])[0] for _ in range(7)) for name, run in rivals.items()}
    return {
        "times": {name: summary([whole for whole, _ in values]) for name, values in times.items()},
        "host_us": {name: 1e6 * value for name, value in host.items()},
        "device_us": {name: 1e6 * value for name, value in device.items()},
    }


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


def set_precision(precision: str) -> None:
    """Have torch's float32 products on a GPU be so precise."""
    rnn: Any = torch.backends.cudnn.rnn  # its setting is no annotated attribute
    rnn.fp32_precision = precision
    # an older name of fp32_precision, which sets both: torch refuses to tell peers the one where only the other was set
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def measure(point: Point, seconds: float, peers: Sequence[str] = ()) -> dict[str, Any]:
    """The record of one point."""
    set_precision(FORMATS[point.format][1])
    ours, theirs = Subject(point, fastrnn), Subject(point, nn)
    expected = theirs.results()
    result: dict[str, Any] = {"name": point.name, "point": asdict(point)}
    explanation = fastrnn.explain(ours.module, ours.inputs[0])
    result |= {"engine": explanation.engine, "schedule": list(explanation.schedule)}
    result["faults"] = ours.differences(expected, point.format)
    if result["faults"]:
        return result
    others = {name: peer_of(name, point, expected) for name in peers}
    result["left_out"] = {name: reason for name, reason in others.items() if isinstance(reason, str)}
    rivals = {"fastrnn": ours, "torch": theirs}
    rivals |= {name: subject for name, subject in others.items() if isinstance(subject, Subject)}
    for mode in ("forward", "train"):
        parts = interleave({name: getattr(subject, mode) for name, subject in rivals.items()}, seconds)
        times, steps = parts["times"], point.T * point.layers
        result[mode] = parts | {
            "ratio": times["torch"]["median"] / times["fastrnn"]["median"],
            "us_a_step": {name: 1e6 * taken["median"] / steps for name, taken in times.items()},
        }
    result["peak_bytes"] = {name: subject.peak_bytes() for name, subject in rivals.items()}
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="points such as 'flashrnn LSTM fp16 H768 B16 T1024'")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per point and mode (default %(default)s)")
    parser.add_argument("--output", type=Path, help=f"(default {DEFAULT_OUTPUT} for all points, else none)")
    peers = ",".join(("torch", *gpu_peers.PEERS))
    parser.add_argument("--peers", default="torch", help=f"of {peers}, where they are installed (default %(default)s)")
    options = parser.parse_args(argv)
    try:
        options.peers = gpu_peers.named(options.peers)
    except ValueError as error:
        parser.error(f"argument --peers: {error}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if not torch.cuda.is_available():
        print("bench.gpu: no GPU here", file=sys.stderr)
        return 1
    record.one_tree()
    peers, missing = gpu_peers.present(options.peers)
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    dispatch.forced = "triton"  # also where it would leave the call to cuDNN
    content, results = header(), []
    print(content["device"]["name"], "barrier", content["barrier_us"], "L2 GB/s", content["l2_gb_s"])
    output = options.output or (DEFAULT_OUTPUT if not options.only else None)
    for point in points():
        if not re.search(options.only, point.name):
            continue
        results.append(measure(point, options.seconds, peers))
        print(line(results[-1]), flush=True)
        if output:  # after each point: a machine may be taken away
            record.write(output, content | {"points": results})
    return any(result["faults"] for result in results)


def line(result: dict[str, Any]) -> str:
    """One point for the terminal."""
    if result["faults"]:
        return f"{result['name']}: wrong: {', '.join(result['faults'])}"
    words = []
    for mode in ("forward", "train"):
        found = result[mode]
        steps = ", ".join(f"{name} {each:.2f}" for name, each in found["us_a_step"].items())
        parts = f"{found['host_us']['fastrnn']:.0f} us of the host, {found['device_us']['fastrnn']:.0f} of the device"
        words.append(f"{mode} {found['ratio']:.2f}x (us a step: {steps}; a call of fastrnn: {parts})")
    words += [f"{name} left out: {reason}" for name, reason in result["left_out"].items()]
    memory = result["peak_bytes"]["fastrnn"] / max(result["peak_bytes"]["torch"], 1)
    return f"{result['name']}: {', '.join(words)}, memory {memory:.2f}"


if __name__ == "__main__":
    sys.exit(main())
