"""A layer's backward scan: from the outputs' gradients to those of every pre-activation and of the initial states.

Letters and layouts as in forward.py; further

    dy       like y
    dh_n     [D, B, R], the final state's gradient
    saved    [D, N, W] as forward left `kept`
    da       [D, N, P*H] step-major, out: gradients of the P pre-activations in the cell's order, from which those of the
             weights and of x follow in one product each; programs read each other's
    dp       [D, N, R], out where PROJECTED: gradients of the projection's output; programs read each other's
    dh0      [D, B, R], out
    carry    [D, B, C*H] float32: gradients of the states but h, the final ones' first, in the end the initial ones'; sums over
             a row's steps of those of the cell's own weights, zeros first; and in scans, where the cell reads h, what reached
             it past the gates
    b_ih     [D, ...], which has the cell's own weights behind the biases
    h0       as it is, with a mask or without
    dc_steps [D, N, S*H], gradients of the states but h after each step, of callers who read these; only where DC_STEPS
    sums_h   [D, B, R] and sums_c [D, B, STATES*H], float32: what resets take of the gradients of the states before them

Step s of a program first takes dh, the product of W_hh^T with `da` of the step before, then goes through the cell. So there
are steps 0...T: in step 0 no row has a step before it, in step T none has one of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .barrier import arrive, wait
from .tile import (
    added,
    begins_anew,
    diagonal,
    load_tiles,
    product,
    released,
    replaced,
    resident_weights,
    row_index,
    scaled,
    stack,
    step_noise,
    steps_of_rows,
    store_tiles,
    zeros,
)
from .wavefront import feed


@triton.jit
def kept_values(
    saved, y, h0, c0, offsets, t, here, length, steps, backwards, d, rows, units, units_ok, T, B, N,
    STATES: tl.constexpr, READS: tl.constexpr, KEPT: tl.constexpr, SLOTS: tl.constexpr, OUTPUT: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PACKED: tl.constexpr, BATCH_FIRST: tl.constexpr,
    PROJECTED: tl.constexpr, anew, RESETS: tl.constexpr,
):  # fmt: skip
    """What is there of step t for the rows that are `here`, as the cell takes it, float32 [UNITS, ROWS] each. y: of the side.

    What was kept, the states after the step, the output if OUTPUT, the states before the step, h the last.
    """
    ok = units_ok[:, None] & here[None, :]
    before = tl.minimum(tl.maximum(tl.where(backwards, t + 1, t - 1), 0), steps - 1)
    joined = tl.where(backwards, t + 1 < length, t > 0)  # had the row a step before this one?
    if RESETS:
        joined = joined & (anew == 0)
    own = row_index(t, rows, offsets, T, B, PACKED, False)  # [ROWS]
    slots = saved + (d * N + own) * W  # [ROWS]
    states = (SLOTS - STATES) * H  # of a row the first column that has them
    values = load_tiles(slots[None, :] + units[:, None], ok, KEPT, H)
    values = values + load_tiles(slots[None, :] + states + units[:, None], ok, STATES, H)
    if OUTPUT:
        if PROJECTED:
            at = slots + SLOTS * H
        else:
            at = y + row_index(t, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * H)
        values = values + load_tiles(at[None, :] + units[:, None], ok, 1, H)
    if STATES:
        after = saved + (d * N + row_index(before, rows, offsets, T, B, PACKED, False)) * W + states
        at = tl.where(joined, after, c0 + (d * B + rows) * (STATES * H))
        values = values + load_tiles(at[None, :] + units[:, None], ok, STATES, H)
    if READS:
        after = y + row_index(before, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * H)
        at = tl.where(joined, after, h0 + (d * B + rows) * H)
        values = values + load_tiles(at[None, :] + units[:, None], ok, 1, H)
    return values


@triton.jit
def step_gradients(dc_steps, own, units, ok, DC_STEPS: tl.constexpr, STATES: tl.constexpr, H: tl.constexpr):
    """Of the sequence's rows `own` [ROWS] what comes in for the states but h, float32 [UNITS, ROWS] each, if anything does."""
    if DC_STEPS:
        return load_tiles(dc_steps + (own * (STATES * H))[None, :] + units[:, None], ok, STATES, H)
    else:
        return ()


@triton.jit
def carried(grads, active, dc, P: tl.constexpr, STATES: tl.constexpr, READS: tl.constexpr, WEIGHTS: tl.constexpr):
    """Of `carry` the gradients of states and the weights' sums after a step, where rows are active, else as before."""
    after = replaced(grads, P, STATES, active, dc)
    for k in tl.static_range(WEIGHTS):
        sums = dc[STATES + k]
        after = after + (tl.where(active, sums + grads[P + STATES + READS + k], sums),)
    return after


@triton.jit(do_not_specialize=["T", "B", "N", "first_row", "begin", "end"])
def scan_backward(
    saved, y, ys, dy, dys, da, dp, h0, c0, dh_n, dh0, carry, sums_h, sums_c, w_ih, w_hh, w_hr, b_ih, lengths, offsets, resets,
    counters, gave_up, mask, noise, moments, dc_steps,
    w_ih_step: tl.int64, w_hh_step: tl.int64, w_hr_step: tl.int64, b_ih_step: tl.int64, noise_t: tl.int64, noise_b: tl.int64,
    T, B, N, first_row, begin, end,
    CELL: tl.constexpr, GATES: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, STATES: tl.constexpr,
    READS: tl.constexpr, WEIGHTS: tl.constexpr, NOISE: tl.constexpr, KEPT: tl.constexpr, SLOTS: tl.constexpr,
    OUTPUT: tl.constexpr, D: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, RESETS: tl.constexpr, MASKED: tl.constexpr,
    DC_STEPS: tl.constexpr, BATCH_FIRST: tl.constexpr, REVERSE: tl.constexpr, PROJECTED: tl.constexpr,
    MEETINGS: tl.constexpr, SETS: tl.constexpr, BLOCKS: tl.constexpr, UNITS: tl.constexpr, OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr, DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
    SPAN: tl.constexpr, FEED: tl.constexpr, PHASE: tl.constexpr, SYNC: tl.constexpr,
):  # fmt: skip
    """Steps begin...end of T + 1. Grid: BLOCKS * HEADS * D * LAYERS * blocks of rows.

    OUTPUT:    the cell's backward reads its output.
    PHASE:     "state" or "cell", one half of a projected step, or "both".
    DIAGONAL:  the product is of every gate with every other, see tile.py.
    SPAN, FEED, SYNC: as in forward.
    """
    P: tl.constexpr = HIDDEN + GATES
    CARRIED: tl.constexpr = STATES + READS + WEIGHTS
    HEAD: tl.constexpr = H // HEADS  # units of a head
    WIDTH: tl.constexpr = R // HEADS  # of its weights
    pid = tl.program_id(0)
    block, group = pid % BLOCKS, pid // BLOCKS
    head, of_rows = group % HEADS, group // HEADS
    d, first = (of_rows % (D * LAYERS)).to(tl.int64), first_row + (of_rows // (D * LAYERS)) * ROWS
    PROGRAMS: tl.constexpr = BLOCKS * HEADS if MEETINGS else BLOCKS  # that meet
    EACH: tl.constexpr = 1 + PROJECTED + MEETINGS  # meetings of a step
    counter = counters + (of_rows if MEETINGS else group) * 16
    backwards = ((d == 1) & (D == 2)) != REVERSE
    rows = first + tl.arange(0, ROWS)  # [ROWS]
    rows_ok = rows < B
    length, steps = steps_of_rows(lengths, rows, rows_ok, first, T, PACKED, RAGGED)  # [ROWS]
    if LAYERS == 1:
        y += d * R
        dy += d * R
    else:
        top = d == LAYERS - 1
        target = dys + d * N * R
        y, dy = tl.where(top, y, ys + d * N * R), tl.where(top, dy, target)
        above = da + (d + 1) * N * (P * H)
        w_ih += d * w_ih_step
    stop = tl.minimum(end, steps + 1)

    units = block * UNITS + tl.arange(0, UNITS)  # [UNITS], of the head
    units_ok = units < HEAD
    units += head * HEAD
    outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)  # [OUTPUTS]; without projection these are the units
    outputs_ok = outputs < WIDTH
    outputs += head * WIDTH
    # the product's rows are outputs, its columns batch rows; or both with gates, a column's gate changing slowest
    SIDE: tl.constexpr = PADDED if DIAGONAL else 1
    K: tl.constexpr = HEAD if DIAGONAL else GATES * HEAD
    stacked = tl.arange(0, OUTPUTS * SIDE)  # [OUTPUTS * SIDE]
    output, gate = block * OUTPUTS + stacked // SIDE, stacked % SIDE
    a_ok = (output < WIDTH) & (gate < GATES)
    a_rows = w_hh + d * w_hh_step + (gate * H + head * HEAD).to(tl.int64) * WIDTH + output
    chunks = resident_weights(a_rows, a_ok, K, WIDTH, HEAD, H, BK, SPLIT, RESIDENT and PHASE != "cell")
    columns = tl.arange(0, SIDE * ROWS)  # [SIDE * ROWS]
    column_gate, column_rows = columns // ROWS, first + columns % ROWS
    columns_ok = (column_rows < B) & (column_gate < GATES)
    if PACKED or RAGGED:
        column_length = tl.load(lengths + column_rows, mask=columns_ok, other=0).to(tl.int32)
    else:
        column_length = tl.where(columns_ok, T, 0)
    r_rows = w_hr + d * w_hr_step + units
    own_weights = (b_ih + d * b_ih_step + GATES * H + units)[:, None]
    own_weights = load_tiles(own_weights, units_ok[:, None], WEIGHTS, H)  # [UNITS, 1] each

    state_at = (d * B + rows)[None, :] * (CARRIED * H) + units[:, None]  # [UNITS, ROWS]
    state_ok = units_ok[:, None] & rows_ok[None, :]
    n_at = (d * B + rows)[None, :] * R + outputs[:, None]  # [OUTPUTS, ROWS]
    n_ok = outputs_ok[:, None] & rows_ok[None, :]
    final = tl.load(dh_n + n_at, mask=n_ok, other=0.0).to(tl.float32)
    dc = ()
    if PHASE != "state":
        dc = load_tiles(carry + state_at, state_ok, CARRIED, H)
    noise += d * NOISE * H
    if MASKED:
        factors = tl.load(mask + n_at, mask=n_ok, other=0.0).to(tl.float32)

    # what a step needs from memory, and does not wait for, is loaded in the step before
    t = tl.where(backwards, begin, steps - 1 - begin)
    at = tl.minimum(tl.maximum(t, 0), steps - 1)
    here = (t < length) & (begin < steps)
    anew = here  # of the step, and of the one before
    stopped = here
    if RESETS:
        anew = begins_anew(resets, at, rows, here, offsets, T, B, PACKED, BATCH_FIRST)
        came_at = tl.minimum(tl.maximum(tl.where(backwards, t - 1, t + 1), 0), steps - 1)
        came = (tl.where(backwards, t - 1, t + 1) < length) & (begin > 0)
        stopped = begins_anew(resets, came_at, rows, came, offsets, T, B, PACKED, BATCH_FIRST)
    values = kept_values(
        saved, y, h0, c0, offsets, at, here, length, steps, backwards, d, rows, units, units_ok, T, B, N,
        STATES, READS, KEPT, SLOTS, OUTPUT, D, H, W, PACKED, BATCH_FIRST, PROJECTED, anew, RESETS,
    )  # fmt: skip
    dy_rows = dy + row_index(at, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R)  # [ROWS]
    if LAYERS == 1:
        outer = load_tiles(dy_rows[None, :] + outputs[:, None], outputs_ok[:, None] & here[None, :], 1, 0)
    noises = step_noise(noise, at, rows, units, units_ok[:, None] & here[None, :], offsets, noise_t, noise_b, NOISE, H, PACKED)
    own = row_index(at, rows, offsets, T, B, PACKED, False)  # [ROWS]
    dcs = step_gradients(dc_steps, d * N + own, units, units_ok[:, None] & here[None, :], DC_STEPS, STATES, H)
    before = tl.minimum(tl.maximum(tl.where(backwards, t - 1, t + 1), 0), steps - 1)
    state = da + HIDDEN * H + column_gate * H + head * HEAD  # [SIDE * ROWS]
    da_before = state + (d * N + row_index(before, column_rows, offsets, T, B, PACKED, False)) * (P * H)

    for s in tl.range(begin, stop, num_stages=1):
        t = tl.where(backwards, s, steps - 1 - s)
        before = tl.where(backwards, t - 1, t + 1)
        came = (before < length) & (s > 0)  # [ROWS]; was there a step before this one?
        active = (t < length) & (s < steps)  # [ROWS]
        da_rows = da + (d * N + own) * (P * H)  # [ROWS]
        dp_rows = dp + (d * N + own) * R  # [ROWS]
        if LAYERS > 1:
            if (d < LAYERS - 1) & (s % SPAN == 0) & (s < steps):
                feed(
                    target, above, w_ih, counter, counter + 16, gave_up, s, steps, backwards == 0, block, first, lengths,
                    offsets, T, B, R, GATES * H, 1, R, R, P * H, BATCH_FIRST, False, PACKED, RAGGED, ROWS, BLOCKS, SPAN, FEED,
                    PRECISION,
                )  # fmt: skip
            outer = load_tiles(dy_rows[None, :] + outputs[:, None], outputs_ok[:, None] & active[None, :], 1, 0, ".cg")
        if PHASE != "cell":
            dh = product(
                chunks, a_rows, a_ok, da_before, (before < column_length) & (s > 0), K, WIDTH, HEAD, H,
                OUTPUTS * SIDE, SIDE * ROWS, BK, SPLIT, RESIDENT, STAGES, PRECISION,
            )  # fmt: skip
            dh = diagonal(dh, OUTPUTS, SIDE, ROWS) if DIAGONAL else released(dh)
            if MASKED:
                dh *= factors
            if READS:
                dh += dc[STATES + WEIGHTS]
            dh = tl.where(came[None, :], dh, final)  # [OUTPUTS, ROWS]
            leaving = came & (active == 0)
            initial = dh
            if RESETS:  # what a reset has stopped is the initial state's, as what is left in the end
                taken = n_ok & (leaving | stopped)[None, :]
                initial += tl.load(sums_h + n_at, mask=taken, other=0.0)
                tl.store(sums_h + n_at, initial, mask=taken)
                dh = tl.where(stopped[None, :], 0.0, dh)
            tl.store(dh0 + n_at, initial.to(dh0.dtype.element_ty), mask=n_ok & leaving[None, :])
            dh += outer[0]
            if PROJECTED:
                at_dp = dp_rows[None, :] + outputs[:, None]
                tl.store(at_dp, dh.to(dp.dtype.element_ty), mask=outputs_ok[:, None] & active[None, :])
            if SYNC and PROJECTED:
                arrive(counter)
                wait(counter, (EACH * (s - begin) + 1).to(tl.int64) * PROGRAMS, gave_up)
        if PHASE != "state":
            if PROJECTED:
                dh = product(
                    (), r_rows, units_ok, dp_rows, active, R, H, R, R, UNITS, ROWS, BK, SPLIT, False, STAGES, PRECISION
                )
                dh = released(dh)
            of_states = added(dc, dcs, STATES) if DC_STEPS else dc[:STATES]
            if MEETINGS:
                own_moments = moments + of_rows * (SETS * 2 * PROGRAMS * ROWS)
                own_units = tl.minimum(HEAD - block * UNITS, UNITS)
                grads = CELL(
                    dh, *of_states, *values, *own_weights, *noises, own_moments, counter, EACH * (s - begin) + PROJECTED,
                    gave_up, head * BLOCKS + block, units_ok[:, None], own_units,
                )  # fmt: skip
            else:
                grads = CELL(dh, *of_states, *values, *own_weights, *noises)
            store_tiles(da_rows[None, :] + units[:, None], grads, units_ok[:, None] & active[None, :], 0, P, H)
            if SYNC:
                arrive(counter)
            if CARRIED:
                sums = carried(grads, active[None, :], dc, P, STATES, READS, WEIGHTS)
                dc = sums + replaced(grads, P + STATES, READS, active[None, :], dc[STATES + WEIGHTS :])
            if RESETS and STATES:
                sums_at, taken = sums_c + (d * B + rows)[None, :] * (STATES * H) + units[:, None], state_ok & anew[None, :]
                sums = added(dc, load_tiles(sums_at, taken, STATES, H), STATES)
                store_tiles(sums_at, sums, taken, 0, STATES, H)
                dc = replaced(zeros(STATES, UNITS, ROWS), 0, STATES, anew[None, :], dc) + dc[STATES:]

        if SYNC:
            da_before = state + (d * N + row_index(at, column_rows, offsets, T, B, PACKED, False)) * (P * H)
            t = tl.where(backwards, s + 1, steps - 2 - s)
            at = tl.minimum(tl.maximum(t, 0), steps - 1)
            here = (t < length) & (s + 1 < steps)
            if RESETS:
                stopped = anew
                anew = begins_anew(resets, at, rows, here, offsets, T, B, PACKED, BATCH_FIRST)
            values = kept_values(
                saved, y, h0, c0, offsets, at, here, length, steps, backwards, d, rows, units, units_ok, T, B, N,
                STATES, READS, KEPT, SLOTS, OUTPUT, D, H, W, PACKED, BATCH_FIRST, PROJECTED, anew, RESETS,
            )  # fmt: skip
            dy_rows = dy + row_index(at, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R)
            if LAYERS == 1:
                outer = load_tiles(dy_rows[None, :] + outputs[:, None], outputs_ok[:, None] & here[None, :], 1, 0)
            noises = step_noise(
                noise, at, rows, units, units_ok[:, None] & here[None, :], offsets, noise_t, noise_b, NOISE, H, PACKED
            )
            own = row_index(at, rows, offsets, T, B, PACKED, False)
            dcs = step_gradients(dc_steps, d * N + own, units, units_ok[:, None] & here[None, :], DC_STEPS, STATES, H)
            wait(counter, (s - begin + 1).to(tl.int64) * EACH * PROGRAMS, gave_up)
    if PHASE != "state":
        store_tiles(carry + state_at, dc, state_ok, 0, CARRIED, H)


@triton.jit(do_not_specialize=["T", "B", "N"])
def single_backward(
    saved, y, dy, da, dp, h0, c0, dh_n, dh0, carry, w_hh, w_hr, b_ih, lengths, offsets, resets, mask, noise, dc_steps,
    w_hh_step: tl.int64, w_hr_step: tl.int64, b_ih_step: tl.int64, noise_t: tl.int64, noise_b: tl.int64,
    T, B, N,
    CELL: tl.constexpr, GATES: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, STATES: tl.constexpr,
    READS: tl.constexpr, WEIGHTS: tl.constexpr, NOISE: tl.constexpr, KEPT: tl.constexpr, SLOTS: tl.constexpr,
    OUTPUT: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, RESETS: tl.constexpr, MASKED: tl.constexpr,
    DC_STEPS: tl.constexpr, BATCH_FIRST: tl.constexpr, REVERSE: tl.constexpr, PROJECTED: tl.constexpr,
    UNITS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All steps of ROWS rows in one program, which holds every unit of a head and the states' gradients.

    Grid: HEADS * D * blocks of rows.
    """
    P: tl.constexpr = HIDDEN + GATES
    CARRIED: tl.constexpr = STATES + WEIGHTS
    HEAD: tl.constexpr = H // HEADS  # units of a head
    WIDTH: tl.constexpr = R // HEADS  # of its weights
    pid = tl.program_id(0)
    head, of_rows = pid % HEADS, pid // HEADS
    d, first = (of_rows % D).to(tl.int64), (of_rows // D) * ROWS
    backwards = (d == 1) != REVERSE
    rows = first + tl.arange(0, ROWS)  # [ROWS]
    rows_ok = rows < B
    length, steps = steps_of_rows(lengths, rows, rows_ok, first, T, PACKED, RAGGED)  # [ROWS]
    y += d * R

    units = tl.arange(0, UNITS)  # [UNITS]
    units_ok = units < HEAD
    outputs = tl.arange(0, OUTPUTS)  # [OUTPUTS]; without projection these are the units
    outputs_ok = outputs < WIDTH
    stacked = tl.arange(0, PADDED * UNITS)  # [PADDED * UNITS], gate-major
    gate, unit = stacked // UNITS, stacked % UNITS
    at = w_hh + d * w_hh_step + (gate * H + head * HEAD + unit)[None, :] * WIDTH + outputs[:, None]
    w = tl.load(
        at, mask=outputs_ok[:, None] & ((gate < GATES) & (unit < HEAD))[None, :], other=0.0
    )  # [OUTPUTS, PADDED * UNITS]
    units += head * HEAD
    outputs += head * WIDTH
    own_weights = (b_ih + d * b_ih_step + GATES * H + units)[:, None]
    own_weights = load_tiles(own_weights, units_ok[:, None], WEIGHTS, H)  # [UNITS, 1] each
    if PROJECTED:
        at = w_hr + d * w_hr_step + outputs[None, :] * H + units[:, None]
        proj = tl.load(at, mask=units_ok[:, None] & outputs_ok[None, :], other=0.0)  # [UNITS, OUTPUTS]

    state_at = (d * B + rows)[None, :] * (CARRIED * H) + units[:, None]  # [UNITS, ROWS]
    state_ok = units_ok[:, None] & rows_ok[None, :]
    n_at = (d * B + rows)[None, :] * R + outputs[:, None]  # [OUTPUTS, ROWS]
    n_ok = outputs_ok[:, None] & rows_ok[None, :]
    dh = tl.load(dh_n + n_at, mask=n_ok, other=0.0).to(tl.float32)
    dc = load_tiles(carry + state_at, state_ok, CARRIED, H)
    noise += d * NOISE * H
    if MASKED:
        factors = tl.load(mask + n_at, mask=n_ok, other=0.0).to(tl.float32)

    # loaded a step ahead
    t = tl.where(backwards, 0, steps - 1)
    anew = t < length
    if RESETS:
        anew = begins_anew(resets, t, rows, t < length, offsets, T, B, PACKED, BATCH_FIRST)
        nothing = zeros(STATES, UNITS, ROWS)
        taken_h, taken_c = tl.zeros((OUTPUTS, ROWS), tl.float32), nothing
    values = kept_values(
        saved, y, h0, c0, offsets, t, t < length, length, steps, backwards, d, rows, units, units_ok, T, B, N,
        STATES, READS, KEPT, SLOTS, OUTPUT, D, H, W, PACKED, BATCH_FIRST, PROJECTED, anew, RESETS,
    )  # fmt: skip
    dy_rows = dy + row_index(t, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R  # [ROWS]
    dys = load_tiles(dy_rows[None, :] + outputs[:, None], outputs_ok[:, None] & (t < length)[None, :], 1, 0)
    here_ok = units_ok[:, None] & (t < length)[None, :]  # [UNITS, ROWS]
    noises = step_noise(noise, t, rows, units, here_ok, offsets, noise_t, noise_b, NOISE, H, PACKED)
    own = d * N + row_index(t, rows, offsets, T, B, PACKED, False)  # [ROWS]
    dcs = step_gradients(dc_steps, own, units, here_ok, DC_STEPS, STATES, H)

    for s in tl.range(0, steps, num_stages=1):
        t = tl.where(backwards, s, steps - 1 - s)
        active = t < length  # [ROWS]
        now, own_noises, d_out = values, noises, dh + dys[0]
        ahead = tl.minimum(tl.maximum(tl.where(backwards, t + 1, t - 1), 0), steps - 1)
        here = (ahead < length) & (s + 1 < steps)
        stops = anew
        if RESETS:
            anew = begins_anew(resets, ahead, rows, here, offsets, T, B, PACKED, BATCH_FIRST)
        values = kept_values(
            saved, y, h0, c0, offsets, ahead, here, length, steps, backwards, d, rows, units, units_ok, T, B, N,
        STATES, READS, KEPT, SLOTS, OUTPUT, D, H, W, PACKED, BATCH_FIRST, PROJECTED, anew, RESETS,
        )  # fmt: skip
        dy_rows = dy + row_index(ahead, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R
        dys = load_tiles(dy_rows[None, :] + outputs[:, None], outputs_ok[:, None] & here[None, :], 1, 0)
        here_ok = units_ok[:, None] & here[None, :]
        noises = step_noise(noise, ahead, rows, units, here_ok, offsets, noise_t, noise_b, NOISE, H, PACKED)
        of_states = added(dc, dcs, STATES) if DC_STEPS else dc[:STATES]
        if DC_STEPS:
            own = d * N + row_index(ahead, rows, offsets, T, B, PACKED, False)
            dcs = step_gradients(dc_steps, own, units, here_ok, DC_STEPS, STATES, H)

        own = d * N + row_index(t, rows, offsets, T, B, PACKED, False)  # [ROWS]
        if PROJECTED:
            dp_rows = dp + own * R
            d_proj = d_out.to(dp.dtype.element_ty)
            tl.store(dp_rows[None, :] + outputs[:, None], d_proj, mask=outputs_ok[:, None] & active[None, :])
            d_out = released(tl.dot(proj, d_proj, input_precision=PRECISION))  # [UNITS, ROWS]
        grads = CELL(d_out, *of_states, *now, *own_weights, *own_noises)
        da_rows = da + own * (P * H)
        store_tiles(da_rows[None, :] + units[:, None], grads, units_ok[:, None] & active[None, :], 0, P, H)
        d_hidden = stack(grads, HIDDEN, GATES, PADDED, UNITS, ROWS).to(da.dtype.element_ty)
        if UNITS > HEAD:  # of no unit it may be NaN, which zeros among the weights do not take away
            d_hidden = tl.where((unit < HEAD)[:, None], d_hidden, 0.0)
        new = released(tl.dot(w, d_hidden, input_precision=PRECISION))  # [OUTPUTS, ROWS]
        if MASKED:
            new *= factors
        if READS:
            new += grads[P + STATES]
        if CARRIED:
            dc = carried(grads, active[None, :], dc, P, STATES, READS, WEIGHTS)
        dh = tl.where(active[None, :], new, dh)
        if RESETS:
            taken_h += tl.where(stops[None, :], dh, 0.0)
            dh = tl.where(stops[None, :], 0.0, dh)
            taken_c = added(taken_c, replaced(dc, 0, STATES, stops[None, :], nothing), STATES)
            dc = replaced(nothing, 0, STATES, stops[None, :], dc) + dc[STATES:]
    if RESETS:
        dh += taken_h
        dc = added(dc, taken_c, STATES) + dc[STATES:]
    tl.store(dh0 + n_at, dh.to(dh0.dtype.element_ty), mask=n_ok)
    store_tiles(carry + state_at, dc, state_ok, 0, CARRIED, H)


@triton.jit(do_not_specialize=["T", "B", "blocks", "d"])
def states_before(
    before, y, h0, lengths, offsets, resets, mask, T, B, blocks, d,
    D: tl.constexpr, R: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, RESETS: tl.constexpr, MASKED: tl.constexpr,
    BATCH_FIRST: tl.constexpr, BACKWARDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """before [N, R]: h as it entered the product of each step of direction d. h0 and mask: of the direction, [B, R].

    Grid: T * blocks of rows, blocks of columns.
    """
    pid = tl.program_id(0)
    t, rows = pid // blocks, (pid % blocks) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    length, _ = steps_of_rows(lengths, rows, rows < B, 0, T, PACKED, RAGGED)  # [ROWS]
    ok = (t < length)[:, None] & (columns < R)[None, :]  # [ROWS, COLUMNS]
    earlier = t + 1 if BACKWARDS else t - 1
    joined = earlier < length if BACKWARDS else tl.where(rows < B, t > 0, False)
    if RESETS:
        joined = joined & (begins_anew(resets, t, rows, t < length, offsets, T, B, PACKED, BATCH_FIRST) == 0)
    at = tl.minimum(tl.maximum(earlier, 0), T - 1)
    after = y + row_index(at, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R  # [ROWS]
    states = tl.where(joined, after, h0 + rows.to(tl.int64) * R)
    values = tl.load(states[:, None] + columns[None, :], mask=ok, other=0.0)
    if MASKED:
        at = mask + rows.to(tl.int64)[:, None] * R + columns[None, :]
        values = scaled(values, tl.load(at, mask=ok, other=0.0).to(tl.float32))
    own = before + row_index(t, rows, offsets, T, B, PACKED, False) * R  # [ROWS]
    tl.store(own[:, None] + columns[None, :], values, mask=ok)


@triton.jit(do_not_specialize=["N", "B"])
def rows_within(
    within, given, lengths, N, B, W: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """within [N, W]: rows of all steps, which are STEP numbers apart in `given`, with zeros past their lengths.

    Grid: blocks of rows, blocks of columns.
    """
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    length = tl.load(lengths + n % B, mask=n < N, other=0)
    there, columns_ok = (n < N) & (n // B < length), columns < W
    row = n.to(tl.int64)[:, None]
    values = tl.load(given + row * STEP + columns[None, :], mask=there[:, None] & columns_ok[None, :], other=0.0)
    tl.store(within + row * W + columns[None, :], values, mask=(n < N)[:, None] & columns_ok[None, :])
