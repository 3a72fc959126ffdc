"""Rows: more elements than 32 bits count. They take much of the memory, so they run alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_calls import Call, call_of
from bench.gpu_check_functions import outputs_of, results_of, rows_of
from bench.gpu_device import Device
from bench.gpu_oracle import CASES, Case, disagreement
from bench.gpu_rows import NotApplicableError, Row

# Past what 32 bits count, by more than a chunk that is not full.
BIG = 2**31 + 4099
WINDOW = 2**25
ROWS, COLUMNS = 2**20 + 3, 2048
IMAGES = (2**10 + 3, 64, 2**15)
LAST = 8
# Tensors of x's size that are there at once, at most: inputs, outputs and all gradients.
TENSORS = 9
CALLS = {
    "softmax -1": (ROWS, COLUMNS),
    "softmax 0": (COLUMNS, ROWS),
    "cross_entropy of each row": (ROWS, COLUMNS),
    "layer_norm": (ROWS, COLUMNS),
    "add_rms_norm": (ROWS, COLUMNS),
    "scaled_masked_softmax": (ROWS, COLUMNS),
    "group_norm": IMAGES,
    "instance_norm": IMAGES,
    "weight_norm 0": (ROWS, COLUMNS),
}


def rows(device: Device, quick: bool) -> Iterator[Row]:
    adamw = next(case for case in CASES if case.name == "AdamW")
    yield Row(f"a tensor of {BIG} elements", partial(_big_step, device, adamw), 5)
    for name, shape in CALLS.items():
        yield Row(f"{2**31} elements: {name}", partial(_big_call, device, call_of(name), shape), 3)


def _need(device: Device, n_bytes: int) -> None:
    if device.device.type == "cpu":
        raise NotApplicableError("too large for an interpreter")
    if device.free_bytes() < n_bytes:
        raise NotApplicableError(f"needs {n_bytes / 2**30:.0f} GiB of free device memory")


def _pattern(start: int, n: int, period: int, device: torch.device) -> Tensor:
    """Values that differ from element to element, of any part of the tensor."""
    index = torch.arange(start, start + n, device=device)
    return (index % period).float() / period - 0.5


def _big_step(device: Device, case: Case) -> dict[str, int]:
    """bfloat16, one step, every element compared window by window."""
    n, where = BIG, device.device
    _need(device, 4 * 2 * n + 16 * 8 * WINDOW)
    param = nn.Parameter(torch.empty(n, dtype=torch.bfloat16, device=where))
    grad = torch.empty_like(param)
    starts = range(0, n, WINDOW)
    with torch.no_grad():
        for start in starts:
            size = min(WINDOW, n - start)
            param[start : start + size] = _pattern(start, size, 1021, where)
            grad[start : start + size] = _pattern(start, size, 4093, where)
    param.grad = grad
    ours = case.ours([param])
    ours.step()
    for start in starts:
        _check_window(case, ours, param, start, min(WINDOW, n - start))
    return {"elements": n}


def _check_window(case: Case, ours: Any, param: nn.Parameter, start: int, size: int) -> None:
    where = param.device
    p, g = (_pattern(start, size, period, where).bfloat16().double() for period in (1021, 4093))
    q = nn.Parameter(p)
    q.grad = g
    torchs = case.torchs([q], foreach=False)
    torchs.step()
    state = torchs.state[q]
    for name, whole, right in (
        ("p", param.detach(), q.detach()),
        ("exp_avg", ours.state[param]["exp_avg"], state["exp_avg"]),
        ("exp_avg_sq", ours.state[param]["exp_avg_sq"], state["exp_avg_sq"]),
    ):
        got = whole[start : start + size]
        allowed = 1.001 * 2.0**-8 * right.abs() + 2.0**-40
        if bool(((got.double() - right).abs() > allowed).any()):
            text = disagreement(got, right, right, truncates=False)
            raise AssertionError(f"{name} from element {start}: {text}")


def _big_call(device: Device, call: Call, shape: tuple[int, ...]) -> None:
    """The last rows against the same rows alone; of softmax over them, the last columns."""
    _need(device, TENSORS * 2 * torch.Size(shape).numel())
    random = torch.Generator(device.device).manual_seed(0)
    x = torch.randn(shape, generator=random, device=device.device, dtype=torch.bfloat16)
    others = call.others(x, random)
    got = results_of(call.ours, x, others, None)
    if call.alone or call.name == "instance_norm":
        last: tuple[slice, ...] = (slice(-LAST, None),)
        fewer = [rows_of(a, x, last[0]) for a in others]
    else:
        last, fewer = (slice(None), slice(-LAST, None)), list(others)
    right = results_of(call.ours, x[last].clone(), fewer, None)
    for name, whole, part in (
        ("y", outputs_of(got)[0], outputs_of(right)[0]),
        ("dx", got["dx"], right["dx"]),
    ):
        if not torch.equal(whole[last], part):
            raise AssertionError(f"{name}: the last rows are not what they are alone")
