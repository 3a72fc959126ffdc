"""Every provider on every row function, one after the other: pytest bench/test_rows.py -k softmax.

The public function is timed whole. pytest-benchmark takes providers in sequence with the allocator
as a user has it, so these figures hold page faults and drift with the machine: for ratios run
`python -m bench.row_report`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import timed
from bench.models import DTYPES
from bench.providers import FASTOPT, NoStepError
from bench.row_cases import SECTIONS, Case
from bench.row_measure import allowed
from bench.row_ops import OPS, Shape, Workload, check
from bench.row_providers import ATEN, PROVIDERS
from bench.timing import Subject

# Warnings are errors in the tests of this project; here they are those of other people's code.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [case for here in SECTIONS.values() for case in here]


@lru_cache(maxsize=1)
def _workload(op: str, shape: Shape, dtype: str) -> tuple[Workload, dict[str, Tensor]]:
    """The input and what torch makes of it in float64."""
    work = Workload(OPS[op], shape, DTYPES[dtype])
    return work, work.oracle(torch.float64)


def _subject(case: Case, provider: str) -> tuple[Subject, float]:
    """The provider, warmed up, and its error; a skip where it has no such function, or a peer's
    fails. An error of fastopt's that is not rounding's is a failure."""
    work, oracle = _workload(case.op.name, case.sizes, case.dtype)
    try:
        function = PROVIDERS[provider](case.op.function)
        results = work.results(function, case.backward)
        error = check(results, oracle, allowed(provider, case.dtype))
        subject = Subject(work.step(function, case.backward))
        timed.warm(subject)
    except NoStepError as reason:
        pytest.skip(str(reason))
    except Exception as error:
        if provider in (FASTOPT, ATEN):
            raise
        pytest.skip(f"{provider} failed: {type(error).__name__}: {error}")
    return subject, error


@pytest.mark.parametrize("provider", PROVIDERS, ids=timed.slug)
@pytest.mark.parametrize(
    ("op", "shape", "dtype", "which"),
    [pytest.param(c.op.name, c.shape, c.dtype, c.which, id=timed.slug(c.name)) for c in CASES],
)
def test_row_function(
    benchmark: Any, op: str, shape: str, dtype: str, which: str, provider: str
) -> None:
    case = Case(OPS[op], shape, dtype, which)
    subject, error = _subject(case, provider)
    facts = timed.Facts(f"{op} {shape}", case.name, provider, dtype, case.n_bytes, error)
    timed.time(benchmark, subject, facts)
