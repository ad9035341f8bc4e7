"""freeze and thaw: weights packed once."""

import copy
import functools
import io

import pytest
import torch
from contract import threads
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import dispatch

I, H, B = 5, 19, 3
LAYERS, CELLS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")
VARIANTS = [{}, {"num_layers": 3, "bidirectional": True}, {"bias": False}, {"batch_first": True}, {"dtype": torch.float64}]


def parts(result):
    return [result] if isinstance(result, torch.Tensor) else [part for item in result for part in parts(item)]


def assert_same_bits(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(parts(found), parts(expected), strict=True))


def given(module, steps, batch=B):
    """x and states, of the module's dtype."""
    dtype, depth = module.weight_ih_l0.dtype, module.num_layers * (1 + module.bidirectional)
    x = torch.randn(*((batch, steps) if module.batch_first else (steps, batch)), I, dtype=dtype)
    h, c = (torch.randn(depth, batch, size, dtype=dtype) for size in (module.proj_size or H, H))
    return x, (h, c) if module.mode == "LSTM" else h


def frozen(name, *sizes, **options):
    """A frozen module and its ordinary twin."""
    twin = getattr(fastrnn, name)(*sizes, **options).eval()
    module = fastrnn.freeze(copy.deepcopy(twin))
    assert module._fastrnn_panels is not None and type(module).__name__ == f"Frozen{name}"
    return module, twin


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("steps", [2, 7, 300])
@pytest.mark.parametrize("options", [*VARIANTS, {"proj_size": 7, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_same_bits_as_ever(name, options, steps, count):
    if "proj_size" in options and name != "LSTM":
        options = {"nonlinearity": "relu"} if name == "RNN" else {}
    module, twin = frozen(name, I, H, **options)
    x, states = given(module, steps)
    with threads(count):
        for state in (None, states):
            with torch.no_grad():
                assert_same_bits(module(x, state), twin(x, state))
            assert not module(x, state)[0].requires_grad  # weights are constants, in whatever mode


@pytest.mark.parametrize("hidden", [1, 19, 300])
@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_has_the_bits_of_the_sequence(name, batch, hidden):
    """Which a step that reads the weights as they lie has not."""
    module, _ = frozen(name, I, hidden, 2)
    x = torch.randn(6, batch, I)
    expected, last = module(x)
    state, out = None, None
    for t in range(6):
        assert_same_bits(module(x[t : t + 1], state)[0][0], expected[t])
        y, state = module.step(x[t], state, out=out)
        assert_same_bits(y, expected[t])
        out = (torch.full_like(y, torch.nan), state)
    assert_same_bits(state, last)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name, bias):
    module, twin = frozen(name, I, H, bias=bias)
    x, h, c = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)
    assert fastrnn.freeze(module) is module  # anew
    module.load_state_dict({key: value / 2 for key, value in twin.state_dict().items()})
    twin.load_state_dict(module.state_dict())
    for state in (None, (h, c) if name == "LSTMCell" else h):
        found = parts(module(x, state))
        for value, right in zip(found, parts(twin(x, state)), strict=True):
            torch.testing.assert_close(value, right.detach())
            assert not value.requires_grad


@pytest.mark.parametrize("name", LAYERS)
def test_what_the_fast_path_does_not_take(name):
    module, twin = frozen(name, I, H)
    unbatched, packed = torch.randn(4, I), pack_sequence([torch.randn(n, I) for n in (5, 2)])
    for x in (unbatched, packed):
        found, expected = module(x), twin(x)
        a, b = (result[0].data if x is packed else result[0] for result in (found, expected))
        assert torch.equal(a, b) and not a.requires_grad
    torch._dynamo.reset()  # it allows a function, and forward is one for all modules, eight compilations
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    x = torch.randn(4, B, I)
    assert torch.equal(compiled(x)[0], twin(x)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_those_of_the_moment(name):
    module, twin = frozen(name, I, H)
    x, _ = given(module, 4)
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.5)
        assert torch.equal(module(x)[0], twin(x)[0])
        changed = fastrnn.freeze(module)(x)[0]
        twin.weight_hh_l0.mul_(0.5)
        assert torch.equal(changed, twin(x)[0])
        module.load_state_dict({key: value * 0.5 for key, value in twin.state_dict().items()})
        twin.load_state_dict(module.state_dict())
        assert torch.equal(module(x)[0], twin(x)[0])
        module.double(), twin.double()
        assert torch.equal(module(x.double())[0], twin(x.double())[0])
        module.weight_hh_l0.mul_(0.5), twin.weight_hh_l0.mul_(0.5)
        assert torch.equal(fastrnn.thaw(module)(x.double())[0], twin(x.double())[0])
        assert type(module) is getattr(fastrnn, name) and "_fastrnn_panels" not in module.__dict__
        module.weight_ih_l0.mul_(0.5), twin.weight_ih_l0.mul_(0.5)
        assert torch.equal(module(x.double())[0], twin(x.double())[0])


def test_refuses_training():
    module, _ = frozen("LSTM", I, H)
    cell, _ = frozen("GRUCell", I, H)
    x = torch.randn(4, B, I, requires_grad=True)
    for frozen_module, value in ((module, x), (cell, x[0])):
        with pytest.raises(RuntimeError, match=r"(LSTM|GRUCell) is frozen and has no gradients: call thaw\(\) to train"):
            frozen_module(value)
        with pytest.raises(RuntimeError, match=r"(LSTM|GRUCell) is frozen: call thaw\(\) before train\(\)"):
            nn.Sequential(frozen_module).train()
        assert frozen_module.eval() is frozen_module
    with pytest.raises(RuntimeError, match=r"GRU.* is frozen and has no gradients"):
        cell(x[0].detach(), torch.randn(B, H, requires_grad=True))
    with pytest.raises(
        RuntimeError, match=r"expected a model in evaluation mode, but a layer is training; call eval\(\) first"
    ):
        fastrnn.freeze(nn.Sequential(fastrnn.LSTM(I, H)))
    with torch.no_grad():
        assert module(x)[0].shape == (4, B, H)
    fastrnn.thaw(module).train()(x)[0].sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "GRUCell"])
def test_refuses_weights_in_place_of_its_own(name):
    """Its panels know nothing of them, nor of their gradients."""
    module = fastrnn.freeze(getattr(fastrnn, name)(3, 4).eval())
    x, own = torch.randn(5, 3), dict(module.named_parameters())
    other = {key: value.detach() * 2 for key, value in own.items()}
    of_another = {key: nn.Parameter(value) for key, value in other.items()}
    for given in (x, x.unsqueeze(0)) if name != "GRUCell" else (x, x[0]):
        torch.func.functional_call(module, own, (given,))
        for weights in (other, of_another, {next(iter(own)): of_another[next(iter(own))]}):
            with pytest.raises(RuntimeError, match=f"{name} is frozen and computes with its own weights: call thaw"):
                torch.func.functional_call(module, weights, (given,))
    with pytest.raises(RuntimeError, match="is frozen and computes with its own weights"):
        torch.func.grad(lambda weights: tree_leaves(torch.func.functional_call(module, weights, (x,)))[0].sum())(other)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_copies_and_pickles_are_thawed(name, tmp_path):
    module, _ = frozen(name, I, H)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    x = torch.randn(B, I) if name in CELLS else torch.randn(4, B, I)
    for copied in (copy.deepcopy(module), copy.copy(module), torch.load(buffer, weights_only=False)):
        assert type(copied) is getattr(fastrnn, name) and "_fastrnn_panels" not in copied.__dict__
        torch.testing.assert_close(parts(copied(x)), parts(module(x)))
    assert type(module).__name__ == f"Frozen{name}" and isinstance(module, getattr(nn, name))


def test_what_cannot_be_frozen_is_left_as_it_is():
    class Own(fastrnn.GRU):
        pass

    computed = fastrnn.GRU(I, H)
    parametrize.register_parametrization(computed, "weight_hh_l0", nn.Identity())
    model = nn.Sequential(
        computed, fastrnn.LSTM(I, H).bfloat16(), fastrnn.compress(fastrnn.RNN(I, 20)), nn.GRU(I, H), Own(I, H), nn.Linear(I, H)
    ).eval()
    classes = [type(module) for module in model]
    assert fastrnn.freeze(model) is model
    assert [type(module) for module in model[:4]] == classes[:4] and type(model[5]) is nn.Linear
    assert type(model[4]).__name__ == "FrozenOwn" and isinstance(model[4], Own)
    assert fastrnn.freeze(model) is model and type(model[4]).__name__ == "FrozenOwn"  # again: anew
    assert fastrnn.thaw(model) is model and [type(module) for module in model] == classes


def test_what_is_not_panels_is_not_read():
    """An attribute of that name may hold anything."""
    x = torch.randn(4, B, I)
    for value in (False, True, 3, torch.zeros(1), torch.zeros(0), torch.zeros(200, dtype=torch.uint8), (), (None,), (1, 2)):
        module = fastrnn.LSTM(I, H)
        expected = module(x)[0].detach()
        for held in (value, (value, *module.parameters())):
            module.__dict__["_fastrnn_panels"] = held
            with torch.no_grad():
                assert torch.equal(module(x)[0], expected)


def test_packed_input_that_requires_gradients_is_refused():
    module, _ = frozen("LSTM", I, H)
    with pytest.raises(RuntimeError, match="has no gradients"):
        module(pack_sequence([torch.randn(3, I, requires_grad=True)]))


def test_frozen_anew_where_it_cannot_be():
    module, _ = frozen("GRU", I, 20)
    fastrnn.compress(module)
    assert type(fastrnn.freeze(module)) is fastrnn.GRU and "_fastrnn_panels" not in module.__dict__
    module, _ = frozen("GRU", I, 20)
    parametrize.register_parametrization(module, "weight_hh_l0", nn.Identity())
    with pytest.raises(RuntimeError, match="ParametrizedFrozenGRU was derived from a frozen layer; undo that first"):
        fastrnn.thaw(module)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(fastrnn.thaw(module)) is fastrnn.GRU


def test_panels_are_written_whole():
    """What was in their memory before does not matter."""
    module, twin = frozen("LSTM", I, H, 2, bidirectional=True, bias=False)
    x, state = given(module, 5)
    for fill in (0x00, 0xFF):  # 0xFF everywhere is not a number
        poisoned = functools.partial(torch.full, fill_value=fill, dtype=torch.uint8)
        panels = dispatch.native.pack(twin.__dict__, "LSTM", lambda size, make=poisoned: make((size,)))
        assert len(panels) > 4 * sum(weight.numel() for weight in twin.parameters())
        module._fastrnn_panels = panels, *module.parameters()
        with torch.no_grad():
            assert_same_bits(module(x, state), twin(x, state))


class Guarded(fastrnn.GRU):
    def __setattr__(self, name, value):
        assert not name.startswith("_fastrnn")
        super().__setattr__(name, value)

    def __delattr__(self, name):
        raise AssertionError(name)


def test_a_class_that_guards_its_attributes_freezes():
    module = Guarded(I, H).eval()
    x = torch.randn(3, 2, I)
    with torch.no_grad():
        expected = module(x)[0]
        assert_same_bits(fastrnn.freeze(fastrnn.freeze(module)).float()(x)[0], expected)
        assert type(fastrnn.thaw(module)) is Guarded
        assert_same_bits(module(x)[0], expected)
