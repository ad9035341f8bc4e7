"""A layer's forward scan: from projected inputs to outputs, final states and what backward needs.

Letters as in fastrnn/ops.py; N rows of the sequence, W row width of `kept`, s-th step of a program's rows in the layer's order,
t its place in the sequence. Pointers, with the element type E of the layer unless said otherwise:

    kept     [D, N, W] step-major; holds the projected input of gate k of the cell's arguments at columns k*H..., and where SAVE
             the cell's slots afterwards, and the output before its projection after those
    y        [..., D*R], the layout of the op
    out      [D, B, H], the output before its projection, where it is not kept
    h0, h_n  [D, B, R]
    carry    [D, B, H] float32: what enters element by element (c, or h of GRU); the initial one, in the end the final one
    w_hh, w_hr, b_ih, b_hh   as in the op, of direction 0; those of direction 1 are w_hh_step and so on numbers further
    lengths  [B] and offsets [T], int64: steps of each row, and rows before each step; only read where PACKED
    counters [groups, 16] int64, zero, and gave_up [1] int32: see barrier.py; only used where SYNC

A program has UNITS units of every gate (and OUTPUTS outputs of the projection) and ROWS rows; programs of the same rows and
direction are a group. Groups never wait for each other, and stop with the longest of their rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .barrier import arrive, wait
from .tile import load_tiles, product, released, resident_weights, row_index, store_tiles, unstack


@triton.jit
def input_biases(b_ih, b_hh, units, H: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr, INPUT: tl.constexpr,
                 BIAS: tl.constexpr):  # fmt: skip
    """What is added to each pre-activation in the cell's order, [UNITS, 1] float32 each."""
    biases = ()
    ok = units < H
    for k in tl.static_range(HIDDEN + GATES):
        bias = tl.zeros_like(units).to(tl.float32)
        if BIAS and k < GATES:
            bias += tl.load(b_ih + INPUT[k] * H + units, mask=ok, other=0.0).to(tl.float32)
        if BIAS and k >= HIDDEN:
            bias += tl.load(b_hh + (k - HIDDEN) * H + units, mask=ok, other=0.0).to(tl.float32)
        biases = biases + (bias[:, None],)
    return biases


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


@triton.jit(do_not_specialize=["T", "B", "N", "first_row", "begin", "end"])
def scan_forward(
    kept, y, out, h0, carry, w_hh, w_hr, b_ih, b_hh, h_n, lengths, offsets, counters, gave_up,
    w_hh_step: tl.int64, w_hr_step: tl.int64, b_ih_step: tl.int64, b_hh_step: tl.int64,
    T, B, N, first_row, begin, end,
    CELL: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr, INPUT: tl.constexpr, SLOTS: tl.constexpr,
    CARRY: tl.constexpr, D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    PACKED: tl.constexpr, BATCH_FIRST: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr, PROJECTED: tl.constexpr,
    ALIGNED: tl.constexpr, SAVE: tl.constexpr, BLOCKS: tl.constexpr, UNITS: tl.constexpr, OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PHASE: tl.constexpr, SYNC: tl.constexpr,
):  # fmt: skip
    """Steps begin...end of the layer. Grid: BLOCKS * D * blocks of rows.

    PHASE:   "gates" or "project", one half of a projected step, or "both".
    ALIGNED: rows of y and h0 start at multiples of 16 bytes.
    SYNC:    programs meet where one needs what others have stored; without, a launch has one step (and one phase if PROJECTED).
    """
    pid = tl.program_id(0)
    block, group = pid % BLOCKS, pid // BLOCKS
    d, first = (group % D).to(tl.int64), first_row + (group // D) * ROWS
    counter = counters + group * 16
    backwards = (d == 1) != REVERSE
    rows = first + tl.arange(0, ROWS)  # [ROWS]
    rows_ok = rows < B
    length = tl.load(lengths + rows, mask=rows_ok, other=0).to(tl.int32) if PACKED else tl.where(rows_ok, T, 0)  # [ROWS]
    steps = tl.load(lengths + first).to(tl.int32) if PACKED else T  # rows are sorted: its first row's
    stop = tl.minimum(end, steps)

    units = block * UNITS + tl.arange(0, UNITS)  # [UNITS]
    units_ok = units < H
    tile_ok = units_ok[:, None] & rows_ok[None, :]  # [UNITS, ROWS]
    PADDED: tl.constexpr = 4 if GATES == 3 else GATES
    stacked = tl.arange(0, PADDED * UNITS)  # [PADDED * UNITS], gate-major
    gate, unit = stacked // UNITS, block * UNITS + stacked % UNITS
    a_rows = w_hh + d * w_hh_step + (gate * H + unit).to(tl.int64) * R
    a_ok = (gate < GATES) & (unit < H)
    chunks = resident_weights(a_rows, a_ok, R, 1, BK, SPLIT, RESIDENT and PHASE != "project")
    biases = input_biases(b_ih + d * b_ih_step, b_hh + d * b_hh_step, units, H, GATES, HIDDEN, INPUT, BIAS)

    h0_rows = h0 + (d * B + rows) * R  # [ROWS]
    state_at = (d * B + rows)[None, :] * H + units[:, None]  # [UNITS, ROWS]
    p = tl.zeros((UNITS, ROWS), tl.float32)
    if CARRY != "none" and PHASE != "project":
        p = tl.load(carry + state_at, mask=tile_ok, other=0.0)

    outputs = block * OUTPUTS + tl.arange(0, OUTPUTS)  # [OUTPUTS]
    outputs_ok = outputs < R
    r_rows = w_hr + d * w_hr_step + outputs.to(tl.int64) * H

    # what a step needs from memory, and does not wait for, is loaded in the step before
    t = tl.where(backwards, steps - 1 - begin, begin)
    at = tl.maximum(t, 0) if PACKED else t
    kept_rows = kept + (d * N + row_index(at, rows, offsets, T, B, PACKED, False)) * W  # [ROWS]
    active = (t < length) & (t >= 0)
    inputs = load_tiles(kept_rows[None, :] + units[:, None], units_ok[:, None] & active[None, :], GATES, H)
    y_rows = y + row_index(at, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R  # [ROWS]
    t_before = tl.minimum(tl.maximum(tl.where(backwards, t + 1, t - 1), 0), steps - 1)
    y_before = y + row_index(t_before, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R  # [ROWS]

    for s in tl.range(begin, stop, num_stages=1):
        t = tl.where(backwards, steps - 1 - s, s)
        active = t < length  # [ROWS]
        last = active & tl.where(backwards, t == 0, t + 1 == length)
        ok = units_ok[:, None] & active[None, :]  # [UNITS, ROWS]
        out_rows = kept_rows + SLOTS * H if SAVE else out + (d * B + rows) * H  # [ROWS]
        if PHASE != "project":
            joined = tl.where(backwards, t + 1 < length, s > 0)  # has the row a step before this one?
            h_rows = tl.where(joined, y_before, h0_rows)
            if ALIGNED:  # of a choice between pointers the compiler forgets it
                h_rows = tl.multiple_of(h_rows, 16)
            acc = product(
                chunks, a_rows, a_ok, h_rows, active, R, 1, PADDED * UNITS, ROWS, BK, SPLIT, RESIDENT, STAGES, PRECISION
            )
            a = preactivations(inputs, unstack(acc, PADDED, UNITS, ROWS), biases, GATES, HIDDEN)
            new = CELL(*a) if CARRY == "none" else CELL(*a, p)
            h = new[0].to(y.dtype.element_ty)
            if PROJECTED:
                tl.store(out_rows[None, :] + units[:, None], h, mask=ok)
            else:
                tl.store(y_rows[None, :] + units[:, None], h, mask=ok)
            if SYNC:
                arrive(counter)
            if not PROJECTED:
                tl.store(h_n + state_at, h, mask=units_ok[:, None] & last[None, :])
            if SAVE:
                store_tiles(kept_rows[None, :] + units[:, None], new, ok, 1, SLOTS, H)
            if CARRY == "cell":
                p = tl.where(active[None, :], new[SLOTS], p)
            elif CARRY == "hidden":
                p = tl.where(active[None, :], new[0], p)
            if SYNC and PROJECTED:
                wait(counter, (2 * (s - begin) + 1).to(tl.int64) * BLOCKS, gave_up)
        if PROJECTED and PHASE != "gates":
            proj = product((), r_rows, outputs_ok, out_rows, active, H, 1, OUTPUTS, ROWS, BK, SPLIT, False, STAGES, PRECISION)
            proj = released(proj).to(y.dtype.element_ty)  # [OUTPUTS, ROWS]
            tl.store(y_rows[None, :] + outputs[:, None], proj, mask=outputs_ok[:, None] & active[None, :])
            n_at = (d * B + rows)[None, :] * R + outputs[:, None]
            tl.store(h_n + n_at, proj, mask=outputs_ok[:, None] & last[None, :])
            if SYNC:
                arrive(counter)

        if SYNC:
            t = tl.where(backwards, steps - 2 - s, s + 1)
            at = tl.minimum(tl.maximum(t, 0), steps - 1)
            kept_rows = kept + (d * N + row_index(at, rows, offsets, T, B, PACKED, False)) * W
            here = (t < length) & (t >= 0)
            inputs = load_tiles(kept_rows[None, :] + units[:, None], units_ok[:, None] & here[None, :], GATES, H)
            y_before = y_rows
            y_rows = y + row_index(at, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R
            if PROJECTED:
                wait(counter, (2 * (s - begin) + 2).to(tl.int64) * BLOCKS, gave_up)
            else:
                wait(counter, (s - begin + 1).to(tl.int64) * BLOCKS, gave_up)
    if CARRY != "none" and PHASE != "project":
        tl.store(carry + state_at, p, mask=tile_ok)


@triton.jit(do_not_specialize=["T", "B", "N"])
def single_forward(
    kept, y, h0, carry, w_hh, w_hr, b_ih, b_hh, h_n, lengths, offsets,
    w_hh_step: tl.int64, w_hr_step: tl.int64, b_ih_step: tl.int64, b_hh_step: tl.int64,
    T, B, N,
    CELL: tl.constexpr, GATES: tl.constexpr, HIDDEN: tl.constexpr, INPUT: tl.constexpr, SLOTS: tl.constexpr,
    CARRY: tl.constexpr, D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    PACKED: tl.constexpr, BATCH_FIRST: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr, PROJECTED: tl.constexpr,
    SAVE: tl.constexpr, UNITS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All steps of ROWS rows in one program, which holds every unit and the state. Grid: D * blocks of rows."""
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
    biases = input_biases(b_ih + d * b_ih_step, b_hh + d * b_hh_step, units, H, GATES, HIDDEN, INPUT, BIAS)
    PADDED: tl.constexpr = 4 if GATES == 3 else GATES
    stacked = tl.arange(0, PADDED * UNITS)  # [PADDED * UNITS], gate-major
    gate, unit = stacked // UNITS, stacked % UNITS
    at = w_hh + d * w_hh_step + (gate * H + unit)[:, None] * R + outputs[None, :]
    w = tl.load(at, mask=((gate < GATES) & (unit < H))[:, None] & outputs_ok[None, :], other=0.0)  # [PADDED * UNITS, OUTPUTS]
    if PROJECTED:
        at = w_hr + d * w_hr_step + outputs[:, None] * H + units[None, :]
        proj = tl.load(at, mask=outputs_ok[:, None] & units_ok[None, :], other=0.0)  # [OUTPUTS, UNITS]

    state_at = (d * B + rows)[None, :] * H + units[:, None]  # [UNITS, ROWS]
    n_at = (d * B + rows)[None, :] * R + outputs[:, None]  # [OUTPUTS, ROWS]
    n_ok = outputs_ok[:, None] & rows_ok[None, :]
    h = tl.load(h0 + n_at, mask=n_ok, other=0.0)
    p = tl.zeros((UNITS, ROWS), tl.float32)
    if CARRY != "none":
        p = tl.load(carry + state_at, mask=units_ok[:, None] & rows_ok[None, :], other=0.0)

    # loaded a step ahead
    t = tl.where(backwards, steps - 1, 0)
    kept_rows = kept + (d * N + row_index(t, rows, offsets, T, B, PACKED, False)) * W  # [ROWS]
    inputs = load_tiles(kept_rows[None, :] + units[:, None], units_ok[:, None] & (t < length)[None, :], GATES, H)

    for s in tl.range(0, steps, num_stages=1):
        t = tl.where(backwards, steps - 1 - s, s)
        active = t < length  # [ROWS]
        ok = units_ok[:, None] & active[None, :]  # [UNITS, ROWS]
        own_rows = kept_rows
        own_inputs = inputs
        ahead = tl.minimum(tl.maximum(tl.where(backwards, t - 1, t + 1), 0), steps - 1)
        kept_rows = kept + (d * N + row_index(ahead, rows, offsets, T, B, PACKED, False)) * W
        here = (ahead < length) & (s + 1 < steps)
        inputs = load_tiles(kept_rows[None, :] + units[:, None], units_ok[:, None] & here[None, :], GATES, H)

        hiddens = unstack(tl.dot(w, h, input_precision=PRECISION), PADDED, UNITS, ROWS)
        a = preactivations(own_inputs, hiddens, biases, GATES, HIDDEN)
        new = CELL(*a) if CARRY == "none" else CELL(*a, p)
        out = new[0].to(y.dtype.element_ty)
        if SAVE:
            store_tiles(own_rows[None, :] + units[:, None], new, ok, 1, SLOTS, H)
        if CARRY == "cell":
            p = tl.where(active[None, :], new[SLOTS], p)
        elif CARRY == "hidden":
            p = tl.where(active[None, :], new[0], p)
        if PROJECTED:
            if SAVE:
                tl.store(own_rows[None, :] + SLOTS * H + units[:, None], out, mask=ok)
            out = released(tl.dot(proj, out, input_precision=PRECISION)).to(y.dtype.element_ty)  # [OUTPUTS, ROWS]
        y_rows = y + row_index(t, rows, offsets, T, B, PACKED, BATCH_FIRST) * (D * R) + d * R
        tl.store(y_rows[None, :] + outputs[:, None], out, mask=outputs_ok[:, None] & active[None, :])
        h = tl.where(active[None, :], out, h)
    tl.store(h_n + n_at, h, mask=n_ok)
    if CARRY != "none":
        tl.store(carry + state_at, p, mask=units_ok[:, None] & rows_ok[None, :])
