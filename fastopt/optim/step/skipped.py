"""Norms and telemetry of a step that the host knows to be skipped.

No launch reads them then, so torch's operators do, a piece at a time: sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastopt.optim import options
from fastopt.optim.state import formats
from fastopt.optim.step import memory_layout, sharding
from fastopt.optim.step.grad_norm import ClipResult
from fastopt.optim.step.telemetry import ParameterTelemetry

# Elements that are widened to float64 at once.
PIECE = 1 << 20


@torch.no_grad()
def clip_result_of(groups: Sequence[Mapping[str, Any]], inverse_scale: float) -> ClipResult:
    """The clip result of a skipped step, of gradients that are yet to be multiplied by that."""
    clip = ClipResult(groups)
    part_of = _largest if clip.maximum else _square
    for number, group in enumerate(groups):
        for param in group["params"]:
            if param.grad is not None:
                found = np.array([part_of(param.grad), _nonfinite(param.grad)])
                clip.add(np.array([number]), found[:1], found[1:])
    return clip.with_grad_scale(inverse_scale, skip=True)


@torch.no_grad()
def rows_of(
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Any]],
    params: Iterable[Tensor],
    inverse_scale: float,
) -> dict[Tensor, ParameterTelemetry | None]:
    """Telemetry of a skipped step, of those parameters that are watched; None for one without a
    gradient."""
    watched = {p: group for group in groups if group.get("telemetry") for p in group["params"]}
    rows: dict[Tensor, ParameterTelemetry | None] = {}
    for param in params:
        if param not in watched:
            continue
        rows[param] = None
        if param.grad is not None:
            whole = _whole(param, states.get(param, {}), watched[param])
            rows[param] = ParameterTelemetry(
                grad_norm=abs(inverse_scale) * math.sqrt(_square(param.grad)),
                param_norm=math.sqrt(_square(whole)),
                update_norm=0.0,
                nonfinite=_nonfinite(param.grad),
                lost=0.0,
                numel=whole.numel(),
                shard=sharding.is_part(param),
            )
    return rows


def _whole(param: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """A parameter with what its rounding keeps beside it."""
    param = memory_layout.local(param)
    name, _ = options.KEPT.get(
        options.options_of_param(options.step_options_of(group), param).rounding, ("", None)
    )
    kept = state.get(name)
    return formats.joined(param, memory_layout.local(kept)) if isinstance(kept, Tensor) else param


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The real numbers of this rank's part of a tensor; the sum of those a sparse one repeats."""
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.is_sparse else tensor.values()
    tensor = memory_layout.local(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if memory_layout.has_memory(tensor):
        yield from torch.split(tensor.reshape(-1), PIECE)


def _square(tensor: Tensor) -> float:
    norms = [float(torch.linalg.vector_norm(x.double())) for x in _pieces(tensor)]
    return sum(norm * norm for norm in norms)


def _largest(tensor: Tensor) -> float:
    # NaN stays, as in a tensor's max.
    found = [float(x.abs().max()) for x in _pieces(tensor) if x.numel()]
    return float(np.max(found, initial=0.0))


def _nonfinite(tensor: Tensor) -> int:
    return sum(x.numel() - int(x.isfinite().sum()) for x in _pieces(tensor))
