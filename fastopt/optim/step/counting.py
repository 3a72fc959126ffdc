"""The part of a step before anything is written: its scalars are computed, and it is counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastopt.optim.options import ClipResult
from fastopt.optim.step.grad_norm import DeviceClipResult
from fastopt.optim.step.grad_scale import Scale

if TYPE_CHECKING:
    from fastopt.optim.step.launch_group import LaunchGroup
    from fastopt.optim.step.plan import Plan


def count(
    plan: Plan,
    groups: list[dict[str, Any]],
    scale: Scale,
    clip: ClipResult | DeviceClipResult | None,
    state_was_accessed: bool,
) -> list[LaunchGroup]:
    """Count the step of every launch of a plan that is to run now; gives those launches.

    The scalars of all of them come first: where a hyper-parameter is nothing to compute with, this
    raises, and nothing has been counted.
    """
    running: list[LaunchGroup] = []
    factors: list[float] | None = None
    before = [(counters, counters.values()) for counters in plan.counters()] if plan.twice else []
    try:
        for launch_group in plan.launch_groups:
            if launch_group.empty:
                continue
            if not launch_group.on_device:
                # Only here, since it may wait for a device.
                factors = _factors(groups, scale, clip) if factors is None else factors
                if not factors:
                    continue
            launch_group.prepare(groups, factors or [], state_was_accessed)
            # The second launch of a parameter that is given twice goes on from the first one's.
            if plan.twice:
                launch_group.count()
            running.append(launch_group)
    except BaseException:
        for counters, values in before:
            counters.restore(values)
        raise
    if not plan.twice:
        for launch_group in running:
            launch_group.count()
    return running


def _factors(
    groups: list[dict[str, Any]], scale: Scale, clip: ClipResult | DeviceClipResult | None
) -> list[float]:
    """The factors of each group's gradients on the host; empty where it skips the step."""
    if isinstance(clip, DeviceClipResult):
        return [1.0] * len(groups)
    if scale.skip():
        return []
    inverse = scale.inverse()
    if isinstance(clip, ClipResult):
        return [inverse * coefficient for coefficient in clip.coefficients]
    return [inverse] * len(groups)
