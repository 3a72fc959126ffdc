"""The cases of batch_norm, instance_norm and group_norm: one layer of a network for images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from bench.function_cases import FunctionCase
from fastopt import functional

SHAPE, GROUPS = (32, 64, 56, 56), 32
FORMATS = {"": torch.contiguous_format, " channels_last": torch.channels_last}
# Times as fast as ATen, forward, and forward + backward, by function and dtype.
GOALS = {
    ("batch_norm", torch.float32): (4.0, 3.0),
    ("batch_norm", torch.bfloat16): (3.0, 3.0),
    ("instance_norm", torch.float32): (4.0, 3.0),
    ("instance_norm", torch.bfloat16): (3.0, 3.0),
    ("group_norm", torch.float32): (1.0, 1.5),
    ("group_norm", torch.bfloat16): (1.5, 1.5),
}
CHANNELS_LAST_GOAL = (3.0, 3.0)
# How each is called: x, weight, bias.
CALLS: dict[str, Callable[[Any], Callable[..., Tensor]]] = {
    "batch_norm": lambda f: lambda x, w, b: f.batch_norm(x, None, None, w, b, True),
    "instance_norm": lambda f: lambda x, w, b: f.instance_norm(x, None, None, w, b),
    "group_norm": lambda f: lambda x, w, b: f.group_norm(x, GROUPS, w, b),
}


def _inputs(dtype: torch.dtype, layout: torch.memory_format) -> Callable[[], Sequence[Tensor]]:
    def make() -> Sequence[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(SHAPE, generator=generator).to(dtype).contiguous(memory_format=layout)
        # ATen's batch_norm takes float32 weights beside 16-bit elements, its group_norm does not.
        weight, bias = torch.ones(SHAPE[1], dtype=dtype), torch.zeros(SHAPE[1], dtype=dtype)
        return [t.requires_grad_() for t in (x, weight, bias)]

    return make


def _case(name: str, dtype: torch.dtype, layout: str) -> FunctionCase:
    goal = CHANNELS_LAST_GOAL if layout and name == "group_norm" else GOALS[name, dtype]
    groups = f", {GROUPS} groups" if name == "group_norm" else ""
    nbytes = prod(SHAPE) * dtype.itemsize
    return FunctionCase(
        name=f"{name} {'x'.join(map(str, SHAPE))}{groups}{layout}",
        dtype=dtype,
        inputs=_inputs(dtype, FORMATS[layout]),
        ours=CALLS[name](functional),
        theirs=CALLS[name](F),
        # x and y; then dy and x, and dx.
        bytes_moved=(2 * nbytes, 5 * nbytes),
        goal=goal,
    )


CASES: list[FunctionCase] = [
    _case(name, dtype, layout) for name, dtype in GOALS for layout in FORMATS
]
