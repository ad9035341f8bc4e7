"""The textbook models in Keras, and the way to their twins in PyTorch and back.

model = LSTMModel(hidden_size=128, num_classes=10)
logits = model(x)  # [batch, steps, features] -> [batch, num_classes]
twin = to_pytorch(model)  # an LSTMModel of examples/models.py with the same weights, and the same logits
"""

from __future__ import annotations

from typing import Any

import keras
import torch

from examples import models
from fastrnn.keras import GRU, LSTM, SimpleRNN, from_torch, to_torch  # the one change: it would be keras.layers


class RNNModel(keras.Model):
    """Two stacked plain layers, and a Dense layer that reads the last step."""

    def __init__(self, hidden_size: int, num_classes: int, **options: Any):
        super().__init__(**options)
        self.lower = SimpleRNN(hidden_size, return_sequences=True)
        self.upper = SimpleRNN(hidden_size)
        self.fc = keras.layers.Dense(num_classes)

    def call(self, x: Any) -> Any:
        return self.fc(self.upper(self.lower(x)))


class LSTMModel(keras.Model):
    """Two stacked LSTM layers, and a Dense layer that reads the last step."""

    def __init__(self, hidden_size: int, num_classes: int, **options: Any):
        super().__init__(**options)
        self.lower = LSTM(hidden_size, return_sequences=True)
        self.upper = LSTM(hidden_size)
        self.fc = keras.layers.Dense(num_classes)

    def call(self, x: Any) -> Any:
        return self.fc(self.upper(self.lower(x)))


class GRUModel(keras.Model):
    """Two stacked GRU layers, and a Dense layer that reads the last step."""

    def __init__(self, hidden_size: int, num_classes: int, **options: Any):
        super().__init__(**options)
        self.lower = GRU(hidden_size, return_sequences=True)
        self.upper = GRU(hidden_size)
        self.fc = keras.layers.Dense(num_classes)

    def call(self, x: Any) -> Any:
        return self.fc(self.upper(self.lower(x)))


TWINS = ((RNNModel, models.RNNModel, "rnn"), (LSTMModel, models.LSTMModel, "lstm"), (GRUModel, models.GRUModel, "gru"))


def to_pytorch(model: Any) -> Any:
    """Make the model of examples/models.py with the weights of a built model of this file, in evaluation mode.

    Raises:
        TypeError: `model` is no model of this file. ValueError: it has not been called yet.
    """
    found = [(torch_class, name) for keras_class, torch_class, name in TWINS if isinstance(model, keras_class)]
    if not found:
        raise TypeError(f"model: expected a model of examples.keras_models, got {type(model).__name__}")
    layers = [to_torch(layer) for layer in (model.lower, model.upper)]
    (torch_class, name), first = found[0], layers[0]
    twin = torch_class(first.input_size, first.hidden_size, 2, model.fc.units)
    recurrent = getattr(twin, name)
    with torch.no_grad():
        for index, layer in enumerate(layers):
            for key, value in layer.named_parameters():
                recurrent.get_parameter(key.replace("_l0", f"_l{index}")).copy_(value)
        kernel, bias = (weight.value for weight in model.fc.weights)
        twin.fc.weight.copy_(kernel.t())
        twin.fc.bias.copy_(bias)
    return twin.eval()


def from_pytorch(twin: Any) -> Any:
    """Make the model of this file with the weights of a model of examples/models.py that has two layers.

    Raises:
        TypeError: `twin` is no model of examples/models.py. ValueError: it has not two layers.
    """
    found = [(keras_class, getattr(twin, name)) for keras_class, torch_class, name in TWINS if isinstance(twin, torch_class)]
    if not found:
        raise TypeError(f"twin: expected a model of examples.models, got {type(twin).__name__}")
    keras_class, recurrent = found[0]
    if recurrent.num_layers != 2:
        raise ValueError(f"twin: expected two layers, got num_layers={recurrent.num_layers}")
    model = keras_class(recurrent.hidden_size, twin.fc.out_features)
    model(torch.zeros(1, 1, recurrent.input_size))  # which builds it
    for layer, source in zip((model.lower, model.upper), from_torch(recurrent).layers):
        layer.set_weights(source.get_weights())
    model.fc.set_weights([twin.fc.weight.detach().t().cpu().numpy(), twin.fc.bias.detach().cpu().numpy()])
    return model
