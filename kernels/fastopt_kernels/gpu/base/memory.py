"""Addresses to typed pointers and back: the codecs of the CPU engine, for Triton.

The arithmetic is in float32 (float64 for float64 parameters) whatever lies in memory; a store
rounds to nearest, ties to even.
"""

from __future__ import annotations

import triton
import triton.language as tl

DTYPES = {
    "fp32": tl.float32,
    "bf16": tl.bfloat16,
    "fp16": tl.float16,
    "fp64": tl.float64,
    "int16": tl.int16,
    "int8": tl.int8,
    "uint8": tl.uint8,
}


def compute_dtype(kind: str) -> tl.dtype:
    """The type a parameter of this kind is updated in."""
    return tl.float64 if kind == "fp64" else tl.float32


@triton.jit
def pointer(address, first, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Element `first` (int64) of the array at an address; ALIGNED: bytes it promises, or 0."""
    x_ptr = address.to(tl.pointer_type(DTYPE)) + first
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, ALIGNED)
    return x_ptr
