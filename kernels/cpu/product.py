"""Products of rows with packed panels, and the packing.

A panel holds, for each k in turn, `columns` vectors of numbers that are multiplied with a[row, k]; what the columns stand for
(the gates of a block of units, or neighbouring columns of a matrix) is the packer's choice. Every product sums in one fixed
order, whatever the number of rows computed together: a row has the same bits in any company.
"""

from __future__ import annotations

from functools import cache

from numba import njit, types

from .plan import GROUP_BYTES, LINE, ROW_BLOCK
from .plan import ceil_div as _ceil_div
from .processor import Target
from .vector import VectorLibrary, load_int, prefetch, product_tile, store_int

# Longest chain of additions in one register: longer sums are sums of such chains, which keeps rounding small. Also so long a
# part of a panel, at most 32 KiB, stays in L1 while it meets a block of rows.
CHAIN = 128
ALONE = 8  # sums of a row alone that are under way at once: with fewer, multipliers would wait for those of the last k
WIDEST = 4  # columns of a panel so wide that it pays to leave out those past the end of a matrix
DOT_PART = 512  # numbers of a row of 16 that stay in L1

options = {"error_model": "numpy", "boundscheck": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def integers(count: int):
    """Signature void(int64, ...): with it Numba compiles a function once, not again for every constant argument."""
    return types.void(*[types.int64] * count)


ceil_div = njit(_ceil_div, **options)


def tile_rows(target: Target, columns: int) -> int:
    """Rows of the largest tile whose sums fit the registers, beside one of its sides and a register for the other's."""
    fitting = (rows for rows in range(1, 9) if rows * columns + min(rows, columns) + 1 <= target.registers)
    return max(fitting, default=1)  # of a cell with very many gates, no tile fits


def panels_together(v: VectorLibrary, columns: int) -> tuple[int, int]:
    """Panels of `columns` vectors that go together: with more rows than a tile has, and with a row alone, in one tile."""
    group = max(1, GROUP_BYTES // (columns * v.lanes * v.size))
    return group, min(group, max(1, ALONE // columns))


@cache
def make_product(v: VectorLibrary, target: Target, columns: int, half: str = ""):
    """product(...): `count` <= ROW_BLOCK rows times `together` panels, all of whose sums fit plan.scratch_bytes.

    panels:      the first panel; the next ones lie `panel_bytes` apart.
    panel_row:   bytes from one row of a panel to the next.
    wanted:      columns of the last of these panels that are multiplied and written, the others' sums stay what they were:
                 all, or fewer where the matrix ends. In bfloat16, and in panels of fewer than WIDEST columns, all are.
    sums:        the first together * count * columns vectors become the result, panel by panel.
    following:   the panel that comes next, or any: its first part is brought near meanwhile.
    add:         to what `sums` hold, all of them.

    Every part of a panel that is one chain long meets all rows in turn: the rest of a deep panel, which no cache near holds,
    is read once. Panels that go together meet the same part of the rows in turn: it, too, is read once for them; as many as
    panels_together says for a row alone meet one row in one tile. The first
    tile of rows brings a panel's part into L1; those after it prefetch the next part, evenly.

    half: the panels are in bfloat16, see product_tile; of "pairs" depth and a_stride are of single numbers all the same, and
    panel_row is of a pair.
    """
    vector, group = v.lanes * v.size, 2 if half == "pairs" else 1
    row_bytes = columns * v.lanes * (2 if half == "rows" else v.size)

    def tiles(rows, wanted):
        """Tiles of up to `rows` rows, by the number of rows."""
        tile = product_tile(v, rows, columns, half, 1, wanted)
        if rows == 1:

            @njit(integers(11), **options)
            def run(count, a_rows, a_offset, a_stride, panel, panel_row, depth, out, add, ahead, ahead_stride):
                tile(a_rows, a_offset, a_stride, panel, 0, panel_row, depth, out, add, ahead, ahead_stride)

            return run
        fewer = tiles(rows - 1, wanted)

        @njit(integers(11), **options)
        def run(count, a_rows, a_offset, a_stride, panel, panel_row, depth, out, add, ahead, ahead_stride):
            if count == rows:
                tile(a_rows, a_offset, a_stride, panel, 0, panel_row, depth, out, add, ahead, ahead_stride)
            else:
                fewer(count, a_rows, a_offset, a_stride, panel, panel_row, depth, out, add, ahead, ahead_stride)

        return run

    def narrowing(wide, narrowest):
        """Tiles of up to `wide` columns, by the number of columns that are wanted; the narrowest serve fewer, too."""
        own = tiles(most, wide)
        narrower = narrowing(wide - 1, narrowest) if wide > narrowest else own

        @njit(integers(12), **options)
        def run(wanted, count, a_rows, a_offset, a_stride, panel, panel_row, depth, out, add, ahead, ahead_stride):
            if wanted >= wide or wide == narrowest:
                own(count, a_rows, a_offset, a_stride, panel, panel_row, depth, out, add, ahead, ahead_stride)
            else:
                narrower(wanted, count, a_rows, a_offset, a_stride, panel, panel_row, depth, out, add, ahead, ahead_stride)

        return run

    most = tile_rows(target, columns)
    run = narrowing(columns, 1 if columns == WIDEST and not half else columns)
    alone = 1 if half else panels_together(v, columns)[1]
    lonely = product_tile(v, 1, columns, half, alone)

    @njit(integers(12), **options)
    def product(count, a_rows, a_stride, panels, panel_bytes, together, wanted, panel_row, depth, sums, following, add):
        k = 0
        while alone > 1 and count == 1 and together == alone and k < depth:
            length, part = min(depth - k, CHAIN), panels + k * panel_row
            lonely(a_rows, k * a_stride, a_stride, part, panel_bytes, panel_row, length, sums, add + k, part, 0)
            k += length
        while k < depth:
            length = min(depth - k, CHAIN)
            count_k = length // group
            for index in range(together):
                part = panels + index * panel_bytes + k // group * panel_row
                if index + 1 < together:
                    next_part = part + panel_bytes
                else:
                    next_part = panels + (k + length) // group * panel_row if k + length < depth else following
                i, tile, tiles = 0, 0, ceil_div(count, most)
                while i < count:
                    rows, out = ceil_div(count - i, tiles - tile), sums + (index * count + i) * columns * vector
                    ahead, ahead_stride = part, 0
                    if tile > 0:
                        ahead_stride = min(LINE, ceil_div(row_bytes, tiles - 1))
                        ahead = next_part + (tile - 1) * count_k * ahead_stride
                    run(
                        wanted if index + 1 == together else columns, rows, a_rows + 8 * i, k * a_stride, group * a_stride,
                        part, panel_row, count_k, out, add + k, ahead, ahead_stride,
                    )  # fmt: skip
                    i += rows
                    tile += 1
            k += length

    return product


@cache
def make_dot_rows(v: VectorLibrary, half: bool = False):
    """dot_rows(...): rows times up to `lanes` rows of a matrix as torch keeps it, which are read once and never packed.

    a_rows: address of `count` row addresses.
    w:      `units` rows, of which `lanes` at most are meant, of `depth` numbers, next to each other.
    sums:   where the vector of each row goes, `stride` bytes apart; lanes past `units` are not to be used.
    buffer: of `lanes` times DOT_PART numbers, if half.
    half:   the matrix is in bfloat16.
    """
    size, lanes, dots = v.size, v.lanes, v.half.dots if half else v.dots
    w_size = 2 if half else size
    store, load_all, store_all, zero = v.store, v.load_all, v.store_all, v.zero
    if half:
        spread, dots_of_spread = v.half.spread, v.half.dots_of_spread

        @njit(integers(4), **options)
        def widen(w, row_bytes, length, buffer):
            for unit in range(lanes):
                for k in range(0, length, 2 * lanes):
                    spread(w + unit * row_bytes + 2 * k, length - k, buffer + (unit * DOT_PART + k) * size)

    else:
        dots_of_spread, widen = dots, njit(lambda w, row_bytes, length, buffer: None, **options)

    @njit(integers(8), **options)
    def dot_rows(count, a_rows, w, units, depth, sums, stride, buffer):
        k, widened = 0, half and count > 2 and units >= lanes  # so many rows share what widening costs
        while k < depth:  # a part that stays in L1 meets all rows
            length = min(DOT_PART, depth - k)
            if widened:
                widen(w + k * w_size, depth * w_size, length, buffer)
            for m in range(count):
                x, out = load_int(a_rows + 8 * m) + k * size, sums + m * stride
                if units >= lanes:
                    if widened:
                        total = dots_of_spread(buffer, DOT_PART * size, x, length)
                    else:
                        total = dots(w + k * w_size, depth * w_size, x, length)
                    store_all(out, total + load_all(out) if k > 0 else total)
                else:
                    if k == 0:
                        store_all(out, zero())
                    for unit in range(units):
                        total = dots(w + (unit * depth + k) * w_size, 0, x, length)
                        store(out + unit * size, total + load_all(out + unit * size) if k > 0 else total, 1)
            k += length

    return dot_rows


@cache
def make_deliver(v: VectorLibrary, columns: int):
    """(expect, deliver): where a panel's sums go, rows of a matrix; and the sums, to `width` numbers of each of `count` rows.

    out_rows: address of `count` int64 row addresses.
    add:      to what is there, which `expect` brings near before the sums are known: else they would wait for it.
    sums:     count * columns vectors.
    """
    vector, size, lanes = v.lanes * v.size, v.size, v.lanes
    load, store, load_all = v.load, v.store, v.load_all

    @njit(integers(3), **options)
    def expect(count, out_rows, panel):
        for m in range(count):
            for j in range(columns):
                prefetch(load_int(out_rows + 8 * m) + (panel * columns + j) * vector)

    @njit(integers(6), **options)
    def deliver(count, out_rows, panel, width, add, sums):
        for m in range(count):
            row = load_int(out_rows + 8 * m)
            for j in range(columns):
                column = (panel * columns + j) * lanes
                if column < width:
                    value = load_all(sums + (m * columns + j) * vector)
                    if add:
                        value = value + load(row + column * size, width - column)
                    store(row + column * size, value, width - column)

    return expect, deliver


@cache
def make_multiply(v: VectorLibrary, target: Target, columns: int, half: str = ""):
    """multiply(...): out[i, :width] (=, or += if add) sum over k of a[i, k] * panels[k, :width].

    a_rows, out_rows: address of `count` int64 row addresses.
    panels:           `panel_bytes` apart, each of `depth` rows, `panel_row` bytes apart.
    first, last:      the panels (columns * lanes numbers wide each) to do: groups of them, where there are many rows.
    scratch:          plan.scratch_bytes.
    half:             the panels are in bfloat16, see product_tile.
    """
    product, group = make_product(v, target, columns, half), panels_together(v, columns)[0]
    expect, deliver = make_deliver(v, columns)
    most, lanes, vector = tile_rows(target, columns), v.lanes, v.lanes * v.size

    @njit(integers(13), **options)
    def multiply(
        count, a_rows, a_stride, panels, panel_bytes, panel_row, depth, width, first, last, out_rows, add, scratch
    ):  # fmt: skip
        together = group if count > most else 1
        for panel in range(first, last, together):
            weights, beside = panels + panel * panel_bytes, min(together, last - panel)
            following = panels + min(panel + together, last - 1) * panel_bytes
            wanted = min(columns, ceil_div(width, lanes) - (panel + beside - 1) * columns)
            i = 0
            while i < count:
                rows = min(count - i, ROW_BLOCK)
                for q in range(beside if add else 0):
                    expect(rows, out_rows + 8 * i, panel + q)
                product(
                    rows, a_rows + 8 * i, a_stride, weights, panel_bytes, beside, wanted, panel_row, depth, scratch, following,
                    0,
                )  # fmt: skip
                for q in range(beside):
                    deliver(rows, out_rows + 8 * i, panel + q, width, add, scratch + q * rows * columns * vector)
                i += rows

    return multiply


@cache
def make_pack_rows(v: VectorLibrary, columns: int, half: bool = False):
    """pack_rows(...): to `out`, panel `panel` of the matrix whose `depth` rows, `width` wide, have addresses `rows`.

    half: the matrix is in bfloat16.
    """
    vector, size, lanes = v.lanes * v.size, 2 if half else v.size, v.lanes
    load, store_all, zero = v.half.load if half else v.load, v.store_all, v.zero

    @njit(integers(5), **options)
    def pack_rows(rows, depth, width, panel, out):
        for k in range(depth):
            row = load_int(rows + 8 * k)
            for j in range(columns):
                column = (panel * columns + j) * lanes
                if column < width:
                    store_all(out, load(row + column * size, width - column))
                else:
                    store_all(out, zero())
                out += vector

    return pack_rows


@cache
def make_pack_columns(v: VectorLibrary, half: bool = False):
    """pack_columns(...): `units` <= lanes rows of `depth` numbers at `source`, turned so that k runs down `out`.

    out: `depth` vectors, out_stride bytes apart, one lane a row, zero in the lanes past `units`.
    half: the rows are in bfloat16.
    """
    size, lanes, source_size = v.size, v.lanes, 2 if half else v.size
    block = 2 * lanes if half else lanes  # k of a transposition
    load_scalar, transpose = (v.half.load_scalar, v.half.transpose) if half else (v.load_scalar, v.transpose)
    store_scalar, store_all, zero = v.store_scalar, v.store_all, v.zero

    @njit(integers(6), **options)
    def pack_columns(source, source_stride, units, depth, out, out_stride):
        k = 0
        if units >= lanes:
            while k + block <= depth:
                transpose(source + k * source_size, source_stride, out + k * out_stride, out_stride)
                k += block
        while k < depth:
            store_all(out + k * out_stride, zero())
            for unit in range(min(units, lanes)):
                value = load_scalar(source + unit * source_stride + k * source_size)
                store_scalar(out + k * out_stride + unit * size, value)
            k += 1

    return pack_columns


@njit(integers(4), **options)
def fill_rows(table, count, first, stride):
    """Write `count` addresses, `stride` bytes apart from `first` on, to `table`."""
    for i in range(count):
        store_int(table + 8 * i, first + i * stride)


@njit(integers(3), **options)
def shift_rows(table, count, by):
    """Add `by` bytes to each of the `count` addresses at `table`."""
    for i in range(count if by else 0):
        store_int(table + 8 * i, load_int(table + 8 * i) + by)
