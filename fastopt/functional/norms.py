"""layer_norm and rms_norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

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
from fastopt.ops import norms
from fastopt.ops.registry import compute_dtype


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x - mean) / sqrt(mean((x - mean)^2) + eps) weight + bias over the last dimensions.

    normalized_shape: those dimensions, the shape of weight and bias too, which may be of another
    dtype than the input; the result is of the input's. As torch.nn.functional.layer_norm.
    Ba, Kiros & Hinton 2016, equation 4.
    """
    route, (x, weight, bias) = enter("layer_norm", input, weight, bias)
    if route == AS_NODE:
        return as_node(layer_norm, input, normalized_shape, weight, bias, eps)
    shape = _as_shape(normalized_shape)
    if not isinstance(eps, (float, int)) or not _affine_fits(route, x, shape, weight, bias):
        return by_torch("layer_norm", F.layer_norm, x, normalized_shape, weight, bias, eps)
    if autocast("layer_norm", x):
        x = widen(x)
        weight, bias = (None if t is None else widen(t) for t in (weight, bias))
    if route == BY_TORCH:
        return norms.composed(x, weight, bias, len(shape), eps, 0.0, True)
    if route == AS_OP:
        result: Tensor = torch.ops.fastopt.layer_norm(x, weight, bias, len(shape), eps)[0]
        return result
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return norms.apply_layer_norm(x, weight, bias, len(shape), eps)  # type: ignore[no-any-return]
    return norms.run_layer_norm(x, weight, bias, len(shape), eps, False)[0]


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) (weight + weight_offset) over the last dimensions.

    normalized_shape: those dimensions, the shape of weight too, which may be of another dtype than
    the input; the result is of the input's. eps: the machine epsilon of the type it is computed in
    unless given. As torch.nn.functional.rms_norm, but for weight_offset, which is added in float32
    (float64 for float64): 1.0 for models that keep the weight's difference from 1, as Gemma does.
    Zhang & Sennrich 2019, equation 4.
    """
    route, (x, weight) = enter("rms_norm", input, weight)
    if route == AS_NODE:
        args = (input, normalized_shape, weight, eps)
        return as_node(rms_norm, *args, weight_offset=weight_offset)
    shape = _as_shape(normalized_shape)
    if not isinstance(eps, (float, int, type(None))) or not _affine_fits(
        route, x, shape, weight, None
    ):
        args = (x, normalized_shape, weight, eps)
        if not weight_offset:
            return by_torch("rms_norm", F.rms_norm, *args)
        return by_torch("rms_norm", norms.rms_norm_by_torch, *args, weight_offset)
    if autocast("rms_norm", x):
        x, weight = widen(x), None if weight is None else widen(weight)
    if eps is None:
        eps = torch.finfo(compute_dtype(x.dtype)).eps
    if route == BY_TORCH:
        return norms.composed(x, weight, None, len(shape), eps, weight_offset, False)
    if route == AS_OP:
        result: Tensor = torch.ops.fastopt.rms_norm(x, weight, len(shape), eps, weight_offset)[0]
        return result
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad)
    ):
        return norms.apply_rms_norm(x, weight, len(shape), eps, weight_offset)  # type: ignore[no-any-return]
    return norms.run_rms_norm(x, weight, len(shape), eps, weight_offset, False)[0]


def _as_shape(shape: Any) -> tuple[int, ...]:
    """Empty for what is no shape, which torch refuses."""
    return tuple(shape) if isinstance(shape, (tuple, list)) else ()


def _affine_fits(
    route: int, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> bool:
    """Whether kernels, or what is composed in their place, take these: what they do not is torch's
    to do, or to refuse."""
    if route == BY_TORCH and not transformed(x, weight, bias):
        return False
    if not shape or x.dtype not in DTYPES or x.shape[-len(shape) :] != shape:
        return False
    for tensor in (weight, bias):
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in DTYPES):
            return False
    return True
