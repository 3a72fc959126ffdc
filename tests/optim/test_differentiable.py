"""differentiable=True: the step is part of the graph, as torch's is.

torch's own graph serves as the oracle for one step from given states (over several of its steps
some classes overwrite what backward needs); over several steps difference quotients do.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from tests.optim.pairs import (
    CASES,
    ONE_EACH,
    SHAPES,
    Pair,
    assert_params_close,
    assert_states_close,
    construct,
    give_grads,
    make_params,
)

SIZE = 5
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def draw(generator: torch.Generator, positive: bool = False) -> Tensor:
    x = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return (x.square() + 0.5 if positive else x).requires_grad_()


def one_step(package: Any, case: str, **more: Any) -> dict[str, Tensor]:
    """The tenth step from random states: its results, and their derivatives by all that went in,
    tensor hyper-parameters too."""
    generator = torch.Generator().manual_seed(0)
    inputs = {"p": draw(generator), "g": draw(generator)}
    p = inputs["p"].clone()
    template = construct(fastopt, case, [torch.ones(SIZE, dtype=torch.float64)])
    template.param_groups[0]["params"][0].grad = torch.ones(SIZE, dtype=torch.float64)
    template.step()
    states = next(iter(template.state.values()), {})
    optimizer = construct(package, case, [p], differentiable=True, **more)
    for name, value in states.items():
        if value.dim():
            positive = any(word in name for word in ("sq", "square", "sum", "inf", "delta"))
            inputs[name] = draw(generator, positive)
            optimizer.state[p][name] = inputs[name].clone()
        else:
            optimizer.state[p][name] = torch.tensor(9.0 if name == "step" else 0.4).double()
    if "grad_avg" in inputs:  # the variance is positive
        optimizer.state[p]["grad_avg"] = inputs["grad_avg"].tanh() / 2
    for name, value in more.items():
        tensors = value if isinstance(value, tuple) else (value,)
        inputs.update({f"{name} {k}": t for k, t in enumerate(tensors) if isinstance(t, Tensor)})
    p.grad = inputs["g"]
    optimizer.step()
    results = {"new p": p, **{k: v for k, v in optimizer.state[p].items() if k in inputs}}
    weights = [draw(generator).detach() for _ in results]
    total = sum((w * x).sum() for w, x in zip(weights, results.values(), strict=True))
    grads = torch.autograd.grad(total, list(inputs.values()))
    derivatives = {f"d/d {k}": x for k, x in zip(inputs, grads, strict=True)}
    return {k: x.detach() for k, x in (results | derivatives).items()}


def check_derivatives(case: str, ours: Any = fastopt, **more: Any) -> None:
    theirs, mine = one_step(torch, case, **more), one_step(ours, case, **more)
    assert list(mine) == list(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(
            mine[name], expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert bool(expected.abs().max() > 1e-9), name


@pytest.mark.parametrize("case", CASES)
def test_gradients_flow_through_a_step_as_with_torch(case: str) -> None:
    check_derivatives(case)


@pytest.mark.parametrize("case", ["SGD-nesterov", "AdamW", "RMSprop-both", "RAdam"])
def test_with_maximize(case: str) -> None:
    check_derivatives(case, maximize=True)


def rate(value: float = 0.02) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("case", ["SGD", "SGD-momentum", "SGD-nesterov", "Adam", "AdamW"])
def test_gradients_flow_to_a_tensor_learning_rate_as_with_torch(case: str) -> None:
    check_derivatives(case, lr=rate())


@pytest.mark.parametrize("case", ["Adam", "AdamW-amsgrad"])
def test_gradients_flow_to_tensor_betas_as_with_torch(case: str) -> None:
    check_derivatives(case, betas=(rate(0.8), rate(0.9)))


class Detached(fastopt.optim.Adam):
    """Wrong: the gradient enters the step as a constant."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = param.grad.detach() + 0 * param.grad
        return super().step(closure)


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError, match="d/d g"):
        check_derivatives("Adam", Detached)


# Several steps.


def unroll(case: str, p: Tensor, grads: Tensor, lr: Any, differentiable: bool = True) -> Tensor:
    """Three steps from fresh states; a loss of where they end."""
    p = p.clone()
    optimizer = construct(fastopt, case, [p], lr=lr, differentiable=differentiable)
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return (p * torch.arange(1.0, SIZE + 1, dtype=torch.float64)).sum()


@pytest.mark.parametrize("case", CASES)
def test_gradients_flow_through_several_steps(case: str) -> None:
    """By the initial parameter, every gradient and the learning rate, against difference
    quotients of the plain kernel in float64."""
    generator = torch.Generator().manual_seed(1)
    p = draw(generator)
    grads = torch.stack([draw(generator) for _ in range(3)]).detach()
    grads = (grads.sign() * (grads.abs() + 0.2)).requires_grad_()
    lr = rate()
    loss = unroll(case, p, grads, lr)
    by_p, by_grads, by_lr = torch.autograd.grad(loss, [p, grads, lr])
    with torch.no_grad():
        plain = [x.detach().clone() for x in (p, grads, lr)]
        directions = [torch.randn(x.shape, generator=generator).double() for x in plain]
        for k, derivative in enumerate((by_p, by_grads, by_lr)):
            ends = []
            for sign in (1, -1):
                moved = list(plain)
                moved[k] = plain[k] + sign * 1e-5 * directions[k]
                ends.append(unroll(case, *moved, differentiable=False))
            torch.testing.assert_close(
                (derivative * directions[k]).sum(),
                (ends[0] - ends[1]) / 2e-5,
                rtol=1e-6,
                atol=1e-7,
            )
            assert bool(derivative.abs().max() > 1e-6)


def test_a_learned_learning_rate_learns() -> None:
    """Meta-learning, in small: descend on the rate through three steps on a quadratic."""
    lr = torch.tensor(0.01, requires_grad=True)
    losses = []
    for _ in range(20):
        p = torch.ones(4).requires_grad_() * 1.0
        optimizer = fastopt.optim.SGD([p], lr=lr, differentiable=True)
        for _ in range(3):
            p.grad = p * torch.tensor([1.0, 2.0, 3.0, 4.0])
            optimizer.step()
        loss = p.square().sum()
        losses.append(loss.item())
        (by_lr,) = torch.autograd.grad(loss, [lr])
        with torch.no_grad():
            lr -= 0.002 * by_lr
    assert losses[-1] < 0.1 * losses[0]


# The same values as a plain step, and torch's refusals.


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_differentiable_step_is_the_plain_one_in_value(case: str) -> None:
    """Parameters that require no gradient may be leaves; states and step counts alike too, and a
    run may go on without the flag."""
    sides = []
    for differentiable in (False, True):
        params = [param.detach().clone() for param in make_params()]
        optimizer = construct(fastopt, case, params, differentiable=differentiable)
        for seed in range(4):
            give_grads(params, seed, missing=(1,) if seed == 1 else ())
            optimizer.step()
            if seed == 2:
                optimizer.param_groups[0]["differentiable"] = False
        state = copy.deepcopy(optimizer.state_dict())
        sides.append((params, state))
    (plain, plain_state), (params, state) = sides
    assert_params_close(params, plain)
    assert_states_close(state, plain_state)


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
def test_a_leaf_that_requires_grad_is_refused_as_by_torch(case: str) -> None:
    for package in (torch, fastopt):
        params = make_params(SHAPES)
        optimizer = construct(package, case, params, differentiable=True)
        for param in params:
            param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            optimizer.step()
    assert_params_close(params, make_params(SHAPES))
    pair = Pair(case)
    for param, other in zip(params, pair.our_params, strict=True):
        assert torch.equal(param, other)


def test_bfloat16_parameters_in_the_graph() -> None:
    p = torch.ones(4, dtype=torch.bfloat16).requires_grad_()
    moved = p.clone()
    g = torch.full((4,), 0.5, dtype=torch.bfloat16).requires_grad_()
    optimizer = fastopt.optim.SGD([moved], lr=0.25, differentiable=True)
    moved.grad = g
    optimizer.step()
    by_p, by_g = torch.autograd.grad(moved.sum(), [p, g])
    assert moved.dtype is torch.bfloat16
    torch.testing.assert_close(by_p, torch.ones_like(by_p))
    torch.testing.assert_close(by_g, torch.full_like(by_g, -0.25))
