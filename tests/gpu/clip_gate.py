"""The gate for what clipping and skipping add: the kernel that measures gradients, and the others
with what they read of it. `gate.py` says what fails."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from fastopt.optim.update import Update
from fastopt_kernels.chunks import NO_OPTIONS, STOCHASTIC, StepOptions
from fastopt_kernels.gpu.machine_code import Launched, compiling
from fastopt_kernels.gpu.step import reduce
from tests.gpu.checked import Case, Checked, checked
from tests.gpu.gate import (
    CPU,
    KINDS,
    ROUNDINGS,
    Checks,
    check_scalars,
    checked_scalars,
    checked_update,
    launch_of,
    run_on_device,
    updates,
)


def checked_measure(launched: Launched, kind: str) -> Checked:
    """What keeps a kernel that measures gradients from passing."""
    found = checked(launched)
    found.wide(reduce.UNROLL[kind], 0)
    if found.read.approximate:
        found.faults.append(f"approximate: {' '.join(found.read.approximate)}")
    return found


def check_clipped(
    update: Update,
    kinds: tuple[str, str, str],
    target: str,
    maximum: bool = False,
    step_options: StepOptions = NO_OPTIONS,
) -> list[Checked]:
    """Compile a step that is clipped by norm under GradScaler: measure, count and update."""
    with compiling(target) as compiled:
        launch = launch_of(update, kinds, update.rule, step_options)
        one = torch.ones(1)
        look = reduce.GradNorm(CPU, [launch])
        clip = look.run(np.zeros(1, dtype=np.int64), [1.0], maximum, True, one, one)
        run_on_device(launch, update, False, clip)
        launch.run(1, clip)
        measuring, scalars, (skipping, clipped) = (
            compiled.of(name) for name in ("measure_kernel", "scalars_kernel", "update_kernel")
        )
        return [
            checked_measure(measuring[0], kinds[1]),
            checked_scalars(scalars[0]),
            checked_update(skipping, launch.kinds),
            checked_update(clipped, launch.kinds),
        ]


def all_checks(targets: Sequence[str]) -> Checks:
    """The kernels of a clipped Adam step; the scalars of one that rounds."""
    adam = updates()["adam"]
    for target, kinds, maximum in itertools.product(targets, KINDS, (False, True)):
        what = "clipped by largest" if maximum else "clipped by norm"
        yield (
            Case(target, "adam", "-".join(kinds), what),
            lambda c=kinds, t=target, m=maximum: check_clipped(adam, c, t, m),
        )
    for target, rounding in itertools.product(targets, (0, STOCHASTIC)):
        step_options = StepOptions(clipped=True, averaged=True, rounding=rounding)
        yield (
            Case(target, "adam_scalars", "bf16", ROUNDINGS[rounding]),
            lambda t=target, e=step_options: [check_scalars(adam, KINDS[1], t, step_options=e)],
        )
