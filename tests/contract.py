"""The numerical contract: what it measures, what it allows, and the configurations it is held over.

Truth is torch.nn in float64, over the same weights, inputs, initial states and loss. Every tensor that a user can see
has a name: output, h_n, c_n, and the gradients dx, dh0, dc0 and d<parameter>.

Error of a tensor: relative L2 over all seeds at once, sqrt(sum |ours - truth|^2 / sum |truth|^2). Pooled, not averaged
over seeds: one whose truth nearly cancels (a single unit, say) would otherwise decide both sides by chance, while one
that is really wrong still shows. Accuracy near zero has tests of its own.

Allowed in float32: FACTOR times torch.nn's own error at that dtype plus SLACK eps. In float64 a fixed bound, because
torch.nn's error against itself is zero. In half precision too: each layer computes in float32 and rounds its results
once, which is at most half of eps a layer, whatever torch.nn's error.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn.kernels import cpu, reference
from fastrnn.kernels.cells import Cell
from fastrnn.kernels.derive import Code

FACTOR, SLACK = 2, 4
FIXED = {torch.float64: 1e-12} | {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.bfloat16)}

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# PYTHONWARNINGS: what torch says where NumPy is not installed, and what its own modules bring about (see pyproject.toml).
IGNORED = ("Failed to initialize NumPy", "`torch.jit.script` is deprecated", "`torch.jit.script_method` is deprecated")
WARNINGS = ",".join(["error", *(f"ignore:{message}" for message in IGNORED)])
CELLS = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}
PACKED = ("packed", "unsorted")

with warnings.catch_warnings():  # torch says once a process that oneDNN takes no projections; tests make warnings errors
    warnings.simplefilter("ignore")
    nn.LSTM(2, 2, proj_size=1)(torch.zeros(1, 1, 2))


@dataclass(frozen=True)
class Case:
    """One configuration of a module and its call.

    layout:  time [T, B, I]; batch [B, T, I]; strided, a view [T, B, I] whose last stride is 2; packed, lengths sorted;
             unsorted, packed with enforce_sorted=False; unbatched [T, I].
    lengths: of the packed rows; None draws them from 1 to steps, the longest and a 1 always among them.
    loss:    what carries weight in the loss: all, output, h_n or c_n.
    grad:    what asks for a gradient: all, input (x and the states) or weights.
    scale:   of the input and the initial states.
    """

    cell: str = "lstm"
    input_size: int = 7
    hidden_size: int = 17
    layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    bias: bool = True
    layout: str = "time"
    batch: int = 3
    steps: int = 7
    hx: bool = True
    loss: str = "all"
    grad: str = "all"
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        """The fields that differ from their defaults: a test's id, and enough to build the case again."""
        default = type(self)()
        fields = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return " ".join([self.cell] + [f"{name}={value}" for name, value in fields.items() if name != "cell"])

    @property
    def rows(self) -> int:
        return 1 if self.layout == "unbatched" else self.batch

    def module(self, library=nn, seed: int = 0) -> nn.Module:
        """The module of `library` (torch.nn, fastrnn or a stand-in) with the weights that torch.nn draws for `seed`."""
        name, options = CELLS[self.cell]
        torch.manual_seed(seed)
        module = getattr(library, name)(
            self.input_size,
            self.hidden_size,
            self.layers,
            bias=self.bias,
            batch_first=self.layout == "batch",
            bidirectional=self.bidirectional,
            dtype=self.dtype,
            **({"proj_size": self.proj_size} if self.proj_size else {}),
            **options,
        )
        return module.requires_grad_(self.grad != "input")

    def sample(self, seed: int) -> Sample:
        draw = torch.Generator().manual_seed(seed)
        B, T, D = self.rows, self.steps, self.layers * (1 + self.bidirectional)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=draw, dtype=torch.float64) * self.scale).to(self.dtype)

        shape = {"batch": (B, T), "unbatched": (T,), "strided": (T, B, 2)}.get(self.layout, (T, B))
        states = [normal(D, B, self.proj_size or self.hidden_size), normal(D, B, self.hidden_size)][: 1 + (self.cell == "lstm")]
        if self.layout == "unbatched":
            states = [state[:, 0] for state in states]
        if self.lengths is not None:
            lengths = torch.tensor(self.lengths)
        else:
            lengths = torch.randint(1, T + 1, (B,), generator=draw)
            lengths[0], lengths[-1] = 1, T
        if self.layout == "packed":
            lengths = lengths.sort(descending=True).values
        return Sample(normal(*shape, self.input_size), states if self.hx else [], lengths, seed)

    def seeds(self) -> range:
        """More of them where a seed costs little, which is also where one seed says little."""
        if self.dtype in FIXED:
            return range(2)
        gates = {"lstm": 4, "gru": 3}.get(self.cell, 1)
        work = self.rows * self.steps * self.layers * (1 + self.bidirectional) * gates * self.hidden_size
        return range(max(4, min(16, 200_000 // work)))


@dataclass
class Sample:
    """Leaves of one call: x, the initial states (or none), lengths of the rows where they are packed."""

    x: Tensor
    states: list[Tensor]
    lengths: Tensor
    seed: int

    def to(self, where: torch.dtype | str) -> Sample:
        return Sample(self.x.to(where), [state.to(where) for state in self.states], self.lengths, self.seed)


def arguments(case: Case, x: Tensor, states: Sequence[Tensor], lengths: Tensor) -> tuple:
    """(input, hx) as the module takes them."""
    if case.layout in PACKED:
        x = pack_padded_sequence(x, lengths, enforce_sorted=case.layout == "packed")
    elif case.layout == "strided":
        # [T, B, 2, I] read as [T, B, I, 2]: the view's last stride is 2, its gradient goes to half of the leaf
        x = x.flatten(2).unflatten(2, (case.input_size, 2))[..., 0]
    hx = None if not states else tuple(states) if case.cell == "lstm" else states[0]
    return x, hx


def run(module: nn.Module, case: Case, sample: Sample) -> dict[str, Tensor]:
    """Every tensor of the contract by name, for one call and the gradient of a randomly weighted sum of its results."""
    differentiate = case.grad != "weights"
    x, *states = (leaf.detach().clone().requires_grad_(differentiate) for leaf in (sample.x, *sample.states))
    output, state = module(*arguments(case, x, states, sample.lengths))
    results = {"output": output.data if isinstance(output, PackedSequence) else output}
    results |= zip(("h_n", "c_n"), state) if case.cell == "lstm" else {"h_n": state}
    draw = torch.Generator().manual_seed(sample.seed + 1)
    weights = {name: torch.randn(value.shape, generator=draw).to(case.dtype).to(value) for name, value in results.items()}
    loss = sum((weights[name] * results[name]).sum() for name in results if case.loss in ("all", name))
    leaves = {"dx": x, **dict(zip(("dh0", "dc0"), states))} if differentiate else {}
    leaves |= {f"d{name}": p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    # what the loss does not reach has no gradient; an engine may as well say zero
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.values(), grads)]
    return {name: value.detach() for name, value in results.items()} | dict(zip(leaves, grads))


def twins(case: Case, seed: int, library=fastrnn) -> tuple[nn.Module, nn.Module]:
    """(torch.nn's module, library's module) over equal weights, carried across by `load_state_dict`."""
    stock, ours = case.module(nn, seed), case.module(library, seed)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


class Error:
    """Relative L2 of one tensor, pooled over seeds."""

    def __init__(self) -> None:
        self.wrong = self.whole = 0.0

    def add(self, value: Tensor, truth: Tensor) -> None:
        self.wrong += float((value.double() - truth).square().sum())
        self.whole += float(truth.square().sum())

    @property
    def relative(self) -> float:
        return math.sqrt(self.wrong / self.whole) if self.whole else math.inf if self.wrong else 0.0


def relative(value: Tensor, truth: Tensor) -> float:
    """Relative L2 error of one tensor."""
    error = Error()
    error.add(value, truth.double())
    return error.relative


def bound(dtype: torch.dtype, stock: float) -> float:
    """Allowed error, where torch.nn's own is `stock`."""
    return FIXED[dtype] if dtype in FIXED else FACTOR * stock + SLACK * torch.finfo(dtype).eps


def assert_contract(case: Case, seeds: Sequence[int] | None = None, library=fastrnn) -> None:
    """The engine of `library` runs `case` (torch.nn's path does not), with every tensor's error within its bound."""
    seeds = case.seeds() if seeds is None else seeds
    errors: dict[str, tuple[Error, Error]] = {}
    for seed in seeds:
        stock, ours = twins(case, seed, library)
        sample = case.sample(seed)
        if seed == seeds[0]:
            assert_engine(case, ours, sample, library)
        mine = run(ours, case, sample)
        with threads(1):  # as accurate, and no OpenMP barriers where the machine is busy
            truth = run(copy.deepcopy(stock).double(), case, sample.to(torch.float64))
            theirs = truth if case.dtype in FIXED else run(stock, case, sample)
        assert mine.keys() == truth.keys()
        for name, value in truth.items():
            form = mine[name].shape, mine[name].dtype
            assert form == (value.shape, case.dtype), f"{case}: {name} is {form}, torch.nn gives {tuple(value.shape)}"
            stock_error, our_error = errors.setdefault(name, (Error(), Error()))
            stock_error.add(theirs[name], value)
            our_error.add(mine[name], value)
    broken = []
    for name, (stock_error, our_error) in errors.items():
        allowed = bound(case.dtype, stock_error.relative) * (case.layers if case.dtype.itemsize == 2 else 1)
        if not our_error.relative <= allowed:  # NaN is broken too
            broken.append(
                f"  {name}: error {our_error.relative:.3g} > {allowed:.3g}, torch.nn's own {stock_error.relative:.3g}"
            )
    assert not broken, "\n".join([f"{case}, {len(seeds)} seeds", *broken])


def assert_engine(case: Case, module: nn.Module, sample: Sample, library=fastrnn) -> None:
    """A contract that torch.nn's own path fulfils says nothing of the engine."""
    if library is fastrnn:
        choice = fastrnn.explain(module, *arguments(case, sample.x, sample.states, sample.lengths))
        assert choice.engine == "cpu", f"{case}: {choice}"


def numbers(code: Code, given: dict[str, Tensor]) -> list[Tensor]:
    """Arguments of a derived function by their names, new random ones where there are none."""
    return [given.setdefault(name, torch.randn(5, 7, dtype=torch.float64)) for name, _ in code.parameters]


def assert_derivative(cell: Cell, rtol: float, atol: float) -> None:
    """A cell's backward gives what autograd gives through its forward."""
    derived, given = cell.derived, dict[str, Tensor]()
    inputs = [each.requires_grad_() for each in numbers(derived.forward, given)]
    results = derived.forward.bind(reference.NAMES)(*inputs)
    given |= {name: value for (name, _), value in zip(derived.forward.results, results, strict=True)}
    own = derived.backward.bind(reference.NAMES)(*numbers(derived.backward, given))
    names = ["h_new", *(name for name, _ in derived.after)]
    learned = len(inputs) - cell.noise  # noise, which has no gradient, comes last
    truths = torch.autograd.grad([given[name] for name in names], inputs[:learned], [given[f"d_{name}"] for name in names])
    for (name, _), found, truth in zip(derived.forward.parameters[:learned], own, truths, strict=True):
        torch.testing.assert_close(found, truth, rtol=rtol, atol=atol, msg=lambda text, name=name: f"d_{name}: {text}")


def same_bits(ours: Tensor | Mapping[str, Tensor], theirs: Tensor | Mapping[str, Tensor], what: str = "") -> None:
    """Equal to the bit: -0 is not 0, a NaN equals itself."""
    if isinstance(ours, Mapping):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            same_bits(value, theirs[name], f"{what} {name}")
        return
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    differ = ours.contiguous().view(whole) != theirs.contiguous().view(whole)
    assert not differ.any(), f"{what}: {int(differ.sum())} of {differ.numel()} differ, first at {differ.nonzero()[0].tolist()}"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's thread count inside the block, and let teams have as many, whatever CPUs there are and however busy."""
    before, limit = torch.get_num_threads(), cpu.runtime_module().set_limits if tiers() else lambda on: None
    torch.set_num_threads(count)
    limit(False)
    try:
        yield
    finally:
        limit(True)
        torch.set_num_threads(before)


def python(code: str, *, timeout: float = 120, cwd: Path = TESTS, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter, where warnings are errors and this module can be imported.

    A hang becomes a failure here, and a crash cannot take the suite with it.
    """
    path = os.pathsep.join(filter(None, (environment.pop("PYTHONPATH", ""), str(TESTS))))
    kernels = str(ROOT / "build")  # where those that setup.py compiled lie, and what is compiled at run time is kept
    env = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": WARNINGS, "FASTRNN_CACHE_DIR": kernels, **environment}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired as stalled:
        output = (stalled.stdout or b"").decode() + (stalled.stderr or b"").decode()
        raise AssertionError(f"stalled: not done after {timeout} s\n{output}") from None
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def tiers() -> list[str]:
    """Names of the tiers that are compiled in and that this processor runs, widest first."""
    if cpu.EXTENSION is None:
        return []
    return cpu.runtime_module().tiers()


def pairwise(factors: Mapping[str, Sequence], valid: Callable[[dict], bool] = lambda row: True) -> list[dict]:
    """Rows in which every valid pair of values of any two factors occurs at least once; greedy, always the same.

    valid: whether a row can be; also asked of rows that lack factors, where it must not say no too early.
    """
    names = list(factors)
    always = {name: values[0] for name, values in factors.items() if len(values) == 1}
    missing = {
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
        if valid({**always, a: x, b: y})
    }
    order = sorted(missing, key=lambda pair: str(sorted(pair, key=str)))
    rows = []
    for seed_pair in order:
        if seed_pair not in missing:
            continue
        row = {**always, **dict(seed_pair)}
        for name in sorted(names, key=lambda name: -len(factors[name])):
            if name not in row:
                choices = [value for value in factors[name] if valid({**row, name: value})]
                gains = [sum(frozenset(((name, v), item)) in missing for item in row.items()) for v in choices]
                row[name] = choices[gains.index(max(gains))]
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({name: row[name] for name in names})
    return rows


def cases(factors: Mapping[str, Sequence]) -> list[Case]:
    """A pairwise-covering selection of the cases that can be."""

    def valid(row: dict) -> bool:
        lstm = row.get("cell", "lstm") == "lstm"
        projects = row.get("proj_size", 0) > 0
        fits = row.get("proj_size", 0) < row.get("hidden_size", math.inf)
        return fits and (lstm or not projects) and (lstm or row.get("loss") != "c_n")

    return [Case(**row) for row in pairwise(factors, valid)]
