"""The default device and dtype, which torch gives to every tensor made without one, are not the
optimizer's: what it makes lies where its parameters, or its counts, are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from tests.optim.pairs import ONE_EACH, construct, give_grads, make_params

Where = Callable[[], AbstractContextManager[Any]]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5, "ema_decay": 0.9, "telemetry": True},
    "differentiable": {"differentiable": True},
}


def elsewhere() -> AbstractContextManager[Any]:
    return torch.device("meta")


def trained(case: str, options: dict[str, Any], where: Where, ours: Any = fastopt) -> list[Tensor]:
    """Parameters and states after some steps, a state_dict and its loading between them."""
    params: list[Any] = make_params()
    saved: dict[str, Any] = {}
    for param in params:
        # A differentiable step writes to no leaf that requires a gradient.
        param.requires_grad_(not options.get("differentiable"))
    for part in range(2):
        with where():
            optimizer: Any = construct(ours, case, params, **options)
            if saved:
                optimizer.load_state_dict(saved)
        for step in range(2):
            give_grads(params, 2 * part + step)
            with where(), torch.no_grad():
                optimizer.step()
        with where():
            saved = copy.deepcopy(optimizer.state_dict())
    states = saved["state"]
    return [*params, *(value for index in sorted(states) for value in states[index].values())]


def check(case: str, options: dict[str, Any], ours: Any = fastopt) -> None:
    found = trained(case, options, elsewhere, ours)
    for mine, other in zip(found, trained(case, options, nullcontext), strict=True):
        assert (mine.device, mine.dtype) == (other.device, other.dtype)
        assert torch.equal(mine, other)


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("case", ONE_EACH)
def test_steps_and_checkpoints_do_not_follow_the_default_device(case: str, how: str) -> None:
    check(case, OPTIONS[how])


class CountsElsewhere(fastopt.optim.AdamW):
    """Wrong: a step is counted on the default device."""

    def initial_number(self, value: float, param: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.tensor(value)


def test_this_check_sees_a_count_on_the_default_device() -> None:
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        check("AdamW", {}, CountsElsewhere)


@pytest.mark.parametrize("by", ["own", "torch", "ours"])
def test_last_step_lies_where_the_parameters_are(by: str) -> None:
    params = make_params()
    optimizer = fastopt.optim.AdamW(
        [{"params": []}, {"params": params}], max_grad_norm=1.0, skip_nonfinite=True
    )
    scaler: Any = {"torch": torch.amp.GradScaler, "ours": fastopt.GradScaler}.get(by)
    for overflow in (False, True):
        give_grads(params, 0)
        if overflow:
            assert params[0].grad is not None
            params[0].grad.fill_(float("inf"))
        kept = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with elsewhere():
                if scaler is None:
                    optimizer.step()
                else:
                    amp = scaler("cpu", init_scale=2.0)
                    amp.scale(params[1].sum())
                    amp.step(optimizer)
                    amp.update()
                report = optimizer.last_step
        finally:
            torch.set_default_dtype(kept)
        assert {x.device.type for x in vars(report).values()} == {"cpu"}
        assert report.grad_norm.dtype == report.clip_coefficient.dtype == torch.float32
        assert bool(report.skipped) == overflow
