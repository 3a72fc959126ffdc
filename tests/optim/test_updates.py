"""Every optimizer with every option follows torch.optim's trajectory, parameters and states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from tests import oracle

SHAPES = [(41, 37), (300,), (7, 50), (1,)]

COMMON: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"weight_decay": 0.1, "maximize": True},
    {"lr": 0.0, "weight_decay": 0.1},
    {"lr": torch.tensor(0.03, dtype=torch.float64)},
]
BETAS: list[dict[str, Any]] = [
    {"betas": (0.0, 0.0)},
    {"betas": (0.3, 0.6)},
    {"betas": (0.5, 0.9), "weight_decay": 0.1},
    {"betas": (0.0, 0.99)},
    {"betas": (0.95, 0.0)},
    {"eps": 0.0},
    {"eps": 0.1, "maximize": True},
]
AMSGRAD: list[dict[str, Any]] = [
    {"amsgrad": True},
    {"amsgrad": True, "weight_decay": 0.1, "maximize": True, "betas": (0.3, 0.6)},
]
DECOUPLED: list[dict[str, Any]] = [
    {"decoupled_weight_decay": True, "weight_decay": 0.1},
    {"decoupled_weight_decay": True, "weight_decay": 0.1, "maximize": True, "betas": (0.3, 0.6)},
]
OWN: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        {"dampening": 0.3},
    ],
    "Adagrad": [
        {"lr_decay": 0.1},
        {"initial_accumulator_value": 0.5},
        {"initial_accumulator_value": 0.5, "eps": 0.0, "lr_decay": 0.3, "weight_decay": 0.1},
        {"eps": 0.1},
    ],
    "RMSprop": [
        {"momentum": 0.9},
        {"centered": True},
        {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.5, "alpha": 0.3, "weight_decay": 0.1},
        {"alpha": 0.0},
        {"alpha": 0.3, "centered": True, "eps": 1.0},
        {"eps": 0.0},
        {"eps": 0.1, "maximize": True},
    ],
    "Adadelta": [{"rho": 0.0}, {"rho": 0.3}, {"rho": 0.6, "weight_decay": 0.1}, {"eps": 0.1}],
    "Adam": [*BETAS, *AMSGRAD, *DECOUPLED],
    "AdamW": [*BETAS, *AMSGRAD],
    "Adamax": BETAS,
    "NAdam": [
        *BETAS,
        *DECOUPLED,
        {"momentum_decay": 0.0},
        {"momentum_decay": 0.5, "weight_decay": 0.1, "maximize": True},
    ],
    "RAdam": [*BETAS, *DECOUPLED],
}
EACH = [
    pytest.param(name, options, id="-".join([name, *(f"{k}={v}" for k, v in options.items())]))
    for name in oracle.NAMES
    for options in [*COMMON, *OWN[name]]
]


def with_lr(options: dict[str, Any]) -> dict[str, Any]:
    """A learning rate at which the steps, not the rounding of p, make the difference."""
    return {"lr": 0.05} | options


@pytest.mark.parametrize(("name", "options"), EACH)
def test_trajectory_is_that_of_torch(name: str, options: dict[str, Any]) -> None:
    params, grads = oracle.inputs(SHAPES)
    oracle.check(name, with_lr(options), params, grads)


@pytest.mark.parametrize("name", oracle.NAMES)
def test_defaults_are_those_of_torch(name: str) -> None:
    """No keyword at all: a default that differs shows in the trajectory."""
    params, grads = oracle.inputs(SHAPES, seed=1)
    oracle.check(name, {}, params, grads)


def _two_groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [
        {"params": params[:1], "lr": 0.2},
        {"params": params[1:3], "weight_decay": 0.3},
        {"params": params[3:], "maximize": True, "lr": 0.01},
    ]


@pytest.mark.parametrize("name", oracle.NAMES)
def test_groups_keep_their_own_settings_in_one_launch(name: str) -> None:
    params, grads = oracle.inputs(SHAPES, seed=2)
    oracle.check(name, with_lr({}), params, grads, split=_two_groups)


SWITCHES: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"momentum": 0.0}, {"momentum": 0.8, "dampening": 0.5}, {"momentum": 0.0}],
    "RMSprop": [{"alpha": 0.9}, {"alpha": 0.3, "eps": 1e-3}, {"weight_decay": 0.2}],
    "Adam": [{"betas": (0.9, 0.99)}, {"betas": (0.3, 0.6), "weight_decay": 0.3}, {"eps": 0.1}],
    "AdamW": [{"weight_decay": 0.0}, {"weight_decay": 0.3, "maximize": True}, {"lr": 0.5}],
    "NAdam": [{"momentum_decay": 0.1}, {"betas": (0.3, 0.6)}, {"decoupled_weight_decay": True}],
    "Adagrad": [{"lr_decay": 0.5}, {"lr_decay": 0.0, "weight_decay": 0.2}, {"eps": 0.1}],
}


@pytest.mark.parametrize("name", SWITCHES)
def test_settings_changed_between_steps_hold_from_the_next_step(name: str) -> None:
    """What schedulers and users do to `param_groups`, momentum switched on late among it."""

    def edit(optimizer: torch.optim.Optimizer, step: int) -> None:
        if step % 3 == 0:
            optimizer.param_groups[0].update(SWITCHES[name][step // 3])

    params, grads = oracle.inputs(SHAPES, seed=3)
    oracle.check(name, with_lr({}), params, grads, edit=edit)


def test_momentum_switched_off_and_on_finds_its_buffer_again() -> None:
    """torch's first buffer is the bare gradient, every later one is dampened: what counts is
    whether there is a buffer, not how many steps there were."""

    def edit(optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.param_groups[0]["momentum"] = 0.0 if step in (0, 1, 4) else 0.8

    params, grads = oracle.inputs(SHAPES, seed=4, gaps=False)
    oracle.check("SGD", {"lr": 0.05, "dampening": 0.5}, params, grads, edit=edit)


# Teeth: what must be told from a right optimizer.


class _Wrong:
    """torch's own loop, stepped as `how` says."""

    def __init__(self, real: torch.optim.Optimizer, how: Callable[[Any], None]) -> None:
        self.real, self.how = real, how

    @property
    def state(self) -> Any:
        return self.real.state

    def step(self) -> None:
        self.how(self.real)


def _wrong(make: oracle.Make, how: Callable[[Any], None]) -> Any:
    return lambda params: _Wrong(make(params), how)


def _nothing(real: torch.optim.Optimizer) -> None:
    """A no-op that keeps up appearances: the states move, the parameters do not."""
    before = [oracle.plain(p) for p in real.param_groups[0]["params"]]
    real.step()
    with torch.no_grad():
        for param, was in zip(real.param_groups[0]["params"], before, strict=True):
            param.copy_(was)


def _twice(real: torch.optim.Optimizer) -> None:
    real.step()
    real.step()


def _never(real: torch.optim.Optimizer) -> None:
    pass


def _once(real: torch.optim.Optimizer) -> None:
    real.step()


WRONG: dict[str, tuple[dict[str, Any], Callable[[Any], None]]] = {
    "no-op": ({}, _never),
    "no-op with states": ({}, _nothing),
    "without weight decay": ({"weight_decay": 0.0}, _once),
    "wrong sign": ({"maximize": True}, _once),
    "double step": ({}, _twice),
    "another beta": ({"betas": (0.9, 0.9991)}, _once),
    "another eps": ({"eps": 1e-5}, _once),
}


# bfloat16 has a spacing of 2^-8: a beta or an eps that is slightly off is below it.
CANDIDATES = [
    pytest.param(wrong, dtype, id=f"{wrong}-{dtype}")
    for dtype in (torch.float32, torch.bfloat16)
    for wrong in WRONG
    if dtype is torch.float32 or not wrong.startswith("another")
]


@pytest.mark.parametrize("name", ["AdamW", "Adam", "NAdam"])
@pytest.mark.parametrize(("wrong", "dtype"), CANDIDATES)
def test_a_wrong_optimizer_is_rejected(wrong: str, name: str, dtype: torch.dtype) -> None:
    options = {"lr": 0.05, "weight_decay": 0.1}
    change, how = WRONG[wrong]
    real = oracle.torch_loop(name, **(options | change))
    params, grads = oracle.inputs(SHAPES, dtype)
    with pytest.raises(AssertionError):
        oracle.check(name, options, params, grads, ours=_wrong(real, how))


@pytest.mark.parametrize(("name", "other"), [("AdamW", "Adam"), ("Adam", "AdamW")])
def test_coupled_and_decoupled_decay_are_told_apart(name: str, other: str) -> None:
    options = {"lr": 0.05, "weight_decay": 0.1}
    params, grads = oracle.inputs(SHAPES)
    with pytest.raises(AssertionError, match="of parameter 0 after step 1"):
        oracle.check(name, options, params, grads, ours=oracle.fused(other, **options))


@pytest.mark.parametrize("name", oracle.NAMES)
def test_the_oracle_accepts_torch_itself(name: str) -> None:
    """And refuses a step that wrote into a gradient."""
    params, grads = oracle.inputs(SHAPES)
    real = oracle.torch_loop(name)
    oracle.check(name, {}, [p.clone() for p in params], grads, ours=real)

    def spoil(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        if (grad := optimizer.param_groups[0]["params"][0].grad) is not None:
            grad[0, 0] += 1

    with pytest.raises(AssertionError, match="wrote gradient"):
        oracle.check(name, {}, params, grads, ours=_wrong(real, spoil))


def test_every_optimizer_of_the_package_is_tested_here() -> None:
    classes = {n for n in fastopt.optim.__all__ if n[:1].isupper()} - {"FusedOptimizer"}
    assert classes == set(oracle.NAMES)
