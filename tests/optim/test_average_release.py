"""Averages of an optimizer that steps in backward: a backward is a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastopt
from tests.optim.test_averages import DECAY, Oracle, check, everything, same


def make_params() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4)) for _ in range(4)]


def chosen_at(step: int) -> list[int]:
    """Which of three parameters a loss is of: by chance, at least one; the fourth is frozen."""
    chance = torch.rand(3, generator=torch.Generator().manual_seed(step)) < 0.5
    return [k for k in range(3) if chance[k]] or [step % 3]


def plain_loss(params: list[nn.Parameter], step: int) -> torch.Tensor:
    losses = [(params[k] - step % 5).square().sum() for k in chosen_at(step)]
    return torch.stack(losses).sum()


def checkpointed_loss(params: list[nn.Parameter], step: int) -> torch.Tensor:
    """Each parameter in a segment of its own, whose backward is begun within the backward."""
    x = torch.ones(4, requires_grad=True)
    for k in chosen_at(step):
        p = params[k]
        x = checkpoint(lambda y, p=p: y + (p - step % 5).square(), x, use_reentrant=True)
    return x.sum()


AFTER: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda optimizer: None,
    "step": lambda optimizer: optimizer.step(),
    "zero_grad": lambda optimizer: optimizer.zero_grad(),
    "state_dict": lambda optimizer: optimizer.state_dict(),
}


def check_release(make: Callable[..., Any], loss: Callable[..., Any], after: str) -> None:
    params = make_params()
    params[3].requires_grad_(False)
    optimizer = make(params)
    optimizer.release_gradients()
    oracle = Oracle(params)
    for step in range(60):
        with torch.no_grad():
            params[3].add_(0.1)
        loss(params, step).backward()
        oracle.update()
        AFTER[after](optimizer)
        if step % 9 == 0:
            check(optimizer, params, oracle.averages, 1e-6)
    check(optimizer, params, oracle.averages, 1e-6)


# Nothing of a backward by segments is outside of them, so its end must be seen by a later call.
HOW = [
    *((plain_loss, after) for after in AFTER),
    *((checkpointed_loss, after) for after in AFTER if after != "nothing"),
]


@pytest.mark.parametrize(("loss", "after"), HOW)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_all_averages_move_at_each_backward(name: str, loss: Any, after: str) -> None:
    check_release(
        lambda params: getattr(fastopt.optim, name)(params, lr=0.01, ema_decay=DECAY), loss, after
    )


class OnlyTheirOwn(fastopt.optim.SGD):
    """Wrong: an average moves when its own parameter is stepped, and at no other time."""

    def release_gradients(self, *args: Any) -> Any:
        released = super().release_gradients(*args)
        released.averages.end = lambda *_: None
        return released


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError, match="parameter"):
        check_release(
            lambda params: OnlyTheirOwn(params, lr=0.01, ema_decay=DECAY), plain_loss, "nothing"
        )


def test_a_segment_beside_others_is_no_step_of_its_own() -> None:
    """The backward of a segment ends within one that goes on: the averages of what is outside of
    it move once, when the whole ends."""
    params = make_params()
    optimizer = fastopt.optim.SGD(params, lr=0.01, ema_decay=DECAY)
    optimizer.release_gradients()
    oracle = Oracle(params)
    for step in range(20):
        x = params[0] * 2.0
        for p in params[1 : 2 + step % 2]:
            x = checkpoint(lambda y, p=p: y * p, x, use_reentrant=True)
        (x + params[3]).square().sum().backward()
        oracle.update()
        assert all(p.grad is None for p in params)
    check(optimizer, params, oracle.averages, 1e-6)


def test_a_backward_that_fails_is_over_when_the_next_begins() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError

    params = make_params()
    optimizer = fastopt.optim.SGD(params, lr=0.01, ema_decay=DECAY)
    optimizer.release_gradients()
    oracle = Oracle(params)
    for step in range(6):
        early = params[0].square().sum()
        late = params[1].square()
        if step in (1, 4):
            with pytest.raises(ArithmeticError):
                # The engine goes from the latest node to the earliest.
                (Fails.apply(late).sum() + params[0].square().sum()).backward()
        else:
            (early + late.sum()).backward()
        oracle.update()
    check(optimizer, params, oracle.averages, 1e-6)


def test_a_backward_that_would_step_inside_averaged_is_refused() -> None:
    params = make_params()
    optimizer = fastopt.optim.AdamW(params, lr=0.01, ema_decay=DECAY)
    optimizer.release_gradients()
    plain_loss(params, 0).backward()
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=r"inside averaged\(\)"), optimizer.averaged():
        plain_loss(params, 1).backward()
    assert same(everything(optimizer), before)
    assert all(p.grad is None for p in params)
    plain_loss(params, 1).backward()
    assert not same(everything(optimizer), before)


def test_gradients_that_stay_again_leave_averages_to_step() -> None:
    params = make_params()
    optimizer = fastopt.optim.SGD(params, lr=0.01, ema_decay=DECAY)
    handle = optimizer.release_gradients()
    oracle = Oracle(params)
    for step in range(10):
        plain_loss(params, step).backward()
        if step == 5:
            handle.remove()
        if step > 5:
            optimizer.step()
            optimizer.zero_grad()
        oracle.update()
    check(optimizer, params, oracle.averages, 1e-6)
