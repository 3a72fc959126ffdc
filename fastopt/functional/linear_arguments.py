"""Arguments of linear_cross_entropy: what torch refuses, and what kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

from fastopt.functional.logit_chunks import Layer
from fastopt.functional.routing import DTYPES, autocast, widen
from fastopt.functional.tracing import unrecorded


@unrecorded
def check(layer: Layer, ignore_index: int | None) -> None:
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


def _came(layer: Layer) -> str:
    x, linear_weight = layer[:2]
    return f"got input {tuple(x.shape)} and linear_weight {tuple(linear_weight.shape)}"


def cast_layer(layer: Layer) -> tuple[Layer, torch.dtype]:
    """The arguments as autocast casts them, and the dtype of the loss: the product is in autocast's
    dtype, the loss in float32."""
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
    return Layer(x, linear_weight, target, linear_bias, weight), dtype


def fits(layer: Layer, label_smoothing: float) -> bool:
    """True where kernels take these arguments: torch's own function computes or refuses others."""
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
