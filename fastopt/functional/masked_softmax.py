"""scaled_masked_softmax: the softmax of attention scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastopt import backend
from fastopt.functional import layout
from fastopt.functional.registry import apply_of, compute_dtype, define, differentiated, plain
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
        return composed(x, mask, scale, is_causal)
    if route == AS_OP:
        result: Tensor = torch.ops.fastopt.masked_softmax(x, mask, scale, is_causal)
        return result
    if torch.is_grad_enabled() and (x.requires_grad or (mask is not None and mask.requires_grad)):
        return apply_masked_softmax(x, mask, scale, is_causal)  # type: ignore[no-any-return]
    return run_masked_softmax(x, mask, scale, is_causal)


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


# (n1, n2, s0, s1, s2): row (i0, i1, i2) of a mask lies at i0 s0 + i1 s1 + i2 s2.
Walk = tuple[int, int, int, int, int]
_NO_MASK: Walk = (1, 1, 0, 0, 0)


def composed(x: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """The softmax by torch's operators: the meaning of the op under transforms."""
    dtype = compute_dtype(x.dtype)
    v, lowest = x.to(dtype) * scale, -torch.inf
    if mask is not None:
        v = v + mask.to(dtype) if mask.is_floating_point() else v.masked_fill(~mask, lowest)
    if is_causal:
        right = x.new_ones(x.shape[-2:], dtype=torch.bool).triu(1)
        v = v.masked_fill(right, lowest)
    nothing = (v == lowest).all(-1, keepdim=True)
    y = torch.softmax(v.masked_fill(nothing, 0.0), -1)
    return y.masked_fill(nothing, 0.0).to(x.dtype)


def walk_of(mask: Tensor, shape: Sequence[int]) -> tuple[Tensor, Walk]:
    """A mask that broadcasts to `shape`, as kernels walk it: where it is broadcast its strides are
    0. A copy only where its columns are not next to each other (of what there is of it), or where
    more than three strides lead to a row."""
    if not mask.dim() or (shape[-1] > 1 and (mask.shape[-1] == 1 or mask.stride(-1) != 1)):
        mask = mask.expand(*mask.shape[:-1], shape[-1]).contiguous()
    view = mask.expand(shape)
    levels: list[tuple[int, int]] = []
    for size, stride in zip(reversed(shape[:-1]), reversed(view.stride()[:-1]), strict=True):
        if levels and stride == levels[0][0] * levels[0][1]:
            levels[0] = (levels[0][0] * size, levels[0][1])
        elif size > 1:
            levels.insert(0, (size, stride))
    if len(levels) > 3:
        return walk_of(view.contiguous(), shape)
    (_, s0), (n1, s1), (n2, s2) = [(1, 0)] * (3 - len(levels)) + levels
    return mask, (n1, n2, s0, s1, s2)


def run_masked_softmax(x: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """y over the last dimension; contiguous."""
    y = layout.output(x)
    if x.numel():
        walk, n_queries = _NO_MASK, x.shape[-2] if is_causal else 0
        if mask is not None:
            mask, walk = walk_of(mask, x.shape)
        x, sizes = layout.rows(x, 1)
        kernels = backend.kernels_for(x, "rows.masked_softmax")
        kernels.masked_softmax(x, mask, y, sizes, walk, scale, n_queries)
    return y


def run_masked_softmax_backward(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    """dx = scale y (dy - sum dy y)"""
    dx = layout.output(y)
    if y.numel():
        n_cols = y.shape[-1]
        kernels = backend.kernels_for(y, "rows.softmax")
        shape = (y.numel() // n_cols, n_cols, 1)
        kernels.softmax_backward(dy.contiguous(), y.contiguous(), dx, shape, False, scale)
    return dx


def keep_masked_softmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, ctx.scale, _ = inputs
    ctx.mask = None if mask is None else (mask.shape, mask.dtype)
    ctx.save_for_backward(output)


def masked_softmax_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dmask = y (dy - sum dy y), summed over what it was broadcast to,  dx = scale as much"""
    (y,) = ctx.saved_tensors
    wants_dx, wants_dmask, *_ = ctx.needs_input_grad
    scale = 1.0 if wants_dmask else ctx.scale
    if differentiated(dy, y):
        d = y * (dy - (dy * y).sum(-1, keepdim=True)) * scale
    else:
        kernel = run_masked_softmax_backward
        d = (kernel if plain(dy, y) else torch.ops.fastopt.masked_softmax_backward)(dy, y, scale)
    if not wants_dmask:
        return d, None, None, None
    shape, dtype = ctx.mask
    dmask = d.sum_to_size(shape).to(dtype)
    return d * ctx.scale if wants_dx else None, dmask, None, None


define(
    "masked_softmax(Tensor x, Tensor? mask, float scale, bool is_causal) -> Tensor",
    run_masked_softmax,
    lambda x, mask, scale, is_causal: layout.output(x),
    keep_masked_softmax,
    masked_softmax_backward,
)
define(
    "masked_softmax_backward(Tensor dy, Tensor y, float scale) -> Tensor",
    run_masked_softmax_backward,
    lambda dy, y, scale: layout.output(y),
)


class MaskedSoftmax(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y = run_masked_softmax(*args)
        keep_masked_softmax(ctx, args, y)
        return y

    backward = staticmethod(masked_softmax_backward)


apply_masked_softmax = apply_of(MaskedSoftmax)
