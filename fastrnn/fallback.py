"""What runs a module's call when the fast path has declined it: our functions on its weights, or torch.nn's own code.

torch.nn's code is its own code object with the name `_VF` bound to `fastrnn.functional`. So checks and error words are those of
the torch that is installed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import dispatch, features, functional
from fastrnn.checkpoint import is_on, recompute
from fastrnn.kernels import cpu
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.layer import Inputs, Layer, States

_Function = TypeVar("_Function", bound=Callable[..., Any])
_VF = functional  # the name under which torch.nn's code finds its functions

# The methods that torch.nn's forward of a layer calls.
METHODS = ("check_forward_args", "check_input", "check_hidden_size", "get_expected_hidden_size", "get_expected_cell_size",
           "permute_hidden", "_update_flat_weights", "_weights_have_changed", "_init_flat_weights")  # fmt: skip


def module_forward(module: Any, x: Tensor, hx: Tensor | Sequence[Tensor] | None):
    """`module(x, hx)` of batched dense input past torch.nn's code; None where that has to run, to take or to refuse it."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.dim() != 3 or x.is_nested:
        return None
    weights = own_weights(module)
    if weights is None or not _attributes_agree(module, x, weights):
        return None
    layer, num_layers, lstm = dispatch.layer_of_module(module), module.num_layers, isinstance(module, nn.LSTM)
    if hx is None:
        hx = _as_hx(_initial_states(module, x, x.size(0 if layer.batch_first else 1)))
    inputs = functional.inputs_of(layer.cell, x, None, hx)
    stack = functional.Stack(layer, weights, num_layers, features.noise_of(module), module._fastrnn_compressed)
    done = functional.run_layers(inputs, stack)
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
    if module.num_layers < 1 or not isinstance(module.dropout, (int, float)):
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


def _initial_states(module: Any, x: Tensor, batch: Any) -> list[Tensor]:
    """Return the states that so many rows begin with where hx is missing: zeros, or what is learned, each [L * D, B, ...]."""
    if module.learn_initial_state:
        return features.initial_states(module, int(batch))
    depth, others = module.num_layers * (1 + module.bidirectional), module._fastrnn_cell.states
    h0 = x.new_zeros((depth, batch, module.proj_size or module.hidden_size))
    return [h0, *[x.new_zeros((depth, batch, module.hidden_size)) if module.proj_size else h0] * others]


def _keywords(self, input, hx=None, *, resets=None, lengths=None, all_states=False): ...


SIGNATURE = inspect.signature(_keywords)  # of a layer's forward, which takes less time to call without these defaults


def has_keywords(module: Any, resets: Any = None, lengths: Any = None, all_states: Any = False, **unknown: Any) -> bool:
    """Does a call of a layer ask for what torch.nn has not? A TypeError where that is nothing that we have either."""
    if unknown:
        raise TypeError(f"{type(module).__name__}.forward() got an unexpected keyword argument {next(iter(unknown))!r}")
    if not isinstance(all_states, bool):
        raise TypeError(f"all_states: expected a bool, got {all_states!r}")
    return resets is not None or lengths is not None or all_states


def sequence(
    module: Any, input: Any, hx: Any, resets: Any = None, lengths: Any = None, all_states: bool = False
) -> tuple[Any, ...]:
    """`module(input, hx)` with these keywords, of any layer class here: torch.nn's checks, in its words, and our engines."""
    weights, packed = module._fastrnn_weights(), isinstance(input, PackedSequence)
    layer, noise = module._fastrnn_layer(), features.noise_of(module)
    if resets is lengths is None and not all_states:
        results = _by_runtime(module, input, hx, weights, layer, noise)
        if results is not None:
            return results
    x, batch_sizes, order, back = input if packed else (input, None, None, None)
    batched, batch_dim = packed or x.dim() == 3, 0 if module.batch_first else 1
    if not packed and x.dim() not in (2, 3):
        name = dispatch.mode_of(module).split("_")[0] if isinstance(module, nn.RNNBase) else type(module).__name__
        what = "D tensor" if name == "RNN" else "D"
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {x.dim()}{what} instead")
    marks = functional.marked(input, batch_dim, resets, lengths)
    states = None if hx is None else _given_states(module, hx, None if packed else x.dim())
    x = x if batched else x.unsqueeze(batch_dim)
    restarts = states is not None and resets is not None
    fresh: list[Tensor] = []
    if states is None or restarts:
        fresh = _initial_states(module, x, x.size(batch_dim) if batch_sizes is None else batch_sizes[0])
    begin = _as_hx(fresh if states is None else states)
    module.check_forward_args(x, begin, batch_sizes)
    begin = module.permute_hidden(begin, order)
    of_layer = begin if isinstance(begin, tuple) else (begin,)
    for state in of_layer:
        if state.device != x.device:  # torch.bmm of a meta tensor, which heads come to, reads what is no memory
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, "
                f"found input tensor at {x.device} and hidden tensor at {state.device}"
            )
    if restarts:  # resets go back to the latter; of packed input they need no order, being the same for all rows
        # torch.cat would make one dtype of two, where another than x's has to be refused, or says which the results have
        pairs = [(state, own.to(state.dtype)) for state, own in zip(of_layer, fresh, strict=True)]
        of_layer = tuple([torch.cat(pair, 1) for pair in pairs])
    layer = layer._replace(batch_first=layer.batch_first and not packed, restarts=restarts)
    stack = functional.Stack(layer, weights, module.num_layers, noise, module._fastrnn_compressed)
    inputs = Inputs(x, batch_sizes, *_side_by_side(of_layer), *marks)
    with recompute(module.recompute is True or is_on()):
        y, h_n, c_n, after_steps = functional.run_marked(inputs, stack, all_states)
    after = _apart(module, h_n, c_n)
    if not batched:
        y, after = y.squeeze(batch_dim), [state.squeeze(1) for state in after]
    output = PackedSequence(y, batch_sizes, order, back) if packed else y
    results = output, module.permute_hidden(_as_hx(after), back)
    if not all_states:
        return results
    every = _apart(module, *after_steps)
    return *results, _as_hx(every if batched else [state.squeeze(1 + batch_dim) for state in every])


def _by_runtime(
    module: Any, input: Any, hx: Any, weights: Sequence[Tensor], layer: Layer, noise: features.Noise
) -> tuple[Any, ...] | None:
    """`sequence` in one call of the compiled runtime (csrc/modules.cpp), which takes less time; None where that declines it.

    It is told of a module with these weights, and draws noise of a single layer when it knows that it takes the call.
    """
    if torch.compiler.is_compiling() or not dispatch.native or type(input) is not Tensor:
        return None
    if not type(module)._fastrnn_fast_path or not module.__dict__.keys().isdisjoint(METHODS) or module._fastrnn_compressed:
        return None
    if dispatch.forced not in (None, "cpu") or not input.is_cpu or input.dim() != 3 or weights[0].dtype not in cpu.DTYPES:
        return None
    if layer.projected or (noise.within() and module.num_layers > 1):
        return None
    B = input.shape[0 if layer.batch_first else 1]
    if hx is None and module.learn_initial_state:
        hx = _as_hx(features.initial_states(module, B))
    names, hidden = _numbered(len(weights)), module.hidden_size
    attributes = {
        "input_size": module.input_size,
        "hidden_size": hidden,
        "num_layers": module.num_layers,
        "num_heads": layer.heads,
        "bias": layer.bias,
        "batch_first": layer.batch_first,
        "dropout": module.dropout,
        "training": module.training,
        "bidirectional": layer.directions == 2,
        "_flat_weights_names": names,
        "_parameters": dict(zip(names, weights, strict=True)),
    }
    given = attributes, layer.cell, input, hx, module.recompute is True
    if not noise.within():
        return dispatch.native.forward(*given)
    of_h0 = layer.directions, B, hidden
    return dispatch.native.forward_noisy(*given, lambda: noise.draw(input, of_h0, layer.batch_first, hidden, input.dtype))


@functools.cache
def _numbered(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _given_states(module: Any, hx: Any, dims: int | None) -> list[Tensor]:
    """Return the states of a call whose input has so many dimensions, None for packed input, each with a batch."""
    names = features.state_names(module._fastrnn_cell)
    states = [hx] if len(names) == 1 else list(hx) if isinstance(hx, (tuple, list)) else []
    if len(states) != len(names) or not all(isinstance(state, Tensor) for state in states):
        wanted = "a tensor h" if len(names) == 1 else f"a tuple of tensors ({', '.join(names)})"
        raise TypeError(f"hx: expected {wanted}, got {_described(hx)}")
    if dims is None:
        return states
    functional.check_dimensions(names, states, dims)
    return states if dims == 3 else [state.unsqueeze(1) for state in states]


def _described(value: Any) -> str:
    """Name a value by its type, tensors by their shapes too."""
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} ({', '.join(map(_described, value))})"
    return type(value).__name__ + (f" {list(value.shape)}" if isinstance(value, Tensor) else "")


def _as_hx(states: Any) -> Any:
    """Return states as a caller has them: a tensor, or a tuple of several."""
    return tuple(states) if len(states) > 1 else states[0]


def _side_by_side(states: Sequence[Tensor]) -> States:
    """Return h and c as the engines take them: the states but h side by side."""
    h, *others = states
    return h, None if not others else others[0] if len(others) == 1 else torch.cat(others, -1)


def _apart(module: Any, h: Tensor, c: Tensor | None) -> list[Tensor]:
    """Undo that."""
    others = module._fastrnn_cell.states
    return [h] if c is None else [h, c] if others == 1 else [h, *c.chunk(others, -1)]


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


def _rebound(function: _Function, functions: Any = functional) -> _Function:
    """`function`, its code unchanged, with globals looked up in this module, and its `_VF` the given functions."""
    assert isinstance(function, FunctionType)
    for name in function.__code__.co_names:
        if name in function.__globals__:
            globals().setdefault(name, function.__globals__[name])
    names = globals()
    if functions is not functional:
        names = names | {"_VF": functions}
        del names["__name__"]  # for Dynamo, which looks globals up in the module of this name
    own = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    own.__module__ = __name__
    own.__kwdefaults__, own.__annotations__ = function.__kwdefaults__, function.__annotations__
    own.__qualname__ = function.__qualname__
    return own  # type: ignore[return-value]


def layer_fallback(torch_class: type[nn.RNNBase]) -> Any:
    """Make the method that runs a call through torch.nn's own code when the fast path declined it."""
    by_torch = cell_fallback(torch_class)

    def run(self, input, hx):
        if torch.compiler.is_dynamo_compiling():
            return run_compiled(self, input, hx)
        result = module_forward(self, input, hx) if self._fastrnn_fast_path else None
        return by_torch(self, input, hx) if result is None else result

    def run_compiled(self, input, hx):
        """torch.nn's code lists the weights anew where others stand in their place (torch.func.functional_call).

        A graph would return that list, of tensors which belong to a transform and are no results.
        """
        weights, references, changed = self._flat_weights, self._flat_weight_refs, self._weights_have_changed()
        result = by_torch(self, input, hx)
        if changed:
            self._flat_weights, self._flat_weight_refs = weights, references
        return result

    def fallback(self, input, hx):
        if self._fastrnn_features:
            return sequence(self, input, hx)
        if self.recompute is True:  # a derived class may have a method of this name
            with recompute():
                return run(self, input, hx)
        return run(self, input, hx)

    return fallback


def cell_fallback(torch_class: type[nn.RNNBase | nn.RNNCellBase]) -> Any:
    """Make the function that runs torch.nn's code over our functions: those for compressed layers where this is one."""
    usual, compressed = _rebound(torch_class.forward), _rebound(torch_class.forward, functional.for_compressed)

    def by_torch(self, input, hx=None):
        return (compressed if self._fastrnn_compressed else usual)(self, input, hx)

    return by_torch
