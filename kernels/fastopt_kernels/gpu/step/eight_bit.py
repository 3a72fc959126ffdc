"""States of 8 bits on blocks: `cpu/step/eight_bit.py`, which describes the codes, for Triton.

A program is one warp, and its block the 256 elements of one scale: the largest of them is found by
shuffles, and nothing waits for another warp.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from fastopt_kernels.chunks import BASE, CODES_8BIT, LAST, LEAST_SCALE, ORIGIN, SHIFT, value_of

_SHIFT, _ORIGIN, _BASE = tl.constexpr(SHIFT), tl.constexpr(ORIGIN), tl.constexpr(BASE)
_DRAWN, _ONE = tl.constexpr(32 - SHIFT), tl.constexpr(1 << SHIFT)
_SIGNED, _UNSIGNED = (tl.constexpr(LAST[kind]) for kind in CODES_8BIT)
_TOP_SIGNED, _TOP_UNSIGNED = (tl.constexpr(value_of(LAST[kind])) for kind in CODES_8BIT)
_LARGEST = tl.constexpr(float(np.finfo(np.float32).max))
_SMALLEST = tl.constexpr(LEAST_SCALE)


@triton.jit
def decode(codes, scale):
    """The float32 numbers that codes stand for."""
    q = codes.to(tl.int32)
    size = (tl.abs(q) << _SHIFT) + _ORIGIN
    x = (size.to(tl.float32, bitcast=True) - _BASE) * scale
    return tl.where(q < 0, -x, x)


@triton.jit
def draw(i, key):
    """A number below 2^SHIFT, any as likely, of an element and a key, less the bits of BASE."""
    chance = i.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32)
    return (chance >> _DRAWN).to(tl.int32) - _ORIGIN


@triton.jit
def _settle(x, mask, CODE: tl.constexpr):
    """(s, 1 / s) of a block.

    An infinite second moment stands for the largest that there is: it lets its parameter rest. That
    of a first moment, and all that is NaN, is in the parameter already, and counts as nothing.
    """
    if tl.int8 == CODE:
        size = tl.where(tl.abs(x) < float("inf"), tl.abs(x), 0.0)
        top = tl.full((), _TOP_SIGNED, tl.float32)
    else:
        size = tl.where(x > 0.0, x, 0.0)
        top = tl.full((), _TOP_UNSIGNED, tl.float32)
    if mask is not None:
        size = tl.where(mask, size, 0.0)
    largest = tl.maximum(tl.minimum(tl.max(size, 0), _LARGEST), _SMALLEST)
    return tl.div_rn(largest, top), tl.div_rn(top, largest)


@triton.jit
def encode(x, mask, drawn, CODE: tl.constexpr):
    """The codes of a block, each that of x or of the next one above by chance, and their scale.

    drawn: as of `draw`
    """
    scale, inverse = _settle(x, mask, CODE)
    if tl.int8 == CODE:
        size = tl.abs(x)
    else:
        size = x
    bits = tl.fma(size, inverse, _BASE).to(tl.int32, bitcast=True) + drawn
    if tl.int8 == CODE:
        q = tl.minimum(bits >> _SHIFT, _SIGNED)
        minus = x.to(tl.int32, bitcast=True) >> 31
        code = (q ^ minus) - minus
    else:
        # Never 0: a step would be divided by nothing.
        code = tl.minimum(tl.maximum(bits, _ONE) >> _SHIFT, _UNSIGNED)
    return code.to(CODE), scale
