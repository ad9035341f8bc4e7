"""convert, revert and patch: whole models, and modules of classes that somebody derived from torch.nn's."""

import abc
import copy
import functools
import gc
import itertools
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import pytest
import torch
from test_modules import B, H, I, T, assert_same, assert_same_run, both
from torch import nn
from torch.ao.pruning._experimental.pruner import LSTMSaliencyPruner
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.derived import converted_class, original_class
from fastrnn.modules import DROP_INS

OURS = tuple(DROP_INS.values())


# --- classes as people derive them


class Special(nn.LSTM):
    """Nothing of its own."""


class Doubled(nn.GRU):
    """A forward around torch.nn's, and names that fastrnn's layers have, too."""

    factor = 2

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.note = "kept"
        self.calls = 0

    def forward(self, x, hx=None):
        self.calls += 1
        y, h = super().forward(x, hx)
        return self.factor * y, h

    def step(self):
        return "own step"

    def recompute(self):
        return "own recompute"

    def _fallback(self, *args):
        raise AssertionError("a method that ours took for one of theirs")

    _original_class = _own_class = _mixin = _asks = _fast_path = _panels = _has_own_checks = _fallback


class Further(Doubled):
    factor = 3


class WithLengths(abc.ABC, nn.RNNBase):
    """As pytorch-forecasting's layers: a base that knows neither LSTM nor GRU, begins with ABC, and takes lengths of 0."""

    @abc.abstractmethod
    def keep(self, state, rows): ...

    def forward(self, x, hx=None, lengths=None):
        if lengths is None or isinstance(x, PackedSequence):
            return super().forward(x, hx)
        packed = pack_padded_sequence(x, lengths.clamp(min=1), batch_first=self.batch_first, enforce_sorted=False)
        y, state = super().forward(packed, hx)
        y, _ = pad_packed_sequence(y, batch_first=self.batch_first)
        return y, self.keep(state, (lengths > 0)[None, :, None])


class LSTMWithLengths(WithLengths, nn.LSTM):
    def keep(self, state, rows):
        return tuple(tensor * rows for tensor in state)


class GRUWithLengths(WithLengths, nn.GRU):
    def keep(self, state, rows):
        return state * rows


class Listing(type):
    """A metaclass that keeps a list of all classes and asks for a keyword."""

    known: ClassVar[list[str]] = []

    def __new__(cls, name, bases, namespace, *, label):
        Listing.known.append(name)
        return super().__new__(cls, name, bases, namespace)

    def __init__(cls, name, bases, namespace, *, label):
        super().__init__(name, bases, namespace)


class Listed(nn.LSTM, metaclass=Listing, label="a"):
    subclasses: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, needed):
        Listed.subclasses.append(cls.__name__)


Item = TypeVar("Item")


class Typed(Generic[Item], nn.RNN):
    pass


class Slotted(nn.LSTM):
    __slots__ = ("slot",)


class Strict(nn.GRU):
    def __setattr__(self, name, value):
        assert name != "__class__", "somebody changes the class"
        super().__setattr__(name, value)


class LateMixin:
    def forward(self, x, hx=None):
        raise AssertionError("torch.nn's forward comes first")


class WithMixin(nn.GRU, LateMixin):
    pass


class OwnCell(nn.LSTMCell):
    def forward(self, x, hx=None):
        h, c = super().forward(x, hx)
        return h + 1, c


class SpecialGRUCell(nn.GRUCell):
    pass


class SpecialRNNCell(nn.RNNCell):
    pass


class OwnArithmetic(nn.RNN):
    """Takes torch.nn's weights, and computes something else."""

    def forward(self, x):
        return x @ self.weight_ih_l0.t()


LAYERS = [Special, Doubled, Further, LSTMWithLengths, GRUWithLengths, Listed, Typed, Slotted, Strict, WithMixin]
CELLS = [OwnCell, SpecialGRUCell, SpecialRNNCell]
DERIVED = LAYERS + CELLS


def pair(cls, *args, **kwargs):
    """A module of a derived class, and a converted one with the same weights."""
    torch.manual_seed(0)
    theirs = cls(*(args or (I, H)), **kwargs)
    return theirs, fastrnn.convert(copy.deepcopy(theirs))


def sample(cls):
    return torch.randn(B, I) if cls in CELLS else torch.randn(T, B, I)


def assert_both(module, cls):
    """It is ours and the class's, and looks like the class's."""
    assert isinstance(module, OURS) and isinstance(module, cls) and type(module) is not cls
    assert (type(module).__name__, type(module).__qualname__, type(module).__module__, type(module).__doc__) == (
        cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__)  # fmt: skip


@pytest.fixture
def no_kernels_of_torch(monkeypatch):
    """torch.nn's own path fails."""

    def fail(*args):
        raise AssertionError("torch.nn's kernels run")

    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
        monkeypatch.setattr(torch._VF, name, fail, raising=False)


# --- whole models


def stock_model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "lstm": nn.LSTM(I, H, 2, dropout=0.5),
            "deep": nn.Sequential(nn.GRU(I, H), nn.Sequential(nn.RNN(I, H, nonlinearity="relu"))),
            "cells": nn.ModuleList([nn.RNNCell(I, H), nn.LSTMCell(I, H), nn.GRUCell(I, H)]),
            "head": nn.Linear(H, 2),
            "special": Special(I, H),
        }
    )


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


def test_convert_in_place():
    model = stock_model().eval()
    model["deep"].train()
    before, flags = kinds(model), [module.training for module in model.modules()]
    parameters, modules = list(model.parameters()), list(model.modules())
    seen = []
    hook = model["lstm"].register_forward_hook(lambda *args: seen.append(1))
    model["lstm"].note = "kept"
    x = torch.randn(T, B, I)
    expected = model["lstm"](x)
    assert fastrnn.convert(model) is model
    expected_kinds = {name: DROP_INS.get(kind, kind) for name, kind in before.items()}
    assert kinds(model) == expected_kinds | {"special": converted_class(Special)}
    assert sum(kind in DROP_INS.values() for kind in kinds(model).values()) == 6
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [module.training for module in model.modules()] == flags
    assert model["lstm"].note == "kept"
    assert_same(model["lstm"](x), expected)
    assert seen == [1, 1]
    converted = kinds(model)
    assert kinds(fastrnn.convert(model)) == converted  # again changes nothing
    hook.remove()
    assert type(pickle.loads(pickle.dumps(model["lstm"]))) is fastrnn.LSTM

    assert fastrnn.revert(model) is model
    assert kinds(model) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert kinds(fastrnn.revert(model)) == before
    assert kinds(fastrnn.convert(model)) == converted


def test_convert_a_copy_and_a_single_layer():
    model = stock_model()
    before = kinds(model)
    copied = fastrnn.convert(model, inplace=False)
    assert kinds(model) == before
    assert type(copied["lstm"]) is fastrnn.LSTM
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    assert_same_run(copied["lstm"].eval(), model["lstm"].eval(), torch.randn(T, B, I))
    layer = nn.GRU(I, H)
    assert fastrnn.convert(layer) is layer
    assert type(layer) is fastrnn.GRU


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_convert_leaves_the_rest_alone():
    """A traced part refuses that its attributes be set; other modules of the user's may, too."""

    class Sealed(nn.Module):
        def __setattr__(self, name, value):
            raise AssertionError(f"{name} is set")

    sealed = Sealed.__new__(Sealed)
    sealed.__dict__.update(nn.Module().__dict__)
    x = torch.randn(T, B, I)
    traced, traced_layer = (torch.jit.trace(module, (x,)) for module in (nn.Linear(I, 2), nn.GRU(I, H)))
    scripted = torch.jit.script(nn.Sequential(nn.Linear(I, 2)))
    model = nn.ModuleList([sealed, traced, traced_layer, scripted, nn.GRU(I, H)])
    before = kinds(model)
    fastrnn.convert(model)
    assert kinds(model) == before | {"4": fastrnn.GRU}
    assert kinds(fastrnn.revert(model)) == before
    assert traced(x).shape == scripted(x).shape == (T, B, 2)


def test_revert_what_was_built_as_ours():
    """Also what was frozen; but not a class derived from ours, which has no other."""

    class Mine(fastrnn.LSTM):
        pass

    model = nn.ModuleList([fastrnn.GRU(I, H), fastrnn.LSTMCell(I, H), Mine(I, H), Special(I, H)]).eval()
    fastrnn.freeze(fastrnn.convert(model))
    parameters = list(model.parameters())
    assert [type(module) for module in fastrnn.revert(model)] == [nn.GRU, nn.LSTMCell, Mine, Special]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any("_fastrnn_panels" in vars(module) for module in model)
    model.train()


# --- derived classes


@pytest.mark.parametrize("cls", DERIVED)
def test_convert_reaches_a_derived_class(cls, no_kernels_of_torch, monkeypatch):
    torch.manual_seed(0)
    module = cls(I, H)
    before, parameters = repr(module), list(module.parameters())
    fastrnn.convert(module)
    assert_both(module, cls)
    assert repr(module) == before
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    x = sample(cls)
    result = module(x)
    assert type(fastrnn.convert(module)) is type(module) is converted_class(cls)
    assert type(cls(I, H)) is cls  # others of the class stay
    fastrnn.revert(module)
    assert type(module) is cls
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    with pytest.raises(AssertionError, match="kernels run"):
        module(x)
    monkeypatch.undo()
    assert_same(result, module(x))


@pytest.mark.parametrize("cls", DERIVED)
def test_gradients_of_a_derived_class(cls):
    theirs, own = pair(cls)
    assert_same_run(own, theirs, sample(cls))


@pytest.mark.parametrize("options", [{"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("cls", [LSTMWithLengths, GRUWithLengths])
def test_a_class_that_takes_lengths_of_zero(cls, options, no_kernels_of_torch, monkeypatch):
    torch.manual_seed(0)
    theirs = cls(I, H, **options)
    own = fastrnn.convert(copy.deepcopy(theirs))
    x, lengths = torch.randn(*((3, T) if own.batch_first else (T, 3)), I), torch.tensor([0, T, 2])
    result = own(x, lengths=lengths)
    monkeypatch.undo()
    assert_same(result, theirs(x, lengths=lengths))
    assert_same_run(own, theirs, x, None, lengths)


def test_what_a_derived_class_defines_holds():
    theirs, own = pair(Doubled)
    assert (own.note, own.step(), own.recompute(), own.factor) == ("kept", "own step", "own recompute", 2)
    own(torch.randn(T, B, I))
    assert own.calls == 1
    own.factor = 5
    x = torch.randn(T, B, I)
    assert_same(own(x)[0], 2.5 * theirs(x)[0])
    assert own.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(own.state_dict())
    again = type(own)(I, H)  # as code does that copies itself
    assert type(again) is type(own) and again.note == "kept"


def test_code_that_computes_otherwise_runs_as_it_is():
    x = torch.randn(T, B, I)
    theirs, own = pair(OwnArithmetic)
    assert_both(own, OwnArithmetic)
    assert torch.equal(own(x), theirs(x))

    class Naming(nn.GRU):
        def forward(self, x):
            return nn.GRU.forward(self, x)[0]

    theirs, own = pair(Naming)
    assert torch.equal(own(x), theirs(x))


def test_checks_of_a_derived_class_are_asked():
    class Checking(nn.GRU):
        def check_input(self, input, batch_sizes):
            raise KeyError("own check")

    with pytest.raises(KeyError, match="own check"):
        fastrnn.convert(Checking(I, H))(torch.randn(T, B, I))


def test_a_class_is_made_once_and_not_kept():
    class Local(nn.LSTM):
        pass

    modules, made = [Local(I, H) for _ in range(8)], []
    threads = [threading.Thread(target=fastrnn.convert, args=(module,)) for module in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {type(module) for module in modules} == set(Local.__subclasses__()) and len(Local.__subclasses__()) == 1
    frozen = fastrnn.freeze(fastrnn.convert(Local(I, H)).eval())
    assert type(frozen) is type(fastrnn.freeze(fastrnn.convert(Local(I, H)).eval()))
    made = [weakref.ref(cls) for cls in (type(frozen), *Local.__subclasses__())]
    del modules, frozen, thread, threads
    gc.collect()
    assert [cls() for cls in made] == [None, None] and Local.__subclasses__() == []


def test_hooks_for_subclasses_do_not_hear_of_made_classes():
    known = list(Listing.known)
    module = fastrnn.convert(Listed(I, H)).eval()
    fastrnn.revert(fastrnn.freeze(module))
    assert Listing.known == known and Listed.subclasses == []


# --- pickles and copies


class Rebuilt(nn.GRU):
    """Pickled by arguments of its own."""

    def __init__(self, width):
        super().__init__(I, width)

    def __reduce__(self):
        return type(self), (self.hidden_size,), self.__getstate__()


class RebuiltByFunction(nn.GRU):
    def __reduce_ex__(self, protocol):
        return rebuild, (self.hidden_size,), self.__getstate__()


def rebuild(width):
    return RebuiltByFunction(I, width)


def round_trips(module, path):
    """Copies of a module by every way there is."""
    torch.save(module, path)
    yield torch.load(path, weights_only=False)
    yield copy.copy(module)
    yield copy.deepcopy(module)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(module, protocol))
        yield pickle.loads(pickle._dumps(module, protocol))


@pytest.mark.parametrize("cls", [*DERIVED, Rebuilt, RebuiltByFunction])
def test_pickle_and_copy_a_derived_class(cls, tmp_path):
    torch.manual_seed(0)
    module = fastrnn.convert(cls(H) if cls is Rebuilt else cls(I, H))
    module.tag = [1]
    x = sample(cls)
    for again in round_trips(module, tmp_path / "module"):
        assert type(again) is type(module) and again.tag == [1]
        assert_same(again(x), module(x))
    inside = copy.deepcopy(nn.ModuleList([module, module]))
    assert inside[0] is inside[1] and type(inside[0]) is type(module)


def test_a_pickle_reads_where_nothing_was_converted(tmp_path):
    """Ours reads as ours, and a pickle of torch.nn's class as torch.nn's."""
    modules = [fastrnn.convert(cls(I, H)) for cls in (Doubled, GRUWithLengths, OwnCell)]
    (tmp_path / "ours").write_bytes(pickle.dumps(modules))
    (tmp_path / "theirs").write_bytes(pickle.dumps(Doubled(I, H)))
    script = f"""
import pickle, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
modules = pickle.load(open({str(tmp_path / "ours")!r}, "rb"))
theirs = pickle.load(open({str(tmp_path / "theirs")!r}, "rb"))
import fastrnn, test_convert
from test_convert import Doubled, GRUWithLengths, OwnCell, OURS
for module, cls in zip(modules, (Doubled, GRUWithLengths, OwnCell), strict=True):
    assert isinstance(module, OURS) and isinstance(module, cls) and type(module) is not cls, type(module)
assert type(theirs) is Doubled
modules[0](test_convert.sample(Doubled))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# --- with what else fastrnn and torch do


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@pytest.mark.parametrize("cls", LAYERS)
def test_compile_a_derived_class(cls):
    theirs, own = pair(cls)
    torch._dynamo.reset()

    class Net(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            assert isinstance(self.layer, nn.RNNBase)
            return self.layer(x)

    net = Net(own)
    net.compile(fullgraph=True, backend="aot_eager")
    assert_same_run(net, Net(theirs), torch.randn(T, B, I))


@pytest.mark.parametrize("cls", DERIVED)
def test_freeze_a_derived_class(cls):
    module = fastrnn.convert(cls(I, H)).eval()
    x = sample(cls)
    with torch.no_grad():
        expected = module(x)
        own_class = type(module)
        assert fastrnn.freeze(module) is module
        assert isinstance(module, cls) and "_fastrnn_panels" in vars(module)
        assert_same(module(x), expected)
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(again) is own_class
            assert_same(again(x), expected)
        assert type(fastrnn.thaw(module)) is own_class
        assert_same(module(x), expected)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight * 2


def parametrized(cls):
    torch.manual_seed(0)
    module = cls(I, H)
    for name in ("weight_hh_l0", "bias_ih_l0"):
        parametrize.register_parametrization(module, name, Halved())
    return module


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, Special, Doubled, GRUWithLengths])
def test_convert_a_parametrized_module(cls, no_kernels_of_torch, monkeypatch):
    x = torch.randn(T, B, I)
    theirs, module = parametrized(cls), parametrized(cls)
    parameters = list(module.parameters())
    own = fastrnn.convert(module)
    assert isinstance(own, OURS) and isinstance(own, cls)
    assert parametrize.is_parametrized(own) and type(own).__name__ == type(theirs).__name__
    result = own(x)
    monkeypatch.undo()
    assert_same(result, theirs(x))
    assert_same_run(own, theirs, x)
    with torch.no_grad():
        copied = copy.deepcopy(parametrized(cls))
        assert type(fastrnn.convert(copied, inplace=False)) is not type(copied)
        assert not isinstance(copied, OURS)
    fastrnn.revert(own)
    assert parametrize.type_before_parametrizations(own) is cls
    assert all(a is b for a, b in zip(own.parameters(), parameters, strict=True))
    assert_same_run(own, theirs, x)
    fastrnn.convert(own)
    for module in (own, theirs):
        for name in ("weight_hh_l0", "bias_ih_l0"):
            parametrize.remove_parametrizations(module, name)
    assert type(own) is converted_class(cls) and type(theirs) is cls
    assert_same_run(own, theirs, x)


def test_parametrize_what_was_converted():
    x = torch.randn(T, B, I)
    theirs, own = pair(Doubled)
    for module in (theirs, own):
        parametrize.register_parametrization(module, "weight_hh_l0", Halved())
    assert_same_run(own, theirs, x)
    fastrnn.revert(own)
    assert not isinstance(own, OURS) and parametrize.type_before_parametrizations(own) is Doubled
    parametrize.register_parametrization(own, "weight_ih_l0", Halved())
    fastrnn.convert(own)
    parametrize.register_parametrization(theirs, "weight_ih_l0", Halved())
    assert_same_run(own, theirs, x)


def test_classes_there_and_back():
    for cls in (*DROP_INS, *DERIVED):
        assert original_class(converted_class(cls)) is cls
        assert converted_class(converted_class(cls)) is converted_class(cls)
        assert original_class(cls) is cls
    assert converted_class(nn.Linear) is original_class(nn.Linear) is nn.Linear
    assert converted_class(nn.RNNBase) is nn.RNNBase  # which has no forward


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_script_a_derived_class():
    """TorchScript gets the class that somebody wrote."""
    theirs, own = pair(OwnArithmetic)
    x = torch.randn(T, B, I)
    assert_same(torch.jit.script(own)(x), torch.jit.script(theirs)(x))


class Pruned(nn.Module):
    def __init__(self, namespace):
        super().__init__()
        torch.manual_seed(0)
        self.layer = namespace.LSTM(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0])


def test_the_structured_pruner_of_torch_ao_finds_ours():
    def prune(model):
        config = [{"tensor_fqn": "layer.weight_ih_l0"}, {"tensor_fqn": "layer.weight_hh_l0"}]
        pruner = LSTMSaliencyPruner({"sparsity_level": 0.5})
        pruner.prepare(model, config)
        pruner.enable_mask_update = True
        pruner.step()
        return pruner.prune()

    theirs, own = (prune(Pruned(namespace).eval()) for namespace in (nn, fastrnn))
    assert isinstance(own.layer, fastrnn.LSTM)
    assert own.layer.weight_hh_l0.shape == theirs.layer.weight_hh_l0.shape != (32, 8)
    x = torch.randn(T, B, 8)
    assert_same(own(x), theirs(x))


@pytest.mark.filterwarnings("ignore:torch.*deprecated")  # so is all of torch.ao.quantization
def test_quantize_dynamic_finds_what_was_reverted():
    model = nn.Sequential(fastrnn.LSTM(8, 8))
    assert type(torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})[0]) is fastrnn.LSTM
    quantized = torch.ao.quantization.quantize_dynamic(fastrnn.revert(model), {nn.LSTM})
    assert type(quantized[0]) is torch.ao.nn.quantized.dynamic.LSTM


# --- patch


def test_patch():
    early, stock_inits = nn.LSTM, [(cls, cls.__init__) for cls in (*DROP_INS, nn.RNNBase, nn.RNNCellBase)]
    with fastrnn.patch():
        assert kinds(stock_model()) == kinds(fastrnn.convert(stock_model()))
        assert type(early(I, H)) is fastrnn.LSTM
        assert isinstance(nn.GRU(I, H), nn.GRU)
        with fastrnn.patch():
            assert type(nn.GRUCell(I, H)) is fastrnn.GRUCell
        assert type(nn.GRUCell(I, H)) is fastrnn.GRUCell
        assert type(fastrnn.RNN(I, H)) is fastrnn.RNN
        assert type(pickle.loads(pickle.dumps(nn.LSTM(I, H)))) is fastrnn.LSTM
        with pytest.raises(ValueError, match="hidden_size"):
            nn.LSTM(I, 0)
    patched, again = fastrnn.patch(), fastrnn.patch()
    patched.close()
    patched.close()
    assert type(nn.RNN(I, H)) is fastrnn.RNN
    again.close()
    assert all(cls.__init__ is init for cls, init in stock_inits)
    assert not any(isinstance(module, OURS) for module in stock_model().modules())
    theirs, own = both("LSTM")
    with fastrnn.patch():
        torch.manual_seed(0)
        assert_same_run(nn.LSTM(I, H), theirs, torch.randn(T, B, I))
    assert_same_run(own, theirs, torch.randn(T, B, I))


@pytest.mark.parametrize("cls", DERIVED)
def test_patch_reaches_a_derived_class(cls):
    """One that was defined before, and one that is defined now."""
    torch.manual_seed(0)
    theirs = cls(I, H)
    with fastrnn.patch():
        torch.manual_seed(0)
        own = cls(I, H)
        assert_both(own, cls)
        if cls is not Listed:

            class Later(cls):
                pass

            assert_both(Later(I, H), Later)
    assert type(cls(I, H)) is cls
    assert_same_run(own, theirs, sample(cls))


def test_patch_while_a_derived_class_builds_itself():
    class Building(nn.GRU):
        def __init__(self):
            nn.RNNBase.__init__(self, "GRU", I, H)  # past nn.GRU's own
            self.then = isinstance(self, fastrnn.GRU)
            parametrize.register_parametrization(self, "weight_hh_l0", Halved())

    torch.manual_seed(0)
    theirs = Building()
    with fastrnn.patch():
        torch.manual_seed(0)
        own = Building()
    assert own.then and not theirs.then
    assert_same_run(own, theirs, torch.randn(T, B, I))


@pytest.mark.parametrize("cls", [nn.RNNBase, nn.GRU])
@pytest.mark.parametrize("order", list(itertools.permutations(["close", "close again", "unwrap"])), ids=" ".join)
def test_closing_a_patch_leaves_alone_what_others_laid_over_it(cls, order):
    """Another library's wrapper holds until that library takes it off, whoever goes first."""
    stock, seen = cls.__init__, []
    first = fastrnn.patch()
    inner = cls.__init__

    @functools.wraps(inner)
    def over(self, *args, **kwargs):
        seen.append(1)
        inner(self, *args, **kwargs)

    cls.__init__ = over
    again = fastrnn.patch()
    steps = {"close": first.close, "close again": again.close, "unwrap": lambda: setattr(cls, "__init__", inner)}
    try:
        for step in order:
            layer, gone = nn.GRU(I, H), set(order[: order.index(step)])
            assert (type(layer) is fastrnn.GRU) == (not gone >= {"close", "close again"})
            assert len(seen) == ("unwrap" not in gone)
            seen.clear()
            steps[step]()
        assert type(nn.GRU(I, H)) is nn.GRU and not seen
        with fastrnn.patch():
            assert type(nn.GRU(I, H)) is fastrnn.GRU
        assert type(nn.GRU(I, H)) is nn.GRU
    finally:
        cls.__init__ = stock


class Equal:
    """A wrapper that equals what it wraps and binds to the module itself, as those of the package wrapt do."""

    def __init__(self, wrapped):
        self.__wrapped__, self.calls = wrapped, 0

    def __eq__(self, other):
        return self.__wrapped__ == other

    def __hash__(self):
        return hash(self.__wrapped__)

    def __get__(self, module, cls=None):
        return functools.partial(self, *([] if module is None else [module]))

    def __call__(self, *args, **kwargs):
        self.calls += 1
        self.__wrapped__(*args, **kwargs)


def test_a_wrapper_that_equals_what_it_wraps():
    stock = nn.RNNBase.__init__
    try:
        below = nn.RNNBase.__init__ = Equal(stock)
        with fastrnn.patch():
            above = nn.RNNBase.__init__ = Equal(vars(nn.RNNBase)["__init__"])
            with fastrnn.patch():
                assert type(nn.RNN(I, H)) is fastrnn.RNN
            assert type(nn.RNN(I, H)) is fastrnn.RNN
        assert vars(nn.RNNBase)["__init__"] is above and type(nn.RNN(I, H)) is nn.RNN
        assert (below.calls, above.calls) == (3, 3)
        nn.RNNBase.__init__ = above.__wrapped__
        fastrnn.patch().close()
        assert vars(nn.RNNBase)["__init__"] is below
    finally:
        nn.RNNBase.__init__ = stock


def test_a_wrapper_that_stays_does_not_stop_later_patches():
    stock = nn.RNNBase.__init__
    try:
        for _ in range(3):
            patched = fastrnn.patch()
            inner = nn.RNNBase.__init__
            nn.RNNBase.__init__ = lambda self, *args, inner=inner, **kwargs: inner(self, *args, **kwargs)
            patched.close()
            assert type(nn.LSTM(I, H)) is nn.LSTM
            with fastrnn.patch():
                assert type(nn.LSTM(I, H)) is fastrnn.LSTM
    finally:
        nn.RNNBase.__init__ = stock
