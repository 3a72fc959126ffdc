"""Rows: launches, synchronizations and graphs of every way to step that is timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu_check_device import QUICK_SIZES, SIZES, Maker, assert_same
from bench.gpu_device import Device
from bench.gpu_oracle import CASES, Case
from bench.gpu_rows import NotApplicableError, Row
from bench.gpu_variants import VARIANTS
from bench.providers import FASTOPT

# Those that a clipped step's two launches are not looked at for elsewhere.
STORED = [name for name, variant in VARIANTS.items() if not variant.clips]
QUICK = ("fp32 8-bit",)


def rows(device: Device, quick: bool) -> Iterator[Row]:
    maker = Maker(device, QUICK_SIZES if quick else SIZES)
    for name in QUICK if quick else STORED:
        yield Row(f"launches and syncs: AdamW {name}", partial(_launches_of, maker, name))
        yield Row(f"graph: AdamW {name}", partial(_graph_of, maker, name))
    adamw = next(case for case in CASES if case.name == "AdamW")
    yield Row("torch's GradScaler, fused: syncs", partial(_torchs_scaler, maker, adamw))


def _launches_of(maker: Maker, name: str) -> dict[str, Any]:
    """However states are stored and parameters rounded, a step is one launch."""
    variant = VARIANTS[name]
    params = maker.parameters(variant.dtype)
    step = _rebound(variant.step(FASTOPT, "AdamW", params), params, maker)
    step()
    step()
    maker.device.synchronize()
    with maker.device.no_synchronization():
        step()
    found = maker.device.launches(step)
    if found.kernels != 1:
        raise AssertionError(f"{found.kernels} kernels for 1: {', '.join(found.names)}")
    return {"kernels": found.kernels, "copies": found.copies}


def _rebound(step: Callable[[], Any], params: Sequence[Any], maker: Maker) -> Callable[[], Any]:
    """The step, with other tensors as gradients each time, as a backward leaves them."""
    drawn = [maker.gradients(k) for k in range(2)]
    cast = [[g.to(p.dtype) for p, g in zip(params, grads, strict=True)] for grads in drawn]
    sets = itertools.cycle(cast)

    def call() -> None:
        for p, grad in zip(params, next(sets), strict=True):
            p.grad = grad.detach()
        step()

    return call


def _graph_of(maker: Maker, name: str) -> None:
    """Replays leave the bits of eager steps."""
    variant, results = VARIANTS[name], []
    for replayed in (False, True):
        params = maker.parameters(variant.dtype)
        for p, grad in zip(params, maker.gradients(0), strict=True):
            p.grad = grad.to(p.dtype)
        ours = variant.optimizer(FASTOPT, "AdamW", params, capturable=True)
        with maker.device.stream():
            ours.step()
            ours.step()
        step = maker.device.graph(ours.step) if replayed else ours.step
        for k in range(1, 4):
            for p, grad in zip(params, maker.gradients(k), strict=True):
                p.grad.copy_(grad)  # type: ignore[union-attr]
            step()
            maker.device.churn()
        maker.device.synchronize()
        results.append(maker.held(ours))
    assert_same(*results, f"replays of {name}")


def _torchs_scaler(maker: Maker, case: Case) -> None:
    """torch.amp.GradScaler leaves unscaling and skipping to a fused step: nobody waits."""
    if maker.device.device.type == "cpu":
        raise NotApplicableError("on a CPU the scaler's verdict is the host's to see")
    params = maker.parameters()
    ours = case.ours_fused(params)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    scaler.scale(torch.zeros(1, device=maker.device.device))
    step = _rebound(lambda: scaler.step(ours), params, maker)
    for _ in range(2):
        step()
        scaler.update()
    maker.device.synchronize()
    with maker.device.no_synchronization():
        step()
        scaler.update()
    maker.device.synchronize()
