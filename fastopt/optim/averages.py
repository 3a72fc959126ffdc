"""Running averages of parameters (ema_decay), and a model that holds them for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from fastopt.optim.passes import AVERAGED

if TYPE_CHECKING:
    from fastopt.optim.base import FusedOptimizer


@contextmanager
def averaged(optimizer: FusedOptimizer) -> Iterator[None]:
    """`FusedOptimizer.averaged`."""
    if not any(group.get("ema_decay") is not None for group in optimizer.param_groups):
        raise RuntimeError(f"construct {type(optimizer).__name__} with ema_decay to keep averages")
    held = optimizer.state
    pairs = [(p, held[p][AVERAGED]) for p in optimizer._all_params() if AVERAGED in held[p]]
    with torch.no_grad():
        kept = [param.clone() for param, _ in pairs]
        for param, average in pairs:
            param.copy_(average)
    try:
        yield
    finally:
        with torch.no_grad():
            for (param, _), own in zip(pairs, kept, strict=True):
                param.copy_(own)
