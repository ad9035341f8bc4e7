"""What is done to whole models: bring fastrnn to code that says `torch.nn`, take it away again, make weights small."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from fastrnn import features
from fastrnn.derived import converted_class, original_class, set_class
from fastrnn.frozen import thaw
from fastrnn.modules import DROP_INS, mark_compressed

M = TypeVar("M", bound=nn.Module)


def convert(model: M, inplace: bool = True) -> M:
    """Turn every torch.nn RNN, LSTM, GRU and cell in `model`, or `model` itself, into fastrnn's.

    Modules and Parameters stay the very objects they were, so optimisers, hooks, attributes and references hold. All other
    modules are left alone. `fastrnn.revert` undoes it.

    A module of a class derived from torch.nn's, `class Own(nn.LSTM)`, becomes one that is both an Own and a fastrnn.LSTM: Own's
    methods and attributes hold, and `super().forward(x)` in them reaches fastrnn's forward. Own itself does not change. Where
    Own's code computes without torch.nn's forward, or names it (`nn.LSTM.forward(self, x)`), that code runs as it is.
    Parametrized modules (torch.nn.utils.parametrize) are converted in the same way and stay parametrized.

    Args:
        model: any module.
        inplace: False leaves `model` alone and converts a deep copy of it.

    Returns:
        `model`, or the converted copy.
    """
    if not inplace:
        model = copy.deepcopy(model)
    for module in model.modules():
        set_class(module, converted_class(type(module)))
    return model


def revert(model: M) -> M:
    """Turn every fastrnn layer and cell in `model`, or `model` itself, into torch.nn's, as it was before `convert`.

    For code that goes by the exact class of a module, and to pickle a model for programs without fastrnn. Modules and
    Parameters stay the very objects they were. A module gets the class that it had: torch.nn's, or the one derived from it.
    A fastrnn.LSTM that was built as one becomes an nn.LSTM, too. Frozen layers are thawed first. Weights that `compress` made
    bfloat16 stay so: call `model.float()` before. Modules of classes derived from fastrnn's own are left as they are.

    Returns:
        `model`.

    Raises:
        RuntimeError: as `fastrnn.thaw`; or a layer has what torch.nn's have not, such as heads.
    """
    for module in model.modules():
        if getattr(module, "_fastrnn_features", False) and original_class(type(module)) is not type(module):
            raise RuntimeError(f"revert: torch.nn's {type(module).__name__} has no {features.described(module)[2:]}")
    for module in thaw(model).modules():
        set_class(module, original_class(type(module)))
    return model


def compress(model: M) -> M:
    """Hold the weight matrices of every fastrnn layer and cell in `model`, or of `model` itself, in bfloat16.

    This is for inference on a CPU. The matrices take half the memory, and a step of few sequences reads half as much. Input,
    states, biases, sums and outputs stay float32. Each weight is rounded once, by at most 2**-8 of its value, and nothing else
    changes: the outputs have the bits of a float32 layer with the rounded weights (but for rounding in float32 in a single
    step, and with more than four sequences on a processor with AMX).

    Parameters stay the objects they were; their gradients are dropped. `model.float()` makes float32 layers again, with the
    rounded weights, and any other conversion makes ordinary layers of that dtype. Copies, pickles and state dicts of a
    compressed layer say that it is one (a state dict beside its keys, for `load_state_dict(..., assign=True)`). Frozen
    layers are thawed, and `freeze` leaves compressed ones as they are. Layers of another dtype than float32 and those with
    computed weights (parametrizations) are not touched. Where the output size is odd, and on engines other than the CPU's,
    each call makes a float32 copy of the matrices.

    Args:
        model: any module.

    Returns:
        `model`.
    """
    for module in model.modules():
        if isinstance(module, tuple(DROP_INS.values())) and _is_in_float32(module):
            for parameter in thaw(module)._parameters.values():
                if parameter is not None and parameter.dim() == 2:
                    parameter.grad = None
                    parameter.data = parameter.data.bfloat16()
            mark_compressed(module, True)
    return model


def _is_in_float32(layer: Any) -> bool:
    """Are all weights of a layer its own parameters, in float32?"""
    of_cell = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
    names = layer._flat_weights_names if isinstance(layer, nn.RNNBase) else of_cell
    weights = layer._parameters.values()
    return layer._parameters.keys() >= set(names) and all(weight is None or weight.dtype is torch.float32 for weight in weights)


def patch() -> ExitStack:
    """Have `torch.nn.LSTM(...)`, its five siblings and classes derived from them build what `convert` makes, from this call on.

        with fastrnn.patch():
            model = other_peoples_model()

    or `patched = fastrnn.patch()` and, later, `patched.close()`. torch.nn's classes themselves stay: names imported earlier,
    isinstance and pickles work as before, and what was built keeps its class. It does not matter when a derived class was
    defined. A module becomes fastrnn's while `super().__init__()` runs, so the rest of its `__init__` meets it as such.

    Returns:
        A context manager that is already active; leaving it, or its `close()`, ends the patch: of several, the last one ended.
        What another library has meanwhile laid over torch.nn's constructors stays.
    """
    global _patches
    _patches += 1
    for base in _BASES:
        if not _is_ours(vars(base)["__init__"]):
            base.__init__ = _then_convert(vars(base)["__init__"])  # type: ignore[method-assign]  # what a patch is
    patched = ExitStack()
    patched.callback(_end_patch)
    return patched


_BASES: tuple[type[nn.Module], ...] = (nn.RNNBase, nn.RNNCellBase)  # whose constructors those of the six classes call
_patches = 0  # those that have not ended
_laid: weakref.WeakSet[Callable[..., None]] = weakref.WeakSet()  # the constructors that patches put over those


def _end_patch() -> None:
    """Take our constructors off where they lie on top. One that another library wrapped stays below and does nothing."""
    global _patches
    _patches -= 1
    if not _patches:
        for base in _BASES:
            own = vars(base)["__init__"]
            if _is_ours(own):
                base.__init__ = own.__wrapped__  # type: ignore[method-assign]


def _is_ours(init: Any) -> bool:
    """By identity: a wrapper of another library may say that it equals what it wraps."""
    return any(init is own for own in _laid)


def _then_convert(init: Any) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init.__get__(self, type(self))(*args, **kwargs)  # which another library may have made something else than a function
        if _patches:
            set_class(self, converted_class(type(self)))

    _laid.add(wrapper)
    return wrapper
