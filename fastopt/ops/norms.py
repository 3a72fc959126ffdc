"""layer_norm and rms_norm as ops: kernels, fakes and derivatives."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from fastopt import backend
from fastopt.ops import layout
from fastopt.ops.registry import by_torch, call, compute_dtype, define, differentiated


def _flat(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _statistic(x: Tensor, n_dims: int, dtype: torch.dtype | None = None) -> Tensor:
    """One number a row, in the compute type unless said otherwise."""
    n_rows = prod(x.shape[: x.dim() - n_dims])
    return torch.empty(n_rows, dtype=dtype or compute_dtype(x.dtype), device=x.device)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    n_dims: int,
    eps: float,
) -> Tensor:
    """y; the last n_dims dimensions are one row. mean and rstd are filled in where given."""
    y = layout.output(x)
    if x.numel():
        x, *geometry = layout.rows(x, n_dims)
        kernels = backend.kernels(x.device.type, "norms")
        kernels.layer_norm(x, _flat(weight), _flat(bias), y, mean, rstd, *geometry, eps)
    return y


def run_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n_dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)."""
    mean, rstd = _statistic(x, n_dims, torch.float64), _statistic(x, n_dims)
    return layer_norm(x, weight, bias, mean, rstd, n_dims, eps), mean, rstd


def rms_norm(
    x: Tensor, weight: Tensor | None, rstd: Tensor | None, n_dims: int, eps: float
) -> Tensor:
    """y; the last n_dims dimensions are one row. rstd is filled in where given."""
    y = layout.output(x)
    if x.numel():
        x, *geometry = layout.rows(x, n_dims)
        backend.kernels(x.device.type, "norms").rms_norm(x, _flat(weight), y, rstd, *geometry, eps)
    return y


def run_rms_norm(
    x: Tensor, weight: Tensor | None, n_dims: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(y, rstd)."""
    rstd = _statistic(x, n_dims)
    return rms_norm(x, weight, rstd, n_dims, eps), rstd


def _outputs(wanted: list[bool], *likes: Tensor | None) -> list[Tensor | None]:
    pairs = zip(wanted, likes, strict=True)
    return [layout.output(x) if wants and x is not None else None for wants, x in pairs]


def run_layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    n_dims: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); empty where one is not wanted."""
    grads = _outputs(wanted, x, weight, bias)
    _backward("layer_norm_backward", dy, x, (_flat(weight), mean, rstd), grads, n_dims)
    dx, dweight, dbias = (dy.new_empty(0) if g is None else g for g in grads)
    return dx, dweight, dbias


def run_rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, n_dims: int, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """(dx, dweight); empty where one is not wanted."""
    grads = _outputs(wanted, x, weight)
    _backward("rms_norm_backward", dy, x, (_flat(weight), rstd), grads, n_dims)
    dx, dweight = (dy.new_empty(0) if g is None else g for g in grads)
    return dx, dweight


def _backward(
    name: str,
    dy: Tensor,
    x: Tensor,
    kept: tuple[Tensor | None, ...],
    grads: list[Tensor | None],
    n_dims: int,
) -> None:
    if x.numel():
        x, *geometry = layout.rows(x, n_dims)
        kernels = backend.kernels(x.device.type, "norms")
        getattr(kernels, name)(dy.contiguous(), x, *kept, *grads, *geometry)
    else:
        for grad in grads:
            if grad is not None:
                grad.zero_()


def keep_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.n_dims, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def layer_norm_backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    if differentiated():
        shape, eps = x.shape[x.dim() - ctx.n_dims :], ctx.eps

        def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return F.layer_norm(x, shape, weight, bias, eps)

        return *by_torch(norm, [x, weight, bias], dy), None, None
    wanted = list(ctx.needs_input_grad[:3])
    grads = call(
        run_layer_norm_backward,
        "layer_norm_backward",
        dy,
        x,
        weight,
        bias,
        mean,
        rstd,
        ctx.n_dims,
        wanted,
    )
    return *_those(grads, wanted), None, None


def _those(grads: tuple[Tensor, ...], wanted: list[bool]) -> list[Tensor | None]:
    return [grad if wants else None for grad, wants in zip(grads, wanted, strict=True)]


def keep_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, ctx.n_dims, ctx.eps = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def rms_norm_backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, rstd = ctx.saved_tensors
    if differentiated():
        shape, eps = x.shape[x.dim() - ctx.n_dims :], ctx.eps

        def norm(x: Tensor, weight: Tensor | None) -> Tensor:
            return F.rms_norm(x, shape, weight, eps)

        return *by_torch(norm, [x, weight], dy), None, None
    wanted = list(ctx.needs_input_grad[:2])
    grads = call(
        run_rms_norm_backward, "rms_norm_backward", dy, x, weight, rstd, ctx.n_dims, wanted
    )
    return *_those(grads, wanted), None, None


def _fake_grads(wanted: list[bool], dy: Tensor, *likes: Tensor | None) -> tuple[Tensor, ...]:
    grads = _outputs(wanted, *likes)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, int n_dims, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    run_layer_norm,
    lambda x, weight, bias, n_dims, eps: (
        layout.output(x),
        _statistic(x, n_dims, torch.float64),
        _statistic(x, n_dims),
    ),
    keep_layer_norm,
    layer_norm_backward,
)
define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, int n_dims, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    run_layer_norm_backward,
    lambda dy, x, weight, bias, mean, rstd, n_dims, wanted: _fake_grads(
        wanted, dy, x, weight, bias
    ),
)
define(
    "rms_norm(Tensor x, Tensor? weight, int n_dims, float eps) -> (Tensor, Tensor)",
    run_rms_norm,
    lambda x, weight, n_dims, eps: (layout.output(x), _statistic(x, n_dims)),
    keep_rms_norm,
    rms_norm_backward,
)
define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, int n_dims, "
    "bool[2] wanted) -> (Tensor, Tensor)",
    run_rms_norm_backward,
    lambda dy, x, weight, rstd, n_dims, wanted: _fake_grads(wanted, dy, x, weight),
)


class LayerNorm(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, n_dims: int, eps: float
    ) -> Tensor:
        y, mean, rstd = run_layer_norm(x, weight, bias, n_dims, eps)
        ctx.n_dims, ctx.eps = n_dims, eps
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    backward = staticmethod(layer_norm_backward)


class RMSNorm(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, n_dims: int, eps: float) -> Tensor:
        y, rstd = run_rms_norm(x, weight, n_dims, eps)
        ctx.n_dims, ctx.eps = n_dims, eps
        ctx.save_for_backward(x, weight, rstd)
        return y

    backward = staticmethod(rms_norm_backward)
