"""The route of a call: kernels at once, an op of the dispatcher, or torch's own function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Proxy

from fastopt import backend
from fastopt.functional import guards
from fastopt.functional.guards import in_memory
from fastopt.storage import PLAIN

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_LOW = frozenset({torch.bfloat16, torch.float16})
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
_is_compiling: Callable[[], bool] = torch.compiler.is_compiling
_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_n_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

# What each function calls the tensors it is given, in the order of `enter`.
_AFFINE, _RUNNING = ("weight", "bias"), ("running_mean", "running_var")
OPERANDS = {
    "softmax": ("input",),
    "log_softmax": ("input",),
    "logsumexp": ("input",),
    "scaled_masked_softmax": ("x", "mask"),
    "cross_entropy": ("input", "target", "weight"),
    "linear_cross_entropy": ("input", "linear_weight", "target", "linear_bias", "weight"),
    "layer_norm": ("input", *_AFFINE),
    "rms_norm": ("input", "weight"),
    "add_layer_norm": ("x", "residual", *_AFFINE),
    "add_rms_norm": ("x", "residual", "weight"),
    "batch_norm": ("input", *_RUNNING, *_AFFINE),
    "instance_norm": ("input", *_RUNNING, *_AFFINE),
    "group_norm": ("input", *_AFFINE),
    "dropout": ("seed",),
    "weight_norm": ("weight_g", "weight_v"),
    "spectral_norm": ("weight", "u", "v"),
}

# How a call runs: the kernels at once, as ops of the dispatcher, torch's own function, or as a node
# that torch.fx records (`tracing.as_node`).
DIRECT, AS_OP, BY_TORCH, AS_NODE = range(4)


def enter(function: str, *tensors: Tensor | None) -> tuple[int, tuple[Any, ...]]:
    """The route of a call with these tensors, and the tensors it is to take: what another tensor
    stands for is resolved, except where torch's own function runs.

    Raises RuntimeError where they are on different devices, one is longer than its storage, or
    there are no kernels for a device.
    """
    if _is_compiling():
        by_torch = _transforms_active() or _handed_over(tensors) or torch.onnx.is_in_onnx_export()
        return (BY_TORCH if by_torch else AS_OP), tensors
    transformed = _transforms_active() or forward_ad._current_level >= 0
    if not transformed and not _jit_tracing() and in_memory(tensors):
        return (AS_OP if _n_dispatch_modes() else DIRECT), tensors
    return _enter_others(function, tensors, transformed)


def _enter_others(
    function: str, tensors: tuple[Any, ...], transformed: bool
) -> tuple[int, tuple[Any, ...]]:
    """`enter` under a transform or a tracer, and for tensors that kernels cannot read as they
    lie."""
    if any(isinstance(x, Proxy) for x in tensors):
        return AS_NODE, tensors
    if _jit_tracing():  # sizes and offsets are tensors there, and would be recorded
        return BY_TORCH, tensors
    if not transformed:
        tensors = tuple(map(guards.without_class, tensors))
        if in_memory(tensors):
            return (AS_OP if _n_dispatch_modes() else DIRECT), tensors
    names = OPERANDS.get(function) or [f"tensor {k}" for k in range(len(tensors))]
    operands = list(zip(names, tensors, strict=True))
    guards.check_storages(f"fastopt's {function}", operands)
    if transformed or _handed_over(tensors):
        return BY_TORCH, tensors
    guards.check_devices(f"fastopt's {function}", operands)
    if any(x is not None and guards.opaque(x) for x in tensors):
        return BY_TORCH, tensors
    for x in tensors:
        if type(x) in PLAIN and not (x.is_cpu or x.is_cuda or x.is_meta):
            backend.kernels(x.device.type, "rows.softmax")  # refuses
    given = tuple(None if x is None else guards.resolved(x) for x in tensors)
    return (DIRECT if in_memory(given) and not _n_dispatch_modes() else AS_OP), given


def _handed_over(tensors: Sequence[Any]) -> bool:
    """True where any of these is no tensor, or of a class that overrides torch's functions."""
    return any(x is not None and guards.takes_over(x) for x in tensors)


def transformed(*tensors: Tensor | None) -> bool:
    """True where a transform of functorch or forward-mode AD hands a call to torch, not a class of
    tensors: an op's composed form may then take the place of torch's own function."""
    active = _transforms_active() or forward_ad._current_level >= 0
    return active and not _handed_over(tensors)


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


def are_numbers(*values: Any) -> bool:
    """True where all are floats or integers: torch's function says what is wrong with others."""
    return all(isinstance(value, (float, int)) for value in values)


def autocast(name: str, tensor: Tensor) -> bool:
    """True where autocast wants this function in float32."""
    if tensor.is_cpu:
        return name in _AUTOCAST["cpu"] and torch.is_autocast_enabled("cpu")
    return name in _AUTOCAST["cuda"] and torch.is_autocast_enabled("cuda")


def widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _LOW else tensor
