"""Rows: every row function, forward alone and forward + backward, as a share of a device copy.

Who takes turns and how is as for the optimizers' steps (`gpu_turns`); which cases, and their bytes,
`gpu_timed` says. linear_cross_entropy is also weighed: the memory it takes at its peak.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu_device import Device
from bench.gpu_rows import NotApplicableError, Row
from bench.gpu_timed import DTYPES, FLAG_GEMS, TimedCase, cases, provided, together
from bench.gpu_turns import (
    WARM,
    Subject,
    copies_beyond_cache,
    copy_bytes_per_second,
    interleaved,
    launches,
    with_shares,
)
from bench.providers import FASTOPT, NoStepError, import_peer
from bench.row_cases import BOTH, PASSES
from bench.row_ops import PEERS_TOLERANCE, TOLERANCE, check
from bench.row_providers import ATEN

ROUNDS = 20
# x, y, dy and dx.
TENSORS = 4
WEIGHED = "linear_cross_entropy"


def rows(device: Device, quick: bool) -> Iterator[Row]:
    for case in cases(quick):
        rounds = 1 if quick else ROUNDS
        seconds = 15.0 if case.compiled else 4.0
        yield Row(case.name, partial(_measured, device, case, rounds), seconds)
        if case.op == WEIGHED:
            yield Row(f"peak memory: {case.name}", partial(_peaks, device, case), 5)


def _measured(device: Device, case: TimedCase, rounds: int) -> dict[str, Any]:
    n_copies = copies_beyond_cache(device, TENSORS * case.n_elements * DTYPES[case.dtype].itemsize)
    copy = copy_bytes_per_second(device)
    passes: dict[str, Any] = {}
    for which, n_bytes in zip(PASSES, case.n_bytes, strict=True):
        backward = which == BOTH
        found = _times(device, case, together(case), n_copies, backward, rounds)
        found |= _flag_gems(device, case, n_copies, backward, rounds)
        passes[which] = {"bytes": n_bytes, **with_shares(copy, n_bytes, found)}
    return {
        "elements": case.n_elements,
        "copy_gbps": copy / 1e9,
        "inputs": n_copies,
        "passes": passes,
    }


def _times(
    device: Device,
    case: TimedCase,
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
    device: Device, case: TimedCase, n_copies: int, backward: bool, rounds: int
) -> dict[str, Any]:
    """It replaces ATen's functions for as long as it is in use: timed after the others."""
    try:
        gems = import_peer("flag_gems")
    except NoStepError as reason:
        return {FLAG_GEMS: {"unavailable": str(reason)}}
    with gems.use_gems():
        return _times(device, case, (FLAG_GEMS,), n_copies, backward, rounds)


def _subject(
    device: Device, case: TimedCase, provider: str, n_copies: int, backward: bool
) -> Subject:
    """The provider's function on inputs of its own: some write to them. Raises where it is wrong,
    or has none."""
    function = provided(provider, case)
    works = [case.work(device) for _ in range(n_copies)]
    if provider != ATEN:
        tight = provider == FASTOPT and not case.coarse
        allowed = TOLERANCE[case.dtype] if tight else PEERS_TOLERANCE
        check(works[0].results(function, backward), works[0].oracle(torch.float32), allowed)
    subject = Subject([work.step(function, backward) for work in works], [[]])
    for _ in range(WARM if device.device.type != "cpu" else 1):
        subject.burst(n_copies)
    device.synchronize()
    return subject


def _peaks(device: Device, case: TimedCase) -> dict[str, Any]:
    """By how many bytes allocated memory grows at its peak, forward and backward, each alone."""
    if device.device.type == "cpu":
        raise NotApplicableError("a CPU's allocator keeps no peak")
    found = {}
    for name, function in ((FASTOPT, case.ours), (ATEN, case.eager)):
        found[name] = _peak(device, case.work(device).step(function, True))
    return {"peak_bytes": found, "share": found[FASTOPT] / found[ATEN]}


def _peak(device: Device, step: Callable[[], Any]) -> int:
    step()
    device.free_bytes()
    device.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    device.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
