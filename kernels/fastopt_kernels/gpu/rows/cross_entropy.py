"""Cross entropy for Triton: the softmax is never written, and the logits are read once.

    p = exp(x - lse),  W = sum w
    indices        loss = (1 - s) w_t (lse - x_t) + s / C sum_c w_c (lse - x_c)
                   dx_c = dloss ((1 - s) w_t (p_c - [c = t]) + s / C (W p_c - w_c))
    probabilities  loss = sum_c w_c q_c (lse - x_c),  q_c = (1 - s) probs_c + s / C
                   dx_c = dloss (p_c sum_k w_k q_k - w_c q_c)
    and what `loss_terms` adds

Both are one kernel, as both spread a mass over the classes: w_c q_c, or w_c s / C. Differences to
the maximum are taken before anything is added, as lse rounded to float32 is off by 3e-5 at 1000.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.gpu.rows import cross_entropy_terms, shared
from fastopt_kernels.gpu.rows.cross_entropy_gradients import gradients, mass_of, targets_of
from fastopt_kernels.gpu.rows.cross_entropy_terms import Terms
from fastopt_kernels.gpu.rows.shared import Lines

Shape = tuple[int, int, int]
Strides = tuple[int, int]


@triton.jit
def _online_with_mass(
    tops, totals, offs, masses, x, mass, read, left, WIDTH: tl.constexpr, COMPUTE: tl.constexpr
):
    """`rows.online`, with the running sums of mass (maximum - x) and of the mass.

    left: columns there are from the first of the tile on
    """
    # Made anew: a mask that is reshaped goes through shared memory in every round.
    lanes = tl.arange(0, x.shape[1] // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = read[:, None, None] & (lanes < left)[None, :, :]
    wide = shared.tiled(x, WIDTH)
    new = tl.maximum(tops, tl.max(shared.finite(wide, COMPUTE), 2))
    # Where nothing but -inf has come there is no maximum to move away from.
    offs += tl.where(totals == 0.0, 0.0, masses * (new - tops))
    terms = shared.tiled(mass, WIDTH) * (new[:, :, None] - wide)
    offs += tl.sum(tl.where(mask, terms, 0.0), 2)
    masses += tl.sum(shared.tiled(mass, WIDTH), 2)
    new, totals = shared.online(tops, totals, x, WIDTH, COMPUTE)
    return new, totals, offs, masses


@triton.jit
def _statistics_with_mass(
    x_ptr, probs_ptr, weight_ptr, softcap, where, scalars, here, n_cols, COMPUTE: tl.constexpr,
    COLUMNS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`rows.statistics`, and the sums of mass (maximum - x) and of the mass."""
    tops = tl.full((LINES, COLS // WIDTH), shared.lowest(COMPUTE), COMPUTE)
    totals = tl.zeros((LINES, COLS // WIDTH), COMPUTE)
    offs = tl.zeros((LINES, COLS // WIDTH), COMPUTE)
    masses = tl.zeros((LINES, COLS // WIDTH), COMPUTE)
    for first in range(0, n_cols, COLS):
        cols = first + tl.arange(0, COLS)
        mask = here[:, None] & (cols < n_cols)[None, :]
        at = shared.spread(where[0], cols, where[1], COLUMNS)
        x = shared.load(x_ptr, at, mask, -float("inf"), COMPUTE)
        x = cross_entropy_terms.capped_lines(x, softcap, mask, COMPUTE)
        at = shared.spread(where[2], cols, where[3], COLUMNS)
        mass = mass_of(probs_ptr, weight_ptr, at, cols, mask, n_cols, scalars, COMPUTE)
        tops, totals, offs, masses = _online_with_mass(
            tops, totals, offs, masses, x, mass, here, n_cols - first, WIDTH, COMPUTE
        )
    top, total = shared.merge(tops, totals)
    offs += tl.where(totals == 0.0, 0.0, masses * (top[:, None] - tops))
    return top, total, tl.sum(offs, 1), tl.sum(masses, 1)


@triton.jit
def _whole(
    x_ptr, probs_ptr, weight_ptr, softcap, where, scalars, here, n_cols, SPREAD: tl.constexpr,
    COMPUTE: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """`_walked`, of lines that fit registers."""
    cols = tl.arange(0, COLS)
    mask = here[:, None] & (cols < n_cols)[None, :]
    at = shared.spread(where[0], cols, where[1], COLUMNS)
    x = shared.load(x_ptr, at, mask, -float("inf"), COMPUTE)
    x = cross_entropy_terms.capped_lines(x, softcap, mask, COMPUTE)
    top = shared.peak(x, COMPUTE)
    x -= top[:, None]
    total = tl.log(shared.no_infinity(tl.sum(shared.exp_term(x), 1)))
    loss = tl.zeros((LINES,), COMPUTE)
    if SPREAD:
        at = shared.spread(where[2], cols, where[3], COLUMNS)
        mass = mass_of(probs_ptr, weight_ptr, at, cols, mask, n_cols, scalars, COMPUTE)
        loss = tl.sum(tl.where(mask, mass * (total[:, None] - x), 0.0), 1)
    return top, total, loss


@triton.jit
def _walked(
    x_ptr, probs_ptr, weight_ptr, softcap, where, scalars, here, n_cols, SPREAD: tl.constexpr,
    COMPUTE: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Maximum of each line, log sum_c e^(x_c - maximum), and sum_c mass_c (lse - x_c).

    where: starts and stride_col of x, then of probs; scalars: keep, share
    """
    loss = tl.zeros((LINES,), COMPUTE)
    if SPREAD:
        top, total, off, mass = _statistics_with_mass(
            x_ptr, probs_ptr, weight_ptr, softcap, where, scalars, here, n_cols,
            COMPUTE, COLUMNS, LINES, COLS, WIDTH,
        )  # fmt: skip
        total = tl.log(shared.no_infinity(total))
        loss = off + mass * total
    else:
        top, total = cross_entropy_terms.statistics(
            x_ptr, softcap, where[0], here[:, None], n_cols, where[1],
            COMPUTE, COLUMNS, LINES, COLS, WIDTH,
        )  # fmt: skip
        total = tl.log(shared.no_infinity(total))
    return top, total, loss


@triton.jit
def _target_logit(
    x_ptr, softcap, start, target, here, stride_col, COMPUTE: tl.constexpr, COLUMNS: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    """x_t of each line."""
    at = start + target
    if COLUMNS:
        at = start + target * stride_col
    x = shared.load(x_ptr, at, here, 0.0, COMPUTE)
    if softcap is not None:
        z, _ = cross_entropy_terms.capped(x[:, None], softcap, COMPUTE)
        x = tl.reshape(z, (LINES,))
    return x


@triton.jit(do_not_specialize=[*shared.EXTENTS, "ignore_index"])
def cross_entropy_kernel(
    x_ptr, target_ptr, probs_ptr, weight_ptr, loss_ptr, lse_ptr, z_share_ptr, n_lines, n_cols,
    stride_outer, stride_col, ignore_index, keep, share, z_loss, softcap, SPREAD: tl.constexpr,
    COMPUTE: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
    COLS: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """SPREAD: there is mass on every class, of the probabilities or of smoothing.

    keep: 1 - s; share: s / C; both as `rows.parts`; z_loss, softcap: as `loss_terms.keywords`;
    z_share_ptr: as `loss_terms.squared`
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
    x_start = shared.starts(outer, lines, stride_outer, COLUMNS)
    p_start, p_stride = shared.packed(outer, lines, n_lines, n_cols, COLUMNS)
    where = (x_start, stride_col, p_start, p_stride)
    if WHOLE:
        top, total, loss = _whole(
            x_ptr, probs_ptr, weight_ptr, softcap, where, (keep, share), here, n_cols,
            SPREAD, COMPUTE, COLUMNS, LINES, COLS,
        )  # fmt: skip
    else:
        top, total, loss = _walked(
            x_ptr, probs_ptr, weight_ptr, softcap, where, (keep, share), here, n_cols,
            SPREAD, COMPUTE, COLUMNS, LINES, COLS, WIDTH,
        )  # fmt: skip
    if target_ptr is not None:
        x_target = _target_logit(
            x_ptr, softcap, x_start, target, here, stride_col, COMPUTE, COLUMNS, LINES
        )
        loss += keep * weight * (total - (x_target - top))
    if z_loss is not None:
        square, _ = cross_entropy_terms.squared(z_loss, z_share_ptr, top + total, COMPUTE)
        loss += square
    shared.store(loss_ptr, line, tl.where(ignored, 0.0, loss), here)
    shared.store(lse_ptr, line, top + total, here)


def _forward(
    x: Tensor,
    target: Tensor | None,
    probs: Tensor | None,
    weight: Tensor | None,
    out: tuple[Tensor, Tensor],
    shape: Shape,
    strides: Strides,
    ignore_index: int,
    terms: Terms,
    z_share: Tensor | None = None,
) -> None:
    smoothing = terms[0]
    spread = probs is not None or smoothing != 0.0
    lines = Lines.of(
        x,
        shape,
        strides,
        (x, probs),
        spread,
        cross_entropy_terms.widest(shared.COMPUTE[x.dtype], terms),
    )
    lines.launch(
        cross_entropy_kernel,
        (x, target, probs, weight, *out, z_share),
        ignore_index,
        shared.parts(1.0 - smoothing),
        shared.parts(smoothing / max(1, shape[1])),
        SPREAD=spread,
        WIDTH=lines.tile.width,
        **cross_entropy_terms.keywords(terms),
    )


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: Tensor,
    lse: Tensor,
    shape: Shape,
    strides: Strides,
    ignore_index: int,
    terms: Terms,
    z_share: Tensor | None = None,
) -> None:
    """loss = (1 - s) w_t (lse - x_t) + s / C sum_c w_c (lse - x_c)

    x: (n_outer, n_cols, n_inner) with `strides` of the first two; target: (n_outer, n_inner) int64;
    weight: (n_cols,) in the compute type; loss, lse: (n_outer, n_inner), likewise; the loss is
    0 where ignored. A target that is neither ignored nor a class makes loss and gradient NaN.
    z_share: (1,), likewise, what z_loss is multiplied by; None for 1
    """
    _forward(x, target, None, weight, (loss, lse), shape, strides, ignore_index, terms, z_share)


def cross_entropy_backward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    dloss: Tensor,
    dx: Tensor,
    shape: Shape,
    strides: Strides,
    ignore_index: int,
    terms: Terms,
    z_share: Tensor | None = None,
) -> None:
    """dx_c = dloss ((1 - s) w_t (p_c - [c = t]) + s / C (W p_c - w_c))

    p = exp(x - lse), W = sum w
    dloss: (n_outer, n_inner), or (1,) for all alike, in the compute type; dx: contiguous;
    z_share: as in `cross_entropy`
    """
    gradients(x, target, None, weight, lse, dloss, dx, shape, strides, ignore_index, terms, z_share)


def cross_entropy_probs(
    x: Tensor,
    probs: Tensor,
    weight: Tensor | None,
    loss: Tensor,
    lse: Tensor,
    shape: Shape,
    strides: Strides,
    terms: Terms,
) -> None:
    """loss = sum_c w_c q_c (lse - x_c),  q_c = (1 - s) probs_c + s / C

    probs: (n_outer, n_cols, n_inner), contiguous, in x's dtype; the others as in `cross_entropy`
    """
    _forward(x, None, probs, weight, (loss, lse), shape, strides, 0, terms)


def cross_entropy_probs_backward(
    x: Tensor,
    probs: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    dloss: Tensor,
    dx: Tensor,
    shape: Shape,
    strides: Strides,
    terms: Terms,
) -> None:
    """dx_c = dloss (p_c sum_k w_k q_k - w_c q_c),  p = exp(x - lse)

    Tensors as in `cross_entropy_probs` and `cross_entropy_backward`.
    """
    gradients(x, None, probs, weight, lse, dloss, dx, shape, strides, 0, terms)
