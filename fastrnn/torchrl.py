"""TorchRL's LSTMModule and GRUModule on fastrnn's engines.

    from fastrnn.torchrl import LSTMModule  # was: from torchrl.modules import LSTMModule

In recurrent mode TorchRL's modules cut a batch at the marks of `is_init`, pad the pieces, pack them, and put the results
together again. These derive from them and hand the marks to the layer, as `resets`, in one call.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torchrl.modules
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor

import fastrnn

__all__ = ["GRUModule", "LSTMModule"]


class _OnResets:
    """What both modules have beyond TorchRL's. layer_name: of the attribute that holds the layer."""

    layer_name: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fastrnn.convert(self)  # type: ignore[type-var]  # a module, by its other base

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """As TorchRL's. In recurrent mode, where the last dimension of `tensordict` is time, with resets at `is_init`."""
        done = _with_resets(self, getattr(self, self.layer_name), tensordict)
        return super().forward(tensordict) if done is None else done  # type: ignore[misc]  # of the other base


class LSTMModule(_OnResets, torchrl.modules.LSTMModule):
    """`torchrl.modules.LSTMModule`, arguments and behaviour, on fastrnn's engines.

    A layer that is given as `lstm` becomes one of fastrnn's in place. `recurrent_backend` is for what resets cannot do: two
    directions, and recorded states that are not zero where an episode begins in the midst of a row.
    """

    layer_name = "lstm"


class GRUModule(_OnResets, torchrl.modules.GRUModule):
    """`torchrl.modules.GRUModule`, as `LSTMModule`; a layer is given as `gru`."""

    layer_name = "gru"


def _with_resets(module: Any, layer: Any, tensordict: TensorDictBase) -> TensorDictBase | None:
    """What the module's forward returns in recurrent mode; None where TorchRL has to do it.

    TorchRL begins an episode with the state that was recorded before it, which is zero where a TensorDictPrimer made it. It
    writes states at the last steps of episodes and rows, and zeros elsewhere.
    """
    if not module.recurrent_mode or not tensordict.ndim or not isinstance(layer, (fastrnn.LSTM, fastrnn.GRU)):
        return None
    if layer.bidirectional or layer.learn_initial_state:
        return None
    rows = tensordict.select(*module.in_keys, strict=False).reshape(-1, tensordict.shape[-1])
    x, *recorded = (rows.get(key, None) for key in module.in_keys[:-1])
    begins = rows["is_init"].squeeze(-1)  # [B, T]
    ends = torch.cat((begins[:, 1:], torch.ones_like(begins[:, :1])), 1)
    begins = begins & torch.arange(begins.shape[1], device=begins.device).bool()  # a row goes on from what was recorded
    present: list[Tensor] = [state for state in recorded if state is not None]  # [B, T, L, H]
    if x is None or len(present) not in (0, len(recorded)) or any(state[begins].any() for state in present):
        return None
    first = [state[:, 0].transpose(0, 1).contiguous() for state in present]
    hx = None if not first else tuple(first) if len(recorded) > 1 else first[0]
    y, _, states = layer(x, hx, resets=begins, all_states=True)
    steps = [state.permute(1, 2, 0, 3) for state in (states if isinstance(states, tuple) else (states,))]
    results = [y, *(torch.where(ends[..., None, None], state, 0.0) for state in steps)]
    for key, result in zip(module.out_keys, results, strict=True):
        tensordict.set(key, result.reshape(*tensordict.shape, *result.shape[2:]))
    return tensordict
