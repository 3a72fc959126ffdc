"""What `bench/function_report.py` times: functions beside torch's own, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FunctionCase:
    """name: in the table, with the shape; inputs: made anew for each provider, alike for both

    ours, theirs: of the inputs, returning the tensor that backward starts from
    bytes_moved: what cannot be left out, forward, and forward + backward
    goal: times as fast, forward, and forward + backward
    """

    name: str
    dtype: torch.dtype
    inputs: Callable[[], Sequence[Tensor]]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    bytes_moved: tuple[int, int]
    goal: tuple[float, float]
