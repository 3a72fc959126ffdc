"""Rows and columns of a tensor as kernels walk them, without a copy where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

# x, (n_outer, n_cols, n_inner), (stride_outer, stride_col) in elements; inner has stride 1.
Walk = tuple[Tensor, tuple[int, int, int], tuple[int, int]]
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def along(x: Tensor, dim: int) -> Walk:
    """x, which is not empty, as kernels that reduce over `dim` (not negative) see it; a copy where
    its strides do not allow that."""
    sizes = x.shape
    if not sizes:
        return x, (1, 1, 1), (1, 1)
    if dim == len(sizes) - 1 and x.is_contiguous():
        n_cols = sizes[dim]
        return x, (x.numel() // n_cols, n_cols, 1), (n_cols, 1)
    n_outer, n_cols, n_inner = prod(sizes[:dim]), sizes[dim], prod(sizes[dim + 1 :])
    shape = (n_outer, n_cols, n_inner)
    if not x.is_contiguous():
        strides = x.stride()
        outer = flattened(sizes[:dim], strides[:dim])
        inner = flattened(sizes[dim + 1 :], strides[dim + 1 :])
        step = strides[dim]
        if n_inner == 1 and outer is not None and (step == 1 or n_cols == 1):
            return x, shape, (outer, 1)
        if n_inner > 1 and outer is not None and inner == 1:
            return x, shape, (outer, step)
        x = x.contiguous()
    return x, shape, (n_cols * n_inner, n_inner)


def neighbours(dims: Sequence[int]) -> bool:
    """True where these sorted dimensions follow one another."""
    return dims[-1] - dims[0] == len(dims) - 1


def merged(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, int]:
    """x with `dims`, which are sorted, as one dimension, and which that is: the first of them where
    they are neighbours, else the last."""
    if len(dims) == 1:
        return x, dims[0]
    if neighbours(dims):
        return x.flatten(dims[0], dims[-1]), dims[0]
    kept = [d for d in range(x.dim()) if d not in dims]
    return x.permute(*kept, *dims).flatten(len(kept)), len(kept)


def unmerge_(x: Tensor, dims: Sequence[int], source: Tensor) -> None:
    """Write into x, whatever its strides, what is laid out as `merged` has it, without gaps."""
    if not neighbours(dims):
        kept = [d for d in range(x.dim()) if d not in dims]
        x = x.permute(*kept, *dims)
    x.copy_(source.view(x.shape))


def channels_last_of(x: Tensor) -> torch.memory_format | None:
    """channels_last, or channels_last_3d, where torch takes x for that by its strides; x may have
    gaps, and is not contiguous."""
    form = _CHANNELS_LAST.get(x.dim())
    if form is None or not x.numel() or x.stride(1) == 0:
        return None
    reach = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.stride(dim) < reach:
            return None
        reach = x.stride(dim) * x.shape[dim]
    return form


def kept_channels_last(y: Tensor, like: Tensor) -> Tensor:
    """y, which is contiguous, in channels_last where `like` lies so."""
    form = None if like.is_contiguous() else channels_last_of(like)
    return y if form is None else y.contiguous(memory_format=form)


def output(x: Tensor) -> Tensor:
    """An empty tensor like x, contiguous."""
    if x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rows(x: Tensor, n_dims: int) -> tuple[Tensor, tuple[int, int, int]]:
    """(x or a copy, (rows, columns, stride of a row)) of an x that is not empty: the last n_dims
    dimensions are one row."""
    sizes = x.shape
    n_cols = sizes[-1] if n_dims == 1 else prod(sizes[len(sizes) - n_dims :])
    n_rows = x.numel() // n_cols
    if x.is_contiguous():
        return x, (n_rows, n_cols, n_cols)
    split = len(sizes) - n_dims
    outer = flattened(sizes[:split], x.stride()[:split])
    inner = flattened(sizes[split:], x.stride()[split:])
    if outer is not None and inner == 1:
        return x, (n_rows, n_cols, outer)
    return x.contiguous(), (n_rows, n_cols, n_cols)


def flattened(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of these dimensions as one, or None where they are not one."""
    stride, expected = None, 0
    for size, step in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return 1 if stride is None else stride
