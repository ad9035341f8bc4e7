"""Reductions over the units of a row, as layer norm has them, in a cell that Triton compiles.

In a single program they are sums over a tile's units. In a persistent launch each program knows some units. At each place where
a cell needs reductions (derive.Stage) it writes the moments of its own, meets the others at the barrier, and merges everybody's
in a fixed order (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances"). A
step has one more meeting at least, so nobody writes moments of the next step before all have read those of this one.

Values are float32 [UNITS, ROWS], what they are reduced to [1, ROWS].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..cells import Cell
from ..derive import Code, Printer, Stage, made
from ..symbols import REDUCTIONS, Symbol
from .barrier import arrive, wait


@triton.jit
def total(x, own):
    """The sum over units, of those that are `own`; others may be anything."""
    return tl.sum(tl.where(own, x, 0.0), 0)[None, :]


@triton.jit
def moments(values, own, count):
    """Mean, and sum of squared distances from it, of the `own` units' values, count of each."""
    mean = values[0]
    for i in tl.static_range(1, len(values)):
        mean += values[i]
    mean = total(mean, own) / (count * len(values))
    spread = (values[0] - mean) * (values[0] - mean)
    for i in tl.static_range(1, len(values)):
        spread += (values[i] - mean) * (values[i] - mean)
    return mean, total(spread, own)


@triton.jit
def in_program(values, UNITS: tl.constexpr):
    """The moments of all UNITS units of a row, which this program has."""
    own = (tl.arange(0, values[0].shape[0]) < UNITS)[:, None]
    return moments(values, own, UNITS)


@triton.jit
def row_mean(values, UNITS: tl.constexpr):
    return in_program(values, UNITS)[0]


@triton.jit
def row_rstd(values, eps, UNITS: tl.constexpr):
    return rstd(in_program(values, UNITS)[1], eps, UNITS * len(values))


@triton.jit
def rstd(spread, eps, count):
    """1 / sqrt(variance + eps), of count values' sum of squared distances from their mean."""
    return 1 / tl.sqrt_rn(spread / count + eps)


@triton.jit
def put(values, at, place, program, own, count, PROGRAMS: tl.constexpr):
    """Write the moments of this program's units as the group's number `at`."""
    mean, spread = moments(values, own, count)
    rows = tl.arange(0, mean.shape[1])[None, :]
    to = place + ((2 * at) * PROGRAMS + program) * mean.shape[1] + rows
    tl.store(to, mean)
    tl.store(to + PROGRAMS * mean.shape[1], spread)


@triton.jit
def take(
    at, place, ROWS: tl.constexpr, PROGRAMS: tl.constexpr, SIDE: tl.constexpr, BLOCKS: tl.constexpr, UNITS: tl.constexpr,
    HEAD: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Merge what all PROGRAMS (at most SIDE) have put there; BLOCKS of them share the HEAD units of a head out, UNITS each."""
    program = tl.arange(0, SIDE)[:, None]
    there = program < PROGRAMS
    count = tl.where(there, tl.minimum(HEAD - program % BLOCKS * UNITS, UNITS), 0).to(tl.float32) * VALUES
    whole = HEAD * (PROGRAMS // BLOCKS) * VALUES
    of = place + (2 * at * PROGRAMS + program) * ROWS + tl.arange(0, ROWS)[None, :]
    means = tl.load(of, mask=there, other=0.0, cache_modifier=".cg")
    spreads = tl.load(of + PROGRAMS * ROWS, mask=there, other=0.0, cache_modifier=".cg")
    mean = tl.sum(count * means, 0)[None, :] / whole
    return mean, tl.sum(spreads + count * (means - mean) * (means - mean), 0)[None, :]


@triton.jit
def meet(counter, met, gave_up, PROGRAMS: tl.constexpr):
    """All programs of the group meet, `met` of whose meetings are this one and those before."""
    arrive(counter)
    wait(counter, met.to(tl.int64) * PROGRAMS, gave_up)


_MORE = "place", "counter", "met", "gave_up", "program", "own", "count"
FUNCTIONS = {each.__name__: each for each in (row_mean, row_rstd, rstd, put, take, meet)}  # that the text below calls


def printer_of(units: int) -> type[Printer]:
    """Print a cell whose reductions are over so many units of one program."""

    class InProgram(Printer):
        def _expression(self, function: str, *operands: Any) -> tuple[str, int]:
            if function not in REDUCTIONS:
                return super()._expression(function, *operands)
            values, more = split(operands)
            named = [f"({', '.join(self._text(each)[0] for each in values)},)", *map(repr, more), str(units)]
            return f"{function}({', '.join(named)})", 7

    return InProgram


def split(operands: Sequence[Any]) -> tuple[list[Symbol], list[float]]:
    """Return the values that a reduction is of, and its numbers."""
    return [each for each in operands if isinstance(each, Symbol)], [each for each in operands if not isinstance(each, Symbol)]


def sets(cell: Cell, forward: bool) -> int:
    """Return of how many sets of values programs exchange moments in a step."""
    return sum(len(_sets(stage)) for stage in stages(cell, forward)) if cell.reduces else 0


def stages(cell: Cell, forward: bool) -> tuple[Stage, ...]:
    """Return what a pass does between one meeting and the next."""
    return cell.derived.forward_stages if forward else cell.derived.backward_stages


def _sets(stage: Stage) -> list[tuple[int, ...]]:
    """Return the sets of values, by their nodes' indices, whose moments a stage begins with."""
    return list(dict.fromkeys(tuple(each.index for each in split(node.operands)[0]) for _, node in stage.reductions))


class Reach(NamedTuple):
    """Which of a row's units a program has.

    head, heads: units of a head, and a layer's heads.
    units, rows: of a program.
    blocks:      programs that share the units of a head out; 0 where one has all units of the row.
    """

    head: int
    heads: int
    units: int
    rows: int
    blocks: int


def between_programs(cell: Cell, forward: bool, code: Code, names: dict[str, Any], reach: Reach) -> Any:
    """A pass of a cell as a Triton function that meets other programs.

    Its parameters and results are those of `code`; more parameters come last: where moments are exchanged, the counter of the
    group's meetings, how many there were before this step, the word of programs that gave up, the number of the program in
    its group, which units of its tile [UNITS, 1] are its own, and how many.
    """
    head, heads, units, rows, blocks = reach
    programs = blocks * heads
    shape = f"{rows}, {programs}, {1 << (programs - 1).bit_length()}, {blocks}, {units}, {head}"
    # names that no argument of a cell has
    place, counter, met, gave_up, program, own, count = (f"its__{name}" for name in _MORE)
    more = ", ".join((place, counter, met, gave_up, program, own, count))
    lines = [f"def {code.name}({', '.join(name for name, _ in code.parameters)}, {more}):"]
    functions, at, meeting = dict(names), 0, 0
    for number, stage in enumerate(stages(cell, forward)):
        by_index = {node.index: name for name, node in stage.code.parameters}
        found = _sets(stage)
        for k, each in enumerate(found, at):
            named = ", ".join(by_index[index] for index in each)
            lines.append(f"    put(({named},), {k}, {place}, {program}, {own}, {count}, {programs})")
        if found:
            meeting += 1
            lines.append(f"    meet({counter}, {met} + {meeting}, {gave_up}, {programs})")
        for k, each in enumerate(found, at):
            lines.append(f"    its__mean_{k}, its__spread_{k} = take({k}, {place}, {shape}, {len(each)})")
        for name, node in stage.reductions:
            values, numbers = split(node.operands)
            k = at + found.index(tuple(each.index for each in values))
            rstd = f"rstd(its__spread_{k}, {numbers[0]!r}, {head * heads * len(values)})" if numbers else ""
            lines.append(f"    {name} = {rstd or f'its__mean_{k}'}")
        at += len(found)
        if stage.code.results:
            function = f"its__stage_{number}"
            functions[function] = triton.jit(stage.code.bind(names))
            results = ", ".join(name for name, _ in stage.code.results)
            lines.append(f"    {results}, = {function}({', '.join(name for name, _ in stage.code.parameters)})")
    lines.append(f"    return {', '.join(name for name, _ in code.results)},")
    return triton.jit(made(code.name, "\n".join(lines) + "\n", functions))
