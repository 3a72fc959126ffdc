"""States of 8 bits: blocks of 256 elements with one float32 scale s each.

    code of x = (bits of float32(|x| / s + 2^-15) - bits of 2^-15) / 2^19

so codes are the top of a float32's own bits, from 2^-15 on: evenly spaced below 2^-15 s, and by
octaves above, 16 to each. Nothing but shifts and additions makes them.

    int8   a sign and 0 ... 127: 8 octaves    of either sign (first moments)
    uint8  1 ... 255: 16 octaves              never below zero (second moments)

What lies between two codes takes the upper one with the probability of how far it is from the
lower: right on average, where the nearest would stand still (a second moment that falls by 0.1 % a
step never reaches the next code). A second moment is never 0: a step would be divided by nothing.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fastopt_kernels.chunks import (
    BASE,
    BLOCK_8BIT,
    CODES_8BIT,
    LAST,
    LEAST_SCALE,
    ORIGIN,
    SHIFT,
    value_of,
)
from fastopt_kernels.cpu.base import memory
from fastopt_kernels.cpu.base.vector_math import larger, larger_float, smaller
from fastopt_kernels.cpu.base.xp import JIT
from fastopt_kernels.cpu.step.rounding import bits_of, float_of, is_finite

_ZERO, _INFINITY = np.float32(0), np.float32(math.inf)
_LARGEST = np.float32(np.finfo(np.float32).max)
_SMALLEST = np.float32(LEAST_SCALE)
# Consecutive elements draw numbers a golden ratio of the range apart.
_GOLDEN, _DRAWN = np.uint32(0x9E3779B1), np.uint32(32 - SHIFT)
_ORIGIN = np.int32(ORIGIN)
# The alias stream of the first scratch.
SCRATCH = 8


def make_scratch(n: int):
    """scratch(): the address of n blocks of float32 on the stack."""

    @intrinsic
    def scratch(typingctx):
        def codegen(context, builder, signature, args):
            with builder.goto_entry_block():
                blocks = builder.alloca(ir.FloatType(), n * BLOCK_8BIT)
            return builder.ptrtoint(blocks, ir.IntType(64))

        return types.int64(), codegen

    return scratch


def _make_codec(kind: str):
    """(decode(x, s), scale(largest), code(x, inverse, draw), size(x)) of a kind."""
    signed = kind == "int8"
    base, last = np.float32(BASE), np.int32(LAST[kind])
    top = np.float32(value_of(LAST[kind]))
    shift, sign, lowest = np.int32(SHIFT), np.int32(31), np.int32(-(2**31))
    least = np.int32(1 << SHIFT)

    @njit(**JIT)
    def decode(x, s):
        """x: the code, as the bits of a float32"""
        q = np.int32(bits_of(x))
        size = abs(q) if signed else q
        y = (float_of(np.uint32((size << shift) + _ORIGIN)) - base) * s
        return float_of(np.uint32(bits_of(y) | np.uint32(q & lowest))) if signed else y

    @njit(**JIT)
    def scale(largest):
        """(s, 1 / s) of a block whose largest magnitude this is."""
        largest = larger_float(_SMALLEST, largest)
        return largest / top, top / largest

    @njit(**JIT)
    def code(x, inverse, draw):
        """draw: as of `draw`"""
        size = abs(x) if signed else x
        bits = np.int32(np.int32(bits_of(size * inverse + base)) + draw)
        if not signed:
            bits = larger(bits, least)
        q = smaller(np.int32(bits >> shift), last)
        if signed:
            minus = np.int32(np.int32(bits_of(x)) >> sign)
            return np.int32((q ^ minus) - minus)
        return q

    @njit(**JIT)
    def size(x):
        """An int32 that grows with the magnitude of x; of NaN at least that of infinity, or
        negative."""
        return np.int32(bits_of(abs(x) if signed else x))

    return decode, scale, code, size


_CODEC = {kind: _make_codec(kind) for kind in CODES_8BIT}


@njit(**JIT)
def _none(*args):
    return ()


def make_decode(kinds: tuple[str, ...], j: int = 0):
    """decode(x, scales): the elements of all streams, of which 8-bit ones come as codes.

    Here and below j counts the 8-bit streams, and the recursion is over the streams: a compiled
    loop over them would not unroll.
    """
    if not kinds:
        return _none
    eight = kinds[0] in CODES_8BIT
    rest = make_decode(kinds[1:], j + eight)
    one = _CODEC[kinds[0]][0] if eight else None

    def decode_code(x, scales):
        return (one(x[0], scales[j]),) + rest(x[1:], scales)  # noqa: RUF005 (Numba)

    def keep(x, scales):
        return (x[0],) + rest(x[1:], scales)  # noqa: RUF005

    return njit(**JIT)(decode_code if eight else keep)


def make_targets(kinds: tuple[str, ...], j: int = 0):
    """targets(addresses, spare): where element i of a stream is written, of 8-bit ones to scratch.

    spare: the scratch, less what the block's first element is away from the first
    """
    if not kinds:
        return _none
    eight = kinds[0] in CODES_8BIT
    rest = make_targets(kinds[1:], j + eight)

    def to_scratch(addresses, spare):
        return (spare + 4 * BLOCK_8BIT * j,) + rest(addresses[1:], spare)  # noqa: RUF005

    def in_place(addresses, spare):
        return (addresses[0],) + rest(addresses[1:], spare)  # noqa: RUF005

    return njit(**JIT)(to_scratch if eight else in_place)


def make_grow(kinds: tuple[str, ...], j: int = 0):
    """grow(largest, new): the largest magnitudes of the 8-bit streams, with one more element, as
    the bits of float32."""
    if not kinds:
        return _none
    eight = kinds[0] in CODES_8BIT
    rest = make_grow(kinds[1:], j + eight)
    size = _CODEC[kinds[0]][3] if eight else None

    def grown(largest, new):
        # As integers: a maximum of floats, of which one may be NaN, is not vectorized.
        one = larger(size(new[0]), largest[j])
        return (one,) + rest(largest, new[1:])  # noqa: RUF005

    def skip(largest, new):
        return rest(largest, new[1:])

    return njit(**JIT)(grown if eight else skip)


def make_pick(kinds: tuple[str, ...]):
    """pick(addresses): those of the 8-bit streams."""
    if not kinds:
        return _none
    rest = make_pick(kinds[1:])

    def pick(addresses):
        return (addresses[0],) + rest(addresses[1:])  # noqa: RUF005

    def skip(addresses):
        return rest(addresses[1:])

    return njit(**JIT)(pick if kinds[0] in CODES_8BIT else skip)


def make_units(n: int):
    """units(scales, block): the scales of a block, of n streams by their addresses."""
    if not n:
        return _none
    load, rest = memory.make_loader("fp32", types.float32), make_units(n - 1)

    @njit(**JIT)
    def units(scales, block):
        return (load(scales[0], block),) + rest(scales[1:], block)  # noqa: RUF005

    return units


def make_settle(kinds: tuple[str, ...], j: int = 0):
    """settle(scales, spare, largest, block, first, last): writes the scales of a block, and gives
    their inverses.

    kinds: of the 8-bit streams; scales: addresses; largest: as of grow
    """
    if not kinds:
        return _none
    load = memory.make_loader("fp32", types.float32, SCRATCH + j)
    put = memory.make_storer("fp32", types.float32)
    # An infinite second moment stands for the largest that there is: it lets its parameter rest.
    # That of a first moment, and all that is NaN, is in the parameter already.
    beyond = _LARGEST if kinds[0] == "uint8" else _ZERO
    scale_of, rest = _CODEC[kinds[0]][1], make_settle(kinds[1:], j + 1)

    @njit(**JIT)
    def finite(spare, first, last):
        """The largest magnitude where one is not finite."""
        top = _ZERO
        for i in range(first, last):
            x = abs(load(spare, i))
            x = beyond if x == _INFINITY else x
            top = larger_float(x, top)
        return top

    @njit(forceinline=True, **JIT)
    def settle(scales, spare, largest, block, first, last):
        top = float_of(np.uint32(largest[0]))
        if not is_finite(top):
            top = finite(spare, first, last)
        scale, inverse = scale_of(top)
        put(scales[0], block, scale)
        spare += 4 * BLOCK_8BIT
        return (inverse,) + rest(scales[1:], spare, largest[1:], block, first, last)  # noqa: RUF005

    return settle


def make_encode(kinds: tuple[str, ...], streams: tuple[int, ...], j: int = 0):
    """encode(codes, spare, inverses, i, draw): element i out of scratch.

    kinds, streams: of the 8-bit streams; codes: their addresses
    """
    if not kinds:
        return _none
    load = memory.make_loader("fp32", types.float32, SCRATCH + j)
    store, code = memory.make_code_storer(streams[0]), _CODEC[kinds[0]][2]
    rest = make_encode(kinds[1:], streams[1:], j + 1)

    @njit(**JIT)
    def encode(codes, spare, inverses, i, draw):
        store(codes[0], i, code(load(spare, i), inverses[0], draw))
        return rest(codes[1:], spare + 4 * BLOCK_8BIT, inverses[1:], i, draw)

    return encode


@njit(**JIT)
def chance_of(i, key):
    """32 bits of an element and a key."""
    return np.uint32(np.uint32(i) * _GOLDEN + key)


@njit(**JIT)
def next_chance(chance):
    """That of the next element."""
    return np.uint32(chance + _GOLDEN)


@njit(**JIT)
def draw(chance):
    """A number below 2^SHIFT, any as likely, less the bits of BASE."""
    return np.int32(np.int32(chance >> _DRAWN) - _ORIGIN)
