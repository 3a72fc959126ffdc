"""Running averages of the parameters, kept by the step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from tests.optim import pairs
from tests.optim.pairs import construct, give_grads, make_params


def averages(history: list[list[Tensor]], decay: float, warmup: int = 0) -> list[Tensor]:
    """What ema_decay gives, in float64: history[0] are the parameters before the first step."""
    found = [p.double() for p in history[0]]
    for t, params in enumerate(history[1:], start=1):
        d = min(decay, (1 + t) / (10 + t)) if t <= warmup else decay
        found = [d * a + (1 - d) * p.double() for a, p in zip(found, params, strict=True)]
    return found


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *[(case, torch.float32) for case in pairs.ONE_EACH],
        *[("AdamW-amsgrad", dtype) for dtype in (torch.bfloat16, torch.float64)],
    ],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_averaged_parameters(case: str, warmup: int, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    optimizer: Any = construct(fastopt, case, params, ema_decay=0.9, ema_warmup=warmup)
    plain_params = make_params(dtype=dtype)
    plain = construct(fastopt, case, plain_params)
    history = [[p.detach().clone() for p in params]]
    for step in range(7):
        for each, owned in ((optimizer, params), (plain, plain_params)):
            give_grads(owned, step)
            each.step()
        history.append([p.detach().clone() for p in params])
    for mine, other in zip(params, plain_params, strict=True):
        assert torch.equal(mine.detach(), other.detach())
    # An average is of what was computed; a 16-bit parameter was rounded after.
    room = 8 * torch.finfo(dtype).eps
    with optimizer.averaged():
        for param, exact in zip(params, averages(history, 0.9, warmup), strict=True):
            torch.testing.assert_close(param.detach().double(), exact, rtol=room, atol=room)
    for param, own in zip(params, history[-1], strict=True):
        assert torch.equal(param.detach(), own)


def test_averages_of_half_parameters_do_not_stand_still() -> None:
    """Kept in float32: in bfloat16 a step of a thousandth is rounded away."""
    param = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = fastopt.optim.SGD([param], lr=0.0, ema_decay=0.999)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    with torch.no_grad():
        param.fill_(2.0)
    for _ in range(1000):
        optimizer.step()
    average = optimizer.state[param]["averaged"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(
        average, torch.full_like(average, 2 - 0.999**1000), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averages_are_saved_with_the_state(dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    optimizer = fastopt.optim.AdamW(params, ema_decay=0.9)
    for step in range(3):
        give_grads(params, step)
        optimizer.step()
    other = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = fastopt.optim.AdamW(other, ema_decay=0.9)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, owned in ((optimizer, params), (loaded, other)):
        give_grads(owned, 9)
        each.step()
    for p, q in zip(params, other, strict=True):
        mine, theirs = optimizer.state[p]["averaged"], loaded.state[q]["averaged"]
        assert mine.dtype == theirs.dtype == torch.float32
        assert torch.equal(mine, theirs)
