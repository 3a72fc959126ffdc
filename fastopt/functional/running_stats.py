"""Running mean and variance of channels: where a norm may move them itself, and how torch does."""

from __future__ import annotations

import torch
from torch import Tensor

from fastopt.functional.routing import AS_OP, BY_TORCH


def to_move(route: int, running: Running, came: Running) -> tuple[int, Running]:
    """The route and the running statistics that came, which are to be written. A kernel cannot
    write those that were resolved to others; beside the op torch's operators can."""
    if running[0] is came[0] and running[1] is came[1]:
        return route, came
    return AS_OP, came


def movable(route: int, running: Running) -> bool:
    """True where both are there or neither, and a kernel may write them as they lie. (Where the
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


def move(running: Running, moments: tuple[Tensor, Tensor], x: Tensor, momentum: float) -> None:
    """running = momentum own + (1 - momentum) running, and the mean of those where images have
    moments of their own."""
    mean, var = moments
    n = x.numel() // mean.numel()
    for before, own in zip(running, (mean, var * (n / (n - 1))), strict=True):
        if before is not None:
            after = momentum * own.view(-1, x.shape[1]) + (1 - momentum) * before.to(own.dtype)
            before.copy_(after.mean(0))


Running = tuple[Tensor | None, Tensor | None]


def written(*tensors: Tensor | None) -> None:
    """Tell autograd what a kernel wrote."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
