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
from fastopt_kernels.cpu import memory, rows
from fastopt_kernels.cpu.channel_pixels import (
    AHEAD,
    FLUSHED,
    MERGED,
    aligned,
    block_of,
    line_of,
    make_fold,
    pixels_table,
    table_row,
)
from fastopt_kernels.cpu.channel_sets import kind_at, load_any, store_any, tidy
from fastopt_kernels.cpu.vecmath import bits_to_double, product

_args = memory.make_row(types.int64, 13)
# Channels whose weight gradients one task adds up.
SUMMED = 16


def _make_prepare(tag, codec):
    """prepare(vectors, stats, image, n_channels, width, groups, batch, eps): mean in two parts and
    rstd of every channel of an image."""
    compute, get_stats = codec.compute, rows.Codec("fp64", 1).load
    put_high, put_low, put_scale = (rows.Codec(codec.wide, k).store for k in (5, 6, 7))

    @rows.inlined(tag)
    def prepare(vectors, stats, image, n_channels, width, groups, batch, eps):
        for i in range(n_channels):
            k = i // (n_channels // groups) + (0 if batch else image * groups)
            mean, variance = get_stats(stats, 2 * k), get_stats(stats, 2 * k + 1)
            rstd = compute(1.0 / math.sqrt(variance + bits_to_double(eps)))
            high = compute(mean)
            low = compute(mean - np.float64(high))
            for at in range(i, width, n_channels):
                put_high(vectors, at, high)
                put_low(vectors + 8 * width, at, low)
                put_scale(vectors + 16 * width, at, rstd)

    return prepare


def _make_sums(tag, codec):
    """sums(dy, x, n, n_channels, pixels, down, vectors): totals of dy and dy x_hat of each channel
    over n pixels; x's are `down` bytes apart. Behind the three vectors lie two scratch lines and
    the totals."""
    load, load_dy, itemsize = codec.load, rows.Codec(codec.kind, 3).load, codec.itemsize
    zero = codec.compute(0)
    get_high, get_low, get_scale = (rows.Codec(codec.wide, k).load for k in (5, 6, 7))
    of_plain, of_along = rows.Codec(codec.wide, 8), rows.Codec(codec.wide, 9)
    get_plain, put_plain, get_along, put_along = (
        of_plain.load, of_plain.store, of_along.load, of_along.store,
    )  # fmt: skip
    of_total, of_total_along = rows.Codec("fp64", 10), rows.Codec("fp64", 11)
    get_total, put_total = of_total.load, of_total.store
    get_total_along, put_total_along = of_total_along.load, of_total_along.store
    fold, fold_along = make_fold(tag, of_total), make_fold(tag, of_total_along)

    @rows.inlined(tag)
    def flush(width, plain, along, total, total_along):
        for i in range(width):
            put_total(total, i, get_total(total, i) + np.float64(get_plain(plain, i)))
            more = get_total_along(total_along, i) + np.float64(get_along(along, i))
            put_total_along(total_along, i, more)
            put_plain(plain, i, zero)
            put_along(along, i, zero)

    @rows.inlined(tag)
    def sums(dy, x, n, n_channels, pixels, down, vectors):
        width, lower = n_channels * pixels, down * pixels
        low, scale = vectors + 8 * width, vectors + 16 * width
        plain, along = vectors + 24 * width, vectors + 32 * width
        total, total_along, lower_dy = vectors + 40 * width, vectors + 48 * width, width * itemsize
        for i in range(width):
            put_total(total, i, np.float64(0))
            put_total_along(total_along, i, np.float64(0))
            put_plain(plain, i, zero)
            put_along(along, i, zero)
        n_lines = n // pixels
        for start in range(0, max(1, n_lines), FLUSHED):
            stop = min(start + FLUSHED, n_lines)
            last = stop == n_lines and n % pixels != 0
            for k in range(start, stop + last):
                _, here = line_of(k, n, pixels)
                rows.fetch(x + k * lower, AHEAD, 0, width, itemsize)
                rows.fetch(dy + k * lower_dy, AHEAD, 0, width, itemsize)
                for i in range(here * n_channels):
                    normal = (load(x + k * lower, i) - get_high(vectors, i)) - get_low(low, i)
                    g = load_dy(dy + k * lower_dy, i)
                    put_plain(plain, i, get_plain(plain, i) + g)
                    put_along(along, i, get_along(along, i) + g * (normal * get_scale(scale, i)))
            flush(width, plain, along, total, total_along)
        fold(total, n_channels, width)
        fold_along(total_along, n_channels, width)

    return sums


def _pixel_sums(tag, kind):
    codec = rows.Codec(kind, 0)
    itemsize, prepare, sums = codec.itemsize, _make_prepare(tag, codec), _make_sums(tag, codec)
    get, get_along = rows.Codec("fp64", 10).load, rows.Codec("fp64", 11).load
    put = rows.Codec("fp64", 4).store

    def pixel_sums(args, task):
        dy, x, _, stats, _, partial, _, _, _, table, _, eps, _ = _args(args, 0)
        (
            _, n_channels, length, stride_image, stride, groups, batch, block, n_blocks, pixels,
        ) = table_row(table, 0)  # fmt: skip
        image, first, n = block_of(task, length, block, n_blocks)
        width = n_channels * pixels
        scratch = np.empty(7 * width + 8, np.float64)
        vectors = aligned(scratch.ctypes.data)
        prepare(vectors, stats, image, n_channels, width, groups, batch, eps)
        x_block = x + (image * stride_image + first * stride) * itemsize
        dy_block = dy + (image * length + first) * n_channels * itemsize
        sums(dy_block, x_block, n, n_channels, pixels, stride * itemsize, vectors)
        for i in range(n_channels):
            put(partial, task * 2 * n_channels + i, get(vectors + 40 * width, i))
            put(partial, (task * 2 + 1) * n_channels + i, get_along(vectors + 48 * width, i))
        rows.alive(scratch)

    return pixel_sums


def _pixel_totals(tag):
    """The first tasks: mean(g) and mean(g x_hat) of the sets of MERGED channels each; those after
    them: dweight and dbias of SUMMED channels."""
    get, put = rows.Codec("fp64", 0).load, rows.Codec("fp64", 1).store

    @rows.inlined(tag)
    def total_of(partial, c, width, first, last):
        plain, along = np.float64(0), np.float64(0)
        for q in range(first, last):
            at = q * 2 * width + c
            plain += get(partial, at)
            along += get(partial, at + width)
        return plain, along

    def pixel_totals(args, task):
        _, _, weight, _, _, partial, means, dweight, dbias, table, kinds, _, _ = _args(args, 0)
        images, width, length, _, _, groups, batch, _, n_blocks, _ = table_row(table, 0)
        each = width // groups
        n_sets, n_task = groups if batch else images * groups, max(1, MERGED // each)
        set_tasks = (n_sets + n_task - 1) // n_task
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
        channel = (task - set_tasks) * SUMMED
        for c in range(channel if channel >= 0 else width, min(channel + SUMMED, width)):
            plain, along = total_of(partial, c, width, 0, images * n_blocks)
            if dweight != 0:
                store_any(dweight, c, kind_at(kinds, 1), along)
            if dbias != 0:
                store_any(dbias, c, kind_at(kinds, 2), plain)

    return pixel_totals


def _make_write(tag, codec):
    """write(dy, x, dx, n, width, vectors): dx of a line of n elements; write_scaled(dy, dx, n,
    factors)."""
    load, load_dy = codec.load, rows.Codec(codec.kind, 3).load
    store = rows.Codec(codec.kind, 2).store
    get_high, get_low, get_scale, get_w, get_shift, get_slope, get_factor = (
        rows.Codec(codec.wide, k).load for k in (5, 6, 7, 8, 9, 10, 11)
    )

    @rows.inlined(tag)
    def write(dy, x, dx, n, width, vectors):
        step = 8 * width
        low, scale, w = vectors + step, vectors + 2 * step, vectors + 3 * step
        shift, slope, factor = vectors + 4 * step, vectors + 5 * step, vectors + 6 * step
        for i in range(n):
            normal = ((load(x, i) - get_high(vectors, i)) - get_low(low, i)) * get_scale(scale, i)
            g = product(load_dy(dy, i), get_w(w, i)) - get_shift(shift, i)
            store(dx, i, get_factor(factor, i) * (g - normal * get_slope(slope, i)))

    @rows.inlined(tag)
    def write_scaled(dy, dx, n, factor):
        for i in range(n):
            store(dx, i, load_dy(dy, i) * get_factor(factor, i))

    return write, write_scaled


def _pixel_dx(tag, kind):
    codec = rows.Codec(kind, 0)
    itemsize, compute, get_stats = codec.itemsize, codec.compute, rows.Codec("fp64", 1).load
    get_mean = rows.Codec("fp64", 4).load
    put_w, put_shift, put_slope, put_factor = (
        rows.Codec(codec.wide, k).store for k in (8, 9, 10, 11)
    )
    prepare, (write, write_scaled) = _make_prepare(tag, codec), _make_write(tag, codec)

    @rows.inlined(tag)
    def finish(vectors, weight, stats, means, image, n_channels, width, groups, batch, numbers):
        """The other vectors: weight within the brackets, means, and what is before them."""
        (kinds, eps, given), each = numbers, n_channels // groups
        for i in range(n_channels):
            k = i // each + (0 if batch else image * groups)
            factor = 1.0 / math.sqrt(get_stats(stats, 2 * k + 1) + bits_to_double(eps))
            w, shift, slope = np.float64(1), np.float64(0), np.float64(0)
            if weight != 0:
                w = load_any(weight, i, kind_at(kinds, 0))
            if each == 1 or given:
                factor, w = factor * w, np.float64(1)
            if not given:
                shift, slope = get_mean(means, 2 * k), get_mean(means, 2 * k + 1)
            for at in range(i, width, n_channels):
                put_w(vectors + 24 * width, at, compute(tidy(w)))
                put_shift(vectors + 32 * width, at, compute(tidy(shift)))
                put_slope(vectors + 40 * width, at, compute(tidy(slope)))
                put_factor(vectors + 48 * width, at, compute(tidy(factor)))

    def pixel_dx(args, task):
        dy, x, weight, stats, dx, _, means, _, _, table, kinds, eps, given = _args(args, 0)
        (
            _, n_channels, length, stride_image, stride, groups, batch, block, n_blocks, pixels,
        ) = table_row(table, 0)  # fmt: skip
        image, first, n = block_of(task, length, block, n_blocks)
        width, numbers = n_channels * pixels, (kinds, eps, given)
        scratch = np.empty(7 * width + 8, np.float64)
        vectors = aligned(scratch.ctypes.data)
        prepare(vectors, stats, image, n_channels, width, groups, batch, eps)
        finish(vectors, weight, stats, means, image, n_channels, width, groups, batch, numbers)
        for k in range((n + pixels - 1) // pixels):
            p, here = line_of(k, n, pixels)
            at = (image * length + first + p) * n_channels * itemsize
            rows.fetch(dy + at, AHEAD, 0, width, itemsize)
            if given:
                write_scaled(dy + at, dx + at, here * n_channels, vectors + 48 * width)
            else:
                x_line = x + (image * stride_image + (first + p) * stride) * itemsize
                rows.fetch(x_line, AHEAD, 0, width, itemsize)
                write(dy + at, x_line, dx + at, here * n_channels, width, vectors)
        rows.alive(scratch)

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
    table, kind, n, given = pixels_table(channels), rows.kind_of(x), x.numel(), rest[-1]
    n_blocks, needed = channels.images * int(table[8]), summed or not given
    # Sums of dy and dy x_hat of each channel in each block; their means over each set.
    partial = torch.empty(2 * n_blocks * channels.channels if needed else 0, dtype=torch.float64)
    means = torch.empty(2 * channels.n_sets, dtype=torch.float64)
    numbers = (*inputs, partial.data_ptr(), means.data_ptr(), *results, table.ctypes.data, *rest)
    if needed:
        n_task = max(1, MERGED // (channels.channels // channels.groups))
        n_last = -(-channels.n_sets // n_task)
        n_last += -(-channels.channels // SUMMED) if summed else 0
        last = rows.task_of(_pixel_totals)
        rows.run(rows.task_of(_pixel_sums, kind), n_blocks, n, numbers, last, n_last)
    if inputs[-1]:
        rows.run(rows.task_of(_pixel_dx, kind), n_blocks, n, numbers)
