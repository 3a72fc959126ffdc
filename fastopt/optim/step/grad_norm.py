"""Norms of gradients, clip coefficients and the skip flag: on the host, and on devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastopt import backend
from fastopt.optim.options import ALONE
from fastopt.optim.step.grad_scale import Scale
from fastopt.optim.step.launch_group import LaunchGroup
from fastopt.optim.update import number


def maximum_of(groups: Sequence[Mapping[str, Any]]) -> bool:
    """True where the norm of these groups is max |g|, false where it is sqrt(sum g^2).

    Raises ValueError where they do not agree.
    """
    kinds = {float(group.get("norm_type", 2.0)) for group in groups}
    if len(kinds) > 1:
        raise ValueError(
            f"Invalid norm_type: {sorted(kinds)} in one optimizer (one norm is over all of its "
            "parameters: give all groups the same)"
        )
    return kinds == {math.inf}


def one_limit(groups: Sequence[Mapping[str, Any]]) -> bool:
    """True where one coefficient serves all groups; limits on a device are not read."""
    limits = [group.get("max_grad_norm") for group in groups]
    return len({id(x) if isinstance(x, Tensor) else x for x in limits}) == 1 and (
        len(groups) == 1 or not any(group.get(ALONE) for group in groups)
    )


@dataclass(frozen=True)
class LastStep:
    """Findings of the last step that measured its gradients.

    grad_norm: of all gradients, unscaled; clip_coefficient: what they were multiplied by, one for
    all groups, or (groups,) where one has a limit of its own; nonfinite: elements that were
    infinite or NaN; skipped: nothing was updated for it
    """

    grad_norm: Tensor
    clip_coefficient: Tensor
    nonfinite: Tensor
    skipped: Tensor


class ClipResult:
    """The coefficients of a step's parameter groups, and whether it is to be skipped."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._groups, self._inverse_scale, self._skip = list(groups), 1.0, False
        self.maximum = maximum_of(groups)
        self._parts = np.zeros(len(groups))
        self.nonfinite = 0.0

    def add(self, group: np.ndarray[Any, Any], parts: Any, nonfinite: Any) -> None:
        """Take in what was measured: sum g^2 or max |g| of tensors, and whose they are."""
        merge = np.maximum if self.maximum else np.add
        with np.errstate(invalid="ignore"):
            merge.at(self._parts, group, parts)
        self.nonfinite += float(nonfinite.sum())

    def with_grad_scale(self, inverse_scale: float, skip: bool = False) -> ClipResult:
        """The same, of gradients that are multiplied by this first; skip: a GradScaler skips."""
        self._inverse_scale, self._skip = inverse_scale, skip
        return self

    def _norm(self, parts: Any) -> float:
        if len(parts) == 1:
            merged = float(parts[0])
        else:
            merged = float(np.max(parts, initial=0.0) if self.maximum else np.sum(parts))
        return abs(self._inverse_scale) * (merged if self.maximum else math.sqrt(merged))

    def _coefficient(self, index: int) -> float:
        limit = self._groups[index].get("max_grad_norm")
        if limit is None:
            return 1.0
        if len(self._groups) == 1:
            parts = self._parts
        elif self._groups[index].get(ALONE):
            parts = self._parts[[index]]
        else:
            parts = self._parts[[not group.get(ALONE) for group in self._groups]]
        coefficient = number(limit) / (self._norm(parts) + 1e-6)
        # As torch's clamp: NaN stays.
        return 1.0 if coefficient > 1.0 else coefficient

    @functools.cached_property
    def coefficients(self) -> list[float]:
        """One a parameter group."""
        return [self._coefficient(index) for index in range(len(self._groups))]

    @property
    def skip(self) -> bool:
        """True where nothing is to be updated."""
        return self._skip or (
            self.nonfinite > 0 and any(group.get("skip_nonfinite") for group in self._groups)
        )

    def report(self, device: torch.device) -> LastStep:
        """The same as tensors on a device."""
        coefficients = self.coefficients[0] if one_limit(self._groups) else self.coefficients
        return LastStep(
            torch.tensor(self._norm(self._parts), dtype=torch.float32, device=device),
            torch.tensor(coefficients, dtype=torch.float32, device=device),
            torch.tensor(int(self.nonfinite), device=device),
            torch.tensor(self.skip, device=device),
        )


class DeviceClipResult:
    """A `ClipResult` that only devices hold: launches read it, and skip, by themselves.

    devices: what each device's launches read (`gpu.measure.ClipResult`); of the first is the
        report
    """

    skip = False

    def __init__(self, devices: dict[torch.device, Any], one_limit: bool) -> None:
        self._devices, self._one_limit = devices, one_limit
        self._first = next(iter(devices.values()))

    def on(self, device: torch.device) -> Any:
        """The result that the launches of a device read."""
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
        self._grad_norms = {
            device: backend.kernels(device.type, "step.reduce").GradNorm(device, held)
            for device, held in launches.items()
        }

    def measure(
        self, groups: Sequence[Mapping[str, Any]], scale: Scale, skips: bool
    ) -> DeviceClipResult:
        """Measure, clip or skip, without waiting for it; skips: also where no group asks for it."""
        maximum = maximum_of(groups)
        alone = np.array([bool(group.get(ALONE)) for group in groups])
        norm_groups = (np.cumsum(alone) * alone).astype(np.int64)
        limits = [
            0.0 if group.get("max_grad_norm") is None else group["max_grad_norm"]
            for group in groups
        ]
        skips = skips or any(group.get("skip_nonfinite") for group in groups)
        settings = (norm_groups, limits, maximum, skips, scale.grad_scale, scale.found_inf)
        (first, grad_norm), *others = self._grad_norms.items()
        # What others have measured goes to the first device, and its result to all.
        measured = [other.run(*settings).measured for _, other in others]
        clip = grad_norm.run(*settings, measured)
        devices = {first: clip} | {device: clip.to(device) for device, _ in others}
        return DeviceClipResult(devices, one_limit(groups))
