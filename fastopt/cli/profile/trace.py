"""A Chrome trace of some steps, by torch.profiler: kernels are there as fastopt::<name>."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def profiled(step: Callable[[], Any], device: torch.device, n_steps: int) -> Any:
    """torch.profiler's record of some steps; the first, which it slows down, is left out."""
    step()
    activities = [ProfilerActivity.CPU]
    if device.type != "cpu":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as record:
        for _ in range(n_steps):
            step()
    return record


def chrome(step: Callable[[], Any], device: torch.device, n_steps: int) -> bytes:
    """The file's content, for chrome://tracing and https://ui.perfetto.dev."""
    record = profiled(step, device, n_steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        return path.read_bytes()
