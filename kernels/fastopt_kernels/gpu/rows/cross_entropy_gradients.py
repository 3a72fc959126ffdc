"""The gradient of cross entropy for Triton, and what it shares with the loss (`losses`).

p is computed from the logits where they are at hand or lse is large: lse rounded to float32 is off
by 3e-5 at 1000, and so would be all of p.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.gpu.rows import cross_entropy_terms, shared
from fastopt_kernels.gpu.rows.cross_entropy_terms import Terms
from fastopt_kernels.gpu.rows.shared import Lines

# Above this |lse| a rounding of it is larger than that of the log p that torch keeps.
TRUSTED_LSE = tl.constexpr(16.0)


@triton.jit
def mass_of(probs_ptr, weight_ptr, at, cols, mask, n_cols, scalars, COMPUTE: tl.constexpr):
    """w_c q_c of a tile, or w_c s / C where there are no probabilities; 0 outside.

    scalars: keep, share
    """
    keep, share = scalars
    mass = tl.where(mask, share[:, None], 0.0)
    if probs_ptr is not None:
        mass += keep[:, None] * shared.load(probs_ptr, at, mask, 0.0, COMPUTE)
    if weight_ptr is not None:
        mass *= shared.load(weight_ptr, cols[None, :], (cols < n_cols)[None, :], 0.0, COMPUTE)
    return mass


@triton.jit
def targets_of(target_ptr, weight_ptr, line, here, n_cols, ignore_index, COMPUTE: tl.constexpr):
    """The target of each line, its weight (NaN where it is no class), and where it is ignored."""
    if target_ptr is None:
        target = line * 0
        ignored = here & (line < 0)
        weight = (line * 0).to(COMPUTE)
    else:
        target = tl.load(target_ptr + line, mask=here, other=0)
        ignored = here & (target == ignore_index)
        known = here & (target >= 0) & (target < n_cols)
        target = tl.where(known, target, 0).to(n_cols.dtype)
        weight = tl.where(known | ignored, 1.0, float("nan")).to(COMPUTE)
        if weight_ptr is not None:
            weight *= shared.load(weight_ptr, target, known, 0.0, COMPUTE)
    return target, weight, ignored


@triton.jit
def _anchor(
    x_ptr, softcap, lse, start, read, n_cols, stride_col, COMPUTE: tl.constexpr,
    COLUMNS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(top, rest) of p = exp((x - top) - rest): lse and 0, or the parts of lse, walked anew."""
    top = lse
    rest = lse * 0.0
    far = tl.abs(lse) >= TRUSTED_LSE
    if tl.max(far.to(tl.int32), 0) > 0:
        peak, total = cross_entropy_terms.statistics(
            x_ptr, softcap, start, read[:, None], n_cols, stride_col,
            COMPUTE, COLUMNS, LINES, COLS, WIDTH,
        )  # fmt: skip
        top = tl.where(far, peak, top)
        rest = tl.where(far, tl.log(total), rest)
    return top, rest


@triton.jit
def _mass_of_probs(
    probs_ptr, weight_ptr, start, stride, read, n_cols, scalars, COMPUTE: tl.constexpr,
    COLUMNS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """sum_c w_c q_c of each line."""
    masses = tl.zeros((LINES, COLS), COMPUTE)
    for first in range(0, n_cols, COLS):
        cols = first + tl.arange(0, COLS)
        mask = read[:, None] & (cols < n_cols)[None, :]
        at = shared.spread(start, cols, stride, COLUMNS)
        masses += mass_of(probs_ptr, weight_ptr, at, cols, mask, n_cols, scalars, COMPUTE)
    return tl.sum(masses, 1)


@triton.jit
def _mass_sums(
    weight_sum_ptr, z_share_ptr, weight, most, share, z_loss, lse, COMPUTE: tl.constexpr
):
    """The weight of p where targets are classes; and the part of it that is of the z_loss."""
    # 1 - s + s where nothing is weighted.
    mass_sum = weight
    if weight_sum_ptr is not None:
        mass_sum = most + share * tl.load(weight_sum_ptr)
    beside = lse * 0.0
    if z_loss is not None:
        _, beside = cross_entropy_terms.squared(z_loss, z_share_ptr, lse, COMPUTE)
        mass_sum += beside
    return mass_sum, beside


@triton.jit
def _store(
    dx_ptr, at, dx, slope, softcap, target_ptr, cols, n_cols, of_line, COLUMNS: tl.constexpr
):
    """dloss (dx - [c = t] most) slope, the second where there are targets; but where ignored."""
    here, target, most, dloss, ignored, unread = of_line
    if target_ptr is not None:
        dx -= tl.where(cols[None, :] == target[:, None], most[:, None], 0.0)
    dx = dloss[:, None] * dx
    if softcap is not None:
        dx *= slope
    if not COLUMNS:
        dx = tl.where(ignored[:, None], unread[:, None], dx)
    shared.store(dx_ptr, at, dx, here[:, None] & (cols < n_cols)[None, :])


@triton.jit
def _whole(
    x_ptr, target_ptr, probs_ptr, weight_ptr, dx_ptr, softcap, where, scalars, masses, read, n_cols,
    of_line, SPREAD: tl.constexpr, COMPUTE: tl.constexpr, COLUMNS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`_walked`, of lines that fit registers; lse is not needed."""
    mass_sum, beside = masses
    cols = tl.arange(0, COLS)
    mask = read[:, None] & (cols < n_cols)[None, :]
    at = shared.spread(where[0], cols, where[1], COLUMNS)
    x = shared.load(x_ptr, at, mask, -float("inf"), COMPUTE)
    slope = x
    if softcap is not None:
        z, slope = cross_entropy_terms.capped(x, softcap, COMPUTE)
        x = tl.where(mask, z, -float("inf"))
    p = shared.exp(x - shared.peak(x, COMPUTE)[:, None])
    p *= shared.reciprocal(tl.sum(p, 1))[:, None]
    at = shared.spread(where[2], cols, where[3], COLUMNS)
    if SPREAD:
        mass = mass_of(probs_ptr, weight_ptr, at, cols, mask, n_cols, scalars, COMPUTE)
        if target_ptr is None:
            mass_sum = tl.sum(mass, 1) + beside
        dx = p * mass_sum[:, None] - mass
    else:
        dx = p * mass_sum[:, None]
    _store(dx_ptr, at, dx, slope, softcap, target_ptr, cols, n_cols, of_line, COLUMNS)


@triton.jit
def _walked(
    x_ptr, target_ptr, probs_ptr, weight_ptr, dx_ptr, softcap, where, scalars, masses, anchor, read,
    n_cols, of_line, SPREAD: tl.constexpr, COMPUTE: tl.constexpr, COLUMNS: tl.constexpr,
    LINES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write p mass_sum - mass, and what `_store` does to it.

    where: starts and stride_col of x, then of dx and probs; scalars: keep, share;
    masses: as `_mass_sums` has them
    """
    mass_sum, beside = masses
    top, rest = anchor
    if target_ptr is None:
        mass_sum = beside + _mass_of_probs(
            probs_ptr, weight_ptr, where[2], where[3], read, n_cols, scalars,
            COMPUTE, COLUMNS, LINES, COLS,
        )  # fmt: skip
    for first in range(0, n_cols, COLS):
        cols = first + tl.arange(0, COLS)
        mask = read[:, None] & (cols < n_cols)[None, :]
        at = shared.spread(where[0], cols, where[1], COLUMNS)
        x = shared.load(x_ptr, at, mask, 0.0, COMPUTE)
        slope = x
        if softcap is not None:
            x, slope = cross_entropy_terms.capped(x, softcap, COMPUTE)
        p = shared.exp((x - top[:, None]) - rest[:, None])
        at = shared.spread(where[2], cols, where[3], COLUMNS)
        dx = p * mass_sum[:, None]
        if SPREAD:
            dx -= mass_of(probs_ptr, weight_ptr, at, cols, mask, n_cols, scalars, COMPUTE)
        _store(dx_ptr, at, dx, slope, softcap, target_ptr, cols, n_cols, of_line, COLUMNS)


@triton.jit(do_not_specialize=[*shared.EXTENTS, "ignore_index", "dloss_step"])
def cross_entropy_backward_kernel(
    x_ptr, target_ptr, probs_ptr, weight_ptr, weight_sum_ptr, lse_ptr, dloss_ptr, dx_ptr,
    z_share_ptr, n_lines, n_cols, stride_outer, stride_col, ignore_index, dloss_step, keep, share,
    z_loss, softcap, SPREAD: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """dloss_step: 1, or 0 where dloss holds one number for all; weight_sum_ptr: (1,), or None

    z_loss, softcap: as `loss_terms.keywords`; z_share_ptr: as `loss_terms.squared`; dx may be x
    """
    n_lines, n_cols, stride_outer, stride_col = shared.geometry(
        n_lines, n_cols, stride_outer, stride_col, VECTOR, COLUMNS
    )
    outer, lines = shared.place(n_lines, LINES, COLUMNS)
    here = lines < n_lines
    line = outer * n_lines + lines
    keep, share = shared.scalar(keep, COMPUTE), shared.scalar(share, COMPUTE)
    target, weight, ignored = targets_of(
        target_ptr, weight_ptr, line, here, n_cols, ignore_index, COMPUTE
    )
    lse = shared.load(lse_ptr, line, here, 0.0, COMPUTE)
    # As with torch: 0 where ignored, but NaN where what is ignored is not finite. Such a row need
    # not be read for that; in columns the hole would cost the wide loads.
    read = here
    if not COLUMNS:
        read = here & (ignored == 0)
    x_start = shared.starts(outer, lines, stride_outer, COLUMNS)
    # Before what it does not need is loaded, and would be kept in registers over it.
    anchor = (lse, lse)
    if not WHOLE:
        anchor = _anchor(
            x_ptr, softcap, lse, x_start, read, n_cols, stride_col,
            COMPUTE, COLUMNS, LINES, COLS, WIDTH,
        )  # fmt: skip
    dloss = shared.load(dloss_ptr, line * dloss_step, here & (ignored == 0), 0.0, COMPUTE)
    unread = tl.where(lse - lse == 0.0, 0.0, float("nan"))
    most = keep * weight
    masses = _mass_sums(weight_sum_ptr, z_share_ptr, weight, most, share, z_loss, lse, COMPUTE)
    of_line = (here, target, most, dloss, ignored, unread)
    dx_start, dx_stride = shared.packed(outer, lines, n_lines, n_cols, COLUMNS)
    where = (x_start, stride_col, dx_start, dx_stride)
    if WHOLE:
        _whole(
            x_ptr, target_ptr, probs_ptr, weight_ptr, dx_ptr, softcap, where, (keep, share), masses,
            read, n_cols, of_line, SPREAD, COMPUTE, COLUMNS, COLS,
        )  # fmt: skip
    else:
        _walked(
            x_ptr, target_ptr, probs_ptr, weight_ptr, dx_ptr, softcap, where, (keep, share), masses,
            anchor, read, n_cols, of_line, SPREAD, COMPUTE, COLUMNS, LINES, COLS,
        )  # fmt: skip


def gradients(
    x: Tensor,
    target: Tensor | None,
    probs: Tensor | None,
    weight: Tensor | None,
    lse: Tensor,
    dloss: Tensor,
    dx: Tensor,
    shape: tuple[int, int, int],
    strides: tuple[int, int],
    ignore_index: int,
    terms: Terms,
    z_share: Tensor | None = None,
) -> None:
    """Fill dx; of target and probs one is None. Tensors as in `losses`."""
    smoothing, _, softcap = terms
    halved = shape[2] != 1 or probs is not None or softcap != 0.0
    most = cross_entropy_terms.widest(shared.COMPUTE[x.dtype], terms)
    if probs is not None and x.dtype is torch.float64:
        most //= 2  # or registers do not hold x, p and mass (sm_90)
    lines = Lines.of(x, shape, strides, (x, probs, dx), halved, most)
    weighted = target is not None and weight is not None and smoothing != 0.0
    lines.launch(
        cross_entropy_backward_kernel,
        (x, target, probs, weight, weight.sum() if weighted else None, lse, dloss, dx, z_share),
        ignore_index,
        int(dloss.numel() != 1),
        shared.parts(1.0 - smoothing),
        shared.parts(smoothing / max(1, shape[1])),
        SPREAD=probs is not None or smoothing != 0.0,
        WIDTH=lines.tile.width,
        **cross_entropy_terms.keywords(terms),
    )
