"""torch.compile of whole training steps with graph breaks in them.

What a tracer splits between an address and the launch that uses it corrupts the heap: the steps run
in processes of their own, whose allocator aborts then and fills what is freed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import cache

import pytest

from tests.hostile.compiled import CASES, STEPS, WAYS
from tests.optim.workers import environment

TOLERANCE = {"abs": 2e-5, "rel": 2e-5}


@cache
def found(way: str) -> tuple[dict[str, tuple[list[float], list[float]]], str]:
    """The losses of each case, without compiling and with it, and what the process left."""
    checked = environment(
        MALLOC_CHECK_="3",
        MALLOC_PERTURB_="165",
        OMP_NUM_THREADS="1",
        # Inductor keeps graphs by what is in them, not by the sources of ops that they call.
        TORCHINDUCTOR_CACHE_DIR=tempfile.mkdtemp(prefix="fastopt-inductor-"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.compiled", way],
        capture_output=True,
        text=True,
        timeout=1200,
        env=checked,
        check=False,
    )
    lines = map(json.loads, done.stdout.splitlines())
    left = f"exit code {done.returncode}\n{done.stderr[-2000:]}"
    return {case: (plain, compiled) for case, plain, compiled in lines}, left


def check_losses(plain: list[float], compiled: list[float]) -> None:
    assert len(compiled) == STEPS
    assert compiled == pytest.approx(plain, **TOLERANCE)
    assert plain[-1] < plain[0] - 0.05, "nothing was learned"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_without_compiling(way: str, case: str) -> None:
    results, left = found(way)
    assert case in results, left
    check_losses(*results[case])


def test_other_losses_would_be_noticed() -> None:
    plain = [2.0 - 0.02 * step for step in range(STEPS)]
    check_losses(plain, plain)
    with pytest.raises(AssertionError):
        check_losses(plain, [*plain[:-1], plain[-1] + 1e-3])
    with pytest.raises(AssertionError):
        check_losses(plain[:1] * STEPS, plain[:1] * STEPS)
