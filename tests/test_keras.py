"""fastrnn.keras stands in for keras.layers: Keras is asked what is right, never quoted."""

import itertools
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
import torch

import fastrnn
import fastrnn.keras
from examples import keras_models, models

# Keras' variables do not know numpy 2's `copy` keyword.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
NAMES = ["SimpleRNN", "LSTM", "GRU"]
B, T, I, H = 4, 7, 5, 6
LENGTHS = torch.tensor([7, 4, 1, 3])
MASKS = {
    "none": None,
    "all valid": torch.ones(B, T, dtype=torch.bool),
    "right-padded": torch.arange(T) < LENGTHS[:, None],
    "left-padded": torch.arange(T) >= T - LENGTHS[:, None],
    "with holes": torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0, 0]])
    > 0,
    "with an empty row": torch.arange(T) < torch.tensor([7, 0, 1, 3])[:, None],
    "empty": torch.zeros(B, T, dtype=torch.bool),
}


@pytest.fixture(autouse=True)
def _keras_seed():
    keras.utils.set_random_seed(0)


def both(name, *args, bidirectional=None, **options):
    """The same layer of Keras and of ours, with the same weights, built."""
    layers = []
    for namespace in (keras.layers, fastrnn.keras):
        layer = getattr(namespace, name)(*(args or (H,)), **options)
        if bidirectional is not None:
            layer = namespace.Bidirectional(layer, **bidirectional)
        layer.build((B, T, I))
        layers.append(layer)
    theirs, own = layers
    own.set_weights(theirs.get_weights())
    return theirs, own


def results(layer, x, **call):
    """Outputs, states and all gradients by name, in float64."""
    x = x.clone().requires_grad_()
    for weight in layer.trainable_weights:
        weight.value.grad = None
    outputs = keras.tree.flatten(layer(x, **call))
    generator = torch.Generator().manual_seed(1)
    loss = sum((output.double() * torch.randn(output.shape, generator=generator)).sum() for output in outputs)
    loss.backward()
    gradients = {f"gradient {k}, {weight.name}": weight.value.grad for k, weight in enumerate(layer.trainable_weights)}
    found = {f"output {k}": output for k, output in enumerate(outputs)} | {"dx": x.grad} | gradients
    return {name: value.detach().double() for name, value in found.items() if value is not None}


def assert_same(theirs, own, x=None, loops=True, **call):
    """Every result of `own` is as near to float64's as twice that of `theirs`, and it does not run Keras' loop."""
    x = torch.randn(B, T, I) if x is None else x
    exact = type(theirs).from_config(theirs.get_config() | {"dtype": "float64"})
    exact = exact if not isinstance(theirs, keras.layers.Bidirectional) else _in_float64(theirs)
    exact.build((B, T, I))
    exact.set_weights(theirs.get_weights())
    for cell in itertools.chain(*(layer._flatten_layers() for layer in (exact, theirs, own))):
        if hasattr(cell, "seed_generator"):  # not all configurations have the seed
            cell.seed_generator._initial_seed = 3
            cell.seed_generator.state.assign([3, 0])
    call64 = {key: [state.double() for state in value] if key == "initial_state" else value for key, value in call.items()}
    expected = results(exact, x.double(), **call64)
    reference, found = results(theirs, x, **call), results(own, x, **call)
    assert found.keys() == reference.keys() == expected.keys()
    for name, right in expected.items():
        assert found[name].shape == right.shape, name
        error, theirs_error = (found[name] - right).norm(), (reference[name] - right).norm()
        assert error <= 2 * theirs_error + 4 * torch.finfo(torch.float32).eps * right.norm(), name


def _in_float64(layer):
    config = layer.get_config()
    for part in ("layer", "backward_layer"):
        config[part]["config"]["dtype"] = "float64"
    return keras.layers.Bidirectional.from_config(config | {"dtype": "float64"})


@pytest.fixture
def no_keras_loop(monkeypatch):
    """Keras' own loops raise, so that what passes has run on the engines."""
    refuse_keras_loops(monkeypatch)


def refuse_keras_loops(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("Keras' own loop ran")

    monkeypatch.setattr("keras.src.backend.rnn", refuse)
    monkeypatch.setattr("keras.src.backend.lstm", refuse)
    monkeypatch.setattr("keras.src.backend.gru", refuse)


OPTIONS = [
    {},
    {"return_sequences": True, "return_state": True},
    {"return_sequences": True, "return_state": True, "go_backwards": True},
    {"return_state": True, "go_backwards": True},
    {"return_sequences": True, "return_state": True, "zero_output_for_mask": True},
    {"return_sequences": True, "use_bias": False},
    {"return_sequences": True, "unroll": True},
    {"bias_initializer": "random_normal", "return_sequences": True},
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_states_and_gradients_are_those_of_keras(name, options, mask):
    theirs, own = both(name, **options)
    assert_same(theirs, own, mask=MASKS[mask])


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("merge_mode", ["concat", "sum", "ave", "mul", None], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_two_directions_are_those_of_keras(name, merge_mode, mask):
    for sequences in (False, True):
        theirs, own = both(name, return_sequences=sequences, return_state=True, bidirectional={"merge_mode": merge_mode})
        assert_same(theirs, own, mask=MASKS[mask])


@pytest.mark.parametrize("name", NAMES)
def test_the_engines_run_what_they_have_kernels_for(name, no_keras_loop):
    for options, (mask, value) in itertools.product(OPTIONS, MASKS.items()):
        if mask != "empty":  # nothing to compute
            both(name, **options)[1](torch.randn(B, T, I), mask=value)
    both(name, bidirectional={})[1](torch.randn(B, T, I), mask=MASKS["left-padded"])
    both(name, dropout=0.5)[1](torch.randn(B, T, I), training=True)
    both(name, recurrent_dropout=0.5)[1](torch.randn(B, T, I), training=False)


@pytest.mark.parametrize("name", NAMES)
def test_an_initial_state(name):
    states = [torch.randn(B, H) for _ in range(2 if name == "LSTM" else 1)]
    for mask in ("none", "right-padded", "with an empty row"):
        assert_same(*both(name, return_state=True), initial_state=states, mask=MASKS[mask])
        pair = both(name, return_state=True, bidirectional={})
        assert_same(*pair, initial_state=states + [torch.randn(B, H) for _ in states], mask=MASKS[mask])


@pytest.mark.parametrize("name", NAMES)
def test_a_stateful_layer_goes_on_where_it_was(name):
    theirs, own = both(name, stateful=True, return_sequences=True)
    for _ in range(3):
        x = torch.randn(B, T, I)
        torch.testing.assert_close(own(x), theirs(x))
    own(x).sum().backward()
    own.reset_state()
    theirs.reset_state()
    torch.testing.assert_close(own(x), theirs(x))


def test_a_stack_of_cells(monkeypatch):
    cells = [keras.layers.LSTMCell(4), keras.layers.GRUCell(3), keras.layers.SimpleRNNCell(5)]
    x, masks = torch.randn(B, T, I), (None, MASKS["with holes"])
    options = {"return_sequences": True, "return_state": True}
    expected = [keras.layers.RNN(cells, **options)(x, mask=mask) for mask in masks]
    refuse_keras_loops(monkeypatch)
    for mask, right in zip(masks, expected, strict=True):
        found = fastrnn.keras.RNN(cells, **options)(x, mask=mask)
        for value, of_keras in zip(keras.tree.flatten(found), keras.tree.flatten(right), strict=True):
            torch.testing.assert_close(value, of_keras)


UNFUSED = [
    ("LSTM", {"activation": "relu"}, "activation=relu"),
    ("GRU", {"recurrent_activation": "hard_sigmoid"}, "recurrent_activation=hard_sigmoid"),
    ("GRU", {"reset_after": False}, "reset_after=False"),
    ("SimpleRNN", {"activation": None}, "activation=linear"),
]


@pytest.mark.parametrize(("name", "options", "reason"), UNFUSED)
def test_what_the_engines_have_not_runs_in_keras_and_explain_says_why(name, options, reason):
    theirs, own = both(name, return_sequences=True, **options)
    assert_same(theirs, own, mask=MASKS["right-padded"])
    explained = fastrnn.explain(own, torch.randn(B, T, I))
    assert explained.engine == "keras" and reason in str(explained)


def test_explain_of_what_the_engines_run():
    explained = fastrnn.explain(both("LSTM", recurrent_dropout=0.2)[1], torch.randn(B, T, I))
    assert explained.engine == "reference" and "a mask for each gate" in str(explained)
    assert fastrnn.explain(both("SimpleRNN", recurrent_dropout=0.2)[1], torch.randn(B, T, I)).engine == "cpu"
    assert fastrnn.explain(both("LSTM")[1], torch.randn(B, T, I)).engine == "cpu"
    assert fastrnn.explain(both("GRU", bidirectional={})[1], np.zeros((B, T, I), "float32")).engine == "cpu"


def test_explain_of_cells_and_stacks_of_them():
    """A line for each cell; of a layer that is not built, a clear error."""
    x = torch.randn(B, T, I)
    stack = [keras.layers.GRUCell(4), keras.layers.SimpleRNNCell(5), keras.layers.LSTMCell(6)]
    for cells in ([keras.layers.LSTMCell(4)], stack):
        layer = fastrnn.keras.RNN(cells if len(cells) > 1 else cells[0])
        with pytest.raises(ValueError, match="expected a built layer"):
            fastrnn.explain(layer, x)
        layer(x)
        explained = fastrnn.explain(layer, x)
        assert explained.engine == "cpu" and len(explained.schedule) == len(cells)


DIFFERENT = {  # directions that no torch layer has
    "cells": lambda layers: (layers.LSTM(4), layers.GRU(4, go_backwards=True)),
    "units": lambda layers: (layers.LSTM(4), layers.LSTM(6, go_backwards=True)),
    "biases": lambda layers: (layers.LSTM(4), layers.LSTM(4, use_bias=False, go_backwards=True)),
    "activations": lambda layers: (layers.SimpleRNN(4), layers.SimpleRNN(4, activation="relu", go_backwards=True)),
    "the first one backwards": lambda layers: (layers.LSTM(4, go_backwards=True), layers.LSTM(4)),
}


@pytest.mark.parametrize("library", [keras.layers, fastrnn.keras], ids=["keras.layers", "fastrnn.keras"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_directions_that_differ_are_explained_and_have_no_torch_layer(name, library):
    forward, backward = DIFFERENT[name](library)
    layer, x = fastrnn.keras.Bidirectional(forward, backward_layer=backward), torch.randn(B, T, I)
    layer(x)
    assert fastrnn.explain(layer, x).engine == "cpu"
    with pytest.raises(ValueError, match="go_backwards=True" if "backwards" in name else "two directions of different"):
        fastrnn.keras.to_torch(layer)


def test_a_layer_that_goes_backwards_has_no_torch_layer():
    layer = fastrnn.keras.GRU(3, go_backwards=True)
    layer.build((None, None, 2))
    with pytest.raises(ValueError, match="go_backwards=True"):
        fastrnn.keras.to_torch(layer)


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_bfloat16"])
def test_explain_knows_the_dtype_of_the_computation(dtype):
    layer, x = fastrnn.keras.LSTM(4, dtype=dtype), torch.randn(B, T, I)
    layer(x)
    assert fastrnn.explain(layer, x).engine == "cpu"


DROPOUTS = [{"dropout": 0.4}, {"recurrent_dropout": 0.4}, {"dropout": 0.4, "recurrent_dropout": 0.3}]


@pytest.mark.parametrize("mask", ["none", "left-padded", "with holes", "with an empty row"])
@pytest.mark.parametrize("options", DROPOUTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dropout_draws_what_keras_draws(name, options, mask, monkeypatch):
    options = {"return_sequences": True, "return_state": True, "bias_initializer": "random_normal", **options}
    theirs, own = both(name, **options)
    assert_same(theirs, own, mask=MASKS[mask], training=True)
    assert_same(*both(name, bidirectional={}, **options), mask=MASKS[mask], training=True)
    x = torch.randn(B, T, I)
    for training in (True, False):  # with the numbers that come next, and none
        for found, right in zip(*(layer(x, training=training) for layer in (own, theirs)), strict=True):
            torch.testing.assert_close(found, right)
    refuse_keras_loops(monkeypatch)
    own(x, mask=MASKS[mask], training=True)


@pytest.mark.parametrize("mask", ["none", "with holes"])
def test_dropout_in_a_stack_of_cells(mask, monkeypatch):
    options = {"return_sequences": True, "return_state": True}
    layers = []
    for namespace in (keras.layers, fastrnn.keras):
        own = {"dropout": 0.3, "recurrent_dropout": 0.4}
        cells = [keras.layers.LSTMCell(4, seed=1, **own), keras.layers.GRUCell(3, seed=2, **own)]
        cells += [keras.layers.SimpleRNNCell(5, seed=3, **own), keras.layers.LSTMCell(3, seed=4, dropout=0.3, implementation=1)]
        layers.append(namespace.RNN(cells, **options))
        layers[-1].build((B, T, I))
    layers[1].set_weights(layers[0].get_weights())
    x = torch.randn(B, T, I)
    expected = results(layers[0], x, mask=MASKS[mask], training=True)
    refuse_keras_loops(monkeypatch)
    found = results(layers[1], x, mask=MASKS[mask], training=True)
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("rates", [{"dropout": 1.0}, {"recurrent_dropout": 1.0}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_dropped_with_certainty_is_what_keras_drops(name, rates):
    theirs, own = both(name, seed=3, **rates)
    x = torch.randn(B, T, I)
    torch.testing.assert_close(own(x, training=True), theirs(x, training=True))


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_and_their_names_are_those_of_keras(name):
    layers = []
    for namespace in (keras.layers, fastrnn.keras):
        keras.utils.set_random_seed(5)
        layers.append(getattr(namespace, name)(H))
        layers[-1].build((None, None, I))
    for weight, own in zip(*(layer.weights for layer in layers), strict=True):
        assert (weight.name, weight.shape) == (own.name, own.shape)
        assert np.array_equal(weight.numpy(), own.numpy())
    assert layers[0].get_config().keys() == layers[1].get_config().keys()


def textbook(namespace):
    return keras.Sequential(
        [
            keras.Input((None, I)),
            namespace.LSTM(H, return_sequences=True),
            namespace.Bidirectional(namespace.GRU(3, return_sequences=True)),
            namespace.SimpleRNN(4, kernel_regularizer="l2", recurrent_constraint="unit_norm"),
            keras.layers.Dense(1),
        ]
    )


def test_files_are_read_both_ways(tmp_path):
    x = torch.rand(B, T, I).numpy()
    own, theirs = textbook(fastrnn.keras), textbook(keras.layers)
    for saver, other in ((own, theirs), (theirs, own)):
        saver.save_weights(tmp_path / "model.weights.h5")
        other.load_weights(tmp_path / "model.weights.h5")
        np.testing.assert_allclose(other.predict(x, verbose=0), saver.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    for layer, width in ((own.layers[0], I), (own.layers[1], H), (own, I)):
        copy, given = pickle.loads(pickle.dumps(layer)), torch.ones(B, T, width)
        assert type(copy) is type(layer)
        torch.testing.assert_close(copy(given), layer(given))
    own.save(tmp_path / "own.keras")
    loaded = keras.models.load_model(tmp_path / "own.keras")
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in own.layers]
    assert type(loaded.layers[1].forward_layer) is fastrnn.keras.GRU
    theirs.save(tmp_path / "theirs.keras")
    assert type(keras.models.load_model(tmp_path / "theirs.keras").layers[0]) is keras.layers.LSTM
    code = (
        "import keras, numpy as np, sys; model = keras.models.load_model(sys.argv[1]); assert 'fastrnn' not in sys.modules; "
        "assert type(model.layers[0]) is keras.layers.LSTM; "
        "np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))"
    )
    np.save(tmp_path / "x.npy", x)
    paths = [str(tmp_path / name) for name in ("own.keras", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)
    np.testing.assert_allclose(np.load(paths[2]), own.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


def test_fit_learns_as_keras_does():
    x = torch.rand(32, T, I).numpy()
    y = x.sum((1, 2), keepdims=False)[:, None]
    losses = []
    for namespace in (keras.layers, fastrnn.keras):
        keras.utils.set_random_seed(1)
        model = textbook(namespace)
        model.compile("adam", "mse")
        losses.append(model.fit(x, y, epochs=3, batch_size=8, verbose=0).history["loss"] + [model.train_on_batch(x, y)])
        losses[-1].append(model.evaluate(x, y, verbose=0))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[1][2] < losses[1][0]


def test_masks_from_an_embedding_and_a_subclassed_model():
    class Tagger(keras.Model):
        def __init__(self, namespace):
            super().__init__()
            self.embed = keras.layers.Embedding(11, I, mask_zero=True)
            self.encode = namespace.GRU(H, return_sequences=True)
            self.tag = keras.layers.TimeDistributed(keras.layers.Dense(3))

        def call(self, ids):
            return self.tag(self.encode(self.embed(ids)))

    ids = np.array([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]])
    outputs = []
    for namespace in (keras.layers, fastrnn.keras):
        keras.utils.set_random_seed(2)
        outputs.append(Tagger(namespace)(ids))
    torch.testing.assert_close(outputs[1], outputs[0])


def test_mixed_bfloat16_rounds_no_more_than_keras():
    x = torch.randn(B, T, I)
    for name in NAMES:
        theirs, own = both(name, return_sequences=True, dtype="mixed_bfloat16")
        exact = getattr(keras.layers, name)(H, return_sequences=True)
        exact.build((B, T, I))
        exact.set_weights(theirs.get_weights())
        assert own(x).dtype is torch.bfloat16
        assert (own(x).float() - exact(x)).norm() <= 2 * (theirs(x).float() - exact(x)).norm()


def test_a_patch_reaches_layers_of_others_and_ends(no_keras_loop):
    layer = keras.layers.LSTM(H)
    x = torch.randn(B, T, I)
    with fastrnn.keras.patch():
        layer(x)
        keras.layers.SimpleRNN(H)(x)
        keras.layers.Bidirectional(keras.layers.GRU(H))(x)
    with pytest.raises(AssertionError, match="own loop"):
        layer(x)


def test_a_patch_leaves_what_others_have_laid_over_it(monkeypatch):
    patched = fastrnn.keras.patch()
    inner = keras.layers.LSTM.inner_loop
    monkeypatch.setattr(keras.layers.LSTM, "inner_loop", lambda self, *args, **kwargs: inner(self, *args, **kwargs))
    over = keras.layers.LSTM.inner_loop
    patched.close()
    assert keras.layers.LSTM.inner_loop is over
    monkeypatch.undo()
    assert keras.layers.LSTM.inner_loop is inner
    type.__setattr__(keras.layers.LSTM, "inner_loop", inner.__wrapped__)


@pytest.mark.parametrize("bidirectional", [None, {}], ids=["one way", "two ways"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_go_to_torch_and_back(name, bidirectional):
    options = {"return_sequences": True, "bias_initializer": "random_normal"}
    layer = both(name, bidirectional=bidirectional, **options)[1]
    x = torch.randn(B, T, I)
    module = fastrnn.keras.to_torch(layer)
    torch.testing.assert_close(module(x)[0], layer(x))
    back = fastrnn.keras.from_torch(module)
    torch.testing.assert_close(back(x), layer(x))
    of_a_cell = fastrnn.keras.RNN(type(layer.forward_layer if bidirectional is not None else layer)(2).cell)
    y = of_a_cell(x)
    torch.testing.assert_close(fastrnn.keras.to_torch(of_a_cell)(x)[0][:, -1], y)
    for weight, right in zip(back.get_weights(), layer.get_weights(), strict=True):
        np.testing.assert_allclose(weight, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("library", [torch.nn, fastrnn], ids=["torch.nn", "fastrnn"])
def test_stacked_torch_modules_become_keras_models(library):
    module = library.RNN(I, H, 3, nonlinearity="relu", bidirectional=True, dropout=0.2, batch_first=True).eval()
    x = torch.randn(B, T, I)
    torch.testing.assert_close(fastrnn.keras.from_torch(module)(x), module(x)[0])


def test_wrong_arguments_of_the_converters():
    with pytest.raises(TypeError, match="expected a SimpleRNN, LSTM, GRU or Bidirectional"):
        fastrnn.keras.to_torch(keras.layers.Dense(3))
    with pytest.raises(ValueError, match="expected a built layer"):
        fastrnn.keras.to_torch(keras.layers.LSTM(3))
    layer = keras.layers.GRU(3, reset_after=False)
    layer.build((None, None, 2))
    with pytest.raises(ValueError, match="reset_after=False"):
        fastrnn.keras.to_torch(layer)
    with pytest.raises(TypeError, match="expected an RNN, LSTM or GRU"):
        fastrnn.keras.from_torch(torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match="proj_size=2"):
        fastrnn.keras.from_torch(torch.nn.LSTM(2, 3, proj_size=2))


def test_another_backend_is_refused_with_the_setting_to_change():
    code = (
        "import sys, types; keras = types.ModuleType('keras'); keras.backend = types.SimpleNamespace(backend=lambda: 'jax');"
        "sys.modules['keras'] = keras\ntry:\n    import fastrnn.keras\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "KERAS_BACKEND=torch" in done.stdout and "'jax'" in done.stdout


@pytest.mark.parametrize("name", ["RNNModel", "LSTMModel", "GRUModel"])
def test_textbook_models_equal_their_twins_in_pytorch(name):
    x = torch.randn(B, T, I)
    model = getattr(keras_models, name)(H, 3)
    expected = model(x)
    twin = keras_models.to_pytorch(model)
    assert type(twin) is getattr(models, name)
    torch.testing.assert_close(twin(x), expected, atol=1e-6, rtol=1e-5)

    torch.manual_seed(1)
    other = getattr(models, name)(I, H, 2, 3)
    torch.testing.assert_close(keras_models.from_pytorch(other)(x), other(x), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(other(x), expected)


def test_models_without_a_twin_are_refused():
    with pytest.raises(TypeError, match=r"expected a model of examples\.keras_models, got Sequential"):
        keras_models.to_pytorch(keras.Sequential())
    with pytest.raises(TypeError, match=r"expected a model of examples\.models, got LSTM"):
        keras_models.from_pytorch(torch.nn.LSTM(I, H))
    with pytest.raises(ValueError, match=r"expected two layers, got num_layers=1"):
        keras_models.from_pytorch(models.LSTMModel(I, H, 1, 3))


@pytest.mark.parametrize("shape", [(1, 1), (5, 6), (16, 16), (40, 33), (64, 48), (130, 257)], ids=str)
@pytest.mark.parametrize("gates", [(0,), (0, 1, 2, 3), (1, 0, 2)], ids=str)
def test_the_runtime_turns_matrices(gates, shape):
    if fastrnn.dispatch.native is None:
        pytest.skip("no compiled runtime")
    n, H = shape
    matrix = torch.randn(n, len(gates) * H)
    expected = torch.cat([matrix.chunk(len(gates), 1)[gate] for gate in gates], 1).t()
    turned = fastrnn.dispatch.native.turn(matrix, gates, True)
    assert turned.is_contiguous() and torch.equal(turned, expected)
    back = fastrnn.dispatch.native.turn(turned, tuple(gates.index(gate) for gate in range(len(gates))), False)
    assert back.is_contiguous() and torch.equal(back, matrix)
    for other in (matrix.double(), torch.randn(4, 24)[:, ::2], matrix[0], matrix.to(torch.bfloat16)):
        assert fastrnn.dispatch.native.turn(other, gates, True) is None
    for wrong in ((-1, *gates[1:]), (len(gates), *gates[1:]), (0,) * 9, ()):
        assert fastrnn.dispatch.native.turn(matrix, wrong, True) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_call_does_nothing_of_keras(name, monkeypatch):
    own = both(name, return_sequences=True, return_state=True)[1]
    x = torch.randn(B, T, I)
    expected = own(x)
    calls = []
    monkeypatch.setattr(keras.layers.RNN, "call", lambda *args, **kwargs: calls.append("call"))
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda self, x, **kwargs: calls.append("module") or x)
    for training in ({}, {"training": False}, {"training": True}, {"training": None}):
        for found, right in zip(own(x, **training), expected, strict=True):
            torch.testing.assert_close(found, right)
    states = [torch.randn(B, H) for _ in expected[1:]]
    monkeypatch.undo()
    theirs = own(x, initial_state=states, mask=torch.ones(B, T, dtype=torch.bool))
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda self, x, **kwargs: calls.append("module") or x)
    for found, right in zip(own(x, initial_state=states), theirs, strict=True):
        torch.testing.assert_close(found, right)
    assert not calls
    own(x, mask=torch.ones(B, T, dtype=torch.bool))
    assert calls == ["module"]


def _with_hook(layer):
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append("hook") or output * 2)
    return layer


def _with_global_hook(layer):
    layer.handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if module is layer else None
    )
    return layer


def _with_own_call(layer):
    call = layer.call
    object.__setattr__(layer, "call", lambda *args, **kwargs: 3 * call(*args, **kwargs))
    return layer


def _told_what_axes(layer):
    layer.input_spec = keras.layers.InputSpec(ndim=3, axes={-1: I + 1})
    return layer


def masked(x):
    return keras.layers.Masking()(x * MASKS["with holes"].unsqueeze(-1))


CIRCUMSTANCES = {
    "a hook": (_with_hook, lambda layer, x: layer(x)),
    "a hook of all modules": (_with_global_hook, lambda layer, x: layer(x)),
    "a call of the object's own": (_with_own_call, lambda layer, x: layer(x)),
    "an input spec": (_told_what_axes, lambda layer, x: layer(x)),
    "another dtype": (lambda layer: layer, lambda layer, x: layer(x.double())),
    "an array": (lambda layer: layer, lambda layer, x: layer(x.numpy())),
    "too few dimensions": (lambda layer: layer, lambda layer, x: layer(x[0])),
    "no sequences": (lambda layer: layer, lambda layer, x: layer(x[:0])),
    "no steps": (lambda layer: layer, lambda layer, x: layer(x[:, :0])),
    "another width": (lambda layer: layer, lambda layer, x: layer(x[..., 1:])),
    "a state for all rows": (lambda layer: layer, lambda layer, x: layer(x, initial_state=[x[:1, 0, :1].repeat(1, H)] * 2)),
    "a state of another width": (lambda layer: layer, lambda layer, x: layer(x, initial_state=[x[:, 0]] * 2)),
    "a state too few": (lambda layer: layer, lambda layer, x: layer(x, initial_state=[torch.ones(B, H)])),
    "a flag that is no bool": (lambda layer: layer, lambda layer, x: layer(x, training=1)),
    "a mask on the input": (lambda layer: layer, lambda layer, x: layer(masked(x))),
}  # fmt: skip


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_a_call_does_what_keras_does_around_it(circumstance):
    prepare, call = CIRCUMSTANCES[circumstance]
    x, found = torch.randn(B, T, I), []
    for layer in both("LSTM", return_sequences=True, bias_initializer="random_normal"):
        layer(x)
        layer = prepare(layer)
        try:
            y = call(layer, x)
            found.append((None, y.dtype, y.shape, getattr(y, "_keras_mask", None) is not None, y.detach()))
        except Exception as error:
            found.append((type(error),))
        if handle := getattr(layer, "handle", None):
            handle.remove()
    assert found[0][:4] == found[1][:4]
    if len(found[0]) > 1:
        torch.testing.assert_close(found[1][4], found[0][4])


def test_losses_and_dtypes_of_a_call_are_those_of_keras():
    x = torch.randn(B, T, I)
    for theirs, own in (both("GRU", activity_regularizer="l2"), both("GRU", kernel_regularizer="l1")):
        for layer in (theirs, own):
            layer(x)
            layer(x)
        torch.testing.assert_close(own.losses, theirs.losses)
    theirs, own = both("GRU", return_sequences=True)
    with keras.src.backend.AutocastScope("bfloat16"):
        assert own(x).dtype is theirs(x).dtype is torch.float32


def test_the_training_flag_reaches_other_layers_as_in_keras():
    class Model(keras.Model):
        def __init__(self, namespace, told):
            super().__init__()
            self.one, self.two, self.told = namespace.LSTM(H, return_sequences=True), namespace.GRU(H), told
            self.drop = keras.layers.Dropout(0.5, seed=1)

        def call(self, x, training=None):
            return self.drop(self.two(self.one(x, **self.told)))

    x = torch.ones(B, T, I)
    for told in ({}, {"training": True}, {"training": False}):
        for training in ({}, {"training": True}, {"training": False}):
            zeros = []
            for namespace in (keras.layers, fastrnn.keras):
                keras.utils.set_random_seed(2)
                model = Model(namespace, told)
                model(x, **training)
                zeros.append(bool((model(x, **training) == 0).any()))
            assert zeros[0] == zeros[1], (told, training)


@pytest.mark.parametrize("name", ["SimpleRNN", "LSTM", "GRU"])
def test_a_layers_own_dtype_policy(name):
    """Where the scope of Keras' call around the layer casts no weights, or casts them to another dtype."""
    x, own = torch.randn(2, 3, 4), getattr(fastrnn.keras, name)(5, dtype="mixed_bfloat16")
    expected = own(x)
    found, _ = own.stateless_call(own.trainable_variables, own.non_trainable_variables, x)
    torch.testing.assert_close(found, expected)
    both = fastrnn.keras.Bidirectional(getattr(fastrnn.keras, name)(5, dtype="mixed_bfloat16"))
    theirs = keras.layers.Bidirectional(getattr(keras.layers, name)(5, dtype="mixed_bfloat16"))
    y = both(x)
    theirs.build(x.shape)
    theirs.set_weights(both.get_weights())
    other = theirs(x)
    assert y.dtype == other.dtype
    torch.testing.assert_close(y, other, rtol=0.02, atol=0.02)  # bfloat16 has eight bits


def _cells_of(layer):
    parts = (layer.forward_layer, layer.backward_layer) if isinstance(layer, keras.layers.Bidirectional) else (layer,)
    return [part.cell for part in parts]


def _with_own_kernels(layer):
    for cell in _cells_of(layer):
        cell.kernel = torch.nn.Parameter(2 * cell.kernel.value.detach())
        cell.recurrent_kernel._value = torch.nn.Parameter(2 * cell.recurrent_kernel.value.detach())
    return layer


def _with_hooks_on_cells(layer):
    for cell in _cells_of(layer):
        cell.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    return layer


def _with_hooks_before_cells(layer):
    for cell in _cells_of(layer):
        cell.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    return layer


def _with_cells_called_otherwise(layer):
    for cell in _cells_of(layer):
        call = cell.call
        object.__setattr__(cell, "call", lambda x, *args, call=call, **kwargs: call(2 * x, *args, **kwargs))
    return layer


TINKERED = [_with_own_kernels, _with_hooks_on_cells, _with_hooks_before_cells, _with_cells_called_otherwise]


@pytest.mark.parametrize("mask", ["none", "right-padded"])
@pytest.mark.parametrize("bidirectional", [None, {}], ids=["one way", "two ways"])
@pytest.mark.parametrize("tinker", [*TINKERED, torch.nn.Module.double], ids=lambda tinker: tinker.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_done_to_a_cell_does_what_it_does_in_keras(name, tinker, bidirectional, mask):
    x, found = torch.randn(B, T, I), []
    for layer in both(name, bidirectional=bidirectional, bias_initializer="random_normal", return_sequences=True):
        layer(x)
        y = tinker(layer)(x, mask=MASKS[mask])
        y.square().sum().backward()
        found.append([y, *(parameter.grad for parameter in layer.parameters() if parameter.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_regularizer_of_a_cell_and_a_stack_of_ones_own_run_in_keras():
    class Stack(keras.layers.StackedRNNCells):
        def call(self, inputs, states, **kwargs):
            output, states = super().call(inputs, states, **kwargs)
            return 2 * output, states

    x = torch.randn(B, T, I)
    cells = [keras.layers.LSTMCell(3), keras.layers.GRUCell(4)]
    expected, found = (namespace.RNN(Stack(cells), return_sequences=True)(x) for namespace in (keras.layers, fastrnn.keras))
    torch.testing.assert_close(found, expected)
    regularized = keras.layers.SimpleRNNCell(3, activity_regularizer="l2")
    layers = [namespace.RNN(regularized) for namespace in (keras.layers, fastrnn.keras)]
    losses = []
    for layer in layers:
        layer(x)
        losses.append(sum(layer.losses))
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("mask", ["none", "with holes"])
@pytest.mark.parametrize("bidirectional", [None, {}], ids=["one way", "two ways"])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_under_autocast_are_those_of_keras(name, bidirectional, mask):
    x, found = torch.randn(B, T, I), []
    options = {"bidirectional": bidirectional, "return_sequences": True, "return_state": True}
    for layer in both(name, **options):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(layer(x, mask=MASKS[mask]))
    for one, other in zip(*found, strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)  # bfloat16 has eight bits
