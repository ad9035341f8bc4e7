"""Modules over the GPU engine without a GPU: on CPU tensors in Triton's interpreter, from the call down to the kernels."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import triton_layers
from contract import relative
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import cells, dispatch
from fastrnn.kernels import gpu
from fastrnn.kernels.gpu.plan import COOPERATIVE, choose

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def _as_on_a_gpu(function: Callable, *args):
    """Call a function where CPU tensors are taken for a GPU's, in a process that interprets kernels."""
    off = dict.fromkeys(COOPERATIVE, "programs are interpreted one after another")
    target = replace(triton_layers.H100, off=tuple(off))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "HERE", "is_cpu")
        patch.setattr(gpu, "why_not", lambda device: None)
        patch.setattr(gpu, "device_of", lambda device: target)
        patch.setattr(gpu, "off", lambda device: off)
        patch.setattr("fastrnn.kernels.gpu.layer.device_of", lambda device: target)
        patch.setattr(dispatch, "native", None)
        patch.setattr(dispatch, "forced", "triton")
        patch.setattr(torch.backends.cudnn, "version", lambda: 91300)
        return function(*args)


@pytest.fixture
def gpu_process(interpreted) -> Callable:
    return lambda function, *args: interpreted(_as_on_a_gpu, function, *args)


@contextlib.contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast("cuda", dtype), which switches itself off where there is no GPU."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def _results(module, x: torch.Tensor, scale: float, mixed: torch.dtype | None = None, **more) -> dict[str, torch.Tensor]:
    """Of a call and its gradients, by name. more: of the call; `packed`: pack x and resets, with these lengths."""
    leaf = x.clone().requires_grad_()
    given, packed = leaf, more.pop("packed", None)
    if packed is not None:
        given = pack_padded_sequence(leaf, packed, enforce_sorted=False)
        more["resets"] = pack_padded_sequence(more["resets"], packed, enforce_sorted=False)
    with _autocast(mixed) if mixed else contextlib.nullcontext():
        y, *states = module(given, **more)
    y = y if packed is None else y.data
    states = [each for state in states for each in (state if isinstance(state, tuple) else (state,))]
    loss = y.double().square().sum() + sum(each.double().sum() for each in states)
    (scale * loss).backward()
    found = {"y": y.detach(), "dx": leaf.grad, **{f"state {k}": each.detach() for k, each in enumerate(states)}}
    return found | {f"d{name}": weight.grad / scale for name, weight in module.named_parameters()}


def _errors(cell: str, sizes: dict, mixed: torch.dtype | None, dtype: torch.dtype) -> tuple[dict, dict]:
    """Dtypes of results and gradients by name, and their relative errors against torch.nn in float64."""
    torch.manual_seed(0)
    ours, stock = (getattr(library, cell)(5, 16, **sizes) for library in (fastrnn, torch.nn))
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 5)
    found = _results(ours.to(dtype), x.to(dtype), 64.0, mixed)
    expected = _results(stock.double(), x.double(), 64.0)
    scaled = {name: value / 64 if name == "dx" else value for name, value in found.items()}
    expected["dx"] /= 64
    errors = {name: relative(value.double(), expected[name]) for name, value in scaled.items()}
    return {name: value.dtype for name, value in found.items()}, errors


@pytest.mark.parametrize("mixed", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_autocast(cell, mixed, gpu_process):
    """torch.nn's layers compute in float16, whatever autocast's dtype is; gradients have the dtypes of what they belong to."""
    dtypes, errors = gpu_process(_errors, cell, {"num_layers": 2}, mixed, torch.float32)
    for name, dtype in dtypes.items():
        assert dtype is (torch.float16 if name == "y" or name.startswith("state") else torch.float32), name
    assert {name: error for name, error in errors.items() if not 1e-5 < error < 1e-2} == {}


def _dtypes_of_a_step(cell: str, mixed: torch.dtype) -> list[torch.dtype]:
    with _autocast(mixed), torch.no_grad():
        state = getattr(fastrnn, cell)(5, 16)(torch.randn(3, 5))
    return [each.dtype for each in (state if isinstance(state, tuple) else (state,))]


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_under_autocast(cell, gpu_process):
    """torch casts a cell's step to autocast's dtype."""
    assert set(gpu_process(_dtypes_of_a_step, cell, torch.bfloat16)) == {torch.bfloat16}


def _why_not(version: int, enabled: bool, dtype: torch.dtype) -> str | None:
    module = fastrnn.LSTM(5, 16)
    before = torch.backends.cudnn.version, torch.backends.cudnn.enabled
    torch.backends.cudnn.version = lambda: version
    torch._C._set_cudnn_enabled(enabled)
    try:
        with _autocast(torch.bfloat16):
            return dispatch.why_not_triton(torch.zeros(3, 2, 5, dtype=dtype), None, (), module._flat_weights)
    finally:
        torch.backends.cudnn.version = before[0]
        torch._C._set_cudnn_enabled(before[1])


def test_where_autocast_is_torchs(gpu_process):
    """Its results have other dtypes there."""
    assert gpu_process(_why_not, 91300, True, torch.bfloat16) is None
    assert gpu_process(_why_not, 91200, True, torch.float32) is None
    assert "from 9.13 on" in gpu_process(_why_not, 91200, True, torch.bfloat16)
    assert gpu_process(_why_not, 91300, False, torch.float32) == "autocast without cuDNN"
    assert "float64" in gpu_process(_why_not, 91300, True, torch.float64)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_float64(cell, gpu_process):
    dtypes, errors = gpu_process(_errors, cell, {"bidirectional": True}, None, torch.float64)
    assert set(dtypes.values()) == {torch.float64}
    assert {name: error for name, error in errors.items() if not error < 1e-12} == {}


@pytest.mark.parametrize("sizes", [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_float32(cell, sizes, gpu_process):
    errors = gpu_process(_errors, cell, sizes, None, torch.float32)[1]
    assert {name: error for name, error in errors.items() if not error < 2e-6} == {}


FORMS = {
    "dense": {"lengths": torch.tensor([3, 5, 0, 1])},
    "batch first": {"lengths": torch.tensor([5, 2, 3, 0])},
    "packed": {"packed": torch.tensor([5, 2, 3, 1])},
    "every state": {"lengths": torch.tensor([3, 5, 0, 1]), "all_states": True},
}


def _marked_errors(cell: str, form: str, dtype: torch.dtype, mixed: torch.dtype | None = None) -> tuple[set, dict]:
    """Dtypes of results, and relative errors by name, of two layers with resets and lengths against the reference."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "bidirectional": True, "batch_first": form == "batch first"}
    own = getattr(fastrnn, cell, None) or fastrnn.recurrent(getattr(fastrnn.cells, cell))
    truth = own(5, 16, num_heads=2 if form == "dense" else 1, dtype=torch.float64, **sizes)
    ours, x = copy.deepcopy(truth).to(dtype), torch.randn(5, 4, 5, dtype=torch.float64)
    marks = {"resets": torch.rand(5, 4) < 0.4, **FORMS[form]}
    if sizes["batch_first"]:
        x, marks["resets"] = x.transpose(0, 1), marks["resets"].T
    with pytest.MonkeyPatch.context() as patch:
        run, started = gpu.layer_forward, []
        patch.setattr(gpu, "layer_forward", lambda *args: started.append(args) or run(*args))
        found = _results(ours, x.to(dtype), 1.0, mixed, **marks)
        assert len(started) == 2, "the engine's operator did not run"
        patch.setattr(dispatch, "forced", "reference")
        expected = _results(truth, x, 1.0, **marks)
    errors = {name: relative(found[name].double(), right) for name, right in expected.items()}
    return {value.dtype for name, value in found.items() if name == "y" or name.startswith("state")}, errors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "peephole_lstm"])
def test_resets_and_lengths(cell, form, gpu_process):
    """Of torch.nn's cells and of others, which have weights of their own."""
    dtypes, errors = gpu_process(_marked_errors, cell, form, torch.float32)
    assert dtypes == {torch.float32}
    assert {name: error for name, error in errors.items() if not error < 2e-6} == {}


@pytest.mark.parametrize("cell", ["LSTM", "peephole_lstm"])
def test_resets_and_lengths_in_float64(cell, gpu_process):
    dtypes, errors = gpu_process(_marked_errors, cell, "dense", torch.float64)
    assert dtypes == {torch.float64}
    assert {name: error for name, error in errors.items() if not error < 1e-12} == {}


@pytest.mark.parametrize("cell", ["LSTM", "peephole_lstm"])
def test_every_state_under_autocast(cell, gpu_process):
    dtypes, errors = gpu_process(_marked_errors, cell, "every state", torch.float32, torch.bfloat16)
    assert dtypes == {torch.float16}
    assert {name: error for name, error in errors.items() if not 1e-5 < error < 1e-2} == {}


def _gradients_in_memory_of_their_own() -> bool:
    module = fastrnn.RNN(5, 16).double()
    module(torch.randn(2, 3, 5).double())[0].sum().backward()
    places = [weight.grad.data_ptr() for weight in module.parameters()]
    return len(set(places)) == len(places)


def test_no_two_gradients_share_memory(gpu_process):
    """autograd adds to them in place."""
    assert gpu_process(_gradients_in_memory_of_their_own)


def _errors_of_own(resets: bool, mixed: torch.dtype | None) -> tuple[set, dict]:
    """Dtypes of what a layer of a cell of one's own returns, and relative errors of that and of gradients against float64."""
    torch.manual_seed(0)
    ours = fastrnn.recurrent(cells.peephole_lstm)(5, 16, num_heads=2, bidirectional=True)
    assert fastrnn.explain(ours, torch.randn(4, 3, 5)).engine == "triton"
    marks = {"resets": torch.rand(4, 3) < 0.3, "lengths": torch.tensor([4, 2, 3])} if resets else {}
    x = torch.randn(4, 3, 5)
    found, expected = (
        _results(module, each, 64.0, kind, **marks)
        for module, each, kind in ((ours, x, mixed), (copy.deepcopy(ours).double(), x.double(), None))
    )
    dtypes = {value.dtype for name, value in found.items() if not name.startswith("d")}
    return dtypes, {name: relative(value.double(), expected[name]) for name, value in found.items()}


@pytest.mark.parametrize("resets", [False, True])
def test_cells_of_ones_own(resets, gpu_process):
    """With heads, and with every keyword of a call."""
    dtypes, errors = gpu_process(_errors_of_own, resets, None)
    assert dtypes == {torch.float32}
    assert {name: error for name, error in errors.items() if not error < 2e-6} == {}


def test_cells_of_ones_own_under_autocast(gpu_process):
    dtypes, errors = gpu_process(_errors_of_own, False, torch.float16)
    assert dtypes == {torch.float16}
    assert {name: error for name, error in errors.items() if not 1e-5 < error < 1e-2} == {}


# --- layers at once


@contextlib.contextmanager
def at_once(count: int = 2) -> Iterator[list[int]]:
    """Have the lowest layers of a stack run at once; how many do is noted."""
    from fastrnn.kernels.gpu import layer as engine

    started: list[int] = []
    run = engine.layers_forward

    def counted(x, batch_sizes, h0, *given):
        started.append(len(h0))
        return run(x, batch_sizes, h0, *given)

    def chosen(device, sizes, forward):
        if sizes.layers == 1:
            return choose(device, sizes, forward)
        return choose(triton_layers.H100, replace(sizes, T=9, bytes_=2), forward)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "layers_at_once", lambda *given: (count, *(1,) * (given[-2] - count)))
        patch.setattr(engine, "layers_forward", counted)
        patch.setattr(engine, "choose", chosen)
        yield started


def _errors_at_once(cell: str, sizes: dict, mixed: torch.dtype | None) -> tuple[dict, dict, list[int]]:
    with at_once() as started:
        return *_errors(cell, sizes, mixed, torch.float32), started


@pytest.mark.parametrize("sizes", [{"num_layers": 2, "batch_first": True}, {"num_layers": 3, "bias": False}], ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_layers_at_once(cell, sizes, gpu_process):
    """Results and every gradient; of three layers the highest runs alone."""
    _, errors, started = gpu_process(_errors_at_once, cell, sizes, None)
    assert started == [2] and {name: error for name, error in errors.items() if not error < 2e-6} == {}


def test_layers_at_once_under_autocast(gpu_process):
    dtypes, errors, started = gpu_process(_errors_at_once, "LSTM", {"num_layers": 2}, torch.bfloat16)
    assert started == [2] and {dtypes["y"], dtypes["dx"], dtypes["dweight_hh_l1"]} == {torch.float16, torch.float32}
    assert {name: error for name, error in errors.items() if not 1e-5 < error < 1e-2} == {}


def _derivatives_at_once(cell: str) -> tuple[dict[str, float], list[int]]:
    """Relative errors of second derivatives, and of gradients that are mapped over, against torch.nn in float64."""
    torch.manual_seed(0)
    ours, stock = (getattr(library, cell)(5, 16, 2) for library in (fastrnn, torch.nn))
    stock.load_state_dict(ours.state_dict())
    x, found = torch.randn(4, 3, 5), []
    with at_once() as started:
        for module, given in ((ours, x), (stock.double(), x.double())):
            given = given.clone().requires_grad_()
            y, *_ = module(given)
            wanted = given, *module.parameters()
            firsts = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
            seconds = torch.autograd.grad(sum(first.square().sum() for first in firsts), wanted)
            y, state = module(given)
            both = torch.stack([y, 2 * y]).detach()
            mapped = torch.autograd.grad(y, wanted, both, retain_graph=True, is_grads_batched=True)
            last = state[1] if cell == "LSTM" else state
            partly = torch.autograd.grad(last[0].sum(), (given, module.weight_hh_l0))  # nothing of y, nothing of layer 1
            found.append({f"{k} {name}": each for k, of_kind in enumerate((firsts, seconds, mapped, partly))
                          for name, each in enumerate(of_kind)})  # fmt: skip
    ours, theirs = found
    return {name: relative(ours[name].detach().double(), theirs[name].detach()) for name in theirs}, started


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_derivatives_of_layers_at_once(cell, gpu_process):
    errors, started = gpu_process(_derivatives_at_once, cell)
    assert started == [2, 2] and {name: error for name, error in errors.items() if not error < 1e-5} == {}


def _those_that_run_alone() -> dict[str, list[int]]:
    """What runs at once where somebody looks at each layer, or asks for what a stack has not."""
    found, x = {}, torch.randn(4, 3, 5)
    calls = {
        "evaluation": lambda: fastrnn.LSTM(5, 16, 2, dropout=0.5).eval()(x),
        "dropout": lambda: fastrnn.LSTM(5, 16, 2, dropout=0.5)(x),
        "zoneout": lambda: fastrnn.LSTM(5, 16, 2, zoneout=0.1)(x),
        "profiler": lambda: _profiled(fastrnn.LSTM(5, 16, 2), x),
        "transform": lambda: torch.func.grad(lambda x: fastrnn.LSTM(5, 16, 2)(x)[0].sum())(x),
        "recompute": lambda: fastrnn.LSTM(5, 16, 2, recompute=True)(x),
    }
    for name, call in calls.items():
        with at_once() as started:
            call()
        found[name] = started
    return found


def _profiled(module, x: torch.Tensor) -> None:
    with torch.autograd.profiler.profile():
        module(x)


def test_where_layers_run_one_after_another(gpu_process):
    found = gpu_process(_those_that_run_alone)
    assert {name for name, started in found.items() if started} == {"evaluation"}
