"""Which elements a dropout keeps: the hash of `cpu/rows/dropout.py` on blocks, bit for bit.

keep(seed, row, column) = hash(column, keys(seed, row)) < kept,  kept = 2^32 (1 - p)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.gpu.rows import shared

# seed, how many of 2^32 stay, and what they are multiplied by
Dropout = tuple[Tensor, int, float]


@triton.jit
def _mix(h):
    """A bijection of 32 bits in which each bit of the result depends on all."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _keys(seed_ptr, lines):
    """The two words that the columns of a row are hashed with."""
    seed = tl.load(seed_ptr)
    low = seed.to(tl.uint32)
    high = _mix((seed >> 32).to(tl.uint32) ^ _mix(low))
    low = _mix(low + high)
    first = _mix(lines.to(tl.uint32) ^ low)
    return first, _mix(first + high)


@triton.jit
def drop(x, seed_ptr, lines, cols, kept, scale, COMPUTE: tl.constexpr):
    """x scale where an element of the tile stays, else 0, whatever x is; kept: less 2^31"""
    if seed_ptr is not None:
        first, second = _keys(seed_ptr, lines)
        h = (cols.to(tl.uint32)[None, :] ^ first[:, None]) * 0x9E3779B1
        h = (h ^ (h >> 16) ^ second[:, None]) * 0x85EBCA6B
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        # Compared with a sign, because what the host passes must be one type whatever its value.
        keep = (h ^ 0x80000000).to(tl.int32, bitcast=True) < kept
        x = tl.where(keep, x * shared.scalar(scale, COMPUTE)[:, None], 0.0)
    return x


def arguments(dropout: Dropout | None) -> tuple[Tensor | None, int, tuple[float, ...]]:
    """seed_ptr, kept and scale as a kernel is given them."""
    if dropout is None:
        return None, 0, shared.parts(0.0)
    seed, kept, scale = dropout
    return seed, kept - 2**31, shared.parts(scale)
