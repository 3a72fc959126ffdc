"""The gradients of BatchNorm, InstanceNorm and GroupNorm for CPU.

    dx = rstd (g - mean(g) - x_hat mean(g x_hat)),  g = dy weight,  x_hat = (x - mean) rstd
    dx = rstd g  where the statistics were given
    dweight = sum dy x_hat,  dbias = sum dy

Where a set has one channel its weight is taken out of the brackets: nothing there is rounded twice.
Sums run over fixed blocks, and over the blocks in order, in float64.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import types
from torch import Tensor

from fastopt_kernels.channels import Channels
from fastopt_kernels.cpu import channel_pixel_gradients, memory, rows
from fastopt_kernels.cpu.channel_sets import (
    kind_at,
    kinds_code,
    load_any,
    planes_table,
    store_any,
    table_row,
    tidy,
)
from fastopt_kernels.cpu.norm_gradients import make_deviation
from fastopt_kernels.cpu.rows import block_end, double_bits
from fastopt_kernels.cpu.vecmath import add, bits_to_double, product

_args = memory.make_row(types.int64, 13)
# Channels whose weight gradients one task adds up.
SUMMED = 64


def _make_sums(tag, codec):
    """sums(dy, x, n, high, low, scale) -> sum dy and sum dy x_hat of a segment, in float64."""
    load, load_dy, zero = codec.load, rows.Codec(codec.kind, 3).load, codec.compute(0)
    deviation = make_deviation(tag, load, codec.compute, True)

    @rows.inlined(tag)
    def sums(dy, x, n, high, low, scale):
        across, along, start = np.float64(0), np.float64(0), 0
        while start < n:
            stop = block_end(start, n)
            plain, part = zero, zero
            for i in range(start, stop):
                g = load_dy(dy, i)
                plain = add(plain, g)
                part = add(part, g * (deviation(x, i, high, low) * scale))
            across += np.float64(plain)
            along += np.float64(part)
            start = stop
        return across, along

    return sums


def _planes(tag, kind):
    codec, load_dy, store = rows.Codec(kind, 0), rows.Codec(kind, 3).load, rows.Codec(kind, 2).store
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    get_stats, put_part = rows.Codec("fp64", 1).load, rows.Codec("fp64", 4).store
    deviation, sums = make_deviation(tag, load, compute, True), _make_sums(tag, codec)
    one = compute(1)

    @rows.inlined(tag)
    def write(dy, x, dx, n, high, low, scale, w, shift, slope, factor):
        for i in range(n):
            normal = deviation(x, i, high, low) * scale
            store(dx, i, factor * ((product(load_dy(dy, i), w) - shift) - normal * slope))

    @rows.inlined(tag)
    def write_scaled(dy, dx, n, factor):
        for i in range(n):
            store(dx, i, load_dy(dy, i) * factor)

    def norm_planes_backward(args, task):
        dy, x, weight, stats, dx, parts, _, _, table, kinds, eps, given, n_task = _args(args, 0)
        (
            n_sets, inner, outer_x, inner_x, outer_y, inner_y, n_segments, segment_x, segment_y,
            length, channels, moving, _, _, _,
        ) = table_row(table, 0)  # fmt: skip
        of_weight, n = kind_at(kinds, 0), np.float64(n_segments * length)
        for k in range(task * n_task, min(task * n_task + n_task, n_sets)):
            x_set = x + (k // inner * outer_x + k % inner * inner_x) * itemsize
            at = (k // inner * outer_y + k % inner * inner_y) * itemsize
            dy_set, dx_set, first_channel = dy + at, dx + at, k % inner * channels
            mean = get_stats(stats, 2 * k)
            rstd = 1.0 / math.sqrt(get_stats(stats, 2 * k + 1) + bits_to_double(eps))
            high, scale = compute(mean), compute(rstd)
            low = compute(mean - np.float64(high))
            shift, slope = np.float64(0), np.float64(0)
            for j in range(n_segments if parts != 0 else 0):
                across, along = sums(
                    dy_set + j * segment_y * itemsize, x_set + j * segment_x * itemsize, length,
                    high, low, scale,
                )  # fmt: skip
                if moving:
                    put_part(parts, 2 * (k * n_segments + j), across)
                    put_part(parts, 2 * (k * n_segments + j) + 1, along)
                    if weight != 0:
                        w = load_any(weight, first_channel + j, of_weight)
                        across, along = across * w, along * w
                shift += across
                slope += along
            if parts != 0 and not moving:
                put_part(parts, 2 * k, shift)
                put_part(parts, 2 * k + 1, slope)
            for j in range(n_segments if dx != 0 else 0):
                w, factor = one, rstd
                if weight != 0:
                    of_channel = load_any(weight, first_channel + j * moving, of_weight)
                    if moving and not given:
                        w = compute(tidy(of_channel))
                    else:
                        factor *= of_channel
                dy_row, dx_row = dy_set + j * segment_y * itemsize, dx_set + j * segment_y * itemsize
                if given:
                    write_scaled(dy_row, dx_row, length, compute(tidy(factor)))
                else:
                    write(
                        dy_row, x_set + j * segment_x * itemsize, dx_row, length, high, low, scale,
                        w, compute(tidy(shift / n)), compute(tidy(slope / n)),
                        compute(tidy(factor)),
                    )  # fmt: skip

    return norm_planes_backward


def _sum_parts(tag):
    """dweight and dbias of SUMMED channels: parts of channel c are at c, c + channels, ..."""
    get = rows.Codec("fp64", 0).load

    def sum_parts(args, task):
        _, _, _, _, _, parts, dweight, dbias, table, kinds, _, _, _ = _args(args, 0)
        n_sets, inner, _, _, _, _, _, _, _, _, channels, _, _, _, _ = table_row(table, 0)
        n_channels = inner * channels
        for c in range(task * SUMMED, min(task * SUMMED + SUMMED, n_channels)):
            plain, along = np.float64(0), np.float64(0)
            for outer in range(n_sets // inner):
                at = 2 * (outer * n_channels + c)
                plain += get(parts, at)
                along += get(parts, at + 1)
            if dweight != 0:
                store_any(dweight, c, kind_at(kinds, 1), along)
            if dbias != 0:
                store_any(dbias, c, kind_at(kinds, 2), plain)

    return sum_parts


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    channels: Channels,
    eps: float,
    given: bool,
) -> None:
    """Fill those of dx, dweight and dbias that there are."""
    dx, dweight, dbias = outputs
    summed = dweight is not None or dbias is not None
    kinds = kinds_code(weight, dweight, dbias)
    inputs = dy.data_ptr(), x.data_ptr(), rows.address(weight), stats.data_ptr(), rows.address(dx)
    results = rows.address(dweight), rows.address(dbias)
    if channels.pixels:
        rest = kinds, double_bits(eps), int(given)
        channel_pixel_gradients.gradients(x, inputs, results, channels, rest, summed)
        return
    # Sums of dy and dy x_hat, of each set or of each of its channels.
    n_parts = 2 * channels.n_sets * (1 if channels.batch else channels.channels // channels.groups)
    parts = torch.empty(n_parts if summed or not given else 0, dtype=torch.float64)
    table = planes_table(channels)
    numbers = (*inputs, parts.data_ptr(), *results, table.ctypes.data)
    n_task = rows.rows_of(channels.per_set)
    rows.run(
        rows.task_of(_planes, rows.kind_of(x)),
        -(-channels.n_sets // n_task),
        x.numel(),
        (*numbers, kinds, double_bits(eps), int(given), n_task),
        rows.task_of(_sum_parts) if summed else None,
        -(-channels.channels // SUMMED) if summed else 0,
    )
