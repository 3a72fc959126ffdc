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
from fastopt_kernels.cpu.channel_pixels import FLUSHED, MERGED, block_of, pixels_table, table_row
from fastopt_kernels.cpu.channel_sets import kind_at, load_any, store_any, tidy
from fastopt_kernels.cpu.vecmath import bits_to_double, product

_args = memory.make_row(types.int64, 13)
# Lines walked together, so that the sums are read and written once for four.
TOGETHER = 4
# Channels whose weight gradients one task adds up.
SUMMED = 16


def _make_prepare(tag, codec):
    """prepare(vectors, stats, image, width, groups, batch, eps): mean in two parts and rstd of
    every channel of an image."""
    compute, get_stats = codec.compute, rows.Codec("fp64", 1).load
    put_high, put_low, put_scale = (rows.Codec(codec.wide, k).store for k in (5, 6, 7))

    @rows.inlined(tag)
    def prepare(vectors, stats, image, width, groups, batch, eps):
        for i in range(width):
            k = i // (width // groups) + (0 if batch else image * groups)
            mean, variance = get_stats(stats, 2 * k), get_stats(stats, 2 * k + 1)
            high = compute(mean)
            put_high(vectors, i, high)
            put_low(vectors + 8 * width, i, compute(mean - np.float64(high)))
            rstd = 1.0 / math.sqrt(variance + bits_to_double(eps))
            put_scale(vectors + 16 * width, i, compute(rstd))

    return prepare


def _make_sums(tag, codec):
    """sums(dy, x, n, width, down, vectors, parts, totals): totals of dy and dy x_hat of each
    channel over n lines; x's are `down` bytes apart."""
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

    @rows.inlined(tag)
    def flush(width, plain, along, total, total_along):
        for i in range(width):
            put_total(total, i, get_total(total, i) + np.float64(get_plain(plain, i)))
            more = get_total_along(total_along, i) + np.float64(get_along(along, i))
            put_total_along(total_along, i, more)
            put_plain(plain, i, zero)
            put_along(along, i, zero)

    @rows.inlined(tag)
    def sums(dy, x, n, width, down, vectors, plain, total):
        low, scale = vectors + 8 * width, vectors + 16 * width
        along, total_along, down_dy = plain + 8 * width, total + 8 * width, width * itemsize
        for i in range(width):
            put_total(total, i, np.float64(0))
            put_total_along(total_along, i, np.float64(0))
            put_plain(plain, i, zero)
            put_along(along, i, zero)
        for start in range(0, n, FLUSHED):
            stop = min(start + FLUSHED, n)
            together = (stop - start) // TOGETHER
            for k in range(together):
                p = start + k * TOGETHER
                x0, dy0 = x + p * down, dy + p * down_dy
                for i in range(width):
                    h, l, s = get_high(vectors, i), get_low(low, i), get_scale(scale, i)
                    n0, n1 = (load(x0, i) - h) - l, (load(x0 + down, i) - h) - l
                    n2, n3 = (load(x0 + 2 * down, i) - h) - l, (load(x0 + 3 * down, i) - h) - l
                    g0, g1 = load_dy(dy0, i), load_dy(dy0 + down_dy, i)
                    g2, g3 = load_dy(dy0 + 2 * down_dy, i), load_dy(dy0 + 3 * down_dy, i)
                    put_plain(plain, i, get_plain(plain, i) + ((g0 + g1) + (g2 + g3)))
                    more = (g0 * (n0 * s) + g1 * (n1 * s)) + (g2 * (n2 * s) + g3 * (n3 * s))
                    put_along(along, i, get_along(along, i) + more)
            for p in range(start + together * TOGETHER, stop):
                for i in range(width):
                    normal = (load(x + p * down, i) - get_high(vectors, i)) - get_low(low, i)
                    g = load_dy(dy + p * down_dy, i)
                    put_plain(plain, i, get_plain(plain, i) + g)
                    put_along(along, i, get_along(along, i) + g * (normal * get_scale(scale, i)))
            flush(width, plain, along, total, total_along)

    return sums


def _pixel_sums(tag, kind):
    codec = rows.Codec(kind, 0)
    itemsize, prepare, sums = codec.itemsize, _make_prepare(tag, codec), _make_sums(tag, codec)

    def pixel_sums(args, task):
        dy, x, _, stats, _, partial, _, _, _, table, _, eps, _ = _args(args, 0)
        _, width, length, stride_image, stride, groups, batch, block, n_blocks = table_row(table, 0)
        image, first, n = block_of(task, length, block, n_blocks)
        scratch = np.empty(5 * width, np.float64)
        vectors = scratch.ctypes.data
        prepare(vectors, stats, image, width, groups, batch, eps)
        x_block = x + (image * stride_image + first * stride) * itemsize
        dy_block = dy + (image * length + first) * width * itemsize
        total = partial + task * width * 16
        sums(
            dy_block, x_block, n, width, stride * itemsize, vectors, vectors + 24 * width, total
        )  # fmt: skip
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
        images, width, length, _, _, groups, batch, _, n_blocks = table_row(table, 0)
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
    """write(dy, x, dx, width, vectors): dx of a line; write_scaled(dy, dx, width, factors)."""
    load, load_dy = codec.load, rows.Codec(codec.kind, 3).load
    store = rows.Codec(codec.kind, 2).store
    get_high, get_low, get_scale, get_w, get_shift, get_slope, get_factor = (
        rows.Codec(codec.wide, k).load for k in (5, 6, 7, 8, 9, 10, 11)
    )

    @rows.inlined(tag)
    def write(dy, x, dx, width, vectors):
        step = 8 * width
        low, scale, w, shift = vectors + step, vectors + 2 * step, vectors + 3 * step, 4 * step
        shift, slope, factor = vectors + shift, vectors + 5 * step, vectors + 6 * step
        for i in range(width):
            normal = ((load(x, i) - get_high(vectors, i)) - get_low(low, i)) * get_scale(scale, i)
            g = product(load_dy(dy, i), get_w(w, i)) - get_shift(shift, i)
            store(dx, i, get_factor(factor, i) * (g - normal * get_slope(slope, i)))

    @rows.inlined(tag)
    def write_scaled(dy, dx, width, factor):
        for i in range(width):
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
    def finish(vectors, weight, stats, means, image, width, groups, batch, kinds, eps, given):
        """The other vectors: weight within the brackets, means, and what is before them."""
        each = width // groups
        for i in range(width):
            k = i // each + (0 if batch else image * groups)
            w, factor = np.float64(1), get_stats(stats, 2 * k + 1) + bits_to_double(eps)
            factor = 1.0 / math.sqrt(factor)
            if weight != 0:
                w = load_any(weight, i, kind_at(kinds, 0))
            if each == 1 or given:
                factor, w = factor * w, np.float64(1)
            put_w(vectors + 24 * width, i, compute(tidy(w)))
            put_factor(vectors + 48 * width, i, compute(tidy(factor)))
            if not given:
                put_shift(vectors + 32 * width, i, compute(tidy(get_mean(means, 2 * k))))
                put_slope(vectors + 40 * width, i, compute(tidy(get_mean(means, 2 * k + 1))))

    def pixel_dx(args, task):
        dy, x, weight, stats, dx, _, means, _, _, table, kinds, eps, given = _args(args, 0)
        _, width, length, stride_image, stride, groups, batch, block, n_blocks = table_row(table, 0)
        image, first, n = block_of(task, length, block, n_blocks)
        scratch = np.empty(7 * width, np.float64)
        vectors = scratch.ctypes.data
        prepare(vectors, stats, image, width, groups, batch, eps)
        finish(vectors, weight, stats, means, image, width, groups, batch, kinds, eps, given)
        for p in range(first, first + n):
            at = (image * length + p) * width * itemsize
            if given:
                write_scaled(dy + at, dx + at, width, vectors + 48 * width)
            else:
                x_line = x + (image * stride_image + p * stride) * itemsize
                write(dy + at, x_line, dx + at, width, vectors)
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
    n_blocks, needed = channels.images * int(table[-1]), summed or not given
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
