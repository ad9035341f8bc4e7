"""Who runs a call: the choice, its reasons, the ways to force it, and that what no engine takes is torch.nn's."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import by_kind
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import autograd, dispatch, functional
from fastrnn.kernels import cpu

MODULES = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]


@pytest.fixture(autouse=True)
def _unforced(monkeypatch):
    monkeypatch.setattr(dispatch, "forced", None)


@pytest.fixture
def engine_calls(monkeypatch) -> list[str]:
    """The cells of the layers that reach the engine, with the short way closed, which asks nobody."""
    calls: list[str] = []
    run_layer = autograd.run_layer

    def counted(inputs, weights, layer, of_cell=False):
        calls.append(layer.cell)
        return run_layer(inputs, weights, layer, of_cell)

    monkeypatch.setattr(autograd, "run_layer", counted)
    monkeypatch.setattr(dispatch, "native", None)
    return calls


def _call(module: nn.Module, x) -> list[Tensor]:
    torch.manual_seed(1)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(module(x)) if isinstance(leaf, Tensor)]


def _twins(name: str, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    ours, theirs = getattr(fastrnn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


class Subclass(Tensor):
    pass


ODD = {
    "no_rows": lambda m: (m, torch.randn(3, 0, 4)),
    "meta": lambda m: (m.to("meta"), torch.randn(3, 2, 4, device="meta")),
    "subclass": lambda m: (m, torch.randn(3, 2, 4).as_subclass(Subclass)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("odd", ODD)
def test_what_no_engine_takes_is_torchs(name, odd, engine_calls):
    ours, theirs = _twins(name, 4, 5, 2)
    (ours, x), (theirs, _) = ODD[odd](ours), ODD[odd](theirs)
    for one, other in zip(_call(ours, x), _call(theirs, x), strict=True):
        assert type(one) is type(other)
        assert one.is_meta or torch.equal(one, other)
    assert not engine_calls


WRONG = {
    "no_steps": lambda m: torch.randn(0, 2, 4),
    "input_dtype": lambda m: torch.randn(3, 2, 4).double(),
    "input_size": lambda m: torch.randn(3, 2, 5),
    "integers": lambda m: torch.zeros(3, 2, 4, dtype=torch.int64),
    "complex": lambda m: torch.zeros(3, 2, 4, dtype=torch.complex64),
    "dimensions": lambda m: torch.randn(3, 2, 2, 4),
    "device": lambda m: torch.randn(3, 2, 4, device="meta"),
    "sparse": lambda m: torch.randn(3, 2, 4).to_sparse(),
    "weight_shape": lambda m: _with(m, "weight_hh_l0", torch.ones(7, 5)),
    "weight_dtype": lambda m: _with(m, "weight_ih_l1", m.weight_ih_l1.detach().double()),
    "bias_shape": lambda m: _with(m, "bias_hh_l0", torch.ones(3)),
}


def _with(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """An input for the module, one parameter of which is another from now on."""
    setattr(module, name, nn.Parameter(value))
    return torch.randn(3, 2, 4)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("wrong", WRONG)
def test_errors_are_torchs(name, wrong, engine_calls):
    ours, theirs = _twins(name, 4, 5, 2)
    errors = []
    for module in (ours, theirs):
        x = WRONG[wrong](module)
        try:
            module(x)
            errors.append(None)
        except Exception as error:
            errors.append((type(error), str(error)))
    if name == "LSTM" and wrong in ("weight_shape", "bias_shape"):
        # torch hands such weights to oneDNN, which reads past their ends: a shape it happens to notice is all it refuses
        error, words = errors[0]
        assert error is RuntimeError and re.match(r"LSTM: (w_hh: expected 4 \* H rows|b_hh: expected \(20,\))", words)
    else:
        assert errors[0] == errors[1]
    assert not engine_calls


@pytest.mark.parametrize("name", MODULES)
def test_the_engine_takes_the_usual(name, engine_calls):
    ours, theirs = _twins(name, 4, 5, 2, dropout=0.5, bidirectional=True, batch_first=True)
    inputs = [
        torch.randn(2, 3, 4),
        torch.randn(3, 4),
        torch.randn(4, 3, 2).permute(2, 1, 0),
        torch.randn(1, 1, 4).expand(2, 3, 4),
        pack_sequence([torch.randn(2, 4), torch.randn(4, 4)], enforce_sorted=False),
    ]
    for x in inputs:
        engine_calls.clear()
        for one, other in zip(_call(ours, x), _call(theirs, x), strict=True):
            torch.testing.assert_close(one, other, msg=lambda text, x=x: f"{x}: {text}")
        assert len(engine_calls) == 2


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_engine_takes_single_steps(name, bias, engine_calls):
    ours, theirs = _twins(name, 4, 5, bias=bias)
    for x in (torch.randn(2, 4), torch.randn(4), torch.randn(4, 2).T):
        state = torch.randn(5) if x.dim() == 1 else torch.randn(2, 5)
        hx = (state, state.cos()) if name == "LSTMCell" else state
        for args in ((x,), (x, hx)):
            found, expected = (torch.utils._pytree.tree_leaves(module(*args)) for module in (ours, theirs))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)
    assert len(engine_calls) == 6


@pytest.mark.parametrize("name", CELLS)
def test_wrong_single_steps_are_torchs(name, engine_calls):
    ours, theirs = _twins(name, 4, 5)
    pair = (lambda h: (h, h)) if name == "LSTMCell" else (lambda h: h)
    calls = [
        (torch.randn(2, 3),),
        (torch.randn(2, 4), pair(torch.randn(3, 5))),
        (torch.randn(2, 4), pair(torch.randn(2, 6))),
        (torch.randn(2, 4).double(),),
        (torch.randn(2, 4), pair(torch.randn(2, 5).double())),
        (torch.randn(1, 2, 4),),
    ]
    for args in calls:
        errors = []
        for module in (ours, theirs):
            with pytest.raises((RuntimeError, ValueError)) as raised:
                module(*args)
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]
    assert not engine_calls


@pytest.mark.parametrize("name", MODULES)
def test_float64_under_autocast_is_torchs(name, engine_calls):
    ours, theirs = _twins(name, 4, 5, dtype=torch.float64)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(_call(ours, x), _call(theirs, x), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    assert not engine_calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", MODULES)
def test_trace_holds_torchs_operators(name, engine_calls):
    ours, _ = _twins(name, 4, 5)
    x = torch.randn(3, 2, 4)
    traced = torch.jit.trace(ours, x, check_trace=False)
    assert not engine_calls
    assert "fastrnn::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x)[0], ours(x)[0])


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights:UserWarning")  # of torch.nn's modules too
@pytest.mark.parametrize("onnx", [False, True])
def test_export_holds_our_operator(onnx, monkeypatch):
    """torch.export keeps the layer whole; an exporter to ONNX has to see torch's operators."""
    torch._dynamo.trace_rules.get_torch_obj_rule_map()  # Dynamo makes its tables once: not with ours
    torch._dynamo.variables.torch.tracing_state_functions()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: onnx)
    program = torch.export.export(fastrnn.GRU(4, 5).eval(), (torch.randn(3, 2, 4),))
    assert any("fastrnn.layer_forward" in str(node.target) for node in program.graph.nodes) != onnx


@pytest.mark.parametrize("function", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("packed", [False, True])
def test_functions_take_torchs_arguments(function, packed):
    lstm = function == "lstm"
    module = nn.LSTM(4, 5, 2) if lstm else nn.GRU(4, 5, 2) if function == "gru" else nn.RNN(4, 5, 2)
    h0 = torch.randn(2, 3, 5)
    hx = [h0, h0.cos()] if lstm else h0
    rest = module._flat_weights, True, 2, 0.0, False, False
    dense = torch.randn(2, 3, 4), hx, *rest, False
    args = (torch.randn(5, 4), torch.tensor([3, 2]), hx, *rest) if packed else dense
    found, expected = getattr(functional, function)(*args), getattr(torch, function)(*args)
    assert type(found) is type(expected) is tuple
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(TypeError):
        getattr(functional, function)(*args[:-2])


def test_public_layer(make_layer, plain_layer):
    arguments = make_layer("lstm", directions=2, project=True, batch_first=True, reverse=True)
    expected, arguments = plain_layer(**arguments), by_kind(arguments)
    for one, other in zip(functional.layer(**arguments), expected, strict=True):
        torch.testing.assert_close(one, other)
    half = make_layer("gru", dtype=torch.bfloat16)
    assert functional.layer(**by_kind(half))[0].dtype == torch.bfloat16
    wrong = {
        "cell": "gru2",
        "x": torch.randn(2, 3, dtype=torch.float64),
        "h0": torch.randn(2, 3, 3, dtype=torch.float64),
        "c0": None,
        "w_ih": [],
        "w_hh": arguments["w_hh"][:1],
        "b_ih": [],
        "b_hh": [torch.randn(3, dtype=torch.float64)] * 2,
        "w_hr": [arguments["w_hr"][0].T] * 2,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            functional.layer(**{**arguments, name: value})


def test_explain():
    module = fastrnn.LSTM(4, 5, 2, bidirectional=True)
    text = str(fastrnn.explain(module, torch.randn(3, 2, 4)))
    assert text.startswith("engine: cpu\n  threads: ") and "\n  layer 0: " in text
    assert "not reference: " in text
    assert "not torch: " in text
    mixed = fastrnn.explain(module, torch.randn(3, 2, 4).half())
    assert mixed.engine == "torch"
    assert "float16" in mixed.declined["cpu"]
    packed = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    assert len(fastrnn.explain(module, packed).schedule) == 2
    assert fastrnn.explain(fastrnn.GRUCell(4, 5), torch.randn(2, 4), torch.randn(2, 5)).engine == "cpu"
    assert fastrnn.explain(nn.GRU(4, 5, batch_first=True), torch.randn(3, 4)).engine == "cpu"
    with torch.autocast("cpu", torch.bfloat16):
        assert fastrnn.explain(module, torch.randn(3, 2, 4)).engine == "cpu"
        assert "autocast" in fastrnn.explain(module.double(), torch.randn(3, 2, 4).double()).declined["cpu"]


def test_explain_refuses():
    with pytest.raises(TypeError, match="module: expected a recurrent layer or cell, got Linear"):
        fastrnn.explain(nn.Linear(4, 5), torch.randn(3, 4))
    for module, x in ((fastrnn.GRU(4, 5), torch.randn(4)), (fastrnn.GRUCell(4, 5), torch.randn(1, 2, 4))):
        with pytest.raises(ValueError, match=f"input: expected . or . dimensions, got {x.dim()}"):
            fastrnn.explain(module, x)


def test_explain_reckons_with_the_bytes_of_bfloat16(monkeypatch):
    """A step of few rows reads panels of half the size."""
    sizes, schedule = [], cpu.plan.schedule
    monkeypatch.setattr(cpu.plan, "schedule", lambda *given: sizes.append(given[-2][0]) or schedule(*given))
    with torch.no_grad():
        for rows in (16, 17):
            for module in (fastrnn.LSTM(4, 6), fastrnn.compress(fastrnn.LSTM(4, 6)), fastrnn.compress(fastrnn.LSTM(4, 7))):
                fastrnn.explain(module, torch.randn(3, rows, 4))
    target = cpu.load()[1].target
    whole = target.vector_bytes
    assert sizes == [whole, whole // 2, whole, whole, whole // 2 if target.tiles else whole, whole]


def test_forced(monkeypatch, engine_calls):
    module, x = fastrnn.GRU(4, 5), torch.randn(3, 2, 4)
    expected = nn.GRU.forward(module, x)[0]
    for name in ("torch", "reference"):
        monkeypatch.setattr(dispatch, "forced", name)
        monkeypatch.setattr(dispatch, "native", None)  # as where it is forced from the start
        assert fastrnn.explain(module, x).engine == name
        torch.testing.assert_close(module(x)[0], expected)
        assert not engine_calls
    monkeypatch.setattr(dispatch, "forced", "cpu")
    with pytest.raises(RuntimeError, match=r"FASTRNN_BACKEND=cpu: .*dtypes differ"):
        module(x.bfloat16())
    monkeypatch.setattr(dispatch, "forced", "tpu")
    with pytest.raises(
        RuntimeError, match="FASTRNN_BACKEND=tpu: no such engine, expected one of cpu, triton, reference, torch"
    ):
        module(x)


def test_without_the_engine(monkeypatch):
    """An engine that cannot load says why, and its calls are torch.nn's."""

    def load():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(dispatch.cpu, "load", load)
    monkeypatch.setattr(dispatch, "unavailable", dispatch.unavailable)
    with pytest.warns(RuntimeWarning, match="no compiler"):
        dispatch.load()
    module, x = fastrnn.GRU(4, 5), torch.randn(3, 2, 4)
    assert fastrnn.explain(module, x).engine == "torch"
    assert fastrnn.explain(module, x).declined["cpu"] == "no compiler"
    torch.testing.assert_close(module(x)[0], nn.GRU.forward(module, x)[0])


def test_fastrnn_backend_is_read():
    code = "from fastrnn import dispatch; print(dispatch.forced)"
    environment = {**os.environ, "FASTRNN_BACKEND": "reference"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "reference\n"
