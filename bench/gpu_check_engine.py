"""Rows: each rule's kernel on memory laid out by hand, against torch.optim in float64.

Sizes, alignments, dtypes of parameter, gradient and states, unequal steps in one launch, poisoned
neighbours, scalars by the host and by the device, unscaling, skipping, missing gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from types import ModuleType

import numpy as np
import torch

from bench.gpu_device import Device
from bench.gpu_oracle import CASES, Case, cases
from bench.gpu_rows import NotApplicableError, Row
from bench.gpu_streams import Streams
from fastopt_kernels.chunks import chunk_table

# p, g, every state.
KINDS = (
    ("fp32", "fp32", "fp32"),
    ("bf16", "bf16", "bf16"),
    ("fp16", "fp16", "fp16"),
    ("fp64", "fp64", "fp64"),
    ("bf16", "bf16", "fp32"),
    ("fp32", "bf16", "bf16"),
    ("fp16", "fp32", "fp16"),
    ("fp64", "bf16", "fp32"),
)
# Launches with found_inf are kernels of their own.
SKIPPING = KINDS[:2]
ON_DEVICE = (KINDS[0], KINDS[3])


def rows(device: Device, quick: bool) -> Iterator[Row]:
    """quick: small sizes and few dtypes, for the interpreter."""
    from fastopt_kernels.gpu.step import launch as engine  # needs triton

    for case in cases(quick):
        here = [KINDS[0], KINDS[1 + CASES.index(case) % 7]] if quick else KINDS
        yield Row(f"step: {case.name}", partial(_step, device, engine, case, here, quick), 60)
        yield Row(f"skip: {case.name}", partial(_skip, device, engine, case), 20)
    adamw = next(case for case in CASES if case.name == "AdamW")
    yield Row("missing gradients", partial(_missing, device, engine, cases(quick)))
    yield Row("same bits at any alignment", partial(_alignment, device, engine, adamw))
    yield Row("same bits in every run", partial(_determinism, device, engine, adamw))
    yield Row("64-bit offsets", partial(_offsets, device, engine, adamw))
    yield Row("a wrong rule is found out", partial(_teeth, device, engine, adamw))


def _layout(engine: ModuleType, quick: bool) -> dict[str, Sequence[int]]:
    chunk = engine.engine.CHUNK
    if quick:
        sizes = (5, 0, 1, 700)
        return {"sizes": sizes, "offsets": (0, 0, 1, 0), "steps": (1, 3, 9, 1000)}
    sizes = (5, 0, 1, chunk + 700, chunk - 1, 1823 * 781, 3 * chunk, 100_003, 513)
    return {
        "sizes": sizes,
        "offsets": (0, 0, 1, 0, 3, 0, 0, 7, 0),
        "steps": (1, 3, 9, 1000, 2, 6, 1, 100_000, 4),
    }


def _make(
    device: Device,
    engine: ModuleType,
    case: Case,
    kinds: tuple[str, str, str],
    layout: dict[str, Sequence[int]],
) -> Streams:
    p, g, state = kinds
    streams = (p, g, *(state for _ in case.update.state_names))
    return Streams(engine, case, streams, device=device.device, **layout)


def _raise(found: list[str]) -> None:
    if found:
        raise AssertionError(f"{len(found)} disagreements: " + "; ".join(found[:4]))


def _step(
    device: Device,
    engine: ModuleType,
    case: Case,
    kinds: Sequence[tuple[str, str, str]],
    quick: bool,
) -> dict[str, int]:
    found = []
    for one in kinds:
        streams = _make(device, engine, case, one, _layout(engine, quick))
        streams.run()
        found += [f"{'-'.join(one)} {text}" for text in streams.wrong(device.truncates)]
        if one in ON_DEVICE:
            streams = _make(device, engine, case, one, _layout(engine, quick))
            streams.run_on_device()
            wrong = streams.wrong(device.truncates) + streams.wrong_numbers()
            found += [f"{'-'.join(one)} counted on the device: {text}" for text in wrong]
    _raise(found)
    return {"dtype combinations": len(kinds)}


def _skip(device: Device, engine: ModuleType, case: Case) -> None:
    """A skipped step leaves every bit; one that is not unscales the gradient."""
    layout = {"sizes": (5, 600, 5000), "offsets": (1, 0, 0), "steps": (1, 7, 3)}
    scale, no, yes = (torch.tensor([x], device=device.device) for x in (8.0, 0.0, 1.0))
    found = []
    for kinds in SKIPPING[:1] if device.truncates else SKIPPING:
        streams = _make(device, engine, case, kinds, layout)
        for stream in streams.streams[1]:
            stream[0] = torch.inf
        streams.before[1] = [x.clone() for x in streams.streams[1]]
        streams.run_on_device(scale, yes)
        if not streams.unchanged():
            found.append(f"{'-'.join(kinds)}: a skipped step wrote something")
        streams = _make(device, engine, case, kinds, layout)
        streams.run_on_device(scale, no)
        wrong = streams.wrong(device.truncates, g_scale=1 / 8) + streams.wrong_numbers()
        found += [f"{'-'.join(kinds)} {text}" for text in wrong]
    _raise(found)


def _missing(device: Device, engine: ModuleType, chosen: Sequence[Case]) -> None:
    layout = {"sizes": (5, 700, 600, 9), "offsets": (0, 0, 1, 0), "steps": (1, 3, 9, 4)}
    active = (True, False, True, False)
    found = []
    for case in chosen:
        streams = _make(device, engine, case, KINDS[0], layout)
        streams.launch.tensors[[1, 3], 1] = 0
        streams.run_on_device(active=active)
        wrong = streams.wrong(device.truncates, active=active) + streams.wrong_numbers(active)
        found += [f"{case.name}: {text}" for text in wrong]
    _raise(found)


def _alignment(device: Device, engine: ModuleType, case: Case) -> None:
    """The vector body and the masked one compute the same bits."""
    for kinds in KINDS[:4]:
        results = []
        for offset in (0, 1):
            layout = {"sizes": (9000,), "offsets": (offset,), "steps": (3,)}
            streams = _make(device, engine, case, kinds, layout)
            streams.run()
            results.append([stream[0].cpu() for stream in streams.streams])
        for a, b in zip(*results, strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"{'-'.join(kinds)}: {int((a != b).sum())} elements differ")


def _determinism(device: Device, engine: ModuleType, case: Case) -> None:
    results = []
    for _ in range(3):
        streams = _make(device, engine, case, KINDS[0], _layout(engine, device.truncates))
        streams.run()
        results.append(torch.cat([x.cpu() for stream in streams.streams for x in stream]))
    if not all(torch.equal(results[0], other) for other in results[1:]):
        raise AssertionError("the same launch gave other bits")


def _offsets(device: Device, engine: ModuleType, case: Case) -> None:
    """Addresses 2**33 elements below the tensors, chunks as far above them."""
    far = 2**33
    for kinds in (KINDS[0], KINDS[1]):
        streams = _make(
            device, engine, case, kinds, {"sizes": (1000,), "offsets": (0,), "steps": (2,)}
        )
        itemsize = streams.arenas[0].dtype.itemsize
        if streams.launch.tensors.min() < far * itemsize:
            raise NotApplicableError("device addresses are lower than 2**33 elements")
        streams.launch.tensors -= far * itemsize
        chunks = chunk_table(np.asarray([1000]), engine.engine.CHUNK)
        chunks[:, 1:] += far
        streams.launch._all_chunks = chunks
        streams.launch.select(None)
        streams.run()
        _raise(streams.wrong(device.truncates))


def _no_op(p, g, m, v, a, b, c, d, e, f, h, i):
    return p, m, v


def _sign_error(p, g, m, v, weight_decay, decay, step_size, mu, beta2, nu, eps, v_scale):
    return decay * p + step_size * m, m + mu * (g - m), beta2 * v + (nu * g) * g


def _teeth(device: Device, engine: ModuleType, case: Case) -> None:
    for rule in (_no_op, _sign_error):
        for kinds in KINDS[:3]:
            layout = {"sizes": (5, 700), "offsets": (0, 0), "steps": (1, 3)}
            streams = _make(device, engine, case, kinds, layout)
            streams.launch.rule = rule
            streams.run()
            if not streams.wrong(device.truncates):
                raise AssertionError(f"{rule.__name__} passed with {'-'.join(kinds)}")
