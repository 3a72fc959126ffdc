"""Rows: clipping, skipping, averaging and rounding inside the step, on the device's own count.

The norm is computed here in float64 from the gradients; with its coefficient as a factor of the
gradients, torch.optim in float64 is the oracle of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastopt
from bench.gpu_device import Device
from bench.gpu_oracle import CASES, Case, Checked
from bench.gpu_rows import Row

LIMIT = 0.7
SIZES = (5, 4097, 1, 0, 70_001, 1823 * 781)
QUICK_SIZES = (5, 37, 0, 300)
# Decay apart from the gradient: where their sum is nearly 0, the rounding of the factor shows.
CHECKED = ("SGD momentum", "AdamW", "NAdam decoupled_weight_decay")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUNDINGS = ("stochastic", "kahan", "master")
WAYS: dict[str, dict[str, Any]] = {"plain": {}, "capturable": {"capturable": True}}


def rows(device: Device, quick: bool) -> Iterator[Row]:
    """quick: small sizes, for the interpreter."""
    maker = _Maker(device, QUICK_SIZES if quick else SIZES, 2 if quick else 6)
    for case in CASES:
        if case.name in (CHECKED[-1:] if quick else CHECKED):
            yield Row(f"clipped: {case.name}", partial(_clipped, maker, case), 20)
            yield Row(f"skipped: {case.name}", partial(_skipped, maker, case), 10)
    adamw = next(case for case in CASES if case.name == "AdamW")
    yield Row("clipped over dtypes", partial(_dtypes, maker))
    yield Row("clipped: launches and syncs", partial(_launches, maker, adamw), 10)
    yield Row("clipped: the same bits in every run", partial(_determinism, maker, adamw))
    yield Row("clipped: graph", partial(_graph, maker, adamw), 10)
    yield Row("clipped: GradScaler", partial(_scaler, maker, adamw), 10)
    yield Row("averages", partial(_averages, maker, adamw))
    for how in ROUNDINGS[: 1 if quick else None]:
        yield Row(f"rounding counted on the device: {how}", partial(_rounding, maker, how))
    yield Row("a wrong limit is found out", partial(_teeth, maker, adamw))


class _Maker:
    def __init__(self, device: Device, sizes: Sequence[int], n_steps: int) -> None:
        self.device, self.sizes, self.n_steps = device, sizes, n_steps

    def parameters(self, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        random = torch.Generator().manual_seed(0)
        values = [torch.randn(n, generator=random).to(dtype) for n in self.sizes]
        return [nn.Parameter(value.to(self.device.device)) for value in values]

    def gradients(self, params: Sequence[Tensor], step: int, scale: float = 1.0) -> list[Tensor]:
        random = torch.Generator().manual_seed(step + 1)
        return [
            (scale * torch.randn(p.shape, generator=random)).to(p.dtype).to(p.device)
            for p in params
        ]


def _norm(grads: Sequence[Tensor | None], maximum: bool = False) -> float:
    flat = torch.cat([g.detach().cpu().double().reshape(-1) for g in grads if g is not None])
    return float(flat.abs().max() if maximum else flat.norm())


def _coefficient(norm: float, limit: float = LIMIT) -> float:
    return min(1.0, limit / (norm + 1e-6))


def _near(got: Any, right: float, what: str, relative: float = 1e-6) -> None:
    if not math.isclose(float(got), right, rel_tol=relative):
        raise AssertionError(f"{what}: got {float(got):.9g} for {right:.9g}")


def _bits(ours: Any) -> list[Tensor]:
    """Copies on the host of every parameter and everything in the state."""
    params = [p for group in ours.param_groups for p in group["params"]]
    states = [x for p in params for x in ours.__dict__["state"].get(p, {}).values()]
    return [x.detach().cpu().clone() for x in (*params, *states) if isinstance(x, Tensor)]


def _same(a: Sequence[Tensor], b: Sequence[Tensor], what: str) -> None:
    if len(a) != len(b) or not all(map(torch.equal, a, b)):
        raise AssertionError(f"{what}: not the same bits")


def _clipped(maker: _Maker, case: Case) -> None:
    for maximum in (False, True):
        norm_type = math.inf if maximum else 2.0
        for options in WAYS.values():
            ours = case.ours(
                maker.parameters(), max_grad_norm=LIMIT, norm_type=norm_type, **options
            )
            _steps(maker, Checked(case, ours, maker.device.truncates), maximum)


def _steps(maker: _Maker, checked: Checked, maximum: bool = False) -> None:
    for step in range(maker.n_steps):
        grads: list[Tensor | None] = [
            *maker.gradients(checked.params, step, scale=(1.0, 1e18, 1e-6)[step % 3])
        ]
        if step == 1:
            grads[0] = None
        norm = _norm(grads, maximum)
        checked.step(grads, g_scale=_coefficient(norm))
        _near(checked.ours.last_step.grad_norm, norm, "the norm")
        _near(checked.ours.last_step.clip_coefficient, _coefficient(norm), "the coefficient")


def _teeth(maker: _Maker, case: Case) -> None:
    ours = case.ours(maker.parameters(), max_grad_norm=1.01 * LIMIT)
    try:
        _steps(maker, Checked(case, ours, maker.device.truncates))
    except AssertionError:
        return
    raise AssertionError("a limit that is off by a hundredth passed")


def _skipped(maker: _Maker, case: Case) -> None:
    """A step with one element that is not finite leaves every bit, and does not count."""
    for value in (math.nan, math.inf):
        params = maker.parameters()
        ours = case.ours(params, skip_nonfinite=True, max_grad_norm=1e9, ema_decay=0.9)
        for step in range(3):
            grads = maker.gradients(params, step)
            if step == 1:
                grads[-1][-1] = value
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            before = _bits(ours)
            ours.step()
            if bool(ours.last_step.skipped) != (step == 1):
                raise AssertionError(f"step {step}: skipped is {ours.last_step.skipped}")
            if step == 1:
                _same(before, _bits(ours), "a skipped step")
                _near(ours.last_step.nonfinite, 1.0, "elements that are not finite")


def _dtypes(maker: _Maker) -> None:
    """One norm over float32, bfloat16, float16 and float64: a launch each."""
    params = [p for dtype in DTYPES for p in maker.parameters(dtype)]
    ours = fastopt.optim.SGD(params, lr=1.0, max_grad_norm=LIMIT)
    for step in range(2):
        grads = maker.gradients(params, step)
        before = [p.detach().cpu().double().clone() for p in params]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        ours.step()
        factor = _coefficient(_norm(grads))
        _near(ours.last_step.clip_coefficient, factor, "the coefficient")
        for p, old, grad in zip(params, before, grads, strict=True):
            right = old - factor * grad.cpu().double()
            # The interpreter truncates to bfloat16.
            room = (2.0 if maker.device.truncates else 1.0) * torch.finfo(p.dtype).eps
            torch.testing.assert_close(p.detach().cpu().double(), right, rtol=room, atol=room)


def _launches(maker: _Maker, case: Case) -> dict[str, Any]:
    """Measure and update, and the small launch that counts; nobody waits for the device."""
    counts: dict[str, Any] = {}
    for name, options, expected in (
        ("clipped", {"max_grad_norm": LIMIT}, 2),
        ("clipped, capturable", {"max_grad_norm": LIMIT, "capturable": True}, 3),
        ("skips", {"skip_nonfinite": True}, 3),
    ):
        params = maker.parameters()
        ours = case.ours(params, **options)
        sets = [maker.gradients(params, k) for k in range(2)]

        def step(k: int, params: Any = params, sets: Any = sets, ours: Any = ours) -> None:
            for p, grad in zip(params, sets[k % 2], strict=True):
                p.grad = grad.detach()
            ours.step()

        step(0)
        step(1)
        maker.device.synchronize()
        with maker.device.no_synchronization():
            step(2)
            report = ours.last_step
        _near(report.grad_norm, _norm(sets[0]), "the norm")
        found = maker.device.launches(partial(step, 3))
        counts[name] = {"kernels": found.kernels, "copies": found.copies}
        if found.kernels != expected:
            raise AssertionError(
                f"{name}: {found.kernels} kernels for {expected}: {', '.join(found.names)}"
            )
    return counts


def _determinism(maker: _Maker, case: Case) -> None:
    found = []
    for _ in range(2 if maker.device.truncates else 20):
        params = maker.parameters()
        ours = case.ours(params, max_grad_norm=LIMIT)
        for p, grad in zip(params, maker.gradients(params, 0), strict=True):
            p.grad = grad
        ours.step()
        found.append([*_bits(ours), ours.last_step.grad_norm.cpu()])
    for other in found[1:]:
        _same(found[0], other, "a clipped step")


def _graph(maker: _Maker, case: Case) -> None:
    """A captured step clips by what lies in the gradients at each replay, and skips by it."""
    params = maker.parameters()
    grads = maker.gradients(params, 0)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    ours = case.ours(params, capturable=True, max_grad_norm=LIMIT, skip_nonfinite=True)
    with maker.device.stream():
        ours.step()
        ours.step()
    replay = maker.device.graph(ours.step)
    checked = Checked(case, ours, maker.device.truncates)
    for k in range(1, 5):
        for grad, value in zip(
            grads, maker.gradients(params, k, scale=10.0 ** (3 * k - 9)), strict=True
        ):
            grad.copy_(value)
        if k == 3:
            grads[0][0] = math.nan
            before = _bits(ours)
            replay()
            _same(before, _bits(ours), "a replay with a NaN")
        else:
            norm = _norm(grads)
            checked.step(grads, g_scale=_coefficient(norm), run=replay)
            _near(ours.last_step.grad_norm, norm, "the norm of a replay")
        maker.device.churn()
    _near(ours.state[params[0]]["step"], 5.0, "steps counted")


def _scaler(maker: _Maker, case: Case) -> None:
    """Ours: unscales, clips and skips inside the step, and the host waits for nothing."""
    params = maker.parameters()
    ours = case.ours(params, max_grad_norm=LIMIT)
    scaler = fastopt.GradScaler(maker.device.device.type, init_scale=1024.0)
    checked = Checked(case, ours, maker.device.truncates)

    def step(waits: bool) -> None:
        if waits or maker.device.truncates:
            scaler.step(ours)
            return
        with maker.device.no_synchronization():
            scaler.step(ours)

    scale = 1024.0
    for k in range(4):
        scaler.scale(torch.zeros(1, device=maker.device.device))
        grads = [scale * g for g in maker.gradients(params, k)]
        norm = _norm(grads) / scale
        if k == 2:
            grads[0][0] = math.inf
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            before = _bits(ours)
            step(waits=False)
            _same(before, _bits(ours), "a step the scaler skips")
            scale /= 2
        else:
            run: Callable[[], None] = partial(step, waits=k == 0)
            checked.step(grads, g_scale=_coefficient(norm) / scale, run=run)
            _near(ours.last_step.grad_norm, norm, "the norm")
        scaler.update()
        _near(scaler.get_scale(), scale, "the scale")


def _averages(maker: _Maker, case: Case) -> None:
    """The first p, then a + (1 - d) (p - a), with a decay that is warmed up, on either count."""
    for dtype in (torch.float32, torch.bfloat16):
        for options in WAYS.values():
            params = maker.parameters(dtype)
            ours = case.ours(params, ema_decay=0.9, ema_warmup=2, **options)
            averages = [p.detach().cpu().double() for p in params]
            for step in range(1, maker.n_steps + 1):
                for p, grad in zip(params, maker.gradients(params, step), strict=True):
                    p.grad = grad
                ours.step()
                decay = min(0.9, (1 + step) / (10 + step)) if step <= 2 else 0.9
                decay = 0.0 if step == 1 else decay
                for a, p in zip(averages, params, strict=True):
                    a.lerp_(p.detach().cpu().double(), 1.0 - decay)
            # An average is of what was computed; a bfloat16 parameter was rounded after.
            room = 8 * torch.finfo(dtype).eps
            for a, p in zip(averages, params, strict=True):
                got = ours.state[p]["averaged"].cpu().double()
                torch.testing.assert_close(got, a, rtol=room, atol=room)


def _rounding(maker: _Maker, how: str) -> None:
    """The bits of steps that the host counts."""
    found = []
    for options in WAYS.values():
        params = maker.parameters(torch.bfloat16)
        ours = fastopt.optim.SGD(
            params, lr=0.01, momentum=0.9, param_rounding=how, rounding_seed=5, **options
        )
        for step in range(3):
            for p, grad in zip(params, maker.gradients(params, step), strict=True):
                p.grad = grad
            ours.step()
        found.append(_bits(ours))
    _same(*found, how)
