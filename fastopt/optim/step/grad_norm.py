"""What a step found in its gradients, where the host has not computed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastopt import backend
from fastopt.optim import options
from fastopt.optim.options import LastStep
from fastopt.optim.step.grad_scale import Scale

if TYPE_CHECKING:
    from fastopt.optim.step.launch_group import LaunchGroup


class DeviceClipResult:
    """A `ClipResult` that no host has seen: launches read it, and skip, by themselves.

    devices: what each device's launches read (`gpu.measure.ClipResult`); of the first is the
        report
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


class ReportedClip:
    """The findings of the last step of an optimizer that was copied or unpickled since."""

    def __init__(self, last: LastStep) -> None:
        self._last = last

    def report(self) -> LastStep:
        """As the original's."""
        return self._last


class DeviceGradNorm:
    """The launches of a plan whose gradients are on devices, each measured where it is."""

    def __init__(self, launch_groups: Sequence[LaunchGroup]) -> None:
        launches: dict[torch.device, list[Any]] = {}
        for launch_group in launch_groups:
            launch_group.launch.owners = launch_group.group_of
            launches.setdefault(launch_group.launch.device, []).append(launch_group.launch)
        self._looks = {
            device: backend.kernels(device.type, "measure").GradNorm(device, here)
            for device, here in launches.items()
        }

    def measure(
        self, groups: Sequence[Mapping[str, Any]], scale: Scale, skips: bool
    ) -> DeviceClipResult:
        """Measure and judge, without waiting for it; skips: also where no group asks for it."""
        maximum = options.maximum_of(groups)
        alone = np.array([bool(group.get(options.ALONE)) for group in groups])
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
        clip = look.run(*settings, measured)
        devices = {first: clip} | {device: clip.to(device) for device, _ in others}
        return DeviceClipResult(devices, options.one_limit(groups))
