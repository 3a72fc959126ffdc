"""The dropout of the fused functions: which elements stay follows from a seed and their place.

    keep = hash(column; keys(seed, row)) < kept,  kept = 2^32 (1 - p),  y = x 2^32 / kept

The kernels compute the same hash (`fastopt_kernels/{cpu,gpu}/dropout.py`), so a mask is never
stored: the backward has the seed. What is here serves second derivatives and transforms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastopt.functional.routing import _describe, enter

_WORD = 0xFFFFFFFF


def odds(p: float) -> tuple[int, float]:
    """(kept, scale): of 2^32 elements so many stay, multiplied by what makes up for the others.

    p counts in steps of 2^-32, and the mean stays exactly what it was.
    """
    kept = min(round((1.0 - p) * 2**32), _WORD)
    return kept, 2.0**32 / kept if kept else 0.0


def draw_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """An int64 tensor on the device, of no dimensions; drawn from torch's default generator of that
    device where there is no seed."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.to(device).reshape(())
    return torch.full((), seed, dtype=torch.int64, device=device)


def _mix(h: Tensor) -> Tensor:
    h = (h ^ (h >> 16)) * 0x7FEB352D & _WORD
    h = (h ^ (h >> 15)) * 0x846CA68B & _WORD
    return h ^ (h >> 16)


def mask(seed: Tensor, n_rows: int, n_cols: int, p: float) -> Tensor:
    """(n_rows, n_cols), True where an element stays."""
    row, column = (torch.arange(n, device=seed.device) for n in (n_rows, n_cols))
    low, high = seed & _WORD, (seed >> 32) & _WORD
    high = _mix(high ^ _mix(low))
    low = _mix((low + high) & _WORD)
    first = _mix((row & _WORD) ^ low)
    second = _mix((first + high) & _WORD)
    h = (column ^ first[:, None]) * 0x9E3779B1 & _WORD
    h = (h ^ (h >> 16) ^ second[:, None]) * 0x85EBCA6B & _WORD
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & _WORD
    return h < odds(p)[0]


def dropped(x: Tensor, seed: Tensor | None, n_cols: int, p: float) -> Tensor:
    """x with what the dropout leaves of it, made of torch's operators; x: rows of n_cols, whatever
    its shape. Without a seed x itself."""
    if seed is None:
        return x
    keep = mask(seed, x.numel() // max(n_cols, 1), n_cols, p).view(x.shape)
    return torch.where(keep, x * odds(p)[1], 0.0)


def seed_of(
    name: str, p: float, training: bool, seed: int | Tensor | None, x: Tensor
) -> Tensor | None:
    """The seed of the dropout, None where nothing is dropped."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(
            f"dropout probability has to be between 0 and 1, but got {p} "
            f"(fastopt.functional.{name}: dropout_p is the share of x that is dropped)"
        )
    if isinstance(seed, Tensor):
        (seed,) = enter("dropout", seed)[1]
        assert isinstance(seed, Tensor)
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"fastopt.functional.{name} takes a seed of one int64, got {_describe(seed)}. Give "
                "it an int, such a tensor, or None."
            )
    elif seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(
            f"fastopt.functional.{name} takes a seed of 64 bits with a sign, got {seed}. "
            "Take it modulo 2**63."
        )
    return draw_seed(seed, x.device) if training and p > 0.0 else None
