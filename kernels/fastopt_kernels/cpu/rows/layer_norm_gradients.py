"""The gradients of LayerNorm and RMSNorm for CPU.

    dx = rstd (g - mean(g) - x_hat mean(g x_hat)),  g = dy weight,  x_hat = (x - mean) rstd
    dweight = sum dy x_hat,  dbias = sum dy

The sums run over blocks of rows that follow from the shape alone, and over the blocks in order: the
same bits in every run and for any number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import types
from torch import Tensor

from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.streaming_stores import SPAN, fence, use_streaming_stores
from fastopt_kernels.cpu.base.tasks import block_end, double_bits
from fastopt_kernels.cpu.base.vector_math import add, bits_to_double, product
from fastopt_kernels.cpu.rows.dropout import make_chance, numbers_of
from fastopt_kernels.cpu.rows.layer_norm_writes import (
    TOGETHER,
    Outputs,
    make_places,
    make_put,
    stagings,
)

_args = memory.make_row(types.int64, 19)
# Blocks of rows whose weight gradients are summed apart: at most so many, of at least so many rows.
BLOCKS, BLOCK_ROWS = 64, 32
# Rows summed in the compute type before they are added to the block's sum in float64.
FLUSHED = 128
# TOGETHER rows are walked together, so that their share of a weight gradient is read and written
# once; not where they would leave the L2 cache.
TOGETHER_COLS = 16384
# Columns of the blocks that one task adds up.
SUMMED = 256


def make_deviation(tag, load, compute, centered):
    """deviation(x, j, high, low), x_j minus the mean in two parts: rounded to one, a mean of 1e4
    would be as far off as 1e-3 of a standard deviation of 1."""

    @tasks.inlined(tag)
    def deviation(x, j, high, low):
        if centered:
            return (load(x, j) - high) - low
        return load(x, j)

    return deviation


def make_weight(tag, kind, compute, stream, shifted):
    """weight_of(weight, j, shift), an element of the weight; shifted: plus shift. 1 without one."""
    load, one = memory.make_loader(kind or "fp32", compute, stream), compute(1)
    weighted = kind is not None

    @tasks.inlined(tag)
    def weight_of(weight, j, shift):
        w = load(weight, j) if weighted else one
        return w + shift if weighted and shifted else w

    return weight_of


def _make_row_reader(tag, kind, weight_kind, centered, wants_dx, shifted):
    """read(dy, x, weight, stats, row, n, stride, shift), all that a row brings into its backward:
    addresses of dy and x, the mean in two parts, rstd, mean(g normal) and mean(g)."""
    codec, load_dy = tasks.Codec(kind, 0), tasks.Codec(kind, 3).load
    load, itemsize, compute = codec.load, codec.itemsize, codec.compute
    get, get_double = tasks.Codec(codec.wide, 1).load, tasks.Codec("fp64", 4).load
    weight_of = make_weight(tag, weight_kind, compute, 7, shifted)
    zero, deviation = compute(0), make_deviation(tag, load, compute, centered)

    @tasks.inlined(tag)
    def read(dy, x, weight, stats, row, n, stride, shift):
        x, dy = x + row * stride * itemsize, dy + row * n * itemsize
        center = get_double(stats, 2 * row) if centered else np.float64(0)
        high = compute(center)
        low = compute(center - np.float64(high))
        scale = compute(get_double(stats, 2 * row + 1)) if centered else get(stats, row)
        along, across = np.float64(0), np.float64(0)
        start = 0 if wants_dx else n
        while start < n:
            stop = block_end(start, n)
            part, plain = zero, zero
            for j in range(start, stop):
                g = product(load_dy(dy, j), weight_of(weight, j, shift))
                part = add(part, g * (deviation(x, j, high, low) * scale))
                plain = add(plain, g) if centered else plain
            along += np.float64(part)
            across += np.float64(plain)
            start = stop
        return dy, x, high, low, scale, compute(along / n), compute(across / n)

    return read


def _make_dx(tag):
    @tasks.inlined(tag)
    def dx_of(dy, w, normal, scale, along, across):
        """dx = rstd (g - mean(g) - normal mean(g normal)),  g = dy weight"""
        return scale * (product(dy, w) - across - normal * along)

    return dx_of


def _make_sums(kind):
    """(get, put) of the sums of a block's dweight and dbias, in the compute type."""
    codecs = (tasks.Codec(tasks.wide(kind), stream) for stream in (5, 6))
    return [(codec.load, codec.store) for codec in codecs]


def _make_gradients(tag, kind, weight_kind, centered, shifted, outputs):
    """one(..., row, ...) and four(..., row, ...): the gradients of a row, and of that and the next
    three; to: addresses of dx, dropped and dsum; sums: of this block's, in the compute type."""
    wants_dx, wants_dw, wants_db = outputs.wants_dx, outputs.dweight, outputs.dbias
    codec, load_dy = tasks.Codec(kind, 0), tasks.Codec(kind, 3).load
    dx_of, ((get_dw, put_dw), (get_db, put_db)) = _make_dx(tag), _make_sums(kind)
    weight_of = make_weight(tag, weight_kind, codec.compute, 7, shifted)
    put, put_1, put_2, put_3 = (
        make_put(tag, kind, weight_kind, outputs, streams)
        for streams in ((2, 12), (8, 13), (9, 14), (10, 15))
    )
    stage, flush = make_places(tag, kind, outputs)
    deviation = make_deviation(tag, codec.load, codec.compute, centered)
    read = _make_row_reader(tag, kind, weight_kind, centered, wants_dx, shifted)
    chance_of = make_chance(tag, codec.compute, outputs.drops)
    size = codec.itemsize

    @tasks.inlined(tag)
    def one(dy, x, weight, stats, to, sums, row, n, stride, shift, dropout, streaming):
        (dx, dropped, dsum), (dw, db) = to, sums
        dy, x, high, low, scale, along, across = read(dy, x, weight, stats, row, n, stride, shift)
        dsum += row * n * size
        chance, scratch = chance_of(dropout, row), stagings()
        for start in range(0, n, SPAN):
            stop = min(start + SPAN, n)
            to_dx, to_dropped = stage(dx, dropped, row, n, scratch, 0, start, streaming)
            for j in range(start, stop):
                w = weight_of(weight, j, shift)
                upstream = load_dy(dy, j)
                normal = deviation(x, j, high, low) * scale
                if wants_dx:
                    d = dx_of(upstream, w, normal, scale, along, across)
                    put(to_dx, to_dropped, dsum, j, d, chance)
                if wants_dw:
                    put_dw(dw, j, get_dw(dw, j) + upstream * normal)
                if wants_db:
                    put_db(db, j, get_db(db, j) + upstream)
            flush(dx, dropped, row, n, scratch, 0, start, stop, streaming)

    @tasks.inlined(tag)
    def four(dy, x, weight, stats, to, sums, row, n, stride, shift, dropout, streaming):
        (dx, dropped, dsum), (dw, db) = to, sums
        dy0, x0, h0, l0, s0, a0, c0 = read(dy, x, weight, stats, row, n, stride, shift)
        dy1, x1, h1, l1, s1, a1, c1 = read(dy, x, weight, stats, row + 1, n, stride, shift)
        dy2, x2, h2, l2, s2, a2, c2 = read(dy, x, weight, stats, row + 2, n, stride, shift)
        dy3, x3, h3, l3, s3, a3, c3 = read(dy, x, weight, stats, row + 3, n, stride, shift)
        dsum0, scratch = dsum + row * n * size, stagings()
        dsum1, dsum2, dsum3 = dsum0 + n * size, dsum0 + 2 * n * size, dsum0 + 3 * n * size
        k0, k1 = chance_of(dropout, row), chance_of(dropout, row + 1)
        k2, k3 = chance_of(dropout, row + 2), chance_of(dropout, row + 3)
        for start in range(0, n, SPAN):
            stop = min(start + SPAN, n)
            dx0, dropped0 = stage(dx, dropped, row, n, scratch, 0, start, streaming)
            dx1, dropped1 = stage(dx, dropped, row + 1, n, scratch, 1, start, streaming)
            dx2, dropped2 = stage(dx, dropped, row + 2, n, scratch, 2, start, streaming)
            dx3, dropped3 = stage(dx, dropped, row + 3, n, scratch, 3, start, streaming)
            for j in range(start, stop):
                w = weight_of(weight, j, shift)
                g0, g1, g2, g3 = load_dy(dy0, j), load_dy(dy1, j), load_dy(dy2, j), load_dy(dy3, j)
                n0, n1 = deviation(x0, j, h0, l0) * s0, deviation(x1, j, h1, l1) * s1
                n2, n3 = deviation(x2, j, h2, l2) * s2, deviation(x3, j, h3, l3) * s3
                if wants_dx:
                    put(dx0, dropped0, dsum0, j, dx_of(g0, w, n0, s0, a0, c0), k0)
                    put_1(dx1, dropped1, dsum1, j, dx_of(g1, w, n1, s1, a1, c1), k1)
                    put_2(dx2, dropped2, dsum2, j, dx_of(g2, w, n2, s2, a2, c2), k2)
                    put_3(dx3, dropped3, dsum3, j, dx_of(g3, w, n3, s3, a3, c3), k3)
                if wants_dw:
                    put_dw(dw, j, get_dw(dw, j) + ((g0 * n0 + g1 * n1) + (g2 * n2 + g3 * n3)))
                if wants_db:
                    put_db(db, j, get_db(db, j) + ((g0 + g1) + (g2 + g3)))
            for k in range(4):
                flush(dx, dropped, row + k, n, scratch, k, start, stop, streaming)

    return one, four


def _make_flush(tag, part, total):
    """flush(parts, totals, n, is_first): add what was summed to float64 sums, and begin anew."""
    get, put, zero = part.load, part.store, part.compute(0)
    get_total, put_total = total.load, total.store

    @tasks.inlined(tag)
    def flush(parts, totals, n, is_first):
        for j in range(n):
            before = np.float64(0) if is_first else get_total(totals, j)
            put_total(totals, j, before + np.float64(get(parts, j)))
            put(parts, j, zero)

    return flush


def _backward(tag, kind, weight_kind, centered, shifted, *outputs):
    outputs = Outputs(*outputs)
    wants_dw, wants_db = outputs.dweight, outputs.dbias
    one, four = _make_gradients(tag, kind, weight_kind, centered, shifted, outputs)
    compute, itemsize = memory.compute_type(kind), tasks.ITEMSIZE[kind]
    sum_dw, sum_db = tasks.Codec(tasks.wide(kind), 5), tasks.Codec(tasks.wide(kind), 6)
    put_dw, put_db, size, zero = sum_dw.store, sum_db.store, sum_dw.itemsize, sum_dw.compute(0)
    total = tasks.Codec("fp64", 11)
    flush_dw, flush_db = _make_flush(tag, sum_dw, total), _make_flush(tag, sum_db, total)

    def norm_backward(args, task):
        numbers = _args(args, 0)
        dy, x, weight, stats, dx, blocks, _, _, n_rows, n_cols, stride, n_task, _ = numbers[:13]
        offset, dropped, dsum = numbers[13:16]
        dropout, shift = numbers[16:], compute(bits_to_double(offset))
        first, streaming = task * n_task, use_streaming_stores(n_rows * n_cols * itemsize)
        last = min(first + n_task, n_rows)
        all_dw = blocks + task * n_cols * 32
        all_db, dw = all_dw + 8 * n_cols, all_dw + 16 * n_cols
        db = dw + size * n_cols
        to, sums = (dx, dropped, dsum), (dw, db)
        for j in range(n_cols):
            if wants_dw:
                put_dw(dw, j, zero)
            if wants_db:
                put_db(db, j, zero)
        for start in range(first, last, FLUSHED):
            stop = min(start + FLUSHED, last)
            fours = (stop - start) // TOGETHER if n_cols <= TOGETHER_COLS else 0
            for k in range(fours):
                row = start + k * TOGETHER
                four(dy, x, weight, stats, to, sums, row, n_cols, stride, shift, dropout, streaming)
            for row in range(start + fours * TOGETHER, stop):
                one(dy, x, weight, stats, to, sums, row, n_cols, stride, shift, dropout, streaming)
            if wants_dw:
                flush_dw(dw, all_dw, n_cols, start == first)
            if wants_db:
                flush_db(db, all_db, n_cols, start == first)
        fence(streaming)

    return norm_backward


def _sum_blocks(tag, dweight_kind, dbias_kind):
    """Add up the blocks' sums, in columns; the first block has room for the totals."""
    to_dw, to_db = tasks.Codec(dweight_kind or "fp32", 2), tasks.Codec(dbias_kind or "fp32", 3)
    sums, totals = tasks.Codec("fp64", 0), tasks.Codec("fp64", 4)
    get, get_total, put_total = sums.load, totals.load, totals.store
    weighted, biased = dweight_kind is not None, dbias_kind is not None

    def make_add(to):
        store, compute = to.store, to.compute

        @tasks.inlined(tag)
        def add_up(blocks, total, out, first, width, n_blocks, n_cols):
            for j in range(width):
                put_total(total, j, np.float64(0))
            for block in range(n_blocks):
                at = block * 4 * n_cols + first
                for j in range(width):
                    put_total(total, j, get_total(total, j) + get(blocks, at + j))
            for j in range(width):
                store(out, first + j, compute(get_total(total, j)))

        return add_up

    add_dw, add_db = make_add(to_dw), make_add(to_db)

    def sum_blocks(args, task):
        _, _, _, _, _, blocks, dw, db, _, n_cols, _, _, n_blocks = _args(args, 0)[:13]
        first = task * SUMMED
        width = min(SUMMED, n_cols - first)
        total = blocks + 8 * (2 * n_cols + first)
        if weighted:
            add_dw(blocks, total, dw, first, width, n_blocks, n_cols)
        if biased:
            add_db(blocks + 8 * n_cols, total, db, first, width, n_blocks, n_cols)

    return sum_blocks


class Beside(NamedTuple):
    """Of a norm of a sum: the sum's own gradient, if any; where dx through the dropout goes, if it
    is wanted; and the dropout, if any."""

    dsum: Tensor | None
    dropped: Tensor | None
    dropout: tuple[Tensor, int, float] | None


ALONE = Beside(None, None, None)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    sizes: tuple[int, int, int],
    centered: bool,
    weight_offset: float = 0.0,
    beside: Beside = ALONE,
) -> None:
    """Fill those of dx, dweight and dbias that there are; sizes: rows, columns, stride of a row.

    beside: what more there is where x is a sum, whose gradient dx then is
    """
    (dx, dweight, dbias), (n_rows, n_cols, _) = outputs, sizes
    dsum, dropped, dropout = beside
    wanted = (tasks.kind_of(dx), tasks.kind_of(dropped), dsum is not None, dropout is not None)
    wanted += (dweight is not None, dbias is not None)
    kinds = tasks.kind_of(x), tasks.kind_of(weight), centered, weight_offset != 0
    task, last, n_last = tasks.task_of(_backward, *kinds, *wanted), None, 0
    if dweight is not None or dbias is not None:
        n_task = max(BLOCK_ROWS, -(-n_rows // BLOCKS))
        n_blocks = -(-n_rows // n_task)
        last = tasks.task_of(_sum_blocks, tasks.kind_of(dweight), tasks.kind_of(dbias))
        n_last = -(-n_cols // SUMMED)
    else:
        n_task = tasks.rows_of(n_cols)
        n_blocks = -(-n_rows // n_task)
    # Of each block: dweight and dbias in float64, and room to sum them in the compute type.
    blocks = torch.empty(
        4 * n_blocks * n_cols if n_last else 0, dtype=torch.float64, device=tasks.CPU
    )
    inputs = (dy.data_ptr(), x.data_ptr(), tasks.address(weight), stats.data_ptr())
    results = (tasks.address(dx), blocks.data_ptr(), tasks.address(dweight), tasks.address(dbias))
    offset = double_bits(weight_offset) if weight_offset else 0
    more = (n_task, n_blocks, offset, tasks.address(dropped), tasks.address(dsum))
    numbers = (*inputs, *results, *sizes, *more, *numbers_of(dropout))
    tasks.run(task, n_blocks, n_rows * n_cols, numbers, last, n_last)
