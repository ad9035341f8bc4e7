"""What a cell with reductions does with a step's rows after its product: stage by stage (derive.Stage), all units of a row.

A reduction's operands lie in memory, those that other threads have written too. Where threads share rows they meet before a
stage whose reductions read what they have just written; then each of them reduces whole rows by itself, all in the same order.
So the result has the same bits on any team, and a reduction takes one meeting. A thread that has its rows for itself goes
through all stages of one row before the next: what one stage carries on to the next is then in its L1 cache, where all rows
have the same place for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numba import njit

from ..derive import Stage
from .elementary import elementary, make_writer, over_vectors
from .processor import Target
from .product import options
from .vector import VectorLibrary

Place = tuple[str, int]  # "kept" or "carried", and which of the row's numbers there: each is hidden_size numbers


def carried_values(stages: Sequence[Stage]) -> int:
    """Count what stages carry on, of each unit."""
    return sum(len(stage.code.results) for stage in stages[:-1])


def row_values(stages: Sequence[Stage]) -> int:
    """Count the results of reductions, of a row."""
    return sum(len(stage.reductions) for stage in stages)


def make_stages(
    stages: Sequence[Stage], kept: Mapping[str, int], first_carried: int, v: VectorLibrary, target: Target, tools: Sequence[Any]
):
    """run(context, rows, units, between): all stages of some rows, for this thread's units.

    kept:          which of a row's kept numbers a parameter of the pass is.
    first_carried: numbers of each unit of a row that lie before those that are carried.
    tools:         (read, keep, kept_row, wait), with read(context, i, unit, n) -> the parameters of the pass of a vector of
                   units of row i, keep(context, i, unit, n, results), kept_row(context, i) -> the address of what is kept, and
                   wait(context), for the threads that share the rows.

    rows: (first, end). units: (first, end, hidden_size). between: addresses of what is carried, of the first row, and of a
    thread's own place for the results of reductions, and the bytes from one row to the next of each, which are 0 where rows
    come one after the other.
    """
    if not stages:
        return njit(lambda context, rows, units, between: None, **options)
    read, keep, kept_row, wait = tools
    size, lanes, vector = v.size, v.lanes, v.lanes * v.size
    load, load_all, writer = v.load, v.load_all, make_writer(v)
    places: dict[int, Place] = {node.index: ("kept", kept[name]) for name, node in stages[0].code.parameters if name in kept}
    values: dict[int, int] = {}

    def extra_reader(extras: Sequence[Place]):
        """read(row, stride, own, n): what stages before have carried of a vector of units, and what was reduced."""
        if not extras:
            return njit(lambda row, stride, own, n: (), **options)
        before, (where, place) = extra_reader(extras[:-1]), extras[-1]
        if where == "value":
            return njit(lambda row, stride, own, n: before(row, stride, own, n) + (load_all(own + place * vector),), **options)
        return njit(lambda row, stride, own, n: before(row, stride, own, n) + (load(row + place * stride, n),), **options)

    def runner(index: int, extras: list[Place]):
        """run, up to this stage."""
        stage, is_last = stages[index], index + 1 == len(stages)
        before = runner(index - 1, extras) if index else njit(lambda context, rows, units, between: None, **options)
        first = first_carried + sum(place[0] == "carried" for place in extras)
        for _, node in stage.reductions:
            values[node.index] = len(values)
            extras.append(("value", values[node.index]))
        means_first = sorted(stage.reductions, key=lambda reduction: reduction[1].operation != "row_mean")  # they wait less
        reduce = reducer(means_first, places, values, v, target)
        read_extras = extra_reader(tuple(extras))
        calculate, _ = over_vectors(stage.code, v, target)
        count = 0 if is_last else len(stage.code.results)
        carry = writer(range(first, first + count), range(count))
        if not is_last:
            for place, (_, node) in enumerate(stage.code.results, first):
                places[node.index] = "carried", place
                extras.append(("carried", place))
        waits = stage.waits

        @njit(**options)
        def finish(context, i, row, unit, n, stride, results):
            carry(row + unit * size, stride, results, n)
            if is_last:
                keep(context, i, unit, n, results)

        @njit(**options)
        def run(context, rows, units, between):
            before(context, rows, units, between)
            if waits:
                wait(context)
            unit0, end, hidden = units
            carried, own, row_bytes, own_bytes = between
            stride = hidden * size
            for i in range(rows[0], rows[1]):
                row, reduced = carried + i * row_bytes, own + i * own_bytes
                reduce(kept_row(context, i), row, reduced, hidden)
                for unit in range(unit0, end, lanes):  # of two vectors at a time the numbers would not fit the registers
                    n = end - unit
                    given = read(context, i, unit, n) + read_extras(row + unit * size, stride, reduced, n)
                    finish(context, i, row, unit, n, stride, calculate(given))

        return run

    return runner(len(stages) - 1, [])


def reducer(
    reductions: Sequence[tuple[str, Any]],
    places: Mapping[int, Place],
    values: Mapping[int, int],
    v: VectorLibrary,
    target: Target,
):
    """reduce(kept, carried, own, hidden): these reductions of a row, each in all lanes of a vector at its place in `own`."""
    if not reductions:
        return njit(lambda kept, carried, own, hidden: None, **options)
    before, (_, node) = reducer(reductions[:-1], places, values, v, target), reductions[-1]
    size, lanes, vector = v.size, v.lanes, v.lanes * v.size
    load, store_all, zero, over_lanes = v.load, v.store_all, v.zero, v.over_lanes
    sqrt = elementary(v.type, target)["sqrt"]
    operands, place = tuple(places[each.index] for each in node.inputs), values[node.index]
    eps, count = node.operands[-1], len(operands)
    means = {
        tuple(places[each.index] for each in other.inputs): values[other.index]
        for _, other in reductions[:-1]
        if other.operation == "row_mean"
    }
    mean_known, mean_place = operands in means, means.get(operands, place)

    def adder(operands: Sequence[Place], squared: bool):
        """add(kept, carried, stride, mean, n): the sum of a unit's values, or of the squares of what they are off the mean."""
        before = adder(operands[:-1], squared) if len(operands) > 1 else None
        number, of_kept = operands[-1][1], operands[-1][0] == "kept"

        @njit(**options)
        def own(kept, carried, stride, mean, n):
            value = load((kept if of_kept else carried) + number * stride, n)
            if squared:
                value = value - load(mean, n)  # zero in the lanes past the last unit, as the value is
                return value * value
            return value

        if before is None:
            return own
        return njit(
            lambda kept, carried, stride, mean, n: before(kept, carried, stride, mean, n) + own(kept, carried, stride, mean, n),
            **options,
        )

    add, add_squares = adder(operands, False), adder(operands, True)

    @njit(**options)
    def mean_over(kept, carried, hidden):
        total = zero()
        for unit in range(0, hidden, lanes):
            at = unit * size
            total = total + add(kept + at, carried + at, hidden * size, 0, hidden - unit)
        return over_lanes(total) / (count * hidden)

    @njit(**options)
    def variance_over(kept, carried, hidden, mean):
        total = zero()
        for unit in range(0, hidden, lanes):
            at = unit * size
            total = total + add_squares(kept + at, carried + at, hidden * size, mean, hidden - unit)
        return over_lanes(total) / (count * hidden)

    if node.operation == "row_mean":

        @njit(**options)
        def reduce(kept, carried, own, hidden):
            before(kept, carried, own, hidden)
            store_all(own + place * vector, mean_over(kept, carried, hidden))

    else:

        @njit(**options)
        def reduce(kept, carried, own, hidden):
            before(kept, carried, own, hidden)
            mean = own + mean_place * vector
            if not mean_known:
                store_all(mean, mean_over(kept, carried, hidden))
            store_all(own + place * vector, 1 / sqrt(variance_over(kept, carried, hidden, mean) + eps))

    return reduce
