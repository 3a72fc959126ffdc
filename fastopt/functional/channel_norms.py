"""batch_norm, instance_norm and group_norm."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from fastopt import backend
from fastopt.functional import layout
from fastopt.functional.channel_layout import (
    in_order,
    moments,
    n_sets,
    output,
    stats_for,
    stats_of_given,
    walk,
)
from fastopt.functional.layer_norm import flat, grad_or_empty
from fastopt.functional.registry import apply_of, define, differentiated, gradients_by_torch, plain
from fastopt.functional.routing import (
    AS_NODE,
    AS_OP,
    BY_TORCH,
    DTYPES,
    are_numbers,
    autocast,
    by_torch,
    enter,
    transformed,
    widen,
)
from fastopt.functional.running_stats import Running, movable, move, to_move, written
from fastopt.functional.tracing import as_node


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) weight + bias, over everything but channels.

    input: (images, channels, ...); the others: (channels,), of any dtype each. training: mean and
    variance are those of this batch, and the running ones move to them by momentum, the unbiased
    variance; else they are the running ones. As torch.nn.functional.batch_norm; channels_last stays
    channels_last. Ioffe & Szegedy 2015, algorithm 1.
    """
    per_channel = (running_mean, running_var, weight, bias)
    route, given = enter("batch_norm", input, *per_channel)
    if route == AS_NODE:
        return as_node(batch_norm, input, *per_channel, training, momentum, eps)
    x, mean, var, weight, bias = given
    fits = _fits(route, *given) and are_numbers(momentum, eps)
    running = (mean, var)
    if fits and training:
        n = x.shape[0] * prod(x.shape[2:])
        route, running = to_move(route, running, (running_mean, running_var))
        fits = n != 1 and eps > 0 and movable(route, running)
    elif fits:
        fits = running_mean is not None and running_var is not None and eps >= 0
    if not fits:
        return by_torch(
            "batch_norm", F.batch_norm, input, *per_channel, training, momentum, eps
        )  # fmt: skip
    return _normalize(
        route, x, weight, bias, running, bool(training), x.shape[1], True, momentum, eps
    )


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) weight + bias, over every channel of every image.

    input: (images, channels, ...); the others: (channels,), of any dtype each. The running
    statistics, where there are any, move by momentum to the mean of those of all images; without
    use_input_stats they take their place. As torch.nn.functional.instance_norm; channels_last stays
    channels_last. Ulyanov, Vedaldi & Lempitsky 2016, equation 2.
    """
    per_channel = (running_mean, running_var, weight, bias)
    route, given = enter("instance_norm", input, *per_channel)
    if route == AS_NODE:
        return as_node(instance_norm, input, *per_channel, use_input_stats, momentum, eps)
    x, mean, var, weight, bias = given
    fits = _fits(route, *given) and are_numbers(momentum, eps)
    running = (mean, var)
    if fits and use_input_stats:
        route, running = to_move(route, running, (running_mean, running_var))
        fits = prod(x.shape[2:]) != 1 and eps >= 0 and movable(route, running)
    elif fits:
        fits = running_mean is not None and running_var is not None and eps >= 0
    if not fits:
        return by_torch(
            "instance_norm", F.instance_norm, input, *per_channel, use_input_stats, momentum, eps
        )
    groups, batch = x.shape[1], not use_input_stats
    return _normalize(
        route, x, weight, bias, running, bool(use_input_stats), groups, batch, momentum, eps
    )


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) weight + bias, over groups of channels of every image.

    input: (images, channels, ...); weight, bias: (channels,), of any dtype each. As
    torch.nn.functional.group_norm; channels_last stays channels_last. Wu & He 2018, equation 7.
    """
    route, (input, weight, bias) = enter("group_norm", input, weight, bias)
    if route == AS_NODE:
        return as_node(group_norm, input, num_groups, weight, bias, eps)
    fits = (
        _fits(route, input, weight, bias)
        and are_numbers(eps)
        and isinstance(num_groups, int)
        and num_groups > 0
        and input.shape[1] % num_groups == 0
        and eps >= 0
        and prod(input.shape[2:]) * (input.shape[0] * input.shape[1] // num_groups) != 1
    )
    if not fits:
        return by_torch("group_norm", F.group_norm, input, num_groups, weight, bias, eps)
    if autocast("group_norm", input):
        input = widen(input)
        weight, bias = (None if t is None else widen(t) for t in (weight, bias))
    return _normalize(
        route, input, weight, bias, (None, None), True, num_groups, False, 0.0, eps
    )  # fmt: skip


def _fits(route: int, x: Tensor, *per_channel: Tensor | None) -> bool:
    """True where kernels, or the composed form in their place, take these arguments: torch's own
    function computes or refuses all others."""
    if route == BY_TORCH and not transformed(x, *per_channel):
        return False
    sizes = x.shape
    if len(sizes) < 2 or x.dtype not in DTYPES or sizes[1] == 0:
        return False
    shape = (sizes[1],)
    for tensor in per_channel:
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in DTYPES):
            return False
    return True


def _normalize(
    route: int,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    own: bool,
    groups: int,
    batch: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """own: by statistics of x, to which the running ones move; else by those."""
    given = (None, None) if own else running
    if route == BY_TORCH:
        return composed(x, weight, bias, *given, groups, batch, eps)
    moved = running if own and x.numel() else (None, None)
    moves = moved[0] is not None or moved[1] is not None
    if route == AS_OP or (moves and not batch):
        y, stats = torch.ops.fastopt.channel_norm(x, weight, bias, *given, groups, batch, eps)
        if moves:
            move(moved, moments(x, stats.detach()), x, momentum)
        return y  # type: ignore[no-any-return]
    args = (x, weight, bias, *given, groups, batch, eps, moved, momentum)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return apply_channel_norm(*args)  # type: ignore[no-any-return]
    return run_channel_norm(*args, keep=False)[0]


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
    y = output(x)
    given = mean is not None and var is not None
    stats = stats_for(x, n_sets(x, groups, batch)) if keep else None
    if mean is not None and var is not None:
        mean, var = mean.contiguous(), var.contiguous()
        if keep:
            stats = stats_of_given(x, mean, var)
    if not x.numel():
        return y, stats
    x, channels = walk(x, groups, batch)
    backend.kernels_for(x, "rows.channel_norms").channel_norm(
        x,
        flat(weight),
        flat(bias),
        y,
        None if given else stats,
        (mean, var) if given else running,
        channels,
        eps,
        None if given else momentum,
    )
    if not given:
        written(*running)
    return y, stats


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
        dy = in_order(dy, output(x) if dx is None else dx)
        x, channels = walk(x, groups, batch)
        backend.kernels_for(x, "rows.channel_norms").channel_norm_backward(
            dy, x, flat(weight), stats, dx, dweight, dbias, channels, eps, given
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
    dx = output(x) if wanted[0] else None
    dweight = layout.output(weight) if wanted[1] and weight is not None else None
    dbias = layout.output(bias) if wanted[2] and bias is not None else None
    return dx, dweight, dbias


def run_channel_norm_backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(dx, dweight, dbias) as an op gives them."""
    return tuple(grad_or_empty(dy, grad) for grad in _grads(dy, *args))


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

        return *gradients_by_torch(norm, [x, weight, bias], dy), *[None] * 5
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
        output(x),
        stats_for(x, n_sets(x, groups, batch)),
    ),
    _keep,
    _backward,
)
define(
    "channel_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, "
    "int groups, bool batch, float eps, bool given, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    run_channel_norm_backward,
    lambda dy, x, weight, bias, stats, groups, batch, eps, given, wanted: tuple(
        grad_or_empty(dy, grad) for grad in _room(wanted, x, weight, bias)
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
