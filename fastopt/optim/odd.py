"""Parameters that no kernel takes: sparse, differentiable, or without memory of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastopt.optim import eager, states
from fastopt.optim.plan import Odd
from fastopt.optim.scale import Scale
from fastopt.optim.update import Update, sign

if TYPE_CHECKING:
    from fastopt.optim.base import FusedOptimizer


def step(optimizer: FusedOptimizer, odd: Odd, update: Update, scale: Scale) -> None:
    """One step of a parameter that no kernel takes."""
    group, param = optimizer.param_groups[odd.group], odd.param
    grad = param.grad
    if grad is None or scale.skip():
        return
    if odd.sparse:
        if scale.grad_scale is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__} with fused=True cannot unscale sparse gradients: got "
                "one with a grad_scale. Leave fused unset, and GradScaler unscales before."
            )
        with torch.no_grad():
            optimizer.step_sparse(param, grad, group)
        return
    state = states.state_of(optimizer, param, update)
    numbers = states.numbers_of(optimizer, param, update)
    factor = sign(group) * scale.inverse()
    with torch.set_grad_enabled(bool(group.get("differentiable"))):
        eager.step_param(update, param, grad, state, numbers, group, factor)
