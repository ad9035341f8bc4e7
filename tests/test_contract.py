"""fastrnn against torch.nn in float64: outputs, states and every gradient, as contract.py measures and bounds them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from contract import CELLS, Case, Sample, arguments, assert_contract, bound, cases, relative, run, twins
from torch.nn.utils.rnn import PackedSequence

import fastrnn

# Around one lane, one vector and one tile of any register width, and 1; even where they can be, mostly not.
SIZES = (1, 2, 7, 17, 33, 63, 65, 130)
GRID = {
    "input_size": SIZES,
    "hidden_size": SIZES,
    "layers": (1, 2, 3),
    "bidirectional": (False, True),
    "bias": (True, False),
    "layout": ("time", "batch", "strided", "packed", "unsorted", "unbatched"),
    "batch": (1, 2, 3, 5, 8, 17, 33),
    "steps": (1, 2, 7, 40),
    "hx": (True, False),
    "loss": ("all", "output", "h_n"),
    "grad": ("all", "input", "weights"),
}
# Every pair of values meets in each cell by itself; the projection, which only lstm has, has a table of its own.
CASES = [
    *(case for cell in CELLS for case in cases({**GRID, "cell": (cell,)})),
    *cases({**GRID, "cell": ("lstm",), "loss": ("all", "output", "h_n", "c_n"), "proj_size": (0, *SIZES[:-1])}),
]
# In float64 every formula has been held to torch.nn already: what is left is the type, whose vectors are half as long.
CASES_DOUBLE = cases({**GRID, "cell": tuple(CELLS), "proj_size": (0, 1, 7, 33, 65), "dtype": (torch.float64,)})


def each(values):
    return pytest.mark.parametrize("case", list(values), ids=str)


@each(CASES)
def test_float32(case):
    assert_contract(case)


@each(CASES_DOUBLE)
def test_float64(case):
    assert_contract(case)


@each(
    Case(cell, 17, 33, layout=layout, batch=len(lengths), steps=max(lengths), bidirectional=True, lengths=lengths)
    for cell in CELLS
    for layout, lengths in (
        ("packed", (1, 1, 1)),
        ("packed", (40,)),
        ("packed", (40,) + (1,) * 20),
        ("packed", (64, 63, 9, 9, 8, 8, 1)),
        ("unsorted", (1, 40, 1, 1, 39, 2)),
        ("unsorted", (5, 5, 5, 5)),
    )
)
def test_lengths(case):
    """Very uneven ones, equal ones, all of them 1."""
    assert_contract(case)


@each(
    Case(cell, 33, 65, layers=2, batch=5, steps=20, bias=scale >= 1, hx=scale >= 1, scale=scale, dtype=dtype)
    for cell in CELLS
    for dtype in (torch.float32, torch.float64)
    for scale in (1e-4, 1e-3, 1, 30)
)
def test_magnitudes(case):
    """Down to where only relative accuracy counts (without biases, or they would decide), up to saturation."""
    assert_contract(case)


@dataclass(frozen=True)
class Saturating(Case):
    """A case in which one row meets numbers of this size: in a step of the input, or in the initial hidden state."""

    size: float = 1e38
    where: str = "x"

    def sample(self, seed: int) -> Sample:
        sample = super().sample(seed)
        place = sample.x[self.steps // 2, 1] if self.where == "x" else sample.states[0][0, 1]
        place[::2] = place[::2].sign() * self.size
        return sample


@each(
    Saturating(cell, batch=batch, steps=steps, dtype=dtype, size=size, where=where)
    for cell in CELLS
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    for steps, batch in ((1, 3), (5, 9))
    for size in ((1e34,) if cell == "rnn_relu" else (1e38, torch.finfo(dtype).max))
    for where in (("x",) if cell == "gru" else ("x", "h0"))  # a GRU may carry such a state on, and its gradients hide others
)
def test_saturated_gates(case):
    """They are 0 or 1 exactly, so that none of the input comes back in the gradients of weights, however large it is."""
    assert_contract(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_sums_of_opposite_infinities(cell, dtype):
    """Gate inputs so large that their sum or a product with a gate overflows: NaN, infinities and zeros are torch.nn's."""
    case = Case(cell, 3, 5, batch=4, steps=1, dtype=dtype)
    stock, ours = twins(case, 0)
    sample = case.sample(0)
    largest = torch.finfo(dtype).max
    for row, state in enumerate((largest, float("inf"), -float("inf"))):
        sample.x[0, row, 0], sample.states[0][0, row, 0] = largest, state
    theirs, mine = run(stock, case, sample), run(ours, case, sample)
    for name in ("output", "h_n", "dx", "dh0"):
        torch.testing.assert_close(
            mine[name], theirs[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=f"{name} is not torch.nn's"
        )


def gate_values(library, gate: str, a: torch.Tensor) -> torch.Tensor:
    """What `library` computes for the elementary function `gate` of each element of `a`.

    tanh is an RNN over one input and unit weight. sigmoid is the input gate of an LSTM: c = sigmoid(a) * tanh(30).
    """
    module = library.LSTM(1, 1, dtype=a.dtype) if gate == "sigmoid" else library.RNN(1, 1, dtype=a.dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_ih_l0[0] = 1
        if gate == "sigmoid":
            module.bias_ih_l0[2] = 30
        _, state = module(torch.stack((a, a))[..., None])  # two steps: one alone may take a path of its own
        if gate == "tanh":
            return state.flatten()
        module.weight_ih_l0[1] = 0
        module.bias_ih_l0[1] = -1e4  # forget the first step
        return module(torch.stack((a, a))[..., None])[1][1].flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("gate", "lowest", "highest"), [("tanh", 1e-30, 100), ("sigmoid", 1e-10, 85)])
def test_elementary_functions(gate, lowest, highest, dtype):
    """Relative error element by element, over every magnitude and both signs, as a plain product would hide it."""
    magnitude = torch.logspace(*torch.tensor((lowest, highest)).log10().tolist(), 4001, dtype=torch.float64).to(dtype)
    near_switches = torch.linspace(0, 2, 4001, dtype=dtype)[1:]
    a = torch.cat((-magnitude, magnitude, -near_switches, near_switches))
    truth = getattr(a.double(), gate)()

    def worst(values):
        return ((values.double() - truth) / truth).abs().max().item()

    stock, ours = worst(getattr(a, gate)()), worst(gate_values(fastrnn, gate, a))
    allowed = bound(dtype, stock)
    assert ours <= allowed, f"{gate} in {dtype}: {ours:.3g} > {allowed:.3g}, torch's own {stock:.3g}"


@pytest.mark.parametrize("gate", range(4))
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (torch.float32, (0x7FC00001, 0x7FC000FF, 0x7FFFFFFF, -1)),
        (torch.float64, (0x7FF80000000007A2, 0x7FFFFFFFFFFFFFFF, -1)),
    ],
    ids=str,
)
def test_every_nan_is_one(gate, dtype, bits):
    """Whatever the bits beside those that make it one (CUDA's are all set), in the pre-activation of one gate alone."""
    integer = torch.int32 if dtype is torch.float32 else torch.int64
    module = fastrnn.LSTM(1, len(bits), dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.5)
        module.bias_ih_l0.view(4, -1)[gate] = torch.tensor(bits, dtype=integer).view(dtype)
        y, _ = module(torch.ones(2, 3, 1, dtype=dtype), (torch.ones(1, 3, len(bits), dtype=dtype),) * 2)
    assert y[0].isnan().all()  # after the first step each unit's are in all


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("layout", ["time", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_not_finite(cell, layout, value):
    """To its own row such a value does what it does in torch.nn, in gradients too, and to other rows nothing."""
    case = Case(cell, 9, 33, layers=2, layout=layout, batch=6, steps=8, lengths=(8, 8, 7, 5, 5, 2))
    stock, ours = twins(case, 0)
    clean, tainted = case.sample(0), case.sample(0)
    tainted.x[4, 2, 3] = value
    theirs, mine, before = run(stock, case, tainted), run(ours, case, tainted), run(ours, case, clean)
    for name, expected in theirs.items():
        found = mine[name]
        # which numbers are finite is the question here; how near they come is assert_contract's, and saturated ones are tiny
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True, msg=f"{name} is not torch.nn's")
    for name in ("h_n", "dx", "dh0"):
        others = [row for row in range(6) if row != 2]
        assert mine[name].isfinite()[:, others].all(), name
        assert torch.equal(mine[name][:, others], before[name][:, others]), f"{name} of other rows changed"


@pytest.mark.parametrize("cell", CELLS)
def test_padding(cell):
    """Padding is no part of a packed sequence: NaN in it changes nothing, and its gradient is 0."""
    case = Case(cell, 9, 17, layout="packed", batch=4, steps=6, lengths=(6, 4, 2, 1))
    _, ours = twins(case, 0)
    clean, padded = case.sample(0), case.sample(0)
    for row, length in enumerate(case.lengths):
        padded.x[length:, row] = float("nan")
    mine, before = run(ours, case, padded), run(ours, case, clean)
    for name, value in mine.items():
        assert torch.equal(value, before[name]), name
    for row, length in enumerate(case.lengths):
        assert not mine["dx"][length:, row].any()
    output, _ = ours(*arguments(case, clean.x, clean.states, clean.lengths))
    assert isinstance(output, PackedSequence)


def test_can_fail():
    """The measure itself: an error of ten times the bound in one parameter's gradient is named."""

    class Broken(torch.nn.GRU):
        def forward(self, *args):
            self.bias_hh_l0.register_hook(lambda grad: grad * (1 + 1e-4)) if self.bias_hh_l0.requires_grad else None
            return super().forward(*args)

    library = type("Library", (), {"GRU": Broken})
    with pytest.raises(AssertionError, match=r"dbias_hh_l0: error 0\.0001 >") as broken:
        assert_contract(Case("gru"), library=library)
    assert "dbias_ih_l0" not in str(broken.value)
    assert_contract(Case("gru"), library=torch.nn)
    assert relative(torch.ones(3), torch.ones(3)) == 0
