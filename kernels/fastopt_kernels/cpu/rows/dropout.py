"""Which elements a dropout keeps: a hash of seed, row and column, so that no mask is ever stored.

    keep(seed, row, column) = hash(column, keys(seed, row)) < kept,  kept = 2^32 (1 - p)

All of it is arithmetic on 32 bits, written out again for Triton (`gpu/rows/dropout.py`) and for
torch (`fastopt/functional/dropout.py`): one seed drops the same elements everywhere.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from fastopt_kernels.cpu.base import tasks
from fastopt_kernels.cpu.base.tasks import double_bits
from fastopt_kernels.cpu.base.vector_math import bits_to_double

_I32 = ir.IntType(32)
# Odd numbers that spread the bits of a word well over those above (Wellons' search for hashes of
# two multiplications, and the constants of MurmurHash3).
MIX = (0x7FEB352D, 0x846CA68B)
HASH = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)


def _word(x: int) -> ir.Constant:
    return ir.Constant(_I32, x)


def _folded(builder, h, shift):
    return builder.xor(h, builder.lshr(h, _word(shift)))


def _mix(builder, h):
    """A bijection of 32 bits in which each bit of the result depends on all."""
    h = builder.mul(_folded(builder, h, 16), _word(MIX[0]))
    h = builder.mul(_folded(builder, h, 15), _word(MIX[1]))
    return _folded(builder, h, 16)


@intrinsic
def keys(typingctx, seed, row):
    """The two words that the columns of a row are hashed with; of row the lowest 32 bits count."""

    def codegen(context, builder, signature, args):
        seed, row = args
        low, row = builder.trunc(seed, _I32), builder.trunc(row, _I32)
        high = builder.trunc(builder.lshr(seed, ir.Constant(seed.type, 32)), _I32)
        high = _mix(builder, builder.xor(high, _mix(builder, low)))
        low = _mix(builder, builder.add(low, high))
        first = _mix(builder, builder.xor(row, low))
        second = _mix(builder, builder.add(first, high))
        return context.make_tuple(builder, signature.return_type, (first, second))

    return types.UniTuple(types.uint32, 2)(types.int64, types.int64), codegen


@intrinsic
def keep(typingctx, column, first, second, kept):
    """True where the element of that column stays; first, second: `keys`; kept: of 2^32 columns"""

    def codegen(context, builder, signature, args):
        column, first, second, kept = args
        h = builder.xor(builder.trunc(column, _I32), first)
        h = builder.mul(h, _word(HASH[0]))
        h = builder.mul(builder.xor(_folded(builder, h, 16), second), _word(HASH[1]))
        h = builder.mul(_folded(builder, h, 13), _word(HASH[2]))
        return builder.icmp_unsigned("<", h, builder.trunc(kept, _I32))

    words = (types.uint32, types.uint32)
    return types.boolean(types.int64, *words, types.int64), codegen


def numbers_of(dropout: tuple[Tensor, int, float] | None) -> tuple[int, int, int]:
    """Seed, kept and scale as a task is given them."""
    if dropout is None:
        return 0, 0, 0
    seed, kept, scale = dropout
    return int(seed), kept, double_bits(scale)


def make_chance(tag, compute, drops):
    """chance_of(numbers, row): what `drop` needs to know of a row."""
    zero = np.uint32(0)

    @tasks.inlined(tag)
    def chance_of(numbers, row):
        seed, kept, scale = numbers
        first, second = keys(seed, row) if drops else (zero, zero)
        return first, second, kept, compute(bits_to_double(scale))

    return chance_of


def make_dropper(tag, compute, drops):
    """drop(x, j, chance): x scale where element j of the row stays, else 0, whatever x is."""
    zero = compute(0)

    @tasks.inlined(tag)
    def drop(x, j, chance):
        if drops:
            first, second, kept, scale = chance
            scaled = x * scale
            return scaled if keep(j, first, second, kept) else zero
        return x

    return drop
