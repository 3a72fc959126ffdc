"""Parameters that no kernel takes: sparse, differentiable, or without memory of their own."""

from __future__ import annotations

import torch

from fastopt.optim.contract import Stepped
from fastopt.optim.state import formats
from fastopt.optim.state.store import StateStore
from fastopt.optim.step import eager
from fastopt.optim.step.grad_scale import Scale
from fastopt.optim.step.group_key import GroupKey
from fastopt.optim.step.plan import FallbackParam
from fastopt.optim.update import sign


def check(
    optimizer: Stepped, store: StateStore, each: FallbackParam, key: GroupKey, scale: Scale
) -> None:
    """Raise what its step would, before any other parameter has been counted or written."""
    if scale.skip():
        return
    if not each.sparse:
        counters = store.counters_of(each.param, key)
        with torch.no_grad():
            eager.scalars_of(
                key.update,
                each.param,
                counters,
                optimizer.param_groups[each.group],
            )
    elif scale.grad_scale is not None:
        raise RuntimeError(
            f"{type(optimizer).__name__} with fused=True cannot unscale sparse gradients: got one "
            "with a grad_scale. Leave fused unset, and GradScaler unscales before."
        )


def step(
    optimizer: Stepped, store: StateStore, each: FallbackParam, key: GroupKey, scale: Scale
) -> None:
    """One step of a parameter that no kernel takes."""
    group, param = optimizer.param_groups[each.group], each.param
    grad = param.grad
    if grad is None or scale.skip():
        return
    if each.sparse:
        # torch's own update of it knows no codes.
        state = store.states.get(param, {})
        for name in key.update.state_names:
            if formats.holds(state, name):
                formats.conform(state, name, None, key.update, param)
        with torch.no_grad():
            optimizer.step_sparse(param, grad, group)
        return
    state = store.state_of(param, key)
    counters = store.counters_of(param, key)
    factor = sign(group) * scale.inverse()
    with torch.set_grad_enabled(bool(group.get("differentiable"))):
        eager.step_param(key.update, param, grad, state, counters, group, factor)
