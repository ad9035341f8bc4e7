"""Layers whose weights are packed once, for serving: `freeze` and `thaw`.

A frozen layer is of a class made for it, between which and its own class it changes, as torch's parametrized modules do.
"""

from __future__ import annotations

import functools
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import dispatch
from fastrnn.modules import DROP_INS

M = TypeVar("M", bound=nn.Module)


def freeze(model: M) -> M:
    """Pack the weights of every fastrnn layer and cell in `model`, or of `model` itself, once, for serving on a CPU.

    A call then reads panels that lie ready, where it would pack them itself: short sequences and single steps gain most, and a
    step gets the very bits that it has in a longer sequence. The panels take as much memory as the weights, which stay.

    Frozen layers compute with the weights they had when they were frozen. `load_state_dict` and `to` freeze them anew; after
    any other change call `freeze` again, whatever else a call then computes with is not defined. They have no gradients, and
    refuse `train()`, input that requires one, and parameters in place of those they had (torch.func.functional_call, but not
    under a compiler). `train()` of a model that holds one raises when it gets there, and leaves what came before it training:
    call `eval()` if you go on. Copies and pickles of a frozen layer are not frozen.

    What the compiled CPU engine does not run is left as it is: layers on other devices or in half precision (`compress`ed
    ones, too), computed weights (parametrisations), any layer where the engine is not there or another is forced.

    Returns:
        `model`.

    Raises:
        RuntimeError: a layer is in training mode.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, tuple(DROP_INS.values()))]
    for layer in layers:
        if layer.training:
            raise RuntimeError("freeze: expected a model in evaluation mode, but a layer is training; call eval() first")
    for layer in layers:
        panels = _packed(layer)
        if panels is not None:
            own_class: Any = getattr(layer, "_own_class", type(layer))
            layer.__class__ = _frozen_class(own_class)
            layer._fastrnn_panels = panels
        else:  # what was packed before is not what it has now
            thaw(layer)
    return model


def thaw(model: M) -> M:
    """Make ordinary layers of all that are frozen in `model`, or of `model` itself: they read their weights at each call.

    Returns:
        `model`.

    Raises:
        RuntimeError: a class was derived from that of a frozen layer, as a parametrisation of it does.
    """
    for module in list(model.modules()):
        if isinstance(module, _Frozen):
            if type(module) is not _frozen_class(module._own_class):
                raise RuntimeError(f"thaw: {type(module).__name__} was derived from a frozen layer; undo that first")
            module.__class__ = module._own_class
            del module._fastrnn_panels
    return model


def _packed(layer: Any) -> tuple[Tensor, ...] | None:
    """The panels of a layer, and its parameters; or None where there cannot be any."""
    if dispatch.native is None:
        return None
    mode = dispatch.mode_of_cell(layer) if isinstance(layer, nn.RNNCellBase) else None
    panels = dispatch.native.pack(layer.__dict__, mode, functools.partial(torch.empty, dtype=torch.uint8, device="cpu"))
    return None if panels is None else (panels, *layer._parameters.values())


class _Frozen(nn.Module):
    """What a frozen layer does otherwise. The extension (csrc/modules.cpp) finds its panels in `_fastrnn_panels`, the first of
    that tuple, before the parameters that they were made of.
    """

    _fastrnn_panels: tuple[Tensor, ...]
    _own_class: type  # that it had before it was frozen

    def _fallback(self: Any, input: Any, hx: Any = None) -> Any:
        packed = zip_longest(self._fastrnn_panels[1:], self._parameters.values())
        if not torch.compiler.is_compiling() and any(one is not other for one, other in packed):
            raise RuntimeError(
                f"{self._own_class.__name__} is frozen and computes with its own weights: call thaw() to give others"
            )
        if torch.is_grad_enabled():
            x = input[0] if isinstance(input, PackedSequence) else input
            given = (x, *hx) if isinstance(hx, (tuple, list)) else (x, hx)
            if any(getattr(value, "requires_grad", False) for value in given):
                raise RuntimeError(f"{self._own_class.__name__} is frozen and has no gradients: call thaw() to train with it")
        with torch.no_grad():
            return super()._fallback(input, hx)  # type: ignore[misc] # of the class that it is mixed into

    def train(self: Any, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(f"{self._own_class.__name__} is frozen: call thaw() before train()")
        return super().train(mode)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        return self._freeze_anew()

    def _load_from_state_dict(self: Any, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._freeze_anew()

    def _freeze_anew(self: Any) -> Any:
        panels = _packed(self)
        if panels is None:  # such as on another device
            return thaw(self)
        self._fastrnn_panels = panels
        return self

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """As an ordinary layer: panels are this processor's."""
        twin = object.__new__(self._own_class)
        twin.__dict__ = {name: value for name, value in self.__dict__.items() if name != "_fastrnn_panels"}
        state = twin.__reduce_ex__(2)[2]
        return object.__new__, (self._own_class,), state


@functools.cache
def _frozen_class(own_class: type) -> type:
    attributes = {"__module__": own_class.__module__, "_own_class": own_class}
    return type(f"Frozen{own_class.__name__}", (_Frozen, own_class), attributes)
