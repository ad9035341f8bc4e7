"""Layers of any cell: `recurrent` makes an nn.Module class of a cell's function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import dispatch, fallback, functional
from fastrnn.cells import CellFunction
from fastrnn.checkpoint import is_on, recompute
from fastrnn.kernels import cpu
from fastrnn.kernels.layer import Inputs, Layer, misfit

_CLASSES: dict[CellFunction, type[Recurrent]] = {}


def recurrent(cell: CellFunction) -> type[Recurrent]:
    """Make a class of layers of a cell, an nn.Module that is constructed and called as nn.GRU and nn.LSTM are.

    Args:
        cell: what `fastrnn.cell` has made.

    Returns:
        The class, `Recurrent` with the cell; the same at every call with the same cell.

    Raises:
        TypeError: cell is something else.
    """
    if not isinstance(cell, CellFunction):
        raise TypeError(
            f"cell: expected a cell that fastrnn.cell has made, got {cell!r}; write @fastrnn.cell above the function"
        )
    if cell not in _CLASSES:
        name = "".join(part[:1].upper() + part[1:] for part in cell.__name__.split("_"))  # type: ignore[attr-defined]
        _CLASSES[cell] = type(name, (Recurrent,), {"cell": cell, "__module__": cell.__module__, "__doc__": Recurrent.__doc__})
    return _CLASSES[cell]


def _empty(cell: CellFunction) -> Recurrent:
    made = recurrent(cell)
    return made.__new__(made)


class Recurrent(nn.Module):
    """Run a cell over sequences.

    Parameters, for each layer k and, with `_reverse` at the end, for the other direction:
        weight_ih_l{k} [blocks * H, I], a row block for each Gate and Input of the cell, in order; I is D * H in higher layers
        weight_hh_l{k} [blocks * H, H / num_heads], for each Gate and Hidden
        bias_ih_l{k}, bias_hh_l{k} [blocks * H], as many, unless bias is False
        weight_<name>_l{k} [H], for each Weight

    They are drawn from the uniform distribution within 1 / sqrt(H), as torch.nn's.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units.
        num_layers: L, layers on top of each other.
        bias: have biases.
        batch_first: input and output are [B, T, features].
        dropout: probability that a number between two layers is zero in training.
        bidirectional: run in both directions, D = 2.
        device, dtype: of the parameters.
        num_heads: keyword only. Units see the hidden state of their own head alone: the recurrent matrix is block-diagonal.
        recompute: keyword only. Keep less for backward, as in `fastrnn.recompute`.

    Shape:
        input: [T, B, I], or [B, T, I] with `batch_first`, or [T, I] without a batch, or a PackedSequence.
        hx: h [L * D, B, H]; where the cell has states but h, a tuple of h and these, each so. Zeros where it is missing.
        resets: keyword only. bool [T, B], as the input without its features, or a PackedSequence as the input, or its data.
            Before a step where it is True, in the order of each direction, the state is the initial one again.
        lengths: keyword only. int64 [B] on the input's device, from 0 to T: the steps of each row of padded input. Past them
            output and gradients are zero, and the final state is the one at the length.
        all_states: keyword only. True for a third result: the states after every step of each layer and direction, as the final
            ones with an axis for the steps behind the first, [L * D, T, B, ...], as the input has it.
        output: as input, with D * H features.
        state after the last step: as hx.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value, in torch.nn's words; resets or lengths do not fit.
        RuntimeError: shapes or dtypes do not agree, in torch.nn's words.
    """

    cell: ClassVar[CellFunction]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        num_heads: int = 1,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
            ("num_heads", num_heads),
        ):
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
            )
        for name, flag in (
            ("bias", bias),
            ("batch_first", batch_first),
            ("bidirectional", bidirectional),
            ("recompute", recompute),
        ):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} should be a bool, got {flag!r}")
        if hidden_size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size {hidden_size}, got {num_heads}")
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bidirectional
        self.num_heads, self.recompute = num_heads, recompute
        parts, H = self.cell.parts, hidden_size
        for layer in range(num_layers):
            inputs = input_size if layer == 0 else H * (1 + bidirectional)
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (len(parts["ih"]) * H, inputs),
                "weight_hh": (len(parts["hh"]) * H, H // num_heads),
            }
            if bias:
                shapes |= {"bias_ih": (len(parts["ih"]) * H,), "bias_hh": (len(parts["hh"]) * H,)}
            shapes |= {f"weight_{name}": (H,) for name in parts["own"]}
            for suffix in self._suffixes(layer):
                for name, shape in shapes.items():
                    if shape[0]:
                        self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Do nothing, as torch.nn's modules on a CPU: the parameters stay as they are."""

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][: 1 + self.bidirectional]

    def extra_repr(self) -> str:
        """Name the sizes, and what is not as by default."""
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        defaults |= {"num_heads": 1, "recompute": False}
        given = [f"{name}={getattr(self, name)}" for name, default in defaults.items() if getattr(self, name) != default]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *given])

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not _CLASSES.get(self.cell):  # a class derived from it is found by its own name
            return super().__reduce_ex__(protocol)
        return _empty, (self.cell,), self.__dict__

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        resets: Tensor | PackedSequence | None = None,
        lengths: Tensor | None = None,
        all_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run the layers; see the class."""
        if not isinstance(all_states, bool):
            raise TypeError(f"all_states: expected a bool, got {all_states!r}")
        x, batch_sizes, order, back = input if isinstance(input, PackedSequence) else (input, None, None, None)
        batched = batch_sizes is not None or x.dim() == 3
        batch = self._check_input(x, batch_sizes)
        states = self._states(x, batch, batched, hx)
        if order is not None:
            states = [state.index_select(1, order) for state in states]
        batch_first = self.batch_first and batched and batch_sizes is None
        marks = functional.marked(input, 1, resets, lengths)
        after_steps: list[Any] | None = [] if all_states else None
        y, *after = self._run(x if batched else x.unsqueeze(1), batch_sizes, states, batch_first, *marks, after_steps)
        if back is not None:
            after = [state.index_select(1, back) for state in after]
        if not batched:
            y, after = y.squeeze(1), [state.squeeze(1) for state in after]
        output = y if batch_sizes is None else PackedSequence(y, batch_sizes, order, back)
        results = output, after[0] if len(after) == 1 else tuple(after)
        if after_steps is None:
            return results
        h, *c = fallback.states_of(after_steps, None if batched else 2)
        others = [] if not c else c[0].chunk(self.cell.definition.states, -1)
        return *results, (h, *others) if others else h

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Run one step of a stream, without gradients.

        Args:
            x: [B, I], the step's input.
            state: as `forward` takes and returns it; None means zeros.

        Returns:
            y [B, H], and the state after the step.

        Raises:
            ValueError: the layer is bidirectional, x has not two dimensions, or its dtype is not the weights'.
            RuntimeError: shapes do not agree, in torch.nn's words.
        """
        return fallback.module_step(self, x, state, None)

    def _check_input(self, x: Tensor, batch_sizes: Tensor | None) -> int:
        """Return the rows of the batch; raise torch.nn's errors."""
        dims = (2,) if batch_sizes is not None else (2, 3)
        if x.dim() not in dims:
            raise ValueError(f"RNN: Expected input to be {'2D' if len(dims) == 1 else '2D or 3D'}, got {x.dim()}D instead")
        if x.shape[-1] != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}")
        dtype = self.weight_ih_l0.dtype
        if x.dtype != dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({dtype}). Convert input: input.to({dtype}), "
                f"or convert model: model.to({x.dtype})"
            )
        if batch_sizes is not None:
            return int(batch_sizes[0])
        batch_first = self.batch_first and x.dim() == 3
        if x.shape[1 if batch_first else 0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return 1 if x.dim() == 2 else x.shape[0 if batch_first else 1]

    def _states(self, x: Tensor, batch: int, batched: bool, hx: Any) -> list[Tensor]:
        """Return h and the other states, each [L * D, B, H]."""
        count, depth = 1 + self.cell.definition.states, self.num_layers * (1 + self.bidirectional)
        if hx is None:
            return [x.new_zeros(depth, batch, self.hidden_size) for _ in range(count)]
        states = [hx] if count == 1 else list(hx) if isinstance(hx, (tuple, list)) else []
        if len(states) != count or not all(isinstance(state, Tensor) for state in states):
            names = ", ".join(["h", *(name.removesuffix("_new") for name, _ in self.cell.definition.derived.after)])
            raise TypeError(f"hx: expected {'h' if count == 1 else f'a tuple ({names})'} of tensors, got {_described(hx)}")
        expected = (depth, batch, self.hidden_size)
        for state in states:
            if state.dim() != (3 if batched else 2):
                wanted = "batched 3-D input, hx should also be 3-D" if batched else "unbatched 2-D input, hx should also be 2-D"
                raise RuntimeError(f"For {wanted} but got {state.dim()}-D tensor")
            own = tuple(state.shape) if batched else (state.shape[0], 1, state.shape[1])
            if own != expected:
                raise RuntimeError(f"Expected hidden size {expected}, got {list(own)}")
        return states if batched else [state.unsqueeze(1) for state in states]

    def _run(
        self,
        x: Tensor,
        batch_sizes: Tensor | None,
        states: Sequence[Tensor],
        batch_first: bool,
        resets: Tensor | None,
        lengths: Tensor | None,
        after_steps: list[Any] | None,
    ) -> list[Tensor]:
        """Run all layers: y, and the states after, each [L * D, B, H]."""
        definition = self.cell.definition
        weights = [each for layer in range(self.num_layers) for each in self._weights(layer)]
        engine = dispatch.choose(x, batch_sizes, states, weights)
        if engine != "cpu" or cpu.why_not_cell(definition.name):
            engine = "reference"
        else:
            cpu.prepare_cell(definition.name, x.dtype, torch.is_grad_enabled())
        h0, *others = states
        c0 = None if not others else others[0] if len(others) == 1 else torch.cat(others, -1)
        bias = self.bias or definition.weights > 0
        layer = Layer(definition.name, 1 + self.bidirectional, bias, batch_first=batch_first)
        dropout, inputs = self.dropout if self.training else 0.0, Inputs(x, batch_sizes, h0, c0, resets, lengths)
        if (resets is not None or lengths is not None) and (reason := misfit(layer, inputs, weights, self.num_layers)):
            raise ValueError(reason)
        with recompute(self.recompute or is_on()):
            y, h_n, c_n = functional.run_stack(engine, inputs, weights, layer, self.num_layers, dropout, after_steps)
        return [y, h_n, *(() if c_n is None else c_n.chunk(definition.states, -1))]

    def _weights(self, layer: int) -> list[Tensor]:
        """Return a layer's weights as the engines take them: w_ih, w_hh, b_ih and b_hh of each direction."""
        definition, parts, H = self.cell.definition, self.cell.parts, self.hidden_size
        found: list[Tensor] = []
        for suffix in self._suffixes(layer):
            own = [getattr(self, f"weight_{name}{suffix}") for name in parts["own"]]
            matrix = getattr(self, f"weight_ih{suffix}")
            recurrent = getattr(self, f"weight_hh{suffix}", None)
            recurrent = matrix.new_zeros(0, H) if recurrent is None else self._dense(recurrent)
            found += (
                _blocks(matrix, parts["ih"], definition.input_parts, H),
                _blocks(recurrent, parts["hh"], definition.hidden_parts, H),
            )
            if self.bias or own:
                biases = [getattr(self, f"bias_{kind}{suffix}", None) if self.bias else None for kind in ("ih", "hh")]
                of_input, of_hidden = (matrix.new_zeros(0) if bias is None else bias for bias in biases)
                of_input = _blocks(of_input, parts["ih"] if len(of_input) else [], definition.input_parts, H)
                found.append(torch.cat([of_input, *own]) if own else of_input)
                found.append(_blocks(of_hidden, parts["hh"] if len(of_hidden) else [], definition.hidden_parts, H))
        return found

    def _dense(self, w: Tensor) -> Tensor:
        """Return w_hh [blocks * H, H] of its heads' blocks [blocks * H, H / num_heads], with zeros elsewhere."""
        heads, size = self.num_heads, self.hidden_size // self.num_heads
        if heads == 1:
            return w
        eye = torch.eye(heads, dtype=w.dtype, device=w.device)
        return (w.view(-1, heads, size, 1, size) * eye.view(1, heads, 1, heads, 1)).reshape(-1, self.hidden_size)

    @staticmethod
    def _fastrnn_explain(module: Recurrent, input: Any, hx: Any = None) -> dispatch.Explanation:
        x, batch_sizes = (input.data, input.batch_sizes) if isinstance(input, PackedSequence) else (input, None)
        weights = list(module.parameters())
        reason = dispatch.why_not("cpu", x, batch_sizes, (), weights, False) or cpu.why_not_cell(module.cell.definition.name)
        if dispatch.choose(x, batch_sizes, (), weights) != "cpu":
            reason = reason or f"{dispatch.forced} is forced"
        declined = {"triton": "it has the built-in cells alone", "torch": "torch.nn has no such cell"}
        if reason:
            return dispatch.Explanation("reference", {"cpu": reason, **declined})
        return dispatch.Explanation("cpu", {**declined, "reference": "the definition, slow"}, (), cpu.team()[1])


def _blocks(w: Tensor, names: Sequence[str], wanted: Sequence[str], H: int) -> Tensor:
    """Return the row blocks of w, which have these names, in another order, with zeros for those that are not there."""
    if list(names) == list(wanted):
        return w
    blocks = dict(zip(names, w.split(H) if len(w) else (), strict=True))
    return torch.cat([blocks[name] if name in blocks else w.new_zeros(H, *w.shape[1:]) for name in wanted])


def _described(value: Any) -> str:
    """Name a value by its type, tensors by their shapes too."""
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} ({', '.join(map(_described, value))})"
    return type(value).__name__ + (f" {list(value.shape)}" if isinstance(value, Tensor) else "")
