"""The part of a step before anything is written: its scalars are computed, and it is counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastopt.optim.options import Verdict
from fastopt.optim.step.grad_norm import DeviceVerdict
from fastopt.optim.step.grad_scale import Scale

if TYPE_CHECKING:
    from fastopt.optim.step.launch_group import Bucket
    from fastopt.optim.step.plan import Plan


def count(
    plan: Plan,
    groups: list[dict[str, Any]],
    scale: Scale,
    verdict: Verdict | DeviceVerdict | None,
    exposed: bool,
) -> list[Bucket]:
    """Count the step of every launch of a plan that is to run now; gives those launches.

    The scalars of all of them come first: where a hyper-parameter is nothing to compute with, this
    raises, and nothing has been counted.
    """
    running: list[Bucket] = []
    factors: list[float] | None = None
    before = [(numbers, numbers.values()) for numbers in plan.numbers()] if plan.twice else []
    try:
        for bucket in plan.buckets:
            if bucket.empty:
                continue
            if not bucket.on_device:
                # Only here, since it may wait for a device.
                factors = _factors(groups, scale, verdict) if factors is None else factors
                if not factors:
                    continue
            bucket.prepare(groups, factors or [], exposed)
            # The second launch of a parameter that is given twice goes on from the first one's.
            if plan.twice:
                bucket.count()
            running.append(bucket)
    except BaseException:
        for numbers, values in before:
            numbers.restore(values)
        raise
    if not plan.twice:
        for bucket in running:
            bucket.count()
    return running


def _factors(
    groups: list[dict[str, Any]], scale: Scale, verdict: Verdict | DeviceVerdict | None
) -> list[float]:
    """The factors of each group's gradients on the host; empty where it skips the step."""
    if isinstance(verdict, DeviceVerdict):
        return [1.0] * len(groups)
    if scale.skip():
        return []
    inverse = scale.inverse()
    if isinstance(verdict, Verdict):
        return [inverse * coefficient for coefficient in verdict.coefficients]
    return [inverse] * len(groups)
