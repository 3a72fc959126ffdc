"""The states of an optimizer: made where they are missing, and converted to another format."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from fastopt.optim import options
from fastopt.optim.contract import InitialStates
from fastopt.optim.options import AVERAGED, N_AVERAGED
from fastopt.optim.state import formats
from fastopt.optim.state.step_counts import move_counter
from fastopt.optim.step import memory_layout
from fastopt.optim.step.group_key import GroupKey
from fastopt.optim.update import OWN_STEP, number

State = dict[str, Any]


class StateStore:
    """The states of an optimizer by parameter, and the counters that torch's state does not show.

    states: as torch has them, {param: {name: tensor}}
    hidden_counters: {param: {name: () tensor}}, step counts of updates whose state has none in
        torch (SGD), and the number of steps in an average
    was_accessed: true once something outside may have replaced, moved or saved a state; until
        `FusedOptimizer.state` is read, nothing can have
    """

    def __init__(
        self, states: dict[Tensor, State], initial: InitialStates, was_accessed: bool
    ) -> None:
        self.states, self.was_accessed = states, was_accessed
        self.hidden_counters: dict[Tensor, State] = {}
        # Not the optimizer itself: a cycle would keep its memory until the next collection.
        self._initial: InitialStates = weakref.proxy(initial)

    def state_of(self, param: Tensor, key: GroupKey) -> State:
        """The state of a parameter; where nothing is kept, it leaves no entry, as with torch."""
        if not key.update.counted and not key.state_names(param) and not key.saves_count(param):
            return {}
        state: State = self.states[param]
        return state

    def counters_of(self, param: Tensor, key: GroupKey) -> State:
        """The dict that counts a parameter's steps: its state, or a hidden one."""
        if key.update.counted or key.saves_count(param):
            return self.state_of(param, key)
        return self.hidden_counters.setdefault(param, {})

    def prepare(
        self,
        param: Tensor,
        group: dict[str, Any],
        key: GroupKey,
        before: list[tuple[State, State]],
    ) -> None:
        """Make the states a parameter lacks, and convert those of another format.

        before: takes what each dict held, to be put back on an error
        """
        update = key.update
        counters, state = self.counters_of(param, key), self.state_of(param, key)
        before += [(counters, dict(counters)), (state, dict(state))]
        if not update.counted:
            self._take_count(param, counters, before)
        # Without a count in torch's state (SGD), a parameter begins where its buffer does.
        started = all(formats.holds(state, name) for name in update.state_names)
        if update.step_name not in counters or not (update.counted or started):
            first = 0.0 if update.counted or not started else 1.0
            counters[update.step_name] = self._initial.initial_number(first, param, group)
        formats.convert_kept(state, param, key.step_options)
        for name in update.carried:
            if state.get(name) is None:
                state[name] = self._initial_tensor(name, param, group)
        for name in update.state_names:
            if not formats.holds(state, name):
                state[name] = self._initial_tensor(name, param, group)
            formats.conform(state, name, key.format_of(name), update, param)
        for name in options.state_names((), options.options_of_param(key.step_options, param)):
            if name == AVERAGED:
                self.prepare_average(param, group, state, before)
            elif state.get(name) is None:
                state[name] = self._initial_tensor(name, param, group)

    def _take_count(
        self, param: Tensor, counters: State, before: list[tuple[State, State]]
    ) -> None:
        """Go on from the count of steps that was kept where it is kept no longer: beside the state,
        or in it, since options have changed or a state_dict has been loaded."""
        for other in (self.hidden_counters.get(param), self.states.get(param)):
            if other is not None and other is not counters and OWN_STEP in other:
                before.append((other, dict(other)))
                counters.setdefault(OWN_STEP, other.pop(OWN_STEP))

    def put_back(self, before: list[tuple[State, State]], n_states: int) -> None:
        """Leave the states as they were before a plan that could not be built.

        n_states: how many parameters had one
        """
        for state, was in reversed(before):
            state.clear()
            state.update(was)
        # An entry without anything in it would pass for one that has been stepped.
        while len(self.states) > n_states:
            self.states.popitem()

    def prepare_average(
        self,
        param: Tensor,
        group: dict[str, Any],
        state: State,
        before: list[tuple[State, State]],
    ) -> None:
        """Make the average a parameter lacks, and the number of steps in it.

        before: takes what each dict held, to be put back on an error
        """
        counters = self.hidden_counters.setdefault(param, {})
        before += [(counters, dict(counters)), (state, dict(state))]
        count: Any = None
        if state.get(AVERAGED) is None:
            # In 16 bits an average stands still: a step of 1e-3 of it is rounded away.
            low = param.dtype in (torch.bfloat16, torch.float16)
            state[AVERAGED] = param.detach().float() if low else param.detach().clone()
            count = self._initial.initial_number(0.0, param, group)
        elif (count := state.get(N_AVERAGED)) is None and (
            count := counters.get(N_AVERAGED)
        ) is None:
            count = self._count_of_loaded(param, group, state)
        counters[N_AVERAGED] = count
        state.pop(N_AVERAGED, None)
        if group.get("ema_warmup"):
            state[N_AVERAGED] = count

    def prepare_idle(
        self,
        param: Tensor,
        group: dict[str, Any],
        key: GroupKey,
        on_device: bool,
        before: list[tuple[State, State]],
    ) -> State:
        """The same for a parameter that has an average, but no gradient; gives its state.

        on_device: true where the steps in the average are counted there
        """
        state: State = self.states[param]
        before.append((state, dict(state)))
        # torch's classes expect a step and what is carried in a state that has anything.
        if key.update.counted and "step" not in state:
            state["step"] = self._initial.initial_number(0.0, param, group)
            state.update(
                (name, self._initial_tensor(name, param, group)) for name in key.update.carried
            )
        self.prepare_average(param, group, state, before)
        formats.check_state(AVERAGED, state[AVERAGED], param)
        counters = self.hidden_counters[param]
        device = memory_layout.local(param).device if on_device else torch.device("cpu")
        move_counter(counters, N_AVERAGED, device)
        show_count(state, counters)
        return state

    def _count_of_loaded(self, param: Tensor, group: dict[str, Any], state: State) -> Any:
        """Steps in an average that was saved without their number, as if it moved in every step of
        its parameter; where these are not counted either, its warm-up is over."""
        if (step := state.get("step")) is not None:
            if not isinstance(step, Tensor):  # else it would lie on torch's default device
                step = torch.tensor(float(step), dtype=torch.float32, device="cpu")
            return step.detach().clamp(min=1.0)
        return self._initial.initial_number(max(1.0, group.get("ema_warmup") or 0), param, group)

    def has_average(self, param: Tensor) -> bool:
        """True where a step has gone into the average of a parameter."""
        held = self.states.get(param, {})
        if held.get(AVERAGED) is None:
            return False
        counters = self.hidden_counters.get(param, {})
        return number(counters.get(N_AVERAGED, held.get(N_AVERAGED, 1.0))) > 0.0

    def _initial_tensor(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        if name in options.OWN_DTYPE:
            return torch.zeros_like(param, dtype=options.OWN_DTYPE[name])
        return self._initial.initial_state(name, param, group)


def show_count(state: State, counters: State) -> None:
    """Let a state that shows how many steps are in its average show what is counted now."""
    if N_AVERAGED in state:
        state[N_AVERAGED] = counters[N_AVERAGED]
