"""Layer norm: what is derived of a cell with reductions over a row, and what layers with it have. See test_features.py too."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import assert_derivative, numbers, python, relative, threads
from torch import Tensor

import fastrnn
from fastrnn import cells, dispatch, features
from fastrnn.kernels import gradients, reference
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.derive import stages
from fastrnn.kernels.layer import Inputs, Layer, Needs, Outer
from fastrnn.kernels.symbols import REDUCTIONS

MODULES = {
    "rnn": lambda **more: fastrnn.RNN(4, 6, layer_norm=True, **more),
    "lstm": lambda **more: fastrnn.LSTM(4, 6, layer_norm=True, **more),
    "gru": lambda **more: fastrnn.GRU(4, 6, layer_norm=True, **more),
    "peephole": lambda **more: fastrnn.recurrent(cells.peephole_lstm)(4, 6, layer_norm=True, **more),
    "indrnn": lambda **more: fastrnn.recurrent(cells.indrnn)(4, 6, layer_norm=True, **more),
    "slstm": lambda **more: fastrnn.recurrent(cells.slstm)(4, 6, layer_norm=True, **more),
    "zoned": lambda **more: fastrnn.LSTM(4, 6, layer_norm=True, cell_clip=0.5, zoneout=(0.2, 0.3), **more),
}


@pytest.fixture(params=MODULES)
def cell(request):
    return CELLS[features.cell_name(MODULES[request.param]())]


def test_gradients_are_those_of_autograd(cell):
    assert_derivative(cell, rtol=1e-12, atol=1e-13)


def test_stages_in_turn_are_the_whole(cell):
    """Each stage has only what was there before it, and reductions read what is in memory."""
    derived = cell.derived
    for whole, parts, resident in (
        (derived.forward, derived.forward_stages, derived.kept),
        (derived.backward, derived.backward_stages, (*derived.kept, *derived.after)),
    ):
        given: dict[str, Tensor] = {}
        truth = dict(zip((n for n, _ in whole.results), whole.bind(reference.NAMES)(*numbers(whole, given)), strict=True))
        known, readable = dict(given), {node.index: name for name, node in resident}
        for stage in parts:
            waits = False
            for name, node in stage.reductions:
                operands = [readable[each.index] for each in node.inputs]
                waits = waits or any(operand.startswith("carried_") for operand in operands)
                constants = [each for each in node.operands if isinstance(each, float)]
                known[name] = reference.of_tensors(node.operation, *(known[each] for each in operands), *constants)
            assert waits == stage.waits
            found = stage.code.bind(reference.NAMES)(*(known[name] for name, _ in stage.code.parameters))
            known |= dict(zip((name for name, _ in stage.code.results), found, strict=True))
            readable |= {node.index: name for name, node in stage.code.results if name.startswith("carried_")}
            assert not any(f"{operation}(" in stage.code.source() for operation in REDUCTIONS)
        for name, _ in parts[-1].code.results:
            torch.testing.assert_close(known[name].expand(5, 7), truth[name].expand(5, 7), rtol=1e-13, atol=1e-14)


def test_an_lstm_reduces_as_seldom_as_its_equations_allow():
    derived = CELLS[features.cell_name(MODULES["lstm"]())].derived
    found = [[[node.operation for _, node in stage.reductions] for stage in parts] for parts in (
        derived.forward_stages, derived.backward_stages
    )]  # fmt: skip
    both = ["row_mean", "row_rstd"]
    assert found == [[both * 2, both], [both * 3, ["row_mean"] * 2, ["row_mean"] * 4]]
    assert [len(stage.code.results) for stage in derived.forward_stages] == [2, 2]  # c and the output gate go on


def test_a_cell_without_reductions_has_one_stage():
    code = CELLS["lstm"].derived.forward
    (stage,) = stages(code, set())
    assert stage.code.results == code.results and not (stage.reductions or CELLS["lstm"].reduces)


@pytest.mark.parametrize(("hidden_size", "num_heads"), [(6, 2), (130, 1)])
def test_a_cell_without_a_recurrent_matrix(hidden_size, num_heads, monkeypatch):
    """The engines take zeros in its place, in heads of which the layer decides how many there are."""
    monkeypatch.setattr(dispatch, "forced", "reference")
    layer = fastrnn.recurrent(cells.indrnn)(4, hidden_size, layer_norm=True, num_heads=num_heads, dtype=torch.float64)
    x, h = torch.randn(3, 2, 4, dtype=torch.float64), torch.zeros(2, hidden_size, dtype=torch.float64)
    own, gain, bias = (getattr(layer, f"{name}_l0") for name in ("weight_u", "norm_ih", "bias_ih"))
    for x_t, y_t in zip(x, layer(x)[0], strict=True):
        product = torch.nn.functional.layer_norm(x_t @ layer.weight_ih_l0.T, (hidden_size,))
        h = torch.relu(product * gain + bias + own * h)
        torch.testing.assert_close(y_t, h)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_derivatives_of_a_layer_are_those_of_the_loop(name):
    """gradients.py, which goes through the reference, for all inputs and weights, and twice."""
    module = MODULES[name](dtype=torch.float64, bidirectional=True)
    layer = Layer(features.cell_name(module), 2, True)
    weights = [weight.detach().requires_grad_() for weight in features.weights_of(module)]
    x, h0 = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(2, 2, 6, dtype=torch.float64)
    given = [each.requires_grad_() for each in (x, h0, *([h0.detach() + 1] if name == "lstm" else []))]
    c0 = given[2] if name == "lstm" else None
    inputs = Inputs(x, None, h0, c0, torch.rand(3, 2) < 0.3)
    y, h_n, c_n, saved = reference.layer_forward(inputs, weights, layer, True)
    outer = Outer(
        *(torch.randn_like(each).requires_grad_() for each in (y, h_n)), torch.randn_like(c_n) if c0 is not None else None
    )
    results = [each for each in (y, h_n, c_n) if each.numel()]
    grads = [each for each in outer if each is not None]
    truth = torch.autograd.grad(results, [*given, *weights], grads, create_graph=True)
    dx, dh0, dc0, dw = gradients.layer_backward(outer, inputs, weights, y, saved, layer, Needs())
    own = [dx, dh0, *([dc0] if c0 is not None else []), *dw]
    for one, other in zip(own, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    v = [torch.randn_like(each) for each in truth]
    of_v = (v[0], v[1], v[2] if c0 is not None else None, v[len(given) :])
    leaves = [outer.dy, outer.dh_n, *given, *weights]
    second = torch.autograd.grad(truth, leaves, v)
    with torch.no_grad():
        changed, of_inputs, of_weights = gradients.layer_double_backward(of_v, outer, inputs, weights, y, saved, layer, Needs())
    states = [of_inputs.c0] if c0 is not None else []
    for one, other in zip((changed.dy, changed.dh_n, of_inputs.x, of_inputs.h0, *states, *of_weights), second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_constant_row_is_a_number_and_so_is_its_gradient(name, dtype, engine, monkeypatch):
    """Products of zeros have no variance; gains and states go on, and shifts alone are left."""
    if engine == "cpu" and (name != "lstm" or dtype is torch.float64):
        pytest.skip("one cell's kernels are enough, and take their time to compile")
    monkeypatch.setattr(dispatch, "forced", engine)
    module = MODULES[name](dtype=dtype)
    x = torch.zeros(3, 2, 4, dtype=dtype, requires_grad=True)
    y, _ = module(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    assert module.bias_ih_l0.grad.any() and not module.norm_ih_l0.grad.any()


TEAMS = [
    {"steps": 20, "batch": 1, "hidden": 400},  # threads share units
    {"steps": 12, "batch": 7, "hidden": 60},  # and rows
    {"steps": 20, "batch": 1, "hidden": 400, "num_heads": 2},  # each has a head, and meets all the same
    {"steps": 15, "batch": 1, "hidden": 400, "proj_size": 290},
    {"steps": 270, "batch": 2, "hidden": 33, "bidirectional": True},  # in two blocks of time
    {"steps": 1, "batch": 5, "hidden": 33},
    {"steps": 9, "batch": 6, "hidden": 50, "marks": True, "bidirectional": True},
]


@pytest.mark.parametrize("case", TEAMS, ids=lambda case: " ".join(f"{key}={value}" for key, value in case.items()))
def test_any_team_gives_the_same_bits_and_the_loops_numbers(case, poison, monkeypatch):
    """In float32, against the reference in float64: outputs, states, and each gradient by name."""
    own = dict(case)
    steps, batch, hidden, marks = own.pop("steps"), own.pop("batch"), own.pop("hidden"), own.pop("marks", False)
    module = fastrnn.LSTM(4, hidden, layer_norm=True, **own)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("norm"):
                parameter.uniform_(0.5, 1.5)
    x = torch.randn(steps, batch, 4)
    resets, lengths = torch.rand(steps, batch) < 0.3, torch.randint(0, steps + 1, (batch,))

    def call(module, x) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        draw = torch.Generator().manual_seed(1)
        y, (h, c) = module(x, resets=resets, lengths=lengths) if marks else module(x)
        loss = sum((each * torch.randn(each.shape, generator=draw).to(each)).sum() for each in (y, h, c))
        names, leaves = zip(*module.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, [x, *leaves])
        return {"y": y.detach(), "h": h.detach(), "c": c.detach()} | dict(zip(("dx", *names), grads, strict=True))

    with threads(1):
        assert fastrnn.explain(module, x).engine == "cpu"
        found = call(module, x)
    for count in (2, 3, 4):
        with threads(count):
            (schedule,) = fastrnn.explain(module, x).schedule
            assert ("x units" in schedule) == (hidden == 400), schedule
            for name, value in call(module, x).items():
                assert torch.equal(value, found[name]), f"{name}, {count} threads"
    monkeypatch.setattr(dispatch, "forced", "reference")
    for name, truth in call(copy.deepcopy(module).double(), x.double()).items():
        assert relative(found[name], truth) < 3e-6, name


def test_one_thread_fits_the_workspace_of_any_team():
    code = "import test_workspace, fastrnn; from fastrnn import features; "
    code += "name = features.cell_name(fastrnn.LSTM(2, 2, layer_norm=True)); "
    for which in ("forward", "backward"):
        python(code + f"test_workspace.check(name, {which!r})")


def test_a_step_is_a_sequence_of_one():
    module = fastrnn.LSTM(4, 33, 2, layer_norm=True).eval()
    x = torch.randn(3, 2, 4)
    y, state = module(x)
    stepped, last = [], None
    for row in x:
        one, last = module.step(row, last)
        stepped.append(one)
    torch.testing.assert_close(torch.stack(stepped), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, state, rtol=1e-5, atol=1e-6)
    assert type(fastrnn.freeze(copy.deepcopy(module))(x)[0]) is Tensor


def test_half_precision_compiled_and_second_derivatives(monkeypatch):
    module = fastrnn.LSTM(4, 32, layer_norm=True)
    x = torch.randn(6, 5, 4)
    half = copy.deepcopy(module).bfloat16()
    y, _ = half(x.bfloat16())
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), module(x)[0], rtol=0.1, atol=0.05)  # eight bits a number
    y.float().sum().backward()
    assert half.norm_ih_l0.grad.dtype is torch.bfloat16 and half.norm_ih_l0.grad.any()
    compiled, found = torch.compile(module, fullgraph=True, backend="aot_eager"), []
    for function in (module, compiled):
        found.append(torch.autograd.grad(function(x)[0].square().sum(), list(module.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    seconds = []
    for engine in ("cpu", "reference"):
        monkeypatch.setattr(dispatch, "forced", engine)
        given = x.clone().requires_grad_()
        first = torch.autograd.grad(module(given)[0].pow(3).sum(), given, create_graph=True)[0]
        seconds.append(torch.autograd.grad(first.square().sum(), list(module.parameters())))
    for one, other in zip(*seconds, strict=True):
        assert relative(one, other) < 1e-5


def test_parameters():
    module = fastrnn.LSTM(4, 6, 2, bidirectional=True, layer_norm=True, proj_size=3)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters() if name.startswith("norm")}
    suffixes = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    kinds = {"norm_ih": (24,), "norm_hh": (24,), "norm_c": (6,), "norm_c_bias": (6,)}
    assert shapes == {kind + suffix: shape for suffix in suffixes for kind, shape in kinds.items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    module.reset_parameters()
    assert (module.norm_ih_l1 == 1).all() and (module.norm_c_l0_reverse == 1).all() and not module.norm_c_bias_l1.any()
    assert module.weight_ih_l0.abs().max() <= 6**-0.5
    with pytest.raises(TypeError, match="layer_norm should be a bool, got 1"):
        fastrnn.GRU(4, 6, layer_norm=1)
    with pytest.raises(AttributeError, match="layer_norm: only the constructor sets it"):
        module.layer_norm = False
