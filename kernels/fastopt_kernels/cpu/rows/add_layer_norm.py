"""LayerNorm and RMSNorm of a sum for CPU: a row of the sum is in cache when it is normalized.

    sum = dropout(x) + residual,  y = norm(sum)

The sum is rounded once, to what it is stored in, and y is the norm of what is stored.
"""

from __future__ import annotations

import numpy as np
from numba import types
from torch import Tensor

from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.streaming_stores import fence, stream_bytes, use_streaming_stores
from fastopt_kernels.cpu.base.tasks import double_bits
from fastopt_kernels.cpu.rows.dropout import make_chance, make_dropper, numbers_of
from fastopt_kernels.cpu.rows.layer_norm import Source, make_normalize
from fastopt_kernels.cpu.rows.layer_norm_gradients import Beside, gradients

_args = memory.make_row(types.int64, 17)


def _make_source(tag, kind, x_kind, residual_kind, drops):
    """The sum as the norm loads it: added up, stored and read again as what it was rounded to."""
    compute = memory.compute_type(kind)
    own_nan = x_kind == residual_kind == kind
    load_x = memory.make_loader(x_kind, compute, 6)
    load_residual = memory.make_loader(residual_kind, compute, 7)
    load_sum = memory.make_loader(kind, compute, 0)
    store_sum = memory.make_storer(kind, compute, own_nan, 0)
    drop, x_size = make_dropper(tag, compute, drops), tasks.ITEMSIZE[x_kind]

    @tasks.inlined(tag)
    def load(source, j):
        x, residual, total, _, chance = source
        store_sum(total, j, drop(load_x(x, j), j, chance) + load_residual(residual, j))
        return load_sum(total, j)

    @tasks.inlined(tag)
    def fetch(source, start, stop):
        x, _, _, ahead, _ = source
        tasks.fetch(x, ahead, start, stop, x_size)

    return Source(load, fetch, tasks.ITEMSIZE[residual_kind])


def _forward(tag, kind, x_kind, residual_kind, weight_kind, bias_kind, centered, shifted, drops):
    chance_of = make_chance(tag, memory.compute_type(kind), drops)
    source = _make_source(tag, kind, x_kind, residual_kind, drops)
    normalize = make_normalize(tag, kind, weight_kind, bias_kind, centered, shifted, source)
    itemsize, x_size = tasks.ITEMSIZE[kind], tasks.ITEMSIZE[x_kind]
    residual_size = tasks.ITEMSIZE[residual_kind]

    def add_norm(args, task):
        numbers = _args(args, 0)
        x, residual, weight, bias, y, total, stats, n_rows, n_cols = numbers[:9]
        stride, residual_stride, eps, offset, seed, kept, scale, n_task = numbers[9:]
        ahead = tasks.ahead_of(n_rows, n_cols, stride, x_size)
        ahead_too = tasks.ahead_of(n_rows, n_cols, residual_stride, residual_size)
        first, streaming = task * n_task, use_streaming_stores(n_rows * n_cols * itemsize)
        waiting = np.empty(n_cols * itemsize if streaming else 1, np.uint8)
        for row in range(first, min(first + n_task, n_rows)):
            here = row * n_cols * itemsize
            y_row = y + here
            total_row = np.int64(waiting.ctypes.data) if streaming else total + here
            far = residual + row * residual_stride * residual_size
            chance = chance_of((seed, kept, scale), row)
            source = x + row * stride * x_size, far, total_row, ahead, chance
            normalize(
                source, total_row, y_row, weight, bias, stats, row, n_cols, eps, offset,
                far, ahead_too, streaming,
            )  # fmt: skip
            if streaming:
                stream_bytes(total + here, total_row, n_cols * itemsize)
        fence(streaming)
        tasks.alive(waiting)

    return add_norm


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    total: Tensor,
    stats: Tensor | None,
    sizes: tuple[int, int, int, int],
    eps: float,
    weight_offset: float,
    dropout: tuple[Tensor, int, float] | None,
    centered: bool,
) -> None:
    """Fill total with dropout(x) + residual, and y with its norm.

    sizes: rows, columns, strides of a row of x and of residual; y, total: contiguous, of one dtype;
    weight, bias: (n_cols,), of any dtype each; stats: as layer_norm (centered) or rms_norm has them
    dropout: seed, how many of 2^32 stay, and what they are multiplied by; if there is one
    """
    kinds = [tasks.kind_of(tensor) for tensor in (total, x, residual, weight, bias)]
    task = tasks.task_of(_forward, *kinds, centered, weight_offset != 0, dropout is not None)
    inputs = (x.data_ptr(), residual.data_ptr(), tasks.address(weight), tasks.address(bias))
    outputs = (y.data_ptr(), total.data_ptr(), tasks.address(stats))
    scalars = (double_bits(eps), double_bits(weight_offset), *numbers_of(dropout))
    tasks.run_rows(task, sizes[0], sizes[1], *inputs, *outputs, *sizes, *scalars)


def add_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    sizes: tuple[int, int],
    weight_offset: float,
    dropout: tuple[Tensor, int, float] | None,
    centered: bool,
) -> None:
    """dresidual = dsum + d norm(sum),  dx = dropout(dresidual),  those that are wanted.

    dy, dsum, total: (n_rows, n_cols), contiguous, of one dtype; dx, dresidual: of any each; where
    nothing is dropped and they are of one dtype, dx is dresidual and is not asked for
    """
    outputs, beside = (dresidual, dweight, dbias), Beside(dsum, dx, dropout)
    sizes = (*sizes, sizes[1])
    gradients(dy, total, weight, stats, outputs, sizes, centered, weight_offset, beside)
