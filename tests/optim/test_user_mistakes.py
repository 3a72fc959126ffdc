"""Mistakes in an optimizer of a user's own, each told where it is made and before anything is
written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastopt.optim import FusedOptimizer


def step_with(rule: Any, scalars: Any, **names: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """One step of lr 0.1 from ones, with a gradient of ones; what is left where it raises."""
    p = torch.ones(3)
    p.grad = torch.ones(3)
    state: dict[str, Any] = {}
    try:
        optimizer = type("Mine", (FusedOptimizer,), {"rule": rule, "scalars": scalars, **names})(
            [p], {"lr": 0.1}
        )
        state = optimizer.state
        optimizer.step()
    except Exception:
        assert torch.equal(p, torch.ones(3))
        assert not any(state.values())
        raise
    return p, state


def refused(rule: Any, scalars: Any, **names: Any) -> str:
    with pytest.raises((TypeError, KeyError)) as caught:
        step_with(rule, scalars, **names)
    return str(caught.value)


def just_lr(step: float, lr: float) -> tuple[float, ...]:
    return (lr,)


def test_a_rule_that_closes_over_a_variable() -> None:
    factor = 0.5

    def rule(p: float, g: float, lr: float) -> tuple[float, ...]:
        return (p - factor * lr * g,)

    message = refused(rule, just_lr)
    assert "factor" in message
    assert "argument" in message


def test_a_rule_that_is_no_plain_function() -> None:
    class Callable:
        def __call__(self, p: float, g: float, lr: float) -> tuple[float, ...]:
            return (p - lr * g,)

    assert "plain Python function" in refused(Callable(), just_lr)


def too_few(p: float, g: float) -> tuple[float, ...]:
    return (p - g,)


def two_states(p: float, g: float, m: float, lr: float) -> tuple[float, ...]:
    return p - lr * m, m


def test_a_rule_with_too_few_arguments() -> None:
    message = refused(too_few, just_lr)
    assert "too_few" in message
    assert "scalar" in message


def test_a_rule_whose_states_and_scalars_do_not_add_up() -> None:
    """One scalar more, or one less, than the scalars function returns: a compiler's type error
    would say nothing of where."""
    message = refused(two_states, just_lr)
    assert "two_states" in message


def three_results(p: float, g: float, lr: float) -> tuple[float, ...]:
    return p - lr * g, g, lr


def test_a_rule_that_returns_too_many_or_too_few_values() -> None:
    assert "three_results" in refused(three_results, just_lr)

    def forgets(p: float, g: float, m: float, lr: float) -> tuple[float, ...]:
        return (p - lr * m,)

    assert "forgets" in refused(forgets, just_lr, state_names=("m",))


def needs_eps(step: float, lr: float, eps: float) -> tuple[float, ...]:
    return (lr + eps,)


def plain_sgd(p: float, g: float, lr: float) -> tuple[float, ...]:
    return (p - lr * g,)


def test_a_hyper_parameter_the_groups_do_not_have() -> None:
    message = refused(plain_sgd, needs_eps)
    assert "eps" in message
    assert "needs_eps" in message


def no_step(lr: float) -> tuple[float, ...]:
    return (lr,)


def test_scalars_that_do_not_begin_with_the_step() -> None:
    assert "step" in refused(plain_sgd, no_step)


HALF = 0.5


def with_literal(p: float, g: float, lr: float) -> tuple[float, ...]:
    return (p - 2.0 * lr * g,)


def with_constant(p: float, g: float, lr: float) -> tuple[float, ...]:
    return (p - HALF * lr * g,)


def with_module(p: float, g: float, lr: float) -> tuple[float, ...]:
    return (p - lr * g * math.pi,)


def with_builtin(p: float, g: float, lr: float) -> tuple[float, ...]:
    return (p - lr * abs(g),)


@pytest.mark.parametrize("rule", [with_literal, with_constant, with_module, with_builtin])
def test_a_rule_that_uses_more_than_its_arguments_and_xp(rule: Any) -> None:
    """A number would be a double, and one from outside could change behind a kept kernel."""
    message = refused(rule, just_lr)
    assert rule.__name__ in message
    assert any(name in message for name in ("2.0", "HALF", "math", "abs"))


def calls_torch(p: float, g: float, lr: float) -> tuple[float, ...]:
    return (p - lr * torch.sign(g),)


def test_a_rule_the_compiler_cannot_take_is_named() -> None:
    with pytest.raises(Exception, match="calls_torch"):
        step_with(calls_torch, just_lr)


def test_a_class_without_a_rule_says_so() -> None:
    class Empty(FusedOptimizer):
        pass

    p = torch.ones(3)
    p.grad = torch.ones(3)
    with pytest.raises((TypeError, NotImplementedError, AttributeError), match=r"rule|_update"):
        Empty([p], {"lr": 0.1}).step()


def test_a_rule_without_a_mistake() -> None:
    """What the others here fall short of."""
    p, state = step_with(plain_sgd, just_lr)
    torch.testing.assert_close(p, torch.full((3,), 0.9))
    assert [float(entry["step"]) for entry in state.values()] == [1.0]


def test_these_checks_see_a_mistake_that_is_not_refused() -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refused(plain_sgd, just_lr)
