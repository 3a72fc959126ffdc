"""A float32 stored as bf16 without losing what rounding takes away.

    stochastic  up with the probability of how far it is from below: right on average
    kahan       what was rounded away is kept in bf16
    master      the 16 low bits are kept: an exact float32 in 4 bytes

Chance is a hash of the element's index and a key of its parameter, step and seed: the same for any
number of threads.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fastopt_kernels.cpu.base.xp import JIT

_ZERO = np.float32(0)
_I32, _F32 = ir.IntType(32), ir.FloatType()


@intrinsic
def bits_of(typingctx, x):
    """The bits of a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _I32)

    return types.uint32(types.float32), codegen


@intrinsic
def float_of(typingctx, bits):
    """The float32 of these bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), codegen


@njit(**JIT)
def key_of_chunk(key, first):
    """A key for elements from `first` on: what their 32-bit index does not say."""
    return key ^ ((first >> 32) * 0x27D4EB2F)


@intrinsic
def _chance(typingctx, i, key):
    """16 bits out of an index and a key, as a uint32: a multiplicative hash, twice."""

    def codegen(context, builder, signature, args):
        def word(x):
            return ir.Constant(_I32, x)

        low, key = (builder.trunc(x, _I32) for x in args)
        h = builder.mul(builder.xor(low, key), word(0x9E3779B1))
        h = builder.mul(builder.xor(h, builder.lshr(h, word(15))), word(0x85EBCA6B))
        return builder.lshr(h, word(16))

    return types.uint32(types.int64, types.int64), codegen


@njit(**JIT)
def is_finite(x):
    return x - x == _ZERO


@njit(**JIT)
def stochastic(x, i, key):
    """x, rounded to bf16 up or down by chance; infinity and NaN as they are. key: of the chunk"""
    rounded = (bits_of(x) + _chance(i, key)) & np.uint32(0xFFFF0000)
    return float_of(np.uint32(rounded)) if is_finite(x) else x


@njit(**JIT)
def upper(x):
    """x, rounded to the nearest bf16, away from zero where two are as near."""
    rounded = (bits_of(x) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)
    return float_of(np.uint32(rounded)) if x == x else x


@njit(**JIT)
def lower(x, high):
    """The part join adds to high for x, between -0x8000 and 0x7FFF, as a float; 0 for a NaN."""
    difference = np.int32(bits_of(x) - bits_of(high))
    return np.float32(difference) if x == x else _ZERO


@njit(**JIT)
def join(high, low):
    """The float32 whose bits are those of high plus low."""
    return float_of(np.uint32(bits_of(high) + np.uint32(np.int32(low))))


@njit(**JIT)
def rest(x, high):
    """The rest of x beside high: x - high; 0 where that is not finite."""
    left = x - high
    return left if is_finite(left) else _ZERO
