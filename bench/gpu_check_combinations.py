"""Rows: every optimizer with every way to store its states and what may stand around a step.

Two steps beside torch.optim's in float64, whose gradients are clipped here; a stored value may be
off by its roundings, and by what its states have lost. Then the CPU's kernels on the same values,
and steps that are smaller than a rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastopt
from bench.combination_cases import FORMATS, OPTIONS
from bench.gpu_device import Device
from bench.gpu_interpret import numba_on_cpu
from bench.gpu_oracle import ulp
from bench.gpu_rows import NotApplicableError, Row
from bench.providers import HYPERPARAMETERS, OPTIMIZERS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = ((300,), (7, 5), (4099,))
QUICK_SHAPES = ((300,), (7, 5))
STEPS = 2
# With every option; the kernels around their rules are those around the others'.
IN_FULL = ("AdamW", "SGD")
OTHERS = ("plain", "release_gradients", "all of them")
FP32_FORMATS = ("own", "8bit")
ROUNDINGS = ("stochastic", "kahan", "master")
# What states may lose of an update: bf16 eight bits of each, codes 1/16 of the nearest.
LOST = {"8bit": 0.2, "bfloat16": 0.03}
LOST_BF16, LOST_FP32 = 0.03, 2e-5
# Beside the CPU's kernels: equal bits, but where the last bit of a sum decides a rounding.
EQUAL = 0.98
TINY_STEPS, TINY = 24, 2.0**-8 / 16


def rows(device: Device, quick: bool) -> Iterator[Row]:
    """quick: few combinations, for the interpreter."""
    maker = _Maker(device, QUICK_SHAPES if quick else SHAPES)
    for optimizer in IN_FULL[:1] if quick else OPTIMIZERS:
        for dtype, format in _stored(quick):
            name = f"{optimizer} {dtype}, states {format}"
            run = partial(_combine, maker, optimizer, dtype, format, quick)
            yield Row(name, run, 20)
    for how in ROUNDINGS:
        yield Row(f"steps smaller than a rounding: {how}", partial(_small_steps, maker, how))
    yield Row("a combination that is wrong is found out", partial(_teeth, maker))
    for optimizer in IN_FULL[:1] if quick else IN_FULL:
        for dtype, format in list(_stored(quick))[: 1 if quick else None]:
            name = f"beside the CPU's kernels: {optimizer} {dtype}, states {format}"
            yield Row(name, partial(_beside_cpu, maker, optimizer, dtype, format, quick), 20)


def _stored(quick: bool) -> Iterator[tuple[str, str]]:
    """Dtypes of parameters, and formats of states."""
    if quick:
        yield from (("bf16", "own"), ("fp32", "8bit"))
        return
    yield from (("bf16", format) for format in FORMATS)
    yield from (("fp32", format) for format in FP32_FORMATS)


def _options(optimizer: str, dtype: str, quick: bool) -> list[str]:
    if quick or optimizer not in IN_FULL:
        return list(OTHERS)
    return [name for name in OPTIONS if dtype == "bf16" or name not in ROUNDINGS]


class _Maker:
    def __init__(self, device: Device, shapes: Sequence[tuple[int, ...]]) -> None:
        self.device, self.shapes = device, shapes

    def drawn(self, dtype: torch.dtype, seed: int) -> list[Tensor]:
        random = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=random).to(dtype) for shape in self.shapes]

    def parameters(self, dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
        return [nn.Parameter(x.to(device)) for x in self.drawn(dtype, 0)]


def _hyperparameters(optimizer: str) -> dict[str, Any]:
    # An eps that lets Adadelta's first steps be larger than a rounding.
    more = {"eps": 1e-2, "lr": 1.0} if optimizer == "Adadelta" else {"lr": 0.1}
    return HYPERPARAMETERS[optimizer] | more


def _made(optimizer: str, format: str, option: str, params: Sequence[Tensor]) -> Any:
    """Ours, on these parameters; raises NotApplicableError for what it refuses."""
    options = _hyperparameters(optimizer) | OPTIONS[option]
    cls, wanted = getattr(fastopt.optim, optimizer), FORMATS[format]
    if wanted == "8bit" and 0 < len(cls.eight_bit_names) < len(cls.state_names):
        wanted = dict.fromkeys(cls.eight_bit_names, wanted)  # those that can be
    try:
        return cls(params, state_dtype=wanted, **options)
    except ValueError as refusal:
        raise NotApplicableError(f"refused: {refusal}") from None


def _step(optimizer: Any, option: str, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    if option == "release_gradients":
        sum((p * g).sum() for p, g in zip(params, grads, strict=True)).backward()
    else:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
    optimizer.step()


def _run(
    maker: _Maker,
    optimizer: str,
    dtype: torch.dtype,
    format: str,
    option: str,
    device: torch.device,
) -> tuple[Any, list[nn.Parameter]]:
    params = maker.parameters(dtype, device)
    ours = _made(optimizer, format, option, params)
    if option == "release_gradients":
        ours.release_gradients()
    for step in range(STEPS):
        grads = [g.to(device) for g in maker.drawn(dtype, step + 1)]
        _step(ours, option, params, grads)
        if "skip_nonfinite" in OPTIONS[option] and step == 0:
            before = [p.detach().clone() for p in params]
            _step(ours, option, params, [torch.full_like(p, torch.nan) for p in params])
            if not all(map(torch.equal, before, params)):
                raise AssertionError(f"{option}: a step with NaN wrote something")
    return ours, params


class Path(NamedTuple):
    """What stands at the end, and on the way to it the largest values and the lengths of steps."""

    end: list[Tensor]
    largest: list[Tensor]
    length: list[Tensor]

    @classmethod
    def starting(cls, values: Sequence[Tensor]) -> Path:
        zeros = [torch.zeros_like(x) for x in values]
        return cls([x.clone() for x in values], [x.abs() for x in values], zeros)

    def go(self, values: Sequence[Tensor]) -> None:
        for end, largest, length, x in zip(*self, values, strict=True):
            length += (x - end).abs()
            largest.copy_(torch.maximum(largest, x.abs()))
            end.copy_(x)


def _right(maker: _Maker, optimizer: str, dtype: torch.dtype, option: str) -> tuple[Path, Path]:
    """The ways of parameters and averages by torch's steps in float64."""
    step_options = OPTIONS[option]
    params = [nn.Parameter(x.double()) for x in maker.drawn(dtype, 0)]
    way, averages = (Path.starting([p.detach() for p in params]) for _ in range(2))
    torchs = getattr(torch.optim, optimizer)(params, foreach=False, **_hyperparameters(optimizer))
    for step in range(STEPS):
        grads = [g.double() for g in maker.drawn(dtype, step + 1)]
        if limit := step_options.get("max_grad_norm"):
            norm = torch.cat([g.reshape(-1) for g in grads]).norm()
            grads = [g * min(1.0, float(limit / (norm + 1e-6))) for g in grads]
        if limit := step_options.get("clip_value"):
            grads = [g.clamp(-limit, limit) for g in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        torchs.step()
        way.go([p.detach() for p in params])
        weight = 1.0 - step_options.get("ema_decay", 0.0) if step else 1.0
        averages.go([a.lerp(p, weight) for a, p in zip(averages.end, way.end, strict=True)])
    return way, averages


def _lost(dtype: torch.dtype, format: str) -> float:
    narrow = LOST_BF16 if dtype is torch.bfloat16 and format == "own" else LOST_FP32
    return LOST.get(format, narrow)


def _wrong(dtype: torch.dtype, format: str, got: Sequence[Tensor], right: Path) -> str | None:
    """Each step may be off by a rounding to the stored dtype and by what states have lost of it."""
    for x, exact, largest, length in zip(got, *right, strict=True):
        lost = _lost(dtype, format)
        allowed = STEPS * ulp(largest, dtype) + lost * (length + length.mean())
        error = (x.detach().cpu().double() - exact).abs()
        if not bool((error <= allowed).all()):
            k = int((error - allowed).reshape(-1).nan_to_num(torch.inf).argmax())
            return (
                f"{tuple(x.shape)}: off by {error.reshape(-1)[k]:.2g} at {k}, where "
                f"{allowed.reshape(-1)[k]:.2g} is allowed, after steps of "
                f"{length.reshape(-1)[k]:.2g} in all"
            )
    return None


def _combine(maker: _Maker, optimizer: str, dtype: str, format: str, quick: bool) -> dict[str, Any]:
    found, width = [], DTYPES[dtype]
    options = _options(optimizer, dtype, quick)
    for option in options:
        ours, params = _run(maker, optimizer, width, format, option, maker.device.device)
        right, averages = _right(maker, optimizer, width, option)
        if text := _wrong(width, format, params, right):
            found.append(f"{option}: {text}")
        if "ema_decay" in OPTIONS[option]:
            held = [ours.state[p]["averaged"] for p in params]
            if text := _wrong(width, format, held, averages):
                found.append(f"{option}: averages, {text}")
        if "telemetry" in OPTIONS[option]:
            found += _told(ours, maker.drawn(width, STEPS))
        if option == "release_gradients" and any(p.grad is not None for p in params):
            found.append(f"{option}: gradients are still there")
    if found:
        raise AssertionError("; ".join(found[:4]))
    return {"options": options}


def _told(ours: Any, grads: Sequence[Tensor]) -> list[str]:
    rows = ours.telemetry().values()
    pairs = [(row.grad_norm, float(g.double().norm())) for row, g in zip(rows, grads, strict=True)]
    return [f"telemetry: norm {a} for {b}" for a, b in pairs if abs(a - b) > 1e-5 * b]


def _small_steps(maker: _Maker, how: str) -> None:
    """Steps of 1/16 of a rounding add up; to the nearest they would all be lost."""
    device, one = maker.device.device, torch.ones(256, dtype=torch.bfloat16)
    param = nn.Parameter(one.to(device))
    ours = fastopt.optim.SGD([param], lr=TINY, param_rounding=how)
    param.grad = torch.ones_like(param)
    for _ in range(TINY_STEPS):
        ours.step()
    moved = float((1.0 - param.detach().double()).mean())
    right = TINY_STEPS * TINY
    # By chance: 256 elements of about one rounding each. Kept bits: one rounding of each.
    room = 5 * 2.0**-8 / 16 if how == "stochastic" else 2.0**-8
    if abs(moved - right) > room or moved == 0:
        raise AssertionError(f"moved by {moved:.3g} for {right:.3g}")


def _teeth(maker: _Maker) -> None:
    narrow = torch.bfloat16
    plain, _ = _right(maker, "SGD", narrow, "plain")
    for option in ("max_grad_norm", "clip_value"):
        other, _ = _right(maker, "SGD", narrow, option)
        if _wrong(narrow, "8bit", other.end, plain) is None:
            raise AssertionError(f"steps with {option} passed for steps without")
    right, _ = _right(maker, "AdamW", narrow, "plain")
    if _wrong(narrow, "8bit", maker.drawn(narrow, 0), right) is None:
        raise AssertionError("parameters that have not moved passed")


def _beside_cpu(maker: _Maker, optimizer: str, dtype: str, format: str, quick: bool) -> None:
    found, width = [], DTYPES[dtype]
    for option in _options(optimizer, dtype, quick)[: 1 if quick else None]:
        _, params = _run(maker, optimizer, width, format, option, maker.device.device)
        mine = [p.detach().cpu() for p in params]
        with numba_on_cpu():
            _, others = _run(maker, optimizer, width, format, option, torch.device("cpu"))
        theirs = [p.detach() for p in others]
        right, _ = _right(maker, optimizer, width, option)
        if text := _wrong(width, format, theirs, right):
            found.append(f"{option}: the CPU's, {text}")
        flat = [torch.cat([p.reshape(-1) for p in each]) for each in (mine, theirs)]
        room = 4 * torch.finfo(torch.float32).eps * flat[0].float().abs().clamp(min=1.0)
        equal = float(((flat[0].float() - flat[1].float()).abs() <= room).double().mean())
        if equal < EQUAL and not maker.device.truncates:
            found.append(f"{option}: {100 * equal:.1f} % of the elements are the CPU's")
    if found:
        raise AssertionError("; ".join(found[:4]))
