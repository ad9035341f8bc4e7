"""Cells of one's own: what one unit does in one step, as a function of a few lines of arithmetic.

::

    import fastrnn
    from fastrnn.cells import Gate, Hidden, Input, State, sigmoid, tanh

    @fastrnn.cell
    def gru(r: Gate, z: Gate, n_x: Input, n_h: Hidden, h: State):
        n = tanh(n_x + sigmoid(r) * n_h)
        return n + sigmoid(z) * (h - n)

    GRU = fastrnn.recurrent(gru)

The signature says what the function is given, per unit: a `Gate` is a pre-activation, the row block's products with the input
and with the hidden state and both biases; `Input` and `Hidden` are one of the two alone; a `State` is carried from step to
step, and `h` is the output itself as it enters element by element; a `Weight` is a learned value. Row blocks stand in
weight_ih and weight_hh in the order of the arguments that have them. An argument with a number as its default is a constant.

The function returns the output, then each State but h in their order. It may use + - * /, whole powers, comparisons, & | ~
between them, abs, Python's numbers, and the functions here, which also take tensors.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import linecache
from collections.abc import Callable
from typing import Any

from fastrnn.kernels import cells, gradients, reference, symbols
from fastrnn.kernels.cells import Gate, Hidden, Input, State, Weight
from fastrnn.kernels.symbols import (
    Refused,
    erf,
    exp,
    expm1,
    gelu,
    hardsigmoid,
    hardswish,
    hardtanh,
    log,
    log1p,
    logsigmoid,
    maximum,
    minimum,
    relu,
    sigmoid,
    silu,
    softplus,
    sqrt,
    tanh,
    where,
)

__all__ = [
    "CellFunction",
    "Gate",
    "Hidden",
    "Input",
    "Refused",
    "State",
    "Weight",
    "cell",
    "erf",
    "exp",
    "expm1",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "log",
    "log1p",
    "logsigmoid",
    "maximum",
    "minimum",
    "relu",
    "sigmoid",
    "silu",
    "softplus",
    "sqrt",
    "tanh",
    "where",
]


SHIPPED = "cfc", "cifg", "gru", "indrnn", "leaky_rnn", "lstm", "mgu", "peephole_lstm", "slstm"


def __getattr__(name: str) -> Any:
    """Find a cell that comes with fastrnn; what it takes to derive them is not spent on import."""
    if name in SHIPPED:
        return getattr(importlib.import_module("fastrnn.shipped"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class CellFunction:
    """A cell, made by `fastrnn.cell`: still a function, of tensors, which runs one step.

    Called on tensors of any shapes that broadcast, it does what was written, with torch's operations.

    Attributes:
        definition: the cell as the engines know it.
        parts: those of the definition.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        try:
            self.definition = cells.define(function, _kinds(function))
        except (TypeError, ArithmeticError, ValueError) as error:  # Refused is a TypeError
            raise _located(function, error) from error
        reference.register(self.definition)
        traced = self.definition.derived.definition
        # what gives constants the dtype of the arguments, where they have none: where(condition, 1, 0)
        self._typed = traced.bind(reference.NAMES) if "full_like" in traced.source() else None
        self.parts = self.definition.parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._typed is not None:
            given = inspect.signature(self._function).bind(*args, **kwargs).arguments
            if given.keys() == self.definition.kinds.keys() and all(hasattr(each, "dtype") for each in given.values()):
                found = self._typed(**given)
                return found[0] if len(found) == 1 else found
        return self._function(*args, **kwargs)

    def source(self) -> str:
        """Return what was derived, as Python: forward, with what a step keeps for backward, and its gradient."""
        derived = self.definition.derived
        return f"{derived.forward.source()}\n\n{derived.backward.source()}"

    def __repr__(self) -> str:
        kinds = ", ".join(f"{name}: {kind}" for name, kind in self.definition.kinds.items())
        return f"<cell {self.__name__}({kinds})>"  # type: ignore[attr-defined]

    def __reduce__(self) -> str:
        return self.__qualname__  # type: ignore[attr-defined]  # what is imported under that name

    def __copy__(self) -> CellFunction:
        return self

    def __deepcopy__(self, memo: Any) -> CellFunction:
        return self


def cell(function: Callable[..., Any]) -> CellFunction:
    """Make a cell of a function: derive its gradient, and what a step keeps for backward. See `fastrnn.cells`.

    Args:
        function: what one unit does in one step, each argument annotated with its kind.

    Returns:
        The cell, for `fastrnn.recurrent`.

    Raises:
        Refused: (a TypeError) the function does what no engine can. The words name the line, and what to write in its place.
    """
    return CellFunction(function)


def _kinds(function: Callable[..., Any]) -> dict[str, str]:
    """Return the kind of each argument that has one, and see that the others are constants."""
    if not inspect.isfunction(function) or function.__name__ == "<lambda>":
        raise Refused(f"expected a function with a name, got {function!r}: write def")
    if function.__code__.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_GENERATOR):
        raise Refused("async def, or yield: a cell's function returns the values of one step; write def and return")
    elementary = {*symbols.NUMBERS, *reference.NAMES, *gradients.FUSED}
    if function.__name__ in elementary:
        raise Refused(f"{function.__name__}: the name is that of an operation that cells are made of; write another")
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise Refused(f"{parameter}: a cell has a fixed number of arguments with names; write each")
        if name in elementary:
            raise Refused(f"{name}: the argument has the name of an operation that cells are made of; write another name")
        kind = parameter.annotation
        kind = kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        if kind in cells.KINDS:
            found[name] = kind
        elif parameter.default is parameter.empty:
            raise Refused(f"{name}: expected a kind, one of {', '.join(cells.KINDS)}; write {name}: Gate, for example")
        elif not isinstance(parameter.default, (int, float)):
            raise Refused(
                f"{name}={parameter.default!r}: a constant is a Python number; write {name}: Weight for a learned value"
            )
    if not {"Gate", "Input"} & {*found.values()}:
        raise Refused("no argument of kind Gate or Input: a layer needs one, for its input")
    if found.get("h", "State") != "State":
        raise Refused(f"h: {found['h']}: the name is the hidden state's; write another, or h: State")
    for name, kind in found.items():
        if kind == "Weight" and name in ("ih", "hh"):
            raise Refused(f"{name}: Weight: the parameter weight_{name} is a matrix; write another name")
        if name.startswith(("d_", "change_")) or name.endswith("_new"):
            raise Refused(
                f"{name}: names that begin with d_ or change_ or end with _new are those of what is derived; write another"
            )
    return found


def _located(function: Callable[..., Any], error: Exception) -> Refused:
    """Return the error with the line of the function, or of what it calls, where it came up."""
    place, trace = getattr(function, "__code__", None), error.__traceback__
    words = str(error)
    if isinstance(error, (ArithmeticError, ValueError)):
        words += "; a constant is a finite number"
    elif not isinstance(error, Refused):
        words += "; use + - * / and functions of fastrnn.cells"
    if place is None:
        return Refused(words)
    file, line, inside = place.co_filename, place.co_firstlineno, False
    while trace is not None:
        code = trace.tb_frame.f_code
        inside = inside or code is place
        if inside and not code.co_filename.endswith(("symbols.py", "derive.py")):
            file, line = code.co_filename, trace.tb_lineno
        trace = trace.tb_next
    text = linecache.getline(file, line).strip()
    return Refused(f"{function.__name__}, line {line} of {file}{f': {text}' * bool(text)}\n{words}")
