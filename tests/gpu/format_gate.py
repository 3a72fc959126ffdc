"""The gate for states of 8 bits and for telemetry. `gate.py` says what fails."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fastopt_kernels.chunks import KAHAN, MASTER, STOCHASTIC, StepOptions
from tests.gpu.checked import Case
from tests.gpu.gate import ROUNDINGS, Checks, check_update, updates

# Of p and g; states are of 8 bits where they may be.
KINDS = (("fp32", "fp32", "8bit"), ("bf16", "bf16", "8bit"), ("fp16", "fp16", "8bit"))
# Rules that telemetry is tried with, and what they are watched with.
WATCHED = ("adam", "rmsprop_centered_momentum", "sgd")
SEEN = (*KINDS, *((kind,) * 3 for kind in ("fp32", "bf16", "fp64")), ("bf16", "bf16", "fp32"))


def all_checks(targets: Sequence[str]) -> Checks:
    """Every rule with states in 8 bits; some rules watched."""
    coded = {name: update for name, update in updates().items() if update.eight_bit}
    for target, (name, update), kinds in itertools.product(targets, coded.items(), KINDS):
        for skip in (False, True):
            case = Case(target, name, "-".join(kinds), "skip" if skip else "")
            yield case, lambda u=update, k=kinds, t=target, s=skip: [check_update(u, k, t, s)]
    adam = updates()["adam"]
    for target, rounding in itertools.product(targets, (STOCHASTIC, KAHAN, MASTER)):
        for watched in (False, True):
            step_options = StepOptions(True, True, rounding, watched)
            what = f"{ROUNDINGS[rounding]}{', watched' * watched}"
            yield (
                Case(target, "adam", "-".join(KINDS[1]), what),
                lambda t=target, e=step_options: [check_update(adam, KINDS[1], t, step_options=e)],
            )
    for target, name, kinds in itertools.product(targets, WATCHED, SEEN):
        update, step_options = updates()[name], StepOptions(watched=True)
        if not update.state_names and kinds[2] != kinds[0]:
            continue
        for skip in (False, True):
            yield (
                Case(target, name, "-".join(kinds), f"watched{', skip' * skip}"),
                lambda u=update, k=kinds, t=target, s=skip, e=step_options: [
                    check_update(u, k, t, s, step_options=e)
                ],
            )
