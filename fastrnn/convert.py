"""What is done to whole models: bring fastrnn to code that says `torch.nn`, make weights small."""

from __future__ import annotations

import copy
import functools
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from fastrnn.modules import DROP_INS

M = TypeVar("M", bound=nn.Module)


def convert(model: M, inplace: bool = True) -> M:
    """Turn every torch.nn RNN, LSTM, GRU and cell in `model`, or `model` itself, into fastrnn's.

    Modules and Parameters stay the very objects they were, so optimisers, hooks, attributes and references hold.
    Subclasses of torch.nn's classes, parametrised modules among them, are left as they are.

    Args:
        model: any module.
        inplace: False leaves `model` alone and converts a deep copy of it.

    Returns:
        `model`, or the converted copy.
    """
    if not inplace:
        model = copy.deepcopy(model)
    for module in model.modules():
        _stand_in(module)
    return model


def compress(model: M) -> M:
    """Hold the weight matrices of every fastrnn layer and cell in `model`, or of `model` itself, in bfloat16.

    This is for inference on a CPU. The matrices take half the memory, and a step of few sequences reads half as much. Input,
    states, biases, sums and outputs stay float32. Each weight is rounded once, by at most 2**-8 of its value, and nothing else
    changes: the outputs have the bits of a float32 layer with the rounded weights (but for rounding in float32 in a single
    step, and with more than four sequences on a processor with AMX).

    Parameters stay the objects they were; their gradients are dropped. `model.float()` makes float32 layers again, with the
    rounded weights. Layers of another dtype than float32 and computed weights (parametrizations) are left as they are. Where
    the output size is odd, and on engines other than the CPU's, each call makes a float32 copy of the matrices.

    Args:
        model: any module.

    Returns:
        `model`.
    """
    for module in model.modules():
        if isinstance(module, tuple(DROP_INS.values())):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dim() == 2 and parameter.dtype is torch.float32:
                    parameter.grad = None
                    parameter.data = parameter.data.bfloat16()
    return model


def patch() -> ExitStack:
    """Make `torch.nn.LSTM(...)` and its five siblings build fastrnn's modules, from this call on.

        with fastrnn.patch():
            model = other_peoples_model()

    or `patched = fastrnn.patch()` and, later, `patched.close()`. torch.nn's classes themselves stay: names imported
    earlier, isinstance and pickles work as before, subclasses are not touched, and what was built keeps its class.

    Returns:
        A context manager that is already active; leaving it, or its `close()`, ends the patch: of several, the last one ended.
    """
    global _patches
    if not _patches:
        for torch_class in DROP_INS:
            _unpatch.callback(setattr, torch_class, "__init__", torch_class.__init__)
            torch_class.__init__ = _then_stand_in(torch_class.__init__)  # type: ignore[method-assign]  # what a patch is
    _patches += 1
    patched = ExitStack()
    patched.callback(_end_patch)
    return patched


_patches, _unpatch = 0, ExitStack()  # those that have not ended; what undoes them


def _end_patch() -> None:
    global _patches
    _patches -= 1
    if not _patches:
        _unpatch.close()


def _stand_in(module: nn.Module) -> None:
    """Change the class of a torch.nn recurrent module, and no other, to fastrnn's; both have the same attributes."""
    module.__class__ = DROP_INS.get(type(module), type(module))


def _then_stand_in(init: Any) -> Any:
    @functools.wraps(init)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _stand_in(self)

    return wrapper
