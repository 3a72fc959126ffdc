"""Memory replaced behind the optimizer's back: parameters given new data, states edited, swapped,
cleared, modules moved and cast. What a plan remembers must not outlive it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

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

SQUARE = ((6, 6), (11,), (6, 6))
Edit = Callable[[torch.optim.Optimizer, list[nn.Parameter]], None]


def check_edit(
    case: str, edit: Edit, ours: type | None = None, states: bool = True, **more: Any
) -> None:
    """An edit after 2 steps whose states nobody had looked at, and again after 2 more."""
    pair = Pair(case, ours=ours, shapes=SQUARE, **more)
    for _ in range(2):
        pair.run(2)
        for optimizer, params in pair.sides:
            edit(optimizer, params)
    pair.run(2)
    if states:
        pair.check()
    else:
        assert_params_close(pair.our_params, pair.their_params)


# Parameters.


def new_data(_: Any, params: list[nn.Parameter]) -> None:
    params[0].data = params[0].data * 2
    params[2].data = torch.full((6, 6), 0.25)


def new_layout(_: Any, params: list[nn.Parameter]) -> None:
    params[0].data = params[0].data.t().contiguous().t()


def same_memory_transposed(_: Any, params: list[nn.Parameter]) -> None:
    params[0].data = params[0].data.t()


def strided(_: Any, params: list[nn.Parameter]) -> None:
    params[0].data = torch.arange(72.0).view(6, 12)[:, ::2]


def one_storage(_: Any, params: list[nn.Parameter]) -> None:
    """As FSDP and flatten_parameters do: all parameters views of one new buffer."""
    flat = torch.cat([param.data.reshape(-1) for param in params])
    start = 0
    for param in params:
        param.data = flat[start : start + param.numel()].view(param.shape)
        start += param.numel()


def traded(_: Any, params: list[nn.Parameter]) -> None:
    """Two parameters exchange their memory: the same addresses, each at another's place."""
    params[0].data, params[2].data = params[2].data, params[0].data


def freed_and_back(_: Any, params: list[nn.Parameter]) -> None:
    """As resharding does: the storage is given up and comes back, perhaps at the same address."""
    value = params[0].data.clone()
    params[0].untyped_storage().resize_(0)
    params[0].untyped_storage().resize_(value.nbytes)
    params[0].data.copy_(value)


def filled_in_place(_: Any, params: list[nn.Parameter]) -> None:
    with torch.no_grad():
        params[0].mul_(0.5)
        params[2].copy_(torch.eye(6))


PARAMETER_EDITS = [
    new_data,
    new_layout,
    same_memory_transposed,
    strided,
    one_storage,
    traded,
    freed_and_back,
    filled_in_place,
]


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
@pytest.mark.parametrize("edit", PARAMETER_EDITS)
def test_a_parameter_given_other_memory(edit: Edit, case: str) -> None:
    check_edit(case, edit)


# States.


def each_state(optimizer: Any, params: Any, edit: Callable[[Any, str], None]) -> None:
    for param in params[:2]:
        state = optimizer.state[param]
        for name in list(state):
            edit(state, name)


def assigned(optimizer: Any, params: Any) -> None:
    each_state(optimizer, params, lambda s, n: s.update({n: s[n] * 0.5 if n != "step" else s[n]}))


def assigned_and_old_kept_alive(optimizer: Any, params: Any) -> None:
    assigned.kept = [copy.copy(state) for state in optimizer.state.values()]  # type: ignore[attr-defined]
    assigned(optimizer, params)


def state_data(optimizer: Any, params: Any) -> None:
    each_state(optimizer, params, lambda s, n: setattr(s[n], "data", s[n].data * 0.5))


def state_in_place(optimizer: Any, params: Any) -> None:
    each_state(optimizer, params, lambda s, n: s[n].mul_(0.5))


def state_transposed(optimizer: Any, params: Any) -> None:
    state = optimizer.state[params[0]]
    for name in state:
        if state[name].dim() == 2:
            state[name] = state[name].t()


def state_data_transposed(optimizer: Any, params: Any) -> None:
    """The same object and address, another layout."""
    state = optimizer.state[params[0]]
    for value in state.values():
        if value.dim() == 2:
            value.data = value.data.t()


def step_set(optimizer: Any, params: Any) -> None:
    for count, param in enumerate(params):
        if "step" in optimizer.state[param]:
            optimizer.state[param]["step"] = torch.tensor(10.0 + count)


def step_filled(optimizer: Any, params: Any) -> None:
    for param in params[:2]:
        if "step" in optimizer.state[param]:
            optimizer.state[param]["step"].fill_(20.0)


def one_forgotten(optimizer: Any, params: Any) -> None:
    del optimizer.state[params[0]]


def one_emptied(optimizer: Any, params: Any) -> None:
    optimizer.state[params[1]].clear()


def all_cleared(optimizer: Any, params: Any) -> None:
    optimizer.state.clear()


def other_mapping(optimizer: Any, params: Any) -> None:
    fresh = type(optimizer.state)(dict)
    for param, state in optimizer.state.items():
        fresh[param] = {name: value.clone() for name, value in state.items()}
    optimizer.state = fresh


def other_entry(optimizer: Any, params: Any) -> None:
    """A new dict in the same mapping: the old entry stays whole in whoever holds it."""
    state = optimizer.state[params[0]]
    optimizer.state[params[0]] = {n: v * 0.5 if n != "step" else v for n, v in state.items()}


def states_traded(optimizer: Any, params: Any) -> None:
    state = optimizer.state
    state[params[0]], state[params[2]] = state[params[2]], state[params[0]]


STATE_EDITS = [
    assigned,
    assigned_and_old_kept_alive,
    state_data,
    state_in_place,
    state_transposed,
    state_data_transposed,
    step_set,
    step_filled,
    one_forgotten,
    one_emptied,
    all_cleared,
    other_mapping,
    other_entry,
    states_traded,
]


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW", "NAdam", "RMSprop-both"])
@pytest.mark.parametrize("edit", STATE_EDITS)
def test_an_edited_state_is_the_one_that_is_stepped(edit: Edit, case: str) -> None:
    check_edit(case, edit)


def test_a_reference_taken_long_before_edits_the_state() -> None:
    """Who has once read `state` may come back to it at any time."""
    pair = Pair("AdamW").run(1)
    held = [[optimizer.state[param] for param in params] for optimizer, params in pair.sides]
    pair.run(3)
    for states in held:
        states[0]["exp_avg"] = torch.ones_like(states[0]["exp_avg"])
        states[1]["exp_avg_sq"].fill_(2.0)
        states[2]["step"].add_(5)
    pair.run(2).check()


class Stale(fastopt.optim.AdamW):
    """Wrong: goes on writing to the states it saw first."""

    def step(self, closure: Any = None) -> Any:
        seen = self.__dict__.setdefault("seen", {})
        for param, state in self.state.items():
            for name, value in seen.get(param, {}).items():
                state[name] = value
        super().step(closure)
        for param, state in self.state.items():
            seen.setdefault(param, dict(state))


@pytest.mark.parametrize("edit", [assigned, other_entry, all_cleared])
def test_these_checks_see_a_wrong_optimizer(edit: Edit) -> None:
    with pytest.raises(AssertionError):
        check_edit("AdamW", edit, Stale)


# Modules that move.


def model_pair(case: str = "AdamW") -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    sides = []
    for package in (torch, fastopt):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        sides.append((model, construct(package, case, model.parameters())))
    return sides


def train(sides: Any, seed: int, dtype: torch.dtype = torch.float32) -> None:
    for model, optimizer in sides:
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_a_model_turned_channels_last_midway() -> None:
    sides = model_pair()
    train(sides, 0)
    for model, _ in sides:
        model.to(memory_format=torch.channels_last)
    for seed in (1, 2):
        train(sides, seed)
    (theirs, expected), (ours, optimizer) = sides
    assert_params_close(ours.parameters(), theirs.parameters())
    assert_states_close(optimizer.state_dict(), expected.state_dict())


def test_a_model_cast_to_float64_midway_with_its_states() -> None:
    sides = model_pair()
    train(sides, 0)
    train(sides, 1)
    for model, optimizer in sides:
        saved = optimizer.state_dict()
        model.double()
        optimizer.load_state_dict(saved)
    train(sides, 2, torch.float64)
    train(sides, 3, torch.float64)
    (theirs, expected), (ours, optimizer) = sides
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.dtype is torch.float64
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert_states_close(optimizer.state_dict(), expected.state_dict())


def test_a_model_cast_midway_keeps_its_states_as_they_are() -> None:
    """torch's loop cannot go on so (its states and gradients have two dtypes); ours steps with
    float32 states beside the new parameters, close to one that was never cast."""
    (plain, plain_optimizer), (cast, optimizer) = (model_pair()[1] for _ in range(2))
    train([(plain, plain_optimizer), (cast, optimizer)], 0)
    cast.double()
    train([(plain, plain_optimizer)], 1)
    train([(cast, optimizer)], 1, torch.float64)
    for mine, other in zip(cast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.float(), other, rtol=1e-5, atol=1e-6)
        assert optimizer.state[mine]["exp_avg"].dtype is torch.float32


def test_a_model_emptied_and_loaded_midway() -> None:
    sides = model_pair("SGD-momentum")
    train(sides, 0)
    for model, optimizer in sides:
        values = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        model.to_empty(device="cpu")
        model.load_state_dict(values)
    train(sides, 1)
    for model, optimizer in sides:
        values = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        model.to("meta")
        model.to_empty(device="cpu")
        model.load_state_dict(values, assign=False)
    train(sides, 2)
    (theirs, _), (ours, _) = sides
    assert_params_close(ours.parameters(), theirs.parameters())


def test_a_module_cast_by_swapping_tensors() -> None:
    """torch swaps the insides of two tensors, unless somebody holds a weak reference to one."""
    sides = model_pair("SGD")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model, optimizer in sides:
            for _ in range(4):  # gradients that persist are remembered
                for param in model.parameters():
                    if param.grad is None:
                        param.grad = torch.ones_like(param)
                optimizer.step()
            model.to(torch.float64)
            optimizer.step()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    (theirs, _), (ours, _) = sides
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.dtype is torch.float64
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


# Copies and loads.


@pytest.mark.parametrize("case", ONE_EACH)
def test_loading_drops_what_was_known_of_the_states(case: str) -> None:
    def reload(optimizer: Any, params: Any) -> None:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    check_edit(case, reload)


def test_a_shape_changed_without_its_gradient_is_refused_as_by_torch() -> None:
    """Even where the memory would fit: 4 x 6 over the gradient of 6 x 4."""
    for package in (torch, fastopt):
        params = make_params([(6, 4)])
        optimizer = construct(package, "SGD", params)
        give_grads(params, 0)
        optimizer.step()
        optimizer.step()
        grad = params[0].grad
        params[0].data = params[0].data.view(4, 6)
        before = params[0].detach().clone()
        assert params[0].grad is grad
        with pytest.raises(RuntimeError, match="The size of"):
            optimizer.step()
        assert torch.equal(params[0], before)
