"""Writes the gradients of a norm by its input: dx, and dx through a dropout, or one of them."""

from __future__ import annotations

from typing import NamedTuple

from fastopt_kernels.cpu.base import memory, tasks
from fastopt_kernels.cpu.base.streaming_stores import STAGING, make_staging, make_streaming_stores
from fastopt_kernels.cpu.rows.dropout import make_dropper

# Rows written together, at most.
TOGETHER = 4
stagings = make_staging(2 * TOGETHER)


class Outputs(NamedTuple):
    """The outputs a gradient kernel is compiled for: kinds of dx and of dx through the dropout,
    None where one is not wanted; whether the sum has a gradient of its own; and which more there
    are."""

    dx: str | None
    dropped: str | None
    summed: bool
    drops: bool
    dweight: bool
    dbias: bool

    @property
    def wants_dx(self) -> bool:
        return self.dx is not None or self.dropped is not None


def make_put(tag, kind, weight_kind, outputs, streams):
    """put(dx, dropped, dsum, j, d, chance): d, the gradient by what was normalized, on its way."""
    compute = memory.compute_type(kind)
    own_nan = weight_kind in (None, kind)
    store, store_dropped = (
        memory.make_storer(to or kind, compute, own_nan and to == kind, stream)
        for to, stream in zip((outputs.dx, outputs.dropped), streams, strict=True)
    )
    load_dsum, drop = tasks.Codec(kind, 16).load, make_dropper(tag, compute, outputs.drops)
    summed, stores = outputs.summed, outputs.dx is not None
    stores_dropped = outputs.dropped is not None

    @tasks.inlined(tag)
    def put(dx, dropped, dsum, j, d, chance):
        if summed:
            d = d + load_dsum(dsum, j)
        if stores:
            store(dx, j, d)
        if stores_dropped:
            store_dropped(dropped, j, drop(d, j, chance))

    return put


def make_places(tag, kind, outputs):
    """stage(dx, dropped, row, n, scratch, k, start, streaming): the addresses at which elements
    from `start` on of a row of dx and of dropped are stored, the k-th of those made at a time;
    flush(dx, dropped, row, n, scratch, k, start, stop, streaming): moves them to their rows."""
    stores, stores_dropped = outputs.dx is not None, outputs.dropped is not None
    sizes = [tasks.ITEMSIZE[to or kind] for to in (outputs.dx, outputs.dropped)]
    dx_size, dropped_size = sizes
    (stage_dx, flush_dx), (stage_dropped, flush_dropped) = map(make_streaming_stores, sizes)

    @tasks.inlined(tag)
    def stage(dx, dropped, row, n, scratch, k, start, streaming):
        return (
            stage_dx(dx + row * n * dx_size, scratch + k * STAGING, start, streaming),
            stage_dropped(
                dropped + row * n * dropped_size,
                scratch + (k + TOGETHER) * STAGING,
                start,
                streaming,
            ),
        )

    @tasks.inlined(tag)
    def flush(dx, dropped, row, n, scratch, k, start, stop, streaming):
        if stores:
            flush_dx(dx + row * n * dx_size, scratch + k * STAGING, start, stop, streaming)
        if stores_dropped:
            at, waiting = row * n * dropped_size, scratch + (k + TOGETHER) * STAGING
            flush_dropped(dropped + at, waiting, start, stop, streaming)

    return stage, flush
