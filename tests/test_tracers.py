"""Calls that no engine takes leave a compiled graph; transforms, inductor and TorchScript take our modules as torch.nn's."""

import copy
import importlib.util
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import dispatch

I, H, T, B = 4, 6, 5, 3
LAYERS = ["RNN", "LSTM", "GRU"]
TORCHS = torch.rnn_tanh, torch.lstm, torch.gru

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.jit.*is deprecated"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(name, **options):
    """torch.nn's layer and ours over the same weights."""
    theirs = getattr(nn, name)(I, H, **options)
    return theirs, fastrnn.convert(copy.deepcopy(theirs))


class Graphs:
    """A backend that keeps the graphs it compiles."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph, examples):
        self.seen.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    def hold(self, *targets) -> bool:
        return any(node.target in targets for graph in self.seen for node in graph.graph.nodes)


def trained(module, call, x):
    """Output, states, and the gradients of parameters and input, by name."""
    module.zero_grad()
    x = x.detach().requires_grad_(x.is_floating_point() or x.is_complex())
    y, state = call(x)
    y.abs().square().sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"y": y.detach(), "state": torch.utils._pytree.tree_leaves(state)[-1].detach(), "x": x.grad, **grads}


def assert_same(found, expected):
    for name, value in expected.items():
        if value.is_meta:
            assert found[name].is_meta
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


# Calls that no engine takes: the layer's options, the input, what else is set.
ODD = {
    "no rows, two layers of two directions": ({"num_layers": 2, "bidirectional": True}, torch.randn(T, 0, I)),
    "complex": ({"dtype": torch.complex64}, torch.randn(T, B, I, dtype=torch.complex64)),
    "meta": ({"device": "meta"}, torch.randn(T, B, I, device="meta")),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_call_that_no_engine_takes_is_torchs(name, odd):
    """Its values, its gradients, and no decomposition of torch.lstm and the like, which can kill the process."""
    options, x = ODD[odd]
    theirs, ours = pair(name, **options)
    graphs = Graphs()
    assert_same(trained(ours, torch.compile(ours, backend=graphs), x), trained(theirs, theirs, x))
    assert not graphs.hold(*TORCHS)


@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_call_without_an_engine_is_torchs(name, monkeypatch):
    """Where another engine is forced, or the CPU's is not there."""
    theirs, ours = pair(name, num_layers=2)
    x = torch.randn(T, B, I)
    expected = trained(theirs, theirs, x)
    for attribute, value in (("forced", "torch"), ("unavailable", "not built")):
        with monkeypatch.context() as patched:
            patched.setattr(dispatch, "native", None)
            patched.setattr(dispatch, attribute, value)
            torch._dynamo.reset()
            graphs = Graphs()
            assert_same(trained(ours, torch.compile(ours, backend=graphs), x), expected)
            assert not graphs.hold(*TORCHS)


@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_call_that_torch_refuses_raises_its_error(name):
    theirs, ours = pair(name)
    for x in (
        torch.randn(0, B, I),
        torch.randn(T, B, I + 1),
        torch.randn(T, B, I, dtype=torch.float64),
        torch.randn(T, B, I, 1),
    ):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            theirs(x)
        with pytest.raises(expected.type) as found:
            torch.compile(ours, backend="aot_eager")(x)
        assert str(found.value).splitlines()[0] == str(expected.value)


def test_fullgraph_where_no_engine_takes_the_call():
    """It is refused, as torch.nn's layers are; `allow_rnn` is the user's word for torch's decomposition."""
    ours, x = fastrnn.GRU(I, H), torch.randn(T, 0, I)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="no engine of fastrnn takes the call"):
        torch.compile(ours, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        assert torch.compile(ours, backend="eager", fullgraph=True)(x)[0].shape == (T, 0, H)


def test_lengths_of_a_dynamic_graph_to_the_least():
    theirs, ours = pair("LSTM", num_layers=2, bidirectional=True)
    call = torch.compile(ours, backend="aot_eager", dynamic=True)
    for steps, rows in ((5, 3), (1, 1), (2, 1), (1, 4), (7, 2), (5, 0)):
        x = torch.randn(steps, rows, I)
        torch.testing.assert_close(call(x), theirs(x))


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_gradients_of_functional_call(name):
    """The graph returns gradients alone, and the module lists its own weights as before."""
    theirs, ours = pair(name, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I)
    parameters = {name: parameter.detach() * 2 for name, parameter in ours.named_parameters()}

    def gradients(module):
        return grad(lambda parameters: functional_call(module, parameters, (x,))[0].square().sum())

    graphs = Graphs()
    found = torch.compile(gradients(ours), backend=graphs, fullgraph=True)(parameters)
    assert_same(found, gradients(theirs)(parameters))
    assert len(graphs.seen) == 1
    assert graphs.hold(torch.ops.fastrnn.layer_forward.default)
    assert all(weight is own for weight, own in zip(ours._flat_weights, ours.parameters(), strict=True))
    assert ours._flat_weight_refs == [weakref.ref(weight) for weight in ours.parameters()]


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_per_sample_gradients(name):
    theirs, ours = pair(name, batch_first=True)
    x = torch.randn(B, T, I)
    parameters = {name: parameter.detach() for name, parameter in ours.named_parameters()}

    def loss(module, parameters, x):
        return functional_call(module, parameters, (x[None],))[0].square().sum()

    graphs = Graphs()
    per_sample = vmap(grad(lambda parameters, x: loss(ours, parameters, x)), (None, 0))
    found = torch.compile(per_sample, backend=graphs, fullgraph=True)(parameters, x)
    assert graphs.hold(torch.ops.fastrnn.layer_forward.default)
    for index in range(B):
        theirs.zero_grad()
        theirs(x[index : index + 1])[0].square().sum().backward()
        one = {name: gradients[index] for name, gradients in found.items()}
        assert_same(one, {name: parameter.grad for name, parameter in theirs.named_parameters()})


@pytest.mark.filterwarnings("ignore")  # torch warns of itself, of leaves and of Dynamo's own deprecations
def test_compiled_autograd():
    """Of a forward pass that ran eagerly."""
    theirs, ours = pair("LSTM")
    x = torch.randn(T, B, I)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        ours(x)[0].square().sum().backward()
    theirs(x)[0].square().sum().backward()
    assert_same({n: p.grad for n, p in ours.named_parameters()}, {n: p.grad for n, p in theirs.named_parameters()})


def test_inductor_knows_the_operators():
    """It takes no operator for granted where `implicit_fallbacks` is off."""
    from torch._inductor import lowering

    names = "layer_forward", "layer_backward", "checkpoint_forward", "checkpoint_backward"
    assert all(getattr(torch.ops.fastrnn, name).default in lowering.lowerings for name in names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_inductor_without_implicit_fallbacks():
    theirs, ours = pair("LSTM", num_layers=2)
    x, lengths = torch.randn(T, B, I), torch.tensor([5, 3, 2])
    with torch._inductor.config.patch(implicit_fallbacks=False):
        call = torch.compile(lambda x, lengths: ours(pack_padded_sequence(x, lengths))[0].data * 2)
        y = call(x, lengths)
        y.sum().backward()
    expected = theirs(pack_padded_sequence(x, lengths))[0].data * 2
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    assert_same({n: p.grad for n, p in ours.named_parameters()}, {n: p.grad for n, p in theirs.named_parameters()})


SCRIPTED = """
import torch
from torch.nn.utils.rnn import PackedSequence

class Scripted(torch.jit.ScriptModule):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    @torch.jit.script_method
    def forward(self, x):
        return self.rnn(x)[0]

class Packed(torch.nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x: PackedSequence):
        return self.rnn(x)[0].data
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A module of SCRIPTED's classes; TorchScript reads their source in a file."""
    path = tmp_path / "scripted_models.py"
    path.write_text(SCRIPTED)
    spec = importlib.util.spec_from_file_location("scripted_models", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scripted_models", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LAYERS)
def test_a_script_module_holds_a_layer(name, scripted):
    theirs, ours = pair(name, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I)
    torch.testing.assert_close(scripted.Scripted(ours)(x), theirs(x)[0])
    packed = pack_padded_sequence(x, [5, 3, 2])
    torch.testing.assert_close(torch.jit.script(scripted.Packed(ours))(packed), theirs(packed)[0].data)


@pytest.mark.parametrize("name", [*LAYERS, "LSTMCell"])
def test_scripting_leaves_the_model_as_it_was(name, scripted):
    """The layer in it stays ours, and frozen where it is; what was compiled is torch.nn's, without the panels."""
    model = nn.Sequential(getattr(fastrnn, name)(I, H)).eval()
    x = torch.randn(B, I) if "Cell" in name else torch.randn(T, B, I)
    expected = model(x)
    for frozen in (False, True):
        if frozen:
            fastrnn.freeze(model)
        before, own_class = dict(vars(model[0])), type(model[0])
        compiled = torch.jit.script(model)
        assert type(model[0]) is own_class
        assert vars(model[0]) == before
        part = dict(compiled.named_modules())["0"]
        assert part.original_name == name
        assert not hasattr(part, "_fastrnn_panels")
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(model(x), expected)


def test_scripting_that_fails_leaves_the_model_as_it_was():
    class Unscriptable(nn.Module):
        def forward(self, x):
            return super().forward(**x)

    model = nn.Sequential(fastrnn.GRU(I, H), Unscriptable())
    with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(model)
    assert type(model[0]) is fastrnn.GRU
