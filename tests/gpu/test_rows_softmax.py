"""Softmax, log_softmax and logsumexp in the interpreter, against torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastopt_kernels.gpu.rows import shared, softmax
from tests.gpu.row_launches import (
    CASES,
    DTYPES,
    INF,
    NAN,
    SHAPES,
    assert_branch,
    contiguous,
    draw,
    recorded,
    same_bits,
    short_walks,
    unwritten,
    wide,
    wrong,
)

Shape = tuple[int, int, int]
Kernel = Callable[..., None]


def run_softmax(x: Tensor, log: bool, kernel: Kernel = softmax.softmax) -> Tensor:
    """x: (n_outer, n_cols, n_inner), its last dim of stride 1"""
    y = unwritten(*x.shape, dtype=x.dtype)
    kernel(x, y, tuple(x.shape), x.stride()[:2], log)
    return y


def run_logsumexp(x: Tensor) -> Tensor:
    lse = unwritten(x.shape[0], x.shape[2], dtype=wide(x.dtype))
    softmax.logsumexp(x, lse, tuple(x.shape), x.stride()[:2])
    return lse


def reference(x: Tensor, log: bool) -> Tensor:
    return (torch.log_softmax if log else torch.softmax)(x.double(), 1)


def backward_reference(dy: Tensor, y: Tensor, log: bool) -> Tensor:
    dy, y = dy.double(), y.double()
    if log:
        return dy - y.exp() * dy.sum(1, keepdim=True)
    return y * (dy - (dy * y).sum(1, keepdim=True))


def wrong_softmax(x: Tensor, log: bool, kernel: Kernel = softmax.softmax) -> list[str]:
    return wrong("y", run_softmax(x, log, kernel), reference(x, log), dim=1)


@pytest.mark.parametrize(("what", "dtype", "log"), CASES)
def test_softmax(what: str, dtype: torch.dtype, log: bool) -> None:
    x = draw(*SHAPES[what], dtype=dtype, scale=3)
    with recorded() as launched:
        assert wrong_softmax(x, log) == []
    assert_branch(launched, what, dtype)


@pytest.mark.parametrize(("what", "dtype", "log"), CASES)
def test_softmax_backward(what: str, dtype: torch.dtype, log: bool) -> None:
    shape = SHAPES[what]
    y = reference(draw(*shape, dtype=dtype, scale=3), log).to(dtype)
    dy, dx = draw(*shape, dtype=dtype, seed=1), unwritten(*shape, dtype=dtype)
    with recorded() as launched:
        softmax.softmax_backward(dy, y, dx, shape, log)
    assert_branch(launched, what, dtype)
    right = backward_reference(dy, y, log)
    # What is subtracted cancels: the error is one of the sum.
    size = dy.double().norm(dim=1).max() if log else (y.double() * dy.double()).norm(dim=1).max()
    assert wrong("dx", dx, right, dim=1, least=float(size)) == []


@pytest.mark.parametrize(("what", "dtype", "even"), CASES)
def test_logsumexp(what: str, dtype: torch.dtype, even: bool) -> None:
    shape = SHAPES[what]
    x = torch.full(shape, 3.25, dtype=dtype) if even else draw(*shape, dtype=dtype, scale=3)
    right = torch.logsumexp(x.double(), 1)
    with recorded() as launched:
        lse = run_logsumexp(x)
    assert_branch(launched, what, dtype)
    assert wrong("lse", lse, right) == []

    dlse = draw(shape[0], shape[2], dtype=dtype, seed=1)
    dx = unwritten(*shape, dtype=dtype)
    softmax.logsumexp_backward(dlse, x, lse, dx, shape, contiguous(shape))
    right = dlse.double()[:, None] * (x.double() - lse.double()[:, None]).exp()
    assert wrong("dx", dx, right, dim=1) == []


LINES = {
    "-inf": [-INF] * 5,
    "one +inf": [INF, *[0.25] * 66],
    "two +inf": [INF, 1.0, INF, 0.0, 2.0],
    "NaN": [NAN, *[0.25] * 66],
    "NaN and +inf": [1.0, NAN, INF, 3.0, -INF],
    "some -inf": [-INF, 0.25, -INF, 3.0, 2.0],
    "1000, 990, 980": [1000.0, 990.0, 980.0, 990.0, 980.0],
    "large": [1e30, -1e30, 3e38, 1.0, -3e38],
    "lowest": [-3.4028234663852886e38] * 5,
    "denormals": [1e-40, -1e-40, 3e-42, 0.0, 1e-45],
    "equal": [3.25] * 5,
    "-inf, then numbers": [*[-INF] * 40, *[2.0] * 27],
    "numbers, then larger": [*[-1000.0] * 40, *[1000.0] * 27],
    "numbers, then +inf": [*[1.0] * 66, INF],
    "ordinary": [0.5, -0.25, 1.0, 2.0, -1.0],
}
BRANCHES = {"rows": False, "rows walked": True, "columns": False, "columns walked": True}


@pytest.mark.parametrize("what", BRANCHES)
def test_adversarial_lines(what: str) -> None:
    x = torch.stack([torch.tensor(line).repeat(67)[:67] for line in LINES.values()])
    x = x.t()[None].contiguous() if "columns" in what else x[:, :, None]
    with (
        recorded() as launched,
        short_walks("columns" in what) if BRANCHES[what] else nullcontext(),
    ):
        for log in (False, True):
            y = run_softmax(x, log)
            assert wrong("y", y, reference(x, log), dim=1) == []
            dy, dx = draw(*x.shape, seed=4), unwritten(*x.shape, dtype=x.dtype)
            softmax.softmax_backward(dy, y, dx, tuple(x.shape), log)
            assert wrong("dx", dx, backward_reference(dy, y, log), least=30.0) == []
        lse = run_logsumexp(x)
        assert wrong("lse", lse, torch.logsumexp(x.double(), 1), least=1.0) == []
        dx, dlse = unwritten(*x.shape, dtype=x.dtype), torch.ones(x.shape[0], x.shape[2])
        softmax.logsumexp_backward(dlse, x, lse, dx, tuple(x.shape), x.stride()[:2])
        expected = (x - lse[:, None]).exp().double()
        assert wrong("dx", dx, expected, least=1.0) == []
    assert {each.constants["WHOLE"] for each in launched} == {not BRANCHES[what]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 67, 1), (4, 64, 1), (2, 20, 6), (2, 300, 16)], ids=str)
def test_strided_input(shape: Shape, dtype: torch.dtype) -> None:
    """A slice off its boundary, one on it, and every second slice of the outer dim."""
    n_outer, n_cols, n_inner = shape
    base = draw(n_outer * 2, n_cols + 8, n_inner, dtype=dtype)
    for x in (base[:n_outer, 3 : 3 + n_cols], base[:n_outer, 8:], base[::2, :n_cols]):
        before = x.clone()
        assert wrong_softmax(x, False) == []
        assert wrong("lse", run_logsumexp(x), torch.logsumexp(x.double(), 1)) == []
        assert torch.equal(x, before)


def test_misaligned_memory_takes_no_vectors() -> None:
    for first, vector in ((0, 4), (1, 1)):
        x = draw(5 * 64 + 1)[first : first + 5 * 64].view(5, 64, 1)
        with recorded() as launched:
            assert wrong_softmax(x, False) == []
        assert launched[0].constants["VECTOR"] == vector


@pytest.mark.parametrize("shape", [(2, 67, 1), (1, 3, 5)], ids=str)
def test_offsets_are_64_bit(shape: Shape) -> None:
    """Rows, and columns, 2**31 elements apart: of the memory between them nothing is touched."""
    n_outer, n_cols, n_inner = shape
    far = 2**31 // max(1, n_outer - 1, n_cols - 1 if n_inner > 1 else 1)
    strides = (far, 1, 1) if n_inner == 1 else (2 * far, far, 1)
    x = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided(shape, strides)
    x.copy_(draw(*shape, dtype=torch.bfloat16))
    assert wrong_softmax(x, False) == []
    assert wrong("lse", run_logsumexp(x), torch.logsumexp(x.double(), 1)) == []


@pytest.mark.parametrize("what", ["short", "row", "walked", "columns", "columns walked"])
def test_a_line_is_computed_alike_in_every_batch(what: str) -> None:
    x = torch.cat([draw(*SHAPES[what]), draw(*SHAPES[what], seed=1)])
    y, lse = run_softmax(x, True), run_logsumexp(x)
    for outer in range(min(5, x.shape[0])):
        alone = x[outer : outer + 1].contiguous()
        assert same_bits(run_softmax(alone, True)[0], y[outer])
        assert same_bits(run_logsumexp(alone)[0], lse[outer])
    turned = x.flip(0).contiguous()
    assert same_bits(run_softmax(turned, True).flip(0), y)
    assert same_bits(run_softmax(x, True), y)


@pytest.mark.parametrize("shape", [(0, 5, 1), (3, 0, 1), (0, 5, 4), (3, 5, 0)], ids=str)
def test_empty(shape: Shape) -> None:
    x = torch.empty(shape)
    assert run_softmax(x, False).shape == shape
    softmax.softmax_backward(x, x, torch.empty(shape), shape, False)
    assert torch.equal(run_logsumexp(x), torch.logsumexp(x, 1))


@triton.jit
def _without_rescaling(top, total, x, WIDTH: tl.constexpr, COMPUTE: tl.constexpr):  # noqa: N803
    x = shared.tiled(x, WIDTH)
    new = tl.maximum(top, tl.max(shared.finite(x, COMPUTE), 2))
    return new, total + tl.sum(shared.exp_term(x - new[:, :, None]), 2)


@triton.jit
def _coarse(x):
    """2 to the power of a product that has been rounded, and nothing put back."""
    return tl.exp2((x * 1.4426).to(x.dtype))


def _transposed(x: Tensor, y: Tensor, shape: Shape, strides: Any, log: bool) -> None:
    softmax.softmax(x, y, (shape[0] * shape[1], 1, shape[2]), (1, 1), log)


def _no_op(x: Tensor, y: Tensor, *rest: Any) -> None:
    pass


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [_no_op, _transposed])
def test_a_wrong_kernel_does_not_pass(kernel: Kernel, dtype: torch.dtype) -> None:
    assert wrong_softmax(draw(*SHAPES["short"], dtype=dtype), False, kernel) != []


@pytest.mark.parametrize("what", ["walked", "walked vectors", "columns walked"])
def test_a_walk_that_does_not_rescale_does_not_pass(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "online", _without_rescaling)
    x = draw(*SHAPES[what], scale=3)
    assert wrong_softmax(x, False) != []
    assert wrong("lse", run_logsumexp(x), torch.logsumexp(x.double(), 1)) != []


def test_a_coarse_exponential_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "exp", _coarse)
    assert wrong_softmax(draw(*SHAPES["short"], scale=3), False) != []


def test_numbers_of_the_host_arrive_whole() -> None:
    for x in (1e-5, 0.1, 0.9, 1 / 3, 1.0, 0.0, 1e-12):
        assert sum(shared.parts(x)) == x
        assert all(torch.tensor(part).item() == part for part in shared.parts(x))
