"""Recompute mode: the default mode's outputs to the bit and its gradients to rounding, from states alone."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re
import threading

import pytest
import torch
from conftest import of_operator, run_layer, weight_names
from contract import ROOT, relative
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import checkpoint, ops
from fastrnn.kernels.cells import CELLS

LENGTHS = torch.tensor([9, 9, 6, 5, 2, 1, 1])  # rows end and begin in the first, a middle and the last segment
FORMS = {
    "dense": {},
    "reverse": {"reverse": True},
    "batch_first": {"batch_first": True, "bias": False},
    "two_directions": {"directions": 2, "batch_first": True},
    "packed": {"packed": True},
    "packed_reverse": {"packed": True, "reverse": True},
    "packed_two": {"packed": True, "directions": 2},
}
LAYERS = [(cell, form, False) for cell in ("lstm", "gru") for form in FORMS] + [("lstm", form, True) for form in FORMS]
every_layer = pytest.mark.parametrize(("cell", "form", "project"), LAYERS)
some_layers = pytest.mark.parametrize(
    ("cell", "form", "project"),
    [
        ("lstm", "dense", False),
        ("lstm", "packed_two", True),
        ("gru", "two_directions", False),
        ("gru", "packed_reverse", False),
    ],
)

pytestmark = [
    # torch's own: Dynamo, at every autograd.Function
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """Several segments at the sizes of a test."""
    monkeypatch.setattr(checkpoint, "SEGMENT_ROWS", 4)


class Operators(TorchDispatchMode):
    """How often each operator runs inside the block."""

    def __enter__(self):
        self.counts = {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def layer(make_layer):
    """Arguments of `run_layer` by (cell, form, project), packed ones of LENGTHS."""

    def make(cell, form, project, sizes=(9, 7, 5, 11)):
        form = FORMS[form]
        arguments = make_layer(cell, **form, project=project, sizes=sizes)
        if form.get("packed") and sizes == (9, 7, 5, 11):
            arguments["batch_sizes"] = (LENGTHS > torch.arange(9)[:, None]).sum(1)
            arguments["x"] = torch.randn(int(LENGTHS.sum()), 5, dtype=torch.float64)
        return arguments

    return make


def leaves_of(arguments: dict) -> dict[str, torch.Tensor]:
    """Differentiable tensors by name; `arguments` are made to hold them."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, list):
            arguments[name] = [tensor.clone().requires_grad_() for tensor in value]
            found |= zip(weight_names(arguments["layer"]), arguments[name])
        elif isinstance(value, torch.Tensor) and name != "batch_sizes":
            arguments[name] = found[name] = value.clone().requires_grad_()
    return found


def weighted(outputs):
    """A scalar that weighs every output differently and is linear in none."""
    return sum((index + 1) * (out.sin() * out).sum() for index, out in enumerate(outputs) if out is not None)


def gradients(arguments: dict, recompute: bool, used=slice(None), wanted=None, times=1) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name."""
    arguments = dict(arguments)
    leaves = leaves_of(arguments)
    for name, leaf in leaves.items():
        leaf.requires_grad_(wanted is None or name.startswith(wanted))
    with fastrnn.recompute(recompute):
        outputs = run_layer(**arguments)
    loss = weighted(outputs[used])
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    for _ in range(times):
        grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, materialize_grads=True)
    named = {name: out.detach() for name, out in zip(("y", "h_n", "c_n"), outputs) if out is not None}
    return named | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def same(found: dict, expected: dict, bound: float = 1e-13) -> None:
    """Outputs to the bit, gradients within `bound`, relative L2."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in ("y", "h_n", "c_n"):
            assert torch.equal(found[name], value), name
        else:
            error = relative(found[name], value)
            assert error <= bound, f"{name}: {error:.3g} > {bound:.3g}"


# --- how many segments, and where


def test_count_takes_the_least_memory():
    """Against every other count: states kept for n segments, and what backward holds of the longest."""
    for cell, steps, batch, project in itertools.product(("lstm", "gru"), (1, 2, 5, 64, 333), (1, 3, 40), (False, True)):
        if project and cell == "gru":
            continue
        rows = steps * batch
        allowed = range(1, max(1, min(steps // 2, rows // checkpoint.SEGMENT_ROWS)) + 1)
        slots = CELLS[cell].slots + 1 + project
        cost = {n: (cell == "lstm") * n * batch + slots * rows / n for n in allowed}
        n = checkpoint.count_segments(steps, rows, batch, cell, project)
        assert n in allowed
        # a whole number below the root of it: never worse than one more or one less by more than a state
        assert cost[n] <= min(cost.values()) + batch, f"{cell} T{steps} B{batch}: {n} segments"
    assert checkpoint.count_segments(1000, 32_000, 32, "lstm") == 77  # sqrt(1000 * 6)


@pytest.mark.parametrize("segments", range(1, 9))
def test_bounds(segments):
    """Each step in one segment, two steps at least, rows about even whatever the lengths."""
    for sizes in ([3] * 17, [9] * 3 + [1] * 16, [50] + [1] * 20, [1] * 16):
        offsets = [0, *itertools.accumulate(sizes)]
        found = checkpoint.bounds(offsets, segments)
        assert (found[0], found[-1], len(found)) == (0, len(sizes), segments + 1)
        assert all(stop - start >= 2 for start, stop in itertools.pairwise(found))
        if segments > 1 and max(sizes) == min(sizes):
            rows = [offsets[stop] - offsets[start] for start, stop in itertools.pairwise(found)]
            assert max(rows) - min(rows) <= 2 * sizes[0], rows


# --- values and first derivatives


@every_layer
@pytest.mark.parametrize("rows", [1, 17, 1000], ids=["many", "few", "one"])
def test_equals_the_default(layer, monkeypatch, poison, cell, form, project, rows):
    monkeypatch.setattr(checkpoint, "SEGMENT_ROWS", rows)
    arguments = layer(cell, form, project)
    with Operators() as ran:
        found = gradients(arguments, True)
    assert ran.counts["fastrnn::checkpoint_forward"] == ran.counts["fastrnn::checkpoint_backward"] == 1
    assert "fastrnn::layer_backward" not in ran.counts  # inside those: nothing else was differentiated
    same(found, gradients(arguments, False))


@pytest.mark.parametrize("segments", [1, 2, 3, 4])
@every_layer
def test_every_count(layer, cell, form, project, segments):
    """The ops themselves, with all and with no gradient coming in."""
    arguments = layer(cell, form, project)
    *tensors, text = of_operator(arguments)
    y, h_n, c_n, saved = ops.forward_op(*tensors, text, True)
    outputs = y, h_n, c_n
    *others, kept = ops.checkpoint_forward(*tensors, text, segments)
    assert all(torch.equal(one, other) for one, other in zip(others, outputs))
    assert kept.shape == ((len(h_n), segments - 1, *c_n.shape[1:]) if cell == "lstm" else (0,))
    for incoming in ([True, True, True], [False, True, False], [True, False, False]):
        grads = [torch.randn_like(out) if here and out.numel() else None for out, here in zip(outputs, incoming)]
        for needs in ((True, True, True), (True, True, False), (False, True, True), (True, False, True)):
            *expected, dw = ops.backward_op(*grads, *tensors, y, saved, text, needs)
            *found, found_dw = ops.checkpoint_backward(*grads, *tensors, y, kept, text, segments, needs)
            names = "dx", "dh0", "dc0", *(f"d{name}" for name in weight_names(arguments["layer"]))
            same(dict(zip(names, found + found_dw)), dict(zip(names, expected + dw)))
            assert [grad.shape for grad in found + found_dw] == [grad.shape for grad in expected + dw]


@some_layers
def test_opcheck(layer, cell, form, project):
    *tensors, text = of_operator(layer(cell, form, project))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    forward = (*tensors, text, 3)
    torch.library.opcheck(torch.ops.fastrnn.checkpoint_forward, forward, test_utils=checks)
    y, h_n, c_n, kept = ops.checkpoint_forward(*forward)
    backward = (y, h_n, c_n if cell == "lstm" else None, *tensors, y, kept, text, 3, [True, True, True])
    torch.library.opcheck(torch.ops.fastrnn.checkpoint_backward, backward, test_utils=checks)


@some_layers
def test_some_outputs_and_some_inputs(layer, cell, form, project):
    arguments = layer(cell, form, project)
    for index in range(3 if cell == "lstm" else 2):
        used = slice(index, index + 1)
        same(gradients(arguments, True, used), gradients(arguments, False, used))
    for wanted in ("x", "h0", "c0"[: 2 * (cell == "lstm")] or "h0", "w_ih0", "b_hh"):
        same(gradients(arguments, True, wanted=wanted), gradients(arguments, False, wanted=wanted))


@some_layers
def test_backward_again(layer, cell, form, project):
    """retain_graph: the same bits twice."""
    arguments = layer(cell, form, project)
    once, twice = gradients(arguments, True), gradients(arguments, True, times=2)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_rnn_keeps_only_its_output_already(make_layer):
    for cell in ("rnn_tanh", "rnn_relu"):
        with Operators() as ran:
            found = gradients(make_layer(cell, sizes=(9, 7, 5, 11)), True)
        assert "fastrnn::layer_backward" in ran.counts and "fastrnn::checkpoint_backward" not in ran.counts, found.keys()


# --- other derivatives


def flat(arguments: dict, recompute: bool = True):
    """(function of the differentiable tensors, those tensors)."""
    leaves = leaves_of(dict(arguments))

    def function(*tensors):
        rest, filled = iter(tensors), dict(arguments)
        for name, value in arguments.items():
            if isinstance(value, list):
                filled[name] = [next(rest) for _ in value]
            elif isinstance(value, torch.Tensor) and name != "batch_sizes":
                filled[name] = next(rest)
        with fastrnn.recompute(recompute):
            return tuple(out for out in run_layer(**filled) if out is not None)

    return function, tuple(leaves.values())


@some_layers
def test_gradcheck(layer, monkeypatch, cell, form, project):
    monkeypatch.setattr(checkpoint, "SEGMENT_ROWS", 1)
    function, leaves = flat(layer(cell, form, project, sizes=(4, 2, 2, 2)))
    with Operators() as ran:
        function(*leaves)
    assert "fastrnn::checkpoint_forward" in ran.counts
    torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


@some_layers
def test_second_derivative(layer, cell, form, project):
    """Through a gradient that is differentiated, and that itself came from segments."""
    arguments, seconds = layer(cell, form, project), []
    for recompute in (True, False):
        function, leaves = flat(arguments, recompute)
        with Operators() as ran:
            first = torch.autograd.grad(weighted(function(*leaves)), leaves, create_graph=True)
        assert ("fastrnn::checkpoint_backward" in ran.counts) == recompute
        seconds.append(torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), leaves))
    for index, (found, expected) in enumerate(zip(*seconds)):
        assert relative(found, expected) <= 1e-12, f"leaf {index}"


@some_layers
def test_transforms(layer, cell, form, project):
    """torch.func and forward mode: the default mode's results, whether the mode reaches inside or not."""
    arguments = layer(cell, form, project)
    (ours, leaves), (plain, _) = flat(arguments), flat(arguments, False)
    tensors = tuple(leaf.detach() for leaf in leaves)
    every = tuple(range(len(tensors)))

    def grads(function):
        return torch.func.grad(lambda *tensors: weighted(function(*tensors)), every)

    def mapped(function):
        stacked = torch.stack([tensors[0], tensors[0] * 0.5])
        return torch.func.vmap(lambda x: grads(function)(x, *tensors[1:]))(stacked)

    def tangents(function):
        return torch.func.jvp(function, tensors, tensors)

    def batched(function):
        outputs = function(*leaves)
        incoming = [torch.stack([out.detach(), out.detach().cos()]) for out in outputs]
        return torch.autograd.grad(outputs, leaves, incoming, is_grads_batched=True)

    def mapped_outside(function):
        outputs = function(*leaves)
        incoming = [torch.stack([out.detach(), out.detach().cos()]) for out in outputs]
        return torch.func.vmap(lambda *one: torch.autograd.grad(outputs, leaves, one, retain_graph=True))(*incoming)

    def over_a_graph_from_before(function):
        outputs = function(*leaves)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(out.detach().cos(), out.detach()) for out in outputs]
            found = torch.autograd.grad(outputs, leaves, duals, create_graph=True)
            return [forward_ad.unpack_dual(grad).tangent for grad in found]

    for transform in (lambda f: grads(f)(*tensors), mapped, tangents, batched, mapped_outside, over_a_graph_from_before):
        found, expected = (torch.utils._pytree.tree_leaves(transform(function)) for function in (ours, plain))
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert relative(one.detach(), other.detach()) <= 1e-12, f"{transform.__name__} {index}"


# --- torch.compile


def noting(operators: list[list[str]]):
    """A backend of torch.compile that adds the names in each graph."""

    def note(graph, inputs):
        operators.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=note)


@pytest.mark.parametrize(
    ("name", "options", "block"),
    [("LSTM", {"bidirectional": True}, False), ("LSTM", {"proj_size": 2}, True), ("GRU", {}, True)],
)
def test_compile(name, options, block):
    """One graph with gradients, the mode's operators in it; no new one for other lengths."""
    torch._dynamo.reset()
    module = getattr(fastrnn, name)(3, 5, 2, recompute=not block, **options)
    operators: list[list[str]] = []

    def call(x):
        if not block:
            return module(x)
        with fastrnn.recompute():
            return module(x)

    compiled = torch.compile(call, fullgraph=True, backend=noting(operators), dynamic=True)
    for steps in (40, 71, 100):
        x, found = torch.randn(steps, 3, 3), []
        for function in (compiled, call):
            module.zero_grad()
            y, _ = function(x)
            weighted([y]).backward()
            found.append({"y": y.detach()} | {f"d{n}": p.grad for n, p in module.named_parameters()})
        same(*found, bound=1e-5)
    forward, backward = operators  # and not a pair for each length
    assert forward.count("fastrnn.checkpoint_forward.default") == 2
    assert backward.count("fastrnn.checkpoint_backward.default") == 2
    assert not any("layer_" in name for name in forward + backward)
    torch._dynamo.reset()


def test_compiled_before_the_block():
    """A compiled module follows the mode of each call."""
    torch._dynamo.reset()
    operators: list[list[str]] = []
    compiled = torch.compile(fastrnn.GRU(3, 5), fullgraph=True, backend=noting(operators))
    for recompute, graphs in ((False, 2), (True, 4), (False, 4), (True, 4)):
        with fastrnn.recompute(recompute):
            compiled(torch.randn(40, 3, 3))[0].sum().backward()
        assert len(operators) == graphs
    for names, operator in zip(operators[1::2], ("layer_backward", "checkpoint_backward")):
        assert f"fastrnn.{operator}.default" in names
    torch._dynamo.reset()


# --- the mode


MODULES = [
    ("RNN", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"proj_size": 4}),
    ("GRU", {"num_layers": 2}),
]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("name", "options"), MODULES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_modules(name, options, packed, training):
    """By the argument, by the context manager, and both: the same bits; and the default's results."""
    x = torch.randn(9, 7, 5, dtype=torch.float64, requires_grad=True)
    plain = getattr(fastrnn, name)(5, 11, dtype=torch.float64, **options).train(training)
    always = getattr(fastrnn, name)(5, 11, dtype=torch.float64, recompute=True, **options).train(training)
    always.load_state_dict(plain.state_dict())
    results = []
    for module, within in ((plain, False), (plain, True), (always, False), (always, True)):
        with fastrnn.recompute(within), Operators() as ran:
            y, state = module(pack_padded_sequence(x, LENGTHS) if packed else x)
            weighted([y.data if isinstance(y, PackedSequence) else y, *(state if name == "LSTM" else [state])]).backward()
        mode = (module is always or within) and name != "RNN"
        assert ("fastrnn::checkpoint_backward" in ran.counts) == mode == ("fastrnn::layer_backward" not in ran.counts)
        results.append({"y": y.data.detach(), "dx": x.grad} | {f"d{n}": p.grad for n, p in module.named_parameters()})
        module.zero_grad()
        x.grad = None
    for found in results[1:]:
        same(found, results[0])


def test_blocks_nest_and_threads_are_apart():
    assert not checkpoint._mode.recompute
    with fastrnn.recompute():
        with fastrnn.recompute(enabled=False):
            assert not checkpoint._mode.recompute
        assert checkpoint._mode.recompute
        seen = []
        thread = threading.Thread(target=lambda: seen.append(checkpoint._mode.recompute))
        thread.start()
        thread.join()
        assert seen == [False]
    with pytest.raises(ZeroDivisionError), fastrnn.recompute():
        raise ZeroDivisionError
    assert not checkpoint._mode.recompute


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_the_argument(name):
    make = getattr(fastrnn, name)
    plain, always = make(3, 5), make(3, 5, recompute=True)
    assert not plain.recompute and "recompute" not in repr(plain)
    assert repr(always) == repr(plain)[:-1] + ", recompute=True)"
    for again in (copy.deepcopy(always), pickle.loads(pickle.dumps(always))):
        assert again.recompute and repr(again) == repr(always)
    assert inspect.signature(make) == inspect.signature(getattr(nn, name))
    with pytest.raises(TypeError, match="recompute should be a bool, got 1"):
        make(3, 5, recompute=1)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_modules_without_the_attribute(name):
    """Converted ones, built under a patch, and pickled by a version that had no such mode."""
    with fastrnn.patch():
        patched = getattr(nn, name)(3, 5)
    old = getattr(fastrnn, name)(3, 5)
    assert "recompute" not in vars(old)
    for module in (fastrnn.convert(getattr(nn, name)(3, 5)), patched, pickle.loads(pickle.dumps(old))):
        assert module.recompute is False and "recompute" not in repr(module)
        module(torch.randn(4, 2, 3))[0].sum().backward()


# --- what is kept


def kept_bytes(module: nn.RNNBase, x: torch.Tensor) -> int:
    """Bytes kept for backward beyond what is the caller's: input and parameters."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    zeros = torch.zeros(1, x.shape[1], module.proj_size or module.hidden_size)
    hx = (zeros, torch.zeros(1, x.shape[1], module.hidden_size)) if module.mode == "LSTM" else zeros
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x, hx)
    for given in (x, *module.parameters(), *(hx if isinstance(hx, tuple) else (hx,))):
        storages.pop(given.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def documented() -> dict[str, tuple[float, float]]:
    """Bytes a step, row and unit by docs/memory.md: default mode and recompute mode."""
    text = (ROOT / "docs" / "memory.md").read_text()
    rows = re.findall(r"^\| (\w+)([^|]*)\| ([\d.]+) \| ([\d.]+)", text, re.MULTILINE)
    return {name + rest.rstrip(): (float(default), float(less)) for name, rest, default, less in rows}


@pytest.mark.parametrize(
    ("row", "name", "options"),
    [
        ("RNN", "RNN", {}),
        ("RNN (relu)", "RNN", {"nonlinearity": "relu"}),
        ("LSTM", "LSTM", {}),
        ("LSTM, proj_size H/2", "LSTM", {"proj_size": 8}),
        ("GRU", "GRU", {}),
    ],
)
def test_bytes_kept(monkeypatch, row, name, options):
    """The table in docs/memory.md, from what is really saved; LSTM's states before a segment come on top, as it says."""
    monkeypatch.undo()  # segments of their real length
    T, B, H = 200, 32, 16
    x = torch.randn(T, B, 4)
    n = checkpoint.count_segments(T, T * B, B, "lstm", bool(options.get("proj_size")))
    for recompute, expected in zip((False, True), documented()[row], strict=True):
        kept = kept_bytes(getattr(fastrnn, name)(4, H, recompute=recompute, **options), x)
        states = 4 * (n - 1) * B * H if recompute and name == "LSTM" else 0
        assert (kept - states) / (T * B * H) == expected, f"{row}, recompute={recompute}"
