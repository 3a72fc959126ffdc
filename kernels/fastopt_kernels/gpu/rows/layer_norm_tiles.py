"""The common parts of the launches of the norms: tiles, and arguments as kernels are given them."""

from __future__ import annotations

from dataclasses import replace

import triton.language as tl
from torch import Tensor

from fastopt_kernels.gpu.rows import shared


def tile_of(n_cols: int, compute: tl.dtype, vector: int) -> shared.Tile:
    """The tile of rows that are normalized."""
    # Welford in float64 takes 128 registers for more, and spills (sm_90).
    tile = shared.tile_of_rows(n_cols, compute, vector, halved=compute == tl.float64)
    if vector == 1:
        # Addresses of single elements take registers too (sm_100).
        tile = replace(tile, threads=min(512, 2 * tile.threads))
    return tile


def split(stats: Tensor | None, centered: bool) -> tuple[Tensor | None, Tensor | None]:
    """mean and rstd, of those there are."""
    if stats is None or not centered:
        return None, stats
    mean, rstd = stats.unbind()
    return mean, rstd


def offset_parts(weight_offset: float) -> tuple[float, ...] | None:
    """The offset added to the weight, as kernels take it."""
    return shared.parts(weight_offset) if weight_offset else None
