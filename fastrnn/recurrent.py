"""Layers of any cell: `recurrent` makes an nn.Module class of a cell's function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import dispatch, fallback, features, norms
from fastrnn.cells import CellFunction
from fastrnn.kernels import cpu, gpu
from fastrnn.kernels.cells import Cell
from fastrnn.kernels.layer import Layer

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
        norm_ih_l{k}, norm_hh_l{k} [blocks * H], with layer_norm: gains of the two products
        norm_c_l{k}, norm_c_bias_l{k} [H], with layer_norm: gain and shift of a state named c that is the only one but h
        initial_<name>_l{k} [H], with learn_initial_state, for each state, h first

    They are drawn from the uniform distribution within 1 / sqrt(H), as torch.nn's, but for the last two: gains are ones, shifts
    and initial states zeros.

    Args:
        input_size: I, features of the input.
        hidden_size: H, units.
        num_layers: L, layers on top of each other.
        bias: have biases.
        batch_first: input and output are [B, T, features].
        dropout: probability that a number between two layers is zero in training.
        bidirectional: run in both directions, D = 2.
        device, dtype: of the parameters.
        layer_norm: keyword only. Normalise both products of a step, and the state c where the output is calculated from it,
            over all units of a row, as in `fastrnn.LSTM`.
        num_heads: keyword only. Units see the hidden state of their own head alone: the recurrent matrix is block-diagonal.
        cell_clip: keyword only. Keep the state named c of the cell within -cell_clip and cell_clip, as in `fastrnn.LSTM`.
        learn_initial_state: keyword only. Have a parameter for the initial value of each state, used where hx is missing.
        recurrent_dropout: keyword only. Probability that a unit of h does not enter the recurrent product, in training.
        zoneout: keyword only. Probability that a unit of h keeps its value in a step, in training; or a tuple of these, of h
            and each other state.
        recompute: keyword only. Keep less for backward, as in `fastrnn.recompute`.

    Shape:
        input: [T, B, I], or [B, T, I] with `batch_first`, or [T, I] without a batch, or a PackedSequence.
        hx: h [L * D, B, H]; where the cell has states but h, a tuple of h and these, each so. Where it is missing,
            zeros, or what is learned.
        resets: keyword only. bool [T, B], as the input without its features, or a PackedSequence as the input, or its data.
            Before a step where it is True, in the order of each direction, the state is zeros again, or what is learned.
        lengths: keyword only. int64 [B] on the input's device, from 0 to T: the steps of each row of padded input. Past them
            output and gradients are zero, and the final state is the one at the length.
        all_states: keyword only. True for a third result: the states after every step of each layer and direction, as the final
            ones with an axis for the steps behind the first, [L * D, T, B, ...], as the input has it.
        output: as input, with D * H features.
        state after the last step: as hx.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value, in torch.nn's words.
        RuntimeError: shapes or dtypes do not agree, in torch.nn's words.
    """

    cell: ClassVar[CellFunction]
    layer_norm, cell_clip, learn_initial_state = features.Setting(), features.Setting(), features.Setting()
    recurrent_dropout, zoneout = features.Setting(), features.Setting()
    _fastrnn_features: ClassVar[dict[str, Any]] = {}  # those that are not as by default
    _fastrnn_compressed: ClassVar[bool] = False  # such layers are torch.nn's alone
    # As whose layers the fast path takes those of this class: the cell's name in operators; None where it does not.
    _fastrnn_fast_path: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {name for base in cls.__mro__[: cls.__mro__.index(Recurrent)] for name in vars(base)}
        replaced = not own.isdisjoint(_INNER) or any(name.startswith(("weight_", "bias_")) for name in own)
        cls._fastrnn_fast_path = None if replaced else cls.cell.definition.name

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
        layer_norm: bool = False,
        num_heads: int = 1,
        cell_clip: float | None = None,
        learn_initial_state: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        # torch.nn's own constructor sees to the arguments that are its own, on a device where nothing takes memory
        nn.GRU(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device="meta")
        for name, flag in (("bidirectional", bidirectional), ("recompute", recompute)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bidirectional
        self.num_heads, self.recompute = features.checked("num_heads", num_heads, self), recompute
        self.layer_norm, self.cell_clip, self.learn_initial_state = layer_norm, cell_clip, learn_initial_state
        self.recurrent_dropout, self.zoneout = recurrent_dropout, zoneout
        parts, H = self.cell.parts, hidden_size
        for place, suffix in enumerate(features.suffixes(self)):
            inputs = input_size if place <= bidirectional else H * (1 + bidirectional)
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (len(parts["ih"]) * H, inputs),
                "weight_hh": (len(parts["hh"]) * H, H // num_heads),
            }
            if bias:
                shapes |= {"bias_ih": (len(parts["ih"]) * H,), "bias_hh": (len(parts["hh"]) * H,)}
            shapes |= {f"weight_{name}": (H,) for name in parts["own"]}
            for name, shape in shapes.items():
                if shape[0]:
                    self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        # for csrc/modules.cpp, where the engines take the parameters as they are, but for the cell's own, which follow biases
        as_they_are = parts["ih"] == self.cell.definition.input_parts and parts["hh"] == self.cell.definition.hidden_parts
        self._flat_weights_names = [*self._parameters] if as_they_are and (bias or not parts["own"]) else None
        self.reset_parameters()
        features.add_parameters(self, device, dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith(("weight_", "bias_")):
                nn.init.uniform_(parameter, -bound, bound)
        features.reset_parameters(self)

    def flatten_parameters(self) -> None:
        """Do nothing, as torch.nn's modules on a CPU: the parameters stay as they are."""

    def extra_repr(self) -> str:
        """Name the sizes, and what is not as by default."""
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        defaults |= {**features.DEFAULTS, "recompute": False}
        given = [f"{name}={getattr(self, name)}" for name, default in defaults.items() if getattr(self, name) != default]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *given])

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not _CLASSES.get(self.cell):  # a class derived from it is found by its own name
            return super().__reduce_ex__(protocol)
        return _empty, (self.cell,), self.__dict__

    def forward(self, input: Tensor | PackedSequence, hx: Any = None, **more: Any) -> tuple[Any, ...]:
        """Run the layers; see the class."""
        if more and fallback.has_keywords(self, **more):
            return fallback.sequence(self, input, hx, **more)
        if not torch.compiler.is_dynamo_compiling() and dispatch.native and (kind := self._fastrnn_fast_path):
            result = dispatch.native.forward(self.__dict__, kind, input, hx, self.recompute)
            if result is not None:
                return result
        return self._fastrnn_fallback(input, hx)

    vars(forward)["__signature__"] = fallback.SIGNATURE

    def _fastrnn_fallback(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, ...]:
        return fallback.sequence(self, input, hx)

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Run one step of a stream, without gradients.

        Args:
            x: [B, I], the step's input.
            state: as `forward` takes and returns it; None means zeros, or what is learned.

        Returns:
            y [B, H], and the state after the step.

        Raises:
            ValueError: the layer is bidirectional, x has not two dimensions, or its dtype is not the weights'.
            RuntimeError: shapes do not agree, in torch.nn's words.
        """
        if not torch.compiler.is_dynamo_compiling() and dispatch.native and (kind := self._fastrnn_fast_path):
            result = dispatch.native.step(self.__dict__, kind, x, state, None)
            if result is not None:
                return result
        return fallback.module_step(self, x, state, None)

    @property
    def _fastrnn_cell(self) -> Cell:
        return self.cell.definition

    # torch.nn's own checks of a call, and what they look at
    check_input: Any = nn.RNNBase.check_input
    check_hidden_size: Any = nn.RNNBase.check_hidden_size
    get_expected_hidden_size: Any = nn.RNNBase.get_expected_hidden_size
    proj_size = 0

    @property
    def _flat_weights(self) -> list[Any]:
        return [self.weight_ih_l0]

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Raise torch.nn's errors of an input and states that do not fit the layer."""
        self.check_input(input, batch_sizes)
        expected, states = self.get_expected_hidden_size(input, batch_sizes), hidden if isinstance(hidden, tuple) else (hidden,)
        for place, state in enumerate(states):
            name = f"hidden[{place}]" if len(states) > 1 else "hidden"
            self.check_hidden_size(state, expected, f"Expected {name} size {{}}, got {{}}")
        for kind, tensor in (*(("hidden", state) for state in states), ("parameter", self._flat_weights[0])):
            if tensor.device != input.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at {input.device} "
                    f"and {kind} tensor at {tensor.device}"
                )
            if tensor.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, found input tensor with {_scalar(input)} "
                    f"and {kind} tensor with {_scalar(tensor)}"
                )

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """Return the states with their rows in another order, as torch.nn's layers do."""
        if permutation is None:
            return hx
        if isinstance(hx, tuple):
            return tuple(state.index_select(1, permutation) for state in hx)
        return hx.index_select(1, permutation)

    def _fastrnn_layer(self) -> Layer:
        bias = self.bias or self.cell.definition.weights > 0 or self.layer_norm
        name, D = features.cell_name(self), 1 + self.bidirectional
        return Layer(name, D, bias, batch_first=self.batch_first, heads=self._heads())

    def _heads(self) -> int:
        """Return the heads of the recurrent matrix, or, of a cell that has none, of the zeros in its place: their product takes
        less time the more heads there are, as long as a head fills the engines' vectors."""
        if self.cell.parts["hh"]:
            return self.num_heads
        return max(heads for heads in range(1, max(2, self.hidden_size // 64 + 1)) if self.hidden_size % heads == 0)

    def _fastrnn_weights(self) -> list[Tensor]:
        """Return the weights of all layers as the engines take them: w_ih, w_hh, b_ih and b_hh of each direction."""
        if self.layer_norm:
            return features.weights_of(self)
        definition, parts, H = self.cell.definition, self.cell.parts, self.hidden_size
        found: list[Tensor] = []
        for suffix in features.suffixes(self):
            own = [getattr(self, f"weight_{name}{suffix}") for name in parts["own"]]
            matrix = getattr(self, f"weight_ih{suffix}")
            recurrent = getattr(self, f"weight_hh{suffix}", None)
            recurrent = matrix.new_zeros(0, H // self._heads()) if recurrent is None else recurrent
            found += (
                norms.blocks(matrix, parts["ih"], definition.input_parts, H),
                norms.blocks(recurrent, parts["hh"], definition.hidden_parts, H),
            )
            if self.bias or own:
                biases = [getattr(self, f"bias_{kind}{suffix}", None) if self.bias else None for kind in ("ih", "hh")]
                of_input, of_hidden = (matrix.new_zeros(0) if bias is None else bias for bias in biases)
                of_input = norms.blocks(of_input, parts["ih"] if len(of_input) else [], definition.input_parts, H)
                found.append(torch.cat([of_input, *own]) if own else of_input)
                found.append(norms.blocks(of_hidden, parts["hh"] if len(of_hidden) else [], definition.hidden_parts, H))
        return found

    def _prepared(self) -> bool:
        """Have the kernels of inference ready where the CPU engine takes the parameters; does it?"""
        name, weight = self.cell.definition.name, next(self.parameters())
        if not weight.is_cpu or weight.dtype not in cpu.DTYPES or cpu.why_not_cell(name):
            return False
        cpu.prepare_cell(name, weight.dtype, False)
        return True

    @staticmethod
    def _fastrnn_explain(module: Recurrent, input: Any, hx: Any = None) -> dispatch.Explanation:
        x, batch_sizes = (input.data, input.batch_sizes) if isinstance(input, PackedSequence) else (input, None)
        states = () if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        weights = list(module.parameters())
        call = x, batch_sizes, states, weights, False
        cell = features.cell_name(module)
        engine = dispatch.choose_own(cell, *call)
        idle = f"{dispatch.forced} is forced" if dispatch.forced else f"{engine} takes the call"
        fused = {name: dispatch.why_not(name, *call) or dispatch.why_not_own(name, cell) or idle for name in ("cpu", "triton")}
        declined = fused | {"torch": "torch.nn has no such cell", "reference": "the definition, slow"}
        del declined[engine]
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *states, *weights))
        schedule = module._schedule(engine, x, batch_sizes, training) if engine in dispatch.FUSED else ()
        return dispatch.Explanation(engine, declined, schedule, cpu.team()[1] if engine == "cpu" else "")

    def _schedule(self, engine: str, x: Tensor, batch_sizes: Tensor | None, training: bool) -> tuple[str, ...]:
        """Return what the engine says it would do in each layer."""
        T, B = dispatch.steps_and_rows(x, batch_sizes, self.batch_first)
        layer, I, H, L = self._fastrnn_layer(), self.input_size, self.hidden_size, self.num_layers
        if engine == "triton":
            return (gpu.describe(layer, T, B, H, H, dispatch.dtype_on_gpu(x), x.device, training),) * L
        half, size = x.dtype is torch.bfloat16, 8 if x.dtype is torch.float64 else 4
        at_once = L if batch_sizes is None and x.dim() == 3 and self._flat_weights_names and self._fastrnn_fast_path else 1
        inputs = [I, *[layer.directions * H] * (L - 1)]
        return tuple(cpu.describe(layer, T, B, each, H, H, training, half, at_once, I, size) for each in inputs)


# What a call runs, and the fast path does not.
_INNER = ("check_forward_args", "check_input", "check_hidden_size", "get_expected_hidden_size", "permute_hidden", "_heads",
          "_fastrnn_layer", "_fastrnn_weights", "_flat_weights", "proj_size", "__getattr__",
          "__getattribute__")  # fmt: skip


def _scalar(tensor: Tensor) -> str:
    """Name a dtype as torch's messages do: Float."""
    return tensor.type().rpartition(".")[2].removesuffix("Tensor")
