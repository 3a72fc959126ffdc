"""Rows: every row function, forward alone and forward + backward, as a share of a device copy.

Who takes turns and how is as for the optimizers' steps (`gpu_speed`): in bursts, alone, and the
kernels by themselves. A function is called in turn on several inputs that together exceed the
last-level cache several times over. The bytes are those that no such function can avoid
(`row_ops`); a copy's are those it reads and those it writes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu_device import Device
from bench.gpu_functions import (
    FLAG_GEMS,
    QUICK,
    SPEED_CASES,
    SpeedCase,
    provided,
    together,
)
from bench.gpu_rows import Row
from bench.gpu_speed import (
    DTYPES,
    Subject,
    copies_beyond_cache,
    copy_bytes_per_second,
    interleaved,
    launches,
    with_shares,
)
from bench.providers import FASTOPT, NoStepError, import_peer
from bench.row_cases import BOTH, PASSES
from bench.row_ops import OPS, PEERS_TOLERANCE, TOLERANCE, Workload, check
from bench.row_providers import ATEN

ROUNDS = 15
# x, y, dy and dx.
TENSORS = 4


def rows(device: Device, quick: bool, compiled: bool) -> Iterator[Row]:
    """compiled: torch.compile takes turns with the others."""
    cases = [SpeedCase(op, QUICK, "fp32") for op in OPS] if quick else SPEED_CASES
    for case in cases:
        rounds = 2 if quick else ROUNDS
        yield Row(case.name, partial(_measured, device, case, compiled, rounds), 5)


def _measured(device: Device, case: SpeedCase, compiled: bool, rounds: int) -> dict[str, Any]:
    op, dtype = OPS[case.op], DTYPES[case.dtype]
    n = case.shape[0] * case.shape[1]
    n_copies = copies_beyond_cache(device, TENSORS * n * dtype.itemsize)
    copy = copy_bytes_per_second(device)
    passes: dict[str, Any] = {}
    for which in PASSES:
        backward = which == BOTH
        found = _times(device, case, together(compiled), n_copies, backward, rounds)
        found |= _flag_gems(device, case, n_copies, backward, rounds)
        n_bytes = op.traffic(dtype, backward) * n
        passes[which] = {"bytes": n_bytes, **with_shares(copy, n_bytes, found)}
    return {
        "elements": n,
        "copy_gbps": copy / 1e9,
        "inputs": n_copies,
        "passes": passes,
    }


def _times(
    device: Device,
    case: SpeedCase,
    providers: Sequence[str],
    n_copies: int,
    backward: bool,
    rounds: int,
) -> dict[str, Any]:
    subjects: dict[str, Subject] = {}
    found: dict[str, Any] = {}
    for name in providers:
        try:
            subjects[name] = _subject(device, case, name, n_copies, backward)
        except NoStepError as reason:
            if name == FASTOPT:
                raise
            found[name] = {"unavailable": str(reason)}
        except Exception as error:
            if name in (FASTOPT, ATEN):
                raise
            found[name] = {"unavailable": f"{type(error).__name__}: {error}"[:200]}
    found |= interleaved(device, subjects, n_copies, rounds)
    if FASTOPT in subjects:
        found[FASTOPT] |= launches(device, subjects[FASTOPT])
    subjects.clear()
    gc.collect()
    return found


def _flag_gems(
    device: Device, case: SpeedCase, n_copies: int, backward: bool, rounds: int
) -> dict[str, Any]:
    """It replaces ATen's functions for as long as it is in use: timed after the others."""
    try:
        gems = import_peer("flag_gems")
    except NoStepError as reason:
        return {FLAG_GEMS: {"unavailable": str(reason)}}
    with gems.use_gems():
        return _times(device, case, (FLAG_GEMS,), n_copies, backward, rounds)


def _subject(
    device: Device, case: SpeedCase, provider: str, n_copies: int, backward: bool
) -> Subject:
    """The provider's function on inputs of its own: some write to them. Raises where it is wrong,
    or has none."""
    function = provided(provider, case.op)
    works = [
        Workload(OPS[case.op], case.shape, DTYPES[case.dtype], device.device)
        for _ in range(n_copies)
    ]
    if provider != ATEN:
        allowed = TOLERANCE[case.dtype] if provider == FASTOPT else PEERS_TOLERANCE
        check(works[0].results(function, backward), works[0].oracle(torch.float32), allowed)
    subject = Subject([work.step(function, backward) for work in works], [[]])
    for _ in range(3):
        subject.burst(n_copies)
    device.synchronize()
    return subject
