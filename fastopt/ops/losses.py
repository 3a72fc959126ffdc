"""Cross entropy as an op: kernels, fakes and derivatives."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from fastopt import backend
from fastopt.ops import layout
from fastopt.ops.registry import apply_of, by_torch, compute_dtype, define, differentiated, plain

NONE, MEAN, SUM = 0, 1, 2
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
NAMES = {number: name for name, number in REDUCTIONS.items()}


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
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(loss, stats): what the backward needs of each row, and last what the sum was divided by, and
    by how much more than z_loss's (`z_share_of`).

    Of a row, on CPU: its maximum and log sum exp(x - max), in float64; on a GPU: its logsumexp.
    """
    logits, shape, strides = layout.along(x, _dim(x))
    kernels, terms = backend.kernels_for(x, "rows.cross_entropy"), (smoothing, z_loss, softcap)
    if not backend.by_numba(x):
        args = (logits, target.contiguous(), _weight(weight, x), shape, strides)
        return _by_rows(kernels, args, _positions(x), reduction, ignore_index, terms)
    walk = (target.contiguous(), _weight(weight, x), shape, strides, reduction)
    sizes = _positions(x) if reduction == NONE else []
    loss = torch.empty(sizes, dtype=x.dtype, device=x.device)
    if target.is_floating_point():
        stats = kernels.cross_entropy_probs(logits, *walk, terms, loss)
    else:
        stats, outside = kernels.cross_entropy(logits, *walk, ignore_index, terms, loss)
        if outside is not None:
            refuse_target(outside, shape[1], ignore_index)
    return loss, stats


def refuse_target(outside: int, n_classes: int, ignore_index: int) -> None:
    raise IndexError(
        f"Target {outside} is out of bounds: targets are in [0, {n_classes}) for "
        f"{n_classes} classes, or ignore_index={ignore_index}."
    )


def _by_rows(
    kernels: ModuleType,
    args: tuple[Any, ...],
    sizes: list[int],
    reduction: int,
    ignore_index: int,
    terms: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    """As `run_cross_entropy`, where kernels leave the sum to torch."""
    x, target, weight, shape, strides = args
    compute = compute_dtype(x.dtype)
    rows = torch.empty(sizes, dtype=compute, device=x.device)
    stats = torch.empty(rows.numel() + 2, dtype=compute, device=x.device)
    row_args = (x, target, weight, rows, stats[:-2], shape, strides)
    stats[-2:].fill_(1.0)
    divisor, z_share = stats[-2:-1], stats[-1:]
    if target.is_floating_point():
        kernels.cross_entropy_probs(*row_args, terms)
        if reduction == MEAN:
            divisor.fill_(rows.numel())
    else:
        share = None
        if reduction == MEAN:
            divisor.copy_(weights_of(target, weight, ignore_index).sum(dtype=compute))
            if weight is not None and terms[1]:
                share = z_share_of(divisor, target, ignore_index)
                z_share.copy_(share)
        kernels.cross_entropy(*row_args, ignore_index, terms, share)
    if reduction == NONE:
        return rows.to(x.dtype), stats
    return (rows.sum() / divisor).reshape(()).to(x.dtype), stats


def z_share_of(divisor: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """How much more the weights of the targets that count are than their number: what z_loss is
    multiplied by in a sum that is divided by the weights, so that it is divided by the number."""
    return divisor / (target != ignore_index).sum().clamp(min=1)


class Block(NamedTuple):
    """Rows of logits that are somebody's scratch: their gradient is written over them.

    logits: (N, C), contiguous; target: (N,) or (N, C); weight: (C,) in the compute type, or None
    terms: label smoothing, z_loss and softcap; z_share: of one
    element in the compute type, on a GPU, or None: what z_loss is multiplied by
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    terms: tuple[float, float, float]
    z_share: Tensor | None

    def losses(self, out: Tensor) -> Tensor:
        """Fill out, (N,) in the compute type; what `gradients` needs of each row."""
        x, target, weight, ignore_index, terms, z_share = self
        kernels, walk = backend.kernels_for(x, "rows.cross_entropy"), self._walk()
        probs = target.is_floating_point()
        if not backend.by_numba(x):
            stats = torch.empty_like(out)
            filled = (x, target, weight, out, stats, *walk)
            if probs:
                kernels.cross_entropy_probs(*filled, terms)
            else:
                kernels.cross_entropy(*filled, ignore_index, terms, z_share)
            return stats
        args = (x, target, weight, *walk, NONE)
        if probs:
            return kernels.cross_entropy_probs(*args, terms, out)  # type: ignore[no-any-return]
        stats, outside = kernels.cross_entropy(*args, ignore_index, terms, out)
        if outside is not None:
            refuse_target(outside, x.shape[1], ignore_index)
        return stats  # type: ignore[no-any-return]

    def gradients(self, stats: Tensor, dloss: Tensor) -> None:
        """dloss: (N,), or (1,) for all alike, in the compute type."""
        x, target, weight, ignore_index, terms, z_share = self
        kernels, args = (
            backend.kernels_for(x, "rows.cross_entropy"),
            (x, target, weight, stats, dloss, x),
        )
        if target.is_floating_point():
            kernels.cross_entropy_probs_backward(*args, *self._walk(), terms)
            return
        share = () if backend.by_numba(x) else (z_share,)
        kernels.cross_entropy_backward(*args, *self._walk(), ignore_index, terms, *share)

    def _walk(self) -> tuple[tuple[int, int, int], tuple[int, int]]:
        n_rows, n_cols = self.logits.shape
        return (n_rows, n_cols, 1), (n_cols, 1)


def weights_of(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What each target weighs in a mean: 0 where it is ignored; one that is no class, which the
    kernels find, weighs anything."""
    counts = target != ignore_index
    if weight is None:
        return counts
    return weight[target.where(counts, 0).clamp(0, len(weight) - 1)] * counts


def _positions(x: Tensor) -> list[int]:
    """The shape of x without its classes."""
    dim = _dim(x)
    return [*x.shape[:dim], *x.shape[dim + 1 :]]


def _fake_cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    *terms: float,
) -> tuple[Tensor, Tensor]:
    sizes = _positions(x)
    loss = x.new_empty(sizes if reduction == NONE else [])
    n_rows = x.numel() // x.shape[_dim(x)]
    if backend.by_numba(x):
        return loss, x.new_empty(2 * n_rows + 2, dtype=torch.float64)
    return loss, x.new_empty(n_rows + 2, dtype=compute_dtype(x.dtype))


def run_cross_entropy_backward(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    *terms: float,
) -> Tensor:
    """dx, contiguous."""
    dx = layout.output(x)
    if not x.numel():
        return dx
    kernels = backend.kernels_for(x, "rows.cross_entropy")
    logits, shape, strides = layout.along(x, _dim(x))
    targets = (target.contiguous(), _weight(weight, x))
    share: tuple[Tensor | None, ...] = ()
    if not backend.by_numba(x):
        # A copy: a kernel is compiled anew for a pointer that is aligned otherwise.
        share = (stats[-1:].clone() if weight is not None and terms[1] else None,)
        dloss, stats = (dloss.to(stats.dtype) / stats[-2]).reshape(-1), stats[:-2]
    args = (logits, *targets, stats, dloss.contiguous(), dx, shape, strides)
    if target.is_floating_point():
        kernels.cross_entropy_probs_backward(*args, terms)
    else:
        kernels.cross_entropy_backward(*args, ignore_index, terms, *share)
    return dx


def keep_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, target, weight, *ctx.options = inputs
    ctx.save_for_backward(x, target, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def cross_entropy_backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    """The derivative by x; by probabilities and weights only where torch's own function runs."""
    x, target, weight, stats = ctx.saved_tensors
    reduction, ignore_index, *terms = ctx.options
    if not differentiated(dloss, x, target, weight):
        op = torch.ops.fastopt.cross_entropy_backward
        run = run_cross_entropy_backward if plain(dloss, x, target, weight, stats) else op
        dx = run(dloss, x, target, weight, stats, ignore_index, *terms)
        return dx, *[None] * (2 + len(ctx.options))

    def loss(x: Tensor) -> Tensor:
        return composed(x, target, weight, NAMES[reduction], ignore_index, *terms)

    return by_torch(loss, [x], dloss)[0], *[None] * (2 + len(ctx.options))


def composed(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """The same made of torch's operators, in the type that kernels compute in: where derivatives of
    it are differentiated, and where a kernel does not take what came."""
    dtype, wide = x.dtype, compute_dtype(x.dtype)
    x, weight = x.to(wide), None if weight is None else weight.to(wide)
    target = target.to(wide) if target.is_floating_point() else target
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    loss = F.cross_entropy(
        x,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    if not z_loss:
        return loss.to(dtype)
    squares = z_loss * torch.logsumexp(x, _dim(x)).square()
    n_counted: Any = squares.numel()
    if not target.is_floating_point():
        counts = target != ignore_index
        squares = torch.where(counts, squares, 0.0)
        # Where no target counts the loss is NaN, and its gradient 0.
        n_counted = counts.sum().clamp(min=1)
    if reduction != "none":
        squares = squares.sum()
    return (loss + (squares / n_counted if reduction == "mean" else squares)).to(dtype)


define(
    "cross_entropy(Tensor x, Tensor target, Tensor? weight, int reduction, SymInt ignore_index, "
    "float smoothing, float z_loss, float softcap) -> (Tensor, Tensor)",
    run_cross_entropy,
    _fake_cross_entropy,
    keep_cross_entropy,
    cross_entropy_backward,
)
define(
    "cross_entropy_backward(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor stats, "
    "SymInt ignore_index, float smoothing, float z_loss, float softcap) -> Tensor",
    run_cross_entropy_backward,
    lambda dloss, x, *_: layout.output(x),
)


class CrossEntropy(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, weight: Tensor | None, *options: Any
    ) -> Tensor:
        loss, stats = run_cross_entropy(x, target, weight, *options)
        ctx.options = options
        ctx.save_for_backward(x, target, weight, stats)
        return loss

    backward = staticmethod(cross_entropy_backward)


apply_cross_entropy = apply_of(CrossEntropy)
