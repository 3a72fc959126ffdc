"""linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from fastopt import backend
from fastopt.functional.cross_entropy import composed as composed_of_logits
from fastopt.functional.cross_entropy import composed_under_autocast, cross_entropy
from fastopt.functional.linear_arguments import cast_layer, check, fits
from fastopt.functional.logit_chunks import Layer, chunk_of, divisor_of, sum_of, walk
from fastopt.functional.loss_terms import MEAN, NAMES, NONE, REDUCTIONS, terms_of, z_share_of
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
    by_torch,
    enter,
)
from fastopt.functional.tracing import as_node


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The cross entropy of a linear layer, without the logits of the whole batch.

        cross_entropy(input linear_weight^T + linear_bias, target)

    input: (N, D) or (D); linear_weight: (C, D); linear_bias: (C); target: (N) int64, or
    probabilities (N, C) of input's dtype; weight: (C), of the classes. The rest as in
    `cross_entropy`; ignore_index None is -100.
    Tokens are taken in chunks, so memory for logits is a chunk's; options.batch_chunk_size (of
    torch.nn.LinearCrossEntropyOptions) says how many, where it is given. The gradients are made in
    forward where they are wanted (with reduction "none" in backward, from logits made anew), and
    linear_weight's is summed in float32 (float64 for float64). The matrix products are torch's.
    As torch.nn.functional.linear_cross_entropy, which torch has from 2.13 on. A linear_weight
    (C, d1, ..., D), under vmap or forward-mode AD any, makes all logits, as there.
    """
    terms = terms_of(z_loss, softcap) if z_loss or softcap is not None else (0.0, 0.0)
    route, operands = enter(
        "linear_cross_entropy", input, linear_weight, target, linear_bias, weight
    )
    layer = Layer(*operands)
    if route == AS_NODE:
        return _as_node(layer, reduction, ignore_index, label_smoothing, options, z_loss, softcap)
    check(layer, ignore_index)
    shape = (*input.shape[:-1], *linear_weight.shape[:-1])  # of the logits
    ignored = -100 if ignore_index is None else ignore_index
    given = (reduction, ignored, label_smoothing, *terms)
    if route == BY_TORCH:
        return by_torch("linear_cross_entropy", _composed, *layer, shape, *given)
    layer, dtype = cast_layer(layer)
    if reduction not in REDUCTIONS or not fits(layer, label_smoothing):
        return by_torch("linear_cross_entropy", _unchunked, *layer, shape, *given)
    if len(shape) == 1:
        layer = layer._replace(x=layer.x[None], target=layer.target[None])
    chunk = getattr(options, "batch_chunk_size", None) or chunk_of(layer.x)
    wanted = [
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (layer.x, layer.linear_weight, layer.linear_bias)
    ]
    numbers = (REDUCTIONS[reduction], ignored, float(label_smoothing), *terms)
    args: tuple[Any, ...] = (*layer, *numbers, chunk, dtype, wanted)
    if route == AS_OP:
        loss: Tensor = torch.ops.fastopt.linear_cross_entropy(*args)[0]
    elif any(wanted):
        loss = apply_linear_cross_entropy(*args)
    else:
        loss = run_linear_cross_entropy(*args)[0]
    return loss.squeeze(0) if len(shape) == 1 and reduction == "none" else loss


def _as_node(layer: Layer, *given: Any) -> Tensor:
    names = ("reduction", "ignore_index", "label_smoothing", "options", "z_loss", "softcap")
    x, linear_weight, target, linear_bias, weight = layer
    named = dict(zip(names, given, strict=True), linear_bias=linear_bias, weight=weight)
    return as_node(linear_cross_entropy, x, linear_weight, target, **named)


def _logits(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """All of them; linear_weight may have more dimensions than two."""
    n_out = prod(linear_weight.shape[:-1])
    flat = linear_weight.reshape(n_out, linear_weight.shape[-1])
    bias = None if linear_bias is None else linear_bias.reshape(n_out)
    return F.linear(input, flat, bias).reshape(shape)


def _composed(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    shape: tuple[int, ...],
    *numbers: Any,
) -> Tensor:
    """Of torch's operators alone."""
    logits = _logits(input, linear_weight, linear_bias, shape)
    return composed_under_autocast(logits, target, weight, *numbers)


def _unchunked(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    shape: tuple[int, ...],
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """All logits, and their cross entropy."""
    return cross_entropy(
        _logits(input, linear_weight, linear_bias, shape),
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap or None,
    )


def run_linear_cross_entropy(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    chunk: int,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(loss, divisor, and the gradients of the sum by x, linear_weight and linear_bias).

    dtype: of the loss; wanted: which gradients; with reduction "none" they are not made here
    """
    layer, z_share = Layer(x, linear_weight, target, linear_bias, weight), None
    now = [wants and reduction != NONE for wants in wanted]
    divisor = divisor_of(layer, ignore_index, chunk) if reduction == MEAN else None
    indices = not target.is_floating_point()
    if divisor is not None and z_loss and weight is not None and indices:
        z_share = z_share_of(divisor, target, ignore_index).to(compute_dtype(x.dtype))
        if backend.by_numba(x):
            z_loss, z_share = z_loss * float(z_share), None
    terms = (smoothing, z_loss, softcap)
    result, grads = walk(layer, ignore_index, terms, now, chunk, z_share=z_share)
    if reduction == NONE:
        return result.to(dtype), result.new_ones(()), *grads
    total = sum_of(result, chunk)
    if divisor is None:
        return total.to(dtype), result.new_ones(()), *grads
    loss = (total / divisor).to(dtype)
    if indices:
        # Where no target counts the loss is NaN, and its gradient 0.
        divisor = torch.where((target != ignore_index).any(), divisor, 1.0)
    return loss, divisor.to(result.dtype), *grads


def _op(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """An op returns tensors only: empty for a gradient that is not wanted."""
    found = run_linear_cross_entropy(x, *args)
    return tuple(x.new_empty(0) if tensor is None else tensor for tensor in found)


def _fake(
    x: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    _, reduction, *_, dtype, wanted = rest
    compute = compute_dtype(x.dtype)
    shapes = (x.shape, linear_weight.shape, linear_weight.shape[:1])
    grads = (
        x.new_empty(shape, dtype=dtype_of) if wants and reduction != NONE else x.new_empty(0)
        for shape, wants, dtype_of in zip(shapes, wanted, (x.dtype, compute, compute), strict=True)
    )
    loss = x.new_empty(x.shape[:1] if reduction == NONE else (), dtype=dtype)
    return loss, x.new_empty((), dtype=compute), *grads


def run_linear_cross_entropy_backward(
    dloss: Tensor,
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    chunk: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """dx, dlinear_weight and dlinear_bias of one upstream gradient a token."""
    layer = Layer(x, linear_weight, target, linear_bias, weight)
    terms, dloss = (smoothing, z_loss, softcap), dloss.to(compute_dtype(x.dtype)).contiguous()
    _, grads = walk(layer, ignore_index, terms, wanted, chunk, dloss)
    return tuple(None if grad is None else grad.to(x.dtype) for grad in grads)


def _backward_op(dloss: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    found = run_linear_cross_entropy_backward(dloss, x, *args)
    return tuple(x.new_empty(0) if grad is None else grad for grad in found)


def _fake_backward(dloss: Tensor, x: Tensor, linear_weight: Tensor, *rest: Any) -> Any:
    shapes = (x.shape, linear_weight.shape, linear_weight.shape[:1])
    return tuple(
        x.new_empty(shape if wants else (0,)) for shape, wants in zip(shapes, rest[-1], strict=True)
    )


def composed(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    *options: Any,
) -> Tensor:
    """The same made of torch's operators; options: as `cross_entropy.composed` has them."""
    logits = F.linear(x, linear_weight, linear_bias)
    return composed_of_logits(logits, target, weight, *options)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, divisor, *grads = output
    ctx.save_for_backward(*inputs[:5], divisor, *grads)
    ctx.options, ctx.private = inputs[5:], False
    ctx.mark_non_differentiable(*output[1:])


def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    """The derivatives by x, linear_weight and linear_bias."""
    *tensors, divisor, dx, dweight, dbias = ctx.saved_tensors
    reduction, ignore_index, *terms, chunk, _, wanted = ctx.options
    wanted = [wants and needs for wants, needs in zip(wanted, _needed(ctx), strict=True)]
    x, linear_weight, target, linear_bias, weight = tensors
    found: Sequence[Tensor | None]
    if differentiated(dloss, *tensors):

        def loss(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
            options = (NAMES[reduction], ignore_index, *terms)
            found = composed(x, linear_weight, target, linear_bias, weight, *options)
            return found.to(dloss.dtype)

        found = gradients_by_torch(loss, [x, linear_weight, linear_bias], dloss)
    elif reduction == NONE:
        args = (dloss, *tensors, ignore_index, *terms, chunk, wanted)
        if plain(dloss, *tensors):
            found = run_linear_cross_entropy_backward(*args)
        else:
            found = torch.ops.fastopt.linear_cross_entropy_backward(*args)
    else:
        if not plain(dloss, divisor, dx, dweight, dbias):
            refuse_short(dloss, divisor, dx, dweight, dbias)
        found, spare = (dx, dweight, dbias), ctx.private and not _graph_is_kept()
        scale = dloss.to(divisor.dtype) / divisor
        found = [
            _scaled(grad, scale, x.dtype, spare) if wants and grad is not None else None
            for grad, wants in zip(found, wanted, strict=True)
        ]
    dx, dweight, dbias = [g if w else None for g, w in zip(found, wanted, strict=True)]
    return dx, dweight, None, dbias, *[None] * (1 + len(ctx.options))


_saved_tensors_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


def _needed(ctx: Any) -> tuple[bool, bool, bool]:
    needs = ctx.needs_input_grad
    return needs[0], needs[1], needs[3]


def _graph_is_kept() -> bool:
    """True where this backward may be run again."""
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype, spare: bool) -> Tensor:
    """grad times scale, in grad's own memory where nobody will ask for it again."""
    if spare and grad.dtype == dtype:
        return grad.mul_(scale)
    return (grad * scale).to(dtype)


_NUMBERS = "SymInt ignore_index, float smoothing, float z_loss, float softcap, SymInt chunk"
_TENSORS = "Tensor x, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight"
define(
    f"linear_cross_entropy({_TENSORS}, int reduction, {_NUMBERS}, ScalarType dtype, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op,
    _fake,
    keep,
    backward,
)
define(
    f"linear_cross_entropy_backward(Tensor dloss, {_TENSORS}, {_NUMBERS}, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_op,
    _fake_backward,
)


class LinearCrossEntropy(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        loss, *kept = run_linear_cross_entropy(*inputs)
        ctx.save_for_backward(*inputs[:5], *kept)
        # The last backward may write over the gradients that were made here, unless a hook on saved
        # tensors has them too.
        ctx.options, ctx.private = inputs[5:], _saved_tensors_hooks(True) is None
        return loss

    backward = staticmethod(backward)


apply_linear_cross_entropy = apply_of(LinearCrossEntropy)
