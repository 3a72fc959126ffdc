"""softmax, losses and norms with the signatures of torch.nn.functional, as fused kernels.

Plain tensors on a device with kernels run through them. What a kernel cannot see into goes to
torch's own function: tensor subclasses, functorch transforms (vmap, jvp, grad) and forward-mode AD;
so their meaning is torch's. Under torch.compile, torch.export, fake tensors and dispatch modes the
functions are the ops torch.ops.fastopt.*.

All of them: float32, bfloat16, float16 and float64 on CPU and CUDA; any strides. Sums and
statistics are kept in float32 (float64 for float64). A result is bitwise the same in every run and
for any number of threads, and a row's does not depend on the other rows. NaN and infinity give what
they give in torch. What torch refuses is refused with torch's exception.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor
from torch.autograd import forward_ad

from fastopt import backend
from fastopt.ops import losses, norms
from fastopt.ops import softmax as softmaxes
from fastopt.ops.registry import compute_dtype

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_LOW = frozenset({torch.bfloat16, torch.float16})
_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})
_REFUSALS = frozenset({RuntimeError, TypeError, ValueError, IndexError, NotImplementedError})
# What autocast runs in float32, by device.
_AUTOCAST = {
    "cuda": {"softmax", "log_softmax", "logsumexp", "cross_entropy", "layer_norm", "rms_norm"},
    "cpu": {"cross_entropy"},
}
_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_n_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_overridden: Callable[..., bool] = torch.overrides.has_torch_function_variadic

# How a call runs: the kernels at once, as ops of the dispatcher, or torch's own function.
_DIRECT, _AS_OP, _BY_TORCH = range(3)


def _route(*tensors: Tensor | None) -> int:
    if torch.compiler.is_compiling():
        return _BY_TORCH if _handed_over(tensors) else _AS_OP
    if _transforms_active() or forward_ad._current_level >= 0:
        return _BY_TORCH
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not (tensor.is_cpu or tensor.is_cuda):
            return _route_others(tensors)
    return _AS_OP if _n_dispatch_modes() else _DIRECT


def _route_others(tensors: Sequence[Any]) -> int:
    """Where subclasses, or tensors of other devices, are among them."""
    if _handed_over(tensors):
        return _BY_TORCH
    for tensor in tensors:
        if type(tensor) in _PLAIN and not (tensor.is_cpu or tensor.is_cuda or tensor.is_meta):
            backend.kernels(tensor.device.type, "softmax")  # refuses
    return _AS_OP


def _handed_over(tensors: Sequence[Any]) -> bool:
    """Whether these are no tensors, or of a class that takes torch's functions over."""
    for tensor in tensors:
        if tensor is None or type(tensor) in _PLAIN:
            continue
        if not isinstance(tensor, Tensor) or _overridden(tensor):
            return True
    return False


def _by_torch(name: str, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
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


def _autocast(name: str, tensor: Tensor) -> bool:
    """Whether autocast wants this function in float32 here."""
    if tensor.is_cpu:
        return name in _AUTOCAST["cpu"] and torch.is_autocast_enabled("cpu")
    return name in _AUTOCAST["cuda"] and torch.is_autocast_enabled("cuda")


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _LOW else tensor


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = exp(x - max) / sum exp(x - max) over `dim`, of the shape of `input`.

    dtype: cast the input first. As torch.nn.functional.softmax, implicit `dim` and its warning
    included. Milakov & Gimelshein 2018, algorithm 2.
    """
    return _softmax("softmax", F.softmax, False, input, dim, _stacklevel, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = x - max - log sum exp(x - max) over `dim`, of the shape of `input`.

    dtype: cast the input first. As torch.nn.functional.log_softmax.
    """
    return _softmax("log_softmax", F.log_softmax, True, input, dim, _stacklevel, dtype)


def _softmax(
    name: str,
    theirs: Callable[..., Tensor],
    log: bool,
    input: Tensor,
    dim: int | None,
    stacklevel: int,
    dtype: torch.dtype | None,
) -> Tensor:
    stacklevel += 3  # the functions between the caller and torch's, which warns of dim=None
    route = _route(input)
    if route == _BY_TORCH:
        return _by_torch(name, theirs, input, dim, stacklevel, dtype)
    x = input
    if dtype is None and _autocast(name, x):
        x = _float(x)
    elif dtype in DTYPES and not x.is_complex():
        x = x.to(dtype)
    rank = x.dim() or 1
    if (
        type(dim) is not int
        or not -rank <= dim < rank
        or x.dtype not in DTYPES
        or dtype not in (None, x.dtype)
    ):
        return _by_torch(name, theirs, input, dim, stacklevel, dtype)
    dim = dim % rank
    if route == _AS_OP:
        result: Tensor = torch.ops.fastopt.softmax(x, dim, log)
        return result
    if torch.is_grad_enabled() and x.requires_grad:
        return softmaxes.apply_softmax(x, dim, log)  # type: ignore[no-any-return]
    return softmaxes.run_softmax(x, dim, log)


def logsumexp(input: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """log sum exp(x) over the dimensions `dim`, without overflow. As torch.logsumexp."""
    args = (input, dim, keepdim)
    route = _route(input)
    if route == _BY_TORCH:
        return _by_torch("logsumexp", torch.logsumexp, *args)
    x = _float(input) if _autocast("logsumexp", input) else input
    rank = x.dim()
    dims: list[Any] = list(dim) if isinstance(dim, (tuple, list)) else [dim]
    if (
        rank == 0
        or not dims
        or x.dtype not in DTYPES
        or not all(type(d) is int and -rank <= d < rank for d in dims)
        or len({d % rank for d in dims}) < len(dims)
    ):
        return _by_torch("logsumexp", torch.logsumexp, *args)
    reduced = sorted(d % rank for d in dims)
    if len(reduced) > 1:  # move them to the end and take them as one
        kept = [d for d in range(rank) if d not in reduced]
        x = x.permute(*kept, *reduced).flatten(len(kept))
    at = reduced[0] if len(reduced) == 1 else x.dim() - 1
    if route == _AS_OP:
        result: Tensor = torch.ops.fastopt.logsumexp(x, at)[0]
    elif torch.is_grad_enabled() and x.requires_grad:
        result = softmaxes.apply_logsumexp(x, at)
    else:
        result = softmaxes.run_logsumexp(x, at)[0]
    if keepdim:
        for d in reduced:
            result = result.unsqueeze(d)
    return result


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The cross entropy of logits, without ever writing their softmax.

        class indices  (1 - s) w_t (logsumexp(x) - x_t) + s / C sum_c w_c (logsumexp(x) - x_c)
        probabilities  sum_c w_c ((1 - s) q_c + s / C) (logsumexp(x) - x_c)

    input: (C), (N, C) or (N, C, d1, ...); target: int64 without C, or probabilities of input's
    shape and dtype; weight: (C). reduction "mean" divides by the weights of the targets that
    count. As torch.nn.functional.cross_entropy; a target out of range is an IndexError on CPU and
    a NaN on CUDA. Szegedy et al. 2016, section 7, for label smoothing.
    """
    args = (input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    route = _route(input, target, weight)
    if route == _BY_TORCH:
        return _by_torch("cross_entropy", F.cross_entropy, *args)
    x = input
    if _autocast("cross_entropy", x):
        x, weight = _float(x), None if weight is None else _float(weight)
        target = _float(target)
    if (
        size_average is not None
        or reduce is not None
        or reduction not in losses.REDUCTIONS
        or not 0.0 <= label_smoothing <= 1.0
        or not _loss_fits(x, target, weight, ignore_index)
    ):
        return _by_torch("cross_entropy", F.cross_entropy, *args)
    options = (losses.REDUCTIONS[reduction], ignore_index, float(label_smoothing))
    if route == _AS_OP:
        result: Tensor = torch.ops.fastopt.cross_entropy(x, target, weight, *options)[0]
        return result
    if torch.is_grad_enabled() and x.requires_grad:
        return losses.apply_cross_entropy(x, target, weight, *options)  # type: ignore[no-any-return]
    return losses.run_cross_entropy(x, target, weight, *options)[0]


def _loss_fits(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> bool:
    """Whether kernels take these: what they do not is torch's to do, or to refuse."""
    sizes = x.shape
    if x.dtype not in DTYPES or not sizes or x.device != target.device:
        return False
    dim = 0 if len(sizes) == 1 else 1
    if sizes[dim] == 0:
        return False
    if weight is not None and (
        weight.shape != (sizes[dim],)
        or weight.dtype not in DTYPES
        or weight.device != x.device
        or weight.requires_grad
    ):
        return False
    if target.dtype == torch.int64:
        return target.shape == sizes[:dim] + sizes[dim + 1 :]
    if target.shape == sizes and target.dtype == x.dtype:
        # Beside probabilities torch refuses an index to ignore.
        return not target.requires_grad and ignore_index < 0
    return False


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x - mean) / sqrt(mean((x - mean)^2) + eps) weight + bias over the last dimensions.

    normalized_shape: those dimensions, the shape of weight and bias too, which may be of another
    dtype than the input; the result is of the input's. As torch.nn.functional.layer_norm.
    Ba, Kiros & Hinton 2016, equation 4.
    """
    route, x, shape = _route(input, weight, bias), input, _as_shape(normalized_shape)
    if (
        route == _BY_TORCH
        or not isinstance(eps, (float, int))
        or not _affine_fits(x, shape, weight, bias)
    ):
        return _by_torch("layer_norm", F.layer_norm, input, normalized_shape, weight, bias, eps)
    if _autocast("layer_norm", x):
        x = _float(x)
        weight, bias = (None if t is None else _float(t) for t in (weight, bias))
    if route == _AS_OP:
        result: Tensor = torch.ops.fastopt.layer_norm(x, weight, bias, len(shape), eps)[0]
        return result
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return norms.apply_layer_norm(x, weight, bias, len(shape), eps)  # type: ignore[no-any-return]
    return norms.run_layer_norm(x, weight, bias, len(shape), eps, False)[0]


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) weight over the last dimensions.

    normalized_shape: those dimensions, the shape of weight too, which may be of another dtype than
    the input; the result is of the input's. eps: the machine epsilon of the type it is computed in
    unless given. As torch.nn.functional.rms_norm. Zhang & Sennrich 2019, equation 4.
    """
    route, x, shape = _route(input, weight), input, _as_shape(normalized_shape)
    if (
        route == _BY_TORCH
        or not isinstance(eps, (float, int, type(None)))
        or not _affine_fits(x, shape, weight, None)
    ):
        return _by_torch("rms_norm", F.rms_norm, input, normalized_shape, weight, eps)
    if _autocast("rms_norm", x):
        x, weight = _float(x), None if weight is None else _float(weight)
    if eps is None:
        eps = torch.finfo(compute_dtype(x.dtype)).eps
    if route == _AS_OP:
        result: Tensor = torch.ops.fastopt.rms_norm(x, weight, len(shape), eps)[0]
        return result
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad)
    ):
        return norms.apply_rms_norm(x, weight, len(shape), eps)  # type: ignore[no-any-return]
    return norms.run_rms_norm(x, weight, len(shape), eps, False)[0]


def _as_shape(shape: Any) -> tuple[int, ...]:
    """Empty for what is no shape, which torch refuses."""
    return tuple(shape) if isinstance(shape, (tuple, list)) else ()


def _affine_fits(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> bool:
    """Whether kernels take these: what they do not is torch's to do, or to refuse."""
    if not shape or x.dtype not in DTYPES or x.shape[-len(shape) :] != shape:
        return False
    for tensor in (weight, bias):
        if tensor is not None and (
            tensor.shape != shape or tensor.dtype not in DTYPES or tensor.device != x.device
        ):
            return False
    return True
