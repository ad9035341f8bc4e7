"""The arithmetic of a cell as a graph: what its function does to symbols, and how each operation is differentiated.

A cell's function is called once with a `Symbol` for each argument. Every operation on symbols makes a node of a `Graph`; a node
that is there already serves again. Numbers are constants. `DERIVATIVES` has the rule of each operation, once, for both
`gradients` (reverse mode) and `changes` (forward mode).

The elementary functions take symbols, and numbers. What they are on tensors, and in each engine, the engines say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias


class Graph:
    """The nodes of a calculation, each once, in an order in which they can be calculated."""

    def __init__(self) -> None:
        self.nodes: dict[tuple, Symbol] = {}

    def argument(self, name: str) -> Symbol:
        """Make the symbol of an argument."""
        return self._node("argument", name)

    def apply(self, operation: str, *operands: Value) -> Value:
        """Return the result of an operation: a number, one of the operands, or a node."""
        if not any(isinstance(each, Symbol) for each in operands):
            return NUMBERS[operation](*operands)
        simple = self._simplified(operation, operands)
        return self._node(operation, *operands) if simple is None else simple

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


class Symbol:
    """A node: an operation and its operands, which are symbols and numbers. An argument's only operand is its name."""

    def __init__(self, graph: Graph, index: int, operation: str, *operands: Any) -> None:
        self.graph, self.index, self.operation, self.operands = graph, index, operation, operands

    @property
    def inputs(self) -> list[Symbol]:
        """The operands that are symbols."""
        return [each for each in self.operands if isinstance(each, Symbol)]

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

    def __neg__(self) -> Any:
        return self.graph.apply("neg", self)

    def __lt__(self, other: Value) -> Any:
        return self.graph.apply("lt", self, other)

    def __le__(self, other: Value) -> Any:
        return self.graph.apply("le", self, other)

    def __gt__(self, other: Value) -> Any:
        return self.graph.apply("gt", self, other)

    def __ge__(self, other: Value) -> Any:
        return self.graph.apply("ge", self, other)


Value: TypeAlias = "Symbol | float"


def is_number(value: Value, number: float) -> bool:
    return not isinstance(value, Symbol) and value == number


def _is_negated(value: Value) -> bool:
    return isinstance(value, Symbol) and value.operation == "neg"


def _elementary(name: str) -> Callable[..., Any]:
    def function(*operands: Value) -> Any:
        graphs = [each.graph for each in operands if isinstance(each, Symbol)]
        return graphs[0].apply(name, *operands) if graphs else NUMBERS[name](*operands)

    function.__name__ = function.__qualname__ = name
    return function


sigmoid, tanh, relu, where = (_elementary(name) for name in ("sigmoid", "tanh", "relu", "where"))

COMPARISONS = "lt", "le", "gt", "ge"  # whose results are conditions

NUMBERS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "where": lambda condition, a, b: a if condition else b,
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "tanh": math.tanh,
    "relu": lambda a: max(a, 0.0),
}

# Of (d, y, operands...): the gradient of each operand from d, that of the result y; None where there is none. Each is linear in
# d. What y gives is taken from y, which may be at hand where the operands are not.
DERIVATIVES: dict[str, Callable[..., tuple]] = {
    "add": lambda d, y, a, b: (d, d),
    "sub": lambda d, y, a, b: (d, -d),
    "mul": lambda d, y, a, b: (d * b, d * a),
    "div": lambda d, y, a, b: (d / b, -(d / b * y)),
    "neg": lambda d, y, a: (-d,),
    **dict.fromkeys(COMPARISONS, lambda d, y, a, b: (None, None)),
    "where": lambda d, y, condition, a, b: (None, where(condition, d, 0), where(condition, 0, d)),
    "sigmoid": lambda d, y, a: (d * y * (1 - y),),
    "tanh": lambda d, y, a: (d * (1 - y * y),),
    "relu": lambda d, y, a: (where(y <= 0, 0, d),),  # as in torch d passes where y is NaN
}

# Estimated operations of a vector; of others one.
COSTS = {"div": 6, "sigmoid": 14, "tanh": 16}


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
