"""Rows: every optimizer's step on real model shapes, as a share of what a copy reaches.

Plain, clipped, with states of 8 bits and in rounded bf16 (`gpu_variants`), beside torch's ways;
small models are stepped in turn through several copies that exceed the cache (`gpu_turns`).
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_device import Device
from bench.gpu_rows import NotApplicableError, Row
from bench.gpu_turns import (
    ROUNDS,
    WARM,
    Subject,
    copies_beyond_cache,
    copy_bytes_per_second,
    interleaved,
    launches,
    with_shares,
)
from bench.gpu_variants import EVERY, ORDERED, PLAIN, VARIANTS, Variant
from bench.models import SHAPES
from bench.providers import FASTOPT, FOREACH, FUSED

MODELS = ("33m", "gpt2", "1000x1000")
BILLION = "1g"
QUICK = "tiny"
ALL_SHAPES = SHAPES | {BILLION: [(2**30,)], QUICK: [(33, 3), (33,)]}
# With torch.compile beside it, which compiles a step for seconds.
COMPILED = ("33m", "20x1m")


def rows(device: Device, quick: bool) -> Iterator[Row]:
    """The most wanted first: what does not fit the time is what stands last."""
    row = partial(_row, device, rounds=1 if quick else ROUNDS)
    yield Row("device copy", partial(_copy_row, device), 10)
    if quick:
        yield from (row("AdamW", QUICK, VARIANTS[name]) for name in EVERY[1:])
        yield Row(f"AdamW {QUICK} graph", partial(_graph_row, device, QUICK, rounds=1))
        return
    for model, name in itertools.product((*MODELS, BILLION), EVERY):
        yield row("AdamW", model, VARIANTS[name])
    for model in ("1000x1000", "gpt2"):
        yield Row(f"AdamW {model} graph", partial(_graph_row, device, model), 15)
    for model in COMPILED:
        yield row("AdamW", model, PLAIN, compiled=True)
    others = [name for name in VARIANTS if name not in EVERY]
    yield from (row("AdamW", "33m", VARIANTS[name]) for name in others)
    # Plain ones of all, then the other ways of all: a cut falls on the same column of each.
    for model, optimizer in itertools.product(MODELS, ORDERED[1:]):
        yield row(optimizer, model, PLAIN)
    served = [
        (optimizer, name)
        for name, optimizer in itertools.product(EVERY[1:], ORDERED[1:])
        if VARIANTS[name].serves(optimizer)
    ]
    yield from (row(optimizer, "33m", VARIANTS[name]) for optimizer, name in served)
    yield from (row(optimizer, BILLION, PLAIN) for optimizer in ORDERED[1:])
    for model, (optimizer, name) in itertools.product(("gpt2", "1000x1000"), served):
        yield row(optimizer, model, VARIANTS[name])
    yield from (row(optimizer, BILLION, VARIANTS[name]) for optimizer, name in served)


def _row(
    device: Device,
    optimizer: str,
    model: str,
    variant: Variant,
    rounds: int,
    compiled: bool = False,
) -> Row:
    run = partial(_measured, device, optimizer, model, variant, rounds, compiled)
    name = f"{optimizer} {model} {variant.name}"
    if compiled:
        return Row(f"{name} beside torch.compile", run, 20)
    return Row(name, run, 10 if model == BILLION else 4)


def _copy_row(device: Device) -> dict[str, Any]:
    return {"copy_gbps": copy_bytes_per_second(device) / 1e9}


def _tensors(model: str, dtype: torch.dtype, scale: float, device: Device) -> list[Tensor]:
    shapes = ALL_SHAPES[model]
    sizes = [math.prod(shape) for shape in shapes]
    flat = torch.randn(sum(sizes), device=device.device, dtype=dtype).mul_(scale)
    if len(sizes) == 1:
        return [flat.view(shapes[0])]
    return [x.view(s).clone() for x, s in zip(flat.split(sizes), shapes, strict=True)]


Made = Callable[[list[Any]], Callable[[], Any]]


def _subject(
    device: Device,
    model: str,
    dtype: torch.dtype,
    gradients: Sequence[list[Tensor]],
    make: Made,
) -> Subject:
    """A provider's optimizers over copies of the model; raises where it cannot step."""
    all_params, steps = [], []
    for grads in gradients:
        params = [nn.Parameter(x) for x in _tensors(model, dtype, 2e-2, device)]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        all_params.append(params)
        steps.append(make(params))
    subject = Subject(steps, all_params)
    for _ in range(WARM if device.device.type != "cpu" else 1):
        subject.burst(len(steps))
    device.synchronize()
    return subject


def _measured(
    device: Device, optimizer: str, model: str, variant: Variant, rounds: int, compiled: bool
) -> dict[str, Any]:
    """Times and launches of each provider. One after the other where memory is short."""
    makers = {name: partial(variant.step, name, optimizer) for name in variant.providers(compiled)}
    if model == BILLION:
        # Gradient, parameter, two states, and what foreach makes of them on the way.
        needed = 36 * 2**30
        if device.free_bytes() < needed:
            raise NotApplicableError(f"needs {needed / 2**30:.0f} GiB of free device memory")
        found: dict[str, Any] = {}
        for name, make in makers.items():
            found |= _times(device, model, variant.dtype, {name: make}, rounds)
            device.free_bytes()
    else:
        found = _times(device, model, variant.dtype, makers, rounds)
    n = sum(map(math.prod, ALL_SHAPES[model]))
    return _with_shares(device, n * variant.n_bytes(optimizer), n, found)


def _with_shares(device: Device, n_bytes: float, n: int, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "elements": n,
        "bytes": n_bytes,
        "copy_gbps": copy_bytes_per_second(device) / 1e9,
        **with_shares(copy_bytes_per_second(device), n_bytes, found),
    }


def _times(
    device: Device, model: str, dtype: torch.dtype, makers: dict[str, Made], rounds: int
) -> dict[str, Any]:
    n = sum(map(math.prod, ALL_SHAPES[model]))
    copies = copies_beyond_cache(device, 4 * n * dtype.itemsize)
    gradients = [_tensors(model, dtype, 1e-2, device) for _ in range(copies)]
    subjects: dict[str, Subject] = {}
    found: dict[str, Any] = {}
    for name, make in makers.items():
        try:
            subjects[name] = _subject(device, model, dtype, gradients, make)
        except Exception as error:
            if name == FASTOPT:
                raise
            found[name] = {"unavailable": f"{type(error).__name__}: {error}"[:200]}
    found |= interleaved(device, subjects, copies, rounds)
    if FASTOPT in subjects:
        found[FASTOPT] |= launches(device, subjects[FASTOPT])
    subjects.clear()
    gc.collect()
    return found


def _graph_row(device: Device, model: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Replays of a captured AdamW step: what is left where the host costs nothing."""

    def captured(provider: str, params: list[Any]) -> Callable[[], Any]:
        optimizer = PLAIN.optimizer(provider, "AdamW", params, capturable=True)
        with device.stream():
            for _ in range(2):
                optimizer.step()
        replay = device.graph(optimizer.step)

        def step(_in_use: Any = optimizer) -> None:
            replay()

        return step

    names = (FASTOPT,) if device.device.type == "cpu" else (FASTOPT, FUSED, FOREACH)
    makers: dict[str, Made] = {name: partial(captured, name) for name in names}
    found = _times(device, model, torch.float32, makers, rounds)
    n = sum(map(math.prod, ALL_SHAPES[model]))
    return _with_shares(device, n * PLAIN.n_bytes("AdamW"), n, found)
