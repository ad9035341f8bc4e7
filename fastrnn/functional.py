"""Recurrent layers as functions.

`layer` runs one layer in full: one or two directions, dense or packed, either layout, projection, every cell.

`lstm`, `gru`, `rnn_tanh` and `rnn_relu` run layers on top of each other, and their `_cell` forms run one step. They take the
arguments of their namesakes in torch (torch.lstm and so on) and return the same. A call that no engine takes, or that torch
would refuse, runs torch's function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import _VF, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import autograd, dispatch, ops
from fastrnn.features import Noise
from fastrnn.kernels import cpu, reference
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.layer import Inputs, Layer, Steps, Weights, misfit, misfit_of_weights


class Stack(NamedTuple):
    """Layers on top of each other.

    layer:      what each of them is.
    weights:    of all of them, the lowest first, as torch.nn lists them.
    layers:     so many.
    noise:      what they draw.
    compressed: `fastrnn.compress` made them: matrices may be in bfloat16 beside an input in float32.
    """

    layer: Layer
    weights: Sequence[Tensor]
    layers: int = 1
    noise: Noise = Noise()
    compressed: bool = False

    def wide(self, x: Tensor) -> Stack:
        """The same with compressed matrices in x's dtype."""
        return self._replace(weights=_wide(x, self.weights)) if self.compressed else self


__all__ = [
    "gru",
    "gru_cell",
    "layer",
    "lstm",
    "lstm_cell",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
]


def layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None = None,
    *,
    cell: str,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor] = (),
    b_hh: Sequence[Tensor] = (),
    w_hr: Sequence[Tensor] = (),
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    all_states: bool = False,
) -> tuple:
    """Run one recurrent layer, differentiable to any order. Where the fused engines decline, the reference runs.

    Letters: T steps, B sequences, N steps of all sequences together, I input size, H hidden size, G gates (1, lstm 4, gru 3), R
    the projected size or H, D directions, 1 or 2: the length of every weight sequence. Direction 1 runs opposite to direction
    0.

    Args:
        x: [T, B, I], or [B, T, I] with batch_first, or the data [N, I] of a PackedSequence.
        h0: [D, B, R]
        c0: [D, B, H], for "lstm" and only there.
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        w_ih: [G * H, I] for each direction, gates in torch.nn's order.
        w_hh: [G * H, R] for each direction.
        b_ih: [G * H] for each direction, or nothing.
        b_hh: as b_ih; both or neither.
        w_hr: [R, H] for each direction, the projection, or nothing.
        batch_sizes: of a PackedSequence, int64 [T] on the CPU.
        resets: bool [T, B], or [B, T] with batch_first, or packed [N]: before a step where it is True, each direction, in its
            own order, goes back to h0 and c0. No gradient crosses it.
        lengths: steps of each row, int64 [B] on the device of x, each from 0 to T; not with batch_sizes. Past them y and the
            gradient of x are zero, and the final states are those at the length. Backwards a row begins at its last step.
        all_states: return the states after every step too, differentiable.
        reverse: direction 0 runs from the last step to the first.
        batch_first: x is [B, T, I], and so is y.

    Returns:
        y like x with D * R features, h_n [D, B, R], and c_n [D, B, H] for "lstm", None otherwise. With all_states further the
        pair of h and c after every step, each [D, T, B, ...], or [D, B, T, ...] with batch_first, or packed [D, N, ...].

    Raises:
        ValueError: a shape or a combination above does not hold; the message names the argument.
    """
    kinds = {name: list(given) for name, given in zip(Weights._fields, (w_ih, w_hh, b_ih, b_hh, w_hr), strict=True)}
    directions = len(kinds["w_ih"])
    if cell not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")
    if directions not in (1, 2):
        raise ValueError(f"w_ih: expected one tensor for each of 1 or 2 directions, got {directions}")
    for name, given in kinds.items():
        if len(given) != directions and (given or name == "w_hh"):
            raise ValueError(f"{name}: expected {directions} tensors, got {len(given)}")
    if len(kinds["b_ih"]) != len(kinds["b_hh"]):
        raise ValueError("b_ih, b_hh: expected both or neither")
    if batch_sizes is not None and batch_first:
        raise ValueError("batch_first: packed input has no such layout")
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one step, row and feature, got {tuple(x.shape)}")
    weights = [given[d] for d in range(directions) for given in kinds.values() if given]
    own = Layer(cell, directions, len(kinds["b_ih"]) > 0, len(kinds["w_hr"]) > 0, reverse, batch_first)
    inputs = Inputs(x, batch_sizes, h0, c0, resets, lengths)
    if reason := misfit(own, inputs, weights):
        raise ValueError(reason)
    states = (h0,) if c0 is None else (h0, c0)
    engine = dispatch.choose(x, batch_sizes, states, weights, compressed=True)  # if they are
    inputs = inputs._replace(x=ops.unit_stride(x))
    return (_run_states if all_states else _run)(engine, inputs, weights, own)


def lstm(*args):
    """Run LSTM layers on top of each other, as torch.lstm does.

    The arguments are, for dense and for packed input::

        input, (h0, c0), params, has_biases, num_layers, dropout, train, bidirectional, batch_first
        data, batch_sizes, (h0, c0), params, has_biases, num_layers, dropout, train, bidirectional

    input is [T, B, I], or [B, T, I] with batch_first; data is [N, I]. h0 is [L * D, B, R] and c0 is [L * D, B, H], for L layers
    and D directions. params lists the w_ih, w_hh, b_ih, b_hh and w_hr of each layer and direction, those that are there, in
    this order.

    Returns:
        y [T, B, D * R] or in the layout of the input, h_n as h0, and c_n as c0.

    Raises:
        RuntimeError: what torch.lstm refuses, in its words.
    """
    return _stack("lstm", args)


def gru(*args):
    """Run GRU layers on top of each other, as torch.gru does.

    Arguments, results and errors are those of `lstm`, with h0 [L * D, B, H] in place of the pair, and without c_n.
    """
    return _stack("gru", args)


def rnn_tanh(*args):
    """Run RNN layers with tanh on top of each other, as torch.rnn_tanh does.

    Arguments, results and errors are those of `lstm`, with h0 [L * D, B, H] in place of the pair, and without c_n.
    """
    return _stack("rnn_tanh", args)


def rnn_relu(*args):
    """Run RNN layers with relu on top of each other, as torch.rnn_relu does.

    Arguments, results and errors are those of `lstm`, with h0 [L * D, B, H] in place of the pair, and without c_n.
    """
    return _stack("rnn_relu", args)


def lstm_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Run one step of an LSTM, as torch.lstm_cell does.

    input is [B, I], and hx is (h, c), each [B, H]. The result is (h, c) after the step. Errors are torch's.
    """
    return _cell("lstm", input, hx, w_ih, w_hh, b_ih, b_hh)


def gru_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Run one step of a GRU, as torch.gru_cell does.

    input is [B, I], and hx is h [B, H]. The result is h after the step. Errors are torch's.
    """
    return _cell("gru", input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_tanh_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Run one step of an RNN with tanh, as torch.rnn_tanh_cell does.

    input is [B, I], and hx is h [B, H]. The result is h after the step. Errors are torch's.
    """
    return _cell("rnn_tanh", input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_relu_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Run one step of an RNN with relu, as torch.rnn_relu_cell does.

    input is [B, I], and hx is h [B, H]. The result is h after the step. Errors are torch's.
    """
    return _cell("rnn_relu", input, hx, w_ih, w_hh, b_ih, b_hh)


def _names_compressed() -> SimpleNamespace:
    """The functions above, for layers that `fastrnn.compress` made: their matrices are in bfloat16.

    Everywhere else such matrices beside input in float32 are what torch takes them for, a mistake.
    """
    layers = {cell: lambda *args, cell=cell: _stack(cell, args, compressed=True) for cell in CELLS}
    cells = {f"{cell}_cell": lambda *args, cell=cell: _cell(cell, *args, compressed=True) for cell in CELLS}
    return SimpleNamespace(**layers, **cells)


for_compressed = _names_compressed()


def _stack(cell: str, args: tuple, compressed: bool = False):
    """Run layers on top of each other; compressed: they are those of a layer that `fastrnn.compress` made."""
    fallback = getattr(_VF, cell)
    if len(args) != 9:
        return fallback(*args)
    if not isinstance(args[3], (list, tuple)):
        x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first = args
        batch_sizes = None
    else:
        x, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional = args
        batch_first = False
    counted = isinstance(num_layers, int) and not isinstance(num_layers, bool) and num_layers > 0
    typed = counted and isinstance(params, (list, tuple)) and len(params) > 1 and isinstance(dropout, (int, float))
    if not typed or not all(isinstance(flag, bool) for flag in (has_biases, train, bidirectional, batch_first)):
        return fallback(*args)
    directions, inputs = 2 if bidirectional else 1, inputs_of(cell, x, batch_sizes, hx)
    # num_layers may be a symbol, and torch 2.10's compiler then takes the comparison for one
    projected = True if len(params) // (num_layers * directions) == (5 if has_biases else 3) else False
    layer = Layer(cell, directions, has_biases, projected, False, batch_first)
    done = run_layers(inputs, Stack(layer, params, num_layers, Noise(dropout if train else 0), compressed))
    if done is not None:
        return done[:2] if done[2] is None else done
    if compressed:
        at = 2 if batch_sizes is None else 3
        args = *args[:at], _wide(x, params), *args[at + 1 :]
    if cell == "lstm" and not torch.compiler.is_compiling():
        _check_lstm(layer, inputs, args[2 if batch_sizes is None else 3], num_layers)
    if torch.compiler.is_dynamo_compiling() and not torch._dynamo.config.allow_rnn:
        return call_outside_of_the_graph(fallback, args)  # such as wrong shapes, for which torch has words
    return fallback(*args)


def run_layers(inputs: Inputs, stack: Stack) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Run layers, differentiable: y, h_n and c_n. None where no engine takes the call."""
    x, batch_sizes, h0, c0 = inputs[:4]
    layer, weights, count, noise, compressed = stack
    engine = dispatch.choose(x, batch_sizes, (h0,) if c0 is None else (h0, c0), weights, compressed)
    if engine == "torch" or misfit(layer, inputs, weights, count) or not 0 <= noise.dropout <= 1:
        return None  # torch has words for what is wrong
    if engine == "triton" and dispatch.leaves_to_cudnn(layer, x, batch_sizes, weights[1], count):
        return None
    return run_stack(engine, inputs, stack)[:3]


def run_marked(inputs: Inputs, stack: Stack, all_states: bool = False) -> tuple:
    """`run_layers` of what torch.nn has not, such as resets, any cell, or noise: where no engine takes it the reference runs.

    all_states, results: as of `run_stack`.

    Raises:
        ValueError: what does not fit, by name.
        RuntimeError: there is no step, in torch's words.
    """
    layer, weights, count, _, compressed = stack
    if inputs.batch_sizes is None and inputs.x.shape[layer.batch_first] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if reason := misfit(layer, inputs, weights, count):
        raise ValueError(reason)
    states = inputs.h0, *(() if inputs.c0 is None else (inputs.c0,))
    engine = dispatch.choose_own(layer.cell, inputs.x, inputs.batch_sizes, states, weights, compressed)
    if inputs.mask is not None and inputs.mask.dim() == 4:  # of each gate
        engine = "reference"
    if engine == "cpu":
        cpu.prepare_cell(layer.cell, inputs.x.dtype, torch.is_grad_enabled())
    return run_stack(engine, inputs, stack, all_states)


def run_stack(
    engine: str, inputs: Inputs, stack: Stack, all_states: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """Run layers on an engine that takes them.

    Returns:
        y, h_n, c_n; with all_states the pair of h and c after every step, as `layer` returns it, of all layers, else ().
    """
    inputs = inputs._replace(x=ops.unit_stride(inputs.x))
    layer, weights, layers, noise, _ = stack if engine in dispatch.FUSED else stack.wide(inputs.x)
    hidden = weights[1].shape[0] // CELLS[layer.cell].gates

    def run(given: Inputs, weights: Sequence[Tensor], own: Layer):
        half_on_cpu = engine == "cpu" and given.x.dtype in dispatch.HALF  # which that engine computes in float32
        given = noise.drawn(given, own, hidden, torch.float32 if half_on_cpu else given.x.dtype)
        y, h, c, states = _run_states(engine, given, weights, own) if all_states else (*_run(engine, given, weights, own), ())
        if own.batch_first != layer.batch_first:
            states = tuple(None if each is None else each.transpose(1, 2) for each in states)
        return y, h, c, states

    if layers == 1:
        return run(inputs, weights, layer)

    # torch draws dropout in [T, B, features] whatever the layout; the engine reads and writes either without a copy
    time_major, D, each = noise.dropout > 0 and layer.batch_first, layer.directions, len(weights) // layers
    by_time = layer._replace(batch_first=False)
    y, _, h0, c0, resets, *_ = inputs
    found, index = [], 0
    parts: tuple[int, ...] = (1,) * layers
    plain = engine == "triton" and noise.dropout == 0 and not all_states and inputs.mask is None
    if plain and not noise.within():
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (y, h0, *weights))
        parts = dispatch.layers_at_once(layer, y, inputs.batch_sizes, weights[1], layers, training)
    for count in parts:
        own, last = slice(index * D, (index + count) * D), index + count == layers
        if time_major and (index == 0 or last):
            y, resets = y.transpose(0, 1), None if resets is None else resets.transpose(0, 1)
        given = inputs._replace(x=y, h0=h0[own], c0=None if c0 is None else c0[own], resets=resets)
        own_weights, index = weights[index * each : (index + count) * each], index + count
        y, *states, after_steps = run(given, own_weights, by_time if time_major and not last else layer)
        found.append((*states, *after_steps))
        if noise.dropout > 0 and not last:
            y = F.dropout(y, noise.dropout, True)
    joined: list[Any] = [None if kind[0] is None else torch.cat(kind) for kind in zip(*found, strict=True)]
    h_n, c_n, *after = joined
    return y, h_n, c_n, tuple(after)


def inputs_of(cell: str, x: Any, batch_sizes: Any, hx: Any) -> Inputs:
    """What a caller gave. No state at all in the place of what is no pair: no engine takes that."""
    if cell != "lstm":
        return Inputs(x, batch_sizes, hx, None)
    return Inputs(x, batch_sizes, *(hx if isinstance(hx, (tuple, list)) and len(hx) == 2 else (None, None)))


def _wide(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The weights of a compressed layer in x's dtype."""
    return [weight.float() for weight in weights] if dispatch.has_compressed(x, weights) else weights


def _run(engine: str, inputs: Inputs, weights: Sequence[Tensor], layer: Layer, of_cell: bool = False):
    """`autograd.run_layer`, or the same through plain operations."""
    if engine in dispatch.FUSED:
        return autograd.run_layer(inputs, weights, layer, of_cell)
    y, h_n, c_n, _ = reference.layer_forward(inputs, weights, layer)
    return y, h_n, None if inputs.c0 is None else c_n


def _run_states(engine: str, inputs: Inputs, weights: Sequence[Tensor], layer: Layer) -> tuple:
    """`_run`, and the pair of h and c after every step, see `layer`."""
    if engine in dispatch.FUSED:
        y, h_n, c_n, carried = autograd.run_states(inputs, weights, layer)
    else:
        y, h_n, c_n, saved = reference.layer_forward(inputs, weights, layer, True)
        c_n, carried = (None, None) if inputs.c0 is None else (c_n, reference.carried_states(inputs, layer, saved))
    h = y.unflatten(-1, (layer.directions, -1)).movedim(-2, 0)
    return y, h_n, c_n, (h, None if carried is None else Steps(layer, inputs).of_each(carried))


def marked(input: Tensor | PackedSequence, batch_dim: int, resets: Any, lengths: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return `resets` and `lengths` of a module's call as `Inputs` has them; without a batch they are those of one row.

    Raises:
        TypeError: one is no tensor.
        ValueError: resets are packed otherwise than the input, or have not its dimensions.
    """
    if isinstance(resets, PackedSequence):
        if not isinstance(input, PackedSequence):
            raise ValueError("resets: expected a tensor, as the input is one, got a PackedSequence")
        pairs = zip(resets[1:3], input[1:3], strict=True)  # batch_sizes and sorted_indices
        if not torch.compiler.is_compiling() and not all(_same(one, other) for one, other in pairs):
            raise ValueError("resets: expected the lengths and the order of the packed input, got others")
        resets = resets.data
    for name, given in (("resets", resets), ("lengths", lengths)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(given).__name__}")
    if isinstance(input, PackedSequence) or input.dim() != 2:
        return resets, lengths
    for name, given, dims in (("resets", resets, 1), ("lengths", lengths, 0)):
        if given is not None and given.dim() != dims:
            axes = "bool [T]" if dims else "int64 []"
            raise ValueError(f"{name}: expected {axes} without a batch, got {given.dtype} {tuple(given.shape)}")
    return None if resets is None else resets.unsqueeze(batch_dim), None if lengths is None else lengths.unsqueeze(0)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Are two packed batches alike in this? Tensors on a GPU are not compared: the answer would have to be waited for."""
    if one is None or other is None:
        return one is other
    return one is other or not (one.is_cpu and other.is_cpu) or torch.equal(one, other)


def check_dimensions(names: Sequence[str], states: Sequence[Tensor], dims: int) -> None:
    """Raise torch.nn's error where one of the states, which have these names, has not as many dimensions as the input."""
    if all(state.dim() == dims for state in states):
        return
    kind, given = "batched" if dims == 3 else "unbatched", ", ".join(f"{state.dim()}-D" for state in states)
    *others, last = (f"{name}x" for name in names) if len(names) > 1 else ("hx",)
    which = f"{', '.join(others)} and {last}" if others else last
    got = f"({given}) tensors" if others else f"{given} tensor"
    raise RuntimeError(f"For {kind} {dims}-D input, {which} should also be {dims}-D but got {got}")


def runs_in_graph(module: Any, input: Any, hx: Any) -> bool:
    """Does an engine take `module(input, hx)`, which Dynamo traces, or did the user let torch's own layers be traced?"""
    if torch._dynamo.config.allow_rnn:
        return True
    x, batch_sizes = (input[0], input[1]) if isinstance(input, PackedSequence) else (input, None)
    states = () if hx is None else hx if isinstance(hx, (tuple, list)) else (hx,)
    return dispatch.choose(x, batch_sizes, states, module._flat_weights) != "torch"


def call_outside_of_the_graph(function: Callable, args: tuple):
    """Call from compiled code what ends in a function of torch's own such as torch.lstm, as torch.nn's layers do.

    In the graph torch would decompose it into operations of each step; that is experimental (torch._dynamo.config.allow_rnn),
    fails for some calls and kills the process for others. `tracers` makes Dynamo leave the graph here, once Dynamo is there.
    """
    return function(*args)


def _check_lstm(layer: Layer, inputs: Inputs, params: Sequence[Tensor], num_layers: int) -> None:
    """Raise where an LSTM's input, states or weights do not fit each other and torch would hand them to oneDNN as they are.

    oneDNN takes sizes from some tensors and reads past the ends of others. torch's other path fails in an operation, with words
    of its own. torch.nn checks input and states against a module's attributes, which packed input and functions have not: here
    the same checks are against the weights.
    """
    x, batch_sizes = inputs[:2]
    states: tuple[Any, ...] = inputs[2:4]
    if not all(isinstance(tensor, Tensor) for tensor in (x, *states, *params)):
        return
    if 0 in (states[0].dim(), states[1].dim()) or states[0].shape[-1] != states[1].shape[-1]:  # torch sees a projection
        return
    dtype = params[0].dtype
    if not x.is_cpu or dtype is torch.float64 or any(tensor.dtype is not dtype for tensor in (x, *states)):
        return
    input_size = params[0].shape[-1] if params[0].dim() else 0
    if params[0].dim() == params[1].dim() == 2:
        checks = _LSTMChecks(
            _flat_weights=params,
            input_size=input_size,
            hidden_size=params[1].shape[1],
            proj_size=0,
            num_layers=num_layers,
            bidirectional=layer.directions == 2,
            batch_first=layer.batch_first,
        )
        checks.check_forward_args(x, states, batch_sizes)
    layer = layer._replace(projected=False)  # which oneDNN has not, and torch leaves further tensors alone
    count = len(layer.kinds()) * layer.directions * num_layers
    if reason := misfit_of_weights(layer, params[:count], input_size, num_layers):
        raise RuntimeError(f"LSTM: {reason}")


class _LSTMChecks(SimpleNamespace):
    """torch.nn's own checks of LSTM's input, on these attributes."""

    check_input, check_hidden_size = nn.LSTM.check_input, nn.LSTM.check_hidden_size
    get_expected_hidden_size, get_expected_cell_size = nn.LSTM.get_expected_hidden_size, nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args


def _cell(cell: str, x, hx, w_ih, w_hh, b_ih=None, b_hh=None, *, compressed: bool = False):
    """Run one step of one layer, with `compressed` as in `_stack`."""
    has_biases, (_, _, h, c, *_) = b_ih is not None or b_hh is not None, inputs_of(cell, x, None, hx)
    params = [w_ih, w_hh, b_ih, b_hh] if has_biases else [w_ih, w_hh]
    layer = Layer(cell, bias=has_biases)
    engine = dispatch.choose(x, None, (h,) if c is None else (h, c), params, compressed)
    if engine == "triton" and dispatch.may_leave():
        engine = "torch"  # one step costs less than a launch from Python
    inputs = None
    if engine != "torch":
        x_step = ops.unit_stride(x.unsqueeze(0))
        inputs = Inputs(x_step, None, h.unsqueeze(0), None if c is None else c.unsqueeze(0))
    if compressed and (inputs is None or engine not in dispatch.FUSED):
        w_ih, w_hh = params[:2] = _wide(x, params)[:2]
    if inputs is None or misfit(layer, inputs, params):
        if cell == "lstm" and _unchecked_by_torch_cell(x, h, w_hh):
            raise ValueError(f"LSTMCell: Expected hx[0] to have as many dimensions as input, got {tuple(h.shape)}")
        return getattr(_VF, f"{cell}_cell")(x, hx, w_ih, w_hh, b_ih, b_hh)
    _, h, c = _run(engine, inputs, params, layer, of_cell=True)
    return h.squeeze(0) if c is None else (h.squeeze(0), c.squeeze(0))


def _unchecked_by_torch_cell(x, h, w_hh) -> bool:
    """Would torch read past the end of a state of too many dimensions? It looks at the first two sizes."""
    return isinstance(h, Tensor) and h.dim() > 2 and h.shape[:2] == (x.shape[0], w_hh.shape[1])
