"""What the scans are made of: the product of a program's weights with a step's state, and where rows lie.

A product is acc [M, ROWS] = A [M, K] S [K, ROWS]: A is weights, the same in every step, S what other programs have stored.
K goes in chunks of BK, so it need not be a power of two. It lies in spans of SPAN numbers that begin STEP apart: where a layer
has heads, a head's units of one gate. With SPLIT > 1 a chunk is SPLIT products side by side, one a warp, [SPLIT, M, BK / SPLIT]
by [SPLIT, BK / SPLIT, ROWS], summed in the end: every warp then holds its own share of A in registers and has work, where
M x ROWS is too small to share out. With SPLIT == 1 the tensor cores read A from shared memory where the device has such
instructions (wgmma, tcgen05).

Those take 64 rows of A at least; backward has as many as a program has units, and seldom so many. There every gate's weights
are multiplied with every gate's gradients, [(unit, gate), H] by [H, (gate, row)], and the products of a gate with its own are
summed (`diagonal`): four times the arithmetic, of which there is plenty, and no sum over warps.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_index(t, rows, offsets, T, B, PACKED: tl.constexpr, BATCH_FIRST: tl.constexpr):
    """Rows of a sequence [ROWS] that step t of batch rows `rows` is in; 64 bits, B * T * width passes 2**31."""
    t = t.to(tl.int64)
    if PACKED:
        return tl.load(offsets + t) + rows
    elif BATCH_FIRST:
        return rows.to(tl.int64) * T + t
    else:
        return t * B + rows


@triton.jit
def steps_of_rows(lengths, rows, rows_ok, first, T, PACKED: tl.constexpr, RAGGED: tl.constexpr):
    """Steps of each row [ROWS], and of the longest: the first of them where they are sorted."""
    if RAGGED:
        length = tl.load(lengths + rows, mask=rows_ok, other=0).to(tl.int32)
        return length, tl.max(length, 0)
    elif PACKED:
        length = tl.load(lengths + rows, mask=rows_ok, other=0).to(tl.int32)
        return length, tl.load(lengths + first).to(tl.int32)
    else:
        return tl.where(rows_ok, T, 0), T


@triton.jit
def begins_anew(resets, t, rows, ok, offsets, T, B, PACKED: tl.constexpr, BATCH_FIRST: tl.constexpr):
    """Do the states before step t of these rows, which are `ok`, go back to those that resets go back to?"""
    return tl.load(resets + row_index(t, rows, offsets, T, B, PACKED, BATCH_FIRST), mask=ok, other=0) != 0


@triton.jit
def step_noise(
    noise, t, rows, units, ok, offsets, noise_t, noise_b, NOISE: tl.constexpr, H: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """The NOISE numbers that the call brings for each of these units in step t of these rows: float32 [UNITS, ROWS] each.

    noise_t, noise_b: how far steps and rows of the batch lie apart; of a packed sequence the second is that of all rows.
    """
    if NOISE == 0:
        return ()
    else:
        if PACKED:
            at = (tl.load(offsets + t) + rows) * noise_b
        else:
            at = t * noise_t + rows * noise_b
        return load_tiles(noise + at[None, :] + units[:, None], ok, NOISE, H)


@triton.jit
def scaled(h, factors):
    """h times factors, float32, rounded to the dtype of h."""
    return (h.to(tl.float32) * factors).to(h.dtype)


@triton.jit
def chunk_index(chunk, BK: tl.constexpr, SPLIT: tl.constexpr):
    """Positions along K of a chunk: [BK], or [SPLIT, BK / SPLIT]."""
    if SPLIT == 1:
        return chunk * BK + tl.arange(0, BK)
    else:
        PART: tl.constexpr = BK // SPLIT
        return chunk * BK + (tl.arange(0, SPLIT) * PART)[:, None] + tl.arange(0, PART)[None, :]


@triton.jit
def place(k, SPAN: tl.constexpr, STEP: tl.constexpr):
    """Where the numbers k along K lie."""
    if SPAN == STEP:
        return k
    else:
        return k + k // SPAN * (STEP - SPAN)


@triton.jit
def weight_chunk(
    a_rows, a_ok, k, K: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr
):
    """A[:, k], [M, BK] or [SPLIT, M, BK / SPLIT]; a_rows [M] point at the rows, STRIDE is along K."""
    at = place(k, SPAN, STEP).to(tl.int64) * STRIDE
    if SPLIT == 1:
        return tl.load(a_rows[:, None] + at[None, :], mask=a_ok[:, None] & (k < K)[None, :], other=0.0)
    else:
        return tl.load(a_rows[None, :, None] + at[:, None, :], mask=a_ok[None, :, None] & (k < K)[:, None, :], other=0.0)


@triton.jit
def state_chunk(s_rows, s_ok, k, K: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr):
    """S[k, :], [BK, ROWS] or [SPLIT, BK / SPLIT, ROWS]; s_rows [ROWS] point at the rows. Never from L1: see barrier.py."""
    own = place(k, SPAN, STEP)
    if SPLIT == 1:
        at, ok = s_rows[None, :] + own[:, None], s_ok[None, :] & (k < K)[:, None]
    else:
        at, ok = s_rows[None, None, :] + own[:, :, None], s_ok[None, None, :] & (k < K)[:, :, None]
    return tl.load(at, mask=ok, other=0.0, cache_modifier=".cg")


@triton.jit
def resident_weights(
    a_rows, a_ok, K: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Every chunk of A, loaded once, where the schedule keeps them; none otherwise."""
    chunks = ()
    if RESIDENT:
        for i in tl.static_range((K + BK - 1) // BK):
            chunks = chunks + (weight_chunk(a_rows, a_ok, chunk_index(i, BK, SPLIT), K, STRIDE, SPAN, STEP, SPLIT),)
    return chunks


@triton.jit
def released(x):
    """x [M, N], a product, in a layout that loads and stores have too.

    Left in the tensor cores' layout it would draw the whole cell into it, and every gate that is loaded or stored would change
    its layout through shared memory. A sum of one term is where Triton lets go of it, so that the product changes it once;
    `unstack` of several tiles is another such place.
    """
    return tl.sum(x[None, :, :], 0)


@triton.jit
def product(
    chunks, a_rows, a_ok, s_rows, s_ok, K: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr,
    M: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [M, ROWS], float32."""
    COUNT: tl.constexpr = (K + BK - 1) // BK
    if SPLIT == 1:
        acc = tl.zeros((M, ROWS), tl.float32)
    else:
        acc = tl.zeros((SPLIT, M, ROWS), tl.float32)
    if RESIDENT:
        states = ()  # STAGES chunks are on their way at once
        for i in tl.static_range(COUNT + STAGES):
            if i >= STAGES:
                acc = tl.dot(chunks[i - STAGES], states[i - STAGES], acc, input_precision=PRECISION)
            if i < COUNT:
                states = states + (state_chunk(s_rows, s_ok, chunk_index(i, BK, SPLIT), K, SPAN, STEP, SPLIT),)
    else:
        for i in tl.range(0, COUNT, num_stages=STAGES):
            k = chunk_index(i, BK, SPLIT)
            weights = weight_chunk(a_rows, a_ok, k, K, STRIDE, SPAN, STEP, SPLIT)
            acc = tl.dot(weights, state_chunk(s_rows, s_ok, k, K, SPAN, STEP, SPLIT), acc, input_precision=PRECISION)
    if SPLIT > 1:
        acc = tl.sum(acc, 0)
    return acc


@triton.jit
def unstack(x, COUNT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """The COUNT (a power of two) tiles [UNITS, ROWS] of x [COUNT * UNITS, ROWS]."""
    if COUNT == 1:
        return (released(x),)
    elif COUNT == 2:
        return tl.split(tl.permute(tl.reshape(x, (2, UNITS, ROWS)), (1, 2, 0)))
    elif COUNT == 4:
        halves = tl.split(tl.permute(tl.reshape(x, (2, 2, UNITS, ROWS)), (2, 3, 1, 0)))
        return tl.split(halves[0]) + tl.split(halves[1])
    else:
        HALF: tl.constexpr = COUNT // 2
        halves = tl.split(tl.permute(tl.reshape(x, (2, HALF * UNITS, ROWS)), (1, 2, 0)))
        return unstack(halves[0], HALF, UNITS, ROWS) + unstack(halves[1], HALF, UNITS, ROWS)


@triton.jit
def diagonal(x, UNITS: tl.constexpr, GATES: tl.constexpr, ROWS: tl.constexpr):
    """The sum [UNITS, ROWS] over gates g of x [(unit, g), (g, row)], a product of every gate with every other."""
    gate = tl.arange(0, GATES)
    same = (gate[:, None] == gate[None, :])[None, :, :, None]
    return tl.sum(tl.sum(tl.where(same, tl.reshape(x, (UNITS, GATES, GATES, ROWS)), 0.0), 2), 1)


@triton.jit
def stack(tiles, FIRST: tl.constexpr, COUNT: tl.constexpr, SIDE: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """tiles[FIRST : FIRST + COUNT] [UNITS, ROWS] as one of SIDE (a power of two) tiles, the others zero."""
    if SIDE == 1:
        return tiles[FIRST] if COUNT > 0 else tl.zeros((UNITS, ROWS), tl.float32)
    elif SIDE == 4 and COUNT > 2:
        fourth = tiles[FIRST + 3] if COUNT > 3 else tl.zeros((UNITS, ROWS), tl.float32)
        halves = tl.join(tiles[FIRST], tiles[FIRST + 1]), tl.join(tiles[FIRST + 2], fourth)
        return tl.reshape(tl.permute(tl.join(halves[0], halves[1]), (3, 2, 0, 1)), (4 * UNITS, ROWS))
    else:
        HALF: tl.constexpr = SIDE // 2
        both = stack(tiles, FIRST, COUNT, HALF, UNITS, ROWS), stack(tiles, FIRST + HALF, COUNT - HALF, HALF, UNITS, ROWS)
        return tl.reshape(tl.permute(tl.join(both[0], both[1]), (2, 0, 1)), (SIDE * UNITS, ROWS))


NEAREST = tl.constexpr("")  # any cache; Triton 3.6 takes no plain text for a default


@triton.jit
def load_tiles(at, ok, COUNT: tl.constexpr, STEP: tl.constexpr, FROM: tl.constexpr = NEAREST):
    """COUNT float32 tiles, STEP numbers apart, from pointers `at` to the first. FROM: ".cg" for past L1, see barrier.py."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (tl.load(at + i * STEP, mask=ok, other=0.0, cache_modifier=FROM).to(tl.float32),)
    return tiles


@triton.jit
def store_tiles(at, tiles, ok, FIRST: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr):
    """tiles[FIRST : FIRST + COUNT], STEP numbers apart, at pointers `at`."""
    for i in tl.static_range(COUNT):
        tl.store(at + i * STEP, tiles[FIRST + i].to(at.dtype.element_ty), mask=ok)


@triton.jit
def replaced(tiles, FIRST: tl.constexpr, COUNT: tl.constexpr, where, others):
    """tiles[FIRST : FIRST + COUNT] where the condition holds, elsewhere the first COUNT others."""
    chosen = ()
    for i in tl.static_range(COUNT):
        chosen = chosen + (tl.where(where, tiles[FIRST + i], others[i]),)
    return chosen


@triton.jit
def added(tiles, others, COUNT: tl.constexpr):
    """The sums of the first COUNT tiles and others."""
    sums = ()
    for i in tl.static_range(COUNT):
        sums = sums + (tiles[i] + others[i],)
    return sums


@triton.jit
def zeros(COUNT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """COUNT float32 tiles of zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((UNITS, ROWS), tl.float32),)
    return tiles
