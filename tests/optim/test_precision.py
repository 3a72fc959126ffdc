"""Every dtype, and mixtures of them: never less precise than torch, and rounded once a step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from tests import oracle

SHAPES = [(29, 31), (300,), (17,), (1,)]
DTYPES = [
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
]
LOW = [torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adagrad": {"initial_accumulator_value": 0.125},
    "RMSprop": {"momentum": 0.9},
    "Adadelta": {},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {"betas": (0.5, 0.9)},
}


def settings(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """In float16 an eps below 6e-8 is 0 to torch's loop, and a small square as well: where torch
    divides by 0 there is nothing to compare with."""
    eps = {"eps": 1e-4} if dtype is torch.float16 and name != "SGD" else {}
    return {"lr": 0.05, "weight_decay": 0.1} | OPTIONS[name] | eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", oracle.NAMES)
def test_trajectory_is_that_of_torch_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    decades = 1 if dtype is torch.float16 else 4
    params, grads = oracle.inputs(SHAPES, dtype, decades=decades)
    # torch keeps NAdam's mu_product in the default dtype: no measure for float64 otherwise.
    numbers = torch.float64 if dtype.to_real() is torch.float64 else torch.float32
    with oracle.default_dtype(numbers):
        oracle.check(name, settings(name, dtype), params, grads)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16], ids=str)
def test_options_of_adamw_in_other_dtypes(dtype: torch.dtype, options: dict[str, Any]) -> None:
    params, grads = oracle.inputs(SHAPES, dtype, seed=1)
    oracle.check("AdamW", {"lr": 0.05} | options, params, grads)


@pytest.mark.parametrize("name", oracle.NAMES)
def test_dtypes_mixed_in_one_optimizer(name: str) -> None:
    """Every dtype twice, in turns: each is stepped in its own, in the right order."""
    kinds = [torch.float32, *DTYPES, *DTYPES, torch.float32]
    params, grads = [], []
    for k, dtype in enumerate(kinds):
        some, theirs = oracle.inputs([(19, 23)], dtype, seed=k, gaps=False)
        params += some
        grads.append(theirs)
    rows: list[list[Any]] = [[g[step][0] for g in grads] for step in range(oracle.STEPS)]
    for step in (2, 3):
        rows[step][3] = rows[step][7] = None
        rows[step][8] = rows[step][0] = oracle.FROZEN
    oracle.check(name, settings(name, torch.float16), params, rows)


# Gradients of another dtype than their parameter's. torch's loop takes them for some optimizers
# only; where it does not, it is given what a user would give it: gradients cast by hand. (Its SGD
# gives momentum_buffer the gradient's dtype until a checkpoint is loaded, ours the parameter's.)
PAIRS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-grad-{pair[1]}")
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_gradients_of_another_dtype(name: str, pair: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, grad_dtype = pair
    params, _ = oracle.inputs(SHAPES, dtype)
    _, grads = oracle.inputs(SHAPES, grad_dtype, decades=1)
    options = {"momentum": 0.9} if name == "SGD" else {}
    oracle.check(name, {"lr": 0.05} | options, params, grads, grads_as_params=True)


TAKEN = [*(("SGD", pair) for pair in PAIRS), ("Adagrad", PAIRS[0]), ("RMSprop", PAIRS[0])]


@pytest.mark.parametrize(("name", "pair"), TAKEN, ids=str)
def test_gradients_of_another_dtype_that_torch_takes_too(
    name: str, pair: tuple[torch.dtype, torch.dtype]
) -> None:
    """No cast by hand where torch needs none."""
    params, _ = oracle.inputs(SHAPES, pair[0])
    _, grads = oracle.inputs(SHAPES, pair[1], decades=1)
    oracle.check(name, {"lr": 0.05, "weight_decay": 0.1}, params, grads)


def test_gradient_dtype_may_change_between_steps() -> None:
    params, _ = oracle.inputs(SHAPES)
    grads: list[list[Any]] = []
    for step in range(oracle.STEPS):
        dtype = (torch.float32, torch.bfloat16, torch.bfloat16)[step % 3]
        grads += oracle.inputs(SHAPES, dtype, steps=1, seed=step, decades=1, gaps=False)[1]
    oracle.check("AdamW", {"lr": 0.05}, params, grads, grads_as_params=True)


# Rounded once a step.


def _one_step(name: str, options: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    """Ours and float64 after one step from one start, on 20,000 elements."""
    params, grads = oracle.inputs([(20_000,)], dtype, steps=1, decades=1, gaps=False, seed=5)
    right = oracle.exact(oracle.torch_loop(name, **options), params, grads)[-1]
    ours = oracle.run(oracle.fused(name, **options), params, grads, states_from=0)[-1]
    return ours, right


def _assert_nearest(what: str, x: Tensor, right: Tensor) -> None:
    """Half a spacing of x's dtype from float64, and what float32 arithmetic leaves open: four of
    its roundings of the largest value."""
    facts = torch.finfo(x.dtype)
    binade = 2.0 ** torch.floor(torch.log2(right.abs().clamp(min=facts.smallest_normal)))
    half = binade * facts.eps / 2
    noise = 4 * torch.finfo(torch.float32).eps * float(right.abs().max())
    beyond = (x.double() - right).abs() - half - noise
    at = int(beyond.argmax())
    assert float(beyond[at]) <= 0, f"{what}: {x[at]} is not nearest to {right[at]} at {at}"


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", oracle.NAMES)
def test_low_precision_is_rounded_to_nearest_once(name: str, dtype: torch.dtype) -> None:
    """The arithmetic is in float32, and nothing in between is rounded to the parameter's dtype.
    (torch's loop rounds after every operation.)"""
    ours, right = _one_step(name, settings(name, dtype), dtype)
    for key, value in ours.items():
        if value.numel() > 1:
            _assert_nearest(f"{name} {key[1]}", value, right[key])


def test_truncation_and_double_rounding_would_be_noticed() -> None:
    """Teeth: the right value cut off instead of rounded, and torch's own loop."""
    _, right = _one_step("AdamW", {"lr": 0.05}, torch.bfloat16)
    bits = right[0, "param"].float().view(torch.int32).bitwise_and(-65536)
    cut = bits.view(torch.float32).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="not nearest"):
        _assert_nearest("cut", cut, right[0, "param"])

    params, grads = oracle.inputs([(20_000,)], torch.bfloat16, steps=1, gaps=False, seed=5)
    theirs = oracle.run(oracle.torch_loop("AdamW", lr=0.05), params, grads)[-1]
    with pytest.raises(AssertionError, match="not nearest"):
        _assert_nearest("torch", theirs[0, "param"], right[0, "param"])


def test_rounding_takes_a_tie_to_even() -> None:
    """bfloat16: 1 + 2^-8 lies halfway and goes down to even, 1 + 3 2^-8 goes up to it."""
    ties = torch.tensor([-(2.0**-8), -3 * 2.0**-8, 2.0**-9, 3 * 2.0**-9], dtype=torch.bfloat16)
    param = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    param.grad = ties
    fastopt.optim.SGD([param], lr=1.0).step()
    assert param.tolist() == [1.0, 1.0 + 2.0**-6, 1.0, 1.0 - 2.0**-7]


# What other libraries got wrong.


@pytest.mark.parametrize("name", [n for n in oracle.NAMES if n != "SGD"])
def test_float16_with_a_zero_gradient_is_no_nan(name: str) -> None:
    """eps = 1e-8 is 0 in float16, so torch's loop divides 0 by 0; ours divides in float32."""
    param = torch.full((70,), 0.5, dtype=torch.float16, requires_grad=True)
    optimizer = getattr(fastopt.optim, name)([param], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert param.tolist() == [0.5] * 70
    for value in optimizer.state[param].values():
        assert bool(torch.isfinite(value).all())


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "Adagrad"])
def test_steps_of_a_bfloat16_model_are_counted_beyond_256(name: str) -> None:
    """256 + 1 is 256 in bfloat16: a count kept in the parameter's dtype would stick."""
    param = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    optimizer = getattr(fastopt.optim, name)([param])
    param.grad = torch.ones_like(param)
    for _ in range(259):
        optimizer.step()
    step = optimizer.state[param]["step"]
    assert (step.item(), step.dtype) == (259.0, torch.float32)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "NAdam", "RAdam"])
def test_bias_correction_is_exact_early_and_late(name: str) -> None:
    """beta ** step in float32, or as a running product, is off by 1e-5 within ten steps: the step
    is so large here that it shows in the parameter."""
    start, grads = oracle.inputs([(2000,)], steps=20, decades=1, gaps=False)
    oracle.check(name, {"lr": 1e3}, [start[0] * 1e-6], grads)

    def late(optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == 3:
            for state in optimizer.state.values():
                state["step"] += 1996

    oracle.check(name, {"lr": 1e3}, [start[0] * 1e-6], grads, edit=late)


def test_a_running_power_of_beta_would_be_noticed() -> None:
    """Teeth: Adam with betas to the power of a step in float32 is refused."""

    def drift(params: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(params, lr=1e3, foreach=False)

        def scaled(optimizer: Any, *_: Any) -> None:
            step = 1 + (optimizer.state[params[0]].get("step", torch.tensor(0.0))).item()
            power = torch.tensor(0.999) ** step
            factor = math.sqrt((1 - power.item()) / (1 - 0.999**step))
            optimizer.param_groups[0]["lr"] = 1e3 * factor

        optimizer.register_step_pre_hook(scaled)
        return optimizer

    start, grads = oracle.inputs([(2000,)], steps=20, decades=1, gaps=False)
    with pytest.raises(AssertionError, match="param of parameter 0"):
        oracle.check("Adam", {"lr": 1e3}, [start[0] * 1e-6], grads, ours=drift)


def test_rmsprop_adds_eps_outside_the_root() -> None:
    """With a gradient much smaller than eps the place of eps is the whole update."""
    params, grads = oracle.inputs([(500,)], scale=1e-6, decades=1, gaps=False)
    oracle.check("RMSprop", {"eps": 1e-3, "lr": 1e3}, params, grads)


def test_weight_decay_alone_moves_float32_parameters_all_the_way() -> None:
    """2000 steps of a zero gradient at lr 1e-3 and decay 0.1 leave 0.819 of a parameter."""
    param = torch.ones(5, requires_grad=True)
    optimizer = fastopt.optim.AdamW([param], lr=1e-3, weight_decay=0.1)
    param.grad = torch.zeros_like(param)
    for _ in range(2000):
        optimizer.step()
    right = torch.full((5,), (1 - 1e-4) ** 2000)
    torch.testing.assert_close(param.detach(), right, rtol=2000 * 2.0**-24, atol=0)
