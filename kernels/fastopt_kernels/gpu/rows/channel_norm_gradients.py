"""Gradients of BatchNorm, InstanceNorm and GroupNorm for Triton, their sums without atomics.

    dx = rstd (g - mean(g) - x_hat mean(g x_hat)),  g = dy weight,  x_hat = (x - mean) rstd
    dx = rstd g  where the statistics were given
    dweight = sum dy x_hat,  dbias = sum dy

Where a set has one channel its weight is taken out of the brackets.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.channels import Channels
from fastopt_kernels.gpu.rows import shared
from fastopt_kernels.gpu.rows.channel_tiles import EXTENTS, SETS, Tiles, of_channel, parts_of, place

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def _normalized(
    x, one_set, here, mean_ptr, low_ptr, var_ptr, eps, COMPUTE: tl.constexpr
):  # fmt: skip
    """x as it was before the weight, and rstd."""
    var = of_channel(var_ptr, one_set, here, COMPUTE)
    rstd = shared.rsqrt(var + shared.scalar(eps, COMPUTE)[None, :])
    mean = of_channel(mean_ptr, one_set, here, COMPUTE)
    low = of_channel(low_ptr, one_set, here, COMPUTE)
    return ((x - mean) - low) * rstd, rstd


@triton.jit(do_not_specialize=EXTENTS)
def channel_sums_kernel(
    dy_ptr, x_ptr, mean_ptr, low_ptr, var_ptr, plain_ptr, along_ptr, eps, images, n_channels,
    length, n_pieces, piece_size, stride_image, stride_channel, stride_element, set_image,
    per_group, COMPUTE: tl.constexpr, PIXELS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Sums of dy and of dy x_hat of each part."""
    image, channel, mask, at, dense, part, here = place(
        images, n_channels, length, n_pieces, piece_size, stride_image, stride_channel,
        stride_element, PIXELS, LINES, COLS, VECTOR,
    )  # fmt: skip
    axis: tl.constexpr = 0 if PIXELS else 1
    one_set = image * set_image + channel // per_group
    dy = shared.load(dy_ptr, dense, mask, 0.0, COMPUTE)
    x = shared.load(x_ptr, at, mask, 0.0, COMPUTE)
    x_hat, _ = _normalized(x, one_set, here, mean_ptr, low_ptr, var_ptr, eps, COMPUTE)
    along = tl.where(mask, dy * x_hat, 0.0)
    shared.store(plain_ptr, part, tl.expand_dims(tl.sum(dy, axis), axis), here)
    shared.store(along_ptr, part, tl.expand_dims(tl.sum(along, axis), axis), here)


@triton.jit(do_not_specialize=SETS)
def channel_totals_kernel(
    plains_ptr, alongs_ptr, weight_ptr, plain_ptr, along_ptr, n_sets, groups, base_outer,
    base_inner, n_parts, inner, step_outer, step_inner, length, piece_size, per_set, per_group,
    COMPUTE: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """Sums over the parts of a set or of a channel, or means over its elements."""
    sets = (tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES))[:, None]
    here = sets < n_sets
    plain = tl.zeros((LINES, COLS), COMPUTE)
    along = tl.zeros((LINES, COLS), COMPUTE)
    for first in range(0, n_parts, COLS):
        at, mask, _, outer = parts_of(
            sets, first, n_sets, groups, base_outer, base_inner, n_parts, inner, step_outer,
            step_inner, length, piece_size, COLS,
        )  # fmt: skip
        one = of_channel(plains_ptr, at, mask, COMPUTE)
        other = of_channel(alongs_ptr, at, mask, COMPUTE)
        if weight_ptr is not None:
            weight = of_channel(weight_ptr, (sets % groups) * per_group + outer, mask, COMPUTE)
            one *= weight
            other *= weight
        plain += one
        along += other
    each = tl.zeros((1,), COMPUTE) + 1.0
    if MEANS:
        each = shared.reciprocal(per_set.to(COMPUTE) + each * 0.0)
    if plain_ptr is not None:
        shared.store(plain_ptr, sets, (tl.sum(plain, 1) * each)[:, None], here)
    if along_ptr is not None:
        shared.store(along_ptr, sets, (tl.sum(along, 1) * each)[:, None], here)


@triton.jit(do_not_specialize=EXTENTS)
def channel_dx_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, low_ptr, var_ptr, shift_ptr, slope_ptr, dx_ptr, eps,
    images, n_channels, length, n_pieces, piece_size, stride_image, stride_channel, stride_element,
    set_image, per_group, COMPUTE: tl.constexpr, PIXELS: tl.constexpr, LINES: tl.constexpr,
    COLS: tl.constexpr, VECTOR: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """dx; shift, slope: the means of g and g x_hat of each set, None where statistics were given.

    GROUPED: a set has several channels, whose weights belong to g
    """
    image, channel, mask, at, dense, _, here = place(
        images, n_channels, length, n_pieces, piece_size, stride_image, stride_channel,
        stride_element, PIXELS, LINES, COLS, VECTOR,
    )  # fmt: skip
    one_set = image * set_image + channel // per_group
    g = shared.load(dy_ptr, dense, mask, 0.0, COMPUTE)
    if weight_ptr is not None:
        weight = of_channel(weight_ptr, channel, here, COMPUTE)
        if GROUPED:
            g *= weight
    if shift_ptr is not None:
        x = shared.load(x_ptr, at, mask, 0.0, COMPUTE)
        x_hat, factor = _normalized(x, one_set, here, mean_ptr, low_ptr, var_ptr, eps, COMPUTE)
        slope = of_channel(slope_ptr, one_set, here, COMPUTE)
        g = (g - of_channel(shift_ptr, one_set, here, COMPUTE)) - x_hat * slope
    else:
        var = of_channel(var_ptr, one_set, here, COMPUTE)
        factor = shared.rsqrt(var + shared.scalar(eps, COMPUTE)[None, :])
    if weight_ptr is not None and not GROUPED:
        factor *= weight
    shared.store(dx_ptr, dense, g * factor, mask)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    wanted: Gradients,
    channels: Channels,
    eps: float,
    given: bool,
) -> None:
    """Fill those of `wanted` (dx, dweight, dbias) that there are."""
    dx, dweight, dbias = wanted
    tiles = Tiles.of(x, channels, (dy, x, dx))
    statistics, eps_parts = stats.unbind(), shared.parts(eps)
    summed, grouped = dweight is not None or dbias is not None, channels.channels > channels.groups
    shift = slope = None
    if summed or not given:
        plain, along = tiles.room(x, 2).unbind()
        tiles.launch(channel_sums_kernel, (dy, x, *statistics, plain, along, eps_parts), given)
        if summed:
            tensors = (plain, along, None, dbias, dweight)
            tiles.launch_sums(channel_totals_kernel, tensors, True, MEANS=False)
        if dx is not None and not given:
            shift, slope = plain.new_empty(2, channels.n_sets).unbind()
            tensors = (plain, along, weight if grouped else None, shift, slope)
            tiles.launch_sums(channel_totals_kernel, tensors, False, MEANS=True)
    if dx is not None:
        tensors = (dy, x, weight, *statistics, shift, slope, dx, eps_parts)
        tiles.launch(channel_dx_kernel, tensors, given, GROUPED=grouped and not given)
