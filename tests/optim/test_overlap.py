"""Parameters that share memory: torch updates one after the other, and so must one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from tests import oracle

Views = Callable[[Tensor], list[Tensor]]

N = 40
SHARED: dict[str, Views] = {
    "views side by side": lambda m: [m[:15], m[15:17], m[17:]],
    "interleaved views": lambda m: [m[::2], m[1::2]],
    "columns": lambda m: list(m.view(8, 5).unbind(1)),
    "rows": lambda m: list(m.view(8, 5).unbind(0)),
    "overlapping": lambda m: [m[:25], m[15:]],
    "overlapping, the later first": lambda m: [m[15:], m[:25]],
    "a chain": lambda m: [m[:12], m[8:20], m[16:28], m[24:]],
    "one inside another": lambda m: [m, m[10:20], m[15:16]],
    "the same memory twice": lambda m: [m, m.view(5, 8), m.view(8, 5)],
    "the same memory transposed": lambda m: [m.view(5, 8), m.view(5, 8).t()],
    "among others": lambda m: [torch.ones(3), m[:25], torch.ones(0), m[15:], torch.ones(2, 2)],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5},
    "AdamW": {"lr": 0.1, "weight_decay": 0.5},
}


def check_shared(
    make_ours: oracle.Make, make_torch: oracle.Make, views: Views, dtype: torch.dtype, label: str
) -> None:
    """Like oracle.check, with parameters that are views of one memory in every run."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(N, generator=generator, dtype=torch.float64).to(dtype)
    shapes = [view.shape for view in views(memory)]
    _, grads = oracle.inputs(shapes, dtype, decades=1)
    wide = [[oracle.widened(grad) for grad in row] for row in grads]
    right = oracle.run(make_torch, _leaves(views(memory.double()), torch.float64), wide)
    theirs = oracle.run(make_torch, _leaves(views(memory.clone()), dtype), grads)
    ours = oracle.run(make_ours, _leaves(views(memory.clone()), dtype), grads)
    oracle.assert_history_not_worse(ours, theirs, right, views(memory), label)


def _leaves(params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors of their own to autograd, on the same memory."""
    return [param.to(dtype).detach() for param in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shared", SHARED)
def test_views_of_one_memory(shared: str, name: str, dtype: torch.dtype) -> None:
    ours = oracle.fused(name, **OPTIONS[name])
    theirs = oracle.torch_loop(name, **OPTIONS[name])
    check_shared(ours, theirs, SHARED[shared], dtype, shared)


def test_large_overlapping_views_do_not_race() -> None:
    """Two threads share these chunks: whatever they do at once must not be the same elements."""
    ends = []
    for make in (torch.optim.SGD, fastopt.optim.SGD):
        generator = torch.Generator().manual_seed(0)
        memory = torch.randn(3_000_000, generator=generator)
        params = [memory[:2_000_000].detach(), memory[1_000_000:].detach(), memory[:].detach()]
        for k, param in enumerate(params):
            param.requires_grad_(True)
            param.grad = torch.full_like(param, 0.5 + k)
        optimizer = make(params, lr=0.25, weight_decay=2.0)
        for _ in range(7):
            optimizer.step()
        ends.append(memory)
    torch.testing.assert_close(ends[1], ends[0])


def _reversed_groups(params: list[Tensor]) -> list[dict[str, Any]]:
    """Groups in another order than memory, each with a learning rate of its own."""
    return [{"params": [p], "lr": 0.1 * (k + 1)} for k, p in enumerate(reversed(params))]


@pytest.mark.parametrize("shared", ["a chain", "one inside another", "the same memory twice"])
def test_groups_follow_one_another(shared: str) -> None:
    options = OPTIONS["AdamW"]
    ours = oracle.fused("AdamW", _reversed_groups, **options)
    theirs = oracle.torch_loop("AdamW", _reversed_groups, **options)
    check_shared(ours, theirs, SHARED[shared], torch.float32, shared)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Adagrad"])
def test_a_parameter_given_twice_is_stepped_twice(name: str) -> None:
    """With one state: its step counts both."""

    def doubled(params: list[Tensor]) -> list[Tensor]:
        return [params[0], params[1], params[0], params[0]]

    options = {"momentum": 0.9} if name == "SGD" else {}
    params, grads = oracle.inputs([(50,), (7,)], decades=1)
    oracle.check(name, {"lr": 0.05} | options, params, grads, split=doubled)


def test_memory_shared_across_dtypes_is_stepped_in_order() -> None:
    """A float32 tensor and the bfloat16 view of its second half: two launches, in order."""
    ends = []
    for make in (torch.optim.SGD, fastopt.optim.SGD):
        generator = torch.Generator().manual_seed(0)
        memory = torch.randn(N, generator=generator)
        params = [memory.detach(), memory[N // 2 :].view(torch.bfloat16)]
        for param in params:
            param.requires_grad_(True)
            param.grad = torch.full_like(param, 0.25)
        for order in (params, params[::-1]):
            optimizer = make(order, lr=0.5)
            for _ in range(4):
                optimizer.step()
        ends.append(memory.detach().clone())
    assert oracle.same_bits(*ends)


@pytest.mark.parametrize("name", oracle.NAMES)
def test_an_expanded_parameter_is_refused_before_anything_is_written(name: str) -> None:
    """torch refuses it too, halfway through the step."""
    plain = torch.ones(4, requires_grad=True)
    expanded = torch.ones(3, 1).expand(3, 4).requires_grad_(True)
    for param in (plain, expanded):
        param.grad = torch.ones(param.shape)
    optimizer = getattr(fastopt.optim, name)([plain, expanded])
    before = optimizer.state_dict()
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        optimizer.step()
    assert plain.tolist() == [1.0] * 4
    assert expanded.tolist() == [[1.0] * 4] * 3
    assert optimizer.state_dict().keys() == before.keys()
    assert len(optimizer.state) == len(before["state"])


def test_gradients_that_share_memory_with_parameters() -> None:
    """A gradient may be its own parameter: p' = p - lr p."""
    memory = torch.randn(N)
    param = memory.detach().view(5, 8).requires_grad_(True)
    param.grad = memory.detach().view(5, 8)
    start = memory.clone()
    optimizer = fastopt.optim.SGD([param], lr=0.5)
    optimizer.step()
    optimizer.step()
    assert torch.equal(memory, start / 4)


def test_updates_that_race_would_be_noticed() -> None:
    """Teeth: every parameter stepped from what was there before the step."""

    class Racing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            params = [p for p in self.param_groups[0]["params"] if p.grad is not None]
            with torch.no_grad():
                new = [p - 0.1 * p.grad for p in params]
                for p, value in zip(params, new, strict=True):
                    p.copy_(value)

    with pytest.raises(AssertionError, match="param of parameter 0"):
        check_shared(
            lambda params: Racing(params, lr=0.1),
            oracle.torch_loop("SGD", lr=0.1),
            SHARED["overlapping"],
            torch.float32,
            "racing",
        )
