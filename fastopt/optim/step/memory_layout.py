"""The layout of tensors in memory, and the staging of those that a kernel cannot walk.

A kernel walks p, g and the states of a parameter as flat arrays. That is right only where all of
them are dense and laid out alike; a tensor that is not is staged: copied into a buffer of the
reference layout before the launch, and back after it where the kernel wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastopt.storage import PLAIN, end_of

DTYPE_CODES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.complex64: "fp32",
    torch.complex128: "fp64",
}
# Of states alone: the low bits of a bf16 parameter, and the codes of 8-bit states.
INTEGERS = {torch.int16: "int16", torch.int8: "int8", torch.uint8: "uint8"}


def dtype_code(tensor: Tensor, role: str, integer: bool = False) -> str:
    """The codec of a tensor's elements; TypeError for a dtype without one.

    integer: that role is one of whole numbers
    """
    served = INTEGERS if integer else DTYPE_CODES
    if tensor.dtype in served:
        return served[tensor.dtype]
    raise TypeError(
        f"{role} has dtype {tensor.dtype}; fastopt supports "
        f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPE_CODES)}. "
        "Cast it, or leave it out of this optimizer."
    )


def numel(tensor: Tensor) -> int:
    """Real numbers in a tensor: a complex element is two."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def has_memory(tensor: Tensor) -> bool:
    """True where a kernel can be given this tensor's address (of a DTensor, its local part's).

    Meta, fake and zero tensors have none, and a subclass may mean something else by its memory:
    those are stepped by torch's own operators.
    """
    if is_dtensor(tensor):
        return has_memory(tensor._local_tensor)  # type: ignore[attr-defined]
    return (
        type(tensor) in PLAIN
        and tensor.device.type != "meta"
        and not tensor._is_zerotensor()
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)
    )


def check_storage(tensor: Tensor, role: str) -> None:
    """Refuse a tensor whose storage ends before its last element, as one that was freed does.

    Raises RuntimeError. Tensors without memory of their own (meta, fake, functional) pass.
    """
    if is_dtensor(tensor):
        tensor = tensor._local_tensor  # type: ignore[attr-defined]
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    else:
        parts = [tensor] if tensor.layout is torch.strided else []
    for part in parts:
        if type(part) not in PLAIN or part.is_meta or part._is_zerotensor():
            continue
        needed, held = end_of(part), part.untyped_storage().nbytes()
        if held < needed and not torch._is_functional_tensor(part):
            raise RuntimeError(
                f"{role} of shape {tuple(tensor.shape)} needs {needed} bytes of its storage, which "
                f"has {held}: the storage was freed or shrunk (untyped_storage().resize_). Nothing "
                "has been written. Restore the storage before step(), or clear the gradient."
            )


def local(tensor: Tensor) -> Tensor:
    """The plain tensor on this rank."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_grad(grad: Tensor, param: Tensor) -> Tensor:
    """The part of a gradient that belongs to this rank's part of the parameter."""
    if not is_dtensor(param):
        return grad
    if grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(  # type: ignore[attr-defined]
            param.device_mesh,  # type: ignore[attr-defined]
            param.placements,  # type: ignore[attr-defined]
        )
    return local(grad)


def is_lazy(tensor: Tensor) -> bool:
    """A negated or conjugated view: its memory holds the values of its base."""
    return tensor.is_neg() or tensor.is_conj()


def is_dense(tensor: Tensor) -> bool:
    """No gaps and no overlap: some order of the dimensions makes it contiguous."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """True where two tensors of one shape visit memory in the same order."""
    return same_walk(a.shape, a.stride(), b.stride())


def same_walk(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """True where two strides of one shape visit memory in the same order."""
    return 0 in shape or all(n == 1 or x == y for n, x, y in zip(shape, a, b, strict=True))


def extent(tensor: Tensor) -> tuple[int, int]:
    """First and last-plus-one byte a tensor may touch."""
    first = tensor.data_ptr()
    if tensor.numel() == 0:
        return first, first
    return first, first + end_of(tensor) - int(tensor.storage_offset()) * tensor.element_size()


def waves(tensors: Sequence[Tensor]) -> list[int]:
    """0 for a tensor that shares no memory with an earlier one, else one more than the latest
    such: torch updates those one after the other, one launch would let them race."""
    found = [0] * len(tensors)
    extents = [extent(tensor) for tensor in tensors]
    order = sorted(range(len(tensors)), key=lambda k: extents[k])
    cluster: list[int] = []
    end = -1
    for k in order:
        first, last = extents[k]
        if first >= end:
            cluster = []
        if first < last:
            cluster.append(k)
            end = max(end, last) if len(cluster) > 1 else last
            if len(cluster) > 1:
                for wave, one in enumerate(sorted(cluster)):
                    found[one] = wave
    return found


class Staged(NamedTuple):
    """A tensor that enters a launch through a buffer."""

    source: Tensor
    buffer: Tensor

    def read(self) -> None:
        self.buffer.copy_(self.source)

    def write(self) -> None:
        self.source.copy_(self.buffer)


def check_overlap(param: Tensor) -> None:
    """Refuse to write where one place in memory is several elements."""
    if torch._debug_has_internal_overlap(param) == 1:
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a "
            f"single memory location: a parameter of shape {tuple(param.shape)} has strides "
            f"{param.stride()}. Give the optimizer a clone, or the tensor it was expanded from."
        )


def reference(param: Tensor) -> Tensor:
    """A tensor laid out as the launch walks this parameter: itself where it is dense and its memory
    holds its values."""
    if is_dense(param) and not is_lazy(param):
        return param
    return torch.empty_like(param, memory_format=torch.contiguous_format)
