"""The cost of memory on this machine: a copy's bandwidth, and the fresh pages of a large output.

glibc returns a large block to the system when it is freed. The next output of that size is made of
fresh pages, and the first write to each asks the kernel for it: more time than most row functions
take. Under KEEP freed memory stays with the process.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter

import torch

VARIABLE = "GLIBC_TUNABLES"
# No block comes from mmap, and the heap is never trimmed. (Raising mmap_threshold would not do: it
# stops at 32 MiB, and a temporary of GPT-2's embedding has 154 MB.) Without the cache of small
# chunks: it holds on to the splinters that aligned blocks leave, a freed block then never fits the
# next request of its size, and the heap grows with every step. That cache is worth 2 to 4 % of a
# step on small tensors, to everybody alike.
KEEP = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=0x7fffffffffff:glibc.malloc.tcache_count=0"
)

OUTPUT_BYTES = 64 * 2**20
COPY_BYTES = 128 * 2**20
ROUNDS = 9
CHILD_TIMEOUT_S = 120


@dataclass(frozen=True)
class Cost:
    """ms of writing OUTPUT_BYTES into new memory and into memory that exists; faults of the new."""

    fresh_ms: float
    reused_ms: float
    page_faults: int


def copy_gb_per_s() -> float:
    """Bytes read and written a second by torch's copy_, from memory to memory; the fastest."""
    x, y = (torch.ones(COPY_BYTES // 4) for _ in range(2))
    seconds = min(_seconds(lambda: y.copy_(x)) for _ in range(ROUNDS))
    return 2 * COPY_BYTES / seconds / 1e9


def output_cost() -> Cost:
    """The same sum into an output of its own and into one that is there, in turns."""
    x = torch.ones(OUTPUT_BYTES // 4)
    out = torch.empty_like(x)

    def fresh() -> None:
        torch.add(x, 1)

    def reused() -> None:
        torch.add(x, 1, out=out)

    fresh()
    reused()
    pairs = [(_seconds(fresh), _seconds(reused)) for _ in range(ROUNDS)]
    fresh_s, reused_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fresh()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return Cost(1e3 * fresh_s, 1e3 * reused_s, faults)


def output_cost_kept() -> Cost | None:
    """The same in a process under KEEP; None where there is no glibc, or no such process ran."""
    if platform.libc_ver()[0] != "glibc":
        return None
    code = "from fastopt.cli.shared import memory; memory.print_cost()"
    environment = {**os.environ, VARIABLE: KEEP, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=CHILD_TIMEOUT_S,
        )
        return Cost(**json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def print_cost() -> None:
    """Runs in the child of output_cost_kept."""
    print(json.dumps(asdict(output_cost())))


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start
