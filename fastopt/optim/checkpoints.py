"""What an optimizer saves and loads, beyond what torch.optim.Optimizer does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastopt.optim import formats, passes
from fastopt.optim.update import number, number_dtype

if TYPE_CHECKING:
    from fastopt.optim.base import FusedOptimizer

# Beside "state" and "param_groups", where states are stored in a way that torch's are not.
VERSION_KEY, VERSION = "fastopt_version", 1
_OWN_GROUP_KEYS = (*passes.DEFAULTS, passes.ALONE)


def stamped(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with a version, where anything in it is not as torch would store it."""
    kept = {name for state in state_dict["state"].values() for name in _own_names(state)}
    if kept or any(group.get("state_dtype") for group in state_dict["param_groups"]):
        state_dict[VERSION_KEY] = VERSION
    return state_dict


def check_version(state_dict: Mapping[str, Any]) -> None:
    """Raises ValueError for a version this fastopt does not know."""
    version = state_dict.get(VERSION_KEY, VERSION)
    if version not in range(1, VERSION + 1):
        raise ValueError(
            f"the state_dict is of version {version}, but this fastopt reads versions up to "
            f"{VERSION}. Install the fastopt that saved it, or one that is newer; or save "
            "torch_state_dict() there, which any reads."
        )


def load(
    optimizer: FusedOptimizer,
    state_dict: dict[str, Any],
    by_torch: Callable[[dict[str, Any]], None],
) -> None:
    """`FusedOptimizer.load_state_dict`; by_torch: torch.optim.Optimizer's own, which casts states
    to their parameter's dtype."""
    check_version(state_dict)
    handle = optimizer.register_load_state_dict_pre_hook(lambda _, final: loaded.append(final))
    loaded: list[dict[str, Any]] = []
    stored = [{k: g[k] for k in passes.STORAGE if k in g} for g in optimizer.param_groups]
    try:
        by_torch(state_dict)
    finally:
        handle.remove()
    for group, storage in zip(optimizer.param_groups, stored, strict=True):
        for name in passes.STORAGE:
            group.pop(name, None)
        group.update(storage)
    optimizer._forget(exposed=True)
    restore(optimizer, loaded[0])


def restore(optimizer: FusedOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Take from a state_dict, which torch has loaded, what torch would have cast."""
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [(p, g) for g in optimizer.param_groups for p in g["params"]]
    for index, (param, group) in zip(saved, params, strict=True):
        kept = state_dict["state"].get(index, {})
        for name in optimizer.carried_names:
            if name in kept:
                value = torch.as_tensor(kept[name], dtype=number_dtype()).clone()
                optimizer.state[param][name] = value
        names = _own_names(kept)
        if group.get("state_dtype") is not None:
            names += optimizer.update_of(group).state_names
        for name in names:
            if isinstance(value := kept.get(name), Tensor):
                optimizer.state[param][name] = value.detach().to(param.device, copy=True)


def _own_names(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Entries of a state that are not of their parameter's dtype: averages and the number of steps
    in them, what a rounding keeps, codes and their scales."""
    eight = [name for name, value in state.items() if formats.is_eight_bit(value)]
    scales = [formats.scale_name(name) for name in eight]
    own = (*passes.OWN_DTYPE, passes.N_AVERAGED)
    return (*(name for name in own if name in state), *eight, *scales)


def plain(optimizer: FusedOptimizer) -> dict[str, Any]:
    """A state_dict for torch.optim's class of the optimizer's name."""
    state_dict = torch.optim.Optimizer.state_dict(optimizer)
    states = {index: _plain_state(state) for index, state in state_dict["state"].items()}
    groups = [
        {name: value for name, value in group.items() if name not in _OWN_GROUP_KEYS}
        for group in state_dict["param_groups"]
    ]
    # torch keeps nothing of a parameter that has an average, but was never stepped.
    numbers = {"step", *optimizer.carried_names}
    stepped = {k: v for k, v in states.items() if v.keys() - numbers or number(v.get("step", 0.0))}
    return {"state": stepped, "param_groups": groups}


def _plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    own = _own_names(state)
    result = {name: value for name, value in state.items() if name not in own}
    for name in own:
        if formats.is_eight_bit(codes := state[name]):
            result[name] = formats.decode(codes, state[formats.scale_name(name)])
    # In the order of the state, which is torch's.
    return {name: result[name] for name in state if name in result}
