"""Guards of tensors: type, dtype, device, strides and address are what they were.

An address alone does not say how to walk what lies there: `p.data = p.data.t()` keeps it. Asking
each tensor costs 0.1 us for every question. The guards of torch.compile ask all but the address of
a thousand tensors in 50 us, and a compiled walk over the list reads the addresses in 8. Both rest
on what torch keeps for its own compiler and calls private, so where it is missing, or stricter than
needed (guards note requires_grad and the mode we run in), the questions are asked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastopt.optim.step import memory_layout

CollectDataPtrs: TypeAlias = Callable[[int, int, int, int, int], int]

_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
# A C function, void *(PyObject *): the data pointer of any tensor that has memory.
_address_of: Any = getattr(_guards, "_torchinductor_pyobject_tensor_data_ptr", None)
_data_ptr: Callable[[Tensor], int] = Tensor.data_ptr
# What the walk finds: an address that is not what it was, and one below the lowest there may be.
_MOVED, _LOW = 1, 2


def _lowest_mapped() -> int:
    """The lowest address of this process at which memory is mapped, where the system says so."""
    try:
        with open("/proc/self/maps") as maps:
            return int(maps.readline().partition("-")[0], 16)
    except (OSError, ValueError):
        return _NEVER_MAPPED


# Systems leave the first pages unmapped. A view into a storage that was freed has for its address
# the view's offset in bytes: in host memory that is below all that is mapped.
_NEVER_MAPPED = 1 << 16
_LOWEST = _lowest_mapped()


class _Facts(NamedTuple):
    """Facts about a tensor that a kernel relies on beside its address."""

    type: type
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    pending: tuple[bool, bool, bool]

    @classmethod
    def of(cls, tensor: Tensor) -> _Facts:
        pending = (tensor.is_neg(), tensor.is_conj(), tensor._is_zerotensor())
        return cls(type(tensor), tensor.dtype, tensor.device, tensor.shape, pending)


class TensorGuards:
    """Type, layout and address of some tensors, in order; it holds none of them.

    addresses: (n,) int64, of the last tensors checked; always the same array
    walk: the compiled walk over a list (`fastopt_kernels.cpu.base.data_ptrs`), if there is one
    role: what the tensors are, in errors
    """

    def __init__(
        self, tensors: list[Tensor], walk: CollectDataPtrs | None, role: str = "a tensor"
    ) -> None:
        self._role = role
        self._facts = [_Facts.of(tensor) for tensor in tensors]
        self._strides = [tensor.stride() for tensor in tensors]
        self._collect_data_ptrs = walk
        self._guards = _make_guards(tensors)
        self.addresses = np.fromiter(map(_data_ptr, tensors), np.int64, len(tensors))
        self._where = self.addresses.ctypes.data
        self._filled = np.array([tensor.numel() > 0 for tensor in tensors], dtype=bool)
        on_host = all(tensor.device.type == "cpu" for tensor in tensors)
        self._lowest = _LOWEST if on_host else _NEVER_MAPPED

    def unmoved(self, tensors: list[Tensor]) -> bool:
        """True where these tensors are alike, at the addresses known."""
        found = self._look(tensors)
        return found is not None and not found & _MOVED

    def take(self, tensors: list[Tensor]) -> bool:
        """True where these tensors are alike; their addresses are taken over.

        Raises RuntimeError for a tensor whose storage was freed.
        """
        found = self._look(tensors)
        if found is None:
            return False
        if found & _LOW:
            for k in np.flatnonzero(self._filled & (self.addresses < self._lowest)):
                memory_layout.check_storage(tensors[k], self._role)
        return True

    def _look(self, tensors: list[Tensor]) -> int | None:
        """None for tensors that are not alike, else what the walk finds in their addresses."""
        guarded = self._guards is not None and self._guards.check(*tensors)
        # The walk asks for addresses without asking whether there are any: guards see to that.
        if guarded and self._collect_data_ptrs is not None and _address_of is not None:
            return self._collect_data_ptrs(
                id(tensors), len(tensors), _address_of, self._where, self._lowest
            )
        if not guarded and not self._alike(tensors):
            return None
        now = np.fromiter(map(_data_ptr, tensors), np.int64, len(tensors))
        moved, low = not np.array_equal(now, self.addresses), (now < self._lowest).any()
        self.addresses[:] = now
        return _MOVED * moved | _LOW * bool(low)

    def _alike(self, tensors: list[Tensor]) -> bool:
        for tensor, facts, strides in zip(tensors, self._facts, self._strides, strict=True):
            if type(tensor) is not facts.type or tensor.layout is not torch.strided:
                return False
            if _Facts.of(tensor) != facts:
                return False
            if not memory_layout.same_walk(facts.shape, tensor.stride(), strides):
                return False
        self._guards = _make_guards(tensors)
        return True


def _make_guards(tensors: Iterable[Tensor]) -> Any:
    if not hasattr(_guards, "TensorGuards"):
        return None
    tensors = list(tensors)
    return _guards.TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
    )
