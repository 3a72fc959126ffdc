"""The optional terms of a cross entropy, for Triton: a cap of the logits, and a z_loss.

    logits  z = softcap tanh(x / softcap),  dz/dx = 1 - tanh(x / softcap)^2
    loss    += z_loss r logsumexp(z)^2, r: 1, or the mean of w_t where losses are divided by its sum

A kernel that is given None for either does not have it.
With e = exp(-2 |x| / softcap) tanh is (1 - e) / (1 + e) and its slope 4 e / (1 + e)^2. e - 1 is
computed as expm1 does, so that small logits keep their digits. Where tanh is small the slope is
1 - tanh^2, which rounds less there.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fastopt_kernels.gpu.rows import shared

# Adding it to x / ln 2 leaves n + 127, the exponent of 2^n, in the low bits of the sum.
BIAS = tl.constexpr(12582912.0 + 127.0)
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-0.00021219444)
# More caps than these count as so many: e is still a normal number, and the slope 0.
FAR = tl.constexpr(43.0)


def softcap_parts(softcap: float) -> tuple[float, ...] | None:
    """The cap as a kernel takes it: three parts of it, and of -2 / cap; None for none."""
    return (*shared.parts(softcap), *shared.parts(-2.0 / softcap)) if softcap else None


def z_loss_parts(z_loss: float) -> tuple[float, ...] | None:
    """The z_loss as a kernel takes it; None for none."""
    return shared.parts(z_loss) if z_loss else None


@triton.jit
def _grown(a):
    """(e^a - 1, e^a) for a in [-2 FAR, 0]"""
    if a.dtype == tl.float64:
        e = tl.exp(a)
        # Near 0 the series: e - 1 would lose its digits.
        q = a * 0.0 + 1.0
        for k in tl.static_range(13, 1, -1):
            q = q * a * (1.0 / k) + 1.0
        less = tl.where(a > -0.35, a * q, e - 1.0)
    else:
        t = a * shared.LOG2E + BIAS
        n = t - BIAS
        r = (a - n * LN2_HIGH) - n * LN2_LOW
        q = 0.00138145986 * r + 0.008368716575
        q = ((q * r + 0.041668388993) * r + 0.1666652113) * r + 0.49999994
        grown = q * r * r + r
        power = (t.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
        less = power * grown + (power - 1.0)
        e = power * grown + power
    return less, e


@triton.jit
def _reciprocal(x):
    """1 / x for x in [1, 2], to an ulp; a division would call, and what is live then spill.

    Newton's steps square the relative error, which is 1/17 at first.
    """
    y = 24.0 / 17.0 - 8.0 / 17.0 * x
    for _ in tl.static_range(4 if x.dtype == tl.float64 else 3):
        y += y * (1.0 - x * y)
    return y


@triton.jit
def capped(x, softcap, COMPUTE: tl.constexpr):
    """(z, dz/dx) of a tile of logits."""
    if softcap is None:
        z = x
        slope = x * 0.0 + 1.0
    else:
        cap = (tl.zeros((1, 1), COMPUTE) + softcap[0] + softcap[1]) + softcap[2]
        size = tl.minimum(tl.abs(x), FAR * cap, propagate_nan=tl.PropagateNan.ALL)
        # The rate in two parts: it is rounded to float32 otherwise.
        high = tl.zeros((1, 1), COMPUTE) + softcap[3]
        low = tl.zeros((1, 1), COMPUTE) + softcap[4] + softcap[5]
        less, e = _grown(size * high + size * low)
        share = _reciprocal(2.0 + less)
        tanh = -less * share
        slope = tl.where(size < FAR * cap, 4.0 * e * share * share, 0.0)
        slope = tl.where(tanh < 0.5, 1.0 - tanh * tanh, slope)
        z = cap * tl.where(x < 0.0, -tanh, tanh)
    return z, slope


@triton.jit
def capped_lines(x, softcap, mask, COMPUTE: tl.constexpr):
    """Logits of a tile, -inf where there are none."""
    if softcap is not None:
        z, _ = capped(x, softcap, COMPUTE)
        x = tl.where(mask, z, -float("inf"))
    return x


@triton.jit
def statistics(
    x_ptr, softcap, start, here, n_cols, stride_col, COMPUTE: tl.constexpr, COLUMNS: tl.constexpr,
    LINES: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`rows.statistics` of capped logits."""
    if softcap is None:
        top, total = shared.statistics(
            x_ptr, start, here, n_cols, stride_col, COMPUTE, COLUMNS, LINES, COLS, WIDTH
        )
    else:
        tops = tl.full((LINES, COLS // WIDTH), shared.lowest(COMPUTE), COMPUTE)
        totals = tl.zeros((LINES, COLS // WIDTH), COMPUTE)
        for first in range(0, n_cols, COLS):
            cols = first + tl.arange(0, COLS)
            mask = here & (cols < n_cols)[None, :]
            at = shared.spread(start, cols, stride_col, COLUMNS)
            x = shared.load(x_ptr, at, mask, -float("inf"), COMPUTE)
            x = capped_lines(x, softcap, mask, COMPUTE)
            tops, totals = shared.online(tops, totals, x, WIDTH, COMPUTE)
        top, total = shared.merge(tops, totals)
    return top, total


@triton.jit
def squared(z_loss, share_ptr, lse, COMPUTE: tl.constexpr):
    """(z_loss r lse^2, 2 z_loss r lse): what it adds to a line's loss, and to the mass of p.

    share_ptr: (1,) in the compute type, r; None for 1
    """
    scale = shared.scalar(z_loss, COMPUTE)
    if share_ptr is not None:
        scale *= tl.load(share_ptr)
    return scale * lse * lse, 2.0 * scale * lse


Terms = tuple[float, float, float]


def widest(compute: tl.dtype, terms: Terms) -> int:
    """The longest line to keep in registers: a cap takes as many again."""
    return shared.WIDEST[compute] // (2 if terms[2] else 1)


def keywords(terms: Terms) -> dict[str, Any]:
    """The arguments of a kernel for z_loss and softcap."""
    return {"z_loss": z_loss_parts(terms[1]), "softcap": softcap_parts(terms[2])}
