"""The base of the row kernels: where a program's lines lie, arithmetic that is IEEE's, the launch.

A line is what is reduced: n_cols elements, a row (next to each other) or a column (stride_col
apart). A program takes a tile of LINES x COLS elements. Where COLS covers a line it is read once
and kept in registers (WHOLE); a longer one is walked in tiles, with a running maximum and sum. What
is chosen depends on n_cols, n_inner, the dtype and the alignment alone: never on how many lines
there are, so that a line is computed alike in every batch.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels import launches
from fastopt_kernels.gpu.base import xp
from fastopt_kernels.gpu.base.device import register_options, warp_size
from fastopt_kernels.gpu.base.extents import counted

COMPUTE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float16: tl.float32,
    torch.float64: tl.float64,
}
# Elements of a tile: the least a program takes, the longest line it keeps in registers (in the
# compute type: 16 of 4 bytes a thread, 32 where that is the only way to read a line once), and
# what it walks a longer one in.
LEAST = {tl.float32: 2048, tl.float64: 1024}
WIDEST = {tl.float32: 16384, tl.float64: 8192}
STEP = {tl.float32: 4096, tl.float64: 2048}
# Lines longer than this are walked by a program of 512 threads: there are few of them.
LONG = 65536
# Bytes of neighbouring columns a program takes: whole sectors of 32, but few enough that one
# matrix of 4096 columns keeps 132 multiprocessors busy.
INNER_BYTES = ((16384, 64), (None, 256))
# What changes from call to call, and must not compile a kernel anew.
EXTENTS = ["n_lines", "n_cols", "stride_outer", "stride_col"]
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOWEST64 = tl.constexpr(-1.7976931348623157e308)
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.925963033500011e-8)  # what float32 loses of it
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x):
    """To 2 ulp for x <= 88: what the product with log2(e) loses is put back.

    Below 1.2e-38 it is 0: exp2 flushes, and the range is not worth its three instructions.
    """
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        # The bound keeps -inf from being subtracted from itself.
        x = tl.maximum(x, -105.0, propagate_nan=tl.PropagateNan.ALL)
        power = x * LOG2E
        lost = tl.fma(x, LOG2E_LOW, tl.fma(x, LOG2E, -power))
        y = tl.exp2(power) * (1.0 + lost * LN2)
    return y


@triton.jit
def exp_term(x):
    """For sums: relative error |x| 2**-24, where terms of large |x| weigh nothing."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        y = tl.exp2(x * LOG2E)
    return y


@triton.jit
def reciprocal(x):
    """1 / x, correctly rounded."""
    if x.dtype == tl.float64:
        y = 1.0 / x
    else:
        y = tl.div_rn(1.0, x)
    return y


@triton.jit
def rsqrt(x):
    """1 / sqrt(x), both steps correctly rounded."""
    return reciprocal(xp.sqrt(x))


@triton.jit
def scalar(parts, COMPUTE: tl.constexpr):
    """A number of the host, which comes in `parts`; (1,)"""
    return tl.zeros((1,), COMPUTE) + parts[0] + parts[1] + parts[2]


@triton.jit
def lowest(COMPUTE: tl.constexpr):
    value = LOWEST
    if COMPUTE == tl.float64:  # noqa: SIM300
        value = LOWEST64
    return value


@triton.jit
def finite(x, COMPUTE: tl.constexpr):
    """x for a maximum: within the finite numbers, and the lowest for NaN.

    With it (-inf) - (-inf) does not arise, and NaN and +inf reach the sum of exponentials, where
    they belong: a line of -inf has the sum 0, one with +inf the sum +inf.
    """
    return tl.minimum(tl.maximum(x, lowest(COMPUTE)), -lowest(COMPUTE))


@triton.jit
def peak(x, COMPUTE: tl.constexpr):
    """The maximum of each line of a tile."""
    return tl.max(finite(x, COMPUTE), 1)


@triton.jit
def tiled(x, WIDTH: tl.constexpr):
    """(LINES, COLS) as (LINES, COLS / WIDTH, WIDTH): the last is what one thread loads at once."""
    return tl.reshape(x, (x.shape[0], x.shape[1] // WIDTH, WIDTH))


@triton.jit
def online(top, total, x, WIDTH: tl.constexpr, COMPUTE: tl.constexpr):
    """Running maximum and sum of exp(x - maximum), in each thread for itself: no barrier."""
    x = tiled(x, WIDTH)
    new = tl.maximum(top, tl.max(finite(x, COMPUTE), 2))
    total = total * exp_term(top - new) + tl.sum(exp_term(x - new[:, :, None]), 2)
    return new, total


@triton.jit
def merge(tops, totals):
    """The maximum and the sum of each line from its running ones."""
    top = tl.max(tops, 1)
    return top, tl.sum(totals * exp_term(tops - top[:, None]), 1)


@triton.jit
def no_infinity(total):
    """The sum of a softmax: one +inf makes its line NaN, as inf - inf does in torch."""
    return tl.where(total == float("inf"), float("nan"), total)


@triton.jit
def geometry(
    n_lines, n_cols, stride_outer, stride_col, VECTOR: tl.constexpr, COLUMNS: tl.constexpr
):
    """Extents that came in units of VECTOR: so Triton sees that they are multiples of it."""
    stride_outer = stride_outer.to(tl.int64) * VECTOR
    if COLUMNS:
        # Columns beside each other may be more than 32 bits count.
        n_lines = n_lines.to(tl.int64) * VECTOR
        stride_col = stride_col.to(tl.int64) * VECTOR
    else:
        n_cols = n_cols * VECTOR
    return n_lines, n_cols, stride_outer, stride_col


@triton.jit
def place(n_lines, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """The outer index of this program (0 for rows, which are all one), and its lines; int64."""
    program = tl.program_id(0).to(tl.int64)
    outer = program * 0
    if COLUMNS:
        blocks = tl.cdiv(n_lines, LINES)
        outer = program // blocks
        program = program % blocks
    return outer, program * LINES + tl.arange(0, LINES)


@triton.jit
def starts(outer, lines, stride_outer, COLUMNS: tl.constexpr):
    """Offsets of the first element of each line."""
    if COLUMNS:
        offsets = outer * stride_outer + lines
    else:
        offsets = lines * stride_outer
    return offsets


@triton.jit
def packed(outer, lines, n_lines, n_cols, COLUMNS: tl.constexpr):
    """The same for a contiguous tensor, and its stride_col."""
    stride = n_lines.to(tl.int64)
    if COLUMNS:
        offsets = outer * (stride * n_cols) + lines
    else:
        offsets = lines * n_cols
    return offsets, stride


@triton.jit
def spread(offsets, cols, stride_col, COLUMNS: tl.constexpr):
    """Offsets of a tile: the columns `cols` of the lines that begin at `offsets`."""
    if COLUMNS:
        tile = offsets[:, None] + cols[None, :] * stride_col
    else:
        tile = offsets[:, None] + cols[None, :]
    return tile


@triton.jit
def load(x_ptr, offsets, mask, other, COMPUTE: tl.constexpr):
    return tl.load(x_ptr + offsets, mask=mask, other=other).to(COMPUTE)


@triton.jit
def store(y_ptr, offsets, y, mask):
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def statistics(
    x_ptr, start, here, n_cols, stride_col, COMPUTE: tl.constexpr, COLUMNS: tl.constexpr,
    LINES: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The maximum of each line and its sum of exp(x - maximum), in one walk."""
    tops = tl.full((LINES, COLS // WIDTH), lowest(COMPUTE), COMPUTE)
    totals = tl.zeros((LINES, COLS // WIDTH), COMPUTE)
    for first in range(0, n_cols, COLS):
        cols = first + tl.arange(0, COLS)
        mask = here & (cols < n_cols)[None, :]
        at = spread(start, cols, stride_col, COLUMNS)
        x = load(x_ptr, at, mask, -float("inf"), COMPUTE)
        tops, totals = online(tops, totals, x, WIDTH, COMPUTE)
    return merge(tops, totals)


def parts(x: float) -> tuple[float, ...]:
    """A double as numbers of float32 precision that add up to it: all that Triton passes on."""
    found = []
    for _ in range(3):
        found.append(struct.unpack("f", struct.pack("f", x))[0])
        x -= found[-1]
    return tuple(found)


@dataclass(frozen=True)
class Tile:
    """The tile that a program takes, and what the compiler may count on."""

    lines: int
    cols: int
    whole: bool
    columns: bool
    vector: int
    width: int
    threads: int

    def options(self) -> dict[str, Any]:
        """The keywords of a launch."""
        return {
            "LINES": self.lines,
            "COLS": self.cols,
            "VECTOR": self.vector,
            "num_warps": warps(self.threads),
            "enable_fp_fusion": True,
        }


def power_of_two(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, n - 1).bit_length()


# Elements of a tile a thread has: twice as many of float64 spill in rows of layer_norm and columns
# of cross entropy (sm_90).
EACH = {tl.float32: 16, tl.float64: 4}


def threads_for(elements: int, each: int) -> int:
    """So many elements a thread; more where there would be more than 512 threads."""
    return min(512, max(32, elements // each))


def tile_of_rows(
    n_cols: int, compute: tl.dtype, vector: int, widest: int | None = None, halved: bool = False
) -> Tile:
    """Rows next to each other: as many as fill a tile, or one, or a part of one.

    widest: the longest row to keep in registers; halved: walk in half as many elements a thread
    """
    if counted(n_cols, "a row") <= (widest or WIDEST[compute]):
        cols = power_of_two(n_cols)
        lines = max(1, LEAST[compute] // cols)
        threads = threads_for(lines * cols, EACH[compute])
        return Tile(lines, cols, True, False, vector, 1, threads)
    cols = STEP[compute] * (2 if n_cols > LONG else 1)
    threads = threads_for(cols, EACH[compute])
    return Tile(1, cols // (1 + halved), False, False, vector, vector, threads)


def tile_of_columns(
    n_cols: int, n_inner: int, itemsize: int, compute: tl.dtype, vector: int, halved: bool = False
) -> Tile:
    """Columns: a strip of neighbouring ones, as far down as a tile reaches.

    halved: walk in 16 bytes a thread
    """
    step, length = STEP[compute], power_of_two(counted(n_cols, "a column"))
    nbytes = next(size for limit, size in INNER_BYTES if limit is None or n_inner < limit)
    lines = max(nbytes // itemsize, LEAST[compute] // length)
    lines = min(power_of_two(n_inner), lines)
    cols = min(length, step // lines)
    whole, threads = n_cols <= cols, threads_for(lines * cols, EACH[compute])
    if halved and not whole:
        # More of them leave too few registers for float64 (sm_100).
        threads = min(threads, 256)
        cols = threads * (16 // itemsize) // lines
    return Tile(lines, cols, whole, True, vector, 1, threads)


def warps(threads: int) -> int:
    return max(1, threads // warp_size())


def vector_of(tensors: Sequence[Tensor | None], extents: Sequence[int], itemsize: int) -> int:
    """Elements of 16 bytes, where every tensor and each of these strides allows it; else 1."""
    vector = 16 // itemsize
    whole = all(extent % vector == 0 for extent in extents)
    aligned = all(x is None or x.data_ptr() % 16 == 0 for x in tensors)
    return vector if whole and aligned else 1


@dataclass(frozen=True)
class Lines:
    """The lines of an input (n_outer, n_cols, n_inner), how they are tiled, and over what grid."""

    tile: Tile
    grid: tuple[int]
    # n_lines, n_cols, stride_outer, stride_col; in units of the vector where they must divide.
    extents: tuple[int, int, int, int]
    compute: tl.dtype

    @classmethod
    def of(
        cls,
        x: Tensor,
        shape: tuple[int, int, int],
        strides: tuple[int, int],
        tensors: Sequence[Tensor | None],
        halved: bool = False,
        widest: int | None = None,
    ) -> Lines:
        """tensors: all that are read or written as tiles, x among them; the rest: `tile_of_rows`"""
        (n_outer, n_cols, n_inner), compute = shape, COMPUTE[x.dtype]
        itemsize = x.element_size()
        if n_inner == 1:
            vector = vector_of(tensors, (n_cols, strides[0]), itemsize)
            tile = tile_of_rows(n_cols, compute, vector, widest, halved)
            extents = (n_outer, n_cols // vector, strides[0] // vector, 1)
            return cls(tile, (triton.cdiv(n_outer, tile.lines),), extents, compute)
        vector = vector_of(tensors, (n_inner, *strides), itemsize)
        tile = tile_of_columns(n_cols, n_inner, itemsize, compute, vector, halved)
        extents = (n_inner // vector, n_cols, strides[0] // vector, strides[1] // vector)
        return cls(tile, (n_outer * triton.cdiv(n_inner, tile.lines),), extents, compute)

    def launch(self, kernel: Any, tensors: Sequence[Any], *scalars: Any, **constants: Any) -> None:
        """kernel[grid](*tensors, *extents, *scalars), on the device of the first tensor."""
        launch(
            kernel,
            self.grid,
            (*tensors, *self.extents, *scalars),
            COMPUTE=self.compute,
            WHOLE=self.tile.whole,
            COLUMNS=self.tile.columns,
            **self.tile.options(),
            **constants,
        )


def launch(kernel: Any, grid: tuple[int], args: Sequence[Any], **constants: Any) -> None:
    """Launch on the device of its first tensor, and its current stream; nothing if empty."""
    if grid[0] == 0:
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    # Triton's interpreter runs on the CPU.
    with nullcontext() if device.type == "cpu" else torch.cuda.device(device):
        options = register_options(constants["num_warps"])
        launches.start(kernel, grid, *args, **constants, **options)
