"""The optional terms of a cross entropy, for CPU: a cap of the logits, and the numbers of a loss.

logits  z = softcap tanh(x / softcap)
loss    += z_loss logsumexp(z)^2
"""

from __future__ import annotations

from array import array
from functools import lru_cache

import numpy as np
from torch import Tensor

from fastopt_kernels.cpu.base import tasks
from fastopt_kernels.cpu.base.tasks import block_end
from fastopt_kernels.cpu.base.vector_math import FAR, add, cap_of, exp_of
from fastopt_kernels.cpu.rows.softmax import Shape, Strides, make_row_parts


def make_logits(tag, codec, capped):
    """(numbers_of, cap, peak, exp_sum) of rows whose logits are capped, or are not.

    numbers_of(softcap) is what the others take as `caps`; cap(x, caps) -> (z, its slope);
    peak, exp_sum: as `make_row_parts` has them, of capped logits
    """
    load, compute, itemsize = codec.load, codec.compute, codec.itemsize
    (exp, unit), zero, one = exp_of(codec.kind), compute(0), compute(1)
    capped_of = cap_of(codec.kind)
    plain_peak, plain_exp_sum = make_row_parts(tag, codec)

    @tasks.inlined(tag)
    def numbers_of(softcap):
        rate = np.float64(-2.0) / softcap
        high = compute(rate)
        low = compute(rate - np.float64(high))
        return compute(softcap), high, low, compute(softcap * FAR)

    @tasks.inlined(tag)
    def cap(x, caps):
        if capped:
            return capped_of(x, caps)
        return x, one

    @tasks.inlined(tag)
    def peak(x, n, caps):
        return cap(plain_peak(x, n), caps)[0]

    @tasks.inlined(tag)
    def capped_exp_sum(x, n, peak, ahead, caps):
        total = np.float64(0)
        start = 0
        while start < n:
            stop = block_end(start, n)
            part = zero
            tasks.fetch(x, ahead, start, stop, itemsize)
            for j in range(start, stop):
                part = add(part, exp(capped_of(load(x, j), caps)[0] - peak))
            total += np.float64(part)
            start = stop
        return total / np.float64(unit)

    @tasks.inlined(tag)
    def exp_sum(x, n, peak, ahead, caps):
        return plain_exp_sum(x, n, peak, ahead)

    return numbers_of, cap, peak, capped_exp_sum if capped else exp_sum


# What a task reads at the address of `Terms`, in this order.
SMOOTHING, Z_LOSS, SOFTCAP = range(3)


class Terms:
    """The numbers of a loss, where tasks can read them, and which kernels they call for."""

    def __init__(self, smoothing: float, z_loss: float, softcap: float) -> None:
        """softcap 0: none."""
        self._numbers = array("d", (smoothing, z_loss, softcap))
        self.address = self._numbers.buffer_info()[0]
        self.flags = (smoothing != 0.0, z_loss != 0.0, softcap != 0.0)


@lru_cache(maxsize=256)
def terms_of(smoothing: float, z_loss: float, softcap: float) -> Terms:
    """Made once: it is more than a small loss costs."""
    return Terms(smoothing, z_loss, softcap)


def as_rows(x: Tensor, shape: Shape, strides: Strides) -> tuple[Tensor, int, int, int]:
    """(tensor, rows, columns, stride of a row), classes in the last dimension."""
    n_outer, n_cols, n_inner = shape
    if n_inner == 1:
        return x, n_outer, n_cols, strides[0]
    x = x.as_strided(shape, (strides[0], strides[1], 1)).transpose(1, 2).contiguous()
    return x, n_outer * n_inner, n_cols, n_cols
