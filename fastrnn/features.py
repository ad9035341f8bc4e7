"""What a layer can have that torch.nn's have not: its settings checked, its cell derived from the plain one, its noise drawn.

Layer norm (norms.py), a clipped cell state and zoneout change the cell's own function, which is traced again with them: a
second definition of a cell there is not. Recurrent dropout is a mask on what enters the recurrent product, and the engines
multiply with it.

Noise comes from torch's generator before a layer runs, whatever the dtype. In training each layer draws, the lowest layer
first::

    torch.rand(D, B, R) >= recurrent_dropout     one mask for a sequence, times 1 / (1 - recurrent_dropout)
    random_bits(T, B, D, S, H) >= zoneout        of the S states that have a probability, h first; packed [N, D, S, H]

and then its output's dropout, as torch.nn. So for a seed the noise is the same in either layout, on any number of threads, and
on every engine of a device. `random_bits` are whole numbers of 16 bits, which are compared with the nearest of 65,536
thresholds. On a CPU they are hashed from a single number of torch's generator, which else would take longer than zoneout's
arithmetic, and the compiled runtime makes them (csrc/noise.cpp) where nobody watches.

Letters as in kernels/layer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrnn import norms
from fastrnn.kernels import reference
from fastrnn.kernels.cells import CELLS, Cell, define
from fastrnn.kernels.derive import Code
from fastrnn.kernels.layer import Inputs, Layer, Steps
from fastrnn.kernels.symbols import Symbol, ancestors, where

DEFAULTS: dict[str, Any] = {
    "layer_norm": False,
    "num_heads": 1,
    "cell_clip": None,
    "learn_initial_state": False,
    "recurrent_dropout": 0.0,
    "zoneout": 0.0,
}
_OF_PARAMETERS = "layer_norm", "num_heads", "learn_initial_state"  # they say which parameters a module has


def construct(module: Any, settings: dict[str, Any]) -> None:
    """Set settings of a module that torch.nn's constructor has made, and give it the parameters that they want."""
    set_past_checks(module, {name: checked(name, value, module) for name, value in settings.items()})
    if module.num_heads > 1:
        for name, weight in list(module._parameters.items()):
            if name.startswith("weight_hh"):  # drawn from within 1 / sqrt(H) as before
                blocks = weight.detach()[:, : module.hidden_size // module.num_heads]
                setattr(module, name, nn.Parameter(blocks.contiguous()))
    add_parameters(module, module.weight_ih_l0.device, module.weight_ih_l0.dtype)


class Setting:
    """A module's attribute of a name in DEFAULTS: checked where it is set, and held by the module where it is no default.

    A module that holds any is not the fast path's. They are in a dict of their own: torch 2.10's compiler calls itself without
    end where a descriptor finds its name in the module's.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        held = module._fastrnn_features
        # A module of a derived class may have had an attribute of this name before it was converted.
        return held[self.name] if self.name in held else module.__dict__.get(self.name, DEFAULTS[self.name])

    def __set__(self, module: Any, value: Any) -> None:
        value = checked(self.name, value, module)
        if self.name in _OF_PARAMETERS and module._parameters and value != getattr(module, self.name):
            raise AttributeError(f"{self.name}: only the constructor sets it, as the module's parameters depend on it")
        set_past_checks(module, {self.name: value})

    def __delete__(self, module: Any) -> None:
        setattr(module, self.name, DEFAULTS[self.name])


def set_past_checks(module: Any, values: dict[str, Any]) -> None:
    """Set settings of a module that were checked before."""
    own = module.__dict__
    held = {name: value for name, value in (module._fastrnn_features | values).items() if value != DEFAULTS[name]}
    for name in (*values, "_fastrnn_features", "_fastrnn_fast_path"):
        own.pop(name, None)
    if held:
        own.update(_fastrnn_features=held, _fastrnn_fast_path=None)


def described(module: Any) -> str:
    """Return ", name=value" of each setting that is no default."""
    values = {name: getattr(module, name) for name in DEFAULTS}
    return "".join(f", {name}={value!r}" for name, value in values.items() if value != DEFAULTS[name])


def checked(name: str, value: Any, module: Any) -> Any:
    """Return a setting's value as a module holds it.

    Raises:
        TypeError, ValueError: the module cannot have it.
    """
    return _CHECKS[name](name, value, module)


def _check_heads(name: str, value: Any, module: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or module.hidden_size % value:
        raise ValueError(f"{name}: expected a divisor of hidden_size {module.hidden_size}, got {value!r}")
    if value > 1 and module.proj_size:
        raise ValueError(f"{name}: expected 1 with proj_size {module.proj_size}, got {value}")
    return value


def _check_clip(name: str, value: Any, module: Any) -> float | None:
    if value is None:
        return None
    if not _is_number(value):
        raise TypeError(f"{name}: expected a positive number or None, got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number or None, got {value!r}")
    if "c" not in state_names(module._fastrnn_cell):
        raise ValueError(f"{name}: expected None, because {type(module).__name__} has no cell state c, got {value!r}")
    return float(value)


def _check_flag(name: str, value: Any, module: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be a bool, got {value!r}")
    return value


def _check_probability(name: str, value: Any, module: Any) -> float:
    if not _is_number(value):
        raise TypeError(f"{name}: expected a number p, 0 <= p < 1, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a probability p, 0 <= p < 1, got {value!r}")
    return float(value)


def _check_zoneout(name: str, value: Any, module: Any) -> float | tuple[float, ...]:
    states = state_names(module._fastrnn_cell)
    rates: Any = value if isinstance(value, (tuple, list)) else (value,)
    if isinstance(value, (tuple, list)) and len(value) != len(states):
        raise ValueError(f"{name}: expected a probability, or one for each of {', '.join(states)}, got {value!r}")
    rates = tuple(_check_probability(name, rate, module) for rate in rates)
    if rates[0] and module.proj_size:
        raise ValueError(f"{name}: expected 0 for h with proj_size {module.proj_size}, got {value!r}")
    return (rates if isinstance(value, (tuple, list)) else rates[0]) if any(rates) else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_CHECKS: dict[str, Callable[[str, Any, Any], Any]] = {
    "layer_norm": _check_flag,
    "num_heads": _check_heads,
    "cell_clip": _check_clip,
    "learn_initial_state": _check_flag,
    "recurrent_dropout": _check_probability,
    "zoneout": _check_zoneout,
}


def state_names(cell: Cell) -> list[str]:
    """Return the names of a cell's states, h first, the others as they stand in c0."""
    return ["h", *(name.removesuffix("_new") for name, _ in cell.derived.after)]


class Noise(NamedTuple):
    """What layers on top of each other draw.

    dropout:           of each layer's output but the last one's; 0 in evaluation.
    recurrent_dropout: 0 in evaluation.
    zoneout:           a probability for each state, h first; empty where there is none.
    training:          otherwise zoneout is its expectation.
    """

    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, ...] = ()
    training: bool = False

    def within(self) -> bool:
        """Whether a layer is given any, beside dropout between layers."""
        return bool(self.recurrent_dropout or any(self.zoneout))

    def drawn(self, inputs: Inputs, layer: Layer, hidden: int, dtype: torch.dtype) -> Inputs:
        """Return what a layer is given, with its mask and its noise, in the dtype that it computes in."""
        if not self.within():
            return inputs
        batch_first = layer.batch_first and inputs.batch_sizes is None
        of_h0 = inputs.h0.shape[0], Steps(layer, inputs).batch, inputs.h0.shape[2]  # without rows that resets go back to
        mask, noise = self.draw(inputs.x, of_h0, batch_first, hidden, dtype)
        return inputs._replace(mask=mask, noise=noise)

    def draw(
        self, x: Tensor, of_h0: Sequence[int], batch_first: bool, hidden: int, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """Draw a layer's mask and its noise; of_h0: the shape of h0. batch_first: x is [B, T, I]."""
        D, B, R = of_h0
        mask = noise = None
        if self.recurrent_dropout:
            kept = torch.rand(D, B, R, device=x.device, dtype=torch.float32) >= self.recurrent_dropout
            mask = kept.to(dtype) * (1 / (1 - self.recurrent_dropout))
        if rates := [rate for rate in self.zoneout if rate]:
            if self.training:
                steps = (x.shape[1], x.shape[0]) if batch_first else x.shape[:-1]
                noise = zones((*steps, D, len(rates), hidden), rates, dtype, x.device)
                noise = noise.transpose(0, 1) if batch_first else noise
            else:
                kept = torch.cat([torch.full((hidden,), 1 - rate, device=x.device, dtype=dtype) for rate in rates])
                noise = kept.repeat(D).expand(*x.shape[:-1], -1)
        return mask, noise


def zones(shape: tuple[int, ...], rates: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw ones where a unit takes its new value and zeros where it keeps the old one, with these probabilities of a zero.

    shape: [..., D, S, H], whose last three axes are one in the result; rates: of the S states.
    """
    from fastrnn import dispatch  # which imports this module

    levels = tuple(min(round(rate * 65536), 65535) - 32768 for rate in rates)  # int16, as the bits
    levels = levels[:1] if len({*levels}) == 1 else levels
    seed = random_word(device) if device.type == "cpu" else None
    if seed is not None and dispatch.native and not torch.compiler.is_compiling():
        found = torch.empty(*shape[:-3], math.prod(shape[-3:]), dtype=dtype)
        if dispatch.native.zones(seed, levels, shape[-1], found) is not None:
            return found
    bits = random_bits(shape, seed, device)
    if len(levels) == 1:
        new = bits >= levels[0]
    else:
        new = torch.stack([part >= level for part, level in zip(bits.unbind(-2), levels, strict=True)], -2)
    return new.flatten(-3).to(dtype)


def random_bits(shape: tuple[int, ...], seed: Tensor | None, device: Any = None) -> Tensor:
    """Draw whole numbers of 16 bits, int16 of any value, four of each number of 64 bits.

    seed: int64 [1], of which these are hashed (splitmix64, of Steele, Lea and Flood 2014); without one torch's generator has
    them all.
    """
    count = math.prod(shape)
    size = (count + 3) // 4
    if seed is None:
        words = random_word(device, size)
    else:
        words = seed + torch.arange(1, size + 1, device=device) * _signed(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            words = (words ^ ((words >> shift) & ((1 << 64 - shift) - 1))) * _signed(factor)
    return words.view(torch.int16)[:count].view(shape)


def random_word(device: Any, size: int = 1) -> Tensor:
    """Draw int64 numbers of any value."""
    least = -(2**63)
    if torch.compiler.is_compiling():  # Dynamo knows no random_ without an end; of all numbers this one draws the last never
        return torch.randint(least, -least - 1, (size,), device=device).bitwise_xor(least)
    return torch.empty(size, dtype=torch.int64, device=device).random_(least, None)


def _signed(word: int) -> int:
    """Return a word of 64 bits as int64 has it."""
    return word - (word >> 63 << 64)


def noise_of(module: Any) -> Noise:
    """Return what a module's layers draw."""
    zoneout, training = module.zoneout, module.training
    rates = zoneout if isinstance(zoneout, tuple) else (zoneout,) if zoneout else ()
    dropout, recurrent_dropout = (module.dropout, module.recurrent_dropout) if training else (0.0, 0.0)
    return Noise(dropout, recurrent_dropout, rates, training)


def cell_name(module: Any) -> str:
    """Return the name of the cell that a module's layers run: the plain one, or that with norm, clip and zoneout."""
    zoneout = module.zoneout
    rates = zoneout if isinstance(zoneout, tuple) else (zoneout,)
    return derived(module._fastrnn_cell.name, module.layer_norm, module.cell_clip, tuple(rate > 0 for rate in rates))


def derived(name: str, norm: bool, clip: float | None, zoned: tuple[bool, ...]) -> str:
    """Return the name of a cell with these features, of a cell's name.

    norm: with layer norm. zoned: which states have zoneout, h first.
    """
    return _derive(name, norm, clip, zoned) if norm or clip is not None or any(zoned) else name


# What torch.compiler.assume_constant_result would do, but without importing Dynamo: it does not look into this function.
derived._dynamo_marked_constant = True  # type: ignore[attr-defined]  # undeclared


@cache
def _derive(name: str, norm: bool, clip: float | None, zoned: tuple[bool, ...]) -> str:
    """Derive a cell with these features from one, make it known, and return its name."""
    plain = CELLS[name]
    code, states = plain.derived.definition, state_names(plain)
    normed = norms.Normed(plain) if norm else None
    kinds = dict(plain.kinds if normed is None else normed.kinds)
    noise: dict[str, str] = {}
    for state, has_zones in zip(states, zoned, strict=False):
        if has_zones:
            noise[state] = f"zoneout_{state}"
            while noise[state] in kinds:
                noise[state] += "_"
            kinds |= {state: "State", noise[state]: "Noise"}
    results = dict(code.results)

    def clipped(c: Any) -> Any:
        return c if clip is None else where(c > clip, clip, where(c < -clip, -clip, c))

    def function(**given: Any) -> tuple:
        change: dict[int, Callable] = {}
        if clip is not None:
            change[results["c_new"].index] = clipped  # type: ignore[union-attr]  # no constant
        arguments = given if normed is None else normed.arguments(given)
        new = _traced_again(code, arguments, change)
        if normed is not None and normed.of_state:
            of_state = normed.state(given)
            change[results["c_new"].index] = lambda c: of_state(clipped(c))  # type: ignore[union-attr]
            new[0] = _traced_again(code, arguments, change)[0]
        return tuple(
            given[state] + given[noise[state]] * (value - given[state]) if state in noise else value
            for state, value in zip(states, new, strict=True)
        )

    function.__name__ = plain.derived.name + "_norm" * norm + "_clip" * (clip is not None) + "_zoneout" * any(zoned)
    cell = define(function, kinds)
    reference.register(cell)
    return cell.name


def _traced_again(code: Code, given: dict[str, Any], change: dict[int, Callable]) -> list[Any]:
    """Return a cell's results of other arguments, where some nodes are replaced by a function of them, for what follows too."""
    known = {node.index: given[name] for name, node in code.parameters}
    graph = next(iter(known.values())).graph

    def value(node: Any) -> Any:
        return known[node.index] if isinstance(node, Symbol) else node

    for node in ancestors([node for _, node in code.results]):
        if node.index not in known:
            known[node.index] = graph.apply(node.operation, *map(value, node.operands))
        if node.index in change:
            known[node.index] = change[node.index](known[node.index])
    return [value(node) for _, node in code.results]


INITIAL = "initial_"  # begins the names of the parameters for initial states


def add_parameters(module: Any, device: Any, dtype: Any) -> None:
    """Register the parameters that settings want, for one layer and direction after another, and give them their values."""
    shapes: dict[str, tuple[int]] = {}
    if module.layer_norm:
        shapes |= norms.shapes(module._fastrnn_cell, module.hidden_size)
    if module.learn_initial_state:
        of_h = module.proj_size or module.hidden_size
        names = state_names(module._fastrnn_cell)
        shapes |= {f"{INITIAL}{name}": (module.hidden_size if place else of_h,) for place, name in enumerate(names)}
    for suffix in suffixes(module):
        for name, shape in shapes.items():
            module.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
    reset_parameters(module)


def reset_parameters(module: Any) -> None:
    """Set what `add_parameters` has registered to its first values: initial states to zeros, and see `norms.reset`."""
    if module.layer_norm:
        norms.reset(module, suffixes(module))
    if module.learn_initial_state:
        for names in _initial_names(module):
            for name in names:
                if name in module._parameters:  # torch.nn's constructor comes here before they are there
                    nn.init.zeros_(module._parameters[name])


def suffixes(module: Any) -> list[str]:
    """Return how the names of parameters end, of one layer and direction after another."""
    return [f"_l{k}{end}" for k in range(module.num_layers) for end in ("", "_reverse")[: 1 + module.bidirectional]]


def weights_of(module: Any) -> list[Tensor]:
    """Return the weights of all layers with layer norm as the engines take them."""
    cells = module._fastrnn_cell.name, cell_name(module)
    return [weight for suffix in suffixes(module) for weight in norms.weights(module, suffix, *cells)]


def initial_states(module: Any, batch: int) -> list[Tensor]:
    """Return the learned states of a module, each [L * D, B, features]."""
    states = [torch.stack([getattr(module, name) for name in names]) for names in _initial_names(module)]
    return [state.unsqueeze(1).expand(-1, batch, -1).contiguous() for state in states]


def _initial_names(module: Any) -> list[list[str]]:
    """Return the names of the parameters for the initial value of each state: one a layer and direction."""
    return [[f"{INITIAL}{state}{suffix}" for suffix in suffixes(module)] for state in state_names(module._fastrnn_cell)]
