"""How a call of a function runs: kernels at once, as ops of the dispatcher, or torch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy

from fastopt import backend

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_LOW = frozenset({torch.bfloat16, torch.float16})
_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})
_REFUSALS = frozenset({RuntimeError, TypeError, ValueError, IndexError, NotImplementedError})
# What autocast runs in float32, by device.
_AUTOCAST = {
    "cuda": {
        *("softmax", "log_softmax", "logsumexp", "cross_entropy"),
        *("layer_norm", "rms_norm", "group_norm"),
    },
    "cpu": {"cross_entropy"},
}
_jit_tracing: Callable[[], bool] = torch._C._is_tracing  # a kernel's writes are not in the trace
_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_n_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_overridden: Callable[..., bool] = torch.overrides.has_torch_function_variadic
_NOT_OVERRIDDEN = torch._C._disabled_torch_function_impl

# How a call runs: the kernels at once, as ops of the dispatcher, torch's own function, or as a node
# that torch.fx records (`tracing.as_node`).
DIRECT, AS_OP, BY_TORCH, AS_NODE = range(4)


def route_of(*tensors: Tensor | None) -> int:
    if torch.compiler.is_compiling():
        return BY_TORCH if _handed_over(tensors) or torch.onnx.is_in_onnx_export() else AS_OP
    if _jit_tracing() or _transforms_active() or forward_ad._current_level >= 0:
        return BY_TORCH
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not (tensor.is_cpu or tensor.is_cuda):
            return _route_others(tensors)
    return AS_OP if _n_dispatch_modes() else DIRECT


def _route_others(tensors: Sequence[Any]) -> int:
    """Where subclasses, or tensors of other devices, are among them."""
    if _handed_over(tensors):
        return AS_NODE if any(isinstance(x, Proxy) for x in tensors) else BY_TORCH
    for tensor in tensors:
        if type(tensor) in _PLAIN and not (tensor.is_cpu or tensor.is_cuda or tensor.is_meta):
            backend.kernels(tensor.device.type, "softmax")  # refuses
    return AS_OP


def _handed_over(tensors: Sequence[Any]) -> bool:
    """Whether these are no tensors, or of a class that takes torch's functions over."""
    for tensor in tensors:
        if tensor is None or type(tensor) in _PLAIN:
            continue
        if not isinstance(tensor, Tensor):
            return True
        # A mode overrides functions for all tensors: torch.export's, where fake ones go to the ops.
        if _overridden(tensor) and type(tensor).__torch_function__ is not _NOT_OVERRIDDEN:
            return True
    return False


def by_torch(name: str, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """torch's own function; where it refuses, its exception, with what fastopt supports."""
    try:
        return function(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if type(error) not in _REFUSALS:
            raise
        given = [arg for arg in args if isinstance(arg, (Tensor, torch.dtype))]
        came = ", ".join(_describe(x) if isinstance(x, Tensor) else str(x) for x in given)
        raise type(error)(
            f"{error} (fastopt.functional.{name} got {came}; it supports float32, bfloat16, "
            "float16 and float64 on CPU and CUDA)"
        ) from error


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def autocast(name: str, tensor: Tensor) -> bool:
    """Whether autocast wants this function in float32 here."""
    if tensor.is_cpu:
        return name in _AUTOCAST["cpu"] and torch.is_autocast_enabled("cpu")
    return name in _AUTOCAST["cuda"] and torch.is_autocast_enabled("cuda")


def widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _LOW else tensor
