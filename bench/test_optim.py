"""Every provider on every optimizer and model, one after the other: pytest bench -k adamw.

`step()` is timed whole, through the public class; gradients are put in place, or a forward and
backward run, outside of it. pytest-benchmark takes providers in sequence with the allocator as a
user has it, so these figures drift with the machine: for ratios run `python -m bench.report`.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from bench import limit
from bench.allocator import DEFAULT
from bench.cases import Case, Workload
from bench.models import REAL, SHAPES
from bench.providers import FASTOPT, OPTIMIZERS, PROVIDERS, TORCH, NoStepError, traffic
from bench.timing import Subject, interleave
from fastopt.cli.record import cpu_name

# Warnings are errors in the tests of this project; here they are those of other people's code.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [
    *[Case(name, model, allocator=DEFAULT) for name in OPTIMIZERS for model in (*SHAPES, REAL)],
    *[Case(name, "1000x1000", gradients="flat", allocator=DEFAULT) for name in ("AdamW", "SGD")],
    *[Case("AdamW", model, dtype="bf16", allocator=DEFAULT) for model in SHAPES],
]
SECONDS = 0.5
ROUNDS = (3, 500)


def _id(value: Case | str) -> str:
    name = value.name if isinstance(value, Case) else value
    return name.lower().replace(" ", "-")


def _subject(case: Case, provider: str) -> Subject:
    """The provider, warmed up; a skip where it has no such step, or a peer's step fails."""
    try:
        subject = Workload(case).subject(provider)
    except NoStepError as reason:
        pytest.skip(str(reason))
    try:
        subject.warm()
    except Exception as error:
        if provider == FASTOPT or provider in TORCH:
            raise
        pytest.skip(f"{provider} failed: {type(error).__name__}: {error}")
    return subject


@cache
def _limit_s(optimizer: str, n_elements: int, dtype: torch.dtype) -> float:
    """Seconds of the fastest kernel that moves the bytes of this step."""
    steps = limit.candidates(optimizer, n_elements, dtype)
    timings = interleave({name: Subject(step) for name, step in steps.items()}, SECONDS)
    return min(timing.median for timing in timings.values())


@pytest.mark.parametrize("provider", PROVIDERS, ids=_id)
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_step(benchmark, case: Case, provider: str) -> None:
    subject = _subject(case, provider)
    fewest, most = ROUNDS
    rounds = max(fewest, min(most, round(SECONDS / subject.time())))
    benchmark.group = case.name
    benchmark.pedantic(subject.step, setup=subject.prepare, rounds=rounds)

    n_elements, dtype = sum(p.numel() for p in subject.params), subject.params[0].dtype
    n_bytes = traffic(case.optimizer, dtype) * n_elements
    benchmark.extra_info |= {
        "bytes": n_bytes,
        "page_faults": subject.page_faults(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
    }
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        share = _limit_s(case.optimizer, n_elements, dtype) / seconds
        benchmark.extra_info |= {"gb_per_s": n_bytes / seconds / 1e9, "share_of_limit": share}
