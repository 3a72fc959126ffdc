"""The functions a rule may call, in double on the host.

A rule is a plain function of floats whose globals hold a module named `xp`. Each compiler gets
the same source with its own module of these names: `cpu.xp` (Numba), `gpu.xp` (Triton),
`fastopt.optim.step.eager` (torch). This one serves the host half, the scalars of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any


def sqrt(x: float) -> float:
    """sqrt(x), correctly rounded; NaN below zero, as every backend has it."""
    return math.sqrt(x) if x >= 0.0 else math.nan


def power(x: float, y: float) -> float:
    """x ** y for x >= 0."""
    return math.pow(x, y)


def absolute(x: float) -> float:
    """|x|."""
    return math.fabs(x)


def sign(x: float) -> float:
    """-1, 0 or 1; 0 for NaN, as torch.sign has it."""
    return float(x > 0) - float(x < 0)


def maximum(x: float, y: float) -> float:
    """The larger of x and y; NaN where either is NaN."""
    return x + y if math.isnan(x) or math.isnan(y) else max(x, y)


def where(condition: float, x: float, y: float) -> float:
    """x where the condition holds, else y; the other one may be NaN or infinite."""
    return x if condition else y


def add_scaled(x: float, scale: float, y: float) -> float:
    """x + scale * y, and x untouched where scale is 0 (0 * inf is NaN, no decay is not)."""
    return x + scale * y if scale != 0.0 else x


def lerp(x: float, y: float, weight: float) -> float:
    """x + weight (y - x), from whichever end is nearer, as torch.lerp has it."""
    return x + weight * (y - x) if weight < 0.5 else y - (1.0 - weight) * (y - x)


def uncompilable(rule: Callable[..., Any], compiler: str, error: Exception) -> TypeError:
    """The error to raise for a rule the compiler refuses."""
    return TypeError(
        f"{compiler} cannot compile the rule {rule.__module__}.{rule.__qualname__}: it may use "
        "floats, + - * / and the functions of fastopt.optim.xp, and returns a tuple of the "
        f"parameter and its states. {compiler} says: {error}"
    )


def rebind(rule: Callable[..., Any], xp: ModuleType) -> FunctionType:
    """The same function with `xp` in its globals replaced: one source for every compiler."""
    function = FunctionType(
        rule.__code__, rule.__globals__ | {"xp": xp}, rule.__name__, rule.__defaults__
    )
    function.__module__ = rule.__module__
    function.__qualname__ = rule.__qualname__
    return function
