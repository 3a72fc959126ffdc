"""Results so large that they leave past the caches: bit for bit what their parts alone are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastopt import functional, parametrizations
from fastopt_kernels.cpu.base import streaming_stores
from tests.rows.cases import draw

Call = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
# Rows of an odd size begin anywhere in a line of the cache.
ROWS, COLUMNS = 4110, 1031
TARGETS = torch.arange(ROWS) % COLUMNS


def _backward(function: Callable[[Tensor], Tensor]) -> Call:
    """What a function gives, and its gradient."""

    def call(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = function(x)
        upstream = dy[tuple(slice(n) for n in y.shape)]
        return y.detach(), torch.autograd.grad(y, x, upstream)[0]

    return call


def _add_norm(function: Callable[..., tuple[Tensor, Tensor]], dropout_p: float) -> Call:
    def call(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x, residual = x.detach().requires_grad_(), dy.detach().requires_grad_()
        y, total = function(x, residual, x.shape[-1:], dropout_p=dropout_p, seed=3)
        return y.detach(), total.detach(), *torch.autograd.grad(y, (x, residual), dy)

    return call


ROWWISE: dict[str, Call] = {
    "softmax": _backward(lambda x: functional.softmax(x, -1)),
    "log_softmax": _backward(lambda x: functional.log_softmax(x, -1)),
    "logsumexp": _backward(lambda x: functional.logsumexp(x, -1, keepdim=True)),
    "layer_norm": _backward(lambda x: functional.layer_norm(x, x.shape[-1:])),
    "rms_norm": _backward(lambda x: functional.rms_norm(x, x.shape[-1:])),
    "add_layer_norm": _add_norm(functional.add_layer_norm, 0.0),
    "masked softmax": _backward(
        lambda x: functional.scaled_masked_softmax(x, torch.arange(COLUMNS) % 3 > 0, 0.5)
    ),
    "weight_norm": _backward(lambda v: parametrizations.WeightNorm(0)(torch.ones(len(v), 1), v)),
}
COLUMNWISE: dict[str, Call] = {
    "softmax": _backward(lambda x: functional.softmax(x, 0)),
    "log_softmax": _backward(lambda x: functional.log_softmax(x, 0)),
    "logsumexp": _backward(lambda x: functional.logsumexp(x, 0, keepdim=True)),
}
# (images, channels, height, width): one set an image.
IMAGES = (32, 24, 76, 73)
CHANNELS: dict[str, Call] = {
    "instance_norm": _backward(functional.instance_norm),
    "group_norm": _backward(lambda x: functional.group_norm(x, 4)),
    "batch_norm": _backward(
        lambda x: functional.batch_norm(x, torch.ones(24), torch.ones(24), training=False)
    ),
}


def _draw(*shape: int) -> tuple[Tensor, Tensor]:
    x, dy = draw(*shape), draw(*shape, seed=1)
    assert x.nbytes >= streaming_stores.PAST > x.nbytes // 2
    return x, dy


def _same(call: Call, x: Tensor, dy: Tensor, dim: int) -> None:
    whole = call(x, dy)
    halves = [call(a, b) for a, b in zip(x.chunk(2, dim), dy.chunk(2, dim), strict=True)]
    for found, parts in zip(whole, zip(*halves, strict=True), strict=True):
        right = torch.cat(parts, dim if found.dim() == x.dim() else 0)
        assert torch.equal(found, right)


@pytest.mark.parametrize("name", ROWWISE)
def test_rows(name: str) -> None:
    _same(ROWWISE[name], *_draw(ROWS, COLUMNS), 0)


def test_targets_of_cross_entropy() -> None:
    """Targets in every place of a line, and of what is made at a time."""
    x, dy = _draw(ROWS, COLUMNS)

    def call(part: slice) -> tuple[Tensor, Tensor]:
        given = x[part].detach().requires_grad_()
        loss = functional.cross_entropy(given, TARGETS[part], reduction="none")
        return loss.detach(), torch.autograd.grad(loss, given, dy[part, 0])[0]

    whole, halves = call(slice(0, ROWS)), [call(slice(0, 2000)), call(slice(2000, ROWS))]
    for found, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(found, torch.cat(parts))


def test_a_dropped_row_keeps_its_gradients() -> None:
    """Two gradients are written beside each other, of two dtypes."""
    x, dy = _draw(ROWS, COLUMNS)
    call = _add_norm(functional.add_rms_norm, 0.25)
    whole, part = call(x.bfloat16(), dy), call(x[:1000].bfloat16(), dy[:1000])
    for found, right in zip(whole, part, strict=True):
        assert torch.equal(found[:1000], right)


@pytest.mark.parametrize("name", COLUMNWISE)
def test_columns(name: str) -> None:
    _same(COLUMNWISE[name], *_draw(1031, 4110), 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CHANNELS)
def test_channels(name: str, layout: torch.memory_format) -> None:
    x, dy = _draw(*IMAGES)
    _same(CHANNELS[name], *(t.contiguous(memory_format=layout) for t in (x, dy)), 0)
