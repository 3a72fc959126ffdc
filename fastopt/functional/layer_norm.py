"""layer_norm, and what rms_norm shares with it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
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
    transformed,
    widen,
)
from fastopt.functional.tracing import as_node


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
    shape = as_shape(normalized_shape)
    if not isinstance(eps, (float, int)) or not affine_fits(route, x, shape, weight, bias):
        return by_torch("layer_norm", F.layer_norm, x, normalized_shape, weight, bias, eps)
    if autocast("layer_norm", x):
        x = widen(x)
        weight, bias = (None if t is None else widen(t) for t in (weight, bias))
    if route == BY_TORCH:
        return composed(x, weight, bias, len(shape), eps, 0.0, True)
    if route == AS_OP:
        result: Tensor = torch.ops.fastopt.layer_norm(x, weight, bias, len(shape), eps)[0]
        return result
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return apply_layer_norm(x, weight, bias, len(shape), eps)  # type: ignore[no-any-return]
    return run_layer_norm(x, weight, bias, len(shape), eps, False)[0]


def as_shape(shape: Any) -> tuple[int, ...]:
    """Empty for what is no shape, which torch refuses."""
    return tuple(shape) if isinstance(shape, (tuple, list)) else ()


def affine_fits(
    route: int, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> bool:
    """True where kernels, or the composed form in their place, take these arguments: torch's own
    function computes or refuses all others."""
    if route == BY_TORCH and not transformed(x, weight, bias):
        return False
    if not shape or x.dtype not in DTYPES or x.shape[-len(shape) :] != shape:
        return False
    for tensor in (weight, bias):
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in DTYPES):
            return False
    return True


def composed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n_dims: int,
    eps: float,
    offset: float,
    centered: bool,
) -> Tensor:
    """Either norm made of torch's elementwise operators and means, in the type that kernels compute
    in.

    Second derivatives and transforms use it: torch's own layer_norm is wrong in forward over
    reverse mode, and in the second derivative by a bias without a weight (2.13).
    """
    dtype, dims = compute_dtype(x.dtype), list(range(-n_dims, 0))
    y = x.to(dtype)
    if centered:
        y = y - y.mean(dims, keepdim=True)
    y = y * (y.square().mean(dims, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * (weight.to(dtype) + offset)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)


def flat(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def stats_for(x: Tensor, n_rows: int, centered: bool) -> Tensor:
    """An empty tensor for the statistics that the backward needs of each row. layer_norm: mean and
    rstd, (rows, 2) float64 on CPU (rounded to float32 a large mean would be off), (2, rows) in the
    compute type on GPU; rms_norm: rstd, (rows,) in the compute type."""
    if not centered:
        return torch.empty(n_rows, dtype=compute_dtype(x.dtype), device=x.device)
    if backend.by_numba(x):
        return torch.empty(n_rows, 2, dtype=torch.float64, device=backend.CPU)
    return torch.empty(2, n_rows, dtype=compute_dtype(x.dtype), device=x.device)


def stats_of(x: Tensor, n_dims: int, centered: bool) -> Tensor:
    """Room for them."""
    return stats_for(x, prod(x.shape[: x.dim() - n_dims]), centered)


def run_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n_dims: int,
    eps: float,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(y, stats); the last n_dims dimensions are one row. keep: whether the backward follows."""
    y = layout.output(x)
    if not x.numel():
        return y, stats_of(x, n_dims, True)
    x, sizes = layout.rows(x, n_dims)
    stats = stats_for(x, sizes[0], True) if keep else None
    kernels = backend.kernels_for(x, "rows.layer_norm")
    kernels.layer_norm(x, flat(weight), flat(bias), y, stats, sizes, eps)
    return y, stats


def wanted_of(wanted: bool, x: Tensor | None) -> Tensor | None:
    return layout.output(x) if wanted and x is not None else None


def grad_or_empty(dy: Tensor, grad: Tensor | None) -> Tensor:
    """An op returns tensors only: empty for one that is not wanted."""
    return dy.new_empty(0) if grad is None else grad


def _layer_norm_grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    n_dims: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias; None where one is not wanted."""
    dx, dweight, dbias = map(wanted_of, wanted, (x, weight, bias))
    if x.numel():
        x, sizes = layout.rows(x, n_dims)
        kernels, dy, weight = (
            backend.kernels_for(x, "rows.layer_norm"),
            dy.contiguous(),
            flat(weight),
        )
        kernels.layer_norm_backward(dy, x, weight, stats, dx, dweight, dbias, sizes)
    else:
        zero(dweight, dbias)
    return dx, dweight, dbias


def zero(*grads: Tensor | None) -> None:
    for grad in grads:
        if grad is not None:
            grad.zero_()


def run_layer_norm_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(dx, dweight, dbias) as an op gives them."""
    return tuple(grad_or_empty(dy, grad) for grad in _layer_norm_grads(dy, *args))


def keep_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.n_dims, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def layer_norm_backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, stats = ctx.saved_tensors
    if differentiated(dy, x, weight, bias):

        def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return composed(x, weight, bias, ctx.n_dims, ctx.eps, 0.0, True)

        return *gradients_by_torch(norm, [x, weight, bias], dy), None, None
    args = (dy, x, weight, bias, stats, ctx.n_dims, ctx.needs_input_grad[:3])
    if plain(dy, x, weight, stats):
        return *_layer_norm_grads(*args), None, None
    grads = torch.ops.fastopt.layer_norm_backward(*args)
    return *those(grads, args[-1]), None, None


def those(grads: tuple[Tensor, ...], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [grad if wants else None for grad, wants in zip(grads, wanted, strict=True)]


def fake_grads(wanted: list[bool], dy: Tensor, *likes: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(grad_or_empty(dy, grad) for grad in map(wanted_of, wanted, likes))


define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, int n_dims, float eps) -> (Tensor, Tensor)",
    run_layer_norm,
    lambda x, weight, bias, n_dims, eps: (
        layout.output(x),
        stats_of(x, n_dims, True),
    ),
    keep_layer_norm,
    layer_norm_backward,
)
define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, "
    "int n_dims, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    run_layer_norm_backward,
    lambda dy, x, weight, bias, stats, n_dims, wanted: fake_grads(wanted, dy, x, weight, bias),
)


class LayerNorm(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, n_dims: int, eps: float
    ) -> Tensor:
        y, stats = run_layer_norm(x, weight, bias, n_dims, eps)
        ctx.n_dims, ctx.eps = n_dims, eps
        ctx.save_for_backward(x, weight, bias, stats)
        return y

    backward = staticmethod(layer_norm_backward)


apply_layer_norm = apply_of(LayerNorm)
