"""Gradients of LayerNorm and RMSNorm for Triton, their sums over rows without atomics.

Weight gradients are summed by a number of programs that the shape alone decides, each over rows of
its own, and then over the programs, always in the same order. Where registers hold a row, the
kernel of dx does it on the way, and dy and x are read once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.gpu.base.extents import counted
from fastopt_kernels.gpu.rows import dropout as dropouts
from fastopt_kernels.gpu.rows import layer_norm_tiles, shared
from fastopt_kernels.gpu.rows.dropout import Dropout

# What changes from call to call, and must not compile a kernel anew.
EXTENTS = ["n_rows", "n_cols", "stride_row"]
# Halves of one tensor: aligned or not as the number of rows has it.
STATISTICS = ["mean_ptr", "rstd_ptr"]
# The longest row whose x, dy, weight and two sums registers hold.
WIDEST = {tl.float32: 8192, tl.float64: 4096}
# Threads that sum weight gradients: as many as 132 multiprocessors hold at 100 registers, so that
# no program waits for another to end. Fewer for few rows: a program takes four tiles at least.
SUMMING_THREADS = 65536
TILES_EACH = 4
# Tiles (rows, columns) of the sums of long rows and of the sums over programs, and how many
# programs there are of the former.
LONG_TILE, LONG_THREADS, LONG_PROGRAMS = (8, 512), 256, 1024
SUM_TILE, SUM_THREADS = (64, 32), 128

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def scaled(x, weight_ptr, bias_ptr, offset, cols, n_cols, COMPUTE: tl.constexpr):
    """x (weight + offset) + bias, of those there are."""
    if weight_ptr is not None:
        weight = shared.load(weight_ptr, cols[None, :], (cols < n_cols)[None, :], 0.0, COMPUTE)
        if offset is not None:
            weight += shared.scalar(offset, COMPUTE)[:, None]
        x = x * weight
    if bias_ptr is not None:
        x = x + shared.load(bias_ptr, cols[None, :], (cols < n_cols)[None, :], 0.0, COMPUTE)
    return x


@triton.jit
def _normalized(x, mean_ptr, rstd_ptr, lines, here, COMPUTE: tl.constexpr):
    """x as the forward left it before the weight, and rstd; nothing is subtracted for RMSNorm."""
    rstd = shared.load(rstd_ptr, lines, here, 0.0, COMPUTE)[:, None]
    if mean_ptr is not None:
        x = x - shared.load(mean_ptr, lines, here, 0.0, COMPUTE)[:, None]
    return x * rstd, rstd


@triton.jit
def _held_gradient(dy, x_hat, rstd, each, mean_ptr):
    """dx of rows held in registers; dy: times the weight."""
    dx = dy - x_hat * (tl.sum(dy * x_hat, 1) * each)[:, None]
    if mean_ptr is not None:
        dx -= (tl.sum(dy, 1) * each)[:, None]
    return dx * rstd


@triton.jit
def _store_share(shares_ptr, at, total, inside):
    """A program's share of a sum over rows, if it is wanted."""
    if shares_ptr is not None:
        shared.store(shares_ptr, at, tl.sum(total, 0), inside)


@triton.jit
def _put(
    d, dx_ptr, dropped_ptr, dsum_ptr, at, lines, cols, mask, seed_ptr, kept, scale,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient by what was normalized on its way: of a sum, to what was added up to it."""
    if dsum_ptr is not None:
        d += shared.load(dsum_ptr, at, mask, 0.0, COMPUTE)
    if dx_ptr is not None:
        shared.store(dx_ptr, at, d, mask)
    if dropped_ptr is not None:
        d = dropouts.drop(d, seed_ptr, lines, cols, kept, scale, COMPUTE)
        shared.store(dropped_ptr, at, d, mask)


@triton.jit(
    do_not_specialize=[*EXTENTS, "rows_each", "kept"], do_not_specialize_on_alignment=STATISTICS
)
def norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweights_ptr, dbiases_ptr, n_rows,
    n_cols, stride_row, rows_each, offset, dsum_ptr, dropped_ptr, seed_ptr, kept, scale,
    WANTS_DX: tl.constexpr, COMPUTE: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """dx = rstd (weight dy - mean(weight dy) - x_hat mean(weight dy x_hat)), of rows in registers.

    A program takes rows_each rows one after the other, and keeps its share of the sums:
    dweights_ptr: (programs, n_cols) sums of dy x_hat; dbiases_ptr: sums of dy; None: not wanted
    """
    n_cols = n_cols * VECTOR
    stride_row = stride_row.to(tl.int64) * VECTOR
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    inside = cols < n_cols
    each = shared.reciprocal(n_cols.to(COMPUTE))
    dweight = tl.zeros((LINES, COLS), COMPUTE)
    dbias = tl.zeros((LINES, COLS), COMPUTE)
    last = tl.minimum((program + 1) * rows_each, n_rows)
    for first in range(program * rows_each, last, LINES):
        lines = first + tl.arange(0, LINES)
        here = lines < last
        mask = here[:, None] & inside[None, :]
        packed = (lines * n_cols)[:, None] + cols[None, :]
        dy = shared.load(dy_ptr, packed, mask, 0.0, COMPUTE)
        at = (lines * stride_row)[:, None] + cols[None, :]
        x = shared.load(x_ptr, at, mask, 0.0, COMPUTE)
        x_hat, rstd = _normalized(x, mean_ptr, rstd_ptr, lines, here, COMPUTE)
        if dweights_ptr is not None:
            dweight += dy * x_hat
        if dbiases_ptr is not None:
            dbias += dy
        if WANTS_DX:
            dy = scaled(dy, weight_ptr, None, offset, cols, n_cols, COMPUTE)
            d = _held_gradient(dy, x_hat, rstd, each, mean_ptr)
            _put(
                d, dx_ptr, dropped_ptr, dsum_ptr, packed, lines, cols, mask,
                seed_ptr, kept, scale, COMPUTE,
            )  # fmt: skip
    _store_share(dweights_ptr, program * n_cols + cols, dweight, inside)
    _store_share(dbiases_ptr, program * n_cols + cols, dbias, inside)


@triton.jit(do_not_specialize=[*EXTENTS, "kept"], do_not_specialize_on_alignment=STATISTICS)
def norm_dx_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, n_rows, n_cols, stride_row, offset,
    dsum_ptr, dropped_ptr, seed_ptr, kept, scale, COMPUTE: tl.constexpr, LINES: tl.constexpr,
    COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dx of a row that is walked twice: for the two means, and for what is stored."""
    n_cols = n_cols * VECTOR
    _, lines = shared.place(n_rows, LINES, False)
    here = lines < n_rows
    x_start = (lines * (stride_row.to(tl.int64) * VECTOR))[:, None]
    dx_start = (lines * n_cols)[:, None]
    slopes = tl.zeros((LINES, COLS), COMPUTE)
    shifts = tl.zeros((LINES, COLS), COMPUTE)
    for first in range(0, n_cols, COLS):
        cols = first + tl.arange(0, COLS)
        mask = here[:, None] & (cols < n_cols)[None, :]
        dy = shared.load(dy_ptr, dx_start + cols[None, :], mask, 0.0, COMPUTE)
        x = shared.load(x_ptr, x_start + cols[None, :], mask, 0.0, COMPUTE)
        x_hat, rstd = _normalized(x, mean_ptr, rstd_ptr, lines, here, COMPUTE)
        dy = scaled(dy, weight_ptr, None, offset, cols, n_cols, COMPUTE)
        slopes += dy * x_hat
        if mean_ptr is not None:
            shifts += dy
    each = shared.reciprocal(n_cols.to(COMPUTE))
    slope = (tl.sum(slopes, 1) * each)[:, None]
    shift = (tl.sum(shifts, 1) * each)[:, None]
    for first in range(0, n_cols, COLS):
        cols = first + tl.arange(0, COLS)
        mask = here[:, None] & (cols < n_cols)[None, :]
        dy = shared.load(dy_ptr, dx_start + cols[None, :], mask, 0.0, COMPUTE)
        x = shared.load(x_ptr, x_start + cols[None, :], mask, 0.0, COMPUTE)
        x_hat, rstd = _normalized(x, mean_ptr, rstd_ptr, lines, here, COMPUTE)
        dx = scaled(dy, weight_ptr, None, offset, cols, n_cols, COMPUTE) - x_hat * slope
        if mean_ptr is not None:
            dx -= shift
        _put(
            dx * rstd, dx_ptr, dropped_ptr, dsum_ptr, dx_start + cols[None, :], lines, cols, mask,
            seed_ptr, kept, scale, COMPUTE,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*EXTENTS, "rows_each"], do_not_specialize_on_alignment=STATISTICS)
def norm_weight_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, dweights_ptr, dbiases_ptr, n_rows, n_cols, stride_row,
    rows_each, COMPUTE: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A program's share of the sums of dy x_hat and dy: rows_each rows, COLS columns."""
    n_cols = n_cols * VECTOR
    stride_row = stride_row.to(tl.int64) * VECTOR
    blocks = tl.cdiv(n_cols, COLS)
    program = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    inside = cols < n_cols
    dweight = tl.zeros((LINES, COLS), COMPUTE)
    dbias = tl.zeros((LINES, COLS), COMPUTE)
    last = tl.minimum((program + 1) * rows_each, n_rows)
    for first in range(program * rows_each, last, LINES):
        lines = first + tl.arange(0, LINES)
        here = lines < last
        mask = here[:, None] & inside[None, :]
        dy = shared.load(dy_ptr, (lines * n_cols)[:, None] + cols[None, :], mask, 0.0, COMPUTE)
        if dweights_ptr is not None:
            at = (lines * stride_row)[:, None] + cols[None, :]
            x = shared.load(x_ptr, at, mask, 0.0, COMPUTE)
            dweight += dy * _normalized(x, mean_ptr, rstd_ptr, lines, here, COMPUTE)[0]
        if dbiases_ptr is not None:
            dbias += dy
    _store_share(dweights_ptr, program * n_cols + cols, dweight, inside)
    _store_share(dbiases_ptr, program * n_cols + cols, dbias, inside)


@triton.jit
def _sum_of_shares(shares_ptr, out_ptr, n_shares, n_cols, LINES: tl.constexpr, COLS: tl.constexpr):
    cols = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = cols < n_cols
    totals = tl.zeros((LINES, COLS), shares_ptr.dtype.element_ty)
    for first in range(0, n_shares, LINES):
        lines = first + tl.arange(0, LINES)
        mask = (lines < n_shares)[:, None] & inside[None, :]
        at = lines.to(tl.int64)[:, None] * n_cols + cols[None, :]
        totals += tl.load(shares_ptr + at, mask=mask, other=0.0)
    shared.store(out_ptr, cols, tl.sum(totals, 0), inside)


@triton.jit(do_not_specialize=["n_shares", "n_cols"])
def norm_sum_kernel(
    dweights_ptr, dbiases_ptr, dweight_ptr, dbias_ptr, n_shares, n_cols, LINES: tl.constexpr,
    COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dweight and dbias from the shares (n_shares, n_cols) of the programs."""
    n_cols = n_cols * VECTOR
    if dweights_ptr is not None:
        _sum_of_shares(dweights_ptr, dweight_ptr, n_shares, n_cols, LINES, COLS)
    if dbiases_ptr is not None:
        _sum_of_shares(dbiases_ptr, dbias_ptr, n_shares, n_cols, LINES, COLS)


def _tile_of(n_cols: int, compute: tl.dtype, vector: int, joined: bool) -> shared.Tile:
    """The tile of rows; joined: the gradient of a sum, or a dropout, takes registers too, so a
    thread has half as many elements (sm_90)."""
    tile = shared.tile_of_rows(n_cols, compute, vector, WIDEST[compute] // (1 + joined))
    return replace(tile, threads=min(512, 2 * tile.threads)) if joined else tile


def _share(n_rows: int, lines: int, programs: int) -> tuple[int, int]:
    """Programs over the rows, and how many rows each takes, in tiles of `lines`."""
    programs = max(1, min(programs, triton.cdiv(n_rows, lines * TILES_EACH)))
    rows_each = max(1, triton.cdiv(triton.cdiv(n_rows, programs), lines)) * lines
    return counted(triton.cdiv(n_rows, rows_each), "a sum over rows"), rows_each


class Beside(NamedTuple):
    """Of a norm of a sum: the sum's own gradient, if any; where dx through the dropout goes, if it
    is wanted; and the dropout, if any."""

    dsum: Tensor | None
    dropped: Tensor | None
    dropout: Dropout | None


ALONE = Beside(None, None, None)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    wanted: Gradients,
    sizes: tuple[int, int, int],
    weight_offset: float = 0.0,
    beside: Beside = ALONE,
) -> None:
    """Fill those of `wanted` (dx, dweight, dbias) that there are; sizes: n_rows, n_cols, stride_row

    mean: None for RMSNorm; beside: what more there is where x is a sum, whose gradient dx then is
    """
    dx, dweight, dbias = wanted
    dsum, dropped, dropout = beside
    joined = dsum is not None or dropped is not None
    more = (layer_norm_tiles.offset_parts(weight_offset), dsum, dropped)
    more += dropouts.arguments(dropout)
    wants_dx = dx is not None or dropped is not None
    n_rows, n_cols, stride_row = sizes
    compute, itemsize = shared.COMPUTE[x.dtype], x.element_size()
    vector = shared.vector_of((dy, x, weight, dx, dsum, dropped), (n_cols, stride_row), itemsize)
    tile = _tile_of(n_cols, compute, vector, joined)
    extents = (n_rows, n_cols // vector, stride_row // vector)
    sums = dweight is not None or dbias is not None
    constants = {"COMPUTE": compute, **tile.options()}
    if tile.whole:
        n_shares, rows_each = triton.cdiv(n_rows, tile.lines), tile.lines
        if sums:
            n_shares, rows_each = _share(n_rows, tile.lines, SUMMING_THREADS // tile.threads)
        shares = _shares(x, dweight, dbias, n_shares, n_cols)
        args = (dy, x, weight, mean, rstd, dx, *shares, *extents, rows_each, *more)
        shared.launch(norm_backward_kernel, (n_shares,), args, WANTS_DX=wants_dx, **constants)
    else:
        if wants_dx:
            args = (dy, x, weight, mean, rstd, dx, *extents, *more)
            shared.launch(norm_dx_kernel, (n_rows,), args, **constants)
        if sums:
            constants |= dict(zip(("LINES", "COLS"), LONG_TILE, strict=True))
            constants["num_warps"] = shared.warps(LONG_THREADS)
            blocks = triton.cdiv(n_cols, LONG_TILE[1])
            programs = max(1, LONG_PROGRAMS // blocks)
            n_shares, rows_each = _share(n_rows, LONG_TILE[0], programs)
            shares = _shares(x, dweight, dbias, n_shares, n_cols)
            args = (dy, x, mean, rstd, *shares, *extents, rows_each)
            shared.launch(norm_weight_kernel, (n_shares * blocks,), args, **constants)
    if sums:
        vector = shared.vector_of((dweight, dbias), (n_cols,), 2)
        shared.launch(
            norm_sum_kernel,
            (triton.cdiv(n_cols, SUM_TILE[1]),),
            (*shares, dweight, dbias, n_shares, n_cols // vector),
            LINES=SUM_TILE[0],
            COLS=SUM_TILE[1],
            VECTOR=vector,
            num_warps=shared.warps(SUM_THREADS),
            enable_fp_fusion=True,
        )


def _shares(
    x: Tensor, dweight: Tensor | None, dbias: Tensor | None, n_shares: int, n_cols: int
) -> list[Tensor | None]:
    """Room for each program's share of the sums that are wanted, in the compute type."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return [
        None if wanted is None else torch.empty((n_shares, n_cols), dtype=dtype, device=x.device)
        for wanted in (dweight, dbias)
    ]
