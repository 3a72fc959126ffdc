"""bf16 parameters that lose nothing to rounding: by chance, with a compensation, or exactly."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastopt
from fastopt_kernels.cpu.step import rounding
from tests.optim.pairs import give_grads, make_params

KEEPING = ["stochastic", "kahan", "master"]
KEPT = {"kahan": ("compensation", torch.bfloat16), "master": ("low_bits", torch.int16)}
BF16 = torch.bfloat16


def value_of(optimizer: Any, param: Tensor, how: str) -> Tensor:
    """What a parameter stands for, with all that is kept of it, in float64."""
    wide = param.detach().float()
    if how == "kahan":
        return wide.double() + optimizer.state[param]["compensation"].double()
    if how == "master":
        low = optimizer.state[param]["low_bits"].to(torch.int32)
        return (wide.view(torch.int32) + low).view(torch.float32).double()
    return wide.double()


def parameter(value: float, n: int = 4099, dtype: torch.dtype = BF16) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((n,), value, dtype=dtype))


@pytest.mark.parametrize("how", KEEPING)
def test_decay_by_small_steps_arrives(how: str) -> None:
    """2000 steps of AdamW without gradients leave (1 - lr wd)^2000 = 0.819."""
    param = parameter(1.0)
    optimizer = fastopt.optim.AdamW([param], lr=1e-3, weight_decay=0.1, param_rounding=how)
    param.grad = torch.zeros_like(param)
    for _ in range(2000):
        optimizer.step()
    left = float(param.detach().double().mean())
    assert left == pytest.approx((1 - 1e-4) ** 2000, rel=0.01)


def test_rounded_to_nearest_it_does_not() -> None:
    """What the options are for; torch's own stands still alike."""
    param = parameter(1.0)
    optimizer = fastopt.optim.AdamW([param], lr=1e-3, weight_decay=0.1)
    param.grad = torch.zeros_like(param)
    for _ in range(200):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones_like(param))


@pytest.mark.parametrize(
    ("how", "lr"), [*[(how, 1e-4) for how in KEEPING], ("stochastic", 1e-5), ("master", 1e-5)]
)
def test_tiny_steps_move_as_far_as_in_float32(how: str, lr: float) -> None:
    """A compensation in bf16 adds 8 bits: it rounds steps of 1e-5 of a parameter."""
    params = {dtype: parameter(1.0, dtype=dtype) for dtype in (BF16, torch.float32)}
    moved = {}
    for dtype, param in params.items():
        optimizer = fastopt.optim.SGD([param], lr=lr, param_rounding=how)
        param.grad = torch.ones_like(param)
        for _ in range(3000):
            optimizer.step()
        kept = how if dtype is BF16 else "nearest"
        moved[dtype] = 1.0 - float(value_of(optimizer, param, kept).mean())
    assert moved[BF16] == pytest.approx(moved[torch.float32], rel=0.02)


@pytest.mark.parametrize("value", [1.0, 1.37, 3e-5, -2.6e7])
def test_chance_is_right_on_average(value: float) -> None:
    """The mean of a million roundings is within 3e-5 of what was rounded."""
    param = parameter(value, n=1_000_003)
    start = param.detach().float().clone()
    param.grad = torch.full_like(param, abs(value) * 0.001)
    grad = param.grad.float()
    fastopt.optim.SGD([param], lr=1.0, param_rounding="stochastic").step()
    exact = (start - grad).double()
    error = (param.detach().double() - exact).mean() / exact[0].abs()
    assert param.detach().unique().numel() == 2
    assert abs(float(error)) < 3e-5


def test_chance_is_the_same_for_any_number_of_threads() -> None:
    found = []
    kept = torch.get_num_threads()
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        params = make_params(((70_001,), (5,), (300, 200)), dtype=BF16)
        optimizer = fastopt.optim.AdamW(params, param_rounding="stochastic", rounding_seed=7)
        for step in range(3):
            give_grads(params, step)
            optimizer.step()
        found.append([p.detach().clone() for p in params])
    torch.set_num_threads(kept)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_chance_differs_by_seed_step_parameter_and_element() -> None:
    def ups(seed: int, steps: int) -> Tensor:
        params = [parameter(1.0) for _ in range(2)]
        optimizer = fastopt.optim.SGD(
            params, lr=2**-9, param_rounding="stochastic", rounding_seed=seed
        )
        for step in range(steps):
            for param in params:
                param.grad = torch.full_like(param, 1.0 if step == steps - 1 else 0.0)
            optimizer.step()
        return torch.stack([p.detach() for p in params]) < 1.0

    first = ups(0, 1)
    # Half a unit from either neighbour: as likely up as down, whatever was drawn elsewhere.
    for other in (ups(1, 1), ups(0, 2), first.flip(0), first.roll(1, 1)):
        assert 0.45 < float((first ^ other).double().mean()) < 0.55
    assert torch.equal(first, ups(0, 1))


def test_master_is_float32() -> None:
    """Bit for bit the trajectory of a float32 parameter with the same gradients."""
    shapes = ((517,), (7, 5), ())
    params = make_params(shapes, dtype=BF16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    ours = fastopt.optim.SGD(params, lr=0.013, param_rounding="master")
    theirs = fastopt.optim.SGD(wide, lr=0.013)
    for step in range(9):
        give_grads(params, step)
        for param, other in zip(params, wide, strict=True):
            assert param.grad is not None
            other.grad = param.grad.float()
        ours.step()
        theirs.step()
    for param, other in zip(params, wide, strict=True):
        assert torch.equal(value_of(ours, param, "master").float(), other.detach())
        off = (param.detach().float() - other.detach()).abs()
        assert (off <= 2**-8 * other.detach().abs()).all()


def test_upper_and_lower_halves_join() -> None:
    """All exponents, ties and the largest numbers."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    bits[:65536] = (np.arange(65536, dtype=np.uint32) << 16) | 0x8000
    x = bits.view(np.float32)
    x = x[np.isfinite(x)]
    for each in (*x[:: max(1, len(x) // 5000)], np.float32(3.4e38), np.float32(1e-45)):
        high = rounding.upper(each)
        low = rounding.lower(each, high)
        assert -0x8000 <= low <= 0x7FFF
        assert rounding.join(high, low) == each
    assert np.isnan(rounding.upper(np.float32(np.nan)))
    assert rounding.upper(np.float32(np.inf)) == np.inf


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("how", KEEPING)
def test_what_is_not_finite_stays(how: str, value: float) -> None:
    param, plain = parameter(1.0, n=9), parameter(1.0, n=9)
    for owned, options in ((param, {"param_rounding": how}), (plain, {})):
        optimizer = fastopt.optim.SGD([owned], lr=0.5, **options)
        for step in range(3):
            owned.grad = torch.full_like(owned, 0.25)
            if step == 1:
                owned.grad[3] = value
            optimizer.step()
    torch.testing.assert_close(param.detach(), plain.detach(), equal_nan=True)


@pytest.mark.parametrize(
    ("name", "how"),
    [("SGD", "kahan"), ("SGD", "master"), *[(n, h) for n in ("AdamW", "RMSprop") for h in KEEPING]],
)
def test_saved_and_loaded_bitwise(name: str, how: str) -> None:
    cls = getattr(fastopt.optim, name)
    params = make_params(dtype=BF16)
    optimizer = cls(params, lr=0.01, param_rounding=how, ema_decay=0.9)
    for step in range(4):
        give_grads(params, step)
        optimizer.step()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = cls(others, lr=0.01, param_rounding=how, ema_decay=0.9)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, owned in ((optimizer, params), (loaded, others)):
        for step in range(4, 7):
            give_grads(owned, step)
            each.step()
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param.detach(), other.detach())
        mine, theirs = optimizer.state[param], loaded.state[other]
        assert list(mine) == list(theirs)
        for key in mine:
            assert mine[key].dtype == theirs[key].dtype
            assert torch.equal(mine[key], theirs[key])
        if how in KEPT:
            key, dtype = KEPT[how]
            assert mine[key].dtype == dtype


@pytest.mark.parametrize("how", KEEPING)
def test_other_dtypes_are_rounded_as_ever(how: str) -> None:
    params = [
        torch.nn.Parameter(p) for p in (torch.randn(33), torch.randn(33, dtype=torch.float16))
    ]
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = fastopt.optim.AdamW(params, param_rounding=how)
    theirs = fastopt.optim.AdamW(plain)
    for step in range(3):
        for optimizer, owned in ((ours, params), (theirs, plain)):
            give_grads(owned, step)
            optimizer.step()
    assert all(torch.equal(a.detach(), b.detach()) for a, b in zip(params, plain, strict=True))
    assert all(set(ours.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in params)


def test_a_rounding_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="'kahan'"):
        fastopt.optim.AdamW(make_params(dtype=BF16), param_rounding="up")
