"""batch_norm, instance_norm and group_norm as one op: kernels, fakes and derivatives.

They differ in what is normalized together: groups of neighbouring channels, of every image or, with
`batch`, of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastopt import backend
from fastopt.ops import layout
from fastopt.ops.registry import apply_of, by_torch, compute_dtype, define, differentiated, plain
from fastopt_kernels.channels import Channels

Running = tuple[Tensor | None, Tensor | None]


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """Of an image, a channel and an element of x as (images, channels, elements); None where
    neither channels nor elements lie beside each other."""
    sizes, strides = x.shape, x.stride()
    length = prod(sizes[2:])
    if length == 1:
        return (strides[0], 1, sizes[1]) if sizes[1] == 1 or strides[1] == 1 else None
    step = layout.flattened(sizes[2:], strides[2:])
    if step == 1 or (step is not None and (strides[1] == 1 or sizes[1] == 1)):
        return strides[0], strides[1] if sizes[1] > 1 else 1, step
    return None


def walk(x: Tensor, groups: int, batch: bool) -> tuple[Tensor, Channels]:
    """x, which is not empty, or a copy, and how its kernels see it."""
    images, channels, length = x.shape[0], x.shape[1], prod(x.shape[2:])
    strides = None if x.is_contiguous() and length > 1 else _strides(x)
    if strides is None:
        x, strides = x.contiguous(), (channels * length, length, 1)
    pixels = _in_pixels(length, strides)
    if pixels and batch and (images == 1 or length == 1 or strides[0] == length * strides[2]):
        step = strides[0] if length == 1 else strides[2]
        images, length, strides = 1, images * length, (0, 1, step)
    return x, Channels(images, channels, length, *strides, groups, batch, pixels)


def _in_pixels(length: int, strides: tuple[int, int, int]) -> bool:
    return length == 1 or strides[2] != 1


def _output(x: Tensor) -> Tensor:
    """An empty tensor like x, dense in the order in which its kernels walk x."""
    length = prod(x.shape[2:])
    if x.is_contiguous() or length == 1 or 0 in x.shape:
        return layout.output(x)
    strides = _strides(x)
    if strides is None or not _in_pixels(length, strides):
        return layout.output(x)
    images, channels, *sizes = x.shape
    return torch.empty(images, *sizes, channels, dtype=x.dtype, device=x.device).movedim(-1, 1)


def _in_order(dy: Tensor, like: Tensor) -> Tensor:
    """dy laid out as an empty tensor of ours."""
    if like.is_contiguous():
        return dy.contiguous()
    return dy.movedim(1, -1).contiguous()


def _n_sets(x: Tensor, groups: int, batch: bool) -> int:
    return groups if batch else x.shape[0] * groups


def _stats(x: Tensor, n_sets: int) -> Tensor:
    """Room for mean and variance of each set, the mean not rounded to float32, where a large one
    would be off: on CPU both in float64, on GPU the mean in two parts."""
    if backend.by_numba(x):
        return torch.empty(n_sets, 2, dtype=torch.float64, device=backend.CPU)
    return torch.empty(3, n_sets, dtype=compute_dtype(x.dtype), device=x.device)


def moments(x: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance from what `_stats` made room for; contiguous, as some of torch's kernels
    take statistics for contiguous whatever their strides (2.13)."""
    if backend.by_numba(x):
        return stats[:, 0].contiguous(), stats[:, 1].contiguous()
    return stats[0] + stats[1], stats[2]


def _kept(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Those that were given, as `_stats` has them."""
    if backend.by_numba(x):
        return torch.stack([mean.double(), var.double()], 1)
    high, var = mean.to(compute_dtype(x.dtype)), var.to(compute_dtype(x.dtype))
    return torch.stack([high, (mean - high).to(high.dtype), var])


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def run_channel_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    groups: int,
    batch: bool,
    eps: float,
    running: Running = (None, None),
    momentum: float = 0.0,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(y, stats). mean, var: normalize by these; running: moved to those of x, by momentum; keep:
    whether stats are needed."""
    y = _output(x)
    given = mean is not None and var is not None
    stats = _stats(x, _n_sets(x, groups, batch)) if keep else None
    if mean is not None and var is not None:
        mean, var = mean.contiguous(), var.contiguous()
        if keep:
            stats = _kept(x, mean, var)
    if not x.numel():
        return y, stats
    x, channels = walk(x, groups, batch)
    backend.kernels_for(x, "rows.channel_norms").channel_norm(
        x,
        _flat(weight),
        _flat(bias),
        y,
        None if given else stats,
        (mean, var) if given else running,
        channels,
        eps,
        None if given else momentum,
    )
    if not given:
        _written(*running)
    return y, stats


def _written(*tensors: Tensor | None) -> None:
    """Tell autograd what a kernel wrote."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    groups: int,
    batch: bool,
    eps: float,
    given: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias; None where one is not wanted."""
    dx, dweight, dbias = _room(wanted, x, weight, bias)
    if x.numel():
        dy = _in_order(dy, _output(x) if dx is None else dx)
        x, channels = walk(x, groups, batch)
        backend.kernels_for(x, "rows.channel_norms").channel_norm_backward(
            dy, x, _flat(weight), stats, dx, dweight, dbias, channels, eps, given
        )
    else:
        for grad in (dweight, dbias):
            if grad is not None:
                grad.zero_()
    return dx, dweight, dbias


def _room(
    wanted: Sequence[bool], x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Empty tensors for those of dx, dweight and dbias that are wanted."""
    dx = _output(x) if wanted[0] else None
    dweight = layout.output(weight) if wanted[1] and weight is not None else None
    dbias = layout.output(bias) if wanted[2] and bias is not None else None
    return dx, dweight, dbias


def _given(dy: Tensor, grad: Tensor | None) -> Tensor:
    """An op returns tensors only: empty for one that is not wanted."""
    return dy.new_empty(0) if grad is None else grad


def run_channel_norm_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(dx, dweight, dbias) as an op gives them."""
    return tuple(_given(dy, grad) for grad in _grads(dy, *args))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, mean, _, ctx.groups, ctx.batch, ctx.eps = inputs
    ctx.given = mean is not None
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])


def composed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    groups: int,
    batch: bool,
    eps: float,
) -> Tensor:
    """The op made of torch's elementwise operators and means.

    Second derivatives and transforms use it, as torch's own norms are wrong or refuse under some of
    them (2.13): batch_norm with statistics or images that are not contiguous, group_norm with
    batched gradients, and both with a bias alone.
    """
    found = [t.dtype for t in (x, weight, bias) if t is not None]
    wide = torch.float64 if torch.float64 in found else torch.float32
    per_channel = (1, -1, *[1] * (x.dim() - 2))
    y = x.to(wide)
    if mean is not None and var is not None:
        mean, var = (t.to(wide).view(per_channel) for t in (mean, var))
        y = (y - mean) * (var + eps).rsqrt()
    else:
        y = y.unflatten(1, (groups, x.shape[1] // groups))  # type: ignore[no-untyped-call]
        together = [0] * batch + list(range(2, y.dim()))
        y = y - y.mean(together, keepdim=True)
        y = y * (y.square().mean(together, keepdim=True) + eps).rsqrt()
        y = y.flatten(1, 2)
    if weight is not None:
        y = y * weight.to(wide).view(per_channel)
    if bias is not None:
        y = y + bias.to(wide).view(per_channel)
    return y.to(x.dtype)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, stats = saved = ctx.saved_tensors
    if differentiated(dy, *saved):
        mean, var = moments(x, stats) if ctx.given else (None, None)

        def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return composed(x, weight, bias, mean, var, ctx.groups, ctx.batch, ctx.eps)

        return *by_torch(norm, [x, weight, bias], dy), *[None] * 5
    wanted = ctx.needs_input_grad[:3]
    args = (dy, x, weight, bias, stats, ctx.groups, ctx.batch, ctx.eps, ctx.given, wanted)
    if plain(dy, x, weight, stats):
        return *_grads(*args), *[None] * 5
    grads = torch.ops.fastopt.channel_norm_backward(*args)
    chosen = (grad if wants else None for grad, wants in zip(grads, wanted, strict=True))
    return *chosen, *[None] * 5


define(
    "channel_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, int groups, "
    "bool batch, float eps) -> (Tensor, Tensor)",
    run_channel_norm,
    lambda x, weight, bias, mean, var, groups, batch, eps: (
        _output(x),
        _stats(x, _n_sets(x, groups, batch)),
    ),
    _keep,
    _backward,
)
define(
    "channel_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, "
    "int groups, bool batch, float eps, bool given, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    run_channel_norm_backward,
    lambda dy, x, weight, bias, stats, groups, batch, eps, given, wanted: tuple(
        _given(dy, grad) for grad in _room(wanted, x, weight, bias)
    ),
)


class ChannelNorm(torch.autograd.Function):
    """The op without the dispatcher, for plain tensors; it moves running statistics itself."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        groups: int,
        batch: bool,
        eps: float,
        running: Running,
        momentum: float,
    ) -> Tensor:
        y, stats = run_channel_norm(
            x, weight, bias, mean, var, groups, batch, eps, running, momentum
        )
        ctx.groups, ctx.batch, ctx.eps, ctx.given = groups, batch, eps, mean is not None
        ctx.save_for_backward(x, weight, bias, stats)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return *_backward(ctx, dy), None, None


apply_channel_norm = apply_of(ChannelNorm)
