"""Rows: AdamW at 33M elements with other sizes of block, chunk and program than the engine has.

What the engine's constants were chosen by, on the machine at hand; nothing else reads it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

import fastopt
from bench.gpu_device import Device
from bench.gpu_rows import NotApplicableError, Row
from bench.providers import traffic

N = 33_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 20
BURST = 8
# (threads a program, bytes an access of a thread, elements a chunk); the engine's own come first.
CANDIDATES = (
    (128, 16, 4096), (128, 16, 16384), (128, 8, 4096), (128, 32, 4096), (256, 16, 4096),
    (256, 16, 16384), (256, 8, 8192), (512, 16, 8192), (64, 16, 4096), (128, 16, 1024),
)  # fmt: skip


def rows(device: Device, quick: bool) -> Iterator[Row]:
    from fastopt_kernels.gpu.step import engine  # needs triton

    for dtype in list(DTYPES)[: 1 if quick else None]:
        for threads, width, chunk in CANDIDATES[:1] if quick else CANDIDATES:
            name = f"{dtype} {threads} threads, {8 * width} bits, chunk {chunk}"
            n = 1000 if quick else N
            run = partial(_time, device, engine, dtype, threads, width, chunk, n)
            yield Row(name, run, 2)


def _time(
    device: Device, engine: ModuleType, dtype: str, threads: int, width: int, chunk: int, n: int
) -> dict[str, Any]:
    itemsize = DTYPES[dtype].itemsize
    block = threads * width // itemsize
    if block > chunk:
        raise NotApplicableError(f"a block of {block} elements is larger than the chunk")
    kept = {name: getattr(engine, name) for name in ("THREADS", "CHUNK", "BLOCK")}
    try:
        engine.THREADS, engine.CHUNK = threads, chunk
        engine.BLOCK = engine.BLOCK | {dtype: block}
        ms = _adamw(device, DTYPES[dtype], n)
    finally:
        for name, value in kept.items():
            setattr(engine, name, value)
    gbps = n * traffic("AdamW", DTYPES[dtype]) / ms / 1e6
    return {"threads": threads, "bytes": width, "chunk": chunk, "ms": ms, "gbps": gbps}


def _adamw(device: Device, dtype: torch.dtype, n: int) -> float:
    param = nn.Parameter(torch.randn(n, device=device.device, dtype=dtype))
    param.grad = torch.randn_like(param)
    optimizer = fastopt.optim.AdamW([param])

    burst_of, rounds = (BURST, ROUNDS) if device.device.type != "cpu" else (1, 2)

    def burst() -> None:
        for _ in range(burst_of):
            optimizer.step()

    burst()
    seconds = []
    for _ in range(rounds):
        device.synchronize()
        elapsed = device.time(burst)
        device.synchronize()
        seconds.append(elapsed() / burst_of)
    return statistics.median(seconds) * 1e3
