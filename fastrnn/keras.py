"""Keras' recurrent layers on fastrnn's engines, for Keras 3 with its torch backend.

    from fastrnn.keras import LSTM  # was: from keras.layers import LSTM

`SimpleRNN`, `LSTM`, `GRU`, `RNN` and `Bidirectional` derive from Keras' own classes and replace the loop over the steps.
Constructors, weights, initial values, masks, states, training and saved files are therefore Keras'. A configuration that
the engines have no kernel for (another activation, `reset_after=False`, a cell of one's own) runs Keras' loop;
`fastrnn.explain(layer, input)` says why. LSTM's and GRU's `recurrent_dropout` has a mask for each gate, which the engines
have not: such a training step is a loop of few torch operations (kernels/reference.py). A call with nothing to do around
the loop goes past what Keras does around every layer (`_shortcut`). `patch` gives the same loop to `keras.layers` itself,
and `to_torch` and `from_torch` copy weights between Keras' layers and torch's.

Letters: B rows, T steps, I features, H units, G gates (SimpleRNN 1, GRU 3, LSTM 4), N valid steps of all rows.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import autograd, dispatch, functional
from fastrnn.kernels.layer import Inputs, Layer

if keras.backend.backend() != "torch":
    raise ImportError(
        f"fastrnn.keras runs on Keras' torch backend, and Keras was loaded with {keras.backend.backend()!r}: "
        "set the environment variable KERAS_BACKEND=torch before keras is imported"
    )

# The versions of Keras, from and to, whose Layer.__call__ does what `_asks_for_more` looks for and nothing else.
_READ = (3, 8), (3, 15)
_is_read = _READ[0] <= tuple(map(int, keras.__version__.split(".")[:2])) <= _READ[1]
if _is_read:
    from keras.src.backend.common.global_state import get_global_attribute
    from keras.src.backend.common.masking import get_keras_mask
    from keras.src.backend.common.variables import get_autocast_scope

__all__ = ["GRU", "LSTM", "RNN", "Bidirectional", "SimpleRNN", "from_torch", "patch", "to_torch"]


@dataclass(frozen=True)
class _Kind:
    """How a Keras cell stands for one of fastrnn's.

    keras_cell: Keras' class.
    torch_name: the name of torch.nn's layer.
    gates:      for each gate in torch's order, its place in Keras'.
    """

    keras_cell: Any
    torch_name: str
    gates: tuple[int, ...]

    @property
    def back(self) -> tuple[int, ...]:
        """For each gate in Keras' order, its place in torch's."""
        return tuple(map(self.gates.index, range(len(self.gates))))


def _reordered(tensor: Tensor, gates: tuple[int, ...], axis: int = 0) -> Tensor:
    """Its parts along an axis in another order; gates: for each part, where it was."""
    if gates == tuple(range(len(gates))):
        return tensor
    parts = tensor.chunk(len(gates), axis)
    return torch.cat([parts[gate] for gate in gates], axis)


class _Turned(torch.autograd.Function):
    """Gate matrices [n, G*H] in Keras' layout to [G*H, n] in torch's; GRU's two biases [2, G*H] to theirs.

    The first argument is the _Kind.
    """

    @staticmethod
    def forward(ctx, kind, *weights):
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        return tuple(_turned(kind, *weights))

    @staticmethod
    def backward(ctx, *grads):
        back, plain = ctx.kind.back, autograd.mapped_by_old_vmap(grads) or torch.is_grad_enabled()
        found: list[Tensor | None] = [None]
        for place, grad in enumerate(grads):
            if grad is None or not ctx.needs_input_grad[place + 1]:
                found.append(None)
            elif place == 2:
                found.append(_reordered(grad, back, -1))
            else:
                turned = None if plain or not dispatch.native else dispatch.native.turn(grad, back, False)
                found.append(_reordered(grad, back).t().contiguous() if turned is None else turned)
        return tuple(found)


def _turned(kind: _Kind, *weights: Tensor) -> list[Tensor]:
    """What _Turned returns, in operations that torch differentiates, or in the compiled runtime's."""
    turned = []
    for weight in weights[:2]:
        turn = None
        if dispatch.native and not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and weight.requires_grad):
            turn = dispatch.native.turn(weight, kind.gates, True)
        turned.append(_reordered(weight.t(), kind.gates).contiguous() if turn is None else turn)
    return turned + [_reordered(bias, kind.gates, -1) for bias in weights[2:]]


@functools.cache
def _no_bias(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros, for all calls: torch's second bias. Of the CPU."""
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=dtype, device="cpu")


_KINDS = (
    _Kind(keras.layers.SimpleRNNCell, "RNN", (0,)),
    _Kind(keras.layers.LSTMCell, "LSTM", (0, 1, 2, 3)),
    _Kind(keras.layers.GRUCell, "GRU", (1, 0, 2)),  # Keras has the update gate first, torch the reset gate
)


@dataclass(frozen=True)
class _Dropout:
    """Factors of a cell's inputs and of its h where they enter the products, the same in all steps.

    inputs: [B, I]; one for each gate, in torch's order, or one for all; empty where there are none.
    hidden: [B, H], or [G, B, H] where each gate has its own, or None.
    """

    inputs: Sequence[Tensor] = ()
    hidden: Tensor | None = None


@dataclass(frozen=True)
class _Cell:
    """A Keras cell that the engines run, and the name of the fastrnn cell that does it."""

    keras_cell: Any
    kind: _Kind
    name: str

    @property
    def kinds(self) -> int:
        """Kinds of states: h, and for LSTM c."""
        return 2 if self.name == "lstm" else 1

    def weights(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """As torch.nn lists them: w_ih [G*H, I], w_hh [G*H, H], and b_ih and b_hh [G*H] if there are biases.

        dtype: the input's, where Keras has not cast them to it, as outside of a layer's own call.
        They are made anew in each call: nobody can notice a write through `.data` or a numpy view.
        """
        cell, kind = self.keras_cell, self.kind
        variables = (cell.kernel, cell.recurrent_kernel, *(() if cell.bias is None else (cell.bias,)))
        own = [_value(variable) if dtype is None else _value(variable).to(dtype) for variable in variables]
        two = len(own) > 2 and own[2].dim() == 2
        given = own if two else own[:2]
        eager = not (torch.compiler.is_compiling() or dispatch.watched())
        if eager and torch.is_grad_enabled() and any(weight.requires_grad for weight in given):
            turned = list(_Turned.apply(kind, *given))
        else:
            turned = _turned(kind, *given)
        if two:
            return [*turned[:2], *turned[2].unbind(0)]
        if len(own) == 2:
            return turned
        bias = own[2]
        return [*turned, bias, _no_bias(len(bias), bias.dtype) if eager and bias.is_cpu else torch.zeros_like(bias)]

    def dropout(self, like: Tensor) -> _Dropout:
        """What Keras drops in this call; like: a state [B, H] of it."""
        cell, per_gate = self.keras_cell, getattr(self.keras_cell, "dropout_mask_count", None) is not None
        of_x = cell.get_dropout_mask(like.new_empty(len(like), cell.kernel.shape[0]))
        of_h = cell.get_recurrent_dropout_mask(like)
        if not per_gate:
            return _Dropout([] if of_x is None else [of_x], of_h)
        gates = self.kind.gates
        inputs = [] if of_x is None else [of_x[gate] for gate in gates]
        return _Dropout(inputs, None if of_h is None else torch.stack([of_h[gate] for gate in gates]))


def _value(variable: Any) -> Tensor:
    """Of a cell's weight: Keras' variable, or what somebody has put in its place."""
    return variable.value if isinstance(variable, keras.Variable) else keras.ops.convert_to_tensor(variable)


def _has_more(cell: Any) -> bool:
    """Does a call of a cell do more than its class's `call`?"""
    hooks = cell._forward_hooks, cell._forward_pre_hooks, cell._backward_hooks, cell._backward_pre_hooks
    own = any(name in cell.__dict__ for name in ("call", "forward")) or type(cell).__call__ is not keras.layers.Layer.__call__
    return own or any(hooks) or cell.activity_regularizer is not None


def _cells(layer: Any, training: Any, x: Any = None) -> list[_Cell] | str:
    """The cells of a Keras recurrent layer, the lowest first; or why the engines do not run one, or not for an input x."""
    if x is not None and (len(x.shape) != 3 or 0 in x.shape):
        return f"input {tuple(x.shape)}, the engines have at least one row, step and feature"
    stacked = isinstance(layer.cell, keras.layers.StackedRNNCells)
    if stacked and (type(layer.cell).call is not keras.layers.StackedRNNCells.call or _has_more(layer.cell)):
        return f"{type(layer.cell).__name__} is not Keras' own stack, or there is a hook on it"
    found: list[_Cell] = []
    for cell in layer.cell.cells if stacked else (layer.cell,):
        kind = next((kind for kind in _KINDS if getattr(type(cell), "call", None) is kind.keras_cell.call), None)
        if kind is None:
            return f"{type(cell).__name__} is not one of Keras' own cells"
        if _has_more(cell):
            return f"a hook, an activity regularizer or a call of its own on {type(cell).__name__}"
        if training and 1 in (cell.dropout, cell.recurrent_dropout):
            return "a probability of 1, which Keras' loops take for different things"
        activations = {keras.activations.tanh: kind.torch_name.lower()}
        if kind.torch_name == "RNN":
            activations = {keras.activations.tanh: "rnn_tanh", keras.activations.relu: "rnn_relu"}
        elif cell.recurrent_activation is not keras.activations.sigmoid:
            return f"recurrent_activation={_name(cell.recurrent_activation)}, the engines have sigmoid"
        if cell.activation not in activations:
            return f"activation={_name(cell.activation)}, the engines have {' and '.join(map(_name, activations))}"
        if not getattr(cell, "reset_after", True):
            return "reset_after=False, the engines reset after the product"
        if x is not None and not found and x.shape[2] != cell.kernel.shape[0]:
            return f"input of {x.shape[2]} features, the layer has weights for {cell.kernel.shape[0]}"
        found.append(_Cell(cell, kind, activations[cell.activation]))
    return found


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


class _AllSteps:
    """A sequence without a mask. Its data are x [B, T, I] itself."""

    batch_sizes: Tensor | None = None

    def data(self, x: Tensor) -> Tensor:
        """[B, T, I] -> what the engine reads."""
        return x

    def each(self, factors: Tensor) -> Tensor:
        """Factors [B, I], the same in all steps -> of the data."""
        return factors.unsqueeze(1)

    def initial(self, state: Tensor) -> Tensor:
        """An initial state [..., B, H] -> of the rows that the engine reads."""
        return state

    def final(self, state: Tensor, initial: Tensor) -> Tensor:
        """A final state of these rows -> [B, H]."""
        return state

    def outputs(self, y: Tensor, zero: bool) -> Tensor:
        """What the engine returns -> [B, T, H]."""
        return y

    def last(self, h: Tensor) -> Tensor:
        """h after the sequence [B, H] -> the last output, without `zero`."""
        return h


class _ValidSteps(_AllSteps):
    """A sequence [B, T, I] of which some steps are masked. Its data are the other steps, packed: [N, I].

    A masked step leaves a row's state as it was. So each row is the sequence of its valid steps, wherever they are.
    """

    def __init__(self, mask: Tensor):
        """mask: bool [B, T], True at valid steps, of which there is one at least."""
        lengths, T = mask.sum(1), mask.shape[1]
        self.order = torch.argsort(lengths, descending=True, stable=True)  # [B], rows from the longest on
        self.rank = torch.argsort(self.order)
        valid_first = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)  # [B, T], a row's valid steps in turn
        present = torch.arange(T, device=mask.device)[:, None] < lengths[self.order]  # [T, B]
        self.places = (self.order * T + valid_first[self.order].t())[present]  # [N], in x as [B * T, I]
        sizes = present.sum(1)
        self.batch_sizes = sizes[sizes > 0].cpu()
        self.rows = int(self.batch_sizes[0])  # that have a valid step
        self.latest = mask.cumsum(1) - 1  # [B, T], which of a row's valid steps came last; -1 before the first
        self.starts = sizes.cumsum(0) - sizes  # [T], where a step begins in packed data
        self.mask = mask

    def data(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[self.places]

    def each(self, factors: Tensor) -> Tensor:
        return factors[self.places // self.mask.shape[1]]

    def initial(self, state: Tensor) -> Tensor:
        return state[..., self.order[: self.rows], :]

    def final(self, state: Tensor, initial: Tensor) -> Tensor:
        """A row without a valid step keeps its initial state."""
        return torch.cat((state, initial[self.order[self.rows :]]))[self.rank]

    def outputs(self, y: Tensor, zero: bool) -> Tensor:
        """A masked step repeats the output before it. It is zero before the first valid step, or with `zero`."""
        shown = self.mask if zero else self.latest >= 0
        places = self.starts[self.latest.clamp(min=0)] + self.rank[:, None]
        return torch.where(shown.unsqueeze(-1), y[torch.where(shown, places, 0)], y.new_zeros(()))

    def last(self, h: Tensor) -> Tensor:
        """It is zero in a row without a valid step, whatever the row's state."""
        return torch.where(self.latest[:, -1:] >= 0, h, h.new_zeros(()))


_States = Sequence[Sequence[Tensor]]  # of h, and for LSTM of c: [B, H] of each direction
_NOTHING = _Dropout()


@functools.cache
def _names(count: int, directions: int) -> list[str]:
    """torch.nn's names of `count` weights of each direction."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[:count]
    return [f"{kind}_l0{suffix}" for suffix in ("", "_reverse")[:directions] for kind in kinds]


def _natively(cells: Sequence[_Cell], x: Tensor, hx: Any) -> tuple[Tensor, Any] | None:
    """What the torch module of these cells, batch_first, returns for x and hx; None where the compiled runtime declines it."""
    if not dispatch.native or torch.compiler.is_compiling():
        return None
    weights = [weight for cell in cells for weight in cell.weights(x.dtype)]
    names, name = _names(len(weights) // len(cells), len(cells)), cells[0].kind.torch_name
    attributes = {
        "mode": name if name != "RNN" else cells[0].name.upper(),
        "input_size": weights[0].shape[1],
        "hidden_size": weights[1].shape[1],
        "num_layers": 1,
        "bias": len(names) > 2 * len(cells),
        "batch_first": True,
        "dropout": 0.0,
        "training": False,
        "bidirectional": len(cells) == 2,
        "proj_size": 0,
        "_flat_weights": weights,
        "_flat_weights_names": names,
        "_parameters": dict(zip(names, weights, strict=True)),
    }
    return dispatch.native.forward(attributes, name, x, hx, False)


def _layer(
    cells: Sequence[_Cell], data: Tensor, states: _States, steps: _AllSteps, dropout: _Dropout = _NOTHING
) -> tuple[Tensor, _States]:
    """A layer of Keras' weights, with a direction for each cell: what the engine returns for `data`, and final states.

    dropout: with one cell alone.
    """
    initial = [torch.stack([steps.initial(state) for state in kind]) for kind in states]
    dropped = [data * steps.each(factors) for factors in dropout.inputs]
    data = torch.cat(dropped, -1) if dropped else data
    if dropout.hidden is not None or len(dropped) > 1:
        weights = cells[0].weights(data.dtype)
        if len(dropped) > 1:  # each gate reads its own part of the data
            weights[0] = torch.block_diag(*weights[0].chunk(len(dropped)))
        mask = None if dropout.hidden is None else steps.initial(dropout.hidden).unsqueeze(0)
        given = Inputs(data, steps.batch_sizes, initial[0], initial[1] if len(initial) > 1 else None, mask=mask)
        own = Layer(cells[0].name, bias=len(weights) > 2, batch_first=steps.batch_sizes is None)
        y, *last, _ = functional.run_marked(given, functional.Stack(own, weights))
    else:
        hx = initial[0] if len(initial) == 1 else tuple(initial)
        done = _natively(cells, data, hx) if steps.batch_sizes is None else None
        if done is not None:
            y, state = done
            last = list(state) if isinstance(state, tuple) else [state]
        else:
            w_ih, w_hh, *biases = zip(*(cell.weights(data.dtype) for cell in cells), strict=True)
            y, *last = functional.layer(
                data,
                *initial,
                cell=cells[0].name,
                w_ih=w_ih,
                w_hh=w_hh,
                b_ih=biases[0] if biases else (),
                b_hh=biases[1] if biases else (),
                batch_sizes=steps.batch_sizes,
                batch_first=steps.batch_sizes is None,
            )
    present = [state for state in last if state is not None]
    final = [list(map(steps.final, after, before)) for after, before in zip(present, states, strict=True)]
    return y, final


def _mask_of(mask: Any, x: Tensor) -> Tensor | None:
    """bool [B, T], or None where every step is valid."""
    while isinstance(mask, (list, tuple)):
        mask = mask[0]
    if mask is None:
        return None
    mask = keras.ops.convert_to_tensor(mask).to(x.device, torch.bool).reshape(x.shape[:2])
    return None if bool(mask.all()) else mask


def _is_mask(mask: Any, x: Any) -> bool:
    """Is it none, or one for the rows and steps of x?"""
    while isinstance(mask, (list, tuple)):
        mask = mask[0]
    return mask is None or math.prod(np.shape(mask)) == math.prod(x.shape[:2])


def _run(layer: Any, sequences: Any, initial_state: Any, mask: Any, training: Any) -> Any:
    """What Keras' inner_loop returns: the last output, all outputs, and the final states. None where Keras has to run it."""
    cells = _cells(layer, training, sequences)
    if isinstance(cells, str) or not _is_mask(mask, sequences):
        return None
    x = _inputs(layer, sequences)
    mask = _mask_of(mask, x)
    if layer.go_backwards:  # Keras returns the outputs in the order in which it computes them
        x, mask = x.flip(1), None if mask is None else mask.flip(1)
    if mask is None:
        steps = _AllSteps()
    elif mask.any():
        steps = _ValidSteps(mask)
    else:
        return None
    stacked, data, after = isinstance(layer.cell, keras.layers.StackedRNNCells), steps.data(x), []
    for cell, given in zip(cells, initial_state if stacked else [initial_state], strict=True):
        given = given if isinstance(given, (list, tuple)) else [given]
        before = _before(given, x, cell, 1)
        if before is None:
            return None
        if layer.stateful:  # Keras writes the new states over the old ones, which backward still reads
            before = [state.clone() for state in before]
        dropout = cell.dropout(before[0]) if training else _NOTHING
        data, states = _layer([cell], data, [[state] for state in before], steps, dropout)
        after.append([state for (state,) in states])
    outputs = steps.outputs(data, layer.zero_output_for_mask)
    last_output = after[-1][0] if mask is None else outputs[:, -1]
    return last_output, outputs, after if stacked else after[0]


def _before(given: Sequence[Any], x: Tensor, cell: _Cell, directions: int) -> list[Tensor] | None:
    """The states before the first step, each [B, H]; None where they are others, which Keras may spread, or has words for."""
    before = [keras.ops.convert_to_tensor(state).to(x.dtype) for state in given]
    fits = len(before) == directions * cell.kinds
    return before if fits and all(state.shape == (len(x), cell.keras_cell.units) for state in before) else None


def _inputs(layer: Any, sequences: Any) -> Tensor:
    """[B, T, I] in the dtype of the computation."""
    return keras.ops.convert_to_tensor(sequences).to(getattr(torch, layer.cell.compute_dtype))


def _run_plain(layer: Any, x: Any, initial_state: Any, mask: Any, training: Any) -> Any:
    """What Keras' call returns, for a call without a mask, dropout or states that are kept; None where Keras has to run it.

    What Keras does around its loop takes three times as long as a layer with a short sequence does.
    """
    cell = layer.cell
    if mask is not None or layer.stateful or layer.go_backwards or type(cell) not in _PLAIN or type(x) is not Tensor:
        return None
    if cell.dropout or cell.recurrent_dropout or not getattr(type(layer).inner_loop, "is_fused", False):
        return None
    if type(layer).get_initial_state is not keras.layers.RNN.get_initial_state:
        return None
    cells = _cells(layer, training, x)
    if isinstance(cells, str) or getattr(torch, layer.compute_dtype) is not x.dtype:
        return None
    hx = None
    if initial_state is not None:
        given = initial_state if isinstance(initial_state, (list, tuple)) else (initial_state,)
        if len(given) != len(layer.state_size) or not all(type(state) is Tensor and state.dim() == 2 for state in given):
            return None
        states = tuple(state.unsqueeze(0) for state in given)
        hx = states if len(states) == 2 else states[0]
    done = _natively(cells, x, hx)
    if done is None:
        return None
    y, last = done
    final = [state[0] for state in last] if isinstance(last, tuple) else [last[0]]
    output = y if layer.return_sequences else final[0]
    return (output, *final) if layer.return_state else output


_PLAIN = tuple(kind.keras_cell for kind in _KINDS)


def _fused_call(keras_class: Any) -> Callable:
    """`call` of a Keras class: the engines at once where there is nothing else to do, or what the class has."""
    by_keras = keras_class.call

    @functools.wraps(by_keras)
    def call(self, sequences, initial_state=None, mask=None, training=False):
        done = _run_plain(self, sequences, initial_state, mask, training)
        if done is not None:
            return done
        return by_keras(self, sequences, initial_state=initial_state, mask=mask, training=training)

    return call


_TAKEN = frozenset(("training", "initial_state"))  # arguments beside x that `_shortcut` takes


def _asks_for_more(layer: Any, x: Tensor) -> bool:
    """Would Keras' `__call__` do more with x, and with no arguments but _TAKEN, than call `call`?

    It builds, converts dtypes, runs hooks, hands on masks and keeps losses. Finding that nothing is wanted takes it 0.06 ms, or
    0.1 ms where kernels have used the caches meanwhile.
    """
    own, policy, spec = layer.__dict__, layer._dtype_policy, layer.input_spec
    if isinstance(spec, list) and len(spec) == 1:
        spec = spec[0]
    if spec is not None:
        wanted = spec.ndim, spec.shape, spec.dtype, spec.min_ndim, spec.max_ndim, spec.axes or None
        if wanted != (3, None, None, None, None, None):
            return True
    return bool(
        not (own.get("built") and own.get("_called"))
        or any(name in own for name in ("call", "forward", "inner_loop"))
        or get_keras_mask(x) is not None
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()
        or layer.activity_regularizer is not None
        or layer._losses
        or getattr(layer, "_remat_mode", None)
        or type(policy) is not keras.dtype_policies.DTypePolicy
        or policy.compute_dtype != policy.variable_dtype
        or get_autocast_scope() is not None
        or len(getattr(layer, "_call_context_args", ("training",))) != 1
        or keras.distribution.distribution() is not None
    )


def _training(given: Any) -> bool | None:
    """The flag of a call that was told `given`; None where Keras has to find it, or to tell it to the layers after this one."""
    around = get_global_attribute("current_call_ctx")
    if around is None:
        return False if given is None else given if isinstance(given, bool) else None
    inherited = getattr(around, "training", None)
    return inherited if isinstance(inherited, bool) and given in (None, inherited) else None


def _shortcut(cls: Any) -> Callable:
    """`__call__` of a class of ours: straight to the engines where Keras has nothing to do around them."""
    by_keras = cls.__call__

    @functools.wraps(by_keras)
    def __call__(self, *args, **kwargs):
        if _is_read and len(args) == 1 and type(args[0]) is Tensor and type(self) is cls and kwargs.keys() <= _TAKEN:
            training = _training(kwargs.get("training"))
            if training is not None and not _asks_for_more(self, args[0]):
                done = _run_plain(self, args[0], kwargs.get("initial_state"), None, training)
                if done is not None:
                    return done
        return by_keras(self, *args, **kwargs)

    return __call__


def _fused(keras_class: Any) -> Callable:
    """`inner_loop` of a Keras class: the engines, or what the class has."""
    by_keras = keras_class.inner_loop

    @functools.wraps(by_keras)
    def inner_loop(self, sequences, initial_state, mask, training=False):
        done = _run(self, sequences, initial_state, mask, training)
        if done is not None:
            return done
        return by_keras(self, sequences, initial_state, mask, training)

    inner_loop.is_fused = True  # type: ignore[attr-defined]
    return inner_loop


def _built_layers(layer: Any) -> tuple[Any, ...]:
    """A Keras layer, or both of a Bidirectional.

    Raises:
        ValueError: they are not built yet.
    """
    layers = (layer.forward_layer, layer.backward_layer) if isinstance(layer, keras.layers.Bidirectional) else (layer,)
    if not all(each.built for each in layers):
        raise ValueError("layer: expected a built layer; call it once, or its build()")
    return layers


def _explain(self: Any, input: Any, hx: Any = None) -> dispatch.Explanation:
    """What `fastrnn.explain` says of a Keras layer. `input` as the layer takes it, [B, T, I]."""
    layers = _built_layers(self)
    input = keras.ops.convert_to_tensor(input)
    training = torch.is_grad_enabled()
    runs: list[list[Any]] = []
    for layer in layers:
        recurrent = isinstance(layer, keras.layers.RNN)
        cells = _cells(layer, training, input) if recurrent else f"{type(layer).__name__} is not a recurrent layer"
        if isinstance(cells, str):
            return dispatch.Explanation("keras", {"fastrnn": cells})
        if training and any(cell.keras_cell.recurrent_dropout and len(cell.kind.gates) > 1 for cell in cells):
            reason = "recurrent_dropout while training, for which Keras draws a mask for each gate"
            return dispatch.Explanation("reference", dict.fromkeys(sorted(dispatch.FUSED), reason))
        runs.append([(cell,) for cell in cells])
    if len(runs) == 2 and len(runs[0]) == len(runs[1]) == 1 and _are_alike(runs[0][0][0], runs[1][0][0]):
        runs = [[runs[0][0] + runs[1][0]]]  # one call for both directions
    found = []
    for run in runs:
        x = _inputs(layers[0], input)
        for cells in run:  # a stack's in turn
            module = _layer_of(cells).to(x.dtype).train(training)  # Keras casts variables to the dtype of the computation
            if dropped := cells[0].keras_cell.recurrent_dropout:
                module.recurrent_dropout = dropped
            with torch.set_grad_enabled(training):
                found.append(dispatch.explain(module, x))
            x = x.new_empty((*x.shape[:2], module.hidden_size))
    return replace(found[0], schedule=tuple(itertools.chain.from_iterable(each.schedule for each in found)))


class _Explained:
    _fastrnn_explain = _explain


def _on_engines(cls: Any) -> Any:
    """Give a class derived from one of Keras' the methods that use the engines, which a second base could not bring along."""
    keras_class = cls.__bases__[0]
    cls.__module__ = "keras.layers"  # what saved files name, so that Keras reads them where fastrnn is not imported
    cls.__reduce__ = _reduce(cls)
    if issubclass(cls, keras.layers.RNN):
        cls.__call__ = _shortcut(cls)
        cls.call, cls.inner_loop = _fused_call(keras_class), _fused(keras_class)
    else:
        cls.call = _both_directions(keras_class.call)
    return cls


def _reduce(cls: Any) -> Callable:
    """`__reduce__` of a class of ours: as of Keras', which pickle finds by the name that both have."""

    keras_class: Any = cls.__bases__[0]

    def __reduce__(self):
        unpickle, arguments = super(cls, self).__reduce__()
        return (keras_class._unpickle_model if type(self) is cls else unpickle), arguments

    return __reduce__


@_on_engines
class SimpleRNN(keras.layers.SimpleRNN, _Explained):
    """`keras.layers.SimpleRNN`, arguments and behaviour, on fastrnn's engines. Input [B, T, I]."""


@_on_engines
class LSTM(keras.layers.LSTM, _Explained):
    """`keras.layers.LSTM`, arguments and behaviour, on fastrnn's engines. Input [B, T, I]."""


@_on_engines
class GRU(keras.layers.GRU, _Explained):
    """`keras.layers.GRU`, arguments and behaviour, on fastrnn's engines. Input [B, T, I]."""


@_on_engines
class RNN(keras.layers.RNN, _Explained):
    """`keras.layers.RNN`, arguments and behaviour; Keras' own cells in it, or a stack of them, run on fastrnn's engines."""


def _both_directions(keras_call: Callable) -> Callable:
    """`call` of Bidirectional: both directions in one call of the engine, or what Keras has."""

    @functools.wraps(keras_call)
    def call(self, sequences, initial_state=None, mask=None, training=None):
        done = _run_both(self, sequences, initial_state, mask, training)
        if done is not None:
            return done
        return keras_call(self, sequences, initial_state=initial_state, mask=mask, training=training)

    return call


def _are_alike(one: _Cell, other: _Cell) -> bool:
    """Can these cells be the two directions of one layer?"""
    same = one.name == other.name and one.keras_cell.units == other.keras_cell.units
    return same and one.keras_cell.use_bias == other.keras_cell.use_bias


def _run_both(self: Any, sequences: Any, initial_state: Any, mask: Any, training: Any) -> Any:
    """What Bidirectional's call returns; or None where the two layers have to be called one after the other."""
    layers = self.forward_layer, self.backward_layer
    if self.stateful or any(
        not isinstance(layer, keras.layers.RNN)
        or not getattr(type(layer).inner_loop, "is_fused", False)
        or isinstance(layer.cell, keras.layers.StackedRNNCells)
        or isinstance(_cells(layer, training, sequences), str)
        or layer.activity_regularizer is not None
        or layer.compute_dtype != self.compute_dtype
        or (training and (layer.cell.dropout or layer.cell.recurrent_dropout))
        or not _is_mask(mask, sequences)
        for layer in layers
    ):
        return None
    cells: list[Any] = [_cells(layer, training)[0] for layer in layers]
    forward, backward = cells
    if not _are_alike(forward, backward) or layers[0].go_backwards:
        return None
    x, H = _inputs(layers[0], sequences), forward.keras_cell.units
    mask, kinds = _mask_of(mask, x), forward.kinds
    if mask is not None and not mask.any():
        return None
    steps = _AllSteps() if mask is None else _ValidSteps(mask)
    if initial_state is None:
        initial_state = [x.new_zeros(x.shape[0], H)] * (2 * kinds)
    before = _before(initial_state, x, forward, 2)
    if before is None:
        return None
    y, states = _layer(cells, steps.data(x), list(zip(before[:kinds], before[kinds:], strict=True)), steps)
    dtype = getattr(torch, self.compute_dtype)  # under torch.autocast the engines return another
    y, states = steps.outputs(y, zero=True).to(dtype), [[state.to(dtype) for state in kind] for kind in states]
    one, other = (y[..., :H], y[..., H:]) if self.return_sequences else map(steps.last, states[0])
    if self.merge_mode == "concat":
        output: Any = y if self.return_sequences else torch.cat((one, other), -1)
    elif self.merge_mode == "sum":
        output = one + other
    elif self.merge_mode == "ave":
        output = (one + other) / 2
    elif self.merge_mode == "mul":
        output = one * other
    else:
        output = one, other
    if not self.return_state:
        return output
    final = [state for direction in zip(*states, strict=True) for state in direction]
    return (*output, *final) if self.merge_mode is None else (output, *final)


@_on_engines
class Bidirectional(keras.layers.Bidirectional, _Explained):
    """`keras.layers.Bidirectional`, arguments and behaviour; both directions of a layer of fastrnn's run in one call."""


_CLASSES = {cls.__name__: cls for cls in (SimpleRNN, LSTM, GRU, RNN, Bidirectional)}
# A saved file and the configuration of a copy name the class alone. With these entries the name means ours.
keras.saving.get_custom_objects().update(_CLASSES)


def patch() -> ExitStack:
    """Make `keras.layers.LSTM`, its siblings and `Bidirectional` run on fastrnn's engines: layers that exist, and new ones.

        with fastrnn.keras.patch():
            other_peoples_model.fit(x, y)

    or `patched = fastrnn.keras.patch()` and, later, `patched.close()`. The classes stay Keras' own.

    Returns:
        A context manager that is already active; leaving it, or its `close()`, ends the patch.
    """
    patched = ExitStack()
    wrappers: list[tuple[Any, str, Callable[[Any], Callable]]] = [
        (cls, "inner_loop", _fused) for cls in (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU)
    ]
    wrappers.append((keras.layers.RNN, "call", _fused_call))  # which the others call
    wrappers.append((keras.layers.Bidirectional, "call", lambda cls: _both_directions(cls.call)))
    for keras_class, name, wrap in wrappers:
        before = getattr(keras_class, name)
        wrapped = wrap(keras_class)
        setattr(keras_class, name, wrapped)
        patched.callback(_restore, keras_class, name, wrapped, before)
    return patched


def _restore(keras_class: type, name: str, wrapped: Callable, before: Callable) -> None:
    """Undo a patch, but for what somebody else has laid over it."""
    if getattr(keras_class, name) is wrapped:
        setattr(keras_class, name, before)


def to_torch(layer: Any) -> nn.RNNBase:
    """Make a fastrnn layer of a Keras layer's weights, which it copies.

    Args:
        layer: a built SimpleRNN, LSTM or GRU, or a Bidirectional of one, Keras' or ours.

    Returns:
        `fastrnn.RNN`, `LSTM` or `GRU`, batch_first, in evaluation mode. It returns y [B, T, D*H] and the final states.

    Raises:
        TypeError: `layer` is none of these.
        ValueError: the layer is not built yet, or has something that torch's layers have not; the message says what.
    """
    inner = getattr(layer, "forward_layer", layer)
    if not isinstance(inner, keras.layers.RNN):
        raise TypeError(f"layer: expected a SimpleRNN, LSTM, GRU or Bidirectional of Keras, got {type(layer).__name__}")
    cells = []
    for one in _built_layers(layer):
        found = _cells(one, False)
        if isinstance(found, str) or len(found) > 1:
            raise ValueError(f"layer: {found if isinstance(found, str) else 'expected one cell, got a stack'}")
        if one.go_backwards and one is not getattr(layer, "backward_layer", None):
            raise ValueError("layer: go_backwards=True, torch's layers begin at the first step: flip their input")
        cells += found
    if len(cells) == 2 and not _are_alike(*cells):
        raise ValueError("layer: two directions of different cells, units or biases, torch's have the same")
    return _layer_of(cells).eval()


def _layer_of(cells: Sequence[_Cell]) -> nn.RNNBase:
    """The fastrnn layer, batch_first, of a cell, or of those of two directions; with a copy of their weights."""
    name, (I, H) = cells[0].kind.torch_name, (cells[0].keras_cell.kernel.shape[0], cells[0].keras_cell.units)
    both = len(cells) == 2
    with torch.no_grad():
        weights = [cell.weights() for cell in cells]
        biased, first = len(weights[0]) > 2, weights[0][0]
        more = {"nonlinearity": cells[0].name[4:]} if name == "RNN" else {}
        module = getattr(fastrnn, name)(
            I, H, batch_first=True, bidirectional=both, bias=biased, dtype=first.dtype, device=first.device, **more
        )
        for name, value in zip(_names(4 if biased else 2, len(cells)), itertools.chain(*weights), strict=True):
            module.get_parameter(name).copy_(value)
    return module


def from_torch(module: nn.RNNBase, **options: Any) -> Any:
    """Make a Keras layer of a torch layer's weights, which it copies.

    Args:
        module: an RNN, LSTM or GRU of torch.nn or fastrnn, without a projection.
        options: of the Keras layer, such as return_state; return_sequences is True if not given.

    Returns:
        A built SimpleRNN, LSTM or GRU of this module; Bidirectional where the module is; a `keras.Sequential` of these, with
        Dropout between them, where it has several layers. LSTM's and RNN's two biases become their sum.

    Raises:
        TypeError: `module` is none of these. ValueError: it has a projection.
    """
    if not isinstance(module, (nn.RNN, nn.LSTM, nn.GRU)):
        raise TypeError(f"module: expected an RNN, LSTM or GRU of torch, got {type(module).__name__}")
    if module.proj_size:
        raise ValueError(f"module: Keras' LSTM has no projection, got proj_size={module.proj_size}")
    kind = next(kind for kind in _KINDS if isinstance(module, getattr(nn, kind.torch_name)))
    D, H = 1 + module.bidirectional, module.hidden_size
    built: list[Any] = []
    for index in range(module.num_layers):
        last = index == module.num_layers - 1
        own = {"return_sequences": True, **options} if last else {"return_sequences": True}
        if kind.torch_name == "RNN":
            own = {"activation": module.nonlinearity, **own}
        layer: Any = {"RNN": SimpleRNN, "LSTM": LSTM, "GRU": GRU}[kind.torch_name](H, use_bias=module.bias, **own)
        if D == 2:
            layer = Bidirectional(layer)
        layer.build((None, None, module.input_size if index == 0 else D * H))
        layer.set_weights(_keras_weights(kind, module, index))
        built.append(layer)
        if module.dropout and not last:
            built.append(keras.layers.Dropout(module.dropout))
    return built[0] if len(built) == 1 else keras.Sequential(built)


def _keras_weights(kind: _Kind, module: nn.RNNBase, index: int) -> list[Any]:
    """kernel [I, G*H], recurrent kernel [H, G*H] and the bias of a torch layer, of each direction."""

    def columns(name: str) -> Tensor:
        return _reordered(module.get_parameter(name).detach(), kind.back).t()

    weights = []
    for suffix in ("", "_reverse")[: 1 + module.bidirectional]:
        weights += [columns(f"weight_ih_l{index}{suffix}"), columns(f"weight_hh_l{index}{suffix}")]
        if module.bias:
            pair = columns(f"bias_ih_l{index}{suffix}"), columns(f"bias_hh_l{index}{suffix}")
            weights.append(torch.stack(pair) if kind.torch_name == "GRU" else pair[0] + pair[1])
    return [weight.cpu().numpy() for weight in weights]
