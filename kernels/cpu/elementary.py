"""A cell's arithmetic over registers: its elementary functions, and the cell applied to a vector of units, or to two at once.

Each of these functions is a long chain of operations that wait for each other, and a cell is two or three of them in a row:
longer than a processor looks ahead. A second vector fills what one would wait; four would not stay in 16 registers.
"""

from __future__ import annotations

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

    def polynomial(builder, x, coefficients):
        total = constant(V, coefficients[0])
        for c in coefficients[1:]:
            total = fma(builder, V, total, x, constant(V, c))
        return total

    def reduced(builder, x, factor):
        """The integer n and r of factor * x = n ln 2 + r: n as the low bits of a number, and r / |factor|.

        factor: a power of two or its negative.
        """
        # Adding `magic` rounds to an integer whose bits are the low bits of the sum.
        magic = 12582912.0 if single else 6755399441055744.0
        # Cephes (S. Moshier): the first has so few bits that n times it is exact.
        ln2 = (0.693359375, -2.12194440e-4) if single else (6.93145751953125e-1, 1.42860682030941723212e-6)
        shifted = fma(builder, V, x, constant(V, factor * 1.4426950408889634), constant(V, magic))
        n = builder.fsub(shifted, constant(V, magic))
        r = x if factor > 0 else builder.fneg(x)
        for part in ln2:
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

    unary_functions = {"sigmoid": emit_sigmoid, "tanh": emit_tanh, "relu": emit_relu}
    return {name: unary(emit) for name, emit in unary_functions.items()} | {"full_like": full_like, "where": where}


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
