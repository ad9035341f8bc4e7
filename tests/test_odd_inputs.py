"""Calls that nobody expects, beside torch.nn: memory that is gone, attributes changed later, in-place changes, no sizes."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from conftest import of_operator
from contract import python
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn.kernels.layer import layer_of

I, H, B, T = 4, 6, 3, 5
LAYERS, CELLS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")
NOT_THERE = "not allocated yet|are out of bounds for storage of size"  # torch's words: of no memory, and of too little
sizes_left = pytest.mark.parametrize("left", [0, 8], ids=["freed", "shortened"])


def state_of(name, *states):
    return states if name.startswith("LSTM") else states[0]


def given(name, x=None, requires_grad=False):
    """An input and states of a layer or a cell."""
    lead, depth = ((), ()) if name in CELLS else ((T,), (1,))
    x = torch.randn(*lead, B, I) if x is None else x
    h, c = torch.randn(2, *depth, B, H)
    return x.requires_grad_(requires_grad), state_of(name, h.clone(), c.clone())


def outcome(function):
    """What a call returns, or the type of what it raises."""
    try:
        return function()
    except Exception as error:
        return type(error)


def twins(name, *args, **kwargs):
    """A module of torch.nn and ours, of the same weights."""
    stock = getattr(nn, name)(*args, **kwargs)
    ours = getattr(fastrnn, name)(*args, **kwargs)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def assert_close(found, expected, **tolerance):
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def leave(tensor, size):
    tensor.untyped_storage().resize_(size)


# Memory


@sizes_left
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_memory_of_arguments(name, grad, left):
    """Of the input, each state and each weight."""
    for place in ("x", "h", "c", *(key for key, _ in getattr(fastrnn, name)(I, H).named_parameters())):
        module, (x, state) = getattr(fastrnn, name)(I, H), given(name)
        if place == "c" and "LSTM" not in name:
            continue
        states = dict(zip("hc", tree_leaves(state), strict=False))
        leave({"x": x, **states, **dict(module.named_parameters())}[place], left)
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=NOT_THERE):
            module(x, state)


@sizes_left
@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_memory_of_other_calls(name, options, left):
    """In half precision, unbatched, with gaps, packed."""
    module, dtype = getattr(fastrnn, name)(I, H, **options), options.get("dtype", torch.float32)
    whole = torch.randn(T, B, I, dtype=dtype)
    for x in (whole, whole[:, 0], torch.randn(T, B, 2 * I, dtype=dtype)[..., ::2], whole.transpose(0, 1)):
        x = x.clone(memory_format=torch.preserve_format) if x is whole else x
        leave(x, left)
        with pytest.raises(RuntimeError, match=NOT_THERE):
            module(x)
    packed = pack_padded_sequence(torch.randn(T, B, I, dtype=dtype), torch.tensor([5, 3, 2]))
    for spoilt in ("data", "batch_sizes"):
        own = PackedSequence(packed.data.clone(), packed.batch_sizes.clone())
        leave(getattr(own, spoilt), left)
        with pytest.raises(RuntimeError, match=NOT_THERE):
            module(own)


@sizes_left
@pytest.mark.parametrize("name", LAYERS)
def test_memory_of_a_step(name, left):
    """What it reads, and what it is to write."""
    for frozen, place in itertools.product((False, True), ("x", "h", "y", "into")):
        module, x, y = getattr(fastrnn, name)(I, H).eval(), torch.randn(B, I), torch.empty(B, H)
        module = fastrnn.freeze(module) if frozen else module
        state, into = (state_of(name, torch.zeros(1, B, H), torch.zeros(1, B, H)) for _ in range(2))
        leave({"x": x, "h": tree_leaves(state)[0], "y": y, "into": tree_leaves(into)[-1]}[place], left)
        with pytest.raises(RuntimeError, match=NOT_THERE):
            module.step(x, state, out=(y, into))


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_memory_of_panels(name):
    """A frozen layer whose panels have gone reads its weights."""
    module, (x, state) = getattr(fastrnn, name)(I, H).eval(), given(name)
    expected = fastrnn.freeze(module)(x, state)
    for left in (100, 0):
        leave(module._fastrnn_panels[0], left)
        assert_close(module(x, state), expected)


@sizes_left
def test_memory_of_the_operators(left, make_layer):
    ops = torch.ops.fastrnn
    call = of_operator(make_layer("lstm", bias=True, project=2, sizes=(T, B, I, H), dtype=torch.float32))
    text = call[-1]
    y, _, _, saved = ops.layer_forward(*call, True)
    for name in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "y", "saved", "dy"):
        own = copy.deepcopy(call)
        results = {"y": y.clone(), "saved": saved.clone(), "dy": torch.ones_like(y)}
        named = {"x": own[0], "h0": own[2], "c0": own[3], **layer_of(text).by_direction(own[4])[0]._asdict(), **results}
        leave(named[name], left)
        if name not in results:
            with pytest.raises(RuntimeError, match=NOT_THERE):
                ops.layer_forward(*own, True)
        call_back = results["dy"], None, None, *own[:5], results["y"], results["saved"], text, [True, True, True]
        if name[0] != "b":  # backward does not read biases
            with pytest.raises(RuntimeError, match=NOT_THERE):
                ops.layer_backward(*call_back)


@sizes_left
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_memory_gone_before_backward(name, left):
    """What backward reads, and what it does not: W_ih of an input that wants no gradient, biases, W_hh of a single step."""
    suffix = "" if name in CELLS else "_l0"
    for place, wants_x, fine in (
        ("x", True, False),
        ("weight_ih", True, False),
        ("weight_ih", False, True),
        ("bias_hh", True, True),
        ("weight_hh", False, name in CELLS),
    ):
        module, (x, state) = getattr(fastrnn, name)(I, H), given(name, requires_grad=wants_x)
        output = tree_leaves(module(x, state))[0]
        leave(x if place == "x" else getattr(module, place + suffix), left)
        if fine:
            output.sum().backward()
            continue
        with pytest.raises(RuntimeError, match=NOT_THERE):
            output.sum().backward()


@pytest.mark.parametrize("change", [
    lambda saved: saved[..., :1], lambda saved: saved[:0], lambda saved: saved.flatten(), lambda saved: saved.double(),
    lambda saved: saved.bfloat16(), lambda saved: torch.zeros(1), lambda saved: saved.to("meta"),
    lambda saved: saved.repeat(2, *[1] * (saved.dim() - 1)),
])  # fmt: skip
@pytest.mark.parametrize("name", [*LAYERS, "LSTMCell", "GRUCell"])
def test_an_unpack_hook_gives_something_else(name, change):
    """One saved tensor in turn: an exception, and nothing outside of it is read."""
    for turn in range(8):
        module, (x, state) = getattr(fastrnn, name)(I, H), given(name, requires_grad=True)
        taken = itertools.count()

        def unpack(saved, taken=taken, turn=turn):
            return change(saved) if next(taken) == turn and saved.numel() > 1 and saved.dtype.is_floating_point else saved

        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
            output = tree_leaves(module(x, state))[0]
        found = outcome(output.sum().backward)
        assert found is None or issubclass(found, (RuntimeError, NotImplementedError, ValueError)), (turn, found)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_an_unpack_hook_gives_other_strides(name):
    gradients = []
    for own in (lambda saved: saved, lambda saved: saved.transpose(-1, 0).contiguous().transpose(-1, 0)):
        torch.manual_seed(0)
        module, (x, state) = getattr(fastrnn, name)(I, H), given(name, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, own):
            output = tree_leaves(module(x, state))[0]
        output.sin().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    assert_close(*gradients)


# Attributes


@pytest.mark.parametrize("attribute", ["bias", "bidirectional", "batch_first", "input_size", "hidden_size", "proj_size",
                                       "num_layers", "mode", "dropout", "training"])  # fmt: skip
@pytest.mark.parametrize("name", LAYERS)
def test_attributes_changed_later(name, attribute):
    """The very result of torch.nn, or an exception of the same type."""
    for value in (False, True, 0, 1, 2, 9, -1, 2**70, -(2**70), 4.0, 0.0, "False", "", None, "GRU", "LSTM", "RNN_RELU"):
        modules, (x, state) = twins(name, I, H), given(name)
        for hx in (None, state):
            if name == "LSTM" and attribute == "hidden_size" and hx is None and value in (1, 2, 9):
                # torch.nn reads the weights as if they were of that size, and past their ends
                modules[1].hidden_size = value
                with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 3, 6\), got \[1, 3, \d\]"):
                    modules[1](x)
                continue
            results = []
            for module in modules:
                module.__dict__[attribute] = value
                results.append(outcome(lambda module=module, x=x, hx=hx: module(x, hx)))
            expected, found = results
            if isinstance(expected, type) or isinstance(found, type):
                assert found is expected, (value, hx is None, found, expected)
            else:
                assert_close(found, expected)


@pytest.mark.parametrize("attribute", ["input_size", "hidden_size", "bias", "nonlinearity"])
@pytest.mark.parametrize("name", CELLS)
def test_attributes_of_cells_changed_later(name, attribute):
    for value in (False, True, 0, 9, 4.0, "relu", "tanh", "Relu", None):
        modules, (x, state) = twins(name, I, H), given(name)
        for hx in (None, state):
            for module in modules:
                module.__dict__[attribute] = value
            expected, found = (outcome(lambda module=module, x=x, hx=hx: module(x, hx)) for module in modules)
            if isinstance(expected, type) or isinstance(found, type):
                assert found is expected, (value, hx is None, found, expected)
            else:
                assert_close(found, expected)


def with_property(base, name, value):
    """A class whose attribute is computed, whatever the constructor wrote."""
    return type("Own", (base,), {name: property(lambda self: value, lambda self, new: self.__dict__.__setitem__(name, new))})


@pytest.mark.parametrize(("name", "attribute", "value"), [
    ("GRU", "batch_first", True), ("LSTM", "bidirectional", True), ("RNN", "mode", "RNN_RELU"), ("GRU", "input_size", 9),
    ("GRU", "hidden_size", 9), ("RNNCell", "nonlinearity", "relu"), ("GRUCell", "weight_ih", torch.ones(3 * H, I)),
    ("LSTM", "_flat_weights", [torch.ones(4 * H, I), torch.ones(4 * H, H), torch.ones(4 * H), torch.ones(4 * H)]),
])  # fmt: skip
def test_an_attribute_that_is_a_property(name, attribute, value):
    results = []
    for library in (nn, fastrnn):
        torch.manual_seed(0)
        module = getattr(library, name)(I, H)
        module.__class__ = with_property(getattr(library, name), attribute, value)
        x, _ = given(
            name, torch.linspace(-1, 1, B * I * (1 if name in CELLS else T)).view(*(() if name in CELLS else (T,)), B, I)
        )
        with torch.no_grad():
            results.append(outcome(lambda module=module, x=x: module(x)))
    if isinstance(results[0], type):
        assert results[0] is results[1]
    else:
        assert_close(*reversed(results))


@pytest.mark.parametrize("hook", ["__getattribute__", "__getattr__"])
def test_a_class_that_computes_its_attributes(hook):
    asked = set()

    def get(self, name):
        asked.add(name)
        return object.__getattribute__(self, name) if hook == "__getattribute__" else nn.Module.__getattr__(self, name)

    module = type("Own", (fastrnn.GRU,), {hook: get})(I, H)
    asked.clear()
    with torch.no_grad():
        module(torch.randn(T, B, I))
    assert ("batch_first" if hook == "__getattribute__" else "weight_hh_l0") in asked


def test_methods_replaced_in_a_module():
    """And attributes of one's own, which cost no fast path."""
    for name in ("check_input", "check_forward_args", "permute_hidden", "check_hidden_size"):
        module, seen = fastrnn.LSTM(I, H), []
        usual = getattr(module, name)
        setattr(module, name, lambda *args, usual=usual, seen=seen: (seen.append(1), usual(*args))[1])
        with torch.no_grad():
            module(torch.randn(T, B, I))
        assert seen, name
    module = fastrnn.GRU(I, H)
    module.tag = "mine"
    with torch.no_grad():
        assert fastrnn.dispatch.native.forward(module.__dict__, "GRU", torch.randn(T, B, I), None, False) is not None


# Changes in place


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("wanted", ["x", "h", "weights", "x weights", "h weights"])
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_what_backward_does_not_need_may_change(name, wanted, steps):
    """What torch.nn lets pass passes, with the same gradients: changes of leaves, but for GRU's initial state."""
    cell = name in CELLS
    if cell and steps > 1:
        return

    def run(library, changed):
        torch.manual_seed(0)
        module = getattr(library, name)(I, H, dtype=torch.float64)
        x = torch.randn(*(() if cell else (steps,)), B, I, dtype=torch.float64)
        h, c = torch.randn(2, *(() if cell else (1,)), B, H, dtype=torch.float64)
        h, c = h.clone(), c.clone()
        leaves = {"x": x, "h": h, "c": c} | {key.removesuffix("_l0"): value for key, value in module.named_parameters()}
        for key, value in leaves.items():
            value.requires_grad_(key in wanted.split() or ("_" in key and "weights" in wanted))
        output = sum(part.sin().sum() for part in tree_leaves(module(x, state_of(name, h, c))))
        if changed:
            with torch.no_grad():
                leaves[changed].mul_(1.5)
        inputs = [value for value in leaves.values() if value.requires_grad]
        return outcome(lambda: torch.autograd.grad(output, inputs))

    for changed in ("x", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        expected, found = run(nn, changed), run(fastrnn, changed)
        if isinstance(expected, type):
            assert found is expected, changed
        elif not ("GRU" in name and changed == "h"):
            assert_close(found, expected)
            assert_close(found, run(fastrnn, None))


@pytest.mark.parametrize("name", CELLS)
def test_an_optimizer_steps_between_two_backward_passes(name):
    """Of which the second one's derivative does need the weights as they were."""
    cell, x = getattr(fastrnn, name)(I, H), torch.randn(2, B, I)
    optimizer = torch.optim.SGD(cell.parameters(), 0.1)
    one, other = (tree_leaves(cell(part))[0].sin().sum() for part in x)
    expected = torch.autograd.grad(other, cell.parameters(), retain_graph=True)
    one.backward()
    optimizer.step()
    assert_close(torch.autograd.grad(other, cell.parameters(), retain_graph=True), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other, cell.parameters(), create_graph=True)


# Negative bits


@pytest.mark.parametrize("place", ["x", "state", "weight_hh", "bias_ih", "dy"])
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_contiguous_negative_views(name, place):
    suffix, results = "" if name in CELLS else "_l0", []
    for negated in (False, True):
        torch.manual_seed(0)
        module, (x, state) = getattr(fastrnn, name)(I, H), given(name)
        negate = torch._neg_view if negated else torch.neg
        if place == "x":
            x = negate(x)
        elif place == "state":
            state = state_of(name, *(negate(part) for part in tree_leaves(state)))
        elif place != "dy":
            setattr(module, place + suffix, nn.Parameter(negate(getattr(module, place + suffix).detach())))
        with torch.no_grad():
            results.append([tree_leaves(module(x, state))])
            if name in LAYERS:
                results[-1].append(module.step(x[0], state))
        output = tree_leaves(module(x.requires_grad_(), state))[0]
        upstream = negate(torch.randn(output.shape)) if place == "dy" else torch.ones_like(output)
        results[-1].append(torch.autograd.grad(output, (x, *module.parameters()), upstream))
    assert_close(*results)


# Sizes of zero


@pytest.mark.parametrize("sizes", [(0, 3, 2), (4, 0, 2), (4, 3, 0), (0, 0, 2), (4, 0, 0)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_cells_without_numbers(name, bias, sizes):
    """Of inputs, units and rows, with gradients."""
    inputs, hidden, rows = sizes
    results = []
    for module in twins(name, inputs, hidden, bias=bias):
        x, h = torch.ones(rows, inputs, requires_grad=True), torch.ones(rows, hidden)

        def run(module=module, x=x, h=h):
            output = tree_leaves(module(x, state_of(name, h, h)))
            loss = sum(part.sum() for part in output)
            return *output, *torch.autograd.grad(loss, (x, *module.parameters()), allow_unused=True)

        results.append(outcome(run))
    expected, found = results
    if isinstance(expected, type):
        assert found is expected
    else:
        assert [None if part is None else part.shape for part in found] == [
            None if part is None else part.shape for part in expected
        ]
        assert_close([part for part in found if part is not None], [part for part in expected if part is not None])


@pytest.mark.parametrize("shape", [(0, B, I), (T, 0, I), (0, 0, I), (T, B, 0), (0, I), (T, 0)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_numbers(name, shape):
    expected, found = (outcome(lambda module=module: module(torch.ones(shape))) for module in twins(name, I, H))
    if isinstance(expected, type):
        assert found is expected
    else:
        assert_close(found, expected)


# Dtypes, and what compress makes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_dtypes_that_torch_refuses(name, dtype, bias):
    x, _ = given(name)
    errors = []
    for module in twins(name, I, H, bias=bias, dtype=dtype):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            module(x)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def reads_float32(module):
    x, _ = given(type(module).__name__.removeprefix("Frozen"))
    return not isinstance(outcome(lambda: module(x)), type)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_the_mark_of_compression(name, bias):
    """It goes with copies, pickles and saved states, and leaves with the dtype."""
    module = fastrnn.compress(getattr(fastrnn, name)(I, H, bias=bias))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for copied in (module, copy.deepcopy(module), copy.copy(module), torch.load(buffer, weights_only=False)):
        assert copied._fastrnn_compressed and reads_float32(copied)
    fresh = getattr(fastrnn, name)(I, H, bias=bias)
    fresh.load_state_dict(module.state_dict())  # the values
    assert not fresh._fastrnn_compressed and reads_float32(fresh) and fresh.state_dict().keys() == module.state_dict().keys()
    fresh.load_state_dict(module.state_dict(), assign=True)  # the very tensors
    assert fresh._fastrnn_compressed and reads_float32(fresh)
    getattr(nn, name)(I, H, bias=bias).load_state_dict(module.state_dict())
    moved = copy.deepcopy(module).to("cpu")
    assert moved._fastrnn_compressed
    for convert in ("bfloat16", "half", "double", "float"):
        converted = getattr(copy.deepcopy(module), convert)()
        assert not converted._fastrnn_compressed and "_fastrnn_compressed" not in converted.__dict__
        assert reads_float32(converted) == (convert == "float")


def test_compress_and_freeze_in_either_order():
    module = fastrnn.freeze(fastrnn.LSTM(I, H).eval())
    twin, x = fastrnn.LSTM(I, H).eval(), torch.randn(T, B, I)
    fastrnn.compress(module)
    assert type(module) is fastrnn.LSTM and module._fastrnn_compressed
    twin.load_state_dict(module.state_dict())
    assert_close(module(x), twin(x))
    assert type(fastrnn.freeze(module)) is fastrnn.LSTM
    assert_close(module(x), twin(x))


def test_compress_leaves_computed_weights():
    module = nn.utils.parametrizations.orthogonal(fastrnn.GRU(I, H), "weight_hh_l0")
    fastrnn.compress(module)
    assert not module._fastrnn_compressed and module.weight_ih_l0.dtype is torch.float32


@pytest.mark.parametrize("name", LAYERS)
def test_freeze_after_weights_were_replaced(name):
    module, x = getattr(fastrnn, name)(I, H).eval(), torch.randn(T, B, I)
    torch.func.functional_call(module, {key: value * 2 for key, value in module.named_parameters()}, (x,))
    expected = module(x)
    torch.func.functional_call(module, {key: value * 2 for key, value in module.named_parameters()}, (x,))
    assert type(fastrnn.freeze(module)).__name__ == f"Frozen{name}"
    assert_close(module(x), expected)


# The rest


@pytest.mark.parametrize("shapes", [((3,), (3, 3), (3, 3)), ((2, 3), (2, 6, 6), (2, 6, 6)), ((3,), (3, 3), (3,))], ids=str)
def test_states_of_another_rank(shapes):
    """torch.nn's LSTMCell reads past the end of these."""
    x, h, c = map(torch.randn, shapes)
    with pytest.raises((ValueError, RuntimeError)):
        fastrnn.LSTMCell(3, h.shape[-1])(x, (h, c))


def test_empty_environment_variables_are_unset():
    names = "FASTRNN_BACKEND", "FASTRNN_CACHE_DIR", "FASTRNN_TRITON"
    body = "import torch, fastrnn\nprint(tuple(fastrnn.LSTM(4, 6)(torch.randn(5, 3, 4))[0].shape))"
    assert python(body, **dict.fromkeys(names, "")) == "(5, 3, 6)\n"
