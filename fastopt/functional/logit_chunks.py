"""Logits of a chunk of tokens at a time: their losses, and the gradients of a layer before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastopt import backend
from fastopt.functional.loss_terms import NONE, refuse_target, weights_of
from fastopt.functional.registry import compute_dtype


class Block(NamedTuple):
    """Rows of logits that are somebody's scratch: their gradient is written over them.

    logits: (N, C), contiguous; target: (N,) or (N, C); weight: (C,) in the compute type, or None
    terms: label smoothing, z_loss and softcap; z_share: of one
    element in the compute type, on a GPU, or None: what z_loss is multiplied by
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    terms: tuple[float, float, float]
    z_share: Tensor | None

    def losses(self, out: Tensor) -> Tensor:
        """Fill out, (N,) in the compute type; what `gradients` needs of each row."""
        x, target, weight, ignore_index, terms, z_share = self
        kernels, walk = backend.kernels_for(x, "rows.cross_entropy"), self._walk()
        probs = target.is_floating_point()
        if not backend.by_numba(x):
            stats = torch.empty_like(out)
            filled = (x, target, weight, out, stats, *walk)
            if probs:
                kernels.cross_entropy_probs(*filled, terms)
            else:
                kernels.cross_entropy(*filled, ignore_index, terms, z_share)
            return stats
        args = (x, target, weight, *walk, NONE)
        if probs:
            return kernels.cross_entropy_probs(*args, terms, out)  # type: ignore[no-any-return]
        stats, outside = kernels.cross_entropy(*args, ignore_index, terms, out)
        if outside is not None:
            refuse_target(outside, x.shape[1], ignore_index)
        return stats  # type: ignore[no-any-return]

    def gradients(self, stats: Tensor, dloss: Tensor) -> None:
        """dloss: (N,), or (1,) for all alike, in the compute type."""
        x, target, weight, ignore_index, terms, z_share = self
        kernels, args = (
            backend.kernels_for(x, "rows.cross_entropy"),
            (x, target, weight, stats, dloss, x),
        )
        if target.is_floating_point():
            kernels.cross_entropy_probs_backward(*args, *self._walk(), terms)
            return
        share = () if backend.by_numba(x) else (z_share,)
        kernels.cross_entropy_backward(*args, *self._walk(), ignore_index, terms, *share)

    def _walk(self) -> tuple[tuple[int, int, int], tuple[int, int]]:
        n_rows, n_cols = self.logits.shape
        return (n_rows, n_cols, 1), (n_cols, 1)


# Tokens a chunk, by device type. CPU, 4096 tokens x 32000 classes x 512 wide, float32, forward and
# backward, beside other work: 128, 256, 512, 1024 tokens are 0.73, 0.87, 1.07, 1.20 times as fast
# as linear + cross_entropy; more than 512 take more than a tenth of its memory. cuda: not measured.
CHUNK = {"cpu": 512, "cuda": 2048}


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


class Layer(NamedTuple):
    """x: (N, D); linear_weight: (C, D); linear_bias: (C,) or None; all of one dtype
    target: (N,) int64, or probabilities (N, C) of that dtype; weight: (C,) or None"""

    x: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    weight: Tensor | None


def chunk_of(x: Tensor) -> int:
    """Tokens a chunk, where the caller does not say."""
    return CHUNK["cpu" if x.is_cpu else "cuda"]


def walk(
    layer: Layer,
    ignore_index: int,
    terms: tuple[float, float, float],
    wanted: Sequence[bool],
    chunk: int,
    dloss: Tensor | None = None,
    z_share: Tensor | None = None,
) -> tuple[Tensor, Grads]:
    """(the loss of each token in the compute type, the gradients that are wanted).

    dloss: (N,), or None for ones; z_share: as `Block` has it; of linear_weight and
    linear_bias the gradients are sums in the compute type, of x they are of its dtype
    """
    x, linear_weight, target, linear_bias, weight = layer
    compute, n_tokens, n_classes = compute_dtype(x.dtype), len(x), len(linear_weight)
    result = torch.empty(n_tokens, dtype=compute, device=x.device)
    buffer = x.new_empty(min(chunk, n_tokens), n_classes)
    sums = Sums(layer, wanted, compute)
    weight = None if weight is None else weight.to(compute).contiguous()
    target, ones = target.contiguous(), result.new_ones(1)
    for first in range(0, n_tokens, chunk):
        rows = slice(first, min(first + chunk, n_tokens))
        logits = buffer[: rows.stop - first]
        if linear_bias is None:
            torch.mm(x[rows], linear_weight.t(), out=logits)
        else:
            torch.addmm(linear_bias, x[rows], linear_weight.t(), out=logits)
        block = Block(logits, target[rows], weight, ignore_index, terms, z_share)
        stats = block.losses(result[rows])
        if any(wanted):
            block.gradients(stats, ones if dloss is None else dloss[rows])
            sums.add(logits, rows)
    return result, sums.grads


class Sums:
    """The gradients of a layer, chunk by chunk of the gradient of its logits."""

    def __init__(self, layer: Layer, wanted: Sequence[bool], compute: torch.dtype) -> None:
        self.x, self.linear_weight, n_classes = (
            layer.x,
            layer.linear_weight,
            layer.linear_weight.shape[:1],
        )
        dx = layer.x.new_empty(layer.x.shape) if wanted[0] else None
        weights = (layer.linear_weight.shape, n_classes)
        dweight, dbias = (
            layer.x.new_zeros(shape, dtype=compute) if wants else None
            for shape, wants in zip(weights, wanted[1:], strict=True)
        )
        self.grads: Grads = (dx, dweight, dbias)

    def add(self, dlogits: Tensor, rows: slice) -> None:
        dx, dweight, dbias = self.grads
        if dx is not None:
            torch.mm(dlogits, self.linear_weight, out=dx[rows])
        if dweight is not None:
            _add_product(dweight, dlogits.t(), self.x[rows])
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=dbias.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def sum_of(x: Tensor, chunk: int) -> Tensor:
    """In float64 on CPU, chunk by chunk: torch sums more at once in an order that depends on the
    threads."""
    wide = torch.float64 if x.is_cpu else compute_dtype(x.dtype)
    if x.numel() <= chunk:
        return x.sum(dtype=wide)
    total = x.new_zeros((), dtype=wide)
    for part in torch.split(x, chunk):
        total = total + part.sum(dtype=wide)
    return total


def divisor_of(layer: Layer, ignore_index: int, chunk: int) -> Tensor:
    """The divisor of a sum of losses in their mean."""
    target, compute = layer.target, compute_dtype(layer.x.dtype)
    if target.is_floating_point():
        return sum_of(target.new_ones(len(target), dtype=compute), chunk)
    weight = None if layer.weight is None else layer.weight.to(compute)
    return sum_of(weights_of(target, weight, ignore_index).to(compute), chunk)
