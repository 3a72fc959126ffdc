"""Sparse gradients: as torch supports them for SGD and Adagrad, torch's refusal elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastopt
from tests.optim.pairs import (
    CASES,
    assert_params_close,
    construct,
    give_grads,
    make_params,
)

# torch says so once, of its own sparse tensors.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")

TAKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"weight_decay": 0.0}),
    "SGD-maximize": ("SGD", {"weight_decay": 0.0, "maximize": True}),
    "SGD-momentum": ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.0}),
    "SGD-nesterov": ("SGD-nesterov", {"weight_decay": 0.0}),
    "Adagrad": ("Adagrad", {"weight_decay": 0.0}),
    "Adagrad-accumulator": ("Adagrad", {"weight_decay": 0.0, "initial_accumulator_value": 0.5}),
    "Adagrad-maximize": ("Adagrad", {"weight_decay": 0.0, "maximize": True}),
}
TOKENS = [[1, 3, 3, 7], [0, 1], [9, 9, 9], [2, 7]]


def train(package: Any, case: str, resume: Any = None, **more: Any) -> tuple[nn.Module, Any]:
    """An embedding with sparse gradients and a linear layer with dense ones, in one group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Linear(4, 3))
    optimizer = construct(package, case, model.parameters(), **more)
    for step, tokens in enumerate(TOKENS):
        optimizer.zero_grad()
        model(torch.tensor(tokens)).square().sum().backward()
        assert model[0].weight.grad.is_sparse
        optimizer.step()
        if resume is not None and step == 1:
            state = optimizer.state_dict()
            optimizer = construct(resume, case, model.parameters(), **more)
            optimizer.load_state_dict(copy.deepcopy(state))
    return model, optimizer


def dense(value: Any) -> torch.Tensor:
    return value.to_dense() if isinstance(value, torch.Tensor) else torch.tensor(value)


def check_sparse(name: str, ours: Any = fastopt, **resume: Any) -> None:
    case, more = TAKEN[name]
    (model, optimizer), (expected, torchs) = (
        train(ours, case, **more, **resume),
        train(torch, case, **more),
    )
    assert_params_close(model.parameters(), expected.parameters())
    mine, theirs = optimizer.state_dict()["state"], torchs.state_dict()["state"]
    assert sorted(mine) == sorted(theirs)
    for index, state in theirs.items():
        assert list(mine[index]) == list(state)
        for key, value in state.items():
            assert mine[index][key].is_sparse == value.is_sparse
            torch.testing.assert_close(dense(mine[index][key]), dense(value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TAKEN)
def test_sparse_beside_dense_gradients(name: str) -> None:
    check_sparse(name)


@pytest.mark.parametrize("name", ["SGD-momentum", "Adagrad"])
def test_a_run_on_sparse_gradients_goes_on_either_way(name: str) -> None:
    check_sparse(name, resume=torch)
    check_sparse(name, torch, resume=fastopt)


class DenseInstead(fastopt.optim.SGD):
    """Wrong: a dense momentum step moves rows that have no gradient."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.grad.is_sparse:
                    param.grad = param.grad.to_dense()
        return super().step(closure)


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError):
        check_sparse("SGD-momentum", DenseInstead)


def test_rows_without_a_gradient_keep_every_bit() -> None:
    for case in ("SGD", "Adagrad"):
        torch.manual_seed(0)
        embedding = nn.Embedding(9, 3, sparse=True)
        optimizer = construct(fastopt, case, embedding.parameters(), weight_decay=0.0)
        before = embedding.weight.detach().clone()
        embedding(torch.tensor([2, 5])).sum().backward()
        optimizer.step()
        moved = (embedding.weight != before).any(dim=1).nonzero().flatten().tolist()
        assert moved == [2, 5]


def test_a_parameter_whose_gradient_is_sparse_one_step_and_dense_the_next() -> None:
    sides = []
    for package in (torch, fastopt):
        params = make_params([(6, 3), (4,)])
        optimizer = construct(package, "Adagrad", params, weight_decay=0.0)
        for seed in range(6):
            give_grads(params, seed)
            if seed % 3:
                params[0].grad = (params[0].grad * (params[0].grad > 0)).to_sparse()
            optimizer.step()
        sides.append(params)
    assert_params_close(sides[1], sides[0])


REFUSING = [case for case in CASES if case.partition("-")[0] not in ("SGD", "Adagrad")]


@pytest.mark.parametrize("case", [*REFUSING, "SGD", "Adagrad"])
def test_torchs_refusal_before_anything_is_written(case: str) -> None:
    """SGD and Adagrad refuse weight decay on a sparse gradient."""
    messages = []
    for package in (torch, fastopt):
        params = make_params([(6, 3), (6, 3)])
        give_grads(params, 0)
        params[1].grad = params[1].grad.to_sparse()
        optimizer = construct(package, case, params)
        state = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(RuntimeError) as caught:
            optimizer.step()
        messages.append(str(caught.value))
        if package is fastopt and case in REFUSING:
            assert_params_close(params, make_params([(6, 3), (6, 3)]))
            assert optimizer.state_dict() == state
    theirs, ours = messages
    assert ours.startswith(theirs)


def test_fused_with_a_sparse_gradient_is_refused() -> None:
    """torch's fused kernels take none, and an eager step has no grad_scale."""
    for case in ("SGD", "Adagrad"):
        for package in (torch, fastopt):
            params = make_params([(6, 3)])
            optimizer = construct(package, case, params, fused=True, weight_decay=0.0)
            optimizer.grad_scale = torch.tensor(4.0)
            optimizer.found_inf = torch.tensor(0.0)
            give_grads(params, 0)
            params[0].grad = params[0].grad.to_sparse()
            with pytest.raises(RuntimeError, match="sparse"):
                optimizer.step()
            assert_params_close(params, make_params([(6, 3)]))


@pytest.mark.parametrize("case", ["SGD", "Adagrad"])
def test_a_fused_sparse_step_without_a_scaler_is_the_plain_one(case: str) -> None:
    """torch's fused kernels refuse it; without a grad_scale there is nothing to miss."""
    sides = []
    for package, fused in ((torch, False), (fastopt, True)):
        params = make_params([(6, 3)])
        optimizer = construct(package, case, params, fused=fused, weight_decay=0.0)
        give_grads(params, 0)
        params[0].grad = params[0].grad.to_sparse()
        optimizer.step()
        sides.append(params)
    assert_params_close(sides[1], sides[0])
    assert not torch.equal(sides[1][0], make_params([(6, 3)])[0])
