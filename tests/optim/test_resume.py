"""A run goes on from torch.optim to fastopt and back, either way, on the same trajectory."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import fastopt
from tests.optim.pairs import (
    CASES,
    ONE_EACH,
    assert_params_close,
    assert_states_close,
    construct,
    give_grads,
    make_params,
)

# Who has a gradient at each step: the first parameter late, the last frozen midway.
MISSING = [(0,), (0,), (), (3,), (3,), (), (1,), (), ()]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run_relay(
    case: str, runners: list[Any], pass_on: Any = through_a_file, missing: Any = MISSING
) -> Any:
    """Each runner takes over the parameters and the state_dict of the one before."""
    values, state = [param.detach() for param in make_params()], None
    each = len(MISSING) // len(runners)
    for leg, package in enumerate(runners):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        optimizer = construct(package, case, params)
        if state is not None:
            optimizer.load_state_dict(pass_on(state))
        for step in range(leg * each, (leg + 1) * each):
            give_grads(params, step, missing[step])
            optimizer.step()
        values, state = [param.detach() for param in params], optimizer.state_dict()
    return values, state


def check_relay(case: str, runners: list[Any], pass_on: Any = through_a_file) -> None:
    values, state = run_relay(case, runners, pass_on)
    expected, expected_state = run_relay(case, [torch])
    assert_params_close(values, expected)
    assert_states_close(state, expected_state)


@pytest.mark.parametrize("case", CASES)
def test_from_torch_to_ours_and_back(case: str) -> None:
    check_relay(case, [torch, fastopt, torch])


@pytest.mark.parametrize("case", CASES)
def test_from_ours_to_torch_and_back(case: str) -> None:
    check_relay(case, [fastopt, torch, fastopt])


@pytest.mark.parametrize("case", ONE_EACH)
def test_from_ours_to_ours_without_a_file(case: str) -> None:
    """deepcopy, and the live state_dict itself: two optimizers then share state tensors."""
    check_relay(case, [fastopt, fastopt, fastopt], copy.deepcopy)
    check_relay(case, [fastopt, torch, fastopt], lambda state: state)


class Forgets(fastopt.optim.RMSprop):
    """Wrong: loads everything but the momentum."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["momentum_buffer"].zero_()


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError):
        check_relay("RMSprop-both", [torch, Forgets, torch])


@pytest.mark.parametrize("case", ["Adam", "SGD-momentum", "Adagrad"])
def test_between_fused_and_plain_either_way(case: str) -> None:
    """Every gradient is there: torch's fused SGD cannot begin one buffer beside another's."""
    expected, _ = run_relay(case, [torch], missing=[()] * 9)
    for flags in [(True, False), (False, True)]:
        values, state = [param.detach() for param in make_params()], None
        for leg, fused in enumerate(flags):
            params = [torch.nn.Parameter(value.clone()) for value in values]
            optimizer = construct(torch if leg == 0 else fastopt, case, params, fused=fused)
            if state is not None:
                optimizer.load_state_dict(through_a_file(state))
            for step in range(4 * leg, 4 if leg == 0 else 9):
                give_grads(params, step)
                optimizer.step()
            values, state = [param.detach() for param in params], optimizer.state_dict()
        assert_params_close(values, expected)


def test_a_state_dict_taken_before_the_first_step_is_loaded_over_states() -> None:
    """It has none: stepping starts anew."""
    for case in ONE_EACH:
        sides = []
        for package in (torch, fastopt):
            params = make_params()
            optimizer = construct(package, case, params)
            empty = copy.deepcopy(optimizer.state_dict())
            for seed in range(2):
                give_grads(params, seed)
                optimizer.step()
            optimizer.load_state_dict(empty)
            for seed in range(2):
                give_grads(params, seed)
                optimizer.step()
            sides.append((params, optimizer.state_dict()))
        (theirs, their_state), (ours, our_state) = sides
        assert_params_close(ours, theirs)
        assert_states_close(our_state, their_state)


@pytest.mark.parametrize("case", ONE_EACH)
def test_loading_into_an_optimizer_that_has_stepped_others_than_the_checkpoint(case: str) -> None:
    """Saved when the last two were frozen; loaded where the first two have been, midway."""
    sides = []
    for package in (torch, fastopt):
        params = make_params()
        optimizer = construct(package, case, params)
        for seed in range(2):
            give_grads(params, seed, missing=(2, 3))
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        params = make_params(seed=3)
        optimizer = construct(package, case, params)
        for seed in range(3):
            give_grads(params, seed, missing=(0, 1))
            optimizer.step()
        optimizer.load_state_dict(saved)
        for seed, missing in enumerate([(), (0, 3), (1, 2), ()]):
            give_grads(params, seed, missing)
            optimizer.step()
        sides.append((params, optimizer.state_dict()))
    (theirs, their_state), (ours, our_state) = sides
    assert_params_close(ours, theirs)
    assert_states_close(our_state, their_state)
