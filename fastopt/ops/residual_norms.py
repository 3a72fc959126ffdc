"""add_layer_norm and add_rms_norm as one op: kernels, fakes and derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastopt import backend
from fastopt.ops import layout, norms
from fastopt.ops.dropout import dropped, odds
from fastopt.ops.registry import (
    apply_of,
    by_torch,
    compute_dtype,
    define,
    differentiated,
    plain,
    refuse_short,
)


def sum_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    """What x + residual is of."""
    return torch.promote_types(x.dtype, residual.dtype)


def composed(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    n_dims: int,
    eps: float,
    offset: float,
    p: float,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    """(y, sum) by torch's operators: the meaning of the op under transforms."""
    dtype = sum_dtype(x, residual)
    wide = x.to(compute_dtype(dtype))
    wide = dropped(wide, seed, prod(x.shape[x.dim() - n_dims :]), p)
    total = (wide + residual).to(dtype)
    return norms.composed(total, weight, bias, n_dims, eps, offset, centered), total


def run_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    n_dims: int,
    eps: float,
    offset: float,
    p: float,
    centered: bool,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y, sum, stats); the last n_dims dimensions are one row; seed: of the dropout, if there is
    one; keep: whether the backward follows. Where x is in channels_last so are the sum and, of
    rms_norm, y."""
    y = torch.empty(x.shape, dtype=sum_dtype(x, residual), device=x.device)
    total = torch.empty_like(y)
    stats = norms.stats_of(y, n_dims, centered) if keep else None
    if x.numel():
        rows, (n_rows, n_cols, stride) = layout.rows(x, n_dims)
        residual, (_, _, residual_stride) = layout.rows(residual, n_dims)
        weights, sizes = (norms.flat(weight), norms.flat(bias)), (n_rows, n_cols)
        strides, dropout = (stride, residual_stride), _dropout(seed, p)
        kernels = backend.kernels_for(x, "rows.add_layer_norm")
        outputs, options = (y, total, stats), (eps, offset, dropout, centered)
        kernels.add_norm(rows, residual, *weights, *outputs, (*sizes, *strides), *options)
    return *_laid(y, total, x, centered), stats


def _laid(y: Tensor, total: Tensor, x: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    """Both as torch lays out x + residual and a norm of it, where x is in channels_last."""
    total = layout.kept_channels_last(total, x)
    return y if centered else layout.kept_channels_last(y, total), total


def _dropout(seed: Tensor | None, p: float) -> tuple[Tensor, int, float] | None:
    return None if seed is None else (seed, *odds(p))


def _grads(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    seed: Tensor | None,
    n_dims: int,
    offset: float,
    p: float,
    centered: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dweight, dbias); None where one is not wanted, and for dx where it is
    dresidual."""
    alike = _alike(seed, (x_dtype, residual_dtype))
    rows, dx, dresidual = total.contiguous(), None, None
    if wanted[0] and not alike:
        dx = torch.empty_like(rows, dtype=x_dtype)
    if wanted[1] or (wanted[0] and alike):
        dresidual = torch.empty_like(rows, dtype=residual_dtype)
    dweight, dbias = map(norms.wanted_of, wanted[2:], (weight, bias))
    if total.numel():
        kernels, n_cols = backend.kernels_for(total, "rows.add_layer_norm"), _n_cols(total, n_dims)
        inputs = (dy.contiguous(), None if dsum is None else dsum.contiguous(), rows)
        sizes = (total.numel() // n_cols, n_cols)
        weights, outputs = (norms.flat(weight), stats), (dx, dresidual, dweight, dbias)
        options = (offset, _dropout(seed, p), centered)
        kernels.add_norm_backward(*inputs, *weights, *outputs, sizes, *options)
    else:
        norms.zero(dweight, dbias)
    if rows is not total:
        dx, dresidual = (
            d if d is None else layout.kept_channels_last(d, total) for d in (dx, dresidual)
        )
    return dx, dresidual, dweight, dbias


def _n_cols(x: Tensor, n_dims: int) -> int:
    return prod(x.shape[x.dim() - n_dims :])


def _alike(seed: Tensor | None, dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """Whether x and residual have the same gradient."""
    return seed is None and dtypes[0] == dtypes[1]


def run_add_norm_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(dx, dresidual, dweight, dbias) as an op gives them."""
    return tuple(norms.given(dy, grad) for grad in _grads(dy, *args))


def keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, seed, *ctx.options = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight, bias, output[2], seed)
    ctx.mark_non_differentiable(output[2])


def add_norm_backward(
    ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    """dresidual = dsum + d norm(sum),  dx = dropout(dresidual); by torch's operators where they are
    differentiated again, and where y has no gradient."""
    total, weight, bias, stats, seed = ctx.saved_tensors
    n_dims, _, offset, p, centered = ctx.options
    saved = (total, weight, bias, seed)
    composed = dy is None or differentiated(dy, *saved)
    if composed or (dsum is not None and differentiated(dsum, *saved)):
        return *_composed_grads(ctx, saved, dy, dsum), *(None,) * 6
    wanted = ctx.needs_input_grad[:4]
    tensors, options = (dy, dsum, total, weight, bias, stats, seed), (n_dims, offset, p, centered)
    args: tuple[Any, ...] = (*tensors, *options, *ctx.dtypes, wanted)
    grads: Sequence[Tensor | None]
    if plain(dy, dsum, total, weight, stats, seed):
        grads = _grads(*args)
    else:
        grads = torch.ops.fastopt.add_norm_backward(*args)
    dx = grads[1] if _alike(seed, ctx.dtypes) else grads[0]
    found = (dx, *grads[1:])
    return *(g if wants else None for g, wants in zip(found, wanted, strict=True)), *(None,) * 6


def _composed_grads(
    ctx: Any, saved: tuple[Any, ...], dy: Tensor | None, dsum: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, weight, bias, seed = saved
    n_dims, eps, offset, p, centered = ctx.options
    if dy is None:
        refuse_short(dsum, seed)

    def norm(total: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return norms.composed(total, weight, bias, n_dims, eps, offset, centered)

    d, dweight, dbias = dsum, None, None
    if dy is not None:
        d, dweight, dbias = by_torch(norm, [total, weight, bias], dy)
        d = d if dsum is None or d is None else d + dsum
    if d is None:
        return None, None, None, None
    dx = dropped(d.to(compute_dtype(d.dtype)), seed, _n_cols(total, n_dims), p)
    return dx.to(ctx.dtypes[0]), d.to(ctx.dtypes[1]), dweight, dbias


def _fake(x: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, n_dims, _, _, _, centered = args
    y = torch.empty(x.shape, dtype=sum_dtype(x, residual), device=x.device)
    return *_laid(y, torch.empty_like(y), x, centered), norms.stats_of(y, n_dims, centered)


def _fake_grads(dy: Tensor, dsum: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    total, weight, bias, _, seed, *_, x_dtype, residual_dtype, wanted = args
    dtypes = (x_dtype, residual_dtype)
    alike = _alike(seed, dtypes)
    flags = (wanted[0] and not alike, wanted[1] or (wanted[0] and alike), *wanted[2:])
    likes = (*(layout.output(total).to(dtype) for dtype in dtypes), weight, bias)
    grads = [norms.wanted_of(*pair) for pair in zip(flags, likes, strict=True)]
    grads[:2] = (d if d is None else layout.kept_channels_last(d, total) for d in grads[:2])
    return tuple(norms.given(dy, grad) for grad in grads)


define(
    "add_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, int n_dims, "
    "float eps, float offset, float p, bool centered) -> (Tensor, Tensor, Tensor)",
    run_add_norm,
    _fake,
    keep_add_norm,
    add_norm_backward,
)
define(
    "add_norm_backward(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, Tensor? bias, "
    "Tensor stats, Tensor? seed, int n_dims, float offset, float p, bool centered, "
    "ScalarType x_dtype, ScalarType residual_dtype, bool[4] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    run_add_norm_backward,
    _fake_grads,
)


class AddNorm(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        y, total, stats = run_add_norm(x, residual, *args)
        weight, bias, seed, *ctx.options = args
        ctx.dtypes = x.dtype, residual.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, bias, stats, seed)
        return y, total

    backward = staticmethod(add_norm_backward)


apply_add_norm = apply_of(AddNorm)
