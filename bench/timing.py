"""Interleaved timing: all subjects take turns, round after round, in orders that change.

A machine's speed drifts by more than the differences looked for, so a ratio is only taken between
steps of the same round, and the figure is the median over rounds.
"""

from __future__ import annotations

import gc
import random
import resource
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

# Compiles kernels, makes states, fills the allocator; the same number for each subject, so that
# their parameters can be compared afterwards.
WARM_STEPS = 3
# A burst is long enough that its median step does not see the caches its predecessor left.
BURST_S = 0.03
BURST_STEPS = (3, 200)
# From here on, preparation included, a single step settles its own caches.
SINGLE_STEP_S = 0.05
MIN_ROUNDS = 5


@dataclass
class Subject:
    """One of those who take turns: prepare() is not timed, step() is.

    params: what the step updates, if anything
    """

    step: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    params: list[Any] = field(default_factory=list)

    def warm(self) -> None:
        for _ in range(WARM_STEPS):
            self.prepare()
            self.step()

    def time(self) -> float:
        self.prepare()
        start = perf_counter()
        self.step()
        return perf_counter() - start

    def page_faults(self) -> int:
        """Of the second of two steps: the first may find the heap as others left it."""
        return [self._page_faults() for _ in range(2)][-1]

    def _page_faults(self) -> int:
        self.prepare()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self.step()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@dataclass
class Timing:
    """What one subject took.

    rounds:      seconds a step, the median of each round's burst
    page_faults: in one step, memory that was asked for anew
    """

    page_faults: int
    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def record(self, n_bytes: int) -> dict[str, Any]:
        """Median and quartiles as plain values, with the rate at which n_bytes a step moved."""
        low, median, high = statistics.quantiles(self.rounds, method="inclusive")
        return {
            "ms": 1e3 * median,
            "low_ms": 1e3 * low,
            "high_ms": 1e3 * high,
            "gb_per_s": n_bytes / median / 1e9,
            "page_faults": self.page_faults,
        }


@dataclass(frozen=True)
class Ratio:
    """How many times as fast, round by round: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, slower: Timing, faster: Timing) -> Ratio:
        pairs = zip(slower.rounds, faster.rounds, strict=True)
        low, median, high = statistics.quantiles([a / b for a, b in pairs], method="inclusive")
        return cls(median, low, high)


def interleave(subjects: Mapping[str, Subject], seconds: float) -> dict[str, Timing]:
    """Time warmed-up subjects against each other for about so many seconds.

    The order of a round is drawn anew each time, so nobody always runs in the cache, or beside
    the threads, that the same predecessor left behind. Garbage collection waits until the end of
    a burst, as in timeit.
    """
    timings = {name: Timing(subject.page_faults()) for name, subject in subjects.items()}
    bursts = {name: _burst_steps(subject) for name, subject in subjects.items()}
    order = list(subjects)
    shuffle = random.Random(0).shuffle
    deadline = perf_counter() + seconds
    n_rounds = 0
    while n_rounds < MIN_ROUNDS or perf_counter() < deadline:
        shuffle(order)
        for name in order:
            timings[name].rounds.append(_burst(subjects[name], bursts[name]))
        n_rounds += 1
    return timings


def _burst_steps(subject: Subject) -> int:
    start = perf_counter()
    subject.time()
    seconds = perf_counter() - start
    if seconds > SINGLE_STEP_S:
        return 1
    fewest, most = BURST_STEPS
    return max(fewest, min(most, round(BURST_S / seconds)))


def _burst(subject: Subject, n_steps: int) -> float:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return statistics.median(subject.time() for _ in range(n_steps))
    finally:
        if was_enabled:
            gc.enable()
