"""The norm of all gradients before a step: measured by the host, or on the gradients' devices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastopt.optim import options
from fastopt.optim.state.store import StateStore
from fastopt.optim.step import skipped
from fastopt.optim.step.grad_norm import ClipResult, DeviceClipResult, LastStep, ReportedClip
from fastopt.optim.step.grad_scale import NO_SCALE, Scale, ScalesInside
from fastopt.optim.step.hooks import pre_hooks
from fastopt.optim.step.plan import Plan
from fastopt.optim.step.telemetry import ParameterTelemetry


class MeasuringOptimizer:
    """The part of an optimizer that measures gradients, and reports what it found."""

    param_groups: list[dict[str, Any]]
    _store: StateStore
    _clip: ClipResult | DeviceClipResult | ReportedClip | None = None
    # A plan for the gradients that are there, and what the host has measured ahead of the step.
    _measured_ahead: tuple[Plan, ClipResult | None] | None = None
    # A scaler of ours leaves it to the step to unscale (unscales), and to find what is not finite.
    unscales: bool = False
    _finds_inf: bool = False
    # Telemetry of parameters whose last step the host knew to be skipped; None: had no gradient.
    _skipped_telemetry: dict[Tensor, ParameterTelemetry | None] | None = None

    _step_supports_amp_scaling = ScalesInside()

    def _current_plan(self, may_be_skipped: bool) -> Plan:
        """The plan for the gradients that are there now, which a subclass makes."""
        raise NotImplementedError

    def measures_gradients(self) -> bool:
        """True where a step measures all gradients before any parameter is written."""
        return options.measures(self.param_groups)

    def measure_gradients(self) -> bool | None:
        """Measure now, for the step that follows at once; true where an element is infinite or NaN.

        None where only the device will know: `found_inf_of_step`, once that was taken.
        """
        plan = self._current_plan(may_be_skipped=True)
        clip = None if plan.device_grad_norm else self._measure_on_host(plan)
        if not plan.fallback_params and not pre_hooks(self):
            self._measured_ahead = plan, clip
        self._finds_inf = plan.device_grad_norm is not None
        return None if clip is None else clip.nonfinite > 0

    def forget_measured(self) -> None:
        """Forget what `measure_gradients` has measured."""
        self._measured_ahead, self._finds_inf = None, False

    def found_inf_of_step(self) -> Tensor | None:
        """() float32, not 0 where the step was skipped; None where the host knows."""
        if self._finds_inf and isinstance(self._clip, DeviceClipResult):
            return self._clip.found_inf
        return None

    def _measure_on_host(self, plan: Plan) -> ClipResult:
        clip = ClipResult(self.param_groups)
        for launch_group in plan.launch_groups:
            clip.add(*launch_group.measure(clip.maximum))
        return clip

    def _measure_gradients(
        self, plan: Plan, measured: ClipResult | None, scale: Scale
    ) -> ClipResult | DeviceClipResult:
        """Clip coefficients and the skip flag of a step.

        measured: by the host, before
        """
        clip: ClipResult | DeviceClipResult
        if plan.device_grad_norm is not None:
            clip = plan.device_grad_norm.measure(self.param_groups, scale, self._finds_inf)
        else:
            clip = (measured or self._measure_on_host(plan)).with_grad_scale(scale.inverse())
        self._clip = clip
        return clip

    def note_skip(self, scale: Scale = NO_SCALE, measured: ClipResult | None = None) -> None:
        """Note what is found in the gradients of a step that is skipped, as a scaler says on the
        host; measured: norms of its gradients, where they have been measured already."""
        try:
            inverse = scale.inverse()
        except ZeroDivisionError:  # a scale that is halved at every step ends at 0
            inverse = math.inf
        if measured is None:
            measured = skipped.clip_result_of(self.param_groups, inverse)
        self._clip = measured.with_grad_scale(inverse, skip=True)
        params = [param for group in self.param_groups for param in group["params"]]
        self._note_skipped_telemetry(params, inverse)

    def _note_skipped_telemetry(self, params: Iterable[Tensor], inverse: float) -> None:
        """Have telemetry show what is found where a step of these is skipped."""
        rows = skipped.rows_of(self.param_groups, self._store.states, params, inverse)
        if rows:
            self._skipped_telemetry = {**(self._skipped_telemetry or {}), **rows}

    def _forget_skipped_telemetry(self, params: Iterable[Tensor]) -> None:
        """A step of these follows, which their launches measure."""
        stepped = set(params)
        rows = {p: row for p, row in (self._skipped_telemetry or {}).items() if p not in stepped}
        self._skipped_telemetry = rows or None

    @property
    def last_step(self) -> LastStep:
        """Norm, clip coefficient and counts of the gradients of the last step, as tensors on their
        device; made when asked for, until when nothing waits for the device.

        A step that a GradScaler skipped counts, with or without options, where found_inf is on the
        CPU. torch's calls step() for a skipped one only where the step unscales (fused=True,
        max_grad_norm, clip_value); otherwise the last step is the one before.

        Raises RuntimeError where no option had the step measure (max_grad_norm, skip_nonfinite).
        """
        if self._clip is None:
            raise RuntimeError(
                f"the last step of this {type(self).__name__} has not looked at its gradients: "
                "construct it with max_grad_norm or skip_nonfinite=True, and call step()."
            )
        if not isinstance(self._clip, ClipResult):
            return self._clip.report()
        devices = (param.device for group in self.param_groups for param in group["params"])
        return self._clip.report(next(devices, torch.device("cpu")))
