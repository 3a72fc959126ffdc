"""Saving: the parts of a state_dict that torch.optim.Optimizer has none of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastopt.optim import options
from fastopt.optim.state import formats
from fastopt.optim.update import OWN_STEP, number

# Beside "state" and "param_groups", where states are stored in a way that torch's are not.
VERSION_KEY, VERSION = "fastopt_version", 2
# What marks a group without parameters that only torch counts: see `stamped`.
BARRIER = "fastopt_barrier"
OWN_GROUP_KEYS = (*options.DEFAULTS, options.ALONE)


def stamped(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with a version, where anything in it is not as torch would store it.

    Where states are in codes, which torch cannot read, a last group without parameters makes
    torch's load_state_dict raise ValueError. Without it SGD would begin its momentum anew and not
    say so, and the other classes would raise KeyError only at the next step.
    """
    held, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(held, Mapping) or not isinstance(groups, list):
        # What a hook of the user's has made of it.
        return state_dict
    states = [state for state in held.values() if isinstance(state, Mapping)]
    if any(map(own_names, states)) or any(group.get("state_dtype") for group in groups):
        state_dict[VERSION_KEY] = VERSION
        state_dict["param_groups"] = groups = list(map(_named, groups))
    if groups and any(map(formats.coded_in, states)):
        groups.append({**groups[-1], "params": [], BARRIER: True})
        if "param_names" in groups[-1]:
            groups[-1]["param_names"] = []
    return state_dict


def _named(group: Mapping[str, Any]) -> dict[str, Any]:
    if "state_dtype" not in group:
        return dict(group)
    return {**group, "state_dtype": formats.named(group["state_dtype"])}


def own_names(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Entries of a state that torch's has none of: averages and the steps in them, what a rounding
    keeps, codes and their scales, and the steps of SGD."""
    coded = formats.coded_in(state)
    own = (OWN_STEP, options.N_AVERAGED, *options.OWN_DTYPE)
    codes, scales = map(formats.codes_name, coded), map(formats.scale_name, coded)
    return (*(name for name in own if name in state), *codes, *scales)


def plain(state_dict: dict[str, Any], carried: tuple[str, ...]) -> dict[str, Any]:
    """A state_dict for torch.optim's class of the optimizer's name.

    carried: the counters of a parameter beside its step"""
    states = {
        key: _plain_state(state) if isinstance(state, Mapping) else state
        for key, state in state_dict["state"].items()
    }
    groups = [
        {name: value for name, value in group.items() if name not in OWN_GROUP_KEYS}
        for group in state_dict["param_groups"]
    ]
    numbers = {"step", *carried}
    kept = {k: v for k, v in states.items() if not isinstance(v, dict) or _stepped(v, numbers)}
    return {"state": kept, "param_groups": groups}


def _stepped(state: Mapping[str, Any], numbers: set[str]) -> bool:
    """False for a parameter that has an average but was never stepped: torch keeps none of it."""
    return bool(state.keys() - numbers) or number(state.get("step", 0.0)) > 0.0


def _plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """In the order of the state, which is torch's."""
    own = own_names(state)
    named = {formats.codes_name(name): name for name in formats.coded_in(state)}
    result = {}
    for key, value in state.items():
        if key in named:
            result[named[key]] = formats.value_in(state, named[key])
        elif key not in own:
            result[key] = value
    return result
