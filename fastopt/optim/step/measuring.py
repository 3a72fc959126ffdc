"""A step's look at all gradients before it begins: by the host, or on the devices they are on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastopt.optim import options
from fastopt.optim.options import LastStep, Verdict
from fastopt.optim.step import skipped
from fastopt.optim.step.grad_norm import DeviceVerdict, Reported
from fastopt.optim.step.grad_scale import NO_SCALE, Scale, ScalesInside
from fastopt.optim.step.hooks import pre_hooks
from fastopt.optim.step.planning import Planning

if TYPE_CHECKING:
    from fastopt.optim.step.plan import Plan
    from fastopt.optim.step.telemetry import ParameterTelemetry


class Looking(Planning):
    """The part of an optimizer that looks at gradients, and tells what it saw."""

    _verdict: Verdict | DeviceVerdict | Reported | None = None
    # A plan for the gradients that are there, and what the host has seen of them ahead of the step.
    _seen: tuple[Plan, Verdict | None] | None = None
    # A scaler of ours leaves it to the step to unscale (unscales), and to find what is not finite.
    unscales: bool = False
    _finds: bool = False
    # Telemetry of parameters whose last step the host knew to be skipped; None: had no gradient.
    _skipped: dict[Tensor, ParameterTelemetry | None] | None = None

    _step_supports_amp_scaling = ScalesInside()

    def looks(self) -> bool:
        """Whether a step looks at all gradients before any parameter is written."""
        return options.measures(self.param_groups)

    def look(self) -> bool | None:
        """Look now, for the step that follows at once: whether an element is infinite or NaN.

        None where only the device will know: `found_inf_of_step`, once that was taken.
        """
        plan = self._current_plan(told=True)
        verdict = None if plan.look else self._see(plan)
        if not plan.odd and not pre_hooks(self):
            self._seen = plan, verdict
        self._finds = plan.look is not None
        return None if verdict is None else verdict.nonfinite > 0

    def forget_look(self) -> None:
        """What was seen holds no longer."""
        self._seen, self._finds = None, False

    def found_inf_of_step(self) -> Tensor | None:
        """What a step found that was left to find it: float32, not 0 where it was skipped."""
        if self._finds and isinstance(self._verdict, DeviceVerdict):
            return self._verdict.found_inf
        return None

    def _see(self, plan: Plan) -> Verdict:
        verdict = Verdict(self.param_groups)
        for bucket in plan.buckets:
            bucket.measure(verdict)
        return verdict

    def _judge(self, plan: Plan, seen: Verdict | None, scale: Scale) -> Verdict | DeviceVerdict:
        """What the step is to do about its gradients; seen: by the host, before."""
        verdict: Verdict | DeviceVerdict
        if plan.look is not None:
            verdict = plan.look.take(self.param_groups, scale, self._finds)
        else:
            verdict = (seen or self._see(plan)).given(scale.inverse())
        self._verdict = verdict
        return verdict

    def note_skip(self, scale: Scale = NO_SCALE, seen: Verdict | None = None) -> None:
        """Note what is found in the gradients of a step that is skipped, as a scaler says on the
        host; seen: what was seen of them before."""
        try:
            inverse = scale.inverse()
        except ZeroDivisionError:  # a scale that is halved at every step ends at 0
            inverse = math.inf
        if seen is None:
            seen = skipped.verdict_of(self.param_groups, inverse)
        self._verdict = seen.given(inverse, skip=True)
        params = [param for group in self.param_groups for param in group["params"]]
        self._watch_skipped(params, inverse)

    def _watch_skipped(self, params: Iterable[Tensor], inverse: float) -> None:
        """Have telemetry show what is found where a step of these is skipped."""
        rows = skipped.rows_of(self.param_groups, self.__dict__["state"], params, inverse)
        if rows:
            self._skipped = {**(self._skipped or {}), **rows}

    def _forget_skipped(self, params: Iterable[Tensor]) -> None:
        """A step of these follows, which their launches measure."""
        stepped = set(params)
        rows = {p: row for p, row in (self._skipped or {}).items() if p not in stepped}
        self._skipped = rows or None

    @property
    def last_step(self) -> LastStep:
        """What the last step found in its gradients, as tensors where these are; made when it is
        asked for, until when nobody waits for a device.

        A step that a GradScaler skipped counts, with or without options, where found_inf is on the
        CPU. torch's calls step() for a skipped one only where the step unscales (fused=True,
        max_grad_norm, clip_value); otherwise the last step is the one before.

        Raises RuntimeError where no option had the step look (max_grad_norm, skip_nonfinite).
        """
        if self._verdict is None:
            raise RuntimeError(
                f"the last step of this {type(self).__name__} has not looked at its gradients: "
                "construct it with max_grad_norm or skip_nonfinite=True, and call step()."
            )
        if not isinstance(self._verdict, Verdict):
            return self._verdict.report()
        devices = (param.device for group in self.param_groups for param in group["params"])
        return self._verdict.report(next(devices, torch.device("cpu")))
