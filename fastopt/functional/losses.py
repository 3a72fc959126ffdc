"""cross_entropy."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor
from torch.nn._reduction import legacy_get_string

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
from fastopt.ops import losses


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
        or reduction not in losses.REDUCTIONS
        or not 0.0 <= label_smoothing <= 1.0
        or not _loss_fits(x, target, weight, ignore_index)
    ):
        return by_torch("cross_entropy", _torchs(*extra), *args)
    if route == BY_TORCH:
        numbers = (reduction, ignore_index, label_smoothing, *extra)
        return by_torch("cross_entropy", losses.composed, x, target, weight, *numbers)
    options = (losses.REDUCTIONS[reduction], ignore_index, float(label_smoothing), *extra)
    if route == AS_OP:
        result: Tensor = torch.ops.fastopt.cross_entropy(x, target, weight, *options)[0]
        return result
    if torch.is_grad_enabled() and x.requires_grad:
        return losses.apply_cross_entropy(x, target, weight, *options)  # type: ignore[no-any-return]
    return losses.run_cross_entropy(x, target, weight, *options)[0]


def terms_of(z_loss: float, softcap: float | None) -> tuple[float, float]:
    """Both as kernels take them: a softcap of 0 is none."""
    if not 0.0 <= z_loss < inf:
        raise ValueError(f"z_loss is {z_loss}: it must be a positive number, or 0.0 for none.")
    if softcap is not None and not 0.0 < softcap < inf:
        raise ValueError(f"softcap is {softcap}: it must be a positive number, or None for none.")
    return float(z_loss), float(softcap or 0.0)


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
        return composed(input, target, weight, *options)

    return cross_entropy


def composed(x: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    """`losses.composed`, in float32 where autocast wants that."""
    return losses.composed(*_cast(x, target, weight), *options)


def _cast(x: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if not autocast("cross_entropy", x):
        return x, target, weight
    return widen(x), widen(target), None if weight is None else widen(weight)


def _loss_fits(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> bool:
    """Whether kernels take these: what they do not is torch's to do, or to refuse."""
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
