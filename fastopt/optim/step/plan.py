"""The plan of a step, kept between steps: its tensors and its launches.

A plan is built where anything changed and checked where nothing seems to have. It is keyed on every
address it holds: an address that outlived its tensor is a write into memory of another tensor.
"""

from __future__ import annotations

from collections import defaultdict
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt import backend
from fastopt.optim import options
from fastopt.optim.contract import Stepped
from fastopt.optim.options import AVERAGED
from fastopt.optim.state.averages import UnsteppedAverage, can_follow
from fastopt.optim.state.step_counts import DeviceStepCounts, StepCounters, StepCounts
from fastopt.optim.state.store import StateStore, show_count
from fastopt.optim.step import checks, memory_layout, sharding
from fastopt.optim.step.grad_norm import ClipResult, DeviceClipResult, DeviceGradNorm
from fastopt.optim.step.grad_scale import NO_SCALE, Scale
from fastopt.optim.step.group_key import GroupKey, ParamRef
from fastopt.optim.step.launch_group import LaunchGroup, ParamSlot
from fastopt.optim.update import Update
from fastopt_kernels.chunks import StepOptions


class FallbackParam(NamedTuple):
    """A parameter torch's operators step: sparse, differentiable, or without its own memory."""

    param: Tensor
    group: int
    sparse: bool


class Plan:
    """The launches of one optimizer, in the order they must run."""

    def __init__(self, params: list[Tensor], keys: list[GroupKey]) -> None:
        self.params, self.keys = params, keys
        self.measures_gradients = any(key.measures_gradients for key in keys)
        self.launch_groups: list[LaunchGroup] = []
        # A parameter is in two launches, which count its steps in turn.
        self.twice = False
        self.device_grad_norm: DeviceGradNorm | None = None
        self.fallback_params: list[FallbackParam] = []
        self.idle: list[Tensor] = []
        self.averages: list[UnsteppedAverage] = []
        self.averaged = any(key.step_options.averaged for key in keys)
        # Only averages move, those that a backward has not moved (release_gradients).
        self.ends_backward = False
        self.state_owners: list[Any] = []
        self.states: list[Any] = []

    def counters(self) -> list[StepCounters]:
        """The numbers the host counts for these launches, which may share them."""
        held = [
            each.steps.counters for each in self.launch_groups if isinstance(each.steps, StepCounts)
        ]
        return list({id(counters): counters for counters in held}.values())

    def remember(self, state: dict[Any, Any]) -> None:
        """Note whose states these are."""
        self.state_owners, self.states = list(state), list(state.values())

    def holds(self, state: dict[Any, Any]) -> bool:
        """True while every entry of the optimizer's state is the one the plan was built for."""
        return (
            len(state) == len(self.states)
            and all(map(is_, state, self.state_owners))
            and all(map(is_, state.values(), self.states))
        )

    def fits(
        self, params: list[Tensor], grads: list[Tensor | None], state_was_accessed: bool
    ) -> bool:
        """True where the plan describes these tensors; takes over the gradients' addresses."""
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        for param in self.idle:
            if param.grad is not None:
                return False
        for each in self.averages:
            if not each.fits(state_was_accessed):
                return False
        for launch_group in self.launch_groups:
            if not launch_group.refresh(grads, state_was_accessed):
                return False
        return True

    def unstepped_averages(self) -> list[UnsteppedAverage]:
        """The averages of parameters that this step has no gradient for."""
        found = list(self.averages)
        for launch_group in self.launch_groups:
            if launch_group.launch.step_options.averaged:
                on_device = launch_group.on_device
                for slot in launch_group.missing_slots():
                    average = slot.state[AVERAGED]
                    found.append(
                        UnsteppedAverage(slot.param, slot.group, on_device, slot.state, average)
                    )
        return found

    def count(
        self,
        groups: list[dict[str, Any]],
        scale: Scale,
        clip: ClipResult | DeviceClipResult | None,
        state_was_accessed: bool,
    ) -> list[LaunchGroup]:
        """Count the step of every launch that is to run now; gives those launches.

        The scalars of all of them come first: where a hyper-parameter is nothing to compute with,
        this raises, and nothing has been counted.
        """
        running: list[LaunchGroup] = []
        factors: list[float] | None = None
        before = (
            [(counters, counters.values()) for counters in self.counters()] if self.twice else []
        )
        try:
            for launch_group in self.launch_groups:
                if launch_group.empty:
                    continue
                if not launch_group.on_device:
                    # Only here, since it may wait for a device.
                    factors = _factors(groups, scale, clip) if factors is None else factors
                    if not factors:
                        continue
                launch_group.prepare(groups, factors or [], state_was_accessed)
                # The second launch of a parameter that is given twice goes on from the first one's.
                if self.twice:
                    launch_group.count()
                running.append(launch_group)
        except BaseException:
            for counters, values in before:
                counters.restore(values)
            raise
        if not self.twice:
            for launch_group in running:
                launch_group.count()
        return running


def _factors(
    groups: list[dict[str, Any]], scale: Scale, clip: ClipResult | DeviceClipResult | None
) -> list[float]:
    """The factors of each group's gradients on the host; empty where it skips the step."""
    if isinstance(clip, DeviceClipResult):
        return [1.0] * len(groups)
    inverse = 1.0
    if scale is not NO_SCALE:
        if scale.skip():
            return []
        inverse = scale.inverse()
    if isinstance(clip, ClipResult):
        return [inverse * coefficient for coefficient in clip.coefficients]
    return [inverse] * len(groups)


def build(
    optimizer: Stepped,
    store: StateStore,
    param_refs: list[ParamRef],
    grads: list[Tensor | None],
    keys: list[GroupKey],
) -> Plan:
    """Check every gradient, make the states that are missing and lay out the launches.

    Raises before anything is written: nothing of the optimizer or the parameters has changed.
    """
    plan = Plan([ref.param for ref in param_refs], keys)
    found: list[tuple[Tensor, Tensor, int, int]] = []
    idle: list[tuple[Tensor, int]] = []
    for (param, number, position), grad in zip(param_refs, grads, strict=True):
        if grad is None:
            plan.idle.append(param)
            idle.append((param, number))
        else:
            checks.check_grad(optimizer, param, grad, optimizer.param_groups[number])
            checks.check_storages(store, param, grad)
            found.append((param, grad, number, position))

    dense = []
    for param, grad, number, position in found:
        sparse = grad.layout is not torch.strided
        if sparse or keys[number].differentiable or not memory_layout.has_memory(param):
            checks.check_fallback(optimizer, param, keys)
            plan.fallback_params.append(FallbackParam(param, number, sparse))
        else:
            _check_param(param, keys[number])
            dense.append((param, grad, number, position))
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    n_states = len(store.states)
    try:
        for param, grad, number, _ in found:
            group = optimizer.param_groups[number]
            # A sparse buffer begins as a sparse gradient (SGD), not as zeros.
            if grad.layout is torch.strided or keys[number].update.counted:
                store.prepare(param, group, keys[number], before)
        plan.averages = _idle_averages(optimizer.param_groups, store, idle, keys, before)
        slots = []
        for param, grad, number, position in dense:
            state, names = store.state_of(param, keys[number]), keys[number].state_names(param)
            slots.append(ParamSlot.make(state, param, grad, number, position, names))
        plan.launch_groups = _make_launch_groups(optimizer, store, slots, keys)
        plan.twice = any(
            isinstance(b.steps, StepCounts) and b.steps.shared for b in plan.launch_groups
        )
        if (
            plan.measures_gradients
            and plan.launch_groups
            and measures_on_device(plan.launch_groups[0].targets[0].device)
        ):
            plan.device_grad_norm = DeviceGradNorm(plan.launch_groups)
    except BaseException:
        store.put_back(before, n_states)
        raise
    return plan


def _idle_averages(
    groups: list[dict[str, Any]],
    store: StateStore,
    idle: list[tuple[Tensor, int]],
    keys: list[GroupKey],
    before: list[tuple[dict[str, Any], dict[str, Any]]],
) -> list[UnsteppedAverage]:
    """Those of these parameters without gradient that have an average, which is made if missing."""
    found = []
    for param, number in idle:
        group, key = groups[number], keys[number]
        if key.step_options.averaged and can_follow(param):
            on_device = counts_on_device(param.device, key)
            state = store.prepare_idle(param, group, key, on_device, before)
            found.append(UnsteppedAverage(param, number, on_device, state, state[AVERAGED]))
    return found


def _check_options(optimizer: Stepped, slots: list[ParamSlot], keys: list[GroupKey]) -> None:
    """Refuse options of the step that do not go with a parameter."""
    measures_gradients = any(key.measures_gradients for key in keys)
    sharding.check(optimizer)
    if measures_gradients and len({measures_on_device(slot.target.device) for slot in slots}) > 1:
        devices = sorted({str(slot.target.device) for slot in slots})
        raise RuntimeError(
            "max_grad_norm and skip_nonfinite are about all parameters at once, but these are on "
            f"{', '.join(devices)}: what is on the CPU would wait for the others. Give the "
            "parameters on the CPU an optimizer of their own."
        )
    largest = measures_gradients and optimizer.param_groups[0].get("norm_type", 2.0) != 2.0
    for slot in slots:
        clipped = keys[slot.group].step_options.clipped
        if slot.param.is_complex() and (clipped or largest):
            raise RuntimeError(
                "clip_value and norm_type=inf have no meaning for complex gradients, but got a "
                f"parameter of dtype {slot.param.dtype}. Use max_grad_norm with norm_type=2."
            )


def _check_param(param: Tensor, key: GroupKey) -> None:
    """Refuse what no kernel of ours can step, and what would be wrong to step."""
    target = memory_layout.local(param)
    memory_layout.dtype_code(target, "a parameter")
    if param.grad is not None:
        memory_layout.dtype_code(memory_layout.local(param.grad), "a gradient")
    backend.step_kernels(target.device.type)
    memory_layout.check_overlap(target)
    if key.capturable and target.device.type == "cpu":
        counted = ", ".join(["params", *(f"{name}s" for name in key.update.carried)])
        raise AssertionError(
            f"If capturable=True, {counted} and state_steps must be on supported devices: "
            "['cuda']. Got a parameter on cpu, where there are no graphs to capture: leave "
            "capturable=False."
        )


def counts_on_device(device: torch.device, key: GroupKey) -> bool:
    """True where a step is counted on its device: a captured graph replays without the host, and
    only the device knows if a step is skipped."""
    return device.type != "cpu" and bool(key.capturable or key.fused or key.may_be_skipped)


def measures_on_device(device: torch.device) -> bool:
    """True where gradients are measured on their device, and the host does not read the norm."""
    return device.type != "cpu"


def _make_launch_groups(
    optimizer: Stepped, store: StateStore, slots: list[ParamSlot], keys: list[GroupKey]
) -> list[LaunchGroup]:
    """One launch for each device, rule and combination of dtypes; more where memory overlaps."""
    _check_options(optimizer, slots, keys)
    waves = memory_layout.waves([slot.source for slot in slots])
    split: dict[_LaunchKey, list[ParamSlot]] = defaultdict(list)
    for slot, wave in zip(slots, waves, strict=True):
        key = keys[slot.group]
        device = slot.target.device
        on_device = counts_on_device(device, key)
        step_options = options.options_of_param(key.step_options, slot.param)
        split[
            _LaunchKey(wave, device, key.update, slot.dtype_codes, on_device, step_options)
        ].append(slot)
    launch_groups = []
    for launch_key, chosen in split.items():
        numels = [memory_layout.numel(slot.target) for slot in chosen]
        launch = backend.step_kernels(launch_key.device.type).Launch(
            launch_key.update.rule,
            launch_key.dtype_codes,
            numels,
            1 + launch_key.update.n_scalars + launch_key.step_options.n_scalars,
            launch_key.device,
            launch_key.step_options,
        )
        launch.name = type(optimizer).__name__.lower()
        launch.prepare(torch.get_num_threads())
        launch_groups.append((launch_key, chosen, launch))
    steps = _make_step_counts(
        store, [(launch_key, chosen) for launch_key, chosen, _ in launch_groups], keys
    )
    ordered = sorted(zip(launch_groups, steps, strict=True), key=lambda pair: pair[0][0].wave)
    return [
        LaunchGroup(chosen, launch_key.update, launch, counts)
        for (launch_key, chosen, launch), counts in ordered
    ]


class _LaunchKey(NamedTuple):
    """Settings that the parameters of one launch share."""

    wave: int
    device: torch.device
    update: Update
    dtype_codes: tuple[str, ...]
    on_device: bool
    step_options: StepOptions

    @property
    def counters(self) -> tuple[tuple[str, ...], bool]:
        """Names of the counters, and if averages have one; launches that agree share counters."""
        return self.update.counter_names, self.step_options.averaged


def _make_step_counts(
    store: StateStore,
    launches: list[tuple[_LaunchKey, list[ParamSlot]]],
    keys: list[GroupKey],
) -> list[StepCounts | DeviceStepCounts]:
    """The counts of every launch, in flat buffers that launches of one kind of numbers share (a
    parameter given twice is in two launches, and has one count)."""
    owners = []
    seen: set[int] = set()
    for launch_key, slots in launches:
        mine = [store.counters_of(m.param, keys[m.group]) for m in slots]
        if not launch_key.update.counted:
            # To torch, each occurrence of a parameter begins where its buffer was not there yet.
            mine = [dict(owner) if id(owner) in seen else owner for owner in mine]
        seen.update(map(id, mine))
        owners.append(mine)
    twice = len(seen) < sum(map(len, owners))
    counts = [
        [store.hidden_counters[slot.param] for slot in slots]
        if launch_key.step_options.averaged
        else []
        for launch_key, slots in launches
    ]
    shared: dict[tuple[Any, ...], dict[int, tuple[Any, Any]]] = defaultdict(dict)
    for (launch_key, _), mine, held in zip(launches, owners, counts, strict=True):
        if not launch_key.on_device:
            both = zip(mine, held or mine, strict=True)
            shared[launch_key.counters].update((id(pair[0]), pair) for pair in both)
    counters = {}
    for (names, averaged), pairs in shared.items():
        mine, held = map(list, zip(*pairs.values(), strict=True))
        counters[names, averaged] = StepCounters(mine, names, held if averaged else ())
    steps: list[StepCounts | DeviceStepCounts] = []
    for (launch_key, slots), mine, held in zip(launches, owners, counts, strict=True):
        groups = [slot.group for slot in slots]
        if launch_key.on_device:
            steps.append(DeviceStepCounts(launch_key.update, mine, held, groups, launch_key.device))
        else:
            row_of = {ref: row for row, ref in enumerate(shared[launch_key.counters])}
            rows = [row_of[id(owner)] for owner in mine]
            steps.append(
                StepCounts(launch_key.update, counters[launch_key.counters], rows, groups, twice)
            )
        for slot, count in zip(slots, held, strict=False):
            show_count(slot.state, count)
    return steps
