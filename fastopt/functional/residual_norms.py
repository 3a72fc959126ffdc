"""add_layer_norm and add_rms_norm: a residual branch joins and is normalized in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastopt.functional.norms import _as_shape
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
from fastopt.ops import residual_norms
from fastopt.ops.dropout import draw_seed
from fastopt.ops.registry import compute_dtype


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
    name, shape = "add_layer_norm", _as_shape(normalized_shape)
    route, (x, residual, weight, bias) = enter(name, x, residual, weight, bias)
    if route == AS_NODE:
        args = (x, residual, normalized_shape, weight, bias, eps, dropout_p, training, seed)
        return as_node(add_layer_norm, *args)
    _check(name, x, residual, shape, {"weight": weight, "bias": bias})
    seed = _seed(name, dropout_p, training, seed, x)
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
    name, shape = "add_rms_norm", _as_shape(normalized_shape)
    route, (x, residual, weight) = enter(name, x, residual, weight)
    if route == AS_NODE:
        args = (x, residual, normalized_shape, weight, eps, dropout_p, training, seed)
        return as_node(add_rms_norm, *args, weight_offset=weight_offset)
    _check(name, x, residual, shape, {"weight": weight})
    seed = _seed(name, dropout_p, training, seed, x)
    if eps is None:
        eps = torch.finfo(compute_dtype(residual_norms.sum_dtype(x, residual))).eps
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
        return residual_norms.composed(*args)
    if route == AS_OP:
        y, total, _ = torch.ops.fastopt.add_norm(*args)
        return y, total
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, residual, weight, bias)
    ):
        return residual_norms.apply_add_norm(*args)  # type: ignore[no-any-return]
    y, total, _ = residual_norms.run_add_norm(*args, keep=False)
    return y, total


def _seed(
    name: str, p: float, training: bool, seed: int | Tensor | None, x: Tensor
) -> Tensor | None:
    """The seed of the dropout, None where nothing is dropped."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(
            f"dropout probability has to be between 0 and 1, but got {p} "
            f"(fastopt.functional.{name}: dropout_p is the share of x that is dropped)"
        )
    if isinstance(seed, Tensor):
        (seed,) = enter("dropout", seed)[1]
        assert isinstance(seed, Tensor)
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"fastopt.functional.{name} takes a seed of one int64, got {_describe(seed)}. Give "
                "it an int, such a tensor, or None."
            )
    elif seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(
            f"fastopt.functional.{name} takes a seed of 64 bits with a sign, got {seed}. "
            "Take it modulo 2**63."
        )
    return draw_seed(seed, x.device) if training and p > 0.0 else None


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
