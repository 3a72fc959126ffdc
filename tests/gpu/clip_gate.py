"""The gate for what clipping and skipping add: the kernel that measures gradients, and the others
with what they read of it. `gate.py` says what fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastopt.optim.update import Update
from fastopt_kernels.chunks import NO_EXTRAS, STOCHASTIC, Extras
from fastopt_kernels.gpu import measure
from tests.gpu.gate import (
    CPU,
    KINDS,
    ROUNDINGS,
    Read,
    check_scalars,
    compiling,
    launch_of,
    read,
    run_on_device,
    scalars_faults,
    update_faults,
    updates,
)


def measure_faults(kernel: Any, kind: str) -> tuple[Read, list[str]]:
    """What keeps a kernel that measures gradients from passing."""
    found = read(kernel)
    faults = []
    if found.spilled:
        faults.append(f"spills: {found.spilled} (stack, local memory, instructions)")
    if found.loads < measure.UNROLL[kind]:
        faults.append(f"{found.loads} loads of 128 bits, {measure.UNROLL[kind]} needed")
    if found.approximate:
        faults.append(f"approximate: {' '.join(found.approximate)}")
    return found, faults


def check_clipped(
    update: Update,
    kinds: tuple[str, str, str],
    target: str,
    maximum: bool = False,
    extras: Extras = NO_EXTRAS,
) -> list[tuple[Read, list[str]]]:
    """Compile a step that is clipped by norm under GradScaler: measure, count and update."""
    with compiling(target) as compiled:
        launch = launch_of(update, kinds, update.rule, extras)
        one = torch.ones(1)
        look = measure.Look(CPU, [launch])
        verdict = look.run(np.zeros(1, dtype=np.int64), [1.0], maximum, True, one, one)
        run_on_device(launch, update, False, verdict)
        launch.run(1, verdict)
        measuring, scalars, (skipping, clipped) = (
            compiled.of(name) for name in ("measure_kernel", "scalars_kernel", "update_kernel")
        )
        return [
            measure_faults(measuring[0], kinds[1]),
            scalars_faults(scalars[0]),
            update_faults(skipping, launch.kinds),
            update_faults(clipped, launch.kinds),
        ]


def all_checks(targets: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each kernel of a clipped Adam step, by name."""
    adam = updates()["adam"]
    for target, kinds, maximum in itertools.product(targets, KINDS, (False, True)):
        norm = "largest" if maximum else "norm"
        for k, part in enumerate(("measure", "scalars", "skipped", "clipped")):
            label = f"{target:7} {'adam ' + norm + ' ' + part:26} {'-'.join(kinds):15}"
            yield (
                label,
                lambda c=kinds, t=target, m=maximum, k=k: check_clipped(adam, c, t, m)[k],
            )
    for target, rounding in itertools.product(targets, (0, STOCHASTIC)):
        extras = Extras(clipped=True, averaged=True, rounding=rounding)
        label = f"{target:7} {'adam_scalars':26} {'bf16':15} {ROUNDINGS[rounding]}"
        yield label, lambda t=target, e=extras: check_scalars(adam, KINDS[1], t, extras=e)
