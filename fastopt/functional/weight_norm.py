"""weight_norm as an op: kernels, fakes and derivatives."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from fastopt import backend
from fastopt.functional import layout
from fastopt.functional.registry import (
    apply_of,
    compute_dtype,
    define,
    differentiated,
    gradients_by_torch,
    plain,
)

# One norm of all elements.
WHOLE = -1
# Below so many elements one norm of all is that of a row, which one thread walks.
ONE_ROW = 32768


def sizes_of(v: Tensor, dim: int) -> tuple[int, int, int]:
    """(n_outer, n_kept, n_inner): the norms are over the first and the last."""
    shape = v.shape
    if dim == WHOLE and v.numel() <= ONE_ROW:
        return 1, 1, v.numel()
    if dim == WHOLE:
        return prod(shape[:-1]), 1, shape[-1]
    return prod(shape[:dim]), shape[dim], prod(shape[dim + 1 :])


def fits(v: Tensor, dim: int) -> bool:
    """True where kernels take it: on a GPU a norm is of rows or of columns."""
    if not v.numel() or backend.by_numba(v):
        return bool(v.numel())
    n_outer, _, n_inner = sizes_of(v, dim)
    return n_outer == 1 or n_inner == 1


def _norms(v: Tensor, n_kept: int) -> Tensor:
    dtype = torch.float64 if backend.by_numba(v) else compute_dtype(v.dtype)
    return torch.empty(n_kept, dtype=dtype, device=v.device)


def run_weight_norm(v: Tensor, g: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(y, norms)"""
    y, sizes = layout.output(v), sizes_of(v, dim)
    norms = _norms(v, sizes[1])
    kernels = backend.kernels_for(v, "rows.weight_norm")
    kernels.weight_norm(v.contiguous(), g.contiguous(), y, norms, sizes)
    return y, norms


def run_weight_norm_backward(
    dy: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """(dv, dg)"""
    dv, dg = layout.output(v), layout.output(g)
    kernels, g = backend.kernels_for(v, "rows.weight_norm"), g.contiguous()
    args = (dy.contiguous(), v.contiguous(), g, norms, dv, dg, sizes_of(v, dim))
    kernels.weight_norm_backward(*args)
    return dv, dg


def composed(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """The same made of torch's operators: the second derivative of torch._weight_norm takes the
    norms for constants (2.13)."""
    if dim == WHOLE:
        scale: Tensor = g / torch.linalg.vector_norm(v)
        return v * scale
    lines = v.transpose(0, dim).reshape(v.shape[dim], -1)
    scale = g / torch.linalg.vector_norm(lines, dim=1).view(g.shape)
    return v * scale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    v, g, ctx.dim = inputs
    ctx.save_for_backward(v, g, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    v, g, norms = ctx.saved_tensors
    if differentiated(dy, v, g, norms):
        return *gradients_by_torch(lambda v, g: composed(v, g, ctx.dim), [v, g], dy), None
    if plain(dy, v, g, norms):
        return *run_weight_norm_backward(dy, v, g, norms, ctx.dim), None
    return *torch.ops.fastopt.weight_norm_backward(dy, v, g, norms, ctx.dim), None


define(
    "weight_norm(Tensor v, Tensor g, int dim) -> (Tensor, Tensor)",
    run_weight_norm,
    lambda v, g, dim: (layout.output(v), _norms(v, sizes_of(v, dim)[1])),
    _keep,
    _backward,
)
define(
    "weight_norm_backward(Tensor dy, Tensor v, Tensor g, Tensor norms, int dim) "
    "-> (Tensor, Tensor)",
    run_weight_norm_backward,
    lambda dy, v, g, *_: (layout.output(v), layout.output(g)),
)


class WeightNorm(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dim: int) -> Tensor:
        y, norms = run_weight_norm(v, g, dim)
        ctx.dim = dim
        ctx.save_for_backward(v, g, norms)
        return y

    backward = staticmethod(_backward)


apply_weight_norm = apply_of(WeightNorm)


def run_unit(x: Tensor, out: Tensor, eps: float) -> None:
    """out = x / max(||x||, eps) of a vector."""
    backend.kernels_for(x, "rows.weight_norm").unit(x, out, eps)
