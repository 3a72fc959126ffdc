"""What every torch.optim.Optimizer promises, held by each of ours: construction, closures,
gradients that are missing, copies."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from typing import Any

import pytest
import torch

import fastopt
from tests.optim.pairs import (
    CASES,
    NAMES,
    ONE_EACH,
    SHAPES,
    Pair,
    assert_states_close,
    construct,
    give_grads,
    make_params,
)


def check_unequal_steps(case: str, ours: type | None = None) -> None:
    """Parameters freeze, thaw and join late: each has a step count of its own."""
    pair = Pair(case, ours=ours)
    for missing in [(3,), (3,), (0, 3), (0,), (), (1, 2), (), (0, 1, 2, 3), ()]:
        pair.step(missing)
    pair.check()


@pytest.mark.parametrize("case", CASES)
def test_missing_gradients_leave_a_parameter_and_its_step_count_alone(case: str) -> None:
    check_unequal_steps(case)


class CountsTogether(fastopt.optim.Adam):
    """Wrong: one step count for the whole optimizer."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        states = list(self.state.values())
        for state in states:
            state["step"] = max(other["step"] for other in states).clone()
        return result


class StepsMissing(fastopt.optim.SGD):
    """Wrong: a parameter without a gradient gets one of zeros."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
        return super().step(closure)


class Idle(fastopt.optim.AdamW):
    """Wrong: does nothing."""

    def step(self, closure: Any = None) -> Any:
        return closure() if closure is not None else None


@pytest.mark.parametrize(
    ("case", "wrong"),
    [("Adam", CountsTogether), ("SGD-momentum", StepsMissing), ("AdamW", Idle)],
)
def test_these_checks_see_a_wrong_optimizer(case: str, wrong: type) -> None:
    with pytest.raises(AssertionError):
        check_unequal_steps(case, wrong)


@pytest.mark.parametrize("name", NAMES)
def test_ours_are_the_classes_of_torch_that_they_replace(name: str) -> None:
    ours, theirs = getattr(fastopt.optim, name), getattr(torch.optim, name)
    assert issubclass(ours, theirs)
    optimizer = ours([torch.nn.Parameter(torch.ones(2))])
    assert isinstance(optimizer, torch.optim.Optimizer)
    expected = theirs([torch.nn.Parameter(torch.ones(2))])
    assert optimizer.defaults == expected.defaults
    assert list(optimizer.param_groups[0]) == list(expected.param_groups[0])
    assert repr(optimizer) == repr(expected)


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned(case: str) -> None:
    pair = Pair(case)
    calls = {torch: 0, fastopt: 0}
    for package, (optimizer, params) in zip((torch, fastopt), pair.sides, strict=True):

        def closure(package: Any = package, optimizer: Any = optimizer, params: Any = params):
            calls[package] += 1
            optimizer.zero_grad()
            loss = sum((param**2).sum() for param in params)
            loss.backward()
            return loss

        with torch.no_grad():
            losses = [optimizer.step(closure).item() for _ in range(3)]
        assert losses[0] > losses[1] > losses[2]
    assert calls == {torch: 3, fastopt: 3}
    pair.check()


def test_a_closure_that_raises_leaves_parameters_and_states_alone() -> None:
    pair = Pair("AdamW").run(2)
    before = copy.deepcopy(pair.ours.state_dict())
    values = [param.detach().clone() for param in pair.our_params]

    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pair.ours.step(closure)
    assert_states_close(pair.ours.state_dict(), before)
    assert all(torch.equal(a, b) for a, b in zip(pair.our_params, values, strict=True))
    pair.run(2).check()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW", "RMSprop-both"])
def test_zero_grad_both_ways(case: str, set_to_none: bool) -> None:
    """Zeroed gradients are a step with gradient 0; absent ones are no step."""
    pair = Pair(case).run(2)
    for _ in range(3):
        for optimizer, params in pair.sides:
            optimizer.zero_grad(set_to_none=set_to_none)
            assert (params[0].grad is None) == set_to_none
            optimizer.step()
    pair.check()


def test_a_step_before_any_gradient_changes_nothing_and_makes_no_state() -> None:
    for case in ONE_EACH:
        pair = Pair(case)
        for optimizer, _ in pair.sides:
            optimizer.step()
        pair.check()
        pair.run(2).check()


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_deepcopy_goes_on_by_itself(case: str) -> None:
    """A copied optimizer steps its own copies of the parameters, not those it was copied from."""
    pair = Pair(case).run(3)
    kept = [param.detach().clone() for param in pair.our_params]
    ours = copy.deepcopy(pair.ours)
    theirs = copy.deepcopy(pair.theirs)
    for optimizer in (theirs, ours):
        for seed in range(3):
            give_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
    assert_states_close(ours.state_dict(), theirs.state_dict())
    for ours_, theirs_ in zip(*(o.param_groups[0]["params"] for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(pair.our_params, kept, strict=True))
    pair.run(2).check()


@pytest.mark.parametrize("case", ONE_EACH)
def test_pickle_and_torch_save_of_a_whole_optimizer(case: str) -> None:
    pair = Pair(case).run(3)
    saved = io.BytesIO()
    torch.save(pair.ours, saved)
    saved.seek(0)
    loaded = [
        pickle.loads(pickle.dumps(pair.theirs)),
        pickle.loads(pickle.dumps(pair.ours)),
        torch.load(saved, weights_only=False),
    ]
    for optimizer in loaded:
        for seed in range(3):
            give_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
    for ours in loaded[1:]:
        assert type(ours) is type(pair.ours)
        assert_states_close(ours.state_dict(), loaded[0].state_dict())


def test_a_model_with_tied_weights_steps_them_once() -> None:
    def train(package: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        embed, head = torch.nn.Embedding(13, 6), torch.nn.Linear(6, 13, bias=False)
        head.weight = embed.weight
        model = torch.nn.Sequential(embed, head)
        optimizer = construct(package, "AdamW", model.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            tokens = torch.randint(0, 13, (5,))
            torch.nn.functional.cross_entropy(model(tokens), tokens).backward()
            optimizer.step()
        return list(model.parameters()), optimizer.state_dict()

    (ours, our_state), (theirs, their_state) = train(fastopt), train(torch)
    assert len(ours) == 1
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert_states_close(our_state, their_state)


def test_accumulated_gradients_are_one_step() -> None:
    pair = Pair("AdamW")
    for round_ in range(3):
        for optimizer, params in pair.sides:
            optimizer.zero_grad()
            for part in range(4):
                (sum((p * (round_ + part + 1)).sin().sum() for p in params) / 4).backward()
            optimizer.step()
    pair.check()


def test_an_optimizer_is_freed_with_the_last_reference() -> None:
    """A cycle through plans would keep the states of a dropped optimizer until the next gc."""
    params = make_params(SHAPES)
    optimizer = fastopt.optim.AdamW(params)
    give_grads(params, 0)
    optimizer.step()
    optimizer.step()
    dies = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    del optimizer
    assert dies() is None
