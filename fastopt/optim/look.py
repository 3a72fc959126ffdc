"""A step's look at all gradients before it begins: by the host, or on the devices they are on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastopt import backend
from fastopt.optim import passes, skipped
from fastopt.optim.hooks import pre_hooks
from fastopt.optim.passes import LastStep, Verdict
from fastopt.optim.scale import NO_SCALE, Scale, ScalesInside

if TYPE_CHECKING:
    from fastopt.optim.bucket import Bucket
    from fastopt.optim.plan import Plan
    from fastopt.optim.telemetry import ParameterTelemetry


class DeviceVerdict:
    """A `Verdict` that no host has seen: launches read it, and skip, by themselves.

    devices: what each device's launches read (`gpu.measure.Verdict`); the first also has the report
    """

    skip = False

    def __init__(self, devices: dict[torch.device, Any], one_limit: bool) -> None:
        self._devices, self._one_limit = devices, one_limit
        self._first = next(iter(devices.values()))

    def on(self, device: torch.device) -> Any:
        """What the launches of a device read."""
        return self._devices[device]

    @property
    def found_inf(self) -> Tensor:
        """float32, not 0 where nothing is updated."""
        return self._first.skip.reshape(())  # type: ignore[no-any-return]

    def report(self) -> LastStep:
        """The same as tensors of their own, on the device."""
        coefficients = self._first.coefficients.float()
        return LastStep(
            self._first.wide[0].float(),
            coefficients[0] if self._one_limit else coefficients,
            self._first.wide[1].long(),
            self.found_inf.bool(),
        )


class Reported:
    """The findings of the last step of an optimizer that was copied or unpickled since."""

    def __init__(self, last: LastStep) -> None:
        self._last = last

    def report(self) -> LastStep:
        """As the original's."""
        return self._last


class DeviceLook:
    """The launches of a plan whose gradients are on devices, each measured where it is."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        launches: dict[torch.device, list[Any]] = {}
        for bucket in buckets:
            bucket.launch.owners = bucket.group_of
            launches.setdefault(bucket.launch.device, []).append(bucket.launch)
        self._looks = {
            device: backend.kernels(device.type, "measure").Look(device, here)
            for device, here in launches.items()
        }

    def take(self, groups: Sequence[Mapping[str, Any]], scale: Scale, skips: bool) -> DeviceVerdict:
        """Measure and judge, without waiting for it; skips: also where no group asks for it."""
        maximum = passes.maximum_of(groups)
        alone = np.array([bool(group.get(passes.ALONE)) for group in groups])
        families = (np.cumsum(alone) * alone).astype(np.int64)
        limits = [
            0.0 if group.get("max_grad_norm") is None else group["max_grad_norm"]
            for group in groups
        ]
        skips = skips or any(group.get("skip_nonfinite") for group in groups)
        settings = (families, limits, maximum, skips, scale.grad_scale, scale.found_inf)
        (first, look), *others = self._looks.items()
        # What others have measured goes to the first device, and its verdict to all.
        measured = [other.run(*settings).measured for _, other in others]
        verdict = look.run(*settings, measured)
        devices = {first: verdict} | {device: verdict.to(device) for device, _ in others}
        return DeviceVerdict(devices, passes.one_limit(groups))


class Looking:
    """The part of an optimizer that looks at gradients, and tells what it saw."""

    param_groups: list[dict[str, Any]]
    _verdict: Verdict | DeviceVerdict | Reported | None = None
    # A plan for the gradients that are there, and what the host has seen of them ahead of the step.
    _seen: tuple[Plan, Verdict | None] | None = None
    # A scaler of ours leaves it to the step to unscale (unscales), and to find what is not finite.
    unscales: bool = False
    _finds: bool = False
    # Telemetry of parameters whose last step the host knew to be skipped; None: had no gradient.
    _skipped: dict[Tensor, ParameterTelemetry | None] | None = None

    def _current_plan(self, told: bool) -> Plan:
        raise NotImplementedError

    _step_supports_amp_scaling = ScalesInside()

    def looks(self) -> bool:
        """Whether a step looks at all gradients before any parameter is written."""
        return passes.measures(self.param_groups)

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
