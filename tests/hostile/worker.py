"""What a process of test_ranks is: a module of its own, so that a spawned child imports it without
the tests."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.hostile import in_backward, in_parts
from tests.hostile.ranks import WORLD, Found, process_group

RUNS = (
    in_backward.run_released_ddp,
    in_backward.run_released_fsdp,
    in_backward.run_refused_releases,
    in_parts.run_norms,
    in_parts.run_wrapped_later,
    in_parts.run_elementwise,
    in_parts.run_scalers,
)


def main(rank: int, folder: str) -> None:
    """Saves what a rank found. One that fails ends, and the other with it."""
    torch.set_num_threads(1)
    found: Found = {}
    with process_group(folder, rank, WORLD):
        for run in RUNS:
            found |= run(rank)
        torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()
