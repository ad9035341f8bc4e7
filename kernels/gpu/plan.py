"""How a layer's scan is laid out on a GPU: schedule and tiles, by an estimate of a step's time. Sizes in, a Plan out; no torch.

Schedules:
    single      a program has all units and the state of its rows; nothing is shared, all steps are one launch
    persistent  a program has some units of its rows for all steps, and meets the others of the same rows once a step
    wavefront   the same for layers of one direction at once, each a span of steps behind its neighbour, see wavefront.py
    stepwise    the same tiles, a launch a step

Equations and their constants are explained in docs/gpu.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import cache, cached_property, lru_cache

COOPERATIVE = "persistent", "wavefront"  # schedules whose programs wait for each other
GIGAHERTZ = 1.9
PORT_BYTES = 32  # from L2 into a multiprocessor, a clock
SHARED_BYTES = 128  # from shared memory, a clock
INSTRUCTION = 1.0  # clocks of a product for a byte of its depth, at least: 32 for one instruction of the tensor cores
BARRIER, LAUNCH, GATES, CELL = 0.9, 30.0, 0.85, 0.0015  # microseconds; a launch is from Python, CELL a gate of a unit's
SPARE_BYTES = 24 * 1024  # of shared memory, for state and for tiles that change their layout
LAYOUT_BYTES = 20 * 1024  # the latter alone
MANY_VALUES = 8  # more of them, of as many rows, do not fit registers
SPANS = 4, 8, 16  # steps that a wavefront's layers are behind each other
GAIN = 1.25  # of layers at once, by the estimate, before they run so: no device has measured that


@dataclass(frozen=True)
class Device:
    """What a plan depends on.

    backend:         "cuda" or "hip".
    capability:      of CUDA, 10 * major + minor; 0 of others.
    multiprocessors: programs that surely run at once, one on each.
    shared_bytes:    shared memory that a program may have.
    off:             parts of the engine that it does without, see selftest.py.
    """

    backend: str
    capability: int
    multiprocessors: int
    shared_bytes: int
    off: tuple[str, ...] = ()

    @property
    def l2_bytes(self) -> float:
        """Bytes a clock that L2 gives all multiprocessors together: measured, H200 7.7 TB/s; by others, A100 4, B200 9."""
        return {8: 2400, 9: 4000, 10: 5300}.get(self.capability // 10, 2400)

    def operations(self, bytes_: int, precision: str, wide: bool) -> float:
        """Floating-point operations a clock of a multiprocessor's products; wide: by the instructions of whole warp groups."""
        if self.backend == "cuda" and bytes_ == 4 and precision == "ieee":
            return 256
        fast = 4096 if wide and self.capability >= 90 else 2048
        return fast / (2 if bytes_ == 4 else 1) / (3 if precision == "tf32x3" else 1)


@dataclass(frozen=True)
class Sizes:
    """A layer's: steps, rows, units, outputs (projected, or the units), directions, gates, bytes of a number, precision.

    Of a layer of several heads, units and outputs are those of a head, and a direction counts for each of its heads.

    precision: of products, see precision.py.
    values: what backward holds of a unit between two products: what it has loaded of a step, and what it carries.
    meetings: in a step, forward and backward, how often the programs of a row exchange what the cell reduces over its units.
    heads: so many of a layer's heads are reduced together; with meetings alone.
    layers: so many that run at once, of which all but the lowest have R inputs.
    """

    T: int
    B: int
    H: int
    R: int
    D: int
    gates: int
    bytes_: int
    precision: str
    values: int = 7
    meetings: tuple[int, int] = (0, 0)
    heads: int = 1
    layers: int = 1

    @property
    def projected(self) -> bool:
        return self.R != self.H

    @property
    def held_bytes(self) -> int:
        """Of a number in shared memory, where "tf32x3" holds it in two parts."""
        return self.bytes_ * (2 if self.precision == "tf32x3" else 1)


@dataclass(frozen=True)
class Plan:
    """A schedule with its tiles.

    units, outputs: of a program, powers of two; outputs those of the projection, or the units.
    rows:           of a program.
    blocks:         programs that share the units out.
    groups:         blocks of rows that a persistent launch has at once.
    registers:      that a thread may have, 0 for as many as the compiler likes.
    chunk, split, resident, stages, diagonal: how a product is taken, see tile.py; of a resident one, chunks of the state that
                    are on their way at once are its stages.
    span, feed:     of a wavefront, see wavefront.py.
    microseconds:   estimate of a step, of all layers that run at once.
    """

    schedule: str
    units: int
    outputs: int
    rows: int
    blocks: int
    groups: int
    warps: int
    registers: int = 0
    chunk: int = 0
    split: int = 1
    resident: bool = False
    stages: int = 1
    diagonal: bool = False
    span: int = 0
    feed: tuple[int, ...] = ()
    microseconds: float = 0.0

    @cached_property
    def tiles(self) -> tuple:
        """All that kernels are compiled for."""
        return *astuple(self)[:5], *astuple(self)[6:-1]

    def __str__(self) -> str:
        weights = ", weights stay in the program" if self.resident or self.schedule == "single" else ""
        tile = f"{self.units} units x {self.rows} rows a program"
        return f"{self.schedule}, {tile}{weights}, about {self.microseconds:.1f} us a step"


@lru_cache(4096)
def choose(device: Device, sizes: Sizes, forward: bool, schedule: str | None = None) -> Plan:
    """The plan of least estimated time; of one schedule, if named.

    ValueError: the device has no such schedule for these sizes.
    """
    allowed = (plan for plan in plans(device, sizes, forward) if plan.schedule not in device.off)
    candidates = [
        replace(plan, microseconds=estimate(device, sizes, forward, plan))
        for plan in allowed
        if schedule in (None, plan.schedule) and shared_bytes(device, sizes, forward, plan) <= device.shared_bytes
    ]
    if not candidates:
        raise ValueError(f"schedule: expected one that {device} has for {sizes}, got {schedule}")
    return min(candidates, key=lambda plan: plan.microseconds)


def plans(device: Device, sizes: Sizes, forward: bool) -> Iterator[Plan]:
    """Every plan whose tiles fit the registers of each device that bench/gpu_resources.py compiles for."""
    if sizes.layers > 1:
        yield from _wavefront(device, sizes, forward)
        return
    for plan in _single(device, sizes):
        yield replace(plan, registers=_registers(device, plan))
    for tiles in (*_resident(device, sizes, forward, _units(sizes)), *_streamed(device, sizes, forward)):
        plan = replace(tiles, registers=_registers(device, tiles))
        if not (plan.resident or any(sizes.meetings)):  # in a launch a step nobody meets
            yield replace(plan, schedule="stepwise")
        groups = min(_ceil(sizes.B, plan.rows), device.multiprocessors // (plan.blocks * sizes.D))
        if device.backend == "cuda" and groups:
            yield replace(plan, groups=groups)


def _wavefront(device: Device, sizes: Sizes, forward: bool) -> Iterator[Plan]:
    """Weights of the scan stay, those of the input come from L2 once a span.

    Twice as many units need half as many programs, which is what lets more layers, or fewer rows a program, be there at once.
    """
    if sizes.projected or sizes.D > 1 or sizes.precision == "tf32x3":
        return
    units, number = _units(sizes), sizes.bytes_
    for tiles in (*_resident(device, sizes, forward, units), *_resident(device, sizes, forward, 2 * units)):
        groups = min(_ceil(sizes.B, tiles.rows), device.multiprocessors // (tiles.blocks * sizes.layers))
        for span, columns in itertools.product(SPANS, (64, 128)):
            if groups and columns <= span * tiles.rows and span <= sizes.T:
                plan = replace(tiles, schedule="wavefront", groups=groups, span=span, feed=(64, columns, 128 // number, 3))
                yield replace(plan, registers=_registers(device, plan))


def _registers(device: Device, plan: Plan) -> int:
    """Left to itself, CUDA's compiler may stop at half of a thread's 255 and spill; sm_100's spills where it may have all."""
    if device.backend != "cuda" or plan.warps > 8:
        return 0
    return 0 if device.capability >= 100 and plan.resident else 255


def _single(device: Device, sizes: Sizes) -> Iterator[Plan]:
    """Four cells a thread, so that a product spreads over all warps and changes its layout once.

    Two where a cell reduces over units: it keeps every pre-activation, and has a gain and a bias for each.
    """
    if sizes.heads > 1:
        return  # no program has all units of a row
    units, outputs = _power(sizes.H), _power(sizes.R)
    most = 256
    if sizes.bytes_ == 4 and (device.backend == "hip" or sizes.precision != "tf32"):
        most = 32  # weights that no tensor core reads from shared memory are in registers, as parts of numbers are
    elif device.backend == "hip":
        most = 128
    if any(sizes.meetings):
        most = min(most, 32 if sizes.gates > 1 else 128)
    if sizes.projected:
        most = min(most, 64)
    room = {1: 8192, 2: 4096, 4: 4096}.get(stacked(sizes.gates), 16384 // stacked(sizes.gates))
    if units <= most and units * 16 * sizes.bytes_ <= room:
        wide = units // 4 if any(sizes.meetings) else units // 8
        warps = max(4, min(wide, 16 if sizes.bytes_ == 2 else 8))
        yield Plan("single", units, outputs, 16, blocks=1, groups=1, warps=warps)


def _resident(device: Device, sizes: Sizes, forward: bool, units: int) -> Iterator[Plan]:
    """Weights stay in shared memory, and a step's state is on its way there, or as much of it as there is room for."""
    if device.backend == "hip" or (sizes.bytes_ == 4 and sizes.precision == "ieee"):
        return  # products without tensor cores hold a copy of the weights in registers
    diagonal = not forward and sizes.gates > 1
    if sizes.precision == "tf32x3" and (device.capability >= 100 or (diagonal and device.capability < 90)):
        return  # a kilobyte of spill a thread and more
    for rows in (16,) if any(sizes.meetings) else (16, 32):  # of whose many values more rows do not fit registers
        chunk = (256 if diagonal else 512) // sizes.bytes_
        plan = replace(_tiled(sizes, units, rows, chunk, split=1, stages=0), warps=4, resident=True, diagonal=diagonal)
        chunk_bytes = _chunk_bytes(sizes, forward, plan)
        room = device.shared_bytes - (shared_bytes(device, sizes, forward, plan) - LAYOUT_BYTES)  # which is free by then
        most = 1 if device.capability >= 100 and sizes.bytes_ == 4 else 3 if diagonal else 4  # or too many registers
        stages = min(_ceil(_product(sizes, forward, plan)[1], chunk), room // chunk_bytes, most)
        if stages > 0:
            yield replace(plan, stages=stages)


def _streamed(device: Device, sizes: Sizes, forward: bool) -> Iterator[Plan]:
    """Weights come from L2 in every step."""
    plain = sizes.bytes_ == 4 and sizes.precision == "ieee"
    if plain or device.backend == "hip":
        units = min(16, _units(sizes)) if forward else 16
        yield _tiled(sizes, units, 16, 128 if plain else 512 // sizes.bytes_, split=8, stages=1 if plain else 2)
        yield _tiled(sizes, units, 32, 32, split=1, stages=2 if device.backend == "cuda" else 1)
        return
    if any(sizes.meetings) and not forward and sizes.bytes_ == 4 and device.capability >= 100:
        return  # spills more than 384 bytes a thread
    units = _units(sizes) if forward else 64
    registers = sizes.values <= MANY_VALUES and sizes.precision != "tf32x3"  # enough for many rows
    rows = 16 if any(sizes.meetings) else 64 if forward or registers else 32
    plan = _tiled(sizes, units, rows, 128 // sizes.bytes_, split=1, stages=3)
    plan = replace(plan, warps=4 if forward else 8)
    yield plan
    if sizes.precision == "tf32x3":  # where there is little shared memory
        yield replace(plan, stages=1)
    if forward and sizes.B > 64 and not any(sizes.meetings):
        yield replace(plan, rows=128)


def _units(sizes: Sizes) -> int:
    """So many that their gates are the 64 rows that the tensor cores take at least."""
    return max(1, 64 // stacked(sizes.gates))


def _tiled(sizes: Sizes, units: int, rows: int, chunk: int, split: int, stages: int) -> Plan:
    blocks = _ceil(sizes.H, units)
    outputs = _power(_ceil(sizes.R, blocks)) if sizes.projected else units
    return Plan("persistent", units, outputs, rows, blocks, groups=1, warps=8, chunk=chunk, split=split, stages=stages)


def shared_bytes(device: Device, sizes: Sizes, forward: bool, plan: Plan) -> int:
    """Shared memory of a program, at most."""
    if plan.schedule == "single":
        matrices = stacked(sizes.gates) + sizes.projected if device.backend == "cuda" else 1  # hip holds them in registers
        return matrices * plan.units * plan.outputs * sizes.held_bytes + SPARE_BYTES
    height, depth = _product(sizes, forward, plan)
    chunks = plan.stages * _chunk_bytes(sizes, forward, plan)
    if plan.feed:  # both operands of the span's product, whose tile then changes its layout
        outputs, columns, chunk, stages = plan.feed
        chunks = max(chunks, stages * (outputs + columns) * chunk * sizes.held_bytes, outputs * columns * 4)
    if plan.resident:
        return height * _ceil(depth, plan.chunk) * plan.chunk * sizes.held_bytes + max(chunks, LAYOUT_BYTES) + 2048
    return plan.stages * height * plan.chunk * sizes.held_bytes + chunks + SPARE_BYTES


def estimate(device: Device, sizes: Sizes, forward: bool, plan: Plan) -> float:
    """Microseconds of a step, the rest of a launch shared out over the steps."""
    size, rows = sizes.bytes_, plan.rows
    row_blocks = _ceil(sizes.B, rows)
    if plan.schedule == "single":
        height, depth = sizes.gates * plan.units, plan.outputs
        products = [(height, depth, True)] + [(plan.units, plan.outputs, True)] * sizes.projected
        together = 2 if 2 * shared_bytes(device, sizes, forward, plan) <= device.shared_bytes else 1  # one waits, one works
        programs, launches, state = _ceil(sizes.D * row_blocks, together), 1, 0
    else:
        height, depth = _product(sizes, forward, plan)
        projection = (plan.outputs, sizes.H) if forward else (plan.units, sizes.R)
        products = [(height, depth, plan.resident)] + [(*projection, False)] * sizes.projected
        programs, launches = plan.blocks * sizes.D * row_blocks, 1
        state = sum(depth for _, depth, _ in products) * size * (rows * sizes.gates if plan.diagonal else rows)
    at_once = min(programs, device.multiprocessors)
    rounds = _ceil(programs, device.multiprocessors)
    if plan.schedule in COOPERATIVE:
        rounds = launches = _ceil(row_blocks, plan.groups)
        at_once = plan.blocks * sizes.D * sizes.layers * min(plan.groups, row_blocks)
    port = min(PORT_BYTES, device.l2_bytes / at_once)  # bytes a clock of each
    held = sum(height * depth * sizes.held_bytes for height, depth, stays in products if stays)
    streamed = sum(height * depth * size for height, depth, stays in products if not stays)
    rate = device.operations(size, sizes.precision, plan.split == 1 and height >= 64)
    columns = _columns(sizes, plan)
    instruction = INSTRUCTION * (3 if sizes.precision == "tf32x3" else 1)
    work = 0.0
    for height, depth, _ in products:
        work += max(2 * height * depth * columns / rate, depth * size * instruction * _ceil(height, 64))
    clocks = (state + streamed) / port + max(held / SHARED_BYTES, work)
    inside = GATES + clocks / (1000 * GIGAHERTZ)
    if plan.schedule == "stepwise":
        return len(products) * LAUNCH + rounds * inside
    if plan.schedule == "single":
        inside += plan.units * sizes.gates * CELL  # its cells are all of a multiprocessor's, not a few
    between = BARRIER * (len(products) + sizes.meetings[not forward]) if plan.schedule in COOPERATIVE else 0
    step = between + inside
    if plan.feed:
        step = (step + _feeding(device, sizes, forward, plan, port)) * (1 + (sizes.layers - 1) * (plan.span + 1) / sizes.T)
    return rounds * (step + held / port / (1000 * GIGAHERTZ) / sizes.T) + launches * LAUNCH / sizes.T


def _feeding(device: Device, sizes: Sizes, forward: bool, plan: Plan, port: float) -> float:
    """Microseconds of a step that a span's product takes, with its two barriers; port: bytes a clock."""
    outputs, columns, *_ = plan.feed
    wide, depth = (sizes.gates * sizes.H, sizes.R) if forward else (sizes.R, sizes.gates * sizes.H)
    tiles = _ceil(_ceil(wide, outputs) * (plan.span * plan.rows // columns), plan.blocks)
    work = 2 * outputs * columns * depth / device.operations(sizes.bytes_, sizes.precision, True)
    clocks = tiles * max((outputs + columns) * depth * sizes.bytes_ / port, work)
    return (2 * BARRIER + clocks / (1000 * GIGAHERTZ)) / plan.span


def layers_at_once(device: Device, sizes: Sizes, layers: int, training: bool) -> tuple[int, ...]:
    """So many layers as run at once, the lowest first: as many parts, nearly equal, as take the least estimated time.

    sizes: of one of them; training: forward and backward count.
    """

    @cache
    def of(count: int) -> float:
        each = replace(sizes, layers=count)
        return sum(choose(device, each, forward).microseconds for forward in ((True, False) if training else (True,)))

    one_by_one = (1,) * layers
    best, least = one_by_one, layers * of(1) / GAIN
    for parts in range(1, layers):
        split = tuple(layers // parts + (part < layers % parts) for part in range(parts))
        try:
            time = sum(map(of, split))
        except ValueError:  # so many do not fit the device
            continue
        if time < least:
            best, least = split, time
    return best


def cudnn_is_faster(device: Device, sizes: Sizes, layers: int, dtype: str, packed: bool) -> bool:
    """Was cuDNN faster for such a call on an H200? bench/results/gpu.json has the times, docs/gpu.md the reasons.

    dtype: "float16", "bfloat16" or "float32". Of other devices nothing is known.
    """
    if device.backend != "cuda" or device.capability // 10 != 9:
        return False
    if sizes.T == 1:
        return True  # a step costs less than a launch from Python
    plan = choose(device, sizes, forward=False)
    if plan.schedule == "stepwise" or not (sizes.gates == 1 or plan.resident or plan.schedule == "single"):
        return True  # all weights from L2 in every step
    if layers > 1 or sizes.D > 1 or packed or sizes.projected or dtype == "bfloat16":
        return False  # what cuDNN has no persistent kernels for
    H = sizes.H
    if sizes.gates == 1:
        return H % 64 == 0 and H <= (512 if dtype == "float16" else 192)
    if dtype == "float32":
        return H <= 128 and not (sizes.gates == 3 and sizes.B >= 256)
    return H % 128 == 0 and (H == 128 or (sizes.gates == 4 and H <= 1024 and (sizes.B <= 32 or sizes.T < 100)))


def _columns(sizes: Sizes, plan: Plan) -> int:
    """Of a product: its rows of the batch, or those times gates."""
    return plan.rows * (stacked(sizes.gates) if plan.diagonal else 1)


def _chunk_bytes(sizes: Sizes, forward: bool, plan: Plan) -> int:
    """Shared memory of a chunk of the state; or of the projection's operands, both of which are streamed."""
    projection = ((plan.outputs if forward else plan.units) + plan.rows) * sizes.projected
    return max(_columns(sizes, plan), projection) * plan.chunk * sizes.held_bytes


def _product(sizes: Sizes, forward: bool, plan: Plan) -> tuple[int, int]:
    """Height and depth of the recurrent weights in a program: forward its units' rows, backward its outputs' columns."""
    if forward:
        return stacked(sizes.gates) * plan.units, sizes.R
    return (stacked(sizes.gates) * plan.outputs, sizes.H) if plan.diagonal else (plan.outputs, sizes.gates * sizes.H)


def stacked(gates: int) -> int:
    """Tiles in which the gates of a unit are stacked: a power of two."""
    return _power(gates, 1)


def _power(n: int, least: int = 16) -> int:
    """The power of two at n or above; a tile's side has 16 at least."""
    return max(least, 1 << (n - 1).bit_length())


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
