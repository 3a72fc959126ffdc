"""Every torch.optim.lr_scheduler drives ours as it drives torch's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import fastopt
from tests.optim.pairs import Pair

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LRScheduler": lambda o: Halving(o),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 2, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.5, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.005, anneal_epochs=3),
}


class Halving(lr_scheduler.LRScheduler):
    """A scheduler of a user's own."""

    def get_lr(self) -> list[float]:
        return [base / 2**self.last_epoch for base in self.base_lrs]


def check_schedule(name: str, case: str, ours: type | None = None) -> None:
    """Learning rates and trajectory alike, and no warning that nobody stepped (it would be an
    error here)."""
    pair = Pair(case, ours=ours)
    schedulers = [SCHEDULERS[name](optimizer) for optimizer, _ in pair.sides]
    rates = []
    for _ in range(6):
        pair.step()
        for scheduler in schedulers:
            metric = (1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
            scheduler.step(*metric)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer, _ in pair.sides])
    pair.check()
    assert all(theirs == mine for theirs, mine in rates)
    assert len({rate for rate, _ in rates}) > 1


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_is_followed(name: str, case: str) -> None:
    """CyclicLR and OneCycleLR also cycle momentum, or betas."""
    check_schedule(name, case)


def test_every_scheduler_of_torch_is_here() -> None:
    assert set(lr_scheduler.__all__) <= set(SCHEDULERS)


class FirstRate(fastopt.optim.AdamW):
    """Wrong: keeps the learning rate it was made with."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            now, group["lr"] = group["lr"], self.defaults["lr"]
            super().step(closure)
            group["lr"] = now


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError):
        check_schedule("StepLR", "AdamW", FirstRate)


def test_a_scheduler_and_its_optimizer_resume_from_their_state_dicts() -> None:
    pair = Pair("AdamW")
    schedulers = [SCHEDULERS["CosineAnnealingLR"](optimizer) for optimizer, _ in pair.sides]
    pair.step()
    for scheduler in schedulers:
        scheduler.step()
    saved = [
        copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
        for (optimizer, _), scheduler in zip(pair.sides, schedulers, strict=True)
    ]
    again = Pair("AdamW")
    schedulers = [SCHEDULERS["CosineAnnealingLR"](optimizer) for optimizer, _ in again.sides]
    # Each resumes from the other's.
    for (optimizer, params), scheduler, (state, schedule), (_, old) in zip(
        again.sides, schedulers, reversed(saved), pair.sides, strict=True
    ):
        optimizer.load_state_dict(state)
        scheduler.load_state_dict(schedule)
        for param, value in zip(params, old, strict=True):
            param.data.copy_(value.data)
    for _ in range(2):
        again.step()
        for scheduler in schedulers:
            scheduler.step()
    again.check()
    assert math.isclose(
        again.ours.param_groups[0]["lr"], 0.02 * 0.5 * (1 + math.cos(0.75 * 3.14159265358979))
    )


def test_a_scheduler_on_a_tensor_learning_rate_fills_it_in_place() -> None:
    pair = Pair("AdamW", lr=torch.tensor(0.02))
    schedulers = [SCHEDULERS["ExponentialLR"](optimizer) for optimizer, _ in pair.sides]
    rate = pair.ours.param_groups[0]["lr"]
    for _ in range(4):
        pair.step()
        for scheduler in schedulers:
            scheduler.step()
    pair.check()
    assert pair.ours.param_groups[0]["lr"] is rate
    assert float(rate) < 0.006
