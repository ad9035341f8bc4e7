"""RNN, LSTM, GRU and their cells: torch.nn's classes with torch.nn's own code, whose arithmetic `functional` runs.

Each class derives from the one it stands for and replaces `forward`. The fast path is one call of the compiled runtime, which
takes it where nothing is out of the ordinary. The fallback is torch's own code object with the name `_VF` bound to
`fastrnn.functional`: its checks take longer than a small step does. So constructors, checks, error words, initial values,
state_dict, pickling, parametrisations and `isinstance` are torch's, of the torch that is installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastrnn import dispatch
from fastrnn import functional as _VF
from fastrnn.checkpoint import recompute

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _rebound(function: _Function) -> _Function:
    """`function`, its code unchanged, with globals looked up in this module, where `_VF` is `fastrnn.functional`."""
    assert isinstance(function, FunctionType)
    for name in function.__code__.co_names:
        if name in function.__globals__:
            globals().setdefault(name, function.__globals__[name])
    own = FunctionType(function.__code__, globals(), function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__, own.__annotations__ = function.__kwdefaults__, function.__annotations__
    own.__qualname__ = function.__qualname__
    return own  # type: ignore[return-value]


def _forward(torch_class: type[nn.RNNBase]) -> Any:
    @functools.wraps(torch_class.forward)
    def forward(self, input, hx=None):
        if torch.compiler.is_dynamo_compiling():
            if not _VF.runs_in_graph(self, input, hx):
                return _VF.call_outside_of_the_graph(forward, (self, input, hx))
        elif dispatch.native and not self._has_own_checks:
            result = dispatch.native.forward(self.__dict__, input, hx, self.recompute is True)
            if result is not None:
                return result
        return self._fallback(input, hx)

    return forward


def _fallback(torch_class: type[nn.RNNBase]) -> Any:
    """Make the method that runs a call through torch.nn's own code when the fast path declined it."""
    by_torch = _rebound(torch_class.forward)

    def run(self, input, hx):
        if torch.compiler.is_dynamo_compiling():
            return run_compiled(self, input, hx)
        result = None if self._has_own_checks else _VF.module_forward(self, input, hx)
        return by_torch(self, input, hx) if result is None else result

    def run_compiled(self, input, hx):
        """torch.nn's code lists the weights anew where others stand in their place (torch.func.functional_call).

        A graph would return that list, of tensors which belong to a transform and are no results.
        """
        weights, references = self._flat_weights, self._flat_weight_refs
        result = by_torch(self, input, hx)
        if self._flat_weights is not weights:
            self._flat_weights, self._flat_weight_refs = weights, references
        return result

    def fallback(self, input, hx):
        if self.recompute is True:  # a derived class may have a method of this name
            with recompute():
                return run(self, input, hx)
        return run(self, input, hx)

    return fallback


def _init(torch_class: type[nn.RNNBase]) -> Any:
    @functools.wraps(torch_class.__init__)
    def __init__(self, *args, recompute=False, **kwargs):
        if not isinstance(recompute, bool):
            raise TypeError(f"recompute should be a bool, got {recompute!r}")
        torch_class.__init__(self, *args, **kwargs)
        if recompute:  # otherwise the attributes are torch.nn's, no more
            self.recompute = True

    return __init__


def _extra_repr(self: Any) -> str:
    return nn.RNNBase.extra_repr(self) + ", recompute=True" * (self.recompute is True)


def _cell_forward(torch_class: type[nn.RNNCellBase]) -> Any:
    @functools.wraps(torch_class.forward)
    def forward(self, input, hx=None):
        if not torch.compiler.is_dynamo_compiling() and dispatch.native:
            result = dispatch.native.cell(self.__dict__, input, hx, dispatch.mode_of_cell(self))
            if result is not None:
                return result
        return self._fallback(input, hx)

    return forward


class DropIn:
    """Mark the six classes, and with them all that are derived from them.

    Each of the six, and each class that `convert` makes (see fastrnn.derived), has `_original_class`, the one it stands for,
    among its own attributes; what is derived from them has not.

    Second among the bases, so that the layout is that of torch.nn's class, which `convert` needs to assign `__class__`.
    """


def _weights_have_changed(self: nn.RNNBase) -> bool:
    """Answer as torch.nn, without eight calls of nn.Module.__getattr__ where every weight is a plain parameter."""
    return _VF.own_weights(self) is None and nn.RNNBase._weights_have_changed(self)


def _check_input(self: nn.RNNBase, input: Tensor, batch_sizes: Tensor | None) -> None:
    """Check as torch.nn, which wants input and weights in one dtype, what `compress` made of two."""
    if dispatch.compressed(input, self._flat_weights):
        input = input.to("meta", torch.bfloat16)
    elif self.bias and not torch._C._is_any_autocast_enabled():
        # torch's annotation lets weights be None, as they are while a module is built
        matrix, bias = self._flat_weights[0].dtype, self._flat_weights[2].dtype  # type: ignore[union-attr]
        if matrix is torch.bfloat16 and bias is torch.float32 and input.dtype is not bias:
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match compressed weights, which take {bias}. Convert input: "
                f"input.to({bias})"
            )
    nn.RNNBase.check_input(self, input, batch_sizes)


# The methods that torch.nn's forward calls to check its input, and the functions that they are unless a subclass has its own.
_CHECKS = ("check_forward_args", "check_input", "check_hidden_size", "get_expected_hidden_size", "get_expected_cell_size",
           "permute_hidden")  # fmt: skip
_OURS = {getattr(of, name, None) for of in (nn.RNN, nn.LSTM, nn.GRU) for name in _CHECKS} | {_check_input}


class _Layers(DropIn):
    """What RNN, LSTM and GRU have beyond torch.nn's."""

    recompute = False
    _has_own_checks = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Find out whether a subclass has checks of its own. The fast path would not run them."""
        super().__init_subclass__(**kwargs)
        cls._has_own_checks = any(getattr(cls, name, None) not in _OURS for name in _CHECKS)

    def step(self, x: Tensor, state: Any = None, *, out: tuple[Tensor, Any] | None = None) -> tuple[Tensor, Any]:
        """Run one step of a stream, without gradients.

        The result differs from that of a longer sequence by rounding, because a step reads the weights in another order. Hooks
        of the module do not run.

        Args:
            x: [B, I], the step's input.
            state: as `forward` takes and returns it: h [L, B, R], for LSTM the pair (h, c) with c [L, B, H]. None means zeros.
            out: (y, state) to write into instead of new tensors, for a loop that allocates nothing. Its state may be `state`.

        Returns:
            y [B, R], and the state after the step.

        Raises:
            ValueError: the module is bidirectional, x has not two dimensions, or `out` is not made like the result, in the
                shapes and dtypes of its tensors. What `forward` refuses is refused in the same words.
        """
        if not torch.compiler.is_dynamo_compiling() and dispatch.native and not self._has_own_checks:
            result = dispatch.native.step(self.__dict__, x, state, out)
            if result is not None:
                return result
        return _VF.module_step(self, x, state, out)


class RNN(nn.RNN, _Layers):
    """Run an RNN over sequences: torch.nn.RNN on fastrnn's engines.

    Arguments, parameters, initial values, checks and error messages are torch.nn's.

    Args:
        recompute: keyword only. It has no effect here, as an RNN keeps its output and nothing else.

    Shape:
        input: [T, B, I], or [B, T, I] with `batch_first`, or [T, I] without a batch, or a PackedSequence.
        h_0: [L * D, B, H]; zeros where it is missing.
        output: as input, with D * H features.
        h_n: as h_0, the state after the last step.

    For T steps, B sequences, I input size, H hidden size, L layers, D directions. Without a batch, states have no
    B. The call raises what torch.nn.RNN raises, in its words.
    """

    __init__ = _init(nn.RNN)
    extra_repr = _extra_repr
    forward = _forward(nn.RNN)
    _fallback = _fallback(nn.RNN)
    _weights_have_changed = _weights_have_changed
    check_input = _check_input


class LSTM(nn.LSTM, _Layers):
    """Run an LSTM over sequences: torch.nn.LSTM on fastrnn's engines.

    Arguments, parameters, initial values, checks and error messages are torch.nn's.

    Args:
        recompute: keyword only. True keeps less for the backward pass, which then takes longer, as in
            `fastrnn.recompute`. The attribute may be changed later.

    Shape:
        input: [T, B, I], or [B, T, I] with `batch_first`, or [T, I] without a batch, or a PackedSequence.
        h_0: [L * D, B, R], and c_0: [L * D, B, H], as a pair (h_0, c_0); zeros where it is missing.
        output: as input, with D * R features.
        h_n and c_n: as h_0 and c_0, the states after the last step.

    For T steps, B sequences, I input size, H hidden size, R proj_size or H, L layers, D directions. Without a batch, states
    have no B. The call raises what torch.nn.LSTM raises, in its words.
    """

    __init__ = _init(nn.LSTM)
    extra_repr = _extra_repr
    forward = _forward(nn.LSTM)
    _fallback = _fallback(nn.LSTM)
    _weights_have_changed = _weights_have_changed
    check_input = _check_input


class GRU(nn.GRU, _Layers):
    """Run a GRU over sequences: torch.nn.GRU on fastrnn's engines.

    Arguments, parameters, initial values, checks and error messages are torch.nn's.

    Args:
        recompute: keyword only. True keeps less for the backward pass, which then takes longer, as in
            `fastrnn.recompute`. The attribute may be changed later.

    Shape:
        input: [T, B, I], or [B, T, I] with `batch_first`, or [T, I] without a batch, or a PackedSequence.
        h_0: [L * D, B, H]; zeros where it is missing.
        output: as input, with D * H features.
        h_n: as h_0, the state after the last step.

    For T steps, B sequences, I input size, H hidden size, L layers, D directions. Without a batch, states have no
    B. The call raises what torch.nn.GRU raises, in its words.
    """

    __init__ = _init(nn.GRU)
    extra_repr = _extra_repr
    forward = _forward(nn.GRU)
    _fallback = _fallback(nn.GRU)
    _weights_have_changed = _weights_have_changed
    check_input = _check_input


class RNNCell(nn.RNNCell, DropIn):
    """Run one step of an RNN: torch.nn.RNNCell on fastrnn's engines.

    Arguments, parameters, initial values, checks and error messages are torch.nn's.

    Shape:
        input: [B, I], or [I] without a batch.
        h: [B, H]; zeros where it is missing.
        output: h, as the state before the step.

    For B sequences, I input size, H hidden size. The call raises what torch.nn.RNNCell raises, in its words.
    """

    forward = _cell_forward(nn.RNNCell)
    _fallback = _rebound(nn.RNNCell.forward)


class LSTMCell(nn.LSTMCell, DropIn):
    """Run one step of an LSTM: torch.nn.LSTMCell on fastrnn's engines.

    Arguments, parameters, initial values, checks and error messages are torch.nn's.

    Shape:
        input: [B, I], or [I] without a batch.
        (h, c): two tensors [B, H]; zeros where they are missing.
        output: (h, c), as the states before the step.

    For B sequences, I input size, H hidden size. The call raises what torch.nn.LSTMCell raises, in its words.
    """

    forward = _cell_forward(nn.LSTMCell)
    _fallback = _rebound(nn.LSTMCell.forward)


class GRUCell(nn.GRUCell, DropIn):
    """Run one step of a GRU: torch.nn.GRUCell on fastrnn's engines.

    Arguments, parameters, initial values, checks and error messages are torch.nn's.

    Shape:
        input: [B, I], or [I] without a batch.
        h: [B, H]; zeros where it is missing.
        output: h, as the state before the step.

    For B sequences, I input size, H hidden size. The call raises what torch.nn.GRUCell raises, in its words.
    """

    forward = _cell_forward(nn.GRUCell)
    _fallback = _rebound(nn.GRUCell.forward)


# Each class of torch.nn and the one that stands in for it.
DROP_INS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: RNN,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNNCell: RNNCell,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
}
for _torch_class, _drop_in in DROP_INS.items():
    _drop_in._original_class = _torch_class  # type: ignore[attr-defined]  # of DropIn, which not all nn.Modules are
