"""fastopt.functional on the GPU kernels, interpreted: what lies between them and the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastopt import functional
from fastopt.functional import logit_chunks
from fastopt.parametrizations import WeightNorm

C = 37
TARGET = torch.tensor([3, -100, 0, 36, 8, 21])
POINTS = torch.tensor([[0, 4, 2], [1, 1, -100]])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def losses() -> dict[str, Callable[[Any, Tensor], Tensor]]:
    weight = torch.rand(C, generator=torch.Generator().manual_seed(5))
    probabilities = torch.softmax(draw(6, C, seed=6), 1)

    def indices(reduction: str, weighted: bool, smoothing: float) -> Any:
        def loss(f: Any, x: Tensor) -> Tensor:
            scale = weight.to(x.dtype) if weighted else None
            options = {"reduction": reduction, "label_smoothing": smoothing}
            return f.cross_entropy(x, TARGET, scale, **options)  # type: ignore[no-any-return]

        return loss

    found = {
        f"{reduction}, weight {weighted}, smoothing {smoothing}": indices(
            reduction, weighted, smoothing
        )
        for reduction in ("mean", "sum", "none")
        for weighted in (False, True)
        for smoothing in (0.0, 0.1)
    }
    found["z_loss"] = lambda f, x: _with_z_loss(f, x, weight)
    found["probabilities"] = lambda f, x: f.cross_entropy(x, probabilities.to(x.dtype))
    return found


def _with_z_loss(f: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The mean of a loss that is weighted, and of a z_loss that is not."""
    scale = weight.to(x.dtype)
    if f is functional:
        return functional.cross_entropy(x, TARGET, scale, z_loss=0.1)
    squares = torch.logsumexp(x, 1).square()[TARGET != -100].mean()
    return F.cross_entropy(x, TARGET, scale) + 0.1 * squares


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    **{
        f"{name} over {dim}": (
            lambda f, x, name=name, dim=dim: getattr(f, name)(x, dim),
            ((6, C),),
        )
        for name in ("softmax", "log_softmax")
        for dim in (0, 1)
    },
    **{
        f"logsumexp over {dim}": (
            lambda f, x, dim=dim: getattr(f, "logsumexp", torch.logsumexp)(x, dim),
            ((6, C),),
        )
        for dim in (0, 1, (0, 1))
    },
    **{f"cross_entropy, {name}": (loss, ((6, C),)) for name, loss in losses().items()},
    "cross_entropy, points": (lambda f, x: f.cross_entropy(x, POINTS), ((2, 5, 3),)),
    "layer_norm": (lambda f, x, w, b: f.layer_norm(x, (C,), w, b), ((6, C), (C,), (C,))),
    "layer_norm, no bias": (lambda f, x, w: f.layer_norm(x, (C,), w), ((6, C), (C,))),
    "rms_norm": (lambda f, x, w: f.rms_norm(x, (C,), w, 1e-6), ((6, C), (C,))),
}


def check(name: str, ours: Any, dtype: torch.dtype) -> None:
    call, shapes = CALLS[name]
    given = [draw(*shape, seed=k).to(dtype) for k, shape in enumerate(shapes)]
    sides = []
    for functions, wide in ((ours, dtype), (F, torch.float64)):
        inputs = [x.to(wide).requires_grad_() for x in given]
        result = call(functions, *inputs)
        upstream = draw(*result.shape, seed=9).to(dtype).to(wide)
        sides.append([result, *torch.autograd.grad(result, inputs, upstream)])
    for mine, exact in zip(*sides, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == exact.shape
        room = 16 * torch.finfo(dtype).eps * max(1.0, float(exact.detach().abs().max()))
        assert (mine.double() - exact).abs().max() <= room


@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward_are_torchs(name: str) -> None:
    check(name, functional, torch.float32)


@pytest.mark.parametrize("name", ["softmax over 1", "cross_entropy, probabilities", "layer_norm"])
def test_half_precision(name: str) -> None:
    check(name, functional, torch.float16)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_linear_cross_entropy(
    dtype: torch.dtype, reduction: str, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of four tokens, with a gradient over the logits of each."""
    weight = draw(C, seed=5).abs() + 0.5 if z_loss else None
    monkeypatch.setitem(logit_chunks.CHUNK, "cpu", 4)
    given = [draw(*shape, seed=k).to(dtype) for k, shape in enumerate(((6, 5), (C, 5), (C,)))]
    sides = []
    for function, wide in ((functional.linear_cross_entropy, dtype), (None, torch.float64)):
        x, w, b = inputs = [x.to(wide).requires_grad_() for x in given]
        if function is None:
            scale = None if weight is None else weight.double()
            logits = F.linear(x, w, b)
            loss = F.cross_entropy(logits, TARGET, scale, reduction=reduction)
            squares = z_loss * torch.logsumexp(logits, 1).square() * (TARGET != -100)
            loss = loss + (squares.sum() / 5 if reduction == "mean" else squares)
        else:
            options = {"reduction": reduction, "weight": weight, "z_loss": z_loss}
            loss = function(x, w, TARGET, linear_bias=b, **options)
        upstream = draw(*loss.shape, seed=9).to(dtype).to(wide)
        sides.append([loss, *torch.autograd.grad(loss, inputs, upstream)])
    for mine, exact in zip(*sides, strict=True):
        room = 16 * torch.finfo(dtype).eps * max(1.0, float(exact.detach().abs().max()))
        assert (mine.double() - exact).abs().max() <= room


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_weight_norm(dim: int) -> None:
    """By kernels where norms are of rows or of columns, by torch's own else."""
    v = draw(4, 3, 5)
    g = torch.norm_except_dim(v, 2, dim) + 0.5
    sides = []
    for function in (
        lambda v, g: WeightNorm(dim)(g, v),
        lambda v, g: torch._weight_norm(v, g, dim),
    ):
        leaves = [x.clone().requires_grad_() for x in (v, g)]
        w = function(*leaves)
        sides.append([w.detach(), *torch.autograd.grad(w, leaves, draw(4, 3, 5, seed=1))])
    torch.testing.assert_close(*sides)


def test_these_checks_see_a_wrong_function() -> None:
    class Wrong:
        @staticmethod
        def softmax(x: Tensor, dim: int) -> Tensor:
            return F.softmax(x * 1.001, dim)

    with pytest.raises(AssertionError):
        check("softmax over 1", Wrong, torch.float32)
