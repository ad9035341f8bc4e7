"""A cell's forward pass and its gradient as plain Python functions, derived from the cell's own function.

Of what backward needs of a step, some is kept, one value a unit (a slot), and the rest is calculated again from that and from
what is there anyway: the states before and after the step, and its output. `choose_kept` weighs one against the other.
"""

from __future__ import annotations

import linecache
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

from .symbols import COMPARISONS, CONDITIONS, COSTS, REDUCTIONS, Graph, Refused, Symbol, Value, ancestors, changes, gradients

CARRY = 8  # operations that a value is worth which goes from one stage to the next, through memory that is near
SLOT = 64  # operations that a slot is worth: it is written and read in each step, and takes memory for all of them
NEVER = 1 << 30  # more than all costs together
DEEPEST = 50  # expressions within each other in a line: Python's parser takes 200, and the printer calls itself for each
# How each operation is written, and how tightly it binds.
BINARY = {"or": ("|", 2), "and": ("&", 3), "add": ("+", 4), "sub": ("-", 4), "mul": ("*", 5), "div": ("/", 5)}
BINARY |= {name: (sign, 1) for name, sign in zip(COMPARISONS, ("<", "<=", ">", ">=", "==", "!="), strict=True)}
UNARY = {"neg": "-", "not": "~"}


@dataclass(frozen=True)
class Code:
    """A function to be made: its parameters and results, each a name with its node.

    A parameter stands for its node: what is calculated from there on is the function's.
    """

    name: str
    parameters: tuple[tuple[str, Symbol], ...]
    results: tuple[tuple[str, Value], ...]

    def source(self, printer: type[Printer] | None = None) -> str:
        """Return the function as Python."""
        return (printer or Printer)(self).source()

    def bind(self, names: dict[str, Any], printer: type[Printer] | None = None) -> Callable:
        """Make the function, with the elementary functions, and `full_like` for constants, by name."""
        return made(self.name, self.source(printer), names)


def made(name: str, source: str, names: dict[str, Any]) -> Callable:
    """Make the function of this name from its source, with others by name."""
    # a name of its own, under which debuggers and Triton find the source
    file = next(file for n in count() if (file := f"<fastrnn {name} {n}>") not in linecache.cache)
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    space = dict(names)
    exec(compile(source, file, "exec"), space)
    return space[name]


class Printer:
    """Writes `Code` as Python: a line for each result, for what is used more than once, and for what nests too deep."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.names = {node.index: name for name, node in reversed(code.parameters)}
        self.wanted = {node.index: name for name, node in reversed(code.results) if isinstance(node, Symbol)}
        nodes = [node for node in ancestors([node for _, node in code.results], self.names) if node.index not in self.names]
        self.single = self._used_once([node.inputs for node in nodes])
        operations, waiting = {}, [node for node in nodes if node.index in self.wanted]
        while waiting:
            node = waiting.pop()
            if node.index not in operations and node.index not in self.names:
                operations[node.index] = operation = self.operation(node)
                waiting += [each for each in operation[1:] if isinstance(each, Symbol)]
        self.operations = dict(sorted(operations.items()))
        self.single = self._used_once(self.operations.values())

    def _used_once(self, uses: Iterable[Iterable[Any]]) -> set[int]:
        """Find the nodes that are operands once, and no results."""
        times = Counter(each.index for operands in uses for each in operands if isinstance(each, Symbol))
        return {index for index, number in times.items() if number == 1} - self.wanted.keys()

    def operation(self, node: Symbol) -> tuple:
        """Return a node's operation, and its operands; another may do more at once."""
        return node.operation, *node.operands

    def source(self) -> str:
        taken = {name for name, _ in (*self.code.parameters, *self.code.results)}
        taken |= {function for function, *_ in self.operations.values()}
        lines = [f"def {self.code.name}({', '.join(name for name, _ in self.code.parameters)}):"]
        depths: dict[int, int] = {}
        for index, operation in self.operations.items():
            depths[index] = 1 + max(
                (depths.get(each.index, 0) for each in operation[1:] if isinstance(each, Symbol)), default=0
            )
            if index not in self.single or depths[index] == DEEPEST:
                depths[index] = 0
                name = self.wanted.get(index) or self._new_name(operation, taken)
                lines.append(f"    {name} = {self._expression(*operation)[0]}")
                self.names[index] = name
        found = [self._text(node)[0] if isinstance(node, Symbol) else self._filled(node) for _, node in self.code.results]
        lines.append(f"    return {', '.join(found)}{',' * (len(found) == 1)}")
        return "\n".join(lines) + "\n"

    def _new_name(self, operation: tuple, taken: set[str]) -> str:
        function, first, *more = operation
        name = f"{function}_{self.names.get(first.index, '')}" if isinstance(first, Symbol) and not more else ""
        if name in taken or name.endswith("_") or not name:
            name = next(name for n in count() if (name := f"v{n}") not in taken)
        taken.add(name)
        return name

    def _filled(self, number: float) -> str:
        """Return a constant of the cell's dtype, which a number alone has not."""
        return f"full_like({self.code.parameters[0][0]}, {self._text(number)[0]})"

    def _text(self, node: Value) -> tuple[str, int]:
        """Return an expression, and how tightly its outermost operator binds."""
        if not isinstance(node, Symbol):
            whole = abs(node) <= 2**53 and float(node).is_integer()  # torch takes no greater integers as they are
            return repr(int(node) if whole else float(node)), 7 if node >= 0 else 6
        return (self.names[node.index], 7) if node.index in self.names else self._expression(*self.operations[node.index])

    def _expression(self, function: str, *operands: Any) -> tuple[str, int]:
        if function in UNARY:
            return f"{UNARY[function]}{self._within(operands[0], 6)}", 6
        if function in BINARY:
            sign, binds = BINARY[function]
            return f"{self._within(operands[0], binds)} {sign} {self._within(operands[1], binds + 1)}", binds
        if function == "where" and not any(isinstance(each, Symbol) for each in operands[1:]):
            return f"where({self._text(operands[0])[0]}, {', '.join(map(self._filled, operands[1:]))})", 7
        return f"{function}({', '.join(each if isinstance(each, str) else self._text(each)[0] for each in operands)})", 7

    def _within(self, node: Value, binds: int) -> str:
        text, own = self._text(node)
        return text if own >= binds else f"({text})"


@dataclass(frozen=True)
class Stage:
    """What a pass does of each unit between two reductions over the units of a row.

    reductions: names and nodes, of the row, that have to be there: their operands are numbers of `Pass.resident` or carried.
    waits:      some of these operands are carried: what other units have calculated in the stage before.
    code:       (the pass's parameters..., results of all reductions so far..., what stages before have carried...) ->
                what this one carries, of the last stage the pass's results.
    """

    reductions: tuple[tuple[str, Symbol], ...]
    waits: bool
    code: Code


def stages(code: Code, resident: Collection[str]) -> tuple[Stage, ...]:
    """Divide a function of a unit where it needs a reduction: into as many stages as reductions follow on each other, and one.

    A value that is calculated before a reduction and needed after it is carried, or calculated again where that is less.

    resident: parameters that are in memory for all units, so that a reduction can read them.
    """
    results = [node for _, node in code.results]
    given = {node.index for _, node in code.parameters}
    readable = {node.index for name, node in code.parameters if name in resident}
    nodes = [node for node in ancestors(results, given) if node.index not in given]
    level = dict.fromkeys(given, 0)
    for node in nodes:
        before = max((level[each.index] for each in node.inputs), default=0)
        level[node.index] = before + (node.operation in REDUCTIONS)
    parameters, found, known, carried = list(code.parameters), [], set(given), set[int]()
    last = max((level[node.index] for node in nodes), default=0)
    for here in range(last + 1):
        own = [node for node in nodes if node.operation in REDUCTIONS and level[node.index] == here]
        reductions = tuple((f"{node.operation}_{node.index}", node) for node in own)
        waits = any(each.index in carried for node in own for each in node.inputs)
        parameters += reductions
        known |= {node.index for node in own}
        if here == last:
            found.append(Stage(reductions, waits, Code(f"{code.name}_{here}", tuple(parameters), code.results)))
            break
        following = [node for node in nodes if level[node.index] > here]
        reduced = {each.index: each for node in following if node.operation in REDUCTIONS for each in node.inputs}
        needed = {each.index: each for node in following for each in node.inputs} | {
            each.index: each for each in results if isinstance(each, Symbol)
        }
        to_carry = []
        for index in sorted(needed):
            node = needed[index]
            if level[index] > here or index in carried or node.is_condition:
                continue
            again = sum(COSTS.get(each.operation, 1) for each in ancestors([node], known) if each.index not in known)
            if again > CARRY or (index in reduced and index not in readable):
                to_carry.append((f"carried_{index}", node))
                known.add(index)
                carried.add(index)
        if to_carry or reductions:
            found.append(Stage(reductions, waits, Code(f"{code.name}_{here}", tuple(parameters), tuple(to_carry))))
        parameters += to_carry
    return tuple(found)


class Derivation:
    """What follows from a cell's function.

    alone, shared, hidden: names of the pre-activations of the input's product alone, of both products, of the state's alone.
    states:                names of the states; "h", if it is among them, is the output.
    weights:               names of the learned values.
    noise:                 names of the numbers that a call brings, which have no gradients.
    order:                 all of these in the order of the function's arguments.

    inputs:       names and nodes of the pre-activations, of the states before the step, and of the weights, in this order.
    before, after, kept: names and nodes; before and after: the states, without h in after. kept: what the step keeps beside
                  those, a slot each.
    reads_output: whether backward reads the step's output.
    reduces:      whether there are reductions over the units of a row. Then all pre-activations are kept, and nothing else:
                  each is read anyway, for the derivative of what it has been reduced to.
    """

    def __init__(
        self,
        name: str,
        function: Callable,
        alone: Sequence[str],
        shared: Sequence[str],
        hidden: Sequence[str],
        states: Sequence[str],
        weights: Sequence[str],
        noise: Sequence[str],
        order: Sequence[str],
    ) -> None:
        graph = Graph()
        symbols = {each: graph.argument(each) for each in order}
        results = function(**symbols)
        results = tuple(results) if isinstance(results, (tuple, list)) else (results,)
        carried = [state for state in states if state != "h"]
        if len(results) != 1 + len(carried):
            raise Refused(
                f"{len(results)} results, expected {1 + len(carried)}: the output" + "".join(f", {n}" for n in carried)
            )
        output, *after = (each if isinstance(each, Symbol) else _refuse_constant(each) for each in results)
        for each in (output, *after):
            graph.check_own(each)
        for each, result in zip(("output", *(f"state {state}" for state in carried)), (output, *after), strict=True):
            if result.is_condition:
                raise Refused(f"the {each} is a condition; write where(condition, 1, 0)")
        self.name, self._order = name, tuple(symbols.items())
        self.before = tuple((state, symbols[state]) for state in states)
        self.inputs = (*((each, symbols[each]) for each in (*alone, *shared, *hidden, *states, *weights)),)
        self.after = tuple((f"{state}_new", node) for state, node in zip(carried, after, strict=True))
        self._weights = self.inputs[len(self.inputs) - len(weights) :]
        self._noise = tuple((each, symbols[each]) for each in noise)
        self._output = ("h_new", output)
        self._seeds = tuple((f"d_{each}", graph.argument(f"d_{each}")) for each in ("h_new", *(n for n, _ in self.after)))
        seeds = [node for _, node in self._seeds]
        found = gradients([output, *after], seeds, [node for _, node in self.inputs])
        self._gradients = tuple((f"d_{each}", gradient) for (each, _), gradient in zip(self.inputs, found, strict=True))
        self._changes = tuple((f"change_{each}", graph.argument(f"change_{each}")) for each, _ in self.inputs)

        forward = {node.index for node in ancestors([output, *after])}
        for each, node in (*self.inputs, *self._noise):
            if node.index not in forward:
                raise Refused(f"{each} is not used: leave the argument out")
        at_hand = {node.index for _, node in (*self.before, *self.after, *self._weights, *self._noise, self._output)}
        self.reduces = any(node.operation in REDUCTIONS for node in ancestors([output, *after]))
        if self.reduces:
            kept = [symbols[each] for each in (*alone, *shared, *hidden)]
        else:
            kept = choose_kept(found, seeds, forward, at_hand)
        places = {node.index: place for place, (_, node) in enumerate(self.inputs)}
        kept.sort(key=lambda node: min(places[each.index] for each in ancestors([node]) if each.index in places))
        self.kept = labelled(kept, {*order, "h_new", *(each for each, _ in self.after)})
        given = {node.index for _, node in (*self.kept, *self.before, *self.after, *self._weights, *self._noise)}
        self.reads_output = output.index in {node.index for node in ancestors(found, given)} - given

    @property
    def definition(self) -> Code:
        """The cell's function itself, as it was traced."""
        return Code(self.name, self._order, (self._output, *self.after))

    @property
    def forward(self) -> Code:
        """(pre-activations..., states before..., weights..., noise...) -> (output, kept..., states after...)."""
        return Code(f"{self.name}_forward", (*self.inputs, *self._noise), (self._output, *self.kept, *self.after))

    @property
    def backward(self) -> Code:
        """(gradients of output and states after..., kept..., states after..., the output if it is read, states before...,
        weights..., noise...) -> gradients of (pre-activations..., states before..., weights...)."""
        output = (self._output,) if self.reads_output else ()
        parameters = *self._seeds, *self.kept, *self.after, *output, *self.before, *self._weights, *self._noise
        return Code(f"{self.name}_backward", parameters, self._gradients)

    @cached_property
    def forward_stages(self) -> tuple[Stage, ...]:
        """Of `forward` without what is kept, where there are reductions: pre-activations are in memory."""
        code = Code(self.forward.name, self.forward.parameters, (self._output, *self.after))
        return stages(code, {name for name, _ in self.kept})

    @cached_property
    def backward_stages(self) -> tuple[Stage, ...]:
        """Of `backward`, where there are reductions: what is kept is in memory, and so are the states after the step."""
        return stages(self.backward, {name for name, _ in (*self.kept, *self.after)})

    @cached_property
    def bend(self) -> Code:
        """(parameters of backward..., changes of pre-activations, states before and weights...) -> changes of its results."""
        by_index = {node.index: change for (_, node), (_, change) in zip(self.inputs, self._changes, strict=True)}
        found = changes([gradient for _, gradient in self._gradients], by_index)
        results = tuple((f"change_of_{name}", change) for (name, _), change in zip(self._gradients, found, strict=True))
        return Code(f"{self.name}_bend", (*self.backward.parameters, *self._changes), results)


def _refuse_constant(value: Any) -> Any:
    raise Refused(f"the result {value!r}: a cell returns values that are calculated from its arguments")


def labelled(nodes: Iterable[Symbol], taken: set[str]) -> tuple[tuple[str, Symbol], ...]:
    """Name each node by its operation and its argument, or by its index where that name is taken; an argument keeps its own."""
    found: dict[str, Symbol] = {}
    for node in nodes:
        single = len(node.inputs) == 1 and node.inputs[0].operation == "argument"
        name = f"{node.operation}_{node.inputs[0].operands[0] if single else node.index}"
        if name in taken or name in found:
            name = f"{node.operation}_{node.index}"
            while name in taken or name in found:
                name += "_"
        found[node.operands[0] if node.operation == "argument" else name] = node
    return tuple(found.items())


def choose_kept(
    found: Sequence[Value], seeds: Sequence[Symbol], forward: Collection[int], at_hand: Collection[int]
) -> list[Symbol]:
    """Choose the nodes that a step keeps for backward, at the least cost of keeping and of calculating again.

    A minimal cut finds it. A node is wanted or not. If it is, it is kept, which costs a SLOT, or calculated again, which costs
    its operation and makes its operands wanted.

    found, seeds: backward's results, and the gradients they are calculated from. forward: nodes that forward calculates, which
    alone can be kept. at_hand: nodes that backward has anyway.
    """
    of_seeds = {seed.index for seed in seeds}
    nodes = ancestors(found)
    for node in nodes:
        if any(each.index in of_seeds for each in node.inputs):
            of_seeds.add(node.index)
    wanted = [each for node in nodes if node.index in of_seeds for each in node.inputs]
    wanted = [each for each in (*wanted, *found) if isinstance(each, Symbol) and each.index not in of_seeds | set(at_hand)]
    edges: dict[Any, dict[Any, int]] = {"source": {}, "sink": {}}

    def edge(start: Any, end: Any, capacity: int) -> None:
        edges.setdefault(start, {})[end] = capacity
        edges.setdefault(end, {}).setdefault(start, 0)

    for node in wanted:
        edge("source", ("wanted", node.index), NEVER)
    candidates = [node for node in ancestors(wanted, at_hand) if node.index not in at_hand]
    for node in candidates:
        own, again = ("wanted", node.index), ("again", node.index)
        edge(own, again, SLOT if node.index in forward and node.operation not in CONDITIONS else NEVER)
        edge(again, "sink", NEVER if node.operation == "argument" else COSTS.get(node.operation, 1))
        for each in node.inputs:
            if each.index not in at_hand:
                edge(again, ("wanted", each.index), NEVER)
    reached = _source_side(edges)
    return [node for node in candidates if ("wanted", node.index) in reached and ("again", node.index) not in reached]


def _source_side(edges: dict[Any, dict[Any, int]]) -> dict[Any, Any]:
    """Find the source's side of a minimal cut (Edmonds and Karp 1972); `edges` are left with what no path can use."""
    while True:
        came: dict[Any, Any] = {"source": None}
        waiting = ["source"]
        for start in waiting:
            for end, capacity in edges[start].items():
                if capacity and end not in came:
                    came[end] = start
                    waiting.append(end)
        if "sink" not in came:
            return came
        path, end = [], "sink"
        while came[end] is not None:
            path.append((came[end], end))
            end = came[end]
        flow = min(edges[start][end] for start, end in path)
        for start, end in path:
            edges[start][end] -= flow
            edges[end][start] += flow
