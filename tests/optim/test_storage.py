"""Tensors whose storage was freed or shrunk are refused before anything is read or written.

A wrong answer here is a crash, so each case runs in a forked child.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt
from tests.optim.pairs import Pair

# Python 3.12 says so of every fork beside threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
TIMEOUT = 60
N = 600


def in_child(scenario: Callable[[], str]) -> str:
    """What a scenario returns in a forked child, or the signal that ended it."""
    reads, writes = os.pipe()
    if not (child := os.fork()):
        signal.alarm(TIMEOUT)
        torch.set_num_threads(1)
        try:
            answer = scenario()
        except BaseException as error:
            answer = repr(error)
        os.write(writes, answer.encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else answer


def shrink(tensor: Tensor, how: str) -> None:
    storage = tensor.untyped_storage()
    storage.resize_(0 if how == "freed" else storage.nbytes() // 2)


def make(n: int = N, **options: Any) -> tuple[list[nn.Parameter], Any]:
    """Two parameters that have been stepped, with new gradients."""
    params = [nn.Parameter(torch.ones(n)) for _ in range(2)]
    optimizer = fastopt.optim.AdamW(params, lr=0.1, **options)
    for _ in range(2):
        for param in params:
            param.grad = torch.full((n,), 0.5)
        if not optimizer.__dict__["state"]:
            optimizer.step()
    return params, optimizer


def gradient(params: list[nn.Parameter], optimizer: Any) -> Tensor:
    return params[1].grad  # type: ignore[return-value]


def parameter(params: list[nn.Parameter], optimizer: Any) -> Tensor:
    return params[1]


def state(params: list[nn.Parameter], optimizer: Any) -> Tensor:
    return optimizer.state[params[1]]["exp_avg_sq"]  # type: ignore[no-any-return]


def bucket_view(params: list[nn.Parameter], optimizer: Any) -> Tensor:
    """A gradient in the middle of a larger buffer, as DistributedDataParallel has them."""
    n = params[1].numel()
    params[1].grad = torch.ones(40_000 + n)[-n:]
    return params[1].grad


def strided_gradient(params: list[nn.Parameter], optimizer: Any) -> Tensor:
    """A gradient that is read through a buffer."""
    params[1].grad = torch.ones(2 * params[1].numel())[::2]
    return params[1].grad


def step_is_refused(victim: Callable[..., Tensor], how: str, n: int = N, **options: Any) -> str:
    params, optimizer = make(n, **options)
    before = params[0].detach().clone()
    count = optimizer.__dict__["state"][params[0]]["step"].clone()
    shrink(victim(params, optimizer), how)
    try:
        optimizer.step()
    except RuntimeError as error:
        unchanged = torch.equal(params[0], before)
        counted = optimizer.__dict__["state"][params[0]]["step"] != count
        return f"{error} | unchanged {unchanged}, counted {bool(counted)}"
    return "stepped"


def check_refused(answer: str) -> None:
    assert "storage was freed or shrunk" in answer
    assert answer.endswith("unchanged True, counted False")


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
@pytest.mark.parametrize(
    "victim", [gradient, parameter, state, bucket_view, strided_gradient], ids=lambda f: f.__name__
)
def test_a_freed_storage_is_refused(victim: Callable[..., Tensor], options: Any) -> None:
    check_refused(in_child(lambda: step_is_refused(victim, "freed", **options)))


@pytest.mark.parametrize("victim", [parameter, state], ids=lambda f: f.__name__)
def test_half_a_storage_is_refused(victim: Callable[..., Tensor]) -> None:
    check_refused(in_child(lambda: step_is_refused(victim, "halved")))


def test_half_the_storage_of_a_large_gradient_is_refused() -> None:
    check_refused(in_child(lambda: step_is_refused(gradient, "halved", n=1 << 20)))


def first_step_is_refused(how: str, sparse: bool) -> str:
    param = nn.Parameter(torch.ones(N))
    optimizer = fastopt.optim.SGD([param], lr=0.1)
    grad = torch.ones(N).to_sparse() if sparse else torch.ones(N)
    param.grad = grad
    shrink(grad._values() if sparse else grad, how)
    try:
        optimizer.step()
    except RuntimeError as error:
        return f"{error} | unchanged {bool((param == 1).all())}, counted {bool(optimizer.state)}"
    return "stepped"


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("how", ["freed", "halved"])
def test_the_first_step_looks_too(how: str, sparse: bool) -> None:
    check_refused(in_child(lambda: first_step_is_refused(how, sparse)))


def restored() -> str:
    params, optimizer = make()
    grad = gradient(params, optimizer)
    grad.untyped_storage().resize_(0)
    try:
        optimizer.step()
    except RuntimeError:
        grad.untyped_storage().resize_(N * 4)
        grad.fill_(0.5)
        optimizer.step()
        return "alike" if torch.equal(params[0], params[1]) else "apart"
    return "stepped"


def test_a_storage_that_is_there_again_is_stepped() -> None:
    assert in_child(restored) == "alike"


def test_empty_tensors_have_no_storage_and_need_none() -> None:
    pair = Pair("AdamW", shapes=[(0,), (3, 0), (5,)]).run(3)
    pair.check()


class Unchecked(fastopt.optim.AdamW):
    """Wrong: takes the error for a step."""

    def step(self, closure: Any = None) -> Any:
        try:
            super().step(closure)
        except RuntimeError:
            return None


def test_these_checks_see_a_wrong_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastopt.optim, "AdamW", Unchecked)
    with pytest.raises(AssertionError):
        check_refused(in_child(lambda: step_is_refused(gradient, "freed")))


# Negated and conjugated views hold the values of their base.


@pytest.mark.parametrize("lazy", ["parameter", "state"])
@pytest.mark.parametrize("case", ["AdamW", "SGD-momentum"])
@pytest.mark.parametrize("kind", ["negated", "conjugated"])
def test_lazy_views_are_stepped_by_their_values(kind: str, case: str, lazy: str) -> None:
    negated = kind == "negated"
    sides = []
    for resolved in (True, False):
        pair = Pair(case, shapes=[(4, 8)], dtype=torch.float32 if negated else torch.complex64)
        optimizer, (param,) = pair.ours, pair.our_params
        view = _lazy(param.detach(), negated)
        if lazy == "parameter":
            param.data = view.clone() if resolved else view
        for step in range(4):
            param.grad = torch.full_like(param, 0.5 + step)
            if lazy == "state" and step == 2:
                name = "exp_avg" if case == "AdamW" else "momentum_buffer"
                held = _lazy(optimizer.state[param][name], negated)
                optimizer.state[param][name] = held.clone() if resolved else held
            optimizer.step()
        sides.append(param.detach().resolve_conj().resolve_neg().clone())
    torch.testing.assert_close(sides[1], sides[0], rtol=0, atol=0)


def _lazy(tensor: Tensor, negated: bool) -> Tensor:
    return torch._neg_view(tensor) if negated else tensor.conj()
