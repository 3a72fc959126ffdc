"""LayerNorm and RMSNorm of a sum for Triton: a row that registers hold is read and written once.

    sum = dropout(x) + residual,  y = norm(sum)

The sum is rounded once, to what it is stored in, and y is the norm of what is stored.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.gpu.rows import dropout as dropouts
from fastopt_kernels.gpu.rows import layer_norm, layer_norm_gradients, layer_norm_tiles, shared
from fastopt_kernels.gpu.rows.dropout import Dropout
from fastopt_kernels.gpu.rows.layer_norm_gradients import EXTENTS, STATISTICS


@triton.jit
def _add(
    x_ptr, residual_ptr, sum_ptr, x_start, residual_start, sum_start, lines, cols, mask, seed_ptr,
    kept, scale, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A tile of the sum, stored; as what it was rounded to."""
    x = shared.load(x_ptr, x_start[:, None] + cols[None, :], mask, 0.0, COMPUTE)
    x = dropouts.drop(x, seed_ptr, lines, cols, kept, scale, COMPUTE)
    x += shared.load(residual_ptr, residual_start[:, None] + cols[None, :], mask, 0.0, COMPUTE)
    stored = x.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + (sum_start[:, None] + cols[None, :]), stored, mask=mask)
    return stored.to(COMPUTE)


@triton.jit(
    do_not_specialize=[*EXTENTS, "stride_residual", "kept"],
    do_not_specialize_on_alignment=STATISTICS,
)
def add_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr, n_rows, n_cols,
    stride_row, stride_residual, eps, offset, seed_ptr, kept, scale, CENTERED: tl.constexpr,
    COMPUTE: tl.constexpr, WHOLE: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    n_cols = n_cols * VECTOR
    _, lines = shared.place(n_rows, LINES, False)
    here = lines < n_rows
    x_start = lines * (stride_row.to(tl.int64) * VECTOR)
    residual_start = lines * (stride_residual.to(tl.int64) * VECTOR)
    start = lines * n_cols
    n = n_cols.to(COMPUTE)
    for first in range(0, COLS if WHOLE else n_cols, COLS):
        cols = first + tl.arange(0, COLS)
        mask = here[:, None] & (cols < n_cols)[None, :]
        x = _add(
            x_ptr, residual_ptr, sum_ptr, x_start, residual_start, start, lines, cols, mask,
            seed_ptr, kept, scale, COMPUTE,
        )  # fmt: skip
        if WHOLE:
            mean, rstd = layer_norm.normalize(
                x, weight_ptr, bias_ptr, y_ptr, start, cols, mask, n_cols, n, eps, offset,
                COMPUTE, CENTERED,
            )  # fmt: skip
            layer_norm.keep(mean_ptr, rstd_ptr, lines, here, mean, rstd)
    if not WHOLE:
        # What other threads have stored is read.
        tl.debug_barrier()
        mean, rstd = layer_norm.walk(
            sum_ptr, weight_ptr, bias_ptr, y_ptr, start, start, n_cols, n, eps, offset,
            COMPUTE, COLS, CENTERED,
        )  # fmt: skip
        layer_norm.keep(mean_ptr, rstd_ptr, lines, here, mean, rstd)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    total: Tensor,
    stats: Tensor | None,
    sizes: tuple[int, int, int, int],
    eps: float,
    weight_offset: float,
    dropout: Dropout | None,
    centered: bool,
) -> None:
    """total = dropout(x) + residual,  y = norm(total)

    sizes: rows, columns, strides of a row of x and of residual; y, total: contiguous, of one dtype;
    weight, bias: (n_cols,), of any dtype each; stats: as layer_norm (centered) or rms_norm has them
    """
    n_rows, n_cols, *strides = sizes
    compute, tensors = shared.COMPUTE[total.dtype], (x, residual, y, total, weight, bias)
    vector = shared.vector_of(tensors, (n_cols, *strides), total.element_size())
    tile = layer_norm_tiles.tile_of(n_cols, compute, vector)
    if tile.lines > 2 or (dropout is not None and vector == 1):
        # Many rows at once, or hashes and addresses of single elements (sm_100).
        tile = replace(tile, threads=min(512, 2 * tile.threads))
    mean, rstd = layer_norm_tiles.split(stats, centered)
    extents = (n_rows, n_cols // vector, *(stride // vector for stride in strides))
    scalars = (
        shared.parts(eps),
        layer_norm_tiles.offset_parts(weight_offset),
        *dropouts.arguments(dropout),
    )
    shared.launch(
        add_norm_kernel,
        (triton.cdiv(n_rows, tile.lines),),
        (x, residual, weight, bias, y, total, mean, rstd, *extents, *scalars),
        CENTERED=centered,
        COMPUTE=compute,
        WHOLE=tile.whole,
        **tile.options(),
    )


def add_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    sizes: tuple[int, int],
    weight_offset: float,
    dropout: Dropout | None,
    centered: bool,
) -> None:
    """dresidual = dsum + d norm(sum),  dx = dropout(dresidual), those that are wanted

    dy, dsum, total: (n_rows, n_cols), contiguous, of one dtype; dx, dresidual: of any each; where
    nothing is dropped and they are of one dtype, dx is dresidual and is not asked for
    """
    outputs, beside = (dresidual, dweight, dbias), layer_norm_gradients.Beside(dsum, dx, dropout)
    layer_norm_gradients.gradients(
        dy,
        total,
        weight,
        *layer_norm_tiles.split(stats, centered),
        outputs,
        (*sizes, sizes[1]),
        weight_offset,
        beside,
    )
