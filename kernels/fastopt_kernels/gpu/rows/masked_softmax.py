"""Softmax of scaled and masked rows for Triton: nothing of x's size is written but the result.

    y = softmax(scale x + mask);  a boolean mask adds -inf where it is False, a causal one to the
    right of the diagonal

A row in which all is -inf gives zeros; NaN and +inf where they are not masked make a row NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.gpu.rows import shared
from fastopt_kernels.gpu.rows.layer_norm_tiles import tile_of

# What changes from call to call, and must not compile a kernel anew.
EXTENTS = ["n_rows", "n_cols", "stride_row", "n1", "n2", "s0", "s1", "s2", "n_queries"]


@triton.jit
def _scores(
    x_ptr, mask_ptr, x_start, mask_start, last, here, cols, n_cols, scale, CAUSAL: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """A tile as the softmax sees it; last: the last column of each row that is seen."""
    inside = here & (cols < n_cols)[None, :]
    x = shared.load(x_ptr, x_start[:, None] + cols[None, :], inside, 0.0, COMPUTE)
    x *= shared.scalar(scale, COMPUTE)[:, None]
    if mask_ptr is not None:
        at = mask_start[:, None] + cols[None, :]
        if mask_ptr.dtype.element_ty == tl.uint8:
            inside = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        else:
            x += shared.load(mask_ptr, at, inside, 0.0, COMPUTE)
    if CAUSAL:
        # After the loads: a mask that changes within 16 bytes would take their vectors apart.
        inside = inside & (cols[None, :] <= last[:, None])
    return tl.where(inside, x, -float("inf"))


@triton.jit
def _share(total):
    """1 / total, and 0 of a row in which all was -inf."""
    return tl.where(total == 0.0, 0.0, shared.reciprocal(total))


@triton.jit(do_not_specialize=EXTENTS)
def masked_softmax_kernel(
    x_ptr, mask_ptr, y_ptr, n_rows, n_cols, stride_row, n1, n2, s0, s1, s2, n_queries, scale,
    CAUSAL: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr, LINES: tl.constexpr,
    COLS: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n_cols = n_cols * VECTOR
    _, lines = shared.place(n_rows, LINES, False)
    here = (lines < n_rows)[:, None]
    x_start, y_start = lines * (stride_row.to(tl.int64) * VECTOR), lines * n_cols
    outer = lines // n2
    walked = outer // n1 * s0.to(tl.int64) + outer % n1 * s1.to(tl.int64)
    mask_start = (walked + lines % n2 * s2.to(tl.int64)) * VECTOR
    last = lines % n_queries
    if WHOLE:
        cols = tl.arange(0, COLS)
        x = _scores(
            x_ptr, mask_ptr, x_start, mask_start, last, here, cols, n_cols, scale, CAUSAL, COMPUTE
        )
        y = shared.exp(x - shared.peak(x, COMPUTE)[:, None])
        y *= _share(tl.sum(y, 1))[:, None]
        mask = here & (cols < n_cols)[None, :]
        shared.store(y_ptr, y_start[:, None] + cols[None, :], y, mask)
    else:
        tops = tl.full((LINES, COLS // WIDTH), shared.lowest(COMPUTE), COMPUTE)
        totals = tl.zeros((LINES, COLS // WIDTH), COMPUTE)
        for first in range(0, n_cols, COLS):
            cols = first + tl.arange(0, COLS)
            x = _scores(
                x_ptr, mask_ptr, x_start, mask_start, last, here, cols, n_cols, scale, CAUSAL,
                COMPUTE,
            )  # fmt: skip
            tops, totals = shared.online(tops, totals, x, WIDTH, COMPUTE)
        top, total = shared.merge(tops, totals)
        share = _share(shared.no_infinity(total))
        for first in range(0, n_cols, COLS):
            cols = first + tl.arange(0, COLS)
            x = _scores(
                x_ptr, mask_ptr, x_start, mask_start, last, here, cols, n_cols, scale, CAUSAL,
                COMPUTE,
            )  # fmt: skip
            y = shared.exp(x - top[:, None]) * share[:, None]
            mask = here & (cols < n_cols)[None, :]
            shared.store(y_ptr, y_start[:, None] + cols[None, :], y, mask)


def masked_softmax(
    x: Tensor,
    mask: Tensor | None,
    y: Tensor,
    sizes: tuple[int, int, int],
    walk: tuple[int, int, int, int, int],
    scale: float,
    n_queries: int,
) -> None:
    """y = softmax(scale x + mask)

    sizes: rows, columns, stride of a row of x; y: contiguous; mask: boolean or of any dtype, its
    columns next to each other, row (i0, i1, i2) at i0 s0 + i1 s1 + i2 s2; walk: (n1, n2, s0, s1,
    s2), n1 and n2 being the extents of i1 and i2; n_queries: rows of a causal block, 0: not causal
    """
    n_rows, n_cols, stride_row = sizes
    n1, n2, *strides = walk
    if mask is not None and mask.dtype is torch.bool:
        mask = mask.view(torch.uint8)
    compute = shared.COMPUTE[x.dtype]
    extents = (n_cols, stride_row, *strides)
    vector = shared.vector_of((x, mask, y), extents, x.element_size())
    tile = tile_of(n_cols, compute, vector)
    args = (x, mask, y, n_rows, n_cols // vector, stride_row // vector, n1, n2)
    args += (*(s // vector for s in strides), max(n_queries, 1), shared.parts(scale))
    shared.launch(
        masked_softmax_kernel,
        (triton.cdiv(n_rows, tile.lines),),
        args,
        CAUSAL=n_queries > 0,
        COMPUTE=compute,
        WHOLE=tile.whole,
        WIDTH=tile.width,
        **tile.options(),
    )
