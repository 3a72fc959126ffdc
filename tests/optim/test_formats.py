"""States in float32 beside bf16, in bf16, and in 8 bits."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from fastopt.optim.state import formats
from tests.optim import pairs
from tests.optim.pairs import give_grads, make_params

EIGHT = "8bit"
SHAPES = ((517,), (7, 41), (3000,), ())
# Optimizers all of whose states may be of 8 bits.
SERVED: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9},
    "Adam": {},
    "AdamW": {},
    "NAdam": {},
    "RAdam": {},
}


def make(name: str, params: list[torch.nn.Parameter], **options: Any) -> Any:
    return getattr(fastopt.optim, name)(params, lr=1e-2, **(SERVED.get(name, {}) | options))


def run(optimizer: Any, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        give_grads(params, step)
        optimizer.step()


def all_of(optimizer: Any, params: list[torch.nn.Parameter]) -> list[Tensor]:
    """Parameters and states."""
    return [t for p in params for t in (p.detach(), *optimizer.state[p].values())]


def is_close(ours: Tensor, theirs: Tensor, start: Tensor) -> bool:
    """Whether a trajectory ends within a twentieth of the way it has gone."""
    way = (theirs - start).norm()
    return bool((ours.float() - theirs).norm() < 0.05 * way)


@pytest.mark.parametrize("name", SERVED)
def test_eight_bits_follow_float32(name: str) -> None:
    params = make_params(SHAPES)
    start = [p.detach().clone() for p in params]
    wide = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours, theirs = make(name, params, state_dtype=EIGHT), make(name, wide)
    run(ours, params, range(12))
    run(theirs, wide, range(12))
    for param, other, first in zip(params, wide, start, strict=True):
        assert is_close(param.detach(), other.detach(), first)
        codes = {k: v for k, v in ours.state[param].items() if k.endswith("_codes")}
        assert len(codes) == len(ours.update_of(ours.param_groups[0]).state_names)
        for value in codes.values():
            assert value.dtype in (torch.int8, torch.uint8)
            assert value.shape == param.shape


def test_a_wrong_state_would_be_noticed() -> None:
    """The comparison above, of a run whose first moments were lost on the way."""
    params, wide = make_params(SHAPES), make_params(SHAPES)
    start = [p.detach().clone() for p in params]
    ours, theirs = make("AdamW", params, state_dtype=EIGHT), make("AdamW", wide)
    for step in range(12):
        run(ours, params, range(step, step + 1))
        for param in params:
            ours.state[param]["exp_avg_codes"].zero_()
    run(theirs, wide, range(12))
    assert not is_close(params[0].detach(), wide[0].detach(), start[0])


def test_codes_are_within_a_step_of_the_state() -> None:
    """One step from zero: what is stored against what is computed, and on average."""
    (param,) = make_params(((100_001,),))
    give_grads([param], 0)
    assert param.grad is not None
    optimizer = make("AdamW", [param], state_dtype=EIGHT)
    optimizer.step()
    state = optimizer.state[param]
    g = param.grad.double()
    for name, true in (("exp_avg", 0.1 * g), ("exp_avg_sq", 0.001 * g * g)):
        value = formats.value_in(state, name).double()
        largest = torch.nn.functional.pad(true.abs(), (0, -len(true) % 256)).view(-1, 256).amax(1)
        largest = largest.repeat_interleave(256)[: len(true)]
        # 16 codes an octave; below the first octave as in it.
        octaves = 8 if name == "exp_avg" else 16
        step = (true.abs() + largest * 2.0**-octaves) / 16
        assert ((value - true).abs() <= 1.05 * step).all()
        assert float((value - true).mean() / true.abs().mean()) == pytest.approx(0.0, abs=2e-3)


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1.0, 1e20])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_scales_neither_underflow_nor_overflow(name: str, scale: float) -> None:
    params, wide = make_params(SHAPES), make_params(SHAPES)
    start = [p.detach().clone() for p in params]
    options: dict[str, Any] = {"eps": 0.0} if name == "AdamW" and scale == 1e-8 else {}
    lr = 1e-2 / scale if name == "SGD" else 1e-2
    for optimizer, owned in (
        (make(name, params, state_dtype=EIGHT, **options), params),
        (make(name, wide, **options), wide),
    ):
        optimizer.param_groups[0]["lr"] = lr
        for step in range(4):
            give_grads(owned, step)
            for param in owned:
                assert param.grad is not None
                param.grad *= scale
            optimizer.step()
    for param, other, first in zip(params, wide, start, strict=True):
        assert param.isfinite().all()
        if (other.detach() - first).norm() > 0:
            assert is_close(param.detach(), other.detach(), first)


def test_one_outlier_leaves_its_block_alone() -> None:
    param = torch.nn.Parameter(torch.zeros(1024))
    wide = torch.nn.Parameter(torch.zeros(1024))
    torch.manual_seed(0)
    for owned, options in ((param, {"state_dtype": EIGHT}), (wide, {})):
        optimizer = fastopt.optim.AdamW([owned], lr=1e-2, **options)
        for step in range(20):
            torch.manual_seed(step)
            owned.grad = torch.randn(1024)
            owned.grad[300] *= 100.0
            optimizer.step()
    assert (param - wide).norm() < 0.15 * wide.norm()
    assert (param - wide).abs().max() < 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_stays_where_it_is(value: float) -> None:
    pairs.assert_one_is_lost(
        lambda param, dtype: fastopt.optim.AdamW([param], lr=1e-2, state_dtype=dtype), EIGHT, value
    )


def test_zero_gradients_of_float16_give_no_nan() -> None:
    param = torch.nn.Parameter(torch.ones(300, dtype=torch.float16))
    optimizer = fastopt.optim.AdamW([param], lr=1e-2, eps=1e-8, state_dtype=EIGHT)
    for _ in range(5):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert param.isfinite().all()


def second_moment(dtype: Any, steps: int) -> float:
    """Of a gradient that was 1 and is 0 since, beside another that stays 1."""
    param = torch.nn.Parameter(torch.zeros(512, dtype=torch.bfloat16))
    optimizer = fastopt.optim.AdamW([param], lr=0.0, state_dtype=dtype)
    for step in range(steps):
        param.grad = torch.ones_like(param)
        param.grad[::2] = float(step < 100)
        optimizer.step()
    return float(formats.value_in(optimizer.state[param], "exp_avg_sq")[::2].float().mean())


def test_a_second_moment_stands_still_in_bf16_alone() -> None:
    """Why torch.bfloat16 means float32 for second moments, and 8 bits are rounded by chance."""
    exact = second_moment(torch.float32, 1000)
    assert exact == pytest.approx((1 - 0.999**100) * 0.999**900, rel=1e-3)
    assert second_moment({"exp_avg_sq": torch.bfloat16}, 1000) > 2 * exact
    assert second_moment(torch.bfloat16, 1000) == exact
    assert second_moment(EIGHT, 1000) == pytest.approx(exact, rel=0.05)


def test_float32_states_beside_bf16_parameters() -> None:
    (param,) = make_params(((300,),), dtype=torch.bfloat16)
    optimizer = make("AdamW", [param], state_dtype=torch.float32)
    run(optimizer, [param], range(2))
    state = optimizer.state[param]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    optimizer = make("AdamW", [param], state_dtype=torch.bfloat16)
    run(optimizer, [param], range(2))
    state = optimizer.state[param]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16, torch.float32)


def test_bits_do_not_depend_on_threads() -> None:
    found, kept = [], torch.get_num_threads()
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        params = make_params(((70_001,), (5,), (300, 200)))
        optimizer = make("AdamW", params, state_dtype=EIGHT)
        run(optimizer, params, range(3))
        found.append(
            [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
        )
    torch.set_num_threads(kept)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_skipped_step_leaves_every_bit() -> None:
    params = make_params(SHAPES)
    optimizer = make("AdamW", params, state_dtype=EIGHT, skip_nonfinite=True)
    run(optimizer, params, range(2))
    before = [t.clone() for t in all_of(optimizer, params)]
    give_grads(params, 2)
    assert params[1].grad is not None
    params[1].grad[0, 0] = float("inf")
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, all_of(optimizer, params), strict=True))


@pytest.mark.parametrize("kind", ["channels_last", "transposed", "strided"])
def test_layouts(kind: str) -> None:
    def laid(x: Tensor) -> Tensor:
        if kind == "channels_last":
            return x.to(memory_format=torch.channels_last)
        if kind == "transposed":
            return x.transpose(0, 1)
        return torch.stack([x, x], dim=-1)[..., 0]

    torch.manual_seed(0)
    base = torch.randn(6, 5, 11, 3)
    params = [torch.nn.Parameter(laid(base.clone())), torch.nn.Parameter(laid(base.clone()))]
    start = params[0].detach().clone()
    for param, options in zip(params, ({"state_dtype": EIGHT}, {}), strict=True):
        optimizer = fastopt.optim.AdamW([param], lr=1e-2, **options)
        for step in range(4):
            torch.manual_seed(step)
            param.grad = torch.randn(param.shape)
            optimizer.step()
    assert is_close(params[0].detach(), params[1].detach(), start)


def test_a_parameter_that_is_laid_out_anew_keeps_its_state() -> None:
    param = torch.nn.Parameter(torch.randn(6, 5, 11, 3))
    optimizer = fastopt.optim.AdamW([param], lr=1e-2, state_dtype=EIGHT)
    param.grad = torch.randn_like(param)
    optimizer.step()
    before = formats.value_in(optimizer.state[param], "exp_avg").clone()
    param.data = param.data.to(memory_format=torch.channels_last)
    param.grad = torch.zeros_like(param)
    optimizer.param_groups[0]["betas"] = (1.0 - 1e-7, 0.999)
    optimizer.step()
    after = formats.value_in(optimizer.state[param], "exp_avg")
    assert (after - before).abs().max() < 0.05 * before.abs().max()
    assert (after - before).norm() < 0.05 * before.norm()


FORMATS = [None, torch.float32, torch.bfloat16, EIGHT]


@pytest.mark.parametrize(("saved", "loaded"), [*itertools.product(FORMATS, FORMATS)])
def test_saved_and_loaded_into_another_format(saved: Any, loaded: Any) -> None:
    params = make_params(SHAPES, dtype=torch.bfloat16)
    optimizer = make("AdamW", params, state_dtype=saved)
    run(optimizer, params, range(3))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make("AdamW", others, state_dtype=loaded)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0].get("state_dtype") == formats.named(loaded)
    before = {k: formats.value_in(optimizer.state[params[0]], k) for k in ("exp_avg", "exp_avg_sq")}
    for param in others:
        param.grad = torch.zeros_like(param)
    other.param_groups[0]["lr"] = 0.0
    other.step()
    state = other.state[others[0]]
    fresh = make("AdamW", [torch.nn.Parameter(params[0].detach().clone())], state_dtype=loaded)
    run(fresh, fresh.param_groups[0]["params"], range(1))
    expected = next(iter(fresh.state.values()))
    assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in expected.items()}
    for name, decay in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
        off = (formats.value_in(state, name).float() - decay * before[name].float()).norm()
        assert off < 0.05 * before[name].float().norm()


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "master"])
@pytest.mark.parametrize("state_dtype", FORMATS)
def test_saved_and_loaded_bitwise(state_dtype: Any, rounding: str) -> None:
    options = {"state_dtype": state_dtype, "param_rounding": rounding}
    params = make_params(SHAPES, dtype=torch.bfloat16)
    optimizer = make("AdamW", params, **options)
    run(optimizer, params, range(3))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make("AdamW", others, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, range(3, 5))
    run(other, others, range(3, 5))
    for param, other_param in zip(params, others, strict=True):
        assert torch.equal(param, other_param)
        mine, theirs = optimizer.state[param], other.state[other_param]
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize(("saved", "loaded"), [("kahan", "master"), ("master", "kahan")])
def test_what_a_rounding_keeps_is_converted(saved: str, loaded: str) -> None:
    params = make_params(SHAPES, dtype=torch.bfloat16)
    optimizer = make("AdamW", params, param_rounding=saved)
    run(optimizer, params, range(4))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make("AdamW", others, param_rounding=loaded)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.param_groups[0]["lr"] = 0.0
    for param in others:
        param.grad = torch.zeros_like(param)
    other.step()

    def whole(state: dict[str, Any], param: Tensor) -> Tensor:
        high = param.detach().float()
        if "compensation" in state:
            return high + state["compensation"].float()
        return (high.view(torch.int32) + state["low_bits"].to(torch.int32)).view(torch.float32)

    for param, other_param in zip(params, others, strict=True):
        assert len({"compensation", "low_bits"} & set(other.state[other_param])) == 1
        mine, theirs = (
            whole(optimizer.state[param], param),
            whole(other.state[other_param], other_param),
        )
        torch.testing.assert_close(mine, theirs, rtol=2.0**-16, atol=0)


@pytest.mark.parametrize("state_dtype", FORMATS)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_to_torch_and_back(name: str, state_dtype: Any) -> None:
    params = make_params(SHAPES)
    optimizer = make(name, params, state_dtype=state_dtype, ema_decay=0.9, max_grad_norm=1.0)
    run(optimizer, params, range(3))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theirs = getattr(torch.optim, name)(others, lr=1e-2, **SERVED[name])
    plain = optimizer.torch_state_dict()
    run(theirs, others, range(1))
    expected = theirs.state_dict()
    assert plain.keys() == expected.keys()
    for ours, torchs in zip(plain["param_groups"], expected["param_groups"], strict=True):
        assert set(ours) - {"capturable"} == set(torchs) - {"capturable"}
    assert {k: set(v) for k, v in plain["state"].items()} == {
        k: set(v) for k, v in expected["state"].items()
    }
    theirs.load_state_dict(plain)
    run(theirs, others, range(3, 4))
    copies = [torch.nn.Parameter(p.detach().clone()) for p in others]
    back = make(name, copies, ema_decay=0.9)
    back.param_groups[0].update(state_dtype=state_dtype)
    back.load_state_dict(theirs.state_dict())
    run(back, back.param_groups[0]["params"], range(4, 5))
    first = "exp_avg" if name == "AdamW" else "momentum_buffer"
    ours, torchs = back.state[back.param_groups[0]["params"][0]], theirs.state[others[0]]
    give_grads(others, 4)
    theirs.step()
    off = (formats.value_in(ours, first).float() - torchs[first]).norm()
    assert off < 0.05 * torchs[first].norm()


def test_a_later_version_is_refused() -> None:
    params = make_params(SHAPES)
    optimizer = make("AdamW", params, state_dtype=EIGHT)
    run(optimizer, params, range(1))
    state_dict = optimizer.state_dict()
    assert state_dict["fastopt_version"] == 2
    with pytest.raises(ValueError, match="version 7"):
        optimizer.load_state_dict(state_dict | {"fastopt_version": 7})
    assert "fastopt_version" not in make("AdamW", make_params(SHAPES)).state_dict()


def test_saved_states_are_small() -> None:
    param = torch.nn.Parameter(torch.randn(1 << 16, dtype=torch.bfloat16))
    optimizer = make("AdamW", [param], state_dtype=EIGHT, param_rounding="master")
    run(optimizer, [param], range(1))
    saved = optimizer.state_dict()["state"][0]
    n_bytes = sum(t.numel() * t.element_size() for t in saved.values())
    assert n_bytes <= 4.04 * param.numel()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("AdamW", {"state_dtype": "4bit"}, "supported: torch.float32"),
        ("AdamW", {"state_dtype": {"exp_average": EIGHT}}, "'exp_average'"),
        ("AdamW", {"state_dtype": EIGHT, "amsgrad": True}, "max_exp_avg_sq"),
        ("AdamW", {"state_dtype": EIGHT, "differentiable": True}, "differentiable"),
        ("Adagrad", {"state_dtype": EIGHT}, "'sum'"),
        ("RMSprop", {"state_dtype": EIGHT, "centered": True}, "grad_avg"),
    ],
)
def test_what_there_is_not_is_refused_at_construction(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(fastopt.optim, name)(make_params(SHAPES), lr=1e-2, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_eight_bits_beside_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    params = make_params(((9,),), dtype=dtype)
    with pytest.raises(ValueError, match="float32, bfloat16 and float16"):
        fastopt.optim.AdamW(params, state_dtype=EIGHT)
