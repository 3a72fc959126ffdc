"""A process group of one rank: nothing of it is a part, and nothing is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import fastopt
from tests.hostile import ranks


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    with ranks.process_group(str(tmp_path), rank=0, world=1):
        yield


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`", "ignore:`torch.jit")
@pytest.mark.parametrize("wrapper", ranks.WRAPPERS)
def test_norms_and_telemetry_are_of_the_whole(wrapper: str) -> None:
    model, optimizer = ranks.wrap(wrapper, max_grad_norm=0.05, telemetry=True)
    model(ranks.batch(0, 0)).square().mean().backward()
    norm = torch.stack([ranks.local(p.grad).norm() for p in model.parameters()]).norm()
    optimizer.step()
    inner: Any = getattr(optimizer, "optim", optimizer)
    torch.testing.assert_close(inner.last_step.grad_norm, norm)
    assert not any(row.shard for row in inner.telemetry().values())


@pytest.mark.parametrize("as_view", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_steps_in_backward_are_counted_once(named: bool, as_view: bool) -> None:
    """DistributedDataParallel hands out zeros for gradients that are freed before it sees them."""
    results = []
    for released in (True, False):
        net = ranks.make_net()
        ddp = DistributedDataParallel(net, gradient_as_bucket_view=as_view)
        optimizer = fastopt.optim.AdamW(net.parameters(), lr=0.05)
        if released:
            optimizer.release_gradients(model=ddp if named else None)
        for step in range(3):
            ddp(ranks.batch(0, step)).square().mean().backward()
            assert not released or all(p.grad is None for p in net.parameters())
            optimizer.step()
            optimizer.zero_grad()
        assert {int(state["step"]) for state in optimizer.state.values()} == {3}
        results.append(ranks.values(net))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_these_checks_see_a_step_too_many() -> None:
    net = ranks.make_net()
    optimizer = fastopt.optim.AdamW(net.parameters(), lr=0.05)
    optimizer.release_gradients()
    net(ranks.batch(0, 0)).square().mean().backward()
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
