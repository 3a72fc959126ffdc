"""Softmax and what is near it, for Triton: a line is read once where registers hold it.

    softmax      y = exp(x - max) / sum exp(x - max)
    log_softmax  y = x - max - log sum exp(x - max)
    logsumexp    max + log sum exp(x - max)

A NaN anywhere makes its line NaN through the sum; so do a +inf and a line of -inf, as with torch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.gpu.rows import shared
from fastopt_kernels.gpu.rows.shared import Lines

Shape = tuple[int, int, int]
Strides = tuple[int, int]


@triton.jit
def _normalized(x, top, total, LOG: tl.constexpr):
    x = x - top[:, None]
    if LOG:
        y = x - tl.log(total)[:, None]
    else:
        y = shared.exp(x) * shared.reciprocal(total)[:, None]
    return y


@triton.jit(do_not_specialize=shared.EXTENTS)
def softmax_kernel(
    x_ptr, y_ptr, n_lines, n_cols, stride_outer, stride_col, LOG: tl.constexpr,
    COMPUTE: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
    COLS: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n_lines, n_cols, stride_outer, stride_col = shared.geometry(
        n_lines, n_cols, stride_outer, stride_col, VECTOR, COLUMNS
    )
    outer, lines = shared.place(n_lines, LINES, COLUMNS)
    here = (lines < n_lines)[:, None]
    x_start = shared.starts(outer, lines, stride_outer, COLUMNS)
    y_start, y_stride = shared.packed(outer, lines, n_lines, n_cols, COLUMNS)
    if WHOLE:
        cols = tl.arange(0, COLS)
        mask = here & (cols < n_cols)[None, :]
        at = shared.spread(x_start, cols, stride_col, COLUMNS)
        x = shared.load(x_ptr, at, mask, -float("inf"), COMPUTE)
        x = x - shared.peak(x, COMPUTE)[:, None]
        if LOG:
            total = shared.no_infinity(tl.sum(shared.exp_term(x), 1))
            y = x - tl.log(total)[:, None]
        else:
            y = shared.exp(x)
            y *= shared.reciprocal(tl.sum(y, 1))[:, None]
        shared.store(y_ptr, shared.spread(y_start, cols, y_stride, COLUMNS), y, mask)
    else:
        top, total = shared.statistics(
            x_ptr, x_start, here, n_cols, stride_col, COMPUTE, COLUMNS, LINES, COLS, WIDTH
        )
        total = shared.no_infinity(total)
        for first in range(0, n_cols, COLS):
            cols = first + tl.arange(0, COLS)
            mask = here & (cols < n_cols)[None, :]
            at = shared.spread(x_start, cols, stride_col, COLUMNS)
            x = shared.load(x_ptr, at, mask, 0.0, COMPUTE)
            y = _normalized(x, top, total, LOG)
            shared.store(y_ptr, shared.spread(y_start, cols, y_stride, COLUMNS), y, mask)


@triton.jit
def _weight(dy, y, LOG: tl.constexpr):
    """The terms that are summed up: dy y, of the logarithm dy."""
    if LOG:
        term = dy
    else:
        term = dy * y
    return term


@triton.jit
def _softmax_gradient(dy, y, total, scale, LOG: tl.constexpr, COMPUTE: tl.constexpr):
    if LOG:
        dx = dy - shared.exp(y) * total[:, None]
    else:
        dx = y * (dy - total[:, None])
    if scale is not None:
        dx *= shared.scalar(scale, COMPUTE)[:, None]
    return dx


@triton.jit(do_not_specialize=shared.EXTENTS)
def softmax_backward_kernel(
    dy_ptr, y_ptr, dx_ptr, n_lines, n_cols, stride_outer, stride_col, scale, LOG: tl.constexpr,
    COMPUTE: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
    COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dx = scale y (dy - sum dy y), of the logarithm dx = dy - exp(y) sum dy."""
    n_lines, n_cols, stride_outer, stride_col = shared.geometry(
        n_lines, n_cols, stride_outer, stride_col, VECTOR, COLUMNS
    )
    outer, lines = shared.place(n_lines, LINES, COLUMNS)
    here = (lines < n_lines)[:, None]
    start = shared.starts(outer, lines, stride_outer, COLUMNS)
    if WHOLE:
        cols = tl.arange(0, COLS)
        mask = here & (cols < n_cols)[None, :]
        at = shared.spread(start, cols, stride_col, COLUMNS)
        dy = shared.load(dy_ptr, at, mask, 0.0, COMPUTE)
        y = shared.load(y_ptr, at, mask, 0.0, COMPUTE)
        total = tl.sum(_weight(dy, y, LOG), 1)
        shared.store(dx_ptr, at, _softmax_gradient(dy, y, total, scale, LOG, COMPUTE), mask)
    else:
        totals = tl.zeros((LINES, COLS), COMPUTE)
        for first in range(0, n_cols, COLS):
            cols = first + tl.arange(0, COLS)
            mask = here & (cols < n_cols)[None, :]
            at = shared.spread(start, cols, stride_col, COLUMNS)
            dy = shared.load(dy_ptr, at, mask, 0.0, COMPUTE)
            if LOG:
                totals += dy
            else:
                totals += dy * shared.load(y_ptr, at, mask, 0.0, COMPUTE)
        total = tl.sum(totals, 1)
        for first in range(0, n_cols, COLS):
            cols = first + tl.arange(0, COLS)
            mask = here & (cols < n_cols)[None, :]
            at = shared.spread(start, cols, stride_col, COLUMNS)
            dy = shared.load(dy_ptr, at, mask, 0.0, COMPUTE)
            y = shared.load(y_ptr, at, mask, 0.0, COMPUTE)
            shared.store(dx_ptr, at, _softmax_gradient(dy, y, total, scale, LOG, COMPUTE), mask)


@triton.jit(do_not_specialize=shared.EXTENTS)
def logsumexp_kernel(
    x_ptr, lse_ptr, n_lines, n_cols, stride_outer, stride_col, COMPUTE: tl.constexpr,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
    VECTOR: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n_lines, n_cols, stride_outer, stride_col = shared.geometry(
        n_lines, n_cols, stride_outer, stride_col, VECTOR, COLUMNS
    )
    outer, lines = shared.place(n_lines, LINES, COLUMNS)
    here = lines < n_lines
    start = shared.starts(outer, lines, stride_outer, COLUMNS)
    if WHOLE:
        cols = tl.arange(0, COLS)
        mask = here[:, None] & (cols < n_cols)[None, :]
        at = shared.spread(start, cols, stride_col, COLUMNS)
        x = shared.load(x_ptr, at, mask, -float("inf"), COMPUTE)
        top = shared.peak(x, COMPUTE)
        total = tl.sum(shared.exp_term(x - top[:, None]), 1)
    else:
        top, total = shared.statistics(
            x_ptr, start, here[:, None], n_cols, stride_col, COMPUTE, COLUMNS, LINES, COLS, WIDTH
        )
    shared.store(lse_ptr, outer * n_lines + lines, top + tl.log(total), here)


@triton.jit(do_not_specialize=shared.EXTENTS)
def logsumexp_backward_kernel(
    dlse_ptr, x_ptr, lse_ptr, dx_ptr, n_lines, n_cols, stride_outer, stride_col,
    COMPUTE: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
    COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """dx = dlse exp(x - lse)"""
    n_lines, n_cols, stride_outer, stride_col = shared.geometry(
        n_lines, n_cols, stride_outer, stride_col, VECTOR, COLUMNS
    )
    outer, lines = shared.place(n_lines, LINES, COLUMNS)
    here = lines < n_lines
    line = outer * n_lines + lines
    dlse = shared.load(dlse_ptr, line, here, 0.0, COMPUTE)[:, None]
    lse = shared.load(lse_ptr, line, here, 0.0, COMPUTE)[:, None]
    start = shared.starts(outer, lines, stride_outer, COLUMNS)
    dx_start, dx_stride = shared.packed(outer, lines, n_lines, n_cols, COLUMNS)
    for first in range(0, n_cols, COLS):
        cols = first + tl.arange(0, COLS)
        mask = here[:, None] & (cols < n_cols)[None, :]
        at = shared.spread(start, cols, stride_col, COLUMNS)
        dx = dlse * shared.exp(shared.load(x_ptr, at, mask, 0.0, COMPUTE) - lse)
        shared.store(dx_ptr, shared.spread(dx_start, cols, dx_stride, COLUMNS), dx, mask)


def softmax(x: Tensor, y: Tensor, shape: Shape, strides: Strides, log: bool) -> None:
    """y = exp(x - max) / sum exp(x - max); log: y = x - max - log sum exp(x - max)

    x: (n_outer, n_cols, n_inner) with `strides` of the first two; y: the same, contiguous
    """
    lines = Lines.of(x, shape, strides, (x, y))
    lines.launch(softmax_kernel, (x, y), LOG=log, WIDTH=lines.tile.width)


def softmax_backward(
    dy: Tensor, y: Tensor, dx: Tensor, shape: Shape, log: bool, scale: float | None = None
) -> None:
    """dx = scale y (dy - sum dy y); log: dx = dy - exp(y) sum dy

    dy, y, dx: (n_outer, n_cols, n_inner), contiguous; scale: what the input had been scaled by
    """
    # In columns of 16 bits the walk with exp spills for more (sm_100).
    halved = log and shape[2] != 1
    lines = Lines.of(y, shape, (shape[1] * shape[2], shape[2]), (dy, y, dx), halved)
    factor = None if scale is None else shared.parts(scale)
    lines.launch(softmax_backward_kernel, (dy, y, dx), factor, LOG=log)


def logsumexp(x: Tensor, lse: Tensor, shape: Shape, strides: Strides) -> None:
    """lse = max + log sum exp(x - max)

    x: (n_outer, n_cols, n_inner) with `strides` of the first two; lse: (n_outer, n_inner) in the
    compute type. A line of -inf gives -inf, one with +inf +inf, one with NaN NaN.
    """
    lines = Lines.of(x, shape, strides, (x,))
    lines.launch(logsumexp_kernel, (x, lse), WIDTH=lines.tile.width)


def logsumexp_backward(
    dlse: Tensor, x: Tensor, lse: Tensor, dx: Tensor, shape: Shape, strides: Strides
) -> None:
    """dx = dlse exp(x - lse)

    dlse: (n_outer, n_inner) in x's dtype; lse: likewise, in the compute type; dx: contiguous
    """
    lines = Lines.of(x, shape, strides, (x, dx))
    lines.launch(logsumexp_backward_kernel, (dlse, x, lse, dx))
