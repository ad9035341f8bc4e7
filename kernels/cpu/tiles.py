"""Products in tile registers (Intel's AMX), of matrices in bfloat16 with rows in float32.

A tile is 16 rows of 64 bytes. One instruction multiplies 16 rows of 32 numbers in bfloat16 with 32 x 16 of them and adds the
products, which are exact, to sums in float32. A number in float32 is the sum of three in bfloat16: forward takes rows apart
into these. Backward makes do with two, which leave out 2**-17 at most, where bfloat16 would leave out 2**-8. Where both factors
are apart, in the weights' gradients, the product of both second parts is left out, too: of a product 2**-15 at most. Numbers
below 2**-126 count as zero, and an infinity that meets what is left of an exact number, which is zero, gives NaN.

Rows and panels are kept as tiles. Of each 16 rows and each block of 32 numbers there is a tile for every part; of a panel and
each block one for every column and part, whose rows are pairs of numbers and whose columns are units. Past the depth both are
zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..cells import bind
from . import plan
from .plan import LINE, TILE_BYTES, TILE_DEPTH, TILE_PAIRS, TILE_ROWS
from .processor import Target
from .product import ceil_div, integers, make_deliver, make_pack_columns, options
from .vector import I16, I32, I64, VectorLibrary, load_int, store_int

I8 = ir.IntType(8)
SUMS = 4  # of the eight tiles hold sums; two hold rows, and two a panel's

tile_blocks = njit(bind(plan.tile_blocks, ceil_div=ceil_div), **options)


def _call(builder, name: str, *arguments):
    """Call an instruction of LLVM's that gives nothing."""
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _place(builder, *addends):
    """A pointer to the sum of these addresses and offsets."""
    address = addends[0]
    for addend in addends[1:]:
        address = builder.add(address, addend)
    return builder.inttoptr(address, I8.as_pointer())


@intrinsic
def _load_configuration(typing_context, address):
    def codegen(context, builder, sig, args):
        _call(builder, "ldtilecfg", _place(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _release(typing_context):
    def codegen(context, builder, sig, args):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _stack(typing_context):
    """Room for a block of a panel's column in float32, in the caller's frame."""

    def codegen(context, builder, sig, args):
        room = cgutils.alloca_once(builder, ir.ArrayType(I8, TILE_DEPTH * LINE))
        room.align = LINE
        return builder.ptrtoint(room, I64)

    return types.int64(), codegen


@njit(**options)
def rows_at(tiles, i, blocks, parts):
    """Where the tiles of row i, and of those that share them, begin."""
    return tiles + i // TILE_ROWS * blocks * parts * TILE_BYTES


nothing = njit(lambda *_: 0, **options)


def for_tiles(v: VectorLibrary, target: Target, make: Callable[..., Any], *arguments: Any) -> Any:
    """The function that `make` makes of these, or one that does nothing where numbers or processor have no tiles."""
    return make(*arguments) if v.half is not None and target.tiles else nothing


@cache
def make_configure(target: Target):
    """configure(): this thread's tiles, before the first product."""

    @njit(**options)
    def configure():
        # The only palette there is, 1; of each of eight tiles two bytes that hold a row's, 64, and one that holds its rows, 16.
        space = _stack()
        for word, value in enumerate((1, 0, 0x0040004000400040, 0x0040004000400040, 0, 0, 0x1010101010101010, 0)):
            store_int(space + 8 * word, value)
        _load_configuration(space)

    return nothing if target.tiles == "emulated" else configure


@cache
def make_release(target: Target):
    """release(): after the last product."""
    return nothing if target.tiles == "emulated" else njit(lambda: _release(), **options)


@cache
def make_parts(v: VectorLibrary):
    """(nearest, rest, store_upper, store_pairs, differ): numbers taken apart."""
    V, lanes = v.type, v.lanes

    def every(bits):
        return ir.Constant(V.integer, [I32(bits)] * lanes)

    def bits_of(builder, value):
        return builder.bitcast(value, V.integer)

    def magnitude_of(builder, value):
        return builder.and_(bits_of(builder, value), every(0x7FFFFFFF))

    @intrinsic
    def nearest(typing_context, value):
        """The numbers rounded to bfloat16; what would become infinite, or is not finite, is cut off."""

        def codegen(context, builder, sig, args):
            small = builder.icmp_unsigned("<", magnitude_of(builder, args[0]), every(0x7F7F8000))
            bits = builder.add(bits_of(builder, args[0]), builder.select(small, every(0x8000), every(0)))
            return builder.bitcast(builder.and_(bits, every(0xFFFF0000)), V.llvm)

        return V(V), codegen

    @intrinsic
    def rest(typing_context, value, part):
        """What is left without a part: nothing of an infinity, and of a NaN a NaN."""

        def codegen(context, builder, sig, args):
            infinite = builder.icmp_signed("==", magnitude_of(builder, args[0]), every(0x7F800000))
            return builder.select(infinite, ir.Constant(V.llvm, None), builder.fsub(*args))

        return V(V, V), codegen

    @intrinsic
    def store_upper(typing_context, address, value):
        """A vector's numbers in bfloat16, next to each other."""

        def codegen(context, builder, sig, args):
            kind = ir.VectorType(I16, lanes)
            numbers = builder.trunc(builder.lshr(bits_of(builder, args[1]), every(16)), kind)
            builder.store(numbers, builder.inttoptr(args[0], kind.as_pointer())).align = 2
            return context.get_dummy_value()

        return types.void(types.int64, V), codegen

    @intrinsic
    def store_pairs(typing_context, address, first, second):
        """Two vectors' numbers in bfloat16, in pairs."""

        def codegen(context, builder, sig, args):
            first, second = (bits_of(builder, value) for value in args[1:])
            pairs = builder.or_(builder.lshr(first, every(16)), builder.and_(second, every(0xFFFF0000)))
            builder.store(pairs, builder.inttoptr(args[0], V.integer.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(types.int64, V, V), codegen

    @intrinsic
    def differ(typing_context, a, b):
        """Lanes whose bits differ, as the bits of a number."""

        def codegen(context, builder, sig, args):
            mask = builder.icmp_signed("!=", *(bits_of(builder, value) for value in args))
            return builder.zext(builder.bitcast(mask, ir.IntType(lanes)), I64)

        return types.int64(V, V), codegen

    return nearest, rest, store_upper, store_pairs, differ


@cache
def make_parts_of(v: VectorLibrary, most: int):
    """parts_of(...): whether some rows of numbers in float32 need `most` parts, or are in bfloat16 and need but one."""
    size, lanes, load = v.size, v.lanes, v.load
    nearest, _, _, _, differ = make_parts(v)

    @njit(types.int64(*[types.int64] * 3), **options)
    def parts_of(count, rows, depth):
        for i in range(count):
            row, different = load_int(rows + 8 * i), 0
            for k in range(0, depth, lanes):
                value = load(row + k * size, depth - k)
                different |= differ(value, nearest(value))
            if different:
                return most
        return 1

    return parts_of


@cache
def make_take_apart(v: VectorLibrary):
    """take_apart(...): a vector's parts, each to the next tile from `out` on."""
    nearest, rest, store_upper, _, _ = make_parts(v)

    @njit(**options)
    def take_apart(value, parts, out):
        for part in range(parts):
            rounded = nearest(value)
            store_upper(out + part * TILE_BYTES, rounded)
            value = rest(value, rounded)

    return take_apart


@cache
def make_split(v: VectorLibrary):
    """split(...): `count` rows of `depth` numbers in float32, of which `rows` is a table, in parts, as tiles."""
    size, lanes, load, take_apart = v.size, v.lanes, v.load, make_take_apart(v)

    @njit(integers(5), **options)
    def split(count, rows, depth, parts, out):
        blocks = tile_blocks(depth)
        for i in range(count):
            row, own = load_int(rows + 8 * i), rows_at(out, i, blocks, parts) + i % TILE_ROWS * LINE
            for k in range(0, TILE_DEPTH * blocks, lanes):
                at = own + k // TILE_DEPTH * parts * TILE_BYTES + k % TILE_DEPTH * 2
                take_apart(load(row + k * size, depth - k), parts, at)

    return split


@cache
def make_split_columns(v: VectorLibrary):
    """split_columns(...): the same of rows that are a matrix's columns: k of row i is at columns + k * row_bytes + i * size."""
    size, lanes, load_all, zero, take_apart = v.size, v.lanes, v.load_all, v.zero, make_take_apart(v)
    pack_columns = make_pack_columns(v)

    @njit(integers(6), **options)
    def split_columns(count, columns, row_bytes, depth, parts, out):
        blocks, turned = tile_blocks(depth), _stack()
        for i in range(0, count, TILE_ROWS):
            n, tiles = min(TILE_ROWS, count - i), rows_at(out, i, blocks, parts)
            for k in range(0, TILE_DEPTH * blocks, lanes):
                at = tiles + k // TILE_DEPTH * parts * TILE_BYTES + k % TILE_DEPTH * 2
                if k < depth:
                    source = columns + k * row_bytes + i * size
                    pack_columns(source, row_bytes, min(lanes, depth - k), n, turned, LINE)
                for m in range(n):
                    take_apart(load_all(turned + m * LINE) if k < depth else zero(), parts, at + m * LINE)

    return split_columns


@cache
def make_pack_block(v: VectorLibrary):
    """pack_block(...): a block of one column of a panel, of `count` vectors in float32, one for each k, as tiles at `out`."""
    vector, load_all, zero = v.lanes * v.size, v.load_all, v.zero
    nearest, rest, _, store_pairs, _ = make_parts(v)

    @njit(integers(4), **options)
    def pack_block(numbers, count, parts, out):
        for pair in range(TILE_PAIRS):
            at, k = numbers + 2 * pair * vector, 2 * pair
            a = load_all(at) if k < count else zero()
            b = load_all(at + vector) if k + 1 < count else zero()
            for part in range(parts):
                part_a, part_b = nearest(a), nearest(b)
                store_pairs(out + part * TILE_BYTES + pair * LINE, part_a, part_b)
                a, b = rest(a, part_a), rest(b, part_b)

    return pack_block


@cache
def make_pack_columns_block(v: VectorLibrary):
    """pack_columns_block(...): such a block from `count` numbers of each of `units` rows of a matrix in bfloat16."""
    vector, pack_columns, pack_block = v.lanes * v.size, make_pack_columns(v, True), make_pack_block(v)

    @njit(integers(5), **options)
    def pack_columns_block(source, source_stride, units, count, out):
        turned = _stack()
        pack_columns(source, source_stride, units, count, turned, vector)
        pack_block(turned, count, 1, out)

    return pack_columns_block


@cache
def make_pack_rows_block(v: VectorLibrary):
    """pack_rows_block(...): such a block from the numbers from `column` on of `count` rows, `width` wide, of which `rows` is a
    table; these are in bfloat16 if half."""
    size, vector, load, load_half = v.size, v.lanes * v.size, v.load, v.half.load
    store_all, pack_block = v.store_all, make_pack_block(v)

    @njit(integers(7), **options)
    def pack_rows_block(rows, column, count, width, half, parts, out):
        gathered = _stack()
        for k in range(count):
            if half:
                store_all(gathered + k * vector, load_half(load_int(rows + 8 * k) + 2 * column, width - column))
            else:
                store_all(gathered + k * vector, load(load_int(rows + 8 * k) + size * column, width - column))
        pack_block(gathered, count, parts, out)

    return pack_rows_block


@cache
def _make_block(v: VectorLibrary, tiles: int, columns: int, row_parts: int, panel_parts: int):
    """block(...): `tiles` tiles of rows times `columns` tiles of each block of a panel; sums at `out`.

    An instruction takes 16 cycles and its sums come after 52: so each of four sums has its turn before the first has another,
    where there are two tiles of rows. Where there is one the processor has to look ahead, to the next pair of columns.
    """

    @intrinsic
    def clear(typing_context):
        def codegen(context, builder, sig, args):
            for sums in range(tiles * columns):
                _call(builder, "tilezero", I8(sums))
            return context.get_dummy_value()

        return types.void(), codegen

    @intrinsic
    def multiply(typing_context, rows, next_rows, panel):
        def codegen(context, builder, sig, args):
            *rows, panel = args
            loads = [0, 0]  # of rows, of a panel: each has two registers, so that one is loaded while one is used

            def load_tile(which, base, index):
                register = SUMS + 2 * which + loads[which] % 2
                loads[which] += 1
                _call(builder, "tileloadd64", I8(register), _place(builder, base, I64(index * TILE_BYTES)), I64(LINE))
                return register

            for panel_part in range(panel_parts):
                for first in range(0, columns, 2):
                    pair = range(first, min(first + 2, columns))
                    weights = {column: load_tile(1, panel, column * panel_parts + panel_part) for column in pair}
                    for row_part in range(row_parts - panel_part):
                        for tile in range(tiles):
                            own = load_tile(0, rows[tile], row_part)
                            for column, register in weights.items():
                                _call(builder, "tdpbf16ps", I8(tile * columns + column), I8(own), I8(register))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    @intrinsic
    def keep(typing_context, out, out_row):
        def codegen(context, builder, sig, args):
            out, out_row = args
            for tile in range(tiles):
                for column in range(columns):
                    offset = builder.mul(out_row, I64(tile * TILE_ROWS))
                    place = _place(builder, out, offset, I64(column * LINE))
                    _call(builder, "tilestored64", I8(tile * columns + column), place, out_row)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    @njit(integers(6), **options)
    def block(rows, panel, stride, blocks, out, out_row):
        clear()
        for k in range(blocks):
            place = rows + k * row_parts * TILE_BYTES
            multiply(place, rows_at(place, TILE_ROWS, blocks, row_parts), panel + k * stride)
        keep(out, out_row)

    return block


@cache
def _make_emulated_block(v: VectorLibrary, tiles: int, columns: int, row_parts: int, panel_parts: int):
    """The same of plain vectors, for processors without tiles: for tests. It sums in the same order, by Intel's description."""
    lanes, load_half, spread = v.lanes, v.half.load_scalar, v.half.spread
    load_all, store_all, store_scalar, multiply_add, zero = v.load_all, v.store_all, v.store_scalar, v.multiply_add, v.zero

    @njit(**options)
    def row_times_tile(row, tile, space):
        """The products of a row's 32 numbers: those of first and of second numbers of pairs are summed apart."""
        first, second = zero(), zero()
        for pair in range(TILE_PAIRS):
            spread(tile + pair * LINE, 2 * lanes, space)
            for member in range(2):
                store_scalar(space + (2 + member) * LINE, load_half(row + 4 * pair + 2 * member))
            first = multiply_add(space + 2 * LINE, load_all(space), first)
            second = multiply_add(space + 3 * LINE, load_all(space + LINE), second)
        return first + second

    @njit(integers(6), **options)
    def block(rows, panel, stride, blocks, out, out_row):
        space = _stack()
        for m in range(tiles * TILE_ROWS):
            for column in range(columns):
                total = zero()
                for k in range(blocks):
                    row = rows_at(rows, m, blocks, row_parts) + k * row_parts * TILE_BYTES + m % TILE_ROWS * LINE
                    tile = panel + k * stride + column * panel_parts * TILE_BYTES
                    for panel_part in range(panel_parts):
                        for part in range(row_parts - panel_part):
                            own = row + part * TILE_BYTES
                            total = total + row_times_tile(own, tile + panel_part * TILE_BYTES, space)
                store_all(out + m * out_row + column * LINE, total)

    return block


@cache
def make_tile_product(v: VectorLibrary, target: Target, columns: int, row_parts: int, panel_parts: int = 1):
    """product(...): `count` rows, of row_parts parts, times a panel of `columns` vectors, of panel_parts.

    sums: room for whole tiles of rows; the first count * columns vectors become the result.
    """
    make = _make_emulated_block if target.tiles == "emulated" else _make_block
    row_bytes, stride, in_pairs = columns * LINE, columns * panel_parts * TILE_BYTES, columns == 4
    single = make(v, 1, columns, row_parts, panel_parts)
    double = make(v, 2, 2, row_parts, panel_parts) if in_pairs else single

    @njit(integers(5), **options)
    def product(count, rows, panel, blocks, sums):
        i = 0
        while i < count:
            a, out = rows_at(rows, i, blocks, row_parts), sums + i * row_bytes
            if in_pairs and count - i > TILE_ROWS:  # two tiles of rows share half of the panel's tiles, and then the others
                for column in range(0, columns, 2):
                    double(a, panel + column * panel_parts * TILE_BYTES, stride, blocks, out + column * LINE, row_bytes)
                i += 2 * TILE_ROWS
            else:
                single(a, panel, stride, blocks, out, row_bytes)
                i += TILE_ROWS

    return product


@cache
def make_tile_multiply(v: VectorLibrary, target: Target, columns: int, row_parts: int, panel_parts: int = 1):
    """multiply(...): what product.make_multiply gives, of rows and panels that are tiles, `depth` numbers deep.

    panels: next to each other.
    """
    product = make_tile_product(v, target, columns, row_parts, panel_parts)
    expect, deliver = make_deliver(v, columns)

    @njit(integers(10), **options)
    def multiply(count, rows, panels, depth, width, first, last, out_rows, add, scratch):
        blocks = tile_blocks(depth)
        for panel in range(first, last):
            weights = panels + panel * blocks * columns * panel_parts * TILE_BYTES
            for i in range(0, count, 2 * TILE_ROWS):
                n = min(count - i, 2 * TILE_ROWS)
                if add:
                    expect(n, out_rows + 8 * i, panel)
                product(n, rows_at(rows, i, blocks, row_parts), weights, blocks, scratch)
                deliver(n, out_rows + 8 * i, panel, width, add, scratch)

    return multiply
