"""Elementwise mathematics that LLVM vectorizes, for the row kernels.

Numba has no vector exp, its max() does not vectorize, and a float sum only does where additions may
be reordered. Reordering is allowed here for one operation at a time, by name: with it on a whole
function the rounding in `exp` would be simplified away.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fastopt_kernels.cpu.base.xp import JIT


@intrinsic
def bits_to_double(typingctx, x):
    """The float64 whose bits an int64 carries."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic
def add(typingctx, x, y):
    """x + y of a sum whose additions may be reordered, and so vectorized."""

    def codegen(context, builder, signature, args):
        return builder.fadd(*args, flags=("reassoc", "contract"))

    return x(x, x), codegen


@njit(nogil=True, error_model="numpy", fastmath=False)
def product(x, y):
    """x * y, never fused with what follows: what is subtracted from itself must be the same."""
    return x * y


@intrinsic
def larger(typingctx, x, y):
    """The larger of two integers."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.icmp_signed(">", *args), *args)

    return x(x, x), codegen


@intrinsic
def smaller(typingctx, x, y):
    """The smaller of two integers."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.icmp_signed("<", *args), *args)

    return x(x, x), codegen


@intrinsic
def larger_float(typingctx, x, y):
    """x where x > y, else y: a NaN in x is passed over."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return x(x, x), codegen


@intrinsic
def ordered(typingctx, x):
    """A float as an integer that compares as `memory.make_order` has it."""
    width = x.bitwidth
    integer = ir.IntType(width)

    def codegen(context, builder, signature, args):
        bits = builder.bitcast(args[0], integer)
        negative = builder.ashr(bits, ir.Constant(integer, width - 1))
        low_bits = ir.Constant(integer, (1 << (width - 1)) - 1)
        return builder.xor(bits, builder.and_(negative, low_bits))

    return getattr(types, f"int{width}")(x), codegen


# exp(x) = 2^n exp(r), where n is the integer nearest to x / ln 2. Adding _MAGIC leaves n + 191 in
# the low bits of the sum: the exponent of 2^(n + 64), a normal number for all x in [-104, 0].
_LOG2_E, _MAGIC = np.float32(1.4426950408889634), np.float32(12582912.0 + 191.0)
# ln 2 in two parts: n * _LN2_HIGH is exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-0.00021219444)
# exp(r) = 1 + r + r^2 q(r) on |r| <= ln(2) / 2: a minimax fit, relative error 3e-9.
_Q0, _Q1, _Q2, _Q3, _Q4 = map(
    np.float32, (0.49999994, 0.1666652113, 0.041668388993, 0.008368716575, 0.00138145986)
)
# 2^f = 1 + f (...) on |f| <= 1/2, relative error 3e-6: a hundredth of what 16 bits round away.
_P1, _P2, _P3, _P4 = map(np.float32, (0.69312419, 0.24024099, 0.05590643, 0.00958285))
_LOWEST, _ONE = np.float32(-104.0), np.float32(1)


@intrinsic
def _times_power(typingctx, y, t):
    """y times 2^(n + 64), where t = n + _MAGIC."""

    def codegen(context, builder, signature, args):
        y, t = args
        i32 = ir.IntType(32)
        exponent = builder.shl(builder.bitcast(t, i32), ir.Constant(i32, 23))
        return builder.fmul(y, builder.bitcast(exponent, ir.FloatType()))

    return types.float32(types.float32, types.float32), codegen


@njit(**JIT)
def _exp32(x):
    x = larger_float(_LOWEST, x)
    t = x * _LOG2_E + _MAGIC
    n = t - _MAGIC
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    y = (((((_Q4 * r + _Q3) * r + _Q2) * r + _Q1) * r + _Q0) * r + _ONE) * r + _ONE
    return _times_power(y, t)


@njit(**JIT)
def _exp16(x):
    x = larger_float(_LOWEST, x)
    t = x * _LOG2_E + _MAGIC
    f = x * _LOG2_E - (t - _MAGIC)
    y = (((_P4 * f + _P3) * f + _P2) * f + _P1) * f + _ONE
    return _times_power(y, t)


@njit(**JIT)
def _exp64(x):
    return math.exp(x)


def exp_of(kind: str):
    """(exp, unit): exp(x) / unit is e^x for x up to rounding errors above 0, or NaN; to 1 ulp for
    fp32 and fp64, to what their rounding leaves for bf16 and fp16.

    Scaled so that no factor is subnormal, it takes half the instructions of an exp for all x.
    """
    if kind == "fp64":
        return _exp64, np.float64(1)
    return _exp32 if kind == "fp32" else _exp16, np.float32(2.0**64)


# A cap: x counts as no more than so many caps, where exp(-2 |x| / cap) is still a normal number.
FAR = 43.0
_BIAS = np.float32(12582912.0 + 127.0)
_HALF, _TWO, _FOUR = np.float32(0.5), np.float32(2), np.float32(4)


@intrinsic
def _power_of(typingctx, t):
    """2^n, where t = n + _BIAS."""

    def codegen(context, builder, signature, args):
        i32 = ir.IntType(32)
        exponent = builder.shl(builder.bitcast(args[0], i32), ir.Constant(i32, 23))
        return builder.bitcast(exponent, ir.FloatType())

    return types.float32(types.float32), codegen


@njit(**JIT)
def _cap32(x, caps):
    cap, high, low, far = caps
    size = -larger_float(-far, -math.fabs(x))
    a = size * high + size * low
    t = a * _LOG2_E + _BIAS
    n = t - _BIAS
    r = (a - n * _LN2_HIGH) - n * _LN2_LOW
    grown = (((((_Q4 * r + _Q3) * r + _Q2) * r + _Q1) * r + _Q0) * r) * r + r
    power = _power_of(t)
    less = power * grown + (power - _ONE)
    share = _ONE / (_TWO + less)
    tanh = -less * share
    slope = _FOUR * (power * grown + power) * share * share
    slope = slope if size < far else np.float32(0)
    slope = _ONE - tanh * tanh if tanh < _HALF else slope
    return math.copysign(cap * tanh, x), slope


@njit(**JIT)
def _cap64(x, caps):
    cap, high, _, _ = caps
    e, tanh = math.exp(math.fabs(x) * high), math.tanh(x / cap)
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    return cap * tanh, 1.0 - tanh * tanh if math.fabs(tanh) < 0.5 else slope


def cap_of(kind: str):
    """cap(x, caps) -> (z, dz/dx) of z = cap tanh(x / cap).

    caps: cap, the high and the low part of -2 / cap, and FAR caps
    With e = exp(-2 |x| / cap) tanh is (1 - e) / (1 + e) and its slope 4 e / (1 + e)^2. e - 1 is
    computed as expm1 does, so that small x keep their digits. Where tanh is small the slope is
    1 - tanh^2, which rounds less there.
    """
    return _cap64 if kind == "fp64" else _cap32
