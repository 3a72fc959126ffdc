"""Providers taking turns on a device: what is timed, how, and beside which copy.

Round after round in changing order, on memory of their own. Three times are taken: in bursts (the
device never waits, which is what a training loop sees), alone (queue and host included) and of the
kernels (torch.profiler). What is small is repeated over several inputs that together exceed the
last-level cache several times over.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial
from time import perf_counter
from typing import Any

import torch

from bench.gpu_device import Device
from bench.providers import FASTOPT

ROUNDS = 20
BURST_S = 2e-3
MAX_BURST = 60
# Inputs of a small case: their memory exceeds the last-level cache so many times.
CACHES = 3
MAX_COPIES = 64
COPY_BYTES = 2**30
# Rounds through all inputs before anything is timed.
WARM = 3


class Subject:
    """A provider with its copies of a model, stepped in turn."""

    def __init__(self, steps: Sequence[Callable[[], Any]], params: Sequence[list[Any]]) -> None:
        self.steps, self.params = steps, params
        self._turns = itertools.cycle(steps)

    def burst(self, n: int) -> None:
        for _ in range(n):
            next(self._turns)()

    def rebind(self) -> None:
        """New gradient objects, as zero_grad and a backward leave them."""
        for p in self.params[0]:
            p.grad = p.grad.detach()

    def alone(self) -> None:
        self.steps[0]()


@cache
def copy_bytes_per_second(device: Device) -> float:
    """A device copy, bytes read plus bytes written: the median of bursts of five."""
    n = COPY_BYTES if device.device.type != "cpu" else 2**20
    if device.device.type != "cpu":
        n = min(n, device.free_bytes() // 8)
    source = torch.empty(n, dtype=torch.uint8, device=device.device).random_(0, 256)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(5):
            target.copy_(source)

    for _ in range(3):
        copies()
    seconds = []
    for _ in range(ROUNDS):
        device.synchronize()
        elapsed = device.time(copies)
        device.synchronize()
        seconds.append(elapsed() / 5)
    if not torch.equal(source, target):
        raise AssertionError("the copy is not one")
    return 2 * n / statistics.median(seconds)


def copies_beyond_cache(device: Device, n_bytes: int) -> int:
    if device.device.type == "cpu":
        return 1
    cache_bytes = getattr(
        torch.cuda.get_device_properties(device.device), "L2_cache_size", 64 * 2**20
    )
    return max(1, min(MAX_COPIES, math.ceil(CACHES * cache_bytes / n_bytes)))


def with_shares(copy: float, n_bytes: int, found: dict[str, Any]) -> dict[str, Any]:
    """The times of each provider with its rate as a share of a copy's, and how many times as fast
    fastopt is."""
    for times in found.values():
        if "ms" in times:
            times["gbps"] = n_bytes / times["ms"] / 1e6
            times["share"] = times["gbps"] * 1e9 / copy
            if times.get("kernel_ms"):
                times["kernel_share"] = n_bytes / times["kernel_ms"] * 1e3 / copy
    ours = found[FASTOPT]["ms"]
    ratios = {name: t["ms"] / ours for name, t in found.items() if name != FASTOPT and "ms" in t}
    return {"providers": found, "times_as_fast_as": ratios}


def interleaved(
    device: Device, subjects: dict[str, Subject], copies: int, rounds: int
) -> dict[str, dict[str, Any]]:
    bursts: dict[str, int] = {}
    for name, subject in subjects.items():
        elapsed = device.time(partial(subject.burst, copies))
        device.synchronize()
        steps = math.ceil(BURST_S / max(elapsed() / copies, 1e-7))
        bursts[name] = max(copies, min(MAX_BURST, steps))
    burst_s: dict[str, list[float]] = {name: [] for name in subjects}
    alone_s: dict[str, list[float]] = {name: [] for name in subjects}
    host_s: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            device.synchronize()
            elapsed = device.time(partial(subjects[name].burst, bursts[name]))
            device.synchronize()
            burst_s[name].append(elapsed() / bursts[name])
        for name in order:
            subjects[name].rebind()
            device.synchronize()
            start = perf_counter()
            elapsed = device.time(subjects[name].alone)
            host_s[name].append(perf_counter() - start)
            device.synchronize()
            alone_s[name].append(elapsed())
    return {
        name: {
            "ms": statistics.median(burst_s[name]) * 1e3,
            "spread": _spread(burst_s[name]),
            "alone_ms": statistics.median(alone_s[name]) * 1e3,
            "host_ms": statistics.median(host_s[name]) * 1e3,
            "copies_of_the_model": copies,
            "rounds": rounds,
        }
        for name in subjects
    }


def _spread(seconds: Sequence[float]) -> float:
    """The distance of the quartiles as a part of the median."""
    if len(seconds) < 2:
        return 0.0
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / median


def launches(device: Device, subject: Subject) -> dict[str, Any]:
    try:
        found = device.launches(subject.alone)
    except Exception as error:
        return {"kernels": None, "profiler": f"{type(error).__name__}: {error}"[:200]}
    return {
        "kernels": found.kernels,
        "copies": found.copies,
        "kernel_ms": None if found.seconds is None else found.seconds * 1e3,
        "counted_by": found.by,
    }
