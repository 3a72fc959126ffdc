"""softmax, log_softmax and logsumexp as ops: kernels, fakes and derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastopt import backend
from fastopt.ops import layout
from fastopt.ops.registry import apply_of, by_torch, compute_dtype, define, differentiated, plain


def run_softmax(x: Tensor, dim: int, log: bool) -> Tensor:
    """y over one dimension, which is not negative; contiguous."""
    y = layout.output(x)
    if x.numel():
        x, shape, strides = layout.along(x, dim)
        backend.kernels_for(x, "rows.softmax").softmax(x, y, shape, strides, log)
    return y


def run_softmax_backward(dy: Tensor, y: Tensor, dim: int, log: bool) -> Tensor:
    """dx from the result."""
    dx = layout.output(y)
    if y.numel():
        y, shape, _ = layout.along(y.contiguous(), dim)
        kernels = backend.kernels_for(y, "rows.softmax")
        kernels.softmax_backward(dy.contiguous(), y, dx, shape, log)
    return dx


def keep_softmax(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
    _, ctx.dim, ctx.log = inputs
    ctx.save_for_backward(output)


def softmax_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    """dx = y (dy - sum dy y), or dy - exp(y) sum dy; as torch operators where it is differentiated
    again."""
    (y,) = ctx.saved_tensors
    if not differentiated(dy, y):
        run = run_softmax_backward if plain(dy, y) else torch.ops.fastopt.softmax_backward
        dx = run(dy, y, ctx.dim, ctx.log)
    elif ctx.log:
        dx = dy - y.exp() * dy.sum(ctx.dim, keepdim=True)
    else:
        dx = y * (dy - (dy * y).sum(ctx.dim, keepdim=True))
    return dx, None, None


define(
    "softmax(Tensor x, int dim, bool log) -> Tensor",
    run_softmax,
    lambda x, dim, log: layout.output(x),
    keep_softmax,
    softmax_backward,
)
define(
    "softmax_backward(Tensor dy, Tensor y, int dim, bool log) -> Tensor",
    run_softmax_backward,
    lambda dy, y, dim, log: layout.output(y),
)


class Softmax(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, log: bool) -> Tensor:
        y = run_softmax(x, dim, log)
        ctx.dim, ctx.log = dim, log
        ctx.save_for_backward(y)
        return y

    backward = staticmethod(softmax_backward)


apply_softmax = apply_of(Softmax)


def run_logsumexp(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(result in x's dtype, stats for the backward) over dimensions, which are sorted.

    stats: on CPU the maximum and log sum exp(x - max), in float64; on a GPU the result, unrounded
    """
    out = torch.empty(_without(x.shape, dims), dtype=x.dtype, device=x.device)
    kernels, stats = backend.kernels_for(x, "rows.softmax"), _stats(out)
    if not x.numel():
        out.fill_(-torch.inf)
    elif backend.by_numba(x):
        kernels.logsumexp(*_walked(x, dims, out, stats))
    else:
        kernels.logsumexp(*_walked(x, dims, stats))
        out.copy_(stats.view(out.shape))
    return out, stats


def _walked(x: Tensor, dims: Sequence[int], *outputs: Tensor) -> tuple[Any, ...]:
    x, shape, strides = layout.along(*layout.merged(x, dims))
    return x, *outputs, shape, strides


def _stats(out: Tensor) -> Tensor:
    if backend.by_numba(out):
        return torch.empty(out.numel(), 2, dtype=torch.float64, device=backend.CPU)
    return torch.empty(out.numel(), dtype=compute_dtype(out.dtype), device=out.device)


def _fake_logsumexp(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    out = x.new_empty(_without(x.shape, dims))
    return out, _stats(out)


def _without(shape: torch.Size, dims: Sequence[int]) -> list[int]:
    return [size for d, size in enumerate(shape) if d not in dims]


def run_logsumexp_backward(dlse: Tensor, x: Tensor, stats: Tensor, dims: Sequence[int]) -> Tensor:
    """dx = dlse exp(x - lse)."""
    dx = _like(x, dims)
    if x.numel():
        one, dim = layout.merged(x, dims)
        in_place = dx.is_contiguous() and layout.neighbours(dims)
        out = dx if in_place else layout.output(one)
        one, shape, strides = layout.along(one, dim)
        kernels = backend.kernels_for(x, "rows.softmax")
        kernels.logsumexp_backward(dlse.contiguous(), one, stats, out, shape, strides)
        if not in_place:
            layout.unmerge_(dx, dims, out)
    return dx


def _like(x: Tensor, dims: Sequence[int]) -> Tensor:
    """An empty dx, as torch lays it out: as x is, where the dimensions that are not reduced lie in
    their order (those of dlse do), else contiguous."""
    if not x.is_contiguous():
        kept = [x.stride(d) for d in range(x.dim()) if d not in dims and x.shape[d] > 1]
        if kept != sorted(kept, reverse=True):
            return layout.output(x)
    return torch.empty_like(x)


def keep_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.dims = inputs
    ctx.save_for_backward(x, output[1])
    ctx.mark_non_differentiable(output[1])


def logsumexp_backward(ctx: Any, dlse: Tensor, _: Any) -> tuple[Tensor | None, None]:
    x, stats = ctx.saved_tensors
    if differentiated(dlse, x):
        return by_torch(lambda x: torch.logsumexp(x, ctx.dims), [x], dlse)[0], None
    run = run_logsumexp_backward if plain(dlse, x, stats) else torch.ops.fastopt.logsumexp_backward
    return run(dlse, x, stats, ctx.dims), None


define(
    "logsumexp(Tensor x, int[] dims) -> (Tensor, Tensor)",
    run_logsumexp,
    _fake_logsumexp,
    keep_logsumexp,
    logsumexp_backward,
)
define(
    "logsumexp_backward(Tensor dlse, Tensor x, Tensor stats, int[] dims) -> Tensor",
    run_logsumexp_backward,
    lambda dlse, x, stats, dims: _like(x, dims),
)


class LogSumExp(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: Sequence[int]) -> Tensor:
        result, stats = run_logsumexp(x, dims)
        ctx.dims = dims
        ctx.save_for_backward(x, stats)
        return result

    @staticmethod
    def backward(ctx: Any, dlse: Tensor) -> tuple[Tensor | None, None]:
        return logsumexp_backward(ctx, dlse, None)


apply_logsumexp = apply_of(LogSumExp)
