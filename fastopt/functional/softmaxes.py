"""softmax, log_softmax and logsumexp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from fastopt.functional.routing import (
    AS_NODE,
    AS_OP,
    BY_TORCH,
    DTYPES,
    autocast,
    by_torch,
    enter,
    widen,
)
from fastopt.functional.tracing import as_node
from fastopt.ops import softmax as ops


def softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = exp(x - max) / sum exp(x - max) over `dim`, of the shape of `input`.

    dtype: cast the input first. As torch.nn.functional.softmax, implicit `dim` and its warning
    included. Milakov & Gimelshein 2018, algorithm 2.
    """
    return _softmax(softmax, F.softmax, False, input, dim, _stacklevel, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = x - max - log sum exp(x - max) over `dim`, of the shape of `input`.

    dtype: cast the input first. As torch.nn.functional.log_softmax.
    """
    return _softmax(log_softmax, F.log_softmax, True, input, dim, _stacklevel, dtype)


def _softmax(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    log: bool,
    input: Tensor,
    dim: int | None,
    stacklevel: int,
    dtype: torch.dtype | None,
) -> Tensor:
    name = ours.__name__
    route, (input,) = enter(name, input)
    if route == AS_NODE:
        return as_node(ours, input, dim, stacklevel, dtype)
    stacklevel += 3  # the functions between the caller and torch's, which warns of dim=None
    if route == BY_TORCH:
        return by_torch(name, theirs, input, dim, stacklevel, dtype)
    x = input
    if dtype is None and autocast(name, x):
        x = widen(x)
    elif dtype in DTYPES and not x.is_complex():
        x = x.to(dtype)
    rank = x.dim() or 1
    if (
        type(dim) is not int
        or not -rank <= dim < rank
        or x.dtype not in DTYPES
        or dtype not in (None, x.dtype)
    ):
        return by_torch(name, theirs, input, dim, stacklevel, dtype)
    dim = dim % rank
    if route == AS_OP:
        result: Tensor = torch.ops.fastopt.softmax(x, dim, log)
        return result
    if torch.is_grad_enabled() and x.requires_grad:
        return ops.apply_softmax(x, dim, log)  # type: ignore[no-any-return]
    return ops.run_softmax(x, dim, log)


def logsumexp(input: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """log sum exp(x) over the dimensions `dim`, without overflow. As torch.logsumexp."""
    route, (input,) = enter("logsumexp", input)
    args = (input, dim, keepdim)
    if route == AS_NODE:
        return as_node(logsumexp, *args)
    if route == BY_TORCH:
        return by_torch("logsumexp", torch.logsumexp, *args)
    x = widen(input) if autocast("logsumexp", input) else input
    rank = x.dim()
    dims: list[Any] = list(dim) if isinstance(dim, (tuple, list)) else [dim]
    if (
        rank == 0
        or not dims
        or x.dtype not in DTYPES
        or not all(type(d) is int and -rank <= d < rank for d in dims)
        or len({d % rank for d in dims}) < len(dims)
    ):
        return by_torch("logsumexp", torch.logsumexp, *args)
    reduced = sorted(d % rank for d in dims)
    if route == AS_OP:
        result: Tensor = torch.ops.fastopt.logsumexp(x, reduced)[0]
    elif torch.is_grad_enabled() and x.requires_grad:
        result = ops.apply_logsumexp(x, reduced)
    else:
        result = ops.run_logsumexp(x, reduced)[0]
    if keepdim:
        for d in reduced:
            result = result.unsqueeze(d)
    return result
