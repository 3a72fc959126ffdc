"""Ranks of a process group, for tests that look at what each of them found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def run_ranks(
    work: Callable[[int, str], None], folder: Path, world: int, timeout: float
) -> list[dict[str, Any]]:
    """Run work(rank, folder) in a process for each rank; what each has saved as `<rank>.pt`.

    timeout: seconds for the first rank to end, and for the others after it
    """
    context = mp.spawn(work, args=(str(folder),), nprocs=world, join=False)
    try:
        assert context.join(timeout=timeout) or context.join(timeout=timeout), "ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
