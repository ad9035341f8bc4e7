"""RNN, LSTM, GRU and their cells: torch.nn's classes with torch.nn's own code, whose arithmetic `functional` runs.

Each class derives from the one it stands for and replaces `forward`. The fast path is one call of the compiled runtime, which
takes it where nothing is out of the ordinary; elsewhere the fallback (fallback.py) runs torch.nn's own code, whose checks take
longer than a small step does. So constructors, checks, error words, initial values, state_dict, pickling, parametrisations and
`isinstance` are torch's, of the torch that is installed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastrnn import dispatch, fallback, features, functional
from fastrnn.kernels.cells import CELLS, Cell
from fastrnn.kernels.layer import Layer

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

_Class = TypeVar("_Class", bound=type)


# Each class of torch.nn and the one that stands in for it.
DROP_INS: dict[type[nn.Module], type[nn.Module]] = {}


def _drop_in(cls: _Class) -> _Class:
    """Give a class derived from torch.nn's what stands in the place of torch.nn's methods.

    A base could not bring it along: torch.nn's class comes first among the bases.
    """
    torch_class: Any = cls.__bases__[0]
    DROP_INS[torch_class] = cls
    own: dict[str, Any] = {"_fastrnn_original": torch_class}
    if issubclass(torch_class, nn.RNNBase):
        own |= {"__init__": _init(torch_class), "extra_repr": _extra_repr, "forward": _forward(torch_class)}
        own |= {"_fastrnn_fallback": fallback.layer_fallback(torch_class), "check_input": _check_input}
        own |= {"_weights_have_changed": _weights_have_changed, "reset_parameters": _reset_parameters}
        own["flatten_parameters"] = _flatten_parameters
    else:
        own |= {"forward": _cell_forward(torch_class), "_fastrnn_fallback": fallback.cell_fallback(torch_class)}
    for name, value in own.items():
        setattr(cls, name, value)
    return cls


def _forward(torch_class: type[nn.RNNBase]) -> Any:
    @functools.wraps(torch_class.forward)
    def forward(self, input, hx=None, **more):  # a third of the time that three defaults take
        if more and fallback.has_keywords(self, **more):
            return fallback.sequence(self, input, hx, **more)
        if torch.compiler.is_dynamo_compiling():
            if not functional.runs_in_graph(self, input, hx):
                return functional.call_outside_of_the_graph(forward, (self, input, hx))
        elif dispatch.native and (kind := self._fastrnn_fast_path):
            result = dispatch.native.forward(self.__dict__, kind, input, hx, self.recompute is True)
            if result is not None:
                return result
        return self._fastrnn_fallback(input, hx)

    vars(forward)["__signature__"] = fallback.SIGNATURE
    return forward


def _init(torch_class: type[nn.RNNBase]) -> Any:
    @functools.wraps(torch_class.__init__)
    def __init__(self, *args, recompute=False, **kwargs):
        if not isinstance(recompute, bool):
            raise TypeError(f"recompute should be a bool, got {recompute!r}")
        settings = {name: kwargs.pop(name) for name in features.DEFAULTS if name in kwargs}
        torch_class.__init__(self, *args, **kwargs)
        if recompute:  # otherwise the attributes are torch.nn's, no more
            self.recompute = True
        if settings:
            features.construct(self, settings)

    return __init__


def _reset_parameters(self: Any) -> None:
    """Draw all parameters anew as torch.nn; what it has not begins as ever."""
    nn.RNNBase.reset_parameters(self)
    features.reset_parameters(self)


def _flatten_parameters(self: Any) -> None:
    """Do as torch.nn, but for heads, whose matrices cuDNN does not know."""
    if self.num_heads == 1:
        nn.RNNBase.flatten_parameters(self)


def _extra_repr(self: Any) -> str:
    return nn.RNNBase.extra_repr(self) + features.described(self) + ", recompute=True" * (self.recompute is True)


def _cell_forward(torch_class: type[nn.RNNCellBase]) -> Any:
    @functools.wraps(torch_class.forward)
    def forward(self, input, hx=None):
        if not torch.compiler.is_dynamo_compiling() and dispatch.native and (kind := self._fastrnn_fast_path):
            result = dispatch.native.cell(self.__dict__, kind, input, hx)
            if result is not None:
                return result
        return self._fastrnn_fallback(input, hx)

    return forward


# What torch.nn's forward reads of a module, of a layer and of a cell.
_ATTRIBUTES = ("mode", "input_size", "hidden_size", "proj_size", "num_layers", "bias", "batch_first", "dropout",
               "bidirectional", "training", "nonlinearity", "_flat_weights", "_flat_weights_names", "_flat_weight_refs",
               "_parameters")  # fmt: skip
_WEIGHTS = "weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh"  # and more letters, in layers


class DropIn(nn.Module):
    """What the six classes share: how they know what they hold.

    Each of them, and each class that `convert` makes (see fastrnn.derived), has `_fastrnn_original`, the class it stands for,
    among its own attributes; what is derived from them has not. Names that our code looks up in a module begin with
    `_fastrnn_`: a class derived from torch.nn's, which comes before ours, may have any other.

    Second among the bases, so that the layout is that of torch.nn's class, which `convert` needs to assign `__class__`.
    """

    # The class of torch.nn, by name, as whose module the fast path takes one of this class; None where it does not.
    _fastrnn_fast_path: str | None
    _fastrnn_compressed = False  # whether `compress` made the matrices bfloat16, beside input and biases in float32

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        kinds = nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell
        names = [kind.__name__ for kind in kinds if issubclass(cls, kind)]
        cls._fastrnn_fast_path = names[0] if names and not _overrides(cls) else None

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        """Apply as torch.nn. What is converted to another dtype is not compressed any more, be it bfloat16."""
        super()._apply(fn, recurse)
        if self._fastrnn_compressed:
            kept = fn(torch.empty(0, dtype=torch.float32)).dtype is torch.float32
            mark_compressed(self, kept and are_compressed(self._parameters.values()))
        return self

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save as torch.nn, with a mark beside the version. The keys are torch.nn's."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._fastrnn_compressed and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["fastrnn_compressed"] = True

    def _load_from_state_dict(self: Any, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        """Load as torch.nn. With assign=True a layer gets the saved tensors, and so may become compressed, or not be it."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        marked = self._fastrnn_compressed or local_metadata.get("fastrnn_compressed", False)
        if marked and local_metadata.get("assign_to_params_buffers", False):
            mark_compressed(self, are_compressed(self._parameters.values()))


def _weights_have_changed(self: Any) -> bool:
    """Answer as torch.nn, without eight calls of nn.Module.__getattr__ where every weight is a plain parameter."""
    own = type(self)._fastrnn_fast_path and fallback.own_weights(self) is not None
    return not own and nn.RNNBase._weights_have_changed(self)


def _check_input(self: nn.RNNBase, input: Tensor, batch_sizes: Tensor | None) -> None:
    """Check as torch.nn, which wants input and weights in one dtype, what `compress` made of two."""
    if self._fastrnn_compressed:
        if dispatch.has_compressed(input, self._flat_weights):
            input = input.to("meta", torch.bfloat16)
        elif are_compressed(self._flat_weights) and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match compressed weights, which take torch.float32. Convert input: "
                "input.to(torch.float32)"
            )
    nn.RNNBase.check_input(self, input, batch_sizes)


def are_compressed(weights: Iterable[Tensor | None]) -> bool:
    """Are the matrices among a layer's weights in bfloat16, and its biases in float32?"""
    present = [weight for weight in weights if weight is not None]
    return all(weight.dtype is (torch.bfloat16 if weight.dim() == 2 else torch.float32) for weight in present)


def mark_compressed(module: nn.Module, compressed: bool) -> None:
    """Note in a layer whether it is compressed. One that is not has torch.nn's attributes and no more."""
    module.__dict__.pop("_fastrnn_compressed", None)
    if compressed:
        module.__dict__["_fastrnn_compressed"] = True


_OURS = {getattr(of, name, None) for of in (nn.RNN, nn.LSTM, nn.GRU) for name in fallback.METHODS} | {
    _check_input,
    _weights_have_changed,
}


def _overrides(cls: type) -> bool:
    """Does a class derived from ours replace a method that torch.nn's forward calls, or an attribute that it reads?

    The fast path calls no method, and reads attributes where torch.nn's constructor puts them: in the module's own dictionary.
    There a property, or another descriptor that can be set, comes first; a weight comes after any attribute of the class.
    """
    if any(getattr(cls, name) is not getattr(nn.Module, name) for name in ("__getattribute__", "__getattr__")):
        return True
    if issubclass(cls, nn.RNNBase) and any(getattr(cls, name, None) not in _OURS for name in fallback.METHODS):
        return True
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        found = dict(vars(base)) | found
    replaced = [found[name] for name in _ATTRIBUTES if name in found]
    return any(hasattr(type(value), "__set__") or hasattr(type(value), "__delete__") for value in replaced) or any(
        name.startswith(_WEIGHTS) for name in found
    )


class _Layers(DropIn):
    """What RNN, LSTM and GRU have beyond torch.nn's."""

    recompute = False
    layer_norm, num_heads, cell_clip = features.Setting(), features.Setting(), features.Setting()
    learn_initial_state, recurrent_dropout, zoneout = features.Setting(), features.Setting(), features.Setting()
    _fastrnn_features: ClassVar[dict[str, Any]] = {}  # those that are not as by default

    @property
    def _fastrnn_cell(self) -> Cell:
        return CELLS[dispatch.BY_MODE[dispatch.mode_of(self)]]  # type: ignore[arg-type]  # a base of RNN, LSTM and GRU

    def _fastrnn_layer(self) -> Layer:
        return dispatch.layer_of_module(self)

    def _fastrnn_weights(self: Any) -> Sequence[Tensor]:
        """Return the weights of all layers as the engines take them."""
        known = self._flat_weights, self._flat_weight_refs
        self._update_flat_weights()
        weights = features.weights_of(self) if self.layer_norm else self._flat_weights
        if torch.compiler.is_compiling() and self._flat_weights is not known[0]:  # as in fallback's `run_compiled`
            self._flat_weights, self._flat_weight_refs = known
        return weights

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
        if not torch.compiler.is_dynamo_compiling() and dispatch.native and (kind := self._fastrnn_fast_path):
            result = dispatch.native.step(self.__dict__, kind, x, state, out)
            if result is not None:
                return result
        return fallback.module_step(self, x, state, out)


@_drop_in
class RNN(nn.RNN, _Layers):
    """Run an RNN over sequences: torch.nn.RNN on fastrnn's engines.

    Arguments, parameters, initial values, checks and error messages are torch.nn's; docs/features.md has more of the arguments
    that torch.nn has not.

    Args:
        recompute: keyword only. It has no effect without layer_norm, as an RNN keeps its output and nothing else.
        layer_norm: keyword only. Normalise both products of a step over the row, see below.
        num_heads: keyword only. The recurrent matrix is block-diagonal, weight_hh_l{k} [G * H, H / num_heads].
        learn_initial_state: keyword only. Have parameters initial_h_l{k} for the state where hx is missing.
        recurrent_dropout: keyword only. Probability that a unit of h does not enter the recurrent product, in training.
        zoneout: keyword only. Probability that a unit of h keeps its value in a step, in training.

    Shape:
        input: [T, B, I], or [B, T, I] with `batch_first`, or [T, I] without a batch, or a PackedSequence.
        h_0: [L * D, B, H]; zeros, or what is learned, where it is missing.
        resets: keyword only. bool [T, B], as the input without its features, or a PackedSequence as the input, or its data.
            Before a step where it is True, in the order of each direction, the state is zeros again, or what is learned.
        lengths: keyword only. int64 [B] on the input's device, from 0 to T: the steps of each row of padded input. Past them
            output and gradients are zero, and the final state is the one at the length.
        all_states: keyword only. True for a third result: the states after every step of each layer and direction, as the final
            ones with an axis for the steps behind the first, [L * D, T, B, ...], as the input has it.
        output: as input, with D * H features.
        h_n: as h_0, the state after the last step.

    With layer_norm (Ba, Kiros and Hinton 2016), where norm(v) = (v - mean(v)) / sqrt(var(v) + 1e-5) over a row v::

        a   = norm(W_ih x) * norm_ih + b_ih + norm(W_hh h) * norm_hh + b_hh
        h   = tanh(a)

    The gains norm_ih_l{k} and norm_hh_l{k} [H] begin as ones.

    For T steps, B sequences, I input size, H hidden size, L layers, D directions. Without a batch, states have no
    B. The call raises what torch.nn.RNN raises, in its words, and ValueError for resets or lengths of another shape, dtype or
    device, and on a CPU for lengths out of range.
    """


@_drop_in
class LSTM(nn.LSTM, _Layers):
    """Run an LSTM over sequences: torch.nn.LSTM on fastrnn's engines.

    Arguments, parameters, initial values, checks and error messages are torch.nn's; docs/features.md has more of the arguments
    that torch.nn has not.

    Args:
        recompute: keyword only. True keeps less for the backward pass, which then takes longer, as in
            `fastrnn.recompute`. The attribute may be changed later.
        layer_norm: keyword only. Normalise both products of a step over the row, and the cell state on its way to the output,
            see below.
        num_heads: keyword only. The recurrent matrix is block-diagonal, weight_hh_l{k} [G * H, H / num_heads].
        cell_clip: keyword only. Keep the cell state within -cell_clip and cell_clip.
        learn_initial_state: keyword only. Have parameters initial_h_l{k} and initial_c_l{k} for the state where hx is missing.
        recurrent_dropout: keyword only. Probability that a unit of h does not enter the recurrent product, in training.
        zoneout: keyword only. Probability that a unit of h keeps its value in a step, in training, or a pair of these, of h and
            of c.

    Shape:
        input: [T, B, I], or [B, T, I] with `batch_first`, or [T, I] without a batch, or a PackedSequence.
        h_0: [L * D, B, R], and c_0: [L * D, B, H], as a pair (h_0, c_0); zeros, or what is learned, where it is missing.
        resets: keyword only. bool [T, B], as the input without its features, or a PackedSequence as the input, or its data.
            Before a step where it is True, in the order of each direction, the state is zeros again, or what is learned.
        lengths: keyword only. int64 [B] on the input's device, from 0 to T: the steps of each row of padded input. Past them
            output and gradients are zero, and the final state is the one at the length.
        all_states: keyword only. True for a third result: the states after every step of each layer and direction, as the final
            ones with an axis for the steps behind the first, [L * D, T, B, ...], as the input has it.
        output: as input, with D * R features.
        h_n and c_n: as h_0 and c_0, the states after the last step.

    With layer_norm (Ba, Kiros and Hinton 2016; Haste's LayerNormLSTM), where norm(v) = (v - mean(v)) / sqrt(var(v) + 1e-5) over
    a row v, of all gates together, and of all heads::

        i, f, g, o = norm(W_ih x) * norm_ih + b_ih + norm(W_hh h) * norm_hh + b_hh
        c   = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h   = sigmoid(o) * tanh(norm(c) * norm_c + norm_c_bias)

    The gains norm_ih_l{k} and norm_hh_l{k} [4 * H] and norm_c_l{k} [H] begin as ones, the shift norm_c_bias_l{k} [H] as zeros.

    For T steps, B sequences, I input size, H hidden size, R proj_size or H, L layers, D directions. Without a batch, states
    have no B. The call raises what torch.nn.LSTM raises, in its words, and ValueError for resets or lengths of another shape,
    dtype or device, and on a CPU for lengths out of range.
    """


@_drop_in
class GRU(nn.GRU, _Layers):
    """Run a GRU over sequences: torch.nn.GRU on fastrnn's engines.

    Arguments, parameters, initial values, checks and error messages are torch.nn's; docs/features.md has more of the arguments
    that torch.nn has not.

    Args:
        recompute: keyword only. True keeps less for the backward pass, which then takes longer, as in
            `fastrnn.recompute`. The attribute may be changed later.
        layer_norm: keyword only. Normalise both products of a step over the row, see below.
        num_heads: keyword only. The recurrent matrix is block-diagonal, weight_hh_l{k} [G * H, H / num_heads].
        learn_initial_state: keyword only. Have parameters initial_h_l{k} for the state where hx is missing.
        recurrent_dropout: keyword only. Probability that a unit of h does not enter the recurrent product, in training.
        zoneout: keyword only. Probability that a unit of h keeps its value in a step, in training.

    Shape:
        input: [T, B, I], or [B, T, I] with `batch_first`, or [T, I] without a batch, or a PackedSequence.
        h_0: [L * D, B, H]; zeros, or what is learned, where it is missing.
        resets: keyword only. bool [T, B], as the input without its features, or a PackedSequence as the input, or its data.
            Before a step where it is True, in the order of each direction, the state is zeros again, or what is learned.
        lengths: keyword only. int64 [B] on the input's device, from 0 to T: the steps of each row of padded input. Past them
            output and gradients are zero, and the final state is the one at the length.
        all_states: keyword only. True for a third result: the states after every step of each layer and direction, as the final
            ones with an axis for the steps behind the first, [L * D, T, B, ...], as the input has it.
        output: as input, with D * H features.
        h_n: as h_0, the state after the last step.

    With layer_norm (Ba, Kiros and Hinton 2016; Haste's LayerNormGRU), where norm(v) = (v - mean(v)) / sqrt(var(v) + 1e-5) over
    a row v, of all gates together, and of all heads::

        x_r, x_z, x_n = norm(W_ih x) * norm_ih + b_ih
        h_r, h_z, h_n = norm(W_hh h) * norm_hh + b_hh
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        h   = (1 - z) * tanh(x_n + r * h_n) + z * h

    The gains norm_ih_l{k} and norm_hh_l{k} [3 * H] begin as ones.

    For T steps, B sequences, I input size, H hidden size, L layers, D directions. Without a batch, states have no
    B. The call raises what torch.nn.GRU raises, in its words, and ValueError for resets or lengths of another shape, dtype or
    device, and on a CPU for lengths out of range.
    """


@_drop_in
class RNNCell(nn.RNNCell, DropIn):
    """Run one step of an RNN: torch.nn.RNNCell on fastrnn's engines.

    Arguments, parameters, initial values, checks and error messages are torch.nn's.

    Shape:
        input: [B, I], or [I] without a batch.
        h: [B, H]; zeros where it is missing.
        output: h, as the state before the step.

    For B sequences, I input size, H hidden size. The call raises what torch.nn.RNNCell raises, in its words.
    """


@_drop_in
class LSTMCell(nn.LSTMCell, DropIn):
    """Run one step of an LSTM: torch.nn.LSTMCell on fastrnn's engines.

    Arguments, parameters, initial values, checks and error messages are torch.nn's.

    Shape:
        input: [B, I], or [I] without a batch.
        (h, c): two tensors [B, H]; zeros where they are missing.
        output: (h, c), as the states before the step.

    For B sequences, I input size, H hidden size. The call raises what torch.nn.LSTMCell raises, in its words.
    """


@_drop_in
class GRUCell(nn.GRUCell, DropIn):
    """Run one step of a GRU: torch.nn.GRUCell on fastrnn's engines.

    Arguments, parameters, initial values, checks and error messages are torch.nn's.

    Shape:
        input: [B, I], or [I] without a batch.
        h: [B, H]; zeros where it is missing.
        output: h, as the state before the step.

    For B sequences, I input size, H hidden size. The call raises what torch.nn.GRUCell raises, in its words.
    """


if dispatch.native:  # attributes that a constructor makes: nn.Module's, and its class's own but for an RNNCell's nonlinearity
    _made = len(nn.Module().__dict__)
    dispatch.native.expect(fallback.METHODS, _made + 13, _WEIGHTS, _made + 3)
