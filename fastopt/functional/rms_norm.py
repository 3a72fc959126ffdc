"""rms_norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from fastopt import backend
from fastopt.functional import layout
from fastopt.functional.layer_norm import (
    affine_fits,
    as_shape,
    composed,
    fake_grads,
    flat,
    grad_or_empty,
    stats_for,
    stats_of,
    those,
    wanted_of,
    zero,
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
    autocast,
    by_torch,
    enter,
    widen,
)
from fastopt.functional.tracing import as_node


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
    shape = as_shape(normalized_shape)
    if not isinstance(eps, (float, int, type(None))) or not affine_fits(
        route, x, shape, weight, None
    ):
        args = (x, normalized_shape, weight, eps)
        if not weight_offset:
            return by_torch("rms_norm", F.rms_norm, *args)
        return by_torch("rms_norm", rms_norm_by_torch, *args, weight_offset)
    if autocast("rms_norm", x):
        x, weight = widen(x), None if weight is None else widen(weight)
    if eps is None:
        eps = torch.finfo(compute_dtype(x.dtype)).eps
    if route == BY_TORCH:
        return composed(x, weight, None, len(shape), eps, weight_offset, False)
    if route == AS_OP:
        result: Tensor = torch.ops.fastopt.rms_norm(x, weight, len(shape), eps, weight_offset)[0]
        return result
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad)
    ):
        return apply_rms_norm(x, weight, len(shape), eps, weight_offset)  # type: ignore[no-any-return]
    return run_rms_norm(x, weight, len(shape), eps, weight_offset, False)[0]


def run_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    n_dims: int,
    eps: float,
    offset: float,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(y, stats); the last n_dims dimensions are one row; the weight counts as weight + offset;
    channels_last stays, as with torch. keep: whether the backward follows."""
    y = layout.output(x)
    if not x.numel():
        return y, stats_of(x, n_dims, False)
    rows, sizes = layout.rows(x, n_dims)
    stats = stats_for(x, sizes[0], False) if keep else None
    backend.kernels_for(x, "rows.layer_norm").rms_norm(
        rows, flat(weight), y, stats, sizes, eps, offset
    )
    return layout.kept_channels_last(y, x), stats


def _rms_norm_grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    n_dims: int,
    offset: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dx, dweight; None where one is not wanted. dx is in channels_last where dy is."""
    dx, dweight, rows = wanted_of(wanted[0], x), wanted_of(wanted[1], weight), dy.contiguous()
    if x.numel():
        x, sizes = layout.rows(x, n_dims)
        kernels, weight = backend.kernels_for(x, "rows.layer_norm"), flat(weight)
        kernels.rms_norm_backward(rows, x, weight, stats, dx, dweight, sizes, offset)
    else:
        zero(dweight)
    if rows is not dy and dx is not None:
        dx = layout.kept_channels_last(dx, dy)
    return dx, dweight


def run_rms_norm_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(dx, dweight) as an op gives them."""
    return tuple(grad_or_empty(dy, grad) for grad in _rms_norm_grads(dy, *args))


def rms_norm_by_torch(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None, offset: float
) -> Tensor:
    """torch's, its weight counted as weight + offset in the type that is computed in."""
    if not offset or weight is None:
        return F.rms_norm(x, shape, weight, eps)
    dtype = compute_dtype(x.dtype)
    return F.rms_norm(x.to(dtype), shape, weight.to(dtype) + offset, eps).to(x.dtype)


def keep_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, ctx.n_dims, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def rms_norm_backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, stats = ctx.saved_tensors
    if differentiated(dy, x, weight):

        def norm(x: Tensor, weight: Tensor | None) -> Tensor:
            return composed(x, weight, None, ctx.n_dims, ctx.eps, ctx.offset, False)

        return *gradients_by_torch(norm, [x, weight], dy), None, None, None
    args = (dy, x, weight, stats, ctx.n_dims, ctx.offset, ctx.needs_input_grad[:2])
    if plain(dy, x, weight, stats):
        return *_rms_norm_grads(*args), None, None, None
    grads = torch.ops.fastopt.rms_norm_backward(*args)
    return *those(grads, args[-1]), None, None, None


def _fake_rms_norm(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _, n_dims, _, _ = args
    return layout.kept_channels_last(layout.output(x), x), stats_of(x, n_dims, False)


def _fake_rms_norm_grads(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, *_, wanted = args
    dx, dweight = fake_grads(wanted, dy, x, weight)
    return layout.kept_channels_last(dx, dy) if wanted[0] else dx, dweight


define(
    "rms_norm(Tensor x, Tensor? weight, int n_dims, float eps, float offset) -> (Tensor, Tensor)",
    run_rms_norm,
    _fake_rms_norm,
    keep_rms_norm,
    rms_norm_backward,
)


define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor stats, int n_dims, "
    "float offset, bool[2] wanted) -> (Tensor, Tensor)",
    run_rms_norm_backward,
    _fake_rms_norm_grads,
)


class RMSNorm(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, n_dims: int, eps: float, offset: float
    ) -> Tensor:
        y, stats = run_rms_norm(x, weight, n_dims, eps, offset)
        ctx.n_dims, ctx.eps, ctx.offset = n_dims, eps, offset
        ctx.save_for_backward(x, weight, stats)
        return y

    backward = staticmethod(rms_norm_backward)


apply_rms_norm = apply_of(RMSNorm)
