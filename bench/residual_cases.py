"""Residual norms and masked softmax beside torch's ops one after the other.

Traffic in tensors of x's size: an add norm reads x and residual, writes sum and y, 4; backward
reads dy, dsum and sum, writes the one gradient that x and residual share, 4, or with a dropout
both, 5. Masked softmax reads x, writes y, 2; backward reads dy and y, writes dx, 3; the mask, a
byte for twelve heads, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- the name torch's own documentation uses
from torch import Tensor

from bench.function_cases import FunctionCase
from fastopt import functional

ROWS, COLS = 4096, 4096
# Batch, heads, queries and keys; the mask is (8, 1, 512, 512), and drops a fifth.
SCORES, MASK = (8, 12, 512, 512), (8, 1, 512, 512)
EPS, P = 1e-5, 0.1
Norm = Callable[..., tuple[Tensor, Tensor]]


class _Joined(torch.autograd.Function):
    """y, whose backward brings the sum a gradient of its own, as the residual stream does."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, total: Tensor, dsum: Tensor) -> Tensor:
        ctx.dsum = dsum
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return dy, ctx.dsum, None


def _drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _norm_inputs(dtype: torch.dtype, biased: bool) -> Callable[[], Sequence[Tensor]]:
    def inputs() -> Sequence[Tensor]:
        x, residual, dsum = (_drawn(ROWS, COLS, dtype=dtype, seed=seed) for seed in range(3))
        weights = [_drawn(COLS, dtype=dtype, seed=seed) for seed in (3, 4)[: 1 + biased]]
        return [dsum, *(t.requires_grad_() for t in (x, residual, *weights))]

    return inputs


def _joined(norm: Norm) -> Callable[..., Tensor]:
    def call(dsum: Tensor, *inputs: Tensor) -> Tensor:
        joined: Tensor = _Joined.apply(*norm(*inputs), dsum)
        return joined

    return call


def _ours_rms(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return functional.add_rms_norm(x, residual, (COLS,), weight, EPS)


def _their_rms(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, (COLS,), weight, EPS), total


def _ours_layer(p: float) -> Norm:
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return functional.add_layer_norm(x, residual, (COLS,), weight, bias, EPS, p)

    return call


def _their_layer(p: float) -> Norm:
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = (F.dropout(x, p) if p else x) + residual
        return F.layer_norm(total, (COLS,), weight, bias, EPS), total

    return call


def _score_inputs(dtype: torch.dtype) -> Callable[[], Sequence[Tensor]]:
    def inputs() -> Sequence[Tensor]:
        kept = torch.rand(MASK, generator=torch.Generator().manual_seed(1)) < 0.8
        return [_drawn(*SCORES, dtype=dtype, seed=0).requires_grad_(), kept]

    return inputs


def _ours_softmax(x: Tensor, kept: Tensor) -> Tensor:
    return functional.scaled_masked_softmax(x, kept)


def _their_softmax(x: Tensor, kept: Tensor) -> Tensor:
    return torch.softmax(x.masked_fill(~kept, -torch.inf), -1)


def _moved(dtype: torch.dtype, n_elements: int, forward: int, backward: int) -> tuple[int, int]:
    nbytes = n_elements * dtype.itemsize
    return nbytes * forward, nbytes * (forward + backward)


def _cases(dtype: torch.dtype) -> list[FunctionCase]:
    norm, scores = f"{ROWS}x{COLS}", "x".join(map(str, SCORES))
    layer, rms = _norm_inputs(dtype, True), _norm_inputs(dtype, False)
    size = ROWS * COLS
    made = [
        ("add_rms_norm", rms, _joined(_ours_rms), _joined(_their_rms), 4, (2.5, 3.0)),
        ("add_layer_norm", layer, _joined(_ours_layer(0)), _joined(_their_layer(0)), 4, (1.3, 1.3)),
        (
            "add_layer_norm, dropout", layer, _joined(_ours_layer(P)), _joined(_their_layer(P)), 5,
            (1.3, 1.3),
        ),
    ]  # fmt: skip
    found = [
        FunctionCase(f"{name} {norm}", dtype, *rest, _moved(dtype, size, 4, backward), goal)
        for name, *rest, backward, goal in made
    ]
    moved = _moved(dtype, prod(SCORES), 2, 3)
    name = f"masked softmax {scores}, a mask for all heads"
    inputs, functions = _score_inputs(dtype), (_ours_softmax, _their_softmax)
    return [*found, FunctionCase(name, dtype, inputs, *functions, moved, (1.8, 1.5))]


CASES: list[FunctionCase] = [
    case for dtype in (torch.float32, torch.bfloat16) for case in _cases(dtype)
]
