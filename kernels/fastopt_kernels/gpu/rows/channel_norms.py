"""BatchNorm, InstanceNorm and GroupNorm for Triton; the variance is about the mean.

    y = (x - mean) rstd weight + bias,  rstd = 1 / sqrt(var + eps)

Three launches: moments of each channel of each image (or piece of it), their merger for each set,
and what is written. Where the statistics are given, the last alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.channels import Channels
from fastopt_kernels.gpu.rows import channel_norm_gradients, shared
from fastopt_kernels.gpu.rows.channel_tiles import EXTENTS, SETS, Tiles, of_channel, parts_of, place


@triton.jit(do_not_specialize=EXTENTS)
def channel_moments_kernel(
    x_ptr, mean_ptr, drift_ptr, squares_ptr, images, n_channels, length, n_pieces, piece_size,
    stride_image, stride_channel, stride_element, set_image, per_group, COMPUTE: tl.constexpr,
    PIXELS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Mean in two parts, and the sum of squares about it, of each part."""
    _, _, mask, at, _, part, here = place(
        images, n_channels, length, n_pieces, piece_size, stride_image, stride_channel,
        stride_element, PIXELS, LINES, COLS, VECTOR,
    )  # fmt: skip
    axis: tl.constexpr = 0 if PIXELS else 1
    x = shared.load(x_ptr, at, mask, 0.0, COMPUTE)
    n = tl.sum(mask.to(COMPUTE), axis)
    each = shared.reciprocal(n)
    mean = tl.sum(x, axis) * each
    x = tl.where(mask, x - tl.expand_dims(mean, axis), 0.0)
    # What rounding the mean has left: at a mean of 1e4 it is 1e-3.
    rest = tl.sum(x, axis)
    drift = rest * each
    squares = tl.sum(x * x, axis)
    # Of squares that overflow nothing is subtracted that may have overflowed too.
    squares = tl.where(squares < float("inf"), squares - rest * drift, squares)
    squares = tl.maximum(squares, 0.0, propagate_nan=tl.PropagateNan.ALL)
    shared.store(mean_ptr, part, tl.expand_dims(mean, axis), here)
    shared.store(drift_ptr, part, tl.expand_dims(drift, axis), here)
    shared.store(squares_ptr, part, tl.expand_dims(squares, axis), here)


@triton.jit
def _move(running_ptr, sets, here, value, momentum, COMPUTE: tl.constexpr):
    """running = momentum value + (1 - momentum) running"""
    before = of_channel(running_ptr, sets, here, COMPUTE)
    shared.store(running_ptr, sets, momentum * value + (1.0 - momentum) * before, here)


@triton.jit(do_not_specialize=SETS)
def channel_merge_kernel(
    means_ptr, drifts_ptr, squares_ptr, mean_ptr, low_ptr, var_ptr, running_mean_ptr,
    running_var_ptr, momentum, n_sets, groups, base_outer, base_inner, n_parts, inner, step_outer,
    step_inner, length, piece_size, per_set, per_group, COMPUTE: tl.constexpr, LINES: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Mean in two parts and variance of each set, counted from the mean of its first part; the
    running ones move."""
    sets = (tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES))[:, None]
    here = sets < n_sets
    base = (sets // groups) * base_outer + (sets % groups) * base_inner
    origin = of_channel(means_ptr, base, here, COMPUTE)
    n = per_set.to(COMPUTE)
    each = shared.reciprocal(n)
    totals = tl.zeros((LINES, COLS), COMPUTE)
    for first in range(0, n_parts, COLS):
        at, mask, count, _ = parts_of(
            sets, first, n_sets, groups, base_outer, base_inner, n_parts, inner, step_outer,
            step_inner, length, piece_size, COLS,
        )  # fmt: skip
        off = of_channel(means_ptr, at, mask, COMPUTE) - origin
        off += of_channel(drifts_ptr, at, mask, COMPUTE)
        totals += tl.where(mask, count.to(COMPUTE) * off, 0.0)
    rest = (tl.sum(totals, 1) * each)[:, None]
    totals = tl.zeros((LINES, COLS), COMPUTE)
    for first in range(0, n_parts, COLS):
        at, mask, count, _ = parts_of(
            sets, first, n_sets, groups, base_outer, base_inner, n_parts, inner, step_outer,
            step_inner, length, piece_size, COLS,
        )  # fmt: skip
        off = of_channel(means_ptr, at, mask, COMPUTE) - origin
        off += of_channel(drifts_ptr, at, mask, COMPUTE) - rest
        squares = of_channel(squares_ptr, at, mask, COMPUTE)
        totals += tl.where(mask, squares + count.to(COMPUTE) * off * off, 0.0)
    squares = tl.sum(totals, 1)[:, None]
    mean = origin + rest
    shared.store(mean_ptr, sets, mean, here)
    # An infinite mean leaves nothing.
    shared.store(low_ptr, sets, tl.where(mean - mean == 0.0, (origin - mean) + rest, 0.0), here)
    shared.store(var_ptr, sets, squares * each, here)
    momentum = shared.scalar(momentum, COMPUTE)[None, :]
    if running_mean_ptr is not None:
        _move(running_mean_ptr, sets, here, mean, momentum, COMPUTE)
    if running_var_ptr is not None:
        unbiased = squares * shared.reciprocal(n - 1.0)
        _move(running_var_ptr, sets, here, unbiased, momentum, COMPUTE)


@triton.jit(do_not_specialize=EXTENTS)
def channel_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, low_ptr, var_ptr, eps, images, n_channels, length,
    n_pieces, piece_size, stride_image, stride_channel, stride_element, set_image, per_group,
    COMPUTE: tl.constexpr, PIXELS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) rstd weight + bias, by statistics of the set that an element is of."""
    image, channel, mask, at, dense, _, here = place(
        images, n_channels, length, n_pieces, piece_size, stride_image, stride_channel,
        stride_element, PIXELS, LINES, COLS, VECTOR,
    )  # fmt: skip
    one_set = image * set_image + channel // per_group
    x = shared.load(x_ptr, at, mask, 0.0, COMPUTE)
    x -= of_channel(mean_ptr, one_set, here, COMPUTE)
    if low_ptr is not None:
        x -= of_channel(low_ptr, one_set, here, COMPUTE)
    var = of_channel(var_ptr, one_set, here, COMPUTE)
    scale = shared.rsqrt(var + shared.scalar(eps, COMPUTE)[None, :])
    if weight_ptr is not None:
        scale *= of_channel(weight_ptr, channel, here, COMPUTE)
    x *= scale
    if bias_ptr is not None:
        x += of_channel(bias_ptr, channel, here, COMPUTE)
    shared.store(y_ptr, dense, x, mask)


def channel_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    channels: Channels,
    eps: float,
    momentum: float | None,
) -> None:
    """Normalize every set of x into y, dense in the same order.

    weight, bias: (channels,), of any dtype each; stats: (3, sets), mean in two parts and variance,
    in the compute type, written if there is one; running: mean and variance of each channel, used
    where momentum is None, and else moved towards those of this x
    """
    tiles, given = Tiles.of(x, channels, (x, y)), momentum is None
    if momentum is None:
        statistics = running[0], None, running[1]
    else:
        parts = tiles.room(x, 3)
        if stats is None:
            stats = parts.new_empty(3, channels.n_sets)
        tiles.launch(channel_moments_kernel, (x, *parts.unbind()), False)
        statistics = stats.unbind()
        tensors = (*parts.unbind(), *statistics, *running, shared.parts(momentum))
        tiles.launch_sums(channel_merge_kernel, tensors, False)
    tensors = (x, weight, bias, y, *statistics, shared.parts(eps))
    tiles.launch(channel_norm_kernel, tensors, given)


def channel_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    channels: Channels,
    eps: float,
    given: bool,
) -> None:
    """Those of the three gradients that are wanted; given: the statistics were, and are constant.

    dy, dx: dense in the order of x
    """
    wanted = dx, dweight, dbias
    channel_norm_gradients.gradients(dy, x, weight, stats, wanted, channels, eps, given)
