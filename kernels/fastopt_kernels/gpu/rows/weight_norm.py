"""Weight normalization for Triton: the norm and what is scaled by it, in one launch.

    y = v g / ||v||,  dg = sum(dy v) / ||v||,  dv = g / ||v|| (dy - v sum(dy v) / ||v||^2)
    unit  y = x / max(||x||, eps)

Norms are of lines (`rows`): of rows where the first dimension is kept, of columns where the last
is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.gpu.base import xp
from fastopt_kernels.gpu.rows import shared
from fastopt_kernels.gpu.rows.shared import Lines

Sizes = tuple[int, int, int]


@triton.jit
def _scaled(dy, v, scale, back, BACKWARD: tl.constexpr):
    if BACKWARD:
        out = scale[:, None] * (dy - v * back[:, None])
    else:
        out = v * scale[:, None]
    return out


@triton.jit(do_not_specialize=shared.EXTENTS)
def weight_norm_kernel(
    v_ptr, dy_ptr, g_ptr, norm_ptr, out_ptr, dg_ptr, n_lines, n_cols, stride_outer, stride_col, eps,
    BACKWARD: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr,
    LINES: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """g_ptr None: unit, whose norm is at least eps, as `rows.parts`; dy_ptr None: forward"""
    n_lines, n_cols, stride_outer, stride_col = shared.geometry(
        n_lines, n_cols, stride_outer, stride_col, VECTOR, COLUMNS
    )
    outer, lines = shared.place(n_lines, LINES, COLUMNS)
    here = lines < n_lines
    start = shared.starts(outer, lines, stride_outer, COLUMNS)
    totals = tl.zeros((LINES, COLS), COMPUTE)
    v = totals
    dy = totals
    for first in range(0, n_cols, COLS):
        cols = first + tl.arange(0, COLS)
        mask = here[:, None] & (cols < n_cols)[None, :]
        at = shared.spread(start, cols, stride_col, COLUMNS)
        v = shared.load(v_ptr, at, mask, 0.0, COMPUTE)
        if BACKWARD:
            dy = shared.load(dy_ptr, at, mask, 0.0, COMPUTE)
            totals += dy * v
        else:
            totals += v * v
    total = tl.sum(totals, 1)
    if BACKWARD:
        norm = shared.load(norm_ptr, lines, here, 1.0, COMPUTE)
        shared.store(dg_ptr, lines, total * shared.reciprocal(norm), here)
    else:
        norm = xp.sqrt(total)
    over = shared.reciprocal(norm)
    if g_ptr is None:
        least = shared.scalar(eps, COMPUTE)
        over = shared.reciprocal(tl.where(norm < least, least, norm))
        scale = over
    else:
        scale = shared.load(g_ptr, lines, here, 0.0, COMPUTE) * over
        if not BACKWARD:
            shared.store(norm_ptr, lines, norm, here)
    back = total * over * over
    if WHOLE:
        cols = tl.arange(0, COLS)
        at = shared.spread(start, cols, stride_col, COLUMNS)
        mask = here[:, None] & (cols < n_cols)[None, :]
        shared.store(out_ptr, at, _scaled(dy, v, scale, back, BACKWARD), mask)
    else:
        for first in range(0, n_cols, COLS):
            cols = first + tl.arange(0, COLS)
            mask = here[:, None] & (cols < n_cols)[None, :]
            at = shared.spread(start, cols, stride_col, COLUMNS)
            v = shared.load(v_ptr, at, mask, 0.0, COMPUTE)
            if BACKWARD:
                dy = shared.load(dy_ptr, at, mask, 0.0, COMPUTE)
            shared.store(out_ptr, at, _scaled(dy, v, scale, back, BACKWARD), mask)


def _run(
    v: Tensor,
    dy: Tensor | None,
    g: Tensor | None,
    norms: Tensor | None,
    out: Tensor,
    dg: Tensor | None,
    sizes: Sizes,
    eps: float = 0.0,
) -> None:
    n_outer, n_kept, n_inner = sizes
    if n_inner == 1:
        shape, strides = (1, n_outer, n_kept), (n_outer * n_kept, n_kept)
    else:
        shape, strides = (n_kept, n_inner, 1), (n_inner, 1)
    lines = Lines.of(v, shape, strides, (v, dy, out), halved=dy is not None)
    tensors = (v, dy, g, norms, out, dg)
    lines.launch(weight_norm_kernel, tensors, shared.parts(eps), BACKWARD=dy is not None)


def weight_norm(v: Tensor, g: Tensor, y: Tensor, norms: Tensor, sizes: Sizes) -> None:
    """y = v g / ||v||; norms: (n_kept,), in the compute type

    v, y: (n_outer, n_kept, n_inner), of n_outer and n_inner one is 1; g: (n_kept,); contiguous
    """
    _run(v, None, g, norms, y, None, sizes)


def weight_norm_backward(
    dy: Tensor, v: Tensor, g: Tensor, norms: Tensor, dv: Tensor, dg: Tensor, sizes: Sizes
) -> None:
    """dg = sum(dy v) / ||v||,  dv = g / ||v|| (dy - v sum(dy v) / ||v||^2); laid out as v and g"""
    _run(v, dy, g, norms, dv, dg, sizes)


def unit(x: Tensor, out: Tensor, eps: float) -> None:
    """x / max(||x||, eps) of a vector; out may be x itself."""
    _run(x, None, None, None, out, None, (1, 1, x.numel()), eps)
