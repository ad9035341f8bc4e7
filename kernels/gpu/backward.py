"""A layer's backward scan: from the outputs' gradients to those of every pre-activation and of the initial states.

Letters and layouts as in forward.py; further

    dy       like y
    dh_n     [D, B, R], the final state's gradient
    saved    [D, N, W] as forward left `kept`
    da       [D, N, P*H] step-major, out: gradients of the P pre-activations in the cell's order, from which those of the
             weights and of x follow in one product each; programs read each other's
    dp       [D, N, R], out where PROJECTED: gradients of the projection's output; programs read each other's
    dh0      [D, B, R], out
    carry    [D, B, H] float32: the gradient that enters element by element (of c; for GRU what reached h past the gates),
             the final state's first, in the end the initial one's

Step s of a program first takes dh, the product of W_hh^T with `da` of the step before, then goes through the cell. So there
are steps 0...T: in step 0 no row has a step before it, in step T none has one of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .barrier import arrive, wait
from .tile import diagonal, load_tiles, product, released, resident_weights, row_index, stack, store_tiles


@triton.jit
def kept_values(
    saved, y, h0, c0, offsets, t, here, length, steps, backwards, d, rows, units, units_ok, T, B, N,
    SLOTS: tl.constexpr, CARRY: tl.constexpr, D: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    PACKED: tl.constexpr, BATCH_FIRST: tl.constexpr,
):  # fmt: skip
    """What forward kept of step t for the rows that are `here`: slots or output, and p, float32 [UNITS, ROWS] each."""
    ok = units_ok[:, None] & here[None, :]
    before = tl.minimum(tl.maximum(tl.where(backwards, t + 1, t - 1), 0), steps - 1)
    joined = tl.where(backwards, t + 1 < length, t > 0)  # had the row a step before this one?
    if SLOTS == 0:
        at = y + row_index(t, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * H) + d * H  # [ROWS]
        values = load_tiles(at[None, :] + units[:, None], ok, 1, H)
    else:
        at = saved + (d * N + row_index(t, rows, offsets, T, B, PACKED, False)) * W
        values = load_tiles(at[None, :] + units[:, None], ok, SLOTS, H)
    if CARRY == "cell":
        after = saved + (d * N + row_index(before, rows, offsets, T, B, PACKED, False)) * W + (SLOTS - 1) * H
        at = tl.where(joined, after, c0 + (d * B + rows) * H)
        return values + load_tiles(at[None, :] + units[:, None], ok, 1, H)
    elif CARRY == "hidden":
        after = y + row_index(before, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * H) + d * H
        at = tl.where(joined, after, h0 + (d * B + rows) * H)
        return values + load_tiles(at[None, :] + units[:, None], ok, 1, H)
    else:
        return values


@triton.jit(do_not_specialize=["T", "B", "N", "first_row", "begin", "end"])
def scan_backward(
    saved, y, dy, da, dp, h0, c0, dh_n, dh0, carry, w_hh, w_hr, lengths, offsets, counters, gave_up,
    w_hh_step: tl.int64, w_hr_step: tl.int64,
    T, B, N, first_row, begin, end,
    CELL: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr, SLOTS: tl.constexpr, CARRY: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    PACKED: tl.constexpr, BATCH_FIRST: tl.constexpr, REVERSE: tl.constexpr, PROJECTED: tl.constexpr,
    BLOCKS: tl.constexpr, UNITS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
    PHASE: tl.constexpr, SYNC: tl.constexpr,
):  # fmt: skip
    """Steps begin...end of T + 1. Grid: BLOCKS * D * blocks of rows.

    PHASE:    "state" or "cell", one half of a projected step, or "both".
    DIAGONAL: the product is of every gate with every other, see tile.py.
    SYNC:     as in forward.
    """
    P: tl.constexpr = HIDDEN + GATES
    pid = tl.program_id(0)
    block, group = pid % BLOCKS, pid // BLOCKS
    d, first = (group % D).to(tl.int64), first_row + (group // D) * ROWS
    counter = counters + group * 16
    backwards = (d == 1) != REVERSE
    rows = first + tl.arange(0, ROWS)  # [ROWS]
    rows_ok = rows < B
    length = tl.load(lengths + rows, mask=rows_ok, other=0).to(tl.int32) if PACKED else tl.where(rows_ok, T, 0)  # [ROWS]
    steps = tl.load(lengths + first).to(tl.int32) if PACKED else T  # rows are sorted: its first row's
    stop = tl.minimum(end, steps + 1)

    units = block * UNITS + tl.arange(0, UNITS)  # [UNITS]
    units_ok = units < H
    outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)  # [OUTPUTS]; without projection these are the units
    outputs_ok = outputs < R
    # the product's rows are outputs, its columns batch rows; or both with gates, a column's gate changing slowest
    SIDE: tl.constexpr = (4 if GATES == 3 else GATES) if DIAGONAL else 1
    K: tl.constexpr = H if DIAGONAL else GATES * H
    stacked = tl.arange(0, OUTPUTS * SIDE)  # [OUTPUTS * SIDE]
    output, gate = block * OUTPUTS + stacked // SIDE, stacked % SIDE
    a_ok = (output < R) & (gate < GATES)
    a_rows = w_hh + d * w_hh_step + gate.to(tl.int64) * (H * R) + output
    chunks = resident_weights(a_rows, a_ok, K, R, BK, SPLIT, RESIDENT and PHASE != "cell")
    columns = tl.arange(0, SIDE * ROWS)  # [SIDE * ROWS]
    column_gate, column_rows = columns // ROWS, first + columns % ROWS
    columns_ok = (column_rows < B) & (column_gate < GATES)
    if PACKED:
        column_length = tl.load(lengths + column_rows, mask=columns_ok, other=0).to(tl.int32)
    else:
        column_length = tl.where(columns_ok, T, 0)
    r_rows = w_hr + d * w_hr_step + units

    state_at = (d * B + rows)[None, :] * H + units[:, None]  # [UNITS, ROWS]
    state_ok = units_ok[:, None] & rows_ok[None, :]
    n_at = (d * B + rows)[None, :] * R + outputs[:, None]  # [OUTPUTS, ROWS]
    n_ok = outputs_ok[:, None] & rows_ok[None, :]
    final = tl.load(dh_n + n_at, mask=n_ok, other=0.0).to(tl.float32)
    dc = tl.zeros((UNITS, ROWS), tl.float32)
    if (CARRY != "none" and PHASE != "state") or CARRY == "hidden":
        dc = tl.load(carry + state_at, mask=state_ok, other=0.0)

    # what a step needs from memory, and does not wait for, is loaded in the step before
    t = tl.where(backwards, begin, steps - 1 - begin)
    at = tl.minimum(tl.maximum(t, 0), steps - 1)
    here = (t < length) & (begin < steps)
    values = kept_values(
        saved, y, h0, c0, offsets, at, here, length, steps, backwards, d, rows, units, units_ok, T, B, N,
        SLOTS, CARRY, D, H, W, PACKED, BATCH_FIRST,
    )  # fmt: skip
    dy_rows = dy + row_index(at, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R  # [ROWS]
    dys = load_tiles(dy_rows[None, :] + outputs[:, None], outputs_ok[:, None] & here[None, :], 1, 0)
    own = row_index(at, rows, offsets, T, B, PACKED, False)  # [ROWS]
    before = tl.minimum(tl.maximum(tl.where(backwards, t - 1, t + 1), 0), steps - 1)
    state = da + HIDDEN * H + column_gate * H  # [SIDE * ROWS]
    da_before = state + (d * N + row_index(before, column_rows, offsets, T, B, PACKED, False)) * (P * H)

    for s in tl.range(begin, stop, num_stages=1):
        t = tl.where(backwards, s, steps - 1 - s)
        before = tl.where(backwards, t - 1, t + 1)
        came = (before < length) & (s > 0)  # [ROWS]; was there a step before this one?
        active = (t < length) & (s < steps)  # [ROWS]
        da_rows = da + (d * N + own) * (P * H)  # [ROWS]
        dp_rows = dp + (d * N + own) * R  # [ROWS]
        if PHASE != "cell":
            dh = product(
                chunks, a_rows, a_ok, da_before, (before < column_length) & (s > 0), K, R, OUTPUTS * SIDE, SIDE * ROWS,
                BK, SPLIT, RESIDENT, STAGES, PRECISION,
            )  # fmt: skip
            dh = diagonal(dh, OUTPUTS, SIDE, ROWS) if DIAGONAL else released(dh)
            if CARRY == "hidden":
                dh += dc
            dh = tl.where(came[None, :], dh, final)  # [OUTPUTS, ROWS]
            leaving = came & (active == 0)
            tl.store(dh0 + n_at, dh.to(dh0.dtype.element_ty), mask=n_ok & leaving[None, :])
            dh += dys[0]
            if PROJECTED:
                at_dp = dp_rows[None, :] + outputs[:, None]
                tl.store(at_dp, dh.to(dp.dtype.element_ty), mask=outputs_ok[:, None] & active[None, :])
            if SYNC and PROJECTED:
                arrive(counter)
                wait(counter, (2 * (s - begin) + 1).to(tl.int64) * BLOCKS, gave_up)
        if PHASE != "state":
            if PROJECTED:
                dh = product((), r_rows, units_ok, dp_rows, active, R, H, UNITS, ROWS, BK, SPLIT, False, STAGES, PRECISION)
                dh = released(dh)
            grads = CELL(dh, dc, *values) if CARRY == "cell" else CELL(dh, *values)
            store_tiles(da_rows[None, :] + units[:, None], grads, units_ok[:, None] & active[None, :], 0, P, H)
            if SYNC:
                arrive(counter)
            if CARRY != "none":
                dc = tl.where(active[None, :], grads[P], dc)

        if SYNC:
            da_before = state + (d * N + row_index(at, column_rows, offsets, T, B, PACKED, False)) * (P * H)
            t = tl.where(backwards, s + 1, steps - 2 - s)
            at = tl.minimum(tl.maximum(t, 0), steps - 1)
            here = (t < length) & (s + 1 < steps)
            values = kept_values(
                saved, y, h0, c0, offsets, at, here, length, steps, backwards, d, rows, units, units_ok, T, B, N,
                SLOTS, CARRY, D, H, W, PACKED, BATCH_FIRST,
            )  # fmt: skip
            dy_rows = dy + row_index(at, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R
            dys = load_tiles(dy_rows[None, :] + outputs[:, None], outputs_ok[:, None] & here[None, :], 1, 0)
            own = row_index(at, rows, offsets, T, B, PACKED, False)
            wait(counter, (s - begin + 1).to(tl.int64) * (1 + PROJECTED) * BLOCKS, gave_up)
    if CARRY != "none" and PHASE != "state":
        tl.store(carry + state_at, dc, mask=state_ok)


@triton.jit(do_not_specialize=["T", "B", "N"])
def single_backward(
    saved, y, dy, da, dp, h0, c0, dh_n, dh0, carry, w_hh, w_hr, lengths, offsets,
    w_hh_step: tl.int64, w_hr_step: tl.int64,
    T, B, N,
    CELL: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr, SLOTS: tl.constexpr, CARRY: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    PACKED: tl.constexpr, BATCH_FIRST: tl.constexpr, REVERSE: tl.constexpr, PROJECTED: tl.constexpr,
    UNITS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All steps of ROWS rows in one program, which holds every unit and the states' gradients. Grid: D * blocks of rows."""
    P: tl.constexpr = HIDDEN + GATES
    pid = tl.program_id(0)
    d, first = (pid % D).to(tl.int64), (pid // D) * ROWS
    backwards = (d == 1) != REVERSE
    rows = first + tl.arange(0, ROWS)  # [ROWS]
    rows_ok = rows < B
    length = tl.load(lengths + rows, mask=rows_ok, other=0).to(tl.int32) if PACKED else tl.where(rows_ok, T, 0)  # [ROWS]
    steps = tl.load(lengths + first).to(tl.int32) if PACKED else T

    units = tl.arange(0, UNITS)  # [UNITS]
    units_ok = units < H
    outputs = tl.arange(0, OUTPUTS)  # [OUTPUTS]; without projection these are the units
    outputs_ok = outputs < R
    PADDED: tl.constexpr = 4 if GATES == 3 else GATES
    stacked = tl.arange(0, PADDED * UNITS)  # [PADDED * UNITS], gate-major
    gate, unit = stacked // UNITS, stacked % UNITS
    at = w_hh + d * w_hh_step + (gate * H + unit)[None, :] * R + outputs[:, None]
    w = tl.load(at, mask=outputs_ok[:, None] & ((gate < GATES) & (unit < H))[None, :], other=0.0)  # [OUTPUTS, PADDED * UNITS]
    if PROJECTED:
        at = w_hr + d * w_hr_step + outputs[None, :] * H + units[:, None]
        proj = tl.load(at, mask=units_ok[:, None] & outputs_ok[None, :], other=0.0)  # [UNITS, OUTPUTS]

    state_at = (d * B + rows)[None, :] * H + units[:, None]  # [UNITS, ROWS]
    state_ok = units_ok[:, None] & rows_ok[None, :]
    n_at = (d * B + rows)[None, :] * R + outputs[:, None]  # [OUTPUTS, ROWS]
    n_ok = outputs_ok[:, None] & rows_ok[None, :]
    dh = tl.load(dh_n + n_at, mask=n_ok, other=0.0).to(tl.float32)
    dc = tl.zeros((UNITS, ROWS), tl.float32)
    if CARRY != "none":
        dc = tl.load(carry + state_at, mask=state_ok, other=0.0)

    # loaded a step ahead
    t = tl.where(backwards, 0, steps - 1)
    values = kept_values(
        saved, y, h0, c0, offsets, t, t < length, length, steps, backwards, d, rows, units, units_ok, T, B, N,
        SLOTS, CARRY, D, H, W, PACKED, BATCH_FIRST,
    )  # fmt: skip
    dy_rows = dy + row_index(t, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R  # [ROWS]
    dys = load_tiles(dy_rows[None, :] + outputs[:, None], outputs_ok[:, None] & (t < length)[None, :], 1, 0)

    for s in tl.range(0, steps, num_stages=1):
        t = tl.where(backwards, s, steps - 1 - s)
        active = t < length  # [ROWS]
        now, d_out = values, dh + dys[0]
        ahead = tl.minimum(tl.maximum(tl.where(backwards, t + 1, t - 1), 0), steps - 1)
        here = (ahead < length) & (s + 1 < steps)
        values = kept_values(
            saved, y, h0, c0, offsets, ahead, here, length, steps, backwards, d, rows, units, units_ok, T, B, N,
            SLOTS, CARRY, D, H, W, PACKED, BATCH_FIRST,
        )  # fmt: skip
        dy_rows = dy + row_index(ahead, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R
        dys = load_tiles(dy_rows[None, :] + outputs[:, None], outputs_ok[:, None] & here[None, :], 1, 0)

        own = d * N + row_index(t, rows, offsets, T, B, PACKED, False)  # [ROWS]
        if PROJECTED:
            dp_rows = dp + own * R
            d_proj = d_out.to(dp.dtype.element_ty)
            tl.store(dp_rows[None, :] + outputs[:, None], d_proj, mask=outputs_ok[:, None] & active[None, :])
            d_out = released(tl.dot(proj, d_proj, input_precision=PRECISION))  # [UNITS, ROWS]
        grads = CELL(d_out, dc, *now) if CARRY == "cell" else CELL(d_out, *now)
        da_rows = da + own * (P * H)
        store_tiles(da_rows[None, :] + units[:, None], grads, units_ok[:, None] & active[None, :], 0, P, H)
        d_hidden = stack(grads, HIDDEN, GATES, UNITS, ROWS).to(da.dtype.element_ty)
        new = released(tl.dot(w, d_hidden, input_precision=PRECISION))  # [OUTPUTS, ROWS]
        if CARRY == "hidden":
            new += grads[P]
        if CARRY == "cell":
            dc = tl.where(active[None, :], grads[P], dc)
        dh = tl.where(active[None, :], new, dh)
    tl.store(dh0 + n_at, dh.to(dh0.dtype.element_ty), mask=n_ok)
    if CARRY == "cell":
        tl.store(carry + state_at, dc, mask=state_ok)


@triton.jit(do_not_specialize=["T", "B", "blocks", "d"])
def states_before(
    before, y, h0, lengths, offsets, T, B, blocks, d,
    D: tl.constexpr, R: tl.constexpr, PACKED: tl.constexpr, BATCH_FIRST: tl.constexpr, BACKWARDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """before [N, R], the state that each step of direction d began with. Grid: T * blocks of rows, blocks of columns."""
    pid = tl.program_id(0)
    t, rows = pid // blocks, (pid % blocks) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    length = tl.load(lengths + rows, mask=rows < B, other=0).to(tl.int32) if PACKED else tl.where(rows < B, T, 0)  # [ROWS]
    ok = (t < length)[:, None] & (columns < R)[None, :]  # [ROWS, COLUMNS]
    earlier = t + 1 if BACKWARDS else t - 1
    joined = earlier < length if BACKWARDS else tl.where(rows < B, t > 0, False)
    at = tl.minimum(tl.maximum(earlier, 0), T - 1)
    after = y + row_index(at, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R  # [ROWS]
    states = tl.where(joined, after, h0 + rows.to(tl.int64) * R)
    values = tl.load(states[:, None] + columns[None, :], mask=ok, other=0.0)
    own = before + row_index(t, rows, offsets, T, B, PACKED, False) * R  # [ROWS]
    tl.store(own[:, None] + columns[None, :], values, mask=ok)
