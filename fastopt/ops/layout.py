"""How a kernel may walk a tensor: rows, or columns side by side, without a copy where it can."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

# x, (n_outer, n_cols, n_inner), (stride_outer, stride_col) in elements; inner has stride 1.
Walk = tuple[Tensor, tuple[int, int, int], tuple[int, int]]


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
