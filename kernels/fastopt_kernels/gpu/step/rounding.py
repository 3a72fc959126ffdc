"""A float32 stored as bf16 without losing what rounding takes away, on blocks of elements.

The arithmetic is that of `cpu/step/rounding.py`.

Chance is the same hash, so both backends round alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt_kernels.chunks import KAHAN, MASTER, STOCHASTIC

# The roundings as kernels see them.
BY_CHANCE, WITH_REST, WITH_LOW = map(tl.constexpr, (STOCHASTIC, KAHAN, MASTER))


@triton.jit
def _float_of(bits):
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def key_of_step(base, step):
    """32 bits of a parameter's base (`fastopt.optim.options.bases_of`) and its step: splitmix64."""
    x = base.to(tl.uint64) * 0xBF58476D1CE4E5B9 + step.to(tl.int64).to(tl.uint64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return ((x ^ (x >> 31)) & 0xFFFFFFFF).to(tl.int64)


@triton.jit
def key_of_chunk(key, first):
    """A key for elements from `first` on: what their 32-bit index does not say."""
    return key ^ ((first >> 32) * 0x27D4EB2F)


@triton.jit
def _chance(i, key):
    """16 bits out of an index and a key: a multiplicative hash, twice."""
    h = (i.to(tl.uint32) ^ key.to(tl.uint32)) * 0x9E3779B1
    return ((h ^ (h >> 15)) * 0x85EBCA6B) >> 16


@triton.jit
def stochastic(x, i, key):
    """x, rounded to bf16 up or down by chance; infinity and NaN as they are. key: of the chunk"""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + _chance(i, key)) & 0xFFFF0000
    return tl.where(x - x == 0.0, _float_of(rounded), x)


@triton.jit
def upper(x):
    """x, rounded to the nearest bf16, away from zero where two are as near."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x8000) & 0xFFFF0000
    return tl.where(x == x, _float_of(rounded), x)


@triton.jit
def lower(x, high):
    """The part join adds to high for x, between -0x8000 and 0x7FFF; 0 for a NaN."""
    difference = x.to(tl.int32, bitcast=True) - high.to(tl.int32, bitcast=True)
    return tl.where(x == x, difference, 0)


@triton.jit
def join(high, low):
    """The float32 whose bits are those of high plus low."""
    bits = high.to(tl.int32, bitcast=True) + low.to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rest(x, high):
    """The rest of x beside high: x - high; 0 where that is not finite."""
    left = x - high
    return tl.where(left - left == 0.0, left, 0.0)
