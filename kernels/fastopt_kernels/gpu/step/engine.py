"""One launch for every tensor of a model: p, g and the states of all of them, in place.

One program takes one chunk (tensor, first, last) of a table (`update`).

Where the host may not know the step (GradScaler's found_inf, graph capture), a small float64 kernel
before it counts the steps and computes the scalars on the device (`scalars`). Where the gradients
are looked at first (`measure`), their factors are read from where that left them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastopt_kernels.chunks import (
    BLOCK_8BIT,
    CODES_8BIT,
    n_codes,
)
from fastopt_kernels.gpu.base import xp as gpu_xp
from fastopt_kernels.gpu.base.device import warp_size
from fastopt_kernels.xp import rebind

# Elements a program updates. Small enough that 20 tensors of 1M fill 132 multiprocessors several
# times over, large enough that the table stays under 0.2 % of the traffic of AdamW.
CHUNK = 4096
THREADS = 128
# Elements a block: 16 bytes a thread of the narrowest stream, so each access is one of 128 bits.
# Twice that took 153 registers instead of 40 on sm_90 (AdamW, float32) and a third of the warps.
BLOCK = {"fp64": 256, "fp32": 512, "bf16": 1024, "fp16": 1024, "int16": 1024}


class Shape(NamedTuple):
    """The walk of a launch over a chunk of some streams.

    block: elements at a time; parts: programs a chunk; threads: of a program; width: elements of a
    thread that lie side by side
    """

    block: int
    parts: int
    threads: int
    width: int


def shape_of(kinds: tuple[str, ...]) -> Shape:
    """The shape of a launch; if states have codes, a program is one warp, a block has one scale."""
    block = max(BLOCK[kind] for kind in kinds if kind not in CODES_8BIT)
    width = block // THREADS
    if not n_codes(kinds):
        return Shape(block, 1, THREADS, width)
    threads = warp_size()
    return Shape(BLOCK_8BIT, THREADS // threads, threads, min(width, BLOCK_8BIT // threads))


def scale_columns(kinds: tuple[str, ...]) -> tuple[int, ...]:
    """Of each stream the column of its scales, which come last; 0 for none."""
    n = len(kinds) - n_codes(kinds)
    coded = count(n)
    return tuple(next(coded) if kind in CODES_8BIT else 0 for kind in kinds[:n])


@cache
def compiled_rule(rule: Callable[..., Any]) -> Any:
    """A rule or scalars function as Triton sees it: the same source, with Triton's `xp`."""
    function = rebind(rule, gpu_xp)
    function.__globals__["tl"] = tl  # Triton's interpreter looks for it in every function
    function.__globals__["bool"] = tl.int1  # its compiler reads annotations, and knows no bool
    for name in rule.__code__.co_names:
        if isinstance(value := rule.__globals__.get(name), (int, float)):
            function.__globals__[name] = tl.constexpr(value)
    return triton.jit(function)
