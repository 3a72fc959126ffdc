"""softmax, log_softmax and logsumexp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
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
from fastopt.functional.tracing import as_node


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = exp(x - max) / sum exp(x - max) over `dim`, of the shape of `input`.

    dtype: cast the input first. As torch.nn.functional.softmax, implicit `dim` and its warning
    included. Milakov & Gimelshein 2018, algorithm 2.
    """
    return _softmax(softmax, F.softmax, False, input, dim, _stacklevel, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = x - max - log sum exp(x - max) over `dim`, of the shape of `input`.

    dtype: cast the input first. As torch.nn.functional.log_softmax.
    """
    return _softmax(log_softmax, F.log_softmax, True, input, dim, _stacklevel, dtype)


def _softmax(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    log: bool,
    input: Tensor,
    dim: int | None,
    stacklevel: int,
    dtype: torch.dtype | None,
) -> Tensor:
    name = ours.__name__
    route, (input,) = enter(name, input)
    if route == AS_NODE:
        return as_node(ours, input, dim, stacklevel, dtype)
    stacklevel += 3  # the functions between the caller and torch's, which warns of dim=None
    if route == BY_TORCH:
        return by_torch(name, theirs, input, dim, stacklevel, dtype)
    x = input
    if dtype is None and autocast(name, x):
        x = widen(x)
    elif dtype in DTYPES and not x.is_complex():
        x = x.to(dtype)
    rank = x.dim() or 1
    if (
        type(dim) is not int
        or not -rank <= dim < rank
        or x.dtype not in DTYPES
        or dtype not in (None, x.dtype)
    ):
        return by_torch(name, theirs, input, dim, stacklevel, dtype)
    dim = dim % rank
    if route == AS_OP:
        result: Tensor = torch.ops.fastopt.softmax(x, dim, log)
        return result
    if torch.is_grad_enabled() and x.requires_grad:
        return apply_softmax(x, dim, log)  # type: ignore[no-any-return]
    return run_softmax(x, dim, log)


def logsumexp(input: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """log sum exp(x) over the dimensions `dim`, without overflow. As torch.logsumexp."""
    route, (input,) = enter("logsumexp", input)
    args = (input, dim, keepdim)
    if route == AS_NODE:
        return as_node(logsumexp, *args)
    if route == BY_TORCH:
        return by_torch("logsumexp", torch.logsumexp, *args)
    x = widen(input) if autocast("logsumexp", input) else input
    rank = x.dim()
    dims: list[Any] = list(dim) if isinstance(dim, (tuple, list)) else [dim]
    if (
        rank == 0
        or not dims
        or x.dtype not in DTYPES
        or not all(type(d) is int and -rank <= d < rank for d in dims)
        or len({d % rank for d in dims}) < len(dims)
    ):
        return by_torch("logsumexp", torch.logsumexp, *args)
    reduced = sorted(d % rank for d in dims)
    if route == AS_OP:
        result: Tensor = torch.ops.fastopt.logsumexp(x, reduced)[0]
    elif torch.is_grad_enabled() and x.requires_grad:
        result = apply_logsumexp(x, reduced)
    else:
        result = run_logsumexp(x, reduced)[0]
    if keepdim:
        for d in reduced:
            result = result.unsqueeze(d)
    return result


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
        return gradients_by_torch(lambda x: torch.logsumexp(x, ctx.dims), [x], dlse)[0], None
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
