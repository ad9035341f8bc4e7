"""A cell's arithmetic over registers: its elementary functions, and the cell applied to a vector of units, or to two at once.

Each of these functions is a long chain of operations that wait for each other, and a cell is two or three of them in a row:
longer than a processor looks ahead. A second vector fills what one would wait; four would not stay in 16 registers.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..derive import Code
from .processor import Target
from .product import options
from .vector import I32, Vector, VectorLibrary, constant, fma, register_arithmetic, spread

# (e^r - 1) / r for |r| <= ln 2 / 2, highest power first. Single: e^r has the least relative error of its degree, 3e-9, found by
# linear programming, each coefficient rounded before the next; double: Taylor's, 4e-18.
EXP_SINGLE = (1.3820945750921965e-3, 8.368683978915215e-3, 4.166826605796814e-2, 0.1666652113199234, 0.4999999403953552, 1.0)
EXP_DOUBLE = tuple(1.0 / float(factorial) for factorial in np.cumprod(np.arange(1.0, 14.0))[::-1])  # 1/13! .. 1/1!

# Cephes (S. Moshier): ln 2 in two parts, the first of so few bits that an exponent times it is exact.
LN2 = {4: (0.693359375, -2.12194440e-4), 8: (6.93145751953125e-1, 1.42860682030941723212e-6)}
LEAST = {4: 2.0**-126, 8: 2.0**-1022}  # of the numbers with all bits
# erf: where its series ends, where it is 1 in double precision, and the centre of the fraction that its rest is a function of
ERF_NEAR, ERF_ONE, ERF_CENTRE = 0.5, 6.0, 2.0


def _erf_tables() -> tuple[dict, tuple[float, float], dict]:
    """(coefficients of erf(x) / x in x^2; the interval of t as (shift, scale) to -1..1; Chebyshev's), the highest first."""
    series = [2 / math.sqrt(math.pi) * (-1) ** k / (math.factorial(k) * (2 * k + 1)) for k in range(14)]
    low, high = ((a - ERF_CENTRE) / (a + ERF_CENTRE) for a in (ERF_NEAR, ERF_ONE))
    scale, shift = 2 / (high - low), -(high + low) / (high - low)

    def scaled(u):  # e^(a^2) erfc(a)
        t = (np.asarray(u) - shift) / scale
        a = ERF_CENTRE * (1 + t) / (1 - t)
        return np.array([math.exp(each * each) * math.erfc(each) for each in a])

    chebyshev = np.polynomial.chebyshev.chebinterpolate(scaled, 30)
    return (
        {4: series[6::-1], 8: series[::-1]},
        (shift, scale),
        {4: chebyshev[10::-1].tolist(), 8: chebyshev[::-1].tolist()},
    )


ERF_SERIES, ERF_INTERVAL, ERF_CHEBYSHEV = _erf_tables()


@cache
def elementary(V: Vector, target: Target) -> dict[str, Any]:
    """What a cell may do with vectors V beside arithmetic, as Numba intrinsics."""
    size, lanes = V.scalar.bitwidth // 8, V.lanes
    single = size == 4

    def below(builder, a, b):
        """Lanes where a < b; false where a is NaN."""
        return builder.fcmp_ordered("<", a, b)

    def at_most(builder, x, high):
        """The lesser of x and `high`; NaN stays NaN."""
        return builder.select(below(builder, constant(V, high), x), constant(V, high), x)

    def at_least(builder, x, low):
        return builder.select(below(builder, x, constant(V, low)), constant(V, low), x)

    # Adding `magic` rounds to an integer whose bits are the low bits of the sum.
    magic = 12582912.0 if single else 6755399441055744.0

    def polynomial(builder, x, coefficients):
        total = constant(V, coefficients[0])
        for c in coefficients[1:]:
            total = fma(builder, V, total, x, constant(V, c))
        return total

    def reduced(builder, x, factor):
        """The integer n and r of factor * x = n ln 2 + r: n as the low bits of a number, and r / |factor|.

        factor: a power of two or its negative.
        """
        shifted = fma(builder, V, x, constant(V, factor * 1.4426950408889634), constant(V, magic))
        n = builder.fsub(shifted, constant(V, magic))
        r = x if factor > 0 else builder.fneg(x)
        for part in LN2[size]:
            r = fma(builder, V, n, constant(V, -part / abs(factor)), r)
        return builder.bitcast(shifted, V.integer), r

    def power_of_two(builder, n):
        """2^n, for n from -126 to 127 (double: -1022 to 1023), of any other n some number."""
        exponent = builder.shl(n, ir.Constant(V.integer, [V.integer.element(23 if single else 52)] * lanes))
        return builder.bitcast(builder.add(exponent, builder.bitcast(constant(V, 1.0), V.integer)), V.llvm)

    exp_coefficients = EXP_SINGLE if single else EXP_DOUBLE

    def estimate(builder, x):
        """1 / x to 14 bits, by a register of AVX-512."""
        register = ir.VectorType(V.element, 16)
        kind = ir.FunctionType(register, [register, register, ir.IntType(16)])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.rcp14.ps.512")
        zeros, every = ir.Constant(register, None), ir.IntType(16)(-1)
        near = [builder.call(function, [part, zeros, every]) for part in parts(builder, x, lanes // 16)]
        return near[0] if len(near) == 1 else concatenated(builder, *near)

    # AVX-512 divides a register in 16 cycles, and estimates in 2: one step of Newton's makes 1 ulp of 14 bits.
    estimates = single and target.vector_bytes == 64 and target.tiles != "emulated"

    def reciprocal(builder, x):
        """1 / x for x from 1/2 to 2^127."""
        one = constant(V, 1.0)
        if not estimates:
            return builder.fdiv(one, x)
        near = estimate(builder, x)
        error = fma(builder, V, builder.fneg(x), near, one)
        return fma(builder, V, near, error, near)

    def quotient(builder, a, b):
        return builder.fmul(a, reciprocal(builder, b)) if estimates else builder.fdiv(a, b)

    # A saturated gate is 0 or 1 (tanh: -1 or 1) exactly, so that nothing of the gradient passes: what it is multiplied with,
    # such as the input, may be as large as numbers get.

    def emit_sigmoid(builder, x):
        # 1 / (1 + 2^n e^r), and 0 where that would be infinite
        low, high = (-88.0, 87.0) if single else (-709.0, 708.0)
        n, r = reduced(builder, at_most(builder, x, high), -1)
        one = constant(V, 1.0)
        exp = fma(builder, V, r, polynomial(builder, r, exp_coefficients), one)
        result = reciprocal(builder, fma(builder, V, power_of_two(builder, n), exp, one))
        return builder.select(below(builder, x, constant(V, low)), constant(V, 0.0), result)

    def emit_tanh(builder, x):
        # u / (1 + u), u = (e^2x - 1) / 2 = 2^n (e^r - 1) / 2 + (2^n - 1) / 2: near zero n is 0, and nothing cancels.
        # Single: from 13 ln 2 on 1 is nearest. There u is 2^25 and a little, and the quotient 1 whatever the estimate.
        high = 9.010913848876953 if single else 20.0
        x = at_most(builder, at_least(builder, x, -high), high)
        n, r = reduced(builder, x, 2)
        half, one = constant(V, 0.5), constant(V, 1.0)
        coefficients = [c * 2.0**k for k, c in enumerate(exp_coefficients[::-1])][::-1]  # of powers of r / 2
        power = power_of_two(builder, n)
        rest = builder.fmul(r, polynomial(builder, r, coefficients))
        u = fma(builder, V, power, rest, fma(builder, V, power, half, constant(V, -0.5)))
        return quotient(builder, u, builder.fadd(u, one))

    def emit_relu(builder, x):
        zero = constant(V, 0.0)
        return builder.select(below(builder, x, zero), zero, x)

    def unary(emit):
        @intrinsic
        def function(typing_context, x):
            return V(V), lambda context, builder, sig, args: emit(builder, args[0])

        return function

    def integer(builder, bits, number):
        """The integer that `reduced` has added to a number."""
        return builder.sub(bits, builder.bitcast(constant(V, number), V.integer))

    def every(number):
        return ir.Constant(V.integer, [V.integer.element(number)] * lanes)

    def call(builder, name, *operands):
        full = f"llvm.{name}.v{lanes}f{V.element.intrinsic_name[1:]}"
        return builder.call(
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(V.llvm, [V.llvm] * len(operands)), full), operands
        )

    def emit_exp(builder, x):
        # 2^n e^r, in two factors, of which each is a number where the result is none, or nearly
        x = at_most(builder, at_least(builder, x, -104.0 if single else -746.0), 89.0 if single else 710.0)
        bits, r = reduced(builder, x, 1)
        n = integer(builder, bits, magic)
        half = builder.ashr(n, every(1))
        exp = fma(builder, V, r, polynomial(builder, r, exp_coefficients), constant(V, 1.0))
        return builder.fmul(builder.fmul(exp, power_of_two(builder, half)), power_of_two(builder, builder.sub(n, half)))

    def emit_expm1(builder, x):
        # 2 (2^(n - 1) (e^r - 1) + 2^(n - 1) - 1/2): near zero n is 0, and nothing cancels
        x = at_most(builder, at_least(builder, x, -80.0 if single else -700.0), 89.0 if single else 710.0)
        bits, r = reduced(builder, x, 1)
        power = power_of_two(builder, builder.sub(bits, every(1)))
        rest = builder.fmul(r, polynomial(builder, r, exp_coefficients))
        half = fma(builder, V, power, rest, builder.fsub(power, constant(V, 0.5)))
        return builder.fadd(half, half)

    def emit_log(builder, x):
        # x = 2^e m, m from sqrt(1/2) to sqrt(2): e ln 2 + 2 artanh(s), s = (m - 1) / (m + 1)
        small = below(builder, x, constant(V, LEAST[size]))
        y = builder.select(small, builder.fmul(x, constant(V, 2.0**54)), x)
        shift, root = (23, 0x3F3504F3) if single else (52, 0x3FE6A09E667F3BCD)
        bits = builder.sub(builder.bitcast(y, V.integer), every(root))
        exponent = builder.ashr(bits, every(shift))
        mantissa = builder.and_(bits, every((1 << shift) - 1))
        m = builder.bitcast(builder.add(mantissa, every(root)), V.llvm)
        e = builder.fsub(builder.sitofp(exponent, V.llvm), builder.select(small, constant(V, 54.0), constant(V, 0.0)))
        s = builder.fdiv(builder.fsub(m, constant(V, 1.0)), builder.fadd(m, constant(V, 1.0)))
        square = builder.fmul(s, s)
        tail = polynomial(builder, square, [2.0 / k for k in range(11 if single else 23, 1, -2)])
        tail = fma(builder, V, builder.fmul(s, square), tail, builder.fmul(e, constant(V, LN2[size][1])))
        result = fma(builder, V, e, constant(V, LN2[size][0]), fma(builder, V, s, constant(V, 2.0), tail))
        finite = below(builder, constant(V, 0.0), x)
        special = builder.select(
            builder.fcmp_ordered("==", x, constant(V, 0.0)), constant(V, -float("inf")), constant(V, float("nan"))
        )
        return builder.select(below(builder, x, constant(V, float("inf"))), builder.select(finite, result, special), x)

    def emit_log1p(builder, x):
        # log(u) and what u = 1 + x has lost
        one = constant(V, 1.0)
        u = builder.fadd(x, one)
        lost = builder.fdiv(builder.fsub(builder.fsub(u, one), x), u)
        exact = builder.fsub(emit_log(builder, u), lost)
        plain = builder.and_(
            builder.fcmp_ordered("!=", u, constant(V, 0.0)), builder.fcmp_ordered("!=", u, constant(V, float("inf")))
        )
        return builder.select(plain, exact, emit_log(builder, u))

    def emit_logsigmoid(builder, x):
        least = builder.select(below(builder, x, constant(V, 0.0)), x, constant(V, 0.0))
        rest = emit_log1p(builder, emit_exp(builder, builder.fneg(call(builder, "fabs", x))))
        return builder.fsub(least, rest)

    def emit_erf(builder, x):
        # Taylor's series near zero, elsewhere 1 - e^(-a^2) times what Chebyshev polynomials of (a - k) / (a + k) give, a = |x|
        a = call(builder, "fabs", x)
        square = builder.fmul(x, x)
        near = builder.fmul(x, polynomial(builder, square, ERF_SERIES[size]))
        capped = at_most(builder, a, ERF_ONE)
        t = builder.fdiv(builder.fsub(capped, constant(V, ERF_CENTRE)), builder.fadd(capped, constant(V, ERF_CENTRE)))
        shift, scale = ERF_INTERVAL
        t = fma(builder, V, t, constant(V, scale), constant(V, shift))
        twice, one, two = builder.fadd(t, t), constant(V, 0.0), constant(V, 0.0)
        *high, lowest = ERF_CHEBYSHEV[size]
        for c in high:  # Clenshaw's sum
            one, two = fma(builder, V, twice, one, builder.fsub(constant(V, c), two)), one
        scaled = fma(builder, V, t, one, builder.fsub(constant(V, lowest), two))
        rest = builder.fmul(scaled, emit_exp(builder, builder.fneg(builder.fmul(capped, capped))))
        far = call(builder, "copysign", builder.fsub(constant(V, 1.0), rest), x)
        return builder.select(below(builder, a, constant(V, ERF_NEAR)), near, builder.select(below(builder, a, a), a, far))

    def extreme(sign):
        """The greater or the lesser of two, NaN where one is, as in torch."""

        @intrinsic
        def function(typing_context, a, b):
            def codegen(context, builder, sig, args):
                a, b = (spread(builder, V, each) for each in args)
                found = builder.select(builder.fcmp_ordered(sign, a, b), a, b)
                return builder.select(builder.fcmp_unordered("uno", a, a), a, found)

            return V(a, b), codegen

        return function

    @intrinsic
    def where(typing_context, condition, a, b):
        """a in the lanes where the condition holds, else b."""

        def codegen(context, builder, sig, args):
            condition, a, b = args
            return builder.select(condition, spread(builder, V, a), spread(builder, V, b))

        return V(condition, a, b), codegen

    @intrinsic
    def full_like(typing_context, vector, number):
        """The number in every lane."""
        return V(vector, number), lambda context, builder, sig, args: spread(builder, V, args[1])

    functions = {
        "abs": lambda builder, x: call(builder, "fabs", x),
        "erf": emit_erf,
        "exp": emit_exp,
        "expm1": emit_expm1,
        "log": emit_log,
        "log1p": emit_log1p,
        "logsigmoid": emit_logsigmoid,
        "relu": emit_relu,
        "sigmoid": emit_sigmoid,
        "sqrt": lambda builder, x: call(builder, "sqrt", x),
        "tanh": emit_tanh,
    }
    others = {"full_like": full_like, "maximum": extreme(">"), "minimum": extreme("<"), "where": where}
    return {name: unary(emit) for name, emit in functions.items()} | others


def parts(builder, value, count: int) -> list:
    """A vector in `count` equal parts, in order."""
    lanes = value.type.count // count
    if count == 1:
        return [value]
    order = [ir.Constant(ir.VectorType(I32, lanes), list(range(i * lanes, (i + 1) * lanes))) for i in range(count)]
    return [builder.shuffle_vector(value, value, lane) for lane in order]


def concatenated(builder, a, b):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, 2 * a.type.count), list(range(2 * a.type.count))))


@cache
def over_vectors(code: Code, v: VectorLibrary, target: Target):
    """(one, two): a cell's function, its parameters and results vectors of units.

    one: of a tuple of arguments, a tuple of results.
    two: of two such tuples, two: as `one` of each, to the bit.
    """
    pair = Vector(v.type.scalar, 2 * v.lanes)
    register_arithmetic(pair)
    own, of_pairs = (njit(code.bind(elementary(kind, target)), **options) for kind in (v.type, pair))

    @intrinsic
    def join(typing_context, a, b):
        return pair(v.type, v.type), lambda context, builder, sig, args: concatenated(builder, *args)

    @intrinsic
    def split(typing_context, both):
        def codegen(context, builder, sig, args):
            return context.make_tuple(builder, sig.return_type, parts(builder, args[0], 2))

        return types.UniTuple(v.type, 2)(pair), codegen

    def joining(count):
        if count == 0:
            return njit(lambda a, b: (), **options)
        before, last = joining(count - 1), count - 1
        return njit(lambda a, b: before(a, b) + (join(a[last], b[last]),), **options)

    def half(which, count):
        if count == 0:
            return njit(lambda both: (), **options)
        before, last = half(which, count - 1), count - 1
        return njit(lambda both: before(both) + (split(both[last])[which],), **options)

    joined, first, second = joining(len(code.parameters)), *(half(which, len(code.results)) for which in (0, 1))

    @njit(**options)
    def one(a):
        return own(*a)

    @njit(**options)
    def two(a, b):
        both = of_pairs(*joined(a, b))
        return first(both), second(both)

    return one, two


def make_reader(v: VectorLibrary):
    """reader(places): what reads the numbers of a vector of units at these places, `stride` bytes apart, as a tuple."""
    load = v.load

    def reader(places):
        if not places:
            return njit(lambda row, stride, n: (), **options)
        before, s = reader(places[:-1]), places[-1]
        return njit(lambda row, stride, n: before(row, stride, n) + (load(row + s * stride, n),), **options)

    return reader


def make_writer(v: VectorLibrary):
    """writer(places, results, add): what writes these results of a vector of units, as they stand in a tuple, to these places,
    `stride` bytes apart; add: to what is there."""
    load, store = v.load, v.store

    def writer(places, results, add=False):
        if not places:
            return njit(lambda row, stride, values, n: None, **options)
        before, place, s = writer(places[:-1], results[:-1], add), places[-1], results[-1]

        @njit(**options)
        def write(row, stride, values, n):
            before(row, stride, values, n)
            value = values[s]
            if add:
                value = load(row + place * stride, n) + value
            store(row + place * stride, value, n)

        return write

    return writer
