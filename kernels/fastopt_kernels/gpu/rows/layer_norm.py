"""LayerNorm and RMSNorm for Triton; the variance is about the mean, never E[x^2] - E[x]^2.

    layer_norm  y = (x - mean) rstd weight + bias,    rstd = 1 / sqrt(var + eps)
    rms_norm    y = x rstd (weight + weight_offset),  rstd = 1 / sqrt(mean x^2 + eps)

Both are one kernel: CENTERED tells them apart.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.gpu.rows import layer_norm_gradients, layer_norm_tiles, shared
from fastopt_kernels.gpu.rows.layer_norm_gradients import EXTENTS, STATISTICS, scaled


@triton.jit
def _moments(x, mask, n, COMPUTE: tl.constexpr, CENTERED: tl.constexpr):
    """x less its mean in two parts, and the mean of its squares, of rows held in registers."""
    each = shared.reciprocal(n)
    if CENTERED:
        mean = tl.sum(x, 1) * each
        x = tl.where(mask, x - mean[:, None], 0.0)
        # What rounding the mean has left: at a mean of 1e4 it is 1e-3.
        rest = tl.sum(x, 1)
        drift = rest * each
        squares = tl.sum(x * x, 1)
        # Of squares that overflow nothing is subtracted that may have overflowed too.
        squares = tl.where(squares < float("inf"), squares - rest * drift, squares)
        squares = tl.maximum(squares, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        squares = tl.sum(x * x, 1)
        mean = tl.zeros((x.shape[0],), COMPUTE)
        drift = mean
    return mean, drift, squares * each


@triton.jit
def _walked_moments(
    x_ptr, start, n_cols, n, COMPUTE: tl.constexpr, COLS: tl.constexpr, CENTERED: tl.constexpr
):
    """The same for a row walked once: Welford's recurrence in every lane, merged at the end.

    A lane counts from the first number it meets, or its mean would be rounded at every step.
    """
    lanes = tl.arange(0, COLS)
    # A row longer than a tile has given every lane one number at least.
    counts = tl.cdiv(n_cols - lanes, COLS).to(COMPUTE)[None, :]
    origins = shared.load(x_ptr, start[:, None] + lanes[None, :], None, None, COMPUTE)
    means = tl.zeros((1, COLS), COMPUTE)
    squares = tl.zeros((1, COLS), COMPUTE)
    seen = n * 0.0
    for first in range(0, n_cols, COLS):
        cols = first + lanes
        mask = (cols < n_cols)[None, :]
        x = shared.load(x_ptr, start[:, None] + cols[None, :], mask, 0.0, COMPUTE)
        if CENTERED:
            seen += 1.0
            x -= origins
            off = x - means
            means += tl.where(mask, off * shared.reciprocal(seen), 0.0)
            squares += tl.where(mask, off * (x - means), 0.0)
        else:
            squares += x * x
    each = shared.reciprocal(n)
    square = tl.sum(squares, 1)
    mean = tl.zeros((1,), COMPUTE)
    drift = mean
    if CENTERED:
        mean += tl.sum(origins + means, 1) * (1.0 / COLS)
        means += origins - mean[:, None]
        drift = tl.sum(counts * means, 1) * each
        means -= drift[:, None]
        square += tl.sum(counts * means * means, 1)
    return mean, drift, square * each


@triton.jit
def normalize(
    x, weight_ptr, bias_ptr, y_ptr, y_start, cols, mask, n_cols, n, eps, offset,
    COMPUTE: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """The norm of rows held in registers into y; (mean, rstd)."""
    mean, drift, square = _moments(x, mask, n, COMPUTE, CENTERED)
    rstd = shared.rsqrt(square + shared.scalar(eps, COMPUTE))
    x = ((x - mean[:, None]) - drift[:, None]) * rstd[:, None]
    y = scaled(x, weight_ptr, bias_ptr, offset, cols, n_cols, COMPUTE)
    shared.store(y_ptr, y_start[:, None] + cols[None, :], y, mask)
    return mean + drift, rstd


@triton.jit
def walk(
    x_ptr, weight_ptr, bias_ptr, y_ptr, x_start, y_start, n_cols, n, eps, offset,
    COMPUTE: tl.constexpr, COLS: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """The norm of a row that is walked twice into y; (mean, rstd)."""
    mean, drift, square = _walked_moments(x_ptr, x_start, n_cols, n, COMPUTE, COLS, CENTERED)
    rstd = shared.rsqrt(square + shared.scalar(eps, COMPUTE))
    for first in range(0, n_cols, COLS):
        cols = first + tl.arange(0, COLS)
        mask = (cols < n_cols)[None, :]
        x = shared.load(x_ptr, x_start[:, None] + cols[None, :], mask, 0.0, COMPUTE)
        x = ((x - mean[:, None]) - drift[:, None]) * rstd[:, None]
        y = scaled(x, weight_ptr, bias_ptr, offset, cols, n_cols, COMPUTE)
        shared.store(y_ptr, y_start[:, None] + cols[None, :], y, mask)
    return mean + drift, rstd


@triton.jit
def keep(mean_ptr, rstd_ptr, lines, here, mean, rstd):
    """Store what the backward needs, of what there is room for."""
    if rstd_ptr is not None:
        shared.store(rstd_ptr, lines, rstd, here)
    if mean_ptr is not None:
        shared.store(mean_ptr, lines, mean, here)


@triton.jit(do_not_specialize=EXTENTS, do_not_specialize_on_alignment=STATISTICS)
def norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, n_rows, n_cols, stride_row, eps, offset,
    CENTERED: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr, LINES: tl.constexpr,
    COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    n_cols = n_cols * VECTOR
    _, lines = shared.place(n_rows, LINES, False)
    here = lines < n_rows
    x_start = lines * (stride_row.to(tl.int64) * VECTOR)
    y_start = lines * n_cols
    n = n_cols.to(COMPUTE)
    if WHOLE:
        cols = tl.arange(0, COLS)
        mask = here[:, None] & (cols < n_cols)[None, :]
        x = shared.load(x_ptr, x_start[:, None] + cols[None, :], mask, 0.0, COMPUTE)
        mean, rstd = normalize(
            x, weight_ptr, bias_ptr, y_ptr, y_start, cols, mask, n_cols, n, eps, offset,
            COMPUTE, CENTERED,
        )  # fmt: skip
    else:
        mean, rstd = walk(
            x_ptr, weight_ptr, bias_ptr, y_ptr, x_start, y_start, n_cols, n, eps, offset,
            COMPUTE, COLS, CENTERED,
        )  # fmt: skip
    keep(mean_ptr, rstd_ptr, lines, here, mean, rstd)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    sizes: tuple[int, int, int],
    eps: float,
    centered: bool,
    weight_offset: float = 0.0,
) -> None:
    n_rows, n_cols, stride_row = sizes
    compute, (mean, rstd) = shared.COMPUTE[x.dtype], layer_norm_tiles.split(stats, centered)
    vector = shared.vector_of((x, y, weight, bias), (n_cols, stride_row), x.element_size())
    tile = layer_norm_tiles.tile_of(n_cols, compute, vector)
    shared.launch(
        norm_kernel,
        (triton.cdiv(n_rows, tile.lines),),
        (x, weight, bias, y, mean, rstd, n_rows, n_cols // vector, stride_row // vector),
        eps=shared.parts(eps),
        offset=layer_norm_tiles.offset_parts(weight_offset),
        CENTERED=centered,
        COMPUTE=compute,
        WHOLE=tile.whole,
        **tile.options(),
    )


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    sizes: tuple[int, int, int],
    eps: float,
) -> None:
    """y = (x - mean) rstd weight + bias,  rstd = 1 / sqrt(var + eps)

    sizes: rows, columns, stride of a row of x; y: contiguous; weight, bias: (n_cols,), of any dtype
    each; stats: (2, n_rows), mean and rstd, in the compute type, written if there is one
    """
    _forward(x, weight, bias, y, stats, sizes, eps, centered=True)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    sizes: tuple[int, int, int],
) -> None:
    """dx = rstd (weight dy - mean(weight dy) - x_hat mean(weight dy x_hat))

    dweight = sum dy x_hat,  dbias = sum dy,  x_hat = (x - mean) rstd
    dy, dx: (n_rows, n_cols), contiguous; dx, dweight, dbias: None where not wanted
    """
    layer_norm_gradients.gradients(dy, x, weight, *stats.unbind(), (dx, dweight, dbias), sizes)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    sizes: tuple[int, int, int],
    eps: float,
    weight_offset: float = 0.0,
) -> None:
    """y = x rstd (weight + weight_offset),  rstd = 1 / sqrt(mean(x^2) + eps)

    Tensors as those of `layer_norm`; stats: (n_rows,), rstd.
    """
    _forward(x, weight, None, y, stats, sizes, eps, False, weight_offset)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    sizes: tuple[int, int, int],
    weight_offset: float = 0.0,
) -> None:
    """dx = rstd (weight dy - x_hat mean(weight dy x_hat)),  x_hat = x rstd,  dweight = sum dy x_hat

    Tensors as those of `layer_norm_backward`; the weight counts as weight + weight_offset.
    """
    outputs = (dx, dweight, None)
    layer_norm_gradients.gradients(dy, x, weight, None, stats, outputs, sizes, weight_offset)
