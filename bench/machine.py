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

from fastopt.cli.demo.record import cpu_name
from fastopt.cli.shared import hardware

# Those a figure may depend on; peers are listed where they are installed.
PACKAGES = (
    "fastopt", "torch", "numba", "llvmlite", "numpy",
    "deepspeed", "torch-optimi", "bitsandbytes", "torchao",
)  # fmt: skip

_ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """The machine and the software of this process, as plain values."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": hardware.caches(),
        "memory_gib": hardware.memory_gib(),
        "transparent_huge_pages": hardware.huge_pages(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


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
