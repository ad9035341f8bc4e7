"""What the CPU engine promises beyond numbers: the same bits whatever shares the call, any strides, clean memory."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import CELLS, Case, Sample, arguments, python, relative, run, same_bits, threads, twins
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn

F32, F64 = torch.float32, torch.float64
# Rows few and many, more and fewer than threads, units above and below a panel: both schedules, one and two directions.
# Never one step: that path may round differently, and says so.
SHAPES = (
    Case("lstm", 7, 17, batch=1, steps=9),
    Case("lstm", 33, 130, batch=3, steps=5, layers=2, bidirectional=True),
    Case("lstm", 65, 65, batch=17, steps=6, proj_size=33, bidirectional=True),
    Case("lstm", 64, 512, batch=4, steps=4, bidirectional=True),
    Case("lstm", 65, 300, batch=40, steps=4),
    Case("gru", 130, 33, batch=33, steps=16, bias=False),  # two blocks of gate gradients
    Case("gru", 63, 256, batch=2, steps=6, bidirectional=True),
    Case("gru", 33, 150, batch=1, steps=7),
    Case("rnn_tanh", 17, 63, batch=8, steps=40, layers=2),
    Case("rnn_relu", 2, 130, batch=40, steps=3, bidirectional=True),
)
LAYOUTS = ("time", "batch", "packed")
PASSES = [replace(case, layout=layout, dtype=dtype) for case in SHAPES for layout in LAYOUTS for dtype in (F32, F64)]


def each(values):
    return pytest.mark.parametrize("case", list(values), ids=str)


def call(case: Case, module=None, sample: Sample | None = None) -> dict[str, torch.Tensor]:
    """One forward and backward of fastrnn's module for `case`."""
    return run(module or twins(case, 0)[1], case, sample or case.sample(0))


class Operators(TorchDispatchMode):
    """Names of the operators that run inside the block."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@each(replace(case, layout=layout, batch=3) for case in SHAPES for layout in (*LAYOUTS, "unsorted", "strided", "unbatched"))
def test_the_engine_runs(case):
    """Forward and backward are the engine's, so that everything else here is about it."""
    module, sample = twins(case, 0)[1], case.sample(0)
    with Operators() as ran:
        call(case, module, sample)
    assert {"fastrnn::layer_forward", "fastrnn::layer_backward"} <= ran.names
    assert not {name for name in ran.names if "mm" in name or "_rnn_" in name or "lstm" in name}, ran.names
    assert fastrnn.explain(module, *arguments(case, sample.x, sample.states, sample.lengths)).engine == "cpu"


# --- bits


@each(PASSES)
def test_bits_from_run_to_run_and_with_any_thread_count(case):
    """Every tensor, weights' gradients too: 20 calls, of teams of 1 to 7."""
    module, sample = twins(case, 0)[1], case.sample(0)
    with threads(1):
        first = call(case, module, sample)
    for count in (1, 2, 3, 4, 7):
        with threads(count):
            for repeat in range(4):
                same_bits(call(case, module, sample), first, f"{case}, {count} threads, run {repeat}:")


def rows_of(case: Case, sample: Sample, rows: list[int]) -> tuple[Case, Sample]:
    """The call with `rows` of the batch only, in that order."""
    at = 0 if case.layout == "batch" else 1
    lengths = sample.lengths[rows]
    x = sample.x.index_select(at, torch.tensor(rows))
    if case.layout in ("packed", "unsorted"):
        x = x[: lengths.max()]
    states = [state[:, rows] for state in sample.states]
    return replace(case, batch=len(rows), steps=x.shape[1 - at]), Sample(x, states, lengths, sample.seed)


def per_row(case: Case, sample: Sample, rows: list[int], module) -> list[dict[str, torch.Tensor]]:
    """Results and gradients of each row of the batch, where the loss weights a position alike in any batch."""
    part, chosen = rows_of(case, sample, rows)
    leaves = [leaf.clone().requires_grad_() for leaf in (chosen.x, *chosen.states)]
    output, state = module(*arguments(part, leaves[0], leaves[1:], chosen.lengths))
    if not isinstance(output, torch.Tensor):
        output, _ = pad_packed_sequence(output)
    at = 0 if case.layout == "batch" else 1
    states = state if isinstance(state, tuple) else (state,)
    wave = torch.arange(200_000).mul(0.7).sin().to(case.dtype)
    seen = [(output.movedim(at, 0), wave), *((value.movedim(1, 0), wave) for value in states)]
    loss = sum((value.flatten(1) * weight[: value[0].numel()]).sum() for value, weight in seen)
    grads = torch.autograd.grad(loss, leaves)
    ats = dict(zip(("output", "dx", "h_n", "c_n", "dh0", "dc0"), (at, at, 1, 1, 1, 1)))
    found = dict(zip(("h_n", "c_n"), states)) | dict(zip(("dx", "dh0", "dc0"), grads)) | {"output": output}
    result = []
    for row, length in enumerate(chosen.lengths.tolist() if case.layout in ("packed", "unsorted") else [None] * len(rows)):
        one = {name: value.detach().select(ats[name], row) for name, value in found.items()}
        result.append(one | {name: one[name][:length] for name in ("output", "dx")})
    return result


@each(replace(case, batch=9) for case in PASSES if case.batch > 1)
def test_bits_of_a_row_whatever_shares_its_batch(case):
    """Alone, among some, among all in another order: outputs, final states, gradients of inputs and initial states."""
    module, sample = twins(case, 0)[1], case.sample(0)
    sample.lengths = sample.lengths.clamp(min=2)
    whole = per_row(case, sample, list(range(9)), module)
    form = replace(case, layout="unsorted") if case.layout == "packed" else case
    for rows in ([8], [0], [3, 4], [5, 1, 7], [1, 2, 3, 4, 6], [8, 7, 6, 5, 4, 3, 2, 1, 0]):
        for row, alone in zip(rows, per_row(form, sample, rows, module)):
            same_bits(alone, whole[row], f"{case}, row {row} among {rows}:")


@each(replace(case, dtype=dtype) for case in SHAPES for dtype in (F32, F64))
def test_bits_of_every_layout(case):
    """[T, B, I], [B, T, I], a strided view, and packed rows of equal length, weights' gradients too."""
    T, B = case.steps, case.batch
    sample = case.sample(0)
    modules = {
        batch_first: replace(case, layout="batch" if batch_first else "time").module(fastrnn, 0) for batch_first in (0, 1)
    }

    def results(batch_first, form, back=lambda output: output) -> dict[str, torch.Tensor]:
        module, x, *states = modules[batch_first], *(t.clone().requires_grad_() for t in (sample.x, *sample.states))
        output, state = module(form(x), tuple(states) if case.cell == "lstm" else states[0])
        output, states_n = back(output), state if case.cell == "lstm" else (state,)
        wave = torch.arange(output.numel()).mul(0.7).sin().to(case.dtype).view(output.shape)
        loss = (output * wave).sum() + sum(value.sum() for value in states_n)
        leaves = {"dx": x, **dict(zip(("dh0", "dc0"), states)), **dict(module.named_parameters())}
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"output": output, **dict(zip(("h_n", "c_n"), states_n)), **dict(zip(leaves, grads))}

    def turn(value: torch.Tensor) -> torch.Tensor:
        return value.transpose(0, 1)

    expected = results(False, lambda x: x)
    others = {
        "batch_first": results(True, lambda x: turn(x).contiguous(), turn),
        "batch_first, a view": results(True, turn, turn),
        "last stride 2": results(False, lambda x: torch.stack((x, x), -1)[..., 0]),
        "packed": results(
            False, lambda x: pack_padded_sequence(x, torch.full((B,), T)), lambda output: output.data.view(T, B, -1)
        ),
    }
    for name, found in others.items():
        same_bits(found, expected, f"{case}, {name}:")


@each(
    replace(case, layout="packed", batch=7, steps=13, bidirectional=True, dtype=dtype)
    for case in SHAPES
    for dtype in (F32, F64)
)
def test_bits_of_a_packed_row_are_those_of_a_dense_one(case):
    module, sample = twins(case, 0)[1], case.sample(0)
    sample.lengths = sample.lengths.clamp(min=2)
    packed = per_row(case, sample, list(range(7)), module)
    for row, length in enumerate(sample.lengths.tolist()):
        x, states = sample.x[:length, row : row + 1], [state[:, row : row + 1] for state in sample.states]
        (dense,) = per_row(replace(case, layout="time", steps=length), Sample(x, states, sample.lengths[:1], 0), [0], module)
        same_bits(dense, packed[row], f"{case}, row {row} of length {length}:")


# --- memory


@pytest.fixture
def dirty(poison):
    """Call it to leave NaN in memory handed out next, what torch.empty returns and freed blocks of every size."""

    def soil() -> None:
        sizes = [scale << power for power in range(4, 19) for scale in (2, 3)]
        blocks = [torch.full((size,), float("nan")) for size in sizes for _ in range(2)]
        del blocks

    return soil


@each(replace(case, dtype=dtype, layout=layout) for case in SHAPES for layout in LAYOUTS for dtype in (F32, F64))
def test_nothing_is_read_before_it_is_written(case, dirty):
    module, sample = twins(case, 0)[1], case.sample(0)
    clean = call(case, module, sample)
    assert torch.empty(99).isnan().all()
    for _ in range(2):
        dirty()
        same_bits(call(case, module, sample), clean, str(case))


def test_nothing_is_read_before_it_is_written_by_the_allocator_either():
    """Where the C library itself fills what it hands out, workspaces too, and maps no pages of zeros."""
    tunables = "glibc.malloc.perturb=128:glibc.malloc.tcache_count=0:glibc.malloc.mmap_threshold=4294967296"
    code = """
from dataclasses import replace
import torch
from contract import run, twins
from test_engine import SHAPES
if FILLED:
    assert (torch.empty(99_999) > 1e38).all(), "the C library does not fill its memory here"
for case in SHAPES:
    for layout in ("time", "packed"):
        case = replace(case, layout=layout)
        for name, value in run(twins(case, 0)[1], case, case.sample(0)).items():
            print(case, name, value.double().norm().item().hex())
"""
    filled = python(code.replace("FILLED", "True"), GLIBC_TUNABLES=tunables)
    assert filled == python(code.replace("FILLED", "False"))


@each(Case(cell, 64, 128, batch=8, steps=12, layers=2, layout=layout) for cell in CELLS for layout in ("time", "packed"))
def test_training_does_not_leak(case):
    module, sample = twins(case, 0)[1], case.sample(0)
    page = 4096

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    for _ in range(20):
        call(case, module, sample)
    before = resident()
    for _ in range(50):
        call(case, module, sample)
    grown = resident() - before
    saved = sample.x.numel() // 64 * 128 * 4 * 4  # what one call keeps for backward, about
    assert grown < 10 * saved, f"{grown / 2**20:.1f} MiB more after 50 steps, {saved / 2**20:.2f} MiB are kept in each"


# torch.nn needs most of a minute for the gradients of the gated ones: by default they run forward only.
@pytest.mark.parametrize("cell", ["rnn_tanh", *(pytest.param(cell, marks=pytest.mark.slow) for cell in ("lstm", "gru"))])
def test_gradients_of_100_000_steps(cell):
    """In float64. Rounding errors add up over the steps: ten times the usual bound."""
    case = Case(cell, 4, 8, batch=1, steps=100_000, dtype=F64)
    stock, ours = twins(case, 0)
    sample = case.sample(0)
    truth, found = run(stock, case, sample), run(ours, case, sample)
    for name, value in truth.items():
        assert relative(found[name], value) < 1e-11, name


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_100_000_steps(cell):
    case = Case(cell, 4, 8, batch=1, steps=100_000, dtype=F64)
    sample = case.sample(0)
    given = arguments(case, sample.x, sample.states, sample.lengths)
    stock, ours = twins(case, 0)
    with torch.no_grad():
        truth, found = stock(*given)[0], ours(*given)[0]
    assert relative(found, truth) < 1e-11
    ours(*given)[0][-1].sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad.isfinite().all(), name


# --- layouts of the arguments


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_any_strides(cell, batch_first):
    """Views of every kind, of inputs, states, weights and incoming gradients: right, each in every place."""
    case = Case(cell, 6, 10, batch=4, steps=5, layout="batch" if batch_first else "time", dtype=F64)
    stock, ours = twins(case, 0)
    sample = case.sample(0)

    def views(value: torch.Tensor) -> dict[str, torch.Tensor]:
        wide = torch.cat((value, value), -1)
        return {
            "transposed": value.transpose(0, 1).contiguous().transpose(0, 1),
            "last stride": torch.stack((value, value), -1)[..., 0],
            "wide rows": wide[..., : value.shape[-1]],
            "unaligned": torch.cat((value.new_zeros(1), value.flatten()))[1:].view(value.shape),
            "reversed in memory": value.permute(2, 1, 0).contiguous().permute(2, 1, 0),
            "expanded": value[:, :1].expand(value.shape),
            "one value": value[:1, :1, :1].expand(value.shape),
        }

    def outcome(module, x, states, weight):
        leaves = [leaf.detach().requires_grad_() for leaf in (x, *states)]
        output, state = module(leaves[0], tuple(leaves[1:]) if cell == "lstm" else leaves[1])
        grads = torch.autograd.grad(output, [*leaves, *module.parameters()], weight, retain_graph=True)
        states = state if cell == "lstm" else (state,)
        return output, *states, *grads, *torch.autograd.grad(states[0].sum(), leaves)  # an expanded gradient

    weight = torch.randn(*sample.x.shape[:2], 10, dtype=F64)
    for kind in views(weight):
        for place in ("x", "states", "dy"):
            x = views(sample.x)[kind] if place == "x" else sample.x
            states = [views(state)[kind] if place == "states" else state for state in sample.states]
            dy = views(weight)[kind] if place == "dy" else weight
            for index, (mine, theirs) in enumerate(
                zip(outcome(ours, x, states, dy), outcome(stock, x, states, dy), strict=True)
            ):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12, msg=f"{kind} {place}, result {index}")
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if parameter.dim() == 2:
                getattr(stock, name).data = getattr(ours, name).data = parameter.t().contiguous().t()
    for mine, theirs in zip(outcome(ours, sample.x, sample.states, weight), outcome(stock, sample.x, sample.states, weight)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12, msg="transposed weights")


@pytest.mark.parametrize("cell", CELLS)
def test_raw_ops_take_any_strides(cell):
    """Called directly, with an x whose last stride is not 1, and a step's rows out of order."""
    case = Case(cell, 6, 10, batch=4, steps=5, dtype=F64)
    module, sample = twins(case, 0)[1], case.sample(0)
    weights = [p.detach() for p in module.parameters()]
    h0, c0 = sample.states[0], sample.states[1] if cell == "lstm" else None
    text = f"{cell} bias"

    def passes(x, h0, dy):
        given = x, None, h0, c0, weights
        y, h_n, c_n, saved = torch.ops.fastrnn.layer_forward(*given, text, True)
        assert y.is_contiguous() and torch.equal(y[-1], h_n[0])
        dx, dh0, dc0, dw = torch.ops.fastrnn.layer_backward(dy, None, None, *given, y, saved, text, [True, True, True])
        return y, c_n, dx, dh0, dc0, *dw

    dy = torch.randn(5, 4, 10, dtype=F64)
    for kind, view in {
        "last stride 2": lambda value: torch.stack((value, value), -1)[..., 0],
        "reversed": lambda value: value.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "every other row": lambda value: (
            torch.cat((value, value), 1).view(value.shape[0], 2, -1, value.shape[2]).transpose(1, 2)[:, :, 0]
        ),
    }.items():
        expected = passes(sample.x, h0, dy)
        for place, given in {
            "x": (view(sample.x), h0, dy),
            "h0": (sample.x, view(h0), dy),
            "dy": (sample.x, h0, view(dy)),
        }.items():
            assert all(torch.equal(a, b) for a, b in zip(given, (sample.x, h0, dy)))
            for mine, theirs in zip(passes(*given), expected):
                torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=f"{kind} {place}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_inputs_stay_as_they_are(cell, layout):
    """Gates are written over private buffers only: no argument, no saved output and no incoming gradient changes."""
    case = Case(cell, 6, 10, layout=layout, layers=2, bidirectional=True)
    module, sample = twins(case, 0)[1], case.sample(0)
    leaves = [sample.x, *sample.states, *(p.detach() for p in module.parameters())]
    copies = [leaf.clone() for leaf in leaves]
    x = sample.x.clone().requires_grad_()
    output, _ = module(*arguments(case, x, sample.states, sample.lengths))
    data = output.data if case.layout == "packed" else output
    dy, before = torch.randn_like(data), data.detach().clone()
    incoming = dy.clone()
    data.backward(dy, retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    data.backward(dy)
    same_bits(x.grad, first, "a second backward")
    same_bits(data.detach(), before, "output")
    same_bits(dy, incoming, "incoming gradient")
    for leaf, copy in zip(leaves, copies):
        same_bits(leaf, copy, "argument")
