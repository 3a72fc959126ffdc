"""torch.amp.GradScaler: it unscales before the step, or, with fused=True, leaves grad_scale and
found_inf to the step. A step it skips leaves every bit and is not counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import fastopt
from tests.optim.pairs import (
    ONE_EACH,
    Pair,
    assert_params_close,
    assert_states_close,
    construct,
    give_grads,
    make_params,
)

FUSED = ["SGD", "SGD-momentum", "SGD-nesterov", "Adagrad", "Adam", "AdamW-amsgrad"]


def scaler(scale: float = 1024.0) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)


def give_scaled(params: Sequence[Any], seed: int, scale: Any, overflow: bool) -> None:
    """Gradients as a scaled loss leaves them."""
    give_grads(params, seed)
    for param in params:
        param.grad.mul_(scale)
    if overflow:
        params[-1].grad.fill_(float("inf"))


def snapshot(optimizer: Any, params: Sequence[Any]) -> list[bytes]:
    """Every bit of the parameters and of the states, by name."""
    states = optimizer.state_dict()["state"]
    tensors = [*params, *(states[k][name] for k in sorted(states) for name in sorted(states[k]))]
    return [
        t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for t in tensors
    ]


def train(
    package: Any,
    case: str,
    fused: bool | None,
    overflows: Sequence[int] = (),
    scale: float = 1024.0,
) -> tuple[list[Any], dict[str, Any], float]:
    params = make_params()
    more = {} if fused is None else {"fused": fused}
    optimizer = construct(package, case, params, **more)
    amp = scaler(scale)
    amp.scale(torch.ones(()))
    seed = 0
    for step in range(7):
        overflow = step in overflows
        give_scaled(params, 99 if overflow else seed, amp.get_scale(), overflow)
        amp.step(optimizer)
        amp.update()
        seed += not overflow
        assert not hasattr(optimizer, "found_inf")
        assert not hasattr(optimizer, "grad_scale")
    return params, optimizer.state_dict(), amp.get_scale()


def check_scaled(case: str, fused: bool | None, ours: Any = fastopt) -> None:
    """torch's trajectory without any scaler, over the steps that are not skipped; torch's own
    scaled one gives the same scale (1000 is no power of two: unscaling rounds)."""
    for scale in (1024.0, 1000.0):
        params, state, last = train(ours, case, fused, (2, 5), scale)
        expected, expected_state, expected_last = train(torch, case, None, (2, 5), scale)
        assert last == expected_last
        assert_params_close(params, expected)
        for group in (*state["param_groups"], *expected_state["param_groups"]):
            group.pop("fused", None)
        assert_states_close(state, expected_state)
        steps = [s["step"] for s in state["state"].values() if "step" in s]
        assert all(float(step) == 5.0 for step in steps)


@pytest.mark.parametrize("case", ONE_EACH)
def test_the_scaler_unscales_before_a_step_that_is_not_fused(case: str) -> None:
    check_scaled(case, None)


@pytest.mark.parametrize("case", FUSED)
def test_a_fused_step_unscales_and_skips_by_itself(case: str) -> None:
    check_scaled(case, True)


class SkipsNothing(fastopt.optim.Adam):
    """Wrong: takes a skipped step."""

    def step(self, closure: Any = None) -> Any:
        if hasattr(self, "found_inf"):
            self.found_inf.zero_()
        return super().step(closure)


class CountsSkipped(fastopt.optim.Adam):
    """Wrong: counts a skipped step."""

    def step(self, closure: Any = None) -> Any:
        skipped = bool(getattr(self, "found_inf", 0.0))
        super().step(closure)
        for state in self.state.values():
            state["step"] += skipped


class Unscaled(fastopt.optim.Adam):
    """Wrong: ignores the scale."""

    def step(self, closure: Any = None) -> Any:
        if hasattr(self, "grad_scale"):
            self.grad_scale.fill_(1.0)
        return super().step(closure)


@pytest.mark.parametrize("wrong", [SkipsNothing, CountsSkipped, Unscaled])
def test_these_checks_see_a_wrong_optimizer(wrong: type) -> None:
    with pytest.raises(AssertionError):
        check_scaled("Adam", True, wrong)


@pytest.mark.parametrize("case", FUSED)
def test_fused_follows_torchs_fused_without_overflows(case: str) -> None:
    params, state, scale = train(fastopt, case, True)
    expected, expected_state, expected_scale = train(torch, case, True)
    assert scale == expected_scale
    assert_params_close(params, expected)
    assert_states_close(state, expected_state)


@pytest.mark.parametrize("case", [*ONE_EACH, *FUSED])
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_leaves_every_bit(case: str, first: bool) -> None:
    for fused in (None, True) if case in FUSED else (None,):
        pair = Pair(case, **({"fused": fused} if fused else {}))
        amp = scaler()
        amp.scale(torch.ones(()))
        if not first:
            pair.run(2)
        before = snapshot(pair.ours, pair.our_params)
        give_scaled(pair.our_params, 5, 1024.0, overflow=True)
        amp.step(pair.ours)
        amp.update()
        after = snapshot(pair.ours, pair.our_params)
        # A first step may have made the states, as torch's does.
        assert after[: len(pair.our_params)] == before[: len(pair.our_params)]
        if not first:
            assert after == before
        pair.run(2)
        assert_params_close(pair.our_params, pair.their_params)


def test_a_first_step_skipped_is_not_the_first_step_of_a_momentum_buffer() -> None:
    """The first momentum_buffer is the gradient, undamped: a skipped step must not use that up.
    (torch's fused SGD leaves an uninitialized buffer behind.)"""
    for skipped in [(0,), (0, 1, 3)]:
        params, _, _ = train(fastopt, "SGD-momentum", True, skipped)
        expected, _, _ = train(torch, "SGD-momentum", None, skipped)
        assert_params_close(params, expected)


@pytest.mark.parametrize("fused", [None, True])
def test_clipping_between_unscale_and_step(fused: bool | None) -> None:
    """After scaler.unscale_ a fused step gets no grad_scale, and must not unscale again."""
    sides = []
    for package in (torch, fastopt):
        params = make_params()
        optimizer = construct(package, "AdamW", params, fused=fused)
        amp = scaler()
        amp.scale(torch.ones(()))
        for step in range(4):
            give_scaled(params, step, amp.get_scale(), overflow=step == 2)
            amp.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 0.5)
            amp.step(optimizer)
            amp.update()
        sides.append((params, optimizer.state_dict()))
    (theirs, their_state), (ours, our_state) = sides
    assert_params_close(ours, theirs)
    assert_states_close(our_state, their_state)


def test_what_unscaling_inside_the_step_leaves_in_the_gradients() -> None:
    """torch's fused step writes the unscaled gradient back; ours leaves it as it was."""
    pair = Pair("AdamW", fused=True)
    amp = scaler()
    amp.scale(torch.ones(()))
    give_scaled(pair.our_params, 1, 1024.0, overflow=False)
    before = [param.grad.clone() for param in pair.our_params]
    amp.step(pair.ours)
    assert all(torch.equal(p.grad, g) for p, g in zip(pair.our_params, before, strict=True))


@pytest.mark.parametrize("fused", [None, True])
def test_two_optimizers_of_one_scaler_skip_each_by_itself(fused: bool | None) -> None:
    sides = []
    for package in (torch, fastopt):
        params = [make_params(seed=seed) for seed in (0, 1)]
        optimizers = [construct(package, "AdamW", p, fused=fused) for p in params]
        amp = scaler()
        amp.scale(torch.ones(()))
        for step in range(4):
            for k, (optimizer, mine) in enumerate(zip(optimizers, params, strict=True)):
                give_scaled(mine, step + 10 * k, amp.get_scale(), overflow=step == 1 + k)
                amp.step(optimizer)
            amp.update()
        sides.append([*params[0], *params[1]])
    assert_params_close(sides[1], sides[0])


def test_maximize_inside_a_fused_step() -> None:
    """The sign of maximize and the scale are one factor of the gradient."""
    params, _, _ = train(fastopt, "Adam", None)
    twin = make_params()
    optimizer = construct(fastopt, "Adam", twin, fused=True, maximize=True)
    amp = scaler()
    amp.scale(torch.ones(()))
    for seed in range(7):
        give_scaled(twin, seed, -amp.get_scale(), overflow=False)
        amp.step(optimizer)
        amp.update()
    assert_params_close(twin, params)


def test_autocast_training_with_a_scaler_follows_torch() -> None:
    def losses(package: Any, fused: bool | None) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        x, y = torch.randn(32, 8), torch.randn(32, 1)
        optimizer = construct(package, "AdamW", model.parameters(), fused=fused)
        amp, history = scaler(), []
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = torch.nn.functional.mse_loss(model(x), y)
            amp.scale(loss).backward()
            amp.step(optimizer)
            amp.update()
            history.append(loss.item())
        return history

    for fused in (None, True):
        ours, theirs = losses(fastopt, fused), losses(torch, None)
        # bfloat16 activations: one rounding that falls the other way is 2^-8 of a value.
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-8)
        assert ours[-1] < 0.9 * ours[0]
