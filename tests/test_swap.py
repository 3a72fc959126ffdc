"""fastopt.swap of an optimizer: a live one of torch becomes ours in place, with all that holds
it."""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import fastopt
from tests.optim.pairs import (
    CASES,
    NAMES,
    ONE_EACH,
    Pair,
    assert_params_close,
    assert_states_close,
    construct,
    give_grads,
    make_params,
)


class Swapped:
    """Two equal torch optimizers, the second swapped when the test says so."""

    def __init__(self, case: str, **more: Any) -> None:
        self.case, self.params, self.count = case, [make_params(), make_params()], 0
        self.optimizers = [construct(torch, case, params, **more) for params in self.params]

    def step(self, missing: tuple[int, ...] = ()) -> None:
        self.count += 1
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            give_grads(params, self.count, missing)
            optimizer.step()

    def swap(self, how: Any = fastopt.swap) -> None:
        assert how(self.optimizers[1]) is self.optimizers[1]

    def check(self) -> None:
        assert type(self.optimizers[1]) is getattr(fastopt.optim, CASES[self.case][0])
        assert_params_close(self.params[1], self.params[0])
        theirs, ours = (optimizer.state_dict() for optimizer in self.optimizers)
        assert_states_close(ours, theirs)


def check_swap_midway(case: str, how: Any = fastopt.swap) -> None:
    pair = Swapped(case)
    for missing in [(3,), (), (0,)]:
        pair.step(missing)
    pair.swap(how)
    for missing in [(), (0,), ()]:
        pair.step(missing)
    pair.check()


@pytest.mark.parametrize("case", CASES)
def test_every_class_goes_on_where_torch_left_off(case: str) -> None:
    check_swap_midway(case)


def drops_states(optimizer: Any) -> Any:
    fastopt.swap(optimizer)
    optimizer.state.clear()
    return optimizer


def does_nothing(optimizer: Any) -> Any:
    return optimizer


@pytest.mark.parametrize("wrong", [drops_states, does_nothing])
def test_these_checks_see_a_wrong_swap(wrong: Any) -> None:
    with pytest.raises(AssertionError):
        check_swap_midway("AdamW", wrong)


@pytest.mark.parametrize("case", ONE_EACH)
def test_swapped_before_the_first_step(case: str) -> None:
    pair = Swapped(case)
    pair.swap()
    pair.step((1,))
    pair.step()
    pair.check()


def test_after_the_swap_it_is_our_step_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not torch's, which the same trajectory would hide."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torch's own update ran")

    for scheduled in (False, True):
        pair = Swapped("AdamW")
        pair.step()
        if scheduled:
            kept = lr_scheduler.StepLR(pair.optimizers[1], 1)
        pair.swap()
        with monkeypatch.context() as patched:
            patched.setattr(importlib.import_module("torch.optim.adam"), "adam", fail)
            give_grads(pair.params[1], 5)
            before = pair.params[1][0].detach().clone()
            pair.optimizers[1].step()
            with pytest.raises(AssertionError, match="own update ran"):
                pair.optimizers[0].step()
        assert not torch.equal(pair.params[1][0], before)
    assert kept.optimizer is pair.optimizers[1]


# A scheduler wraps `step` on the instance, and warns when nobody seems to step.


@pytest.mark.parametrize("stepped", [0, 2])
@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
def test_a_scheduler_made_before_keeps_its_hold(case: str, stepped: int) -> None:
    pair = Swapped(case)
    schedulers = [
        lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3),
                lr_scheduler.ExponentialLR(optimizer, 0.5),
            ],
            [3],
        )
        for optimizer in pair.optimizers
    ]
    for _ in range(stepped):
        pair.step()
        for scheduler in schedulers:
            scheduler.step()
    pair.swap()
    for _ in range(4):
        pair.step()
        for scheduler in schedulers:
            scheduler.step()
    pair.check()
    assert schedulers[1].get_last_lr() == schedulers[0].get_last_lr()


def test_a_scheduler_still_warns_when_nobody_steps_after_the_swap() -> None:
    pair = Swapped("AdamW")
    scheduler = lr_scheduler.StepLR(pair.optimizers[1], 1)
    pair.swap()
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_a_scheduler_made_after_the_swap() -> None:
    pair = Swapped("AdamW")
    pair.step()
    pair.swap()
    schedulers = [lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in pair.optimizers]
    for _ in range(3):
        pair.step()
        for scheduler in schedulers:
            scheduler.step()
    pair.check()


def test_hooks_stay() -> None:
    pair = Swapped("AdamW")
    seen: list[str] = []
    pair.optimizers[1].register_step_pre_hook(lambda *a: seen.append("pre"))
    pair.optimizers[1].register_step_post_hook(lambda *a: seen.append("post"))
    pair.optimizers[1].register_state_dict_post_hook(lambda *a: seen.append("state"))
    schedulers = [lr_scheduler.StepLR(optimizer, 5) for optimizer in pair.optimizers]
    pair.swap()
    pair.step()
    for scheduler in schedulers:
        scheduler.step()
    pair.check()
    assert seen == ["pre", "post", "state"]


@pytest.mark.parametrize("fused", [None, True])
def test_a_grad_scaler_goes_on_with_a_swapped_optimizer(fused: bool | None) -> None:
    pair = Swapped("AdamW", fused=fused)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in range(2)]
    for step in range(6):
        for scaler, params, optimizer in zip(scalers, pair.params, pair.optimizers, strict=True):
            scaler.scale(torch.ones(()))
            give_grads(params, step)
            for param in params:
                param.grad.mul_(scaler.get_scale() if step != 4 else float("nan"))
            scaler.step(optimizer)
            scaler.update()
        if step == 1:
            pair.swap()
    pair.check()
    assert scalers[1].get_scale() == scalers[0].get_scale()


def test_references_groups_and_tensors_stay_the_same_objects() -> None:
    pair = Swapped("AdamW")
    pair.step()
    optimizer = pair.optimizers[1]
    group, moment = optimizer.param_groups[0], optimizer.state[pair.params[1][0]]["exp_avg"]
    pair.swap()
    assert optimizer.param_groups[0] is group
    assert optimizer.state[pair.params[1][0]]["exp_avg"] is moment
    pair.step()
    assert optimizer.state[pair.params[1][0]]["exp_avg"] is moment
    pair.check()


def test_a_copy_and_a_checkpoint_of_a_swapped_optimizer() -> None:
    pair = Swapped("NAdam")
    pair.step()
    pair.swap()
    pair.step()
    assert type(copy.deepcopy(pair.optimizers[1])) is fastopt.optim.NAdam
    assert repr(pair.optimizers[1]) == repr(pair.optimizers[0])
    theirs, ours = (copy.deepcopy(optimizer.state_dict()) for optimizer in pair.optimizers)
    pair.optimizers[0].load_state_dict(ours)
    pair.optimizers[1].load_state_dict(theirs)
    pair.step()
    pair.check()


def test_bfloat16_mu_product_survives_the_swap() -> None:
    sides = [make_params(dtype=torch.bfloat16) for _ in range(2)]
    optimizers = [construct(torch, "NAdam", sides[0]), construct(fastopt, "NAdam", sides[1])]
    for params, optimizer in zip(sides, optimizers, strict=True):
        for seed in range(3):
            give_grads(params, seed)
            optimizer.step()
    products = [o.state[p[0]]["mu_product"] for p, o in zip(sides, optimizers, strict=True)]
    fastopt.swap(optimizers[0])
    torch.testing.assert_close(*products, rtol=1e-6, atol=0)
    give_grads(sides[0], 3)
    optimizers[0].step()
    assert optimizers[0].state[sides[0][0]]["mu_product"].dtype is torch.float32


# What swap does not take.


@pytest.mark.parametrize("name", NAMES)
def test_ours_are_returned_as_they_are(name: str) -> None:
    optimizer = getattr(fastopt.optim, name)(make_params())
    assert fastopt.swap(optimizer) is optimizer
    torchs = getattr(torch.optim, name)(make_params())
    assert fastopt.swap(fastopt.swap(torchs)) is torchs


class Derived(torch.optim.AdamW):
    """Its own step may do anything: an inexact match is none."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: Derived(make_params()),
        lambda: torch.optim.LBFGS(make_params()),
        lambda: torch.optim.Rprop(make_params()),
        lambda: torch.optim.SparseAdam(make_params()),
        lambda: torch.ones(2),
        lambda: nn.Linear,
        lambda: torch.optim.AdamW,
        lambda: None,
    ],
)
def test_an_object_without_a_match_is_refused_and_the_matches_listed(make: Any) -> None:
    given = make()
    kind = type(given)
    with pytest.raises(TypeError) as caught:
        fastopt.swap(given)
    assert all(f"torch.optim.{name}" in str(caught.value) for name in NAMES)
    assert kind.__qualname__ in str(caught.value)
    assert type(given) is kind


def wrapped_by_closure(step: Any) -> Any:
    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    return counted


def replaced(step: Any) -> Any:
    return lambda closure=None: None


def partial(step: Any) -> Any:
    return functools.partial(step)


@pytest.mark.parametrize("wrap", [wrapped_by_closure, replaced, partial])
def test_a_step_wrapped_by_others_is_ours_afterwards_or_refused(wrap: Any) -> None:
    """Swapping the class alone would go on running torch's step inside the wrapper."""
    pair = Swapped("AdamW")
    pair.step()
    optimizer = pair.optimizers[1]
    optimizer.step = wrap(optimizer.step)
    with pytest.raises(RuntimeError, match="step is wrapped"):
        fastopt.swap(optimizer)
    assert type(optimizer) is torch.optim.AdamW


def test_a_step_wrapped_by_a_scheduler_and_by_others_is_refused() -> None:
    pair = Swapped("AdamW")
    optimizer = pair.optimizers[1]
    optimizer.step = wrapped_by_closure(optimizer.step)
    with pytest.raises(RuntimeError, match="step is wrapped"):
        fastopt.swap(optimizer)


def test_a_swapped_optimizer_equals_one_made_by_us() -> None:
    """The plan it builds is the same: bit for bit, not only within tolerances."""
    pair = Pair("AdamW").run(3)
    params = make_params()
    optimizer = fastopt.swap(construct(torch, "AdamW", params))
    for seed in (1, 2, 3):
        give_grads(params, seed)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, pair.our_params, strict=True))
