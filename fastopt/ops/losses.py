"""Cross entropy as an op: kernels, fakes and derivatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from fastopt import backend
from fastopt.ops import layout
from fastopt.ops.registry import by_torch, call, compute_dtype, define

NONE, MEAN, SUM = 0, 1, 2
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
_NAMES = {number: name for name, number in REDUCTIONS.items()}


def _dim(x: Tensor) -> int:
    """Where the classes are: (C), (N, C) or (N, C, d1, ...)."""
    return 0 if x.dim() == 1 else 1


def _weight(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(compute_dtype(x.dtype)).contiguous()


def run_cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logsumexp of each row in float64, what the sum was divided by)."""
    dim = _dim(x)
    compute = compute_dtype(x.dtype)
    sizes = [*x.shape[:dim], *x.shape[dim + 1 :]]
    loss = torch.empty(sizes, dtype=compute, device=x.device)
    lse = torch.empty(sizes, dtype=torch.float64, device=x.device)
    kernels = backend.kernels(x.device.type, "losses")
    weight = _weight(weight, x)
    logits, shape, strides = layout.along(x, dim)
    by_index = not target.is_floating_point()
    target = target.contiguous()
    if by_index:
        outside = kernels.cross_entropy(
            logits, target, weight, loss, lse, shape, strides, ignore_index, smoothing
        )
        if outside is not None:
            raise IndexError(
                f"Target {outside} is out of bounds: targets are in [0, {shape[1]}) for "
                f"{shape[1]} classes, or ignore_index={ignore_index}."
            )
    else:
        kernels.cross_entropy_probs(logits, target, weight, loss, lse, shape, strides, smoothing)
    if reduction == NONE:
        return loss.to(x.dtype), lse, loss.new_ones(1)
    if by_index:
        total, divisor = kernels.totals(loss, target, weight, ignore_index).unbind()
    else:
        total = kernels.totals(loss, None, None, ignore_index)[0]
        divisor = total.new_tensor(float(loss.numel()))
    if reduction == SUM:
        return total.to(x.dtype), lse, loss.new_ones(1)
    return (total / divisor).to(x.dtype), lse, divisor.reshape(1).to(compute)


def _fake_cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dim = _dim(x)
    sizes = [*x.shape[:dim], *x.shape[dim + 1 :]]
    loss = x.new_empty(sizes if reduction == NONE else [])
    divisor = x.new_empty(1, dtype=compute_dtype(x.dtype))
    return loss, x.new_empty(sizes, dtype=torch.float64), divisor


def run_cross_entropy_backward(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    divisor: Tensor,
    ignore_index: int,
    smoothing: float,
) -> Tensor:
    """dx, contiguous."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return dx
    kernels = backend.kernels(x.device.type, "losses")
    upstream = (dloss.to(divisor.dtype) / divisor).reshape(-1).contiguous()
    logits, shape, strides = layout.along(x, _dim(x))
    args = (logits, target.contiguous(), _weight(weight, x), lse, upstream, dx, shape, strides)
    if target.is_floating_point():
        kernels.cross_entropy_probs_backward(*args, smoothing)
    else:
        kernels.cross_entropy_backward(*args, ignore_index, smoothing)
    return dx


def keep_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, target, weight, *ctx.options = inputs
    ctx.save_for_backward(x, target, weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def cross_entropy_backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    """The derivative by x; by probabilities and weights only where torch's own function runs."""
    x, target, weight, lse, divisor = ctx.saved_tensors
    reduction, ignore_index, smoothing = ctx.options
    if not torch.is_grad_enabled():
        dx = call(
            run_cross_entropy_backward,
            "cross_entropy_backward",
            dloss,
            x,
            target,
            weight,
            lse,
            divisor,
            ignore_index,
            smoothing,
        )
        return dx, None, None, None, None, None

    def loss(x: Tensor) -> Tensor:
        options = {"ignore_index": ignore_index, "label_smoothing": smoothing}
        return F.cross_entropy(x, target, weight, reduction=_NAMES[reduction], **options)

    return by_torch(loss, [x], dloss)[0], None, None, None, None, None


define(
    "cross_entropy(Tensor x, Tensor target, Tensor? weight, int reduction, SymInt ignore_index, "
    "float smoothing) -> (Tensor, Tensor, Tensor)",
    run_cross_entropy,
    _fake_cross_entropy,
    keep_cross_entropy,
    cross_entropy_backward,
)
define(
    "cross_entropy_backward(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor lse, "
    "Tensor divisor, SymInt ignore_index, float smoothing) -> Tensor",
    run_cross_entropy_backward,
    lambda dloss, x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
)


class CrossEntropy(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, weight: Tensor | None, *options: Any
    ) -> Tensor:
        loss, lse, divisor = run_cross_entropy(x, target, weight, *options)
        ctx.options = options
        ctx.save_for_backward(x, target, weight, lse, divisor)
        return loss

    backward = staticmethod(cross_entropy_backward)
