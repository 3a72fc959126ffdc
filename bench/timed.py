"""One benchmark under pytest-benchmark: how long it runs, and what is saved beside its times.

`fastopt bench --compare` reads `case` and `provider` from what is saved: the same case by another
provider has the same `case`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

from bench import machine
from bench.allocator import DEFAULT, WARM, is_warm
from bench.measure import copy_gb_per_s
from bench.timing import WARM_STEPS, Subject

SECONDS = 0.5
ROUNDS = (3, 500)


@dataclass(frozen=True)
class Facts:
    """group: op and shape, one table; case: group, dtype and pass, what providers share

    n_bytes: what a step cannot avoid to read and write
    error:   from float64, as a share; None where a function draws random numbers
    """

    group: str
    case: str
    provider: str
    dtype: str
    n_bytes: int
    error: float | None


def slug(name: str) -> str:
    """A name as a part of a test's id: what -k can be told without quotes."""
    for old, new in ((", ", "-"), (" + ", "+"), (" x ", "x"), (" ", "-")):
        name = name.replace(old, new)
    return name.lower()


def warm(subject: Subject) -> None:
    """Compiles, makes states, fills the allocator; one step is enough where it takes long."""
    start = perf_counter()
    for _ in range(WARM_STEPS):
        subject.time()
        if perf_counter() - start > SECONDS:
            return


def time(benchmark: Any, subject: Subject, facts: Facts) -> float | None:
    """Times a warmed-up subject for SECONDS; returns the median, None under --benchmark-disable."""
    benchmark.group = facts.group
    fewest, most = ROUNDS
    rounds = max(fewest, min(most, round(SECONDS / subject.time())))
    benchmark.pedantic(subject.step, setup=subject.prepare, rounds=rounds)
    if benchmark.stats is None:
        return None
    seconds: float = benchmark.stats.stats.median
    gb_per_s = facts.n_bytes / seconds / 1e9
    benchmark.extra_info |= {
        "case": facts.case,
        "provider": facts.provider,
        "dtype": facts.dtype,
        "bytes": facts.n_bytes,
        "gb_per_s": gb_per_s,
        "share_of_copy": gb_per_s / _copy_gb_per_s(),
        "error": facts.error,
        "page_faults": subject.page_faults(),
        "load": os.getloadavg()[0],
        **_machine(),
    }
    return seconds


@cache
def _copy_gb_per_s() -> float:
    return copy_gb_per_s()


@cache
def _machine() -> dict[str, Any]:
    found = machine.describe()
    return {
        "copy_gb_per_s": _copy_gb_per_s(),
        "allocator": WARM if is_warm() else DEFAULT,
        "versions": found["packages"],
        **{name: found[name] for name in ("cpu", "cores", "threads", "caches", "system", "python")},
    }
