"""The limits of this machine, measured in the same run: bytes moved and products summed.

The limit for a mix of reads and writes is the fastest of several passes that move as many bytes in
streams of their own without arithmetic. In a cache that is the cache's limit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch

from fastopt.cli.profile import clock
from fastopt.cli.profile.subjects import Traffic

# Longer streams are no faster or slower, only larger.
LONGEST = 256 << 20
PIECES = (1, 8, 64)
# Of square matrices whose product is timed.
WIDTH = {"cpu": 768, "cuda": 8192}


def bytes_per_s(traffic: Traffic, device: torch.device, budget: float = 0.4) -> float:
    """The highest rate at which this mix of streams was moved."""
    share = min(1.0, LONGEST / max(1, traffic.total))
    mix = Traffic(*(round(share * n) // 8 * 8 for n in traffic))
    passes = _by_numba(mix) if device.type == "cpu" else _by_torch(mix, device)
    for each in passes.values():
        clock.warm(each)
    fastest = min(clock.interleaved(passes, device, budget).values())
    return mix.total / fastest


def _by_numba(mix: Traffic) -> dict[str, Callable[[], object]]:
    from fastopt_kernels.cpu.base import bandwidth

    copied = min(mix.read, mix.written)
    wanted = {
        bandwidth.COPY: copied,
        bandwidth.READ: mix.read - copied,
        bandwidth.WRITE: mix.written - copied,
        bandwidth.UPDATE: mix.updated,
    }
    chosen = bandwidth.Streams(
        [(mode, n) for mode, n in wanted.items() if n] or [(bandwidth.COPY, 8)]
    )
    passes: dict[str, Callable[[], object]] = {
        f"{n} pieces": partial(chosen.run, n) for n in PIECES
    }
    if copied and not mix.updated and mix.read < 1.1 * copied:
        source, target = torch.ones(2, copied // 4).unbind()
        # It moves a little less, which is held against nobody.
        passes["torch copy_"] = lambda: target.copy_(source)
    return passes


def _by_torch(mix: Traffic, device: torch.device) -> dict[str, Callable[[], object]]:
    """One operator of torch for each part of the mix, one after the other."""

    def ones(n_bytes: int) -> torch.Tensor:
        return torch.ones(max(1, n_bytes // 4), device=device)

    copied = min(mix.read, mix.written)
    source, target = ones(copied), ones(copied)
    read, written, updated = (
        ones(n) for n in (mix.read - copied, mix.written - copied, mix.updated)
    )

    def run() -> None:
        if copied:
            target.copy_(source)
        if mix.read > copied:
            read.sum()
        if mix.written > copied:
            written.fill_(1.0)
        if mix.updated:
            updated.add_(1.0)

    return {"torch": run}


@cache
def operations_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """Of a square matrix product, in float32, or float64 for float64: 2 n^3 operations."""
    n = WIDTH[device.type]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    a, b, c = torch.ones(3, n, n, dtype=wide, device=device).unbind()

    def product() -> None:
        torch.mm(a, b, out=c)

    clock.warm(product)
    return float(2 * n**3 / clock.seconds(product, device, 0.2))
