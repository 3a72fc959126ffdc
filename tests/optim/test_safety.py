"""What a kernel that writes through addresses owes autograd, and the owners of memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from tests.optim.pairs import (
    ONE_EACH,
    Pair,
    assert_params_close,
    construct,
    give_grads,
    make_params,
)

# What autograd must hear of.


def check_stale_backward(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """A graph that saved a parameter before the step must not run backward after it."""
    params = make_params([(4,), (4,)])
    optimizer = make(params)
    for seed in range(3):
        give_grads(params, seed)
        if seed == 2:
            graph = (params[0] * params[1]).sum()
        optimizer.step()
        if seed == 2:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                graph.backward()


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_stale_backward_raises_as_with_torch(case: str) -> None:
    check_stale_backward(lambda params: construct(torch, case, params))
    check_stale_backward(lambda params: construct(fastopt, case, params))


class Silent(fastopt.optim.Adam):
    """Wrong: writes without telling autograd."""

    def step(self, closure: Any = None) -> Any:
        params = [param for group in self.param_groups for param in group["params"]]
        versions = [param._version for param in params]
        super().step(closure)
        torch._C._autograd._unsafe_set_version_counter(params, versions)


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_stale_backward(lambda params: Silent(params))


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
def test_a_parameter_without_a_gradient_keeps_its_version_and_its_graphs(case: str) -> None:
    params = make_params([(4,), (4,)])
    optimizer = construct(fastopt, case, params)
    for seed in range(3):
        give_grads(params, seed, missing=() if seed == 0 else (1,))
        versions = [param._version for param in params]
        graph = (params[1] ** 2).sum()
        optimizer.step()
        assert params[0]._version > versions[0]
        if seed > 0:
            assert params[1]._version == versions[1]
            graph.backward()
            torch.testing.assert_close(params[1].grad, 2 * params[1].detach())


@pytest.mark.parametrize("case", ["SGD-momentum", "Adam", "RMSprop-both"])
def test_a_graph_over_a_state_raises_once_the_state_has_moved_on(case: str) -> None:
    pair = Pair(case).run(2)
    for optimizer, params in pair.sides:
        name = "momentum_buffer" if "Adam" not in case else "exp_avg"
        state = optimizer.state[params[0]][name]
        weight = torch.ones_like(state, requires_grad=True)
        graph = (state * weight).sum()
        give_grads(params, 3)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            graph.backward()


def test_views_of_a_parameter_notice_the_step_too() -> None:
    params = make_params([(4, 3)])
    optimizer = fastopt.optim.AdamW(params)
    give_grads(params, 0)
    row = params[0].detach()[1]
    before, version = row.clone(), row._version
    optimizer.step()
    assert row._version > version
    assert not torch.equal(row, before)


# Gradients are not the optimizer's to keep.


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_memory_of_gradients_is_free_after_zero_grad(rounds: int) -> None:
    """Contiguous, staged and missing ones, seen once or known for some steps."""
    params = make_params([(5, 4), (4, 5), (3,)])
    optimizer = fastopt.optim.AdamW(params)
    persistent = [torch.randn(5, 4), torch.randn(5, 4).t(), torch.randn(3)]
    for param, grad in zip(params, persistent, strict=True):
        param.grad = grad
    for _ in range(rounds):
        optimizer.step()
    watched = [weakref.ref(grad) for grad in persistent]
    storages = [weakref.ref(grad.untyped_storage()) for grad in persistent]
    del persistent, grad
    optimizer.zero_grad(set_to_none=True)
    assert [reference() for reference in watched] == [None] * 3
    assert [reference() for reference in storages] == [None] * 3


def test_memory_of_parameters_and_states_is_free_after_the_optimizer() -> None:
    params = make_params()
    optimizer = fastopt.optim.AdamW(params)
    for seed in range(2):
        give_grads(params, seed)
        optimizer.step()
    watched = [weakref.ref(param) for param in params]
    watched += [weakref.ref(optimizer.state[param]["exp_avg"]) for param in params]
    optimizer.param_groups.clear()
    optimizer.state.clear()
    optimizer.step()
    del params, optimizer
    gc.collect()
    assert [reference() for reference in watched] == [None] * len(watched)


# Gradients that persist, as in DDP's buckets.


class Flat:
    """Gradients that are views of one buffer and stay the same objects."""

    def __init__(self, params: Sequence[Tensor], offset: int = 0) -> None:
        self.params = params
        self.buffer = torch.zeros(offset + sum(param.numel() for param in params))
        start = offset
        for param in params:
            param.grad = self.buffer[start : start + param.numel()].view(param.shape)
            start += param.numel()

    def fill(self, seed: int) -> None:
        self.buffer.copy_(torch.randn(self.buffer.shape, generator=_seeded(seed)))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
def test_gradients_in_one_flat_buffer_whose_contents_change(case: str, offset: int) -> None:
    """Off 16-byte boundaries too, as bucket views are."""
    pair = Pair(case)
    flats = [Flat(params, offset) for _, params in pair.sides]
    for seed in range(5):
        for flat, (optimizer, _) in zip(flats, pair.sides, strict=True):
            flat.fill(seed)
            optimizer.step()
    pair.check()


SHAPE = (6, 6)


def transposed_in_place(grad: Tensor) -> None:
    """The same object at the same address, its rows and columns swapped."""
    grad.t_()


def transposed_data(grad: Tensor) -> None:
    grad.data = grad.data.t()


def other_data(grad: Tensor) -> None:
    grad.data = torch.full(SHAPE, 0.5)


def other_layout(grad: Tensor) -> None:
    grad.data = torch.arange(36.0).view(SHAPE).t()


def other_storage(grad: Tensor) -> None:
    grad.set_(torch.arange(36.0).view(SHAPE))


def strided_data(grad: Tensor) -> None:
    grad.data = torch.arange(72.0).view(6, 12)[:, ::2]


@pytest.mark.parametrize("known_for", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "change",
    [
        transposed_in_place,
        transposed_data,
        other_data,
        other_layout,
        other_storage,
        strided_data,
    ],
)
def test_a_gradient_object_that_changes_under_us(change: Any, known_for: int) -> None:
    """After any number of steps on which it was the same."""
    pair = Pair("SGD", shapes=[SHAPE, (11,), SHAPE])
    flats = [Flat(params) for _, params in pair.sides]
    for seed in range(5):
        for flat, (optimizer, params) in zip(flats, pair.sides, strict=True):
            flat.fill(seed)
            if seed == known_for:
                change(params[0].grad)
                change(params[2].grad)
            optimizer.step()
    pair.check()


@pytest.mark.parametrize("known_for", [1, 3])
def test_a_gradient_replaced_by_another_layout_at_the_same_address(known_for: int) -> None:
    """The old object is dropped; its memory, and often its id, come back as a transposed one."""
    sides = []
    for package in (torch, fastopt):
        params = make_params([SHAPE, SHAPE])
        optimizer = construct(package, "AdamW", params)
        memory = [torch.randn(SHAPE, generator=_seeded(k)) for k in range(2)]
        for step in range(5):
            for param, block in zip(params, memory, strict=True):
                if step == 0:
                    param.grad = block.view(SHAPE)
                elif step == known_for:
                    param.grad = None
                    param.grad = block.t()
            optimizer.step()
        sides.append(params)
    assert_params_close(sides[1], sides[0])


def test_gradients_swapped_between_parameters() -> None:
    """The same objects at the same addresses, each at another's place."""
    sides = []
    for package in (torch, fastopt):
        params = make_params([SHAPE, SHAPE, SHAPE])
        optimizer = construct(package, "Adam", params)
        give_grads(params, 0)
        grads = [param.grad for param in params]
        for step in range(4):
            for k, param in enumerate(params):
                param.grad = grads[(k + (step == 3)) % 3]
            optimizer.step()
        sides.append(params)
    assert_params_close(sides[1], sides[0])


def test_one_gradient_tensor_for_two_parameters() -> None:
    sides = []
    for package in (torch, fastopt):
        params = make_params([SHAPE, SHAPE])
        optimizer = construct(package, "AdamW", params)
        for seed in range(3):
            params[0].grad = params[1].grad = torch.randn(SHAPE, generator=_seeded(seed))
            optimizer.step()
        sides.append(params)
    assert_params_close(sides[1], sides[0])


def test_a_gradient_that_is_the_parameters_own_memory() -> None:
    """p.grad = p.detach(): decay towards zero, written in place while it is read."""
    sides = []
    for package in (torch, fastopt):
        params = make_params([SHAPE])
        optimizer = construct(package, "SGD", params)
        params[0].grad = params[0].detach()
        for _ in range(3):
            optimizer.step()
        sides.append(params)
    assert_params_close(sides[1], sides[0])


def test_expanded_and_broadcast_gradients() -> None:
    """loss = p.sum() hands out a gradient of one element, expanded."""
    pair = Pair("AdamW")
    for _ in range(3):
        for optimizer, params in pair.sides:
            optimizer.zero_grad()
            for param in params:
                param.grad = torch.ones(()).expand(param.shape)
            optimizer.step()
    pair.check()
