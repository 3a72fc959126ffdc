"""The functions a rule may call, for Numba: scalars that the loop vectorizes.

`contract` lets LLVM fuse a multiply and an add; no other fast-math flag is sound here, since NaN
and infinity in a gradient must give what torch gives. Constants take the type of an argument:
a Python literal would be a double and halve the vector width.
"""

from __future__ import annotations

import math

from numba import njit

JIT = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


@njit(**JIT)
def sqrt(x):
    return math.sqrt(x)


@njit(**JIT)
def power(x, y):
    return x**y


@njit(**JIT)
def absolute(x):
    return math.fabs(x)


@njit(**JIT)
def sign(x):
    kind = type(x)
    return kind(x > kind(0)) - kind(x < kind(0))


@njit(**JIT)
def maximum(x, y):
    # A comparison with NaN is false, so y wins unless it is smaller; then x + y keeps a NaN in x.
    larger = x if x > y else y
    return x + y if x != x else larger


@njit(**JIT)
def where(condition, x, y):
    return x if condition else y


@njit(**JIT)
def add_scaled(x, scale, y):
    return x + scale * y if scale != type(scale)(0) else x


@njit(**JIT)
def lerp(x, y, weight):
    one = type(weight)(1)
    near_x = weight < type(weight)(0.5)
    start = x if near_x else y
    slope = weight if near_x else weight - one
    return start + slope * (y - x)
