"""Rows: every optimizer's step on real model shapes, as a share of what a copy reaches.

Providers take turns, round after round in changing order, on parameters of their own. Three times
are taken: in bursts (the device never waits, which is what a training loop sees), alone (queue and
host included) and of the kernels (torch.profiler). Small models are stepped in turn through
several copies that together exceed the last-level cache several times over.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import fastopt
from bench.gpu_device import Device
from bench.gpu_rows import NotApplicableError, Row
from bench.models import SHAPES
from bench.providers import HYPERPARAMETERS, OPTIMIZERS, traffic

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODELS = ("33m", "gpt2", "20x1m", "1000x1000")
BILLION = "1g"
QUICK = "tiny"
ALL_SHAPES = SHAPES | {BILLION: [(2**30,)], QUICK: [(33, 3), (33,)]}
FASTOPT, FUSED, FOREACH = "fastopt", "torch fused", "torch foreach"
COMPILE = "torch.compile"

ROUNDS = 25
BURST_S = 2e-3
MAX_BURST = 60
# Copies of a small model: their memory exceeds the last-level cache so many times.
CACHES = 3
MAX_COPIES = 16
COPY_BYTES = 2**30


def rows(device: Device, quick: bool, compiled: bool) -> Iterator[Row]:
    """The most wanted first: what does not fit the time is what stands last."""
    measure = partial(_measured, device)
    if quick:
        yield Row("device copy", partial(_copy_row, device))
        yield Row(f"AdamW {QUICK} fp32", partial(measure, "AdamW", QUICK, "fp32", rounds=2))
        yield Row(f"AdamW {QUICK} graph", partial(_graph_row, device, QUICK, rounds=2))
        return
    yield Row("device copy", partial(_copy_row, device), 10)
    ordered = ["AdamW", "SGD", *(name for name in OPTIMIZERS if name not in ("AdamW", "SGD"))]
    for optimizer in ordered[:2]:
        for model in MODELS:
            yield Row(f"{optimizer} {model} fp32", partial(measure, optimizer, model, "fp32"), 15)
        for model in MODELS[:2]:
            yield Row(f"{optimizer} {model} bf16", partial(measure, optimizer, model, "bf16"), 15)
    yield Row(f"AdamW {BILLION} fp32", partial(measure, "AdamW", BILLION, "fp32", rounds=20), 25)
    for model in ("1000x1000", "gpt2"):
        yield Row(f"AdamW {model} graph", partial(_graph_row, device, model), 15)
    for model, optimizer in itertools.product(MODELS, ordered[2:]):
        yield Row(f"{optimizer} {model} fp32", partial(measure, optimizer, model, "fp32"), 15)
    if compiled:
        for model in ("33m", "20x1m"):
            run = partial(measure, "AdamW", model, "fp32", providers=(FASTOPT, COMPILE))
            yield Row(f"AdamW {model} fp32 beside torch.compile", run, 60)


def _maker(provider: str, optimizer: str, **more: Any) -> Callable[[list[Any]], Any]:
    """What makes a provider's optimizer from parameters."""
    module = fastopt.optim if provider == FASTOPT else torch.optim
    how = {FUSED: {"fused": True}, FOREACH: {"foreach": True}, COMPILE: {"foreach": True}}
    options = HYPERPARAMETERS[optimizer] | how.get(provider, {}) | more
    return lambda params: getattr(module, optimizer)(params, **options)


class Subject:
    """A provider with its copies of a model, stepped in turn."""

    def __init__(self, steps: Sequence[Callable[[], Any]], params: Sequence[list[Any]]) -> None:
        self.steps, self.params = steps, params
        self._turns = itertools.cycle(steps)

    def burst(self, n: int) -> None:
        for _ in range(n):
            next(self._turns)()

    def rebind(self) -> None:
        """New gradient objects, as zero_grad and a backward leave them."""
        for p in self.params[0]:
            p.grad = p.grad.detach()

    def alone(self) -> None:
        self.steps[0]()


@cache
def copy_bytes_per_second(device: Device) -> float:
    """A device copy, bytes read plus bytes written: the median of bursts of five."""
    n = COPY_BYTES if device.device.type != "cpu" else 2**20
    if device.device.type != "cpu":
        n = min(n, device.free_bytes() // 8)
    source = torch.empty(n, dtype=torch.uint8, device=device.device).random_(0, 256)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(5):
            target.copy_(source)

    for _ in range(3):
        copies()
    seconds = []
    for _ in range(ROUNDS):
        device.synchronize()
        elapsed = device.time(copies)
        device.synchronize()
        seconds.append(elapsed() / 5)
    if not torch.equal(source, target):
        raise AssertionError("the copy is not one")
    return 2 * n / statistics.median(seconds)


def _copy_row(device: Device) -> dict[str, Any]:
    return {"copy_gbps": copy_bytes_per_second(device) / 1e9}


def _tensors(model: str, dtype: torch.dtype, scale: float, device: Device) -> list[Tensor]:
    shapes = ALL_SHAPES[model]
    sizes = [math.prod(shape) for shape in shapes]
    flat = torch.randn(sum(sizes), device=device.device, dtype=dtype).mul_(scale)
    if len(sizes) == 1:
        return [flat.view(shapes[0])]
    return [x.view(s).clone() for x, s in zip(flat.split(sizes), shapes, strict=True)]


def copies_beyond_cache(device: Device, n_bytes: int) -> int:
    if device.device.type == "cpu":
        return 2
    cache_bytes = getattr(
        torch.cuda.get_device_properties(device.device), "L2_cache_size", 64 * 2**20
    )
    return max(1, min(MAX_COPIES, math.ceil(CACHES * cache_bytes / n_bytes)))


def _subject(
    device: Device, model: str, dtype: torch.dtype, gradients: Sequence[list[Tensor]], make: Any
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
    for _ in range(3):
        subject.burst(len(steps))
    device.synchronize()
    return subject


def _stepping(make: Callable[[list[Any]], Any], provider: str, params: list[Any]) -> Any:
    step = make(params).step
    return torch.compile(step) if provider == COMPILE else step


def _measured(
    device: Device,
    optimizer: str,
    model: str,
    dtype: str,
    rounds: int = ROUNDS,
    providers: Sequence[str] = (FASTOPT, FUSED, FOREACH),
) -> dict[str, Any]:
    """Times and launches of each provider. One after the other where memory is short."""
    makers = {name: partial(_stepping, _maker(name, optimizer), name) for name in providers}
    if model == BILLION:
        makers = {name: makers[name] for name in (FASTOPT, FUSED)}
        needed = 20 * 2**30
        if device.free_bytes() < needed:
            raise NotApplicableError(f"needs {needed / 2**30:.0f} GiB of free device memory")
        data: dict[str, Any] = {}
        for name, make in makers.items():
            data |= _times(device, model, DTYPES[dtype], {name: make}, rounds)
    else:
        data = _times(device, model, DTYPES[dtype], makers, rounds)
    n = sum(map(math.prod, ALL_SHAPES[model]))
    return _with_shares(device, n * traffic(optimizer, DTYPES[dtype]), n, data)


def _with_shares(device: Device, n_bytes: int, n: int, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "elements": n,
        "bytes": n_bytes,
        "copy_gbps": copy_bytes_per_second(device) / 1e9,
        **with_shares(copy_bytes_per_second(device), n_bytes, found),
    }


def with_shares(copy: float, n_bytes: int, found: dict[str, Any]) -> dict[str, Any]:
    """The times of each provider with its rate as a share of a copy's, and how many times as fast
    fastopt is."""
    for times in found.values():
        if "ms" in times:
            times["gbps"] = n_bytes / times["ms"] / 1e6
            times["share"] = times["gbps"] * 1e9 / copy
            if times.get("kernel_ms"):
                times["kernel_share"] = n_bytes / times["kernel_ms"] * 1e3 / copy
    ours = found[FASTOPT]["ms"]
    ratios = {name: t["ms"] / ours for name, t in found.items() if name != FASTOPT and "ms" in t}
    return {"providers": found, "times_as_fast_as": ratios}


def _times(
    device: Device, model: str, dtype: torch.dtype, makers: dict[str, Any], rounds: int
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
    for name, times in interleaved(device, subjects, copies, rounds).items():
        found[name] = times
    for name, subject in subjects.items():
        found[name] |= launches(device, subject)
    subjects.clear()
    gc.collect()
    return found


def interleaved(
    device: Device, subjects: dict[str, Subject], copies: int, rounds: int
) -> dict[str, dict[str, Any]]:
    bursts: dict[str, int] = {}
    for name, subject in subjects.items():
        elapsed = device.time(partial(subject.burst, copies))
        device.synchronize()
        steps = math.ceil(BURST_S / max(elapsed() / copies, 1e-7))
        bursts[name] = max(copies, min(MAX_BURST, steps))
    burst_s: dict[str, list[float]] = {name: [] for name in subjects}
    alone_s: dict[str, list[float]] = {name: [] for name in subjects}
    host_s: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            device.synchronize()
            elapsed = device.time(partial(subjects[name].burst, bursts[name]))
            device.synchronize()
            burst_s[name].append(elapsed() / bursts[name])
        for name in order:
            subjects[name].rebind()
            device.synchronize()
            start = perf_counter()
            elapsed = device.time(subjects[name].alone)
            host_s[name].append(perf_counter() - start)
            device.synchronize()
            alone_s[name].append(elapsed())
    return {
        name: {
            "ms": statistics.median(burst_s[name]) * 1e3,
            "spread": _spread(burst_s[name]),
            "alone_ms": statistics.median(alone_s[name]) * 1e3,
            "host_ms": statistics.median(host_s[name]) * 1e3,
            "copies_of_the_model": copies,
            "rounds": rounds,
        }
        for name in subjects
    }


def _spread(seconds: Sequence[float]) -> float:
    """The distance of the quartiles as a part of the median."""
    if len(seconds) < 2:
        return 0.0
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / median


def launches(device: Device, subject: Subject) -> dict[str, Any]:
    try:
        found = device.launches(subject.alone)
    except Exception as error:
        return {"kernels": None, "profiler": f"{type(error).__name__}: {error}"[:200]}
    return {
        "kernels": found.kernels,
        "copies": found.copies,
        "kernel_ms": None if found.seconds is None else found.seconds * 1e3,
    }


def _graph_row(device: Device, model: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Replays of a captured AdamW step: what is left where the host costs nothing."""

    def captured(make: Callable[[list[Any]], Any], params: list[Any]) -> Callable[[], Any]:
        optimizer = make(params)
        with device.stream():
            for _ in range(2):
                optimizer.step()
        replay = device.graph(optimizer.step)

        def step(_in_use: Any = optimizer) -> None:
            replay()

        return step

    names = (FASTOPT,) if device.device.type == "cpu" else (FASTOPT, FUSED, FOREACH)
    makers = {name: partial(captured, _maker(name, "AdamW", capturable=True)) for name in names}
    data = _times(device, model, torch.float32, makers, rounds)
    n = sum(map(math.prod, ALL_SHAPES[model]))
    return _with_shares(device, n * traffic("AdamW", torch.float32), n, data)
