"""The same rules by torch's operators, and the functions a rule may call there.

For what no kernel of ours may touch: a differentiable step, tensors without memory of their own
(meta, fake) and tensor subclasses.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastopt.optim.step import memory_layout
from fastopt.optim.update import Update, number
from fastopt_kernels import xp as host
from fastopt_kernels.xp import rebind


def sqrt(x: Any) -> Any:
    return torch.sqrt(x) if isinstance(x, Tensor) else host.sqrt(x)


def power(x: Any, y: Any) -> Any:
    return x**y


def absolute(x: Any) -> Any:
    return torch.abs(x)


def sign(x: Any) -> Any:
    return torch.sign(x)


def maximum(x: Any, y: Any) -> Any:
    return torch.maximum(x, y)


def where(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, Tensor):
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            x = torch.full_like(condition, x, dtype=torch.float64)  # else float32
        return torch.where(condition != 0, x, y)
    return x if condition else y


def add_scaled(x: Any, scale: Any, y: Any) -> Any:
    if isinstance(scale, Tensor):
        return torch.where(scale != 0, x + scale * y, x)
    return x + scale * y if scale != 0 else x


def lerp(x: Any, y: Any, weight: Any) -> Any:
    if isinstance(weight, Tensor):
        return torch.where(weight < 0.5, x + weight * (y - x), y - (1 - weight) * (y - x))
    return torch.lerp(x, y, weight)


_THIS = sys.modules[__name__]


def step_param(
    update: Update,
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    counters: dict[str, Any],
    group: Mapping[str, Any],
    g_scale: Any,
) -> None:
    """One step of one parameter by torch's operators; autograd follows it where grad is enabled.

    numbers: holds the step count and the carried numbers as tensors, counted on here.
    """
    values = scalars_of(update, param, counters, group)
    tensors = [param, grad, *(state[name] for name in update.state_names)]
    p, g, *states = (_computed(tensor) for tensor in tensors)
    new = rebind(update.rule, _THIS)(p, g * g_scale, *states, *values[: update.n_scalars])

    counters[update.step_name] += 1
    for name, value in zip(update.carried, values[update.n_scalars :], strict=True):
        held = counters[name]
        held.copy_(torch.as_tensor(value, dtype=held.dtype, device=held.device))
    written = [param, *tensors[2:]]
    for tensor, result in zip(written, new, strict=True):
        tensor.copy_(torch.view_as_complex(result) if tensor.is_complex() else result)


def scalars_of(
    update: Update, param: Tensor, counters: Mapping[str, Any], group: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The scalars of the next step of a parameter and its carried numbers after it."""
    hypers, scalars = update.hypers(group), update.scalars
    counted = [counters[update.step_name] + 1, *(counters[name] for name in update.carried)]
    tensors = [x for x in (*hypers, *counted) if isinstance(x, Tensor)]
    if any(x.requires_grad or not memory_layout.has_memory(x) for x in tensors):
        scalars = rebind(scalars, _THIS)
        hypers = [x.reshape(()).to(param.device) if isinstance(x, Tensor) else x for x in hypers]
        counted = [x.to(param.device, torch.float64) for x in counted]
    else:
        hypers = update.floats(group)
        counted = [number(x) for x in counted]
    return tuple(scalars(*counted, *hypers))


def _computed(tensor: Tensor) -> Tensor:
    """A copy in the type rules are computed in: what autograd saves must not be written over."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj().clone())
    low = memory_layout.DTYPE_CODES.get(tensor.dtype) in ("bf16", "fp16")
    return tensor.to(torch.float32) if low else tensor.clone()
