"""The first step in a new process: what fastopt adds to the first step of torch.optim.AdamW.

A process imports torch and the optimizer, makes four parameters and steps once. fastopt's may find
its kernels on disk ("compiled before") or not ("never compiled"); $FASTOPT_CACHE_DIR is where it
looks. The three take turns, and what counts is the difference within a turn.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from time import perf_counter
from typing import Any

TURNS, QUICK_TURNS = 5, 1
BEFORE, NEVER = "compiled before", "never compiled"
# Seconds beyond torch's own first step, at most.
GOALS = {BEFORE: 0.6, NEVER: 3.5}

_CACHE = "FASTOPT_CACHE_DIR"


def measure(quick: bool) -> list[dict[str, Any]]:
    """Medians over the turns: seconds of torch's process and of fastopt's, and what it adds."""
    taken: dict[str, list[float]] = {"torch": [], BEFORE: [], NEVER: []}
    with tempfile.TemporaryDirectory() as kept:
        # Not counted: compiles the kernels that are kept, and reads every file into memory once.
        _in_new_process("fastopt.optim", kept)
        for _ in range(QUICK_TURNS if quick else TURNS):
            taken["torch"].append(_in_new_process("torch.optim", kept))
            taken[BEFORE].append(_in_new_process("fastopt.optim", kept))
            with tempfile.TemporaryDirectory() as empty:
                taken[NEVER].append(_in_new_process("fastopt.optim", empty))
    return [
        {
            "case": f"first step, {state}",
            "torch_s": statistics.median(taken["torch"]),
            "fastopt_s": statistics.median(taken[state]),
            "beyond_s": statistics.median(
                ours - theirs for ours, theirs in zip(taken[state], taken["torch"], strict=True)
            ),
            "at_most_s": at_most,
            "turns": len(taken[state]),
        }
        for state, at_most in GOALS.items()
    ]


def _in_new_process(module: str, cache: str) -> float:
    command = [sys.executable, "-m", "bench.first_step", module]
    environment = {**os.environ, _CACHE: cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        reason = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"a process that steps {module}.AdamW once failed: {reason}")
    return float(done.stdout)


def _step_once(module: str) -> float:
    """Seconds from before `import torch` to after the first step."""
    start = perf_counter()
    import importlib

    import torch

    optim = importlib.import_module(module)
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((784, 128), 128, (128, 10), 10)]
    for param in params:
        param.grad = torch.ones_like(param)
    optim.AdamW(params).step()
    return perf_counter() - start


if __name__ == "__main__":
    print(_step_once(sys.argv[1]))
