"""Layers whose weights are packed once, for serving: `freeze` and `thaw`.

A frozen layer is of a class made for it, between which and its own class it changes, as torch's parametrized modules do.
"""

from __future__ import annotations

import copyreg
import functools
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import dispatch
from fastrnn.derived import made_class, set_class
from fastrnn.modules import DROP_INS
from fastrnn.recurrent import Recurrent

M = TypeVar("M", bound=nn.Module)
_NEWOBJ: Any = copyreg.__newobj__  # type: ignore[attr-defined] # typeshed leaves it out


def freeze(model: M) -> M:
    """Pack the weights of every fastrnn layer and cell in `model`, or of `model` itself, once, for serving on a CPU.

    An ordinary layer packs its weights in each call. Short sequences and single steps gain most from a frozen one, and a single
    step gets the same bits as in a longer sequence. The packed weights take as much memory as the weights, which stay.

    A frozen layer is of a class of its own, such as FrozenLSTM, which is derived from the layer's class. It computes with the
    weights that it had when it was frozen. `load_state_dict` and `to` freeze it anew. After any other change of the weights,
    call `freeze` again; until then it is not defined which weights a call uses. Copies and pickles of a frozen layer are
    ordinary layers.

    A frozen layer raises a RuntimeError for `train()`, for input that requires a gradient, and for parameters that replace its
    own (as torch.func.functional_call does; not under a compiler). If a model holds a frozen layer, `model.train()` raises when
    it reaches it and leaves the modules before it in training mode, so call `model.eval()` afterwards.

    Layers that the compiled CPU engine does not run are left as they are: layers on other devices, in half precision or
    compressed, layers with computed weights (parametrizations), layers of a cell whose matrices lack a block (docs/cells.md),
    and all layers where another engine is forced.

    Args:
        model: any module, in evaluation mode.

    Returns:
        `model`.

    Raises:
        RuntimeError: a layer is in training mode.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, (*DROP_INS.values(), Recurrent))]
    for layer in layers:
        if layer.training:
            raise RuntimeError("freeze: expected a model in evaluation mode, but a layer is training; call eval() first")
    for layer in layers:
        panels = _packed(layer)
        if panels is not None:
            own_class: Any = getattr(layer, "_fastrnn_own_class", type(layer))
            set_class(layer, _frozen_class(own_class))
            layer.__dict__["_fastrnn_panels"] = panels  # past a __setattr__ of the module's own
        else:  # what was packed before is not what it has now
            thaw(layer)
    return model


def thaw(model: M) -> M:
    """Turn every frozen layer in `model`, or `model` itself, into an ordinary layer, which reads its weights in each call.

    Args:
        model: any module.

    Returns:
        `model`.

    Raises:
        RuntimeError: a layer's class was derived from a frozen layer's class, as parametrizing a frozen layer does.
    """
    for module in list(model.modules()):
        if isinstance(module, _Frozen):
            if type(module) is not _frozen_class(module._fastrnn_own_class):
                raise RuntimeError(f"thaw: {type(module).__name__} was derived from a frozen layer; undo that first")
            set_class(module, module._fastrnn_own_class)
            del module.__dict__["_fastrnn_panels"]
    return model


def _packed(layer: Any) -> tuple[Tensor, ...] | None:
    """The panels of a layer, and its parameters; or None where there cannot be any."""
    if dispatch.native is None or layer._fastrnn_fast_path is None:
        return None
    if isinstance(layer, Recurrent) and not layer._prepared():
        return None
    if isinstance(layer, nn.RNNBase):
        layer._update_flat_weights()  # as each call does: others may have stood in their place for a while
    allocate = functools.partial(torch.empty, dtype=torch.uint8, device="cpu")
    panels = dispatch.native.pack(layer.__dict__, layer._fastrnn_fast_path, allocate)
    return None if panels is None else (panels, *layer._parameters.values())


class _Frozen(nn.Module):
    """What a frozen layer does otherwise. The extension (csrc/modules.cpp) finds its panels in `_fastrnn_panels`, the first of
    that tuple, before the parameters that they were made of.
    """

    _fastrnn_panels: tuple[Tensor, ...]
    _fastrnn_own_class: type  # that it had before it was frozen

    def _fastrnn_fallback(self: Any, input: Any, hx: Any = None) -> Any:
        packed = zip_longest(self._fastrnn_panels[1:], self._parameters.values())
        if not torch.compiler.is_compiling() and any(one is not other for one, other in packed):
            raise RuntimeError(
                f"{self._fastrnn_own_class.__name__} is frozen and computes with its own weights: call thaw() to give others"
            )
        if torch.is_grad_enabled():
            x = input[0] if isinstance(input, PackedSequence) else input
            given = (x, *hx) if isinstance(hx, (tuple, list)) else (x, hx)
            if any(getattr(value, "requires_grad", False) for value in given):
                raise RuntimeError(
                    f"{self._fastrnn_own_class.__name__} is frozen and has no gradients: call thaw() to train with it"
                )
        with torch.no_grad():
            return super()._fastrnn_fallback(input, hx)  # type: ignore[misc] # of the class that it is mixed into

    def train(self: Any, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(f"{self._fastrnn_own_class.__name__} is frozen: call thaw() before train()")
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
        self.__dict__["_fastrnn_panels"] = panels
        return self

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """As an ordinary layer: panels are this processor's."""
        twin = object.__new__(self._fastrnn_own_class)
        twin.__dict__ = {name: value for name, value in self.__dict__.items() if name != "_fastrnn_panels"}
        build, *rest = twin.__reduce_ex__(protocol)
        return object.__new__ if build is _NEWOBJ else build, *rest  # pickle wants that one to build self's class


def _frozen_class(own_class: type) -> type:
    attributes = {"__module__": own_class.__module__, "_fastrnn_own_class": own_class}
    return made_class(f"Frozen{own_class.__name__}", (own_class,), _Frozen, attributes)
