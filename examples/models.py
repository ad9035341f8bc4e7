"""The textbook models: a recurrent network that classifies a sequence by its last step.

model = LSTMModel(input_size=28, hidden_size=128, num_layers=2, num_classes=10)
logits = model(x)  # [batch, steps, input_size] -> [batch, num_classes]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastrnn  # the one change: the layers below would be nn.RNN, nn.LSTM and nn.GRU


class RNNModel(nn.Module):
    """A plain (tanh) recurrent classifier."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, num_classes: int):
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.rnn = fastrnn.RNN(input_size, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(self.num_layers, x.size(0), self.hidden_size, dtype=x.dtype, device=x.device)
        out, _ = self.rnn(x, h0)
        return self.fc(out[:, -1])


class LSTMModel(nn.Module):
    """An LSTM classifier."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, num_classes: int):
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.lstm = fastrnn.LSTM(input_size, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(self.num_layers, x.size(0), self.hidden_size, dtype=x.dtype, device=x.device)
        out, _ = self.lstm(x, (h0, torch.zeros_like(h0)))
        return self.fc(out[:, -1])


class GRUModel(nn.Module):
    """A GRU classifier."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, num_classes: int):
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.gru = fastrnn.GRU(input_size, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(self.num_layers, x.size(0), self.hidden_size, dtype=x.dtype, device=x.device)
        out, _ = self.gru(x, h0)
        return self.fc(out[:, -1])
