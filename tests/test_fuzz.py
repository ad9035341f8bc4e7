"""Random modules and calls, right and wrong ones: fastrnn does what torch.nn does, errors' types and words included."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from contract import CELLS
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn

# Relative L2, tensor by tensor. float64: some 1e-15 of rounding, hundreds of operations deep, and room for a loss whose
# gradient nearly cancels; float32 has the same room. Half precision is in test_half.py: torch.nn is too far from
# the truth there to compare with.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}
# What a tensor's error may be where the tensor itself is nearly nothing, such as a gradient behind a saturated gate.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-5}

quick = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
wide = settings(quick, max_examples=4000, derandomize=False, print_blob=True)

sizes = st.sampled_from((1, 2, 3, 5, 8, 16, 17, 33, 40))


@st.composite
def constructors(draw) -> dict:
    """Keyword arguments of a module that torch.nn accepts, and "cell"."""
    cell = draw(st.sampled_from(tuple(CELLS)))
    options = {
        "cell": cell,
        "input_size": draw(sizes),
        "hidden_size": draw(sizes),
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "dtype": draw(st.sampled_from((torch.float64,) * 4 + (torch.float32,))),
    }
    if options["num_layers"] > 1 and draw(st.booleans()):
        options["dropout"] = draw(st.sampled_from((0.1, 0.5, 1.0)))
    if cell == "lstm" and options["hidden_size"] > 1 and draw(st.booleans()):
        options["proj_size"] = draw(st.integers(1, options["hidden_size"] - 1))
    return options


@st.composite
def calls(draw) -> dict:
    """How a module is called."""
    return {
        "form": draw(st.sampled_from(("dense", "dense", "unbatched", "packed", "unsorted"))),
        "batch": draw(st.sampled_from((1, 2, 3, 4, 7, 9, 0))),
        "steps": draw(st.integers(1, 9)),
        "hx": draw(st.sampled_from(("none", "given", "given", "expanded", "transposed", "list"))),
        "view": draw(st.sampled_from(("contiguous", "transposed", "last stride", "expanded", "offset", "one value"))),
        "x_grad": draw(st.booleans()),
        "hx_grad": draw(st.booleans()),
        "frozen": draw(st.sampled_from(("none", "none", "all", "weight_hh_l0"))),
        "training": draw(st.booleans()),
        "no_grad": draw(st.integers(0, 9)) == 0,
        "scale": draw(st.sampled_from((1.0, 1.0, 1e-3, 20.0))),
        "seed": draw(st.integers(0, 2**31)),
    }


def construct(library, options: dict) -> nn.Module:
    name, kind = CELLS[options["cell"]]
    torch.manual_seed(0)
    return getattr(library, name)(**{**kind, **{key: value for key, value in options.items() if key != "cell"}})


def view_of(kind: str, x: Tensor) -> Tensor:
    """A tensor of x's shape that lies in memory as `kind` says."""
    match kind:
        case "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        case "last stride":
            return torch.stack((x, x), -1)[..., 0]
        case "expanded":
            return x[:1].expand(x.shape) if x.shape[0] else x
        case "offset":
            return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
        case "one value":
            return x.new_ones(1).expand(x.shape)
    return x


def arguments_of(options: dict, call: dict) -> tuple:
    """(input, hx, leaves that want a gradient)."""
    draw = torch.Generator().manual_seed(call["seed"])
    B, T, dtype = call["batch"], call["steps"], options["dtype"]
    D = options["num_layers"] * (1 + options["bidirectional"])
    H = options["hidden_size"]

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=draw, dtype=torch.float64) * call["scale"]).to(dtype)

    packed, unbatched = call["form"] in ("packed", "unsorted"), call["form"] == "unbatched"
    batch_first = options["batch_first"] and not packed
    x = normal(*((T,) if unbatched else (B, T) if batch_first else (T, B)), options["input_size"])
    x = view_of(call["view"], x).detach().requires_grad_(call["x_grad"])
    leaves, input = [x] * call["x_grad"], x
    if packed:
        lengths = torch.randint(1, T + 1, (B,), generator=draw)
        if call["form"] == "packed":
            lengths = lengths.sort(descending=True).values
        input = pack_padded_sequence(x, lengths, enforce_sorted=call["form"] == "packed")
    if call["hx"] == "none":
        return input, None, leaves
    rows = () if unbatched else (B,)
    states = [normal(D, *rows, options.get("proj_size") or H), normal(D, *rows, H)]
    states = states if options["cell"] == "lstm" else states[:1]
    states = [view_of(call["hx"], state).detach().requires_grad_(call["hx_grad"]) for state in states]
    leaves += states * call["hx_grad"]
    if options["cell"] != "lstm":
        return input, states[0], leaves
    return input, states if call["hx"] == "list" else tuple(states), leaves


Fault = Callable[[dict, object, object], tuple]


def outcome(library, options: dict, call: dict, fault: Fault | None = None) -> tuple:
    """("error", type, words) or ("results", tensors, names); a gradient that is not there is None."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="dropout option adds dropout")
            module = construct(library, options)
        module.train(call["training"])
        frozen = call["frozen"]
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(frozen != "all" and name != frozen)
        input, hx, leaves = arguments_of(options, call)
        if fault is not None:
            input, hx = fault(options, input, hx)
        torch.manual_seed(call["seed"])  # for dropout
        with torch.set_grad_enabled(not call["no_grad"]):
            output, state = module(input, hx)
        data = output.data if isinstance(output, PackedSequence) else output
        results = [data, *(state if isinstance(state, tuple) else (state,))]
        leaves = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
        differentiable = [value for value in results if value.requires_grad]
        grads: tuple = ()
        if differentiable and leaves:
            draw = torch.Generator().manual_seed(call["seed"])
            loss = sum(
                (value * torch.randn(value.shape, generator=draw, dtype=torch.float64).to(value.dtype)).sum()
                for value in differentiable
            )
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        if isinstance(output, PackedSequence):
            results += [value for value in output[1:] if value is not None]
        return "results", [value.detach() for value in results] + list(grads), [v.requires_grad for v in results]
    except Exception as error:  # whatever it is: both libraries' are compared, type and words
        return "error", type(error), str(error)


def assert_same(options: dict, call: dict, fault: Fault | None = None) -> None:
    theirs, mine = (outcome(library, options, call, fault) for library in (nn, fastrnn))
    kinds = [end[:3] if end[0] == "error" else f"{len(end[1])} tensors" for end in (mine, theirs)]
    assert mine[0] == theirs[0], f"fastrnn: {kinds[0]}, torch.nn: {kinds[1]}"
    if mine[0] == "error":
        assert mine == theirs
        return
    assert mine[2] == theirs[2], "requires_grad of the results"
    assert len(mine[1]) == len(theirs[1])
    for index, (ours, truth) in enumerate(zip(mine[1], theirs[1], strict=True)):
        if ours is None or truth is None:  # torch.nn may leave out what an engine says is zero
            rest = ours if truth is None else truth
            assert rest is None or not rest.any(), f"tensor {index}: only one has a gradient"
            continue
        assert (ours.shape, ours.dtype) == (truth.shape, truth.dtype), f"tensor {index}"
        if not truth.is_floating_point():
            assert torch.equal(ours, truth), f"tensor {index}"
            continue
        wrong, whole = (ours - truth).double().norm().item(), truth.double().norm().item()
        allowed = TOLERANCE[truth.dtype] * whole + FLOOR[truth.dtype] * call["scale"]
        assert wrong <= allowed, f"tensor {index} of {len(mine[1])}: off by {wrong:.3g} of {whole:.3g}"


def check_calls(options: dict, call: dict) -> None:
    assert_same(options, call)


test_calls = quick(given(constructors(), calls())(check_calls))
test_calls_widely = pytest.mark.slow(wide(given(constructors(), calls())(check_calls)))


# --- what torch.nn refuses

CONSTRUCTOR_FAULTS = [
    {"hidden_size": 0},
    {"hidden_size": -1},
    {"hidden_size": 2.5},
    {"hidden_size": None},
    {"hidden_size": "8"},
    {"input_size": -1},
    {"input_size": 2.5},
    {"num_layers": 0},
    {"num_layers": -2},
    {"dropout": -0.1},
    {"dropout": 1.5},
    {"dropout": "half"},
    {"dropout": True, "num_layers": 2},
    {"proj_size": -1},
    {"proj_size": 8, "hidden_size": 8},
    {"proj_size": 9, "hidden_size": 8},
    {"proj_size": 3, "hidden_size": 8},
    {"proj_size": "3", "hidden_size": 8},
    {"nonlinearity": "sigmoid"},
    {"nonlinearity": "relu"},
    {"mode": "LSTM"},
    {"batch_frist": True},
    {"dtype": torch.int64},
    {"dtype": "float32"},
    {"device": "nowhere"},
    {"bias": None},
]


@pytest.mark.parametrize("fault", CONSTRUCTOR_FAULTS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_constructor_refuses_what_torch_refuses(cell, fault):
    options = {"cell": cell, "input_size": 4, "hidden_size": 6, "num_layers": 1, "bidirectional": False}
    plain = {"batch_first": False, "bias": True, "dtype": torch.float64}
    call = dict(form="dense", batch=2, steps=3, hx="none", view="contiguous", x_grad=True, hx_grad=False, frozen="none")  # noqa: C408 (reads as the call it stands for)
    # the construction alone: a call after it would need options that make sense
    ends = []
    for library in (nn, fastrnn):
        try:
            ends.append(repr(construct(library, {**options, **plain, **fault})))
        except Exception as error:  # whatever it is: both libraries' are compared, type and words
            ends.append((type(error), str(error)))
    assert ends[0] == ends[1]
    if isinstance(ends[0], str) and not set(fault) & {"dtype", "device", "nonlinearity", "input_size"}:
        assert_same({**options, **plain, **fault}, {**call, "training": True, "no_grad": False, "scale": 1.0, "seed": 0})


def with_input(change: Callable[[Tensor], object]) -> Fault:
    """Change the input's tensor, inside a PackedSequence too."""

    def fault(options, input, hx):
        if isinstance(input, PackedSequence):
            return PackedSequence(change(input.data), *input[1:]), hx
        return change(input), hx

    return fault


def with_state(which: int, change: Callable[[Tensor], object]) -> Fault:
    """Change hx, or one of the two of an LSTM."""

    def fault(options, input, hx):
        if isinstance(hx, (tuple, list)):
            hx = [*hx[:which], change(hx[which]), *hx[which + 1 :]]
            return input, tuple(hx)
        return input, hx if hx is None else change(hx)

    return fault


CHANGES = {
    "narrower": lambda t: t[..., :-1],
    "wider": lambda t: torch.cat((t, t), -1),
    "one more dimension": lambda t: t[None],
    "one dimension less": lambda t: t[0],
    "flat": lambda t: t.flatten(),
    "scalar": lambda t: t.sum(),
    "more rows": lambda t: torch.cat((t, t), 1) if t.dim() > 1 else t,
    "fewer rows": lambda t: t[:, :-1] if t.dim() > 1 else t,
    "more layers": lambda t: torch.cat((t, t), 0),
    "float32": lambda t: t.float(),
    "float16": lambda t: t.half(),
    "int64": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex128),
    "none": lambda t: None,
    "numpy": lambda t: np.array(t.detach().float()),
    "list": lambda t: t.tolist(),
    "no steps": lambda t: t[:0],
    "no features": lambda t: t[..., :0],
    "sparse": lambda t: t.detach().to_sparse(),
}
FAULTS: dict[str, Fault] = {
    **{f"input {name}": with_input(change) for name, change in CHANGES.items()},
    **{f"state {name}": with_state(0, change) for name, change in CHANGES.items()},
    **{f"cell state {name}": with_state(1, change) for name, change in CHANGES.items()},
    "hx is one tensor": lambda options, input, hx: (input, hx[0] if isinstance(hx, tuple) else hx),
    "hx is a pair": lambda options, input, hx: (input, hx if isinstance(hx, tuple) else (hx, hx)),
    "hx is three": lambda options, input, hx: (input, (*hx, hx[0]) if isinstance(hx, tuple) else hx),
    "hx is empty": lambda options, input, hx: (input, ()),
    "hx is a string": lambda options, input, hx: (input, "zeros"),
}


UNCOUNTED = "more layers", "no steps", "dimension less", "more dimension", "state flat", "state scalar"


def crashes_torch(options: dict, call: dict, fault: str) -> bool:
    """torch.nn does not count the states of a packed LSTM, and reads past the end of them or of its weights."""
    packed = call["form"] in ("packed", "unsorted")
    return options["cell"] == "lstm" and packed and " ".join(fault.split()[-2:]) in UNCOUNTED


def check_refusals(options: dict, call: dict, fault: str) -> None:
    packed = call["form"] in ("packed", "unsorted")
    assume(not crashes_torch(options, call, fault) and not (packed and fault == "input more layers"))
    assert_same({**options, "dtype": torch.float64}, {**call, "batch": call["batch"] or 2}, FAULTS[fault])


faulty = given(constructors(), calls().filter(lambda call: call["scale"] == 1), st.sampled_from(tuple(FAULTS)))
test_refusals_widely = pytest.mark.slow(wide(faulty(check_refusals)))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", ["dense", "unbatched", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_refuses_what_torch_refuses(cell, form, fault):
    """Wrong sizes, dimensions, dtypes and kinds of input and states: torch.nn's exception, or its result."""
    options = dict(cell=cell, input_size=4, hidden_size=6, num_layers=2, bidirectional=True, dtype=torch.float64)  # noqa: C408 (reads as the call it stands for)
    call = dict(form=form, batch=3, steps=4, hx="given", view="contiguous", x_grad=True, hx_grad=True, frozen="none")  # noqa: C408 (reads as the call it stands for)
    call |= {"training": True, "no_grad": False, "scale": 1.0, "seed": 0}
    if crashes_torch(options, call, fault):
        pytest.skip("torch.nn reads past the end of a packed LSTM's states here, and crashes: nothing to compare with")
    if form == "packed" and fault == "input more layers":
        pytest.skip("rows that no step counts: torch.nn's RNN and GRU ignore them, fastrnn refuses")
    for extra in ({"proj_size": 3}, {}) if cell == "lstm" else ({},):
        assert_same({**options, "batch_first": False, "bias": True, **extra}, call, FAULTS[fault])
