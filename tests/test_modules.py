"""The modules stand in for torch.nn's: what torch.nn does, they do too. torch.nn is asked for it, never quoted."""

import copy
import functools
import inspect
import io
import pickle
import warnings
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn.modules import DROP_INS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
VARIANTS = [
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"proj_size": 2, "bias": False}),
    ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
    ("GRU", {"bidirectional": True}),
    ("GRU", {"num_layers": 3, "bias": False, "batch_first": True}),
]
I, H, T, B = 3, 5, 4, 2


def both(name, *args, seed=0, **kwargs):
    """The same module of torch.nn and of fastrnn, made from one seed."""
    modules = []
    for namespace in (nn, fastrnn):
        torch.manual_seed(seed)
        modules.append(getattr(namespace, name)(*(args or (I, H)), **kwargs))
    return modules


def flat(result):
    """The tensors in a module's result."""
    if isinstance(result, PackedSequence):
        return [tensor for tensor in result if tensor is not None]
    return [tensor for item in result for tensor in flat(item)] if isinstance(result, tuple) else [result]


def assert_same(result, expected):
    assert type(result) is type(expected)
    result, expected = flat(result), flat(expected)
    assert len(result) == len(expected)
    for tensor, right in zip(result, expected, strict=True):
        torch.testing.assert_close(tensor, right)


def assert_same_run(own, theirs, *args):
    """Outputs and every gradient, by name, of two modules with equal parameters."""
    result, expected = own(*args), theirs(*args)
    assert_same(result, expected)
    for module, outcome in ((own, result), (theirs, expected)):
        module.zero_grad()
        sum((tensor.float() ** 2).sum() for tensor in flat(outcome) if tensor.is_floating_point()).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, msg=lambda text, n=name: f"{n}: {text}")


def outcome(function):
    """What a call returns or, as (type, words), raises; and the warnings it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function()
        except Exception as error:
            result = type(error), str(error)
    return result, [(warning.category, str(warning.message)) for warning in caught]


def states(module, batch=B, dtype=torch.float32):
    """Initial states of the right shape: a tensor, or the LSTM's pair."""
    depth = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(depth, batch, module.proj_size or module.hidden_size, dtype=dtype)
    return (h, torch.randn(depth, batch, module.hidden_size, dtype=dtype)) if module.mode == "LSTM" else h


# --- construction

BAD_ARGUMENTS = [
    ((), {}),
    ((I,), {}),
    ((0, H), {}),
    ((I, 0), {}),
    ((I, -1), {}),
    ((2.0, H), {}),
    ((I, "5"), {}),
    ((I, H, 0), {}),
    ((I, H), {"bias": 1}),
    ((I, H), {"bias": None}),
    ((I, H), {"batch_first": "yes"}),
    ((I, H), {"dropout": -0.1}),
    ((I, H), {"dropout": 1.5}),
    ((I, H), {"dropout": True}),
    ((I, H), {"dropout": "half"}),
    ((I, H), {"dropout": 0.5}),  # one layer: a warning
    ((I, H), {"proj_size": -1}),
    ((I, H), {"proj_size": H}),
    ((I, H), {"proj_size": 2}),
    ((I, H), {"nonlinearity": "sigmoid"}),
    ((I, H), {"nonlinearity": 3}),
    ((I, H), {"hidden": 3}),
    ((I, H, 1, True, False, 0.0, False, 0, None, None, 7), {}),
    ((I, H), {"dtype": torch.int64}),
    ((I, H), {"device": "nowhere"}),
]


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize(("args", "kwargs"), BAD_ARGUMENTS)
def test_constructor_refuses_in_torchs_words(name, args, kwargs):
    result, expected = (outcome(functools.partial(getattr(namespace, name), *args, **kwargs)) for namespace in (fastrnn, nn))
    if isinstance(expected[0], nn.Module):  # some of these are in order for some of the modules
        assert repr(result[0]) == repr(expected[0])
    else:
        assert result[0] == expected[0]
    assert result[1] == expected[1]


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS + [(cell, {}) for cell in CELLS] + [("GRUCell", {"bias": False})])
def test_construction_is_torchs(name, kwargs):
    theirs, own = both(name, **kwargs)
    assert repr(own) == repr(theirs)
    assert list(own.state_dict()) == list(theirs.state_dict())
    for (left, mine), (right, other) in zip(own.named_parameters(), theirs.named_parameters(), strict=True):
        assert left == right
        assert torch.equal(mine, other)  # the same draws, in the same order
    assert list(vars(own)) == list(vars(theirs))
    for attribute in vars(theirs).keys() - {"_parameters", "_flat_weights", "_flat_weight_refs"}:
        assert getattr(own, attribute) == getattr(theirs, attribute)
    assert inspect.signature(type(own)) == inspect.signature(type(theirs))
    parameters = list(inspect.signature(own.forward).parameters.values())
    more = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    assert parameters[: len(parameters) - len(more)] == list(inspect.signature(theirs.forward).parameters.values())
    assert more == ([] if name.endswith("Cell") else ["resets", "lengths", "all_states"])


def test_positional_arguments_dtype_and_device():
    theirs, own = both("RNN", I, H, 2, "relu", False, True, 0.25, True, device="cpu", dtype=torch.float64)
    assert repr(own) == repr(theirs)
    assert (own.nonlinearity, own.mode) == ("relu", "RNN_RELU")
    assert_same_run(own.eval(), theirs.eval(), torch.randn(B, T, I, dtype=torch.float64))
    assert fastrnn.GRU(I, H, device="meta").weight_ih_l0.is_meta


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_isinstance_and_issubclass(name):
    theirs, own = both(name)
    assert type(own) is getattr(fastrnn, name)
    assert own.__class__ is type(own)
    assert isinstance(own, type(theirs))
    assert isinstance(own, (nn.Linear, type(theirs)))
    assert issubclass(type(own), type(theirs))
    assert DROP_INS[type(theirs)] is type(own)
    assert not any(isinstance(own, other) for other in DROP_INS if other is not type(theirs))


# --- state


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS + [(cell, {}) for cell in CELLS])
def test_state_dict_both_ways(name, kwargs):
    theirs, _ = both(name, **kwargs)
    _, own = both(name, seed=1, **kwargs)
    assert own.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(own.state_dict())
    _, own = both(name, seed=1, **kwargs)
    theirs.load_state_dict(own.state_dict())
    x = torch.randn(T, I) if name in CELLS else torch.randn(T, B, I)
    assert_same_run(own, theirs, x)


def test_state_dict_hooks_and_mismatches():
    theirs, own = both("LSTM")
    seen = []
    for module in (own, theirs):
        module.register_state_dict_post_hook(lambda module, state, prefix, local: state.update({prefix + "note": 1}))
        module.register_load_state_dict_pre_hook(lambda module, state, *rest: seen.append(state.pop("note")))
    state = own.state_dict()
    assert list(state) == list(theirs.state_dict())
    theirs.load_state_dict(state)
    own.load_state_dict(theirs.state_dict())
    assert seen == [1, 1]
    bad = both("LSTM", I, H + 1)[0].state_dict()
    assert outcome(lambda: own.load_state_dict({**bad, "note": 1})) == outcome(
        lambda: theirs.load_state_dict({**bad, "note": 1})
    )


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_pickle_copy_save(name, tmp_path):
    _, own = both(name)
    own.note = "kept"
    x = torch.randn(T, B, I) if name in LAYERS else torch.randn(B, I)
    expected = own(x)
    torch.save(own, tmp_path / "module.pt")
    with torch.serialization.safe_globals([type(own), *torch_globals(own)]):
        restricted = torch.load(tmp_path / "module.pt", weights_only=True)
    copies = [
        *(pickle.loads(pickle.dumps(own, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)),
        torch.load(tmp_path / "module.pt", weights_only=False),
        restricted,
        copy.deepcopy(own),
    ]
    for other in copies:
        assert type(other) is type(own)
        assert other.note == "kept"
        assert other.weight_ih_l0 is not own.weight_ih_l0 if name in LAYERS else other.weight_ih is not own.weight_ih
        assert_same(other(x), expected)
        if name in LAYERS:
            assert all(mine is p for mine, p in zip(other._flat_weights, other.parameters(), strict=True))
    assert f"fastrnn.modules\n{name}\n".encode() in pickle.dumps(own, 2)


def torch_globals(module):
    """What torch's own weights_only loader wants to be told about before it loads a whole module."""
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
    return [getattr(__import__(n.rpartition(".")[0], fromlist=["_"]), n.rpartition(".")[2]) for n in names]


def test_a_stock_pickle_reads_into_ours():
    theirs, own = both("LSTM", num_layers=2)
    other = fastrnn.LSTM.__new__(fastrnn.LSTM)
    other.__setstate__(copy.deepcopy(theirs).__getstate__())
    assert_same_run(other, theirs, torch.randn(T, B, I))
    assert_same_run(own, theirs, torch.randn(T, B, I))


# --- calls


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_dense_calls(name, kwargs):
    theirs, own = both(name, **kwargs)
    first = kwargs.get("batch_first", False)
    x = torch.randn(B, T, I) if first else torch.randn(T, B, I)
    hx = states(own)
    assert_same_run(own, theirs, x)
    assert_same_run(own, theirs, x, hx)
    one = states(own, 1)
    expanded = tuple(s.expand(-1, B, -1) for s in one) if name == "LSTM" else one.expand(-1, B, -1)
    assert_same_run(own, theirs, x, expanded)
    strided = torch.randn(*x.shape[::-1]).permute(2, 1, 0)
    assert not strided.is_contiguous()
    assert_same_run(own, theirs, strided, hx)
    assert_same_run(own, theirs, torch.randn(x.shape[0], x.shape[1], 2 * I)[..., ::2])
    unbatched = tuple(s[:, 0] for s in hx) if name == "LSTM" else hx[:, 0]
    assert_same_run(own, theirs, torch.randn(T, I))
    assert_same_run(own, theirs, torch.randn(T, I), unbatched)
    if name == "LSTM":
        assert_same_run(own, theirs, x, list(hx))
        crossed = tuple(torch.randn(B, *s.shape[::2]).transpose(0, 1) for s in hx)
        assert len(crossed[0]) == 1 or not crossed[0].is_contiguous()
        assert_same_run(own, theirs, x, crossed)


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_packed_calls(name, kwargs):
    theirs, own = both(name, **kwargs)
    lengths = [2, 4, 1, 3]
    padded = torch.randn(4, 4, I)
    for packed in (
        pack_padded_sequence(padded, sorted(lengths, reverse=True)),
        pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False),
        pack_sequence([torch.randn(length, I) for length in lengths], enforce_sorted=False),
        pack_sequence([torch.randn(3, I), torch.randn(3, I), torch.randn(1, I)]),
    ):
        batch = int(packed.batch_sizes[0])
        assert_same_run(own, theirs, packed)
        assert_same_run(own, theirs, packed, states(own, batch))
        expected, result = theirs(packed)[0], own(packed)[0]
        assert (result.sorted_indices is None) == (expected.sorted_indices is None)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cell_calls(name, bias):
    theirs, own = both(name, bias=bias)
    for batch in ((), (1,), (B,), (0,)):
        x, h = torch.randn(*batch, I), torch.randn(*batch, H)
        assert_same_run(own, theirs, x)
        assert_same_run(own, theirs, x, (h, h + 1) if name == "LSTMCell" else h)
    if name == "LSTMCell":
        assert_same_run(own, theirs, torch.randn(B, I), [torch.randn(B, H), torch.randn(B, H)])
    if name == "RNNCell":
        assert_same_run(*both(name, bias=bias, nonlinearity="relu")[::-1], torch.randn(B, I))


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_empty_batch(name, kwargs):
    theirs, own = both(name, **kwargs)
    x = torch.randn(0, T, I) if kwargs.get("batch_first") else torch.randn(T, 0, I)
    assert_same_run(own, theirs, x)
    assert_same_run(own, theirs, x, states(own, 0))


BAD_CALLS = {
    "no steps": lambda m: (torch.randn(0, B, I),),
    "1-D": lambda m: (torch.randn(I),),
    "4-D": lambda m: (torch.randn(1, T, B, I),),
    "features": lambda m: (torch.randn(T, B, I + 1),),
    "no features": lambda m: (torch.randn(T, B, 0),),
    "float64": lambda m: (torch.randn(T, B, I, dtype=torch.float64),),
    "int64": lambda m: (torch.ones(T, B, I, dtype=torch.int64),),
    "not a tensor": lambda m: ([[0.0] * I],),
    "None": lambda m: (None,),
    "nothing": lambda m: (),
    "too much": lambda m: (torch.randn(T, B, I), None, None),
    "hx batch": lambda m: (torch.randn(T, B, I), states(m, B + 1)),
    "hx unbatched": lambda m: (torch.randn(T, B, I), state_map(m, lambda s: s[:, 0])),
    "hx batched": lambda m: (torch.randn(T, I), states(m)),
    "hx depth": lambda m: (torch.randn(T, B, I), state_map(m, lambda s: torch.cat([s, s]))),
    "hx width": lambda m: (torch.randn(T, B, I), state_map(m, lambda s: s[..., 1:])),
    "hx float64": lambda m: (torch.randn(T, B, I), states(m, dtype=torch.float64)),
    "hx int64": lambda m: (torch.randn(T, B, I), state_map(m, lambda s: s.long())),
    "hx number": lambda m: (torch.randn(T, B, I), 0.0),
    "hx wrong kind": lambda m: (torch.randn(T, B, I), states(m)[0]),
    "hx triple": lambda m: (torch.randn(T, B, I), (*states(m), torch.randn(2, B, H))),
    "hx meta": lambda m: (torch.randn(T, B, I), state_map(m, lambda s: s.to("meta"))),
    "nested": lambda m: (torch.nested.nested_tensor([torch.randn(2, I), torch.randn(T, I)]),),
    "packed features": lambda m: (pack_sequence([torch.randn(2, I + 1)]),),
    "packed float64": lambda m: (pack_sequence([torch.randn(2, I).double()]),),
    "packed hx": lambda m: (pack_sequence([torch.randn(2, I)]), states(m, 2)),
    "packed int32": lambda m: (PackedSequence(torch.randn(3, I), torch.tensor([2, 1], dtype=torch.int32)),),
}


def state_map(module, change):
    hx = states(module)
    return tuple(map(change, hx)) if isinstance(hx, tuple) else change(hx)


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize(
    ("name", "kwargs"), [("RNN", {}), ("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {"bidirectional": True})]
)
def test_forward_refuses_in_torchs_words(case, name, kwargs):
    theirs, own = both(name, **kwargs)
    torch.manual_seed(1)
    args = outcome(lambda: BAD_CALLS[case](own))[0]
    if name == "LSTM" and not kwargs and case in ("packed features", "packed hx"):
        # torch.nn.LSTM does not check a packed call's sizes and computes with what lies beyond the tensor: its words for dense
        words = r"input.size\(-1\) must be equal to input_size" if case == "packed features" else r"Expected hidden\[0\] size"
        with pytest.raises(RuntimeError, match=words):
            own(*args)
        return
    if args and args[0] is TypeError:  # torch itself refuses to make this input
        pytest.skip(f"{case} cannot be built: {args[1]}")
    expected, result = outcome(lambda: theirs(*args)), outcome(lambda: own(*args))
    if isinstance(expected[0][0], type):
        assert result[0] == expected[0]
    else:  # some of these are in order for some of the modules
        assert_same(result[0], expected[0])


@pytest.mark.parametrize("sizes", [[2, 1], [1, 2], [2, 2, 2], [5, 0], [-1, 6], [6, -1]])
@pytest.mark.parametrize("name", LAYERS)
def test_malformed_packed_sequences_are_torchs_or_refused(name, sizes):
    """torch's documentation forbids making these by hand, and what it does with one differs from module to module."""
    theirs, own = both(name)
    packed = PackedSequence(torch.randn(5, I), torch.tensor(sizes))
    result, _ = outcome(lambda: own(packed))
    if result[0] is not RuntimeError:
        assert_same(result, theirs(packed))


BAD_CELL_CALLS = {
    "3-D": lambda: (torch.randn(1, B, I),),
    "features": lambda: (torch.randn(B, I + 1),),
    "float64": lambda: (torch.randn(B, I, dtype=torch.float64),),
    "None": lambda: (None,),
    "hx 3-D": lambda: (torch.randn(B, I), torch.randn(1, B, H)),
    "hx pair": lambda: (torch.randn(B, I), (torch.randn(B, H), torch.randn(B, H))),
    "hx pair 3-D": lambda: (torch.randn(B, I), (torch.randn(B, H), torch.randn(1, B, H))),
    "hx batch": lambda: (torch.randn(B, I), torch.randn(B + 1, H)),
    "hx nothing": lambda: (torch.randn(B, I), ()),
    "hx for a batch": lambda: (torch.randn(I), (torch.randn(B, H), torch.randn(B, H))),
    "hx width": lambda: (torch.randn(B, I), torch.randn(B, H + 1)),
    "hx pair width": lambda: (torch.randn(B, I), (torch.randn(B, H), torch.randn(B, H + 1))),
    "hx float64": lambda: (torch.randn(B, I), torch.randn(B, H).double()),
}


@pytest.mark.parametrize("case", BAD_CELL_CALLS)
@pytest.mark.parametrize("name", CELLS)
def test_cells_refuse_in_torchs_words(case, name):
    theirs, own = both(name)
    args = BAD_CELL_CALLS[case]()
    expected, result = outcome(lambda: theirs(*args)), outcome(lambda: own(*args))
    if isinstance(expected[0], tuple) and isinstance(expected[0][0], type):
        assert result[0] == expected[0]
    else:
        assert_same(result[0], expected[0])


def test_changed_attributes_are_read_at_call_time():
    theirs, own = both("LSTM", num_layers=2)
    for module in (own, theirs):
        module.batch_first = True
        module.dropout = 1.0
    assert_same_run(own, theirs, torch.randn(B, T, I))
    _, cell = both("RNNCell")
    cell.nonlinearity = "other"
    with pytest.raises(RuntimeError, match="Unknown nonlinearity"):
        cell(torch.randn(B, I))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kwargs", [{"num_layers": 2}, {"num_layers": 3, "batch_first": True, "bidirectional": True}])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.5, 1.0])
def test_dropout_draws_torchs_bits(name, kwargs, packed, dropout):
    theirs, own = both(name, dropout=dropout, **kwargs)
    x = torch.randn(5, 5, I)
    if packed:
        x = pack_padded_sequence(x, [3, 5, 2, 1, 5], enforce_sorted=False)
    results = []
    for module in (own, theirs):
        torch.manual_seed(7)
        module.zero_grad()
        result = module(x)
        flat(result)[0].sum().backward()
        results.append((flat(result), [p.grad for p in module.parameters()], torch.get_rng_state()))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)
    assert_same_run(own.eval(), theirs.eval(), x)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_other_dtypes(name):
    theirs, own = both(name)
    x = torch.randn(*(T, B, I)[name in CELLS :])
    assert_same(own.double()(x.double()), theirs.double()(x.double()))
    assert_same(own.float()(x), theirs.float()(x))


# --- parameters that come and go


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_are_read_at_call_time(name):
    theirs, own = both(name, num_layers=2)
    x = torch.randn(T, B, I)
    before = own(x)[0].detach()
    fresh = torch.randn_like(own.weight_hh_l0)
    for module in (own, theirs):
        module.weight_hh_l0 = nn.Parameter(fresh.clone())
    assert_same_run(own, theirs, x)
    for module in (own, theirs):
        module._parameters["weight_ih_l1"] = nn.Parameter(module.weight_ih_l1.detach() * 3)
    assert_same_run(own, theirs, x)
    for module in (own, theirs):
        module.bias_hh_l1.data.add_(0.5)
    assert_same_run(own, theirs, x)
    for module in (own, theirs):
        module.weight_ih_l0.data = module.weight_ih_l0.data * 2
    assert_same_run(own, theirs, x)
    for module in (own, theirs):  # leaves no trace in Tensor._version
        view = module.weight_hh_l1.detach().numpy()
        version = module.weight_hh_l1._version
        view += np.float32(0.25)
        assert module.weight_hh_l1._version == version
    assert_same_run(own, theirs, x)
    assert not torch.allclose(own(x)[0], before)
    own.reset_parameters()
    theirs.load_state_dict(own.state_dict())
    assert_same_run(own, theirs, x)


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_weight_lists_are_true(name, kwargs):
    theirs, own = both(name, **kwargs)
    own.flatten_parameters()
    assert own._all_weights == theirs._all_weights
    names = [id(parameter) for parameter in own.parameters()]
    assert [id(weight) for weights in own.all_weights for weight in weights] == names
    assert [id(weight) for weight in own._flat_weights] == names
    assert own._flat_weights_names == theirs._flat_weights_names
    own.double()
    assert all(weight.dtype == torch.float64 for weight in own._flat_weights)


def spectral(module, name):
    return parametrizations.spectral_norm(module, name)


def orthogonal(module, name):
    return parametrizations.orthogonal(module, name)


def new_weight_norm(module, name):
    return parametrizations.weight_norm(module, name)


def doubled(module, name):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(module, name, Double())


@pytest.mark.parametrize("register", [spectral, orthogonal, new_weight_norm, doubled])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_parametrisation_and_its_removal(name, register):
    weight = "weight_hh_l0" if name in LAYERS else "weight_hh"
    theirs, own = both(name)
    x = torch.randn(T, B, I) if name in LAYERS else torch.randn(B, I)
    for module in (own, theirs):
        torch.manual_seed(3)
        register(module, weight)
    assert type(own).__name__ == type(theirs).__name__
    assert isinstance(own, (getattr(fastrnn, name)))
    assert isinstance(own, getattr(nn, name))
    assert parametrize.type_before_parametrizations(own) is getattr(fastrnn, name)
    assert_same_run(copy.deepcopy(own), copy.deepcopy(theirs), x)
    for _ in range(2):
        assert_same_run(own, theirs, x)
    assert list(own.state_dict()) == list(theirs.state_dict())
    own.load_state_dict(theirs.state_dict())
    with torch.no_grad(), parametrize.cached():
        assert_same(own(x), theirs(x))
    for module in (own, theirs):
        parametrize.remove_parametrizations(module, weight)
    assert type(own) is getattr(fastrnn, name)
    assert_same_run(own, theirs, x)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("name", LAYERS)
def test_old_norms_and_pruning(name):
    x = torch.randn(T, B, I)
    theirs, own = both(name)
    for module in (own, theirs):
        torch.manual_seed(3)
        nn.utils.weight_norm(module, "weight_hh_l0")
        nn.utils.spectral_norm(module, "weight_ih_l0")
    for _ in range(2):
        assert_same_run(own, theirs, x)
    for module in (own, theirs):
        nn.utils.remove_weight_norm(module, "weight_hh_l0")
    assert_same_run(own, theirs, x)

    theirs, own = both(name)
    for module in (own, theirs):
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
    assert (own.weight_hh_l0 == 0).any()
    assert_same_run(own, theirs, x)
    for module in (own, theirs):
        prune.remove(module, "weight_hh_l0")
    assert_same_run(own, theirs, x)
    assert_same_run(copy.deepcopy(own), theirs, x)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_functional_call(name):
    theirs, own = both(name)
    _, other = both(name, seed=5)
    x = torch.randn(T, B, I) if name in LAYERS else torch.randn(B, I)
    values = {key: value.detach() for key, value in other.named_parameters()}
    assert_same(torch.func.functional_call(own, values, (x,)), other(x))
    assert_same(own(x), theirs(x))  # and the module's own parameters are back


# --- hooks and subclasses


@pytest.mark.parametrize("name", LAYERS)
def test_hooks(name):
    theirs, own = both(name)
    calls = {own: [], theirs: []}
    for module, seen in calls.items():
        module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append("pre") or (args[0] * 2,))
        module.register_forward_hook(lambda m, args, out, seen=seen: seen.append("post") or (out[0] * 3, out[1]))
        module.register_full_backward_pre_hook(lambda m, out, seen=seen: seen.append("backward pre"))
        module.register_full_backward_hook(
            lambda m, into, out, seen=seen: seen.append(("backward", [g is not None for g in into]))
        )
        module.weight_hh_l0.register_hook(lambda grad, seen=seen: seen.append("parameter") or grad * 5)
    x = torch.randn(T, B, I, requires_grad=True)
    assert_same_run(own, theirs, x)
    assert sorted(map(str, calls[own])) == sorted(map(str, calls[theirs]))


class Counting(fastrnn.LSTM):
    """A user's subclass: its own constructor, attribute and forward around ours."""

    def __init__(self, width, scale=2.0):
        super().__init__(width, H, num_layers=2)
        self.scale, self.calls = scale, 0

    def forward(self, input, hx=None):
        self.calls += 1
        y, state = super().forward(input, hx)
        return y * self.scale, state


def test_user_subclass():
    theirs, _ = both("LSTM", num_layers=2)
    torch.manual_seed(0)
    own = Counting(I)
    assert isinstance(own, nn.LSTM)
    assert repr(own) == repr(theirs).replace("LSTM", "Counting")
    x = torch.randn(T, B, I)
    torch.testing.assert_close(own(x)[0], theirs(x)[0] * 2)
    other = pickle.loads(pickle.dumps(own))
    assert (type(other), other.calls, other.scale) == (Counting, 1, 2.0)
    parametrizations.weight_norm(own, "weight_hh_l1")
    assert isinstance(own, Counting)
    torch.testing.assert_close(own(x)[0], theirs(x)[0] * 2)
    parametrize.remove_parametrizations(own, "weight_hh_l1")
    assert type(own) is Counting
    assert isinstance(copy.deepcopy(own), Counting)


# --- leaving Python


class Tagger(nn.Module):
    """A recurrent layer between linear ones, as models have it."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(H * (2 if rnn.bidirectional else 1), 2)

    def forward(self, x):
        y, _ = self.rnn(x)
        return self.head(y)


def taggers(name, **kwargs):
    models = []
    for rnn in both(name, **kwargs):
        torch.manual_seed(1)
        models.append(Tagger(rnn).eval())
    return models


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_jit_trace(name, kwargs):
    theirs, own = both(name, **kwargs)
    x = torch.randn(B, T, I)
    traced = torch.jit.trace(own, (x,))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert kinds == {node.kind() for node in torch.jit.trace(theirs, (x,)).inlined_graph.nodes()}
    assert_same(traced(x), theirs(x))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert_same(torch.jit.load(buffer)(x), theirs(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@pytest.mark.parametrize("name", LAYERS)
def test_jit_script(name):
    theirs, own = taggers(name)
    x = torch.randn(T, B, I)
    expected = theirs(x)
    torch.testing.assert_close(own(x), expected)
    torch.testing.assert_close(torch.jit.script(own)(x), expected)
    cell, other = both(name + "Cell")
    assert_same(torch.jit.script(other)(x[0]), cell(x[0]))
    with pytest.raises(RuntimeError, match="cannot compile Counting"):
        torch.jit.script(Counting(I))


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.nn's forward assigns `_flat_weights`
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo, at an autograd.Function
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_export(name, strict):
    theirs, own = taggers(name, num_layers=2)
    x = torch.randn(T, B, I)
    program = torch.export.export(own, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), theirs(x))


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # recompute's mode, which is restored
@pytest.mark.parametrize(("grad", "strict"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"recompute": True}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_an_exported_program_trains(name, options, grad, strict):
    """Whether it was exported with gradients or not."""
    recompute = {"recompute": options["recompute"]} if "recompute" in options else {}
    theirs, own = taggers(name, **{key: value for key, value in options.items() if key not in recompute})
    own.rnn.recompute = bool(recompute)
    x = torch.randn(T, B, I)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(own, (x,), strict=strict).module()
    x, y = (x.clone().requires_grad_() for _ in range(2))
    program(x).square().sum().backward()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    found = dict(program.named_parameters())
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[key].grad, parameter.grad, msg=key)
    second = [
        torch.autograd.functional.vhp(lambda value, model=model: model(value).square().sum(), x.detach(), torch.ones_like(x))[1]
        for model in (program, theirs)
    ]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_fx_keeps_the_module_whole(name):
    """As it keeps those of torch.nn, which it knows by their names."""
    x = torch.randn(B, I) if name in CELLS else torch.randn(T, B, I)
    graphs = [torch.fx.symbolic_trace(nn.Sequential(nn.Linear(I, I), module)) for module in both(name)]
    nodes = [[(node.op, node.target) for node in graph.graph.nodes] for graph in graphs]
    assert nodes[0] == nodes[1]
    model = nn.Sequential(nn.Linear(I, I), both(name)[1])
    assert_same(torch.fx.symbolic_trace(model)(x), model(x))
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert_same(torch.fx.symbolic_trace(model)(x), model(x))  # it runs once


COUNTED = [(name, {}) for name in ("RNN", "GRU", *CELLS)]
COUNTED += [(name, options) for name in ("RNN", "GRU") for options in ({"num_layers": 2}, {"bidirectional": True})]


@pytest.mark.parametrize(("name", "options"), COUNTED, ids=str)
def test_operations_are_counted_as_torchs(name, options):
    counts = []
    for module in both(name, **options):
        x = torch.randn(B, I) if name in CELLS else torch.randn(T, B, I, requires_grad=True)
        for backward in (False, True):
            with FlopCounterMode(display=False) as counter:
                y = flat(module(x))[0]
                if backward:
                    y.sum().backward()
            counts.append(counter.get_total_flops())
    assert counts[:2] == counts[2:] and counts[0] > 0


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"bias": False}], ids=str)
def test_gradients_of_two_directions_share_no_memory(options):
    for packed in (False, True):  # each way of a call
        module = fastrnn.LSTM(I, H, bidirectional=True, **options)
        x = torch.randn(T, B, I)
        y = flat(module(pack_padded_sequence(x, torch.tensor([T] * B)) if packed else x))[0]
        grads = torch.autograd.grad(y.square().sum(), list(module.parameters()))
        assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads)
        assert all(grad.untyped_storage().nbytes() == 4 * grad.numel() for grad in grads)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_torch_func_takes_an_exported_program():
    theirs, own = taggers("GRU")
    x = torch.randn(T, B, I)
    program = torch.export.export(own, (x,)).module()
    found, expected = (torch.func.grad(lambda value, model=model: model(value).sum())(x) for model in (program, theirs))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.jvp(program, (x,), (x,)), torch.func.jvp(own, (x,), (x,)))


class Asking:
    def check_forward_args(self, input, hidden, batch_sizes):
        raise KeyError("asked")


class AskingByMixin(Asking, fastrnn.GRU):
    pass


class AskingItself(fastrnn.GRU):
    check_forward_args = Asking.check_forward_args

    def forward(self, input, hx=None):
        return super().forward(input, hx)


class Silent(fastrnn.GRU):
    def forward(self, input, hx=None):
        return super().forward(input * 0, hx)


class AskingAndSilent(Silent):
    def check_input(self, input, batch_sizes):
        assert not input.any()


def test_a_subclass_with_checks_of_its_own_is_asked():
    x = torch.randn(T, B, I)
    for layer in (AskingByMixin(I, H), AskingItself(I, H), fastrnn.freeze(AskingItself(I, H).eval())):
        with pytest.raises(KeyError, match="asked"):
            layer(x)
        with pytest.raises(KeyError, match="asked"):
            layer.step(x[0])
    layer = AskingAndSilent(I, H)
    assert_same(layer(x), fastrnn.GRU.forward(layer, x * 0))


@pytest.mark.parametrize(("attribute", "value"), [("weight_ih_l0", None), ("bias_hh_l0", None), ("num_layers", True)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_call_of_a_spoilt_module_is_refused_in_torchs_words(name, attribute, value):
    results = []
    for module in both(name):
        setattr(module, attribute, value)
        x = pack_sequence([torch.ones(T, I), torch.ones(1, I)])
        results.append(outcome(lambda module=module, x=x: module(x, states(module)))[0])
    assert results[1] == results[0]


@pytest.mark.parametrize("dropout", [-1, float("nan"), 2, "a", 0.0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_changed_later(dropout, training):
    results = []
    for module in both("LSTM", num_layers=2):
        module.train(training).dropout = dropout
        results.append(outcome(lambda module=module: module(torch.ones(T, B, I)))[0])
    if isinstance(results[0][0], type):
        assert results[1] == results[0]
    else:
        assert_same(results[1], results[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("name", LAYERS)
def test_onnx(name, dynamo, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the ONNX export needs onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the exported file is run by onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript", reason="torch's newer ONNX exporter needs onnxscript")
    theirs, own = taggers(name, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I)
    graphs = []
    for model in (own, theirs):
        path = tmp_path / "model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=dynamo, verbose=False, external_data=False)
        graphs.append(onnx.load(path).graph)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), theirs(x))
    mine, other = graphs
    assert [node.op_type for node in mine.node] == [node.op_type for node in other.node]


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_batched_gradients(name):
    """autograd.grad(is_grads_batched=True) gives what a call for each of the gradients gives."""
    own = both(name, dtype=torch.float64)[1]
    x = torch.randn(*((B, I) if name in CELLS else (T, B, I)), dtype=torch.float64, requires_grad=True)
    y = flat(own(x))[0]
    leaves = {"x": x, **dict(own.named_parameters())}
    incoming = torch.randn(3, *y.shape, dtype=torch.float64)
    found = torch.autograd.grad(y, leaves.values(), incoming, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, leaves.values(), dy, retain_graph=True) for dy in incoming]
    for leaf, grad, grads in zip(leaves, found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(grad, torch.stack(grads), msg=lambda text, leaf=leaf: f"gradient of {leaf}: {text}")


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_zeros_without_memory(name):
    """torch's autograd makes such tensors. (torch.nn.LSTM itself reads what is not theirs.)"""
    own, ones = both(name)[1], both(name)[1].eval()
    shape, state = ((B, I), (B, H)) if name in CELLS else ((T, B, I), (1, B, H))
    pair = (lambda tensor: (tensor, tensor)) if "LSTM" in name else lambda tensor: tensor
    for module in (own, fastrnn.freeze(ones)):
        results = []
        for zeros in (torch.zeros, torch._efficientzerotensor):
            result = module(zeros(shape)), module(zeros(shape), pair(zeros(state)))
            results.append(flat(result))
        for found, expected in zip(*reversed(results), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("trained", [False, True], ids=["weights", "input, too"])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_weights_made_in_inference_mode(name, trained):
    with torch.inference_mode():
        theirs, own = both(name)
    x = torch.randn(*((B, I) if name in CELLS else (T, B, I)), requires_grad=trained)
    results = [outcome(lambda module=module: module(x))[0] for module in (theirs, own)]
    if isinstance(results[0][0], type):
        assert results[1] == results[0]
    else:
        assert_same(results[1], results[0])


class Doubling(dict):
    def __getitem__(self, name):
        return super().__getitem__(name) * 2


@pytest.mark.parametrize("mapping", [Doubling, UserDict])
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_parameters_in_another_mapping(name, mapping):
    """Some libraries replace it by one that gathers or computes a parameter when it is looked up."""
    results = []
    for module in both(name):
        module.__dict__["_parameters"] = mapping(module._parameters)
        results.append(module(torch.ones(*((B, I) if name in CELLS else (T, B, I)))))
    assert_same(results[1], results[0])
