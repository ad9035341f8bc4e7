"""A layer's forward scan: from projected inputs to outputs, final states and what backward needs.

Letters as in fastrnn/ops.py; N rows of the sequence, W row width of `kept`, s-th step of a program's rows in the layer's order,
t its place in the sequence. Pointers, with the element type E of the layer unless said otherwise:

    kept     [D, N, W] step-major; holds the projected input, G*H columns in the order of w_ih's rows, and where SAVE the
             cell's slots afterwards, and the output before its projection after those
    y        [..., D*R], the layout of the op
    out      [D, B, H], the output before its projection, where it is not kept
    h0, h_n  [D, B, R]; h0 of a scan is what the first step's product reads: where MASKED, times the mask
    carry    [D, B, C*H] float32: the C states that enter element by element, h the last; the initial ones, in the end the
             final ones
    w_hh, w_hr, b_ih, b_hh   as in the op, of direction 0; those of direction 1 are w_hh_step and so on numbers further
    start    [D, B, C*H], what carry begins with, which resets go back to; only where RESETS
    lengths  [B] and offsets [T], int64: steps of each row, and rows before each step; only read where PACKED. lengths also
             where RAGGED: rows of a dense sequence, in any order, have no steps past them
    resets   a byte for each row of x: not 0 where the states before that step go back to the initial ones; only where RESETS
    mask     [D, B, R]: factors of h where it enters the product; only where MASKED
    fed      [2, D, B, R], out where MASKED in scans: h times the mask after an even and after an odd step, which the next
             step's product reads. Who writes to one of them has met those who read it.
    noise    for each row of x the D*NOISE*H numbers that the call brings for the cell; steps and rows of the batch are noise_t
             and noise_b numbers apart, 0 where all have the same; only where NOISE
    counters [groups, 16] int64, zero, and gave_up [1] int32: see barrier.py; only used where SYNC
    moments  [groups, SETS, 2, programs of a group, ROWS] float32: see rows.py; only used where MEETINGS

A program has UNITS units of every gate (and OUTPUTS outputs of the projection) and ROWS rows, of one head where there are
several; programs of the same rows, direction and head are a group; with MEETINGS those of all heads. Groups never wait for
each other, and stop with the longest of their rows.

What a cell is, both passes are told by GATES, HIDDEN, STATES, READS (cells.Cell.reads_hidden), WEIGHTS, KEPT and SLOTS, as in
cells.py, and NOISE; and by MEETINGS, how often in a step programs meet within the cell, to exchange SETS sets of moments.
PADDED is the power of two at GATES or above.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .barrier import arrive, wait
from .tile import (
    NEAREST,
    begins_anew,
    load_tiles,
    product,
    released,
    replaced,
    resident_weights,
    row_index,
    scaled,
    step_noise,
    steps_of_rows,
    store_tiles,
    unstack,
)
from .wavefront import feed


@triton.jit
def input_biases(b_ih, b_hh, units, ok, H: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr, INPUT: tl.constexpr,
                 BIAS: tl.constexpr):  # fmt: skip
    """What is added to each pre-activation in the cell's order, [UNITS, 1] float32 each."""
    biases = ()
    for k in tl.static_range(HIDDEN + GATES):
        bias = tl.zeros_like(units).to(tl.float32)
        if BIAS and k < GATES:
            bias += tl.load(b_ih + INPUT[k] * H + units, mask=ok, other=0.0).to(tl.float32)
        if BIAS and k >= HIDDEN:
            bias += tl.load(b_hh + (k - HIDDEN) * H + units, mask=ok, other=0.0).to(tl.float32)
        biases = biases + (bias[:, None],)
    return biases


@triton.jit
def load_inputs(
    at, ok, GATES: tl.constexpr, INPUT: tl.constexpr, H: tl.constexpr, FROM: tl.constexpr = NEAREST
):  # fmt: skip
    """The input's part of each pre-activation in the cell's order, float32, from pointers to a row's projected input."""
    tiles = ()
    for k in tl.static_range(GATES):
        tiles = tiles + load_tiles(at + INPUT[k] * H, ok, 1, H, FROM)
    return tiles


@triton.jit
def preactivations(inputs, hiddens, biases, GATES: tl.constexpr, HIDDEN: tl.constexpr):
    """Arguments of the cell: input and hidden parts, which are one number where the cell does not keep them apart."""
    a = ()
    for k in tl.static_range(HIDDEN + GATES):
        if k < HIDDEN:
            a = a + (inputs[k] + biases[k],)
        elif k < GATES:
            a = a + (inputs[k] + hiddens[k - HIDDEN] + biases[k],)
        else:
            a = a + (hiddens[k - HIDDEN] + biases[k],)
    return a


@triton.jit
def save_slots(at, new, ok, KEPT: tl.constexpr, SLOTS: tl.constexpr, STATES: tl.constexpr, H: tl.constexpr):
    """What backward needs of a cell's results: at the first slots what is kept, at the last the states."""
    store_tiles(at, new, ok, 1, KEPT, H)
    store_tiles(at + (SLOTS - STATES) * H, new, ok, 1 + KEPT, STATES, H)


@triton.jit
def carried(new, active, p, KEPT: tl.constexpr, STATES: tl.constexpr, READS: tl.constexpr):
    """The states after a step, of a cell's results where rows are active, else as before."""
    return replaced(new, 1 + KEPT, STATES, active, p) + replaced(new, 0, READS, active, p[STATES:])


@triton.jit(do_not_specialize=["T", "B", "N", "first_row", "begin", "end"])
def scan_forward(
    kept, y, ys, out, h0, start, carry, w_ih, w_hh, w_hr, b_ih, b_hh, h_n, lengths, offsets, resets, counters, gave_up,
    mask, fed, noise, moments,
    w_ih_step: tl.int64, w_hh_step: tl.int64, w_hr_step: tl.int64, b_ih_step: tl.int64, b_hh_step: tl.int64,
    noise_t: tl.int64, noise_b: tl.int64,
    T, B, N, first_row, begin, end,
    CELL: tl.constexpr, GATES: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, INPUT: tl.constexpr,
    STATES: tl.constexpr, READS: tl.constexpr, WEIGHTS: tl.constexpr, NOISE: tl.constexpr, KEPT: tl.constexpr,
    SLOTS: tl.constexpr, D: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, R: tl.constexpr,
    W: tl.constexpr,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, RESETS: tl.constexpr, MASKED: tl.constexpr,
    BATCH_FIRST: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr, PROJECTED: tl.constexpr,
    MEETINGS: tl.constexpr, SETS: tl.constexpr, ALIGNED: tl.constexpr, SAVE: tl.constexpr,
    BLOCKS: tl.constexpr, UNITS: tl.constexpr, OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, SPAN: tl.constexpr, FEED: tl.constexpr, PHASE: tl.constexpr, SYNC: tl.constexpr,
):  # fmt: skip
    """Steps begin...end of the layer. Grid: BLOCKS * HEADS * D * LAYERS * blocks of rows.

    SPAN, FEED: of LAYERS that run at once, see wavefront.py.
    PHASE:     "gates" or "project", one half of a projected step, or "both".
    ALIGNED:   rows of y and h0, and heads in them, start at multiples of 16 bytes.
    SYNC:      programs meet where one needs what others have stored; without, a launch has one step of one layer, and one
               phase if PROJECTED.
    """
    CARRIED: tl.constexpr = STATES + READS
    HEAD: tl.constexpr = H // HEADS  # units of a head
    K: tl.constexpr = R // HEADS  # what is multiplied with its weights
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
    else:
        below = ys + (d - 1) * N * R
        y = tl.where(d == LAYERS - 1, y, ys + d * N * R)
        if ALIGNED:
            below, y = tl.multiple_of(below, 16), tl.multiple_of(y, 16)
        w_ih += (d - 1) * w_ih_step
        target = kept + d * N * W
    stop = tl.minimum(end, steps)

    units = block * UNITS + tl.arange(0, UNITS)  # [UNITS], of the head
    units_ok = units < HEAD
    units += head * HEAD
    tile_ok = units_ok[:, None] & rows_ok[None, :]  # [UNITS, ROWS]
    stacked = tl.arange(0, PADDED * UNITS)  # [PADDED * UNITS], gate-major
    gate, unit = stacked // UNITS, block * UNITS + stacked % UNITS
    a_rows = w_hh + d * w_hh_step + (gate * H + head * HEAD + unit).to(tl.int64) * K
    a_ok = (gate < GATES) & (unit < HEAD)
    chunks = resident_weights(a_rows, a_ok, K, 1, K, K, BK, SPLIT, RESIDENT and PHASE != "project")
    b_ih += d * b_ih_step
    biases = input_biases(b_ih, b_hh + d * b_hh_step, units, units_ok, H, GATES, HIDDEN, INPUT, BIAS)
    own = load_tiles((b_ih + GATES * H + units)[:, None], units_ok[:, None], WEIGHTS, H)  # [UNITS, 1] each

    h0_rows = h0 + (d * B + rows) * R  # [ROWS]
    state_at = (d * B + rows)[None, :] * (CARRIED * H) + units[:, None]  # [UNITS, ROWS]
    p = ()
    if PHASE != "project":
        p = load_tiles(carry + state_at, tile_ok, CARRIED, H)

    outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)  # [OUTPUTS]
    outputs_ok = outputs < R
    r_rows = w_hr + d * w_hr_step + outputs.to(tl.int64) * H
    noise += d * NOISE * H
    if MASKED:
        columns, columns_ok = (outputs, outputs_ok) if PROJECTED else (units, units_ok)
        at = (d * B + rows)[None, :] * R + columns[:, None]
        factors = tl.load(mask + at, mask=columns_ok[:, None] & rows_ok[None, :], other=0.0).to(tl.float32)

    # what a step needs from memory, and does not wait for, is loaded in the step before
    t = tl.where(backwards, steps - 1 - begin, begin)
    at = tl.maximum(t, 0) if PACKED or RAGGED else t
    kept_rows = kept + (d * N + row_index(at, rows, offsets, T, B, PACKED, False)) * W  # [ROWS]
    active = (t < length) & (t >= 0)
    if LAYERS == 1:
        inputs = load_inputs(kept_rows[None, :] + units[:, None], units_ok[:, None] & active[None, :], GATES, INPUT, H)
    y_rows = y + row_index(at, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R)  # [ROWS]
    t_before = tl.minimum(tl.maximum(tl.where(backwards, t + 1, t - 1), 0), steps - 1)
    y_before = y + row_index(t_before, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R)  # [ROWS]
    if MASKED:
        y_before = fed + ((begin + 1) % 2 * D * B + d * B + rows) * R
    noises = step_noise(
        noise, at, rows, units, units_ok[:, None] & active[None, :], offsets, noise_t, noise_b, NOISE, H, PACKED
    )
    if RESETS:
        anew = begins_anew(resets, at, rows, active, offsets, T, B, PACKED, BATCH_FIRST)

    for s in tl.range(begin, stop, num_stages=1):
        t = tl.where(backwards, steps - 1 - s, s)
        active = t < length  # [ROWS]
        last = active & tl.where(backwards, t == 0, t + 1 == length)
        ok = units_ok[:, None] & active[None, :]  # [UNITS, ROWS]
        out_rows = kept_rows + SLOTS * H if SAVE else out + (d * B + rows) * H  # [ROWS]
        fed_rows = y_rows  # [ROWS], of what the next product reads
        if MASKED:
            fed_rows = fed + (s % 2 * D * B + d * B + rows) * R
        if LAYERS > 1:
            if (d > 0) & (s % SPAN == 0):
                feed(
                    target, below, w_ih, counter, counter - 16, gave_up, s, steps, backwards, block, first, lengths, offsets,
                    T, B, GATES * H, R, R, 1, W, R, False, BATCH_FIRST, PACKED, RAGGED, ROWS, BLOCKS, SPAN, FEED, PRECISION,
                )  # fmt: skip
            inputs = load_inputs(kept_rows[None, :] + units[:, None], ok, GATES, INPUT, H, ".cg")  # which others have stored
        if PHASE != "project":
            joined = tl.where(backwards, t + 1 < length, s > 0)  # has the row a step before this one?
            if RESETS:
                joined = joined & (anew == 0)
                fresh = load_tiles(start + state_at, ok & anew[None, :], CARRIED, H)
                p = replaced(fresh, 0, CARRIED, anew[None, :], p)
            h_rows = tl.where(joined, y_before, h0_rows)
            if HEADS > 1:  # a sum with nothing would take what is said of it away
                h_rows += head * K
            if ALIGNED:  # of a choice between pointers the compiler forgets it
                h_rows = tl.multiple_of(h_rows, 16)
            acc = product(
                chunks, a_rows, a_ok, h_rows, active, K, 1, K, K, PADDED * UNITS, ROWS, BK, SPLIT, RESIDENT, STAGES, PRECISION
            )
            a = preactivations(inputs, unstack(acc, PADDED, UNITS, ROWS), biases, GATES, HIDDEN)
            if MEETINGS:
                own_moments = moments + of_rows * (SETS * 2 * PROGRAMS * ROWS)
                own_units = tl.minimum(HEAD - block * UNITS, UNITS)
                new = CELL(
                    *a, *p, *own, *noises, own_moments, counter, EACH * (s - begin), gave_up, head * BLOCKS + block,
                    units_ok[:, None], own_units,
                )  # fmt: skip
            else:
                new = CELL(*a, *p, *own, *noises)
            h = new[0].to(y.dtype.element_ty)
            if PROJECTED:
                tl.store(out_rows[None, :] + units[:, None], h, mask=ok)
            else:
                tl.store(y_rows[None, :] + units[:, None], h, mask=ok)
                if MASKED:
                    tl.store(fed_rows[None, :] + units[:, None], scaled(h, factors), mask=ok)
            if SYNC:
                arrive(counter)
            if not PROJECTED:
                n_at = (d * B + rows)[None, :] * H + units[:, None]
                tl.store(h_n + n_at, h, mask=units_ok[:, None] & last[None, :])
            if SAVE:
                save_slots(kept_rows[None, :] + units[:, None], new, ok, KEPT, SLOTS, STATES, H)
            if CARRIED:
                p = carried(new, active[None, :], p, KEPT, STATES, READS)
            if SYNC and PROJECTED:
                wait(counter, (EACH * (s - begin) + MEETINGS + 1).to(tl.int64) * PROGRAMS, gave_up)
        if PROJECTED and PHASE != "gates":
            proj = product(
                (), r_rows, outputs_ok, out_rows, active, H, 1, H, H, OUTPUTS, ROWS, BK, SPLIT, False, STAGES, PRECISION
            )
            proj = released(proj).to(y.dtype.element_ty)  # [OUTPUTS, ROWS]
            proj_ok = outputs_ok[:, None] & active[None, :]
            tl.store(y_rows[None, :] + outputs[:, None], proj, mask=proj_ok)
            if MASKED:
                tl.store(fed_rows[None, :] + outputs[:, None], scaled(proj, factors), mask=proj_ok)
            n_at = (d * B + rows)[None, :] * R + outputs[:, None]
            tl.store(h_n + n_at, proj, mask=outputs_ok[:, None] & last[None, :])
            if SYNC:
                arrive(counter)

        if SYNC:
            t = tl.where(backwards, steps - 2 - s, s + 1)
            at = tl.minimum(tl.maximum(t, 0), steps - 1)
            kept_rows = kept + (d * N + row_index(at, rows, offsets, T, B, PACKED, False)) * W
            here = (t < length) & (t >= 0)
            if LAYERS == 1:
                inputs = load_inputs(kept_rows[None, :] + units[:, None], units_ok[:, None] & here[None, :], GATES, INPUT, H)
            noises = step_noise(
                noise, at, rows, units, units_ok[:, None] & here[None, :], offsets, noise_t, noise_b, NOISE, H, PACKED
            )
            if RESETS:
                anew = begins_anew(resets, at, rows, here, offsets, T, B, PACKED, BATCH_FIRST)
            y_before = fed_rows
            y_rows = y + row_index(at, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R)
            wait(counter, (EACH * (s - begin + 1)).to(tl.int64) * PROGRAMS, gave_up)
    if PHASE != "project":
        store_tiles(carry + state_at, p, tile_ok, 0, CARRIED, H)


@triton.jit(do_not_specialize=["T", "B", "N"])
def single_forward(
    kept, y, h0, start, carry, w_hh, w_hr, b_ih, b_hh, h_n, lengths, offsets, resets, mask, noise,
    w_hh_step: tl.int64, w_hr_step: tl.int64, b_ih_step: tl.int64, b_hh_step: tl.int64, noise_t: tl.int64, noise_b: tl.int64,
    T, B, N,
    CELL: tl.constexpr, GATES: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, INPUT: tl.constexpr,
    STATES: tl.constexpr, READS: tl.constexpr, WEIGHTS: tl.constexpr, NOISE: tl.constexpr, KEPT: tl.constexpr,
    SLOTS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    PACKED: tl.constexpr, RAGGED: tl.constexpr, RESETS: tl.constexpr, MASKED: tl.constexpr,
    BATCH_FIRST: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr, PROJECTED: tl.constexpr,
    SAVE: tl.constexpr, UNITS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All steps of ROWS rows in one program, which holds every unit of a head and the state.

    Grid: HEADS * D * blocks of rows.
    """
    CARRIED: tl.constexpr = STATES + READS
    HEAD: tl.constexpr = H // HEADS  # units of a head
    K: tl.constexpr = R // HEADS
    pid = tl.program_id(0)
    head, of_rows = pid % HEADS, pid // HEADS
    d, first = (of_rows % D).to(tl.int64), (of_rows // D) * ROWS
    backwards = (d == 1) != REVERSE
    rows = first + tl.arange(0, ROWS)  # [ROWS]
    rows_ok = rows < B
    length, steps = steps_of_rows(lengths, rows, rows_ok, first, T, PACKED, RAGGED)  # [ROWS]

    units = tl.arange(0, UNITS)  # [UNITS]
    units_ok = units < HEAD
    outputs = tl.arange(0, OUTPUTS)  # [OUTPUTS]; without projection these are the units
    outputs_ok = outputs < K
    stacked = tl.arange(0, PADDED * UNITS)  # [PADDED * UNITS], gate-major
    gate, unit = stacked // UNITS, stacked % UNITS
    at = w_hh + d * w_hh_step + (gate * H + head * HEAD + unit)[:, None] * K + outputs[None, :]
    w = tl.load(
        at, mask=((gate < GATES) & (unit < HEAD))[:, None] & outputs_ok[None, :], other=0.0
    )  # [PADDED * UNITS, OUTPUTS]
    units += head * HEAD
    outputs += head * K
    b_ih += d * b_ih_step
    biases = input_biases(b_ih, b_hh + d * b_hh_step, units, units_ok, H, GATES, HIDDEN, INPUT, BIAS)
    own = load_tiles((b_ih + GATES * H + units)[:, None], units_ok[:, None], WEIGHTS, H)  # [UNITS, 1] each
    if PROJECTED:
        at = w_hr + d * w_hr_step + outputs[:, None] * H + units[None, :]
        proj = tl.load(at, mask=outputs_ok[:, None] & units_ok[None, :], other=0.0)  # [OUTPUTS, UNITS]

    state_at = (d * B + rows)[None, :] * (CARRIED * H) + units[:, None]  # [UNITS, ROWS]
    state_ok = units_ok[:, None] & rows_ok[None, :]
    n_at = (d * B + rows)[None, :] * R + outputs[:, None]  # [OUTPUTS, ROWS]
    n_ok = outputs_ok[:, None] & rows_ok[None, :]
    h = tl.load(h0 + n_at, mask=n_ok, other=0.0)
    p = load_tiles(carry + state_at, state_ok, CARRIED, H)
    noise += d * NOISE * H
    if MASKED:
        factors = tl.load(mask + n_at, mask=n_ok, other=0.0).to(tl.float32)

    # loaded a step ahead
    t = tl.where(backwards, steps - 1, 0)
    kept_rows = kept + (d * N + row_index(t, rows, offsets, T, B, PACKED, False)) * W  # [ROWS]
    here_ok = units_ok[:, None] & (t < length)[None, :]  # [UNITS, ROWS]
    inputs = load_inputs(kept_rows[None, :] + units[:, None], here_ok, GATES, INPUT, H)
    noises = step_noise(noise, t, rows, units, here_ok, offsets, noise_t, noise_b, NOISE, H, PACKED)
    if RESETS:
        anew = begins_anew(resets, t, rows, t < length, offsets, T, B, PACKED, BATCH_FIRST)

    for s in tl.range(0, steps, num_stages=1):
        t = tl.where(backwards, steps - 1 - s, s)
        active = t < length  # [ROWS]
        ok = units_ok[:, None] & active[None, :]  # [UNITS, ROWS]
        own_rows = kept_rows
        own_inputs, own_noises = inputs, noises
        ahead = tl.minimum(tl.maximum(tl.where(backwards, t - 1, t + 1), 0), steps - 1)
        kept_rows = kept + (d * N + row_index(ahead, rows, offsets, T, B, PACKED, False)) * W
        here = (ahead < length) & (s + 1 < steps)
        here_ok = units_ok[:, None] & here[None, :]
        inputs = load_inputs(kept_rows[None, :] + units[:, None], here_ok, GATES, INPUT, H)
        noises = step_noise(noise, ahead, rows, units, here_ok, offsets, noise_t, noise_b, NOISE, H, PACKED)
        if RESETS:
            h = tl.where(anew[None, :], tl.load(h0 + n_at, mask=n_ok & anew[None, :], other=0.0), h)
            fresh = load_tiles(start + state_at, ok & anew[None, :], CARRIED, H)
            p = replaced(fresh, 0, CARRIED, anew[None, :], p)
            anew = begins_anew(resets, ahead, rows, here, offsets, T, B, PACKED, BATCH_FIRST)

        entering = scaled(h, factors) if MASKED else h
        hiddens = unstack(tl.dot(w, entering, input_precision=PRECISION), PADDED, UNITS, ROWS)
        a = preactivations(own_inputs, hiddens, biases, GATES, HIDDEN)
        new = CELL(*a, *p, *own, *own_noises)
        out = new[0].to(y.dtype.element_ty)
        if UNITS > HEAD:  # of no unit it may be NaN, which zeros among the weights do not take away
            out = tl.where(units_ok[:, None], out, 0.0)
        if SAVE:
            save_slots(own_rows[None, :] + units[:, None], new, ok, KEPT, SLOTS, STATES, H)
        if CARRIED:
            p = carried(new, active[None, :], p, KEPT, STATES, READS)
        if PROJECTED:
            if SAVE:
                tl.store(own_rows[None, :] + SLOTS * H + units[:, None], out, mask=ok)
            out = released(tl.dot(proj, out, input_precision=PRECISION)).to(y.dtype.element_ty)  # [OUTPUTS, ROWS]
        y_rows = y + row_index(t, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R
        tl.store(y_rows[None, :] + outputs[:, None], out, mask=outputs_ok[:, None] & active[None, :])
        h = tl.where(active[None, :], out, h)
    tl.store(h_n + n_at, h, mask=n_ok)
    store_tiles(carry + state_at, p, state_ok, 0, CARRIED, H)
