"""Products in tile registers (Intel's AMX): rows in float32 times panels in bfloat16, without rounding the rows.

A tile is 16 rows of 64 bytes. One instruction multiplies 16 rows of 32 numbers in bfloat16 with 32 x 16 of them and adds the
products, which are exact, to sums in float32. A number in float32 is the sum of three in bfloat16, of 8 bits each: a row is
taken apart into three, which meet a panel together. Numbers below 2**-126 count as zero, and an infinite weight gives NaN.

Rows and panels are kept as tiles. Of each 16 rows and each block of 32 numbers there is a tile for every part; of a panel and
each block a tile for every column, whose rows are pairs of numbers and whose columns are units. Past the depth both are zero.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..cells import bind
from . import plan
from .plan import LINE, TILE_BYTES, TILE_PAIRS, TILE_ROWS
from .processor import Target
from .product import ceil_div, integers, make_pack_columns, options
from .vector import I16, I32, I64, VectorLibrary, load_int, store_int

I8 = ir.IntType(8)
PARTS = 3  # numbers in bfloat16 that make one in float32
SUMS = 4  # of the eight tiles hold sums; two hold rows, and two a panel's

tile_blocks = njit(bind(plan.tile_blocks, ceil_div=ceil_div), **options)
split_bytes = njit(bind(plan.split_bytes, tile_blocks=tile_blocks, ceil_div=ceil_div), **options)


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
def _copy_half(typing_context, source, destination):
    """A number in bfloat16, from address to address."""

    def codegen(context, builder, sig, args):
        source, destination = (builder.inttoptr(address, I16.as_pointer()) for address in args)
        builder.store(builder.load(source), destination)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@cache
def make_configure(target: Target):
    """(configure, release): of this thread's tiles. configure(space), 64 bytes, comes before the first product."""

    @njit(integers(1), **options)
    def configure(space):
        # The only palette there is, 1; of each of eight tiles two bytes that hold a row's, 64, and one that holds its rows, 16.
        for word, value in enumerate((1, 0, 0x0040004000400040, 0x0040004000400040, 0, 0, 0x1010101010101010, 0)):
            store_int(space + 8 * word, value)
        _load_configuration(space)

    @njit(**options)
    def release():
        _release()

    if target.tiles == "emulated":
        return njit(lambda space: None, **options), njit(lambda: None, **options)
    return configure, release


@cache
def make_pack_tiles(v: VectorLibrary):
    """pack_tiles(...): `units` <= lanes rows of `depth` numbers in bfloat16 at `source`, as tiles of pairs.

    out: a tile for each block of TILE_PAIRS pairs, `stride` bytes apart. Its rows are pairs, each lane a unit's; zero in the
         lanes past `units` and from `depth` on.
    """
    lanes, size, vector, store_all, zero = v.lanes, v.size, v.lanes * v.size, v.store_all, v.zero
    pack_columns = make_pack_columns(v)  # which takes a pair for one number in float32

    @njit(integers(5), **options)
    def pack_tiles(source, units, depth, out, stride):
        for block in range(tile_blocks(depth)):
            first, tile = 2 * TILE_PAIRS * block, out + block * stride
            length = min(2 * TILE_PAIRS, depth - first)
            pack_columns(source + 2 * first, 2 * depth, units, length // 2, tile, vector)
            for pair in range(length // 2, TILE_PAIRS):
                store_all(tile + pair * vector, zero())
            if length % 2:
                for unit in range(min(units, lanes)):
                    _copy_half(source + 2 * (unit * depth + depth - 1), tile + length // 2 * vector + unit * size)

    return pack_tiles


@cache
def make_split(v: VectorLibrary):
    """(parts_of, split): how many numbers in bfloat16 the numbers of some rows take, one or PARTS; and those, in tiles."""
    V, size, lanes, load = v.type, v.size, v.lanes, v.load

    def every(bits):
        return ir.Constant(V.integer, [I32(bits)] * lanes)

    @intrinsic
    def upper(typing_context, value):
        """The numbers cut off to bfloat16."""

        def codegen(context, builder, sig, args):
            bits = builder.and_(builder.bitcast(args[0], V.integer), every(0xFFFF0000))
            return builder.bitcast(bits, V.llvm)

        return V(V), codegen

    @intrinsic
    def rest(typing_context, value, cut_off):
        """What was cut off: nothing of an infinity, and of a NaN a NaN."""

        def codegen(context, builder, sig, args):
            value, cut_off = args
            magnitude = builder.and_(builder.bitcast(value, V.integer), every(0x7FFFFFFF))
            infinite = builder.icmp_signed("==", magnitude, every(0x7F800000))
            return builder.select(infinite, ir.Constant(V.llvm, None), builder.fsub(value, cut_off))

        return V(V, V), codegen

    @intrinsic
    def store_upper(typing_context, address, value):
        def codegen(context, builder, sig, args):
            bits = builder.lshr(builder.bitcast(args[1], V.integer), every(16))
            kind = ir.VectorType(I16, lanes)
            builder.store(builder.trunc(bits, kind), builder.inttoptr(args[0], kind.as_pointer())).align = 2
            return context.get_dummy_value()

        return types.void(types.int64, V), codegen

    @intrinsic
    def differ(typing_context, a, b):
        """Lanes whose bits differ, as the bits of a number."""

        def codegen(context, builder, sig, args):
            a, b = (builder.bitcast(value, V.integer) for value in args)
            mask = builder.bitcast(builder.icmp_signed("!=", a, b), ir.IntType(lanes))
            return builder.zext(mask, I64)

        return types.int64(V, V), codegen

    @njit(types.int64(*[types.int64] * 3), **options)
    def parts_of(count, rows, depth):
        for i in range(count):
            row, different = load_int(rows + 8 * i), 0
            for k in range(0, depth, lanes):
                value = load(row + k * size, depth - k)
                different |= differ(value, upper(value))
            if different:
                return PARTS
        return 1

    @njit(integers(5), **options)
    def split(count, rows, depth, parts, out):
        blocks, block = tile_blocks(depth), 2 * TILE_PAIRS
        for i in range(count):
            row, own = load_int(rows + 8 * i), out + i // TILE_ROWS * blocks * parts * TILE_BYTES + i % TILE_ROWS * LINE
            for k in range(0, block * blocks, lanes):
                value, at = load(row + k * size, depth - k), own + k // block * parts * TILE_BYTES + k % block * 2
                for part in range(parts):
                    cut_off = upper(value)
                    store_upper(at + part * TILE_BYTES, cut_off)
                    value = rest(value, cut_off)

    return parts_of, split


@cache
def _make_block(v: VectorLibrary, tiles: int, columns: int, parts: int):
    """block(...): `tiles` tiles of rows, of so many parts, times `columns` tiles of each block of a panel; sums at `out`.

    An instruction takes 16 cycles and its sums come after 52: so each of four sums has its turn before the first has another.
    """
    rows_tile, panel_tile = (SUMS, SUMS + 1), (SUMS + 2, SUMS + 3)  # two of each, so that one is loaded while one is used

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

            def load_tile(tile, base, index):
                _call(builder, "tileloadd64", I8(tile), _place(builder, base, I64(index * TILE_BYTES)), I64(LINE))

            stays = columns <= 2
            for column in range(columns if stays else 0):
                load_tile(panel_tile[column % 2], panel, column)
            for part in range(parts):
                for tile in range(tiles):
                    own = rows_tile[(part * tiles + tile) % 2]
                    load_tile(own, rows[tile], part)
                    for column in range(columns):
                        if not stays:
                            load_tile(panel_tile[column % 2], panel, column)
                        _call(builder, "tdpbf16ps", I8(tile * columns + column), I8(own), I8(panel_tile[column % 2]))
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

    @njit(integers(7), **options)
    def block(rows, panel, stride, blocks, out, out_row, _):
        clear()
        for k in range(blocks):
            place = rows + k * parts * TILE_BYTES
            multiply(place, place + blocks * parts * TILE_BYTES, panel + k * stride)
        keep(out, out_row)

    return block


@cache
def _make_emulated_block(v: VectorLibrary, tiles: int, columns: int, parts: int):
    """The same of plain vectors, for processors without tiles: for tests. It uses three vectors at `space`."""
    lanes, load_half, spread = v.lanes, v.half.load_scalar, v.half.spread
    load_all, store_all, store_scalar, multiply_add, zero = v.load_all, v.store_all, v.store_scalar, v.multiply_add, v.zero

    @njit(integers(7), **options)
    def block(rows, panel, stride, blocks, out, out_row, space):
        for m in range(tiles * TILE_ROWS):
            for column in range(columns):
                total = zero()
                for k in range(blocks):
                    row = rows + (m // TILE_ROWS * blocks + k) * parts * TILE_BYTES + m % TILE_ROWS * LINE
                    for pair in range(TILE_PAIRS):
                        spread(panel + k * stride + column * TILE_BYTES + pair * LINE, 2 * lanes, space)
                        for part in range(parts):
                            for member in range(2):
                                store_scalar(space + 2 * LINE, load_half(row + part * TILE_BYTES + 4 * pair + 2 * member))
                                total = multiply_add(space + 2 * LINE, load_all(space + member * LINE), total)
                store_all(out + m * out_row + column * LINE, total)

    return block


@cache
def make_tile_product(v: VectorLibrary, target: Target, columns: int):
    """product(...): `count` <= ROW_BLOCK rows, of one part or of PARTS, times a panel of `columns` vectors, of so many blocks.

    sums:  room for ROW_BLOCK rows; the first count * columns vectors become the result.
    space: plan.TILE_SPACE_BYTES.
    """
    make = _make_emulated_block if target.tiles == "emulated" else _make_block
    row_bytes, stride, in_pairs = columns * LINE, columns * TILE_BYTES, columns == 4
    one_exact, one_parted = make(v, 1, columns, 1), make(v, 1, columns, PARTS)
    two_exact, two_parted = (make(v, 2, 2, 1), make(v, 2, 2, PARTS)) if in_pairs else (one_exact, one_parted)

    @njit(integers(7), **options)
    def product(count, rows, parts, panel, blocks, sums, space):
        i = 0
        while i < count:
            a, out = rows + i // TILE_ROWS * blocks * parts * TILE_BYTES, sums + i * row_bytes
            if in_pairs and count - i > TILE_ROWS:  # two tiles of rows share half of the panel's tiles, and then the others
                for column in range(0, columns, 2):
                    b, place = panel + column * TILE_BYTES, out + column * LINE
                    if parts > 1:
                        two_parted(a, b, stride, blocks, place, row_bytes, space)
                    else:
                        two_exact(a, b, stride, blocks, place, row_bytes, space)
                i += 2 * TILE_ROWS
            else:
                if parts > 1:
                    one_parted(a, panel, stride, blocks, out, row_bytes, space)
                else:
                    one_exact(a, panel, stride, blocks, out, row_bytes, space)
                i += TILE_ROWS

    return product
