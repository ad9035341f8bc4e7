"""Other libraries' recurrent layers on a GPU, with the weights of a module of torch.nn's: peers of bench.gpu.

A peer is a function of x [T, B, I] that returns y [T, B, H] and differentiates by x and the module's parameters. It says of
itself whether it is there, and which layers it takes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A library that runs layers of one direction, with dense input.

    missing: what it needs that is not here, or None.
    cells:   those that it has.
    formats: those of bench.gpu that it computes in.
    layer:   makes its function of x from a layer's cell and weights: w_ih [G*H, I], w_hh [G*H, H], b_ih and b_hh [G*H].
    """

    missing: Callable[[], str | None]
    cells: tuple[str, ...]
    formats: tuple[str, ...]
    layer: Callable[[str, Sequence[Tensor]], Run]

    def leaves(self, cell: str, format: str, directions: int, packed: bool) -> str | None:
        """Why it has no such layer, or None."""
        if cell not in self.cells or format not in self.formats:
            return f"it has {', '.join(self.cells)} in {', '.join(self.formats)}"
        return "it has one direction and dense input" if directions > 1 or packed else None

    def stack(self, module: nn.RNNBase) -> Run:
        """A module's layers, one after another."""
        cell = module.mode.split("_")[0]
        layers = [self.layer(cell, weights) for weights in module.all_weights]

        def run(x: Tensor) -> Tensor:
            for layer in layers:
                x = layer(x)
            return x

        return run


def _needs(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"{name} is not installed"


# TorchRL, https://github.com/pytorch/rl: the Triton backend of its LSTMModule and GRUModule, without their TensorDicts.


def _torchrl(cell: str, weights: Sequence[Tensor]) -> Run:
    from torchrl.modules.tensordict_module import _rnn_triton

    kernel = _rnn_triton.lstm_triton if cell == "LSTM" else _rnn_triton.gru_triton

    def run(x: Tensor) -> Tensor:
        x = x.transpose(0, 1).contiguous()
        B, T, _ = x.shape
        states = [x.new_zeros(B, T, weights[1].shape[1])] * (2 if cell == "LSTM" else 1)  # at each step, for its resets
        resets = torch.zeros(B, T, dtype=torch.bool, device=x.device)
        precision = torch.backends.cuda.matmul.fp32_precision
        return kernel(x, *states, *weights, resets, input_precision=precision)[0].transpose(0, 1)

    return run


def _no_torchrl() -> str | None:
    return _needs("torchrl") or _needs("triton")


# A loop over steps, each of which torch.compile has made.


def _lstm(gates: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (gates + functional.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(gates: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    r, z, n = gates.chunk(3, -1)
    of_r, of_z, of_n = functional.linear(h, w_hh, b_hh).chunk(3, -1)
    n = (n + (r + of_r).sigmoid() * of_n).tanh()
    return n + (z + of_z).sigmoid() * (h - n), c


def _rnn(gates: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    return (gates + functional.linear(h, w_hh, b_hh)).tanh(), c


_STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}


def _loop(cell: str, weights: Sequence[Tensor]) -> Run:
    w_ih, w_hh, b_ih, b_hh = weights
    torch._dynamo.reset()  # which gives up compiling a function after some shapes
    step = torch.compile(_STEPS[cell], dynamic=False)

    def run(x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], w_hh.shape[1])
        outputs = []
        for gates in functional.linear(x, w_ih, b_ih):
            h, c = step(gates, h, c, w_hh, b_hh)
            outputs.append(h)
        return torch.stack(outputs)

    return run


# FlashRNN, https://github.com/NX-AI/flashrnn: its fused CUDA kernels, which it compiles for each shape (GRU: its other ones).


def _flashrnn(cell: str, weights: Sequence[Tensor]) -> Run:
    from flashrnn import flashrnn

    w_ih, w_hh, b_ih, b_hh = weights
    H = w_hh.shape[1]
    function = {"LSTM": "lstm", "GRU": "gru", "RNN": "elman"}[cell]

    def run(x: Tensor) -> Tensor:
        inputs = functional.linear(x, w_ih).transpose(0, 1)  # [B, T, G*H]
        recurrent, biases = w_hh, b_ih + b_hh
        if cell == "GRU":  # its order is n, r, z, and the biases of n are two: the recurrent one first
            recurrent = torch.cat((w_hh[2 * H :], w_hh[: 2 * H]))
            biases = torch.cat((b_hh[2 * H :], biases[: 2 * H], b_ih[2 * H :]))
        given = inputs.unflatten(2, (-1, 1, H)), recurrent.view(-1, 1, H, H), biases.view(-1, 1, H)
        states, _ = flashrnn(*given, function=function, backend="cuda_fused", dtype=str(x.dtype).removeprefix("torch."))
        return states[0, :, :, 0].transpose(0, 1)  # of [states, B, T, heads, H]

    return run


def _no_flashrnn() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    places = os.pathsep.join([os.path.join(CUDA_HOME or "", "bin"), os.environ.get("PATH", "")])
    return _needs("flashrnn") or (None if shutil.which("nvcc", path=places) else "there is no nvcc to compile its kernels with")


ALL, HALF, SINGLE = ("fp16", "bf16", "tf32", "fp32"), ("fp16", "bf16"), ("tf32", "fp32")
PEERS = {
    "torchrl": Peer(_no_torchrl, ("LSTM", "GRU"), SINGLE, _torchrl),
    "loop": Peer(lambda: None, ("LSTM", "GRU", "RNN"), ALL, _loop),
    "flashrnn": Peer(_no_flashrnn, ("LSTM", "GRU", "RNN"), HALF, _flashrnn),
}


def named(text: str) -> list[str]:
    """Peers by their names, for a command line; torch itself always takes part.

    Raises:
        ValueError: there is none of such a name.
    """
    names = [name for name in text.split(",") if name != "torch"]
    if unknown := [name for name in names if name not in PEERS]:
        raise ValueError(f"expected of torch, {', '.join(PEERS)}, got {', '.join(unknown)}")
    return names


def present(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Those that can run here, and of the others what is missing."""
    missing = {name: why for name in names if (why := PEERS[name].missing())}
    return [name for name in names if name not in missing], missing
