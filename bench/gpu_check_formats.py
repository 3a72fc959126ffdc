"""Rows: states of 8 bits and telemetry on the device.

The codes are judged by an oracle without a compiler: a step is that of the float32 states the codes
stand for, computed by the same kernels without codes (which other rows compare with torch), and
what it leaves in codes is within one of them of what it should be, the right ones on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastopt
from bench.gpu_check_passes import LIMIT, WAYS, _bits, _Maker, _near, _same
from bench.gpu_device import Device
from bench.gpu_rows import Row
from fastopt.optim.state import formats
from fastopt_kernels.chunks import BLOCK_8BIT

# Around a block and a chunk, and a large one.
SIZES = (1, 255, 256, 257, 4099, 0, 1823 * 781)
QUICK_SIZES = (1, 0, 300)
SERVED: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9},
    "Adam": {},
    "AdamW": {},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Parameters, and what stands around the rule.
Around = tuple[torch.dtype, dict[str, Any]]
AROUND: tuple[Around, ...] = (
    (torch.float32, {}),
    (torch.float32, {"max_grad_norm": LIMIT, "ema_decay": 0.9}),
    (torch.bfloat16, {"param_rounding": "master", "clip_value": 0.5}),
    (torch.bfloat16, {"param_rounding": "stochastic"}),
)
TOLD: tuple[Around, ...] = (
    (torch.float32, {}),
    (torch.float32, {"max_grad_norm": LIMIT, "state_dtype": "8bit"}),
    (torch.float32, {"ema_decay": 0.9}),
    (torch.float64, {}),
)


def rows(device: Device, quick: bool) -> Iterator[Row]:
    """quick: small sizes, for the interpreter."""
    maker = _Maker(device, QUICK_SIZES if quick else SIZES, 2 if quick else 6)
    for name in list(SERVED)[:1] if quick else SERVED:
        yield Row(f"8 bits: {name}", partial(_coded, maker, name, DTYPES[: 1 if quick else 3]), 20)
    step_options = AROUND[-1:] if quick else AROUND
    yield Row("8 bits: counted on the device", partial(_counted, maker, step_options), 10)
    yield Row("8 bits: the same bits at any alignment", partial(_alignment, maker))
    yield Row("8 bits: skipped and not finite", partial(_not_finite, maker))
    yield Row("8 bits: chance is fair", partial(_fair, maker))
    yield Row("8 bits: states that are off are found out", partial(_teeth, maker))
    yield Row("telemetry", partial(_telemetry, maker, TOLD[1:2] if quick else TOLD), 20)
    yield Row("telemetry: a graph, and a scale of the device", partial(_replayed, maker), 10)


def _make(name: str, params: Sequence[Tensor], **options: Any) -> Any:
    more = {"lr": 0.01, "state_dtype": "8bit"} | SERVED[name] | options
    return getattr(fastopt.optim, name)(params, **more)


def _give(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def _values(state: dict[str, Any], name: str) -> Tensor:
    return formats.value_in({key: value.cpu() for key, value in state.items()}, name)


def _room(right: Tensor, codes: torch.dtype) -> Tensor:
    """The distance of neighbouring codes around each value."""
    blocks = torch.nn.functional.pad(right.abs(), (0, -len(right) % BLOCK_8BIT))
    largest = blocks.view(-1, BLOCK_8BIT).amax(1).repeat_interleave(BLOCK_8BIT)[: len(right)]
    return (right.abs() + largest * 2.0 ** (-16 if codes is torch.uint8 else -8)) / 16


def _follow(maker: _Maker, name: str, dtype: torch.dtype, factor: float = 1.0) -> None:
    """factor: of the states the oracle begins each step with; other than 1 it is wrong"""
    params, others = maker.parameters(dtype), maker.parameters(dtype)
    ours, wide = _make(name, params), _make(name, others, state_dtype=torch.float32)
    for step in range(maker.n_steps):
        for owned, optimizer in ((params, ours), (others, wide)):
            _give(owned, maker.gradients(owned, step))
            optimizer.step()
        for p, q in zip(params, others, strict=True):
            # Two compilations of one rule may fuse a product and a sum, or not.
            room = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(p.detach(), q.detach(), rtol=room, atol=0.01 * room)
            q.data.copy_(p.data)
            for key, value in wide.state[q].items():
                if key == "step" or not p.numel():
                    continue
                got, right = _values(ours.state[p], key), value.cpu()
                codes = ours.state[p][formats.codes_name(key)].dtype
                if ((got - right).abs() > 1.01 * _room(right, codes)).any():
                    raise AssertionError(f"{name} {dtype}: {key} is off by more than a code")
                value.copy_(factor * got)


def _coded(maker: _Maker, name: str, dtypes: Sequence[torch.dtype]) -> None:
    for dtype in dtypes:
        _follow(maker, name, dtype)


def _teeth(maker: _Maker) -> None:
    try:
        _follow(maker, "AdamW", torch.float32, factor=1.1)
    except AssertionError:
        return
    raise AssertionError("states that are off by a tenth passed")


def _counted(maker: _Maker, around: Sequence[Around]) -> None:
    """The bits of steps that the host counts, with and without what stands around the rule."""
    for dtype, step_options in around:
        found = []
        for options in WAYS.values():
            params = maker.parameters(dtype)
            ours = _make("AdamW", params, rounding_seed=2**40 + 5, **step_options, **options)
            for step in range(3):
                _give(params, maker.gradients(params, step))
                ours.step()
            found.append(_bits(ours))
        _same(*found, f"{dtype} {step_options}")


def _alignment(maker: _Maker) -> None:
    """The vector body and the masked one, of parameters and gradients off a boundary."""
    found = []
    for offset in (0, 1):
        params = []
        for p in maker.parameters():
            room = torch.empty(p.numel() + offset, device=p.device)[offset:]
            params.append(nn.Parameter(room.copy_(p.detach())))
        ours = _make("AdamW", params)
        for step in range(2):
            _give(params, maker.gradients(params, step))
            ours.step()
        found.append(_bits(ours))
    _same(*found, "other alignment")


def _not_finite(maker: _Maker) -> None:
    """A skipped step leaves every bit; without skipping, other blocks go on."""
    for value in (math.nan, math.inf):
        for options in ({"skip_nonfinite": True}, {}):
            params = maker.parameters()
            ours = _make("AdamW", params, **options)
            for step in range(3):
                grads = maker.gradients(params, step)
                if step == 1:
                    grads[-1][-1] = value
                _give(params, grads)
                before = _bits(ours)
                ours.step()
                if step == 1 and options:
                    _same(before, _bits(ours), "a skipped step")
            last = params[-1].detach()
            if not last[: -BLOCK_8BIT - 1].isfinite().all() or bool(last[-1].isfinite()) != bool(
                options
            ):
                raise AssertionError(f"{value} did not stay where it was")


def _fair(maker: _Maker) -> None:
    """The mean of what is stored is that of what was computed."""
    param = nn.Parameter(torch.zeros(max(maker.sizes), device=maker.device.device))
    ours = _make("AdamW", [param])
    (param.grad,) = maker.gradients([param], 0)
    ours.step()
    g = param.grad.cpu().double()
    for name, right in (("exp_avg", 0.1 * g), ("exp_avg_sq", 0.001 * g * g)):
        error = (_values(ours.state[param], name).double() - right).mean() / right.abs().mean()
        # A code is 1/16 of its value wide: 0.02 of it is the mean error of one element, about.
        if abs(error) > 0.1 / math.sqrt(len(g)):
            raise AssertionError(f"{name}: a mean error of {error:.2g}")


def _telemetry(maker: _Maker, around: Sequence[Around]) -> None:
    for (dtype, step_options), options in ((x, way) for x in around for way in WAYS.values()):
        params = maker.parameters(dtype)
        ours = fastopt.optim.AdamW(params, lr=0.05, telemetry=True, **step_options, **options)
        for step in range(2):
            _give(params, maker.gradients(params, step))
            before = [p.detach().clone() for p in params]
            ours.step()
        _check_rows(ours.telemetry().values(), before, params, f"{dtype} {step_options}")


def _check_rows(rows: Any, before: Sequence[Tensor], params: Sequence[Tensor], what: str) -> None:
    for row, old, p in zip(rows, before, params, strict=True):
        assert p.grad is not None
        update = p.detach().double() - old.double()
        _near(row.grad_norm, float(p.grad.double().norm()), f"{what}: gradient norm", 1e-5)
        _near(row.param_norm, float(p.detach().double().norm()), f"{what}: norm", 1e-5)
        _near(row.update_norm, float(update.norm()), f"{what}: update norm", 1e-4)
        if row.nonfinite or row.lost:
            raise AssertionError(f"{what}: {row.nonfinite} not finite, {row.lost} lost")


def _replayed(maker: _Maker) -> None:
    """A graph's replays write what they saw; a scale is taken out on the device."""
    params = maker.parameters()
    ours = fastopt.optim.AdamW(
        [{"params": params, "fused": True}], lr=0.05, telemetry=True, capturable=True
    )
    scale = torch.full((), 8.0, device=maker.device.device)
    ours.grad_scale, ours.found_inf = scale, torch.zeros((), device=maker.device.device)
    _give(params, [8.0 * g for g in maker.gradients(params, 0)])
    with maker.device.stream():
        ours.step()
        ours.step()
    replay = maker.device.graph(ours.step)
    for step in range(1, 4):
        grads = maker.gradients(params, step)
        for p, grad in zip(params, grads, strict=True):
            assert p.grad is not None
            p.grad.copy_(8.0 * grad)
        if step == 2:
            ours.found_inf.fill_(1.0)
        before = [p.detach().clone() for p in params]
        replay()
        maker.device.synchronize()
        ours.found_inf.fill_(0.0)
        for p in params:
            p.grad.div_(8.0)  # type: ignore[union-attr]
        _check_rows(ours.telemetry().values(), before, params, "a replay")
        maker.device.churn()
