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
from fastopt_kernels.cpu.base import memory, streaming_stores, tasks
from fastopt_kernels.cpu.base.tasks import block_end, double_bits
from fastopt_kernels.cpu.base.vector_math import add, bits_to_double, product
from fastopt_kernels.cpu.rows import channels_last_gradients
from fastopt_kernels.cpu.rows.channel_sets import (
    kind_at,
    kinds_code,
    load_any,
    planes_table,
    segments_of,
    size_of,
    store_any,
    table_row,
    tidy,
)

_args = memory.make_row(types.int64, 14)
# Channels whose weight gradients one task adds up.
SUMMED = 64


def _make_sums(tag, codec):
    """sums(dy, x, n, high, low, scale) -> sum dy and sum dy x_hat of a segment, in float64.

    x_hat = (x - high) scale - low
    """
    load, load_dy, zero = codec.load, tasks.Codec(codec.kind, 3).load, codec.compute(0)

    @tasks.inlined(tag)
    def sums(dy, x, n, high, low, scale):
        across, along, start = np.float64(0), np.float64(0), 0
        while start < n:
            stop = block_end(start, n)
            plain, part = zero, zero
            for i in range(start, stop):
                g = load_dy(dy, i)
                plain = add(plain, g)
                part = add(part, g * ((load(x, i) - high) * scale))
            across += np.float64(plain)
            along += np.float64(part)
            start = stop
        return across, along - across * low

    return sums


def _planes(tag, kind):
    codec, load_dy, store = (
        tasks.Codec(kind, 0),
        tasks.Codec(kind, 3).load,
        tasks.Codec(kind, 2).store,
    )
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    get_stats, put_part = tasks.Codec("fp64", 1).load, tasks.Codec("fp64", 4).store
    get_mean = tasks.Codec("fp64", 5).load
    sums, one, (stage, flush) = (
        _make_sums(tag, codec),
        compute(1),
        streaming_stores.make_streaming_stores(itemsize),
    )

    @tasks.inlined(tag)
    def write(dy, x, dx, n, streaming, high, w, shift, slope, factor):
        staging = streaming_stores.staging()
        for start in range(0, n, streaming_stores.SPAN):
            stop = min(start + streaming_stores.SPAN, n)
            to = stage(dx, staging, start, streaming)
            for i in range(start, stop):
                g = product(load_dy(dy, i), w) - shift
                store(to, i, factor * (g - (load(x, i) - high) * slope))
            flush(dx, staging, start, stop, streaming)

    @tasks.inlined(tag)
    def write_scaled(dy, dx, n, streaming, factor):
        staging = streaming_stores.staging()
        for start in range(0, n, streaming_stores.SPAN):
            stop = min(start + streaming_stores.SPAN, n)
            to = stage(dx, staging, start, streaming)
            for i in range(start, stop):
                store(to, i, load_dy(dy, i) * factor)
            flush(dx, staging, start, stop, streaming)

    @tasks.inlined(tag)
    def lot_sums(dy, x, n_segments, segment_y, segment_x, n, high, low, scale, weight, kind, parts):
        """Sums of g and g x_hat of a lot; parts: where those of its channels go, if it has some;
        weight: address of theirs"""
        across, along = np.float64(0), np.float64(0)
        for j in range(n_segments):
            dy_row, x_row = dy + j * segment_y * itemsize, x + j * segment_x * itemsize
            plain, slope = sums(dy_row, x_row, n, high, low, scale)
            if parts != 0:
                put_part(parts, 2 * j, plain)
                put_part(parts, 2 * j + 1, slope)
                if weight != 0:
                    w = load_any(weight, j, kind)
                    plain, slope = plain * w, slope * w
            across += plain
            along += slope
        return across, along

    def norm_planes_backward(args, task):
        (
            dy, x, weight, stats, dx, parts, _, _, table, kinds, eps, given, means, n_task,
        ) = _args(args, 0)  # fmt: skip
        (
            n_lots, inner, outer_x, inner_x, outer_y, inner_y, n_all, segment_x, segment_y, n_total,
            length, channels, moving, _,
        ) = table_row(table, 0)  # fmt: skip
        of_weight, of_channels = kind_at(kinds, 0), kind_at(kinds, 3)
        streaming = streaming_stores.use_streaming_stores(n_total * inner * length * itemsize)
        for k in range(task * n_task, min(task * n_task + n_task, n_lots)):
            x_lot = x + (k // inner * outer_x + k % inner * inner_x) * itemsize
            at = (k // inner * outer_y + k % inner * inner_y) * itemsize
            dy_lot, dx_lot, first_channel = dy + at, dx + at, k % inner * channels
            n_segments, one_set = segments_of(k, inner, n_all, n_total), k
            if of_channels:
                one_set = first_channel
            mean = get_stats(stats, 2 * one_set)
            rstd = 1.0 / math.sqrt(get_stats(stats, 2 * one_set + 1) + bits_to_double(eps))
            high, scale = compute(mean), compute(rstd)
            low = (mean - np.float64(high)) * rstd
            shift, slope, n = np.float64(0), np.float64(0), np.float64(n_segments * length)
            if parts != 0:
                shift, slope = lot_sums(
                    dy_lot, x_lot, n_segments, segment_y, segment_x, length, high, low, scale,
                    weight + first_channel * size_of(of_weight) if weight != 0 else 0, of_weight,
                    parts + 16 * k * n_segments if moving else 0,
                )  # fmt: skip
                if not moving:
                    put_part(parts, 2 * k, shift)
                    put_part(parts, 2 * k + 1, slope)
                shift, slope = shift / n, slope / n
            elif means != 0:
                shift, slope = (
                    get_mean(means, 2 * first_channel),
                    get_mean(means, 2 * first_channel + 1),
                )
            for j in range(n_segments if dx != 0 else 0):
                w, factor = one, rstd
                if weight != 0:
                    of_channel = load_any(weight, first_channel + j * moving, of_weight)
                    if moving and not given:
                        w = compute(tidy(of_channel))
                    else:
                        factor *= of_channel
                dy_row = dy_lot + j * segment_y * itemsize
                dx_row = dx_lot + j * segment_y * itemsize
                if given:
                    write_scaled(dy_row, dx_row, length, streaming, compute(tidy(factor)))
                else:
                    write(
                        dy_row, x_lot + j * segment_x * itemsize, dx_row, length, streaming,
                        high, w,
                        compute(tidy(shift - slope * low)), compute(tidy(slope * rstd)),
                        compute(tidy(factor)),
                    )  # fmt: skip
        streaming_stores.fence(streaming)

    return norm_planes_backward


def _sum_parts(tag):
    """dweight and dbias of SUMMED channels, and the means where a channel is a set: parts of
    channel c are at c, c + channels, ..."""
    get, put = tasks.Codec("fp64", 0).load, tasks.Codec("fp64", 1).store

    def sum_parts(args, task):
        _, _, _, _, _, parts, dweight, dbias, table, kinds, _, _, means, _ = _args(args, 0)
        n_lots, inner, _, _, _, _, _, _, _, n_total, length, channels, _, _ = table_row(table, 0)
        n_channels = inner * channels
        for c in range(task * SUMMED, min(task * SUMMED + SUMMED, n_channels)):
            plain, along = np.float64(0), np.float64(0)
            for outer in range(n_lots // inner):
                at = 2 * (outer * n_channels + c)
                plain += get(parts, at)
                along += get(parts, at + 1)
            if dweight != 0:
                store_any(dweight, c, kind_at(kinds, 1), along)
            if dbias != 0:
                store_any(dbias, c, kind_at(kinds, 2), plain)
            if means != 0:
                put(means, 2 * c, plain / np.float64(n_total * length))
                put(means, 2 * c + 1, along / np.float64(n_total * length))

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
    kinds, batch = kinds_code(weight, dweight, dbias) | channels.batch << 6, channels.batch
    inputs = dy.data_ptr(), x.data_ptr(), tasks.address(weight), stats.data_ptr()
    results = tasks.address(dweight), tasks.address(dbias)
    rest = kinds, double_bits(eps), int(given)
    if channels.pixels:
        inputs = (*inputs, tasks.address(dx))
        channels_last_gradients.gradients(x, inputs, results, channels, rest, summed)
        return
    table, task = planes_table(channels), tasks.task_of(_planes, tasks.kind_of(x))
    n_lots, per_lot = table.numbers[0], table.numbers[6]
    # Sums of dy and dy x_hat of each lot, or of each of its channels; means, where it is no set.
    parts = torch.empty(
        2 * n_lots * (1 if batch else per_lot), dtype=torch.float64, device=tasks.CPU
    )
    means = torch.empty(
        2 * channels.channels if batch else 0, dtype=torch.float64, device=tasks.CPU
    )
    n_task = tasks.rows_of(per_lot * channels.length)
    n_tasks, n, rest = -(-n_lots // n_task), x.numel(), (table.address, *rest)
    tail, now = (*results, *rest, means.data_ptr(), n_task), 0 if batch else tasks.address(dx)
    if summed or not given:
        last, n_last = tasks.task_of(_sum_parts), -(-channels.channels // SUMMED)
        numbers = (*inputs, now, parts.data_ptr(), *tail)
        tasks.run(task, n_tasks, n, numbers, last, n_last if summed or batch else 0)
    if batch and dx is not None:
        tasks.run(task, n_tasks, n, (*inputs, tasks.address(dx), 0, *tail))
