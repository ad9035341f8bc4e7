"""Layers of one direction at once: how a layer is brought what its neighbour has computed.

A scan with LAYERS > 1 has a group of programs for each layer and block of rows. Forward, a layer multiplies the outputs of the
one below with its W_ih, and puts the product where the lowest one finds its projected input. Backward, it multiplies the gate
gradients of the one above with that one's W_ih^T: the gradients of its own outputs. It does so for SPAN steps at a time, as
soon as the neighbour has computed these, so layers run a span of steps behind each other.

The product of a span is shared out over the group's programs in tiles of FEED[0] outputs and FEED[1] columns, which are rows of
the batch in the steps of the span. Both operands come through L2. A program then reads what others of its group have stored, so
they meet once more, at a counter of their own.

Why no program reads what is not there, or waits for ever:
    1. a neighbour's counter has counted a step of all its programs if it is at step * BLOCKS: none of them arrives for the next
       step before all have arrived for this one. What they stored before can then be loaded, as in barrier.py;
    2. the lowest layer (in backward the highest) waits for its own group alone, and each other one for that below (above), so
       nobody waits in a circle. All programs of the launch run at once; who gives up lets both groups go;
    3. outputs and gate gradients of a step are written once, and stay for the whole launch: a neighbour may be as far ahead
       as it likes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .barrier import arrive, wait
from .tile import product, released, row_index


@triton.jit
def feed(
    target, source, weights, counter, neighbour, gave_up, s, steps, backwards, block, first, lengths, offsets, T, B,
    M: tl.constexpr, K: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, TARGET: tl.constexpr, SOURCE: tl.constexpr,
    TARGET_BATCH_FIRST: tl.constexpr, SOURCE_BATCH_FIRST: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, SPAN: tl.constexpr, FEED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """target [rows of SPAN steps, M] from step s on: weights [M, K] times source [the same rows, K]; all of the group's rows.

    Numbers of the weights are ROW and COLUMN apart, rows of target and source TARGET and SOURCE.
    counter, neighbour: of this group, and of that which stores the source.
    FEED: outputs and columns of a tile, chunk of K, and chunks on their way at once.
    """
    OUTPUTS: tl.constexpr = FEED[0]
    COLUMNS: tl.constexpr = FEED[1]
    HIGH: tl.constexpr = (M + OUTPUTS - 1) // OUTPUTS
    TILES: tl.constexpr = HIGH * (SPAN * ROWS // COLUMNS)
    wait(neighbour, tl.minimum(s + SPAN, steps).to(tl.int64) * BLOCKS, gave_up)
    for tile in tl.range(block, TILES, BLOCKS, num_stages=1):
        outputs = tile % HIGH * OUTPUTS + tl.arange(0, OUTPUTS)  # [OUTPUTS]
        column = tile // HIGH * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
        step, rows = s + column // ROWS, first + column % ROWS
        ok = (rows < B) & (step < steps)
        t = tl.where(ok, tl.where(backwards, steps - 1 - step, step), 0)
        if PACKED or RAGGED:
            ok = ok & (t < tl.load(lengths + rows, mask=ok, other=0))
        source_rows = source + row_index(t, rows, offsets, T, B, PACKED, SOURCE_BATCH_FIRST) * SOURCE
        acc = product(
            (), weights + outputs.to(tl.int64) * ROW, outputs < M, source_rows, ok, K, COLUMN, K, K, OUTPUTS, COLUMNS, FEED[2],
            1, False, FEED[3], PRECISION,
        )  # fmt: skip
        target_rows = target + row_index(t, rows, offsets, T, B, PACKED, TARGET_BATCH_FIRST) * TARGET
        values = released(acc).to(target.dtype.element_ty)
        tl.store(target_rows[None, :] + outputs[:, None], values, mask=(outputs < M)[:, None] & ok[None, :])
    arrive(counter + 8)
    wait(counter + 8, (tl.minimum(s, steps) // SPAN + 1).to(tl.int64) * BLOCKS, gave_up)
