"""The layer op: schemas, fakes, and every order and mode of derivative against a plain torch loop in float64."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from conftest import of_operator, run_layer, weight_names
from torch import Tensor
from torch.autograd import forward_ad

import fastrnn
from fastrnn import autograd, ops
from fastrnn.kernels import gradients

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]
FORMS = {
    "dense": {},
    "batch_first": {"batch_first": True, "reverse": True},
    "two_directions": {"directions": 2, "batch_first": True},
    "no_bias": {"bias": False},
    "packed": {"packed": True},
    "packed_two": {"packed": True, "directions": 2, "bias": False},
}
LAYERS = [(cell, form) for cell in CELLS for form in FORMS.values()]
LAYERS += [("lstm", {**form, "project": True}) for form in FORMS.values()]
NAMES = [f"{cell}-{form}" for cell in CELLS for form in FORMS] + [f"lstm-{form}-projected" for form in FORMS]
every_layer = pytest.mark.parametrize(("cell", "form"), LAYERS, ids=NAMES)
some = [NAMES.index(name) for name in ("rnn_tanh-dense", "rnn_relu-two_directions", "lstm-batch_first", "lstm-packed")]
some += [NAMES.index(name) for name in ("gru-two_directions", "lstm-packed_two-projected")]
some_layers = pytest.mark.parametrize(("cell", "form"), [LAYERS[i] for i in some], ids=[NAMES[i] for i in some])

pytestmark = [
    # torch's own: Dynamo, at every autograd.Function
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


class Flat:
    """A layer function over a flat tuple of its differentiable tensors; outputs that are None are left out."""

    def __init__(self, arguments: dict) -> None:
        self.arguments = arguments
        self.names = [name for name, value in arguments.items() if name != "batch_sizes" and _tensors(value)]
        self.tensors = tuple(t for name in self.names for t in _tensors(arguments[name]))
        self.labels = [*(name for name in self.names if name != "weights"), *weight_names(arguments["layer"])]

    def bind(self, function):
        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            rest, arguments = iter(tensors), dict(self.arguments)
            for name in self.names:
                value = arguments[name]
                arguments[name] = [next(rest) for _ in value] if isinstance(value, list) else next(rest)
            return tuple(out for out in function(**arguments) if out is not None)

        return flat

    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(tensor.clone().requires_grad_() for tensor in self.tensors)


def _tensors(value) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else value if isinstance(value, list) else []


def _scalar(function):
    """A scalar that weighs every output differently and is not linear in any."""

    def scalar(*tensors: Tensor) -> Tensor:
        return sum((index + 1) * (out.sin() * out).sum() for index, out in enumerate(function(*tensors)))

    return scalar


def _close(found, expected, labels=None) -> None:
    found, expected = (torch.utils._pytree.tree_leaves(value) for value in (found, expected))
    labels = labels or range(len(expected))
    for label, one, other in zip(labels, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda text, label=label: f"{label}: {text}")


def _pair(make_layer, plain_layer, cell, form, **more):
    flat = Flat(make_layer(cell, **form, **more))
    return flat, flat.bind(run_layer), flat.bind(plain_layer)


@every_layer
def test_values_and_gradients(make_layer, plain_layer, cell, form):
    flat, ours, plain = _pair(make_layer, plain_layer, cell, form, sizes=(4, 3, 3, 2))
    _close(ours(*flat.tensors), plain(*flat.tensors), ["y", "h_n", "c_n"][: 3 if cell == "lstm" else 2])
    mine, theirs = flat.leaves(), flat.leaves()
    grads = torch.autograd.grad(_scalar(ours)(*mine), mine), torch.autograd.grad(_scalar(plain)(*theirs), theirs)
    _close(*grads, flat.labels)


def test_projection_wider_than_all_gates(make_layer, plain_layer):
    """Which torch.nn refuses; `functional.layer` takes it."""
    flat, ours, plain = _pair(make_layer, plain_layer, "lstm", {"project": 35}, sizes=(3, 5, 4, 8))
    mine, theirs = flat.leaves(), flat.leaves()
    grads = torch.autograd.grad(_scalar(ours)(*mine), mine), torch.autograd.grad(_scalar(plain)(*theirs), theirs)
    _close(*grads, flat.labels)


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_of_bfloat16(make_layer, cell):
    """Matrices in bfloat16 have gradients in it; vectors do not, whatever they are."""
    arguments = make_layer(cell, dtype=torch.float32, sizes=(3, 2, 3, 4), project=2 * (cell == "lstm"))
    arguments["weights"] = [weight.bfloat16() if weight.dim() == 2 else weight for weight in arguments["weights"]]
    *inputs, weights, text = of_operator(arguments)
    y, _, _, saved = torch.ops.fastrnn.layer_forward(*inputs, weights, text, True)
    weights = [weight.bfloat16() for weight in weights]
    given = torch.randn_like(y), None, None, *inputs, weights, y, saved, text, [True, True, True]
    *_, dw = torch.ops.fastrnn.layer_backward(*given)
    assert [grad.dtype for grad in dw] == [torch.bfloat16 if grad.dim() == 2 else torch.float32 for grad in dw]
    torch.library.opcheck(torch.ops.fastrnn.layer_backward, given, test_utils=("test_schema", "test_faketensor"))


@some_layers
def test_opcheck(make_layer, cell, form):
    *tensors, text = of_operator(make_layer(cell, **form))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for save in (False, True):
        torch.library.opcheck(torch.ops.fastrnn.layer_forward, (*tensors, text, save), test_utils=checks)
    y, h_n, c_n, saved = torch.ops.fastrnn.layer_forward(*tensors, text, True)
    dc_n = torch.randn_like(c_n) if cell == "lstm" else None
    for needs in ([True, True, True], [False, True, True], [True, False, True], [True, True, False]):
        grads = torch.randn_like(y), torch.randn_like(h_n), dc_n
        backward = (*grads, *tensors, y, saved, text, needs)
        torch.library.opcheck(torch.ops.fastrnn.layer_backward, backward, test_utils=checks)


def test_fakes_take_symbolic_sizes(make_layer):
    """Steps and rows stay symbols; the rows of a packed batch come from h0."""
    from torch.fx.experimental.proxy_tensor import make_fx

    for form in ({}, {"packed": True}):
        *tensors, text = of_operator(make_layer("lstm", **form))

        def forward(*tensors, text=text):
            return torch.ops.fastrnn.layer_forward(*tensors, text, True)

        y, *_ = make_fx(forward, tracing_mode="symbolic")(*tensors)(*tensors)
        assert y.shape == forward(*tensors)[0].shape


@every_layer
def test_gradcheck(make_layer, cell, form):
    flat = Flat(make_layer(cell, **form, sizes=(2, 2, 2, 1)))
    torch.autograd.gradcheck(flat.bind(run_layer), flat.leaves(), check_forward_ad=True, check_batched_grad=True)


@every_layer
def test_gradgradcheck(make_layer, cell, form):
    flat = Flat(make_layer(cell, **form, sizes=(2, 2, 2, 1)))
    torch.autograd.gradgradcheck(flat.bind(run_layer), flat.leaves(), check_fwd_over_rev=True, fast_mode=True)


@some_layers
def test_third_order(make_layer, plain_layer, cell, form):
    flat, ours, plain = _pair(make_layer, plain_layer, cell, form)

    def third(function):
        leaves = flat.leaves()
        value = _scalar(function)(*leaves)
        for _ in range(3):
            value = sum(grad.pow(2).sum() for grad in torch.autograd.grad(value, leaves, create_graph=True))
        return torch.autograd.grad(value, leaves)

    _close(third(ours), third(plain), flat.labels)


@every_layer
@pytest.mark.parametrize("block", [1, 12], ids=["one_step", "two_steps"])
def test_second_derivatives_in_blocks_of_steps(make_layer, plain_layer, monkeypatch, cell, form, block):
    """States and gradients are handed on from block to block, in either direction and as rows end."""
    monkeypatch.setattr(gradients, "BLOCK", block)
    flat, ours, plain = _pair(make_layer, plain_layer, cell, form, sizes=(5, 3, 2, 2))

    def second(function):
        leaves = flat.leaves()
        grads = torch.autograd.grad(_scalar(function)(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), leaves)

    _close(second(ours), second(plain), flat.labels)


@some_layers
def test_second_derivatives_of_some(make_layer, plain_layer, cell, form):
    """Of each input's gradient alone, by each input alone: what is not asked for is left out, and nothing else."""
    flat, ours, plain = _pair(make_layer, plain_layer, cell, form)
    every = range(len(flat.tensors))
    found = []
    for function in (ours, plain):
        leaves = flat.leaves()
        value, seconds = _scalar(function)(*leaves), []
        for index in every:
            (grad,) = torch.autograd.grad(value, leaves[index], create_graph=True)
            loss = grad.pow(2).sum()
            seconds += [torch.autograd.grad(loss, leaf, retain_graph=True, materialize_grads=True)[0] for leaf in leaves]
        found.append(seconds)
    _close(*found, [f"d{flat.labels[one]}/{flat.labels[other]}" for one in every for other in every])


@some_layers
def test_second_derivatives_of_many_vectors_at_once(make_layer, cell, form):
    """is_grads_batched maps by the older of torch's two vmaps, through each operation of the double backward."""
    flat = Flat(make_layer(cell, **form))
    leaves = flat.leaves()
    (grad,) = torch.autograd.grad(_scalar(flat.bind(run_layer))(*leaves), leaves[0], create_graph=True)
    vectors = torch.randn(3, *grad.shape, dtype=grad.dtype)
    together = torch.autograd.grad(grad, leaves, vectors, is_grads_batched=True, retain_graph=True)
    apart = [torch.autograd.grad(grad, leaves, vector, retain_graph=True) for vector in vectors]
    _close(together, [torch.stack(each) for each in zip(*apart, strict=True)], flat.labels)


def test_a_gradient_by_the_input_alone_takes_none_of_weights(make_layer, monkeypatch):
    """ctx.needs_input_grad says that weights have gradients, not whether this pass asks for them."""
    asked, original = [], ops.backward

    def backward(*arguments):
        asked.append(arguments[-1][2])
        return original(*arguments)

    monkeypatch.setattr(ops, "backward", backward)
    monkeypatch.setattr(autograd, "_runtime_backward", lambda *arguments: None)
    flat = Flat(make_layer("gru", sizes=(8, 8, 4, 64)))
    leaves = flat.leaves()
    value = _scalar(flat.bind(run_layer))(*leaves)
    (grad,) = torch.autograd.grad(value, leaves[0], create_graph=True)
    (*_, of_all) = torch.autograd.grad(value, leaves, create_graph=True)
    assert asked == [False, True]
    assert grad.requires_grad and of_all.requires_grad


@every_layer
def test_missing_gradients(make_layer, plain_layer, cell, form):
    """Any subset of the outputs may be used, any subset of the inputs may need a gradient."""
    flat, ours, plain = _pair(make_layer, plain_layer, cell, form)
    outputs = 3 if cell == "lstm" else 2
    for used in itertools.chain.from_iterable(itertools.combinations(range(outputs), n) for n in (1, 2)):
        grads = []
        for function in (ours, plain):
            leaves = flat.leaves()
            results = function(*leaves)
            loss = sum(results[index].sin().sum() for index in used)
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        _close(*grads, flat.labels)
    for index, label in enumerate(flat.labels):
        grads = []
        for function in (ours, plain):
            leaf = flat.tensors[index].clone().requires_grad_()
            tensors = (*flat.tensors[:index], leaf, *flat.tensors[index + 1 :])
            grads.append(torch.autograd.grad(_scalar(function)(*tensors), leaf))
        _close(*grads, [label])


@some_layers
def test_backward_again(make_layer, cell, form):
    """retain_graph, twice: the same bits; without it torch's own error."""
    flat = Flat(make_layer(cell, **form))
    leaves = flat.leaves()
    loss = _scalar(flat.bind(run_layer))(*leaves)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_output_changed_in_place(make_layer):
    """y is kept for backward: changing it is torch's error, never a wrong gradient; h_n and c_n are free."""
    flat = Flat(make_layer("lstm"))
    leaves = flat.leaves()
    y, h_n, c_n = flat.bind(run_layer)(*leaves)
    h_n.mul_(2)
    c_n.mul_(2)
    (y.sum() + h_n.sum() + c_n.sum()).backward(retain_graph=True)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_without_gradients(make_layer):
    """No graph where grad is off or no input needs one."""
    flat = Flat(make_layer("gru"))
    ours = flat.bind(run_layer)
    assert not any(out.requires_grad for out in ours(*flat.tensors))
    with torch.no_grad():
        assert not any(out.requires_grad for out in ours(*flat.leaves()))
    with torch.inference_mode():
        assert all(out.is_inference() for out in ours(*flat.leaves()))


@every_layer
def test_func_jvp_and_vjp(make_layer, plain_layer, cell, form):
    flat, ours, plain = _pair(make_layer, plain_layer, cell, form)
    tangents = tuple(torch.randn_like(tensor) for tensor in flat.tensors)
    _close(torch.func.jvp(ours, flat.tensors, tangents), torch.func.jvp(plain, flat.tensors, tangents))
    out, pull = torch.func.vjp(ours, *flat.tensors)
    expected, pull_plain = torch.func.vjp(plain, *flat.tensors)
    _close(out, expected)
    cotangents = tuple(torch.randn_like(tensor) for tensor in out)
    _close(pull(cotangents), pull_plain(cotangents), flat.labels)


def test_forward_mode_over_a_graph_from_before(make_layer, plain_layer):
    """A dual gradient that meets a layer run before the level was opened."""
    flat, ours, plain = _pair(make_layer, plain_layer, "lstm", {})
    weights, tangents = ([torch.randn_like(out) for out in plain(*flat.tensors)] for _ in range(2))
    found = []
    for function in (ours, plain):
        leaves = flat.leaves()
        outputs = function(*leaves)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(weights, tangents, strict=True)]
            grads = torch.autograd.grad(outputs, leaves, duals, create_graph=True)
            found.append([forward_ad.unpack_dual(grad).tangent for grad in grads])
    _close(*found, flat.labels)


@some_layers
def test_func_jacobians_and_hessian(make_layer, plain_layer, cell, form):
    flat, ours, plain = _pair(make_layer, plain_layer, cell, form, sizes=(2, 2, 2, 1))
    every = tuple(range(len(flat.tensors)))
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        _close(transform(ours, every)(*flat.tensors), transform(plain, every)(*flat.tensors))
    for which in (every[:2], every[2:5]):
        _close(*(torch.func.hessian(_scalar(function), which)(*flat.tensors) for function in (ours, plain)))

    def reverse_twice(function):
        return torch.func.jacrev(torch.func.jacrev(_scalar(function), every[:2]), every[:2])

    _close(reverse_twice(ours)(*flat.tensors), reverse_twice(plain)(*flat.tensors))


MAPPED = {
    "input": (("x",), 0),
    "input_last": (("x",), -1),
    "states": (("h0", "c0"), 1),
    "input_and_states": (("x", "h0", "c0"), 1),
    "weights": (("w_ih", "w_hh"), 0),
    "everything": (None, 0),
}


def _mapped(flat: Flat, names, dim: int, size: int = 3):
    """The layer's tensors with a new axis in those named, and vmap's in_dims."""
    tensors, dims = [], []
    for label, tensor in zip(flat.labels, flat.tensors, strict=True):
        mapped = names is None or label.startswith(names)
        tensors.append(torch.stack([tensor + member * 0.1 for member in range(size)], dim) if mapped else tensor)
        dims.append(dim if mapped else None)
    return tuple(tensors), tuple(dims)


@some_layers
@pytest.mark.parametrize("mapped", MAPPED)
def test_func_vmap(make_layer, plain_layer, cell, form, mapped):
    flat, ours, plain = _pair(make_layer, plain_layer, cell, form)
    tensors, dims = _mapped(flat, *MAPPED[mapped])
    _close(torch.func.vmap(ours, dims)(*tensors), torch.func.vmap(plain, dims)(*tensors))

    # per-sample gradients of everything, then of the states alone, which the backward can fold too
    for which in (tuple(range(len(tensors))), (0, 1)):
        grads = [torch.func.vmap(torch.func.grad(_scalar(f), which), dims)(*tensors) for f in (ours, plain)]
        _close(*grads, [flat.labels[index] for index in which])

    # gradients through vmap, by torch.func and by plain autograd
    def total(function):
        return lambda *members: torch.func.vmap(_scalar(function), dims)(*members).pow(2).sum()

    every = tuple(range(len(tensors)))
    _close(torch.func.grad(total(ours), every)(*tensors), torch.func.grad(total(plain), every)(*tensors), flat.labels)
    mine, theirs = (tuple(t.clone().requires_grad_() for t in tensors) for _ in range(2))
    grads = torch.autograd.grad(total(ours)(*mine), mine), torch.autograd.grad(total(plain)(*theirs), theirs)
    _close(*grads, flat.labels)


def test_func_nested(make_layer, plain_layer):
    """vmap in vmap, vmap of jvp, vmap of a Hessian's product."""
    flat, ours, plain = _pair(make_layer, plain_layer, "gru", {"batch_first": True})
    x, *rest = flat.tensors
    xs = torch.randn(2, 3, *x.shape, dtype=x.dtype)

    def nested(function):
        scalar = _scalar(function)
        single = lambda x: torch.func.grad(scalar)(x, *rest)  # noqa: E731
        return (
            torch.func.vmap(torch.func.vmap(single))(xs),
            torch.func.vmap(lambda x: torch.func.jvp(single, (x,), (x.cos(),))[1])(xs[0]),
            torch.func.vmap(lambda x: torch.func.jvp(lambda x: function(x, *rest), (x,), (x.cos(),)))(xs[0]),
        )

    _close(nested(ours), nested(plain))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_functional_call(name):
    """An ensemble of modules by vmap over their parameters, with per-sample gradients, equal to one after the other."""
    modules = [getattr(fastrnn, name)(3, 2, 2, bidirectional=True, dtype=torch.float64) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(modules)
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def loss(parameters, x):
        return torch.func.functional_call(modules[0], parameters, (x,))[0].pow(2).sum()

    grads, values = torch.func.vmap(torch.func.grad_and_value(loss), (0, None))(parameters, x)
    for index, module in enumerate(modules):
        value = module(x)[0].pow(2).sum()
        value.backward()
        _close(values[index], value)
        for key, parameter in module.named_parameters():
            _close(grads[key][index], parameter.grad, [key])


def test_vmap_of_nothing(make_layer):
    flat = Flat(make_layer("lstm"))
    tensors, dims = _mapped(flat, None, 0)
    with pytest.raises(ValueError, match="size 0"):
        torch.func.vmap(flat.bind(run_layer), dims)(*(tensor[:0] for tensor in tensors))


@pytest.mark.parametrize("form", [{"directions": 2}, {"packed": True, "project": True}], ids=["two_directions", "packed"])
def test_compile(make_layer, form):
    """One graph, with gradients; the same for other lengths."""
    torch._dynamo.reset()
    flat = Flat(make_layer("lstm", **form, dtype=torch.float32))
    ours = flat.bind(run_layer)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    mine, theirs = flat.leaves(), flat.leaves()
    _close(compiled(*mine), ours(*theirs))
    _close(torch.autograd.grad(_scalar(compiled)(*mine), mine), torch.autograd.grad(_scalar(ours)(*theirs), theirs))
    with torch.no_grad():
        _close(compiled(*mine), ours(*theirs))


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(_scalar(f), (0, 2)),
    "vmap": lambda f: lambda x, *rest: torch.func.vmap(lambda x: f(x, *rest))(torch.stack([x, x.cos()])),
    "per-sample gradients": lambda f: (
        lambda x, *rest: torch.func.vmap(torch.func.grad(_scalar(f), (0, 2)), (0, *(None for _ in rest)))(
            torch.stack([x, x.cos()]), *rest
        )
    ),
    "grad of grad": lambda f: torch.func.grad(lambda *tensors: torch.func.grad(_scalar(f))(*tensors).pow(2).sum(), 2),
    "jvp": lambda f: lambda *tensors: torch.func.jvp(f, tensors, tensors),
    "jvp of grad": lambda f: lambda *tensors: torch.func.jvp(torch.func.grad(_scalar(f)), tensors, tensors),
}


def _calls_of_the_op(graph) -> int:
    """How often a traced program calls layer_forward, itself or in its parts."""
    parts = (part for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
    return sum(node.target is torch.ops.fastrnn.layer_forward.default for part in parts for node in part.graph.nodes)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compiled_transforms(make_layer, plain_layer, transform):
    """One graph, that holds the op and not its steps, but for those of forward mode."""
    torch._dynamo.reset()
    flat, ours, plain = _pair(make_layer, plain_layer, "gru", {})
    transformed, calls = TRANSFORMS[transform], []

    def backend(graph, examples):
        calls.append(_calls_of_the_op(graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    compiled = torch.compile(transformed(ours), fullgraph=True, backend=backend)
    _close(compiled(*flat.tensors), transformed(plain)(*flat.tensors))
    assert calls == [1]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functionalize(make_layer, plain_layer, transform):
    """Outside of another transform and inside of it."""
    flat, ours, plain = _pair(make_layer, plain_layer, "lstm", {"directions": 2, "project": True})
    transformed, expected = TRANSFORMS[transform], TRANSFORMS[transform](plain)(*flat.tensors)
    for functionalize in (
        torch.func.functionalize,
        functools.partial(torch.func.functionalize, remove="mutations_and_views"),
    ):
        _close(functionalize(transformed(ours))(*flat.tensors), expected)
        _close(transformed(functionalize(ours))(*flat.tensors), expected)


def test_functionalize_and_plain_autograd(make_layer, plain_layer):
    """Gradients go through a functionalized call; a program traced from one holds the op."""
    flat, ours, plain = _pair(make_layer, plain_layer, "lstm", {})
    mine, theirs = flat.leaves(), flat.leaves()
    functional = torch.func.functionalize(ours)
    grads = torch.autograd.grad(_scalar(functional)(*mine), mine), torch.autograd.grad(_scalar(plain)(*theirs), theirs)
    _close(*grads, flat.labels)
    for mode in ("real", "fake", "symbolic"):
        program = torch.fx.experimental.proxy_tensor.make_fx(functional, tracing_mode=mode)(*flat.tensors)
        assert _calls_of_the_op(program) == 1
        _close(program(*flat.tensors), plain(*flat.tensors))
