"""Activation checkpoints and hooks on saved tensors: what is saved is asked for once a backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import fastopt.nn
from fastopt import functional
from tests.rows import oracle
from tests.rows.cases import draw, same, targets
from tests.rows.every import EVERY, F64, FUNCTIONS, Call, Outputs, as_tuple, leaves

Function = Callable[..., Outputs]


def gradients(call: Call, function: Function, create_graph: bool, times: int = 1) -> list[Tensor]:
    """Of first order, and with create_graph of second."""
    given = leaves(call)
    outputs = as_tuple(function(*given))
    dy = [draw(*y.shape, dtype=F64, seed=40 + k) for k, y in enumerate(outputs)]
    options: dict[str, Any] = {"create_graph": create_graph, "retain_graph": times > 1 or None}
    for _ in range(times):
        grads = torch.autograd.grad(outputs, given, dy, materialize_grads=True, **options)
    total = sum(grad.sin().sum() for grad in grads)
    if create_graph and total.requires_grad:  # else the function is linear
        grads = (*grads, *torch.autograd.grad(total, given, materialize_grads=True))
    return [grad.detach() for grad in grads]


def recomputed(function: Function, *, early_stop: bool = True, **options: Any) -> Function:
    def call(*given: Tensor) -> Outputs:
        with set_checkpoint_early_stop(early_stop):
            found: Outputs = checkpoint(function, *given, use_reentrant=False, **options)
        return found

    return call


def once(function: Function) -> Function:
    """Saved tensors are packed away and may each be unpacked once; they come back as copies."""

    def call(*given: Tensor) -> Outputs:
        asked: Counter[int] = Counter()

        def pack(t: Tensor) -> tuple[int, Tensor]:
            number = len(asked)
            asked[number] = 0
            return number, t

        def unpack(packed: tuple[int, Tensor]) -> Tensor:
            number, t = packed
            asked[number] += 1
            assert asked[number] == 1, "unpacked twice"
            return t if t.requires_grad else t.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return function(*given)

    return call


def on_cpu(function: Function) -> Function:
    def call(*given: Tensor) -> Outputs:
        with torch.autograd.graph.save_on_cpu():
            return function(*given)

    return call


WAYS: dict[str, Callable[[Function], Function]] = {
    "checkpoint": recomputed,
    "without early stop": lambda f: recomputed(f, early_stop=False),
    "nested": lambda f: recomputed(recomputed(f)),
    "save_on_cpu": on_cpu,
}


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_what_they_are_without(name: str) -> None:
    call = EVERY[name]
    first, second = (gradients(call, call.run, graph) for graph in (False, True))
    same(gradients(call, once(call.run), False), first)
    same(gradients(call, call.run, False, times=3), first)
    for way in WAYS.values():
        same(gradients(call, way(call.run), False), first)
        same(gradients(call, way(call.run), True), second)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_checkpoint_without_a_backward(name: str) -> None:
    call = FUNCTIONS[name]
    expected = call.run(*call.tensors)
    with torch.no_grad():
        same(checkpoint(call.run, *call.tensors, use_reentrant=False), expected)
    found = recomputed(call.run)(*leaves(call))
    same([y.detach() for y in as_tuple(found)], list(as_tuple(expected)))


# Selective checkpoints: a policy sees fastopt's ops.


def policy(saved: bool, seen: list[str], context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    """Save what ops of ours give, or all but that."""
    ours = str(op).startswith("fastopt.")
    if ours:
        seen.append(str(op))
    return CheckpointPolicy.MUST_SAVE if ours == saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("saved", [True, False], ids=["ours are saved", "all others are"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_selective_checkpoints(name: str, saved: bool) -> None:
    call, seen = FUNCTIONS[name], []  # type: ignore[var-annotated]
    contexts = partial(create_selective_checkpoint_contexts, partial(policy, saved, seen))
    found = gradients(call, recomputed(call.run, context_fn=contexts), False)
    same(found, gradients(call, call.run, False))
    # Probabilities that need a gradient are torch's to differentiate by.
    assert seen or name == "cross_entropy of probabilities"


# What is chosen by chance, and what moves.


def test_dropout_is_drawn_again_alike() -> None:
    """With a seed of the generator's, whose state is restored."""
    v, r = draw(64, 96).requires_grad_(), draw(64, 96, seed=1).requires_grad_()
    found = []
    for way in (lambda f: f, recomputed):
        torch.manual_seed(3)
        y, total = way(lambda v, r: functional.add_rms_norm(v, r, (96,), dropout_p=0.4))(v, r)
        found.append([total.detach(), *torch.autograd.grad(y.sum() + total.sum(), (v, r))])
    same(*found)


def test_running_statistics_move_no_more_than_torchs() -> None:
    """Forward moves them; whether a second time when it is run again is a matter of how much of it
    is, and torch's move."""
    x = draw(8, 4).requires_grad_()
    means = []
    for package in (fastopt.nn, torch.nn):
        norm = package.BatchNorm1d(4)
        with set_checkpoint_early_stop(False):
            checkpoint(norm, x, use_reentrant=False).sum().backward()
        means.append(norm.running_mean)
    torch.testing.assert_close(*means)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_a_hook_has_kept_are_not_written_over(dtype: torch.dtype) -> None:
    """linear_cross_entropy makes gradients in forward and scales them where they lie, but not those
    that a hook has."""
    x, w = (draw(*shape, dtype=dtype).requires_grad_() for shape in ((6, 5), (7, 5)))
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append((t.detach(), t.detach().clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = functional.linear_cross_entropy(x, w, targets(6, classes=7))
    loss.backward(torch.tensor(3.0, dtype=dtype))
    assert len(kept) > 3
    for now, before in kept:
        assert oracle.same_bits(now, before)


# Deliberately wrong candidates.


class _AsksTwice(torch.autograd.Function):
    """y = v w"""

    @staticmethod
    def forward(ctx: Any, v: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(v, w)
        return v * w

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return dy * ctx.saved_tensors[1], dy * ctx.saved_tensors[0]


@pytest.mark.parametrize("way", [recomputed, once])
def test_asking_twice_is_refused(way: Callable[[Function], Function]) -> None:
    call = Call((draw(3, 4, dtype=F64), draw(3, 4, dtype=F64)), _AsksTwice.apply, torch.mul)
    with pytest.raises((RuntimeError, AssertionError), match=r"already|twice"):
        gradients(call, way(call.run), False)
