"""Every provider on every row function, one after the other: pytest bench/test_rows.py -k softmax.

The public function is timed whole. pytest-benchmark takes providers in sequence with the allocator
as a user has it, so these figures hold page faults and drift with the machine: for ratios run
`python -m bench.row_report`.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import pytest
import torch

from bench import limit
from bench.models import DTYPES
from bench.providers import FASTOPT, NoStepError
from bench.row_cases import SECTIONS, Case
from bench.row_measure import COPY_BYTES
from bench.row_ops import OPS, Shape, Workload
from bench.row_providers import ATEN, PROVIDERS
from bench.timing import Subject, interleave
from fastopt.cli.record import cpu_name

# Warnings are errors in the tests of this project; here they are those of other people's code.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [case for here in SECTIONS.values() for case in here]
SECONDS = 0.5
ROUNDS = (3, 500)


def _id(value: Case | str) -> str:
    name = value.name if isinstance(value, Case) else value
    return name.lower().replace(", ", "-").replace(" + ", "+").replace(" ", "-")


@lru_cache(maxsize=1)
def _workload(op: str, shape: Shape, dtype: str) -> Workload:
    return Workload(OPS[op], shape, DTYPES[dtype])


def _subject(case: Case, provider: str) -> Subject:
    """The provider, warmed up; a skip where it has no such function, or a peer's fails."""
    try:
        function = PROVIDERS[provider](case.op.function)
    except NoStepError as reason:
        pytest.skip(str(reason))
    work = _workload(case.op.name, case.sizes, case.dtype)
    subject = Subject(work.step(function, case.backward))
    try:
        subject.warm()
    except Exception as error:
        if provider in (FASTOPT, ATEN):
            raise
        pytest.skip(f"{provider} failed: {type(error).__name__}: {error}")
    return subject


@cache
def _floor_s(n_bytes: int) -> float:
    """Seconds of the faster copy of as many bytes."""
    copies = limit.copies(n_bytes // COPY_BYTES)
    timings = interleave({name: Subject(copy) for name, copy in copies.items()}, SECONDS)
    return min(timing.median for timing in timings.values())


@pytest.mark.parametrize("provider", PROVIDERS, ids=_id)
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_row_function(benchmark: Any, case: Case, provider: str) -> None:
    subject = _subject(case, provider)
    fewest, most = ROUNDS
    rounds = max(fewest, min(most, round(SECONDS / subject.time())))
    benchmark.group = case.name
    benchmark.pedantic(subject.step, rounds=rounds)

    benchmark.extra_info |= {
        "bytes": case.n_bytes,
        "page_faults": subject.page_faults(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
    }
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["gb_per_s"] = case.n_bytes / seconds / 1e9
        if not case.is_tiny:
            benchmark.extra_info["times_the_floor"] = seconds / _floor_s(case.n_bytes)
