"""The raw record of a demo: every number, with the machine and the versions it was measured on."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastopt
from fastopt.cli.demo.race import WARMUP_STEPS, Comparison, Run

PACKAGES = ("torch", "numba", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Conditions:
    """The options of a run and the machine it ran on."""

    seed: int
    quick: bool
    threads: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seed": self.seed,
            "quick": self.quick,
            "threads": self.threads,
            "warmup_steps": WARMUP_STEPS,
            "cpu": cpu_name(),
            "cpu_count": os.cpu_count(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "fastopt": fastopt.__version__,
        } | {name: _version(name) for name in PACKAGES}

    def __str__(self) -> str:
        threads = f"{self.threads} thread" + "s" * (self.threads != 1)
        return (
            f"{cpu_name()}, {threads}; fastopt {fastopt.__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}; seed {self.seed}"
        )


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def as_dict(conditions: Conditions, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Every number of the demo, as plain dicts, lists and floats; times in milliseconds."""
    return conditions.as_dict() | {"tasks": [_task(comparison) for comparison in comparisons]}


def _task(comparison: Comparison) -> dict[str, Any]:
    task = comparison.task
    return {
        "name": task.name,
        "title": task.title,
        "parameters": task.n_parameters,
        "tensors": task.n_tensors,
        "lr": task.lr,
        "steps": len(task.batches),
        "input_shape": list(task.batches[0][0].shape),
        "runs": {run.provider: _run(run, comparison) for run in comparison.runs},
    }


def _run(run: Run, comparison: Comparison) -> dict[str, Any]:
    return {
        "final_loss": _finite(run.final_loss),
        "held_out_loss": _finite(run.held_out_loss),
        "held_out_accuracy": run.held_out_accuracy,
        "largest_gap": _finite(run.gap(comparison.runs[0])),
        "median_optimizer_ms": run.optimizer_ms,
        "median_step_ms": run.step_ms,
        "losses": [_finite(loss) for loss in run.losses],
        "optimizer_ms": [1e3 * s for s in run.optimizer_s],
        "step_ms": [1e3 * s for s in run.step_s],
    }


def _finite(x: float) -> float | None:
    """x, or None where it is NaN or infinite, which JSON cannot say."""
    return x if math.isfinite(x) else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
