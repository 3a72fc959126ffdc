"""Gradients and states that a step refuses, before anything is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastopt.optim import options
from fastopt.optim.contract import Stepped
from fastopt.optim.state.store import StateStore
from fastopt.optim.step import memory_layout
from fastopt.optim.step.group_key import GroupKey
from fastopt_kernels.chunks import NO_OPTIONS


def check_grad(optimizer: Stepped, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
    if grad.layout is not torch.strided and (reason := optimizer.sparse_error(group)):
        raise RuntimeError(reason)
    if grad.shape != param.shape:
        raise RuntimeError(
            f"The size of a parameter {tuple(param.shape)} must match the size of its gradient "
            f"{tuple(grad.shape)}. Clear the gradient (zero_grad) after giving the parameter a new "
            "shape."
        )
    if grad.device != param.device:
        raise RuntimeError(
            f"Expected a parameter and its gradient on one device, but got {param.device} and "
            f"{grad.device}. Clear the gradient (zero_grad) after moving the parameter."
        )
    if param.is_complex() != grad.is_complex():
        raise RuntimeError(
            f"a parameter of dtype {param.dtype} has a gradient of dtype {grad.dtype}: both must "
            "be real or both complex. Clear the gradient (zero_grad) after casting the parameter."
        )


def check_storages(store: StateStore, param: Tensor, grad: Tensor) -> None:
    """Refuse what a step would read or write past the end of its storage."""
    memory_layout.check_storage(param, "a parameter")
    memory_layout.check_storage(grad, "a gradient")
    for name, value in store.states.get(param, {}).items():
        if isinstance(value, Tensor):
            memory_layout.check_storage(value, f"the state {name!r} of a parameter")


def check_fallback(optimizer: Stepped, param: Tensor, keys: list[GroupKey]) -> None:
    if any(key.measures_gradients or key.step_options != NO_OPTIONS or key.stored for key in keys):
        what = ", ".join(k for k in options.DEFAULTS if any(k in g for g in optimizer.param_groups))
        raise RuntimeError(
            f"{type(optimizer).__name__} with {what} takes dense gradients in memory, but got one "
            f"of layout {param.grad.layout if param.grad is not None else None} for a "
            f"{type(param).__name__} of shape {tuple(param.shape)}. Give such parameters an "
            "optimizer of their own, without these options."
        )
