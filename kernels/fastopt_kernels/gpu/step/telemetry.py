"""Telemetry of the elements that a launch passes over: `cpu/step/telemetry.py`, for Triton.

Squares in float64, where none of a float32 overflows or vanishes: the one exception among update
kernels, of launches that are watched. Each thread adds up what it has of a block, and the threads
what they have of a chunk, in an order that the shapes fix.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from fastopt_kernels.chunks import TELEMETRY
from fastopt_kernels.gpu.step.tables import Tables

N_TELEMETRY = tl.constexpr(len(TELEMETRY))


@triton.jit
def nothing(WATCHED: tl.constexpr, LANES: tl.constexpr):
    """The sums of no element, one a thread."""
    sums = ()
    if WATCHED:
        for _ in tl.static_range(3):
            sums += (tl.zeros((LANES,), tl.float64),)
        for _ in tl.static_range(2):
            sums += (tl.zeros((LANES,), tl.int32),)
    return sums


@triton.jit
def _add(total, x, mask, WIDTH: tl.constexpr):
    """A sum of each thread, with what it has of a block: WIDTH elements side by side, and again."""
    if mask is not None:
        x = tl.where(mask, x, tl.zeros_like(x))
    n: tl.constexpr = total.numel
    own = tl.sum(tl.reshape(x, (x.numel // (n * WIDTH), n, WIDTH)), axis=2)
    return total + tl.sum(own, axis=0)


@triton.jit
def see(sums, g, before, exact, after, mask, WIDTH: tl.constexpr):
    """The sums with a block taken in: its gradient, its parameter before the rule, as the rule has
    it, and as it is stored."""
    p, wide_g = exact.to(tl.float64), g.to(tl.float64)
    d = p - before.to(tl.float64)
    bad = (g - g != 0.0).to(tl.int32)
    lost = ((after == before) & ((exact != before) | (g != 0.0))).to(tl.int32)
    return (
        _add(sums[0], wide_g * wide_g, mask, WIDTH),
        _add(sums[1], p * p, mask, WIDTH),
        _add(sums[2], d * d, mask, WIDTH),
        _add(sums[3], bad, mask, WIDTH),
        _add(sums[4], lost, mask, WIDTH),
    )


@triton.jit
def see_skipped(sums, g, p, mask, WIDTH: tl.constexpr):
    """The same of a step that is skipped: nothing is updated, and nothing lost."""
    wide_g, wide_p = g.to(tl.float64), p.to(tl.float64)
    bad = (g - g != 0.0).to(tl.int32)
    return (
        _add(sums[0], wide_g * wide_g, mask, WIDTH),
        _add(sums[1], wide_p * wide_p, mask, WIDTH),
        sums[2],
        _add(sums[3], bad, mask, WIDTH),
        sums[4],
    )


@triton.jit
def write(seen_ptr, sums, grad_scale_ptr, HAS_SCALE: tl.constexpr):
    """The numbers (TELEMETRY) of this program."""
    inverse = tl.full((), 1.0, tl.float64)
    if HAS_SCALE:
        inverse = inverse / tl.load(grad_scale_ptr).to(tl.float64)
    place_ptr = seen_ptr + tl.program_id(0).to(tl.int64) * N_TELEMETRY
    tl.store(place_ptr, tl.sum(sums[0], 0) * inverse * inverse)
    for k in tl.static_range(1, N_TELEMETRY):
        tl.store(place_ptr + k, tl.sum(sums[k], 0).to(tl.float64))


class Seen:
    """The memory where a launch leaves its telemetry until it is read.

    A captured graph writes here at every replay, for as long as it lives.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._room: torch.Tensor | None = None

    def room(self, parts: int) -> torch.Tensor:
        """(chunks * parts, len(TELEMETRY)) float64 on the device, for the next launch."""
        if self._room is None:
            shape = len(self._tables.lasting) * parts, len(TELEMETRY)
            self._room = torch.zeros(shape, dtype=torch.float64, device=self._tables.device)
        self._tables.outlive(self._room)
        return self._room

    def forget(self) -> None:
        """Other chunks come next."""
        self._room = None

    def merged(self, n: int) -> np.ndarray:
        """(n, len(TELEMETRY)) float64, in order of the tensors' chunks; waits for the device."""
        found = np.zeros((n, len(TELEMETRY)))
        if self._room is not None:
            if self._room.is_cuda:
                torch.cuda.synchronize(self._room.device)
            tensor = self._tables.lasting[:, 0]
            parts = len(self._room) // max(len(tensor), 1)
            np.add.at(found, np.repeat(tensor, parts), self._room.cpu().numpy())
        return found
