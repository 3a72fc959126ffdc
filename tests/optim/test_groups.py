"""Parameter groups: their settings, changed by hand or by code, reach exactly their parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastopt
from tests.optim.pairs import (
    ONE_EACH,
    SHAPES,
    Pair,
    assert_params_close,
    assert_states_close,
    construct,
    give_grads,
    make_params,
)

# Settings a group may have of its own, two groups with each, by class.
PER_GROUP: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.3}, {"maximize": True}],
    "SGD-nesterov": [{"nesterov": False}, {"weight_decay": 0.0}, {"momentum": 0.5}],
    "Adagrad": [{"lr_decay": 0.0}, {"eps": 1e-2}, {"maximize": True}],
    "RMSprop": [{"momentum": 0.3}, {"centered": True}, {"alpha": 0.5, "maximize": True}],
    "Adadelta": [{"rho": 0.5}, {"eps": 1e-3}, {"maximize": True}],
    "Adam": [{"amsgrad": True}, {"betas": (0.5, 0.9)}, {"maximize": True}],
    "AdamW": [{"amsgrad": True}, {"weight_decay": 0.0}, {"maximize": True, "lr": 0.1}],
    "Adamax": [{"betas": (0.5, 0.9)}, {"eps": 1e-2}, {"maximize": True}],
    "NAdam": [{"momentum_decay": 0.1}, {"decoupled_weight_decay": True}, {"maximize": True}],
    "RAdam": [{"betas": (0.5, 0.9)}, {"decoupled_weight_decay": True}, {"maximize": True}],
}


class Groups:
    """torch's and ours on several groups of two parameters each."""

    def __init__(self, case: str, settings: list[dict[str, Any]], ours: Any = fastopt) -> None:
        self.sides = []
        for package in (torch, ours):
            params = make_params(SHAPES * len(settings))
            cut = [params[k :: len(settings)] for k in range(len(settings))]
            groups = [{"params": p, **s} for p, s in zip(cut, settings, strict=True)]
            self.sides.append((construct(package, case, groups), params))
        self.count = 0

    def step(self) -> None:
        self.count += 1
        for optimizer, params in self.sides:
            give_grads(params, self.count)
            optimizer.step()

    def change(self, group: int, **settings: Any) -> None:
        for optimizer, _ in self.sides:
            optimizer.param_groups[group].update(settings)

    def check(self) -> None:
        (theirs, their_params), (ours, our_params) = self.sides
        assert_params_close(our_params, their_params)
        assert_states_close(ours.state_dict(), theirs.state_dict())


def check_groups(case: str, ours: Any = fastopt) -> None:
    groups = Groups(case, [{}, *PER_GROUP[case]], ours)
    for _ in range(4):
        groups.step()
    groups.check()


@pytest.mark.parametrize("case", PER_GROUP)
def test_each_group_has_its_own_settings(case: str) -> None:
    check_groups(case)


class FirstGroupForAll(fastopt.optim.Adam):
    """Wrong: every group is stepped with the first one's betas and sign."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for name in ("betas", "maximize"):
                group[name] = self.param_groups[0][name]
        return super().step(closure)


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError):
        check_groups("Adam", FirstGroupForAll)


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_group_added_midway_starts_its_own_count(case: str) -> None:
    pair = Pair(case).run(3)
    late = [make_params([(4, 3), (9,)], seed=5) for _ in range(2)]
    for (optimizer, params), more in zip(pair.sides, late, strict=True):
        optimizer.add_param_group({"params": more, "lr": 0.1, "weight_decay": 0.0})
        params.extend(more)
    pair.run(3).check()
    assert len(pair.ours.param_groups) == 2


def test_a_parameter_in_two_groups_is_refused_as_by_torch() -> None:
    pair = Pair("AdamW").run(1)
    for optimizer, params in pair.sides:
        with pytest.raises(ValueError, match="some parameters appear in more than one"):
            optimizer.add_param_group({"params": params[:1]})
    pair.run(1).check()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"state_dtype": "8bit"}, "cannot keep"),
    ({"state_dtype": "4bit"}, "Invalid state_dtype"),
    ({"param_rounding": "upwards"}, "Invalid param_rounding"),
    ({"max_grad_norm": 1.0, "clip_value": 1.0}, "cannot be given together"),
    ({"fused": True, "foreach": True}, "cannot be `True` together"),
]


def check_refusal(more: dict[str, Any], message: str, ours: Any = fastopt) -> None:
    """A group that is refused is not there afterwards, and the others go on as with torch."""
    pair = Pair("Adagrad", ours=ours).run(1)
    with pytest.raises((ValueError, RuntimeError), match=message):
        pair.ours.add_param_group({"params": make_params([(4, 3)]), **more})
    assert len(pair.ours.param_groups) == 1
    pair.run(2).check()


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_a_group_that_is_refused_is_not_added(more: dict[str, Any], message: str) -> None:
    check_refusal(more, message)


class KeepsWhatItRefuses(fastopt.optim.Adagrad):
    """Wrong: the group stays, and fails at a later step."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        try:
            super().add_param_group(param_group)
        except ValueError:
            self.param_groups.append(param_group)
            raise


def test_a_refused_group_that_stays_would_be_noticed() -> None:
    with pytest.raises(AssertionError):
        check_refusal(*REFUSED[0], ours=KeepsWhatItRefuses)


def test_an_empty_group_is_no_obstacle() -> None:
    groups = Groups("AdamW", [{}, {}])
    for optimizer, _ in groups.sides:
        optimizer.add_param_group({"params": []})
    groups.step()
    groups.step()
    groups.check()


CHANGES: dict[str, dict[str, Any]] = {
    "SGD-momentum": {"momentum": 0.5, "dampening": 0.0, "maximize": True},
    "Adagrad": {"lr_decay": 0.9, "eps": 0.1},
    "RMSprop-both": {"alpha": 0.5, "momentum": 0.9},
    "Adadelta": {"rho": 0.5, "maximize": True},
    "Adam": {"betas": (0.5, 0.9), "eps": 0.1},
    "AdamW-amsgrad": {"weight_decay": 0.5, "maximize": True},
    "Adamax": {"betas": (0.5, 0.9), "eps": 0.1},
    "NAdam": {"momentum_decay": 0.3, "decoupled_weight_decay": True},
    "RAdam": {"betas": (0.5, 0.9), "decoupled_weight_decay": True},
}


@pytest.mark.parametrize("case", CHANGES)
def test_settings_changed_by_hand_between_steps_are_taken_at_once(case: str) -> None:
    groups = Groups(case, [{}, {}])
    groups.step()
    groups.change(0, lr=0.3)
    groups.step()
    groups.change(1, **CHANGES[case])
    groups.step()
    groups.step()
    groups.check()


def test_momentum_switched_on_midway_starts_its_buffer_at_the_gradient() -> None:
    """torch's first momentum_buffer is the gradient, undamped, whenever it comes into being."""
    groups = Groups("SGD", [{}, {}])
    groups.step()
    groups.step()
    groups.change(1, momentum=0.9, dampening=0.5)
    groups.step()
    groups.step()
    groups.check()
    groups.change(1, momentum=0.0)
    groups.step()
    groups.change(1, momentum=0.9)
    groups.step()
    groups.check()


def test_nesterov_and_maximize_switched_midway() -> None:
    groups = Groups("SGD-nesterov", [{}, {}])
    for change in ({"nesterov": False}, {"maximize": True}, {"nesterov": True}):
        groups.step()
        groups.change(0, **change)
    groups.step()
    groups.check()


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
def test_named_parameters_keep_their_names_in_groups_and_state_dicts(case: str) -> None:
    def train(package: Any) -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
        optimizer = construct(package, case, list(model[0].named_parameters()))
        optimizer.add_param_group({"params": list(model[1].named_parameters()), "lr": 0.1})
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 5)).square().sum().backward()
            optimizer.step()
        return model, optimizer

    (ours, optimizer), (theirs, expected) = train(fastopt), train(torch)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert_params_close(ours.parameters(), theirs.parameters())
    assert_states_close(optimizer.state_dict(), expected.state_dict())


def test_parameters_given_as_a_generator_or_dicts_of_generators() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = fastopt.optim.SGD(({"params": p} for p in model.parameters()), lr=1.0)
    give_grads(list(model.parameters()), 0)
    before = [param.detach() - param.grad for param in model.parameters()]
    optimizer.step()
    assert_params_close(model.parameters(), before)


def test_a_parameter_moved_to_another_group_is_stepped_by_that_one() -> None:
    groups = Groups("AdamW", [{}, {"lr": 0.3}])
    groups.step()
    for optimizer, _ in groups.sides:
        first, second = (group["params"] for group in optimizer.param_groups)
        second.append(first.pop(0))
    groups.step()
    groups.step()
    groups.check()


def test_a_parameter_replaced_in_its_group_is_stepped_in_place_of_the_old_one() -> None:
    groups = Groups("Adam", [{}])
    groups.step()
    kept = []
    for optimizer, params in groups.sides:
        old = params[1]
        params[1] = make_params([old.shape], seed=9)[0]
        optimizer.param_groups[0]["params"][1] = params[1]
        del optimizer.state[old]
        kept.append(old.detach().clone())
    groups.step()
    groups.step()
    groups.check()
    torch.testing.assert_close(*kept, rtol=1e-5, atol=1e-6)
