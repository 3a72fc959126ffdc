"""The gradients of the norms over channels where channels are neighbours in memory.

The sums of dy and dy x_hat of a block of pixels, one number a channel; over blocks those of a
channel and of a set; and block by block what is written. See `channel_norm_gradients`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import types
from torch import Tensor

from fastopt_kernels.channels import Channels
from fastopt_kernels.cpu.base import memory, streaming_stores, tasks
from fastopt_kernels.cpu.base.vector_math import bits_to_double, product
from fastopt_kernels.cpu.rows.channel_sets import kind_at, load_any, store_any, tidy
from fastopt_kernels.cpu.rows.channels_last import (
    AHEAD,
    FLUSHED,
    MERGED,
    TOGETHER,
    aligned,
    block_of,
    image_by_image,
    line_of,
    make_fold,
    pixels_table,
    sets_a_task,
    table_row,
)

_args = memory.make_row(types.int64, 13)
# Channels whose weight gradients one task adds up.
SUMMED = 16


def _make_moments_of(tag, codec):
    """moments_of(stats, k, eps) -> the mean of set k rounded, what rounding left of it in standard
    deviations, and rstd."""
    compute, get_stats = codec.compute, tasks.Codec("fp64", 1).load

    @tasks.inlined(tag)
    def moments_of(stats, k, eps):
        mean, variance = get_stats(stats, 2 * k), get_stats(stats, 2 * k + 1)
        rstd = 1.0 / math.sqrt(variance + bits_to_double(eps))
        high = compute(mean)
        return high, (mean - np.float64(high)) * rstd, rstd

    return moments_of


def _make_sums(tag, codec):
    """sums(dy, x, n, n_channels, pixels, down, vectors): totals of dy and dy x_hat of each channel
    over n pixels, x_hat = (x - high) rstd; x's are `down` bytes apart. Behind high and rstd lie two
    scratch lines and the totals."""
    load, load_dy, itemsize = codec.load, tasks.Codec(codec.kind, 3).load, codec.itemsize
    zero = codec.compute(0)
    get_high, get_scale = (tasks.Codec(codec.wide, k).load for k in (5, 7))
    of_plain, of_along = tasks.Codec(codec.wide, 8), tasks.Codec(codec.wide, 9)
    get_plain, put_plain, get_along, put_along = (
        of_plain.load, of_plain.store, of_along.load, of_along.store,
    )  # fmt: skip
    of_total, of_total_along = tasks.Codec("fp64", 10), tasks.Codec("fp64", 11)
    get_total, put_total = of_total.load, of_total.store
    get_total_along, put_total_along = of_total_along.load, of_total_along.store
    fold, fold_along = make_fold(tag, of_total), make_fold(tag, of_total_along)

    @tasks.inlined(tag)
    def flush(width, plain, along, total, total_along):
        for i in range(width):
            put_total(total, i, get_total(total, i) + np.float64(get_plain(plain, i)))
            more = get_total_along(total_along, i) + np.float64(get_along(along, i))
            put_total_along(total_along, i, more)
            put_plain(plain, i, zero)
            put_along(along, i, zero)

    @tasks.inlined(tag)
    def sums(dy, x, n, n_channels, pixels, down, vectors):
        width, lower = n_channels * pixels, down * pixels
        scale, lower_dy = vectors + 8 * width, width * itemsize
        plain, along = vectors + 16 * width, vectors + 24 * width
        total, total_along = vectors + 32 * width, vectors + 40 * width
        for i in range(width):
            put_total(total, i, np.float64(0))
            put_total_along(total_along, i, np.float64(0))
            put_plain(plain, i, zero)
            put_along(along, i, zero)
        n_lines = n // pixels
        for start in range(0, max(1, n_lines), FLUSHED):
            stop = min(start + FLUSHED, n_lines)
            last = stop == n_lines and n % pixels != 0
            together = start + (stop - start) // TOGETHER * TOGETHER
            for k in range(start, together, TOGETHER):
                x_line, dy_line = x + k * lower, dy + k * lower_dy
                tasks.fetch(x_line, AHEAD, 0, TOGETHER * width, itemsize)
                tasks.fetch(dy_line, AHEAD, 0, TOGETHER * width, itemsize)
                for i in range(width):
                    c, unit = get_high(vectors, i), get_scale(scale, i)
                    a, b = load_dy(dy_line, i), load_dy(dy_line + lower_dy, i)
                    d, e = load_dy(dy_line + 2 * lower_dy, i), load_dy(dy_line + 3 * lower_dy, i)
                    put_plain(plain, i, get_plain(plain, i) + ((a + b) + (d + e)))
                    a *= (load(x_line, i) - c) * unit
                    b *= (load(x_line + lower, i) - c) * unit
                    d *= (load(x_line + 2 * lower, i) - c) * unit
                    e *= (load(x_line + 3 * lower, i) - c) * unit
                    put_along(along, i, get_along(along, i) + ((a + b) + (d + e)))
            for k in range(together, stop + last):
                _, here = line_of(k, n, pixels)
                for i in range(here * n_channels):
                    normal = (load(x + k * lower, i) - get_high(vectors, i)) * get_scale(scale, i)
                    g = load_dy(dy + k * lower_dy, i)
                    put_plain(plain, i, get_plain(plain, i) + g)
                    put_along(along, i, get_along(along, i) + g * normal)
            flush(width, plain, along, total, total_along)
        fold(total, n_channels, width)
        fold_along(total_along, n_channels, width)

    return sums


def _pixel_sums(tag, kind):
    codec = tasks.Codec(kind, 0)
    itemsize, sums, moments_of = (
        codec.itemsize,
        _make_sums(tag, codec),
        _make_moments_of(tag, codec),
    )
    put_high, put_scale = (tasks.Codec(codec.wide, k).store for k in (5, 7))
    get, get_along = tasks.Codec("fp64", 10).load, tasks.Codec("fp64", 11).load
    put, compute, itemsize = tasks.Codec("fp64", 4).store, codec.compute, codec.itemsize

    def pixel_sums(args, task):
        dy, x, _, stats, _, partial, _, _, _, table, _, eps, _ = _args(args, 0)
        (
            _, n_channels, length, stride_image, stride, groups, batch, block, n_blocks, pixels,
        ) = table_row(table, 0)  # fmt: skip
        image, first, n = block_of(task, length, block, n_blocks)
        width, each = n_channels * pixels, n_channels // groups
        first_set = 0 if batch else image * groups
        scratch = np.empty(6 * width + 8, np.float64)
        vectors = aligned(scratch.ctypes.data)
        for i in range(n_channels):
            high, _, rstd = moments_of(stats, first_set + i // each, eps)
            for at in range(i, width, n_channels):
                put_high(vectors, at, high)
                put_scale(vectors + 8 * width, at, compute(rstd))
        x_block = x + (image * stride_image + first * stride) * itemsize
        dy_block = dy + (image * length + first) * n_channels * itemsize
        sums(dy_block, x_block, n, n_channels, pixels, stride * itemsize, vectors)
        for i in range(n_channels):
            _, left, _ = moments_of(stats, first_set + i // each, eps)
            plain = get(vectors + 32 * width, i)
            along = get_along(vectors + 40 * width, i) - plain * left
            put(partial, task * 2 * n_channels + i, plain)
            put(partial, (task * 2 + 1) * n_channels + i, along)
        tasks.alive(scratch)

    return pixel_sums


def _make_total(tag):
    """total_of(partial, c, width, first, last): the sums of a channel in blocks first to last."""
    get = tasks.Codec("fp64", 0).load

    @tasks.inlined(tag)
    def total_of(partial, c, width, first, last):
        plain, along = np.float64(0), np.float64(0)
        for q in range(first, last):
            at = q * 2 * width + c
            plain += get(partial, at)
            along += get(partial, at + width)
        return plain, along

    return total_of


def _pixel_means(tag):
    """mean(g) and mean(g x_hat) of the sets of MERGED channels."""
    put, total_of = tasks.Codec("fp64", 1).store, _make_total(tag)

    def pixel_means(args, task):
        _, _, weight, _, _, partial, means, _, _, table, kinds, _, _ = _args(args, 0)
        images, width, length, _, _, groups, batch, _, n_blocks, _ = table_row(table, 0)
        each = width // groups
        n_sets, n_task = groups if batch else images * groups, max(1, MERGED // each)
        for k in range(task * n_task, min(task * n_task + n_task, n_sets)):
            first = 0 if batch else k // groups * n_blocks
            last = images * n_blocks if batch else first + n_blocks
            across, slope = np.float64(0), np.float64(0)
            for c in range(k % groups * each, (k % groups + 1) * each):
                plain, along = total_of(partial, c, width, first, last)
                w = np.float64(1)
                if weight != 0 and each > 1:
                    w = load_any(weight, c, kind_at(kinds, 0))
                across += plain * w
                slope += along * w
            n = np.float64(each * length) * (images if batch else 1)
            put(means, 2 * k, across / n)
            put(means, 2 * k + 1, slope / n)

    return pixel_means


def _pixel_weights(tag):
    """dweight and dbias of SUMMED channels."""
    total_of = _make_total(tag)

    def pixel_weights(args, task):
        _, _, _, _, _, partial, _, dweight, dbias, table, kinds, _, _ = _args(args, 0)
        images, width, _, _, _, _, _, _, n_blocks, _ = table_row(table, 0)
        for c in range(task * SUMMED, min(task * SUMMED + SUMMED, width)):
            plain, along = total_of(partial, c, width, 0, images * n_blocks)
            if dweight != 0:
                store_any(dweight, c, kind_at(kinds, 1), along)
            if dbias != 0:
                store_any(dbias, c, kind_at(kinds, 2), plain)

    return pixel_weights


def _make_write(tag, codec):
    """write(dy, x, dx, n, width, vectors, streaming): dx of a line of n elements;
    write_scaled(dy, dx, n, factors, streaming)."""
    load, load_dy = codec.load, tasks.Codec(codec.kind, 3).load
    store, (stage, flush) = (
        tasks.Codec(codec.kind, 2).store,
        streaming_stores.make_streaming_stores(codec.itemsize),
    )
    get_high, get_w, get_shift, get_slope, get_factor = (
        tasks.Codec(codec.wide, k).load for k in (5, 8, 9, 10, 11)
    )

    @tasks.inlined(tag)
    def write(dy, x, dx, n, width, vectors, streaming):
        w, shift = vectors + 8 * width, vectors + 16 * width
        slope, factor, staging = (
            vectors + 24 * width,
            vectors + 32 * width,
            streaming_stores.staging(),
        )
        for start in range(0, n, streaming_stores.SPAN):
            stop = min(start + streaming_stores.SPAN, n)
            to = stage(dx, staging, start, streaming)
            for i in range(start, stop):
                g = product(load_dy(dy, i), get_w(w, i)) - get_shift(shift, i)
                d = g - (load(x, i) - get_high(vectors, i)) * get_slope(slope, i)
                store(to, i, get_factor(factor, i) * d)
            flush(dx, staging, start, stop, streaming)

    @tasks.inlined(tag)
    def write_scaled(dy, dx, n, factor, streaming):
        staging = streaming_stores.staging()
        for start in range(0, n, streaming_stores.SPAN):
            stop = min(start + streaming_stores.SPAN, n)
            to = stage(dx, staging, start, streaming)
            for i in range(start, stop):
                store(to, i, load_dy(dy, i) * get_factor(factor, i))
            flush(dx, staging, start, stop, streaming)

    return write, write_scaled


def _pixel_dx(tag, kind):
    codec, get_mean = tasks.Codec(kind, 0), tasks.Codec("fp64", 4).load
    itemsize, compute, moments_of = codec.itemsize, codec.compute, _make_moments_of(tag, codec)
    put_high, put_w, put_shift, put_slope, put_factor = (
        tasks.Codec(codec.wide, k).store for k in (5, 8, 9, 10, 11)
    )
    write, write_scaled = _make_write(tag, codec)

    @tasks.inlined(tag)
    def prepare(vectors, weight, stats, means, image, n_channels, width, groups, batch, numbers):
        """The vectors: mean, weight within the brackets, mean(g) and the slope of x there, and what
        is before them."""
        (kinds, eps, given), each = numbers, n_channels // groups
        for i in range(n_channels):
            k = i // each + (0 if batch else image * groups)
            high, left, factor = moments_of(stats, k, eps)
            w, shift, slope = np.float64(1), np.float64(0), np.float64(0)
            if not given:
                slope = get_mean(means, 2 * k + 1)
                shift = get_mean(means, 2 * k) - slope * left
                slope *= factor
            if weight != 0:
                w = load_any(weight, i, kind_at(kinds, 0))
            if each == 1 or given:
                factor, w = factor * w, np.float64(1)
            for at in range(i, width, n_channels):
                put_high(vectors, at, high)
                put_w(vectors + 8 * width, at, compute(tidy(w)))
                put_shift(vectors + 16 * width, at, compute(tidy(shift)))
                put_slope(vectors + 24 * width, at, compute(tidy(slope)))
                put_factor(vectors + 32 * width, at, compute(tidy(factor)))

    def pixel_dx(args, task):
        dy, x, weight, stats, dx, _, means, _, _, table, kinds, eps, given = _args(args, 0)
        (
            images, n_channels, length, stride_image, stride, groups, batch, block, n_blocks,
            pixels,
        ) = table_row(table, 0)  # fmt: skip
        image, first, n = block_of(task, length, block, n_blocks)
        width, numbers = n_channels * pixels, (kinds, eps, given)
        scratch = np.empty(5 * width + 8, np.float64)
        vectors = aligned(scratch.ctypes.data)
        streaming = streaming_stores.use_streaming_stores(images * length * n_channels * itemsize)
        prepare(vectors, weight, stats, means, image, n_channels, width, groups, batch, numbers)
        for k in range((n + pixels - 1) // pixels):
            p, here = line_of(k, n, pixels)
            at = (image * length + first + p) * n_channels * itemsize
            tasks.fetch(dy + at, AHEAD, 0, width, itemsize)
            if given:
                write_scaled(dy + at, dx + at, here * n_channels, vectors + 32 * width, streaming)
            else:
                x_line = x + (image * stride_image + (first + p) * stride) * itemsize
                tasks.fetch(x_line, AHEAD, 0, width, itemsize)
                write(dy + at, x_line, dx + at, here * n_channels, width, vectors, streaming)
        streaming_stores.fence(streaming)
        tasks.alive(scratch)

    return pixel_dx


def gradients(
    x: Tensor,
    inputs: tuple[int, ...],
    results: tuple[int, int],
    channels: Channels,
    rest: tuple[int, int, int],
    summed: bool,
) -> None:
    """inputs: addresses of dy, x, weight, stats and dx; results: of dweight and dbias; rest: kinds,
    eps, given; summed: whether any of the results is wanted"""
    table, kind, n, given = pixels_table(channels), tasks.kind_of(x), x.numel(), rest[-1]
    n_blocks, needed = channels.images * table.numbers[8], summed or not given
    # Sums of dy and dy x_hat of each channel in each block; their means over each set.
    partial = torch.empty(
        2 * n_blocks * channels.channels if needed else 0, dtype=torch.float64, device=tasks.CPU
    )
    means = torch.empty(2 * channels.n_sets, dtype=torch.float64, device=tasks.CPU)
    numbers = (*inputs, partial.data_ptr(), means.data_ptr(), *results, table.address, *rest)
    sums, means_of = tasks.task_of(_pixel_sums, kind), tasks.task_of(_pixel_means)
    dx, weights = tasks.task_of(_pixel_dx, kind), tasks.task_of(_pixel_weights)
    n_dx, n_means = n_blocks if inputs[-1] else 0, -(-channels.n_sets // sets_a_task(channels))
    n_weights = -(-channels.channels // SUMMED) if summed else 0
    if needed and n_dx and image_by_image(channels):
        each = n_blocks // channels.images
        stages = (sums, each), (means_of, n_means // channels.images), (dx, each)
        tasks.run_groups(stages, channels.images, n, numbers)
        n_dx = 0
    elif needed:
        tasks.run(sums, n_blocks, n, numbers, means_of, n_means)
    if n_dx or n_weights:
        tasks.run(dx, n_dx, n, numbers, weights, n_weights)
