"""Clipping, skipping, averaging and rounding through the Triton engine, in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt
from bench.gpu_oracle import CASES, Checked
from fastopt.optim.step import plan
from fastopt.optim.step.grad_scale import Scale
from fastopt_kernels.gpu.step import engine, reduce
from fastopt_kernels.gpu.step.launch import Launch
from tests.gpu.test_optim import Launches, in_two_groups, parameters

INF, NAN = math.inf, math.nan
LIMIT = 0.7
# Full blocks, unrolled and not, and tails.
SHAPES = ((17, 5), (3,), (), (2100,))
ADAMW = next(case for case in CASES if case.name == "AdamW")
NADAM = next(case for case in CASES if case.name == "NAdam decoupled_weight_decay")
COUNTED = {"by the host": {}, "capturable": {"capturable": True}, "fused": {"fused": True}}


def gradients(params: Sequence[Tensor], step: int, scale: float = 1.0) -> list[Any]:
    random = torch.Generator().manual_seed(step)
    return [scale * torch.randn(p.shape, generator=random).to(p.dtype) for p in params]


def give(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def given_in_turn(params: Sequence[Tensor], steps: int) -> Iterator[int]:
    """Each step with its gradients given; the third lacks one."""
    for step in range(steps):
        grads = gradients(params, step)
        if step == 2:
            grads[1] = None
        give(params, grads)
        yield step


def norm_of(grads: Sequence[Tensor | None], maximum: bool = False) -> float:
    flat = torch.cat([g.double().reshape(-1) for g in grads if g is not None])
    return float(flat.abs().max() if maximum else flat.norm())


def coefficient(norm: float, limit: float = LIMIT) -> float:
    return min(1.0, limit / (norm + 1e-6))


def bits(optimizer: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the parameters and everything in the state, steps too."""
    held = [x for p in params for x in optimizer.__dict__["state"].get(p, {}).values()]
    return [x.detach().clone() for x in (*params, *held) if isinstance(x, Tensor)]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    counted = Launches(monkeypatch)
    counted.counts["measure_kernel"] = 0
    kernel = counted._counted("measure_kernel", reduce.measure_kernel)
    monkeypatch.setattr(reduce, "measure_kernel", kernel)
    return counted


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """GradScaler's word is on a device, whose values the host may not read."""
    monkeypatch.setattr(Scale, "on_host", lambda self: False)
    monkeypatch.setattr(Scale, "skip", None)
    monkeypatch.setattr(Scale, "inverse", None)


# Clipping.


def run(maximum: bool, limit: float = LIMIT, **options: Any) -> Checked:
    """Steps clipped to a limit, beside torch's of gradients that were clipped before."""
    case = NADAM if maximum else ADAMW
    params = parameters(shapes=SHAPES)
    more = {"max_grad_norm": limit, "norm_type": INF if maximum else 2.0} | options
    if fused := more.pop("fused", False):
        groups = [group | {"fused": fused} for group in in_two_groups(params)]
        checked = Checked(case, case.ours(groups, **more), truncates=True)
    else:
        checked = Checked(case, case.ours(in_two_groups(params), **more), truncates=True)
    for step in range(3):
        grads = gradients(params, step, scale=0.001 if step == 2 else 1.0)
        if step == 1:
            grads[1] = None
        norm = norm_of(grads, maximum)
        checked.step(grads, g_scale=coefficient(norm))
        report = checked.ours.last_step
        assert float(report.grad_norm) == pytest.approx(norm, rel=1e-6)
        assert float(report.clip_coefficient) == pytest.approx(coefficient(norm), rel=1e-6)
        assert not report.skipped
        assert int(report.nonfinite) == 0
    return checked


@pytest.mark.parametrize("maximum", [False, True], ids=["norm", "largest"])
@pytest.mark.parametrize("how", COUNTED)
def test_clipping_is_torchs_in_two_launches(how: str, maximum: bool, launches: Launches) -> None:
    run(maximum, **COUNTED[how])
    counted = 3 * bool(COUNTED[how])
    assert launches.counts == {"update_kernel": 3, "scalars_kernel": counted, "measure_kernel": 3}


@pytest.mark.parametrize("wrong", [1e9, LIMIT * 1.01])
def test_this_comparison_sees_a_wrong_limit(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    take = reduce.GradNorm.run

    def with_another_limit(self: Any, norm_groups: Any, limits: Any, *rest: Any) -> Any:
        return take(self, norm_groups, [wrong for _ in limits], *rest)

    monkeypatch.setattr(reduce.GradNorm, "run", with_another_limit)
    with pytest.raises(AssertionError, match="off, the worst at"):
        run(maximum=False)


@pytest.mark.parametrize("maximum", [False, True], ids=["norm", "largest"])
def test_one_norm_over_dtypes_groups_and_spans(
    maximum: bool, monkeypatch: pytest.MonkeyPatch, launches: Launches
) -> None:
    """A launch for each dtype; groups 1 and 3 have limits of their own, 2 has none of its norm."""
    monkeypatch.setattr(reduce, "PROGRAMS", 3)
    monkeypatch.setattr(reduce, "PARTS", 2)
    monkeypatch.setattr(reduce, "GROUPS", 2)
    dtypes = (torch.float32, torch.float16, torch.float64, torch.bfloat16)
    params = [
        parameters(dtype, [(n,)])[0]
        for k, dtype in enumerate(dtypes)
        for n in (5, engine.CHUNK + 70 * k, 3)
    ]
    groups = [params[:2], params[2:5], params[5:7], params[7:9], params[9:]]
    own = {1: 0.1, 3: 0.3}
    options = {"lr": 1.0, "norm_type": INF if maximum else 2.0}
    given = [{"params": g} | ({"max_grad_norm": own[k]} if k in own else {})
             for k, g in enumerate(groups)]  # fmt: skip
    optimizer = fastopt.optim.SGD(given, max_grad_norm=LIMIT, **options)
    optimizer.param_groups[2]["max_grad_norm"] = None
    for step in range(2):
        grads = gradients(params, step)
        if step:
            grads[3] = None
        give(params, grads)
        before = [p.detach().double().clone() for p in params]
        optimizer.step()
        by_group = [[p.grad for p in g] for g in groups]
        shared = norm_of([g for k, gs in enumerate(by_group) for g in gs if k not in own], maximum)
        norms = [norm_of(gs, maximum) if k in own else shared for k, gs in enumerate(by_group)]
        limits = [own.get(k, LIMIT) for k in range(len(groups))]
        right = [coefficient(n, x) for n, x in zip(norms, limits, strict=True)]
        right[2] = 1.0
        report = optimizer.last_step
        assert report.clip_coefficient.tolist() == pytest.approx(right, rel=1e-6)
        assert float(report.grad_norm) == pytest.approx(norm_of(grads, maximum), rel=1e-6)
        owner = [k for k, g in enumerate(groups) for _ in g]
        for p, old, grad, k in zip(params, before, grads, owner, strict=True):
            exact = old if grad is None else old - right[k] * grad.double()
            room = (2.1 if p.dtype is torch.bfloat16 else 1.1) * torch.finfo(p.dtype).eps
            torch.testing.assert_close(p.detach().double(), exact, rtol=room, atol=room)
    assert launches.counts == {"update_kernel": 8, "scalars_kernel": 0, "measure_kernel": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-25, 1e20, 1e30])
def test_norms_of_tiny_and_huge_gradients(scale: float, dtype: torch.dtype) -> None:
    """Their squares would vanish or overflow in float32."""
    params = parameters(dtype, SHAPES)
    optimizer = fastopt.optim.SGD(params, lr=1.0, max_grad_norm=LIMIT)
    give(params, gradients(params, 0, scale))
    before = [p.detach().double() for p in params]
    optimizer.step()
    norm = norm_of([p.grad for p in params])
    assert float(optimizer.last_step.grad_norm) == pytest.approx(norm, rel=1e-6)
    moved = norm_of([a - p.detach().double() for a, p in zip(before, params, strict=True)])
    if scale > 1.0 and dtype is torch.float32:
        assert moved == pytest.approx(LIMIT, rel=1e-5)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("maximum", [False, True], ids=["norm", "largest"])
def test_without_skipping_what_is_not_finite_does_what_it_does_in_torch(
    maximum: bool, value: float
) -> None:
    norm_type = INF if maximum else 2.0
    sides = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    for params in sides:
        give(params, gradients(params, 0))
        params[3].grad[1200] = params[0].grad[2, 1] = value  # type: ignore[index]
    torch.nn.utils.clip_grad_norm_(sides[1], LIMIT, norm_type)
    torch.optim.SGD(sides[1], lr=0.1).step()
    ours = fastopt.optim.SGD(sides[0], lr=0.1, max_grad_norm=LIMIT, norm_type=norm_type)
    ours.step()
    for mine, other in zip(*sides, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), equal_nan=True)
    assert int(ours.last_step.nonfinite) == 2


def test_a_limit_may_be_a_tensor_and_change() -> None:
    limit = torch.tensor(LIMIT, dtype=torch.float64)
    params = parameters(shapes=SHAPES)
    optimizer = fastopt.optim.SGD(params, lr=0.1, max_grad_norm=limit, capturable=True)
    for step, now in enumerate((LIMIT, 0.25)):
        limit.fill_(now)
        give(params, gradients(params, step))
        optimizer.step()
        right = coefficient(norm_of([p.grad for p in params]), now)
        assert float(optimizer.last_step.clip_coefficient) == pytest.approx(right, rel=1e-6)


def test_what_another_device_measured_counts() -> None:
    launch = Launch(ADAMW.update.rule, ("fp32",) * 4, [3000], 9, torch.device("cpu"))
    x = torch.randn(3000)
    launch.tensors[0, 1] = x.data_ptr()
    look = reduce.GradNorm(launch.device, [launch])
    settings = (launch.owners, [LIMIT], False, False, None, None)
    clip = look.run(*settings, [torch.tensor([9.0, 2.0], dtype=torch.float64)] * 2)
    right = float((x.double().square().sum() + 18.0).sqrt())
    assert float(clip.wide[0]) == pytest.approx(right, rel=1e-12)
    assert float(clip.factors(True)) == pytest.approx(coefficient(right), rel=1e-12)
    assert clip.wide[1] == 4.0


def test_gradients_on_both_sides_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    told = cycle([True, False])
    monkeypatch.setattr(plan, "measures_on_device", lambda device: next(told))
    params = parameters(shapes=SHAPES)
    before = [p.detach().clone() for p in params]
    optimizer = fastopt.optim.SGD(params, lr=0.1, max_grad_norm=1.0)
    give(params, gradients(params, 0))
    with pytest.raises(RuntimeError, match="optimizer of their own"):
        optimizer.step()
    assert same(before, bits(optimizer, params))


# Skipping.


@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("case", [ADAMW, NADAM], ids=lambda case: case.name)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": LIMIT, "ema_decay": 0.9}], ids=len)
def test_a_skipped_step_leaves_every_bit(case: Any, value: float, options: dict[str, Any]) -> None:
    params = parameters(shapes=SHAPES)
    optimizer = case.ours(params, skip_nonfinite=True, **options)
    for step in range(3):
        grads = gradients(params, step)
        if step == 1:
            grads[0][1, 1] = grads[3][2050] = value
        give(params, grads)
        before = bits(optimizer, params)
        optimizer.step()
        report = optimizer.last_step
        assert bool(report.skipped) == (step == 1)
        assert int(report.nonfinite) == 2 * (step == 1)
        assert same(before, bits(optimizer, params)) == (step == 1)
    assert float(optimizer.state[params[0]]["step"]) == 2.0


def test_a_step_that_is_not_skipped_is_torchs() -> None:
    params = parameters(shapes=SHAPES)
    checked = Checked(NADAM, NADAM.ours(params, skip_nonfinite=True), truncates=True)
    for step in range(3):
        checked.step(gradients(params, step))


SCALERS = [torch.amp.GradScaler, fastopt.GradScaler]


@pytest.mark.parametrize("cls", SCALERS)
@pytest.mark.parametrize("options", [{"max_grad_norm": LIMIT}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.usefixtures("on_a_device")
def test_a_scaler_unscales_skips_and_is_told(cls: Any, options: dict[str, Any]) -> None:
    """The norm is that of unscaled gradients; ours passes over them once."""
    if cls is torch.amp.GradScaler and "skip_nonfinite" in options:
        options = options | {"max_grad_norm": 1e9}
    params = parameters(shapes=SHAPES)
    checked = Checked(ADAMW, ADAMW.ours(params, **options), truncates=True)
    scaler = cls("cpu", init_scale=1024.0)
    scale = 1024.0
    for step in range(4):
        scaler.scale(torch.ones(()))
        grads = [g * scale for g in gradients(params, step)]
        if step == 1:
            grads[3][7] = INF
            before = bits(checked.ours, params)
            give(params, grads)
            scaler.step(checked.ours)
            assert checked.ours.last_step.skipped
            assert same(before, bits(checked.ours, params))
            scale /= 2
        else:
            norm = norm_of(grads) / (1024.0 if step == 0 else 512.0)
            right = coefficient(norm, options.get("max_grad_norm", 1e9)) / scale
            checked.step(grads, g_scale=right, run=lambda: scaler.step(checked.ours))
            assert float(checked.ours.last_step.grad_norm) == pytest.approx(norm, rel=1e-6)
        scaler.update()
        assert scaler.get_scale() == scale
    assert not checked.ours._finds_inf


@pytest.mark.usefixtures("on_a_device")
def test_our_scaler_leaves_torchs_pass_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def passes_over_gradients(*_: Any) -> None:
        raise AssertionError("torch's own pass")

    params = parameters(shapes=SHAPES)
    give(params, gradients(params, 0))
    optimizer = fastopt.optim.AdamW(params, skip_nonfinite=True)
    scaler = fastopt.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    monkeypatch.setattr(scaler, "_unscale_grads_", passes_over_gradients)
    scaler.step(optimizer)
    scaler.update()
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


@pytest.mark.usefixtures("on_a_device")
def test_two_optimizers_of_one_scaler_have_each_its_own_verdict() -> None:
    sides = [parameters(shapes=SHAPES) for _ in range(2)]
    optimizers = [fastopt.optim.AdamW(params, max_grad_norm=LIMIT) for params in sides]
    for params in sides:
        give(params, gradients(params, 0))
    sides[1][3].grad[7] = INF  # type: ignore[index]
    scaler = fastopt.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert [bool(optimizer.last_step.skipped) for optimizer in optimizers] == [False, True]
    assert scaler.get_scale() == 2.0


# Options of the step, where the device counts the steps.


STEP_OPTIONS: dict[str, dict[str, Any]] = {
    "clip_value": {"clip_value": 0.5},
    "averages": {"ema_decay": 0.9},
    "averages, warmed up": {"ema_decay": 0.75, "ema_warmup": 2, "clip_value": 1.5},
    "stochastic": {"param_rounding": "stochastic", "rounding_seed": 7, "max_grad_norm": LIMIT},
    "kahan": {"param_rounding": "kahan", "ema_decay": 0.5},
    "master": {"param_rounding": "master"},
}


@pytest.mark.parametrize("how", [how for how in COUNTED if COUNTED[how]])
@pytest.mark.parametrize("extra", STEP_OPTIONS)
def test_extras_are_those_of_steps_the_host_counts(extra: str, how: str) -> None:
    """Bit by bit: what the host counts is compared with torch in test_optim."""
    dtype = torch.bfloat16 if "param_rounding" in STEP_OPTIONS[extra] else torch.float32
    sides = []
    for options in ({}, COUNTED[how]):
        params = parameters(dtype, SHAPES)
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]
        optimizer = fastopt.optim.SGD(
            groups, lr=0.1, momentum=0.9, **STEP_OPTIONS[extra], **options
        )
        for _ in given_in_turn(params, 4):
            optimizer.step()
        sides.append(bits(optimizer, params))
    assert same(*sides)


def test_stochastic_keys_of_large_seeds_and_steps() -> None:
    """Two halves of a 64-bit hash, on the device's own count."""
    sides = []
    for options in ({}, {"capturable": True}):
        params = [nn.Parameter(torch.linspace(1, 2, 600, dtype=torch.bfloat16)) for _ in range(3)]
        optimizer = fastopt.optim.AdamW(
            params, lr=1e-4, param_rounding="stochastic", rounding_seed=2**63 + 12345, **options
        )
        give(params, gradients(params, 0))
        optimizer.step()
        for p in params:
            optimizer.state[p]["step"].fill_(2.0**24 - 3)
        optimizer.step()
        sides.append(bits(optimizer, params)[:3])
    assert same(*sides)
    assert not torch.equal(sides[0][0], sides[0][1])
