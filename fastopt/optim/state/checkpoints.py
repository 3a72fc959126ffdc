"""Loading a state_dict: it is checked as a whole, then taken as a whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt.optim import options
from fastopt.optim.contract import Loadable
from fastopt.optim.state import formats
from fastopt.optim.state.saving import BARRIER, OWN_GROUP_KEYS, VERSION, VERSION_KEY
from fastopt.optim.state.validation import StateCheck, check_group
from fastopt.optim.update import OWN_STEP, Update, number_dtype

_LOW = (torch.bfloat16, torch.float16)


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
    optimizer: Loadable,
    state_dict: dict[str, Any],
    by_torch: Callable[[dict[str, Any]], None],
) -> None:
    """`FusedOptimizer.load_state_dict`; by_torch: torch.optim.Optimizer's own.

    Ours are the last of its pre-hooks, which checks, and the first of its post-hooks, which sets
    what torch would have cast: hooks of the user's see the state_dict first and the states last.
    """
    loading = _Loading(optimizer)
    handles = [
        optimizer.register_load_state_dict_pre_hook(loading.check),
        optimizer.register_load_state_dict_post_hook(loading.finish, prepend=True),
    ]
    before, defaults = dict(optimizer.__dict__), dict(optimizer.defaults)
    try:
        by_torch(state_dict)
    except BaseException:
        if not loading.finished:
            optimizer.__dict__.clear()
            optimizer.__dict__.update(before)
            optimizer.defaults.clear()
            optimizer.defaults.update(defaults)
        raise
    finally:
        for handle in handles:
            handle.remove()


class _Param(NamedTuple):
    """A parameter that a state_dict has a state for."""

    param: Tensor
    name: str
    group: dict[str, Any]


class _Loading:
    """One call of load_state_dict."""

    def __init__(self, optimizer: Loadable) -> None:
        self._optimizer = optimizer
        # Of each group, the options that stay; of each parameter, its entries in order, and those
        # that torch is not given.
        self._own: list[dict[str, Any]] = []
        self._order: dict[Tensor, list[str]] = {}
        self._kept: dict[Tensor, dict[str, Any]] = {}
        self.finished = False

    def check(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state_dict as torch is to load it; raises where any of it does not fit."""
        optimizer = self._optimizer
        check_version(state_dict)
        saved = [group for group in state_dict["param_groups"] if not group.get(BARRIER)]
        groups = [{k: v for k, v in g.items() if k not in OWN_GROUP_KEYS} for g in saved]
        result = {**state_dict, "param_groups": groups}
        current = optimizer.param_groups
        if [len(group["params"]) for group in saved] != [len(g["params"]) for g in current]:
            # torch has its own errors for it.
            return result
        self._own = [{k: g[k] for k in OWN_GROUP_KEYS if k in g} for g in current]
        params: dict[Any, _Param] = {}
        for number, (group, mine) in enumerate(zip(groups, current, strict=True)):
            _fill_in(optimizer, group, mine)
            final = {**optimizer.defaults, **group, **self._own[number], "params": mine["params"]}
            check_group(optimizer, number, saved[number], final)
            names = mine.get("param_names") or group.get("param_names") or ()
            for k, (key, param) in enumerate(zip(group["params"], mine["params"], strict=True)):
                name = repr(names[k]) if k < len(names) else str(len(params))
                params[key] = _Param(param, f"parameter {name} (group {number})", final)
        result["state"] = {
            key: self._checked(params[key], state) if key in params else state
            for key, state in state_dict["state"].items()
        }
        return result

    def _checked(self, to: _Param, state: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a parameter's state that torch is given, once all of it has been checked."""
        if not isinstance(state, Mapping):
            raise ValueError(
                f"the state_dict does not fit {to.name}: its state is {state!r}, not a dict."
            )
        optimizer = self._optimizer
        update = optimizer.update_of(to.group)
        state = formats.renamed(state)
        _drop_leftovers(state, optimizer._store.states.get(to.param, {}), update)
        if not state:
            return {}
        base = getattr(optimizer, "_update", None)
        required = base.state_names if base is not None else ()
        sparse = optimizer.sparse_error(to.group) is None
        StateCheck(to.name, to.param, state).check(update, required, sparse)
        kept = _kept_of(state, update, to)
        self._order[to.param], self._kept[to.param] = list(state), kept
        # torch's classes look for the numbers.
        return {k: v for k, v in state.items() if k not in kept or k in update.counter_names}

    def finish(self, _: torch.optim.Optimizer) -> None:
        """Set what is not torch's to load: how the optimizer steps, and states of other dtypes."""
        optimizer = self._optimizer
        for group, own in zip(optimizer.param_groups, self._own, strict=True):
            for name in OWN_GROUP_KEYS:
                group.pop(name, None)
            group.update(own)
        held = optimizer._store.states
        for param, kept in self._kept.items():
            state = {**held[param], **kept}
            order = [name for name in self._order[param] if name in state]
            held[param].clear()
            held[param].update({name: state.pop(name) for name in order} | state)
        optimizer._forget(state_was_accessed=True)
        self.finished = True


def _fill_in(optimizer: Loadable, group: dict[str, Any], mine: Mapping[str, Any]) -> None:
    """Take from the optimizer's group what torch's class has not, and so its state_dicts have not;
    what an older one of them lacks torch fills in."""
    theirs = [c for c in type(optimizer).__mro__ if c.__module__.startswith("torch.optim")]
    known = {name for c in theirs for name in inspect.signature(c).parameters}
    ours = {*optimizer.defaults, *inspect.signature(type(optimizer)).parameters}
    for name in mine:
        if name in ours and name not in known and name not in OWN_GROUP_KEYS:
            group.setdefault(name, mine[name])


def _drop_leftovers(state: dict[str, Any], held: Mapping[str, Any], update: Update) -> None:
    """Of a state in two formats, drop the one that is this optimizer's own.

    set_optimizer_state_dict(full_state_dict=True) adds to what was saved the entries of the
    optimizer's own state that were not: the tensors themselves.
    """
    for name in update.state_names:
        coded = (formats.codes_name(name), formats.scale_name(name))
        if name not in state or coded[0] not in state:
            continue
        for keys in ((name,), coded):
            if state[keys[0]] is held.get(keys[0]):
                for key in keys:
                    state.pop(key, None)


def _kept_of(state: Mapping[str, Any], update: Update, to: _Param) -> dict[str, Any]:
    """Copies of what torch would cast to the parameter's dtype, and should not."""
    kept: dict[str, Any] = {}
    for name in (*update.carried, OWN_STEP, options.N_AVERAGED):
        if (value := state.get(name)) is not None:
            # Not on torch's default device.
            device = value.device if isinstance(value, Tensor) else torch.device("cpu")
            value = torch.as_tensor(value, dtype=number_dtype(), device=device)
            kept[name] = value.detach().clone()
    step = state.get("step")
    if isinstance(step, Tensor) and step.dtype not in (torch.float32, torch.float64):
        kept["step"] = step.detach().to(number_dtype())
    device = to.param.device
    for name in formats.coded_in(state):
        codes, scale = formats.codes_name(name), formats.scale_name(name)
        kept[codes] = formats.packed(state[codes], device)
        kept[scale] = state[scale].detach().to(device, copy=True).contiguous()
    names = list(options.OWN_DTYPE)
    if to.group.get("state_dtype") is not None:
        names += update.state_names
    for name in names:
        if isinstance(value := state.get(name), Tensor):
            kept[name] = value.detach().to(device, copy=True)
    average = kept.get(options.AVERAGED)
    if average is not None and average.dtype in _LOW and to.param.dtype in _LOW:
        # Where torch has loaded and saved it: in 16 bits it would stand still.
        kept[options.AVERAGED] = average.float()
    return kept
