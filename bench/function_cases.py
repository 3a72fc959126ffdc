"""Functions beside torch's own, forward and backward, in `bench/*_cases.py`: one list a family."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def discover() -> list[FunctionCase]:
    """The cases of every module `bench.*_cases` that has a list CASES of them."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(f"bench.{n}") for n in names if n.endswith("_cases")]
    listed = [case for module in modules for case in getattr(module, "CASES", ())]
    return [case for case in listed if isinstance(case, FunctionCase)]
