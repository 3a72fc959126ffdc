"""The states of a parameter: where they are, how they begin, and those of another format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastopt.optim import formats, passes
from fastopt.optim.update import Update

if TYPE_CHECKING:
    from fastopt.optim.base import FusedOptimizer
    from fastopt.optim.plan import GroupKey

State = dict[str, Any]


def state_of(optimizer: FusedOptimizer, param: Tensor, update: Update, more: bool = False) -> State:
    """The state of a parameter; an update without any leaves no entry, as with torch.

    more: whether anything is kept beside the update's own states
    """
    if not update.counted and not update.state_names and not more:
        return {}
    state: State = optimizer.__dict__["state"][param]
    return state


def numbers_of(optimizer: FusedOptimizer, param: Tensor, update: Update) -> State:
    """Where a parameter's step is counted."""
    if update.counted:
        return state_of(optimizer, param, update)
    return optimizer.hidden.setdefault(param, {})


def prepare(
    optimizer: FusedOptimizer,
    param: Tensor,
    group: dict[str, Any],
    key: GroupKey,
    before: list[tuple[State, State]],
) -> None:
    """Make the states a parameter lacks, and convert those of another format.

    before: takes what each dict held, to be put back on an error
    """
    update, names = key.update, key.state_names(param)
    numbers = numbers_of(optimizer, param, update)
    state = state_of(optimizer, param, update, bool(names))
    before += [(numbers, dict(numbers)), (state, dict(state))]
    # Without a count in its state (SGD), a parameter begins where its buffer does.
    started = all(state.get(name) is not None for name in update.state_names)
    if "step" not in numbers or not (update.counted or started):
        first = 0.0 if update.counted or not started else 1.0
        numbers["step"] = optimizer.initial_number(first, param, group)
    passes.convert_kept(state, param, key.extras)
    scales = formats.names_of(update, key.stored)
    for name in (*update.carried, *(name for name in names if name not in scales)):
        if state.get(name) is None:
            state[name] = _first(optimizer, name, param, group)
        if name in update.state_names:
            formats.conform(state, name, key.format_of(name), update, param)


def _first(optimizer: FusedOptimizer, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
    if name == passes.AVERAGED:
        # In 16 bits an average stands still: a step of 1e-3 of it is rounded away.
        low = param.dtype in (torch.bfloat16, torch.float16)
        return param.detach().to(torch.float32) if low else param.detach().clone()
    if name in passes.OWN_DTYPE:
        return torch.zeros_like(param, dtype=passes.OWN_DTYPE[name])
    return optimizer.initial_state(name, param, group)
