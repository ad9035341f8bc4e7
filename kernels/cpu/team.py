"""A thread's place in the team, the layout's addresses, and the barriers, as every kernel needs them."""

from __future__ import annotations

import numpy as np
from numba import from_dtype, njit, types
from numba.extending import intrinsic

from .plan import ARRIVALS_BYTES, FIELDS
from .product import fill_rows, options
from .vector import call, load_byte, load_int, store_int

RECORD = np.dtype([(name, np.int64) for name in FIELDS])
RECORD_BYTES = RECORD.itemsize
record_type = from_dtype(RECORD)


@intrinsic
def record_at(typing_context, address):
    """The record of FIELDS at `address`."""

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(record_type))

    return record_type(types.int64), codegen


@njit(**options)
def wait_team(p, rank):
    """Every thread of the team."""
    if p.threads > 1:
        call(p.wait, p.arrivals, rank, p.threads)


@njit(**options)
def wait_crew(p, member):
    """Every thread of this direction's or layer's crew."""
    size = p.row_groups * p.unit_groups
    if size > 1:
        call(p.wait, p.arrivals + ARRIVALS_BYTES * (p.threads + 2 * p.direction * p.crew_threads), member, size)


@njit(**options)
def wait_rows(p, member):
    """The threads that share this thread's rows."""
    size = p.unit_groups
    if size > 1:
        group = member // size
        first = p.threads + (2 * p.direction + 1) * p.crew_threads + group * size
        call(p.wait, p.arrivals + ARRIVALS_BYTES * first, member % size, size)


@njit(**options)
def wait_group(p, member):
    """The threads that share this thread's rows, unless each has whole heads, of which none reads what another has done."""
    if p.heads % p.unit_groups != 0:
        wait_rows(p, member)


@njit(**options)
def share(count, parts, index):
    """First of `count` things that part `index` of `parts` takes."""
    return count * index // parts


@njit(**options)
def head_of(p, panel):
    """The head that a panel is of. Steps ask, and few layers have several: the others do without the division."""
    return panel // p.head_panels if p.heads > 1 else 0


@njit(**options)
def head_depth(p):
    """Numbers of h that a head's product reads."""
    return p.head_units if p.heads > 1 else p.output_size


@njit(**options)
def first_unit(p, panel, panel_units):
    """First unit of a panel, each of panel_units but for the last one of a head."""
    head = head_of(p, panel)
    return head * p.head_units + (panel - head * p.head_panels) * panel_units


@njit(**options)
def end_unit(p, panel):
    """First unit past the head that a panel is of."""
    return (head_of(p, panel) + 1) * p.head_units


@njit(**options)
def there_and_back(step, first, last, index):
    """The panels first .. last-1, up in one step and down in the next: what a cache can't hold all of, it holds in part."""
    return first + last - 1 - index if step % 2 else index


@njit(**options)
def active_rows(p, t):
    """Rows of the batch that have a step t."""
    return load_int(p.batch_sizes + 8 * t) if p.batch_sizes else p.batch


@njit(**options)
def step_base(p, t):
    """What p.x_step and p.y_step are multiplied with: rows before step t if packed, else t."""
    return load_int(p.offsets + 8 * t) if p.packed else t


@njit(**options)
def first_row(p, t):
    """Rows before step t, counting in steps."""
    return load_int(p.offsets + 8 * t) if p.offsets else t * p.batch


@njit(**options)
def row_at(p, b):
    """Where row b of the batch lies among its rows."""
    return load_int(p.order + 8 * b) if p.order else b


@njit(**options)
def fill_step(p, table, r0, count, first, stride):
    """Write the addresses of rows r0 .. r0+count-1 of a step to `table`: the rows of the batch lie `stride` apart from `first`
    on."""
    if p.order:
        for i in range(count):
            store_int(table + 8 * i, first + load_int(p.order + 8 * (r0 + i)) * stride)
    else:
        fill_rows(table, count, first + r0 * stride, stride)


@njit(**options)
def kept_base(p, t):
    """The row of `saved` that step t of the batch's first row has."""
    return t * p.batch if p.order else first_row(p, t)


@njit(**options)
def begins_anew(p, t, b):
    """Do the states before step t of row b go back to those that resets go back to?"""
    return p.resets != 0 and load_byte(p.resets + step_base(p, t) * p.resets_step + row_at(p, b) * p.resets_row) != 0


@njit(**options)
def split_row(p, group):
    """First row of the batch that row group `group` takes: equal numbers of steps, not of rows, where they differ."""
    if not p.batch_sizes:
        return share(p.batch, p.row_groups, group)
    target = share(p.rows, p.row_groups, group)
    row, steps, t = 0, 0, p.steps
    while row < p.batch and steps < target:
        while t > 0 and load_int(p.batch_sizes + 8 * (t - 1)) <= row:
            t -= 1
        steps += t
        row += 1
    return p.batch if group == p.row_groups else row
