"""The machine as the system tells it: caches, memory, and how many CPUs a process may use."""

from __future__ import annotations

import os
from pathlib import Path

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def caches() -> dict[str, str]:
    """Sizes as one core sees them, such as {"L1 data": "32K"}; empty where the system is silent."""
    sizes = {}
    for index in sorted(_CACHES.glob("index*")):
        kind = _read(index / "type").lower()
        suffix = "" if kind == "unified" else f" {kind}"
        sizes[f"L{_read(index / 'level')}{suffix}"] = _read(index / "size")
    return sizes


def memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def huge_pages() -> str:
    """The chosen word of "always [madvise] never"; empty where the system is silent."""
    return _read(_HUGE_PAGES).partition("[")[2].partition("]")[0]


def usable_cpus() -> float:
    """CPUs this process may run on: its affinity, and a container's quota, which may be 1.5."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quota, _, period = _read(_QUOTA).partition(" ")
    if quota.isdecimal() and period.isdecimal():
        return min(float(allowed), int(quota) / int(period))
    return float(allowed)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
