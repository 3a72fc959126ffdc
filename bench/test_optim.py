"""Every provider on every optimizer and model, one after the other: pytest bench -k adamw.

`step()` is timed whole, through the public class; gradients are put in place, or a forward and
backward run, outside of it. pytest-benchmark takes providers in sequence with the allocator as a
user has it, so these figures drift with the machine: for ratios run `python -m bench.report`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from bench import limit, measure, timed
from bench.allocator import DEFAULT
from bench.cases import Case, Workload
from bench.models import DTYPES, REAL, SHAPES
from bench.providers import FASTOPT, OPTIMIZERS, PROVIDERS, TORCH, NoStepError, traffic
from bench.timing import Subject, interleave

# Warnings are errors in the tests of this project; here they are those of other people's code.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [
    *[Case(name, model) for name in OPTIMIZERS for model in (*SHAPES, REAL)],
    *[Case(name, "1000x1000", gradients="flat") for name in ("AdamW", "SGD")],
    *[Case("AdamW", model, dtype="bf16") for model in SHAPES],
]
# Below, the streams of a step stay in the caches, and what a kernel reaches there is no limit.
LIMIT_FROM_BYTES = 2**28


@cache
def _limit_s(optimizer: str, n_elements: int, dtype: torch.dtype) -> float:
    """Seconds of the fastest kernel that moves the bytes of this step."""
    steps = limit.candidates(optimizer, n_elements, dtype)
    timings = interleave({name: Subject(step) for name, step in steps.items()}, timed.SECONDS)
    return min(timing.median for timing in timings.values())


@cache
def _error(optimizer: str, dtype: str, provider: str) -> float:
    return measure.error(optimizer, DTYPES[dtype], provider)


def _subject(case: Case, provider: str) -> tuple[Subject, float]:
    """The provider, warmed up, and its error; a skip where it has no such step, or a peer's fails.

    An error that is not rounding's is a failure: a time for such a step means nothing.
    """
    try:
        subject = Workload(case).subject(provider)
        timed.warm(subject)
        error = _error(case.optimizer, case.dtype, provider)
    except NoStepError as reason:
        pytest.skip(str(reason))
    except Exception as error:
        if provider == FASTOPT or provider in TORCH:
            raise
        pytest.skip(f"{provider} failed: {type(error).__name__}: {error}")
    if provider == FASTOPT:
        assert error <= measure.TOLERANCE[case.dtype]
    return subject, error


@pytest.mark.parametrize("provider", PROVIDERS, ids=timed.slug)
@pytest.mark.parametrize(
    ("optimizer", "model", "dtype", "gradients"),
    [
        pytest.param(c.optimizer, c.model, c.dtype, c.gradients, id=timed.slug(c.name))
        for c in CASES
    ],
)
def test_step(
    benchmark: Any, optimizer: str, model: str, dtype: str, gradients: str, provider: str
) -> None:
    case = Case(optimizer, model, gradients=gradients, dtype=dtype, allocator=DEFAULT)
    subject, error = _subject(case, provider)
    n_elements, torch_dtype = sum(p.numel() for p in subject.params), subject.params[0].dtype
    n_bytes = traffic(optimizer, torch_dtype) * n_elements
    group = f"{optimizer} {model}"
    facts = timed.Facts(group, case.name, provider, dtype, n_bytes, error)
    seconds = timed.time(benchmark, subject, facts)
    if seconds is not None and n_bytes >= LIMIT_FROM_BYTES:
        share = _limit_s(optimizer, n_elements, torch_dtype) / seconds
        benchmark.extra_info["share_of_limit"] = share
