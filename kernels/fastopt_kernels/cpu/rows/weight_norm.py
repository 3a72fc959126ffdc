"""Weight normalization for CPU: the norm and what is scaled by it, in one call.

    y = v g / ||v||,  dg = sum(dy v) / ||v||,  dv = g / ||v|| (dy - v sum(dy v) / ||v||^2)
    unit  y = x / max(||x||, eps)

A weight is (n_outer, n_kept, n_inner), and n_kept norms are taken of it. Where there is nothing
outside, each is of a row that stays in cache from its sum to its scaling. Else it is walked in rows
of n_kept * n_inner columns: sums by column, in blocks of rows that follow from the shape alone,
added up in order, and then every row is scaled.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import types
from torch import Tensor

from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.streaming_stores import (
    SPAN,
    fence,
    make_streaming_stores,
    staging,
    use_streaming_stores,
)
from fastopt_kernels.cpu.base.tasks import block_end, double_bits
from fastopt_kernels.cpu.base.vector_math import add, bits_to_double

_args = memory.make_row(types.int64, 12)
_args4 = memory.make_row(types.int64, 4)
# Blocks of rows whose sums are apart: at most so many, of at least so many rows.
BLOCKS, BLOCK_ROWS = 16, 64
# Norms that one task adds up.
FOLDED = 256

Sizes = tuple[int, int, int]


def _make_total(tag, codec, backward):
    """total(v, dy, n): sum v^2 of a row, or sum dy v."""
    load, load_dy, zero = codec.load, tasks.Codec(codec.kind, 1).load, codec.compute(0)

    @tasks.inlined(tag)
    def total(v, dy, n):
        whole = np.float64(0)
        start = 0
        while start < n:
            stop = block_end(start, n)
            part = zero
            for j in range(start, stop):
                part = add(part, load(v, j) * (load_dy(dy, j) if backward else load(v, j)))
            whole += np.float64(part)
            start = stop
        return whole

    return total


def _make_factors(tag, kind, backward):
    """factors(k, sum, g, norms, dg) -> (g / ||v||, sum / ||v||^2) of norm k, which forward keeps
    and whose dg backward stores."""
    compute = memory.compute_type(kind)
    norm, get_g, put_dg = (
        tasks.Codec("fp64", 2),
        tasks.Codec(kind, 3).load,
        tasks.Codec(kind, 4).store,
    )
    get_norm, put_norm = norm.load, norm.store

    @tasks.inlined(tag)
    def factors(k, total, g, norms, dg):
        size = get_norm(norms, k) if backward else math.sqrt(total)
        if backward:
            put_dg(dg, k, compute(total / size))
        else:
            put_norm(norms, k, size)
        return compute(np.float64(get_g(g, k)) / size), compute(total / size / size)

    return factors


def _rows(tag, kind, backward):
    codec, load_dy = tasks.Codec(kind, 0), tasks.Codec(kind, 1).load
    load, itemsize, store = codec.load, codec.itemsize, tasks.Codec(kind, 5).store
    total, factors = _make_total(tag, codec, backward), _make_factors(tag, kind, backward)
    stage, flush = make_streaming_stores(itemsize)

    def weight_norm(args, task):
        v, dy, g, norms, out, dg, _, _, n_rows, n_cols, _, n_task = _args(args, 0)
        first, scratch = task * n_task, staging()
        streaming = use_streaming_stores(n_rows * n_cols * itemsize)
        for row in range(first, min(first + n_task, n_rows)):
            at = row * n_cols * itemsize
            scale, back = factors(row, total(v + at, dy + at, n_cols), g, norms, dg)
            for start in range(0, n_cols, SPAN):
                stop = min(start + SPAN, n_cols)
                to = stage(out + at, scratch, start, streaming)
                for j in range(start, stop):
                    if backward:
                        store(to, j, scale * (load_dy(dy + at, j) - load(v + at, j) * back))
                    else:
                        store(to, j, load(v + at, j) * scale)
                flush(out + at, scratch, start, stop, streaming)
        fence(streaming)

    return weight_norm


def _column_sums(tag, kind, backward):
    codec, load_dy = tasks.Codec(kind, 0), tasks.Codec(kind, 1).load
    load, itemsize, block = codec.load, codec.itemsize, tasks.Codec("fp64", 6)
    get, put = block.load, block.store

    @tasks.inlined(tag)
    def term(v, dy, j):
        return load(v, j) * (load_dy(dy, j) if backward else load(v, j))

    def column_sums(args, task):
        v, dy, _, _, _, _, blocks, _, n_rows, n_cols, _, n_task = _args(args, 0)
        sums, down = blocks + task * n_cols * 8, n_cols * itemsize
        for j in range(n_cols):
            put(sums, j, np.float64(0))
        first = task * n_task
        last = min(first + n_task, n_rows)
        fours = (last - first) // 4
        for k in range(fours):
            a = v + (first + 4 * k) * down
            b = dy + (first + 4 * k) * down
            for j in range(n_cols):
                part = (term(a, b, j) + term(a + down, b + down, j)) + (
                    term(a + 2 * down, b + 2 * down, j) + term(a + 3 * down, b + 3 * down, j)
                )
                put(sums, j, get(sums, j) + np.float64(part))
        for row in range(first + 4 * fours, last):
            for j in range(n_cols):
                part = term(v + row * down, dy + row * down, j)
                put(sums, j, get(sums, j) + np.float64(part))

    return column_sums


def _fold(tag, kind, backward):
    """The sums of the blocks as norms, and what each column is multiplied by."""
    factors, wide = _make_factors(tag, kind, backward), tasks.Codec(tasks.wide(kind), 7)
    get, put_factor, itemsize = tasks.Codec("fp64", 6).load, wide.store, wide.itemsize

    def fold(args, task):
        _, _, g, norms, _, dg, blocks, scales, n_rows, n_cols, n_inner, n_task = _args(args, 0)
        n_blocks = -(-n_rows // n_task)
        n_kept = n_cols // n_inner
        for k in range(task * FOLDED, min((task + 1) * FOLDED, n_kept)):
            total = np.float64(0)
            for block in range(n_blocks):
                for i in range(n_inner):
                    total = total + get(blocks, block * n_cols + k * n_inner + i)
            scale, back = factors(k, total, g, norms, dg)
            for j in range(k * n_inner, (k + 1) * n_inner):
                put_factor(scales, j, scale)
                put_factor(scales + n_cols * itemsize, j, back)

    return fold


def _scale_rows(tag, kind, backward):
    codec, load_dy = tasks.Codec(kind, 0), tasks.Codec(kind, 1).load
    load, itemsize, store = codec.load, codec.itemsize, tasks.Codec(kind, 5).store
    wide = tasks.Codec(codec.wide, 7)
    factor, size, (stage, flush) = wide.load, wide.itemsize, make_streaming_stores(itemsize)

    def scale_rows(args, task):
        v, dy, _, _, out, _, _, scales, n_rows, n_cols, _, n_task = _args(args, 0)
        backs, first = scales + n_cols * size, task * n_task
        streaming, scratch = use_streaming_stores(n_rows * n_cols * itemsize), staging()
        for row in range(first, min(first + n_task, n_rows)):
            at = row * n_cols * itemsize
            for start in range(0, n_cols, SPAN):
                stop = min(start + SPAN, n_cols)
                to = stage(out + at, scratch, start, streaming)
                for j in range(start, stop):
                    if backward:
                        dx = load_dy(dy + at, j) - load(v + at, j) * factor(backs, j)
                        store(to, j, factor(scales, j) * dx)
                    else:
                        store(to, j, load(v + at, j) * factor(scales, j))
                flush(out + at, scratch, start, stop, streaming)
        fence(streaming)

    return scale_rows


def _unit(tag, kind):
    codec = tasks.Codec(kind, 0)
    load, store, compute = codec.load, codec.store, codec.compute
    total = _make_total(tag, codec, False)

    def unit(args, task):
        x, out, n, eps = _args4(args, 0)
        size = math.sqrt(total(x, x, n))
        scale = compute(1.0 / (bits_to_double(eps) if size < bits_to_double(eps) else size))
        for j in range(n):
            store(out, j, load(x, j) * scale)

    return unit


def _run(
    v: Tensor,
    dy: Tensor | None,
    g: Tensor,
    norms: Tensor,
    out: Tensor,
    dg: Tensor | None,
    sizes: Sizes,
) -> None:
    n_outer, n_kept, n_inner = sizes
    kind, backward = tasks.KINDS[v.dtype], dy is not None
    pointers = map(tasks.address, (v, dy, g, norms, out, dg))
    if n_outer == 1:
        task = tasks.task_of(_rows, kind, backward)
        tasks.run_rows(task, n_kept, n_inner, *pointers, 0, 0, n_kept, n_inner, n_inner)
        return
    n_cols = n_kept * n_inner
    n_task = max(BLOCK_ROWS, -(-n_outer // BLOCKS))
    n_blocks = -(-n_outer // n_task)
    blocks = torch.empty(n_blocks * n_cols, dtype=torch.float64, device=tasks.CPU)
    scales = torch.empty(
        2 * n_cols, dtype=torch.float64 if kind == "fp64" else torch.float32, device=tasks.CPU
    )
    numbers = (*pointers, blocks.data_ptr(), scales.data_ptr(), n_outer, n_cols, n_inner)
    task, fold = tasks.task_of(_column_sums, kind, backward), tasks.task_of(_fold, kind, backward)
    n_folds = -(-n_kept // FOLDED)
    tasks.run(task, n_blocks, n_outer * n_cols, (*numbers, n_task), fold, n_folds)
    tasks.run_rows(tasks.task_of(_scale_rows, kind, backward), n_outer, n_cols, *numbers)


def weight_norm(v: Tensor, g: Tensor, y: Tensor, norms: Tensor, sizes: Sizes) -> None:
    """Fill y and norms, float64 (n_kept,); v, y: (n_outer, n_kept, n_inner), g: (n_kept,), all
    contiguous and of one dtype."""
    _run(v, None, g, norms, y, None, sizes)


def weight_norm_backward(
    dy: Tensor, v: Tensor, g: Tensor, norms: Tensor, dv: Tensor, dg: Tensor, sizes: Sizes
) -> None:
    """Fill dv and dg, laid out as v and g."""
    _run(v, dy, g, norms, dv, dg, sizes)


def unit(x: Tensor, out: Tensor, eps: float) -> None:
    """x / max(||x||, eps) of a vector; out may be x itself."""
    task = tasks.task_of(_unit, tasks.KINDS[x.dtype])
    numbers = (x.data_ptr(), out.data_ptr(), x.numel(), double_bits(eps))
    tasks.run(task, 1, x.numel(), numbers)
