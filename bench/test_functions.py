"""The functions of every `bench/*_cases.py` beside torch's own: pytest bench/test_functions.py.

pytest-benchmark takes providers in sequence with the allocator as a user has it, so these figures
hold page faults and drift with the machine: for ratios run `python -m bench.function_report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import timed
from bench.function_cases import FunctionCase
from bench.function_report import cases
from bench.models import DTYPES
from bench.providers import FASTOPT
from bench.row_cases import BOTH, PASSES
from bench.row_measure import allowed
from bench.row_ops import check
from bench.timing import Subject

# Warnings are errors in the tests of this project; here they are those of other people's code.
pytestmark = pytest.mark.filterwarnings("ignore")

TORCH = "torch"
PROVIDERS = (FASTOPT, TORCH)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CASES = {(case.name, DTYPE_NAMES[case.dtype]): case for case in cases()}


def _function(case: FunctionCase, provider: str) -> Callable[..., Tensor]:
    return case.ours if provider == FASTOPT else case.theirs


def _upstream(y: Tensor) -> Tensor:
    """The gradient that a backward starts from: random, the same for every provider."""
    drawn = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return drawn.to(y.dtype)


def _step(function: Callable[..., Tensor], inputs: Sequence[Tensor], which: str) -> Any:
    """The forward alone, of tensors that want no gradient, or the forward and the backward."""
    if which != BOTH:
        plain = [x.detach() for x in inputs]
        return lambda: function(*plain)
    leaves, dy = [x for x in inputs if x.requires_grad], None
    with torch.no_grad():
        dy = _upstream(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), leaves, dy)


def _results(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """y, and the gradients of the inputs that want one, by their place."""
    leaves = {f"d{i}": x for i, x in enumerate(inputs) if x.requires_grad}
    y = function(*inputs)
    grads = torch.autograd.grad(y, list(leaves.values()), _upstream(y))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def _in_float64(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    ]


@lru_cache(maxsize=1)
def _oracle(name: str, dtype: str) -> dict[str, Tensor] | None:
    """What torch makes of the inputs in float64; None where it draws random numbers."""
    case = CASES[name, dtype]
    inputs, state = _in_float64(case.inputs()), torch.get_rng_state()
    results = _results(case.theirs, inputs)
    return results if torch.equal(torch.get_rng_state(), state) else None


@cache
def _error(name: str, dtype: str, provider: str) -> float | None:
    """From float64; raises where fastopt's is more than rounding explains."""
    case, oracle = CASES[name, dtype], _oracle(name, dtype)
    if oracle is None:
        return None
    return check(
        _results(_function(case, provider), case.inputs()), oracle, allowed(provider, dtype)
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("which", PASSES, ids=timed.slug)
@pytest.mark.parametrize(
    ("function", "dtype"),
    [pytest.param(*key, id=timed.slug(" ".join(key))) for key in CASES],
)
def test_function(benchmark: Any, function: str, dtype: str, which: str, provider: str) -> None:
    case, error = CASES[function, dtype], _error(function, dtype, provider)
    call, inputs = _function(case, provider), case.inputs()
    subject = Subject(_step(call, inputs, which))
    timed.warm(subject)
    name = f"{function} {dtype}, {which}"
    n_bytes = case.bytes_moved[which == BOTH]
    timed.time(benchmark, subject, timed.Facts(function, name, provider, dtype, n_bytes, error))
