"""Recurrent layers as functions.

`layer` runs one layer in full: one or two directions, dense or packed, either layout, projection, every cell.

`lstm`, `gru`, `rnn_tanh` and `rnn_relu` run layers on top of each other, and their `_cell` forms run one step. They take the
arguments of their namesakes in torch (torch.lstm and so on) and return the same. A call that no engine takes, or that torch
would refuse, runs torch's function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import _VF, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import dispatch, ops
from fastrnn.kernels import reference
from fastrnn.kernels.cells import CELLS

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
) -> tuple[Tensor, Tensor, Tensor | None]:
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
        reverse: direction 0 runs from the last step to the first.
        batch_first: x is [B, T, I], and so is y.

    Returns:
        y like x with D * R features, h_n [D, B, R], and c_n [D, B, H] for "lstm", None otherwise.

    Raises:
        ValueError: a shape or a combination above does not hold; the message names the argument.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = (list(weights) for weights in (w_ih, w_hh, b_ih, b_hh, w_hr))
    _check_layer(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, batch_first)
    states = (h0,) if c0 is None else (h0, c0)
    weights = [*w_ih, *w_hh, *b_ih, *b_hh, *w_hr]
    engine = dispatch.choose(x, batch_sizes, states, weights, compressed=True)  # if they are
    run = ops.layer if engine in dispatch.FUSED else _reference
    return run(ops.unit_stride(x), batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first)


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
    return _stack("lstm", _VF.lstm, args)


def gru(*args):
    """Run GRU layers on top of each other, as torch.gru does.

    Arguments, results and errors are those of `lstm`, with h0 [L * D, B, H] in place of the pair, and without c_n.
    """
    return _stack("gru", _VF.gru, args)


def rnn_tanh(*args):
    """Run RNN layers with tanh on top of each other, as torch.rnn_tanh does.

    Arguments, results and errors are those of `lstm`, with h0 [L * D, B, H] in place of the pair, and without c_n.
    """
    return _stack("rnn_tanh", _VF.rnn_tanh, args)


def rnn_relu(*args):
    """Run RNN layers with relu on top of each other, as torch.rnn_relu does.

    Arguments, results and errors are those of `lstm`, with h0 [L * D, B, H] in place of the pair, and without c_n.
    """
    return _stack("rnn_relu", _VF.rnn_relu, args)


def lstm_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Run one step of an LSTM, as torch.lstm_cell does.

    input is [B, I], and hx is (h, c), each [B, H]. The result is (h, c) after the step. Errors are torch's.
    """
    return _cell("lstm", _VF.lstm_cell, input, hx, w_ih, w_hh, b_ih, b_hh)


def gru_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Run one step of a GRU, as torch.gru_cell does.

    input is [B, I], and hx is h [B, H]. The result is h after the step. Errors are torch's.
    """
    return _cell("gru", _VF.gru_cell, input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_tanh_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Run one step of an RNN with tanh, as torch.rnn_tanh_cell does.

    input is [B, I], and hx is h [B, H]. The result is h after the step. Errors are torch's.
    """
    return _cell("rnn_tanh", _VF.rnn_tanh_cell, input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_relu_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    """Run one step of an RNN with relu, as torch.rnn_relu_cell does.

    input is [B, I], and hx is h [B, H]. The result is h after the step. Errors are torch's.
    """
    return _cell("rnn_relu", _VF.rnn_relu_cell, input, hx, w_ih, w_hh, b_ih, b_hh)


class Compressed:
    """The functions that torch.nn's code calls, for layers that `fastrnn.compress` made: their matrices are in bfloat16.

    Everywhere else such matrices beside input in float32 are what torch takes them for, a mistake.
    """

    @staticmethod
    def lstm(*args):
        return _stack("lstm", _VF.lstm, args, compressed=True)

    @staticmethod
    def gru(*args):
        return _stack("gru", _VF.gru, args, compressed=True)

    @staticmethod
    def rnn_tanh(*args):
        return _stack("rnn_tanh", _VF.rnn_tanh, args, compressed=True)

    @staticmethod
    def rnn_relu(*args):
        return _stack("rnn_relu", _VF.rnn_relu, args, compressed=True)

    @staticmethod
    def lstm_cell(*args):
        return _cell("lstm", _VF.lstm_cell, *args, compressed=True)

    @staticmethod
    def gru_cell(*args):
        return _cell("gru", _VF.gru_cell, *args, compressed=True)

    @staticmethod
    def rnn_tanh_cell(*args):
        return _cell("rnn_tanh", _VF.rnn_tanh_cell, *args, compressed=True)

    @staticmethod
    def rnn_relu_cell(*args):
        return _cell("rnn_relu", _VF.rnn_relu_cell, *args, compressed=True)


# The methods that torch.nn's forward of a layer calls.
METHODS = ("check_forward_args", "check_input", "check_hidden_size", "get_expected_hidden_size", "get_expected_cell_size",
           "permute_hidden", "_update_flat_weights", "_weights_have_changed", "_init_flat_weights")  # fmt: skip


def module_forward(module: nn.RNNBase, x: Tensor, hx: Tensor | Sequence[Tensor] | None):
    """`module(x, hx)` of batched dense input past torch.nn's code; None where that has to run, to take or to refuse it."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dim() != 3 or x.is_nested:
        return None
    weights = own_weights(module)
    if weights is None or not _attributes_agree(module, x, weights):
        return None
    cell, lstm = dispatch.BY_MODE[dispatch.mode_of(module)], isinstance(module, nn.LSTM)
    num_layers, bidirectional, batch_first = module.num_layers, module.bidirectional, module.batch_first
    if hx is None:
        depth, batch = num_layers * (1 + bidirectional), x.size(0 if batch_first else 1)
        hx = x.new_zeros(depth, batch, module.proj_size or module.hidden_size)
        if lstm:
            hx = hx, x.new_zeros(depth, batch, module.hidden_size)
    dropped = module.dropout, module.training
    args = x, hx, weights, module.bias, num_layers, *dropped, bidirectional, batch_first
    done = _stack(cell, _decline, args, compressed=module._fastrnn_compressed)  # type: ignore[arg-type]
    return done and (done[0], done[1:] if lstm else done[1])


def _attributes_agree(module: nn.RNNBase, x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Do the attributes of a module say of its weights what these are? torch.nn goes by the attributes, and checks these."""
    if not module.__dict__.keys().isdisjoint(METHODS) or len(weights) < 2:
        return False
    mode = dispatch.mode_of(module)
    sizes = module.input_size, module.hidden_size, module.proj_size, module.num_layers
    flags = module.bias, module.batch_first, module.bidirectional, module.training
    if mode not in dispatch.BY_MODE or (isinstance(module, nn.RNN) and not mode.startswith("RNN")):
        return False
    if any(type(size) is not int for size in sizes) or any(type(flag) is not bool for flag in flags):
        return False
    rows = CELLS[dispatch.BY_MODE[mode]].gates * module.hidden_size
    return x.shape[-1] == module.input_size and weights[1].shape == (rows, module.proj_size or module.hidden_size)


def own_weights(module: Any) -> list[Tensor] | None:
    """The module's flat weights where they are its parameters still; None where one is computed, or has been replaced.

    Nothing is computed to find out: a parametrization may change at every look.
    """
    parameters = module._parameters
    if type(parameters) is not dict:  # another mapping may compute what it holds
        return None
    for known, name in zip(module._flat_weight_refs, module._flat_weights_names, strict=True):
        weight = parameters.get(name)
        if weight is None or known is None or known() is not weight:
            return None
    return module._flat_weights


def _decline(*args) -> None:
    return None


def module_step(module: Any, x: Tensor, state: Any, out: tuple[Tensor, Any] | None) -> tuple[Tensor, Any]:
    """`module.step(x, state, out=out)` as a sequence of one step, where the fast path has not taken it."""
    if module.bidirectional:
        raise ValueError("step: a bidirectional module needs the whole sequence")
    if x.dim() != 2:
        raise ValueError(f"step: expected x of shape [batch, input_size], got {tuple(x.shape)}")
    time = 1 if module.batch_first else 0
    with torch.no_grad():
        y, last = module.forward(x.unsqueeze(time), state)  # without hooks, which the fast path does not know
    y = y.squeeze(time)
    if out is None:
        return y, last
    lstm = isinstance(module, nn.LSTM)
    results = (y, *last) if lstm else (y, last)
    try:
        into_y, after = out
        places = [into_y, *after] if lstm else [into_y, after]
    except (TypeError, ValueError):
        places = []
    if len(places) != 2 + lstm or not all(isinstance(place, Tensor) and place.device == y.device for place in places):
        raise ValueError(f"step: expected out {'(y, (h, c))' if lstm else '(y, h)'} of tensors on {y.device}, got {out!r}")
    for name, into, value in zip("yhc", places, results, strict=False):
        if into.shape != value.shape or into.dtype != value.dtype:
            raise ValueError(
                f"step: out's {name} must be {value.dtype} of shape {tuple(value.shape)}, got {into.dtype} {tuple(into.shape)}"
            )
    dispatch.check_memory(*places)
    for into, value in zip(places, results, strict=True):
        into.copy_(value)
    return out


def _stack(cell: str, fallback: Callable, args: tuple, compressed: bool = False):
    """Run layers on top of each other; `fallback` is torch's own function of the same arguments.

    compressed: they are those of a layer that `fastrnn.compress` made.
    """
    if len(args) != 9:
        return fallback(*args)
    if not isinstance(args[3], (list, tuple)):
        x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first = args
        batch_sizes = None
    else:
        x, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional = args
        batch_first = False
    states = (hx,) if cell != "lstm" else hx if isinstance(hx, (tuple, list)) else (None,)
    counted = isinstance(num_layers, int) and not isinstance(num_layers, bool) and num_layers > 0
    typed = counted and isinstance(params, (list, tuple)) and len(params) > 1
    if not typed or not all(isinstance(flag, bool) for flag in (has_biases, train, bidirectional, batch_first)):
        return fallback(*args)
    engine = dispatch.choose(x, batch_sizes, states, params, compressed)
    directions = 2 if bidirectional else 1
    kinds = len(params) // (num_layers * directions)  # weights of a layer and direction
    fits = engine != "torch" and _fits(
        cell, x, batch_sizes, states, params, has_biases, num_layers, directions, kinds, batch_first
    )
    if fits and engine == "triton":
        fits = not dispatch.leaves_to_cudnn(cell, x, batch_sizes, params[1], num_layers, directions, batch_first)
    fits = fits and isinstance(dropout, (int, float)) and (not train or 0 <= dropout <= 1)  # else torch has words for it
    if compressed and not (fits and engine in dispatch.FUSED) and dispatch.has_compressed(x, params):
        params = [param.float() for param in params]
        at = 2 if batch_sizes is None else 3
        args = *args[:at], params, *args[at + 1 :]
    if not fits:
        unchecked = cell == "lstm" and fallback is _VF.lstm and not torch.compiler.is_compiling()
        if unchecked and _unchecked_by_torch(x, states, params):
            _check_weights(params, 4 if has_biases else 2, num_layers, directions)
            checks = _LSTMChecks.of(params, num_layers, bidirectional, batch_first)
            checks.check_forward_args(x, states, batch_sizes)
        if torch.compiler.is_dynamo_compiling() and not torch._dynamo.config.allow_rnn:
            return call_outside_of_the_graph(fallback, args)  # such as wrong shapes, for which torch has words
        return fallback(*args)
    run = ops.layer if engine in dispatch.FUSED else _reference
    x = ops.unit_stride(x)
    h0, c0 = states if cell == "lstm" else (*states, None)
    if num_layers == 1:
        y, h_n, c_n = run(x, batch_sizes, h0, c0, *_split(params, kinds, has_biases), cell, False, batch_first)
        return (y, h_n) if c0 is None else (y, h_n, c_n)

    # torch draws dropout in [T, B, features] whatever the layout; the engine reads and writes either without a copy
    dropped = train and dropout > 0
    time_major = dropped and batch_first
    y, hs, cs = x, [], []
    for index in range(num_layers):
        own = slice(index * directions, (index + 1) * directions)
        weights = _split(params[index * directions * kinds : (index + 1) * directions * kinds], kinds, has_biases)
        last = index == num_layers - 1
        if time_major and (index == 0 or last):
            y = y.transpose(0, 1)
        y, h, c = run(
            y,
            batch_sizes,
            h0[own],
            None if c0 is None else c0[own],
            *weights,
            cell,
            False,
            batch_first and (last or not time_major),
        )
        hs.append(h)
        cs += [] if c is None else [c]
        if dropped and not last:
            y = F.dropout(y, dropout, True)
    return (y, torch.cat(hs)) if c0 is None else (y, torch.cat(hs), torch.cat(cs))


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


def _unchecked_by_torch(x, states, params) -> bool:
    """Would torch hand these tensors to oneDNN as they are? Its other path fails in an operation, with words of its own."""
    if len(states) != 2 or not all(isinstance(tensor, Tensor) for tensor in (x, *states, *params)):
        return False
    if 0 in (states[0].dim(), states[1].dim()) or states[0].shape[-1] != states[1].shape[-1]:  # torch sees a projection
        return False
    dtype = params[0].dtype
    return x.is_cpu and dtype is not torch.float64 and all(tensor.dtype is dtype for tensor in (x, *states))


def _check_weights(params: Sequence[Tensor], each: int, num_layers: int, directions: int) -> None:
    """Raise where an LSTM's weights, `each` for a layer and direction, do not fit each other."""
    found = [tuple(param.shape) for param in params[: each * num_layers * directions]]
    if len(found) > 1 and len(found[0]) == len(found[1]) == 2:
        size, width, rows = found[0][1], found[1][1], 4 * found[1][1]
        others = [(rows, width), (rows,), (rows,)][: each - 1]
        first, later = [(rows, size), *others] * directions, [(rows, directions * width), *others] * directions
        if found == first + later * (num_layers - 1):
            return
    raise RuntimeError(f"LSTM: the shapes of its weights do not fit {num_layers} layers and each other, got {found}")


class _LSTMChecks(SimpleNamespace):
    """torch.nn's own checks of LSTM's input, against its weights: torch.nn's are against attributes, and packed input has none.

    oneDNN takes sizes from some tensors and reads past the ends of others.
    """

    check_input, check_hidden_size = nn.LSTM.check_input, nn.LSTM.check_hidden_size
    get_expected_hidden_size, get_expected_cell_size = nn.LSTM.get_expected_hidden_size, nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args

    @classmethod
    def of(cls, params: Sequence[Tensor], num_layers: int, bidirectional: bool, batch_first: bool) -> _LSTMChecks:
        return cls(
            _flat_weights=params,
            input_size=params[0].shape[1],
            hidden_size=params[1].shape[1],
            proj_size=0,
            num_layers=num_layers,
            bidirectional=bidirectional,
            batch_first=batch_first,
        )


def _cell(cell: str, fallback: Callable, x, hx, w_ih, w_hh, b_ih=None, b_hh=None, *, compressed: bool = False):
    """Run one step of one layer, with `fallback` and `compressed` as in `_stack`."""
    states = (hx,) if cell != "lstm" else hx if isinstance(hx, (tuple, list)) else (None,)
    has_biases = b_ih is not None or b_hh is not None
    params = (w_ih, w_hh, b_ih, b_hh) if has_biases else (w_ih, w_hh)
    engine = dispatch.choose(x, None, states, params, compressed)
    if engine == "triton" and dispatch.may_leave():
        engine = "torch"  # one step costs less than a launch from Python
    fits = engine != "torch" and _fits_cell(cell, x, states, params)
    if compressed and not (fits and engine in dispatch.FUSED) and dispatch.has_compressed(x, params):
        w_ih, w_hh = w_ih.float(), w_hh.float()
    if not fits:
        if cell == "lstm" and _unchecked_by_torch_cell(x, states, w_hh):
            raise ValueError(f"LSTMCell: Expected hx[0] to have as many dimensions as input, got {tuple(states[0].shape)}")
        return fallback(x, hx, w_ih, w_hh, b_ih, b_hh)
    h, c = states if cell == "lstm" else (*states, None)
    biases: tuple[list, list] = ([b_ih], [b_hh]) if has_biases else ([], [])
    x, h, c = ops.unit_stride(x).unsqueeze(0), h.unsqueeze(0), None if c is None else c.unsqueeze(0)
    weights: ops.Kinds = ([w_ih], [w_hh], *biases, [])
    if engine in dispatch.FUSED:
        _, h, c = ops.layer(x, None, h, c, *weights, cell, of_cell=True)
    else:
        _, h, c = _reference(x, None, h, c, *weights, cell, False, False)
    return h.squeeze(0) if c is None else (h.squeeze(0), c.squeeze(0))


def _unchecked_by_torch_cell(x, states, w_hh) -> bool:
    """Would torch read past the end of a state of too many dimensions? It looks at the first two sizes."""
    state = states[0] if states else None
    return isinstance(state, Tensor) and state.dim() > 2 and state.shape[:2] == (x.shape[0], w_hh.shape[1])


def _split(params: list[Tensor], kinds: int, has_biases: bool) -> ops.Kinds:
    """w_ih, w_hh, b_ih, b_hh, w_hr of one layer, one tensor a direction each."""
    b_ih, b_hh = (params[2::kinds], params[3::kinds]) if has_biases else ([], [])
    return params[::kinds], params[1::kinds], b_ih, b_hh, params[kinds - 1 :: kinds] if kinds in (3, 5) else []


def _fits(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    directions: int,
    kinds: int,
    batch_first: bool,
) -> bool:
    """Do all shapes agree? Where not, torch says what is wrong."""
    projected = kinds - (4 if has_biases else 2)
    if len(params) != kinds * num_layers * directions or not 0 <= projected <= (cell == "lstm"):
        return False
    if len(states) != 1 + (cell == "lstm"):
        return False
    if batch_sizes is None:
        if x.dim() != 3:
            return False
        batch = x.shape[0 if batch_first else 1]
    else:
        if x.dim() != 2 or batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64:
            return False
        batch = states[0].shape[1] if states[0].dim() == 3 else -1
        # torch.nn's modules have checked this, but for LSTM's
        if cell == "lstm" and not torch.compiler.is_compiling() and int(batch_sizes[0]) != batch:
            return False
    w_hh = params[1]
    if w_hh.dim() != 2:
        return False
    rows, width = w_hh.shape
    hidden = rows // CELLS[cell].gates
    if (width != hidden and not projected) or hidden * CELLS[cell].gates != rows:
        return False
    after_w_ih: list[tuple[int, ...]] = [(rows, width)]
    if has_biases:
        after_w_ih += [(rows,), (rows,)]
    if projected:
        after_w_ih.append((width, hidden))
    size = x.shape[-1]
    for start in range(0, len(params), kinds):
        if start == kinds * directions:
            size = directions * width
        w_ih, *others = params[start : start + kinds]
        if w_ih.shape != (rows, size) or [param.shape for param in others] != after_w_ih:
            return False
    depth = num_layers * directions
    if cell != "lstm":
        return states[0].shape == (depth, batch, width)
    return states[0].shape == (depth, batch, width) and states[1].shape == (depth, batch, hidden)


def _fits_cell(cell: str, x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Do all shapes of a single step agree?"""
    w_ih, w_hh, *biases = params
    if x.dim() != 2 or w_hh.dim() != 2 or len(states) != 1 + (cell == "lstm"):
        return False
    batch, size = x.shape
    rows, hidden = w_hh.shape
    return (
        rows == CELLS[cell].gates * hidden
        and w_ih.shape == (rows, size)
        and all(state.shape == (batch, hidden) for state in states)
        and all(bias.shape == (rows,) for bias in biases)
    )


def _check_layer(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell: str, batch_first: bool) -> None:
    """Raise ValueError where the arguments of `layer` do not agree."""
    if cell not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")
    directions = len(w_ih)
    if directions not in (1, 2):
        raise ValueError(f"w_ih: expected one tensor for each of 1 or 2 directions, got {directions}")
    if x.dim() != (3 if batch_sizes is None else 2):
        raise ValueError(f"x: expected {'[T, B, I]' if batch_sizes is None else '[N, I]'}, got {tuple(x.shape)}")
    if batch_sizes is not None and batch_first:
        raise ValueError("batch_first: packed input has no such layout")
    if batch_sizes is not None and (batch_sizes.dtype is not torch.int64 or batch_sizes.dim() != 1):
        raise ValueError(f"batch_sizes: expected int64 [T], got {batch_sizes.dtype} {tuple(batch_sizes.shape)}")
    if (c0 is None) != (cell != "lstm"):
        raise ValueError(f"c0: {'needed by' if cell == 'lstm' else 'not an argument of'} cell {cell!r}")
    if len(w_hh) != directions or w_hh[0].dim() != 2:
        raise ValueError(f"w_hh: expected {directions} tensors [G * H, R]")
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one step, row and feature, got {tuple(x.shape)}")
    rows, width = w_hh[0].shape
    hidden = rows // CELLS[cell].gates
    batch = h0.shape[1] if batch_sizes is not None and h0.dim() == 3 else x.shape[0 if batch_first else 1]
    shapes = {
        "h0": ([h0], (directions, batch, width)),
        "c0": ([] if c0 is None else [c0], (directions, batch, hidden)),
        "w_ih": (w_ih, (hidden * CELLS[cell].gates, x.shape[-1])),
        "w_hh": (w_hh, (hidden * CELLS[cell].gates, width if w_hr else hidden)),
        "b_ih": (b_ih, (rows,)),
        "b_hh": (b_hh, (rows,)),
        "w_hr": (w_hr, (width, hidden)),
    }
    for name, (tensors, shape) in shapes.items():
        if name[0] != "c" and name != "h0" and len(tensors) not in (0, directions):
            raise ValueError(f"{name}: expected {directions} tensors, got {len(tensors)}")
        for tensor in tensors:
            if tensor.shape != shape:
                raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
    if len(b_ih) != len(b_hh):
        raise ValueError("b_ih, b_hh: expected both or neither")


def _reference(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first):
    """`ops.layer` through plain operations."""
    y, h_n, c_n, _ = reference.layer_forward(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first)
    return y, h_n, None if c0 is None else c_n
