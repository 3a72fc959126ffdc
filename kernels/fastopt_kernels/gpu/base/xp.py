"""The functions a rule may call, for Triton: IEEE where triton.language is not.

`tl.sqrt` is approximate and flushes denormals, `tl.maximum` drops NaN: the ones here are correctly
rounded and keep it. What is multiplied by a scalar that is 0 must not turn infinity into NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sqrt(x):
    if x.dtype == tl.float64:
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def power(x, y):
    # x >= 0. log(0) is -inf, and exp(-inf) the 0 that 0 ** y is. The sum gives x the type of y: a
    # number alone would be float32, and its logarithm approximate.
    return tl.exp(y * tl.log(x + y * 0.0))


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def where(condition, x, y):
    return tl.where(condition != 0, x, y)


@triton.jit
def add_scaled(x, scale, y):
    return tl.where(scale != 0.0, x + scale * y, x)


@triton.jit
def lerp(x, y, weight):
    near_x = weight < 0.5
    start = tl.where(near_x, x, y)
    slope = tl.where(near_x, weight, weight - 1.0)
    return start + slope * (y - x)
