"""The cross entropy of a linear layer as an op, without the logits of the whole batch.

    loss = cross_entropy(x linear_weight^T + linear_bias, target)

Tokens are taken in chunks: a chunk's logits are a matrix product into one buffer, and their
gradient is written over them. So the gradients of a mean or a sum are made in forward, where the
logits are, and the backward multiplies them by its upstream gradient; with a gradient for each
token, which forward cannot know, the backward makes the logits again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from fastopt import backend
from fastopt.ops import losses
from fastopt.ops.losses import MEAN, NONE
from fastopt.ops.registry import (
    apply_of,
    by_torch,
    compute_dtype,
    define,
    differentiated,
    plain,
    refuse_short,
)

# Tokens a chunk, by device type. CPU, 4096 tokens x 32000 classes x 512 wide, float32, forward and
# backward, beside other work: 128, 256, 512, 1024 tokens are 0.73, 0.87, 1.07, 1.20 times as fast
# as linear + cross_entropy; more than 512 take more than a tenth of its memory. cuda: not measured.
CHUNK = {"cpu": 512, "cuda": 2048}

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


class Layer(NamedTuple):
    """x: (N, D); linear_weight: (C, D); linear_bias: (C,) or None; all of one dtype
    target: (N,) int64, or probabilities (N, C) of that dtype; weight: (C,) or None"""

    x: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    weight: Tensor | None


def chunk_of(x: Tensor) -> int:
    """Tokens a chunk, where the caller does not say."""
    return CHUNK["cpu" if x.is_cpu else "cuda"]


def _walk(
    layer: Layer,
    ignore_index: int,
    terms: tuple[float, float, float],
    wanted: Sequence[bool],
    chunk: int,
    dloss: Tensor | None = None,
    z_share: Tensor | None = None,
) -> tuple[Tensor, Grads]:
    """(the loss of each token in the compute type, the gradients that are wanted).

    dloss: (N,), or None for ones; z_share: as `losses.Block` has it; of linear_weight and
    linear_bias the gradients are sums in the compute type, of x they are of its dtype
    """
    x, linear_weight, target, linear_bias, weight = layer
    compute, n_tokens, n_classes = compute_dtype(x.dtype), len(x), len(linear_weight)
    result = torch.empty(n_tokens, dtype=compute, device=x.device)
    buffer = x.new_empty(min(chunk, n_tokens), n_classes)
    sums = Sums(layer, wanted, compute)
    weight = None if weight is None else weight.to(compute).contiguous()
    target, ones = target.contiguous(), result.new_ones(1)
    for first in range(0, n_tokens, chunk):
        rows = slice(first, min(first + chunk, n_tokens))
        logits = buffer[: rows.stop - first]
        if linear_bias is None:
            torch.mm(x[rows], linear_weight.t(), out=logits)
        else:
            torch.addmm(linear_bias, x[rows], linear_weight.t(), out=logits)
        block = losses.Block(logits, target[rows], weight, ignore_index, terms, z_share)
        stats = block.losses(result[rows])
        if any(wanted):
            block.gradients(stats, ones if dloss is None else dloss[rows])
            sums.add(logits, rows)
    return result, sums.grads


class Sums:
    """The gradients of a layer, chunk by chunk of the gradient of its logits."""

    def __init__(self, layer: Layer, wanted: Sequence[bool], compute: torch.dtype) -> None:
        self.x, self.linear_weight, n_classes = (
            layer.x,
            layer.linear_weight,
            layer.linear_weight.shape[:1],
        )
        dx = layer.x.new_empty(layer.x.shape) if wanted[0] else None
        weights = (layer.linear_weight.shape, n_classes)
        dweight, dbias = (
            layer.x.new_zeros(shape, dtype=compute) if wants else None
            for shape, wants in zip(weights, wanted[1:], strict=True)
        )
        self.grads: Grads = (dx, dweight, dbias)

    def add(self, dlogits: Tensor, rows: slice) -> None:
        dx, dweight, dbias = self.grads
        if dx is not None:
            torch.mm(dlogits, self.linear_weight, out=dx[rows])
        if dweight is not None:
            _add_product(dweight, dlogits.t(), self.x[rows])
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=dbias.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _sum(x: Tensor, chunk: int) -> Tensor:
    """In float64 on CPU, chunk by chunk: torch sums more at once in an order that depends on the
    threads."""
    wide = torch.float64 if x.is_cpu else compute_dtype(x.dtype)
    if x.numel() <= chunk:
        return x.sum(dtype=wide)
    total = x.new_zeros((), dtype=wide)
    for part in torch.split(x, chunk):
        total = total + part.sum(dtype=wide)
    return total


def _divisor(layer: Layer, ignore_index: int, chunk: int) -> Tensor:
    """What a sum of losses is divided by for their mean."""
    target, compute = layer.target, compute_dtype(layer.x.dtype)
    if target.is_floating_point():
        return _sum(target.new_ones(len(target), dtype=compute), chunk)
    weight = None if layer.weight is None else layer.weight.to(compute)
    return _sum(losses.weights_of(target, weight, ignore_index).to(compute), chunk)


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
    divisor = _divisor(layer, ignore_index, chunk) if reduction == MEAN else None
    indices = not target.is_floating_point()
    if divisor is not None and z_loss and weight is not None and indices:
        z_share = losses.z_share_of(divisor, target, ignore_index).to(compute_dtype(x.dtype))
        if backend.by_numba(x):
            z_loss, z_share = z_loss * float(z_share), None
    terms = (smoothing, z_loss, softcap)
    result, grads = _walk(layer, ignore_index, terms, now, chunk, z_share=z_share)
    if reduction == NONE:
        return result.to(dtype), result.new_ones(()), *grads
    total = _sum(result, chunk)
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
    _, grads = _walk(layer, ignore_index, terms, wanted, chunk, dloss)
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
    """The same made of torch's operators; options: as `losses.composed` has them."""
    logits = F.linear(x, linear_weight, linear_bias)
    return losses.composed(logits, target, weight, *options)


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
            options = (losses.NAMES[reduction], ignore_index, *terms)
            found = composed(x, linear_weight, target, linear_bias, weight, *options)
            return found.to(dloss.dtype)

        found = by_torch(loss, [x, linear_weight, linear_bias], dloss)
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
    """Whether this backward may be run again."""
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
