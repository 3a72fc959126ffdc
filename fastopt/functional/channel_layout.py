"""Images as the kernels of channel norms walk them: plane by plane, or pixel by pixel."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastopt import backend
from fastopt.functional import layout
from fastopt.functional.registry import compute_dtype
from fastopt_kernels.channels import Channels


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """Of an image, a channel and an element of x as (images, channels, elements); None where
    neither channels nor elements lie beside each other."""
    sizes, strides = x.shape, x.stride()
    length = prod(sizes[2:])
    if length == 1:
        return (strides[0], 1, sizes[1]) if sizes[1] == 1 or strides[1] == 1 else None
    step = layout.flattened(sizes[2:], strides[2:])
    if step == 1 or (step is not None and (strides[1] == 1 or sizes[1] == 1)):
        return strides[0], strides[1] if sizes[1] > 1 else 1, step
    return None


def walk(x: Tensor, groups: int, batch: bool) -> tuple[Tensor, Channels]:
    """x, which is not empty, or a copy, and how its kernels see it."""
    images, channels, length = x.shape[0], x.shape[1], prod(x.shape[2:])
    strides = None if x.is_contiguous() and length > 1 else _strides(x)
    if strides is None:
        x, strides = x.contiguous(), (channels * length, length, 1)
    pixels = _in_pixels(length, strides)
    if pixels and batch and (images == 1 or length == 1 or strides[0] == length * strides[2]):
        step = strides[0] if length == 1 else strides[2]
        images, length, strides = 1, images * length, (0, 1, step)
    return x, Channels(images, channels, length, *strides, groups, batch, pixels)


def _in_pixels(length: int, strides: tuple[int, int, int]) -> bool:
    return length == 1 or strides[2] != 1


def output(x: Tensor) -> Tensor:
    """An empty tensor like x, dense in the order in which its kernels walk x."""
    length = prod(x.shape[2:])
    if x.is_contiguous() or length == 1 or 0 in x.shape:
        return layout.output(x)
    strides = _strides(x)
    if strides is None or not _in_pixels(length, strides):
        return layout.output(x)
    images, channels, *sizes = x.shape
    return torch.empty(images, *sizes, channels, dtype=x.dtype, device=x.device).movedim(-1, 1)


def in_order(dy: Tensor, like: Tensor) -> Tensor:
    """dy laid out as an empty tensor of ours."""
    if like.is_contiguous():
        return dy.contiguous()
    return dy.movedim(1, -1).contiguous()


def n_sets(x: Tensor, groups: int, batch: bool) -> int:
    return groups if batch else x.shape[0] * groups


def stats_for(x: Tensor, n_sets: int) -> Tensor:
    """Room for mean and variance of each set, the mean not rounded to float32, where a large one
    would be off: on CPU both in float64, on GPU the mean in two parts."""
    if backend.by_numba(x):
        return torch.empty(n_sets, 2, dtype=torch.float64, device=backend.CPU)
    return torch.empty(3, n_sets, dtype=compute_dtype(x.dtype), device=x.device)


def moments(x: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance from what `stats_for` made room for; contiguous, as some of torch's kernels
    take statistics for contiguous whatever their strides (2.13)."""
    if backend.by_numba(x):
        return stats[:, 0].contiguous(), stats[:, 1].contiguous()
    return stats[0] + stats[1], stats[2]


def stats_of_given(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Those that were given, as `stats_for` has them."""
    if backend.by_numba(x):
        return torch.stack([mean.double(), var.double()], 1)
    high, var = mean.to(compute_dtype(x.dtype)), var.to(compute_dtype(x.dtype))
    return torch.stack([high, (mean - high).to(high.dtype), var])
