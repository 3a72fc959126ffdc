"""The plans of an optimizer: kept between steps, checked before each one, rebuilt on a change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastopt.optim import options
from fastopt.optim.state import formats
from fastopt.optim.state.store import StateStore
from fastopt.optim.step import plan as plans
from fastopt.optim.step.group_key import GroupKey, ParamRef
from fastopt.optim.step.plan import Plan, build
from fastopt.optim.step.telemetry import ParameterTelemetry
from fastopt.optim.update import Update
from fastopt_kernels.chunks import NO_OPTIONS


class PlanningOptimizer:
    """The part of an optimizer that keeps its plan."""

    param_groups: list[dict[str, Any]]
    _update: ClassVar[Update]
    _plan: Plan | None = None
    _store: StateStore
    # Telemetry of the last step before this optimizer was copied or unpickled.
    _copied_telemetry: dict[Tensor, ParameterTelemetry] | None = None

    def update_of(self, group: dict[str, Any]) -> Update:
        """The update a parameter group is stepped by; the same object for the same settings."""
        return self._update

    def param_refs(self) -> Iterator[ParamRef]:
        """Every parameter with its group's number and its own among all, in order."""
        numbers = ((k, p) for k, group in enumerate(self.param_groups) for p in group["params"])
        for position, (number, param) in enumerate(numbers):
            yield ParamRef(param, number, position)

    def _current_plan(self, may_be_skipped: bool) -> Plan:
        """The plan for the gradients that are there now, checked against every address it holds.

        may_be_skipped: true where a GradScaler may skip the step on a device
        """
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        keys, plan = self._keys(may_be_skipped, params[:1]), self._plan
        # Whatever interrupts the check of a plan leaves it half updated: it is then built anew.
        self._plan = None
        if (
            plan is not None
            and plan.keys == keys
            and not (self._store.was_accessed and not plan.holds(self._store.states))
            and plan.fits(params, grads, self._store.was_accessed)
        ):
            self._plan = plan
            return plan
        plan = self._make_plan(list(self.param_refs()), grads, keys)
        plan.remember(self._store.states)
        if not plan.fallback_params:
            self._plan = plan
        return plan

    def plan_of(self, ref: ParamRef, plan: Plan | None) -> Plan:
        """A plan for one parameter alone; the one given, where it still holds."""
        param, held = ref.param, self._store.states
        keys, grads = self._keys(False, [param]), [param.grad]
        if (
            plan is None
            or plan.keys != keys
            or (self._store.was_accessed and not plan.holds({param: held.get(param)}))
            or not plan.fits([param], grads, self._store.was_accessed)
        ):
            plan = self._make_plan([ref], grads, keys)
            plan.remember({param: held.get(param)})
        return plan

    def plan_of_averages(self, param_refs: list[ParamRef]) -> Plan:
        """A plan in which nothing is stepped, and only averages move."""
        keys = self._keys(False, [ref.param for ref in param_refs])
        plan = self._make_plan(param_refs, [None] * len(param_refs), keys)
        plan.ends_backward = True
        return plan

    def _keys(self, may_be_skipped: bool, params: list[Tensor]) -> list[Any]:
        """The settings of each group that a plan depends on: a GroupKey, as a plain tuple."""
        for group in self.param_groups:
            if group.get("skip_nonfinite"):
                may_be_skipped = True
        may_be_skipped = may_be_skipped and any(
            plans.measures_on_device(param.device) for param in params
        )
        return [
            (
                update := self.update_of(group),
                group.get("capturable", False),
                group.get("fused", False),
                group.get("differentiable", False),
                # Calls are left out where the answer is the common one: this is most of a check.
                NO_OPTIONS
                if options.IN_KERNEL.isdisjoint(group)
                else options.step_options_of(group),
                group.get("max_grad_norm") is not None or bool(group.get("skip_nonfinite")),
                () if group.get("state_dtype") is None else formats.formats_of(update, group),
                may_be_skipped,
            )
            for group in self.param_groups
        ]

    def _make_plan(
        self, param_refs: list[ParamRef], grads: list[Tensor | None], keys: list[Any]
    ) -> Plan:
        for group, key in zip(self.param_groups, keys, strict=True):
            key[0].probe(group)
        with torch.no_grad():
            made = [GroupKey(*key) for key in keys]
            plan = build(self, self._store, param_refs, grads, made)  # type: ignore[arg-type]
            for launch_group in plan.launch_groups:
                if not launch_group.refresh(grads, state_was_accessed=False):
                    raise AssertionError("a plan must fit the gradients it was just built for")
        self._copied_telemetry = None
        return plan
