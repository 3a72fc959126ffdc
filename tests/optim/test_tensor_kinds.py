"""Parameters of every kind a module may hold: given twice, overlapping, without memory, lazy,
subclasses, parametrized. Right as with torch, or refused before anything is written."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

import fastopt
from tests.optim.pairs import (
    ONE_EACH,
    assert_params_close,
    assert_states_close,
    construct,
    give_grads,
    make_params,
)

# Memory shared between parameters.


def check_duplicates(case: str, ours: Any = fastopt) -> None:
    """torch warns, and then updates such a parameter once for each time it is given."""
    sides = []
    for package in (torch, ours):
        params = make_params([(5, 4), (7,)])
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = construct(package, case, [params[0], params[1], params[0]])
        for seed in range(3):
            give_grads(params, seed, missing=(1,) if seed == 1 else ())
            optimizer.step()
        sides.append((params, optimizer.state_dict()))
    (theirs, their_state), (mine, my_state) = sides
    assert_params_close(mine, theirs)
    assert_states_close(my_state, their_state)


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_parameter_given_twice_is_updated_twice_in_order(case: str) -> None:
    check_duplicates(case)


class Once(fastopt.optim.AdamW):
    """Wrong: steps a parameter given twice once."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["params"] = list(dict.fromkeys(group["params"]))
        return super().step(closure)


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError):
        check_duplicates("AdamW-amsgrad", Once)


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW", "Adagrad"])
def test_parameters_that_overlap_in_memory_are_updated_one_after_the_other(case: str) -> None:
    """Windows of 12, 12, 12 and 40000 elements that share some; the last fills several chunks."""
    sides = []
    for package in (torch, fastopt):
        base = torch.randn(40_010, generator=torch.Generator().manual_seed(0))
        params = [
            nn.Parameter(base[k : k + n]) for k, n in ((0, 12), (6, 12), (12, 12), (10, 40_000))
        ]
        optimizer = construct(package, case, params)
        for seed in range(3):
            give_grads(params, seed)
            optimizer.step()
        sides.append(base)
    torch.testing.assert_close(sides[1], sides[0], rtol=1e-5, atol=1e-6)


def test_a_parameter_that_overlaps_itself_is_refused_as_by_torch() -> None:
    for package in (torch, fastopt):
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1).expand(4))]
        optimizer = construct(package, "AdamW", params)
        give_grads(params, 0)
        with pytest.raises(RuntimeError, match="unsupported operation: more than one element"):
            optimizer.step()
    assert torch.equal(params[0], torch.ones(3))
    assert not optimizer.state


# Tensors without memory of their own.


def meta(shape: Any) -> Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize("case", ONE_EACH)
def test_meta_parameters_are_stepped_without_touching_memory(case: str) -> None:
    """Their shapes, dtypes and states are what a dry run of a large model wants to know."""
    states = []
    for package in (torch, fastopt):
        params = [nn.Parameter(meta((1 << 20, 1 << 10))), nn.Parameter(meta(()))]
        optimizer = construct(package, case, params)
        for _ in range(2):
            for param in params:
                param.grad = torch.empty_like(param)
            optimizer.step()
        states.append(optimizer.state_dict()["state"])
    theirs, ours = states
    assert sorted(ours) == sorted(theirs)
    for index, state in theirs.items():
        assert list(ours[index]) == list(state)
        for name, value in state.items():
            mine = ours[index][name]
            assert (mine.shape, mine.dtype, mine.device) == (value.shape, value.dtype, value.device)


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW", "NAdam"])
def test_meta_parameters_beside_real_ones(case: str) -> None:
    sides = []
    for package in (torch, fastopt):
        real = make_params([(5, 4), (7,)])
        optimizer = construct(package, case, [real[0], nn.Parameter(meta((3,))), real[1]])
        for seed in range(3):
            give_grads(real, seed)
            optimizer.param_groups[0]["params"][1].grad = meta((3,))
            optimizer.step()
        sides.append(real)
    assert_params_close(sides[1], sides[0])


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW", "NAdam", "Adagrad"])
def test_fake_parameters_are_stepped_as_by_torch(case: str, inside: bool) -> None:
    """Inside their mode, as memory estimators do, and outside of it."""
    states = []
    for package in (torch, fastopt):
        mode = FakeTensorMode()
        with mode:
            params = [nn.Parameter(torch.empty(5, 4)), nn.Parameter(torch.empty(3))]
            optimizer = construct(package, case, params)
            for param in params:
                param.grad = torch.empty_like(param)
        with mode if inside else nullcontext():
            optimizer.step()
            optimizer.step()
        states.append([dict(optimizer.state[param]) for param in params])
    theirs, ours = states
    for mine, state in zip(ours, theirs, strict=True):
        assert list(mine) == list(state)
        assert all(mine[k].shape == v.shape and mine[k].dtype == v.dtype for k, v in state.items())


def test_a_gradient_without_memory_is_not_read() -> None:
    """A zero tensor, as forward AD hands out, is a gradient of zeros; a meta one cannot be."""
    sides = []
    for package in (torch, fastopt):
        params = make_params([(5, 4), (7,)])
        optimizer = construct(package, "AdamW", params)
        for seed in range(3):
            give_grads(params, seed)
            if seed > 0:
                params[0].grad = torch._efficientzerotensor((5, 4))
            optimizer.step()
        sides.append(params)
    assert_params_close(sides[1], sides[0])


# Lazy modules, subclasses, parametrizations.


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
def test_lazy_modules_materialized_after_the_optimizer_was_made(case: str) -> None:
    def train(package: Any) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LazyLinear(5))
        optimizer = construct(package, case, model.parameters())
        optimizer.zero_grad()
        optimizer.step()
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
        return model, optimizer.state_dict()

    (ours, our_state), (theirs, their_state) = train(fastopt), train(torch)
    assert_params_close(ours.parameters(), theirs.parameters())
    assert_states_close(our_state, their_state)


def test_an_unmaterialized_parameter_with_a_gradient_is_refused() -> None:
    params = [nn.Parameter(torch.ones(2)), nn.UninitializedParameter()]
    optimizer = fastopt.optim.SGD(params, lr=0.1)
    params[0].grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), torch.full((2,), 0.9))


class Named(nn.Parameter):
    """A parameter with an attribute, as many libraries have them."""

    def __new__(cls, data: Tensor, name: str) -> Any:
        self = super().__new__(cls, data)
        self.name_of_mine = name
        return self


class Logged(Tensor):
    """A tensor subclass with torch functions of its own."""

    calls: int = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Logged.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("case", ONE_EACH)
def test_subclasses_of_parameter_and_tensor(case: str) -> None:
    sides = []
    for package in (torch, fastopt):
        values = [param.detach() for param in make_params([(5, 4), (7,), (6,)])]
        params = [
            Named(values[0], "first"),
            nn.Parameter(values[1]),
            values[2].as_subclass(Logged).requires_grad_(),
        ]
        optimizer = construct(package, case, params)
        for seed in range(3):
            give_grads(params, seed)
            optimizer.step()
        assert type(params[0]) is Named
        assert type(params[2]) is Logged
        sides.append(([param.as_subclass(Tensor) for param in params], optimizer.state_dict()))
    (theirs, their_state), (ours, our_state) = sides
    assert_params_close(ours, theirs)
    for index, state in their_state["state"].items():
        assert list(our_state["state"][index]) == list(state)
        for name, value in state.items():
            torch.testing.assert_close(
                our_state["state"][index][name].as_subclass(Tensor),
                value.as_subclass(Tensor),
                rtol=1e-5,
                atol=1e-6,
            )


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
def test_parametrized_modules(case: str) -> None:
    def train(package: Any) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            parametrizations.weight_norm(nn.Linear(5, 4)),
            parametrizations.orthogonal(nn.Linear(4, 4)),
            parametrizations.spectral_norm(nn.Linear(4, 2)),
        )
        optimizer = construct(package, case, model.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(3, 5)).square().sum().backward()
            optimizer.step()
        return model

    torch.testing.assert_close(
        train(fastopt).state_dict(), train(torch).state_dict(), rtol=1e-4, atol=1e-5
    )


def test_buffers_and_plain_tensors_are_parameters_too() -> None:
    sides = []
    for package in (torch, fastopt):
        params = [torch.ones(4).requires_grad_(), nn.Buffer(torch.ones(3)), torch.ones(2)]
        optimizer = construct(package, "AdamW", params)
        for seed in range(2):
            give_grads(params, seed)
            optimizer.step()
        sides.append(params)
    assert_params_close(sides[1], sides[0])
    assert not torch.equal(sides[1][2], torch.ones(2))
