"""What a figure is worth without its machine: processor, caches, memory, versions, commit, date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastopt.cli.record import cpu_name

# Those a figure may depend on; peers are listed where they are installed.
PACKAGES = (
    "fastopt", "torch", "numba", "llvmlite", "numpy",
    "deepspeed", "torch-optimi", "bitsandbytes", "torchao",
)  # fmt: skip

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """The machine and the software of this process, as plain values."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": _caches(),
        "memory_gib": _memory_gib(),
        "transparent_huge_pages": _chosen(_read(_HUGE_PAGES)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _caches() -> dict[str, str]:
    """Sizes as one core sees them, such as {"L1 data": "32K"}; empty where the system is silent."""
    sizes = {}
    for index in sorted(_CACHES.glob("index*")):
        kind = _read(index / "type").lower()
        suffix = "" if kind == "unified" else f" {kind}"
        sizes[f"L{_read(index / 'level')}{suffix}"] = _read(index / "size")
    return sizes


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _chosen(options: str) -> str:
    """The bracketed word of "always [madvise] never"."""
    return options.partition("[")[2].partition("]")[0]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that was measured, "+" behind it where files have changed since."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changes)
