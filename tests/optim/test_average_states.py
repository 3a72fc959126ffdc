"""Where averages begin and go on: late, after a load, in checkpoints of others and in old ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fastopt
from tests.optim.pairs import assert_params_close, construct, give_grads, make_params
from tests.optim.test_averages import DECAY, Oracle, check, room_of

CASES = ["SGD", "SGD-momentum", "AdamW", "NAdam"]


def missing_at(step: int) -> list[int]:
    """Gradients that come and go; the last parameter never has one."""
    return [3, *([1] if step % 3 else []), *([0] if step % 4 == 1 else [])]


def run(optimizer: Any, params: list[nn.Parameter], steps: range, oracle: Any = None) -> None:
    for step in steps:
        give_grads(params, step, missing_at(step))
        optimizer.step()
        if oracle is not None:
            oracle.update()


def twin(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def state_of(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    """Parameters and all that is kept of them."""
    kept = [optimizer.state.get(p, {}) for p in params]
    return [*params, *(state[name] for state in kept for name in sorted(state))]


def assert_same_bits(mine: list[Tensor], other: list[Tensor]) -> None:
    assert len(mine) == len(other)
    for k, (a, b) in enumerate(zip(mine, other, strict=True)):
        assert a.dtype == b.dtype, k
        assert torch.equal(a, b), k


@pytest.mark.parametrize("case", CASES)
def test_an_average_that_begins_late_begins_with_the_parameter(case: str) -> None:
    """ema_decay added to what torch's optimizer has trained, and to a group that is added."""
    params = make_params()
    theirs = construct(torch, case, params)
    run(theirs, params, range(100))
    optimizer: Any = construct(fastopt, case, params, ema_decay=DECAY)
    optimizer.load_state_dict(theirs.state_dict())
    for group in optimizer.param_groups:
        group["ema_decay"] = DECAY
    oracle = Oracle(params)
    run(optimizer, params, range(100, 101), oracle)
    assert all(torch.equal(optimizer.state[p]["averaged"], p) for p in params)
    run(optimizer, params, range(101, 110), oracle)
    late = make_params([(5,)], seed=8)
    optimizer.add_param_group({"params": late})
    others = Oracle(late)
    for step in range(110, 120):
        give_grads(late, step)
        run(optimizer, params, range(step, step + 1), oracle)
        others.update()
    check(optimizer, params, oracle.averages, 1e-6)
    check(optimizer, late, others.averages, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("warmup", [0, 30])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_resumed_bit_by_bit(case: str, warmup: int, dtype: torch.dtype, way: str) -> None:
    """In the warm-up too, of parameters whose steps are fewer than those of their average."""
    params = make_params(dtype=dtype)
    options = {"ema_decay": DECAY, "ema_warmup": warmup}
    optimizer: Any = construct(fastopt, case, params, **options)
    run(optimizer, params, range(7))
    if way == "deepcopy":
        others, resumed = copy.deepcopy((params, optimizer))
    else:
        others = twin(params)
        resumed = construct(fastopt, case, others, **options)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, owned in ((optimizer, params), (resumed, others)):
        run(each, owned, range(7, 12))
    assert_same_bits(state_of(resumed, others), state_of(optimizer, params))
    assert all(s["averaged"].dtype == torch.float32 for s in optimizer.state.values())


def old(state_dict: dict[str, Any]) -> dict[str, Any]:
    """As it was saved when nothing said how many steps are in an average."""
    state_dict = copy.deepcopy(state_dict)
    for state in state_dict["state"].values():
        state.pop("n_averaged", None)
    return state_dict


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("warmup", [0, 5])
def test_old_checkpoints_go_on_where_they_were(case: str, warmup: int) -> None:
    params = make_params()
    options = {"ema_decay": DECAY, "ema_warmup": warmup}
    optimizer: Any = construct(fastopt, case, params, **options)
    for step in range(8):
        give_grads(params, step)
        optimizer.step()
    others = twin(params)
    resumed: Any = construct(fastopt, case, others, **options)
    resumed.load_state_dict(old(optimizer.state_dict()))
    for each, owned in ((optimizer, params), (resumed, others)):
        for step in range(8, 12):
            give_grads(owned, step, missing_at(step)[1:])
            each.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(optimizer.state[p]["averaged"], resumed.state[q]["averaged"])


def test_an_old_checkpoint_of_a_warm_up_goes_on_with_the_count_of_its_steps() -> None:
    params = make_params()
    optimizer = fastopt.optim.AdamW(params, lr=0.1, ema_decay=0.99, ema_warmup=50)
    for step in range(4):
        give_grads(params, step)
        optimizer.step()
    others = twin(params)
    resumed = fastopt.optim.AdamW(others, lr=0.1, ema_decay=0.99, ema_warmup=50)
    resumed.load_state_dict(old(optimizer.state_dict()))
    for each, owned in ((optimizer, params), (resumed, others)):
        give_grads(owned, 4)
        each.step()
    assert_same_bits(state_of(resumed, others), state_of(optimizer, params))


def test_warm_up_counts_the_steps_of_the_average() -> None:
    """A parameter with a gradient in every other step is averaged as one that stands in between."""
    params = make_params([(9,)])
    optimizer = fastopt.optim.AdamW(params, lr=0.1, ema_decay=0.99, ema_warmup=6)
    average = torch.zeros(9, dtype=torch.float64)
    for t in range(1, 11):
        give_grads(params, t, missing=[0] if t % 2 else [])
        optimizer.step()
        decay = 0.0 if t == 1 else min(0.99, (1 + t) / (10 + t)) if t <= 6 else 0.99
        average.lerp_(params[0].detach().double(), 1 - decay)
    check(optimizer, params, [average], room_of(torch.float32))


def test_an_average_that_is_kept_no_longer_is_not_put_in() -> None:
    params = make_params()
    optimizer = fastopt.optim.AdamW(params, lr=0.1, ema_decay=DECAY)
    run(optimizer, params, range(5))
    groups = [{"params": params[:1], "ema_decay": DECAY}, {"params": params[1:]}]
    other = fastopt.optim.AdamW(groups, lr=0.1)
    saved = optimizer.state_dict()
    split = [{**saved["param_groups"][0], "params": [0]}, {**saved["param_groups"][0]}]
    split[1]["params"] = [1, 2, 3]
    other.load_state_dict({**saved, "param_groups": split})
    other.param_groups[1]["ema_decay"] = None
    average = other.state[params[0]]["averaged"].double()
    check(other, params, [average, *(p.detach().double() for p in params[1:])], 0.0)


@pytest.mark.parametrize("case", CASES)
def test_torch_goes_on_from_what_is_saved_for_it(case: str) -> None:
    """Of a parameter that was never stepped torch has no state, and makes one at its first step."""
    params = make_params()
    plain_params = twin(params)
    optimizer: Any = construct(fastopt, case, params, ema_decay=DECAY)
    plain = construct(torch, case, plain_params)
    for step in range(3):
        for each, owned in ((optimizer, params), (plain, plain_params)):
            give_grads(owned, step, [2])
            each.step()
    others = twin(params)
    theirs = construct(torch, case, others)
    theirs.load_state_dict(optimizer.torch_state_dict())
    assert set(theirs.state_dict()["state"]) == set(plain.state_dict()["state"])
    for each, owned in ((theirs, others), (plain, plain_params)):
        give_grads(owned, 3)
        each.step()
    assert_params_close(others, plain_params)


# What must not be there, and what must.


def bad_step(kind: str, params: list[nn.Parameter], optimizer: Any) -> None:
    """A step that is refused after states were made for it."""
    give_grads(params, 0)
    if kind == "complex":
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(3, dtype=torch.complex64))})
        optimizer.param_groups[-1]["params"][0].grad = torch.ones(3, dtype=torch.complex64)
    else:
        optimizer.state[params[2]]["exp_avg"] = torch.zeros(7)
    with pytest.raises(RuntimeError, match=r"complex|must match its state"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["complex", "state"])
def test_a_refused_step_leaves_no_states(kind: str) -> None:
    """An entry without anything in it passes for an optimizer that has been stepped."""
    params = make_params()
    optimizer = fastopt.optim.AdamW(params, clip_value=1.0, ema_decay=DECAY)
    bad_step(kind, params, optimizer)
    assert list(optimizer.state) == ([params[2]] if kind == "state" else [])


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.seen, self.unseen = nn.Linear(4, 3), nn.Linear(4, 3)

    def train_on(self, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            self.seen(x).square().mean().backward()
            if step == 0:  # its gradient stays away from then on
                self.unseen(x).square().mean().backward()
            optimizer.step()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("look_first", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_resumed_through_a_distributed_checkpoint(
    name: str, look_first: bool, tmp_path: Path
) -> None:
    """torch makes the states of an optimizer that has none by a step of its own."""
    models = [Tower(), Tower()]
    optimizers = [
        getattr(fastopt.optim, name)(m.parameters(), lr=0.05, ema_decay=DECAY) for m in models
    ]
    models[0].train_on(optimizers[0], range(4))
    saved = {"optim": get_optimizer_state_dict(models[0], optimizers[0])}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    models[1].load_state_dict(models[0].state_dict())
    if look_first:
        with optimizers[1].averaged():
            pass
    there = {"optim": get_optimizer_state_dict(models[1], optimizers[1])}
    dcp.load(there, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(models[1], optimizers[1], there["optim"])
    for model, optimizer in zip(models, optimizers, strict=True):
        model.train_on(optimizer, range(4, 9))
    mine, other = (
        state_of(o, list(m.parameters())) for o, m in zip(optimizers, models, strict=True)
    )
    assert_same_bits(mine, other)
