"""scaled_masked_softmax: the softmax of attention scores."""

from __future__ import annotations

import torch
from torch import Tensor

from fastopt.functional.routing import (
    AS_NODE,
    AS_OP,
    BY_TORCH,
    DTYPES,
    _describe,
    autocast,
    enter,
    widen,
)
from fastopt.functional.tracing import as_node, unrecorded
from fastopt.ops import masked_softmax as ops


def scaled_masked_softmax(
    x: Tensor, mask: Tensor | None = None, scale: float = 1.0, is_causal: bool = False
) -> Tensor:
    """y = softmax(scale x + mask) over the last dimension, of x's shape and dtype.

    mask: broadcasts to x. Boolean: what is False is left out, whatever x is there. Of float32,
    bfloat16, float16 or float64: is added, in float32 (float64 for float64 x); may need a gradient.
    It is read where it lies and not expanded: only one whose columns are not next to each other is
    copied, as it is.
    is_causal: row i of the last two dimensions sees columns 0 to i, counted from the top left, as
    torch.nn.functional.scaled_dot_product_attention has it; with a mask, both hold.

    A row in which all is -inf, because nothing of it may be seen, gives zeros, where torch.softmax
    gives NaN, and its gradients are 0. What is left out gives 0, and has a gradient of 0. A row
    that sees a NaN or +inf is NaN whole, and so is its gradient.

    Raises RuntimeError for dtypes and devices that do not fit, for a mask that does not broadcast
    to x, and for is_causal with fewer than two dimensions; TypeError for what is no tensor.
    """
    route, (x, mask) = enter("scaled_masked_softmax", x, mask)
    if route == AS_NODE:
        return as_node(scaled_masked_softmax, x, mask, scale, is_causal)
    _check(x, mask, is_causal)
    if autocast("softmax", x):
        x = widen(x)
    if route == BY_TORCH:
        return ops.composed(x, mask, scale, is_causal)
    if route == AS_OP:
        result: Tensor = torch.ops.fastopt.masked_softmax(x, mask, scale, is_causal)
        return result
    if torch.is_grad_enabled() and (x.requires_grad or (mask is not None and mask.requires_grad)):
        return ops.apply_masked_softmax(x, mask, scale, is_causal)  # type: ignore[no-any-return]
    return ops.run_masked_softmax(x, mask, scale, is_causal)


@unrecorded
def _check(x: Tensor, mask: Tensor | None, is_causal: bool) -> None:
    """Raise for what kernels do not take, before anything is computed."""
    name = "fastopt.functional.scaled_masked_softmax"
    for what, tensor in (("x", x), ("mask", mask)):
        if not isinstance(tensor, Tensor) and (what == "x" or tensor is not None):
            raise TypeError(f"{name} takes a Tensor as {what}, got {type(tensor).__name__}")
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"{name} got x {_describe(x)}; it supports float32, bfloat16, float16 and float64. "
            "Convert it first."
        )
    if x.dim() < 1 + is_causal:
        raise RuntimeError(
            f"{name} got x of shape {tuple(x.shape)}; it takes at least {1 + is_causal} dimensions"
            f"{' where is_causal=True' if is_causal else ''}. Add them with unsqueeze."
        )
    if mask is None:
        return
    if mask.dtype not in DTYPES and mask.dtype != torch.bool:
        raise RuntimeError(
            f"{name} got a mask {_describe(mask)}; it takes a boolean one, which keeps what is "
            "True, or one of float32, bfloat16, float16 or float64, which is added. Convert it."
        )
    sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.dim() > x.dim() or any(size not in (1, wanted) for size, wanted in sizes):
        raise RuntimeError(
            f"{name} got a mask of shape {tuple(mask.shape)}, which does not broadcast to x of "
            f"shape {tuple(x.shape)}: from the last dimension on, each size must be x's or 1. Add "
            "dimensions with unsqueeze where it has fewer."
        )
