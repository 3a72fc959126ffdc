"""add_layer_norm and add_rms_norm: a residual branch joins and is normalized in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastopt import backend
from fastopt.functional import layout
from fastopt.functional.dropout import dropped, odds, seed_of
from fastopt.functional.layer_norm import as_shape, flat, grad_or_empty, stats_of, wanted_of, zero
from fastopt.functional.layer_norm import composed as composed_norm
from fastopt.functional.registry import (
    apply_of,
    compute_dtype,
    define,
    differentiated,
    gradients_by_torch,
    plain,
    refuse_short,
)
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


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, sum):  sum = dropout(x) + residual,  y = layer_norm(sum) weight + bias

    x, residual: of one shape; sum and y are of the dtype of x + residual. The sum is rounded once,
    and y is `layer_norm` of what it was rounded to. normalized_shape, weight, bias, eps: as there.

    dropout_p: an element of x is 0 with this probability, whatever it was, and 1 / (1 - dropout_p)
    as large without; in steps of 2^-32, and only while training. Which ones follows from the seed
    and the element's row and column: the same ones in the backward, on CPU and on CUDA, for any
    strides. seed: an int, or an int64 tensor of one element, which is read where the kernel runs
    and so may change between replays of a CUDA graph; None draws one from torch's default generator
    of the device.

    Raises RuntimeError for shapes, dtypes and devices that do not fit, TypeError for what is no
    tensor, ValueError for a dropout_p outside [0, 1] and a seed that is no int64.
    """
    name, shape = "add_layer_norm", as_shape(normalized_shape)
    route, (x, residual, weight, bias) = enter(name, x, residual, weight, bias)
    if route == AS_NODE:
        args = (x, residual, normalized_shape, weight, bias, eps, dropout_p, training, seed)
        return as_node(add_layer_norm, *args)
    _check(name, x, residual, shape, {"weight": weight, "bias": bias})
    seed = seed_of(name, dropout_p, training, seed, x)
    options = (len(shape), eps, 0.0, dropout_p, True)
    return _add_norm(name, route, x, residual, weight, bias, seed, *options)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    *,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, sum):  sum = dropout(x) + residual,  y = rms_norm(sum) (weight + weight_offset)

    All as `add_layer_norm` has it; eps and weight_offset as `rms_norm`.
    """
    name, shape = "add_rms_norm", as_shape(normalized_shape)
    route, (x, residual, weight) = enter(name, x, residual, weight)
    if route == AS_NODE:
        args = (x, residual, normalized_shape, weight, eps, dropout_p, training, seed)
        return as_node(add_rms_norm, *args, weight_offset=weight_offset)
    _check(name, x, residual, shape, {"weight": weight})
    seed = seed_of(name, dropout_p, training, seed, x)
    if eps is None:
        eps = torch.finfo(compute_dtype(sum_dtype(x, residual))).eps
    options = (len(shape), eps, weight_offset, dropout_p, False)
    return _add_norm(name, route, x, residual, weight, None, seed, *options)


def _add_norm(
    name: str,
    route: int,
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
    options = (n_dims, eps, offset, p, centered)
    if autocast(name.removeprefix("add_"), x):
        # The sum is then of float32, as the norm of it is; x is read as it lies.
        residual = widen(residual)
    args = (x, residual, weight, bias, seed, *options)
    if route == BY_TORCH:
        return composed(*args)
    if route == AS_OP:
        y, total, _ = torch.ops.fastopt.add_norm(*args)
        return y, total
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, residual, weight, bias)
    ):
        return apply_add_norm(*args)  # type: ignore[no-any-return]
    y, total, _ = run_add_norm(*args, keep=False)
    return y, total


@unrecorded
def _check(
    name: str,
    x: Tensor,
    residual: Tensor,
    shape: tuple[int, ...],
    weights: dict[str, Tensor | None],
) -> None:
    """Raise for what kernels do not take, before anything is computed."""
    given = {"x": x, "residual": residual, **weights}
    for what, tensor in given.items():
        if tensor is None and what in weights:
            continue
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"fastopt.functional.{name} takes a Tensor as {what}, got {kind}")
        if tensor.dtype not in DTYPES:
            raise RuntimeError(
                f"fastopt.functional.{name} got {what} {_describe(tensor)}; it supports float32, "
                "bfloat16, float16 and float64. Convert it first."
            )
        wanted = shape if what in weights else x.shape
        if tensor.shape != wanted:
            raise RuntimeError(
                f"fastopt.functional.{name} got {what} {_describe(tensor)}, and it must be of "
                f"{'normalized_shape' if what in weights else 'the shape of x'}, {tuple(wanted)}. "
                "Expand or reshape it first."
            )
    if not shape or x.shape[-len(shape) :] != shape:
        raise RuntimeError(
            f"fastopt.functional.{name} got x of shape {tuple(x.shape)} and normalized_shape="
            f"{shape}, which must be its last dimensions, at least one. Give a tuple of those."
        )


def sum_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    """The dtype of x + residual."""
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
    return composed_norm(total, weight, bias, n_dims, eps, offset, centered), total


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
    stats = stats_of(y, n_dims, centered) if keep else None
    if x.numel():
        rows, (n_rows, n_cols, stride) = layout.rows(x, n_dims)
        residual, (_, _, residual_stride) = layout.rows(residual, n_dims)
        weights, sizes = (flat(weight), flat(bias)), (n_rows, n_cols)
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
    dweight, dbias = map(wanted_of, wanted[2:], (weight, bias))
    if total.numel():
        kernels, n_cols = backend.kernels_for(total, "rows.add_layer_norm"), _n_cols(total, n_dims)
        inputs = (dy.contiguous(), None if dsum is None else dsum.contiguous(), rows)
        sizes = (total.numel() // n_cols, n_cols)
        weights, outputs = (flat(weight), stats), (dx, dresidual, dweight, dbias)
        options = (offset, _dropout(seed, p), centered)
        kernels.add_norm_backward(*inputs, *weights, *outputs, sizes, *options)
    else:
        zero(dweight, dbias)
    if rows is not total:
        dx, dresidual = (
            d if d is None else layout.kept_channels_last(d, total) for d in (dx, dresidual)
        )
    return dx, dresidual, dweight, dbias


def _n_cols(x: Tensor, n_dims: int) -> int:
    return prod(x.shape[x.dim() - n_dims :])


def _alike(seed: Tensor | None, dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """True where x and residual have the same gradient."""
    return seed is None and dtypes[0] == dtypes[1]


def run_add_norm_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(dx, dresidual, dweight, dbias) as an op gives them."""
    return tuple(grad_or_empty(dy, grad) for grad in _grads(dy, *args))


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
        return composed_norm(total, weight, bias, n_dims, eps, offset, centered)

    d, dweight, dbias = dsum, None, None
    if dy is not None:
        d, dweight, dbias = gradients_by_torch(norm, [total, weight, bias], dy)
        d = d if dsum is None or d is None else d + dsum
    if d is None:
        return None, None, None, None
    dx = dropped(d.to(compute_dtype(d.dtype)), seed, _n_cols(total, n_dims), p)
    return dx.to(ctx.dtypes[0]), d.to(ctx.dtypes[1]), dweight, dbias


def _fake(x: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, n_dims, _, _, _, centered = args
    y = torch.empty(x.shape, dtype=sum_dtype(x, residual), device=x.device)
    return *_laid(y, torch.empty_like(y), x, centered), stats_of(y, n_dims, centered)


def _fake_grads(dy: Tensor, dsum: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    total, weight, bias, _, seed, *_, x_dtype, residual_dtype, wanted = args
    dtypes = (x_dtype, residual_dtype)
    alike = _alike(seed, dtypes)
    flags = (wanted[0] and not alike, wanted[1] or (wanted[0] and alike), *wanted[2:])
    likes = (*(layout.output(total).to(dtype) for dtype in dtypes), weight, bias)
    grads = [wanted_of(*pair) for pair in zip(flags, likes, strict=True)]
    grads[:2] = (d if d is None else layout.kept_channels_last(d, total) for d in grads[:2])
    return tuple(grad_or_empty(dy, grad) for grad in grads)


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
