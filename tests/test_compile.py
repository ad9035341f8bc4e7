"""torch.compile takes the modules whole, with no setting by the user, and still sees what they are."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn

I, H, T, B = 3, 5, 4, 2
VARIANTS = [
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu", "bias": False}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"proj_size": 2}),
    ("GRU", {"num_layers": 2}),
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # Dynamo's own doing, whenever it traces an autograd.Function
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # and whenever it meets a computed weight, here of a parametrisation
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Asking(nn.Module):
    """A model that asks what its layer is, in every form, within its forward."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        y, state = self.rnn(x)
        answers = (
            isinstance(self.rnn, nn.LSTM),
            isinstance(self.rnn, (nn.GRU, nn.LSTM)),
            isinstance(self.rnn, nn.LSTM | nn.GRU),
            isinstance(self.rnn, fastrnn.LSTM),
            isinstance(self.rnn, nn.RNNBase),
            isinstance(self.rnn, nn.Linear),
            issubclass(type(self.rnn), nn.LSTM),
        )
        if isinstance(self.rnn, nn.LSTM):
            y = y + state[1].sum()
        return y, answers


class Scaled(fastrnn.LSTM):
    """A user's subclass with a forward of its own."""

    def __init__(self, scale):
        super().__init__(I, H, num_layers=2)
        self.scale = scale

    def forward(self, input, hx=None):
        y, state = super().forward(input, hx)
        return self.scale * y, state


def compiled(module, fullgraph=True):
    return torch.compile(module, backend="aot_eager", fullgraph=fullgraph)


def first(result):
    return result[0].data if isinstance(result[0], PackedSequence) else result[0]


def assert_compiles(module, *args, fullgraph=True):
    """Outputs and every gradient are those of the eager call."""
    results = []
    for call in (module, compiled(module, fullgraph)):
        module.zero_grad()
        y = first(call(*args))
        (y * y).sum().backward()
        results.append((y.detach(), {name: parameter.grad.clone() for name, parameter in module.named_parameters()}))
    (expected, right), (y, gradients) = results
    torch.testing.assert_close(y, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, right[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_layers(name, kwargs):
    module = getattr(fastrnn, name)(I, H, **kwargs)
    assert_compiles(module, torch.randn(B, T, I))
    assert_compiles(nn.Sequential(nn.Linear(I, I), module), torch.randn(B, T, I))


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name):
    module = getattr(fastrnn, name)(I, H)
    assert_compiles(nn.Sequential(module), torch.randn(B, I))


def test_initial_states_and_unbatched_input():
    lstm, gru = fastrnn.LSTM(I, H), fastrnn.GRU(I, H)
    h = torch.randn(1, B, H, requires_grad=True)
    assert_compiles(lstm, torch.randn(T, B, I), (h, torch.randn(1, B, H)))
    assert_compiles(lstm, torch.randn(T, B, I), [torch.randn(1, B, H), torch.randn(1, B, H)])
    assert_compiles(gru, torch.randn(T, B, I), h)
    assert_compiles(gru, torch.randn(T, I))


def test_inductor():
    module = nn.Sequential(nn.Linear(I, I), fastrnn.GRU(I, H))
    x = torch.randn(T, B, I)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x)[0], module(x)[0])


def test_no_gradients_and_training_flag():
    module = fastrnn.LSTM(I, H, 2, dropout=1.0)
    call, x = compiled(module), torch.randn(T, B, I)
    with torch.no_grad():
        torch.testing.assert_close(call(x)[0], module(x)[0])
        module.eval()
        torch.testing.assert_close(call(x)[0], module(x)[0])


@pytest.mark.parametrize("wrap", [lambda m: m, parametrizations.weight_norm], ids=["plain", "parametrised"])
@pytest.mark.parametrize("make", [lambda: fastrnn.LSTM(I, H, 2), lambda: Scaled(2.0)], ids=["ours", "user's"])
def test_isinstance_within_a_compiled_forward(make, wrap):
    rnn = make()
    if wrap is not parametrizations.weight_norm:
        wrap(rnn)
    else:
        wrap(rnn, "weight_hh_l1")
    model, x = Asking(rnn), torch.randn(T, B, I)
    y, answers = compiled(model)(x)
    expected, eager = model(x)
    assert answers == eager == (True, True, True, True, True, False, True)
    torch.testing.assert_close(y, expected)


def test_user_subclass():
    assert_compiles(Scaled(3.0), torch.randn(T, B, I))
    assert_compiles(nn.Sequential(Scaled(3.0)), torch.randn(T, B, I))


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1"])
def test_parametrisation_and_its_removal(name):
    module, x = fastrnn.LSTM(I, H, 2), torch.randn(T, B, I)
    parametrizations.weight_norm(module, name)
    assert_compiles(module, x)
    parametrize.remove_parametrizations(module, name)
    assert type(module) is fastrnn.LSTM
    assert_compiles(module, x)


def test_copies_and_pickles_of_a_compiled_module():
    module, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    call = compiled(module)
    expected = call(x)[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is fastrnn.LSTM
        torch.testing.assert_close(compiled(other)(x)[0], expected)


def test_writes_to_parameters_are_seen():
    module, x = fastrnn.GRU(I, H), torch.randn(T, B, I)
    call = compiled(module)
    call(x)
    module.weight_hh_l0.data.mul_(2)
    torch.testing.assert_close(call(x)[0], module(x)[0])
    module.weight_ih_l0 = nn.Parameter(module.weight_ih_l0.detach() * 2)
    torch.testing.assert_close(call(x)[0], module(x)[0])


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_one_graph_for_every_length_and_batch(name):
    module = getattr(fastrnn, name)(I, H, num_layers=2, batch_first=True)
    counter = CompileCounter()
    call = torch.compile(module, backend=counter, fullgraph=True)
    for batch, steps in ((2, 4), (3, 7), (5, 2), (4, 9)):
        x = torch.randn(batch, steps, I)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(call(x)[0], module(x)[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("sorted_already", [True, False])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_packed(name, sorted_already):
    """In several graphs: torch.nn's own code takes the batch size out of the data of a tensor."""
    module = getattr(fastrnn, name)(I, H)

    class Data(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = module

        def forward(self, data, batch_sizes, order, back):
            y, state = self.rnn(PackedSequence(data, batch_sizes, order, back))
            return y.data, state

    lengths = [4, 2, 1] if sorted_already else [2, 4, 1]
    packed = pack_padded_sequence(torch.randn(4, 3, I), lengths, enforce_sorted=sorted_already)
    assert_compiles(Data(), *packed, fullgraph=False)


def test_hooks_run():
    module = fastrnn.LSTM(I, H)
    module.register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))
    assert_compiles(nn.Sequential(module), torch.randn(T, B, I))


def test_torch_is_as_it_was_for_its_own_layers():
    assert not torch._dynamo.config.allow_rnn
    compiled(fastrnn.LSTM(I, H))(torch.randn(T, B, I))
    assert not torch._dynamo.config.allow_rnn
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        compiled(nn.Sequential(nn.LSTM(I, H)))(torch.randn(T, B, I))


@pytest.mark.parametrize("first", ["torch._dynamo", "fastrnn"])
def test_import_order(first):
    program = f"""
import sys, importlib
importlib.import_module({first!r})
assert ("torch._dynamo.variables.builder" in sys.modules) == ({first!r} != "fastrnn"), "importing fastrnn costs seconds"
import torch, torch._dynamo, fastrnn
assert "torch._dynamo" not in [getattr(finder, "name", "") for finder in sys.meta_path]
from torch._dynamo.variables import builder
import inspect
assert "def wrap_module(" in inspect.getsource(builder)
torch.compile(fastrnn.GRU(2, 3), backend="eager", fullgraph=True)(torch.randn(1, 2, 2))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
