"""The norms over channels where channels are neighbours in memory (channels_last), forward.

Lines of channels are walked as they lie, and everything is kept one number a channel: in a block
of pixels the moments about a mean of the block's own, over blocks their merger for each set, and
block by block what is written. Where channels are few a line is several pixels, and a column one of
their channels: a loop over 64 elements is half overhead.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from fastopt_kernels.channels import Channels
from fastopt_kernels.cpu.base import memory, streaming_stores, tasks
from fastopt_kernels.cpu.base.vector_math import bits_to_double
from fastopt_kernels.cpu.base.xp import JIT
from fastopt_kernels.cpu.rows.channel_sets import (
    Table,
    kind_at,
    load_any,
    merge,
    move,
    off,
    poor,
    tidy,
)

_args = memory.make_row(types.int64, 14)
# Elements of a block: it stays in L2 for a second look, and few blocks need merging.
BLOCK = 65536
# Lines a block begins with, whose mean is the center of its moments.
PIVOT = 8
# Lines summed in the compute type before they are added in float64, and at a time: sums so far are
# read and written once for them all.
FLUSHED, TOGETHER = 32, 4
# Channels' worth of sets that one task merges.
MERGED = 32
# Bytes to fetch ahead.
AHEAD = 4096
# Columns of a line of several pixels, at most.
WIDTH = 256

# images, channels, length, stride_image, stride_element, groups, batch, pixels of a block, blocks
# of an image, pixels of a line
table_row = memory.make_row(types.int64, 10)


@lru_cache(maxsize=512)
def pixels_table(c: Channels) -> Table:
    """The numbers of `table_row` for a geometry."""
    pixels = max(1, WIDTH // c.channels) if c.stride_element == c.channels else 1
    n_blocks = -(-c.length // max(1, BLOCK // c.channels))
    block = -(-c.length // n_blocks)
    block = min(c.length, block + -block % pixels)
    n_blocks = -(-c.length // block)
    return Table.of((*c[:4], c.stride_element, c.groups, int(c.batch), block, n_blocks, pixels))


def sets_a_task(c: Channels) -> int:
    """The number of sets that one task merges."""
    return max(1, MERGED // (c.channels // c.groups))


def image_by_image(c: Channels) -> bool:
    """True where each image is read, merged and written before the next: it is in cache still."""
    return not c.batch and c.groups % sets_a_task(c) == 0 and tasks.grouped(c.images)


@njit(**JIT)
def block_of(task, length, block, n_blocks):
    """(image, first pixel, pixels) of a block."""
    first = task % n_blocks * block
    return task // n_blocks, first, min(block, length - first)


@njit(**JIT)
def line_of(k, n, pixels):
    """(first pixel, pixels) of line k of n pixels."""
    return k * pixels, min(pixels, n - k * pixels)


@njit(**JIT)
def aligned(address):
    """The next whole line of the cache: a vector across two takes twice as long."""
    return (address + 63) & ~63


def make_fold(tag, of_total):
    """fold(totals, n_channels, width): add the columns of a channel up in its first."""
    get, put = of_total.load, of_total.store

    @tasks.inlined(tag)
    def fold(totals, n_channels, width):
        for start in range(n_channels, width, n_channels):
            for i in range(n_channels):
                put(totals, i, get(totals, i) + get(totals, start + i))

    return fold


def _make_moments(tag, codec):
    """moments(x, n, n_channels, pixels, down, center): totals of x - center and of its square for
    each channel, over n pixels that are `down` bytes apart; center, totals, totals of squares, and
    two scratch lines lie behind each other."""
    load, itemsize, zero = codec.load, codec.itemsize, codec.compute(0)
    of_center = tasks.Codec(codec.wide, 1)
    of_part, of_square = tasks.Codec(codec.wide, 2), tasks.Codec(codec.wide, 3)
    of_total, of_squares = tasks.Codec("fp64", 4), tasks.Codec("fp64", 5)
    get_center = of_center.load
    get, put, get_square, put_square = of_part.load, of_part.store, of_square.load, of_square.store
    get_total, put_total = of_total.load, of_total.store
    get_squares, put_squares = of_squares.load, of_squares.store
    fold, fold_squares = make_fold(tag, of_total), make_fold(tag, of_squares)

    @tasks.inlined(tag)
    def moments(x, n, n_channels, pixels, down, center):
        width, lower = n_channels * pixels, down * pixels
        totals, total_squares = center + 8 * width, center + 16 * width
        parts, squares = center + 24 * width, center + 32 * width
        for i in range(width):
            put_total(totals, i, np.float64(0))
            put_squares(total_squares, i, np.float64(0))
            put(parts, i, zero)
            put_square(squares, i, zero)
        n_lines = n // pixels
        for start in range(0, max(1, n_lines), FLUSHED):
            stop = min(start + FLUSHED, n_lines)
            last = stop == n_lines and n % pixels != 0
            together = start + (stop - start) // TOGETHER * TOGETHER
            for k in range(start, together, TOGETHER):
                line = x + k * lower
                tasks.fetch(line, AHEAD, 0, TOGETHER * width, itemsize)
                for i in range(width):
                    c = get_center(center, i)
                    a, b = load(line, i) - c, load(line + lower, i) - c
                    d, e = load(line + 2 * lower, i) - c, load(line + 3 * lower, i) - c
                    put(parts, i, get(parts, i) + ((a + b) + (d + e)))
                    put_square(squares, i, get_square(squares, i) + (a * a + b * b + d * d + e * e))
            for k in range(together, stop + last):
                _, here = line_of(k, n, pixels)
                for i in range(here * n_channels):
                    a = load(x + k * lower, i) - get_center(center, i)
                    put(parts, i, get(parts, i) + a)
                    put_square(squares, i, get_square(squares, i) + a * a)
            for i in range(width):
                put_total(totals, i, get_total(totals, i) + np.float64(get(parts, i)))
                more = get_squares(total_squares, i) + np.float64(get_square(squares, i))
                put_squares(total_squares, i, more)
                put(parts, i, zero)
                put_square(squares, i, zero)
        fold(totals, n_channels, width)
        fold_squares(total_squares, n_channels, width)

    return moments


def _make_center(tag, codec):
    """first_center(x, n, width, down, center): the mean of a block's first lines;
    recenter(n, n_channels, width, center, totals): that of all, where one was off."""
    load, compute, of_center = codec.load, codec.compute, tasks.Codec(codec.wide, 1)
    get_center, put_center = of_center.load, of_center.store
    get_total, get_squares = tasks.Codec("fp64", 4).load, tasks.Codec("fp64", 5).load

    @tasks.inlined(tag)
    def first_center(x, n, n_channels, width, down, center):
        n_pivot = min(n, PIVOT)
        for i in range(n_channels):
            put_center(center, i, load(x, i))
        for p in range(1, n_pivot):
            for i in range(n_channels):
                put_center(center, i, get_center(center, i) + load(x + p * down, i))
        share = compute(1.0 / n_pivot)
        for i in range(n_channels):
            put_center(center, i, get_center(center, i) * share)
        for i in range(n_channels, width):
            put_center(center, i, get_center(center, i - n_channels))

    @tasks.inlined(tag)
    def recenter(n, n_channels, width, center, totals, squares):
        moved = False
        for i in range(n_channels):
            moved |= off(get_total(totals, i) / n, get_squares(squares, i) / n)
        if moved:
            for i in range(n_channels):
                left = get_total(totals, i) / n
                put_center(center, i, compute(np.float64(get_center(center, i)) + left))
            for i in range(n_channels, width):
                put_center(center, i, get_center(center, i - n_channels))
        return moved

    return first_center, recenter


def _pixel_moments(tag, kind):
    codec, get_center = tasks.Codec(kind, 0), tasks.Codec(tasks.wide(kind), 1).load
    load, itemsize = codec.load, codec.itemsize
    put = tasks.Codec("fp64", 6).store
    get_total, get_squares = tasks.Codec("fp64", 4).load, tasks.Codec("fp64", 5).load
    moments, (first_center, recenter) = _make_moments(tag, codec), _make_center(tag, codec)

    @tasks.inlined(tag)
    def precise(x, i, n, down):
        total, squares = np.float64(0), np.float64(0)
        for p in range(n):
            total += np.float64(load(x + p * down, i))
        mean = total / n
        for p in range(n):
            d = np.float64(load(x + p * down, i)) - mean
            squares += d * d
        return mean, squares

    def pixel_moments(args, task):
        x, _, _, _, partial, _, _, _, table, _, _, _, _, _ = _args(args, 0)
        _, n_channels, length, stride_image, stride, _, _, block, n_blocks, pixels = table_row(
            table, 0
        )
        image, first, n = block_of(task, length, block, n_blocks)
        x_block, down = x + (image * stride_image + first * stride) * itemsize, stride * itemsize
        width = n_channels * pixels
        scratch = np.empty(5 * width + 8, np.float64)
        center = aligned(scratch.ctypes.data)
        totals, squares = center + 8 * width, center + 16 * width
        first_center(x_block, n, n_channels, width, down, center)
        for _ in range(2):  # a loop: one copy of `moments` to compile
            moments(x_block, n, n_channels, pixels, down, center)
            if not recenter(n, n_channels, width, center, totals, squares):
                break
        for i in range(n_channels):
            total, square = get_total(totals, i), get_squares(squares, i)
            left = total / n
            mean, about = np.float64(get_center(center, i)) + left, square - total * left
            if poor(left, square / n):
                mean, about = precise(x_block, i, n, down)
            put(partial, task * 2 * n_channels + i, mean)
            put(partial, (task * 2 + 1) * n_channels + i, about)
        tasks.alive(scratch)

    return pixel_moments


def _pixel_sets(tag):
    """Mean and variance of each set, from the blocks'; the sets of MERGED channels a task."""
    of_part, of_stats = tasks.Codec("fp64", 0), tasks.Codec("fp64", 1)
    get, put = of_part.load, of_stats.store

    def pixel_sets(args, task):
        _, _, _, _, partial, stats, running_mean, running_var, table, kinds, _, momentum, _, _ = (
            _args(args, 0)
        )
        images, width, length, _, _, groups, batch, block, n_blocks, _ = table_row(table, 0)
        each = width // groups
        n_sets, n_task = groups if batch else images * groups, max(1, MERGED // each)
        for k in range(task * n_task, min(task * n_task + n_task, n_sets)):
            first = 0 if batch else k // groups * n_blocks
            last = images * n_blocks if batch else first + n_blocks
            mean, squares, n = np.float64(0), np.float64(0), np.float64(0)
            for c in range(k % groups * each, (k % groups + 1) * each):
                for q in range(first, last):
                    at = q * 2 * width + c
                    _, _, count = block_of(q, length, block, n_blocks)
                    m, s = get(partial, at), get(partial, at + width)
                    if n == 0.0:
                        mean, squares = m, s
                    else:
                        mean, squares = merge(n, mean, squares, np.float64(count), m, s)
                    n += np.float64(count)
            put(stats, 2 * k, mean)
            put(stats, 2 * k + 1, squares / n)
            if running_mean != 0:
                move(running_mean, k, kind_at(kinds, 2), mean, bits_to_double(momentum))
            if running_var != 0:
                unbiased = squares / (n - 1.0)
                move(running_var, k, kind_at(kinds, 3), unbiased, bits_to_double(momentum))

    return pixel_sets


def _pixel_norms(tag, kind):
    codec, store = tasks.Codec(kind, 0), tasks.Codec(kind, 5).store
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    of_high, of_scale, of_shift = (tasks.Codec(codec.wide, k) for k in (1, 3, 4))
    get_high, put_high = of_high.load, of_high.store
    get_scale, put_scale = of_scale.load, of_scale.store
    get_shift, put_shift = of_shift.load, of_shift.store
    get_stats, (stage, flush) = (
        tasks.Codec("fp64", 6).load,
        streaming_stores.make_streaming_stores(itemsize),
    )

    @tasks.inlined(tag)
    def prepare(vectors, image, n_channels, width, groups, batch, numbers):
        weight, bias, stats, given_mean, given_var, kinds, eps = numbers
        scale_at, shift_at = vectors + 8 * width, vectors + 16 * width
        for i in range(n_channels):
            k = i // (n_channels // groups) + (0 if batch else image * groups)
            if given_mean != 0:
                mean = load_any(given_mean, i, kind_at(kinds, 2))
                variance = load_any(given_var, i, kind_at(kinds, 3))
            else:
                mean, variance = get_stats(stats, 2 * k), get_stats(stats, 2 * k + 1)
            scale, shift = 1.0 / math.sqrt(variance + bits_to_double(eps)), np.float64(0)
            if weight != 0:
                scale *= load_any(weight, i, kind_at(kinds, 0))
            if bias != 0:
                shift = load_any(bias, i, kind_at(kinds, 1))
            high, a = compute(mean), compute(tidy(scale))
            b = compute(tidy(shift - (mean - np.float64(high)) * scale))
            for at in range(i, width, n_channels):
                put_high(vectors, at, high)
                put_scale(scale_at, at, a)
                put_shift(shift_at, at, b)

    def pixel_norms(args, task):
        x, y, weight, bias, _, stats, given_mean, given_var, table, kinds, eps, _, _, _ = _args(
            args, 0
        )
        (
            images, n_channels, length, stride_image, stride, groups, batch, block, n_blocks,
            pixels,
        ) = table_row(table, 0)  # fmt: skip
        image, first, n = block_of(task, length, block, n_blocks)
        width = n_channels * pixels
        scratch = np.empty(3 * width + 8, np.float64)
        high = aligned(scratch.ctypes.data)
        scale, shift = high + 8 * width, high + 16 * width
        staging, streaming = (
            streaming_stores.staging(),
            streaming_stores.use_streaming_stores(images * length * n_channels * itemsize),
        )
        numbers = weight, bias, stats, given_mean, given_var, kinds, eps
        prepare(high, image, n_channels, width, groups, batch, numbers)
        for k in range((n + pixels - 1) // pixels):
            p, here = line_of(k, n, pixels)
            x_line = x + (image * stride_image + (first + p) * stride) * itemsize
            y_line = y + (image * length + first + p) * n_channels * itemsize
            tasks.fetch(x_line, AHEAD, 0, width, itemsize)
            for start in range(0, here * n_channels, streaming_stores.SPAN):
                stop = min(start + streaming_stores.SPAN, here * n_channels)
                to = stage(y_line, staging, start, streaming)
                for i in range(start, stop):
                    deviation = load(x_line, i) - get_high(high, i)
                    store(to, i, deviation * get_scale(scale, i) + get_shift(shift, i))
                flush(y_line, staging, start, stop, streaming)
        streaming_stores.fence(streaming)
        tasks.alive(scratch)

    return pixel_norms


def forward(
    x: Tensor,
    inputs: tuple[int, ...],
    stats: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    channels: Channels,
    rest: tuple[int, ...],
) -> None:
    """inputs: addresses of x, y, weight and bias; rest: kinds, eps, momentum, given"""
    table, kind, given = pixels_table(channels), tasks.kind_of(x), rest[-1]
    n_blocks, addresses = channels.images * table.numbers[8], tuple(map(tasks.address, running))
    tail, norms = (table.address, *rest, 0), tasks.task_of(_pixel_norms, kind)
    if not given:
        partial = torch.empty(
            n_blocks * 2 * channels.channels, dtype=torch.float64, device=tasks.CPU
        )
        if stats is None:
            stats = torch.empty(channels.n_sets, 2, dtype=torch.float64, device=tasks.CPU)
        sets, n_last = tasks.task_of(_pixel_sets), -(-channels.n_sets // sets_a_task(channels))
        numbers = (*inputs, partial.data_ptr(), stats.data_ptr(), *addresses, *tail)
        moments = tasks.task_of(_pixel_moments, kind)
        if addresses == (0, 0) and image_by_image(channels):
            each = n_blocks // channels.images
            stages = (moments, each), (sets, n_last // channels.images), (norms, each)
            tasks.run_groups(stages, channels.images, x.numel(), numbers)
            return
        tasks.run(moments, n_blocks, x.numel(), numbers, sets, n_last)
        addresses = 0, 0
    numbers = (*inputs, 0, tasks.address(stats), *addresses, *tail)
    tasks.run(norms, n_blocks, x.numel(), numbers)
