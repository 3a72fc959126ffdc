"""Tensors whose address is that of their data, and how much of its storage one needs."""

from __future__ import annotations

from operator import mul

import torch
from torch import Tensor

PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})


def end_of(tensor: Tensor) -> int:
    """Bytes from where the storage of a strided tensor begins to the end of its last element."""
    strides = tensor.stride()
    last = tensor.storage_offset() + sum(map(mul, tensor.shape, strides)) - sum(strides)
    return (last + 1) * tensor.itemsize if tensor.numel() else 0
