"""linear_cross_entropy."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from fastopt.functional.losses import composed, cross_entropy, terms_of
from fastopt.functional.routing import (
    AS_NODE,
    AS_OP,
    BY_TORCH,
    DTYPES,
    autocast,
    by_torch,
    enter,
    widen,
)
from fastopt.functional.tracing import as_node, unrecorded
from fastopt.ops import linear_losses, losses


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The cross entropy of a linear layer, without the logits of the whole batch.

        cross_entropy(input linear_weight^T + linear_bias, target)

    input: (N, D) or (D); linear_weight: (C, D); linear_bias: (C); target: (N) int64, or
    probabilities (N, C) of input's dtype; weight: (C), of the classes. The rest as in
    `cross_entropy`; ignore_index None is -100.
    Tokens are taken in chunks, so memory for logits is a chunk's; options.batch_chunk_size (of
    torch.nn.LinearCrossEntropyOptions) says how many, where it is given. The gradients are made in
    forward where they are wanted (with reduction "none" in backward, from logits made anew), and
    linear_weight's is summed in float32 (float64 for float64). The matrix products are torch's.
    As torch.nn.functional.linear_cross_entropy, which torch has from 2.13 on. A linear_weight
    (C, d1, ..., D), under vmap or forward-mode AD any, makes all logits, as there.
    """
    terms = terms_of(z_loss, softcap) if z_loss or softcap is not None else (0.0, 0.0)
    route, operands = enter(
        "linear_cross_entropy", input, linear_weight, target, linear_bias, weight
    )
    layer = linear_losses.Layer(*operands)
    if route == AS_NODE:
        return _as_node(layer, reduction, ignore_index, label_smoothing, options, z_loss, softcap)
    _check(layer, ignore_index)
    shape = (*input.shape[:-1], *linear_weight.shape[:-1])  # of the logits
    ignored = -100 if ignore_index is None else ignore_index
    given = (reduction, ignored, label_smoothing, *terms)
    if route == BY_TORCH:
        return by_torch("linear_cross_entropy", _composed, *layer, shape, *given)
    layer, dtype = _cast(layer)
    if reduction not in losses.REDUCTIONS or not _fits(layer, label_smoothing):
        return by_torch("linear_cross_entropy", _unchunked, *layer, shape, *given)
    if len(shape) == 1:
        layer = layer._replace(x=layer.x[None], target=layer.target[None])
    chunk = getattr(options, "batch_chunk_size", None) or linear_losses.chunk_of(layer.x)
    wanted = [
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (layer.x, layer.linear_weight, layer.linear_bias)
    ]
    numbers = (losses.REDUCTIONS[reduction], ignored, float(label_smoothing), *terms)
    args: tuple[Any, ...] = (*layer, *numbers, chunk, dtype, wanted)
    if route == AS_OP:
        loss: Tensor = torch.ops.fastopt.linear_cross_entropy(*args)[0]
    elif any(wanted):
        loss = linear_losses.apply_linear_cross_entropy(*args)
    else:
        loss = linear_losses.run_linear_cross_entropy(*args)[0]
    return loss.squeeze(0) if len(shape) == 1 and reduction == "none" else loss


def _as_node(layer: linear_losses.Layer, *given: Any) -> Tensor:
    names = ("reduction", "ignore_index", "label_smoothing", "options", "z_loss", "softcap")
    x, linear_weight, target, linear_bias, weight = layer
    named = dict(zip(names, given, strict=True), linear_bias=linear_bias, weight=weight)
    return as_node(linear_cross_entropy, x, linear_weight, target, **named)


@unrecorded
def _check(layer: linear_losses.Layer, ignore_index: int | None) -> None:
    """Raise for what torch refuses, before anything is computed."""
    input, linear_weight, target, linear_bias, _ = layer
    if not 1 <= input.dim() <= 2:
        raise RuntimeError(
            f"expected input with dimensionality 1 or 2, got {input.dim()} ({_came(layer)}): "
            "flatten the batch, input.flatten(0, -2), and the target likewise."
        )
    if linear_weight.dim() < 2:
        raise RuntimeError(
            "expected linear_weight with dimensionality at least 2, got "
            f"{linear_weight.dim()} ({_came(layer)}): it is (classes, features)."
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"{_came(layer)}: linear_weight is (classes, features)."
        )
    out = linear_weight.shape[:-1]
    if linear_bias is not None and linear_bias.shape != out:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(out)}, got {tuple(linear_bias.shape)}: it has one "
            "number for each class."
        )
    if len(out) > 1 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss requires batched input, (N, {input.shape[-1]}); {_came(layer)}: "
            "use input[None], and the target likewise."
        )
    if ignore_index is not None and target.shape == (*input.shape[:-1], *out):
        raise RuntimeError(
            "ignore_index cannot be specified when target contains probabilities (got "
            f"ignore_index={ignore_index} and a target {tuple(target.shape)}): leave it None."
        )


def _came(layer: linear_losses.Layer) -> str:
    x, linear_weight = layer[:2]
    return f"got input {tuple(x.shape)} and linear_weight {tuple(linear_weight.shape)}"


def _cast(layer: linear_losses.Layer) -> tuple[linear_losses.Layer, torch.dtype]:
    """What autocast makes of it, and the dtype of the loss: the product in its dtype, the loss in
    float32."""
    x, linear_weight, target, linear_bias, weight = layer
    if not autocast("cross_entropy", x):
        return layer, x.dtype
    low = torch.get_autocast_dtype(x.device.type)

    def narrow(x: Tensor) -> Tensor:
        return x.to(low) if x.is_floating_point() and x.dtype is not torch.float64 else x

    x, linear_weight = narrow(x), narrow(linear_weight)
    linear_bias = None if linear_bias is None else narrow(linear_bias)
    target, weight = widen(target), None if weight is None else widen(weight)
    dtype = torch.float32 if x.dtype in DTYPES - {torch.float64} else x.dtype
    return linear_losses.Layer(x, linear_weight, target, linear_bias, weight), dtype


def _fits(layer: linear_losses.Layer, label_smoothing: float) -> bool:
    """Whether kernels take these: what they do not is torch's to do, or to refuse."""
    x, linear_weight, target, linear_bias, weight = layer
    alike = [linear_weight] if linear_bias is None else [linear_weight, linear_bias]
    if linear_weight.dim() != 2 or not len(linear_weight) or x.dtype not in DTYPES:
        return False
    if any(y.dtype != x.dtype for y in alike) or not 0.0 <= label_smoothing <= 1.0:
        return False
    if weight is not None and (
        weight.shape != linear_weight.shape[:1]
        or weight.dtype not in DTYPES
        or weight.requires_grad
    ):
        return False
    if target.dtype == torch.int64:
        return target.shape == x.shape[:-1]
    shape = (*x.shape[:-1], len(linear_weight))
    return target.shape == shape and target.dtype == x.dtype and not target.requires_grad


def _logits(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """All of them; linear_weight may have more dimensions than two."""
    n_out = prod(linear_weight.shape[:-1])
    flat = linear_weight.reshape(n_out, linear_weight.shape[-1])
    bias = None if linear_bias is None else linear_bias.reshape(n_out)
    return F.linear(input, flat, bias).reshape(shape)


def _composed(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    shape: tuple[int, ...],
    *numbers: Any,
) -> Tensor:
    """Of torch's operators alone."""
    logits = _logits(input, linear_weight, linear_bias, shape)
    return composed(logits, target, weight, *numbers)


def _unchunked(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    shape: tuple[int, ...],
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """All logits, and their cross entropy."""
    return cross_entropy(
        _logits(input, linear_weight, linear_bias, shape),
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap or None,
    )
