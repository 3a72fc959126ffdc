"""LayerNorm and RMSNorm for CPU: statistics summed towards float64, a row at a time.

    layer_norm  y = (x - mean) rstd weight + bias,  rstd = 1 / sqrt(mean((x - mean)^2) + eps)
    rms_norm    y = x rstd weight,                  rstd = 1 / sqrt(mean(x^2) + eps)

The gradients of weight and bias are summed over blocks of rows that follow from the shape alone,
and the blocks in order: the same bits in every run and for any number of threads.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import types
from torch import Tensor

from fastopt_kernels.cpu import memory, rows
from fastopt_kernels.cpu.rows import block_end, double_bits
from fastopt_kernels.cpu.vecmath import add, bits_to_double, product

_args = memory.make_row(types.int64, 14)
# Blocks of rows whose weight gradients are summed apart: at most so many, of at least so many rows.
BLOCKS, BLOCK_ROWS = 64, 16
# Rows summed in the compute type before they are added to the block's sum in float64.
FLUSHED = 128
# Columns of the blocks that one task adds up.
SUMMED = 256


def _make_deviation(tag, load, compute, centered):
    """deviation(x, j, high, low), x_j minus the mean in two parts: rounded to one, a mean of 1e4
    would be as far off as 1e-3 of a standard deviation of 1."""

    @rows.inlined(tag)
    def deviation(x, j, high, low):
        if centered:
            return (load(x, j) - high) - low
        return load(x, j)

    return deviation


def _forward(tag, kind, weight_kind, bias_kind, centered):
    own_nan = weight_kind in (None, kind) and bias_kind in (None, kind)
    codec, store = rows.Codec(kind, 0), rows.Codec(kind, 1, own_nan).store
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    put, put_double = rows.Codec(codec.wide, 2).store, rows.Codec("fp64", 3).store
    weight_of = memory.make_loader(weight_kind or "fp32", compute, 4)
    bias_of = memory.make_loader(bias_kind or "fp32", compute, 5)
    weighted, biased, zero = weight_kind is not None, bias_kind is not None, compute(0)
    deviation = _make_deviation(tag, load, compute, centered)

    @rows.inlined(tag)
    def row_sum(x, n):
        total = np.float64(0)
        start = 0
        while start < n:
            stop = block_end(start, n)
            part = zero
            for j in range(start, stop):
                part = add(part, load(x, j))
            total += np.float64(part)
            start = stop
        return total

    @rows.inlined(tag)
    def moments(x, n, center):
        first, second = np.float64(0), np.float64(0)
        start = 0
        while start < n:
            stop = block_end(start, n)
            part, squares = zero, zero
            for j in range(start, stop):
                d = deviation(x, j, center, zero)
                part = add(part, d) if centered else part
                squares = add(squares, d * d)
            first += np.float64(part)
            second += np.float64(squares)
            start = stop
        return first / n, second / n

    def norm(args, task):
        x, weight, bias, y, mean, rstd, n_rows, n_cols, stride, eps, _, _, _, n_task = _args(
            args, 0
        )
        first = task * n_task
        for row in range(first, min(first + n_task, n_rows)):
            x_row = x + row * stride * itemsize
            y_row = y + row * n_cols * itemsize
            high = compute(row_sum(x_row, n_cols) / n_cols) if centered else zero
            left, squares = moments(x_row, n_cols, high)
            low = compute(left)
            variance = squares - left * left
            scale = compute(1.0 / math.sqrt(variance + bits_to_double(eps)))
            if mean != 0:
                put_double(mean, row, np.float64(high) + left)
            if rstd != 0:
                put(rstd, row, scale)
            for j in range(n_cols):
                result = deviation(x_row, j, high, low) * scale
                if weighted:
                    result = result * weight_of(weight, j)
                if biased:
                    result = result + bias_of(bias, j)
                store(y_row, j, result)

    return norm


def _backward(tag, kind, weight_kind, centered, wants_dx, wants_dw, wants_db):
    codec, wide = rows.Codec(kind, 0), rows.Codec(rows.wide(kind), 1)
    store = rows.Codec(kind, 2, own_nan=weight_kind in (None, kind)).store
    load, load_dy, itemsize, compute = (
        codec.load,
        rows.Codec(kind, 3).load,
        codec.itemsize,
        codec.compute,
    )
    get, get_double, put_double = wide.load, rows.Codec("fp64", 4).load, rows.Codec("fp64", 4).store
    sum_type = np.float64 if codec.wide == "fp64" else np.float32
    sum_dw, sum_db = rows.Codec(wide.wide, 5), rows.Codec(wide.wide, 6)
    weight_of = memory.make_loader(weight_kind or "fp32", compute, 7)
    get_dw, put_dw, get_db, put_db = sum_dw.load, sum_dw.store, sum_db.load, sum_db.store
    weighted, zero, one, wide_size = weight_kind is not None, compute(0), compute(1), wide.itemsize
    deviation = _make_deviation(tag, load, compute, centered)

    @rows.inlined(tag)
    def upstream(dy, weight, j):
        """g = dy weight, the gradient of the normalized row."""
        return product(load_dy(dy, j), weight_of(weight, j) if weighted else one)

    @rows.inlined(tag)
    def means(dy, x, weight, n, high, low, scale):
        along, across = np.float64(0), np.float64(0)
        start = 0
        while start < n:
            stop = block_end(start, n)
            part, plain = zero, zero
            for j in range(start, stop):
                g = upstream(dy, weight, j)
                part = add(part, g * (deviation(x, j, high, low) * scale))
                plain = add(plain, g) if centered else plain
            along += np.float64(part)
            across += np.float64(plain)
            start = stop
        return compute(along / n), compute(across / n)

    def norm_backward(args, task):
        dy, x, weight, mean, rstd, dx, dws, dbs, n_rows, n_cols, stride, n_task, _, _ = _args(
            args, 0
        )
        first = task * n_task
        last = min(first + n_task, n_rows)
        all_dw, all_db = dws + task * n_cols * 8, dbs + task * n_cols * 8
        scratch = np.zeros(2 * n_cols, sum_type)
        dw = scratch.ctypes.data
        db = dw + n_cols * wide_size
        for start in range(first, last, FLUSHED):
            for row in range(start, min(start + FLUSHED, last)):
                x_row, dy_row = x + row * stride * itemsize, dy + row * n_cols * itemsize
                dx_row, scale = dx + row * n_cols * itemsize, get(rstd, row)
                center = get_double(mean, row) if centered else np.float64(0)
                high = compute(center)
                low = compute(center - np.float64(high))
                along, across = zero, zero
                if wants_dx:
                    along, across = means(dy_row, x_row, weight, n_cols, high, low, scale)
                for j in range(n_cols):
                    normal = deviation(x_row, j, high, low) * scale
                    if wants_dx:  # dx = rstd (g - mean(g) - normal mean(g normal))
                        g = upstream(dy_row, weight, j)
                        store(dx_row, j, scale * (g - across - normal * along))
                    if wants_dw:
                        put_dw(dw, j, get_dw(dw, j) + load_dy(dy_row, j) * normal)
                    if wants_db:
                        put_db(db, j, get_db(db, j) + load_dy(dy_row, j))
            for j in range(n_cols):
                if wants_dw:
                    before = get_double(all_dw, j) if start > first else np.float64(0)
                    put_double(all_dw, j, before + np.float64(get_dw(dw, j)))
                    put_dw(dw, j, zero)
                if wants_db:
                    before = get_double(all_db, j) if start > first else np.float64(0)
                    put_double(all_db, j, before + np.float64(get_db(db, j)))
                    put_db(db, j, zero)
        rows.alive(scratch)

    return norm_backward


def _sum_blocks(tag, weight_kind, bias_kind, partial_kind):
    get_dw, get_db = rows.Codec(partial_kind, 0).load, rows.Codec(partial_kind, 1).load
    dweight_codec, dbias_codec = (
        rows.Codec(weight_kind or "fp32", 2),
        rows.Codec(bias_kind or "fp32", 3),
    )
    store_dw, store_db = dweight_codec.store, dbias_codec.store
    as_dw, as_db = dweight_codec.compute, dbias_codec.compute
    weighted, biased = weight_kind is not None, bias_kind is not None
    sums_dw, sums_db = rows.Codec("fp64", 4), rows.Codec("fp64", 5)
    get_along, put_along, get_across, put_across = (
        sums_dw.load,
        sums_dw.store,
        sums_db.load,
        sums_db.store,
    )

    def sum_blocks(args, task):
        dws, dbs, dw, db, n_blocks, n_cols, n_task, _, _, _, _, _, _, _ = _args(args, 0)
        first = task * n_task
        width = min(n_task, n_cols - first)
        scratch = np.zeros(2 * n_task, np.float64)
        along = scratch.ctypes.data
        across = along + 8 * n_task
        for block in range(n_blocks):
            at = block * n_cols + first
            for j in range(width):
                if weighted:
                    put_along(along, j, get_along(along, j) + np.float64(get_dw(dws, at + j)))
                if biased:
                    put_across(across, j, get_across(across, j) + np.float64(get_db(dbs, at + j)))
        for j in range(width):
            if weighted:
                store_dw(dw, first + j, as_dw(get_along(along, j)))
            if biased:
                store_db(db, first + j, as_db(get_across(across, j)))
        rows.alive(scratch)

    return sum_blocks


def _kind(tensor: Tensor | None) -> str | None:
    return None if tensor is None else rows.KINDS[tensor.dtype]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    n_rows: int,
    n_cols: int,
    stride_row: int,
    eps: float,
) -> None:
    """Normalize every row of x into y; mean and rstd are what the backward needs, if any."""
    task = rows.task_of(_forward, _kind(x), _kind(weight), _kind(bias), True)
    pointers = map(_address, (x, weight, bias, y, mean, rstd))
    task.run_rows(n_rows, n_cols, *pointers, n_rows, n_cols, stride_row, double_bits(eps), 0, 0, 0)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    y: Tensor,
    rstd: Tensor | None,
    n_rows: int,
    n_cols: int,
    stride_row: int,
    eps: float,
) -> None:
    """Scale every row of x to unit mean square into y; rstd is what the backward needs, if any."""
    task = rows.task_of(_forward, _kind(x), _kind(weight), None, False)
    pointers = map(_address, (x, weight, None, y, None, rstd))
    task.run_rows(n_rows, n_cols, *pointers, n_rows, n_cols, stride_row, double_bits(eps), 0, 0, 0)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    n_rows: int,
    n_cols: int,
    stride_row: int,
) -> None:
    """Those of the three gradients that are wanted."""
    _run_backward(dy, x, weight, mean, rstd, dx, dweight, dbias, n_rows, n_cols, stride_row)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    n_rows: int,
    n_cols: int,
    stride_row: int,
) -> None:
    """Those of the two gradients that are wanted."""
    _run_backward(dy, x, weight, None, rstd, dx, dweight, None, n_rows, n_cols, stride_row)


def _run_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    n_rows: int,
    n_cols: int,
    stride_row: int,
) -> None:
    sums = dweight is not None or dbias is not None
    wanted = (dx is not None, dweight is not None, dbias is not None)
    task = rows.task_of(_backward, _kind(x), _kind(weight), mean is not None, *wanted)
    n_task = max(BLOCK_ROWS, -(-n_rows // BLOCKS)) if sums else rows.rows_of(n_cols)
    n_blocks = -(-n_rows // n_task)
    partials = torch.empty(2 * n_blocks * n_cols if sums else 0, dtype=torch.float64)
    dws = partials.data_ptr()
    dbs = dws + n_blocks * n_cols * partials.element_size()
    pointers = map(_address, (dy, x, weight, mean, rstd, dx))
    shape = (n_rows, n_cols, stride_row, n_task, 0, 0)
    task.run(n_blocks, n_rows * n_cols, *pointers, dws, dbs, *shape)
    if sums:
        last = rows.task_of(_sum_blocks, _kind(dweight), _kind(dbias), "fp64")
        pointers = (dws, dbs, _address(dweight), _address(dbias))
        shape = (n_blocks, n_cols, SUMMED, 0, 0, 0, 0, 0, 0, 0)
        last.run(-(-n_cols // SUMMED), n_blocks * n_cols, *pointers, *shape)
