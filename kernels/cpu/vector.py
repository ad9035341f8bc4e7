"""Registers as Numba values: arithmetic, memory access and dot products over a fixed number of lanes.

A `Vector` is an LLVM vector that Numba carries like a number, so that a cell's plain arithmetic (cells.py) compiles straight
to the widest registers of the target, whatever LLVM's own loop vectoriser would have made of it. Addresses are int64.
"""

from __future__ import annotations

import itertools
import operator
from functools import cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from .processor import Target

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """`lanes` numbers of one scalar type in one register."""

    def __init__(self, scalar: types.Float, lanes: int):
        self.scalar, self.lanes = scalar, lanes
        self.element = ir.FloatType() if scalar == types.float32 else ir.DoubleType()
        self.llvm = ir.VectorType(self.element, lanes)
        self.integer = ir.VectorType(I32 if scalar == types.float32 else I64, lanes)
        super().__init__(name=f"Vector({scalar}, {lanes})")


class Mask(types.Type):
    """A condition of each lane of a vector."""

    def __init__(self, lanes: int):
        self.llvm = ir.VectorType(ir.IntType(1), lanes)
        super().__init__(name=f"Mask({lanes})")


@register_model(Mask)
@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.llvm)


def _splat(builder, value, lanes):
    """The scalar in every lane."""
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(empty, value, I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def constant(vector: Vector, value: float):
    return ir.Constant(vector.llvm, [ir.Constant(vector.element, value)] * vector.lanes)


@cache
def register_arithmetic(vector: Vector) -> None:
    """Teach Numba + - * / and comparisons on this vector type; Python's numbers are constants in every lane."""

    def apply(opcode):
        return lambda builder, *operands: getattr(builder, opcode)(*operands)

    def compare(sign):  # false where one of the two is NaN
        return lambda builder, a, b: builder.fcmp_ordered(sign, a, b)

    mask = Mask(vector.lanes)
    numbers = [(vector, vector)] + [
        pair for number in (types.int64, types.float64) for pair in ((number, vector), (vector, number))
    ]
    for function, operands, result, emit in (
        (operator.add, numbers, vector, apply("fadd")),
        (operator.sub, numbers, vector, apply("fsub")),
        (operator.mul, numbers, vector, apply("fmul")),
        (operator.truediv, numbers, vector, apply("fdiv")),
        (operator.neg, [(vector,)], vector, apply("fneg")),
        (operator.lt, numbers, mask, compare("<")),
        (operator.le, numbers, mask, compare("<=")),
        (operator.gt, numbers, mask, compare(">")),
        (operator.ge, numbers, mask, compare(">=")),
        (operator.eq, numbers, mask, compare("==")),
        (operator.ne, numbers, mask, lambda builder, a, b: builder.fcmp_unordered("!=", a, b)),
        (operator.and_, [(mask, mask)], mask, apply("and_")),
        (operator.or_, [(mask, mask)], mask, apply("or_")),
        (operator.invert, [(mask,)], mask, apply("not_")),
    ):

        @infer_global(function)
        class Typing(ConcreteTemplate):
            cases = tuple(signature(result, *each) for each in operands)

        def lower(context, builder, sig, args, emit=emit):
            return emit(builder, *(spread(builder, vector, each) for each in args))  # conditions as they are

        for case in Typing.cases:
            lower_builtin(function, *case.args)(lower)


def spread(builder, vector: Vector, value):
    """A vector as it is; one of Python's numbers in every lane."""
    if isinstance(value.type, ir.VectorType):
        return value
    if isinstance(value.type, ir.IntType):
        value = builder.sitofp(value, vector.element)
    elif value.type != vector.element:
        value = builder.fptrunc(value, vector.element)
    return _splat(builder, value, vector.lanes)


def _pointer(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def _load_at(builder, vector: Vector, address):
    value = builder.load(_pointer(builder, address, vector.llvm))
    value.align = vector.scalar.bitwidth // 8
    return value


def _store_at(builder, address, value):
    builder.store(value, _pointer(builder, address, value.type)).align = 4


def fma(builder, vector, a, b, c):
    """a * b + c, fused where the target can: `llvm.fma` would call libm where it cannot."""
    name = f"llvm.fmuladd.v{vector.lanes}f{vector.element.intrinsic_name[1:]}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector.llvm, [vector.llvm] * 3), name)
    return builder.call(function, [a, b, c])


class VectorLibrary:
    """The functions of one vector type, by name."""

    def __init__(self, **members):
        self.__dict__.update(members)


@cache
def vector_library(scalar: types.Float, target: Target) -> VectorLibrary:
    """Everything a kernel may do with vectors of `scalar` on `target`, as Numba intrinsics."""
    size = scalar.bitwidth // 8
    lanes = max(target.vector_bytes // size, 1)
    V = Vector(scalar, lanes)
    register_arithmetic(V)

    def widened(builder, bits):
        """Numbers in bfloat16, 16 bits or vectors of them, in float32."""
        wide, sixteen = (V.integer, [I32(16)] * lanes) if isinstance(bits.type, ir.VectorType) else (I32, 16)
        result = builder.shl(builder.zext(bits, wide), ir.Constant(wide, sixteen))
        return builder.bitcast(result, V.llvm if wide is V.integer else V.element)

    def load_half(builder, address, mask=None):
        """A vector of them; zero in the lanes that a mask leaves out."""
        return widened(builder, load_kind(builder, ir.VectorType(I16, lanes), address, mask))

    def masked_access(builder, name, returns, vector, arguments):
        """Call llvm.masked.load or llvm.masked.store of a kind of vector."""
        scalar = f"i{vector.element.width}" if vector.element == I16 else vector.element.intrinsic_name
        kind = ir.FunctionType(returns, [argument.type for argument in arguments])
        full = f"llvm.masked.{name}.v{vector.count}{scalar}.p0"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, full), arguments)

    def load_kind(builder, kind, address, mask=None):
        """A vector of this kind; zero in the lanes that a mask leaves out."""
        pointer, align = _pointer(builder, address, kind), 2 if kind.element == I16 else size
        if mask is None:
            value = builder.load(pointer)
            value.align = align
            return value
        return masked_access(builder, "load", kind, kind, [pointer, I32(align), mask, ir.Constant(kind, None)])

    def load_integers(builder, address):
        value = builder.load(_pointer(builder, address, V.integer))
        value.align = 2
        return value

    def load_pairs(builder, address, mask=None):
        """Two vectors of numbers in bfloat16: those at even places from `address` on, and those at odd ones."""
        if mask is None:
            return split(builder, load_integers(builder, address))
        return split(builder, builder.bitcast(load_kind(builder, ir.VectorType(I16, 2 * lanes), address, mask), V.integer))

    def split(builder, pairs):
        """The lower and the upper halves of each lane, numbers in bfloat16."""
        low = builder.shl(pairs, ir.Constant(V.integer, [I32(16)] * lanes))
        high = builder.and_(pairs, ir.Constant(V.integer, [I32(0xFFFF0000)] * lanes))
        return builder.bitcast(low, V.llvm), builder.bitcast(high, V.llvm)

    def rounded(builder, value):
        """To bfloat16, the nearest, and the even one between two; every NaN is one."""
        bits = builder.bitcast(value, V.integer)

        def every(number):
            return ir.Constant(V.integer, [I32(number)] * lanes)

        odd = builder.and_(builder.lshr(bits, every(16)), every(1))
        nearest = builder.lshr(builder.add(builder.add(bits, every(0x7FFF)), odd), every(16))
        nearest = builder.select(builder.fcmp_unordered("uno", value, value), every(0x7FC0), nearest)
        return builder.trunc(nearest, ir.VectorType(I16, lanes))

    def _mask(builder, count, lanes=lanes):
        """Lanes below `count`."""
        index = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
        return builder.icmp_signed("<", index, _splat(builder, count, lanes))

    def _masked(builder, count, whole, masked):
        """All lanes at once where there are enough of them: a masked access costs more on many processors."""
        full = builder.icmp_signed(">=", count, I64(lanes))
        with builder.if_else(full, likely=True) as (then, otherwise):
            with then:
                a = whole()
                a_block = builder.block
            with otherwise:
                b = masked(_mask(builder, count))
                b_block = builder.block
        if a is None:
            return None
        merged = builder.phi(V.llvm)
        merged.add_incoming(a, a_block)
        merged.add_incoming(b, b_block)
        return merged

    def load_numbers(builder, address, mask=None):
        return load_kind(builder, V.llvm, address, mask)

    def loading(read):
        """read(builder, address, mask) gives a vector, all of it without a mask."""

        @intrinsic
        def load(typing_context, address, count):
            """The `count` numbers at `address`, zero in the other lanes."""

            def codegen(context, builder, sig, args):
                address, count = args
                whole, some = (lambda: read(builder, address)), (lambda mask: read(builder, address, mask))
                return _masked(builder, count, whole, some)

            return V(types.int64, types.int64), codegen

        return load

    def storing(written):
        """written(builder, value) gives the vector that is to be in memory."""

        @intrinsic
        def store(typing_context, address, value, count):
            """Write the first `count` lanes to `address`."""

            def codegen(context, builder, sig, args):
                address, value, count = args
                bits = written(builder, value)
                pointer, align = _pointer(builder, address, bits.type), 2 if bits.type.element == I16 else size

                def whole():
                    builder.store(bits, pointer).align = align

                def some(mask):
                    masked_access(builder, "store", ir.VoidType(), bits.type, [bits, pointer, I32(align), mask])

                _masked(builder, count, whole, some)
                return context.get_dummy_value()

            return types.void(types.int64, V, types.int64), codegen

        return store

    @intrinsic
    def load_all(typing_context, address):
        return V(types.int64), lambda context, builder, sig, args: _load_at(builder, V, args[0])

    @intrinsic
    def store_all(typing_context, address, value):
        def codegen(context, builder, sig, args):
            _store_at(builder, *args)
            return context.get_dummy_value()

        return types.void(types.int64, V), codegen

    @intrinsic
    def zero(typing_context):
        return V(), lambda context, builder, sig, args: constant(V, 0.0)

    @intrinsic
    def over_lanes(typing_context, value):
        """The sum of all lanes, in each of them: of pairs, of pairs of these, and so on."""

        def codegen(context, builder, sig, args):
            (total,), width = args, 1
            while width < lanes:
                order = ir.Constant(ir.VectorType(I32, lanes), [lane ^ width for lane in range(lanes)])
                total = builder.fadd(total, builder.shuffle_vector(total, total, order))
                width *= 2
            return total

        return V(V), codegen

    @intrinsic
    def multiply_add(typing_context, number, value, total):
        """total + the number at address `number` * value, as the register tile computes it."""

        def codegen(context, builder, sig, args):
            number, value, total = args
            factor = _splat(builder, builder.load(_pointer(builder, number, V.element)), lanes)
            return fma(builder, V, factor, value, total)

        return V(types.int64, V, V), codegen

    def transposition(read, write):
        """read(builder, address) gives a vector; write(builder, vector) what a column is, one vector or some."""

        @intrinsic
        def transpose(typing_context, source, source_stride, destination, destination_stride):
            """Write the block of rows at `source`, one a lane, as columns: rows at `destination`. Strides in bytes."""

            def codegen(context, builder, sig, args):
                source, source_stride, destination, destination_stride = args

                def row(base, stride, i):
                    return builder.add(base, builder.mul(stride, I64(i)))

                rows = [read(builder, row(source, source_stride, i)) for i in range(lanes)]
                width = 1
                while width < lanes:  # interleave rows i and i + width: log2(lanes) rounds
                    for i in range(lanes):
                        if i & width:
                            continue
                        a, b = rows[i], rows[i + width]
                        low = [k if not k & width else lanes + k - width for k in range(lanes)]
                        high = [k + width if not k & width else lanes + k for k in range(lanes)]
                        shuffle = ir.VectorType(I32, lanes)
                        rows[i] = builder.shuffle_vector(a, b, ir.Constant(shuffle, low))
                        rows[i + width] = builder.shuffle_vector(a, b, ir.Constant(shuffle, high))
                    width *= 2
                for i, vector in enumerate(vector for column in rows for vector in write(builder, column)):
                    _store_at(builder, row(destination, destination_stride, i), vector)
                return context.get_dummy_value()

            return types.void(*[types.int64] * 4), codegen

        return transpose

    def dot_products(group, read, read_rest):
        """group: vectors of x that meet as many of a row of w, which read(builder, address of w, k) gives.

        read_rest(builder, address, k, mask) gives those of a row's end: the mask, of group * lanes numbers, says how many.
        A group of two is taken apart: numbers at even places are multiplied first, then those at odd ones.
        """

        @intrinsic
        def dots(typing_context, w, w_stride, x, depth):
            """Lane u: the sum over k < depth of w[u, k] * x[k]; rows of w are w_stride bytes apart.

            A row's sum is as many chains of FMAs as there are lanes, which are then added in pairs.
            """
            return V(*[types.int64] * 4), lambda *given: emit_dots(*given, group, read, read_rest)

        return dots

    def emit_dots(context, b, sig, args, group, read, read_rest):
        w, w_stride, x, depth = args
        rows = [b.add(w, b.mul(w_stride, I64(u))) for u in range(lanes)]
        before = b.block
        loop, after, rest, done = (b.append_basic_block(name) for name in ("k", "after", "rest", "done"))
        whole = b.and_(depth, I64(-group * lanes))

        def add_products(factors, weights, totals):
            if group == 2:
                even, odd = (ir.Constant(ir.VectorType(I32, lanes), list(range(first, 2 * lanes, 2))) for first in (0, 1))
                factors = b.shuffle_vector(*factors, even), b.shuffle_vector(*factors, odd)
            sums = []
            for row, total in zip(rows, totals, strict=True):
                for factor, weight in zip(factors, weights(row), strict=True):
                    total = fma(b, V, weight, factor, total)
                sums.append(total)
            return sums

        def x_at(k, part):
            return b.add(x, b.mul(b.add(k, I64(part * lanes)), I64(size)))

        def merge(*origins):
            phis = [b.phi(V.llvm) for _ in range(lanes)]
            for values, block in origins:
                for phi, value in zip(phis, values, strict=True):
                    phi.add_incoming(value, block)
            return phis

        zeros = [constant(V, 0.0)] * lanes
        b.cbranch(b.icmp_signed(">", whole, I64(0)), loop, after)
        b.position_at_end(loop)
        k = b.phi(I64)
        totals = merge((zeros, before))
        new = add_products([_load_at(b, V, x_at(k, part)) for part in range(group)], lambda row: read(b, row, k), totals)
        following = b.add(k, I64(group * lanes))
        k.add_incoming(I64(0), before)
        k.add_incoming(following, loop)
        for phi, value in zip(totals, new, strict=True):
            phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", following, whole), loop, after)

        b.position_at_end(after)
        totals = merge((zeros, before), (new, loop))
        b.cbranch(b.icmp_signed("<", whole, depth), rest, done)
        b.position_at_end(rest)
        left = b.sub(depth, whole)
        factors = [load_numbers(b, x_at(whole, part), _mask(b, b.sub(left, I64(part * lanes)))) for part in range(group)]
        mask = _mask(b, left, group * lanes)
        new = add_products(factors, lambda row: read_rest(b, row, whole, mask), totals)
        b.branch(done)
        b.position_at_end(done)
        sums, width = merge((totals, after), (new, rest)), 1
        while width < lanes:  # of two vectors each, sums of neighbouring lanes: half as many vectors, log2(lanes) times
            low = [k if not k & width else lanes + k - width for k in range(lanes)]
            high = [k + width if not k & width else lanes + k for k in range(lanes)]
            low, high = (ir.Constant(ir.VectorType(I32, lanes), order) for order in (low, high))
            pairs = zip(sums[::2], sums[1::2], strict=True)
            sums = [b.fadd(b.shuffle_vector(m, n, low), b.shuffle_vector(m, n, high)) for m, n in pairs]
            width *= 2
        return sums[0]

    def place(builder, row, k, bytes_):
        return builder.add(row, builder.mul(k, I64(bytes_)))

    def read_two(builder, row, k, mask=None):
        """Of `spread`'s numbers: zeros follow the last."""
        return [_load_at(builder, V, builder.add(place(builder, row, k, size), I64(part * lanes * size))) for part in range(2)]

    @intrinsic
    def load_scalar_half(typing_context, address):
        def codegen(context, builder, sig, args):
            return widened(builder, builder.load(_pointer(builder, args[0], I16)))

        return scalar(types.int64), codegen

    @intrinsic
    def spread(typing_context, source, count, out):
        """The `count` numbers in bfloat16 at `source`, two vectors of them at most, to `out`: even places, then odd ones."""

        def codegen(context, builder, sig, args):
            source, count, out = args
            with builder.if_else(builder.icmp_signed(">=", count, I64(2 * lanes)), likely=True) as branches:
                for whole, branch in zip((True, False), branches, strict=True):
                    with branch:
                        parts = load_pairs(builder, source, None if whole else _mask(builder, count, 2 * lanes))
                        for part, value in enumerate(parts):
                            _store_at(builder, builder.add(out, I64(part * lanes * size)), value)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    @intrinsic
    def load_scalar(typing_context, address):
        def codegen(context, builder, sig, args):
            return builder.load(_pointer(builder, args[0], V.element))

        return scalar(types.int64), codegen

    @intrinsic
    def store_scalar(typing_context, address, value):
        def codegen(context, builder, sig, args):
            builder.store(args[1], _pointer(builder, args[0], V.element))
            return context.get_dummy_value()

        return types.void(types.int64, scalar), codegen

    half = None
    if size == 4:  # the same of matrices in bfloat16
        half = VectorLibrary(
            load=loading(load_half),
            store=storing(rounded),
            spread=spread,
            transpose=transposition(load_integers, split),
            dots=dot_products(
                2,
                lambda b, row, k: load_pairs(b, place(b, row, k, 2)),
                lambda b, row, k, mask: load_pairs(b, place(b, row, k, 2), mask),
            ),
            dots_of_spread=dot_products(2, read_two, read_two),
            load_scalar=load_scalar_half,
        )
    return VectorLibrary(
        type=V,
        size=size,
        lanes=lanes,
        load=loading(load_numbers),
        store=storing(lambda b, value: value),
        load_all=load_all,
        store_all=store_all,
        zero=zero,
        over_lanes=over_lanes,
        multiply_add=multiply_add,
        transpose=transposition(lambda b, address: _load_at(b, V, address), lambda b, column: [column]),
        dots=dot_products(
            1,
            lambda b, row, k: [_load_at(b, V, place(b, row, k, size))],
            lambda b, row, k, mask: [load_numbers(b, place(b, row, k, size), mask)],
        ),
        load_scalar=load_scalar,
        store_scalar=store_scalar,
        half=half,
        emit_half=load_half,
        emit_pairs=load_pairs,
    )


@intrinsic
def load_int(typing_context, address):
    """The int64 at `address`."""

    def codegen(context, builder, sig, args):
        return builder.load(_pointer(builder, args[0], I64))

    return types.int64(types.int64), codegen


@intrinsic
def load_byte(typing_context, address):
    """The byte at `address`, as an int64."""

    def codegen(context, builder, sig, args):
        return builder.zext(builder.load(_pointer(builder, args[0], ir.IntType(8))), I64)

    return types.int64(types.int64), codegen


@intrinsic
def store_int(typing_context, address, value):
    def codegen(context, builder, sig, args):
        builder.store(args[1], _pointer(builder, args[0], I64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _prefetch(builder, address, level):
    """level: 3 into L1, 2 into L2."""
    pointer = _pointer(builder, address, ir.IntType(8))
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, I32(0), I32(level), I32(1)])


def _make_prefetch(level):
    """Make prefetch(address), which begins to bring the cache line of `address` near; level as in `_prefetch`."""

    @intrinsic
    def prefetch(typing_context, address):
        def codegen(context, builder, sig, args):
            _prefetch(builder, args[0], level)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return prefetch


prefetch, prefetch_far = _make_prefetch(3), _make_prefetch(2)  # to be read soon, and after other work


@intrinsic
def call(typing_context, function, a, b, c):
    """Call the C function `void (*)(int64_t, int64_t, int64_t)` at address `function`."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [I64] * 3)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


PREFETCHING_ROWS = 3


# The same number, but the compiler does not know that it is.
OPAQUE = ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0")


@cache
def product_tile(vectors: VectorLibrary, rows: int, columns: int, half: str = "", panels: int = 1, wanted: int = 0):
    """The register tile: out[rows, columns * lanes] (=, or += if add) sum over k of a[row, k] * panel[k, :], a chain of FMAs.

    a_rows:  address of `rows` int64 addresses; a[row, k] is `a_offset + k * a_stride` bytes after its row's.
    panel:   `depth` groups of `columns` vectors, `panel_stride` bytes apart; the next of `panels` is `panel_bytes` on.
    out:     rows * panels * columns vectors, contiguous.
    wanted:  so many of the columns are multiplied and written, if not 0: of one panel.
    half:    the panel is in bfloat16. "rows": else as it is otherwise. "pairs": it holds pairs of k, the first of a pair in the
             lower half of a lane: `depth` and strides count pairs, and the numbers of a row of `a` are next to each other.
    ahead:   what is to be brought into L2 meanwhile, a line for each k, `ahead_stride` bytes apart; tiles that have fewer than
             PREFETCHING_ROWS, which are busy loading as it is, do not.
    """
    V, size, lanes = vectors.type, vectors.size, vectors.lanes
    broadcast = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)

    members, weight_bytes = 2 if half == "pairs" else 1, 2 if half == "rows" else size

    def panel_vector(b, address, member):
        if half == "pairs":
            return vectors.emit_pairs(b, address)[member]
        return vectors.emit_half(b, address) if half else _load_at(b, V, address)

    width = wanted or panels * columns

    @intrinsic
    def tile(
        typing_context, a_rows, a_offset, a_stride, panel, panel_bytes, panel_stride, depth, out, add, ahead, ahead_stride
    ):
        def codegen(context, b, sig, args):
            a_rows, a_first, a_stride, panel, panel_bytes, panel_stride, depth, out, add, ahead, ahead_stride = args
            undefined = ir.Constant(V.llvm, ir.Undefined)
            table = b.inttoptr(a_rows, I64.as_pointer())
            a = [b.load(b.gep(table, [I64(m)])) for m in range(rows)]
            before, loop = b.block, b.append_basic_block("k")
            last, adding, setting, after = (b.append_basic_block(name) for name in ("last", "adding", "setting", "done"))
            b.branch(loop)
            b.position_at_end(loop)
            k, a_offset, weights, line = b.phi(I64), b.phi(I64), b.phi(I64), b.phi(I64)
            total = [[b.phi(V.llvm) for _ in range(width)] for _ in range(rows)]
            offset_now = b.call(OPAQUE, [a_offset])  # else each row's address may get a register and an addition of its own
            if rows >= PREFETCHING_ROWS:
                _prefetch(b, line, 2)
            new = total
            for member in range(members):

                def weight(n, member=member):
                    index, n = divmod(n, columns)
                    start = b.add(weights, b.mul(panel_bytes, I64(index))) if index else weights
                    return panel_vector(b, b.add(start, I64(n * lanes * weight_bytes)), member)

                def factor(m, member=member):
                    offset = b.add(offset_now, I64(member * size))
                    x = b.load(b.inttoptr(b.add(a[m], offset), V.element.as_pointer()))
                    return b.shuffle_vector(b.insert_element(undefined, x, I32(0)), undefined, broadcast)

                # The shorter side stays in registers.
                if rows < width:
                    xs, sums = [factor(m) for m in range(rows)], []
                    for n in range(width):
                        w = weight(n)
                        sums.append([fma(b, V, x, w, new[m][n]) for m, x in enumerate(xs)])
                    sums = [list(row) for row in zip(*sums, strict=True)]
                else:
                    ws, sums = [weight(n) for n in range(width)], []
                    for m in range(rows):
                        x = factor(m)
                        sums.append([fma(b, V, x, w, new[m][n]) for n, w in enumerate(ws)])
                new = sums
            steps = (
                (k, I64(0), b.add(k, I64(1))),
                (a_offset, a_first, b.add(offset_now, a_stride)),
                (weights, panel, b.add(weights, panel_stride)),
                (line, ahead, b.add(line, ahead_stride)),
            )
            for phi, first, following in steps:
                phi.add_incoming(first, before)
                phi.add_incoming(following, loop)
            for m in range(rows):
                for n in range(width):
                    total[m][n].add_incoming(constant(V, 0.0), before)
                    total[m][n].add_incoming(new[m][n], loop)
            b.cbranch(b.icmp_signed("<", steps[0][2], depth), loop, last)
            b.position_at_end(last)
            b.cbranch(b.icmp_signed("!=", add, I64(0)), adding, setting)
            for block in (adding, setting):
                b.position_at_end(block)
                for m, n in itertools.product(range(rows), range(width)):
                    value, place = new[m][n], b.add(out, I64((m * panels * columns + n) * lanes * size))
                    _store_at(b, place, b.fadd(_load_at(b, V, place), value) if block is adding else value)
                b.branch(after)
            b.position_at_end(after)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), codegen

    return tile
