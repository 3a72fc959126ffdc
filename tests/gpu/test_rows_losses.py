"""Cross entropy in the interpreter, against torch in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastopt_kernels.gpu.rows import cross_entropy, shared
from tests.gpu.row_launches import (
    CASES,
    DTYPES,
    INF,
    NAN,
    SHAPES,
    all_wrong,
    assert_branch,
    draw,
    recorded,
    same_bits,
    short_walks,
    unwritten,
    wide,
    wrong,
)

Shape = tuple[int, int, int]
Values = dict[str, Tensor]


@dataclass
class Problem:
    """x: (n_outer, n_cols, n_inner), its last dim of stride 1; of target and probs one is None"""

    x: Tensor
    dloss: Tensor
    target: Tensor | None = None
    probs: Tensor | None = None
    weight: Tensor | None = None
    smoothing: float = 0.0
    ignore_index: int = -100
    z_loss: float = 0.0
    softcap: float = 0.0
    z_share: Tensor | None = None

    def run(self, in_place: bool = False) -> Values:
        x, shape = self.x.clone() if in_place else self.x, tuple(self.x.shape)
        loss, lse = (unwritten(shape[0], shape[2], dtype=wide(x.dtype)) for _ in range(2))
        dx = x if in_place else unwritten(*shape, dtype=x.dtype)
        tail: list[Any] = [shape, x.stride()[:2], (self.smoothing, self.z_loss, self.softcap)]
        if self.target is not None:
            tail = [*tail[:2], self.ignore_index, tail[2], self.z_share]
            cross_entropy.cross_entropy(x, self.target, self.weight, loss, lse, *tail)
            cross_entropy.cross_entropy_backward(
                x, self.target, self.weight, lse, self.dloss, dx, *tail
            )
        else:
            cross_entropy.cross_entropy_probs(x, self.probs, self.weight, loss, lse, *tail)
            cross_entropy.cross_entropy_probs_backward(
                x, self.probs, self.weight, lse, self.dloss, dx, *tail
            )
        return {"loss": loss, "lse": lse, "dx": dx}

    def exact(self, dtype: torch.dtype = torch.float64) -> Values:
        """torch's, in a dtype; lse is NaN with +inf."""
        x = self.x.to(dtype, copy=True).requires_grad_()
        weight = None if self.weight is None else self.weight.to(dtype)
        target = self.target if self.probs is None else self.probs.to(dtype)
        options = {"reduction": "none", "label_smoothing": self.smoothing}
        z = self.softcap * torch.tanh(x / self.softcap) if self.softcap else x
        loss = F.cross_entropy(z, target, weight, ignore_index=self.ignore_index, **options)
        if self.z_loss:
            squares = self.z_loss * torch.logsumexp(z, 1) ** 2
            if self.z_share is not None:
                squares = squares * self.z_share.to(dtype)
            if self.target is not None:
                squares = torch.where(self.target != self.ignore_index, squares, 0.0)
            loss = loss + squares
        dloss = self.dloss if self.dloss.numel() > 1 else self.dloss.expand(loss.shape)
        (dx,) = torch.autograd.grad(loss, x, dloss.to(dtype).view(loss.shape))
        lse = torch.logsumexp(z.detach(), 1)
        lse = torch.where(lse == INF, NAN, lse)
        return {"loss": loss.detach(), "lse": lse, "dx": dx}

    def wrong(self) -> list[str]:
        """A loss is the log of a sum of which one term is 1, its gradient p_c - [c = t]."""
        heaviest = 1.0 if self.weight is None else float(self.weight.max())
        size = heaviest * float(self.dloss.abs().max())
        found, exact = self.run(), self.exact()
        return all_wrong(found, exact, loss=heaviest, lse=1.0, dx=size)


def make(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    probs: bool = False,
    weighted: bool = False,
    **other: Any,
) -> Problem:
    """With every third target ignored, and random weights where they are asked for."""
    n_outer, n_cols, n_inner = shape
    x = draw(*shape, dtype=dtype, scale=3)
    problem = Problem(x, draw(n_outer, n_inner, dtype=wide(dtype), seed=1))
    if probs:
        problem.probs = draw(*shape, seed=2, scale=2).softmax(1).to(dtype)
    else:
        random = torch.Generator().manual_seed(3)
        target = torch.randint(n_cols, (n_outer, n_inner), generator=random)
        target.view(-1)[2::3] = -100
        problem.target = target
    if weighted:
        problem.weight = draw(n_cols, dtype=wide(dtype), seed=4).abs()
    return replace(problem, **other)


@pytest.mark.parametrize(("what", "dtype", "smooth"), CASES)
def test_indices(what: str, dtype: torch.dtype, smooth: bool) -> None:
    problem = make(SHAPES[what], dtype, weighted=smooth, smoothing=0.1 if smooth else 0.0)
    with recorded() as launched:
        assert problem.wrong() == []
    names = ["cross_entropy_kernel", "cross_entropy_backward_kernel"]
    assert [each.name for each in launched] == names
    if what != "long":
        for each in launched:
            assert_branch([each], what, dtype)


@pytest.mark.parametrize(("what", "dtype", "weighted"), CASES)
def test_probabilities(what: str, dtype: torch.dtype, weighted: bool) -> None:
    problem = make(SHAPES[what], dtype, probs=True, weighted=weighted)
    problem.smoothing = 0.0 if weighted else 0.1
    with recorded() as launched:
        assert problem.wrong() == []
    if what != "long":
        for each in launched:
            assert_branch([each], what, dtype)


BRANCHES = {
    "rows": ((9, 67, 1), False),
    "rows walked": ((4, 67, 1), True),
    "columns": ((2, 17, 5), False),
    "columns walked": ((1, 97, 5), True),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("what", BRANCHES)
def test_weight_and_smoothing(what: str, weighted: bool, smoothing: float) -> None:
    shape, walked = BRANCHES[what]
    with recorded() as launched, short_walks(shape[2] > 1) if walked else nullcontext():
        for probs in (False, True):
            problem = make(shape, probs=probs, weighted=weighted, smoothing=smoothing)
            assert problem.wrong() == []
    assert {each.constants["WHOLE"] for each in launched} == {not walked}
    assert {each.constants["COLUMNS"] for each in launched} == {shape[2] > 1}


@pytest.mark.parametrize("what", BRANCHES)
def test_one_gradient_for_all(what: str) -> None:
    shape, walked = BRANCHES[what]
    with short_walks(shape[2] > 1) if walked else nullcontext():
        assert make(shape, dloss=torch.tensor([-0.37])).wrong() == []


def test_a_line_of_one_loss() -> None:
    assert make((1, 67, 1)).wrong() == []


@pytest.mark.parametrize("what", BRANCHES)
def test_ignored_lines_are_0_unless_they_hold_what_is_not_finite(what: str) -> None:
    """As with torch, whose gradient is a softmax times 0 there."""
    shape, walked = BRANCHES[what]
    for smoothing, bad in ((0.0, NAN), (0.1, INF)):
        problem = make(shape, smoothing=smoothing, weighted=True, ignore_index=3)
        problem.target = torch.full((shape[0], shape[2]), 3)
        problem.target[0, 0] = 5
        problem.x[-1, 1:4, -1] = torch.tensor([bad, 2.0, -INF])
        with short_walks(shape[2] > 1) if walked else nullcontext():
            assert problem.wrong() == []
            found = problem.run()
        ignored = problem.target == 3
        assert not found["loss"][ignored].any()
        ignored[-1, -1] = False
        dx = found["dx"].movedim(1, 2)
        assert not dx[ignored].any()
        assert torch.isnan(dx[-1, -1]).all()


@pytest.mark.parametrize("what", BRANCHES)
@pytest.mark.parametrize("bad", [-1, 97, 2**40])
def test_a_target_that_is_no_class_gives_nan(bad: int, what: str) -> None:
    shape, walked = BRANCHES[what]
    problem = make(shape)
    right = problem.run()
    problem.target[0, 0] = bad
    with short_walks(shape[2] > 1) if walked else nullcontext():
        found = problem.run()
    assert torch.isnan(found["loss"][0, 0])
    assert torch.isnan(found["dx"][0, :, 0]).all()
    rest = torch.ones(shape[0], shape[2], dtype=torch.bool)
    rest[0, 0] = False
    assert torch.isfinite(found["dx"].movedim(1, 2)[rest]).all()
    assert wrong("loss", found["loss"][rest], right["loss"][rest].double()) == []


LINES = {
    "-inf": [-INF] * 5,
    "one +inf": [INF, *[0.25] * 66],
    "two +inf": [INF, 1.0, INF, 0.0, 2.0],
    "NaN": [NAN, *[0.25] * 66],
    "some -inf": [-INF, 0.25, -INF, 3.0, 2.0],
    "1000, 990, 980": [1000.0, 990.0, 980.0, 990.0, 980.0],
    "equal": [3.25] * 5,
    "-inf, then numbers": [*[-INF] * 40, *[2.0] * 27],
    "numbers, then larger": [*[-1000.0] * 40, *[1000.0] * 27],
    "around 1e4": [1e4, 1e4 + 1, 1e4 - 1, 1e4 + 0.5, 1e4],
    "ordinary": [0.5, -0.25, 1.0, 2.0, -1.0],
}


@pytest.mark.parametrize("walked", [False, True], ids=["whole", "walked"])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_adversarial_lines(columns: bool, walked: bool) -> None:
    """As precise as where nothing cancels: lse rounded to float32 would be off by 3e-5 at 1000."""
    x = torch.stack([torch.tensor(line).repeat(67)[:67] for line in LINES.values()])
    x = x.t()[None].contiguous() if columns else x[:, :, None]
    shape = tuple(x.shape)
    with short_walks(shape[2] > 1) if walked else nullcontext():
        for target, smoothing in ((0, 0.1), (41, 0.0)):
            problem = make(shape, x=x, smoothing=smoothing)
            problem.target = torch.full((shape[0], shape[2]), target)
            assert problem.wrong() == []
        assert make(shape, x=x, probs=True, weighted=True).wrong() == []


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_a_large_lse_is_not_trusted(offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward walks once more for it, and only for it."""
    walks = []
    statistics = shared.statistics

    def counting(*args: Any) -> Any:
        walks.append(args)
        return statistics(*args)

    monkeypatch.setattr(shared, "statistics", counting)
    problem = make((2, 67, 1), x=draw(2, 67, 1) + offset)
    problem.target = torch.tensor([[1], [66]])
    with short_walks():
        assert problem.wrong() == []
    # The forward's for each of two rows, and the backward's.
    assert len(walks) == (4 if offset == 1000.0 else 2)


def test_trusting_it_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastopt_kernels.gpu.rows import cross_entropy_gradients

    monkeypatch.setattr(cross_entropy_gradients, "TRUSTED_LSE", 1e30)
    with short_walks():
        assert make((2, 67, 1), x=draw(2, 67, 1) + 1000.0).wrong() != []


@pytest.mark.parametrize("probs", [False, True], ids=["indices", "probabilities"])
def test_one_class(probs: bool) -> None:
    for smoothing in (0.0, 0.1):
        found = make((30, 1, 1), probs=probs, smoothing=smoothing).run()
        assert not found["loss"].any()
        assert found["dx"].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 67, 1), (4, 64, 1), (2, 20, 6)], ids=str)
def test_strided_input(shape: Shape, dtype: torch.dtype) -> None:
    n_outer, n_cols, n_inner = shape
    base = draw(n_outer * 2, n_cols + 8, n_inner, dtype=dtype)
    for x in (base[:n_outer, 3 : 3 + n_cols], base[:n_outer, 8:], base[::2, :n_cols]):
        before = x.clone()
        assert make(shape, dtype, x=x, smoothing=0.1).wrong() == []
        assert make(shape, dtype, x=x, probs=True).wrong() == []
        assert torch.equal(x, before)


def test_offsets_are_64_bit() -> None:
    """Rows 2**31 elements apart: of the memory between them nothing is touched."""
    x = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 67, 1), (2**31, 1, 1))
    x.copy_(draw(2, 67, 1, dtype=torch.bfloat16))
    assert make((2, 67, 1), torch.bfloat16, x=x).wrong() == []


@pytest.mark.parametrize("what", BRANCHES)
def test_a_line_is_computed_alike_in_every_batch(what: str) -> None:
    """Its gradient too, beside one whose lse is not trusted."""
    shape, walked = BRANCHES[what]
    problem = make((3, *shape[1:]), smoothing=0.1, weighted=True)
    problem.x[2] += 1000.0
    with short_walks(shape[2] > 1) if walked else nullcontext():
        together = problem.run()
        for outer in range(3):
            span = slice(outer, outer + 1)
            cut = {key: getattr(problem, key)[span] for key in ("x", "dloss", "target")}
            alone = replace(problem, **cut).run()
            for name, value in alone.items():
                assert same_bits(value[0], together[name][outer])
        again = problem.run()
    assert all(same_bits(again[name], together[name]) for name in again)


@pytest.mark.parametrize("shape", [(0, 5, 1), (0, 5, 3), (3, 5, 0)], ids=str)
def test_empty(shape: Shape) -> None:
    for probs in (False, True):
        assert make(shape, probs=probs).run()["dx"].shape == shape


def _forgets_smoothing(problem: Problem) -> Problem:
    return replace(problem, smoothing=0.0)


def _forgets_weight(problem: Problem) -> Problem:
    return replace(problem, weight=None)


def _forgets_what_is_ignored(problem: Problem) -> Problem:
    return replace(problem, ignore_index=-1, target=problem.target.clamp(min=0))


def _wrong_sign(problem: Problem) -> Problem:
    return replace(problem, dloss=-problem.dloss)


def _next_class(problem: Problem) -> Problem:
    target = problem.target
    return replace(problem, target=torch.where(target < 0, target, (target + 1) % 67))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "change",
    [_forgets_smoothing, _forgets_weight, _forgets_what_is_ignored, _wrong_sign, _next_class],
)
def test_a_wrong_kernel_does_not_pass(
    change: Callable[[Problem], Problem], dtype: torch.dtype
) -> None:
    problem = make((9, 67, 1), dtype, weighted=True, smoothing=0.1)
    assert all_wrong(change(problem).run(), problem.exact(), loss=1.0, lse=1.0, dx=1.0) != []
