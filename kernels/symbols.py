"""The arithmetic of a cell as a graph: what its function does to symbols, and how each operation is differentiated.

A cell's function is called once with a `Symbol` for each argument. Every operation on symbols makes a node of a `Graph`; a node
that is there already serves again. Numbers are constants. `DERIVATIVES` has the rule of each operation, once, for both
`gradients` (reverse mode) and `changes` (forward mode).

The elementary functions take symbols, and numbers. What they are on tensors, and in each engine, the engines say.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias


class Graph:
    """The nodes of a calculation, each once, in an order in which they can be calculated."""

    def __init__(self) -> None:
        self.nodes: dict[tuple, Symbol] = {}

    def argument(self, name: str) -> Symbol:
        """Make the symbol of an argument."""
        return self._node("argument", name)

    def apply(self, operation: str, *operands: Value) -> Any:
        """Return the result of an operation: a number, one of the operands, or a node.

        Raises:
            Refused: an operand is neither a symbol of this graph nor a number, or a condition in the place of a number, or the
                reverse.
        """
        if not any(isinstance(each, Symbol) for each in operands):
            return NUMBERS[operation](*operands)
        for each in operands:
            self.check_own(each)
        if operation == "where" and isinstance(operands[0], bool):
            return operands[1] if operands[0] else operands[2]
        for place, each in enumerate(operands):
            _check_operand(operation, each, operation in LOGIC or (operation == "where" and place == 0))
        simple = self._simplified(operation, operands)
        return self._node(operation, *operands) if simple is None else simple

    def check_own(self, value: Any) -> None:
        """Raise Refused where a value is a symbol of another graph."""
        if isinstance(value, Symbol) and value.graph is not self:
            raise Refused("a value of another cell's function, or of another call: use this function's own arguments")

    def _node(self, operation: str, *operands: Any) -> Symbol:
        key = operation, *(("symbol", each.index) if isinstance(each, Symbol) else each for each in operands)
        if key not in self.nodes:
            self.nodes[key] = Symbol(self, len(self.nodes), operation, *operands)
        return self.nodes[key]

    def _simplified(self, operation: str, operands: tuple) -> Value | None:
        """Return what is equal, to the bit, and takes fewer operations, or None."""
        a, b = operands[0], operands[-1]
        if (operation in ("add", "sub") and is_number(b, 0)) or (operation in ("mul", "div") and is_number(b, 1)):
            return a
        if (operation == "add" and is_number(a, 0)) or (operation == "mul" and is_number(a, 1)):
            return b
        if operation == "sub" and is_number(a, 0):
            return -b
        if operation == "add" and _is_negated(b):
            return self.apply("sub", a, b.operands[0])
        if operation == "add" and _is_negated(a):
            return self.apply("sub", b, a.operands[0])
        if operation == "sub" and _is_negated(b):
            return self.apply("add", a, b.operands[0])
        if operation in ("mul", "div") and _is_negated(a):
            return -self.apply(operation, a.operands[0], b)
        if operation in ("mul", "div") and _is_negated(b):
            return -self.apply(operation, a, b.operands[0])
        if operation == "neg" and _is_negated(a):
            return a.operands[0]
        return operands[1] if operation == "where" and operands[1] is b else None


class Refused(TypeError):
    """A cell's function does what no engine can. The words say what to write in its place."""


class Symbol:
    """A node: an operation and its operands, which are symbols and numbers. An argument's only operand is its name."""

    def __init__(self, graph: Graph, index: int, operation: str, *operands: Any) -> None:
        self.graph, self.index, self.operation, self.operands = graph, index, operation, operands

    @property
    def inputs(self) -> list[Symbol]:
        """The operands that are symbols."""
        return [each for each in self.operands if isinstance(each, Symbol)]

    @property
    def is_condition(self) -> bool:
        """Is the node true or false, and no number?"""
        return self.operation in CONDITIONS

    __hash__ = object.__hash__

    def __add__(self, other: Value) -> Any:
        return self.graph.apply("add", self, other)

    def __radd__(self, other: Value) -> Any:
        return self.graph.apply("add", other, self)

    def __sub__(self, other: Value) -> Any:
        return self.graph.apply("sub", self, other)

    def __rsub__(self, other: Value) -> Any:
        return self.graph.apply("sub", other, self)

    def __mul__(self, other: Value) -> Any:
        return self.graph.apply("mul", self, other)

    def __rmul__(self, other: Value) -> Any:
        return self.graph.apply("mul", other, self)

    def __truediv__(self, other: Value) -> Any:
        return self.graph.apply("div", self, other)

    def __rtruediv__(self, other: Value) -> Any:
        return self.graph.apply("div", other, self)

    def __pow__(self, power: Any) -> Any:
        if isinstance(power, (int, float)) and 1 <= abs(power) <= 8 and power == int(power):
            result = self
            for _ in range(abs(int(power)) - 1):
                result = result * self
            return result if power > 0 else 1 / result
        if isinstance(power, (int, float)) and abs(power) == 0.5:
            return sqrt(self) if power > 0 else 1 / sqrt(self)
        raise Refused(
            f"** {_named(power)}: the power of a value is a whole number from 1 to 8 or 0.5, or one of these negative; "
            "write exp(p * log(x)) for others"
        )

    def __rpow__(self, base: Any) -> Any:
        raise Refused(f"{base!r} ** a value: write exp(x * log({base!r})), with the logarithm as a number")

    def __neg__(self) -> Any:
        return self.graph.apply("neg", self)

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return self.graph.apply("abs", self)

    def __lt__(self, other: Value) -> Any:
        return self.graph.apply("lt", self, other)

    def __le__(self, other: Value) -> Any:
        return self.graph.apply("le", self, other)

    def __gt__(self, other: Value) -> Any:
        return self.graph.apply("gt", self, other)

    def __ge__(self, other: Value) -> Any:
        return self.graph.apply("ge", self, other)

    def __eq__(self, other: object) -> Any:
        return self.graph.apply("eq", self, other)  # type: ignore[arg-type]

    def __ne__(self, other: object) -> Any:
        return self.graph.apply("ne", self, other)  # type: ignore[arg-type]

    def __and__(self, other: Symbol) -> Any:
        return self.graph.apply("and", self, other)

    def __or__(self, other: Symbol) -> Any:
        return self.graph.apply("or", self, other)

    def __invert__(self) -> Any:
        return self.graph.apply("not", self)

    # What a value of a cell has not, and what to write in its place.

    def __bool__(self) -> bool:
        raise Refused(
            "if, and, or, not on a value: each unit has its own, so write where(condition, a, b), and & | ~ between conditions"
        )

    def __iter__(self) -> Any:
        raise Refused(
            "a loop over a value: a cell's function is of one unit, which is a single number; write it without the loop"
        )

    def __len__(self) -> int:
        raise Refused("len() of a value: a cell's function is of one unit, which is a single number")

    def __getitem__(self, index: Any) -> Any:
        raise Refused("[...] on a value: a cell's function is of one unit; make each part an argument of its own")

    def __float__(self) -> float:
        raise Refused("a value used as a Python number: write functions of fastrnn.cells in the place of math's")

    __int__ = __index__ = __float__

    def __matmul__(self, other: Any) -> Any:
        raise Refused(
            "@ on a value: products with weight_ih and weight_hh are the layer's; declare an argument as Gate, Input or Hidden"
        )

    __rmatmul__ = __matmul__

    def __mod__(self, other: Any) -> Any:
        raise Refused("% and // on a value have no derivative: use + - * / and functions of fastrnn.cells")

    __rmod__ = __floordiv__ = __rfloordiv__ = __mod__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        remedy = (
            f"write {name}(x)" if name in NUMBERS else "a value has + - * /, comparisons and the functions of fastrnn.cells"
        )
        raise Refused(f".{name} of a value: {remedy}")

    __array_ufunc__ = None  # so that NumPy's numbers leave arithmetic to a symbol

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        if any(type(each).__name__ in TENSORS for each in args):
            raise Refused("a tensor in a cell's function: declare it as an argument of kind Weight, or write a Python number")
        remedy = f"fastrnn.cells.{name}" if name in NUMBERS else "functions of fastrnn.cells"
        raise Refused(f"torch's {name}: write {remedy}, which every engine has")


Value: TypeAlias = "Symbol | float"
TENSORS = "Tensor", "Parameter", "ndarray"


def is_number(value: Any, number: float) -> bool:
    """Is a value a constant, and this one?"""
    return not isinstance(value, Symbol) and value == number


def _is_negated(value: Value) -> bool:
    return isinstance(value, Symbol) and value.operation == "neg"


def _named(value: Any) -> str:
    """Name what is no symbol: numbers as they are, others by their type."""
    return repr(value) if isinstance(value, (int, float)) else f"a {type(value).__name__}"


def _check_operand(operation: str, operand: Any, condition: bool) -> None:
    """Raise Refused where an operand is not what an operation takes."""
    if isinstance(operand, Symbol):
        if operand.is_condition and not condition:
            raise Refused(f"{operation} of a condition: write where(condition, 1, 0)")
        if condition and not operand.is_condition:
            raise Refused(f"{operation} wants a condition, such as x > 0")
    elif condition:
        raise Refused(f"{operation} wants a condition, such as x > 0, got {_named(operand)}")
    elif not isinstance(operand, (int, float)):
        name = type(operand).__name__
        remedy = "declare it as an argument of kind Weight" if name in TENSORS else "write a Python number"
        raise Refused(f"{operation} with a {name}: {remedy}")
    elif not abs(operand) <= sys.float_info.max:
        raise Refused(f"{operation}: a constant is a finite number; write one that a float holds, such as 1e30")


def _elementary(name: str) -> Callable[..., Any]:
    """Make an elementary function of symbols, numbers or tensors."""

    def function(*operands: Any) -> Any:
        if len(operands) != ARGUMENTS[name]:
            raise Refused(f"{name}: expected {ARGUMENTS[name]} argument{'s' * (ARGUMENTS[name] > 1)}, got {len(operands)}")
        for each in operands:
            if isinstance(each, Symbol):
                return each.graph.apply(name, *operands)
        if all(isinstance(each, (int, float)) for each in operands):
            try:
                return NUMBERS[name](*operands)
            except (ArithmeticError, ValueError) as error:
                raise type(error)(f"{name}({', '.join(map(repr, operands))}): {error}") from None
        from .reference import of_tensors  # needs torch, which a process that compiles kernels does without

        return of_tensors(name, *operands)

    function.__name__ = function.__qualname__ = name
    return function


sigmoid, tanh, relu, exp, expm1, log, log1p, sqrt, erf, logsigmoid, minimum, maximum, where = map(_elementary, (
    "sigmoid", "tanh", "relu", "exp", "expm1", "log", "log1p", "sqrt", "erf", "logsigmoid", "minimum", "maximum", "where"
))  # fmt: skip


def _reduction(name: str) -> Callable[..., Any]:
    """Make a reduction over all units of a row, of symbols or numbers."""

    def function(*operands: Any) -> Any:
        symbols = [each for each in operands if isinstance(each, Symbol)]
        return symbols[0].graph.apply(name, *operands) if symbols else NUMBERS[name](*operands)

    function.__name__ = function.__qualname__ = name
    return function


# Over a row, its units' values together: their mean, and 1 / sqrt(their variance + the last operand, a number). Each takes any
# number of values of a unit, which count as those of so many units. The result is the same for all units.
REDUCTIONS = "row_mean", "row_rstd"
row_mean, row_rstd = map(_reduction, REDUCTIONS)


def softplus(x: Any) -> Any:
    """log(1 + exp(x))."""
    return -logsigmoid(-x)


def silu(x: Any) -> Any:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def gelu(x: Any) -> Any:
    """x times the normal distribution's function at x, as torch.nn.functional.gelu without approximation."""
    return 0.5 * x * (1 + erf(math.sqrt(0.5) * x))


def hardtanh(x: Any) -> Any:
    """x within -1 and 1."""
    return where(x <= -1, -1.0, where(x >= 1, 1.0, x))


def hardsigmoid(x: Any) -> Any:
    """x / 6 + 1 / 2 within 0 and 1, as torch.nn.functional.hardsigmoid."""
    return where(x <= -3, 0.0, where(x >= 3, 1.0, x * (1 / 6) + 0.5))


def hardswish(x: Any) -> Any:
    """x * hardsigmoid(x)."""
    return x * hardsigmoid(x)


COMPARISONS = "lt", "le", "gt", "ge", "eq", "ne"
LOGIC = "and", "or", "not"
CONDITIONS = frozenset((*COMPARISONS, *LOGIC))  # whose results are true or false

NUMBERS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": operator.and_,
    "or": operator.or_,
    "not": operator.not_,
    "where": lambda condition, a, b: a if condition else b,
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)) if a > -700 else math.exp(a),
    "tanh": math.tanh,
    "relu": lambda a: max(a, 0.0),
    "exp": math.exp,
    "expm1": math.expm1,
    "log": math.log,
    "log1p": math.log1p,
    "sqrt": math.sqrt,
    "abs": abs,
    "erf": math.erf,
    "logsigmoid": lambda a: min(a, 0.0) - math.log1p(math.exp(-abs(a))),
    "minimum": min,
    "maximum": max,
    "row_mean": lambda *values: sum(values) / len(values),
    "row_rstd": lambda *operands: 1 / math.sqrt(_variance(operands[:-1]) + operands[-1]),
}


def _variance(numbers: Sequence[float]) -> float:
    mean = sum(numbers) / len(numbers)
    return sum((each - mean) ** 2 for each in numbers) / len(numbers)


def _of_mean(d: Any, y: Any, *values: Any) -> tuple:
    return (row_mean(d) * (1 / len(values)),) * len(values)


def _of_rstd(d: Any, y: Any, *operands: Any) -> tuple:
    values = operands[:-1]
    mean, factor = row_mean(*values), row_mean(d) * (y * y * y) * (1 / len(values))
    return *((mean - each) * factor for each in values), None


def _shared(d: Any, a: Any, b: Any, not_a: Any, not_b: Any) -> tuple:
    half = where(a == b, 0.5 * d, d) if isinstance(a, Symbol) or isinstance(b, Symbol) else d
    return where(not_a, 0, half), where(not_b, 0, half)


# Of (d, y, operands...): the gradient of each operand from d, that of the result y; None where there is none. Each is linear in
# d. What y gives is taken from y, which may be at hand where the operands are not. Those of reductions, where a unit's values
# are in the results of all, are for reverse mode alone.
DERIVATIVES: dict[str, Callable[..., tuple]] = {
    "add": lambda d, y, a, b: (d, d),
    "sub": lambda d, y, a, b: (d, -d),
    "mul": lambda d, y, a, b: (d * b, d * a),
    "div": lambda d, y, a, b: (d / b, -(d / b * y)),
    "neg": lambda d, y, a: (-d,),
    **dict.fromkeys((*COMPARISONS, "and", "or"), lambda d, y, a, b: (None, None)),
    "not": lambda d, y, a: (None,),
    "where": lambda d, y, condition, a, b: (None, where(condition, d, 0), where(condition, 0, d)),
    "sigmoid": lambda d, y, a: (d * y * (1 - y),),
    "tanh": lambda d, y, a: (d * (1 - y * y),),
    "exp": lambda d, y, a: (d * y,),
    "expm1": lambda d, y, a: (d * (y + 1),),
    "log": lambda d, y, a: (d / a,),
    "log1p": lambda d, y, a: (d / (a + 1),),
    "sqrt": lambda d, y, a: (0.5 * d / y,),
    "abs": lambda d, y, a: (where(a > 0, d, where(a < 0, -d, 0)),),
    "erf": lambda d, y, a: (d * exp(-(a * a)) * (2 / math.sqrt(math.pi)),),
    "logsigmoid": lambda d, y, a: (-(d * expm1(y)),),
    # of two that are equal each gets half, as in torch
    "minimum": lambda d, y, a, b: _shared(d, a, b, a > b, a < b),
    "maximum": lambda d, y, a, b: _shared(d, a, b, a < b, a > b),
    "relu": lambda d, y, a: (where(y <= 0, 0, d),),  # as in torch d passes where y is NaN
    "row_mean": _of_mean,
    "row_rstd": _of_rstd,
}

ARGUMENTS = {name: rule.__code__.co_argcount - 2 for name, rule in DERIVATIVES.items()}

# Estimated operations of a vector; of others one.
COSTS = {
    "div": 6, "sqrt": 6, "exp": 12, "sigmoid": 14, "expm1": 16, "tanh": 16, "log": 16, "log1p": 18, "erf": 24, "logsigmoid": 34,
}  # fmt: skip


def ancestors(results: Iterable[Value], known: Iterable[int] = ()) -> list[Symbol]:
    """Find the nodes that results are calculated from, and themselves, in order; none beyond those with a known index."""
    found: dict[int, Symbol] = {}
    waiting, known = [each for each in results if isinstance(each, Symbol)], set(known)
    while waiting:
        node = waiting.pop()
        if node.index not in found:
            found[node.index] = node
            waiting += [] if node.index in known else node.inputs
    return [found[index] for index in sorted(found)]


def gradients(results: Sequence[Value], seeds: Sequence[Value], arguments: Sequence[Symbol]) -> list[Value]:
    """Return the gradients of arguments, from those of results; 0 where none arrives."""
    totals: dict[int, Value] = {}

    def add(node: Any, gradient: Value | None) -> None:
        if isinstance(node, Symbol) and gradient is not None:
            totals[node.index] = totals[node.index] + gradient if node.index in totals else gradient

    for node, seed in zip(results, seeds, strict=True):
        add(node, seed)
    for node in reversed(ancestors(results)):
        if node.operation != "argument" and node.index in totals:
            for operand, gradient in zip(
                node.operands, DERIVATIVES[node.operation](totals[node.index], node, *node.operands), strict=True
            ):
                add(operand, gradient)
    return [totals.get(each.index, 0) for each in arguments]


def changes(results: Sequence[Value], of_arguments: Mapping[int, Symbol]) -> list[Value]:
    """Return how results change where arguments, by their nodes' indices, change; 0 for not at all."""
    found: dict[int, Value] = dict(of_arguments)
    for node in ancestors(results):
        if node.operation == "argument":
            continue
        parts = [
            DERIVATIVES[node.operation](found[operand.index], node, *node.operands)[place]
            for place, operand in enumerate(node.operands)
            if isinstance(operand, Symbol) and operand.index in found
        ]
        for part in parts:
            if part is not None:
                found[node.index] = found[node.index] + part if node.index in found else part
    return [found.get(each.index, 0) if isinstance(each, Symbol) else 0 for each in results]
