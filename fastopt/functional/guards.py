"""Checks of tensors whose addresses a kernel is to read: resolved, refused, or handed to torch.

The address of a wrapper (a DTensor, a fake tensor, what a collective hands on) or of a zero tensor
is that of nothing; what lies at that of a view with a pending sign has the other sign; and a
storage that was resized may end before its views do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fastopt import backend
from fastopt.storage import PLAIN, end_of

# An operation on one waits for the collective whose result it wraps.
_ASYNC = ("torch.distributed._functional_collectives", "AsyncCollectiveTensor")
_TRACED = (FakeTensor, FunctionalTensor)
_NO_DISPATCH: Any = torch._C._disabled_torch_dispatch_impl
_NO_FUNCTION: Any = torch._C._disabled_torch_function_impl
# What it is called, and the tensor.
Operand = tuple[str, Tensor | None]
_overridden: Any = torch.overrides.has_torch_function_variadic


def in_memory(tensors: tuple[Tensor | None, ...]) -> bool:
    """Kernels may read these as they lie: plain tensors of one device, strided, without a pending
    sign, each within its storage. The first is not None."""
    if _compiled is not None:
        check, table = _compiled
        if check(id(tensors), len(tensors), table):
            return True
    return _in_memory(tensors)


# The check in compiled code, and the address of its table. It is loaded with the kernels for the
# first tensor on a CPU; None until then, and where there is none.
_compiled: tuple[Callable[[int, int, int], bool], int] | None = None
_is_loaded = False


def _load() -> None:
    global _compiled, _is_loaded
    try:
        _compiled = backend.kernels("cpu", "base.in_memory").compiled()
    except ImportError:  # other kernels say what is missing
        _compiled = None
    _is_loaded = True


def _in_memory(tensors: tuple[Tensor | None, ...]) -> bool:
    """The same, asked in Python: 0.6 us a tensor."""
    try:
        index, on_cpu = tensors[0].get_device(), tensors[0].is_cpu  # type: ignore[union-attr]
        for tensor in tensors:
            if tensor is None:
                continue
            if type(tensor) not in PLAIN or tensor.is_neg() or tensor.get_device() != index:
                return False
            if not (tensor.is_cpu if on_cpu else tensor.is_cuda):
                return False
            storage = tensor.untyped_storage()
            if (
                not tensor.is_contiguous()
                or tensor.data_ptr() != storage.data_ptr()
                or storage.nbytes() < tensor.nbytes
            ) and not _lies_within(tensor, storage):
                return False
    except (AttributeError, RuntimeError):  # no tensor, no storage, or no memory in it
        return False
    if on_cpu and not _is_loaded:
        _load()
    return True


def _lies_within(tensor: Tensor, storage: torch.UntypedStorage) -> bool:
    """True where a strided tensor has an address and lies within its storage."""
    if not tensor.numel():
        return True
    return tensor.data_ptr() != 0 and end_of(tensor) <= storage.nbytes()


def takes_over(x: Any) -> bool:
    """True of what is no tensor, and of a class that overrides torch's functions or operators.

    Tensors that stand for others while torch traces take the operators of fastopt as well.
    """
    if type(x) in PLAIN:
        return False
    if not isinstance(x, Tensor):
        return True
    # A mode overrides functions for all tensors: torch.export's, where fake ones go to the ops.
    if _overridden(x) and type(x).__torch_function__ is not _NO_FUNCTION:
        return True
    if type(x).__torch_dispatch__ is _NO_DISPATCH:
        return False
    return not (isinstance(x, _TRACED) or _is_async(x))


def without_class(x: Any) -> Any:
    """A tensor of a class that takes nothing over, as one of torch's own class; else itself."""
    if type(x) in PLAIN or not isinstance(x, Tensor) or _overridden(x):
        return x
    return x.as_subclass(Tensor) if type(x).__torch_dispatch__ is _NO_DISPATCH else x


def _is_async(x: Tensor) -> bool:
    return (type(x).__module__, type(x).__name__) == _ASYNC


def opaque(x: Tensor) -> bool:
    """True of a layout that only torch's operators know: sparse, nested, batched by a transform."""
    return (
        x.layout != torch.strided
        or x.is_nested
        or torch._C._functorch.is_legacy_batchedtensor(x)
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def resolved(x: Tensor) -> Tensor:
    """The tensor itself, or what it stands for where memory of its own can hold that: the result of
    a collective, a view with its sign, zeros."""
    if isinstance(x, _TRACED):
        return x
    if _is_async(x):
        # A copy: autograd does not see what is written to the wrapper in the memory within.
        x = x.clone()
    if x._is_zerotensor():
        return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
    return x.resolve_neg()


def check(function: str, operands: Sequence[Operand]) -> None:
    """Raise RuntimeError where they are on different devices, or one is longer than its storage."""
    check_devices(function, operands)
    check_storages(function, operands)


def check_devices(function: str, operands: Sequence[Operand]) -> None:
    """Raise RuntimeError where they are on different devices."""
    given = [(name, x) for name, x in operands if x is not None]
    for name, x in given[1:]:
        first_name, first = given[0]
        if x.device != first.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{first.device} and {x.device}! ({function} got {_describe(first_name, first)} "
                f"and {_describe(name, x)}: move them to one device.)"
            )


def check_storages(function: str, operands: Sequence[Operand]) -> None:
    """Raise RuntimeError where one is longer than its storage."""
    for name, x in operands:
        if x is None or takes_over(x) or isinstance(x, _TRACED) or x.is_meta or opaque(x):
            continue
        nbytes, needed = x.untyped_storage().nbytes(), end_of(x)
        if nbytes < needed:
            raise RuntimeError(
                f"{function} got {_describe(name, x)}, which needs a storage of {needed} bytes and "
                f"has one of {nbytes}: it has been resized. Give it its size and values back first."
            )


def _describe(name: str, x: Tensor) -> str:
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{name} {tuple(x.shape)} {dtype} on {x.device}"
