"""softmax, log_softmax, logsumexp: never less precise than torch, whatever the row."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tests.rows import cases, oracle
from tests.rows.cases import draw, problem
from tests.rows.problem import Problem
from tests.rows.subject import DTYPES, OURS, OVER_DIM, TORCH, Function

LOW = (torch.bfloat16, torch.float16)
# Below, at and above what a vector, a block and a chunk of rows hold.
COLUMNS = (1, 2, 3, 7, 8, 16, 17, 63, 64, 65, 129, 781, 1025)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OVER_DIM)
def test_rows_of_every_width(name: str, dtype: torch.dtype) -> None:
    for n_cols in COLUMNS:
        oracle.check(problem(name, draw(13, n_cols, dtype=dtype, scale=3.0, seed=n_cols)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OVER_DIM)
def test_columns_of_every_length(name: str, dtype: torch.dtype) -> None:
    """A dim that is not the last: what is reduced lies apart in memory."""
    for n_cols, n_inner in itertools.product((1, 3, 17, 130), (2, 5, 16, 67)):
        x = draw(3, n_cols, n_inner, dtype=dtype, scale=3.0, seed=n_cols)
        oracle.check(problem(name, x, dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OVER_DIM)
def test_long_columns(name: str, dtype: torch.dtype) -> None:
    """Read once, with a maximum that is raised on the way, from -inf too."""
    n = 1600
    x = draw(n, 9, dtype=torch.float64) + torch.linspace(0, 30, n).unsqueeze(1)
    x[:40, 1] = -cases.INF
    x[:, 2] = x[:, 2].flip(0)
    x[1555, 3], x[1555, 4], x[1555, 5] = cases.INF, -cases.INF, cases.NAN
    x[:, 6] = -cases.INF
    x[3, 7] = cases.NAN
    oracle.check(problem(name, x.to(dtype), dim=0))


@pytest.mark.parametrize("name", OVER_DIM)
def test_rows_larger_than_the_cache(name: str) -> None:
    """Which are fetched while the one before is computed; the last has none after it."""
    oracle.check(problem(name, draw(1100, 1024)))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OVER_DIM)
def test_precision_over_many_elements(name: str, dtype: torch.dtype, scale: float) -> None:
    for dim in (0, 1):
        oracle.check(problem(name, draw(97, 311, dtype=dtype, scale=scale), dim=dim))


@pytest.mark.parametrize("what", cases.PACK)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OVER_DIM)
def test_adversarial_rows(name: str, dtype: torch.dtype, what: str) -> None:
    """As rows, and as columns of a tensor."""
    x = cases.pack(what, dtype)
    oracle.check(problem(name, x))
    oracle.check(problem(name, x.t().contiguous(), dim=0))


@pytest.mark.parametrize("what", ["a row of -inf", "one +inf", "NaN", "two +inf"])
@pytest.mark.parametrize("name", OVER_DIM)
def test_gradients_that_are_not_finite(name: str, what: str) -> None:
    """In the upstream too: NaN and infinity reach what torch lets them reach."""
    made = problem(name, cases.pack(what, torch.float32))
    assert made.upstream is not None
    for row, value in enumerate((cases.INF, cases.NAN, -cases.INF)):
        made.upstream.view(5, -1)[row + 1, 0] = value
    oracle.check(made)


@pytest.mark.parametrize("shape", [(1, 1_000_000), (1_000_000, 1)], ids=str)
@pytest.mark.parametrize("name", OVER_DIM)
def test_a_million(name: str, shape: tuple[int, int]) -> None:
    oracle.check(problem(name, draw(*shape)))


# Dims and dtypes.

DIMS: list[Any] = [0, 1, -1, -3, (0,), (0, 1), (1, 2), (2, 0), (-1, 0), (0, 1, 2), [1, -1]]


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", DIMS, ids=str)
def test_dims_of_logsumexp(dim: Any, keepdim: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        oracle.check(problem("logsumexp", draw(5, 7, 11, dtype=dtype), dim=dim, keepdim=keepdim))


def test_logsumexp_over_several_dims_of_rows_that_are_not_finite() -> None:
    x = draw(4, 3, 5)
    x[0] = -cases.INF
    x[1, 1, 1] = cases.INF
    x[2, 0, 0] = cases.NAN
    oracle.check(problem("logsumexp", x, dim=(1, 2)))
    oracle.check(problem("logsumexp", x, dim=(0, 2)))


@pytest.mark.parametrize("asked", DTYPES, ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_dtype_argument(name: str, given: torch.dtype, asked: torch.dtype) -> None:
    """Cast first, then computed; the gradient comes back in the input's dtype."""
    x = draw(9, 33, dtype=given, scale=4.0)
    oracle.check(problem(name, x, dtype=asked))
    oracle.check(problem(name, x, dtype=asked, dim=0))


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_dtype_argument_of_integers(name: str) -> None:
    x = torch.arange(12).view(3, 4)
    found = OURS[name](x, 1, dtype=torch.float32)
    torch.testing.assert_close(found, TORCH[name](x, 1, dtype=torch.float32))


@pytest.mark.parametrize("rank", range(5))
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_dim_none_is_torchs_choice_with_its_warning(name: str, rank: int) -> None:
    x = draw(*(2, 3, 4, 5)[:rank])
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        expected = TORCH[name](x)
    with pytest.warns(UserWarning, match=f"Implicit dimension choice for {name}") as caught:
        found = OURS[name](x)
    torch.testing.assert_close(found, expected)
    assert {warning.filename for warning in caught} == {__file__}, "does not point to the caller"


def test_arguments_by_position() -> None:
    x = draw(3, 5)
    for name in ("softmax", "log_softmax"):
        torch.testing.assert_close(
            OURS[name](x, 0, 3, torch.float64), TORCH[name](x, 0, 3, torch.float64)
        )
    torch.testing.assert_close(OURS["logsumexp"](x, 0, True), torch.logsumexp(x, 0, True))


# Bugs that others had.


@pytest.mark.parametrize("name", OVER_DIM)
def test_strides_are_not_ignored(name: str) -> None:
    """A transposed input read as if it were contiguous gives the values of other elements."""
    x = draw(12, 20)
    oracle.check(problem(name, x.t()))
    oracle.check(problem(name, x[:, ::2]))
    oracle.check(problem(name, x.t(), dim=0))


@pytest.mark.parametrize("name", OVER_DIM)
def test_three_dims_stay_in_bounds(name: str) -> None:
    """A kernel that takes the rows of rank 3 for those of rank 2 reads and writes beyond."""
    memory = torch.full((5 + 2 * 3 * 17 + 5,), cases.NAN)
    x = memory[5:-5].view(2, 3, 17)
    x.copy_(draw(2, 3, 17))
    for dim in (0, 1, 2):
        oracle.check(problem(name, x, dim=dim))
    assert int(memory.isnan().sum()) == 10, "wrote around the input"


def test_a_row_of_minus_infinity() -> None:
    """exp(-inf - -inf): NaN for softmax, yet logsumexp is -inf, its gradient NaN."""
    x = torch.full((2, 40), -cases.INF)
    assert OURS["softmax"](x, 1).isnan().all()
    assert OURS["log_softmax"](x, 1).isnan().all()
    assert OURS["logsumexp"](x, 1).tolist() == [-cases.INF] * 2
    for name in OVER_DIM:
        oracle.check(problem(name, x))


def test_backward_does_not_write_what_forward_saved() -> None:
    """Others reuse the output's memory for the gradient, and the second backward is of that."""
    for name in OVER_DIM:
        x = draw(6, 33).requires_grad_()
        y = OURS[name](x, 1)
        before = y.detach().clone()
        upstream = draw(*y.shape, seed=3)
        first, second = (
            torch.autograd.grad(y, x, upstream, retain_graph=True)[0] for _ in range(2)
        )
        assert oracle.same_bits(first, second)
        assert oracle.same_bits(y, before)


# Deliberately wrong candidates.


class _Swapped(torch.autograd.Function):
    """Right forward, a gradient of the other sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        y = F.softmax(x, dim)
        ctx.save_for_backward(y)
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return y * ((dy * y).sum(ctx.dim, keepdim=True) - dy), None


def _no_maximum(input: Tensor, dim: int) -> Tensor:
    return input.exp() / input.exp().sum(dim, keepdim=True)


def _sums_in_its_dtype(input: Tensor, dim: int) -> Tensor:
    e = (input - input.amax(dim, keepdim=True)).exp()
    total = torch.zeros_like(e.select(dim, 0))
    for part in e.unbind(dim):
        total = total + part
    return e / total.unsqueeze(dim)


def _flat(input: Tensor, dim: int) -> Tensor:
    """Reads as if contiguous."""
    memory = input.as_strided(input.shape, torch.empty(input.shape).stride())
    return F.softmax(memory, dim)


WRONG: dict[str, tuple[Function, Problem]] = {
    "no-op": (lambda input, dim: input.clone(), problem("softmax", draw(9, 67))),
    "sign of the gradient": (
        lambda input, dim: _Swapped.apply(input, dim),
        problem("softmax", draw(9, 67)),
    ),
    "no maximum": (_no_maximum, problem("softmax", cases.pack("1000, 990, 980", torch.float32))),
    "statistics in bf16": (
        _sums_in_its_dtype,
        problem("softmax", draw(9, 300, dtype=torch.bfloat16)),
    ),
    "strides ignored": (_flat, problem("softmax", draw(12, 20).t())),
    "another dim": (
        lambda input, dim: F.softmax(input, 0),
        problem("softmax", draw(20, 20)),
    ),
    "NaN lost": (
        lambda input, dim: F.softmax(input.nan_to_num(), dim),
        problem("softmax", cases.pack("NaN", torch.float32)),
    ),
    "writes its input": (
        lambda input, dim: F.softmax(input.detach().mul_(2).requires_grad_(), dim),
        problem("softmax", draw(9, 67)),
    ),
    "a low-precision exponential": (
        lambda input, dim: F.softmax(input, dim) * (1 + 1e-5),
        problem("softmax", draw(9, 67)),
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_candidate_is_refused(kind: str) -> None:
    candidate, made = WRONG[kind]
    with pytest.raises((AssertionError, RuntimeError)):
        oracle.check(made, ours=candidate)
