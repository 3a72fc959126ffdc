"""cross_entropy."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from fastopt import backend
from fastopt.functional import layout
from fastopt.functional.loss_terms import (
    MEAN,
    NAMES,
    NONE,
    REDUCTIONS,
    refuse_target,
    terms_of,
    weights_of,
    z_share_of,
)
from fastopt.functional.registry import (
    apply_of,
    compute_dtype,
    define,
    differentiated,
    gradients_by_torch,
    plain,
)
from fastopt.functional.routing import (
    AS_NODE,
    AS_OP,
    BY_TORCH,
    DTYPES,
    autocast,
    by_torch,
    enter,
    transformed,
    widen,
)
from fastopt.functional.tracing import as_node


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The cross entropy of logits, without ever writing their softmax.

        class indices  (1 - s) w_t (logsumexp(x) - x_t) + s / C sum_c w_c (logsumexp(x) - x_c)
        probabilities  sum_c w_c ((1 - s) q_c + s / C) (logsumexp(x) - x_c)

    softcap: x is softcap tanh(logits / softcap), which keeps it within +-softcap (Gemma 2, 2024,
    section 2). z_loss: adds z_loss logsumexp(x)^2 to the loss of a row that counts; it keeps
    logsumexp(x) near 0 (PaLM, Chowdhery et al. 2022, section 5).

    input: (C), (N, C) or (N, C, d1, ...); target: int64 without C, or probabilities of input's
    shape and dtype; weight: (C). reduction "mean" divides by the weights of the targets that
    count. weight and label_smoothing do not enter into z_loss, whose mean is over the rows that
    count, one as much as another, as Liger Kernel has it:

        mean  sum_i loss_i / sum_i w_ti + z_loss sum_i logsumexp(x_i)^2 / (rows that count)

    As torch.nn.functional.cross_entropy; a target out of range is an IndexError on CPU and
    a NaN on CUDA. Szegedy et al. 2016, section 7, for label smoothing. ValueError for a z_loss or
    a softcap that is not a positive number.
    """
    extra = terms_of(z_loss, softcap) if z_loss or softcap is not None else (0.0, 0.0)
    route, (x, target, weight) = enter("cross_entropy", input, target, weight)
    args = (x, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    if route == AS_NODE:
        return as_node(cross_entropy, *args, z_loss=z_loss, softcap=softcap)
    if route == BY_TORCH and not transformed(x, target, weight):
        return by_torch("cross_entropy", _torchs(*extra), *args)
    x, target, weight = _cast(x, target, weight)
    if (
        size_average is not None
        or reduce is not None
        or reduction not in REDUCTIONS
        or not 0.0 <= label_smoothing <= 1.0
        or not _loss_fits(x, target, weight, ignore_index)
    ):
        return by_torch("cross_entropy", _torchs(*extra), *args)
    if route == BY_TORCH:
        numbers = (reduction, ignore_index, label_smoothing, *extra)
        return by_torch("cross_entropy", composed, x, target, weight, *numbers)
    options = (REDUCTIONS[reduction], ignore_index, float(label_smoothing), *extra)
    if route == AS_OP:
        result: Tensor = torch.ops.fastopt.cross_entropy(x, target, weight, *options)[0]
        return result
    if torch.is_grad_enabled() and x.requires_grad:
        return apply_cross_entropy(x, target, weight, *options)  # type: ignore[no-any-return]
    return run_cross_entropy(x, target, weight, *options)[0]


def _torchs(z_loss: float, softcap: float) -> Callable[..., Tensor]:
    """torch's own function; with these terms, as much of it as there is."""
    if not z_loss and not softcap:
        return F.cross_entropy

    def cross_entropy(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        size_average: bool | None,
        ignore_index: int,
        reduce: bool | None,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        if size_average is not None or reduce is not None:
            reduction = legacy_get_string(size_average, reduce)
        options = (reduction, ignore_index, label_smoothing, z_loss, softcap)
        return composed_under_autocast(input, target, weight, *options)

    return cross_entropy


def composed_under_autocast(
    x: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> Tensor:
    """`composed`, in float32 where autocast wants that."""
    return composed(*_cast(x, target, weight), *options)


def _cast(x: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if not autocast("cross_entropy", x):
        return x, target, weight
    return widen(x), widen(target), None if weight is None else widen(weight)


def _loss_fits(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> bool:
    """True where kernels take these arguments: torch's own function computes or refuses others."""
    sizes = x.shape
    if x.dtype not in DTYPES or not sizes:
        return False
    dim = 0 if len(sizes) == 1 else 1
    if sizes[dim] == 0:
        return False
    if weight is not None and (
        weight.shape != (sizes[dim],) or weight.dtype not in DTYPES or weight.requires_grad
    ):
        return False
    if target.dtype == torch.int64:
        return target.shape == sizes[:dim] + sizes[dim + 1 :]
    if target.shape == sizes and target.dtype == x.dtype:
        # Beside probabilities torch refuses an index to ignore.
        return not target.requires_grad and ignore_index < 0
    return False


def _dim(x: Tensor) -> int:
    """The dimension of the classes, in (C), (N, C) or (N, C, d1, ...)."""
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

    return gradients_by_torch(loss, [x], dloss)[0], *[None] * (2 + len(ctx.options))


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
