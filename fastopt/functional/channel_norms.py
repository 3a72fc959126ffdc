"""batch_norm, instance_norm and group_norm."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

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
from fastopt.ops import channel_norms


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
    fits = _fits(route, *given) and _are_numbers(momentum, eps)
    running = (mean, var)
    if fits and training:
        n = x.shape[0] * prod(x.shape[2:])
        route, running = _to_move(route, running, (running_mean, running_var))
        fits = n != 1 and eps > 0 and _movable(route, running)
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
    fits = _fits(route, *given) and _are_numbers(momentum, eps)
    running = (mean, var)
    if fits and use_input_stats:
        route, running = _to_move(route, running, (running_mean, running_var))
        fits = prod(x.shape[2:]) != 1 and eps >= 0 and _movable(route, running)
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
        and _are_numbers(eps)
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


def _are_numbers(*those: Any) -> bool:
    return all(isinstance(number, (float, int)) for number in those)


def _fits(route: int, x: Tensor, *per_channel: Tensor | None) -> bool:
    """Whether kernels, or what is composed in their place, take these: what they do not is torch's
    to do, or to refuse."""
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


def _to_move(
    route: int, running: channel_norms.Running, came: channel_norms.Running
) -> tuple[int, channel_norms.Running]:
    """The route and the running statistics that came, which are to be written. A kernel cannot
    write those that were resolved to others; beside the op torch's operators can."""
    if running[0] is came[0] and running[1] is came[1]:
        return route, came
    return AS_OP, came


def _movable(route: int, running: channel_norms.Running) -> bool:
    """Whether these are both there or neither, and a kernel may write them as they lie. (Where the
    call is an op, torch's operators write them; under transforms, torch's function.)"""
    if route == BY_TORCH:
        return running[0] is None and running[1] is None
    if (running[0] is None) != (running[1] is None):
        return False
    return all(t is None or (not t.requires_grad and _writable(route, t)) for t in running)


def _writable(route: int, x: Tensor) -> bool:
    if route == AS_OP:
        return True
    return x.is_contiguous() and (not x.is_inference() or torch.is_inference_mode_enabled())


def _normalize(
    route: int,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: channel_norms.Running,
    own: bool,
    groups: int,
    batch: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """own: by statistics of x, to which the running ones move; else by those."""
    given = (None, None) if own else running
    if route == BY_TORCH:
        return channel_norms.composed(x, weight, bias, *given, groups, batch, eps)
    moved = running if own and x.numel() else (None, None)
    moves = moved[0] is not None or moved[1] is not None
    if route == AS_OP or (moves and not batch):
        y, stats = torch.ops.fastopt.channel_norm(x, weight, bias, *given, groups, batch, eps)
        if moves:
            _move(moved, channel_norms.moments(x, stats.detach()), x, momentum)
        return y  # type: ignore[no-any-return]
    args = (x, weight, bias, *given, groups, batch, eps, moved, momentum)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return channel_norms.apply_channel_norm(*args)  # type: ignore[no-any-return]
    return channel_norms.run_channel_norm(*args, keep=False)[0]


def _move(
    running: channel_norms.Running, moments: tuple[Tensor, Tensor], x: Tensor, momentum: float
) -> None:
    """running = momentum own + (1 - momentum) running, and the mean of those where images have
    moments of their own."""
    mean, var = moments
    n = x.numel() // mean.numel()
    for before, own in zip(running, (mean, var * (n / (n - 1))), strict=True):
        if before is not None:
            after = momentum * own.view(-1, x.shape[1]) + (1 - momentum) * before.to(own.dtype)
            before.copy_(after.mean(0))
