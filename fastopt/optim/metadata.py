"""Whether tensors still are what they were: type, dtype, device, sizes, strides, pending bits.

An address alone does not say how to walk what lies there: `p.data = p.data.t()` keeps it. Asking
each tensor costs 0.1 us for every question; the guards of torch.compile ask all of them of a
thousand tensors in 50 us. They are torch's own and not public, so where they are missing, or
stricter than needed (they note requires_grad and the mode we run in), the questions are asked here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt.optim import layout

_guards_of: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


class _Facts(NamedTuple):
    """What a kernel was told about a tensor, by way of its address."""

    type: type
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    pending: tuple[bool, bool, bool]

    @classmethod
    def of(cls, tensor: Tensor) -> _Facts:
        pending = (tensor.is_neg(), tensor.is_conj(), tensor._is_zerotensor())
        return cls(type(tensor), tensor.dtype, tensor.device, tensor.shape, pending)


class Metadata:
    """What is known of some tensors, in order; it holds none of them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._facts = [_Facts.of(tensor) for tensor in tensors]
        self._strides = [tensor.stride() for tensor in tensors]
        self._guards = _make_guards(tensors)

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors may stand where those stood."""
        if self._guards is not None and self._guards.check(*tensors):
            return True
        for tensor, facts, strides in zip(tensors, self._facts, self._strides, strict=True):
            if tensor.layout is not torch.strided or _Facts.of(tensor) != facts:
                return False
            if not layout.same_walk(facts.shape, tensor.stride(), strides):
                return False
        self._guards = _make_guards(tensors)
        return True


def _make_guards(tensors: Iterable[Tensor]) -> Any:
    if not hasattr(_guards_of, "TensorGuards"):
        return None
    tensors = list(tensors)
    return _guards_of.TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
    )
