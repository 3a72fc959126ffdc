"""Who computes a row function on the CPU: fastopt, ATen, and torch.compile of ATen's.

A provider gives the function that a user would call; one that has none says why in `NoStepError`,
and that reason is what the tables show.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch

from bench.providers import FASTOPT, NoStepError
from bench.row_ops import Function, torchs
from fastopt import functional

ATEN, COMPILE = "ATen", "torch.compile"


def ours(function: str) -> Function:
    """fastopt's public function."""
    found: Function = getattr(functional, function)
    return found


def _torch_compile(function: str) -> Function:
    """Compiled for one shape, as Inductor does best."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        raise NoStepError("torch.compile needs a C++ compiler, and there is none")
    # It counts the compilations of a function over the whole process, and soon refuses more.
    torch.compiler.reset()
    original = torchs(function)

    def call(*arguments: Any) -> Any:
        return original(*arguments)

    compiled: Function = torch.compile(call, dynamic=False)
    return compiled


PROVIDERS: dict[str, Callable[[str], Function]] = {
    FASTOPT: ours,
    ATEN: torchs,
    COMPILE: _torch_compile,
}
