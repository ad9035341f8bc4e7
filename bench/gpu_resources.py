"""What the Triton kernels take of a GPU, compiled with none at hand: registers, spills and shared memory of every plan.

    python -m bench.gpu_resources [--target sm_90] [--cell slstm] [--quick]

A plan is compiled at the largest layer that chooses it, dense and with one direction, and again with all that costs registers:
packed, two directions, a projection where the cell has one, and four heads where it is not torch.nn's; or two and four layers
at once.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastrnn import cells as shipped
from fastrnn import features
from fastrnn.kernels.cells import CELLS, Cell
from fastrnn.kernels.gpu import meetings_of, values_of
from fastrnn.kernels.gpu import plan as plans
from fastrnn.kernels.gpu.plan import Device, Plan, Sizes
from fastrnn.kernels.layer import Inputs, Layer, Needs, Outer

KIB = 1024
TARGETS = {  # of what people rent: A100, H100, B200, MI300X
    "sm_80": (("cuda", 80, 32), Device("cuda", 80, 108, 163 * KIB)),
    "sm_90": (("cuda", 90, 32), Device("cuda", 90, 132, 227 * KIB)),
    "sm_100": (("cuda", 100, 32), Device("cuda", 100, 148, 227 * KIB)),
    "gfx942": (("hip", "gfx942", 64), Device("hip", 0, 304, 64 * KIB)),
}
SPILLED = 384  # bytes a thread that a plan may spill; backward's 64 x 64 tiles do, and smaller ones took longer
SPILLED_RESIDENT = 896  # where weights stay: of an H200's fastest plans one spills 504, and none was faster without
REGISTERS = {"cuda": 64 * KIB, "hip": 128 * KIB}  # 32-bit ones of a multiprocessor
NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
FORMATS = ((torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "tf32x3"), (torch.float32, "ieee"))
BUILT_IN = ("lstm", "gru", "rnn_tanh")
OWN = ("slstm", "peephole_lstm", "cifg", "mgu", "indrnn", "leaky_rnn", "cfc")  # that come with fastrnn
UNITS = (16, 32, 64, 100, 128, 200, 256, 384, 512, 768, 1024, 1760, 2048, 2560, 4096)
ROWS = (1, 16, 32, 64, 128, 4096)


@dataclass(frozen=True)
class Case:
    """A pass of a layer with its plan, to be compiled for a target.

    cell: the name of a built-in cell, else of one that comes with fastrnn. H, R: of all heads.
    """

    target: str
    cell: str
    forward: bool
    dtype: torch.dtype
    precision: str
    B: int
    H: int
    R: int
    D: int
    packed: bool
    plan: Plan
    heads: int = 1
    layers: int = 1  # at once
    marked: bool = False  # with resets and, where it is not packed, lengths
    noisy: bool = False  # with a mask, and zoneout of all states that may have it
    normed: bool = False  # with layer norm

    @property
    def kind(self) -> Cell:
        plain = CELLS[self.cell] if self.cell in CELLS else getattr(shipped, self.cell).definition
        zoned = tuple(self.noisy and (name != "h" or self.R == self.H) for name in features.state_names(plain))
        return CELLS[features.derived(plain.name, self.normed, None, zoned)]

    def __str__(self) -> str:
        plan = self.plan
        tiles = f"{plan.schedule} {plan.units}x{plan.rows}"
        if plan.schedule != "single":
            tiles += f" chunk {plan.chunk} split {plan.split} {'resident' if plan.resident else f'{plan.stages} stages'}"
        number = NAMES[self.dtype] if self.precision == "ieee" else self.precision
        flags = [f"R{self.R}"] * (self.R != self.H) + ["two-way"] * (self.D == 2)
        if self.layers > 1:
            flags.append(f"{self.layers} layers, span {plan.span}, {plan.feed[1]} columns")
        flags += [name for name in ("packed", "marked", "noisy", "normed") if getattr(self, name)]
        flags += [f"{self.heads} heads"] * (self.heads > 1)
        which = "forward" if self.forward else "backward"
        return " ".join([self.target, which, self.cell, number, f"H{self.H}", tiles, f"{plan.warps} warps", *flags])


@dataclass(frozen=True)
class Usage:
    """Of one kernel: registers a thread, bytes a thread spills, bytes of shared memory a program."""

    case: Case
    registers: int
    spilled: int
    shared: int

    def faults(self) -> list[str]:
        """What exceeds the device's limits, or the bound that plans are chosen by."""
        (backend, _, lanes), device = TARGETS[self.case.target]
        sizes = sizes_of(self.case)
        bound = plans.shared_bytes(device, sizes, self.case.forward, self.case.plan)
        faults = []
        if self.spilled > (SPILLED_RESIDENT if self.case.plan.resident else SPILLED):
            faults.append(f"spills {self.spilled} bytes a thread")
        if self.registers * self.case.plan.warps * lanes > REGISTERS[backend]:
            faults.append(f"{self.registers} registers in {self.case.plan.warps} warps")
        if self.shared > min(bound, device.shared_bytes):
            faults.append(f"{self.shared} bytes shared, bound {bound}, device {device.shared_bytes}")
        return faults


def sizes_of(case: Case) -> Sizes:
    H, R, D = case.H // case.heads, case.R // case.heads, case.D * case.heads
    kind = case.kind
    sizes = Sizes(64, case.B, H, R, D, kind.gates, case.dtype.itemsize, case.precision, values_of(kind), layers=case.layers)
    return replace(sizes, meetings=meetings_of(kind), heads=case.heads) if kind.reduces else sizes


def cases(target: str, cells=BUILT_IN, formats=FORMATS, units=UNITS, rows=ROWS) -> Iterator[Case]:
    """Every plan that is chosen for a layer of these, and by name for each schedule, at the largest layer that it serves."""
    device = TARGETS[target][1]
    found: dict[tuple, Case] = {}
    for cell, (dtype, precision), forward, H, B in itertools.product(cells, formats, (True, False), units, rows):
        if dtype is torch.float32 and (device.backend == "hip") != (precision == "ieee"):
            continue
        plain = Case(target, cell, forward, dtype, precision, B, H, H, 1, False, Plan("", 0, 0, 0, 0, 0, 0))
        flags = replace(plain, D=2, packed=True, R=max(16, H // 2) if cell == "lstm" else H)
        if not plain.kind.mode:  # heads in the place of a projection
            flags = replace(flags, H=4 * H, R=4 * H, heads=4)
        wide = [replace(plain, R=H * 7 // 8)] * (cell == "lstm" and H >= 64)  # a projection to hardly less
        stacks = [replace(plain, layers=layers) for layers in (2, 4)]
        for case in (plain, flags, *wide, *stacks):
            for schedule in (None, "single", "persistent", "stepwise"):
                try:
                    plan = plans.choose(device, sizes_of(case), forward, schedule)
                except ValueError:
                    continue
                tiles = replace(plan, blocks=0, groups=0, microseconds=0, outputs=0)
                key = cell, dtype, precision, forward, case.D, case.R == case.H, case.layers > 1, tiles
                found[key] = replace(case, plan=plan)
    yield from found.values()


def launches(case: Case) -> list:
    """What a call of the case starts, on tensors without memory."""
    from fastrnn.kernels.gpu import layer

    cell, T, D = case.kind, 64, case.D
    own = Layer(cell.name, D, bias=True, projected=case.R != case.H, heads=case.heads)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=case.dtype, device="meta")

    batch_sizes = torch.full((T,), case.B) if case.packed else None
    leading = (T * case.B,) if case.packed else (T, case.B)
    sides = D * case.layers
    h0, c0 = empty(sides, case.B, case.R), empty(sides, case.B, cell.states * case.H) if cell.states else None
    rows = cell.gates * case.H
    weights = [empty(rows, 128), empty(rows, case.R // case.heads), empty(rows + cell.weights * case.H), empty(rows)]
    weights += [empty(case.R, case.H)] * own.projected
    started: list = []
    resets = torch.empty(leading, dtype=torch.bool, device="meta") if case.marked else None
    lengths = torch.empty(case.B, dtype=torch.int64, device="meta") if case.marked and not case.packed else None
    mask = empty(D, case.B, case.R) if case.noisy else None
    noise = empty(*leading, D * cell.noise * case.H) if cell.noise else None
    inputs = Inputs(empty(*leading, 128), batch_sizes, h0, c0, resets, lengths, mask, noise)
    above = [empty(rows, case.R), *weights[1:]] * (case.layers - 1)
    call = layer.Call(own, inputs, weights * D + above, run=lambda each: started.extend(each.by_triton()))
    call.ptx = TARGETS[case.target][1].backend == "cuda"
    below = call.below()
    if case.forward:
        layer.forward(call, True, case.plan, case.precision, below)
    else:
        y, saved = empty(*leading, D * case.R), empty(sides, T * case.B, call.slots)
        layer.backward(call, Outer(y, h0, c0), y, saved, Needs(), case.plan, case.precision, below)
    return started


def compile_launch(launch, target: str):
    """The compiled kernel of a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(index,)] = "*" + NAMES[value.dtype], [["tt.divisibility", 16]]
        elif parameter.annotation_type:
            signature[parameter.name], attributes[(index,)] = parameter.annotation_type, [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target][0]), options=dict(launch.options))


def measure(case: Case) -> Usage:
    """The most that a kernel takes of those that a call of the case starts."""
    usages = [_usage(case, compile_launch(launch, case.target)) for launch in _distinct(launches(case))]
    most = (max(getattr(usage, name) for usage in usages) for name in ("registers", "spilled", "shared"))
    return Usage(case, *most)


def _distinct(started: list) -> list:
    """Launches that differ in what is compiled: the scan's, of each phase; `states_before` is a copy and needs no look."""
    phases = {launch.arguments.get("PHASE"): launch for launch in started if "CELL" in launch.arguments}
    return list(phases.values())


def _usage(case: Case, kernel) -> Usage:
    if "amdgcn" in kernel.asm:

        def field(name: str) -> int:
            return int(re.findall(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"])[0])

        return Usage(case, field("vgpr_count"), field("private_segment_fixed_size"), kernel.metadata.shared)
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {dump}")
    return Usage(case, int(found[1]), int(found[2]), kernel.metadata.shared)


def pool() -> ProcessPoolExecutor:
    """Processes to compile in: fresh ones, which see the environment as it is now."""
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_resources", description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="(default all)")
    parser.add_argument("--cell", choices=BUILT_IN + OWN, action="append", help="(default lstm, gru and rnn_tanh)")
    parser.add_argument("--quick", action="store_true", help="one layer of each size class instead of every plan")
    options = parser.parse_args(argv)
    limits = {"units": (64, 768), "rows": (16, 64)} if options.quick else {}
    chosen = [case for target in options.target or TARGETS for case in cases(target, options.cell or BUILT_IN, **limits)]
    print(f"{'registers':>9} {'spilled':>7} {'shared':>7}  plan")
    bad = 0
    with pool() as workers:
        for usage in workers.map(measure, chosen):
            faults = usage.faults()
            bad += bool(faults)
            print(
                f"{usage.registers:9} {usage.spilled:7} {usage.shared:7}  {usage.case}",
                *(f"<- {f}" for f in faults),
                flush=True,
            )
    print(f"{len(chosen)} plans, {bad} over a limit")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
