"""A run goes on from torch.optim to fastopt and back, either way, on the same trajectory."""

from __future__ import annotations

import copy
import io
import pickle
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


# What of SGD follows from the number of the step: chance, and how an average warms up.
CHANCE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "stochastic": (torch.bfloat16, {"param_rounding": "stochastic"}),
    "stochastic, momentum": (
        torch.bfloat16,
        {"param_rounding": "stochastic", "momentum": 0.9, "dampening": 0.5},
    ),
    "8bit": (torch.float32, {"state_dtype": "8bit", "momentum": 0.9, "nesterov": True}),
    "warm-up": (torch.float32, {"ema_decay": 0.999, "ema_warmup": 20}),
}
CARRIED: dict[str, Any] = {
    "a file": lambda a, b: b.load_state_dict(through_a_file(a.state_dict())),
    "deepcopy": lambda a, b: b.load_state_dict(copy.deepcopy(a.state_dict())),
}


def stepped_sgd(case: str, late: bool = False) -> Any:
    """Two parameters and their optimizer after some steps; late: the second began later."""
    dtype, options = CHANCE[case]
    params = make_params(((600,), (7, 5)), dtype)
    optimizer = fastopt.optim.SGD(params, lr=1e-3, **options)
    for seed in range(4):
        give_grads(params, seed, missing=(1,) if late and seed < 2 else ())
        optimizer.step()
    return params, optimizer


def go_on(params: list[torch.nn.Parameter], optimizer: Any) -> list[torch.Tensor]:
    for seed in range(4, 8):
        give_grads(params, seed)
        optimizer.step()
    return [x for p in params for x in (p.detach(), *optimizer.state.get(p, {}).values())]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("carry", CARRIED)
@pytest.mark.parametrize("case", CHANCE)
def test_sgd_goes_on_bit_for_bit(case: str, carry: str, late: bool) -> None:
    params, optimizer = stepped_sgd(case, late)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = fastopt.optim.SGD(others, lr=1e-3, **CHANCE[case][1])
    CARRIED[carry](optimizer, again)
    assert same_bits(go_on(params, optimizer), go_on(others, again))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("case", CHANCE)
def test_a_copy_of_sgd_goes_on_bit_for_bit(case: str, how: Any) -> None:
    params, optimizer = stepped_sgd(case)
    others, again = how((params, optimizer))
    assert same_bits(go_on(params, optimizer), go_on(others, again))


def test_chance_that_begins_anew_would_be_noticed() -> None:
    params, optimizer = stepped_sgd("stochastic")
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = fastopt.optim.SGD(others, lr=1e-3, **CHANCE["stochastic"][1])
    assert not same_bits(go_on(params, optimizer), go_on(others, again))


def test_sgd_saves_a_count_only_where_something_follows_from_it() -> None:
    """And torch's class loads it: it has no use for the count, which is not in its own form."""
    for options in ({}, {"momentum": 0.9}, {"max_grad_norm": 1.0, "momentum": 0.9}):
        params = make_params()
        optimizer = fastopt.optim.SGD(params, lr=1e-3, **options)
        give_grads(params, 0)
        optimizer.step()
        names = {name for state in optimizer.state_dict()["state"].values() for name in state}
        assert names == ({"momentum_buffer"} if "momentum" in options else set())
    params, optimizer = stepped_sgd("stochastic, momentum")
    assert all(float(s["fastopt_step"]) == 4.0 for s in optimizer.state.values())
    assert optimizer.state_dict()["fastopt_version"] == 2
    for saved in (optimizer.state_dict(), optimizer.torch_state_dict()):
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        theirs = torch.optim.SGD(others, lr=1e-3, momentum=0.9, dampening=0.5)
        theirs.load_state_dict(copy.deepcopy(saved))
        give_grads(others, 4)
        theirs.step()
        for param, other in zip(params, others, strict=True):
            assert set(theirs.state[other]) <= {"momentum_buffer", "fastopt_step"}
            assert param.shape == theirs.state[other]["momentum_buffer"].shape
    assert all(list(s) == ["momentum_buffer"] for s in saved["state"].values())
    # Options that are dropped leave no count that stands still.
    plain = fastopt.optim.SGD(params, lr=1e-3, momentum=0.9)
    plain.load_state_dict(optimizer.state_dict())
    give_grads(params, 4)
    plain.step()
    assert all(list(state) == ["momentum_buffer"] for state in plain.state.values())
