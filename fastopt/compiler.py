"""Code that torch.compile is to leave to Python, because it takes the addresses of tensors.

A tracer may split such code between an address and the launch that uses it, and a tensor that is
not used after its address was taken is freed in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def outside_dynamo(function: F) -> F:
    """A function that torch.compile leaves to Python with all it calls: one clean graph break.

    torch.compiler.disable does that too, but imports Dynamo, which takes the first step a second;
    so the code is marked where torch lets us.
    """
    frames: Any = torch._C._dynamo.eval_frame
    try:
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        frames.set_code_exec_strategy(function.__code__, skip)
    except AttributeError:
        return torch.compiler.disable(function)  # type: ignore[no-untyped-call, no-any-return]
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function
